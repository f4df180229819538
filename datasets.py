"""Images, from files or drawn by the program, to batches: data sets, transforms, loaders, mixup.

A data set gives (image, label) for an index and has `classes`, a list of names. Training asks for (epoch, position,
index) instead; its augmentation is a function of (seed, epoch, position), so any number of workers gives the same bits.
"""

import argparse
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, Mixup, create_transform, resolve_data_config
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode

import models
from samplers import REPEATS, RepeatedAugSampler, eval_shard
from shapes import Shapes
from utils import InputError, at_least, say, seed_all

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # it is deprecated, for a package of its own; without it Pillow decodes, which takes longer
    decode_jpeg = None

DATA_SETS = ('IMNET', 'CIFAR', 'CIFAR10', 'INAT', 'INAT19', 'SHAPES')
INTERPOLATIONS = ('random', 'bilinear', 'bicubic')
INAT_LEVELS = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')

# Up to this size images are small already: training crops them from a padded border, and evaluation takes them whole.
SMALL = 32
PADDING = 4
CROP_MODES = ('center', 'squash', 'border')

# What Pillow may take a file for, whatever its name is. Others, EPS above all, start programs or rarely used parsers.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF')
# Judged by the header, before pixels are decoded: they take 4 bytes each, and a side of 1 would be resized like any.
MAX_PIXELS = 2**26
MAX_ASPECT = 100


# Flags that may differ between a run and its continuation, and whether it goes on bit for bit even so.
MAY_CHANGE = dict.fromkeys(('data_path', 'num_workers', 'pin_mem', 'max_broken_images', 'dist_eval'), True)


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of data, augmentation and loading."""
    group = parser.add_argument_group('data')
    group.add_argument('--data-path', default='.', help='folder that holds the data set; SHAPES needs none')
    group.add_argument(
        '--data-set', default='IMNET', choices=DATA_SETS,
        help='IMNET: folders train/CLASS/ and val/CLASS/ of images; CIFAR is CIFAR-100; SHAPES is drawn by the program',
    )  # fmt: skip
    group.add_argument('--inat-category', default='name', choices=INAT_LEVELS, help='level of iNaturalist classes')
    group.add_argument('--batch-size', type=at_least(1), default=64, help='images of one process in one step')
    group.add_argument('--num_workers', type=int, default=10, help='loading processes, at most the cores at hand')
    group.add_argument('--pin-mem', action=argparse.BooleanOptionalAction, default=True, help='used with CUDA alone')
    group.add_argument(
        '--max-broken-images', type=int, default=0, metavar='N',
        help='let each process replace up to N unreadable training images by their neighbours; never in evaluation',
    )  # fmt: skip
    group.add_argument('--dist-eval', action='store_true', help='accepted; evaluation is always shared out, exactly')

    group = parser.add_argument_group(
        'preprocessing', 'Without a flag, the configuration of the model; it is printed at the start.'
    )
    group.add_argument('--input-size', type=int, metavar='PX', help='side of the images')
    group.add_argument('--mean', type=float, nargs='+', metavar='M', help='of pixels from 0 to 1, one or one a channel')
    group.add_argument('--std', type=float, nargs='+', metavar='S', help='of pixels, one or one a channel')
    group.add_argument(
        '--crop-pct', type=float, metavar='P', help='evaluation crops this share of a resized side (1 up to 32 px)'
    )
    group.add_argument('--crop-mode', choices=CROP_MODES, help='of evaluation, as in timm')
    group.add_argument('--interpolation', choices=INTERPOLATIONS[1:], help='of evaluation')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--repeated-aug', action=argparse.BooleanOptionalAction, default=True, help='three times each')
    group.add_argument('--color-jitter', type=float, default=0.4, help='strength, where --aa is off')
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help="timm's policy, rand-..., original, ...; '' is off")
    group.add_argument('--train-interpolation', default='bicubic', choices=INTERPOLATIONS, help='of crops')
    group.add_argument(
        '--fast-decode', action=argparse.BooleanOptionalAction, default=True,
        help='decode, crop and resize JPEGs in faster ways; off, training sees the exact pixels, as evaluation always',
    )  # fmt: skip
    group.add_argument('--reprob', type=float, default=0.25, help='probability of erasing a rectangle')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='what fills it')
    group.add_argument('--recount', type=int, default=1, help='most rectangles in an image')
    group.add_argument('--resplit', action='store_true', help='accepted; there are no augmentation splits')

    group = parser.add_argument_group('mixing of images and labels')
    group.add_argument('--mixup', type=float, default=0.8, help='alpha of mixup, 0 is off')
    group.add_argument('--cutmix', type=float, default=1.0, help='alpha of cutmix, 0 is off')
    group.add_argument('--cutmix-minmax', type=float, nargs=2, metavar='RATIO', help='sides; replaces --cutmix')
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of either')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, help='probability of cutmix where both are on')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares a mixture')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')


# --- image files


class DecodeError(Exception):
    """An image file is damaged, or holds what cannot be shown as RGB."""


@contextmanager
def _decoding():
    """DecodeError for whatever Pillow raises: its readers raise a dozen kinds of errors for damaged files."""
    try:
        yield
    except (UnidentifiedImageError, DecodeError):
        raise
    except Exception as error:
        raise DecodeError(str(error) or type(error).__name__) from error


@_decoding()
def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image file: pixels are what torchvision's loader gives, except where that is wrong.

    Transparent ones become white, and 16 bits are scaled, not clipped. An orientation in EXIF is not applied: published
    accuracies were measured without. DecodeError for damaged files, and for pixels without a known range.
    """
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert('RGB')
    if image.mode in ('I', 'F'):
        raise ValueError(f'pixels of mode {image.mode} have no known range')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    image.load()
    return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy


def load_image(path: str | Path, decode: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """Read an image file by `decode`; InputError that names the path where it is damaged, too large, or of another
    kind.

    Other errors of `decode` are errors of this program, and are raised as they are.
    """
    try:
        with open(path, 'rb') as file:
            return decode(_open_image(file))
    except UnidentifiedImageError as error:
        raise InputError(f'{path} holds no image in a format that is read here ({", ".join(FORMATS)})') from error
    except (OSError, DecodeError) as error:
        raise InputError(f'{path} cannot be read: {error}') from error


@_decoding()
def _open_image(file: BinaryIO) -> Image.Image:
    """The image in a file, its header read and its pixels not yet; DecodeError where they would be too many."""
    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError(
            f'{width} x {height} pixels; at most {MAX_PIXELS:,} are read, and sides up to 1 : {MAX_ASPECT}'
        )
    return image


class DecodeCrop:
    """timm's random crop of an image file that is not decoded yet, by faster ways to the same pixels.

    The crop is the one that `crop` would draw, as the size stands in the header. torchvision decodes to Pillow's
    pixels, and torch resizes to them but for rounding, 2 of 255 at most. A JPEG whose crop is at least twice as large
    as the output is decoded at 1/2, 1/4 or 1/8, which JPEG's own transform does for less work; its low-pass filter
    differs a little, as in all loaders that do this.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        size, interpolation = self.crop.size, self.crop.interpolation
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        if isinstance(interpolation, Sequence):
            interpolation = random.choice(interpolation)
        columns, rows = image.size
        # timm rounds a crop of an image of a few pixels down to nothing.
        top, left, height, width = min(top, rows - 1), min(left, columns - 1), max(height, 1), max(width, 1)
        shrink = min(height // size[0], width // size[1])
        if shrink > 1:
            image.draft(None, (columns // shrink, rows // shrink))
        if image.size != (columns, rows):
            shrink = round(columns / image.size[0])
            box = np.array([left, top, left + width, top + height]) / shrink
            outer = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])])  # resize would look beyond the box
            image = to_rgb(image).crop(tuple(outer.astype(int)))
            return image.resize(size[::-1], Image.Resampling[interpolation.name], tuple(box - np.tile(outer[:2], 2)))
        pixels = None
        if decode_jpeg and image.format == 'JPEG' and image.mode in ('L', 'RGB'):
            image.fp.seek(0)
            with suppress(RuntimeError):  # Pillow reads some files that are not quite right, and names what is wrong
                pixels = decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), ImageReadMode.RGB)
        if pixels is None:
            pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        pixels = pixels[None, :, top : top + height, left : left + width]
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # three times faster to resize
        pixels = F.interpolate(pixels, size, mode=interpolation.value, antialias=True)
        return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


class ImageFiles(Dataset):
    """Image files: `samples` is a list of (path, label), `classes` names the labels; `read` gives a path's image."""

    def __init__(
        self, samples: list[tuple[str, int]], classes: list[str], transform: Callable, read: Callable = load_image
    ):
        self.samples, self.classes, self.transform, self.read = samples, classes, transform, read
        for path, label in samples:
            if not 0 <= label < len(classes):
                raise InputError(f'{path} has label {label}, but there are {len(classes)} classes, counted from 0')

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return self.transform(self.read(path)), label

    def __len__(self) -> int:
        return len(self.samples)


def image_folder(
    root: Path,
    transform: Callable,
    read: Callable = load_image,
    classes: list[str] | None = None,
    num_classes: int | None = None,
) -> ImageFiles:
    """Images in one folder for each class, labelled in the order of the names; hidden files and folders are left out.

    `classes` are those of training, where known: labels then go by name; some folders may be missing, none unknown.
    Where only their number is known, see `name_classes`. Raises InputError where folders or images are missing.
    """
    if not root.is_dir():
        raise _missing(root, 'a folder with a folder of images for each class')
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    hidden = [name for name in folders if name.startswith('.')]
    found = [name for name in folders if not name.startswith('.')]
    if hidden:
        say(f'{root}: left out hidden folders: {_some(hidden)}')
    if not found:
        raise InputError(f'{root} holds no class folders; it holds {_some(os.listdir(root))}')
    if classes is None:
        classes = found if num_classes is None else name_classes(root, found, num_classes)
    if unknown := sorted(set(found) - set(classes)):
        raise InputError(f'{root} holds {len(unknown)} classes that training lacks: {_some(unknown)}')
    if absent := sorted(set(classes) - set(found)):
        say(f'{root}: no images of {len(absent)} of {len(classes)} classes: {_some(absent)}')

    def is_shown(path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and f'{os.sep}.' not in path[len(str(root)) :]

    labels = {name: i for i, name in enumerate(classes)}
    samples = make_dataset(root, labels, is_valid_file=is_shown, allow_empty=True)
    filled = {label for _, label in samples}
    if empty := [name for name in found if labels[name] not in filled]:
        there = _some(os.listdir(root / empty[0]))
        raise InputError(f'{root}: no images in {_some(empty)}; {root / empty[0]} holds {there}')
    return ImageFiles(samples, classes, transform, read)


def name_classes(root: Path, folders: list[str], num_classes: int) -> list[str]:
    """The classes of a checkpoint that does not name them: ImageNet's, or else the class folders in `root` in order.

    Raises InputError where neither fits.
    """
    synsets = ImageNetInfo().label_names()
    unknown = sorted(set(folders) - set(synsets))
    if num_classes == len(synsets) and not unknown:
        return synsets
    if num_classes == len(folders):
        say(f'{root}: the checkpoint does not name its {num_classes} classes; taken for these folders in sorted order')
        return folders
    why = f'; {len(unknown)} folders are not named by an ImageNet synset: {_some(unknown)}'
    raise InputError(
        f'the checkpoint has {num_classes} classes and does not name them, {root} holds {len(folders)} class folders'
        + (why if num_classes == len(synsets) else '')
    )


def compare_classes(trained: Sequence[str], found: Sequence[str]) -> str:
    """How the classes of a data set differ from those of training, in words; '' where they are the same."""
    if list(trained) == list(found):
        return ''
    lacking, new = sorted(set(trained) - set(found)), sorted(set(found) - set(trained))
    if not lacking and not new:
        return 'the same names in another order'
    return f'the data lacks {len(lacking)} ({_some(lacking)}) and has {len(new)} others ({_some(new)})'


def inaturalist(
    root: Path, split: str, year: int, level: str, transform: Callable, read: Callable = load_image
) -> ImageFiles:
    """iNaturalist from `{split}{year}.json` and `categories.json`; classes are the names at `level`, in that order.

    The published code orders them by first appearance in the training list, which evaluation should not need. Raises
    InputError for a path outside `root`, a category that is not in the list, or a level that categories lack.
    """
    for name in (file := f'{split}{year}.json', 'categories.json'):
        if not (root / name).is_file():
            raise _missing(root / name, f"iNaturalist's {file} and categories.json")
    listing, categories = (json.loads((root / name).read_text()) for name in (file, 'categories.json'))
    lacking = [category['id'] for category in categories if level not in category]
    if lacking:
        raise InputError(f'{root / "categories.json"}: {len(lacking)} categories lack a {level}, first id {lacking[0]}')
    names = {category['id']: category[level] for category in categories}
    classes = list(dict.fromkeys(names.values()))
    label = {name: i for i, name in enumerate(classes)}
    category = {annotation['image_id']: annotation['category_id'] for annotation in listing['annotations']}
    samples = []
    for image in listing['images']:
        path = PurePosixPath(image['file_name'])
        if path.is_absolute() or '..' in path.parts:
            raise InputError(f'{root / file} names a path outside {root}: {path}')
        if (number := category.get(image['id'])) not in names:
            raise InputError(
                f'{root / file}: {path} has category {number}, none of the {len(names)} in categories.json'
            )
        samples.append((str(root / path), label[names[number]]))
    if samples and not os.path.exists(samples[0][0]):
        raise _missing(Path(samples[0][0]), f'the images that {file} lists')
    return ImageFiles(samples, classes, transform, read)


def _missing(path: Path, expected: str) -> InputError:
    path = path.absolute()
    folder = next(parent for parent in path.parents if parent.is_dir())
    return InputError(f'{path} does not exist: expected {expected}; {folder} holds {_some(os.listdir(folder))}')


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(sorted(names)[:most]) + more if names else 'nothing'


# --- transforms, data sets, loaders


class DataConfig(NamedTuple):
    """What a model expects of its images; the names are those of the flags.

    Images are square, `input_size` pixels a side. Pixels of 0 to 1 are normalised by `mean` and `std`. Evaluation
    resizes to input_size / crop_pct by `interpolation`, and crops; `crop_mode` is timm's.
    """

    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    interpolation: str


def data_config(args: argparse.Namespace, model_name: str) -> DataConfig:
    """The data configuration of the model of the flags, with what other flags say in its place.

    Raises InputError for values that make no sense, and models that do not take square images with three channels.
    """
    cfg = models.published_cfg(model_name)
    flags = {name: getattr(args, name) for name in DataConfig._fields}
    _check_config(flags)
    if flags['input_size'] is not None:
        flags['input_size'] = 3, args.input_size, args.input_size
    found = resolve_data_config(flags, cfg.to_dict())
    channels, rows, columns = found['input_size']
    if cfg.input_size[0] != 3 or channels != 3 or rows != columns:
        size = ' x '.join(map(str, cfg.input_size))
        raise InputError(f'{model_name} takes images of {size}; expected 3 channels and a square (--input-size)')
    if found['crop_mode'] not in CROP_MODES:
        raise InputError(f'{model_name} has crop_mode {found["crop_mode"]}; expected one of {", ".join(CROP_MODES)}')
    if args.crop_pct is None and rows <= SMALL:
        found['crop_pct'] = 1.0
    return DataConfig(**found | {'input_size': rows})


def _check_config(flags: dict):
    for name in ('mean', 'std'):
        if flags[name] is not None and len(flags[name]) not in (1, 3):
            raise InputError(f'--{name}: expected one number or three, found {len(flags[name])}')
    if min(flags['std'] or [1]) <= 0:
        raise InputError(f'--std: expected numbers above 0, found {flags["std"]}')
    if flags['crop_pct'] is not None and not 0 < flags['crop_pct'] <= 1:
        raise InputError(f'--crop-pct: expected a share above 0 and up to 1, found {flags["crop_pct"]}')
    if flags['input_size'] is not None and flags['input_size'] < 1:
        raise InputError(f'--input-size: expected 1 or more, found {flags["input_size"]}')


def describe(config: DataConfig) -> str:
    """A line about the data configuration."""
    mean, std = (' '.join(f'{value:g}' for value in values) for values in (config.mean, config.std))
    return (
        f'images: {config.input_size} px, evaluated at crop_pct {config.crop_pct:g} ({config.crop_mode}), '
        f'{config.interpolation}, mean {mean}, std {std}'
    )


class ToTensor:
    """RGB image to a normalised tensor (3, height, width): torchvision's ToTensor and Normalize, in half the time."""

    def __init__(self, config: DataConfig):
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std)


def build_transform(train: bool, args: argparse.Namespace, config: DataConfig) -> Callable[[Image.Image], torch.Tensor]:
    """RGB image of any size to a normalised tensor (3, input size, input size), augmented for training."""
    if train:
        return train_transform(config, args)
    steps = create_transform(**config._asdict()).transforms
    return transforms.Compose([*steps[:-2], ToTensor(config)])  # in place of timm's ToTensor and Normalize


def train_transform(config: DataConfig, args: argparse.Namespace) -> transforms.Compose:
    """timm's augmentation as the flags want it, ending in a normalised tensor (3, input size, input size)."""
    size = config.input_size
    transform = create_transform(
        size,
        is_training=True,
        mean=config.mean,
        std=config.std,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    steps = transform.transforms
    if size <= SMALL:
        crop = transforms.RandomCrop(size, padding=PADDING)
        steps[0] = transforms.Compose([transforms.Resize(size, InterpolationMode.BICUBIC), crop])
    end = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    steps[end : end + 2] = [ToTensor(config)]  # in place of it and of Normalize
    return transform


def build_dataset(
    args: argparse.Namespace,
    config: DataConfig,
    train: bool,
    classes: list[str] | None = None,
    num_classes: int | None = None,
) -> Dataset:
    """Data set of the flags, transformed.

    `classes` are those of training, and `num_classes` their number, where known: evaluation then has the same labels.
    Raises InputError where the data set has others.
    """
    root, split = Path(args.data_path).expanduser(), 'train' if train else 'val'
    transform, read = build_transform(train, args, config), load_image
    size = config.input_size
    files = args.data_set in ('IMNET', 'INAT', 'INAT19')
    if files and train and args.fast_decode and size > SMALL:
        read = partial(load_image, decode=DecodeCrop(transform.transforms.pop(0)))
    if args.data_set == 'IMNET':
        return image_folder(root / split, transform, read, classes, num_classes)
    if args.data_set == 'SHAPES':
        dataset = Shapes(split, size, transform=transform)
    elif args.data_set in ('INAT', 'INAT19'):
        year = 2018 if args.data_set == 'INAT' else 2019
        dataset = inaturalist(root, split, year, args.inat_category, transform, read)
    else:
        dataset = cifar(root, train, CIFAR10 if args.data_set == 'CIFAR10' else CIFAR100, transform)
    if num_classes not in (None, len(dataset.classes)):
        raise InputError(f'the checkpoint has {num_classes} classes, the data set {len(dataset.classes)}')
    if classes and (differences := compare_classes(classes, dataset.classes)):
        raise InputError(f'--data-set {args.data_set} has other classes than training: {differences}')
    return dataset


def cifar(root: Path, train: bool, kind: type[CIFAR10], transform: Callable) -> CIFAR10:
    """torchvision's CIFAR-10 or CIFAR-100 as it unpacks them; InputError where files are missing or damaged."""
    folder = root / kind.base_folder
    if not folder.is_dir():
        raise _missing(folder, f'{kind.__name__} as torchvision unpacks it')
    try:
        return kind(root, train, transform)
    except RuntimeError as error:
        raise InputError(f'{folder} is not the whole of {kind.__name__}: files are missing or damaged') from error


class Seeded(Dataset):
    """Takes (epoch, position, index) and makes all that is random in an image a function of (seed, epoch, position).

    Without workers this seeds the generators of the training process itself, which therefore seeds them for each batch.
    Up to `max_broken` unreadable images are replaced by the next in the data set; all workers mark them in `broken`.
    """

    def __init__(self, dataset: Dataset, seed: int, max_broken: int = 0):
        self.dataset, self.seed, self.max_broken = dataset, seed, min(max_broken, len(dataset) - 1)
        self.broken = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __getitem__(self, key: tuple[int, int, int]):
        epoch, position, index = key
        while True:
            seed_all(self.seed, epoch, position)
            try:
                return self.dataset[index]
            except InputError as error:
                known = bool(self.broken[index])
                self.broken[index] = 1
                count = int(self.broken.sum())
                if count > self.max_broken:
                    told = f'{error}\n{count} broken training images, --max-broken-images allows {self.max_broken}'
                    raise InputError(told) from error
                index = (index + 1) % len(self.dataset)
                if not known:
                    print(f'warning: {error}; image {index} takes its place ({count} so far)', flush=True)

    def __len__(self) -> int:
        return len(self.dataset)


def build_loaders(
    args: argparse.Namespace,
    config: DataConfig,
    rank: int = 0,
    world_size: int = 1,
    classes: list[str] | None = None,
    num_classes: int | None = None,
    train: bool = True,
) -> tuple[DataLoader | None, DataLoader]:
    """Loaders of this process: training (None with --eval, which reads no training image) and validation.

    The training loader's `sampler` has `set_epoch`; the validation loader's `dataset.classes` are the classes of both.
    `classes` and `num_classes` are those of the checkpoint that is evaluated, where known.
    Raises InputError where there are no images, or fewer than a batch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = min(args.num_workers, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    common = dict(
        batch_size=args.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        worker_init_fn=_outlive_termination,
    )
    # Each loader has a generator of its own: otherwise evaluating would shift the random numbers of training.
    train_loader = None
    if train:
        data = build_dataset(args, config, True)
        classes = data.classes
        sampler = RepeatedAugSampler(len(data), rank, world_size, args.seed, REPEATS if args.repeated_aug else 1)
        if len(sampler) < args.batch_size:
            raise InputError(
                f'{len(data)} training images give each of {world_size} processes {len(sampler)} an epoch, '
                f'less than one batch of {args.batch_size}; choose a smaller --batch-size'
            )
        train_loader = DataLoader(
            Seeded(data, args.seed, args.max_broken_images),
            sampler=sampler,
            drop_last=True,
            generator=torch.Generator(),
            **common,
        )
    val = build_dataset(args, config, False, classes, num_classes)
    if not len(val):
        raise InputError(f'--data-set {args.data_set} in {args.data_path}: no validation images')
    shard = eval_shard(len(val), rank, world_size)
    return train_loader, DataLoader(val, sampler=shard, generator=torch.Generator(), **common)


def _outlive_termination(_):
    """Let this loading process end for SIGTERM from its parent alone.

    A signal to the process group, such as Ctrl-C, reaches it too, and the last step before a checkpoint still needs it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, 'sigwaitinfo'):  # not on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix of a batch, which also smooths its labels; None where both are off."""
    if args.mixup <= 0 and args.cutmix <= 0 and not args.cutmix_minmax:
        return None
    if args.batch_size % 2:
        raise InputError(
            f'--batch-size {args.batch_size} is odd: images are mixed in pairs (off: --mixup 0 --cutmix 0)'
        )
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )

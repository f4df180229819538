"""From images to batches: datasets, transforms, loaders, mixup.

A dataset maps an index to (image, label) and has `classes`, a list of names. Training indexes it by (epoch, position,
index): augmentation is a function of (seed, epoch, position), so batches do not depend on the number of workers.
"""

import json
import math
import os
import signal
import threading
from argparse import Action, ArgumentError, ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, Mixup, create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode

import networks
from image_data import timm_data
from image_data.files import CropLoader, load_image
from image_data.shapes import Shapes
from samplers import REPEATS, RepeatedAugSampler, eval_shard
from utils import InputError, at_least, between, print_rank0, seed_all

FULL_SCALE = 0.08, 1.0  # area of random crops as a fraction of the image; the default of timm and of the recipe
DATA_SETS = ('IMNET', 'CIFAR', 'CIFAR10', 'INAT', 'INAT19', 'SHAPES')
DATA_SET_NAMES = ', '.join((*DATA_SETS, *(f'{prefix}NAME' for prefix in timm_data.PREFIXES)))
INAT_LEVELS = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
CROP_MODES = ('center', 'squash', 'border')
# Flags that may differ when a run is resumed; True: the run still continues bit for bit.
MAY_CHANGE = dict.fromkeys(('data_path', 'val_split', 'num_workers', 'pin_mem', 'max_broken_images', 'dist_eval'), True)


def add_arguments(parser: ArgumentParser):
    """Flags of data, augmentation and loading."""
    add_image_arguments(parser)
    unit, positive = between(0, 1), between(0, math.inf)
    add = parser.add_argument_group('loading').add_argument
    add('--num_workers', type=at_least(0), default=10, help='loading processes, at most the available cores')
    add('--pin-mem', action=BooleanOptionalAction, default=True, help='pinned memory (CUDA only)')
    about = 'unreadable training images allowed per process; the next image replaces each'
    add('--max-broken-images', type=at_least(0), default=0, metavar='N', help=about)
    add('--dist-eval', action='store_true', help='no effect: evaluation is always distributed, and exact')

    add = parser.add_argument_group('augmentation').add_argument
    about = 'repeated augmentation: an epoch sees a third of the images, three times each'
    add('--repeated-aug', action=BooleanOptionalAction, default=True, help=about)
    about = 'area of random crops as a fraction of the image (above 32 px only)'
    add('--scale', type=between(0.01, 1), nargs=2, action=Ascending, default=FULL_SCALE, metavar='AREA', help=about)
    add('--color-jitter', type=positive, default=0.4, help='strength of color jitter, used without --aa')
    add('--aa', type=augmentation_policy, default='rand-m9-mstd0.5-inc1', help="timm's policy; '' for none")
    filters = 'random', 'bilinear', 'bicubic'
    add('--train-interpolation', default='bicubic', choices=filters, help='resize filter of random crops')
    about = 'faster reading of training images, with slightly different pixels; evaluation is always exact'
    add('--fast-decode', action=BooleanOptionalAction, default=True, help=about)
    add('--reprob', type=unit, default=0.25, help='probability of random erasing')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='fill of erased rectangles')
    add('--recount', type=at_least(1), default=1, help='maximum number of erased rectangles')
    add('--resplit', action='store_true', help='no effect: there are no augmentation splits')

    add = parser.add_argument_group('mixup, cutmix and label smoothing').add_argument
    add('--mixup', type=positive, default=0.8, help='mixup alpha, 0 for none')
    add('--cutmix', type=positive, default=1.0, help='cutmix alpha, 0 for none')
    about = 'min and max side of the cutmix box, as fractions of the image side; replaces --cutmix'
    add('--cutmix-minmax', type=unit, nargs=2, action=Ascending, metavar='SIDE', help=about)
    add('--mixup-prob', type=unit, default=1.0, help='probability of mixup or cutmix')
    add('--mixup-switch-prob', type=unit, default=0.5, help='probability of cutmix if both are on')
    about = 'draw mixing ratios per batch, pair or image (elem)'
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help=about)
    add('--smoothing', type=unit, default=0.1, help='label smoothing')


def add_image_arguments(parser: ArgumentParser):
    """Flags of what is read and of its preprocessing: all the data flags that pictures need."""
    add = parser.add_argument_group('data').add_argument
    add('--data-path', default='.', help='folder of the data set (SHAPES needs none)')
    about = f'{DATA_SET_NAMES} (IMNET: train/CLASS/, val/CLASS/)'
    add('--data-set', type=data_set, default='IMNET', metavar='NAME', help=about)
    add('--train-split', default='train', metavar='NAME', help='training split of torch/ and hfds/')
    add('--val-split', default='validation', metavar='NAME', help='evaluation split of torch/ and hfds/')
    add('--num-classes', type=at_least(1), metavar='N', help='number of classes of hfds/ data without class names')
    add('--inat-category', default='name', choices=INAT_LEVELS, help='level of iNaturalist classes')
    add('--batch-size', type=at_least(1), default=64, help='images per process and step')

    group = parser.add_argument_group('preprocessing', "Defaults come from the model's configuration.")
    add = group.add_argument
    add('--input-size', type=at_least(1), metavar='PX', help='image size')
    add('--mean', type=between(0, 1), nargs='+', metavar='M', help='pixel mean (0 to 1), one value or one per channel')
    add('--std', type=between(0.001, 1), nargs='+', metavar='S', help='pixel standard deviation, likewise')
    add('--crop-pct', type=between(0.01, 1), metavar='P', help='evaluation: crop as a fraction of the resized side')
    add('--crop-mode', choices=CROP_MODES, help='crop of evaluation, as in timm')
    add('--interpolation', choices=('bilinear', 'bicubic'), help='resize filter of evaluation')


def data_set(text: str) -> str:
    """The `type` of a flag: one of DATA_SETS, or timm's name of a data set."""
    if text not in DATA_SETS and not text.startswith(timm_data.PREFIXES):
        raise ArgumentTypeError(f'expected one of {DATA_SET_NAMES}; found {text}')
    return text


class Ascending(Action):
    """argparse action for two numbers in ascending order."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: list[float], option_string=None):
        if values[0] > values[1]:
            raise ArgumentError(self, f'expected the smaller number first, found {values[0]:g} {values[1]:g}')
        setattr(namespace, self.dest, values)


def augmentation_policy(text: str) -> str:
    """The `type` of a flag: an augmentation policy of timm, or '' for none."""
    try:
        create_transform(SMALL, is_training=True, auto_augment=text)
    except Exception as error:  # timm raises half a dozen kinds
        raise ArgumentTypeError(f'timm has no policy {text!r} ({type(error).__name__}: {error})') from error
    return text


# --- preprocessing and augmentation

# Up to this size, training crops images after padding them, as is usual for CIFAR, and evaluation does not crop.
SMALL = 32
PADDING = 4


class DataConfig(NamedTuple):
    """Preprocessing of a model, by the names of the flags and of timm."""

    input_size: int  # pixels a side
    mean: tuple[float, ...]  # of pixels from 0 to 1
    std: tuple[float, ...]
    crop_pct: float  # evaluation resizes to input_size / crop_pct, and crops
    crop_mode: str
    interpolation: str


def data_config(args: Namespace, model_name: str) -> DataConfig:
    """The model's data configuration in timm, with what the preprocessing flags override.

    Raises InputError for models that do not take square RGB images.
    """
    given = {name: getattr(args, name) for name in DataConfig._fields}
    for name in ('mean', 'std'):
        if given[name] and len(given[name]) not in (1, 3):
            raise InputError(f'--{name}: expected 1 or 3 values, found {given[name]}')
    cfg, size = networks.published_cfg(model_name), given['input_size']
    config = resolve_data_config(given | {'input_size': size and (3, size, size)}, cfg.to_dict())
    _, rows, columns = config['input_size']
    if cfg.input_size[0] != 3 or rows != columns:
        found = ' x '.join(map(str, cfg.input_size))
        raise InputError(f'{model_name} takes images of {found}; expected 3 channels and a square (--input-size)')
    if (crop_mode := config['crop_mode']) not in CROP_MODES:
        raise InputError(f'{model_name} has crop_mode {crop_mode}; expected one of {", ".join(CROP_MODES)}')
    if given['crop_pct'] is None and rows <= SMALL:
        config['crop_pct'] = 1.0
    return DataConfig(**config | {'input_size': rows})


def describe(config: DataConfig) -> str:
    """A data configuration in one line, which scripts print at the start."""
    mean, std = (' '.join(f'{value:g}' for value in values) for values in (config.mean, config.std))
    return (
        f'images: {config.input_size} px, evaluated at crop_pct {config.crop_pct:g} ({config.crop_mode}), '
        f'{config.interpolation}, mean {mean}, std {std}'
    )


class ToTensor:
    """RGB image to a normalized tensor (3, height, width): the bits of torchvision's ToTensor and Normalize, faster."""

    def __init__(self, config: DataConfig):
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std)


def build_transform(config: DataConfig, augment: dict | None = None) -> transforms.Compose:
    """timm's transform of an RGB image of any size to a normalized tensor (3, input_size, input_size).

    `augment` holds the arguments of `create_transform` for training; the first step is then the random crop. Without
    it, the transform is that of evaluation.
    """
    if augment is None:
        *resize_and_crop, _, _ = create_transform(**config._asdict()).transforms  # the rest: ToTensor, Normalize
        return transforms.Compose([*resize_and_crop, ToTensor(config)])
    size = config.input_size
    stages = create_transform(size, is_training=True, mean=config.mean, std=config.std, separate=True, **augment)
    (crop, flip), distort, (_, _, *erase) = (stage.transforms for stage in stages)
    if size <= SMALL:
        if tuple(augment.get('scale', FULL_SCALE)) != FULL_SCALE:
            raise InputError(f'--scale: images up to {SMALL} px are padded and cropped instead; leave it out')
        resize = transforms.Resize(size, InterpolationMode.BICUBIC)
        crop = transforms.Compose([resize, transforms.RandomCrop(size, padding=PADDING)])
    return transforms.Compose([crop, flip, *distort, ToTensor(config), *erase])


def augmentation(args: Namespace) -> dict:
    """The augmentation flags as arguments of `create_transform`."""
    names = {'color_jitter': 'color_jitter', 'aa': 'auto_augment', 'train_interpolation': 'interpolation'}
    names |= {'scale': 'scale', 'reprob': 're_prob', 'remode': 're_mode', 'recount': 're_count'}
    return {name: getattr(args, flag) for flag, name in names.items()}


# --- datasets


def build_dataset(
    args: Namespace, config: DataConfig, train: bool, classes: list[str] | None = None, num_classes: int | None = None
) -> Dataset:
    """The dataset of the flags with the transform of training or of evaluation.

    `classes` and `num_classes` are those of training, if known; evaluation then uses the same labels. Raises InputError
    if the dataset has other classes.
    """
    root, split = Path(args.data_path).expanduser(), 'train' if train else 'val'
    transform = build_transform(config, augmentation(args) if train else None)
    fast = train and args.fast_decode and config.input_size > SMALL
    source = getattr(args, 'resume', '') or 'the checkpoint'
    if args.data_set == 'IMNET':
        return ImageFiles(*image_folder(root / split, classes, num_classes, source), transform, fast)
    if args.data_set.startswith('INAT'):
        year = 2019 if args.data_set == 'INAT19' else 2018
        dataset = ImageFiles(*inaturalist(root, split, year, args.inat_category), transform, fast)
    elif args.data_set == 'SHAPES':
        dataset = Shapes(split, config.input_size, transform=transform)
    elif '/' in args.data_set:
        split, count = args.train_split if train else args.val_split, num_classes or args.num_classes
        dataset = timm_data.build(args.data_set, str(root), split, train, transform, count)
    else:
        dataset = cifar(root, train, CIFAR10 if args.data_set == 'CIFAR10' else CIFAR100, transform)
    if num_classes not in (None, len(dataset.classes)):
        raise InputError(f'{source} has {num_classes} classes, the data set {len(dataset.classes)}')
    if classes and (differences := compare_classes(classes, dataset.classes)):
        raise InputError(f'--data-set {args.data_set} has other classes than training: {differences}')
    return dataset


Samples = list[tuple[str, int]]  # path and label


class ImageFiles(Dataset):
    """Image files with labels; with `fast`, a CropLoader takes the place of the first step of `transform`."""

    def __init__(self, samples: Samples, classes: list[str], transform: transforms.Compose, fast: bool = False):
        self.samples, self.classes, self.transform, self.loader = samples, classes, transform, load_image
        if fast:
            crop, *steps = transform.transforms
            self.transform, self.loader = transforms.Compose(steps), CropLoader(crop)
        for path, label in samples:
            if not 0 <= label < len(classes):
                raise InputError(f'{path} has label {label}, but there are {len(classes)} classes, counted from 0')

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return self.transform(self.loader(path)), label

    def __len__(self) -> int:
        return len(self.samples)


def image_folder(
    root: Path, classes: list[str] | None = None, num_classes: int | None = None, source: str = 'the checkpoint'
) -> tuple[Samples, list[str]]:
    """Images of `root`, one folder per class in sorted order, and the classes; hidden folders and files are skipped.

    `classes` are those of training, if known: labels are then matched by name, and folders may be missing. If only
    their number in `source` is known, `name_classes` finds the names. Raises InputError for unknown or empty folders.
    """
    if not root.is_dir():
        raise _missing(root, 'a folder with a folder of images for each class')
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if hidden := {name for name in folders if name.startswith('.')}:
        print_rank0(f'{root}: skipped hidden folders {_abbreviate(hidden)}')
        folders = [name for name in folders if name not in hidden]
    if not folders:
        raise InputError(f'{root} holds no class folders; it holds {_abbreviate(os.listdir(root))}')
    if classes is None:
        classes = folders if num_classes is None else name_classes(root, folders, num_classes, source)
    if unknown := set(folders) - set(classes):
        raise InputError(f'{root} holds {len(unknown)} classes that training lacks: {_abbreviate(unknown)}')
    if absent := set(classes) - set(folders):
        print_rank0(f'{root}: no images of {len(absent)} of {len(classes)} classes: {_abbreviate(absent)}')
    labels = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(root, labels, IMG_EXTENSIONS, allow_empty=True)
    samples = [sample for sample in samples if f'{os.sep}.' not in sample[0].removeprefix(str(root))]
    if empty := sorted(set(folders) - {classes[label] for _, label in samples}):
        content = _abbreviate(os.listdir(root / empty[0]))
        raise InputError(f'{root}: no images in {_abbreviate(empty)}; {root / empty[0]} holds {content}')
    return samples, classes


def name_classes(root: Path, folders: list[str], num_classes: int, source: str) -> list[str]:
    """Class names for a checkpoint without any: ImageNet's synsets, or the sorted folders of `root`.

    Raises InputError if neither fits.
    """
    synsets = ImageNetInfo().label_names()
    unknown = set(folders) - set(synsets)
    if num_classes == len(synsets) and not unknown:
        return synsets
    if num_classes == len(folders):
        print_rank0(f'{root}: {source} does not name its {num_classes} classes; using the sorted folders')
        return folders
    message = f'{source}: {num_classes} classes without names, but {root} has {len(folders)} class folders'
    if num_classes == len(synsets):
        message += f', {len(unknown)} of which are not ImageNet synsets: {_abbreviate(unknown)}'
    raise InputError(f'{message}. Rename the folders to the classes of the checkpoint, or fine-tune with --finetune')


def compare_classes(trained: Sequence[str], current: Sequence[str]) -> str:
    """How the classes of a dataset differ from those of training, in words; '' if they are the same."""
    lacking, new = set(trained) - set(current), set(current) - set(trained)
    if lacking or new:
        return f'the data lacks {len(lacking)} ({_abbreviate(lacking)}) and has {len(new)} others ({_abbreviate(new)})'
    return '' if list(trained) == list(current) else 'the same names in another order'


def inaturalist(root: Path, split: str, year: int, level: str) -> tuple[Samples, list[str]]:
    """iNaturalist from `{split}{year}.json` and `categories.json`; classes are the names at `level`, in that order.

    The original Evo-ViT orders them by first appearance in the training list, which evaluation should not need. Raises
    InputError for a path outside `root`, an unknown category, or a level that categories lack.
    """
    list_path, categories_path = paths = root / f'{split}{year}.json', root / 'categories.json'
    for path in paths:
        if not path.is_file():
            raise _missing(path, f"iNaturalist's {list_path.name} and {categories_path.name}")
    listing, categories = (json.loads(path.read_text()) for path in paths)
    if lacking := [category['id'] for category in categories if level not in category]:
        raise InputError(f'{categories_path}: {len(lacking)} categories lack a {level}, first id {lacking[0]}')
    name_of = {category['id']: category[level] for category in categories}
    classes = list(dict.fromkeys(name_of.values()))
    labels = {category: classes.index(name) for category, name in name_of.items()}
    category_of = {annotation['image_id']: annotation['category_id'] for annotation in listing['annotations']}
    samples = []
    for image in listing['images']:
        path, category = Path(image['file_name']), category_of.get(image['id'])
        if path.is_absolute() or '..' in path.parts:
            raise InputError(f'{list_path} names a path outside {root}: {path}')
        if category not in labels:
            raise InputError(f'{list_path}: {path} has category {category}, none of the {len(labels)} that are listed')
        samples.append((str(root / path), labels[category]))
    if samples and not os.path.exists(samples[0][0]):
        raise _missing(Path(samples[0][0]), f'the images that {list_path.name} lists')
    return samples, classes


def cifar(root: Path, train: bool, kind: type[CIFAR10], transform: Callable) -> CIFAR10:
    """torchvision's CIFAR-10 or CIFAR-100, as it unpacks them; InputError if files are missing or damaged."""
    folder = root / kind.base_folder
    if not folder.is_dir():
        raise _missing(folder, f'{kind.__name__} as torchvision unpacks it')
    try:
        return kind(root, train, transform)
    except RuntimeError as error:
        raise InputError(f'{folder} is not the whole of {kind.__name__}: files are missing or damaged') from error


def _missing(path: Path, expected: str) -> InputError:
    """The error for a missing path, with the content of the nearest folder that exists."""
    path = path.absolute()
    folder = next(parent for parent in path.parents if parent.is_dir())
    return InputError(f'{path} does not exist: expected {expected}; {folder} holds {_abbreviate(os.listdir(folder))}')


def _abbreviate(names: Collection[str], most: int = 5) -> str:
    """The first names in sorted order, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(sorted(names)[:most]) + more or 'nothing'


# --- loaders


class Seeded(Dataset):
    """Indexed by (epoch, position, index); augmentation is a function of (seed, epoch, position).

    Up to `max_broken` unreadable images are replaced by the next one in the dataset; all workers share the count.
    With `num_workers=0` this reseeds the training process itself, which is harmless: each step seeds again.
    """

    def __init__(self, dataset: Dataset, seed: int, max_broken: int = 0):
        self.dataset, self.seed, self.max_broken = dataset, seed, min(max_broken, len(dataset) - 1)
        self.broken = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]):
        epoch, position, index = key
        while True:
            seed_all(self.seed, epoch, position)
            try:
                return self.dataset[index]
            except InputError as error:
                is_new = not self.broken[index]
                self.broken[index] = 1
                count = int(self.broken.sum())
                if count > self.max_broken:
                    limit = f'{count} broken training images, --max-broken-images allows {self.max_broken}'
                    raise InputError(f'{error}\n{limit}') from error
                if is_new:
                    print(f'warning: {error}; replaced by the next image ({count} so far)', flush=True)
                index = (index + 1) % len(self)


def build_loaders(
    args: Namespace,
    config: DataConfig,
    rank: int = 0,
    world_size: int = 1,
    classes: list[str] | None = None,
    num_classes: int | None = None,
    train: bool = True,
) -> tuple[DataLoader | None, DataLoader]:
    """Training and validation loaders of this process; without `train` the first is None and only validation is read.

    `classes` and `num_classes` are those of the checkpoint to evaluate, if known; otherwise those of the training data.
    The training sampler has `set_epoch`. Raises InputError if there are no images, or fewer than a batch.
    """
    train_loader = None
    if train:
        dataset = build_dataset(args, config, train=True)
        classes, train_loader = dataset.classes, build_train_loader(args, dataset, rank, world_size)
    dataset = build_dataset(args, config, False, classes, num_classes)
    if not len(dataset):
        raise InputError(f'--data-set {args.data_set} in {args.data_path}: no validation images')
    return train_loader, build_loader(args, dataset, sampler=eval_shard(len(dataset), rank, world_size))


def build_train_loader(args: Namespace, dataset: Dataset, rank: int, world_size: int) -> DataLoader:
    """A loader whose batches are a function of the seed, the epoch and the position in it."""
    sampler = RepeatedAugSampler(len(dataset), rank, world_size, args.seed, REPEATS if args.repeated_aug else 1)
    if len(sampler) < args.batch_size:
        raise InputError(
            f'{len(dataset)} training images give each of {world_size} processes {len(sampler)} an epoch, '
            f'fewer than one batch of {args.batch_size}; choose a smaller --batch-size'
        )
    dataset = Seeded(dataset, args.seed, args.max_broken_images)
    return build_loader(args, dataset, sampler=sampler, drop_last=True)


def build_loader(args: Namespace, dataset: Dataset, **options) -> DataLoader:
    """A loader with `--num_workers` workers, but at most this process's part of the available cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = min(args.num_workers, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    options |= dict(num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_ignore_signals_to_the_group)
    options |= dict(pin_memory=args.pin_mem and torch.cuda.is_available())
    # A loader draws a seed for its workers. Its own generator keeps evaluation from changing the random state of a run.
    return DataLoader(dataset, args.batch_size, generator=torch.Generator(), **options)


def _ignore_signals_to_the_group(_):
    """End this worker on SIGTERM from its parent only: the step before a checkpoint still needs batches.

    Ctrl-C and schedulers signal all processes of a job, workers too. Only waiting for a signal tells who sent it, hence
    the thread.
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


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix with label smoothing; None if both are off."""
    if args.mixup <= 0 and args.cutmix <= 0 and not args.cutmix_minmax:
        return None
    if args.batch_size % 2:
        raise InputError(f'--batch-size {args.batch_size} is odd, but mixup pairs images (off: --mixup 0 --cutmix 0)')
    probabilities = dict(prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode)
    labels = dict(label_smoothing=args.smoothing, num_classes=num_classes)
    return Mixup(args.mixup, args.cutmix, args.cutmix_minmax, **probabilities, **labels)

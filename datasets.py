"""From image files, or images that the program draws, to batches: datasets, transforms, loaders, mixup.

A dataset gives (image, label) for an index and has `classes`, a list of names. Training asks for (epoch, position,
index) instead; its augmentation is a function of (seed, epoch, position), so any number of workers gives the same bits.
"""

import json
import math
import os
import signal
import sys
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

import models
from image_data import timm_data
from image_data.files import CropLoader, load_image
from image_data.shapes import Shapes
from image_data.timm_data import Stream
from samplers import REPEATS, RepeatedAugSampler, eval_shard
from utils import InputError, at_least, between, print_rank0, seed_all

FULL_SCALE = 0.08, 1.0  # shares of an image that random crops take, as published
DATA_SETS = ('IMNET', 'CIFAR', 'CIFAR10', 'INAT', 'INAT19', 'SHAPES')
INAT_LEVELS = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
CROP_MODES = ('center', 'squash', 'border')
# Flags that may differ between a run and its continuation, and whether it goes on bit for bit even so.
MAY_CHANGE = dict.fromkeys(('data_path', 'val_split', 'num_workers', 'pin_mem', 'max_broken_images', 'dist_eval'), True)


def add_arguments(parser: ArgumentParser):
    """Flags of data, augmentation and loading."""
    add_image_arguments(parser)
    unit, positive = between(0, 1), between(0, math.inf)
    add = parser.add_argument_group('loading').add_argument
    add('--num_workers', type=at_least(0), default=10, help='loading processes, at most the cores at hand')
    add('--pin-mem', action=BooleanOptionalAction, default=True, help='used with CUDA alone')
    about = 'unreadable training images that each process may replace by others'
    add('--max-broken-images', type=at_least(0), default=0, metavar='N', help=about)
    add('--dist-eval', action='store_true', help='accepted; evaluation is always shared out, exactly')

    add = parser.add_argument_group('augmentation').add_argument
    add('--repeated-aug', action=BooleanOptionalAction, default=True, help='three times each')
    about = 'share of an image that a random crop takes, from and to; larger images than 32 px'
    add('--scale', type=between(0.01, 1), nargs=2, action=Ascending, default=FULL_SCALE, metavar='SHARE', help=about)
    add('--color-jitter', type=positive, default=0.4, help='strength, where --aa is off')
    add('--aa', type=augmentation_policy, default='rand-m9-mstd0.5-inc1', help="timm's policy; '' is off")
    add('--train-interpolation', default='bicubic', choices=('random', 'bilinear', 'bicubic'), help='of crops')
    about = 'training reads JPEGs in faster ways; off, it sees the exact pixels, as evaluation always'
    add('--fast-decode', action=BooleanOptionalAction, default=True, help=about)
    add('--reprob', type=unit, default=0.25, help='probability of erasing a rectangle')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='what fills it')
    add('--recount', type=at_least(1), default=1, help='most rectangles in an image')
    add('--resplit', action='store_true', help='accepted; there are no augmentation splits')

    add = parser.add_argument_group('mixing of images and labels').add_argument
    add('--mixup', type=positive, default=0.8, help='alpha of mixup, 0 is off')
    add('--cutmix', type=positive, default=1.0, help='alpha of cutmix, 0 is off')
    add('--cutmix-minmax', type=unit, nargs=2, action=Ascending, metavar='SIDE', help='limits; replaces --cutmix')
    add('--mixup-prob', type=unit, default=1.0, help='probability of either')
    add('--mixup-switch-prob', type=unit, default=0.5, help='probability of cutmix where both are on')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares a mixture')
    add('--smoothing', type=unit, default=0.1, help='label smoothing')


def add_image_arguments(parser: ArgumentParser):
    """Flags of what is read and how a model is to see it, which is all that pictures need."""
    add = parser.add_argument_group('data').add_argument
    add('--data-path', default='.', help='folder that holds the data set; SHAPES needs none')
    about = (
        f"{', '.join(DATA_SETS)}; or timm's name: {', '.join(timm_data.PREFIXES)}... (IMNET: train/CLASS/, val/CLASS/)"
    )
    add('--data-set', type=data_set, default='IMNET', metavar='NAME', help=about)
    add('--train-split', default='train', metavar='NAME', help="of timm's data sets; of wds/ also SHARDS.tar|IMAGES")
    add('--val-split', default='validation', metavar='NAME', help='the same, for evaluation')
    add('--num-classes', type=at_least(1), metavar='N', help="for timm's data sets that do not tell, as wds/")
    add('--inat-category', default='name', choices=INAT_LEVELS, help='level of iNaturalist classes')
    add('--batch-size', type=at_least(1), default=64, help='images of one process in one step')

    group = parser.add_argument_group('preprocessing', "Defaults are the model's own; the start prints what holds.")
    add = group.add_argument
    add('--input-size', type=at_least(1), metavar='PX', help='side of the images')
    add('--mean', type=between(0, 1), nargs='+', metavar='M', help='of pixels from 0 to 1, one or one a channel')
    add('--std', type=between(0.001, 1), nargs='+', metavar='S', help='of pixels, one or one a channel')
    add('--crop-pct', type=between(0.01, 1), metavar='P', help='share of a resized side that evaluation crops')
    add('--crop-mode', choices=CROP_MODES, help='of evaluation, as in timm')
    add('--interpolation', choices=('bilinear', 'bicubic'), help='of evaluation')


def data_set(text: str) -> str:
    """The `type` of a flag: one of DATA_SETS, or timm's name of a data set."""
    if text not in DATA_SETS and not text.startswith(timm_data.PREFIXES):
        raise ArgumentTypeError(f'expected {", ".join(DATA_SETS + timm_data.PREFIXES)}..., found {text}')
    return text


class Ascending(Action):
    """Of a flag with two numbers: the first may not be above the second."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: list[float], option_string=None):
        if values[0] > values[1]:
            raise ArgumentError(self, f'expected the smaller number first, found {values[0]:g} {values[1]:g}')
        setattr(namespace, self.dest, values)


def augmentation_policy(text: str) -> str:
    """The `type` of a flag: a policy that timm can make, or '' for none."""
    try:
        create_transform(SMALL, is_training=True, auto_augment=text)
    except Exception as error:  # of half a dozen kinds
        raise ArgumentTypeError(f'timm has no policy {text!r} ({type(error).__name__}: {error})') from error
    return text


# --- preprocessing and augmentation

# Up to this size images are small already: training crops them from a padded border, and evaluation takes them whole.
SMALL = 32
PADDING = 4


class DataConfig(NamedTuple):
    """What a model expects of its images; the names are those of the flags and of timm."""

    input_size: int  # pixels a side
    mean: tuple[float, ...]  # of pixels from 0 to 1
    std: tuple[float, ...]
    crop_pct: float  # evaluation resizes to input_size / crop_pct, and crops
    crop_mode: str
    interpolation: str


def data_config(args: Namespace, model_name: str) -> DataConfig:
    """The data configuration that a model was published with, but for what the flags of preprocessing say.

    Raises InputError for models that do not take square images with three channels.
    """
    given = {name: getattr(args, name) for name in DataConfig._fields}
    for name in ('mean', 'std'):
        if given[name] and len(given[name]) not in (1, 3):
            raise InputError(f'--{name}: expected one number or three, found {given[name]}')
    cfg, size = models.published_cfg(model_name), given['input_size']
    config = resolve_data_config(given | {'input_size': size and (3, size, size)}, cfg.to_dict())
    _, rows, columns = config['input_size']
    if cfg.input_size[0] != 3 or rows != columns:
        published = ' x '.join(map(str, cfg.input_size))
        raise InputError(f'{model_name} takes images of {published}; expected 3 channels and a square (--input-size)')
    if config['crop_mode'] not in CROP_MODES:
        raise InputError(f'{model_name} has crop_mode {config["crop_mode"]}; expected one of {", ".join(CROP_MODES)}')
    if given['crop_pct'] is None and rows <= SMALL:
        config['crop_pct'] = 1.0
    return DataConfig(**config | {'input_size': rows})


def describe(config: DataConfig) -> str:
    """A line about a data configuration, for the start of a run."""
    mean, std = (' '.join(f'{value:g}' for value in values) for values in (config.mean, config.std))
    return (
        f'images: {config.input_size} px, evaluated at crop_pct {config.crop_pct:g} ({config.crop_mode}), '
        f'{config.interpolation}, mean {mean}, std {std}'
    )


class ToTensor:
    """RGB image to a normalised tensor (3, height, width): torchvision's ToTensor and Normalize, in half the time."""

    def __init__(self, config: DataConfig):
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std)


def build_transform(config: DataConfig, augment: dict | None = None) -> transforms.Compose:
    """timm's transform of an RGB image of any size to a normalised tensor (3, input_size, input_size).

    Without `augment` that of evaluation, else of training, whose first step is the random crop. `augment` holds
    arguments of `create_transform`.
    """
    if augment is None:
        resize_and_crop = create_transform(**config._asdict()).transforms[:-2]  # without timm's ToTensor and Normalize
        return transforms.Compose([*resize_and_crop, ToTensor(config)])
    size = config.input_size
    stages = create_transform(size, is_training=True, mean=config.mean, std=config.std, separate=True, **augment)
    (crop, flip), distort, (_, _, *erase) = (stage.transforms for stage in stages)
    if size <= SMALL:
        if tuple(augment.get('scale', FULL_SCALE)) != FULL_SCALE:
            raise InputError(f'--scale: images of {SMALL} px or less are cropped from a padded border; leave it out')
        resize = transforms.Resize(size, InterpolationMode.BICUBIC)
        crop = transforms.Compose([resize, transforms.RandomCrop(size, padding=PADDING)])
    return transforms.Compose([crop, flip, *distort, ToTensor(config), *erase])


def augmentation(args: Namespace) -> dict:
    """The flags of augmentation, by the names that `create_transform` has for them."""
    names = {'color_jitter': 'color_jitter', 'aa': 'auto_augment', 'train_interpolation': 'interpolation'}
    names |= {'scale': 'scale', 'reprob': 're_prob', 'remode': 're_mode', 'recount': 're_count'}
    return {name: getattr(args, flag) for flag, name in names.items()}


# --- datasets


def build_dataset(
    args: Namespace, config: DataConfig, train: bool, classes: list[str] | None = None, num_classes: int | None = None
) -> Dataset:
    """Dataset of the flags, transformed for training or for evaluation.

    `classes` are those of training, and `num_classes` their number, where known: evaluation then has the same labels.
    Raises InputError where the dataset has others.
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
        where = os.path.expanduser(args.data_path)  # no Path, as it may be a URL
        dataset = timm_data.build(args.data_set, where, split, train, transform, count)
    else:
        dataset = cifar(root, train, CIFAR10 if args.data_set == 'CIFAR10' else CIFAR100, transform)
    if num_classes not in (None, len(dataset.classes)):
        raise InputError(f'{source} has {num_classes} classes, the data set {len(dataset.classes)}')
    if classes and (differences := compare_classes(classes, dataset.classes)):
        raise InputError(f'--data-set {args.data_set} has other classes than training: {differences}')
    return dataset


Samples = list[tuple[str, int]]  # path and label


class ImageFiles(Dataset):
    """Image files and their labels, which `classes` names; `fast`: the first step of `transform` by a CropLoader."""

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
    """Images in one folder for each class, in the order of the names, and the classes; hidden ones are left out.

    `classes` are those of training, where known: labels then go by name; some folders may be missing, none unknown.
    Where only their number is known, that of `source`, see `name_classes`. Raises InputError where folders or images
    are missing.
    """
    if not root.is_dir():
        raise _missing(root, 'a folder with a folder of images for each class')
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if hidden := {name for name in folders if name.startswith('.')}:
        print_rank0(f'{root}: left out hidden folders: {_abbreviate(hidden)}')
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
    """The classes of a checkpoint that does not name them: ImageNet's, or else the class folders in `root` in order.

    Raises InputError where neither fits.
    """
    synsets = ImageNetInfo().label_names()
    unknown = set(folders) - set(synsets)
    if num_classes == len(synsets) and not unknown:
        return synsets
    if num_classes == len(folders):
        print_rank0(f'{root}: {source} does not name its {num_classes} classes; taken for these folders in order')
        return folders
    message = f'{source} has {num_classes} classes and does not name them, {root} holds {len(folders)} class folders'
    if num_classes == len(synsets):
        message += f', {len(unknown)} not named by an ImageNet synset: {_abbreviate(unknown)}'
    raise InputError(message)


def compare_classes(trained: Sequence[str], current: Sequence[str]) -> str:
    """How the classes of a dataset differ from those of training, in words; '' where they are the same."""
    lacking, new = set(trained) - set(current), set(current) - set(trained)
    if lacking or new:
        return f'the data lacks {len(lacking)} ({_abbreviate(lacking)}) and has {len(new)} others ({_abbreviate(new)})'
    return '' if list(trained) == list(current) else 'the same names in another order'


def inaturalist(root: Path, split: str, year: int, level: str) -> tuple[Samples, list[str]]:
    """iNaturalist from `{split}{year}.json` and `categories.json`; classes are the names at `level`, in that order.

    The published code orders them by first appearance in the training list, which evaluation should not need. Raises
    InputError for a path outside `root`, a category that is not in the list, or a level that categories lack.
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
    """torchvision's CIFAR-10 or CIFAR-100 as it unpacks them; InputError where files are missing or damaged."""
    folder = root / kind.base_folder
    if not folder.is_dir():
        raise _missing(folder, f'{kind.__name__} as torchvision unpacks it')
    try:
        return kind(root, train, transform)
    except RuntimeError as error:
        raise InputError(f'{folder} is not the whole of {kind.__name__}: files are missing or damaged') from error


def _missing(path: Path, expected: str) -> InputError:
    """The error for a path that does not exist, which says what the nearest folder holds."""
    path = path.absolute()
    folder = next(parent for parent in path.parents if parent.is_dir())
    return InputError(f'{path} does not exist: expected {expected}; {folder} holds {_abbreviate(os.listdir(folder))}')


def _abbreviate(names: Collection[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(sorted(names)[:most]) + more or 'nothing'


# --- loaders


class Seeded(Dataset):
    """Takes (epoch, position, index) and makes all that is random in an image a function of (seed, epoch, position).

    Without workers this seeds the generators of the training process itself, which therefore seeds them for each batch.
    Up to `max_broken` unreadable images are replaced by the next in the dataset; all workers mark them in `broken`.
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
                is_new, self.broken[index] = not self.broken[index], 1
                count = int(self.broken.sum())
                if count > self.max_broken:
                    limit = f'{count} broken training images, --max-broken-images allows {self.max_broken}'
                    raise InputError(f'{error}\n{limit}') from error
                if is_new:
                    print(f'warning: {error}; the next image takes its place ({count} so far)', flush=True)
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
    """Loaders of this process: training (None unless `train`; then no training image is read) and validation.

    The training loader's `sampler` has `set_epoch`; the validation loader's `dataset.classes` are the classes of both.
    `classes` and `num_classes` are those of the checkpoint that is evaluated, where known.
    Raises InputError where there are no images, or fewer than a batch.
    """
    train_loader = None
    if train:
        dataset = build_dataset(args, config, train=True)
        classes, train_loader = dataset.classes, build_train_loader(args, dataset, rank, world_size)
    dataset = build_dataset(args, config, False, classes, num_classes)
    if not len(dataset):
        raise InputError(f'--data-set {args.data_set} in {args.data_path}: no validation images')
    if isinstance(dataset, Stream):
        return train_loader, build_stream_loader(args, dataset, rank, world_size)
    return train_loader, build_loader(args, dataset, sampler=eval_shard(len(dataset), rank, world_size))


def build_train_loader(args: Namespace, dataset: Dataset, rank: int, world_size: int) -> DataLoader:
    """A loader whose images are a function of the seed, the epoch and their place in it."""
    if isinstance(dataset, Stream):
        return build_stream_loader(args, dataset, rank, world_size)
    sampler = RepeatedAugSampler(len(dataset), rank, world_size, args.seed, REPEATS if args.repeated_aug else 1)
    if len(sampler) < args.batch_size:
        raise InputError(
            f'{len(dataset)} training images give each of {world_size} processes {len(sampler)} an epoch, '
            f'less than one batch of {args.batch_size}; choose a smaller --batch-size'
        )
    dataset = Seeded(dataset, args.seed, args.max_broken_images)
    return build_loader(args, dataset, sampler=sampler, drop_last=True)


def build_stream_loader(args: Namespace, stream: Stream, rank: int, world_size: int) -> DataLoader:
    """The loader of a stream, with one worker a shard at the most."""
    print_rank0(f'--data-set {args.data_set}: {timm_data.TRAINING if stream.train else timm_data.EVALUATION}')
    stream.share(rank, world_size, args.batch_size, args.seed)
    loader = build_loader(args, stream, stream.most_workers(), drop_last=stream.train)
    stream.workers = loader.num_workers
    loader.sampler.set_epoch = stream.set_epoch  # where the loader of a data set that is read by index has it
    return loader


def build_loader(args: Namespace, dataset: Dataset, most_workers: int = sys.maxsize, **options) -> DataLoader:
    """A loader with as many workers as the flags and the cores of this process allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = min(args.num_workers, most_workers, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    options |= dict(num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_outlive_termination)
    options |= dict(pin_memory=args.pin_mem and torch.cuda.is_available())
    # A generator of its own: otherwise evaluating would shift the random numbers of training.
    return DataLoader(dataset, args.batch_size, generator=torch.Generator(), **options)


def _outlive_termination(_):
    """Let this loading process end for SIGTERM from its parent alone: a step before a checkpoint still needs it.

    A signal to the process group, such as Ctrl-C, or to all processes of a job reaches it too. Only a wait for signals
    says who sent one, hence the thread.
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
    """timm's mixup and cutmix of a batch, which also smooths its labels; None where both are off."""
    if args.mixup <= 0 and args.cutmix <= 0 and not args.cutmix_minmax:
        return None
    if args.batch_size % 2:
        raise InputError(f'--batch-size {args.batch_size} is odd, images are mixed in pairs; off: --mixup 0 --cutmix 0')
    probabilities = dict(prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode)
    labels = dict(label_smoothing=args.smoothing, num_classes=num_classes)
    return Mixup(args.mixup, args.cutmix, args.cutmix_minmax, **probabilities, **labels)

"""Data sets by timm's names for them: torchvision's (torch/...), Hugging Face's (hfds/...) and tar shards (wds/...).

Those of torch/ and hfds/ are read by index, so all that holds of image folders holds of them. wds/ is a stream.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from timm.data import ImageNetInfo, IterableImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from image_data.files import load_image
from utils import InputError, print_rank0, seed_all

PREFIXES = ('torch/', 'hfds/', 'wds/')
# What does not hold of a stream, for the start of a run.
TRAINING = (
    'a stream, shuffled within a buffer, without repeated augmentation; some images may come twice in an epoch, others '
    'not at all; broken ones are left out with a warning; a resume is exact between epochs with the same --num_workers '
    'and, within an epoch, starts again with its first images'
)
EVALUATION = 'a stream; each image counts once, but broken ones are left out with a warning'


def build(name: str, root: str, split: str, train: bool, transform: Callable, num_classes: int | None) -> Dataset:
    """A data set by timm's name for it; InputError where timm cannot make it or its classes are not known."""
    make = partial(create_dataset, name, root, split, is_training=train)
    try:
        with _hugging_face():
            dataset = make()
    except Exception as error:  # timm and the packages that it calls raise all kinds
        message = f'--data-set {name}, {split} split, --data-path {root}: {str(error) or type(error).__name__}'
        raise InputError(message) from error
    if (classes := _class_names(dataset)) is None:
        if num_classes is None:
            raise InputError(f'--data-set {name} does not say how many classes it has; expected --num-classes')
        classes = ImageNetInfo().label_names() if num_classes == 1000 else [str(i) for i in range(num_classes)]
        print_rank0(f'--data-set {name} has no names of classes: label 0 is called {classes[0]}')
    if isinstance(dataset, IterableImageDataset):
        return Stream(make, transform, classes, train)
    return Indexed(dataset, transform, classes, name)


@contextmanager
def _hugging_face():
    """In here, `import datasets` finds the package of Hugging Face, not the file beside this one."""
    ours, path, here = sys.modules.pop('datasets', None), sys.path[:], Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    if theirs := sys.modules.get('hugging_face_datasets'):  # of the last time: it must not be imported twice
        sys.modules['datasets'] = theirs
    try:
        yield
    finally:
        sys.path[:] = path
        if 'datasets' in sys.modules:
            sys.modules['hugging_face_datasets'] = sys.modules.pop('datasets')
        if ours:
            sys.modules['datasets'] = ours


def _class_names(dataset: Dataset) -> list[str] | None:
    """Names of the classes in the order of the labels, where a data set has them."""
    if hasattr(dataset, 'reader'):
        features = getattr(getattr(dataset.reader, 'dataset', None), 'features', {})
        return getattr(features.get('label'), 'names', None)
    names = (getattr(dataset, name, None) for name in ('wnids', 'all_categories', 'classes'))
    return next((list(found) for found in names if found), None)


class Indexed(Dataset):
    """Images by index, as RGB, transformed; InputError that names the data set and the index for one that is broken."""

    def __init__(self, dataset: Dataset, transform: Callable, classes: list[str], name: str):
        self.dataset, self.transform, self.classes, self.name = dataset, transform, classes, name
        if hasattr(dataset, 'loader'):
            dataset.loader = load_image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            if hasattr(self.dataset, 'reader'):  # below timm's own reading, which replaces broken images by others
                file, label = self.dataset.reader[index]
                image = load_image(file)
            else:
                image, label = self.dataset[index]
        except InputError as error:
            raise InputError(f'--data-set {self.name}, image {index}: {error}') from error
        return self.transform(image.convert('RGB')), label


class Stream(IterableDataset):
    """Images of tar shards as they come, transformed; in training shuffled by timm, as many each epoch.

    Training gives each process and worker shards of its own. In evaluation each process reads all of them and takes
    its share of the images, so that each image counts once.
    """

    max_broken = 0  # timm leaves out what cannot be read, with a warning

    def __init__(self, make: Callable, transform: Callable, classes: list[str], train: bool):
        self.make, self.transform, self.classes, self.train = make, transform, classes, train
        self.rank, self.world_size, self.seed, self.workers = 0, 1, 0, 0
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers read it too

    def share(self, rank: int, world_size: int, batch_size: int, seed: int):
        """Read for this one of so many processes, from `seed` on, whole batches in training."""
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.make = partial(self.make, batch_size=batch_size, seed=seed)

    def most_workers(self) -> int:
        """How many workers can have a shard; InputError where not even each process can."""
        shards, processes = len(self.make().reader.split_info.filenames), self.world_size if self.train else 1
        if shards < processes:
            raise InputError(f'{shards} shards are too few for {processes} processes, each needs its own')
        return shards // processes

    def set_epoch(self, epoch: int, start: int = 0):
        """Choose the epoch. Its stream begins anew whatever `start` says: there is no way to its middle."""
        self.epoch.fill_(epoch)
        if start:
            print_rank0(f'a stream has no way to its middle: epoch {epoch} goes on with its first images')

    def _reader(self) -> IterableImageDataset:
        images, (rank, processes) = self.make(), (self.rank, self.world_size) if self.train else (0, 1)
        images.reader.dist_rank, images.reader.dist_num_replicas = rank, processes
        images.set_loader_cfg(self.workers)
        images.set_epoch(int(self.epoch))
        return images

    def __len__(self) -> int:
        """Images of an epoch on this process; in evaluation those of all processes."""
        return len(self._reader())

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker, images = getattr(get_worker_info(), 'id', 0), iter(self._reader())
        if not self.train:
            images = islice(images, self.rank, None, self.world_size)
        for i, (image, label) in enumerate(images):
            if not 0 <= label < (count := len(self.classes)):
                raise InputError(f'--data-set wds/ has label {label}, but there are {count} classes, counted from 0')
            if self.train:
                seed_all(self.seed, int(self.epoch), self.rank, worker, i)
            yield self.transform(image), label

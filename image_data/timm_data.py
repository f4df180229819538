"""Data sets by timm's names: torchvision's (torch/NAME) and Hugging Face's (hfds/NAME).

Both are read by index, like image folders: the order of loading, seeds and resuming are exact.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from timm.data import ImageNetInfo, create_dataset
from torch.utils.data import Dataset

from image_data.files import load_image
from utils import InputError, print_rank0

PREFIXES = ('torch/', 'hfds/')


def build(name: str, root: str, split: str, train: bool, transform: Callable, num_classes: int | None) -> Dataset:
    """The data set that timm calls `name`; InputError if timm cannot make it, or its classes are unknown."""
    try:
        with _hugging_face():
            dataset = create_dataset(name, root, split, is_training=train)
    except Exception as error:  # timm and the packages that it calls raise any kind
        message = f'--data-set {name}, {split} split, --data-path {root}: {str(error) or type(error).__name__}'
        raise InputError(message) from error
    if (classes := _class_names(dataset)) is None:
        if num_classes is None:
            raise InputError(f'--data-set {name} does not name its classes; expected --num-classes')
        classes = ImageNetInfo().label_names() if num_classes == 1000 else [str(i) for i in range(num_classes)]
        print_rank0(f'--data-set {name} does not name its classes: label 0 is called {classes[0]}')
    return Indexed(dataset, transform, classes, name)


@contextmanager
def _hugging_face():
    """Let `import datasets` find the package of Hugging Face, not datasets.py of this repository."""
    ours, path, root = sys.modules.pop('datasets', None), sys.path[:], Path(__file__).resolve().parents[1]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != root]
    if theirs := sys.modules.get('hugging_face_datasets'):  # from an earlier call: it cannot be imported twice
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
    """Class names in the order of the labels, or None."""
    if hasattr(dataset, 'reader'):
        features = getattr(getattr(dataset.reader, 'dataset', None), 'features', {})
        return getattr(features.get('label'), 'names', None)
    names = (getattr(dataset, name, None) for name in ('wnids', 'all_categories', 'classes'))
    return next((list(found) for found in names if found), None)


class Indexed(Dataset):
    """Transformed RGB images and labels; InputError names the data set and the index of what cannot be used."""

    def __init__(self, dataset: Dataset, transform: Callable, classes: list[str], name: str):
        self.dataset, self.transform, self.classes, self.name = dataset, transform, classes, name
        if hasattr(dataset, 'loader'):
            dataset.loader = load_image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            if hasattr(self.dataset, 'reader'):  # timm's own __getitem__ silently replaces unreadable images
                file, label = self.dataset.reader[index]
                image = load_image(file)
            else:
                image, label = self.dataset[index]
            if not 0 <= label < len(self.classes):  # such as the -1 of splits without labels
                raise InputError(f'label {label}, but there are {len(self.classes)} classes, counted from 0')
        except InputError as error:
            raise InputError(f'--data-set {self.name}, image {index}: {error}') from error
        return self.transform(image.convert('RGB')), label

"""SHAPES: images are a function of (seed, split, index), classes are balanced, and masks cover the object."""

import random

import numpy as np
import pytest
from PIL import Image

from image_data.shapes import Shapes


def test_shapes_are_a_function_of_seed_split_and_index():
    def pixels(split: str, index: int, **kwargs) -> bytes:
        return Shapes(split, 32, **kwargs)[index][0].tobytes()

    shapes = Shapes('train', 32)
    shapes[0]  # an image does not depend on those drawn before
    random.seed(0)
    np.random.seed(0)
    assert shapes[7][0].tobytes() == pixels('train', 7) == pixels('train', 7, length=8)
    assert len({pixels('train', 7), pixels('val', 7), pixels('train', 7, seed=1), pixels('train', 17)}) == 4


def test_shapes_have_ten_balanced_classes_and_an_end():
    shapes = Shapes('val', 32, length=30)
    assert len(set(shapes.classes)) == 10
    assert np.bincount([label for _, label in shapes]).tolist() == [3] * 10
    with pytest.raises(IndexError):
        shapes[30]
    assert (len(Shapes('train', 32)), len(Shapes('val', 32))) == (10_000, 2_000)


@pytest.mark.parametrize('size', [32, 48, 224])
def test_masks_cover_the_object_whole(size):
    shapes = Shapes('train', size, length=60)
    for i, (image, _) in enumerate(shapes):
        mask = shapes.mask(i)
        assert mask.shape == (size, size) and mask.dtype == bool
        assert 0.08 < mask.mean() < 0.30
        border = np.ones_like(mask)
        border[1:-1, 1:-1] = False
        assert mask[border].mean() < 0.15  # it may touch the border, but is not cut by it
        saturation = np.ptp(np.asarray(image).astype(int), axis=2)
        assert np.median(saturation[mask]) > np.percentile(saturation[~mask], 80)


def test_resolutions_show_the_same_scene():
    small, large = Shapes('val', 32), Shapes('val', 224)
    for i in range(10):
        shrunk = large[i][0].resize((32, 32), Image.Resampling.BOX)
        assert np.abs(np.asarray(shrunk).astype(int) - np.asarray(small[i][0])).mean() < 6
        difference = large.mask(i).reshape(32, 7, 32, 7).mean((1, 3)) - small.mask(i)
        assert np.abs(difference).mean() < 0.05

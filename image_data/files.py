"""From an image file to RGB pixels: what is read, what is refused, and the faster ways of training."""

import math
import random
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from utils import InputError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # it is deprecated, for a package of its own; without it Pillow decodes, which takes longer
    decode_jpeg = None

# What Pillow may take a file for, whatever its name is. Others, EPS above all, start programs or rarely used parsers.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF')
# Judged by the header, before pixels are decoded: they take 4 bytes each, and a side of 1 would be resized like any.
MAX_PIXELS = 2**26
MAX_ASPECT = 100


@contextmanager
def _reading(name: str):
    """InputError that names the file for whatever Pillow raises: its readers raise a dozen kinds of errors."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise InputError(f'{name} holds no image in a format that is read here ({", ".join(FORMATS)})') from error
    except Exception as error:
        raise InputError(f'{name} cannot be read: {str(error) or type(error).__name__}') from error


def load_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB; InputError that names the path where it is damaged, too large, or of another kind."""
    with open_image(path) as image:
        return to_rgb(image)


def open_image(path: str | Path) -> Image.Image:
    """Read the header of an image file, not yet its pixels; InputError where they would be too many."""
    with _reading(str(path)):
        image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
            image.close()
            limits = f'at most {MAX_PIXELS:,} are read, and sides up to 1 : {MAX_ASPECT}'
            raise ValueError(f'{image.width} x {image.height} pixels; {limits}')
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image file: pixels are what torchvision's loader gives, except where that is wrong.

    Transparent ones become white, and 16 bits are scaled, not clipped. An orientation in EXIF is not applied: published
    accuracies were measured without. InputError for damaged files, and for pixels without a known range.
    """
    with _reading(image.filename):
        if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert('RGB')
        if image.mode in ('I', 'F'):
            raise ValueError(f'pixels of mode {image.mode} have no known range')
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        image.load()
        return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy


class CropLoader:
    """Reads image files and crops them as timm's random crop does, by faster ways to the same pixels.

    torchvision decodes to Pillow's pixels, and torch resizes to them but for rounding, 2 of 255 at most. A JPEG whose
    crop is at least twice as large as the output is decoded at 1/2, 1/4 or 1/8, for less work; the low-pass filter of
    JPEG's own transform differs a little, as in all loaders that do this.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, path: str | Path) -> Image.Image:
        with open_image(path) as image:
            full_width, (rows, columns) = image.width, self.crop.size
            top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
            interpolation = self.crop.interpolation
            if isinstance(interpolation, Sequence):
                interpolation = random.choice(interpolation)
            # timm rounds a crop of an image of a few pixels down to nothing.
            top, left = min(top, image.height - 1), min(left, image.width - 1)
            height, width = max(height, 1), max(width, 1)
            reduction = min(height // rows, width // columns)
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))  # JPEGs alone heed it
            if image.width == full_width:
                pixels = resized_crop(_decode(image), top, left, height, width, [rows, columns], interpolation)
                return Image.fromarray(pixels.permute(1, 2, 0).numpy())
            reduction = round(full_width / image.width)
            left, top, right, bottom = (side / reduction for side in (left, top, left + width, top + height))
            # Whole pixels around the crop first, so that nothing outside has an influence.
            x, y = math.floor(left), math.floor(top)
            image = to_rgb(image).crop((x, y, math.ceil(right), math.ceil(bottom)))
            box = left - x, top - y, right - x, bottom - y
            return image.resize((columns, rows), Image.Resampling[interpolation.name], box)


def _decode(image: Image.Image) -> Tensor:
    """Pixels (3, rows, columns) of an opened image, by torchvision where it can."""
    if decode_jpeg and image.format == 'JPEG' and image.mode in ('L', 'RGB'):
        with suppress(RuntimeError, OSError):  # Pillow reads what is not quite right, or names what is wrong
            return decode_jpeg(torch.from_numpy(np.fromfile(image.filename, np.uint8)), ImageReadMode.RGB)
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)

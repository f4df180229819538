"""From an image file to RGB pixels: what is read, what is refused, and faster reading for training."""

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
except ImportError:  # torchvision may drop it; Pillow then decodes, which is slower
    decode_jpeg = None

# Formats that Pillow may recognize, whatever the file's name. Others start programs (EPS) or rarely used parsers.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF')
# Checked in the header, before pixels take 4 bytes each. A side of 1 pixel would be resized to thousands of columns.
MAX_PIXELS = 2**26
MAX_ASPECT = 100


@contextmanager
def _reading(name: str):
    """Turn whatever Pillow raises, which may be any kind of error, into an InputError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise InputError(f'{name} holds no image in a supported format ({", ".join(FORMATS)})') from error
    except Exception as error:
        raise InputError(f'{name} cannot be read: {str(error) or type(error).__name__}') from error


def load_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB; InputError with the path if it is damaged, too large, or in another format."""
    with open_image(path) as image:
        return to_rgb(image)


def open_image(path: str | Path) -> Image.Image:
    """Read the header of an image file; InputError if there would be too many pixels."""
    with _reading(str(path)):
        image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
            image.close()
            limits = f'expected at most {MAX_PIXELS:,}, and an aspect ratio up to {MAX_ASPECT}'
            raise ValueError(f'{image.width} x {image.height} pixels; {limits}')
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image file; pixels are those of torchvision's loader, except where that is wrong.

    Transparent pixels become white, and 16 bits are scaled, not clipped. EXIF orientation is not applied: published
    accuracies were measured without it. InputError for damaged files, and for pixels without a known range.
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
    """Reads and crops an image file as timm's random crop does, faster.

    Decoding by torchvision gives Pillow's pixels; resizing by torch differs by rounding (up to 2 of 255). A JPEG whose
    crop is at least twice the output size is decoded at 1/2, 1/4 or 1/8 scale, which low-pass filters a little
    differently than resizing.
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
            # timm may round a crop of an image of a few pixels down to nothing.
            top, left = min(top, image.height - 1), min(left, image.width - 1)
            height, width = max(height, 1), max(width, 1)
            reduction = min(height // rows, width // columns)
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))  # only JPEGs get smaller
            if image.width == full_width:
                pixels = resized_crop(_decode(image), top, left, height, width, [rows, columns], interpolation)
                return Image.fromarray(pixels.permute(1, 2, 0).numpy())
            scale = 1 / round(full_width / image.width)
            x0, y0, x1, y1 = left * scale, top * scale, (left + width) * scale, (top + height) * scale
            # Crop to whole pixels first, so that resizing does not see what is outside.
            x, y = math.floor(x0), math.floor(y0)
            image = to_rgb(image).crop((x, y, math.ceil(x1), math.ceil(y1)))
            box = x0 - x, y0 - y, x1 - x, y1 - y
            return image.resize((columns, rows), Image.Resampling[interpolation.name], box)


def _decode(image: Image.Image) -> Tensor:
    """Pixels (3, rows, columns) of an opened image, decoded by torchvision if it can."""
    if decode_jpeg and image.format == 'JPEG' and image.mode in ('L', 'RGB'):
        with suppress(RuntimeError, OSError):  # Pillow then reads what is slightly damaged, or says what is wrong
            return decode_jpeg(torch.from_numpy(np.fromfile(image.filename, np.uint8)), ImageReadMode.RGB)
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)

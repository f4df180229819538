"""SHAPES: ten classes of colored shapes on clutter, generated with the mask of the object."""

import colorsys
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

# Points are complex numbers: a product rotates and scales, a sum translates. An image is the unit square.


def _outline(motif: Sequence[complex], turns: int) -> np.ndarray:
    """Corners (complex) of a polygon: a motif repeated `turns` times around 0."""
    return np.concatenate([np.array(motif) * np.exp(2j * np.pi * i / turns) for i in range(turns)])


def _area(polygon: np.ndarray) -> float:
    return float((polygon.conj() * np.roll(polygon, -1)).imag.sum() / 2)


SHAPES = {  # within the unit circle: an outline and, for the ring, its hole
    'ring': (_outline([1], 48), _outline([0.5], 48)),
    'square': (_outline([1], 4),),
    'star': (_outline([1, 0.48 * np.exp(0.2j * np.pi)], 5),),
    'disc': (_outline([1], 48),),
    'cross': (_outline([0.94 - 0.34j, 0.94 + 0.34j, 0.34 + 0.34j], 4),),
}
AREAS = {name: _area(outline) - sum(map(_area, hole)) for name, (outline, *hole) in SHAPES.items()}
HUES = {'red': 0.0, 'orange': 0.09, 'yellow': 0.17, 'lime': 0.25, 'green': 0.36}
HUES |= {'teal': 0.46, 'azure': 0.55, 'blue': 0.65, 'violet': 0.77, 'pink': 0.89}
# Each class has its own hue; two classes share a shape.
KINDS = [(shape, list(HUES)[i + j]) for i, shape in enumerate(SHAPES) for j in (0, 5)]
CIRCLE = _outline([1], 24)
GRID = np.add.outer(1j * np.linspace(-0.5, 0.5, 12), np.linspace(-0.5, 0.5, 12))


class Shapes(Dataset):
    """Ten classes of colored shapes on cluttered backgrounds, a function of (seed, split, index).

    A class has its own hue (small networks learn color first) and one of five shapes. The object is rotated, lies
    anywhere inside the image and covers 12 to 28 % of it; hue, saturation and value vary. The background has a
    gradient, noise, blobs and lines in muted colors. All sizes show the same scene.

    Gives an RGB image, passed through `transform` if there is one, and its label, the index modulo 10.
    """

    LENGTHS = {'train': 10_000, 'val': 2_000}

    def __init__(
        self, split: str, size: int, seed: int = 0, length: int | None = None, transform: Callable | None = None
    ):
        self.key = seed, list(self.LENGTHS).index(split)
        self.size, self.length, self.transform = size, length or self.LENGTHS[split], transform
        self.classes = [f'{hue} {shape}' for shape, hue in KINDS]
        # Masks are drawn this much larger and averaged, for smooth edges.
        self.scale = 4 if size <= 64 else 2

    def __len__(self) -> int:
        return self.length

    def mask(self, index: int) -> np.ndarray:
        """Mask of the object, (size, size), bool."""
        return np.asarray(self._object(index)[1]) >= 128

    def _object(self, index: int) -> tuple[np.random.Generator, Image.Image]:
        """The generator of an image, and the opacity of its object, drawn with its first numbers."""
        if not 0 <= index < self.length:
            raise IndexError(f'image {index} of {self.length}')
        rng = np.random.default_rng((*self.key, index))
        shape, _ = KINDS[index % len(KINDS)]
        radius = np.sqrt(rng.uniform(0.12, 0.28) / AREAS[shape])
        x, y = rng.uniform(radius, 1 - radius, 2)
        turn = np.exp(2j * np.pi * rng.random())
        return rng, self._opacity([x + 1j * y + radius * turn * outline for outline in SHAPES[shape]], (255, 0))

    def _opacity(self, polygons: Sequence[np.ndarray], values: Sequence[int]) -> Image.Image:
        """Polygons with smooth edges (size, size), each with its value from 0 to 255; later ones cover earlier ones."""
        side = self.size * self.scale
        image = Image.new('L', (side, side))
        draw = ImageDraw.Draw(image)
        for polygon, value in zip(polygons, values, strict=False):
            draw.polygon((polygon * side).view(np.float64).tolist(), fill=int(value))
        return image.reduce(self.scale)

    def _spread(self, colors: np.ndarray) -> Image.Image:
        """A coarse grid (rows, columns, 3) of colors from 0 to 255, resized to the whole image."""
        grid = Image.fromarray(colors.clip(0, 255).astype(np.uint8))
        return grid.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def __getitem__(self, index: int):
        rng, opacity = self._object(index)
        label = index % len(KINDS)

        def turns(*shape: int) -> np.ndarray:
            return np.exp(2j * np.pi * rng.random(shape))

        def muted(*shape: int) -> np.ndarray:
            return rng.uniform(40, 215, (*shape, 1)) + rng.uniform(-28, 28, (*shape, 3))

        # A gradient in a random direction, and noise.
        start, end = muted(2)
        ramp = (0.5 + 0.7 * (GRID * turns()).real)[..., None]
        image = self._spread(start + (end - start) * ramp + rng.normal(0, rng.uniform(4, 16), ramp.shape))

        # Blobs with wavy outlines, and lines (thin rectangles).
        waves = 1 + 0.35 * (CIRCLE**2 * turns(3, 1)).real + 0.25 * (CIRCLE**3 * turns(3, 1)).real
        blobs = rng.uniform(0.05, 0.15, (3, 1)) * waves * CIRCLE
        lines = np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j]) * rng.uniform(0.1, 0.45, (3, 1))
        lines = (lines.real + 0.04j * lines.imag) * turns(3, 1)
        places = rng.random((6, 1)) + 1j * rng.random((6, 1))
        clutter = [*(blobs + places[:3]), *(lines + places[3:])]
        image.paste(self._spread(muted(2, 2)), mask=self._opacity(clutter, rng.integers(110, 256, 6)))

        hue = HUES[KINDS[label][1]] + rng.uniform(-0.02, 0.02)
        color = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.7, 0.95), rng.uniform(0.75, 0.95)))
        image.paste(self._spread(255 * color * rng.uniform(0.75, 1.2, (2, 2, 1))), mask=opacity)
        return image if self.transform is None else self.transform(image), label

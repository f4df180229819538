"""Figures of predictions: a selection as pixels, a sheet and frames for an image, a contact sheet for several.

Also a plot of how much of the object selections keep, where that is known.
"""

import math
import re
from collections.abc import Sequence
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from models.evolution import Selection

FADED = 0.3  # weight of an uninformative patch's own color, as in the original Evo-ViT; the rest is the hatching
HATCH_GRAY = 128
LINE = 0.45  # weight of black or white in the outline of a cluster
BLUE, ORANGE = '#0072B2', '#D55E00'  # distinguishable with color blindness
MARKS, COLORS = {'right': '✓ ', 'wrong': '✗ ', '': ''}, {'right': BLUE, 'wrong': ORANGE, '': 'black'}
MAX_COLUMNS = 5  # selections side by side in a sheet
HATCHED = 'Hatched patches skip the blocks; none is lost. The selection need not be the object.'


class Prediction(NamedTuple):
    """An image (height, width, 3), uint8, as a model sees it, its class probabilities, and selections by name.

    The parts of a selection are grids (rows, columns): `kept` is True for informative patches, `score` is relative to
    its mean, `cluster` numbers the representative of each patch (None unless it is the nearest).
    """

    image: np.ndarray
    label: int | None
    probabilities: np.ndarray
    selections: dict[str, Selection]


class View(NamedTuple):
    """A picture of an image or of a selection: suffix of the file name, title, pixels, patches to outline."""

    suffix: str
    title: str
    pixels: np.ndarray
    kept: np.ndarray | None = None


# --- words


def slug(selection: str) -> str:
    """'stages.1.blocks.0' in a file name: 'stage1_block0'."""
    return selection.replace('s.', '').replace('.', '_')


def selection_title(selection: str) -> str:
    """'stages.1.blocks.0' in words: 'stage 1, block 0'."""
    return re.sub(r'(\d+)', r' \1', slug(selection)).replace('_', ', ')


def prediction_text(prediction: Prediction, classes: list[str]) -> tuple[str, str]:
    """'right', 'wrong' or '' (no label), and the prediction in words, '' for a model without a head."""
    if not prediction.probabilities.size:
        return '', ''
    best, true = prediction.probabilities.argmax(), prediction.label
    text = f'{classes[best]} {prediction.probabilities[best]:.0%}'
    if true in (None, best):
        return '' if true is None else 'right', text
    return 'wrong', f'{text} (true: {classes[true]} {prediction.probabilities[true]:.0%})'


def likely_classes(prediction: Prediction, classes: list[str]) -> str:
    """A line for each of the three most likely classes, and for the true one."""
    order, true = prediction.probabilities.argsort()[::-1].tolist(), prediction.label
    shown = order[:3] + [c for c in order[3:] if c == true]
    lines = [f'{classes[c]} {prediction.probabilities[c]:.0%}{" (true)" if c == true else ""}' for c in shown]
    return '\n'.join(lines)


def mean_percent(fractions: np.ndarray) -> tuple[float, float]:
    """Mean of a fraction per image in percent, and half of its 95 % interval."""
    return 100 * fractions.mean(), 196 * fractions.std() / math.sqrt(len(fractions))


# --- pixels


def pixel_patches(image: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of patches of each row of pixels, and the same for columns; every grid covers the image evenly.

    Evo-LeViT's coarser grids keep every second row and column of the finer grid. Here they are stretched over the whole
    image, also where 7 rows become 4.
    """
    rows, columns = (np.arange(image.shape[i]) * grid.shape[i] // image.shape[i] for i in (0, 1))
    return rows, columns


def fade(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image (height, width, 3) with patches that are not `kept` (rows, columns) faded and hatched."""
    y, x = pixel_patches(image, kept)
    # Diagonal lines on white show on any image; white alone would not on pale ones, nor gray on gray ones.
    patch = min(len(y) // kept.shape[0], len(x) // kept.shape[1])
    period = max(2, min(max(4, min(len(y), len(x)) // 28), patch))
    lines = np.add.outer(np.arange(len(y)), np.arange(len(x))) % period < max(1, period // 4)
    veil = np.where(lines, HATCH_GRAY, 255)[:, :, None]
    faded = np.rint(FADED * image + (1 - FADED) * veil).astype(np.uint8)
    return np.where(kept[y][:, x, None], image, faded)


def mosaic(image: np.ndarray, kept: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """The image (height, width, 3) with the patches that are not `kept` in the mean color of their cluster.

    Clusters have an outline, darker than a light fill and lighter than a dark one, so that it shows on any image.
    """
    y, x = pixel_patches(image, kept)
    labels = cluster[y][:, x]
    sums = [np.bincount(labels.ravel(), channel.ravel()) for channel in np.moveaxis(image, 2, 0)]
    mean = np.stack(sums, 1) / np.bincount(labels.ravel())[:, None]
    dark = mean @ (0.299, 0.587, 0.114) < 128
    line = (1 - LINE) * mean + LINE * 255 * dark[:, None]
    height, width = labels.shape
    padded = np.pad(labels, 1, 'edge')
    shifts = (0, 1), (2, 1), (1, 0), (1, 2)
    edge = np.any([padded[i : i + height, j : j + width] != labels for i, j in shifts], axis=0)
    filled = np.where(edge[:, :, None], line[labels], mean[labels])
    return np.where(kept[y][:, x, None], image, np.rint(filled).astype(np.uint8))


def views(prediction: Prediction, names: Sequence[str]) -> list[View]:
    """The image, then for each selection in `names` its informative patches, and its clusters if there are any."""
    image, result = prediction.image, [View('', 'image', prediction.image)]
    for name in names:
        kept, cluster = prediction.selections[name].kept, prediction.selections[name].cluster
        title = f'{selection_title(name)}:\n{kept.sum()} of {kept.size}\ninformative'
        result.append(View(f'_{slug(name)}', title, fade(image, kept), kept))
        if cluster is not None:
            title = f'{kept.sum()} patches\nrepresent\nall {kept.size}'
            result.append(View(f'_{slug(name)}_clusters', title, mosaic(image, kept, cluster)))
    return result


# --- drawing


def blank_axes(width: float, height: float, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure, its size in inches, and its axes (rows, columns) without frames."""
    figure = Figure((width, height), layout='constrained')
    figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 0.98))  # a margin, for dark pages
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    return figure, axes


def draw_view(axes: Axes, view: View):
    """Draw the pixels, with an outline around the kept patches, or else around the image."""
    height = view.pixels.shape[0] / view.pixels.shape[1]
    kept = np.ones((1, 1), bool) if view.kept is None else view.kept
    axes.imshow(view.pixels, extent=(0, 1, height, 0))
    lines = []
    for turn, grid in ((slice(None), kept), (slice(None, None, -1), kept.T)):
        for i, j in np.argwhere(np.diff(np.pad(grid, ((1, 1), (0, 0))).astype(int), axis=0)):
            lines.append(np.array([(j, i), (j + 1, i)])[:, turn] / kept.shape[::-1] * (1, height))
    width = min(0.8, 8 / len(kept))
    axes.add_collection(LineCollection(lines, colors='black', linewidths=width, clip_on=False))


def draw_sheet(prediction: Prediction, classes: list[str]) -> Figure:
    """One image: for each selection its informative patches, its clusters if there are any, and its scores."""
    columns = [views(prediction, [name])[1:] for name in prediction.selections]
    scores = [selection.score for selection in prediction.selections.values()]
    bands, rows = math.ceil(len(columns) / MAX_COLUMNS), max(map(len, columns)) + 1
    width = math.ceil(len(columns) / bands)
    figure, axes = blank_axes(2.1 * (width + 1), 2.3 * rows * bands + 0.9, rows * bands, width + 1)
    draw_view(axes[0, 0], *views(prediction, []))
    style = dict(va='center', fontsize=9, linespacing=2, parse_math=False)
    axes[rows - 1, 0].text(0, 0.5, likely_classes(prediction, classes), **style)
    highest = max(np.quantile(score, 0.99) for score in scores)
    for i, (column, score) in enumerate(zip(columns, scores, strict=True)):
        *upper, lowest = axes[rows * (i // width) :, i % width + 1][:rows]
        for each, view in zip(upper, column, strict=False):  # a selection may have no clusters
            draw_view(each, view)
            each.set_title(view.title.replace('\n', ' '), fontsize=8)
        # On a square-root scale, so that a few high scores do not leave the others black.
        extent = (0, 1, prediction.image.shape[0] / prediction.image.shape[1], 0)
        heat = lowest.imshow(score, 'cividis', PowerNorm(0.5, 0, highest, clip=True), extent=extent)
    bar = figure.colorbar(heat, ax=axes[-1, 1:].tolist(), location='bottom', aspect=40, extend='max')
    bar.set_ticks([tick for tick in (0, 1, 2, 4, 8, 16, 32, 64, 128) if tick <= highest])
    bar.set_label('selection score, 1 = mean', fontsize=8)
    bar.ax.tick_params(labelsize=8)
    verdict, text = prediction_text(prediction, classes)
    figure.suptitle(MARKS[verdict] + text, color=COLORS[verdict], fontsize=12, parse_math=False)
    return figure


def draw_contact(predictions: Sequence[Prediction], classes: list[str]) -> Figure:
    """A column for each image: the image, its first, middle and last selection, the last clusters, the prediction."""
    names = list(predictions[0].selections)
    names = [names[i] for i in sorted({0, len(names) // 2, len(names) - 1})]
    columns = [views(prediction, names) for prediction in predictions]
    # Only the last clusters.
    shown = [i for i, view in enumerate(columns[0]) if view.kept is not None or i in (0, len(columns[0]) - 1)]
    columns, rows = [[column[i] for i in shown] for column in columns], len(shown)
    bands = math.ceil(len(columns) / math.ceil(math.sqrt(len(columns) * rows)))
    width = math.ceil(len(columns) / bands)
    figure, axes = blank_axes(1.42 * width + 0.9, (1.42 * rows + 0.3) * bands, rows * bands, width)
    for i, (column, prediction) in enumerate(zip(columns, predictions, strict=True)):
        cells = axes[rows * (i // width) :, i % width][:rows]
        for each, view in zip(cells, column, strict=True):
            draw_view(each, view)
            if i % width == 0:
                each.text(-0.06, 0.5, view.title, fontsize=9, ha='right', va='center', transform=each.transAxes)
        verdict, text = prediction_text(prediction, classes)
        style = dict(color=COLORS[verdict], fontsize=9, ha='center', va='top', parse_math=False)
        cells[-1].text(0.5, -0.06, fill(MARKS[verdict] + text, 20), transform=cells[-1].transAxes, **style)
    figure.supxlabel(fill(HATCHED, 16 * width + 12), fontsize=8)
    return figure


def draw_frames(prediction: Prediction) -> list[Figure]:
    """Frames of an animation, all of one size: the image, then each selection, with its clusters if there are any."""
    height, width, _ = prediction.image.shape
    frames = []
    for view in views(prediction, prediction.selections):
        figure, axes = blank_axes(2.4, 2.4 * height / width + 0.2, 1, 1)
        draw_view(axes[0, 0], view)
        axes[0, 0].set_title(view.title.replace('\n', ' '), fontsize=8)
        frames.append(figure)
    return frames


def draw_coverage(coverage: dict[str, tuple[np.ndarray, float]]) -> Figure:
    """For each selection, the fraction of the object that it keeps, mean and 95 % interval, beside chance."""
    names = [selection_title(name) for name in coverage]
    means, intervals = zip(*(mean_percent(fractions) for fractions, _ in coverage.values()), strict=True)
    figure = Figure((max(4.0, 0.8 * len(names) + 2), 3), layout='constrained')
    axes = figure.subplots()
    axes.errorbar(names, means, intervals, color=BLUE, marker='o', capsize=3, label='of the object')
    axes.plot(names, [100 * chance for _, chance in coverage.values()], '--s', color=ORANGE, label='by chance')
    axes.set(ylim=(0, 100), xlabel='selection before', ylabel='in informative patches (%)')
    axes.tick_params(axis='x', rotation=0 if max(map(len, names)) < 9 else 30)
    axes.legend(frameon=False)
    return figure

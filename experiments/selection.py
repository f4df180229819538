"""Does the selection find the object, and does it find it again in a flipped or shifted image?

    python3 experiments/selection.py --weights deit_tiny_patch16_224_in1k.pth --data-path imagenet-val

Twenty minutes on 2 cores.

Images: 500 validation images of ImageNet (those of imagenet_500.txt; in one, no box is inside the crop) with the boxes
of their objects: boxes.json beside val/, {file: [[x0, y0, x1, y1], ...]} in pixels of the original, or ImageNet's XML
files by --boxes.

Methods: the pretrained model selects half of the patches once, before each of its blocks in turn: by class attention
('attention', as in the original Evo-ViT), by attention and novelty ('novelty', as `nearest` does), or at random.
'centre' is the half nearest to the middle of every image, where objects often are; it was added after the first run.

Columns: the fraction of the box's area that is kept, minus the fraction of patches that is kept (the chance level),
with the 95 % interval over images; and the fraction of the kept patches that is kept again in the mirrored image and in
one shifted by 4 and by 8 px.

Rule, stated before the run: a selection finds the object if the interval of the difference to chance is above 0. One
finds it better than another if their intervals do not overlap.
"""

import json
import time
from pathlib import Path
from xml.etree import ElementTree

import timm
import torch
from common import Rows, add_images, find_images, get_parser, image_transform, mean_interval
from matplotlib.figure import Figure
from PIL import Image
from plots import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import functional

import models
from measure.timing import progress

# Methods and representatives: `nearest` selects by attention and novelty, `none` by attention or random scores.
METHODS = {'attention': ('evolve', 'none'), 'novelty': ('evolve', 'nearest'), 'random': ('random', 'none')}
# Label, marker and color of each; they differ in gray too.
LOOKS = {
    'attention': ('attention', 'o', 'black'),
    'novelty': ('attention × novelty', 's', '#D55E00'),
    'random': ('random scores', '^', '#56B4E9'),
}
SHIFTS = 4, 8  # px
KEEP_RATIO = 0.5


def load_boxes(path: Path) -> dict[str, list]:
    """Boxes [x0, y0, x1, y1] by the file name of the image, from boxes.json or a folder of ImageNet's XML files."""
    if not path.exists():
        raise SystemExit(f'{path}: expected boxes.json, or a folder of XML files; name it with --boxes')
    if not path.is_dir():
        return json.loads(path.read_text())
    corners = 'xmin', 'ymin', 'xmax', 'ymax'
    return {
        f'{file.stem}.JPEG': [
            [int(box.find(name).text) for name in corners] for box in ElementTree.parse(file).iter('bndbox')
        ]
        for file in path.glob('*.xml')
    }


def crop_boxes(boxes: list, size: tuple[int, int], resized: tuple[int, int], crop: int, grid: int) -> Tensor:
    """Fraction of each patch (N,) that boxes cover, after an image of (width, height) is resized and center-cropped."""
    mask = torch.zeros(crop, crop)
    for box in boxes:
        scaled = [value * new / old for value, new, old in zip(box, resized * 2, size * 2, strict=True)]
        x0, y0, x1, y1 = (round(v - (n - crop) / 2) for v, n in zip(scaled, resized * 2, strict=True))
        mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = 1
    return nn.functional.adaptive_avg_pool2d(mask[None], grid).flatten()


@torch.inference_mode()
def kept(model: nn.Module, images: Tensor, block: int, batch_size: int) -> Tensor:
    """Which patches (n, h, w) of images are selected before a block, bool."""
    device, masks = next(model.parameters()).device, []
    for batch in images.split(batch_size):
        selection = model.forward_blocks(batch.to(device), [block], stop_early=True)[1][f'blocks.{block}']
        mask = torch.zeros(len(batch), model.patch_embed.num_patches, dtype=torch.bool, device=device)
        masks.append(mask.scatter(1, selection.kept, True).unflatten(1, model.patch_embed.grid_size).cpu())
    return torch.cat(masks)


def center(grid: int, count: int) -> Tensor:
    """The patches (grid, grid) nearest to the middle of an image, bool."""
    to_middle = (torch.arange(grid) - (grid - 1) / 2) ** 2
    nearest = (to_middle[:, None] + to_middle).flatten().argsort(stable=True)[:count]
    return torch.zeros(grid**2, dtype=torch.bool).index_fill(0, nearest, True).view(grid, grid)


def percent_of_box(masks: Tensor, cover: Tensor) -> Tensor:
    """Percentage (n,) of the boxes' area that is in masks (n, h, w); boxes cover fractions (n, N) of the patches."""
    return 100 * (masks.flatten(1) * cover).sum(1) / cover.sum(1)


def kept_again(first: Tensor, second: Tensor) -> float:
    """Percentage of the patches of one selection that the other has too."""
    return 100 * ((first & second).sum() / first.sum()).item()


def main():
    parser = get_parser(__doc__, 'selection', speed=False)
    add_images(parser)
    parser.add_argument('--boxes', metavar='PATH', help='boxes.json, or a folder of XML files (default: in the data)')
    args = parser.parse_args()
    output, boxes = Path(args.output), load_boxes(Path(args.boxes or Path(args.data_path) / 'boxes.json'))
    paths = find_images(args.data_path, args.images, args.limit)[0]
    if without := [path for path in paths if not boxes.get(path.name)]:
        print(f'without boxes, left out: {len(without)} of {len(paths)} images, such as {without[0].name}')
    paths = [path for path in paths if boxes.get(path.name)]
    if not paths:
        raise SystemExit('--boxes: expected boxes of the images, found none')
    model = timm.create_model(args.model)
    models.load_weights(model, args.weights)
    model.eval().to(args.device)
    crop, resize, normalize = image_transform(resolve_model_data_config(model))
    views, cover = {'plain': [], 'mirrored': [], **{shift: [] for shift in SHIFTS}}, []
    for path in progress(paths, 'loading images'):
        image = Image.open(path).convert('RGB')
        small = resize(image)
        cover.append(crop_boxes(boxes[path.name], image.size, small.size, crop, model.patch_embed.grid_size[0]))
        left, top = (round((n - crop) / 2) for n in small.size)
        views['plain'].append(normalize(small.crop((left, top, left + crop, top + crop))))
        views['mirrored'].append(functional.hflip(views['plain'][-1]))
        for shift in SHIFTS:
            views[shift].append(normalize(small.crop((left + shift, top, left + shift + crop, top + crop))))
    views, cover = {name: torch.stack(images) for name, images in views.items()}, torch.stack(cover)
    seen, grid = cover.sum(1) > 0, model.patch_embed.grid_size[0]
    setup = dict(model=args.model, weights=Path(args.weights).name, images=Path(args.images).stem, n=len(paths))
    rows = Rows(output.with_suffix('.csv'), setup)
    if not rows.has(method='centre', block=0):
        inside = percent_of_box(center(grid, int(KEEP_RATIO * grid**2)).expand(len(cover), grid, grid), cover)[seen]
        off, interval = mean_interval(inside - 100 * KEEP_RATIO)
        percent = inside.mean().item()
        rows.add(method='centre', block=0, keep_ratio=KEEP_RATIO, kept_of_box=percent, off=off, interval=interval)
    for name, (method, representative) in METHODS.items():
        for block in range(1, len(model.blocks)):
            if rows.has(method=name, block=block):
                continue
            started = time.perf_counter()
            torch.manual_seed(block)  # for random selection
            models.apply(model, method, keep_ratio=KEEP_RATIO, stages=(block,))
            model.representative = representative
            masks = {view: kept(model, images, block, args.batch_size) for view, images in views.items()}
            plain = masks['plain']
            inside = percent_of_box(plain, cover)[seen]
            off, interval = mean_interval(inside - 100 * plain[seen].float().mean((1, 2)))
            rows.add(
                method=name, block=block, keep_ratio=KEEP_RATIO, kept_of_box=inside.mean().item(),
                off=off, interval=interval, kept_again_mirrored=kept_again(plain, masks['mirrored'].flip(2)),
                **{f'kept_again_{shift}px': kept_again(plain, masks[shift]) for shift in SHIFTS},
                seconds=round(time.perf_counter() - started),
            )  # fmt: skip
    draw(rows.ours(), output.with_suffix('.png'))


def draw(rows: list[dict], path: Path):
    """Plot over the blocks how much more of the box than by chance is kept, and how much is kept again."""
    figure = Figure((10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for method, (name, marker, color) in LOOKS.items():
        own = sorted((row for row in rows if row['method'] == method), key=lambda row: row['block'])
        blocks, look = [row['block'] for row in own], dict(color=color, mfc='none', markersize=5)
        offs, bars = ([row[key] for row in own] for key in ('off', 'interval'))
        left.errorbar(blocks, offs, bars, fmt=f'{marker}-', capsize=2, label=name, **look)
        for view, style in (('mirrored', '-'), (f'{SHIFTS[-1]}px', ':')):
            label = f'{name}, ' + ('mirrored' if view == 'mirrored' else f'shifted by {SHIFTS[-1]} px')
            right.plot(blocks, [row[f'kept_again_{view}'] for row in own], marker + style, label=label, **look)
    middle = next(row for row in rows if row['method'] == 'centre')
    left.axhline(middle['off'], color='black', linewidth=0.8, linestyle='--', label='the half nearest to the middle')
    left.axhspan(middle['off'] - middle['interval'], middle['off'] + middle['interval'], color='black', alpha=0.1)
    left.axhline(0, color='black', linewidth=0.8, linestyle=':')
    right.axhline(100 * KEEP_RATIO, color='black', linewidth=0.8, linestyle=':')
    left.set(xlabel='selected before block', ylabel='kept of the box minus chance,\npercentage points')
    right.set(xlabel='selected before block', ylabel='of the kept patches, kept again, %')
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=7, loc='center', bbox_to_anchor=(0.5, 0.25))
    for axes in (left, right):
        axes.set_xticks(sorted({row['block'] for row in rows} - {0}))
    figure.suptitle(
        f'{middle["n"]} ImageNet validation images, half of the patches kept; dotted: chance; 95 % intervals',
        fontsize=10,
    )
    save(figure, path)


if __name__ == '__main__':
    main()

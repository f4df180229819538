"""Pictures of the selection: which patches a model updates slowly, layer by layer.

A batch of validation images, chosen at random by --seed:

    python3 visualize.py --model evo_deit_small_vis_patch16_224 --resume /path/to/checkpoint.pth \\
        --output_dir /path/to/save --data-path /path/to/imagenet --batch-size 64

One image; --img-path takes several too, and folders:

    python3 visualize.py --model evo_deit_small_vis_patch16_224 --resume /path/to/checkpoint.pth \\
        --output_dir /path/to/save --img-path ./imgs/a.jpg --save-name evo_test

Does the selection find the object? SHAPES knows where it is:

    python3 visualize.py --model evo_deit_nano_patch4_32 --resume output/checkpoint.pth --output_dir pictures \\
        --data-set SHAPES --batch-size 12 --score

For each image NAME.png is what the model sees; NAME_block4.png the same, its placeholders from block 4 on faded and
hatched (NAME_stage1_block0.png in Evo-LeViT); NAME_sheet.png all of it with the scores and the prediction; NAME.gif,
with --animate, one selection after the other. A batch has a contact sheet too.
"""

import argparse
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

import checkpoint
import datasets
import models
import shapes
import utils
from models import weights
from utils import InputError, say

FADED = 0.3  # of a placeholder's colour is left, the rest is white, as published, but for the grey lines of the hatch
HATCH = 128  # grey level of these lines
BLUE, ORANGE, GREY = '#0072B2', '#D55E00', '#B0B0B0'  # told apart by colour-blind eyes
MARKS, COLOURS = {'right': '✓ ', 'wrong': '✗ ', '': ''}, {'right': BLUE, 'wrong': ORANGE, '': 'black'}
HEAT = 'cividis'
DPI = 150
MOST_COLUMNS = 5  # selections in one row of a sheet
FRAME_MS = 900


class Look(NamedTuple):
    """An image (side, side, 3), uint8, as a model sees it, and what the model makes of it.

    `selections` holds for each which patches it kept, bool, and the score that it chose by, 1 the mean: (rows, rows).
    """

    image: np.ndarray
    label: int | None
    probabilities: np.ndarray
    selections: dict[str, tuple[np.ndarray, np.ndarray]]


def get_parser() -> utils.Parser:
    parser = utils.Parser(__doc__)
    for add in (models.add_arguments, datasets.add_arguments, utils.add_arguments):
        add(parser)
    group = parser.add_argument_group('pictures')
    group.add_argument('--resume', required=True, metavar='PATH', help='checkpoint (path or address), published or own')
    group.add_argument('--output_dir', default='output', metavar='PATH', help='where the pictures go')
    group.add_argument(
        '--img-path', nargs='+', default=[], metavar='PATH', help='images or folders, instead of a data set'
    )
    group.add_argument('--save-name', default='', metavar='NAME', help='name of one image, prefix of several')
    group.add_argument('--layer-wise-prune', action='store_true', help='select before each layer, whatever was trained')
    group.add_argument('--format', default='png', choices=['png', 'jpg', 'pdf'], help='of sheets; copies are png')
    group.add_argument('--animate', action='store_true', help='write a GIF of the selection through the layers')
    group.add_argument('--score', action='store_true', help='share of the object that is kept, all of val (SHAPES)')
    parser.set_defaults(model='evo_deit_small_vis_patch16_224', data_path='')
    return parser


@torch.inference_mode()
def main():
    args = get_parser().parse_args()
    files, output = check_arguments(args)
    device = utils.set_up_processes(args)
    content = weights.read_checkpoint(args.resume, say)
    model = load_model(args, content).to(device)
    known = checkpoint.find_classes(content, args)
    dataset = None
    if args.data_path or args.data_set == 'SHAPES':
        dataset = datasets.build_dataset(args, datasets.data_config(args, args.model), False, *known)
    classes = class_names(dataset.classes if dataset else known[0], model.num_classes)
    prefix = f'{args.save_name}_' if args.save_name else ''
    earlier = sum(not path.name.startswith('.') for path in output.iterdir())
    found = f', which holds {earlier} files: they stay, except those of the same name' if earlier else ''
    say(f'{args.model}: computed in fp32, whatever it was trained in; pictures go to {output}{found}')
    if args.score:
        shares = object_shares(model, dataset, args.batch_size)
        write_figure(output, f'{prefix}score', draw_shares(shares), args.format)
    for number, batch in enumerate(read_images(args, prefix, files, dataset, classes), 1):
        names, images, labels = zip(*batch, strict=True)
        looks = look(model, torch.stack(images).to(device), labels, args.mean, args.std)
        for i, (name, seen) in enumerate(zip(names, looks, strict=True), 1):
            verdict, text = describe(seen, classes)
            name += f'_{verdict}' if verdict else ''
            write_copies(output, name, seen)
            write_figure(output, f'{name}_sheet', draw_sheet(seen, classes), args.format)
            if args.animate:
                utils.write_whole(output / f'{name}.gif', partial(save_gif, seen))
            say(f'[{i}/{len(looks)}] {name}: {text}')
        if len(looks) > 1:
            name = f'{prefix}contact{number}' if files else f'{prefix}seed{args.seed}_contact'
            write_figure(output, name, draw_contact(looks, classes), args.format)


# --- input


def check_arguments(args: argparse.Namespace) -> tuple[list[Path], Path]:
    """The files of --img-path, and the output folder, which can be written to; InputError for what cannot end well."""
    if not re.fullmatch(r'([^./\\\0][^/\\\0]{0,49})?', args.save_name):
        raise InputError(f'--save-name {args.save_name!r}: expected up to 50 characters, no folders, no dot at first')
    if not (args.img_path or args.data_path or args.data_set == 'SHAPES'):
        raise InputError('nothing to look at: expected --img-path, --data-path, or --data-set SHAPES')
    if args.score and args.data_set != 'SHAPES':
        raise InputError(f'--score: only SHAPES knows where its objects are, not {args.data_set}')
    if args.batch_size < 1:
        raise InputError(f'--batch-size: expected 1 or more, found {args.batch_size}')
    if not weights.is_url(args.resume) and not Path(args.resume).is_file():
        raise InputError(f'--resume {args.resume}: {Path(args.resume).absolute()} is not a file')
    files = [file for path in args.img_path for file in find_images(Path(path).expanduser())]
    output = Path(args.output_dir).expanduser()
    if output.resolve() in [file.resolve().parent for file in files]:
        raise InputError(f'--output_dir {output} holds images of --img-path, which pictures could overwrite')
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise InputError(f'--output_dir {output} cannot be written to: {error}') from error
    return files, output


def find_images(path: Path) -> list[Path]:
    """An image file, or those in a folder in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f'--img-path {path}: {path.absolute()} does not exist')
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith('.'))
    if not found:
        raise InputError(f'--img-path {path}: no images there; expected names that end in {", ".join(IMG_EXTENSIONS)}')
    return found


def load_model(args: argparse.Namespace, content: dict) -> nn.Module:
    """The model with the checkpoint's weights, classes and schedule; InputError if it does not fit or never selects."""
    checkpoint.recall_model(args, content)
    config = datasets.data_config(args, args.model)
    vars(args).update(config._asdict())
    say(datasets.describe(config))
    model = models.build(args, checkpoint.find_classes(content, args)[1] or 1000)
    if not hasattr(model, 'forward_with_selection'):
        raise InputError(f'--model {args.model} selects no patches; expected an Evo-DeiT or an Evo-LeViT')
    try:
        loaded = weights.load_weights(model, content, report=say)
    except InputError as error:
        raise InputError(f'{args.resume}: {error}') from error
    if loaded.filled and '_extra_state' not in weights.find_weights(content):
        say(f'{args.resume} holds a plain vision transformer: its selection is one that it was not trained for')
    if args.layer_wise_prune:
        model.set_schedule(stage_wise=False)
    if not model.eval().forward_with_selection(torch.zeros(1, 3, args.input_size, args.input_size))[1]:
        raise InputError(f'{args.resume}: nothing to see, every patch is informative in every block')
    return model


def class_names(names: list[str] | None, count: int) -> list[str]:
    """What `count` classes are called: by their names, where known, or ImageNet's for 1000."""
    described = ImageNetInfo().label_descriptions(as_dict=True)
    names = names or (list(described) if count == 1000 else [f'class {i}' for i in range(count)])
    return [described.get(name, name).split(',')[0] for name in names]


def read_images(
    args: argparse.Namespace, prefix: str, files: list[Path], dataset: Dataset | None, classes: list[str]
) -> Iterator[list[tuple[str, Tensor, int | None]]]:
    """Batches of (name of the pictures, normalised image (3, side, side), label or None)."""
    if not files:
        batch = []
        for index in np.random.default_rng(args.seed).permutation(len(dataset))[: args.batch_size].tolist():
            image, label = dataset[index]
            kind = re.sub(r'[^\w-]+', '_', classes[label])[:60]
            batch.append((f'{prefix}{kind}_seed{args.seed}_{index}', image, label))
        yield batch
    names = [args.save_name or files[0].stem] if len(files) == 1 else picture_names(prefix, files)
    transform = datasets.build_transform(datasets.data_config(args, args.model))
    for start in range(0, len(files), args.batch_size):
        part = slice(start, start + args.batch_size)
        yield [(name, transform(load_upright(f)), None) for name, f in zip(names[part], files[part], strict=True)]


def picture_names(prefix: str, files: Sequence[Path]) -> list[str]:
    """Names for the pictures of several images, none of which is that of another picture.

    They are those of the files, and numbered too where two are the same but for case or ending (a.jpg, a.PNG), or one
    is like what the pictures of another are called (a_block4.jpg).
    """
    stems = [file.stem for file in files]
    reserved = any(re.search(r'(sheet|score|contact\d+|block\d+)$', stem, re.I) for stem in stems)
    if not reserved and len({stem.casefold() for stem in stems}) == len(stems):
        return [prefix + stem for stem in stems]
    digits = len(str(len(stems)))
    return [f'{prefix}{i:0{digits}}_{stem}' for i, stem in enumerate(stems, 1)]


def load_upright(path: Path) -> Image.Image:
    """A photograph as RGB, turned as its EXIF says. (Evaluation does not turn: see datasets.load_image.)"""
    image = datasets.load_image(path)
    try:
        with Image.open(path, formats=datasets.FORMATS) as header:
            image.info = header.info  # which a conversion may have lost
        return ImageOps.exif_transpose(image)
    except Exception as error:  # as in datasets.load_image
        raise InputError(f'{path} cannot be turned upright, its EXIF is damaged: {error}') from error


# --- the model


def look(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[int | None],
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> list[Look]:
    """Show a model images (B, 3, side, side) that are normalised by `mean` and `std`."""
    tokens, selections, _ = model.evolve(images)
    probabilities = model.forward_head(tokens).float().softmax(1).cpu().numpy()
    mean, std = (images.new_tensor(v)[:, None, None] for v in (mean, std))
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    shown = [{} for _ in labels]
    for name, (kept, score, _) in selections.items():
        rows = math.isqrt(score.shape[1])
        chosen, relative = torch.zeros_like(score).scatter(1, kept, 1.0).bool(), score / score.mean(1, keepdim=True)
        chosen, relative = (grid.unflatten(1, (rows, rows)).cpu().numpy() for grid in (chosen, relative))
        for i, mine in enumerate(shown):
            mine[name] = chosen[i], relative[i]
    return [Look(*parts) for parts in zip(pixels, labels, probabilities, shown, strict=True)]


def fade(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image (side, side, 3) with all patches faded and hatched but those kept (rows, rows).

    Every grid covers the image evenly. A patch of Evo-LeViT's coarser grids takes the place of one of the finer grid
    (every second), and so covers it, also where 7 rows become 4.
    """
    at = np.arange(len(image))
    place = at * len(kept) // len(image)
    # White alone would not show on pale images, nor grey on grey ones: diagonal lines on white do on all.
    period = max(2, min(max(4, len(image) // 28), len(image) // len(kept)))
    lines = (at + at[:, None]) % period < max(1, period // 4)
    veil = np.where(lines, HATCH, 255)[:, :, None]
    faded = np.rint(FADED * image + (1 - FADED) * veil).astype(np.uint8)
    return np.where(kept[place][:, place, None], image, faded)


def object_shares(model: nn.Module, dataset: shapes.Shapes, batch_size: int) -> dict[str, tuple[np.ndarray, float]]:
    """For each selection, the share of each image's object (its area) in kept patches, and the share kept by chance."""
    device = next(model.parameters()).device
    shares, chance = {}, {}
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([dataset[i][0] for i in indices]).to(device)
        masks = torch.stack([torch.from_numpy(dataset.mask(i)) for i in indices]).to(device)
        for name, (kept, score, _) in model.evolve(images)[1].items():
            covered = F.adaptive_avg_pool2d(masks[:, None].float(), math.isqrt(score.shape[1])).flatten(1)
            shares.setdefault(name, []).append(covered.gather(1, kept).sum(1) / covered.sum(1))
            chance[name] = kept.shape[1] / score.shape[1]
        if start % (10 * batch_size) == 0:
            say(f'scored {indices.stop} of {len(dataset)} images')
    return {name: (torch.cat(share).cpu().numpy(), chance[name]) for name, share in shares.items()}


# --- drawing


def short(selection: str) -> str:
    """'stages.1.blocks.0' as a part of a file name: 'stage1_block0'."""
    return selection.replace('s.', '').replace('.', '_')


def words(selection: str) -> str:
    """'stages.1.blocks.0' in words: 'stage 1, block 0'."""
    return re.sub(r'(\d+)', r' \1', short(selection)).replace('_', ', ')


def describe(seen: Look, classes: list[str]) -> tuple[str, str]:
    """Whether the prediction is 'right' or 'wrong' ('' without a label), and the prediction in words."""
    best = seen.probabilities.argmax()
    text = f'{classes[best]} {seen.probabilities[best]:.0%}'
    if seen.label in (None, best):
        return '' if seen.label is None else 'right', text
    return 'wrong', f'{text} (true: {classes[seen.label]} {seen.probabilities[seen.label]:.0%})'


def draw_kept(axes: Axes, seen: Look, name: str = '', left: float = 0.0):
    """Draw the image, or a selection with an outline around what is kept, into the square of side 1 at `left`."""
    kept = seen.selections[name][0] if name else np.ones((1, 1), bool)
    axes.imshow(fade(seen.image, kept), extent=(left, left + 1, 1, 0))
    lines = []
    for turn, grid in ((slice(None), kept), (slice(None, None, -1), kept.T)):
        for i, j in np.argwhere(np.diff(np.pad(grid, ((1, 1), (0, 0))).astype(int), axis=0)):
            lines.append(np.array([(j, i), (j + 1, i)])[:, turn] / len(kept) + (left, 0))
    axes.add_collection(LineCollection(lines, colors='black', linewidths=min(0.8, 8 / len(kept))))


def draw_sheet(seen: Look, classes: list[str]) -> Figure:
    """One image and each selection; below, the likely classes, and the score that each selection chose by."""
    bands = math.ceil(len(seen.selections) / MOST_COLUMNS)
    columns = math.ceil(len(seen.selections) / bands)
    figure = Figure((2.1 * (columns + 1), 4.6 * bands + 0.9), layout='constrained')
    axes = figure.subplots(2 * bands, columns + 1, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    draw_kept(axes[0, 0], seen)
    axes[0, 0].set_title('image', fontsize=9)
    draw_classes(axes[1, 0], seen, classes)
    highest = max(np.quantile(score, 0.99) for _, score in seen.selections.values())
    for i, (name, (kept, score)) in enumerate(seen.selections.items()):
        band, column = divmod(i, columns)
        upper, lower = axes[2 * band : 2 * band + 2, column + 1]
        draw_kept(upper, seen, name)
        upper.set_title(f'before {words(name)}\n{kept.sum()} of {kept.size} patches', fontsize=9)
        # By the root, so that a few bright patches do not leave the others black.
        heat = lower.imshow(score, HEAT, PowerNorm(0.5, 0, highest, clip=True), extent=(0, 1, 1, 0))
    bar = figure.colorbar(heat, ax=axes[-1, 1:].tolist(), location='bottom', aspect=40, extend='max')
    bar.set_ticks([tick for tick in (0, 1, 2, 4, 8, 16, 32, 64, 128) if tick <= highest])
    bar.set_label('global class attention so far, 1 = mean', fontsize=8)
    bar.ax.tick_params(labelsize=8)
    verdict, text = describe(seen, classes)
    figure.suptitle(MARKS[verdict] + text, color=COLOURS[verdict], fontsize=12, parse_math=False)
    return figure


def draw_classes(axes: Axes, seen: Look, classes: list[str]):
    """Bars of the three most likely classes, and of the true one."""
    order = seen.probabilities.argsort()[::-1][:3].tolist()
    order += [seen.label] if seen.label is not None and seen.label not in order else []
    for i, c in enumerate(order):
        true = c == seen.label
        axes.barh(i, seen.probabilities[c], height=0.35, color=BLUE if true else GREY)
        text = f'{classes[c]} {seen.probabilities[c]:.0%}' + ' (true)' * true
        axes.text(0, i - 0.28, text, fontsize=9, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(3.6, -0.9))


def draw_contact(looks: Sequence[Look], classes: list[str]) -> Figure:
    """The images of a batch, each beside its first, middle and last selection."""
    names = list(looks[0].selections)
    names = [names[i] for i in sorted({0, len(names) // 2, len(names) - 1})]
    width = 1 + len(names)
    columns = max(1, round(math.sqrt(1.2 * len(looks) / width)))
    rows = math.ceil(len(looks) / columns)
    figure = Figure((columns * width, 1.14 * rows + 0.4), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for each in axes:
        each.set_axis_off()
    for each, seen in zip(axes, looks, strict=False):
        for i, name in enumerate(('', *names)):
            draw_kept(each, seen, name, 1.05 * i)
        each.set(xlim=(-0.01, 1.05 * width - 0.04), ylim=(1.01, -0.01))
        verdict, text = describe(seen, classes)
        each.set_title(MARKS[verdict] + text, color=COLOURS[verdict], fontsize=8, loc='left', pad=2, parse_math=False)
    figure.suptitle(f'images, and what is kept from\n{", ".join(map(short, names))} on', fontsize=8)
    return figure


def draw_shares(shares: dict[str, tuple[np.ndarray, float]]) -> Figure:
    """Draw, and print, how much of the object each selection keeps beside what chance would keep."""
    names = [words(name) for name in shares]
    means, errors, chances = [], [], []
    for name, (share, chance) in zip(names, shares.values(), strict=True):
        means.append(100 * share.mean())
        errors.append(100 * 1.96 * share.std() / math.sqrt(len(share)))
        chances.append(100 * chance)
        kept = f'{name:<16} keeps {means[-1]:.1f} +- {errors[-1]:.1f} % of the object, chance {chances[-1]:.1f} %'
        say(f'{kept}, more in {(share > chance).mean():.0%} of the images')
    say(f'(mean share of its area over {len(share)} images, with the 95 % interval of the mean)')
    figure = Figure((max(4.0, 0.8 * len(names) + 2), 3), layout='constrained')
    axes = figure.subplots()
    axes.errorbar(names, means, errors, color=BLUE, marker='o', capsize=3, label='of the object')
    axes.plot(names, chances, color=ORANGE, marker='s', linestyle='--', label='by chance')
    axes.set(ylim=(0, 100), xlabel='selection before', ylabel='share kept (%)')
    axes.tick_params(axis='x', rotation=0 if max(map(len, names)) < 9 else 30)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, loc='lower right')
    return figure


# --- files


def write_figure(output: Path, name: str, figure: Figure, kind: str):
    """Write NAME.png, NAME.jpg or NAME.pdf."""
    utils.write_whole(output / f'{name}.{kind}', partial(figure.savefig, format=kind, dpi=DPI))


def write_copies(output: Path, name: str, seen: Look):
    """Write the image, and a copy for each selection, pixel by pixel: NAME.png, NAME_block4.png, ..."""
    copies = {f'_{short(selection)}': fade(seen.image, kept) for selection, (kept, _) in seen.selections.items()}
    for ending, pixels in ({'': seen.image} | copies).items():
        utils.write_whole(output / f'{name}{ending}.png', partial(Image.fromarray(pixels).save, format='PNG'))


def save_gif(seen: Look, file: BinaryIO):
    """The image, then each selection."""
    frames = []
    for name in ('', *seen.selections):
        figure, frame = Figure((2.4, 2.6), layout='constrained'), BytesIO()
        axes = figure.subplots()
        axes.set_axis_off()
        draw_kept(axes, seen, name)
        axes.set_title(f'before {words(name)}' if name else 'image', fontsize=9)
        figure.savefig(frame)
        frames.append(Image.open(frame).convert('RGB'))
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)


if __name__ == '__main__':
    utils.run_script(main)

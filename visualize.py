"""Pictures of the selection: which patches go through every block, and which of them represent the others.

A batch of validation images, chosen at random by --seed:

    python3 visualize.py --model evo_deit_small_vis_patch16_224 --resume /path/to/checkpoint.pth \\
        --output_dir /path/to/save --data-path /path/to/imagenet --batch-size 64

One image; --img-path takes several too, and folders:

    python3 visualize.py --model evo_deit_small_vis_patch16_224 --resume /path/to/checkpoint.pth \\
        --output_dir /path/to/save --img-path ./imgs/a.jpg --save-name evo_test

A ViT of timm, evolved without training:

    python3 visualize.py --model deit_tiny_patch16_224 --evolve --resume /path/to/deit_tiny_patch16_224.pth \\
        --output_dir /path/to/save --img-path ./imgs

Does the selection find the object? SHAPES knows where it is:

    python3 visualize.py --model evo_deit_nano_patch4_32 --resume output/checkpoint.pth --output_dir pictures \\
        --data-set SHAPES --batch-size 12 --score

Learning curves of one or several runs:

    python3 visualize.py --log output/first output/second --output_dir pictures

NAME.png is what the model sees, and NAME_block4.png the selection before block 4 (NAME_stage1_block0.png in Evo-LeViT):
patches that are not informative are faded and hatched; they skip the blocks, and none is lost. With --representative
nearest, NAME_block4_clusters.png fills them with the mean colour of the patches that share one informative patch.
NAME_sheet.png has all of these, the scores and the prediction; --animate writes them as NAME.gif. Each batch of several
images has a contact sheet. --score writes score.png.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

import checkpoint
import datasets
import engine
import models
import utils
from image_data import shapes
from image_data.files import FORMATS, load_image
from models.evolution import Selection
from models.vit import Evolving
from pictures import curves
from pictures.drawing import (
    Prediction,
    describe,
    draw_contact,
    draw_frames,
    draw_shares,
    draw_sheet,
    label,
    mean_percent,
    views,
)
from utils import InputError, print_rank0


def get_parser() -> utils.Parser:
    parser = utils.Parser(__doc__)
    for add in (models.add_arguments, datasets.add_image_arguments, utils.add_arguments):
        add(parser)
    add = parser.add_argument_group('pictures').add_argument
    add('--resume', default='', metavar='PATH', help='checkpoint: path or URL; published, ours or of timm')
    add('--log', nargs='+', default=[], metavar='RUN', help='draw the learning curves of these output folders instead')
    add('--output_dir', default='output', metavar='PATH', help='where the pictures go')
    add('--img-path', nargs='+', default=[], metavar='PATH', help='images or folders, instead of a dataset')
    add('--save-name', default='', metavar='NAME', help='name of one image, prefix of several')
    add('--layer-wise-prune', action='store_true', help='select before each layer, whatever the model was trained for')
    add('--format', default='png', choices=['png', 'jpg', 'pdf'], help='of sheets; copies are always png')
    add('--animate', action='store_true', help='also write the pictures of an image as a GIF')
    add(
        '--score',
        action='store_true',
        help='measure how much of the objects informative patches cover in all of val (SHAPES only)',
    )
    parser.set_defaults(model='evo_deit_small_vis_patch16_224', data_path='')
    return parser


@torch.inference_mode()
def main():
    parser = get_parser()
    args = parser.parse_args(namespace=argparse.Namespace(model=None))
    check_arguments(args)
    prefix = f'{args.save_name}_' if args.save_name else ''
    runs = curves.read_logs(args.log)
    files = find_images(args.img_path)
    output = prepare_output_dir(Path(args.output_dir).expanduser(), files)
    if runs:
        print_rank0(f'written: {write_figure(output, f"{prefix}curves", curves.draw_curves(runs), args.format)}')
        return
    device = utils.set_up_processes(args)
    model, config, names, args = load_model(args, parser.get_default('model'))
    model.to(device)
    print_rank0(f'{datasets.describe(config)}\n{engine.describe_model(args.model, model, config.input_size)}')
    if args.precision not in (None, 'fp32'):
        print_rank0(f'trained in {args.precision}, computed in fp32')

    from_dataset = args.data_path or args.data_set == 'SHAPES'
    dataset = datasets.build_dataset(args, config, False, names, model.num_classes or None) if from_dataset else None
    classes = class_names(dataset.classes if dataset else names, model.num_classes)
    if args.score:
        shares = object_shares(model, dataset, args.batch_size)
        print_shares(shares)
        write_figure(output, f'{prefix}score', draw_shares(shares), args.format)
    broken = []
    if files:
        names = picture_names(files, prefix) if len(files) > 1 else [args.save_name or files[0].stem]
        transform = datasets.build_transform(config)
        samples = load_samples(names, files, transform, broken)
    else:
        samples = random_samples(dataset, classes, args.batch_size, args.seed, prefix)
    number = 0
    while batch := list(islice(samples, args.batch_size)):
        names, images, labels = zip(*batch, strict=True)
        predictions = predict(model, torch.stack(images).to(device), labels, config.mean, config.std)
        write_pictures(output, names, predictions, classes, args.format, args.animate)
        number += 1
        if len(predictions) > 1:
            name = f'{prefix}contact{number}' if files else f'{prefix}seed{args.seed}_contact'
            write_figure(output, name, draw_contact(predictions, classes), args.format)
    if broken:
        print(f'{len(broken)} of {len(files)} images could not be drawn:', *broken, sep='\n  ', file=sys.stderr)
        raise SystemExit(1)


# --- input


def check_arguments(args: argparse.Namespace):
    """InputError for flags that cannot work."""
    if not re.fullmatch(r'([^./\\\0][^/\\\0]{0,49})?', args.save_name):
        raise InputError(f'--save-name {args.save_name!r}: expected up to 50 characters, no folders, no dot at first')
    others = [flag for flag in ('resume', 'img_path', 'score', 'animate') if getattr(args, flag)]
    if args.log and others:
        flags = ', '.join(f'--{flag.replace("_", "-")}' for flag in others)
        raise InputError(f'--log draws learning curves alone; leave out {flags}, or --log')
    if args.log:
        return
    if not args.resume:
        raise InputError('expected --resume with a checkpoint, or --log with the output folder of a run')
    if not (args.img_path or args.data_path or args.data_set == 'SHAPES'):
        raise InputError('no images: expected --img-path, --data-path, or --data-set SHAPES')
    if args.score and args.data_set != 'SHAPES':
        raise InputError(f'--score: only SHAPES knows where its objects are, not {args.data_set}')
    utils.check_source('--resume', args.resume)


def find_images(paths: Sequence[str]) -> list[Path]:
    """Image files, and those in folders in the order of their names; InputError where there are none."""
    images = []
    for path in (Path(path).expanduser() for path in paths):
        if not path.exists():
            raise InputError(f'--img-path {path}: {path.absolute()} does not exist')
        files = sorted(path.glob('[!.]*')) if path.is_dir() else [path]
        if path.is_dir() and not (files := [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]):
            raise InputError(f'--img-path {path}: no images there; expected names in {", ".join(IMG_EXTENSIONS)}')
        images += files
    return images


def prepare_output_dir(output: Path, images: Sequence[Path]) -> Path:
    """Make the folder and print how many files it holds; InputError where it cannot be made, or holds `images`."""
    if output.resolve() in [image.resolve().parent for image in images]:
        raise InputError(f'--output_dir {output} holds images of --img-path, which pictures could overwrite')
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'--output_dir {output} cannot be written to: {error}') from error
    existing = sum(not path.name.startswith('.') for path in output.iterdir())
    note = f', which holds {existing} files: they stay, except those of the same name' if existing else ''
    print_rank0(f'pictures go to {output}{note}')
    return output


def load_model(args: argparse.Namespace, default_model: str) -> checkpoint.Restored:
    """The model of --resume with what its pictures need; InputError if it does not fit or never selects."""
    restored = checkpoint.load_model(args, default_model)
    model, args = restored.model, restored.args
    if not isinstance(model, Evolving):
        raise InputError(f'--model {args.model} selects no patches; expected an Evo-DeiT, an Evo-LeViT, or --evolve')
    if model.method in ('merge', 'merge_norm'):
        raise InputError(f'--method {model.method}: it selects no patches that could be shown; expected another method')
    if args.layer_wise_prune:
        model.set_schedule(stage_wise=False)
    if all(group.keep_ratio == 1 for group in model.groups()):
        raise InputError(f'{args.resume}: nothing to show, every patch is informative in every block')
    return restored


def class_names(names: list[str] | None, count: int) -> list[str]:
    """What `count` classes are called: by their names, where known, or ImageNet's for 1000."""
    descriptions = ImageNetInfo().label_descriptions(as_dict=True)
    names = names or (list(descriptions) if count == 1000 else [f'class {i}' for i in range(count)])
    return [descriptions.get(name, name).split(',')[0] for name in names]


def random_samples(dataset: Dataset, classes: list[str], count: int, seed: int, prefix: str) -> Iterator[tuple]:
    """Up to `count` random ones of a dataset: name of the pictures, normalised image (3, height, width), label."""
    for index in np.random.default_rng(seed).permutation(len(dataset))[:count].tolist():
        image, label = dataset[index]
        name = re.sub(r'[^\w-]+', '_', classes[label])[:60]
        yield f'{prefix}{name}_seed{seed}_{index}', image, label


def load_samples(
    names: Sequence[str], files: Sequence[Path], transform: Callable, broken: list[str]
) -> Iterator[tuple]:
    """Images of files, as `random_samples` has them, without labels; why one of several is missing goes to `broken`."""
    for name, file in zip(names, files, strict=True):
        try:
            image = load_upright(file)
        except InputError as error:
            if len(files) == 1:
                raise
            broken.append(str(error))
            continue
        yield name, transform(image), None


def picture_names(files: Sequence[Path], prefix: str) -> list[str]:
    """Names for the pictures of several images, all different, also from what is written beside them.

    They are those of the files. All are numbered too where two are the same but for case or ending (a.jpg, a.PNG), or
    one ends like the picture of another (a_block4.jpg).
    """
    stems = [file.stem for file in files]
    reserved = any(re.search(r'(sheet|score|clusters|contact\d+|block\d+)$', stem, re.I) for stem in stems)
    if not reserved and len({stem.casefold() for stem in stems}) == len(stems):
        return [prefix + stem for stem in stems]
    digits = len(str(len(stems)))
    return [f'{prefix}{i:0{digits}}_{stem}' for i, stem in enumerate(stems, 1)]


def load_upright(path: Path) -> Image.Image:
    """A photograph as RGB, turned as its EXIF says. (Evaluation does not turn: see load_image.)"""
    image = load_image(path)
    try:
        with Image.open(path, formats=FORMATS) as header:
            image.info = header.info  # which a conversion may have lost
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF data raises many kinds
        raise InputError(f'{path} cannot be turned upright, its EXIF is damaged: {error}') from error


# --- the model


def predict(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[int | None],
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> list[Prediction]:
    """Predictions and selections for images (B, 3, height, width) that are normalised by `mean` and `std`."""
    tokens, selections, _ = model.evolve(images)
    logits = model.forward_head(model.norm_tokens(tokens))[:, : model.num_classes]  # none without a head
    probabilities = logits.float().softmax(1).cpu().numpy()
    mean, std = (images.new_tensor(v)[:, None, None] for v in (mean, std))
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    predictions = [Prediction(*parts, {}) for parts in zip(pixels, labels, probabilities, strict=True)]
    for name, selection in selections.items():
        score = selection.score
        grid = grid_shape(score.shape[1], *images.shape[2:])
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, selection.kept, True)
        parts = kept, score / score.mean(1, keepdim=True), selection.cluster
        parts = [[None] * len(kept) if part is None else part.unflatten(1, grid).cpu().numpy() for part in parts]
        for prediction, *own in zip(predictions, *parts, strict=True):
            prediction.selections[name] = Selection(*own)
    return predictions


def grid_shape(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the grid whose patches are nearest to squares."""
    divisors = [n for n in range(1, patches + 1) if patches % n == 0]
    rows = min(divisors, key=lambda n: abs(math.log(n * n * width / (patches * height))))
    return rows, patches // rows


def object_shares(model: nn.Module, dataset: shapes.Shapes, batch_size: int) -> dict[str, tuple[np.ndarray, float]]:
    """For each selection, the share of each image's object (its area) in kept patches, and the share kept by chance."""
    device, reported = next(model.parameters()).device, time.perf_counter()
    shares, chance = {}, {}
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([dataset[i][0] for i in indices]).to(device)
        masks = torch.stack([torch.from_numpy(dataset.mask(i)) for i in indices]).to(device)
        for name, selection in model.evolve(images)[1].items():
            kept, score = selection.kept, selection.score
            grid = grid_shape(score.shape[1], *images.shape[2:])
            covered = F.adaptive_avg_pool2d(masks[:, None].float(), grid).flatten(1)
            shares.setdefault(name, []).append(covered.gather(1, kept).sum(1) / covered.sum(1))
            chance[name] = kept.shape[1] / score.shape[1]
        if (now := time.perf_counter()) - reported > engine.PROGRESS_SECONDS:
            print_rank0(f'scored {indices.stop} of {len(dataset)} images')
            reported = now
    return {name: (torch.cat(share).cpu().numpy(), chance[name]) for name, share in shares.items()}


def print_shares(shares: dict[str, tuple[np.ndarray, float]]):
    """Print how much of the object the informative patches of each selection cover, beside chance."""
    for name, (share, chance) in shares.items():
        mean, interval = mean_percent(share)
        print_rank0(
            f'{label(name):<16} informative patches cover {mean:.1f} +- {interval:.1f} % of the object, '
            f'chance {100 * chance:.1f} %, more in {(share > chance).mean():.0%} of the images'
        )
    print_rank0(f'(mean share of its area over {len(share)} images, with the 95 % interval of the mean)')


# --- files


def write_pictures(
    output: Path, names: Sequence[str], predictions: Sequence[Prediction], classes: list[str], kind: str, animate: bool
):
    """Write the copies and the sheet of each image, and print its prediction."""
    for i, (name, prediction) in enumerate(zip(names, predictions, strict=True), 1):
        verdict, text = describe(prediction, classes)
        name = f'{name}_{verdict}' if verdict else name
        write_copies(output, name, prediction)
        write_figure(output, f'{name}_sheet', draw_sheet(prediction, classes), kind)
        if animate:
            write_gif(output, name, draw_frames(prediction))
        print_rank0(f'[{i}/{len(predictions)}] {name}: {text}')


def write_copies(output: Path, name: str, prediction: Prediction):
    """Write the image, and copies for each selection, pixel by pixel: NAME.png, NAME_block4.png, ..."""
    for view in views(prediction, prediction.selections):
        save = partial(Image.fromarray(view.pixels).save, format='PNG')
        utils.atomic_write(output / f'{name}{view.ending}.png', save)


def write_gif(output: Path, name: str, figures: Sequence[Figure]):
    """Write NAME.gif, which shows each figure for 0.9 s, again and again."""
    frames = []
    for canvas in map(FigureCanvasAgg, figures):
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB'))
    options = dict(save_all=True, append_images=frames[1:], duration=900, loop=0)
    utils.atomic_write(output / f'{name}.gif', partial(frames[0].save, format='GIF', **options))


def write_figure(output: Path, name: str, figure: Figure, kind: str) -> Path:
    """Write NAME.png, NAME.jpg or NAME.pdf; returns its path."""
    options, path = {'pil_kwargs': {'quality': 85}} if kind == 'jpg' else {}, output / f'{name}.{kind}'
    utils.atomic_write(path, partial(figure.savefig, format=kind, dpi=150, **options))
    return path


if __name__ == '__main__':
    utils.run_script(main)

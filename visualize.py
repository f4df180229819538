"""Pictures of the selection: which patches go through every block, and which of them represent the others.

Images (files or folders), or a batch of validation images, chosen at random by --seed:

    python3 visualize.py --model evo_deit_small_vis_patch16_224 --resume /path/to/checkpoint.pth \\
        --output_dir /path/to/save --img-path ./imgs/a.jpg --save-name evo_test
    python3 visualize.py --model evo_deit_small_vis_patch16_224 --resume /path/to/checkpoint.pth \\
        --output_dir /path/to/save --data-path /path/to/imagenet --batch-size 64

A ViT of timm, evolved without training (--resume takes its weights):

    python3 visualize.py --model deit_tiny_patch16_224 --evolve --resume deit_tiny_patch16_224.pth --img-path ./imgs

Learning curves of runs (curves.png):

    python3 visualize.py --log output/first output/second

Each image gives NAME_sheet.png with everything: selections, clusters, scores, prediction. NAME.png is the image as the
model sees it, NAME_block4.png the selection before block 4 (hatched patches are not informative), and
NAME_block4_clusters.png the patches that share a representative. Several images also give a contact sheet.
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
import networks
import utils
from image_data import shapes
from image_data.files import FORMATS, load_image
from models.evolution import Selection
from models.vit import Evolving
from pictures import curves
from pictures.drawing import (
    Prediction,
    draw_contact,
    draw_coverage,
    draw_frames,
    draw_sheet,
    mean_percent,
    prediction_text,
    selection_title,
    views,
)
from utils import InputError, print_rank0


def get_parser() -> utils.Parser:
    parser = utils.Parser(__doc__)
    parser.usage = '%(prog)s --resume PATH (--img-path PATH ... | --data-path PATH) [--model NAME] [options]'
    add = parser.add_argument_group('pictures').add_argument
    add('--resume', default='', metavar='PATH', help='checkpoint or weights: path or URL')
    add('--img-path', nargs='+', default=[], metavar='PATH', help='images or folders (default: validation images)')
    add('--output_dir', default='output', metavar='PATH', help='where the pictures go')
    add('--save-name', default='', metavar='NAME', help='name of one image, prefix of several')
    add('--layer-wise-prune', action='store_true', help='select before each layer, whatever the training did')
    add('--format', default='png', choices=['png', 'jpg', 'pdf'], help='of sheets; the other pictures are png')
    add('--animate', action='store_true', help='also write NAME.gif, the selections in motion')
    about = 'on SHAPES, measure how much of the objects the informative patches cover (score.png)'
    add('--score', action='store_true', help=about)
    about = 'only draw the learning curves of these output folders (default: none)'
    add('--log', nargs='+', default=[], metavar='RUN', help=about)
    for add_flags in (networks.add_arguments, datasets.add_image_arguments, utils.add_arguments):
        add_flags(parser)
    parser.set_defaults(model='evo_deit_small_vis_patch16_224', data_path='')
    return parser


@torch.inference_mode()
def main():
    parser = get_parser()
    args = parser.parse_args(namespace=argparse.Namespace(model=None))  # None: --model was not given
    check_arguments(args)
    prefix = f'{args.save_name}_' if args.save_name else ''
    # Everything that can be wrong with the input is read before a folder is made.
    runs = curves.read_logs(args.log)
    files = find_images(args.img_path)
    output = prepare_output_dir(Path(args.output_dir).expanduser(), files)
    if runs:
        print_rank0(f'written: {write_figure(output, f"{prefix}curves", curves.draw_curves(runs), args.format)}')
        return
    device = utils.set_up_processes(args)
    model, config, names, args = load_selecting_model(args, parser.get_default('model'))
    model.to(device)
    print_rank0(f'{datasets.describe(config)}\n{engine.describe_model(args.model, model, config.input_size)}')
    if args.precision not in (None, 'fp32'):
        print_rank0(f'trained in {args.precision}, computed in fp32')

    from_dataset = args.data_path or args.data_set == 'SHAPES'
    dataset = datasets.build_dataset(args, config, False, names, model.num_classes or None) if from_dataset else None
    classes = class_names(dataset.classes if dataset else names, model.num_classes)
    if args.score:
        coverage = object_coverage(model, dataset, args.batch_size)
        print_coverage(coverage)
        write_figure(output, f'{prefix}score', draw_coverage(coverage), args.format)
    broken = []
    if files:
        names = picture_names(files, prefix) if len(files) > 1 else [args.save_name or files[0].stem]
        samples = load_samples(names, files, datasets.build_transform(config), broken)
    else:
        samples = random_samples(dataset, classes, args.batch_size, args.seed, prefix)
    sheets, contact_sheets = [], []
    while batch := list(islice(samples, args.batch_size)):
        names, images, labels = zip(*batch, strict=True)
        predictions = predict(model, torch.stack(images).to(device), labels, config.mean, config.std)
        sheets += write_pictures(output, names, predictions, classes, args.format, args.animate)
        if len(predictions) > 1:
            name = f'{prefix}contact{len(contact_sheets) + 1}' if files else f'{prefix}seed{args.seed}_contact'
            contact_sheets.append(write_figure(output, name, draw_contact(predictions, classes), args.format))
    if sheets:
        rest = f', and a sheet and its parts for each of {len(sheets)} images' if contact_sheets else ', and its parts'
        print_rank0(f'written: {(contact_sheets or sheets)[0]}{rest}')
    if broken:
        print(f'{len(broken)} of {len(files)} images could not be drawn:', *broken, sep='\n  ', file=sys.stderr)
        raise SystemExit(1)


# --- input


def check_arguments(args: argparse.Namespace):
    """InputError for flags that do not go together, or are missing."""
    if not re.fullmatch(r'([^./\\\0][^/\\\0]{0,49})?', args.save_name):
        raise InputError(f'--save-name {args.save_name!r}: expected up to 50 characters without folders or leading dot')
    others = [flag for flag in ('resume', 'img_path', 'score', 'animate') if getattr(args, flag)]
    if args.log and others:
        flags = ', '.join(f'--{flag.replace("_", "-")}' for flag in others)
        raise InputError(f'--log only draws learning curves; leave out {flags}, or --log')
    if args.log:
        return
    if not args.resume:
        raise InputError('expected --resume with a checkpoint, or --log with the output folder of a run')
    if not (args.img_path or args.data_path or args.data_set == 'SHAPES'):
        raise InputError('no images: expected --img-path, --data-path, or --data-set SHAPES')
    if args.score and args.data_set != 'SHAPES':
        raise InputError(f'--score needs masks of the objects; expected --data-set SHAPES, found {args.data_set}')
    utils.check_source('--resume', args.resume)


def find_images(paths: Sequence[str]) -> list[Path]:
    """Image files, and those in folders in sorted order; InputError if there are none."""
    images = []
    for path in (Path(path).expanduser() for path in paths):
        if not path.exists():
            raise InputError(f'--img-path {path}: {path.absolute()} does not exist')
        files = sorted(path.glob('[!.]*')) if path.is_dir() else [path]
        if path.is_dir() and not (files := [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]):
            raise InputError(f'--img-path {path} holds no images; expected names in {", ".join(IMG_EXTENSIONS)}')
        images += files
    return images


def prepare_output_dir(output: Path, images: Sequence[Path]) -> Path:
    """Make the folder and print how many files it holds; InputError if that fails, or it holds `images`."""
    if output.resolve() in [image.resolve().parent for image in images]:
        raise InputError(f'--output_dir {output} holds images of --img-path, which pictures could overwrite')
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'--output_dir {output} cannot be written to: {error}') from error
    existing = sum(not path.name.startswith('.') for path in output.iterdir())
    note = f', which holds {existing} files; those with the same names are replaced' if existing else ''
    print_rank0(f'pictures go to {output}{note}')
    return output


def load_selecting_model(args: argparse.Namespace, default_model: str) -> checkpoint.Restored:
    """The model of --resume; InputError if it does not fit the weights, or selects no patches."""
    restored = checkpoint.load_model(args, default_model)
    model, args = restored.model, restored.args
    if not isinstance(model, Evolving):
        raise InputError(f'--model {args.model} selects no patches; expected an Evo-DeiT, an Evo-LeViT, or --evolve')
    if model.method in ('merge', 'merge_norm'):
        raise InputError(f'--method {model.method} selects no patches; expected another method')
    if args.layer_wise_prune:
        model.set_schedule(stage_wise=False)
    if all(group.keep_ratio == 1 for group in model.groups()):
        raise InputError(f'{args.resume}: every patch is informative in every block; set --keep-ratio')
    return restored


def class_names(names: list[str] | None, count: int) -> list[str]:
    """Names to print for `count` classes: `names` (synsets in words), or ImageNet's for 1000."""
    descriptions = ImageNetInfo().label_descriptions(as_dict=True)
    names = names or (list(descriptions) if count == 1000 else [f'class {i}' for i in range(count)])
    return [descriptions.get(name, name).split(',')[0] for name in names]


def random_samples(dataset: Dataset, classes: list[str], count: int, seed: int, prefix: str) -> Iterator[tuple]:
    """Up to `count` random images of a dataset: name, normalized image (3, height, width), label."""
    for index in np.random.default_rng(seed).permutation(len(dataset))[:count].tolist():
        image, label = dataset[index]
        name = re.sub(r'[^\w-]+', '_', classes[label])[:60]
        yield f'{prefix}{name}_seed{seed}_{index}', image, label


def load_samples(
    names: Sequence[str], files: Sequence[Path], transform: Callable, broken: list[str]
) -> Iterator[tuple]:
    """Images of files, as in `random_samples` but without labels; errors of single images go to `broken`."""
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
    """Unique names for the pictures of several images: those of the files.

    All are numbered if two differ only in case or suffix (a.jpg, a.PNG), or one looks like another's picture
    (a_block4.jpg).
    """
    stems = [file.stem for file in files]
    reserved = any(re.search(r'(sheet|score|clusters|contact\d+|block\d+)$', stem, re.I) for stem in stems)
    if not reserved and len({stem.casefold() for stem in stems}) == len(stems):
        return [prefix + stem for stem in stems]
    digits = len(str(len(stems)))
    return [f'{prefix}{i:0{digits}}_{stem}' for i, stem in enumerate(stems, 1)]


def load_upright(path: Path) -> Image.Image:
    """A photograph as RGB, turned upright by its EXIF data. (Evaluation does not turn: see `load_image`.)"""
    image = load_image(path)
    try:
        with Image.open(path, formats=FORMATS) as header:
            image.info = header.info  # converting may have lost it
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF data raises any kind
        raise InputError(f'{path} cannot be turned upright, its EXIF data is damaged: {error}') from error


# --- the model


def predict(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[int | None],
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> list[Prediction]:
    """Predictions and selections for images (B, 3, height, width), normalized by `mean` and `std`."""
    tokens, selections, _ = model.forward_blocks(images)
    logits = model.forward_head(model.norm_tokens(tokens))[:, : model.num_classes]  # none without a head
    probabilities = logits.float().softmax(1).cpu().numpy()
    mean, std = (images.new_tensor(v)[:, None, None] for v in (mean, std))
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    predictions = [Prediction(*parts, {}) for parts in zip(pixels, labels, probabilities, strict=True)]
    for name, selection in selections.items():
        score = selection.score
        grid = grid_shape(score.shape[1], *images.shape[2:])
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, selection.kept, True)
        cluster = selection.cluster
        if cluster is not None:  # without prefix tokens, which are the first clusters
            prefix = cluster.shape[1] - score.shape[1]
            cluster = cluster[:, prefix:] - prefix
        parts = kept, score / score.mean(1, keepdim=True), cluster
        parts = [[None] * len(kept) if part is None else part.unflatten(1, grid).cpu().numpy() for part in parts]
        for prediction, *own in zip(predictions, *parts, strict=True):
            prediction.selections[name] = Selection(*own)
    return predictions


def grid_shape(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the grid with the most nearly square patches."""
    divisors = [n for n in range(1, patches + 1) if patches % n == 0]
    rows = min(divisors, key=lambda n: abs(math.log(n * n * width / (patches * height))))
    return rows, patches // rows


def object_coverage(model: nn.Module, dataset: shapes.Shapes, batch_size: int) -> dict[str, tuple[np.ndarray, float]]:
    """For each selection, the fraction of each object's area in informative patches, and the fraction by chance."""
    device, reported = next(model.parameters()).device, time.perf_counter()
    fractions, chance = {}, {}
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([dataset[i][0] for i in indices]).to(device)
        masks = torch.stack([torch.from_numpy(dataset.mask(i)) for i in indices]).to(device)
        for name, selection in model.forward_blocks(images)[1].items():
            kept, score = selection.kept, selection.score
            grid = grid_shape(score.shape[1], *images.shape[2:])
            covered = F.adaptive_avg_pool2d(masks[:, None].float(), grid).flatten(1)
            fractions.setdefault(name, []).append(covered.gather(1, kept).sum(1) / covered.sum(1))
            chance[name] = kept.shape[1] / score.shape[1]
        if (now := time.perf_counter()) - reported > engine.PROGRESS_SECONDS:
            print_rank0(f'scored {indices.stop} of {len(dataset)} images')
            reported = now
    return {name: (torch.cat(parts).cpu().numpy(), chance[name]) for name, parts in fractions.items()}


def print_coverage(coverage: dict[str, tuple[np.ndarray, float]]):
    """Print how much of the object the informative patches of each selection cover, beside chance."""
    for name, (fractions, chance) in coverage.items():
        mean, interval = mean_percent(fractions)
        print_rank0(
            f'{selection_title(name):<16} informative patches cover {mean:.1f} +- {interval:.1f} % of the object, '
            f'chance {100 * chance:.1f} %, above chance in {(fractions > chance).mean():.0%} of the images'
        )
    print_rank0(f'(mean fraction of its area over {len(fractions)} images, with the 95 % interval of the mean)')


# --- files


def write_pictures(
    output: Path, names: Sequence[str], predictions: Sequence[Prediction], classes: list[str], kind: str, animate: bool
) -> list[Path]:
    """Write the pictures of each image and print its prediction; returns the paths of the sheets."""
    sheets = []
    for i, (name, prediction) in enumerate(zip(names, predictions, strict=True), 1):
        verdict, text = prediction_text(prediction, classes)
        name = f'{name}_{verdict}' if verdict else name
        write_copies(output, name, prediction)
        sheets.append(write_figure(output, f'{name}_sheet', draw_sheet(prediction, classes), kind))
        if animate:
            write_gif(output, name, draw_frames(prediction))
        print_rank0(f'[{i}/{len(predictions)}] {name}: {text}')
    return sheets


def write_copies(output: Path, name: str, prediction: Prediction):
    """Write the image and its selections at the size of the model's input: NAME.png, NAME_block4.png, ..."""
    for view in views(prediction, prediction.selections):
        save = partial(Image.fromarray(view.pixels).save, format='PNG')
        utils.atomic_write(output / f'{name}{view.suffix}.png', save)


def write_gif(output: Path, name: str, figures: Sequence[Figure]):
    """Write NAME.gif, which loops over the figures, 0.9 s each."""
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

"""A model for other runtimes: ONNX, a program of torch.export, or a folder that timm and the Hugging Face hub read.

Any model, with a batch of any size, compared with the file that was written:

    python3 export.py --model deit_tiny_patch16_224 --evolve --resume deit_tiny_patch16_224.pth --format onnx --check
    python3 export.py --model EvoLeViT_128S --resume /path/to/checkpoint.pth --fuse --format pt2 --check
    python3 export.py --model evo_deit_tiny_patch16_224 --resume /path/to/checkpoint.pth --format hub --output folder

Speed-up over the dense model, exported the same way; the two alternate, at batch sizes 1 and 32:

    python3 export.py --model deit_tiny_patch16_224 --evolve --resume weights.pth --format onnx --bench 1 32

ONNX needs the packages onnx and onnxscript, and onnxruntime to check or time it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import TenCrop

import checkpoint
import datasets
import engine
import models
import utils
from image_data.files import load_image
from measure.timing import time_alternately
from models import hub
from utils import InputError, at_least, print_rank0

EXPORT_BATCH = 2  # not the 10 of `check_images`, or the check would not see a batch that became a constant
PHOTOGRAPH = Path(__file__).parent / 'imgs' / 'a.jpg'
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16}
TOLERANCE = {'fp32': 1e-4, 'fp16': 0.05}  # of the largest output
WARM_UP, TURNS = 3, 30
MAX_ONNX = 2**31  # bytes: protobuf's limit


def get_parser() -> utils.Parser:
    parser = utils.Parser(__doc__)
    models.add_arguments(parser)
    add = parser.add_argument_group('export').add_argument
    add('--resume', default='', metavar='PATH', help='checkpoint: path or URL; published, ours or of timm')
    add('--eval-ema', action='store_true', help='take its averaged weights')
    add('--input-size', type=at_least(1), metavar='PX', help="side of the images; without, the checkpoint's or model's")
    add('--fuse', action='store_true', help='fold what can be folded, and drop heads that training alone uses')
    add('--format', default='onnx', choices=('onnx', 'pt2', 'hub'), help='hub is a folder for timm')
    add('--precision', default='fp32', choices=tuple(TOLERANCE), help='of weights, images and logits')
    add('--output', metavar='PATH', help='file, or folder for hub; without, output/MODEL.FORMAT')
    add('--overwrite', action='store_true', help='replace what --output holds')
    add('--check', action='store_true', help='compare what was written with the model, on crops of a photograph')
    add('--bench', type=at_least(1), nargs='+', metavar='B', help='time it beside the dense model at these batch sizes')
    # No images are read here; how to prepare them is the checkpoint's or the model's, and is written with the model.
    parser.set_defaults(**dict.fromkeys(set(datasets.DataConfig._fields) - {'input_size'}))
    return parser


def main():
    args = get_parser().parse_args()
    check_arguments(args)
    model, config, classes, args = load_model(args)
    check_model(args)
    path = Path(args.output or f'output/{args.model}.{args.format}')
    check_output(path, args.format, args.overwrite)
    about = config._asdict() | {'input_size': (3, config.input_size, config.input_size), 'classes': classes}
    write(model, path, args.format, about)
    print_rank0(f'{path}: {sum(file.stat().st_size for file in list_files(path, args.format)) / 1e6:,.1f} MB')
    if args.check and args.format == 'onnx' and not installed('onnxruntime'):
        print_rank0('not checked: that needs the package onnxruntime')
    elif args.check:
        check(model, args.format, path, check_images(config, DTYPES[args.precision]), TOLERANCE[args.precision])
    if args.bench:
        dense = build_dense(args, model, config.input_size)
        bench(model, dense, args.format, path, config.input_size, args.bench)


def check_arguments(args: argparse.Namespace):
    """InputError, before anything is built, for what cannot work: files, packages, combinations of flags."""
    if bool(args.resume) == args.pretrained:
        found = 'both' if args.resume else 'neither'
        raise InputError(f"expected --resume with a checkpoint, or --pretrained for timm's weights; found {found}")
    if not (args.model or args.resume):
        raise InputError('--model: expected the name of a model, found none')
    utils.check_source('--resume', args.resume)
    if args.eval_ema and not args.resume:
        raise InputError('--eval-ema needs --resume with a checkpoint that holds averaged weights')
    needed = ['onnx', 'onnxscript', *(['onnxruntime'] if args.bench else [])] if args.format == 'onnx' else []
    if missing := [name for name in needed if not installed(name)]:
        raise InputError(f'--format onnx needs what is not installed: pip install {" ".join(missing)}')
    if args.format == 'hub' and args.bench:
        raise InputError('--bench times a program: expected --format onnx or pt2, found hub')
    if args.model:
        check_model(args)


def check_model(args: argparse.Namespace):
    """InputError for what cannot work with the model, which the checkpoint may say."""
    ours = models.dense_twin(args.model) is not None
    if args.format == 'hub' and args.fuse and not ours:
        raise InputError(f'--fuse: timm does not load a folded {args.model} from a folder; leave --fuse out')
    if args.bench and not (ours or args.method):
        raise InputError(f'--bench compares with the dense model, which {args.model} is already; add --evolve')


def list_files(path: Path, format: str) -> list[Path]:
    """The files that an export writes at --output."""
    return [path / name for name in hub.FILES] if format == 'hub' else [path]


def check_output(path: Path, format: str, overwrite: bool):
    """InputError where --output is of another kind, or holds a model, unless that may be overwritten."""
    kind = 'folder' if format == 'hub' else 'file'
    if path.exists() and path.is_dir() != (kind == 'folder'):
        raise InputError(f'--output {path}: expected a {kind} for --format {format}')
    if not overwrite and (existing := [str(file) for file in list_files(path, format) if file.exists()]):
        raise InputError(f'{" and ".join(existing)} exists; choose another --output, or replace it with --overwrite')


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_model(args: argparse.Namespace) -> checkpoint.Restored:
    """The model of the flags for inference, folded and in its precision, and what it came with."""
    precision = DTYPES[args.precision]
    model, config, classes, args = checkpoint.load_model(args, use_ema=args.eval_ema)
    if args.fuse:
        engine.fuse(model)
    print_rank0(f'{engine.describe_model(args.model, model, config.input_size)}\n{datasets.describe(config)}')
    return checkpoint.Restored(model.to(precision), config, classes, args)


# --- writing


def write(model: nn.Module, path: Path, format: str, about: dict):
    """Write a model whole or not at all, with what its user must know of images and classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == 'hub':
        try:
            hub.save(model, path, about)
        except (ValueError, OSError) as error:
            raise InputError(f'{path}: {error}') from error
        return
    images, about = random_images(model, EXPORT_BATCH, about['input_size'][-1]), json.dumps(about)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    if format == 'pt2':
        extra = {'preprocessing.json': about}
        utils.atomic_write(path, lambda file: torch.export.save(program, file, extra_files=extra))
        return
    program = torch.onnx.export(
        program, (images,), dynamo=True, verbose=False, input_names=['images'], output_names=['logits']
    )
    program.model.metadata_props['preprocessing'] = about
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size > MAX_ONNX:
        raise InputError(f'an ONNX file holds up to 2 GB, these weights are {size / 1e9:.1f} GB; use --format pt2')
    utils.atomic_write(path, lambda file: file.write(program.model_proto.SerializeToString()))


def random_images(model: nn.Module, batch: int, size: int) -> Tensor:
    """Normal noise (batch, 3, size, size), always the same, in the precision of the model."""
    noise = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).dtype)


# --- running what was written


def check_images(config: datasets.DataConfig, dtype: torch.dtype) -> Tensor:
    """Ten images (10, 3, size, size): the corners and the centre of a photograph, and their mirror images.

    Not noise: its patches score nearly the same, so that rounding decides which are informative.
    """
    photograph, transform = load_image(PHOTOGRAPH), datasets.build_transform(config)
    crops = TenCrop(round(0.8 * min(photograph.size)))(photograph)
    return torch.stack([transform(crop) for crop in crops]).to(dtype)


def load_program(path: Path, format: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """What was written, as a function of images; ONNX Runtime gets as many threads as torch has."""
    if format == 'pt2':
        return torch.export.load(path).module()
    if format == 'hub':
        return hub.load(f'local-dir:{path}').eval().to(dtype)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # in half precision it warns of each kernel that a CPU lacks
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


@torch.no_grad()
def check(model: nn.Module, format: str, path: Path, images: Tensor, tolerance: float):
    """Compare what was written with the model on images; InputError where the logits differ."""
    expected = model(images)
    off = (load_program(path, format, images.dtype)(images) - expected).abs().flatten(1).amax(1)
    largest = expected.abs().max().item()
    wrong = ~(off <= tolerance * largest)  # NaN too
    result = f'largest difference {off.max():.1e}, of logits up to {largest:.3g}, batch {len(images)}'
    if wrong.any():
        raise InputError(f'{path} differs from the model in {wrong.sum()} images: {result}')
    print_rank0(f'{path} agrees with the model: {result} (exported with {EXPORT_BATCH})')


def build_dense(args: argparse.Namespace, model: nn.Module, size: int) -> nn.Module:
    """The dense model to compare with, of random weights, fused as the other is."""
    name, options = models.dense_twin(args.model) or (args.model, args.model_kwargs or {})
    dense = models.create(name, model.num_classes, size, **options).eval()
    if args.fuse:
        engine.fuse(dense)
    return dense.to(DTYPES[args.precision])


@torch.no_grad()
def bench(model: nn.Module, dense: nn.Module, format: str, path: Path, size: int, batches: list[int]):
    """Print images a second of what was written and of the dense model, written the same way, alternately."""
    with tempfile.TemporaryDirectory() as folder:
        dense_path = Path(folder) / f'dense.{format}'
        write(dense, dense_path, format, {'input_size': (3, size, size)})
        programs = load_program(path, format), load_program(dense_path, format)
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('torch', 'onnxruntime') if installed(name)]
    print_rank0(f'{", ".join(versions)}, {torch.get_num_threads()} threads, medians of {TURNS} turns')
    for batch in batches:
        images = random_images(model, batch, size)
        calls = [partial(program, images) for program in programs]
        seconds = time_alternately(calls, TURNS, WARM_UP, torch.device('cpu'))
        evolved, other = (f'{batch / median:.1f} img/s' for median in np.median(seconds, 0))
        low, speedup, high = np.percentile(seconds[:, 1] / seconds[:, 0], (10, 50, 90))
        spread = f'10th to 90th percentile: {low:.2f} to {high:.2f}'
        print_rank0(f'batch {batch}: evolved {evolved}, dense {other}; speed-up {speedup:.2f} ({spread})')


if __name__ == '__main__':
    utils.run_script(main)

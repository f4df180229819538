"""Export a model to ONNX, to a program of torch.export, or to a folder that timm and the Hugging Face Hub read.

    python3 export.py --model deit_tiny_patch16_224 --evolve --resume deit_tiny_patch16_224.pth --check
    python3 export.py --model EvoLeViT_128S --resume checkpoint.pth --fuse --format pt2 --check
    python3 export.py --model evo_deit_tiny_patch16_224 --resume checkpoint.pth --format hub --output folder
    python3 export.py --model deit_tiny_patch16_224 --evolve --resume weights.pth --bench 1 32

Exports have a dynamic batch size. --check compares the logits of the export with the model's. --bench also exports
the dense baseline and times the two in turns. ONNX needs the packages onnx and onnxscript; --check and --bench also
need onnxruntime.
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
import networks
import utils
from image_data.files import load_image
from measure.timing import time_alternately
from models import hub
from utils import InputError, at_least, print_rank0

EXPORT_BATCH = 2  # not the 10 of `check_images`, so that --check catches a hard-coded batch size
PHOTOGRAPH = Path(__file__).parent / 'imgs' / 'a.jpg'
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16}
TOLERANCE = {'fp32': 1e-4, 'fp16': 0.05}  # relative to the largest logit
WARM_UP, TURNS = 3, 30
MAX_ONNX = 2**31  # bytes, the limit of protobuf
HOW_TO_LOAD = {
    'onnx': "load it with onnxruntime.InferenceSession('{}')",
    'pt2': "load it with torch.export.load('{}').module()",
    'hub': "load it with models.hub.load('local-dir:{}')",
}


def get_parser() -> utils.Parser:
    parser = utils.Parser(__doc__)
    parser.usage = '%(prog)s [--model NAME] [--resume PATH] [--format onnx|pt2|hub] [other flags]'
    add = parser.add_argument_group('export').add_argument
    add('--resume', default='', metavar='PATH', help="checkpoint, a path or URL: ours, timm's or the original one")
    add('--eval-ema', action='store_true', help='use its averaged weights')
    add('--format', default='onnx', choices=('onnx', 'pt2', 'hub'), help='hub is a folder for timm')
    add('--output', metavar='PATH', help='file, or folder for hub (default: output/MODEL.FORMAT)')
    add('--overwrite', action='store_true', help='replace what --output holds')
    add('--check', action='store_true', help="compare the logits with the model's, on crops of a photograph")
    add('--bench', type=at_least(1), nargs='+', metavar='B', help='speed-up over the dense baseline at batch sizes B')
    add('--input-size', type=at_least(1), metavar='PX', help="image size (default: the checkpoint's or the model's)")
    add('--precision', default='fp32', choices=tuple(TOLERANCE), help='of weights, images and logits')
    add('--fuse', action='store_true', help='fold BatchNorms and drop heads that only training uses')
    networks.add_arguments(parser)
    # Preprocessing comes from the checkpoint or the model and is written with it; only the size can be set.
    parser.set_defaults(**dict.fromkeys(set(datasets.DataConfig._fields) - {'input_size'}))
    return parser


def main():
    args = get_parser().parse_args()
    check_flags(args)
    model, config, classes, args = load_for_export(args)
    check_model(args)
    path = Path(args.output or f'output/{args.model}.{args.format}')
    check_output(path, args.format, args.overwrite)
    about = config._asdict() | {'input_size': (3, config.input_size, config.input_size), 'classes': classes}
    if args.format != 'hub':
        print_rank0(f'exporting to {path}; this can take a minute or more')
    write(model, path, args.format, about)
    if args.check and args.format == 'onnx' and not installed('onnxruntime'):
        print_rank0('--check: skipped, because the package onnxruntime is not installed')
    elif args.check:
        check(model, args.format, path, check_images(config, DTYPES[args.precision]), TOLERANCE[args.precision])
    if args.bench:
        dense = build_dense(args, model, config.input_size)
        bench(model, dense, args.format, path, config.input_size, args.bench)
    size = sum(file.stat().st_size for file in list_files(path, args.format)) / 1e6
    print_rank0(f'wrote {path}, {size:,.1f} MB; {HOW_TO_LOAD[args.format].format(path)}')


def check_flags(args: argparse.Namespace):
    """Raises InputError for missing files and packages and for flags that exclude each other, before any work."""
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
        raise InputError(f'--format onnx: missing packages; run pip install {" ".join(missing)}')
    if args.format == 'hub' and args.bench:
        raise InputError('--bench times a program: expected --format onnx or pt2, found hub')
    if args.model:
        check_model(args)


def check_model(args: argparse.Namespace):
    """Raises InputError for flags that exclude the model, whose name may come from the checkpoint."""
    ours = networks.dense_baseline(args.model) is not None
    if args.format == 'hub' and args.fuse and not ours:
        raise InputError(f'--fuse: timm cannot load a fused {args.model} from a folder; leave --fuse out')
    if args.bench and not (ours or args.method):
        raise InputError(f'--bench compares with the dense baseline, which {args.model} is already; add --evolve')


def list_files(path: Path, format: str) -> list[Path]:
    """The files of an export to --output."""
    return [path / name for name in hub.FILES] if format == 'hub' else [path]


def check_output(path: Path, format: str, overwrite: bool):
    """Raises InputError if --output exists, unless it may be overwritten, or is a file where a folder is needed."""
    kind = 'folder' if format == 'hub' else 'file'
    if path.exists() and path.is_dir() != (kind == 'folder'):
        raise InputError(f'--output {path}: expected a {kind} for --format {format}')
    if not overwrite and (existing := [str(file) for file in list_files(path, format) if file.exists()]):
        raise InputError(f'{" and ".join(existing)} exists; choose another --output, or replace it with --overwrite')


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_for_export(args: argparse.Namespace) -> checkpoint.Restored:
    """The model, for inference, with --fuse and --precision applied; and what came with it."""
    precision = DTYPES[args.precision]
    model, config, classes, args = checkpoint.load_model(args, use_ema=args.eval_ema)
    if args.fuse:
        engine.fuse(model)
    print_rank0(f'{engine.describe_model(args.model, model, config.input_size)}\n{datasets.describe(config)}')
    return checkpoint.Restored(model.to(precision), config, classes, args)


# --- writing


def write(model: nn.Module, path: Path, format: str, about: dict):
    """Write a model, with its preprocessing and class names; an interrupted write leaves no file."""
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
        raise InputError(
            f'--format onnx: expected at most 2 GB of weights, found {size / 1e9:.1f} GB; use --format pt2'
        )
    utils.atomic_write(path, lambda file: file.write(program.model_proto.SerializeToString()))


def random_images(model: nn.Module, batch: int, size: int) -> Tensor:
    """Fixed normal noise (batch, 3, size, size) in the precision of the model."""
    noise = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).dtype)


# --- running what was written


def check_images(config: datasets.DataConfig, dtype: torch.dtype) -> Tensor:
    """Ten images (10, 3, size, size): corners and center of a photograph, and their mirror images."""
    # On noise all patches score alike, and rounding would decide which are informative.
    photograph, transform = load_image(PHOTOGRAPH), datasets.build_transform(config)
    crops = TenCrop(round(0.8 * min(photograph.size)))(photograph)
    return torch.stack([transform(crop) for crop in crops]).to(dtype)


def load_program(path: Path, format: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """What was written, as a function from images to logits, on as many threads as torch uses."""
    if format == 'pt2':
        return torch.export.load(path).module()
    if format == 'hub':
        return hub.load(f'local-dir:{path}').eval().to(dtype)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # otherwise it warns of every fp16 kernel that a CPU lacks
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


@torch.no_grad()
def check(model: nn.Module, format: str, path: Path, images: Tensor, tolerance: float):
    """Raises InputError if the logits of what was written differ from the model's."""
    expected = model(images)
    difference = (load_program(path, format, images.dtype)(images) - expected).abs().max().item()
    largest = expected.abs().max().item()
    found = f'largest difference {difference:.1e}, logits up to {largest:.3g}, {len(images)} images'
    if not difference <= tolerance * largest:  # NaN too
        raise InputError(f'{path} differs from the model by more than {tolerance:g} of the largest logit: {found}')
    print_rank0(f'{path} agrees with the model: {found}')


def build_dense(args: argparse.Namespace, model: nn.Module, size: int) -> nn.Module:
    """The dense baseline, with random weights, prepared as the model is."""
    name, options = networks.dense_baseline(args.model) or (args.model, args.model_kwargs or {})
    dense = networks.create(name, model.num_classes, size, **options).eval()
    if args.fuse:
        engine.fuse(dense)
    return dense.to(DTYPES[args.precision])


@torch.no_grad()
def bench(model: nn.Module, dense: nn.Module, format: str, path: Path, size: int, batches: list[int]):
    """Print img/s of what was written and of the dense baseline, exported the same way and timed in turns."""
    with tempfile.TemporaryDirectory() as folder:
        dense_path = Path(folder) / f'dense.{format}'
        write(dense, dense_path, format, {'input_size': (3, size, size)})
        programs = load_program(path, format), load_program(dense_path, format)
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('torch', 'onnxruntime') if installed(name)]
    print_rank0(f'{", ".join(versions)}, {torch.get_num_threads()} threads, medians over {TURNS} turns')
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

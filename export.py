"""A model for other runtimes: ONNX, a program of torch.export, or a folder that timm and the Hugging Face hub read.

Any model, with a batch of any size, compared with the file that was written:

    python3 export.py --model deit_tiny_patch16_224 --evolve --resume deit_tiny_patch16_224.pth --format onnx --check
    python3 export.py --model EvoLeViT_128S --resume /path/to/checkpoint.pth --fuse --format pt2 --check
    python3 export.py --model evo_deit_tiny_patch16_224 --resume /path/to/checkpoint.pth --format hub --output folder

How much faster than the dense model is it there? The two alternate, at batch sizes 1 and 32:

    python3 export.py --model deit_tiny_patch16_224 --evolve --format onnx --bench 1 32

ONNX needs the packages onnx and onnxscript, and onnxruntime to check or time it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

import checkpoint
import datasets
import engine
import models
import utils
from costs import keep_freed_memory
from models import hub
from models.vit import Evolving
from utils import InputError, at_least, print_rank0

EXPORT_BATCH, CHECK_BATCH = 2, 8  # two sizes, or the check would not see a batch that became a constant
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
    add('--check', action='store_true', help='compare what was written with the model, at another batch size')
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
    about = config._asdict() | {'input_size': (3, config.input_size, config.input_size), 'classes': classes}
    operators = write(model, path, args.format, about)
    print_rank0(describe(path, operators))
    if args.check and args.format == 'onnx' and not installed('onnxruntime'):
        print_rank0('not checked: that needs the package onnxruntime')
    elif args.check:
        check(model, args.format, path, config.input_size, TOLERANCE[args.precision])
    if args.bench:
        dense = build_dense(args, model, config.input_size)
        bench(model, dense, args.format, path, config.input_size, args.bench)


def check_arguments(args: argparse.Namespace):
    """InputError, before anything is built, for what cannot work: files, packages, combinations of flags."""
    if not (args.model or args.resume):
        raise InputError('--model: expected the name of a model, or --resume with a checkpoint that has it; found none')
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


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_model(args: argparse.Namespace) -> checkpoint.Restored:
    """The model of the flags for inference, folded and in its precision, and what it came with."""
    precision = DTYPES[args.precision]
    model, config, classes, args = checkpoint.load_model(args, use_ema=args.eval_ema)
    if not args.resume:
        print_rank0('without --resume the weights are those that the model was created with')
    if args.fuse:
        engine.fuse(model)
    print_rank0(f'{engine.describe_model(args.model, model, config.input_size)}\n{datasets.describe(config)}')
    return checkpoint.Restored(model.to(precision), config, classes, args)


# --- writing


def write(model: nn.Module, path: Path, format: str, about: dict) -> Counter:
    """Write a model whole or not at all, with what its user must know of images and classes; returns its operators."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == 'hub':
        try:
            hub.save(model, path, about)
        except (ValueError, OSError) as error:
            raise InputError(f'{path}: {error}') from error
        return Counter()
    images, about = random_images(model, EXPORT_BATCH, about['input_size'][-1]), json.dumps(about)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    if format == 'pt2':
        extra = {'preprocessing.json': about}
        utils.atomic_write(path, lambda file: torch.export.save(program, file, extra_files=extra))
        calls = [node for node in program.graph.nodes if node.op == 'call_function']
        return Counter(getattr(node.target, '__name__', str(node.target)).split('.')[0] for node in calls)
    program = torch.onnx.export(
        program, (images,), dynamo=True, verbose=False, input_names=['images'], output_names=['logits']
    )
    program.model.metadata_props['preprocessing'] = about
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size > MAX_ONNX:
        raise InputError(f'an ONNX file holds up to 2 GB, these weights are {size / 1e9:.1f} GB; use --format pt2')
    utils.atomic_write(path, lambda file: file.write(program.model_proto.SerializeToString()))
    return Counter(node.op_type for node in program.model.graph)


def describe(path: Path, operators: Counter) -> str:
    """A line about what was written: its size, and how often it has each operator."""
    files = [path] if path.is_file() else [path / name for name in hub.FILES]
    counts = ', '.join(f'{name} {count}' for name, count in operators.most_common())
    return f'{path}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB' + (
        f', {operators.total():,} operators: {counts}' if operators else ''
    )


def random_images(model: nn.Module, batch: int, size: int) -> Tensor:
    """Normal noise (batch, 3, size, size), always the same, in the precision of the model."""
    noise = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).dtype)


# --- running what was written


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
def check(model: nn.Module, format: str, path: Path, size: int, tolerance: float):
    """Compare what was written with the model; InputError where they differ.

    Where two scores or similarities are equal but for rounding, both choices of patches are right, and the outputs of
    the image differ. That it chooses otherwise is said, not how near the two were; it is an error in more than a
    quarter of the images.
    """
    images = random_images(model, CHECK_BATCH, size)
    expected = model(images)
    off = (load_program(path, format, images.dtype)(images) - expected).abs().flatten(1).amax(1)
    largest = expected.abs().max().item()
    wrong = ~(off <= tolerance * largest)  # NaN too
    choosing = isinstance(model, Evolving) and format != 'hub' and wrong.any()
    others = wrong & off.isfinite() & other_choices(model, format, images) if choosing else torch.zeros_like(wrong)
    worst = off.masked_fill(others, 0).max()
    result = f'largest difference {worst:.1e}, of outputs up to {largest:.3g}, batch {CHECK_BATCH}'
    if others.any():
        result += (
            f'; {others.sum()} of the images are left out, in which it chooses other patches, as it may where scores '
            f'or similarities are equal but for rounding (difference {off[others].max():.1e})'
        )
    if (wrong & ~others).any() or 4 * others.sum() > CHECK_BATCH:
        raise InputError(f'{path} differs from the model in {wrong.sum()} images: {result}')
    print_rank0(f'{path} agrees with the model: {result} (exported with {EXPORT_BATCH})')


def other_choices(model: Evolving, format: str, images: Tensor) -> Tensor:
    """For each image, whether a program of the model selects patches, or lets them represent others, as it does not."""
    choices = Choices(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'choices.{format}'
        write(choices, path, format, {'input_size': images.shape[1:]})
        found = load_program(path, format)(images)
    return (found != choices(images)).any(1)


class Choices(nn.Module):
    """What a model selects, and by whom patches are represented: raster indices (B, all of them one after another)."""

    def __init__(self, model: Evolving):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        choices = []
        for kept, _, cluster in self.model.evolve(images)[1].values():
            choices += [kept.sort(1).values] if cluster is None else [kept.gather(1, cluster)]
        return torch.cat(choices, 1)


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
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        dense_path = Path(folder) / f'dense.{format}'
        write(dense, dense_path, format, {'input_size': (3, size, size)})
        programs = load_program(path, format), load_program(dense_path, format)
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('torch', 'onnxruntime') if installed(name)]
    print_rank0(f'{", ".join(versions)}, {torch.get_num_threads()} threads, medians of {TURNS} turns')
    for batch in batches:
        images, seconds = random_images(model, batch, size), ([], [])
        for turn in range(WARM_UP + TURNS):
            for program, times in zip(programs, seconds, strict=True):
                start = time.perf_counter()
                program(images)
                if turn >= WARM_UP:
                    times.append(time.perf_counter() - start)
        evolved, other = (f'{batch / median(times):.1f} img/s' for times in seconds)
        ratios = quantiles((d / e for e, d in zip(*seconds, strict=True)), n=10)
        spread = f'{ratios[4]:.2f} times, 10 to 90 %: {ratios[0]:.2f} to {ratios[8]:.2f}'
        print_rank0(f'batch {batch}: evolved {evolved}, dense {other}; {spread}')


if __name__ == '__main__':
    utils.run_script(main)

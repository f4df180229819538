"""Measure speed, memory and arithmetic of any registered model, beside its dense twin, timm's model of the same size.

With defaults for the machine at hand, about a minute on a CPU; then as fast as a GPU can be made, in every mode:

    python3 benchmark.py
    python3 benchmark.py --model 'evo_deit_*_patch16_224' 'EvoLeViT_???' EvoLeViT_128S --compile \\
        --bench inference latency train --results_file results.csv --plot results.png

Sweeps of keep ratio or of resolution; end to end, with the real loader:

    python3 benchmark.py --keep-ratio 0.3 0.5 0.7 0.9 --plot keep.png
    python3 benchmark.py --img_size 224 384 512 768 --plot sizes.png
    python3 benchmark.py --bench train --data-path /path/to/imagenet

A model and its twin take turns, call by call, so that whatever else the machine does hits both alike. The speed-up is
the median ratio of neighbouring calls. Beside it stands the ratio of the arithmetic: what it would be if nothing else
took time.
"""

import csv
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
import traceback
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate, chain, cycle, islice, product
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox
from timm.layers import to_2tuple
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import datasets
import engine
import losses
import main_deit
import main_levit
import models
import utils
from checkpoint import State
from losses import HALF
from utils import InputError, say

aten = torch.ops.aten

MODELS = ['evo_deit_tiny_patch16_224', 'EvoLeViT_128S']
MODES = ['inference', 'latency', 'train']
# Flags of a run that is kept: nothing is read from one here, or written to one.
RUN_FLAGS = (
    *('output_dir', 'resume', 'auto_resume', 'overwrite', 'accept_changes', 'finetune', 'eval', 'eval_ema'),
    *('save_interval_steps', 'keep_checkpoints', 'start_epoch'),
)
PUBLISHED_PRECISIONS = {'float32': 'fp32', 'float16': 'fp16', 'bfloat16': 'bf16'}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
PASSES = 3  # end to end, how often a model is given the loader's batches
LATENCY_CALLS = 5  # times --num_bench_iter, as a percentile needs more calls than a median
P99_CALLS = 100  # with fewer, the percentile 99 is hardly more than the slowest call
OUT_OF_MEMORY = 'out of memory'
# Fused attentions that not every version of FlopCounterMode knows, and one with the same first arguments that it does.
COUNTED_AS = {
    '_scaled_dot_product_flash_attention_for_cpu': aten._scaled_dot_product_flash_attention,
    '_scaled_dot_product_fused_attention_overrideable': aten._scaled_dot_product_flash_attention,
    '_scaled_dot_product_attention_math_for_mps': aten._scaled_dot_product_flash_attention,
    '_scaled_dot_product_flash_attention_for_cpu_backward': aten._scaled_dot_product_flash_attention_backward,
    '_scaled_dot_product_fused_attention_overrideable_backward': aten._scaled_dot_product_flash_attention_backward,
}
# Names of operators that multiply matrices, such as addmm, _conv_depthwise2d, mkldnn_linear_backward.
MATRIX_PRODUCT = re.compile(
    '(^|_)([a-z]*mm|matmul|linear|conv|conv[123]d|convolution|attention|attn|einsum|(add)?mv|v?dot|bilinear|rnn)(_|$)'
)

# The columns of the results: what was measured, what came out, in which circumstances.
FIELDS = (
    'mode input model architecture keep_ratio selection image_size batch '
    'images_per_second images_per_second_p10 images_per_second_p90 ms ms_p90 ms_p99 n peak_mib parameters gmacs '
    'speedup speedup_p10 speedup_p90 arithmetic_ratio error '
    'device precision autocast compile channels_last fused threads torch timm date commit'
).split()
# The columns of the table: a field, its heading, and the width, negative where it is aligned to the left.
TABLE = (
    ('mode', 'mode', -9), ('model', 'model', -26), ('image_size', 'px', 7), ('batch', 'batch', 6),
    ('keep_ratio', 'keep', 5), ('images_per_second', 'img/s', 9), ('images_per_second_p10', 'img/s p10', 9),
    ('images_per_second_p90', 'img/s p90', 9), ('ms', 'ms', 9), ('ms_p90', 'ms p90', 9), ('ms_p99', 'ms p99', 9),
    ('n', 'calls', 5), ('peak_mib', 'peak MiB', 9), ('parameters', 'parameters', 10), ('gmacs', 'GMACs/img', 9),
    ('speedup', 'speed-up', 9), ('speedup_p10', 'speed-up p10', 12), ('speedup_p90', 'speed-up p90', 12),
    ('arithmetic_ratio', 'MACs ratio', 10), ('error', '', 1),
)  # fmt: skip
BUSY_LOAD = 0.5  # processes that others may have running before a measurement is called disturbed
DISTURBED, UNUSABLE = 1.5, 10  # spread of img/s, percentile 90 to percentile 10, from which on results need a warning
PLOT_AXES = {'image_size': 'side of the images, px', 'batch': 'images a call', 'gmacs': 'GMACs an image'}
# Lines that coincide stay apart: each later one is thinner, and broken in another way.
LINE_STYLES = [
    dict(fmt=marker + line, linewidth=width, markersize=2 * width + 2, markerfacecolor='none')
    for marker, line, width in (
        ('o', '-', 3), ('s', '--', 2), ('^', ':', 2), ('D', '-.', 1.5), ('v', '-', 1), ('P', '--', 1), ('X', ':', 1),
    )
]  # fmt: skip


def get_parser() -> utils.Parser:
    """Flags of measuring; those of training are left for the parser of engine."""
    parser = utils.Parser(__doc__)
    add = parser.add_argument_group('what is measured').add_argument
    add('--model', '-m', nargs='+', default=MODELS, metavar='NAME', help="ours or timm's; a pattern with * is several")
    add('--model_list', metavar='FILE', help='file of names, in place of --model')
    add('--bench', nargs='+', default=MODES[:2], choices=[*MODES, 'both'], help='both: inference and train')
    add('--compare', action=BooleanOptionalAction, default=True, help='measure the dense twins too')
    add('--batch-size', '-b', type=int, nargs='+', metavar='N', help='one or a sweep (default: 256, on a CPU 32)')
    add('--img_size', type=int, nargs='+', metavar='PX', help="one side or a sweep (default: the model's)")
    add('--input_size', type=int, nargs=3, metavar=('C', 'H', 'W'), help='for images that are not square')
    add('--keep-ratio', type=keep_ratios, nargs='+', metavar='R',
        help='share of informative patches, one or a sweep; one for each stage is 0.7,0.5')  # fmt: skip
    add('--layer-wise', action='store_true', help='select before each layer (default: before each stage)')
    add('--num_classes', type=int, metavar='N', help="outputs (default: 1000, or the data set's)")
    add('--data-path', metavar='PATH', help='measure end to end, with the loader (default: the model alone, on noise)')

    add = parser.add_argument_group('how it runs').add_argument
    add('--precision', type=lambda name: PUBLISHED_PRECISIONS.get(name, name), choices=['fp32', 'tf32', *HALF, 'amp'],
        help='of weights in inference, of autocast in training (default: half on a GPU, fp32 on a CPU)')  # fmt: skip
    add('--amp', action='store_true', help='autocast in inference too, in half precision; also --precision amp')
    add('--compile', '--torchscript', action='store_true', help='torch.compile, in inference on a GPU with CUDA graphs')
    add(
        '--freeze', action='store_true', help='with --compile, which it implies, in inference: weights become constants'
    )
    add('--channels-last', action='store_true', help='memory format of images and convolutions')
    add('--fuse', action=BooleanOptionalAction, default=True, help='in inference: fold BatchNorms, drop training heads')
    add('--threads', type=int, metavar='N', help="on a CPU (default: PyTorch's choice)")

    add = parser.add_argument_group('how it is measured').add_argument
    add('--num_warm_iter', type=int, metavar='N', help='calls before timing (default: 10, on a CPU 2)')
    add('--num_bench_iter', type=int, metavar='N', help='calls that are timed (default: 40, on a CPU 10); '
        f'latency: {LATENCY_CALLS} times as many; end to end: batches in each of {PASSES} passes')  # fmt: skip
    add('--detail', action='store_true', help='print on which operators a call spends its time')
    add('--results_file', metavar='PATH', help='add rows to a .csv, or to a .jsonl of JSON lines')
    add('--plot', metavar='PATH', help='draw img/s against GMACs, or against sizes or batches where they are several')
    add('--gp', metavar='POOL', help='accepted without effect: the pooling belongs to the model')
    add('--drop_block', type=float, metavar='RATE', help='accepted without effect: these models have no such layer')
    utils.add_arguments(parser)
    parser.add_argument_group(
        'training step and loader',
        'All other flags of main_deit.py and main_levit.py, with the defaults of the recipe of the model:\n'
        '--opt --opt_eps --opt_betas --momentum --weight_decay --clip_grad --clip_mode --smoothing --drop\n'
        '--drop_path --data-set --num_workers ...',
    )
    return parser


def keep_ratios(text: str) -> list[float]:
    """One value of --keep-ratio: a number, or one for each stage."""
    try:
        return [float(ratio) for ratio in text.split(',')]
    except ValueError as error:
        raise ArgumentTypeError(f'expected a number, or one for each stage as in 0.7,0.5, found {text!r}') from error


def main():
    """Measure what the flags ask for, case by case, and keep each row at once; exit with 1 if one had an error."""
    load = os.getloadavg()[0]
    args, recipe = get_parser().parse_known_args()
    device = utils.set_up_processes(args)
    settle(args, device)
    cases = [
        make_case(args, recipe, mode, name, size, batch)
        for mode in args.bench
        for name in find_models(args)
        for size in args.img_size or [None]
        for batch in ([1] if mode == 'latency' else args.batch_size)
    ]
    common = describe_circumstances(args, device)
    say(', '.join(f'{key} {value}' for key, value in (common | {'compile': args.compile}).items()))
    warn_if_busy(load, torch.get_num_threads() if device.type == 'cpu' else 1)
    widths = table_widths(args, cases)
    say(table_row({name: heading for name, heading, _ in TABLE}, widths))
    rows = []
    for i, case in enumerate(cases, 1):
        progress = f'[{i}/{len(cases)}] {case.mode}, {case.model}, {case.input_size} px, batch {case.batch_size}'
        print(progress, file=sys.stderr, flush=True)
        for row in measure(args, case, device):
            rows.append(common | row)
            say(table_row(row, widths))
            if args.results_file:
                write_row(rows[-1], args.results_file)
        torch.compiler.reset()  # compiled code belongs to a class: that of earlier cases would count as recompilation
        free_memory(device)
    warn_of_spread(rows)
    if args.plot:
        swept = {'image_size': args.img_size, 'batch': args.batch_size}
        plot(rows, next((x for x, values in swept.items() if values and len(values) > 1), 'gmacs'), args.plot)
    failed = sum(row.get('error', OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows)
    if failed:
        print(f'{failed} of {len(rows)} rows could not be measured: the end of each says why', file=sys.stderr)
        raise SystemExit(1)


# --- what is measured


def settle(args: Namespace, device: torch.device):
    """Fill in what depends on the machine, refuse what would fail late, and set PyTorch's global switches."""
    cpu = device.type == 'cpu'
    for name in ('num_warm_iter', 'num_bench_iter', 'threads', 'num_classes', 'batch_size', 'img_size', 'input_size'):
        value = getattr(args, name)
        if value is not None and min(np.atleast_1d(value)) < 1:
            raise InputError(f'--{name.replace("_", "-")}: expected 1 or more, found {value}')
    args.bench = [m for m in MODES if m in args.bench or ('both' in args.bench and m != 'latency')]
    args.batch_size = args.batch_size or [32 if cpu else 256]
    args.num_bench_iter = args.num_bench_iter or (10 if cpu else 40)
    args.num_warm_iter = args.num_warm_iter or (2 if cpu else 10)
    if args.precision == 'amp':
        args.amp, args.precision = True, None
    if args.amp and args.precision not in (None, *HALF):
        raise InputError(
            f'--amp is autocast to half precision, found --precision {args.precision} beside it; '
            'use --precision fp16 or bf16, or leave one of the two flags out'
        )
    asked = Namespace(precision=args.precision, eval=False, recipe_precision=None)
    args.precision = engine.pick_precision(asked, device)
    if args.amp and args.precision not in HALF:  # where the machine's own is fp32
        args.precision = 'bf16'
    if args.input_size and args.input_size[0] != 3:
        raise InputError(f'--input_size: expected 3 channels, found {args.input_size[0]}')
    if args.input_size and not args.img_size:
        height, width = args.input_size[1:]
        args.img_size = [height if height == width else (height, width)]
    for path, kinds in ((args.results_file, ['.csv', '.jsonl']), (args.plot, ['.png', '.svg', '.pdf'])):
        if path and (Path(path).suffix not in kinds or not Path(path).absolute().parent.is_dir()):
            raise InputError(f'{path}: expected a file in a folder that exists, named {" or ".join(kinds)}')
    if args.results_file and args.results_file.endswith('.csv') and Path(args.results_file).exists():
        head = Path(args.results_file).read_text().partition('\n')[0]
        if head and head.split(',') != FIELDS:
            raise InputError(f'{args.results_file} has other columns than {",".join(FIELDS)}; choose another file')
    if args.threads:
        torch.set_num_threads(args.threads)
    with suppress(OSError, AttributeError):  # a C library other than GNU's
        # Memory that is freed stays here: whether a call gets new pages of the kernel would be chance, and takes time.
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_MMAP_MAX, 0)
        allocator.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    engine.set_backends(args.precision, device)
    args.compile |= args.freeze
    if args.compile:
        torch._dynamo.config.recompile_limit = 256  # after 8 models of a class PyTorch would silently stop to compile
        torch._inductor.config.freezing = args.freeze  # as an option of a single compilation it comes too late
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # the profiler complains where there is no GPU


def find_models(args: Namespace) -> list[str]:
    """Names of the models that the flags ask for; InputError with the nearest names where there is none."""
    names = args.model
    if args.model_list:
        try:
            names = Path(args.model_list).read_text().split()
        except OSError as error:
            raise InputError(f'--model_list {args.model_list} cannot be read: {error}') from error
        if not names:
            raise InputError(f'--model_list {args.model_list}: expected names of models, found none; write one a line')
    # A pattern does not mean the second names that the same networks have.
    found = {
        name: [name] if timm.is_model(name) else timm.list_models(name, exclude_filters='*_vis_*') for name in names
    }
    for name, matches in found.items():
        if matches in ([], [name]):  # no model, or what may be one with a tag that timm does not know
            models.published_cfg(name)
    return list(dict.fromkeys(chain(*found.values())))


def make_case(
    args: Namespace, recipe: list[str], mode: str, name: str, size: int | tuple[int, int] | None, batch: int
) -> Namespace:
    """What main_deit.py or main_levit.py would run with, given the flags `recipe`, and the mode."""
    if 'levit' in name.lower():
        defaults = main_levit.RECIPE | {'distillation_type': 'none'}  # its teacher would take most of the time
    else:
        defaults = main_deit.RECIPE | ({} if models.dense_twin(name) else {'drop_path': None})
    parser = engine.get_parser('', defaults)
    case = parser.parse_args(recipe)
    if given := [name for name in RUN_FLAGS if getattr(case, name) != parser.get_default(name)]:
        flags = ', '.join(f'--{name.replace("_", "-")}' for name in given)
        raise InputError(f'{flags}: benchmark.py measures new networks and touches no run; leave these flags out')
    case.mode, case.model, case.batch_size, case.eval = mode, name, batch, mode != 'train'
    case.input_size = size or models.published_cfg(name).input_size[-1]
    case.precision, case.channels_last = args.precision, args.channels_last
    case.compile, case.seed, case.data_path = args.compile, args.seed, args.data_path
    if args.data_path and not isinstance(case.input_size, int):
        raise InputError(f'--data-path: the loader makes square images, not {size}; use --img_size')
    return case


def twin_label(twin: tuple[str, dict]) -> str:
    """The name of a dense twin, and with what it is created, for people."""
    return ' '.join([twin[0], *(f'{key}={value}' for key, value in twin[1].items())])


# --- measuring


@dataclass
class Candidate:
    """What is timed: the call, what one measurement calls it with, and its row of the results.

    `step` takes images (B, 3, rows, columns) and targets; `seconds` are those of a batch, one for each measurement.
    """

    row: dict
    step: Callable = lambda images, targets: None
    batches: Callable[[], Iterable] = tuple
    seconds: list[float] = field(default_factory=list)


def measure(args: Namespace, case: Namespace, device: torch.device) -> list[dict]:
    """Rows of one case: the model at each keep ratio, then its twin, timed in turns; end to end, first the loader."""
    candidates, load, num_classes = [], None, args.num_classes or 1000
    if args.data_path:
        load, num_classes = build_loader(args, case, device)
        candidates.append(Candidate(new_row(case, 'the loader alone'), batches=load))
        # From here on files come from memory, for all that are timed; one that is damaged ends the run.
        for _ in load():
            pass
    twin = models.dense_twin(case.model)
    ratios = args.keep_ratio if twin and args.keep_ratio else [None]
    own = {'representative': case.representative} if twin else {}  # timm's models know no such argument
    contenders = [(case.model, case.model, own | {'keep_ratio': ratio}) for ratio in ratios]
    if twin and args.compare:
        contenders.append((twin_label(twin), *twin))
    for label, name, own in contenders:
        candidate = Candidate(new_row(case, label))
        candidates.append(candidate)
        attempt(prepare, candidate, device, args, case, num_classes, name, own)
        candidate.batches = load or candidate.batches

    n = PASSES if load else args.num_bench_iter * (LATENCY_CALLS if case.mode == 'latency' else 1)
    for candidate in n * candidates:
        if 'error' not in candidate.row:
            seconds = attempt(seconds_a_batch, candidate, device)
            if seconds is not None:
                candidate.seconds.append(seconds)
    for candidate in candidates:
        summarise(candidate, candidates[-1] if twin and args.compare else None)
    return [candidate.row for candidate in candidates]


def build_loader(args: Namespace, case: Namespace, device: torch.device) -> tuple[Callable[[], Iterable], int]:
    """A function that loads --num_bench_iter batches (or all there are) to the device, and the number of classes."""
    config = datasets.data_config(case, case.model)
    train_loader, val_loader = datasets.build_loaders(case, config, train=case.mode == 'train')
    loader, num_classes = train_loader or val_loader, len(val_loader.dataset.classes)
    mixup = datasets.build_mixup(case, num_classes) if train_loader else None
    count = min(args.num_bench_iter, len(loader.sampler) // case.batch_size)  # whole batches: shapes are static
    if count == 0:
        raise InputError(f'{args.data_path}: {len(loader.sampler)} images, expected a batch of {case.batch_size}')

    # No image more: workers would go on with it while the next pass is timed.
    loader.batch_sampler.sampler = list(islice(loader.sampler, count * case.batch_size))

    def load() -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in loader:
            images = images.to(**placement(args, case, device), non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            yield mixup(images, targets) if mixup else (images, targets)

    return load, num_classes


def placement(args: Namespace, case: Namespace, device: torch.device) -> dict:
    """Where and how a case wants images and weights; training and --amp keep float32 and leave the rest to autocast."""
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    half = case.precision in HALF and case.mode != 'train' and not args.amp
    return dict(device=device, dtype=HALF[case.precision] if half else torch.float32, memory_format=memory_format)


def build(case: Namespace, num_classes: int, name: str, own: dict) -> nn.Module:
    """A model as the flags of a case want it, with arguments of its own."""
    own = {'drop_path_rate': case.drop_path} | own
    own = {key: value for key, value in own.items() if value is not None}
    return models.create(name, num_classes, case.input_size, drop_rate=case.drop, **own)


def prepare(
    candidate: Candidate,
    device: torch.device,
    args: Namespace,
    case: Namespace,
    num_classes: int,
    name: str,
    own: dict,
):
    """Make a model ready to be timed, on a batch of noise, and count its arithmetic and memory on the way."""
    row, train = candidate.row, case.mode == 'train'
    model = build(case, num_classes, name, own)
    if hasattr(model, 'set_schedule'):
        model.set_schedule(stage_wise=not args.layer_wise)
        ratios = model.keep_ratio[:1] if len({*model.keep_ratio}) == 1 else model.keep_ratio
        row['keep_ratio'] = ','.join(f'{ratio:g}' for ratio in ratios)
    row |= dict(selection=engine.describe_schedule(model), fused=args.fuse and not train)
    if row['fused']:
        model = model.fuse() if hasattr(model, 'fuse') else reparameterize_model(model, inplace=True)
    row |= dict(architecture=type(model).__name__, parameters=engine.count_parameters(model))
    model = model.train(train).to(**placement(args, case, device))
    images = torch.randn(case.batch_size, 3, *to_2tuple(case.input_size)).to(**placement(args, case, device))
    targets = torch.rand(case.batch_size, num_classes, device=device).softmax(1)  # soft, as mixup makes them
    batch = images, targets

    autocast = engine.make_autocast(case.precision if train or args.amp else 'fp32', device)
    candidate.step, state = make_step(case, model, num_classes, autocast, device)
    # Counted before compiling, which hides the operators.
    row |= dict(gmacs=count_gmacs(candidate.step, batch), autocast=autocast.keywords['enabled'])
    row['compile'] = compile_model(args, case, model, device) if args.compile else 'no'

    grown = warm_up(candidate.step, batch, args.num_warm_iter, device)
    if device.type == 'cuda' or not args.freeze:  # on a CPU, frozen weights are packed into memory that PyTorch hides
        row['peak_mib'] = (held_bytes(model, state, batch) + grown) / 2**20
    if args.detail:
        with torch.profiler.profile() as profiler:
            candidate.step(*batch)
            synchronize(device)
        operators = profiler.key_averages().table(f'self_{device.type}_time_total', row_limit=15)
        say(f'{case.mode}, {row["model"]}, one call:\n{operators}')
    candidate.batches = partial(list, [batch])


def make_step(
    case: Namespace, model: nn.Module, num_classes: int, autocast: Callable, device: torch.device
) -> tuple[Callable, State | None]:
    """What is timed: a training step, the engine's with all that belongs to it, or a forward pass."""
    if case.mode == 'train':
        criterion = losses.build_criterion(case, num_classes, device)
        with redirect_stdout(sys.stderr):
            state = engine.start(case, model, case.precision, steps=1)
        return lambda *batch: engine.train_step(state, model, criterion, [batch], 1, autocast, case), state

    @torch.inference_mode()
    def forward(images: Tensor, targets: Tensor):
        with autocast():
            model(images)

    return forward, None


class RefuseUncounted(TorchDispatchMode):
    """Raises InputError for a matrix product, convolution or attention outside `counted`: it would count as nothing.

    Entered before a FlopCounterMode, it sees the operators that are left after that one took others apart.
    """

    def __init__(self, counted: Iterable):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = func.overloadpacket
        if operator not in self.counted and MATRIX_PRODUCT.search(operator.__name__):
            raise InputError(
                f'torch {torch.__version__}: expected operators whose arithmetic can be counted, found {operator}; '
                'add it to COUNTED_AS in benchmark.py'
            )
        return func(*args, **(kwargs or {}))


def count_gmacs(call: Callable, inputs: Sequence[Tensor]) -> float:
    """Multiply-accumulates in `call(*inputs)`, in 10^9 an image, of matrix products, convolutions and attentions.

    `inputs` are tensors (B, ...), images first. What a fused attention computes again in its backward pass counts too.
    Raises InputError for such an operator without a formula.
    """
    counter = FlopCounterMode(display=False)
    for name, same in COUNTED_AS.items():
        if hasattr(aten, name):
            counter.flop_registry.setdefault(getattr(aten, name), counter.flop_registry[same])
    with RefuseUncounted(counter.flop_registry), counter:
        call(*inputs)
    return counter.get_total_flops() / 2e9 / len(inputs[0])


def compile_model(args: Namespace, case: Namespace, model: nn.Module, device: torch.device) -> str:
    """Compile a model in place, in training as engine.train does, and say how."""
    if case.mode == 'train':
        model.compile()
        return 'default'
    graphs = device.type == 'cuda'
    model.compile(dynamic=False, options={'triton.cudagraphs': graphs})
    return ('CUDA graphs' if graphs else 'default') + (', frozen' if args.freeze else '')


def held_bytes(model: nn.Module, state: State | None, batch: tuple[Tensor, Tensor]) -> int:
    """What is there between calls: a batch, the weights, in training their average and the optimizer's state too."""
    networks = [model, state.ema.module] if state and state.ema else [model]
    moments = chain(*(own.values() for own in state.optimizer.state.values())) if state else ()
    weights = chain(*((*network.parameters(), *network.buffers()) for network in networks))
    return sum(tensor.nbytes for tensor in (*batch, *weights, *moments) if torch.is_tensor(tensor))


def warm_up(step: Callable, batch: tuple[Tensor, Tensor], calls: int, device: torch.device) -> int:
    """Make calls that are not timed; returns the most bytes that they had allocated at a time."""
    if device.type == 'cuda':  # of all calls, as a CUDA graph allocates when it is captured and never again
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(calls):
        step(*batch)
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        step(*batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def seconds_a_batch(candidate: Candidate, device: torch.device) -> float:
    """One measurement: how long a batch takes, a mean where there are several."""
    synchronize(device)
    started, count = time.perf_counter(), 0
    for images, targets in candidate.batches():
        candidate.step(images, targets)
        count += 1
    synchronize(device)
    return (time.perf_counter() - started) / count


def synchronize(device: torch.device):
    """Wait for what was queued; a CPU has no queue."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def attempt(action: Callable, candidate: Candidate, device: torch.device, *others):
    """`action(candidate, device, *others)`; an error ends the candidate's row, which then says so, and not the run."""
    try:
        return action(candidate, device, *others)
    except Exception as error:
        signs, message = (OUT_OF_MEMORY, "can't allocate memory", 'not enough memory', 'ALLOC_FAILED'), str(error)
        known = isinstance(error, RuntimeError) and any(sign in message for sign in signs)
        if known or isinstance(error, MemoryError):
            candidate.row['error'] = OUT_OF_MEMORY
        else:
            candidate.row['error'] = f'{type(error).__name__}: {message.strip().partition(chr(10))[0]}'
            if not isinstance(error, InputError):  # whose message says it all
                traceback.print_exc()
    # What comes next finds the memory free. Not before here: until the error is gone, its traceback holds the model.
    candidate.step, candidate.batches = Candidate.step, Candidate.batches
    free_memory(device)
    return None


def free_memory(device: torch.device):
    """Give back what nothing refers to any more, so that it is there for the next model."""
    gc.collect()
    if device.type == 'cuda':
        with suppress(RuntimeError):  # some errors break the GPU's context for good: the next rows say so themselves
            torch.cuda.empty_cache()


# --- results


def new_row(case: Namespace, model: str) -> dict:
    height, width = to_2tuple(case.input_size)
    size = height if height == width else f'{height}x{width}'
    source = f'{case.data_set}, end to end' if case.data_path else 'noise'
    return dict(mode=case.mode, input=source, model=model, image_size=size, batch=case.batch_size)


def summarise(candidate: Candidate, twin: Candidate | None):
    """Fill a row with what its measurements give: medians, and the percentiles 10, 90 and 99 of enough calls."""
    row, seconds = candidate.row, np.array(candidate.seconds)
    if 'error' in row:
        return
    p10, p50, p90, p99 = np.percentile(seconds, (10, 50, 90, 99)).tolist()
    row |= dict(ms=1000 * p50, n=len(seconds))
    if row['input'] == 'noise':  # end to end there are a few means of many calls, which say nothing about slow ones
        row['ms_p90'] = 1000 * p90
        if len(seconds) >= P99_CALLS:
            row['ms_p99'] = 1000 * p99
    for name, value in (('', p50), ('_p10', p90), ('_p90', p10)):
        row[f'images_per_second{name}'] = row['batch'] / value
    if twin in (None, candidate) or 'error' in twin.row or 'gmacs' not in row:
        return
    row['arithmetic_ratio'] = twin.row['gmacs'] / row['gmacs']
    speedups = np.percentile(np.array(twin.seconds) / seconds, (50, 10, 90)).tolist()
    row |= dict(zip(('speedup', 'speedup_p10', 'speedup_p90'), speedups, strict=True))


def describe_circumstances(args: Namespace, device: torch.device) -> dict:
    """What all rows of a run have in common."""
    name, info = str(device), Path('/proc/cpuinfo')
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    elif info.exists():
        kinds = [line.split(': ')[1] for line in info.read_text().splitlines() if line.startswith('model name')]
        name = f'{kinds[0] if kinds else name}, {os.cpu_count()} cores'
    try:
        git = ['git', 'describe', '--always', '--dirty', '--exclude', '*']
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ''
    return dict(
        device=name, precision=args.precision, channels_last=args.channels_last, threads=torch.get_num_threads(),
        torch=torch.__version__, timm=timm.__version__, commit=commit or 'unknown',
        date=datetime.now(UTC).isoformat(timespec='seconds'),
    )  # fmt: skip


def spread(row: dict) -> float:
    """How many times faster the fast calls of a row were than its slow ones: percentile 90 to 10; 1 without calls."""
    return row['images_per_second_p90'] / row['images_per_second_p10'] if row.get('images_per_second') else 1.0


def warn_if_busy(load: float, threads: int):
    """Say that other programs used the machine, given its load average of the minute before the start."""
    cores = os.cpu_count()
    if load + threads > cores + BUSY_LOAD:
        say(
            f'warning: the machine was busy before this started (load {load:.1f} of the last minute, {cores} cores, '
            f'{threads} needed here): times may be too long and speed-ups too small; measure again when it is idle'
        )


def warn_of_spread(rows: list[dict]):
    """Say that calls of the same model differed so much that something else must have disturbed them."""
    disturbed = [row for row in rows if spread(row) > DISTURBED]
    if disturbed:
        worst = max(disturbed, key=spread)
        say(
            f'warning: img/s of the same model differ by more than {DISTURBED} times (p90 / p10) in {len(disturbed)} '
            f'of {len(rows)} rows, by {spread(worst):.1f} in {worst["mode"]}, {worst["model"]}: '
            'other programs may disturb the measurement; take more calls, or an idle machine'
        )


def table_widths(args: Namespace, cases: list[Namespace]) -> dict[str, int]:
    """How wide the columns of the table must be whose longest cell depends on the flags."""
    twins = [models.dense_twin(case.model) for case in cases]
    names = [case.model for case in cases] + [twin_label(twin) for twin in twins if twin and args.compare]
    ratios = [','.join(f'{ratio:g}' for ratio in ratios) for ratios in args.keep_ratio or ()]
    return {'model': max(map(len, names)), 'keep_ratio': max(map(len, ratios), default=0)}


def table_row(row: dict, widths: dict[str, int]) -> str:
    """A line of the table for a row, or for the headings; `widths` are those of fields that need more than usual."""
    cells = []
    for name, _, width in TABLE:
        value = row.get(name, '')
        if isinstance(value, float):
            value = f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'
        room = max(abs(width), widths.get(name, 0))
        cells.append(f'{value:{"<" if width < 0 else ">"}{room}}')
    return '  '.join(cells).rstrip()


def write_row(row: dict, path: str):
    """Add a row to a file of comma-separated values or of JSON lines."""
    row = {name: float(f'{row[name]:.6g}') if isinstance(row.get(name), float) else row.get(name) for name in FIELDS}
    with open(path, 'a', newline='') as file:
        if path.endswith('.jsonl'):
            file.write(json.dumps(row) + '\n')
            return
        writer = csv.DictWriter(file, FIELDS, lineterminator='\n')
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def plot(rows: list[dict], x: str, path: str):
    """Draw img/s in each mode against `x`, and warn of points that mean little."""
    rows = sorted((row for row in rows if 'gmacs' in row and 'error' not in row), key=lambda row: row[x])
    modes = [mode for mode in MODES if any(row['mode'] == mode for row in rows)]
    figure, panels = Figure(figsize=(6 * max(1, len(modes)), 5), dpi=150, layout='constrained'), {}
    for i, mode in enumerate(modes, 1):
        panel = figure.add_subplot(1, len(modes), i)
        panels[panel] = draw_panel(panel, [row for row in rows if row['mode'] == mode], x)
    figure.draw_without_rendering()  # labels are placed between what has its place now
    for panel, labels in panels.items():
        place_labels(panel, labels)
    figure.savefig(path)
    say(f'written: {path}')
    for row in rows:
        if spread(row) >= UNUSABLE:
            say(
                f'warning: {path}: the point of {row["model"]}, {row["mode"]}, {row[x]} {PLOT_AXES[x]} means little, '
                f'img/s differ by {spread(row):.0f} times (p90 / p10); measure it again'
            )


def draw_panel(panel: Axes, rows: list[dict], x: str) -> list[tuple[dict, str]]:
    """Draw rows of one mode: a line for each model or, against GMACs, for each kind of model, with p10 to p90.

    Returns the rows whose points need a label, those against GMACs, each with the text.
    """
    # Whatever else was swept belongs into the label: a line has one point at each place of the axis.
    swept = {
        key: word
        for key, word in (('keep_ratio', 'keep'), ('batch', 'batch'))
        if key != x and len({row.get(key) for row in rows} - {None}) > 1
    }
    lines, labels = {}, []
    for row in rows:
        name = ', '.join(
            [row['model'].split()[0], *(f'{word} {row[key]}' for key, word in swept.items() if row.get(key))]
        )
        lines.setdefault(row['architecture'] if x == 'gmacs' else name, []).append(row)
        if x == 'gmacs':
            labels.append((row, re.sub(r'_patch\d+_\d+', '', name)))
    for style, (line, points) in zip(cycle(LINE_STYLES), lines.items(), strict=False):
        low, middle, high = (
            np.array([row[f'images_per_second{end}'] for row in points]) for end in ('_p10', '', '_p90')
        )
        panel.errorbar(
            [row[x] for row in points], middle, np.clip([middle - low, high - middle], 0, None), label=line, capsize=3,
            elinewidth=1, **style,
        )  # fmt: skip
    title = f'{rows[0]["mode"]}, {rows[0]["input"]}, {rows[0]["precision"]}; bars: p10 to p90\n{rows[0]["device"]}'
    panel.set(title=title, xlabel=PLOT_AXES[x], ylabel='img/s', xscale='log', yscale='log')
    panel.margins(0.2, 0.1)
    for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        axis.set_major_formatter('{x:g}')
        axis.set_minor_locator(LogLocator(subs=range(2, 10) if high < 10 * low else (2, 3, 5)))
        axis.set_minor_formatter('{x:g}')
    if x != 'gmacs':
        panel.set_xticks(sorted({row[x] for row in rows}))
        panel.set_xticks([], minor=True)
    panel.legend(fontsize=7)
    return labels


def place_labels(panel: Axes, labels: list[tuple[dict, str]]):
    """Write each label as near to its point as it fits: over no other label, no point, no bar and no legend."""
    half = 0.04 * panel.figure.dpi  # of a marker, in pixels
    taken = [panel.get_legend().get_window_extent()]
    for row, _ in labels:
        (x, low), (_, high) = (
            panel.transData.transform((row['gmacs'], row[f'images_per_second{end}'])) for end in ('_p10', '_p90')
        )
        taken.append(Bbox.from_extents(x - half, low - half, x + half, high + half))
    sides = (1, 1), (-1, -1), (1, 0), (-1, 0), (-1, 1), (1, -1)  # lines fall: they leave the first two free
    for row, text in labels:
        point = row['gmacs'], row['images_per_second']
        for distance, (right, up) in product((8, 14, 22, 32, 44, 58), sides):
            note = panel.annotate(
                text, point, (distance * right, distance * up), textcoords='offset points', fontsize=7,
                ha='left' if right > 0 else 'right', va='center', in_layout=False,
                arrowprops=dict(arrowstyle='-', linewidth=0.4, shrinkA=0),
            )  # fmt: skip
            note.get_window_extent()  # moves the text to its place; what it returns holds the line to the point too
            box = Text.get_window_extent(note)
            if panel.bbox.contains(*box.min) and panel.bbox.contains(*box.max) and not box.count_overlaps(taken):
                taken.append(box)
                break
            note.remove()
        else:
            panel.annotate(text, point, fontsize=7)  # a full panel


if __name__ == '__main__':
    utils.run_script(main)

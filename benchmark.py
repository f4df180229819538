"""Measure speed, memory and FLOPs of a model beside its dense baseline, the same network without evolution.

    python3 benchmark.py                                  two small models, a few minutes on a CPU
    python3 benchmark.py --model evo_deit_small_patch16_224 EvoLeViT_256 --bench inference latency train
    python3 benchmark.py --model deit_small_patch16_224 --evolve --keep-ratio 0.7,0.3 0.5     any ViT of timm
    python3 benchmark.py --img_size 224 384 512 --results_file sizes.csv --plot sizes.png     a sweep
    python3 benchmark.py --bench train --data-path /path/to/imagenet                          with the data loader

Calls of a model and its baseline alternate, so background load slows both. The speed-up is the median ratio of
neighboring calls. The table shows the main columns; --results_file has all of them.

Flags of the model, the training step and the loader are those of main_deit.py and main_levit.py, with the defaults of
the model's recipe: --evolve, --stages, --representative, --opt, --drop_path, --data-set, --num_workers, ...
"""

import gc
import os
import re
import sys
import traceback
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import timm
import torch
from timm.layers import to_2tuple
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import datasets
import engine
import losses
import main_deit
import main_levit
import networks
import optim
import utils
from measure import results
from measure.costs import count_gmacs, peak_memory
from measure.timing import keep_freed_memory, progress, time_call
from utils import HALF, InputError, at_least, print_rank0

MODELS = ['evo_deit_tiny_patch16_224', 'EvoLeViT_128S']
MODES = ['inference', 'latency', 'train']
PRECISIONS = {'float32': 'fp32', 'float16': 'fp16', 'bfloat16': 'bf16'}  # names of the original benchmark
PASSES = 3  # over the loader's batches, end to end
LATENCY_CALLS = 5  # times --num_bench_iter: percentiles need more calls than a median
OUT_OF_MEMORY = 'out of memory'


def get_parser() -> utils.Parser:
    """Flags of the measurement. Flags of the model and of training are left to the parser of `make_case`."""
    parser = utils.Parser(__doc__)
    parser.usage = '%(prog)s [--model NAME ...] [--bench MODE ...] [other flags]'
    count = at_least(1)
    add = parser.add_argument_group('most used').add_argument
    about = f"one or several, ours or timm's, * allowed (default: {' '.join(MODELS)})"
    add('--model', '-m', nargs='+', default=MODELS, metavar='NAME', help=about)
    about = 'inference, latency (batch 1), train; both is inference and train (default: inference latency)'
    add('--bench', nargs='+', default=MODES[:2], choices=[*MODES, 'both'], metavar='MODE', help=about)
    add('--batch-size', '-b', type=count, nargs='+', metavar='N', help='one or several (default: 256, on a CPU 32)')
    add('--img_size', type=count, nargs='+', metavar='PX', help="one or several (default: the model's)")
    add('--keep-ratio', type=keep_ratios, nargs='+', metavar='R', help='one or several; 0.7,0.3 is one per stage')
    choices, about = ['fp32', 'tf32', *HALF, 'amp'], 'fp32, tf32, fp16, bf16, amp (default: half on a GPU, else fp32)'
    name_of = lambda name: PRECISIONS.get(name, name)  # noqa: E731
    add('--precision', type=name_of, choices=choices, metavar='NAME', help=about)
    add('--compile', '--torchscript', action='store_true', help='torch.compile, with CUDA graphs for inference')
    add('--data-path', metavar='PATH', help='measure end to end with the data loader (default: the model, on noise)')
    add('--results_file', metavar='PATH', help='append all columns to a .csv or .jsonl file')
    add('--plot', metavar='PATH', help='plot img/s over GMACs, or over the swept size or batch')

    add = parser.add_argument_group('what is measured').add_argument
    add('--model_list', metavar='FILE', help='file of model names, in place of --model')
    add('--compare', action=BooleanOptionalAction, default=True, help='measure the dense baselines too')
    add('--input_size', type=count, nargs=3, metavar=('C', 'H', 'W'), help='for images that are not square')
    add('--layer-wise', action='store_true', help='select before each layer (default: before each stage)')
    add('--num_classes', type=count, metavar='N', help="outputs (default: 1000, or the dataset's)")

    add = parser.add_argument_group('how it runs').add_argument
    add('--amp', action='store_true', help='autocast to half precision in inference too; also --precision amp')
    add('--freeze', action='store_true', help='inference: compile with constant weights')
    add('--channels-last', action='store_true', help='memory format of images and convolutions')
    add('--fuse', action=BooleanOptionalAction, default=True, help='inference: fold BatchNorms, drop training heads')
    add('--threads', type=count, metavar='N', help="CPU threads (default: PyTorch's choice)")

    add = parser.add_argument_group('how it is measured').add_argument
    add('--num_warm_iter', type=count, metavar='N', help='calls before timing (default: 10, on a CPU 2)')
    about = f'latency: {LATENCY_CALLS} times as many; end to end: batches in each of {PASSES} passes'
    add('--num_bench_iter', type=count, metavar='N', help=f'timed calls (default: 40, on a CPU 10); {about}')
    add('--detail', action='store_true', help='print the operators that take the most time')
    add('--gp', metavar='POOL', help='no effect: the model sets the pooling')
    add('--drop_block', type=float, metavar='RATE', help='no effect: these models have no such layer')
    utils.add_arguments(parser)
    return parser


def keep_ratios(text: str) -> list[float]:
    """One value of --keep-ratio: a number, or one per stage."""
    try:
        return [float(ratio) for ratio in text.split(',')]
    except ValueError as error:
        raise ArgumentTypeError(f'expected a number, or one per stage as in 0.7,0.3, found {text!r}') from error


def main():
    """Measure what the flags ask for, case by case; exit with 1 if a row could not be measured."""
    load = os.getloadavg()[0]  # before this process adds to it
    args, training_flags = get_parser().parse_known_args()
    device = utils.set_up_processes(args)
    args = resolve_args(args, device)
    set_up_torch(args.threads, args.precision, device, args.compile, args.freeze)
    cases = [
        make_case(args, training_flags, mode, name, size, batch)
        for mode in args.bench
        for name in find_models(args.model, args.model_list)
        for size in args.img_size
        for batch in ([1] if mode == 'latency' else args.batch_size)
    ]
    if args.keep_ratio and not any(case.dense for case in cases):
        raise InputError('--keep-ratio: none of these models evolves; add --evolve for ViTs of timm')
    common = results.circumstances(args.precision, device)
    print_rank0(', '.join(f'{key} {value}' for key, value in common.items()))
    for warning in results.warn_if_busy(load, torch.get_num_threads() if device.type == 'cpu' else 1):
        print_rank0(warning)
    print_rank0(describe_plan(cases))
    width = max(len(label) for case in cases for label, _ in list_models(case))
    print_rank0(results.table_line(results.COLUMNS, width))
    rows = []
    for case in cases:
        for row in measure(case):
            rows.append(common | row)
            print_rank0(results.table_line(row, width))
            if args.results_file:  # at once, so that an interrupted run keeps what it has
                results.write_row(rows[-1], args.results_file)
        torch.compiler.reset()  # otherwise later cases of the same class would count as recompilations
    for warning in results.warn_of_spread(rows):
        print_rank0(warning)
    if args.plot:
        x = 'image_size' if len(args.img_size) > 1 else 'batch' if len(args.batch_size) > 1 else 'gmacs'
        results.plot(rows, x, args.plot)
    written = [path for path in (args.results_file, args.plot) if path]
    print_rank0(f'wrote {" and ".join(written)}' if written else 'to keep all columns, add --results_file results.csv')
    failed = sum(row.get('error', OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows)
    if failed:
        print(f'{failed} of {len(rows)} rows could not be measured: the line below each says why', file=sys.stderr)
        raise SystemExit(1)


# --- what is measured


def resolve_args(args: Namespace, device: torch.device) -> Namespace:
    """Fills in the defaults of the device; raises InputError for what would fail late."""
    channels, *size = args.input_size or (3, None, None)
    if channels != 3:
        raise InputError(f'--input_size: expected 3 channels, found {channels}')
    results.check_file(args.results_file, ('.csv', '.jsonl'))
    results.check_file(args.plot, ('.png', '.svg', '.pdf'))
    precision, amp = (None, True) if args.precision == 'amp' else (args.precision, args.amp)
    if amp and precision not in (None, *HALF):
        raise InputError(f'--amp is autocast to half precision, found --precision {precision} as well; leave one out')
    precision = utils.pick_precision(precision, device)
    batch, calls, warm_up_calls = (32, 10, 2) if device.type == 'cpu' else (256, 40, 10)
    resolved = dict(
        bench=[mode for mode in MODES if mode in args.bench or ('both' in args.bench and mode != 'latency')],
        batch_size=args.batch_size or [batch],
        img_size=args.img_size or [size[0] if size[0] == size[1] else tuple(size)],
        num_bench_iter=args.num_bench_iter or calls,
        num_warm_iter=args.num_warm_iter or warm_up_calls,
        precision='bf16' if amp and precision not in HALF else precision,
        amp=amp,
        device=device,
        compile=args.compile or args.freeze,
    )
    return Namespace(**vars(args) | resolved)


def set_up_torch(threads: int | None, precision: str, device: torch.device, compiled: bool, freeze: bool):
    """Process-wide settings: threads, memory, matmul precision, compiler."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    utils.set_backends(precision, device)
    if compiled:
        torch._dynamo.config.recompile_limit = 256  # at the default of 8, later models silently run uncompiled
        torch._inductor.config.freezing = freeze  # as an option of one compilation it comes too late
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # the profiler warns where there is no GPU


def find_models(names: list[str], file: str | None = None) -> list[str]:
    """Model names that match `names` (or those in a file); raises InputError, with the nearest names, if none does."""
    if file:
        names = Path(file).read_text().split() if Path(file).is_file() else []
        if not names:
            raise InputError(f'--model_list {file}: expected model names, one per line, found none')
    models_found = []
    for name in names:
        # The *_vis_* models are the same networks under a second name.
        matches = [name] if timm.is_model(name) else timm.list_models(name, exclude_filters='*_vis_*')
        for match in matches or [name]:
            networks.published_cfg(match)  # raises InputError for an unknown model or tag
        models_found += matches
    return list(dict.fromkeys(models_found))


def make_case(
    args: Namespace, training_flags: list[str], mode: str, name: str, size: int | tuple[int, int] | None, batch: int
) -> Namespace:
    """One measurement: the flags of this script, those that main_deit.py or main_levit.py would train with, and

    dense: name and arguments of the dense baseline, if there is one,
    variants: flags in which the models of the case differ,
    autocast, tensors: how the model is called, and device, dtype and memory format of its tensors.
    """
    dense = networks.dense_baseline(name)
    if 'levit' in name.lower():
        recipe = main_levit.RECIPE | {'distillation_type': 'none'}  # its teacher would take most of the time
    else:
        recipe = main_deit.RECIPE | ({} if dense else {'drop_path': None})
    # No flags of checkpoints: a benchmark neither reads a run nor writes one.
    parser = utils.Parser('')
    for module in (networks, datasets, losses, engine):
        module.add_arguments(parser)
    parser.set_defaults(**recipe)
    case = parser.parse_args(training_flags, namespace=copy(args))  # what is in `args` already stays
    if case.fit_schedule:
        raise InputError('--fit-schedule: speed is measured with random weights; use --stages and --keep-ratio')
    size = size or networks.published_cfg(name).input_size[-1]
    if args.data_path and not isinstance(size, int):
        raise InputError(f'--data-path: the loader makes square images, not {size}; use --img_size')
    if dense:
        case.method = None  # ours evolve anyway
    elif case.method:
        dense = name, case.model_kwargs or {}
    else:
        case.stages = case.representative = None  # has no schedule
    case.mode, case.model, case.dense, case.input_size, case.batch_size = mode, name, dense, size, batch
    case.autocast = mode == 'train' or args.amp
    case.tensors = dict(
        device=args.device,
        dtype=torch.float32 if case.autocast else HALF.get(args.precision, torch.float32),
        memory_format=torch.channels_last if args.channels_last else torch.preserve_format,
    )
    case.variants = [{'keep_ratio': ratio} for ratio in (args.keep_ratio if dense else None) or [None]]
    return case


def list_models(case: Namespace) -> list[tuple[str, Callable[..., nn.Module]]]:
    """Labels of a case's models, and functions from `num_classes` to the model. The dense baseline is last."""
    listed = []
    for variant in case.variants:
        flags = Namespace(**vars(case) | variant)
        method = variant.get('representative', {'evolve': 'evolved'}.get(flags.method, flags.method))
        label = ' '.join(filter(None, [case.model, method]))
        listed.append((label, partial(networks.build, flags, input_size=case.input_size)))
    if case.dense and case.compare:
        name, options = case.dense
        label = ' '.join([name, *(f'{key}={value}' for key, value in options.items())])
        rates = {'drop_rate': case.drop} | ({} if case.drop_path is None else {'drop_path_rate': case.drop_path})
        listed.append((label, partial(networks.create, name, input_size=case.input_size, **rates, **options)))
    return listed


def describe_plan(cases: list[Namespace]) -> str:
    """What will be measured and about how long it takes; raises InputError for a model that cannot be built."""
    rows, gmacs, case = 0, 0.0, cases[0]
    for case in progress(cases, 'estimating the time'):
        listed, count = list_models(case), 0.0
        for _, build in listed:
            # A model that cannot be counted on the meta device is taken to cost what its dense baseline does.
            with torch.device('meta'), suppress(RuntimeError):
                model = build(num_classes=1000).eval()
                with suppress(InputError):
                    count = max(count, count_gmacs(model, [torch.empty(1, 3, *to_2tuple(case.input_size))]))
        # A training step costs about three forward passes.
        count *= 3 if case.mode == 'train' else 1
        gmacs += len(listed) * count * case.batch_size * (case.num_warm_iter + count_turns(case))
        rows += len(listed)
    names = len({case.model for case in cases})
    what = f'{" and ".join(dict.fromkeys(case.mode for case in cases))} of {names} model{"s"[: names > 1]}'
    what = f'measuring {rows} rows: {what}{", with dense baselines" if case.compare else ""}'
    if case.data_path:
        return f'{what}; the time depends on the loader'
    minutes = gmacs / measure_gmacs_per_second(case.tensors) / 60 + rows / 20  # building and counting takes seconds
    return f'{what}, about {minutes:.0f} minutes' if minutes >= 1.5 else f'{what}, about a minute'


def measure_gmacs_per_second(tensors: dict) -> float:
    """Rough speed of a network: half of that of a large matrix product. `tensors` has its device and dtype."""
    x = torch.randn(1024, 1024).to(tensors['device'], tensors['dtype'])
    return 0.5 * 1024**3 / 1e9 / min(time_call(lambda: x @ x, tensors['device']) for _ in range(5))


# --- measuring


@dataclass
class Candidate:
    """One row of a case: what is timed, and how long it took."""

    row: dict
    step: Callable = lambda images, targets: None  # of images (B, 3, H, W) and targets
    batches: Callable[[], Iterable] = tuple  # what one measurement passes to `step`
    seconds: list[float] = field(default_factory=list)  # per batch, one value per measurement


def measure(case: Namespace) -> list[dict]:
    """Rows of one case: the models of `list_models`, timed in turns; end to end, preceded by the loader alone."""
    size = case.input_size if isinstance(case.input_size, int) else '{}x{}'.format(*case.input_size)
    row = dict(requested=case.model, mode=case.mode, image_size=size, batch=case.batch_size)
    row |= dict(input=f'{case.data_set}, end to end' if case.data_path else 'noise', channels_last=case.channels_last)
    candidates, load, num_classes = [], None, case.num_classes or 1000
    if case.data_path:
        load, num_classes = build_loader(case)
        candidates.append(Candidate(row | {'model': 'the loader alone'}, batches=load))
        deque(load(), 0)  # warms the page cache; a damaged file ends the run here
    for label, build in list_models(case):
        candidates.append(Candidate(row | {'model': label}))
        run_or_record_error(prepare, candidates[-1], case, build, num_classes)
        candidates[-1].batches = load or candidates[-1].batches
    for candidate in progress(count_turns(case) * candidates, f'{case.mode}, {case.model}'):
        run_or_record_error(time_batches, candidate, case.device)
    last = candidates[-1]
    dense = (last.row, last.seconds) if case.dense and case.compare and 'error' not in last.row else ()
    for candidate in candidates:
        if 'error' not in candidate.row:
            candidate.row |= results.summarize(candidate.row, candidate.seconds, *(() if candidate is last else dense))
    return [candidate.row for candidate in candidates]


def count_turns(case: Namespace) -> int:
    """How many times each model of a case is timed."""
    if case.data_path:
        return PASSES
    return case.num_bench_iter * (LATENCY_CALLS if case.mode == 'latency' else 1)


def build_loader(case: Namespace) -> tuple[Callable[[], Iterable], int]:
    """A function that yields the batches of one pass, on the device; and the number of classes."""
    config, train = datasets.data_config(case, case.model), case.mode == 'train'
    train_loader, val_loader = datasets.build_loaders(case, config, train=train)
    loader, num_classes = train_loader or val_loader, len(val_loader.dataset.classes)
    mixup = datasets.build_mixup(case, num_classes) if train_loader else None
    count = min(case.num_bench_iter, len(loader.sampler) // case.batch_size)  # whole batches, so that shapes are static
    if count == 0:
        raise InputError(f'{case.data_path}: expected a batch of {case.batch_size}, found {len(loader.sampler)} images')
    # A subset, because workers would go on loading while the next pass is timed.
    subset = Subset(loader.dataset, list(islice(loader.sampler, count * case.batch_size)))
    workers, pin = loader.num_workers, loader.pin_memory
    loader = DataLoader(subset, case.batch_size, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin)

    def load() -> Iterable[tuple[Tensor, Tensor]]:
        for images, targets in loader:
            images, targets = images.to(**case.tensors, non_blocking=True), targets.to(case.device, non_blocking=True)
            yield mixup(images, targets) if mixup else (images, targets)

    return load, num_classes


def prepare(candidate: Candidate, case: Namespace, build: Callable, num_classes: int):
    """Build a model, make it ready to be timed on a batch of noise, and measure its FLOPs and memory."""
    row, train, device = candidate.row, case.mode == 'train', case.device
    gc.collect()  # frees earlier models
    torch.cuda.empty_cache()  # no effect without a GPU
    with device:  # a GPU initializes a large model seconds faster
        model = build(num_classes=num_classes)
    if hasattr(model, 'schedule'):
        model.set_schedule(stage_wise=not case.layer_wise)
        schedule = model.schedule()
        ratios = schedule['keep_ratio'] if len(set(schedule['keep_ratio'])) > 1 else schedule['keep_ratio'][:1]
        row |= dict(keep_ratio=','.join(f'{ratio:g}' for ratio in ratios), representative=schedule['representative'])
        row['stages'] = ','.join(map(str, schedule['stages']))
    row |= dict(selection=engine.describe_schedule(model), fused=case.fuse and not train)
    if row['fused']:
        model = model.fuse() if hasattr(model, 'fuse') else reparameterize_model(model, inplace=True)
    row |= dict(architecture=type(model).__name__, parameters=engine.count_parameters(model))
    model = model.train(train).to(**case.tensors)
    images = torch.randn(case.batch_size, 3, *to_2tuple(case.input_size)).to(**case.tensors)
    targets = torch.rand(case.batch_size, num_classes, device=device).softmax(1)  # soft labels, as with mixup

    candidate.batches = lambda: [(images, targets)]
    candidate.step, kept = make_step(case, model, num_classes)
    # Before compiling, which hides the operators; two images suffice, since all cost the same.
    row |= dict(gmacs=count_gmacs(candidate.step, (images[:2], targets[:2])), compile='no')
    row['autocast'] = case.autocast and case.precision in HALF
    if case.compile:
        graphs = device.type == 'cuda' and not train
        model.compile(**({} if train else dict(dynamic=False, options={'triton.cudagraphs': graphs})))
        row['compile'] = ('CUDA graphs' if graphs else 'default') + (', frozen' if case.freeze and not train else '')
    peak = peak_memory(candidate.step, (images, targets), kept, case.num_warm_iter, device)
    if device.type == 'cuda' or not case.freeze:  # on a CPU, PyTorch does not see the memory of frozen weights
        row['peak_mib'] = peak / 2**20
    if case.detail:
        with torch.profiler.profile() as profiler:
            candidate.step(images, targets)
        operators = profiler.key_averages().table(f'self_{device.type}_time_total', row_limit=15)
        print_rank0(f'{case.mode}, {row["model"]}, one call:\n{operators}')


def make_step(case: Namespace, model: nn.Module, num_classes: int) -> tuple[Callable, list]:
    """What is timed, a whole training step or a forward pass; and the tensors that outlive a call."""
    autocast = utils.make_autocast(case.precision if case.autocast else 'fp32', case.device)
    kept = [*model.parameters(), *model.buffers()]
    if case.mode == 'train':
        config = None if case.distillation_type == 'none' else datasets.data_config(case, case.model)
        criterion = losses.build_criterion(case, config, num_classes, case.device, case.smoothing)
        with redirect_stdout(sys.stderr):
            state = optim.build_state(case, model, case.precision, case.batch_size)
        averaged = [*state.ema.module.parameters(), *state.ema.module.buffers()] if state.ema else []

        def step(images: Tensor, targets: Tensor):
            batches = [(images, targets)]
            engine.train_step(state, model, criterion, batches, 1, autocast, case.clip_grad, case.clip_mode)

        return step, [kept, averaged, state.optimizer.state]

    @torch.inference_mode()
    def forward(images: Tensor, targets: Tensor):
        with autocast():
            model(images)

    return forward, kept


def time_batches(candidate: Candidate, device: torch.device):
    """One measurement: seconds per batch, the mean if there are several."""
    count = 0

    def steps():
        nonlocal count
        for images, targets in candidate.batches():
            candidate.step(images, targets)
            count += 1

    candidate.seconds.append(time_call(steps, device) / count)


def run_or_record_error(action: Callable, candidate: Candidate, *others):
    """Run `action(candidate, *others)`, unless the candidate has failed; record an error in its row and go on."""
    if 'error' in candidate.row:
        return
    try:
        action(candidate, *others)
    except Exception as error:
        signs = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
        full = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(signs, str(error)))
        message = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
        candidate.row['error'] = OUT_OF_MEMORY if full else message
        if not full and not isinstance(error, InputError):  # whose message is enough
            traceback.print_exc()
        candidate.step, candidate.batches = Candidate.step, Candidate.batches  # frees the model


if __name__ == '__main__':
    utils.run_script(main)

"""Measure speed, memory and arithmetic of any model beside its dense twin, the same network without evolution.

With defaults for the machine, some minutes on a CPU (it says how many); then all of our models in every mode:

    python3 benchmark.py
    python3 benchmark.py --model 'evo_deit_*_patch16_224' 'EvoLeViT_???' EvoLeViT_128S --compile \\
        --bench inference latency train --results_file results.csv --plot results.png

Any ViT of timm, evolved and not; sweeps of keep ratio or of resolution; end to end, with the real loader:

    python3 benchmark.py --model deit_small_patch16_224 --evolve --keep-ratio 0.7,0.3 0.5,0.5
    python3 benchmark.py --keep-ratio 0.3 0.5 0.7 0.9 --plot keep.png
    python3 benchmark.py --img_size 224 384 512 768 --plot sizes.png
    python3 benchmark.py --bench train --data-path /path/to/imagenet

Flags of the model, the training step and the loader are those of main_deit.py and main_levit.py, with the defaults of
the model's recipe: --stages, --representative, --opt, --weight_decay, --drop_path, --data-set, --num_workers ...

A model and its twin take turns, call by call, so that whatever else the machine does slows both alike. The speed-up is
the median ratio of neighbouring calls. The table shows what matters most; --results_file gets all columns, such as
percentiles, and the ratio of MACs, which is the speed-up that arithmetic alone allows.
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
import models
import optim
import utils
from measure import results
from measure.costs import count_gmacs, peak_memory
from measure.timing import keep_freed_memory, time_call
from utils import HALF, InputError, at_least, print_rank0

MODELS = ['evo_deit_tiny_patch16_224', 'EvoLeViT_128S']
MODES = ['inference', 'latency', 'train']
PRECISIONS = {'float32': 'fp32', 'float16': 'fp16', 'bfloat16': 'bf16'}  # as in the published benchmark
PASSES = 3  # end to end, how often a model is given the loader's batches
LATENCY_CALLS = 5  # times --num_bench_iter, as a percentile needs more calls than a median
OUT_OF_MEMORY = 'out of memory'


def get_parser() -> utils.Parser:
    """Flags of measuring; those of the model and of training are left for the parser of the scripts."""
    parser = utils.Parser(__doc__)
    count = at_least(1)
    add = parser.add_argument_group('what is measured').add_argument
    add('--model', '-m', nargs='+', default=MODELS, metavar='NAME', help="ours or timm's; a pattern with * is several")
    add('--model_list', metavar='FILE', help='file of names, in place of --model')
    add('--bench', nargs='+', default=MODES[:2], choices=[*MODES, 'both'], help='both: inference and train')
    add('--compare', action=BooleanOptionalAction, default=True, help='measure the dense twins too')
    add('--batch-size', '-b', type=count, nargs='+', metavar='N', help='one or a sweep (default: 256, on a CPU 32)')
    add('--img_size', type=count, nargs='+', metavar='PX', help="one side or a sweep (default: the model's)")
    add('--input_size', type=count, nargs=3, metavar=('C', 'H', 'W'), help='for images that are not square')
    add('--keep-ratio', type=keep_ratios, nargs='+', metavar='R', help='one or a sweep; one for each stage is 0.7,0.3')
    add('--layer-wise', action='store_true', help='select before each layer (default: before each stage)')
    add('--num_classes', type=count, metavar='N', help="outputs (default: 1000, or the dataset's)")
    add('--data-path', metavar='PATH', help='measure end to end, with the loader (default: the model alone, on noise)')

    add = parser.add_argument_group('how it runs').add_argument
    about = 'of weights in inference, of autocast in training (default: half on a GPU, fp32 on a CPU)'
    choices = ['fp32', 'tf32', *HALF, 'amp']
    add('--precision', type=lambda name: PRECISIONS.get(name, name), choices=choices, help=about)
    add('--amp', action='store_true', help='autocast in inference too, in half precision; also --precision amp')
    add('--compile', '--torchscript', action='store_true', help='torch.compile, in inference on a GPU with CUDA graphs')
    add('--freeze', action='store_true', help='in inference: compile, with the weights as constants')
    add('--channels-last', action='store_true', help='memory format of images and convolutions')
    add('--fuse', action=BooleanOptionalAction, default=True, help='in inference: fold BatchNorms, drop training heads')
    add('--threads', type=count, metavar='N', help="on a CPU (default: PyTorch's choice)")

    add = parser.add_argument_group('how it is measured').add_argument
    add('--num_warm_iter', type=count, metavar='N', help='calls before timing (default: 10, on a CPU 2)')
    about = f'latency: {LATENCY_CALLS} times as many; end to end: batches in each of {PASSES} passes'
    add('--num_bench_iter', type=count, metavar='N', help=f'calls that are timed (default: 40, on a CPU 10); {about}')
    add('--detail', action='store_true', help='print the operators on which a call spends its time')
    add('--results_file', metavar='PATH', help='add rows to a .csv, or to a .jsonl of JSON lines')
    add('--plot', metavar='PATH', help='draw img/s against GMACs, or against sizes or batches where they are several')
    add('--gp', metavar='POOL', help='accepted without effect: the pooling belongs to the model')
    add('--drop_block', type=float, metavar='RATE', help='accepted without effect: these models have no such layer')
    utils.add_arguments(parser)
    return parser


def keep_ratios(text: str) -> list[float]:
    """One value of --keep-ratio: a number, or one for each stage."""
    try:
        return [float(ratio) for ratio in text.split(',')]
    except ValueError as error:
        raise ArgumentTypeError(f'expected a number, or one for each stage as in 0.7,0.3, found {text!r}') from error


def main():
    """Measure what the flags ask for, case by case, and write each row at once; exit with 1 if one had an error."""
    load = os.getloadavg()[0]
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
    if args.keep_ratio and not any(case.twin for case in cases):
        raise InputError('--keep-ratio: none of these models evolves; add --evolve for ViTs of timm')
    plan = describe_plan(cases)
    common = results.circumstances(args.precision, device)
    print_rank0(', '.join(f'{key} {value}' for key, value in common.items()))
    for warning in results.warn_if_busy(load, torch.get_num_threads() if device.type == 'cpu' else 1):
        print_rank0(warning)
    print_rank0(plan)
    width = max(len(label) for case in cases for label, _ in list_models(case))
    print_rank0(results.table_line(results.COLUMNS, width))
    rows = []
    for case in cases:
        for row in measure(case):
            rows.append(common | row)
            print_rank0(results.table_line(row, width))
            results.write_row(rows[-1], args.results_file)
        torch.compiler.reset()  # compiled code belongs to a class: that of earlier cases would count as recompilation
    for warning in results.warn_of_spread(rows):
        print_rank0(warning)
    if args.plot:
        x = 'image_size' if len(args.img_size) > 1 else 'batch' if len(args.batch_size) > 1 else 'gmacs'
        results.plot(rows, x, args.plot)
    failed = sum(row.get('error', OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows)
    if failed:
        print(f'{failed} of {len(rows)} rows could not be measured: the line below each says why', file=sys.stderr)
        raise SystemExit(1)


# --- what is measured


def resolve_args(args: Namespace, device: torch.device) -> Namespace:
    """The flags with the defaults of the device filled in; InputError for what would fail late."""
    channels, *size = args.input_size or (3, None, None)
    if channels != 3:
        raise InputError(f'--input_size: expected 3 channels, found {channels}')
    results.check_file(args.results_file, ('.csv', '.jsonl'))
    results.check_file(args.plot, ('.png', '.svg', '.pdf'))
    precision, amp = (None, True) if args.precision == 'amp' else (args.precision, args.amp)
    if amp and precision not in (None, *HALF):
        raise InputError(f'--amp is autocast to half precision, found --precision {precision} beside it; leave one out')
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
    """Set the switches of the process: threads, memory, precision of products, compiler."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    utils.set_backends(precision, device)
    if compiled:
        torch._dynamo.config.recompile_limit = 256  # after 8 models of a class PyTorch would silently stop compiling
        torch._inductor.config.freezing = freeze  # as an option of a single compilation it comes too late
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # the profiler complains where there is no GPU


def find_models(names: list[str], file: str | None = None) -> list[str]:
    """The models of `names` or patterns, or of a file of them; InputError with the nearest names where one is none."""
    if file:
        names = Path(file).read_text().split() if Path(file).is_file() else []
        if not names:
            raise InputError(f'--model_list {file}: expected names of models, found none; write one a line')
    models_found = []
    for name in names:
        # Patterns leave out the second names of the same networks.
        matches = [name] if timm.is_model(name) else timm.list_models(name, exclude_filters='*_vis_*')
        for match in matches or [name]:
            models.published_cfg(match)  # InputError where there is none, or not with this tag
        models_found += matches
    return list(dict.fromkeys(models_found))


def make_case(
    args: Namespace, training_flags: list[str], mode: str, name: str, size: int | tuple[int, int] | None, batch: int
) -> Namespace:
    """One measurement: the flags of this script, what main_deit.py or main_levit.py would train with, the dense twin.

    There are no flags of checkpoints: nothing is read from a run on disk, or written to one.
    """
    twin = models.dense_twin(name)
    if 'levit' in name.lower():
        recipe = main_levit.RECIPE | {'distillation_type': 'none'}  # its teacher would take most of the time
    else:
        recipe = main_deit.RECIPE | ({} if twin else {'drop_path': None})
    parser = utils.Parser('')
    for module in (models, datasets, losses, engine):
        module.add_arguments(parser)
    parser.set_defaults(**recipe)
    flags = parser.parse_args(training_flags)
    if flags.fit_schedule:
        raise InputError('--fit-schedule: speed is measured with random weights; give --stages and --keep-ratio')
    size = size or models.published_cfg(name).input_size[-1]
    if args.data_path and not isinstance(size, int):
        raise InputError(f'--data-path: the loader makes square images, not {size}; use --img_size')
    method = None if twin else flags.method  # ours evolve anyway
    twin = (name, flags.model_kwargs or {}) if method else twin
    case = vars(flags) | vars(args) | dict(mode=mode, model=name, twin=twin, method=method, input_size=size)
    autocast = mode == 'train' or args.amp
    # Of images and weights, which are in half precision only where there is no autocast.
    dtype = torch.float32 if autocast else HALF.get(args.precision, torch.float32)
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    tensors = dict(device=args.device, dtype=dtype, memory_format=memory_format)
    case |= dict(batch_size=batch, autocast=autocast, tensors=tensors)
    # Flags in which the models of a case differ; they are timed alternately.
    case['variants'] = [{'keep_ratio': ratio} for ratio in twin and args.keep_ratio or [None]]
    return Namespace(**case | ({} if twin else dict(stages=None, representative=None)))  # others have no schedule


def list_models(case: Namespace) -> list[tuple[str, Callable[..., nn.Module]]]:
    """The models of a case: labels, and functions of the number of classes that build them. The dense twin is last."""
    listed = []
    for variant in case.variants:
        flags = Namespace(**vars(case) | variant)
        method = variant.get('representative', {'evolve': 'evolved'}.get(flags.method, flags.method))
        label = ' '.join(filter(None, [case.model, method]))
        listed.append((label, partial(models.build, flags, input_size=case.input_size)))
    if case.twin and case.compare:
        name, options = case.twin
        label = ' '.join([name, *(f'{key}={value}' for key, value in options.items())])
        rates = {'drop_rate': case.drop} | ({} if case.drop_path is None else {'drop_path_rate': case.drop_path})
        listed.append((label, partial(models.create, name, input_size=case.input_size, **rates, **options)))
    return listed


def describe_plan(cases: list[Namespace]) -> str:
    """What will be measured, and about how long it takes; InputError for a model that cannot be built or evolved."""
    rows, gmacs, case = 0, 0.0, cases[0]
    for case in cases:
        listed, count = list_models(case), 0.0
        for _, build in listed:
            # Of what has no formula or does not run without data, the dense twin is counted.
            with torch.device('meta'), suppress(RuntimeError):
                model = build(num_classes=1000).eval()
                with suppress(InputError):
                    count = max(count, count_gmacs(model, [torch.empty(1, 3, *to_2tuple(case.input_size))]))
        # Forward and backward are three forward passes.
        count *= 3 if case.mode == 'train' else 1
        gmacs += len(listed) * count * case.batch_size * (case.num_warm_iter + count_turns(case))
        rows += len(listed)
    what = f'{" and ".join(dict.fromkeys(case.mode for case in cases))} of {len({case.model for case in cases})} models'
    what = f'to measure: {rows} rows, {what}{" and their dense twins" if case.compare else ""}'
    if case.data_path:
        return f'{what}; how long that takes depends on the loader'
    minutes = gmacs / measure_gmacs_per_second(case.tensors) / 60 + rows / 20  # to build and to count takes seconds
    return f'{what}, about {minutes:.0f} minutes' if minutes >= 1.5 else f'{what}, about a minute'


def measure_gmacs_per_second(tensors: dict) -> float:
    """About what a network reaches: half of the speed of a large product of matrices. `tensors` are their options."""
    x = torch.randn(1024, 1024).to(tensors['device'], tensors['dtype'])
    return 0.5 * 1024**3 / 1e9 / min(time_call(lambda: x @ x, tensors['device']) for _ in range(5))


# --- measuring


@dataclass
class Candidate:
    """What is timed: `step` of images (B, 3, rows, columns) and targets, the batches of one measurement, its row of
    the results, and the seconds of a batch in each measurement.
    """

    row: dict
    step: Callable = lambda images, targets: None
    batches: Callable[[], Iterable] = tuple
    seconds: list[float] = field(default_factory=list)


def measure(case: Namespace) -> list[dict]:
    """Rows of one case: the models of `list_models`, timed alternately; end to end, before them the loader alone."""
    size = case.input_size if isinstance(case.input_size, int) else '{}x{}'.format(*case.input_size)
    row = dict(requested=case.model, mode=case.mode, image_size=size, batch=case.batch_size)
    row |= dict(input=f'{case.data_set}, end to end' if case.data_path else 'noise', channels_last=case.channels_last)
    candidates, load, num_classes = [], None, case.num_classes or 1000
    if case.data_path:
        load, num_classes = build_loader(case)
        candidates.append(Candidate(row | {'model': 'the loader alone'}, batches=load))
        deque(load(), 0)  # from here on files come from memory, for all that are timed; a damaged one ends the run
    for label, build in list_models(case):
        candidates.append(Candidate(row | {'model': label}))
        run_or_record_error(prepare, candidates[-1], case, build, num_classes)
        candidates[-1].batches = load or candidates[-1].batches
    for candidate in count_turns(case) * candidates:
        run_or_record_error(time_batches, candidate, case.device)
    last = candidates[-1]
    twin = (last.row, last.seconds) if case.twin and case.compare and 'error' not in last.row else ()
    for candidate in candidates:
        if 'error' not in candidate.row:
            compared = () if candidate is last else twin
            candidate.row |= results.summarise(candidate.row, candidate.seconds, *compared)
    return [candidate.row for candidate in candidates]


def count_turns(case: Namespace) -> int:
    """How often each model of a case is timed."""
    if case.data_path:
        return PASSES
    return case.num_bench_iter * (LATENCY_CALLS if case.mode == 'latency' else 1)


def build_loader(case: Namespace) -> tuple[Callable[[], Iterable], int]:
    """A function that loads the batches of one pass to the device, and the number of classes."""
    config, train = datasets.data_config(case, case.model), case.mode == 'train'
    train_loader, val_loader = datasets.build_loaders(case, config, train=train)
    loader, num_classes = train_loader or val_loader, len(val_loader.dataset.classes)
    mixup = datasets.build_mixup(case, num_classes) if train_loader else None
    count = min(case.num_bench_iter, len(loader.sampler) // case.batch_size)  # whole batches: shapes are static
    if count == 0:
        raise InputError(f'{case.data_path}: {len(loader.sampler)} images, expected a batch of {case.batch_size}')
    # These images alone: otherwise workers would go on with the next ones while another pass is timed.
    subset = Subset(loader.dataset, list(islice(loader.sampler, count * case.batch_size)))
    workers, pin = loader.num_workers, loader.pin_memory
    loader = DataLoader(subset, case.batch_size, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin)

    def load() -> Iterable[tuple[Tensor, Tensor]]:
        for images, targets in loader:
            images, targets = images.to(**case.tensors, non_blocking=True), targets.to(case.device, non_blocking=True)
            yield mixup(images, targets) if mixup else (images, targets)

    return load, num_classes


def prepare(candidate: Candidate, case: Namespace, build: Callable, num_classes: int):
    """Build a model and make it ready to be timed on a batch of noise; count its arithmetic and memory on the way."""
    row, train, device = candidate.row, case.mode == 'train', case.device
    gc.collect()  # earlier models, where nothing refers to them any more
    torch.cuda.empty_cache()  # does nothing without a GPU
    with device:  # a GPU draws the first weights of a large model seconds faster
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
    targets = torch.rand(case.batch_size, num_classes, device=device).softmax(1)  # soft labels, as mixup makes them

    candidate.batches = lambda: [(images, targets)]
    candidate.step, kept = make_step(case, model, num_classes)
    # Counted before compiling, which hides the operators, and for two images, as each needs the same.
    row |= dict(gmacs=count_gmacs(candidate.step, (images[:2], targets[:2])), compile='no')
    row['autocast'] = case.autocast and case.precision in HALF
    if case.compile:
        graphs = device.type == 'cuda' and not train
        model.compile(**({} if train else dict(dynamic=False, options={'triton.cudagraphs': graphs})))
        row['compile'] = ('CUDA graphs' if graphs else 'default') + (', frozen' if case.freeze and not train else '')
    peak = peak_memory(candidate.step, (images, targets), kept, case.num_warm_iter, device)
    if device.type == 'cuda' or not case.freeze:  # on a CPU, frozen weights are packed into memory that PyTorch hides
        row['peak_mib'] = peak / 2**20
    if case.detail:
        with torch.profiler.profile() as profiler:
            candidate.step(images, targets)
        operators = profiler.key_averages().table(f'self_{device.type}_time_total', row_limit=15)
        print_rank0(f'{case.mode}, {row["model"]}, one call:\n{operators}')


def make_step(case: Namespace, model: nn.Module, num_classes: int) -> tuple[Callable, list]:
    """What is timed, a whole training step or a forward pass; and the tensors that are kept between calls."""
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
    """One measurement: how long a batch takes, the mean where there are several."""
    count = 0

    def steps():
        nonlocal count
        for images, targets in candidate.batches():
            candidate.step(images, targets)
            count += 1

    candidate.seconds.append(time_call(steps, device) / count)


def run_or_record_error(action: Callable, candidate: Candidate, *others):
    """`action(candidate, *others)`, unless one failed before; an error goes into the row, the run goes on."""
    if 'error' in candidate.row:
        return
    try:
        action(candidate, *others)
    except Exception as error:
        signs = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
        full = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(signs, str(error)))
        message = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
        candidate.row['error'] = OUT_OF_MEMORY if full else message
        if not full and not isinstance(error, InputError):  # its message is enough
            traceback.print_exc()
        candidate.step, candidate.batches = Candidate.step, Candidate.batches  # nothing else holds the model


if __name__ == '__main__':
    utils.run_script(main)

"""Everything that is measured on a GPU, in one command of at most 8 minutes: `make gpu`, or

    python3 experiments/gpu.py --output docs/benchmarks
    python3 experiments/gpu.py --device cpu --tiny --output output/gpu     a trial anywhere, torch.compile off

Parts, each in its own process, so that a GPU error in one does not end the others:

    tests       tests/test_gpu.py; gpu-tests.txt says what passed
    attention   two exact forms of proportional attention, `with_mask` and `with_channel`; gpu-kernels.csv
    stage       the first evolving stage of DeiT-S: nearest, none and dense (keep ratio 1); gpu-kernels.csv
    deit        DeiT-T, S, B at batch 256 and 1: nearest, none, merge and dense in turns; gpu.csv, as benchmark.py
    train       training steps of Evo-DeiT-S, EvoLeViT-256 and an evolved DeiT-B; gpu.csv
    large       as deit: ViT-L at 384 and 1,024 px, DINOv2-B and L at 518 px, at batch 1, 8 and 32; gpu.csv

All run in bfloat16, compiled and eager. Rows already in the files for this GPU are skipped, so the same command
resumes; after a code change, choose another folder. The remaining time is divided among the parts that lack rows. A
part that runs out of time is stopped, and its missing rows are printed.

The rule for attention: find the smallest number of tokens such that, there and at every larger number measured, the
compiled `with_channel` takes at most 0.95 of the time of `with_mask`. From there on use the channel, below it the mask.
"""

import argparse
import csv
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import ROOT, Rows  # puts the root on the path of the imports below
from torch import Tensor

import benchmark
import models
import networks
from measure import results
from measure.timing import time_alternately
from models import evolution

# Batch, heads, tokens of 64 channels: both stages of DeiT-S and B, the first of ViT-L at 384, 518 and 1,024 px.
ATTENTIONS = [(256, 6, 138), (256, 6, 59), (256, 12, 138), (256, 12, 59), (8, 16, 404), (8, 16, 959), (8, 16, 2868)]
TINY, TINY_SHAPE = 'vit_tiny_patch16_224', dict(depth=3, embed_dim=48, num_heads=3)
DEIT = {f'deit_{size}_patch16_224': 224 for size in ('tiny', 'small', 'base')}
LARGE = {'vit_large_patch16_384': 384, 'vit_base_patch14_dinov2': 518, 'vit_large_patch14_dinov2': 518}
LARGE |= {'vit_large_patch16_224': 1024}
TRAINED = {'evo_deit_small_patch16_224': 224, 'EvoLeViT_256': 224, 'deit_base_patch16_224': 224}
# Models, batch, compiled, methods; the most important first, because compiling takes most of the time.
FAST, EVERY = ('nearest', 'none'), ('nearest', 'none', 'merge')
SPEEDS = {
    'deit': [(DEIT, 256, True, FAST), (DEIT, 256, False, EVERY), (DEIT, 1, False, EVERY), (DEIT, 1, True, FAST)]
    + [(DEIT, batch, True, ('merge',)) for batch in (256, 1)],
    'train': [(TRAINED, 256, compiled, ('nearest',)) for compiled in (False, True)],
    'large': [(LARGE, batch, False, EVERY) for batch in (1, 8, 32)]
    + [(LARGE, batch, True, methods) for methods in (FAST, ('merge',)) for batch in (8, 1, 32)],
}
Missing = Iterable[tuple[str, Callable[[], None]]]  # what the files lack: a description, and what measures it


def find_tests(args: argparse.Namespace, part: str) -> Missing:
    path = args.output.absolute() / 'gpu-tests.txt'
    lines = path.read_text().splitlines() if path.exists() else ['']
    passed = {line.split()[0] for line in lines if re.match(r'tests/\S+ (PASSED|SKIPPED)', line)}
    if not re.search('passed|skipped', lines[-1]) or re.search('failed|error', lines[-1]):
        command = [sys.executable, '-m', 'pytest', '-vv', '--tb=short', 'tests/test_gpu.py']
        command = shlex.join([*command, *(f'--deselect={name}' for name in passed)])
        run = partial(subprocess.run, f'{command} 2>&1 | tee -a {shlex.quote(str(path))}', shell=True, cwd=ROOT)
        yield f'tests/test_gpu.py, except {len(passed)} tests that passed', run


# --- kernels


def with_mask(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
    """Proportional attention of q, k, v (B, H, n, D) with the log of sizes (B, 1, 1, n) as a mask: (B, H, n, D)."""
    return F.scaled_dot_product_attention(q, k, v, log_size)


def with_channel(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
    """The same without a mask, for FlashAttention: the log becomes a channel of the keys, where queries have a 1."""
    channels = q.shape[-1]
    spare = -(channels + 1) % 8  # zeros up to a multiple of 8
    q = F.pad(F.pad(q * channels**-0.5, (0, 1), value=1.0), (0, spare))
    k = F.pad(torch.cat([k, log_size.transpose(2, 3).expand(*k.shape[:3], 1)], -1), (0, spare))
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 1 + spare)), scale=1.0)[..., :channels]


def make_attention(args: argparse.Namespace, form: Callable, batch: int, heads: int, tokens: int) -> Callable:
    # As in a network, queries, keys and values are views of one product, and the class token has size 1.
    qkv = torch.randn(batch, tokens, 3 * heads * 64, dtype=args.dtype).chunk(3, -1)
    mask = evolution.log_size_mask(torch.randint(1, 9, (batch, tokens - 1)).float(), args.dtype, 1)
    return partial(form, *(x.unflatten(-1, (heads, 64)).transpose(1, 2) for x in qkv), mask)


def make_stage(args: argparse.Namespace, method: str, batch: int) -> Callable:
    name, shape = (TINY, TINY_SHAPE) if args.tiny else ('deit_small_patch16_224', {})
    model = models.evolve(timm.create_model(name, **shape)).to(args.dtype).eval()
    tokens, blocks = model.prepare(torch.randn(batch, 3, 224, 224, dtype=args.dtype))
    (_, start, *_), (_, stop, ratio, _) = model.groups()[:2]
    tradeoffs = evolution.drop_unread(model.tradeoffs(), model.groups())
    tokens, score = evolution.run_blocks(tokens, None, blocks[:start], tradeoffs[:start])
    schedule = (1.0, 'none') if method == 'dense' else (ratio, method)
    return partial(evolution.update_group, tokens, score, blocks[start:stop], tradeoffs[start:stop], *schedule)


def find_kernels(args: argparse.Namespace, part: str) -> Missing:
    rows, found = Rows(args.output / 'gpu-kernels.csv', {}), {}
    if part == 'attention':
        for shape in [(2, 3, 13)] if args.tiny else ATTENTIONS:
            for form in (with_mask, with_channel):
                found[form.__name__, 'batch {}, {} heads, {} tokens'.format(*shape)] = make_attention, form, *shape
    else:
        for method in ('nearest', 'none', 'dense'):
            found[method, 'batch 2' if args.tiny else 'batch 256'] = make_stage, method, 2 if args.tiny else 256
    for compiled in ('yes', 'no'):
        for (what, shape), (make, *others) in found.items():
            key = dict(part=part, what=what, shape=shape, compile=compiled, device=args.name)
            if not rows.has(**key):
                line = f'{part}, {what}, {shape}, compiled: {compiled}'
                yield line, partial(measure_kernels, args, rows, key, partial(make, args, *others))


@torch.inference_mode()
def measure_kernels(args: argparse.Namespace, rows: Rows, key: dict, make: Callable[[], Callable]):
    """Add rows of the 20 slowest kernels (operators on a CPU), with the time of the call: median, p10 and p90."""
    with args.device:
        call = make()
    run = torch.compile(lambda: call(), dynamic=False) if key['compile'] == 'yes' else call
    run()
    with torch.profiler.profile() as profiler:
        run()
    if args.device.type == 'cuda':  # as a CUDA graph, so that launches do not count
        from triton.testing import do_bench_cudagraph

        ms = do_bench_cudagraph(run, rep=50, quantiles=(0.5, 0.1, 0.9))
    else:
        ms = np.percentile(1000 * time_alternately([run], 3, 0, args.device), (50, 10, 90)).tolist()
    total = 'self_cpu_time_total' if args.device.type == 'cpu' else 'self_device_time_total'
    events = [event for event in profiler.key_averages() if event.device_type.name.lower() == args.device.type]
    events = sorted(events, key=lambda event: -getattr(event, total))[:20]
    print(f'    {ms[0]:.3g} ms, most in {events[0].key[:80]}', flush=True)
    for event in events:
        row = dict(zip(('ms', 'ms_p10', 'ms_p90'), ms, strict=True)) | dict(kernel=event.key[:120], calls=event.count)
        with redirect_stdout(None):
            rows.add(**key, **row, us=getattr(event, total), precision=args.precision)
    torch.compiler.reset()


# --- speed, by the benchmark


def find_speeds(args: argparse.Namespace, part: str) -> Missing:
    path, there = args.output / 'gpu.csv', set()
    for row in csv.DictReader(path.read_text().splitlines()) if path.exists() else ():
        there.add((row['mode'], row['model'], row['image_size'], row['batch'], row['compile'] != 'no', row['device']))
    for names, batch, compiled, methods in SPEEDS[part]:
        if args.tiny:
            batch, names = min(batch, 2), {TINY: 64} | ({'evo_deit_nano_patch4_32': 32} if part == 'train' else {})
        for name, size in names.items():
            case = make_case(args, 'train' if part == 'train' else 'inference', name, size, batch, compiled, methods)
            keys = {(case.mode, x, str(size), str(batch), compiled, args.name) for x, _ in benchmark.list_models(case)}
            if labels := [key[1] for key in keys - there]:
                line = f'{case.mode}, {size} px, batch {batch}{", compiled" * compiled}: {", ".join(labels)}'
                yield line, partial(measure_speeds, args, case, labels, str(path))
            there |= keys


def make_case(
    args: argparse.Namespace, mode: str, name: str, size: int, batch: int, compiled: bool, methods: Iterable[str]
):
    """A case of the benchmark; a ViT of timm with `methods`, each at about 0.66 of dense GMACs."""
    evolved = networks.dense_baseline(name) is None
    flags = ['--precision', args.precision, '--num_bench_iter', '2' if args.tiny else '20', '--num_warm_iter', '3']
    flags += ['--compile'] * compiled + ['--evolve'] * evolved
    flags += ['--model-kwargs', *(f'{k}={v}' for k, v in TINY_SHAPE.items())] if evolved and args.tiny else []
    known, others = benchmark.get_parser().parse_known_args(flags)
    case = benchmark.make_case(benchmark.resolve_args(known, args.device), others, mode, name, size, batch)
    if evolved:
        patches, depth = (size // int(re.search(r'patch(\d+)', name)[1])) ** 2, 24 if 'large' in name else 12
        merge = dict(method='merge', merge_r=round(2 / 3 * patches / (3 if args.tiny else depth)))
        case.variants = [merge if method == 'merge' else dict(representative=method) for method in methods]
    return case


def measure_speeds(args: argparse.Namespace, case: argparse.Namespace, labels: list[str], path: str):
    results.check_file(path, ['.csv'])
    benchmark.set_up_torch(None, args.precision, args.device, case.compile, False)
    for row in benchmark.measure(case):
        print(results.table_line(row, 40), flush=True)
        # Out of memory is final, any other error leaves the row missing. A failed row may lack columns.
        if row['model'] in labels and row.get('error', benchmark.OUT_OF_MEMORY) == benchmark.OUT_OF_MEMORY:
            row = {'compile': 'default' if case.compile else 'no'} | row
            results.write_row(results.circumstances(args.precision, args.device) | row, path)
    torch.compiler.reset()


# --- all


# Of each part: its weight in dividing the time, and the function that finds what it lacks.
PARTS = {'tests': (80, find_tests), 'attention': (30, find_kernels), 'stage': (40, find_kernels)}
PARTS |= {'deit': (120, find_speeds), 'train': (80, find_speeds), 'large': (120, find_speeds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--output', type=Path, default=ROOT / 'docs/benchmarks', metavar='FOLDER', help='default: docs/benchmarks')
    add('--device', type=torch.device, default='cuda', help='cuda or cpu')
    add('--tiny', action='store_true', help='tiny models and images, torch.compile switched off, for a trial')
    add('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='all by default')
    add('--minutes', type=float, default=8, help='time limit of all parts together')
    add('--here', action='store_true', help='in this process, without a time limit')
    args = parser.parse_args()
    if args.device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('expected a GPU, found none; for a trial without one, use --device cpu --tiny')
    args.precision, args.dtype = ('bf16', torch.bfloat16) if args.device.type == 'cuda' else ('fp32', torch.float32)
    args.name = results.circumstances(args.precision, args.device)['device']
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    for i, part in enumerate(args.parts):
        find = PARTS[part][1]
        if args.here:
            with torch._dynamo.config.patch(disable=args.tiny):
                for line, measure in find(args, part):
                    print(line, flush=True)
                    measure()
            continue
        left = [PARTS[other][0] for other in args.parts[i:] if any(PARTS[other][1](args, other))]
        if any(find(args, part)):
            seconds = f'{max((end - time.monotonic()) * PARTS[part][0] / sum(left), 1):.0f}'
            print(f'{part}: at most {seconds} seconds', flush=True)
            # `timeout` also ends the processes that the part started.
            command = ['timeout', '--kill-after=5', seconds, sys.executable, *sys.argv, '--parts', part, '--here']
            subprocess.run(command)
        missing = [line for line, _ in find(args, part)]
        print('\n    '.join([f'{part}: {len(missing) or "nothing"} missing', *missing]), flush=True)


if __name__ == '__main__':
    main()

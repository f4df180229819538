"""What every script needs: flags, processes, precision, seeds, printing on rank 0, and atomic file writes."""

import argparse
import math
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from models.weights import InputError, is_url

# Flags that may differ when a run is resumed; True: the run still continues bit for bit.
MAY_CHANGE = {'device': False, 'world_size': False, 'dist_url': True, 'dist_timeout': True, 'local_rank': True}


def run_script(main: Callable[[], object]):
    """Run a script's `main`; wrong input and Ctrl-C end it with one line instead of a traceback.

    `record` passes the error of a process on to torchrun, whose summary shows it.
    """

    @record
    def recorded():
        try:
            main()
        except InputError as error:
            raise error.with_traceback(None) from None  # torchrun's summary shows the message alone
        except RuntimeError as error:
            if dist.is_initialized() and re.search(r'timed? ?out|closed by peer|reset by peer', str(error), re.I):
                error.add_note(
                    'Another process exited (see its message) or did not respond within --dist-timeout seconds.'
                )
            raise

    try:
        recorded()
    except InputError as error:
        print(f'{Path(sys.argv[0]).name}: error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print(f'\n{Path(sys.argv[0]).name}: interrupted', file=sys.stderr, flush=True)
        sys.unraisablehook = lambda _: None  # ignore errors of destructors during shutdown
        sys.exit(128 + signal.SIGINT)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- flags


class Parser(argparse.ArgumentParser):
    """Parser that accepts dashes and underscores in every flag, as the original scripts mix them.

    `doc` is the docstring of a script: --help begins with its first paragraph and ends with the rest, the examples.
    """

    def __init__(self, doc: str, usage: str | None = None):
        summary, _, examples = doc.partition('\n\n')
        super().__init__(
            description=summary, epilog=examples, usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False
        )

    def show_first(self, title: str, flags: Sequence[str]):
        """Move these flags to a group at the top of --help."""
        actions = [self._option_string_actions[flag] for flag in flags]
        for group in self._action_groups:
            group._group_actions = [action for action in group._group_actions if action not in actions]
        self.add_argument_group(title)._group_actions.extend(actions)
        self._action_groups.insert(0, self._action_groups.pop())

    def parse_known_args(self, args=None, namespace=None):
        spelled = {flag.replace('_', '-'): flag for flag in self._option_string_actions if flag.startswith('--')}
        args = list(sys.argv[1:] if args is None else args)
        for i, arg in enumerate(args):
            flag, equals, value = arg.partition('=')
            if flag.startswith('--') and flag not in self._option_string_actions:
                args[i] = spelled.get(flag.replace('_', '-'), flag) + equals + value
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message} (--help lists all flags)\n')


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        complete = action.default in (None, '', False) or '(default' in action.help
        return action.help if complete else super()._get_help_string(action)


def between(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """The `type` of a flag: a finite number from `low` to `high`, both included."""
    expected = f'a number from {low:g} to {high:g}' if math.isfinite(high) else f'{low:g} or more'

    def number(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f'expected {expected}, found {text}')
        return value

    return number


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type` of a flag: an integer, `lowest` or more."""
    return between(lowest, kind=int)


def above_zero(text: str) -> float:
    """The `type` of a flag: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f'expected a number above 0, found {text}')
    return float(text)


def check_source(flag: str, source: str, advice: str = ''):
    """InputError if the value of a flag is neither a URL nor a file; `advice` is appended to the message."""
    if source and not is_url(source) and not Path(source).is_file():
        raise InputError(f'{flag} {source}: {Path(source).absolute()} is not a file{advice}')


def add_arguments(parser: argparse.ArgumentParser):
    """Add the flags of the device, the seed and the processes."""
    add = parser.add_argument_group('device and processes').add_argument
    add('--device', metavar='NAME', help='cuda or cpu (default: a GPU if there is one)')
    add('--seed', type=at_least(0), default=0, metavar='N', help='seed of weights, data order and augmentation')
    add('--dist_url', default='env://', metavar='URL', help='rendezvous of the processes; set by launchers')
    add('--dist-timeout', type=above_zero, default=1800, metavar='S', help='seconds to wait for another process')
    add('--local_rank', type=at_least(-1), default=-1, metavar='N', help='set by launchers without --use_env')
    add('--world_size', type=int, default=1, metavar='N', help='ignored: the launcher sets the number of processes')


# --- processes


def rank() -> int:
    """Rank of this process, 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank0(message: str):
    """Print on rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


def set_up_processes(args: argparse.Namespace) -> torch.device:
    """Join the process group of torchrun or torch.distributed.launch, seed this process, and return its device.

    Without a launcher the script is a single process, also inside a SLURM allocation.
    """
    device = pick_device(args.device, int(os.environ.get('LOCAL_RANK', max(args.local_rank, 0))))
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ:
        timeout = timedelta(seconds=args.dist_timeout)
        place = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        store, number, count = next(dist.rendezvous(args.dist_url, *place, timeout=timeout))
        # After a restart the store still holds the addresses of the processes that died; gloo would connect to them.
        store = dist.PrefixStore(f'start{restarts()}', store)
        # gloo also with GPUs: --model-ema-force-cpu keeps the EMA on the host.
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    seed_all(args.seed)
    return device


def restarts() -> int:
    """How often the launcher has restarted this job after a failure."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def pick_device(name: str | None, local_rank: int) -> torch.device:
    """The device asked for, by default a GPU if there is one; InputError if torch cannot use it."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        if device.type not in ('cpu', 'cuda'):
            raise RuntimeError('expected cpu or cuda')
        if device.type == 'cuda':
            device = torch.device('cuda', local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f'--device {name}: torch {torch.__version__} cannot use it here ({str(error).splitlines()[0]}). '
            f'CUDA devices found: {torch.cuda.device_count()}. Without --device the script picks one that works.'
        ) from error
    return device


# --- precision

HALF = {'fp16': torch.float16, 'bf16': torch.bfloat16}


def half_precision(device: torch.device) -> str:
    """The half precision that a GPU computes fast: bf16 from compute capability 8.0 on, else fp16."""
    return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'


def pick_precision(precision: str | None, device: torch.device, amp: bool = True) -> str:
    """Return `precision` if given. Default: half precision on a GPU with `amp`, else TF32 if supported, else fp32.

    The original fp32 runs used TF32 on GPUs that support it, which was PyTorch's default then.
    """
    has_tf32 = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == 'tf32' and not has_tf32:
        raise InputError(f'--precision tf32: expected an NVIDIA GPU, Ampere or newer, found {device}; use fp32')
    if precision:
        return precision
    if amp and device.type == 'cuda':
        return half_precision(device)
    return 'tf32' if has_tf32 else 'fp32'


def set_backends(precision: str, device: torch.device):
    """Set PyTorch's global switches: TF32 in float32 matmuls and convolutions, and cuDNN's benchmark mode."""
    # The old names: torch.compile still reads them, and raises an error after the newer `fp32_precision` was set.
    with warnings.catch_warnings(action='ignore'):  # some versions warn that there are newer names
        torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    torch.backends.cudnn.benchmark = device.type == 'cuda'  # training batches have one shape


def make_autocast(precision: str, device: torch.device) -> partial:
    """A context manager for forward passes: autocast in half precision, no effect in fp32 and tf32."""
    dtype = HALF.get(precision)
    return partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)


def all_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_gather(values: Tensor) -> Tensor:
    """`values` of every process, (processes, *values.shape), on the same device."""
    if not dist.is_initialized():
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


# --- randomness


def seed_all(*key: int):
    """Seed `random`, numpy and torch from a tuple of non-negative integers, such as (seed, epoch, position).

    Random numbers become a function of the key, so no generator state is saved, restored or shared between workers.
    """
    words = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    # torch.manual_seed also seeds every backend, which takes thirty times as long: too slow to do for each image.
    torch.default_generator.manual_seed(words[2] << 32 | words[3])
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(words[2] << 32 | words[3])


# --- files


def atomic_write(path: Path, write: Callable[[BinaryIO], None]):
    """Write a file so that, whatever happens, `path` holds either the old content or the new one, complete.

    If writing fails, as on a full disk, the old file stays, the temporary one is removed, and InputError is raised.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the content is on disk before the name points at it
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch reports a full disk as a RuntimeError
            raise InputError(f'{path} could not be written; the old file, if any, is intact: {error}') from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

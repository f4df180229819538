"""What every script needs: flags, processes, seeds, printing on rank 0, and files that are never half-written."""

import argparse
import importlib.metadata
import math
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable
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

# Flags that may differ between a run and its continuation, and whether it goes on bit for bit even so.
MAY_CHANGE = {'device': False, 'world_size': False, 'dist_url': True, 'dist_timeout': True, 'local_rank': True}


def run_script(main: Callable[[], object]):
    """Run a script's `main`: wrong input or Ctrl-C ends it with a message, and its processes leave their group.

    torchrun's summary shows what ended a process, because `record` leaves it the traceback.
    """

    @record
    def recorded():
        try:
            main()
        except InputError as error:
            raise error.with_traceback(None) from None  # where it came from would bury what it says in the summary
        except RuntimeError as error:
            if dist.is_initialized() and re.search(r'timed? ?out|closed by peer|reset by peer', str(error), re.I):
                error.add_note(
                    'This process gave up waiting for another one. That one ended, and says why itself, or it was '
                    'silent for longer than --dist-timeout (seconds).'
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
        sys.unraisablehook = lambda _: None  # what was half built may fail to be torn down: nothing to read there
        sys.exit(128 + signal.SIGINT)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# What a version outside the tested ones may cost.
UNTESTED = {
    'torch': 'before 2.10, a checkpoint can run code although it is read the safe way',
    'torchvision': 'it is one pair with torch, installed together',
    'timm': 'the networks are built from its layers',
    'pillow': "from 13 on, timm's RandAugment, which is on by default, ends training after some steps",
}


def tested_versions(folder: Path = Path(__file__).parent) -> dict[str, list[str]]:
    """Two versions of each package that the tests run with: the lower end of requirements.txt, and constraints.txt's.

    A file that is not in `folder` is skipped: an installation needs neither.
    """
    tested = {}
    for name, operator in (('requirements.txt', '>='), ('constraints.txt', '==')):
        path = folder / name
        text = path.read_text() if path.is_file() else ''
        for package, version in re.findall(rf'^([\w.-]+){operator}([\d.]+)', text, re.M):
            tested.setdefault(package.lower(), []).append(version)
    return tested


def check_versions(version: Callable[[str], str] = importlib.metadata.version):
    """Print which packages are older or newer than the tested versions, and what that may cost."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r'\d+', text.split('+')[0])[:3]]

    tested = tested_versions()
    for package, cost in UNTESTED.items():
        if len(tested.get(package, ())) < 2:
            continue
        oldest, newest, installed = *tested[package], version(package)
        if not numbers(oldest) <= numbers(installed) <= numbers(newest):
            print_rank0(
                f'warning: {package} {installed} is not between the tested versions, {oldest} and {newest}: {cost}'
            )


# --- flags


class Parser(argparse.ArgumentParser):
    """Parser that shows defaults and takes every flag with dashes or underscores, as the published scripts mix them."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

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


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type` of a flag: an integer, `lowest` or more."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f'expected {lowest} or more, found {text}')
        return int(text)

    return integer


def above_zero(text: str) -> float:
    """The `type` of a flag: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f'expected a number above 0, found {text}')
    return float(text)


def between(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """The `type` of a flag: a finite number from `low` to `high`, both allowed."""
    ends = [f'{name} {end:g}' for name, end in (('from', low), ('to', high)) if math.isfinite(end)]
    expected = ' '.join(['a number', *ends]) if ends else 'a finite number'

    def number(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f'expected {expected}, found {text}')
        return value

    return number


def check_source(flag: str, source: str, advice: str = ''):
    """InputError where the value of a flag is neither a URL nor a file; `advice` ends the message."""
    if source and not is_url(source) and not Path(source).is_file():
        raise InputError(f'{flag} {source}: {Path(source).absolute()} is not a file{advice}')


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the processes that a script runs in."""
    add = parser.add_argument_group('device and processes').add_argument
    add('--device', help='cuda or cpu (default: a GPU where there is one, else the CPU)')
    add('--seed', type=at_least(0), default=0, help='seed of weights, order and augmentation')
    add('--dist_url', default='env://', help='where the processes meet; launchers set the environment')
    add('--dist-timeout', type=above_zero, default=1800, help='seconds to wait for another process')
    add('--local_rank', type=at_least(-1), default=-1, help='set by launchers that do not use the environment')
    add('--world_size', type=int, default=1, help='ignored: the launcher decides how many processes run')


# --- processes


def rank() -> int:
    """Number of this process, 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank0(message: str):
    """Print on the first process alone."""
    if rank() == 0:
        print(message, flush=True)


def set_up_processes(args: argparse.Namespace) -> torch.device:
    """Join the launcher's processes, if there is one, seed this one, and return its device.

    Launchers are torchrun and torch.distributed.launch, with and without --use_env. Without one, in a SLURM allocation
    too, the script is a single process.
    """
    device = pick_device(args.device, int(os.environ.get('LOCAL_RANK', max(args.local_rank, 0))))
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ:
        timeout = timedelta(seconds=args.dist_timeout)
        place = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        store, number, count = next(dist.rendezvous(args.dist_url, *place, timeout=timeout))
        # After a restart the store still has the addresses of the processes that died, and gloo would connect to them.
        store = dist.PrefixStore(f'start{restarts()}', store)
        # gloo too on GPUs: an EMA that is kept on the CPU lives on the host.
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    check_versions()
    seed_all(args.seed)
    return device


def restarts() -> int:
    """How often the launcher started this job again after a failure."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def pick_device(name: str | None, local_rank: int) -> torch.device:
    """The device asked for, or a GPU where there is one, else the CPU; InputError where torch cannot use it."""
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
            f'CUDA devices found: {torch.cuda.device_count()}. Without --device the script takes what is there.'
        ) from error
    return device


# --- precision

HALF = {'fp16': torch.float16, 'bf16': torch.bfloat16}


def half_precision(device: torch.device) -> str:
    """The half precision that a GPU has fast units for: bf16 since compute capability 8.0, else fp16."""
    return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'


def pick_precision(precision: str | None, device: torch.device, amp: bool = True) -> str:
    """The precision asked for, or on a GPU the fastest safe one: half precision with `amp`, else TF32, or fp32.

    The published recipes in fp32 had TF32 products where the device has them: it was PyTorch's default.
    """
    has_tf32 = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == 'tf32' and not has_tf32:
        raise InputError(f'--precision tf32 is a mode of NVIDIA GPUs since Ampere, the device is {device}; use fp32')
    if precision:
        return precision
    if amp and device.type == 'cuda':
        return half_precision(device)
    return 'tf32' if has_tf32 else 'fp32'


def set_backends(precision: str, device: torch.device):
    """PyTorch's global switches: TF32 in products of float32, or not; cuDNN tries which convolution is the fastest."""
    # By their older names: after the newer `fp32_precision`, torch.compile, which still reads these, raises an error.
    with warnings.catch_warnings(action='ignore'):  # some versions say that there are newer names
        torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    torch.backends.cudnn.benchmark = device.type == 'cuda'  # worth it, as all batches have the same shape


def make_autocast(precision: str, device: torch.device) -> partial:
    """A context for forward passes: autocast to half precision, or nothing in fp32 and tf32."""
    dtype = HALF.get(precision)
    return partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)


def all_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_gather(values: Tensor) -> Tensor:
    """`values` of every process, of shape (processes, *values.shape), on the device where they are."""
    if not dist.is_initialized():
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


# --- randomness


def seed_all(*key: int):
    """Seed `random`, numpy and torch from a tuple of non-negative integers, such as (seed, epoch, position).

    Random numbers are then a function of the key: there is no state to save, to restore, or to share between workers.
    """
    words = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    # torch.manual_seed would also visit every backend, thirty times slower: too slow for each image.
    torch.default_generator.manual_seed(words[2] << 32 | words[3])
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(words[2] << 32 | words[3])


# --- files


def atomic_write(path: Path, write: Callable[[BinaryIO], None]):
    """Write a file so that `path` holds the old content or the new one, whole, whatever happens.

    Raises InputError, with the old file in place and the temporary one gone, where that fails, as on a full disk.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch reports a full disk as a RuntimeError
            raise InputError(f'{path} could not be written, what was there before is whole: {error}') from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""What every script needs: flags, processes, seeds, and checkpoints that are safe to read and never half-written."""

import argparse
import hashlib
import importlib.metadata
import math
import os
import pathlib
import random
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urldefrag, urlparse

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record


class InputError(ValueError):
    """Something that the user gave is wrong. A script prints the message without a traceback and exits with 2."""


def run_script(main: Callable[[], None]):
    """Run a script's `main`: wrong input or Ctrl-C ends it with a message, and its processes leave their group.

    torchrun's summary shows what ended a process, because `record` leaves it the traceback.
    """

    @record
    def recorded():
        try:
            main()
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


# What a version that is not between the tested ones may cost.
UNTESTED = {
    'torch': 'before 2.10, a checkpoint can run code although it is read the safe way',
    'torchvision': 'it is one pair with torch, installed together',
    'timm': 'the networks are built from its layers',
    'pillow': "from 13 on, timm's RandAugment, which is on by default, ends training after some steps",
}


def tested_versions(folder: Path = Path(__file__).parent) -> dict[str, list[str]]:
    """Two versions of each package that the tests run with: the lower end of requirements.txt, and constraints.txt's.

    A file that is not in `folder` says nothing: an installation needs neither.
    """
    tested = {}
    for name, operator in (('requirements.txt', '>='), ('constraints.txt', '==')):
        path = folder / name
        text = path.read_text() if path.is_file() else ''
        for package, version in re.findall(rf'^([\w.-]+){operator}([\d.]+)', text, re.M):
            tested.setdefault(package.lower(), []).append(version)
    return tested


def check_versions(version: Callable[[str], str] = importlib.metadata.version):
    """Say which packages are older or newer than the tested versions, and what that may cost."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r'\d+', text.split('+')[0])[:3]]

    tested = tested_versions()
    for package, cost in UNTESTED.items():
        if len(tested.get(package, ())) < 2:
            continue
        oldest, newest, found = *tested[package], version(package)
        if not numbers(oldest) <= numbers(found) <= numbers(newest):
            say(f'warning: {package} {found} is not between the tested versions, {oldest} and {newest}: {cost}')


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


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        said = action.default in (None, '', False) or '(default' in action.help
        return action.help if said else super()._get_help_string(action)


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the processes that a script runs in."""
    group = parser.add_argument_group('device and processes')
    group.add_argument('--device', help='cuda or cpu (default: a GPU where there is one, else the CPU)')
    group.add_argument('--seed', type=int, default=0, help='seed of weights, order and augmentation')
    group.add_argument('--dist_url', default='env://', help='where the processes meet; launchers set the environment')
    group.add_argument('--dist-timeout', type=float, default=1800, help='seconds to wait for another process')
    group.add_argument('--local_rank', type=int, default=-1, help='set by launchers that do not use the environment')
    group.add_argument('--world_size', type=int, default=1, help='accepted; the launcher says how many processes run')


# --- processes


def rank() -> int:
    """Number of this process, 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """Print on the first process alone."""
    if rank() == 0:
        print(*words, flush=True)


def set_up_processes(args: argparse.Namespace) -> torch.device:
    """Join the launcher's processes, if there is one, seed this one, and return its device.

    Launchers are torchrun and torch.distributed.launch, with and without --use_env. Without one, in a SLURM allocation
    too, the script is a single process.
    """
    local_rank = int(os.environ.get('LOCAL_RANK', max(args.local_rank, 0)))
    name = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
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
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ:
        # After a restart the store still has the addresses of the processes that died: each start has its own names.
        timeout = timedelta(seconds=args.dist_timeout)
        place = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        store, number, count = next(dist.rendezvous(args.dist_url, *place, timeout=timeout))
        store = dist.PrefixStore(f'start{restarts()}', store)
        # gloo too on GPUs: an average that is kept on the CPU lives on the host.
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    check_versions()
    seed_all(args.seed)
    return device


def restarts() -> int:
    """How often the launcher started this job again after a failure."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def half_precision(device: torch.device) -> str:
    """The half precision that a GPU has fast units for: bf16 since compute capability 8.0, else fp16."""
    return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'


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


def inject_fault(epoch: int, step: int) -> float:
    """For tests: fail where EVO_VIT_FAULT=kind:rank:epoch:step says so; returns what images are multiplied by.

    Kinds: kill, stall, exception, nan. A job that was restarted does not fail again.
    """
    kind, *place = os.environ.get('EVO_VIT_FAULT', '').split(':')
    if not kind or restarts() or [rank(), epoch, step] != [int(number) for number in place]:
        return 1.0
    if kind == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 'stall':
        time.sleep(3600)
    if kind == 'exception':
        raise RuntimeError('injected fault')
    return math.nan


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


# --- checkpoints


def write_checkpoint(path: str | Path, checkpoint: dict):
    """Write a checkpoint as `write_whole` does."""
    write_whole(Path(path), partial(torch.save, checkpoint))


def write_whole(path: Path, write: Callable[[BinaryIO], None]):
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


def is_address(source: str | Path) -> bool:
    """Whether `source` is an http(s) address rather than a path."""
    return urlparse(str(source)).scheme in ('http', 'https')


def read_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint from a path or an address, whole or not at all, and never run code that it holds.

    Files are those of torch.save, or safetensors, which hold weights alone and no checksum.

    An address may carry the hash to check, in its file name (`name-<sha256 prefix>.pth`, as torch.hub has it) or as
    `#sha256=<hex>`. Raises InputError that says what the source is, where it is no checkpoint.
    """
    if is_address(source):
        return _download(str(source))
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f'no checkpoint at {source}: '
            + (f'a folder, with {_listing(path)}' if path.is_dir() else f'{path.resolve()} does not exist')
        )
    if zipfile.is_zipfile(path):
        # torch.load does not check the sums that a zip file keeps: a flipped bit would load.
        try:
            with zipfile.ZipFile(path) as archive:
                damaged, names = archive.testzip(), archive.namelist()
        except Exception as error:  # a wrong byte in a name or a flag raises one of many kinds
            raise InputError(f'{source} is damaged ({error})') from error
        if damaged:
            raise InputError(f'{source} is damaged: the checksum of {damaged} is wrong')
        if not any(name.endswith('/data.pkl') for name in names):
            raise InputError(f'{source} is a zip file ({", ".join(names[:3])}, ...), not a PyTorch checkpoint')
        if any(name.endswith('constants.pkl') for name in names):
            raise InputError(f'{source} is a TorchScript program, not a checkpoint of weights')
    elif path.suffix == '.safetensors' or _is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # of a damaged header, a short file, a foreign file with this ending
            raise InputError(
                f'{source} is damaged, or not a safetensors file: {describe_file(path)} ({error})'
            ) from error
    # The published files keep their arguments as a Namespace, sometimes with paths in it: plain data, safe to rebuild.
    harmless = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
    try:
        with torch.serialization.safe_globals(harmless):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        if refused:
            what = f'holds Python objects ({refused[1]}), not only weights; it was not loaded, as that could run code'
        else:
            what = f'is no readable checkpoint: {describe_file(path)}'
        raise InputError(f'{source} {what}') from error
    if not isinstance(checkpoint, dict):
        raise InputError(f'{source} holds a {type(checkpoint).__name__}; expected a dict of weights')
    return checkpoint


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the size of a JSON header, then the header."""
    with open(path, 'rb') as file:
        head = file.read(9)
    return head[8:] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size


def describe_file(path: Path) -> str:
    """Say what a file that is no checkpoint seems to be."""
    size = path.stat().st_size
    with open(path, 'rb') as file:
        head = file.read(1024)
    if not head:
        return 'the file is empty'
    if re.match(rb'\s*<(!doctype|html|\?xml|head)', head, re.IGNORECASE):
        return 'it is a web page (a download that needs a click or a login gives one)'
    if not head.strip(b'\0'):
        return 'it begins with zeros (a broken copy or download)'
    if head[257:262] == b'ustar':
        return 'it is a tar archive'
    if _is_safetensors(path):
        return f'it begins as a safetensors file, of {size:,} bytes'
    if head[:2] == b'PK':
        return f'it is damaged, a zip file cut short at {size:,} bytes (an interrupted download or copy)'
    if head[:1] == b'\x80':
        return f'it is a pickle, damaged or cut short at {size:,} bytes'
    if all(byte in b'\t\n\r' or byte >= 32 for byte in head):
        return 'it is a text file'
    return f'{size:,} bytes of unknown kind'


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return (
        ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
        if names
        else 'nothing'
    )


def _download(address: str) -> dict:
    """Read a checkpoint from an address through torch.hub's cache; each use checks the hash again."""
    url, fragment = urldefrag(address)
    name = Path(urlparse(url).path).name or 'checkpoint'
    named = re.search(r'-([a-f0-9]{8,64})\.', name)
    wanted = fragment.removeprefix('sha256=') if fragment.startswith('sha256=') else named[1] if named else ''
    cached = Path(torch.hub.get_dir()) / 'checkpoints' / (name if wanted else f'{os.getpid()}-{name}')
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not cached.exists():
            say(f'downloading {url}')
            partial = cached.with_name(f'{cached.name}.{os.getpid()}.part')
            try:
                torch.hub.download_url_to_file(url, str(partial), progress=False)
                os.replace(partial, cached)
            finally:
                partial.unlink(missing_ok=True)
        with open(cached, 'rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
        if wanted and not found.startswith(wanted):
            cached.unlink()
            raise InputError(
                f'{url}: expected a file with sha256 {wanted}, found {found}; it was removed from the cache'
            )
        if not wanted:
            say(f'{url} names no hash to check; add #sha256={found} to hold it to this file')
        try:
            return read_checkpoint(cached)
        except InputError as error:
            cached.unlink(missing_ok=True)
            raise InputError(f'{url}: {error}') from error
    except OSError as error:
        raise InputError(f'{url} could not be downloaded: {error}') from error
    finally:
        if not wanted:
            cached.unlink(missing_ok=True)


class Loaded(NamedTuple):
    """What load_weights could not take over as it is: names of tensors.

    missing: the model's, not found in the file; they are as they were.
    dropped: the file's, not used.
    filled: the model's, not found in the file; they are copies of others, as `head_cls` of `head`.
    pooling: the model's new `global_pool`, where that of the weights is another than the model had; else ''.
    """

    missing: list[str]
    dropped: list[str]
    filled: list[str]
    pooling: str


def find_weights(checkpoint: dict, use_ema: bool = False) -> dict[str, Tensor]:
    """The state dict in a checkpoint: the published layout's, timm's, this project's, or a bare one."""
    keys = ('model_ema', 'state_dict_ema') if use_ema else ('model', 'state_dict')
    state = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), None)
    if state is None and use_ema:
        raise InputError(
            f'the checkpoint has no averaged weights (model_ema); it has {", ".join(map(str, checkpoint))}'
        )
    state = checkpoint if state is None else state
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        raise InputError(f'expected weights, tensors by name; found {", ".join(map(str, wrong[:5])) or "nothing"}')
    # Prefixes that DistributedDataParallel and torch.compile leave.
    return {re.sub(r'^(module\.|_orig_mod\.)+', '', key): value for key, value in state.items()}


def load_weights(model: nn.Module, source: str | Path | dict, use_ema: bool = False, adapt: bool = False) -> Loaded:
    """Load weights into a model, strictly: every tensor is used, or named in what is returned, or an error.

    Args:
        source: path, address, or a checkpoint that was read already, in the published layout, timm's or this project's.
        use_ema: take the averaged weights.
        adapt: for fine-tuning: positions are resized to the model's resolution, heads for other classes are left out,
            and the file may lack a head. The pooling stays the model's, as the head is trained for it.

    Returns what could not be taken over as it is; nothing, unless with `adapt` or for a plain DeiT or ViT in an
    Evo-DeiT. The head of a plain one was trained on the class token: the model then predicts from it, which is said.

    Raises InputError with counts and the first few names where the weights are of another model.
    """
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source)
    where = 'the checkpoint' if isinstance(source, dict) else str(source)
    own, pooling = model.state_dict(), getattr(model, 'global_pool', '')
    state, filled, dropped = find_weights(checkpoint, use_ema), [], []
    try:
        if hasattr(model, 'convert_state'):
            state, filled, dropped = model.convert_state(state, resize=adapt)
        elif adapt:
            state = _resize(model, state)
    except ValueError as error:
        raise InputError(f'{where}: {error}') from error

    classifier = (getattr(model, 'default_cfg', None) or {}).get('classifier') or ()
    heads = tuple(f'{name}.' for name in ([classifier] if isinstance(classifier, str) else classifier))
    differ = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    other_head = [k for k in differ if k.startswith(heads) and len(state[k]) != len(own[k])]
    if other_head and len(other_head) == len(differ) and not adapt:
        found, expected = len(state[other_head[0]]), len(own[other_head[0]])
        raise InputError(f'{where} has {found} classes, the model {expected}')
    missing = [k for k in own if k not in state]
    no_head = [k for k in missing if k.startswith(heads)] if adapt else []
    problems = {
        'missing': [k for k in missing if k not in no_head],
        'not expected': [k for k in state if k not in own],
        'of another shape': [
            f'{k} {(*state[k].shape,)}, not {(*own[k].shape,)}' for k in differ if k not in other_head
        ],
    }
    if any(problems.values()):
        lines = [f'{where} does not fit {type(model).__name__} ({len(state)} tensors for {len(own)}):']
        for problem, names in problems.items():
            if names:
                lines.append(f'  {len(names)} {problem}: {", ".join(names[:4])}{", ..." if len(names) > 4 else ""}')
        raise InputError('\n'.join([*lines, 'It may be of another model or image size.']))
    model.load_state_dict(state | {k: own[k] for k in (*other_head, *no_head)})
    return Loaded(
        missing=sorted({*other_head, *no_head}),
        dropped=dropped + [k for k in other_head if k not in filled],
        filled=[k for k in filled if k not in other_head],
        pooling=_say_new_pooling(model, pooling, where),
    )


def _say_new_pooling(model: nn.Module, before: str, where: str) -> str:
    """Say, and return, the pooling that came with the weights, where it is not the one from before, else ''."""
    pooling = getattr(model, 'global_pool', '')
    if pooling == before:
        return ''
    read = {'token': 'its class token', 'avg': 'the mean of its patches'}.get(pooling, 'its patches')
    say(
        f'{where}: {type(model).__name__} now predicts from {read}, which the head of these weights was trained for '
        f"(global_pool '{pooling}', it was '{before}')"
    )
    return pooling


def _resize(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a model of timm, positions and the like resized by timm's function for its family, if it has one."""
    adapted = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if adapted is None:
        return state
    try:
        return adapted(dict(state), model)
    except Exception as error:  # timm's functions meet any file, and fail in many ways
        raise ValueError(f'cannot be adapted to {type(model).__name__}: {error}') from error

"""Weights: a file or URL read safely, and loaded into a model strictly.

No code in a file is ever run, nothing half is read, and every tensor is used, or named, or an error. The way of a file:
`read_checkpoint` to a dict, `find_weights` to a state dict, the model's `convert_state` to its names and shapes,
`_check_fit`, and `load_state_dict`; `load_weights` goes all of it.
"""

import argparse
import hashlib
import os
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag, urlparse

import safetensors.torch
import torch
from torch import Tensor, nn

from . import huggingface

# Takes a message for the user. A script of several processes gives one that prints on the first of them.
Report = Callable[[str], None]


class InputError(ValueError):
    """Something that the user gave is wrong. A script prints the message without a traceback and exits with 2."""


def is_url(source: str | Path) -> bool:
    """Whether `source` is an http(s) address rather than a path."""
    return urlparse(str(source)).scheme in ('http', 'https')


# What a file that is no checkpoint seems to be, by how it begins.
KINDS = {
    rb'\Z': 'it is empty',
    rb'\s*<(?i:!doctype|html|\?xml|head)': 'it is a web page (a download that needs a click or a login gives one)',
    rb'\0+\Z': 'it begins with zeros (a broken copy or download)',
    rb'.{257}ustar': 'it is a tar archive',
    rb'PK': 'it is a damaged zip file, cut short (an interrupted download or copy)',
    rb'\x80': 'it is a pickle, damaged or cut short',
    rb'[\t\n\r\x20-\xff]+\Z': 'it is a text file',
    rb'.{8}\{': 'it begins as a safetensors file',
}


def read_checkpoint(source: str | Path, report: Report = print) -> dict:
    """Read a checkpoint from a path or a URL, whole or not at all, and never run code that it holds.

    Files are those of torch.save, or safetensors, which hold weights alone and no checksum.

    A URL may carry the hash to check, in its file name (`name-<sha256 prefix>.pth`, as torch.hub has it) or as
    `#sha256=<hex>`. Raises InputError that says what the source is, where it is no checkpoint.
    """
    if is_url(source):
        return _download(str(source), report)
    path = Path(source)
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        raise InputError(f'no checkpoint at {source}: it is a folder, with {", ".join(names[:8]) or "nothing"}')
    if not path.is_file():
        raise InputError(f'no checkpoint at {source}: {path.resolve()} does not exist')
    if zipfile.is_zipfile(path):
        _check_zip(path)
    elif path.suffix == '.safetensors' or _is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # of a damaged header, a short file, a foreign file with this ending
            what = f'is damaged, or not a safetensors file: {describe_file(path)} ({error})'
            raise InputError(f'{source} {what}') from error
    # The published files keep their arguments as a Namespace, sometimes with paths in it: plain data, safe to rebuild.
    harmless = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
    try:
        with torch.serialization.safe_globals(harmless):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        what = f'is no readable checkpoint: {describe_file(path)}'
        if refused := re.search(r'GLOBAL ([\w.]+)', str(error)):
            what = f'holds Python objects ({refused[1]}), not only weights; it was not loaded, as that could run code'
        raise InputError(f'{source} {what}') from error
    if not isinstance(checkpoint, dict):
        raise InputError(f'{source} holds a {type(checkpoint).__name__}; expected a dict of weights')
    return checkpoint


def _check_zip(path: Path):
    """InputError for a zip file that is damaged, or not of torch.save; torch.load does not check its sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except Exception as error:  # a wrong byte in a name or a flag raises one of many kinds
        raise InputError(f'{path} is damaged ({error})') from error
    if damaged:
        raise InputError(f'{path} is damaged: the checksum of {damaged} is wrong')
    if not any(name.endswith('/data.pkl') for name in names):
        raise InputError(f'{path} is a zip file ({", ".join(names[:3])}, ...), not a PyTorch checkpoint')
    if any(name.endswith('constants.pkl') for name in names):
        raise InputError(f'{path} is a TorchScript program, not a checkpoint of weights')


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the size of a JSON header, then the header."""
    with open(path, 'rb') as file:
        head = file.read(9)
    return head[8:] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size


def describe_file(path: Path) -> str:
    """Say what a file that is no checkpoint seems to be."""
    with open(path, 'rb') as file:
        head = file.read(1024)
    kind = next((kind for pattern, kind in KINDS.items() if re.match(pattern, head, re.DOTALL)), 'of unknown kind')
    return f'{kind}; {path.stat().st_size:,} bytes'


def _download(address: str, report: Report) -> dict:
    """Read a checkpoint from a URL through torch.hub's cache; each use checks the hash again."""
    url, fragment = urldefrag(address)
    name = Path(urlparse(url).path).name or 'checkpoint'
    in_name = re.search(r'-([a-f0-9]{8,64})\.', name)
    expected = fragment.removeprefix('sha256=') if fragment.startswith('sha256=') else in_name[1] if in_name else ''
    # A file without a hash to check does not stay in the cache.
    cached = Path(torch.hub.get_dir()) / 'checkpoints' / (name if expected else f'{os.getpid()}-{name}')
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not cached.exists():
            report(f'downloading {url}')
            torch.hub.download_url_to_file(url, str(cached), progress=False)
        with open(cached, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        if not digest.startswith(expected):
            raise InputError(f'expected a file with sha256 {expected}, found {digest}; it was removed from the cache')
        if not expected:
            report(f'{url} names no hash to check; add #sha256={digest} to hold it to this file')
        return read_checkpoint(cached)
    except OSError as error:
        raise InputError(f'{url} could not be downloaded: {error}') from error
    except InputError as error:
        cached.unlink(missing_ok=True)
        raise InputError(f'{url}: {error}') from error
    finally:
        if not expected:
            cached.unlink(missing_ok=True)


class Loaded(NamedTuple):
    """What load_weights could not take over as it is: names of tensors.

    missing: the model's, not found in the file; they are as they were.
    dropped: the file's, not used; `text_model.*` for all that begin so.
    filled: the model's, not found in the file; they are copies of others, as `head_cls` of `head`.
    pooling: the model's new `global_pool`, where that of the weights is another than the model had; else ''.
    """

    missing: list[str]
    dropped: list[str]
    filled: list[str]
    pooling: str


def find_weights(checkpoint: dict, use_ema: bool = False) -> dict[str, Tensor]:
    """The state dict in a checkpoint: the published layout's, timm's, this project's, or a bare one.

    One in the names of Hugging Face's transformers gets timm's.
    """
    return huggingface.to_timm(_find_state(checkpoint, use_ema))[0]


def _find_state(checkpoint: dict, use_ema: bool) -> dict[str, Tensor]:
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


def load_weights(
    model: nn.Module,
    source: str | Path | dict,
    use_ema: bool = False,
    adapt: bool = False,
    report: Report = print,
) -> Loaded:
    """Load weights into a model, strictly: every tensor is used, or named in what is returned, or an error.

    Args:
        source: path, URL, or a checkpoint that was read already, in the published layout, timm's, this project's or
            that of Hugging Face's transformers (see huggingface.py).
        use_ema: take the averaged weights.
        adapt: for fine-tuning: positions are resized to the model's resolution, heads for other classes are left out,
            and the file may lack a head. The pooling stays the model's, as the head is trained for it.
        report: called with messages for the user.

    Returns what could not be taken over as it is; nothing, unless with `adapt`, for a model without classes, which has
    no head, or for a plain DeiT or ViT in an Evo-DeiT. The head of a plain one was trained on the class token: the
    model then predicts from it, which is said. So is a change of the schedule (stages, keep_ratio, ...): the one that
    a checkpoint was saved with comes with its weights; set your own afterwards. With `adapt` the model's stays.

    Raises InputError with counts and the first few names where the weights are of another model.
    """
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source, report)
    where = 'the checkpoint' if isinstance(source, dict) else str(source)
    expected, pooling = model.state_dict(), getattr(model, 'global_pool', '')
    state, filled, dropped = _find_state(checkpoint, use_ema), [], []
    state, beside, note = huggingface.to_timm(state, model)
    if note:
        report(f'{where}: {note}')
    try:
        if hasattr(model, 'convert_state'):
            state, filled, dropped = model.convert_state(state, resize=adapt)
        elif adapt:
            state = resize_weights(model, state)
    except ValueError as error:
        raise InputError(f'{where}: {error}') from error

    heads = tuple(f'{name}.' for name in classifiers(model))
    unused = []
    if getattr(model, 'num_classes', None) == 0:
        modules = tuple(f'{head.split(".")[0]}.' for head in heads)
        unused = [k for k in state if k not in expected and k.startswith(modules)]
        state = {k: v for k, v in state.items() if k not in unused}
    if unused:
        report(f'{where}: the model has no classes; the head of the weights is left out')
    new = _check_fit(model, state, heads, adapt, where)
    unused += [k for k in new if k in state]
    schedule = checkpoint.get('schedule')
    if isinstance(schedule, dict) and 'keep_ratio' in schedule:
        _load_schedule(model, schedule, adapt, where, report)
    model.load_state_dict(state | {k: expected[k] for k in new})
    return Loaded(
        missing=sorted(new),
        dropped=beside + dropped + [k for k in unused if k not in filled],
        filled=[k for k in filled if k not in (*new, *unused)],
        pooling=_report_new_pooling(model, pooling, where, report),
    )


def _check_fit(
    model: nn.Module, state: dict[str, Tensor], heads: tuple[str, ...], adapt: bool, where: str
) -> list[str]:
    """InputError where weights and model differ, but with `adapt` for the heads, whose names begin with one of `heads`.

    Returns the names of the model's tensors that stay as they are: of heads that differ.
    """
    expected = model.state_dict()
    missing = [k for k in expected if k not in state]
    differ = [k for k in state if k in expected and state[k].shape != expected[k].shape]
    other_head = [k for k in differ if k.startswith(heads) and state[k].ndim and len(state[k]) != len(expected[k])]
    if other_head and other_head == differ and not adapt:
        found, classes = len(state[other_head[0]]), len(expected[other_head[0]])
        raise InputError(f'{where} has {found} classes, the model {classes}')
    new = other_head + [k for k in missing if adapt and k.startswith(heads)]
    problems = {
        'missing': [k for k in missing if k not in new],
        'not expected': [k for k in state if k not in expected],
        'of another shape': [f'{k} {(*state[k].shape,)}, not {(*expected[k].shape,)}' for k in differ if k not in new],
    }
    lines = [
        f'  {len(names)} {problem}: {", ".join(names[:4])}{", ..." if len(names) > 4 else ""}'
        for problem, names in problems.items()
        if names
    ]
    if lines:
        lines.insert(0, f'{where} does not fit {type(model).__name__} ({len(state)} tensors for {len(expected)}):')
        raise InputError('\n'.join([*lines, 'It may be of another model or image size.']))
    return new


def _load_schedule(model: nn.Module, saved: dict, adapt: bool, where: str, report: Report):
    """Give a model the schedule that weights were trained with, or with `adapt` leave it its own; say what differs."""
    method = saved.get('method', 'evolve')
    if not hasattr(model, 'load_schedule') and method != 'evolve':
        report(f"{where} was trained with {method}, which models.apply(model, '{method}', ...) gives this dense model")
        return
    if not hasattr(model, 'load_schedule'):
        names = 'keep_ratio', 'stages', 'representative', 'stage_wise'
        arguments = ', '.join(f'{name}={saved.get(name)!r}' for name in names)
        report(
            f'{where} was trained with tokens that evolve, and this {type(model).__name__} does not evolve; '
            f'models.evolve(model, {arguments}) gives it the schedule of then'
        )
        return
    if method != model.method:
        report(f'{where}: the weights were trained with {method}, and this model has {model.method}, which it keeps')
        return
    before = model.schedule()
    differ = [f'{name} {saved[name]} instead of {value}' for name, value in before.items() if saved[name] != value]
    if differ and adapt:
        report(f'{where}: the model keeps its own schedule; the weights were trained with {", ".join(differ)}')
    elif differ:
        try:
            model.load_schedule(saved)
        except ValueError as error:
            raise InputError(f'{where}: its schedule does not fit this model: {error}') from error
        report(f'{where}: the model now evolves as the weights were trained, with {", ".join(differ)}')


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's heads, as timm's configuration has them."""
    names = (getattr(model, 'default_cfg', None) or {}).get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _report_new_pooling(model: nn.Module, before: str, where: str, report: Report) -> str:
    """Say, and return, the pooling that came with the weights, where it is not the one from before, else ''."""
    pooling = getattr(model, 'global_pool', '')
    if pooling == before:
        return ''
    read = {'token': 'its class token', 'avg': 'the mean of its patches'}.get(pooling, 'its patches')
    report(
        f'{where}: {type(model).__name__} now predicts from {read}, which the head of these weights was trained for '
        f"(global_pool '{pooling}', it was '{before}')"
    )
    return pooling


def resize_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with positions and the like resized by timm's function for the model's family, if it has one."""
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]  # of an evolved model too
    adapted = next((module.checkpoint_filter_fn for module in modules if hasattr(module, 'checkpoint_filter_fn')), None)
    if adapted is None:
        return state
    try:
        return adapted(dict(state), model)
    except Exception as error:  # timm's functions meet any file, and fail in many ways
        raise ValueError(f'cannot be adapted to {type(model).__name__}: {error}') from error

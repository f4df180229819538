"""Read checkpoints safely and load weights strictly.

Reading never runs code from a file, and reads the whole file or nothing. Every tensor is used, reported or an error.
`load_weights` takes five steps: `read_checkpoint` returns a dict, `find_weights` the state dict in it, the model's
`convert_state` gives it the model's names and shapes, `_check_fit` compares, and `load_state_dict` loads.
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

# Prints a message for the user, in a distributed run on the first process only.
Report = Callable[[str], None]


class InputError(ValueError):
    """The user's input is wrong. Scripts print the message without a traceback and exit with code 2."""


def is_url(source: str | Path) -> bool:
    """Whether `source` is an http(s) URL."""
    return urlparse(str(source)).scheme in ('http', 'https')


# What a file that is not a checkpoint looks like, by its first bytes.
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
    """Read a checkpoint from a path or a URL, completely or not at all, without running code from it.

    Reads files of torch.save, and safetensors, which hold only weights and have no checksum. A URL may contain the hash
    to check, in its file name (`name-<sha256 prefix>.pth`, as torch.hub has it) or as `#sha256=<hex>`. InputError, with
    what the source looks like, if it is not a checkpoint.
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
        except Exception as error:  # a damaged header, a short file, or another file with this ending
            what = f'is damaged, or not a safetensors file: {describe_file(path)} ({error})'
            raise InputError(f'{source} {what}') from error
    # Checkpoints of the original contain their flags, a Namespace that may hold paths: plain data, safe to load.
    harmless = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
    try:
        with torch.serialization.safe_globals(harmless):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        what = f'is not a readable checkpoint: {describe_file(path)}'
        if refused := re.search(r'GLOBAL ([\w.]+)', str(error)):
            what = f'holds Python objects ({refused[1]}), not only weights; it was not loaded, as that could run code'
        raise InputError(f'{source} {what}') from error
    if not isinstance(checkpoint, dict):
        raise InputError(f'{source} holds a {type(checkpoint).__name__}; expected a dict of weights')
    return checkpoint


def _check_zip(path: Path):
    """InputError for a zip file that is damaged or not of torch.save; torch.load does not verify checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except Exception as error:  # zipfile raises many kinds of errors for a wrong byte
        raise InputError(f'{path} is damaged ({error})') from error
    if damaged:
        raise InputError(f'{path} is damaged: the checksum of {damaged} is wrong')
    if not any(name.endswith('/data.pkl') for name in names):
        raise InputError(f'{path} is a zip file ({", ".join(names[:3])}, ...), not a PyTorch checkpoint')
    if any(name.endswith('constants.pkl') for name in names):
        raise InputError(f'{path} is a TorchScript program, not a checkpoint of weights')


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: with the size of a JSON header, then the header."""
    with open(path, 'rb') as file:
        head = file.read(9)
    return head[8:] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size


def describe_file(path: Path) -> str:
    """Say what a file that is not a checkpoint looks like."""
    with open(path, 'rb') as file:
        head = file.read(1024)
    kind = next((kind for pattern, kind in KINDS.items() if re.match(pattern, head, re.DOTALL)), 'of unknown kind')
    return f'{kind}; {path.stat().st_size:,} bytes'


def _download(address: str, report: Report) -> dict:
    """Read a checkpoint from a URL through torch.hub's cache; the hash is checked on every use."""
    url, fragment = urldefrag(address)
    name = Path(urlparse(url).path).name or 'checkpoint'
    in_name = re.search(r'-([a-f0-9]{8,64})\.', name)
    expected = fragment.removeprefix('sha256=') if fragment.startswith('sha256=') else in_name[1] if in_name else ''
    # A file without a hash is not cached: it could not be checked when it is used again.
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
            report(f'{url} has no hash to check; add #sha256={digest} to accept only this file')
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
    """What `load_weights` did not load one to one, as names of tensors.

    missing: in the model but not in the file; unchanged.
    dropped: in the file but not used; `text_model.*` stands for all names with this prefix.
    filled: in the model but not in the file; copied from others, such as `head_cls` from `head`.
    pooling: the model's new `global_pool` if the weights changed it, else ''.
    """

    missing: list[str]
    dropped: list[str]
    filled: list[str]
    pooling: str


# The keys of weights and averaged weights in checkpoints, ours and the original's first, then timm's.
WEIGHTS, AVERAGED = ('model', 'state_dict'), ('model_ema', 'state_dict_ema')
# Names of tensors whose shape depends on the image size.
POSITIONS = re.compile('pos_embed|relative_position|rel_pos')


def find_weights(checkpoint: dict, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint of this project, the original or timm, or a bare one.

    Names of Hugging Face's transformers become timm's. InputError if there are no weights.
    """
    return huggingface.to_timm(_find_state(checkpoint, use_ema))[0]


def _find_state(checkpoint: dict, use_ema: bool) -> dict[str, Tensor]:
    keys = AVERAGED if use_ema else (*WEIGHTS, *AVERAGED)  # some files have only averaged weights
    state = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), None)
    if state is None and use_ema:
        raise InputError(
            f'the checkpoint has no averaged weights (model_ema); it has {", ".join(map(str, checkpoint))}'
        )
    state = checkpoint if state is None else state
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        raise InputError(f'expected weights, tensors by name; found {", ".join(map(str, wrong[:5])) or "nothing"}')
    # DistributedDataParallel and torch.compile leave prefixes.
    return {re.sub(r'^(module\.|_orig_mod\.)+', '', key): value for key, value in state.items()}


def load_weights(
    model: nn.Module,
    source: str | Path | dict,
    use_ema: bool = False,
    adapt: bool = False,
    report: Report = print,
    resize: bool = True,
    name: str = 'the checkpoint',
) -> Loaded:
    """Load weights into a model, strictly: every tensor is used, listed in the result, or an error.

    Args:
        source: path, URL, or a checkpoint in memory, in the layout of this project, the original, timm, or Hugging
            Face's transformers (see huggingface.py).
        use_ema: load the averaged weights.
        adapt: for fine-tuning: resize positions to the model's image size, skip heads for other classes, and accept
            files without a head. The model keeps its pooling and its schedule, as training adapts the weights to them.
        report: called with messages for the user.
        resize: resize positions to the model's image size as timm does, and report it.
        name: the name of a checkpoint in memory, for messages.

    A schedule (stages, keep_ratio, ...) that was saved with the weights replaces the model's, which is reported; set
    your own afterwards. Weights of a plain DeiT or ViT make an Evo-DeiT predict from the class token, as their head was
    trained on it, which is reported too.

    Returns what was not loaded one to one: nothing, except with `adapt`, for a model without classes, or for a plain
    DeiT or ViT in an Evo-DeiT. InputError with counts and the first few names if the weights are of another model.
    """
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source, report)
    where = name if isinstance(source, dict) else str(source)
    expected, pooling = model.state_dict(), getattr(model, 'global_pool', '')
    heads = tuple(f'{name}.' for name in classifiers(model))
    try:
        found, beside, note = huggingface.to_timm(_find_state(checkpoint, use_ema), model)
        if note:
            report(f'{where}: {note}')
        state, filled, dropped = _convert(model, found, adapt, resize=adapt)
        # If nothing differs but the shapes of positions, the weights are of another image size.
        before = {k: v for k, v in _other_shapes(state, expected).items() if not k.startswith(heads)}
        positions = all(POSITIONS.search(key) and len(shape) == expected[key].ndim for key, shape in before.items())
        complete = all(key in state or key.startswith(heads) for key in expected)
        if resize and not adapt and before and positions and complete:
            state, filled, dropped = _convert(model, found, adapt, resize=True)
            sizes = [f'{key} {shape} to {(*state[key].shape,)}' for key, shape in before.items() if key in state]
            report(f"{where}: positions resized to the model's image size: {', '.join(sizes)}")
    except ValueError as error:
        raise InputError(f'{where}: {error}') from error
    if not use_ema and not _has(checkpoint, WEIGHTS) and _has(checkpoint, AVERAGED):
        report(f'{where} has only averaged weights; these are loaded')

    # A model without classes has no use for the head of the weights.
    unused = []
    if getattr(model, 'num_classes', None) == 0:
        modules = tuple(f'{head.split(".")[0]}.' for head in heads)
        unused = [k for k in state if k not in expected and k.startswith(modules)]
        state = {k: v for k, v in state.items() if k not in unused}
    if unused:
        report(f'{where}: the model has no classes; the head of the weights is not loaded')
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


def _has(checkpoint: dict, keys: tuple[str, ...]) -> bool:
    return any(isinstance(checkpoint.get(key), dict) for key in keys)


def _convert(model: nn.Module, state: dict[str, Tensor], adapt: bool, resize: bool):
    """Return a state dict with the model's names, the names filled with copies, and the names dropped."""
    if hasattr(model, 'convert_state'):
        return model.convert_state(state, resize=resize, finetune=adapt)
    return resize_weights(model, state) if resize else state, [], []


def _other_shapes(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors that have another shape in the model, by name."""
    return {k: (*v.shape,) for k, v in state.items() if k in expected and v.shape != expected[k].shape}


def _check_fit(
    model: nn.Module, state: dict[str, Tensor], heads: tuple[str, ...], adapt: bool, where: str
) -> list[str]:
    """InputError if weights and model differ; with `adapt`, names that begin with one of `heads` may.

    Returns the names of the model's tensors that keep their values: those of heads that differ.
    """
    expected = model.state_dict()
    missing = [k for k in expected if k not in state]
    differ = _other_shapes(state, expected)
    other_head = [k for k in differ if k.startswith(heads) and state[k].ndim and len(state[k]) != len(expected[k])]
    if other_head and other_head == [*differ] and not adapt:
        found, classes = len(state[other_head[0]]), len(expected[other_head[0]])
        raise InputError(f'{where} has {found} classes, the model {classes}')
    new = other_head + [k for k in missing if adapt and k.startswith(heads)]
    problems = {
        'missing': [k for k in missing if k not in new],
        'not expected': [k for k in state if k not in expected],
        'of another shape': [f'{k} {v}, not {(*expected[k].shape,)}' for k, v in differ.items() if k not in new],
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
    """Set the schedule that weights were trained with, or with `adapt` keep the model's; report what differs."""
    method = saved.get('method', 'evolve')
    if not hasattr(model, 'load_schedule'):
        names = 'keep_ratio', 'stages', 'representative', 'stage_wise'
        arguments = ', '.join(f'{name}={saved.get(name)!r}' for name in names)
        call = f'models.evolve(model, {arguments})' if method == 'evolve' else f"models.apply(model, '{method}', ...)"
        report(f'{where} was trained with {method}, and this {type(model).__name__} does not evolve; see {call}')
        return
    if method != model.method:
        report(f'{where}: the weights were trained with {method}; this model keeps {model.method}')
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
        report(f'{where}: the model now evolves as in training, with {", ".join(differ)}')


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's heads, from its timm configuration."""
    names = (getattr(model, 'default_cfg', None) or {}).get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _report_new_pooling(model: nn.Module, before: str, where: str, report: Report) -> str:
    """Report and return the pooling that came with the weights if it is a new one, else ''."""
    pooling = getattr(model, 'global_pool', '')
    if pooling == before:
        return ''
    read = {'token': 'its class token', 'avg': 'the mean of its patches'}.get(pooling, 'its patches')
    report(
        f'{where}: {type(model).__name__} now predicts from {read}, on which the head of these weights was trained '
        f"(global_pool '{pooling}', it was '{before}')"
    )
    return pooling


def resize_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resize positions, and what else depends on the image size, with timm's function for the model's family."""
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]  # an evolved model is a subclass of timm's
    adapted = next((module.checkpoint_filter_fn for module in modules if hasattr(module, 'checkpoint_filter_fn')), None)
    if adapted is None:
        return state
    try:
        return adapted(dict(state), model)
    except Exception as error:  # timm's functions raise anything for files of other models
        raise ValueError(f'cannot be adapted to {type(model).__name__}: {error}') from error

"""The networks. Importing this package registers them with timm: `import models; timm.create_model('EvoLeViT_128')`."""

import argparse
import difflib
import math
from contextlib import suppress

import timm
from timm.models import PretrainedCfg
from torch import nn

from . import evo_deit, evo_levit, vit  # noqa: F401
from .vit import evolve
from .weights import InputError, load_weights

__all__ = ['InputError', 'add_arguments', 'create', 'evolve', 'load_weights']


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the network."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', metavar='NAME', help='any Evo-ViT or timm model')
    group.add_argument('--drop', type=float, default=0.0, metavar='RATE', help='dropout before the head')
    group.add_argument('--drop-path', type=float, metavar='RATE', help="stochastic depth; without, the model's own")
    group.add_argument(
        '--keep-ratio', type=float, nargs='+', metavar='R', help='share of informative patches, one or one a stage'
    )
    group.add_argument(
        '--representative',
        action=argparse.BooleanOptionalAction,
        help='representative token and fast update of placeholders (default: as published for the family)',
    )


def build(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model that the flags ask for, with random weights; InputError with the nearest names where there is none."""
    own = {'keep_ratio': args.keep_ratio, 'representative': args.representative, 'drop_path_rate': args.drop_path}
    own = {name: value for name, value in own.items() if value is not None}
    return create(args.model, num_classes, args.input_size, drop_rate=args.drop, **own)


def create(name: str, num_classes: int, input_size: int | None = None, **own) -> nn.Module:
    """Any registered model for images of `input_size` px (None: its own); InputError if there is none, or none with
    these arguments.
    """
    if published_cfg(name).fixed_input_size and input_size is not None:
        own['img_size'] = input_size
    try:
        model = timm.create_model(name, num_classes=num_classes, **own)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f'{name} cannot be built with {own}: {error}') from error
    check_input_size(model, name, input_size)
    return model


def check_input_size(model: nn.Module, name: str, input_size: int):
    """InputError if the model would cut off the edges of such images without a word.

    Convolutions whose windows neither overlap nor are padded do that: patches, and the stem of ConvNeXt.
    """
    if getattr(getattr(model, 'patch_embed', None), 'dynamic_img_pad', False):
        return
    first = published_cfg(name).first_conv
    conv = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride or conv.padding != (0, 0):
        return
    patch = math.lcm(*conv.stride)
    if cut := input_size % patch:
        sizes = [size for size in (input_size - cut, input_size - cut + patch) if size]
        raise InputError(
            f'input size: expected a multiple of {patch}, the patch of {name}, found {input_size}: {cut} pixels of '
            f'each row and column would be cut off. Nearest: {" and ".join(map(str, sizes))}'
        )


def published_cfg(name: str) -> PretrainedCfg:
    """What a registered model was published with; InputError with the nearest names where there is none."""
    with suppress(RuntimeError):  # of a model that exists, with a tag that does not
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if cfg is not None:
            return cfg
    raise InputError(f'there is no model {name}. {nearest_names(name)}')


def nearest_names(name: str) -> str:
    """A sentence with the registered names nearest to `name`, with tags if it has one.

    Those that begin with it come first, then the most similar; ours before timm's if it begins as ours do.
    """
    tagged = timm.list_models(pretrained=True) if '.' in name else []
    names = {known.lower(): known for known in timm.list_models() + tagged}
    wrong = name.lower()
    ours = {known for known in names if known.startswith('evo') and wrong.startswith('evo')}
    near = [known for known in names if known.startswith(wrong)]
    near += difflib.get_close_matches(wrong, names, n=len(names), cutoff=0.5)
    near = sorted(dict.fromkeys(near), key=lambda known: (not known.startswith(wrong), known not in ours))
    near = [names[known] for known in near[:5]]
    return f'Nearest: {", ".join(near)}' if near else 'timm.list_models() has them all'

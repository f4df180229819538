"""The networks. Importing this package registers them with timm: `import models; timm.create_model('EvoLeViT_128')`."""

import argparse
import difflib
from contextlib import suppress

import timm
from timm.models import PretrainedCfg
from torch import nn

from utils import InputError

from . import evo_deit, evo_levit  # noqa: F401


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
        return timm.create_model(name, num_classes=num_classes, **own)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f'{name} cannot be built with {own}: {error}') from error


def published_cfg(name: str) -> PretrainedCfg:
    """What a registered model was published with; InputError with the nearest names where there is none."""
    with suppress(RuntimeError):  # of a model that exists, with a tag that does not
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if cfg is not None:
            return cfg
    raise InputError(f'there is no model {name}. {nearest_names(name)}')


def nearest_names(name: str) -> str:
    """A sentence with the registered names nearest to `name`, with tags if it has one."""
    tagged = timm.list_models(pretrained=True) if '.' in name else []
    names = {known.lower(): known for known in timm.list_models() + tagged}
    near = [names[n] for n in difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.5)]
    return f'Nearest: {", ".join(near)}' if near else 'timm.list_models() has them all'

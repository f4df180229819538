"""Networks by name: the flags that choose one, and what they build."""

import argparse
import difflib
import math
from contextlib import suppress

import timm
import torch
from timm.layers import to_2tuple
from timm.models import PretrainedCfg
from timm.utils import ParseKwargs
from torch import nn

from models import apply, evo_deit, evo_levit, evolution, rivals
from models.weights import InputError


class Pairs(ParseKwargs):
    """timm's argparse action for KEY=VALUE, with an error that names what is not a pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        if wrong := [value for value in values if '=' not in value]:
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, found {wrong[0]}')
        super().__call__(parser, namespace, values, option_string)


# Model arguments that flags or data determine. Passing them here would fail, or silently override the flag.
HAVE_FLAGS = {
    'in_chans': 'images are read in RGB, with 3 channels',
    'img_size': 'use --input-size',
    'num_classes': 'it is that of the data',
    'drop_rate': 'use --drop',
    'drop_path_rate': 'use --drop-path',
}


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the network."""
    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', metavar='NAME', help='any Evo-ViT or timm model')
    add('--drop', type=float, default=0.0, metavar='RATE', help='dropout before the head')
    add('--drop-path', type=float, metavar='RATE', help="stochastic depth (default: the model's own)")
    add('--pretrained', action='store_true', help="start from timm's weights, downloaded once")
    add('--model-kwargs', nargs='*', action=Pairs, metavar='KEY=VALUE', help='more arguments of the model')
    add(
        '--method', choices=['evolve', *rivals.METHODS],
        help='evolve a ViT of timm (models.evolve), or for comparison apply a rival (models.rivals)',
    )  # fmt: skip
    add('--evolve', dest='method', action='store_const', const='evolve', help='same as --method evolve')
    add(
        '--fit-schedule', default='', metavar='FOLDER',
        help='choose the stages and keep ratios of --evolve on up to 64 images of this folder',
    )  # fmt: skip
    add('--merge-r', type=int, metavar='R', help='merge, merge_norm: patches merged per block (default: 8)')
    add(
        '--keep-ratio', type=float, nargs='+', metavar='R',
        help='fraction of informative patches (drop, fuse: of those left), one value or one per stage (default: 0.5; '
        '--evolve: 0.7 0.3; its rivals: 0.7)',
    )  # fmt: skip
    add(
        '--stages', type=int, nargs='+', metavar='BLOCK',
        help='first block of each stage that evolves (default: as the original; --evolve: 1/3 and 2/3 of the depth)',
    )  # fmt: skip
    add(
        '--representative', nargs='?', const='one', choices=evolution.REPRESENTATIVES,
        help='what placeholders follow (default: as the original; nearest with --evolve)',
    )  # fmt: skip
    add('--no-representative', dest='representative', action='store_const', const='none', help='same as none')


def build(args: argparse.Namespace, num_classes: int, input_size: int | None = None) -> nn.Module:
    """Build the model that the flags describe; InputError for flags that do not fit it, or an unknown name."""
    if args.merge_r is not None and 'merge_r' not in rivals.ARGUMENTS.get(args.method, ()):
        raise InputError('--merge-r needs --method merge')
    flags = {'keep_ratio': args.keep_ratio, 'stages': args.stages, 'representative': args.representative}
    flags = {name: value for name, value in (flags | {'merge_r': args.merge_r}).items() if value is not None}
    if args.fit_schedule and (args.method != 'evolve' or flags):
        raise InputError('--fit-schedule needs --evolve, and no --keep-ratio, --stages or --representative')
    options = {} if args.drop_path is None else {'drop_path_rate': args.drop_path}
    options |= {'pretrained': True} if args.pretrained else {}
    if not args.method:
        if flags and not args.model.startswith(('evo_deit_', 'EvoLeViT_')) and timm.is_model(args.model):
            names = ', '.join(f'--{name.replace("_", "-")}' for name in flags)
            raise InputError(
                f'{names}: expected a model that evolves, found {args.model}; add --evolve for a ViT of timm'
            )
        options |= flags
    given = args.model_kwargs or {}
    if other := [name for name in given if name in HAVE_FLAGS and (name, given[name]) != ('in_chans', 3)]:
        raise InputError(f'--model-kwargs {other[0]}: {HAVE_FLAGS[other[0]]}')
    options |= given
    model = create(args.model, num_classes, input_size or args.input_size, drop_rate=args.drop, **options)
    try:
        return apply(model, args.method, **flags) if args.method else model
    except ValueError as error:
        raise InputError(f'--method {args.method}: {error}') from error


def create(name: str, num_classes: int, input_size: int | None = None, **options) -> nn.Module:
    """Create a registered model for images of `input_size` px (None: its own). InputError for wrong arguments."""
    cfg = published_cfg(name)
    if options.get('pretrained') and not cfg.has_weights:
        raise InputError(f'--pretrained: timm has no weights of {name}; load a file with --finetune')
    if cfg.fixed_input_size and input_size is not None:
        options['img_size'] = input_size
    try:
        model = timm.create_model(name, num_classes=num_classes, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # timm's constructors raise anything for a wrong argument
        if options.get('pretrained') and isinstance(error, OSError):
            raise InputError(f'--pretrained: the weights of {name} could not be downloaded: {error}') from error
        raise InputError(f'{name} cannot be built with {options}: {error}') from error
    if input_size is not None:
        check_input_size(model, name, input_size)
    return model


def dense_baseline(name: str) -> tuple[str, dict] | None:
    """timm's dense model of the same size as one of ours, and the options to create it; None for any other model."""
    size = name.removeprefix('evo_deit_').removeprefix('EvoLeViT_').split('_')[0]
    if name.startswith('evo_deit_nano'):
        embed_dim, num_heads = evo_deit.SIZES[size]
        return 'vit_tiny_patch16_224', dict(patch_size=4, embed_dim=embed_dim, num_heads=num_heads)
    if name.startswith('evo_deit_'):
        return f'deit_{size}_patch16_224', {}
    if name.startswith('EvoLeViT_') and size in evo_levit.SIZES:
        return f'levit_{size.lower()}', {}
    return None


def check_input_size(model: nn.Module, name: str, input_size: int | tuple[int, int]):
    """InputError if the model would silently crop images of this size.

    Convolutions do that if their windows neither overlap nor are padded: patch embeddings, and ConvNeXt's stem.
    """
    if getattr(getattr(model, 'patch_embed', None), 'dynamic_img_pad', False):
        return
    first = published_cfg(name).first_conv
    conv = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride or conv.padding != (0, 0):
        return
    patch = math.lcm(*conv.stride)
    for pixels in to_2tuple(input_size):
        if cut := pixels % patch:
            sizes = [size for size in (pixels - cut, pixels - cut + patch) if size]
            raise InputError(
                f'input size: expected a multiple of {patch}, the patch of {name}, found {pixels}: {cut} pixels of '
                f'each row and column would be cut off. Nearest: {" and ".join(map(str, sizes))}'
            )


def published_cfg(name: str) -> PretrainedCfg:
    """The pretrained configuration of a registered model; InputError with the nearest names if there is none."""
    with suppress(RuntimeError):  # the model exists, its tag does not
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if cfg is not None:
            return cfg
    raise InputError(f'there is no model {name}. {nearest_names(name)}')


def nearest_names(name: str) -> str:
    """A sentence with the registered names nearest to `name`, with tags if it has one.

    Names that begin with it come first, then the most similar; ours before timm's if it begins like ours.
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

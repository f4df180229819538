"""The networks. Importing this package registers them with timm, for `timm.create_model('EvoLeViT_128')`."""

from torch import nn

from . import evo_deit, evo_levit, evolution, rivals  # noqa: F401, registers the networks with timm
from .fit import fit_schedule
from .vit import evolve
from .weights import InputError, load_weights

__version__ = '0.3.0'
__all__ = [
    'InputError',
    'apply',
    'evolve',
    'fit_schedule',
    'load_weights',
]


def apply(model: nn.Module, method: str, **flags) -> nn.Module:
    """Apply `evolve` or a rival to a ViT of timm, in place; ValueError for another method, or flags without effect."""
    if method not in (known := ('evolve', *rivals.METHODS)):
        raise ValueError(f'method: expected one of {", ".join(known)}, found {method!r}')
    known = ('keep_ratio', 'stages', 'representative') if method == 'evolve' else rivals.ARGUMENTS[method]
    if unknown := [f'--{name.replace("_", "-")}' for name in flags if name not in known]:
        raise ValueError(f'{", ".join(unknown)} has no effect with --method {method}')
    return evolve(model, **flags) if method == 'evolve' else rivals.apply(model, method, **flags)

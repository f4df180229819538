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


def apply(model: nn.Module, method: str, **arguments) -> nn.Module:
    """Apply `evolve` or a rival to a ViT of timm, in place; ValueError for another method, or wrong arguments."""
    if method not in (known := ('evolve', *rivals.METHODS)):
        raise ValueError(f'method: expected one of {", ".join(known)}, found {method!r}')
    known = ('keep_ratio', 'stages', 'representative') if method == 'evolve' else rivals.ARGUMENTS[method]
    if unknown := [name for name in arguments if name not in known]:
        raise ValueError(f'{", ".join(unknown)} has no effect on {method}, which takes {", ".join(known)}')
    return evolve(model, **arguments) if method == 'evolve' else rivals.apply(model, method, **arguments)

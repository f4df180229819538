"""Weights and images as functions of a name, the golden numbers beside this file were computed with them."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
STANDARD_LEAVES = {
    'running_mean': 0.1,
    'learn_tradeoff': 0.5,
    'cls_token': 0.5,
    'pos_embed': 0.5,
    'poss': 0.5,
    'bias': 0.1,
}


def rng(name: str) -> np.random.Generator:
    """Generator of one array."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def weight(tag: str, key: str, shape: list[int]) -> torch.Tensor:
    """One tensor of a state dict, from its published key."""
    normal = rng(f'{tag}/{key}').standard_normal(shape).astype(np.float32)
    leaf = key.split('.')[-1]
    if leaf == 'num_batches_tracked':
        values = np.zeros(shape, np.int64)
    elif leaf == 'running_var':
        values = 0.5 + np.abs(normal)
    elif leaf in STANDARD_LEAVES:
        values = np.float32(STANDARD_LEAVES[leaf]) * normal
    elif len(shape) == 1:  # scale of a normalisation
        values = 1 + np.float32(0.1) * normal
    else:
        values = normal / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    return torch.from_numpy(np.asarray(values))


def images(tag: str, batch: int, size: int) -> torch.Tensor:
    """Images (batch, 3, size, size), as normalised ones are."""
    return torch.from_numpy(rng(f'{tag}/images').standard_normal((batch, 3, size, size)).astype(np.float32))


def labels(tag: str, batch: int, classes: int = 1000) -> torch.Tensor:
    """Labels (batch,)."""
    return torch.from_numpy(rng(f'{tag}/labels').integers(0, classes, batch))


def load(name: str) -> tuple[dict, dict]:
    """Description and arrays of one golden file."""
    with np.load(HERE / f'{name}.npz') as arrays:
        return json.loads((HERE / f'{name}.json').read_text()), dict(arrays)


def published_state(description: dict) -> dict[str, torch.Tensor]:
    """The state dict that a description lists, in the published layout; aliases share their target's tensor."""
    aliases = description.get('aliases', {})
    tag, shapes = description['tag'], description['state_dict']
    return {key: weight(tag, aliases.get(key, key), shape) for key, shape in shapes.items()}

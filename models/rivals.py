"""Baselines: dropping, fusing and merging tokens, in any ViT of timm that `models.evolve` takes.

Each method has the signature of evolution.update_group and updates one group of blocks; `apply` sets it for a model. As
with evolution, the grid is whole between groups: a patch that was dropped keeps its last values, and one that was
merged has those of its cluster.

Written from the papers' formulas. Shapes as in evolution.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import evolution
from .evolution import Block, Tradeoff
from .evolving import to_floats
from .vit import evolve, is_from_transformers


class Reduced(NamedTuple):
    """A selection; `fused` is the token (B, 1, C) of all patches that left, None if these are dropped."""

    kept: Tensor
    score: Tensor
    cluster: None = None
    fused: Tensor | None = None


def drop(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    keep_ratio: float,
    representative: str,
    selection: Reduced | None = None,
    select_anew: bool = True,
    prefix: int = 1,
    fusing: bool = False,
):
    """Top-k: the patches with the least class attention leave in the group's first block, between attention and MLP.

    They do not come back. Only that block's attention decides. Source: EViT (https://arxiv.org/abs/2202.07800) without
    its fused token. EViT rounds the number of kept patches up; here it is rounded down.
    """
    x, kept, n = tokens, None, tokens.shape[1] - prefix
    k = evolution.num_informative(n, keep_ratio)
    if selection is not None:  # patches left in an earlier group: go on with the others
        kept, n = selection.kept, selection.kept.shape[1]
        x = evolution.gather_tokens(tokens, evolution.with_prefix(kept, prefix))
        if selection.fused is not None:
            x = torch.cat([x, selection.fused], 1)

    if select_anew and k < n:
        # The closure returns tokens to the block; the rest is returned through this list, which is filled again if
        # gradient checkpointing runs the closure again.
        found = []

        def leave(x: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
            """Reduce the tokens between attention and MLP to the prefix, k patches, and with `fusing` a fused token."""
            best = evolution.select(attention[:, :n], k)
            found[:] = x, attention, best
            remaining = evolution.gather_tokens(x, evolution.with_prefix(best, prefix))
            if not fusing:
                return remaining
            # All that leaves, weighted by its mean attention over heads; the previous fused token is part of it.
            weight = (attention / keys.shape[1]).scatter(1, best, 0.0)
            return torch.cat([remaining, weight.unsqueeze(1).to(x.dtype) @ x[:, prefix:]], 1)

        x, _ = blocks[0](x, places=kept, need_attention=True, reduce=leave)
        last_seen, attention, best = found
        tokens = _put_back(last_seen, tokens, kept, prefix)  # patches that leave keep these values
        if kept is None:
            kept, score = best, attention
        else:
            zeros = attention.new_zeros(tokens.shape[0], tokens.shape[1] - prefix)
            kept, score = kept.gather(1, best), zeros.scatter(1, kept, attention[:, :n])
        selection, blocks = Reduced(kept, score), blocks[1:]
    for block in blocks:
        x = block(x, places=kept)
    if fusing and selection is not None:
        selection = selection._replace(fused=x[:, -1:])
    return _put_back(x, tokens, kept, prefix), score, selection


def _put_back(x: Tensor, tokens: Tensor, kept: Tensor | None, prefix: int) -> Tensor:
    """Write x (B, P + n, C), the prefix and the patches `kept` (B, K), into tokens (B, P + N, C); None keeps all."""
    if kept is None:
        return x
    index = evolution.with_prefix(kept, prefix).unsqueeze(-1).expand(-1, -1, x.shape[2])
    return tokens.scatter(1, index, x[:, : index.shape[1]].to(tokens.dtype))


def fuse(*args, **kwargs):
    """EViT: like `drop`, but the patches that leave are fused into one token, their sum weighted by attention.

    Patches that leave later are fused with the previous fused token. Source: https://arxiv.org/abs/2202.07800, where
    the fused token may also be selected like a patch.
    """
    return drop(*args, **kwargs, fusing=True)


class Merged(NamedTuple):
    """The n tokens that remain after merging."""

    kept: Tensor | None  # (B, n), their raster indices, None before anything was merged
    score: Tensor | None  # (B, N), unchanged
    cluster: Tensor  # (B, N), for each patch, the token that it was merged into
    size: Tensor  # (B, n), how many patches each token represents
    tokens: Tensor  # (B, n, C)
    blocks: int  # how many blocks they went through


def merge(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    keep_ratio: float,
    representative: str,
    selection: Merged | None = None,
    select_anew: bool = True,
    prefix: int = 1,
    r: int | Sequence[int] = 8,
    keep_norm: bool = False,
):
    """ToMe: each block merges the r most similar pairs of patches, between attention and MLP; unmerged after the group.

    Similarity is that of keys, averaged over heads; attention counts a token of s patches s times.
    r: one number, or one per block of the network. keep_norm: rescale a merged token to the mean length of its members.
    Source: https://arxiv.org/abs/2210.09461.
    """
    if selection is None:
        cluster = places_of(tokens[:, prefix:, 0])
        selection = Merged(None, score, cluster, torch.ones_like(cluster, dtype=torch.float32), tokens[:, prefix:], 0)
    places, _, cluster, size, patches, done = selection
    x = torch.cat([tokens[:, :prefix], patches], 1)
    rates = (r,) * (done + len(blocks)) if isinstance(r, int) else r

    for block, rate in zip(blocks, rates[done:], strict=False):
        found = []  # results of `merge_pairs` besides tokens, filled again if gradient checkpointing runs it again

        def merge_pairs(
            x: Tensor, attention: None, keys: Tensor, size: Tensor = size, rate: int = rate, found: list = found
        ) -> Tensor:
            """Reduce the tokens (B, P + n, C) between attention and MLP to P + n - rate."""
            target = match(keys[:, :, prefix:].mean(1), rate)
            merged = size.new_zeros(size.shape[0], size.shape[1] - min(rate, size.shape[1] // 2))
            merged = merged.scatter_add(1, target, size)
            found[:] = target, merged
            return torch.cat([x[:, :prefix], _merged_means(x[:, prefix:], size, target, merged, keep_norm)], 1)

        mask = None if places is None else evolution.log_size_mask(size, x.dtype, prefix)
        x = block(x, places=places, attn_mask=mask, reduce=merge_pairs if rate else None)
        if not rate:
            continue
        target, size = found
        # A merged token has the place of the token that the others were merged into.
        old = places_of(target) if places is None else places
        places = torch.zeros_like(size, dtype=old.dtype).scatter(1, target[:, 1::2], old[:, 1::2])
        places = places.scatter(1, target[:, ::2], old[:, ::2])  # these stay, see `match`, so they are written last
        cluster = target.gather(1, cluster)
    patches = x[:, prefix:].gather(1, cluster.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    merged = Merged(places, score, cluster, size, x[:, prefix:], done + len(blocks))
    return torch.cat([x[:, :prefix], patches], 1), score, merged


def places_of(patches: Tensor) -> Tensor:
    """Raster indices (B, N) for patches (B, N)."""
    return torch.arange(patches.shape[1], device=patches.device).expand_as(patches)


def merge_norm(*args, **kwargs):
    """Like `merge`, but a merged token, whose mean is too short, is rescaled to the mean length of its members.

    Source: the idea of ToFu's MLERP (https://arxiv.org/abs/2312.01026).
    """
    return merge(*args, **kwargs, keep_norm=True)


def _merged_means(patches: Tensor, size: Tensor, target: Tensor, merged: Tensor, keep_norm: bool) -> Tensor:
    """Means (B, m, C) of the patches (B, n, C) merged into each target (B, n), weighted by size (B, n).

    merged (B, m): the sums of these sizes. keep_norm: rescale to the mean length of the members.
    """

    def mean(x: Tensor) -> Tensor:
        return x.new_zeros(*merged.shape, x.shape[2]).scatter_add(1, target.unsqueeze(-1).expand_as(x), x * weight)

    # Divide before summing: a sum could overflow in half precision.
    weight = (size / merged.gather(1, target)).unsqueeze(-1).to(patches.dtype)
    means = mean(patches)
    if not keep_norm:
        return means
    return F.normalize(means, dim=-1) * mean(patches.norm(dim=-1, keepdim=True))


def match(metric: Tensor, r: int) -> Tensor:
    """Bipartite soft matching of tokens with metric (B, n, D): the target (B, n) of each among the n - r that remain.

    Every second token is a source, paired with the most similar of the others; the r most similar pairs are merged. As
    in ToMe, where the class token is the first of all, the first patch stays. Sources that are not merged come first,
    in their order, on which the pairs of the next block depend.
    """
    n = metric.shape[1]
    r = min(r, n // 2)
    if r == 0:
        return torch.arange(n, device=metric.device).expand(metric.shape[0], -1)
    metric = F.normalize(metric, dim=-1)
    similarity, nearest = (metric[:, 1::2] @ metric[:, ::2].transpose(1, 2)).max(-1)
    merges = torch.zeros_like(nearest).scatter(1, similarity.topk(r).indices, 1)
    sources, others = n // 2, n - n // 2
    out = nearest.new_zeros(nearest.shape[0], n)
    out[:, 1::2] = torch.where(merges == 1, sources - r + nearest, (1 - merges).cumsum(1) - 1)
    out[:, ::2] = sources - r + torch.arange(others, device=metric.device)
    return out


def random(tokens: Tensor, score: Tensor | None, *args, **kwargs):
    """A control: evolve with random numbers as attention; with 'nearest' the novelty counts too."""
    return evolution.update_group(tokens, None if score is None else torch.rand_like(score), *args, **kwargs)


def apply(
    model: nn.Module,
    method: str,
    keep_ratio: float | Sequence[float] = 0.7,
    stages: Sequence[int] | None = None,
    merge_r: int | Sequence[int] = 8,
) -> nn.Module:
    """Apply a rival to a ViT of timm, in place, with the schedule of its paper; returns the model.

    Args:
        method: 'drop', 'fuse', 'merge', 'merge_norm' or 'random'.
        keep_ratio: drop, fuse: at each stage, the fraction of the remaining patches that stays (EViT: 0.7);
            `model.keep_ratio` then has the fractions of all patches. random: as in `models.evolve`.
        stages: drop, fuse: the blocks in which patches leave. Default: 3, 6 and 9 of 12, and in proportion.
        merge_r: merge, merge_norm: the number of patches merged per block, one number or one per block (ToMe's
            decreasing schedule, or 0 in the first blocks).

    Raises ValueError, with the reason, for another method or a model that cannot be evolved.
    """
    if method not in METHODS:
        raise ValueError(f'method: expected one of {", ".join(METHODS)}, found {method!r}')
    if is_from_transformers(model):
        raise ValueError(f'{method}: expected a ViT of timm, found {type(model).__name__} of transformers')
    if method in ('merge', 'merge_norm'):
        rates = tuple(map(int, merge_r)) if np.ndim(merge_r) else int(merge_r)
        depth = len(getattr(model, 'blocks', ()))
        if min(np.atleast_1d(rates), default=0) < 0 or np.size(rates) != (depth if np.ndim(rates) else 1):
            raise ValueError(f'merge_r: expected 0 or more patches, one number or {depth}, found {merge_r}')
        model = evolve(model, 1.0, stages=(), representative='none')
        model.update_group = partial(METHODS[method], r=rates)
        return model
    if method == 'random':
        model = evolve(model, keep_ratio, stages)
    else:
        depth = len(getattr(model, 'blocks', ()))
        stages = sorted({max(depth * i // 4, 1) for i in (1, 2, 3)}) if stages is None else stages
        if np.ndim(stages) != 1:
            raise ValueError(f'stages: expected indices of blocks, such as (3, 6, 9), found {stages}')
        ratios = evolution.check_keep_ratio(to_floats('keep_ratio', keep_ratio), len(stages))
        # These methods ignore it, but `schedule()` says it: the fused token represents all patches that left.
        representative = 'one' if method == 'fuse' else 'none'
        model = evolve(model, list(accumulate(ratios, mul)), stages, representative)
    model.update_group = METHODS[method]
    return model


METHODS: dict[str, Callable] = {
    'drop': drop, 'fuse': fuse, 'merge': merge, 'merge_norm': merge_norm, 'random': random
}  # fmt: skip
# The arguments of `apply` that each method takes.
ARGUMENTS = dict.fromkeys(('drop', 'fuse', 'random'), ('keep_ratio', 'stages'))
ARGUMENTS |= dict.fromkeys(('merge', 'merge_norm'), ('merge_r',))

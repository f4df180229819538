"""What users would pick instead: dropping, fusing and merging tokens, through the same seam, for comparison.

Each function here has the signature of evolution.evolve and treats one group of blocks of a ViT that `models.evolve`
takes; `apply` gives a model one of them. As everywhere, the whole grid exists between groups: a patch that left keeps
the values with which it was last seen, and one that was merged has those of its cluster.

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
    """A selection; `fused` is the token (B, 1, C) into which all patches that left were fused, None where they drop."""

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
    """Top-k: the patches with the least class attention leave the group's first block, between attention and MLP.

    They never come back, and the attention of that block alone decides. Source: EViT
    (https://arxiv.org/abs/2202.07800) without its fused token; numbers of patches are rounded down here, there up.
    """
    x, kept, n = tokens, None, tokens.shape[1] - prefix
    k, fused = evolution.num_informative(n, keep_ratio), []
    if selection is not None:
        kept, fused = selection.kept, [] if selection.fused is None else [selection.fused]
        x = torch.cat([evolution.gather_tokens(tokens, evolution.with_prefix(kept, prefix)), *fused], 1)
        n = kept.shape[1]

    if select_anew and k < n:
        found = []  # state goes out by here, as checkpointing runs `leave` again in the backward pass

        def leave(x: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
            """The tokens between attention and MLP to those that go on: prefix, k patches, and perhaps a fused one."""
            best = evolution.select(attention[:, :n], k)
            found[:] = x, attention, best
            fused = []
            if fusing:
                leaving = (attention / keys.shape[1]).scatter(1, best, 0.0)  # mean over heads; the fused one leaves too
                fused = [leaving.unsqueeze(1).to(x.dtype) @ x[:, prefix:]]
            return torch.cat([evolution.gather_tokens(x, evolution.with_prefix(best, prefix)), *fused], 1)

        x, _ = blocks[0](x, places=kept, need_attention=True, reduce=leave)
        last_seen, attention, best = found
        tokens = _put_back(last_seen, tokens, kept, prefix)  # those that leave keep these values
        if kept is None:
            kept, score = best, attention
        else:
            gone = attention.new_zeros(tokens.shape[0], tokens.shape[1] - prefix)
            kept, score = kept.gather(1, best), gone.scatter(1, kept, attention[:, :n])
        selection, blocks = Reduced(kept, score), blocks[1:]
    for block in blocks:
        x = block(x, places=kept)
    if fusing and selection is not None:
        selection = selection._replace(fused=x[:, -1:])
    return _put_back(x, tokens, kept, prefix), score, selection


def _put_back(x: Tensor, tokens: Tensor, kept: Tensor | None, prefix: int) -> Tensor:
    """Tokens (B, P + N, C), with what x (B, P + n, C) has of the prefix and the patches `kept` (B, K), or of all."""
    if kept is None:
        return x
    index = evolution.with_prefix(kept, prefix).unsqueeze(-1).expand(-1, -1, x.shape[2])
    return tokens.scatter(1, index, x[:, : index.shape[1]].to(tokens.dtype))


def fuse(*args, **kwargs):
    """EViT: as `drop`, but what leaves is fused into one token, its sum weighted by the attention, which goes on.

    What leaves later is fused with the token that is there already. Source: https://arxiv.org/abs/2202.07800, whose
    fused token may also be kept as if it were a patch.
    """
    return drop(*args, **kwargs, fusing=True)


class Merged(NamedTuple):
    """What is left: kept (B, n) its places, None for all, cluster (B, N) where each patch went, size (B, n), tokens."""

    kept: Tensor | None
    score: Tensor | None
    cluster: Tensor
    size: Tensor
    tokens: Tensor  # (B, n, C)
    blocks: int  # how many the tokens went through


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
    """ToMe: each block merges the r most similar pairs of patches between attention and MLP; unmerged at the end.

    The keys, a mean over heads, say what is similar; a token that stands for s patches counts s times in attention.
    r: one number, or one for each block of the network. keep_norm: a merged token is as long as its members on average.
    Source: https://arxiv.org/abs/2210.09461.
    """
    if selection is None:
        cluster = places_of(tokens[:, prefix:, 0])
        selection = Merged(None, score, cluster, torch.ones_like(cluster, dtype=torch.float32), tokens[:, prefix:], 0)
    places, _, cluster, size, patches, done = selection
    x = torch.cat([tokens[:, :prefix], patches], 1)
    rates = (r,) * (done + len(blocks)) if isinstance(r, int) else r

    for block, rate in zip(blocks, rates[done:], strict=False):
        found = []  # state goes out by here, as checkpointing runs `merge_pairs` again in the backward pass

        def merge_pairs(
            x: Tensor, attention: None, keys: Tensor, size: Tensor = size, rate: int = rate, found: list = found
        ) -> Tensor:
            """Tokens (B, P + n, C) between attention and MLP to the P + n - rate that remain."""
            target = match(keys[:, :, prefix:].mean(1), rate)
            merged = size.new_zeros(size.shape[0], size.shape[1] - min(rate, size.shape[1] // 2))
            merged = merged.scatter_add(1, target, size)
            found[:] = target, merged
            return torch.cat([x[:, :prefix], _merged_means(x[:, prefix:], size, target, merged, keep_norm)], 1)

        mask = None if places is None else evolution.log_size_mask(size, prefix, x.dtype)
        x = block(x, places=places, attn_mask=mask, reduce=merge_pairs if rate else None)
        if not rate:
            continue
        target, size = found
        # A merged token keeps the place of the one that others were merged into.
        old = places_of(target) if places is None else places
        places = torch.zeros_like(size, dtype=old.dtype).scatter(1, target[:, 1::2], old[:, 1::2])
        places = places.scatter(1, target[:, ::2], old[:, ::2])  # last, as these stay: see `match`
        cluster = target.gather(1, cluster)
    patches = x[:, prefix:].gather(1, cluster.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    merged = Merged(places, score, cluster, size, x[:, prefix:], done + len(blocks))
    return torch.cat([x[:, :prefix], patches], 1), score, merged


def places_of(patches: Tensor) -> Tensor:
    """Raster indices (B, N) of tensors (B, N)."""
    return torch.arange(patches.shape[1], device=patches.device).expand_as(patches)


def merge_norm(*args, **kwargs):
    """As `merge`, but a merged token is as long as its members are on average, where their mean would be shorter.

    The idea is that of ToFu's MLERP (https://arxiv.org/abs/2312.01026).
    """
    return merge(*args, **kwargs, keep_norm=True)


def _merged_means(patches: Tensor, size: Tensor, target: Tensor, merged: Tensor, keep_norm: bool) -> Tensor:
    """Means (B, m, C) of the patches (B, n, C) that go to each target (B, n), weighted by size (B, n).

    merged (B, m): the sums of these sizes. keep_norm: as long as the members are on average.
    """

    def mean(x: Tensor) -> Tensor:
        return x.new_zeros(*merged.shape, x.shape[2]).scatter_add(1, target.unsqueeze(-1).expand_as(x), x * weight)

    # They add up to 1, in place of sums, which could overflow in half precision.
    weight = (size / merged.gather(1, target)).unsqueeze(-1).to(patches.dtype)
    means = mean(patches)
    if not keep_norm:
        return means
    return F.normalize(means, dim=-1) * mean(patches.norm(dim=-1, keepdim=True))


def match(metric: Tensor, r: int) -> Tensor:
    """Bipartite soft matching of tokens with metric (B, n, D): where each goes, (B, n), among the n - r that remain.

    Every second token may be merged into its most similar one among the others; the r most similar pairs are. As in
    ToMe, whose class token counts as the first of all, the first patch stays, and those that are not merged come first,
    in the order in which they were: who may be merged with whom in the next block depends on it.
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
    """A control: evolution.evolve with random numbers in place of the attention; with 'nearest' novelty counts too."""
    return evolution.evolve(tokens, None if score is None else torch.rand_like(score), *args, **kwargs)


def apply(
    model: nn.Module,
    method: str,
    keep_ratio: float | Sequence[float] = 0.7,
    stages: Sequence[int] | None = None,
    merge_r: int | Sequence[int] = 8,
) -> nn.Module:
    """Give a ViT of timm one of the rivals, in place, with the schedule of its paper; returns the model.

    Args:
        method: 'drop', 'fuse', 'merge', 'merge_norm' or 'random'.
        keep_ratio: drop, fuse: the share of the patches still there that goes on, at each of the stages (EViT: 0.7);
            `model.keep_ratio` then has the shares of all patches.
            random: as in `models.evolve`.
        stages: drop, fuse: the blocks in which patches leave; by default 3, 6 and 9 of 12, and in proportion.
        merge_r: merge, merge_norm: how many patches each block merges away, one number or one for each block: ToMe's
            decreasing schedule, or 0 in the first blocks.

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
        shares = evolution.check_keep_ratio(to_floats('keep_ratio', keep_ratio), len(stages))
        # With one token for all that left, its weights have gradients too; dropping has no use for them.
        representative = 'one' if method == 'fuse' else 'none'
        model = evolve(model, list(accumulate(shares, mul)), stages, representative)
    model.update_group = METHODS[method]
    return model


METHODS: dict[str, Callable] = {
    'drop': drop, 'fuse': fuse, 'merge': merge, 'merge_norm': merge_norm, 'random': random
}  # fmt: skip
# What `apply` has of arguments for each.
ARGUMENTS = dict.fromkeys(('drop', 'fuse', 'random'), ('keep_ratio', 'stages'))
ARGUMENTS |= dict.fromkeys(('merge', 'merge_norm'), ('merge_r',))

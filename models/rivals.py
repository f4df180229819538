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
from .evolution import Block, Selection, Slow, Tradeoff
from .vit import evolve, to_floats


def drop(tokens: Tensor, score: Tensor | None, blocks: Sequence[Block], tradeoffs: Sequence[Tradeoff], *args, **kwargs):
    """Top-k: the patches with the least class attention leave, and never come back.

    Source: EViT (https://arxiv.org/abs/2202.07800) without its fused token; the attention of the last block decides.
    """
    tokens, score, selection = evolution.evolve(tokens, score, blocks, [1.0] * len(tradeoffs), *args, **kwargs)
    if selection is not None and score is not None:
        gone = torch.full_like(score, -torch.inf)
        score = gone.scatter(1, selection.kept, score.gather(1, selection.kept))
    return tokens, score, selection


class Fused(NamedTuple):
    """A selection, and the token (B, 1, C) into which all patches that left were fused, with its score (B, 1)."""

    kept: Tensor
    score: Tensor
    cluster: None
    token: Tensor
    token_score: Tensor


def fuse(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    keep_ratio: float,
    representative: str,
    selection: Fused | None = None,
    select_anew: bool = True,
    need_score: bool = True,
    prefix: int = 1,
):
    """EViT: the patches with the least class attention leave, and one token, their mean weighted by it, goes on.

    Those that leave later are fused into the token that is there already. Source: https://arxiv.org/abs/2202.07800,
    whose fused token could also be chosen again as a patch.
    """
    tradeoffs = [1.0] * len(tradeoffs)
    n = tokens.shape[1] - prefix
    k = evolution.informative(n, keep_ratio)
    if k == n:
        return *evolution.run(Slow(tokens), score, blocks, tradeoffs, need_score), None
    if select_anew or selection is None:
        kept = evolution.select(score, k)
        leaving = score.scatter(1, kept, 0.0).clamp(min=0)  # -inf: left before
        # Where nobody attends to what leaves, all of it counts alike, and what was fused before by its score alone.
        alike = torch.isfinite(score).scatter(1, kept, False).to(score.dtype)
        leaving = evolution.replace_zeros(leaving, alike)
        fused, weight = leaving.unsqueeze(1).to(tokens.dtype) @ tokens[:, prefix:], leaving.sum(1, keepdim=True)
        if selection is not None:
            fused = fused + selection.token_score.unsqueeze(-1).to(tokens.dtype) * selection.token
            weight = weight + selection.token_score
        selection = Fused(kept, score, None, fused / weight.unsqueeze(-1).to(tokens.dtype), weight)
    kept = selection.kept
    index = torch.cat([torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1), kept + prefix], 1)
    index = index.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    slow = Slow(torch.cat([tokens.gather(1, index), selection.token], 1), kept)
    slow, new_score = evolution.run(slow, F.pad(score.gather(1, kept), (0, 1)), blocks, tradeoffs, need_score)
    selection = selection._replace(token=slow[:, -1:], token_score=new_score[:, -1:])
    score = torch.full_like(score, -torch.inf).scatter(1, kept, new_score[:, :-1])
    return tokens.scatter(1, index, slow[:, :-1].to(tokens.dtype)), score, selection


def merge(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    keep_ratio: float,
    representative: str,
    selection: Selection | None = None,
    select_anew: bool = True,
    need_score: bool = True,
    prefix: int = 1,
    r: int = 8,
):
    """ToMe: each block merges the r most similar pairs of patches between attention and MLP; unmerged at the end.

    The keys, a mean over heads, say what is similar; a token that stands for s patches counts s times in attention.
    Source: https://arxiv.org/abs/2210.09461.
    """
    patches = tokens[:, prefix:]
    cluster = (
        selection.cluster
        if selection
        else torch.arange(patches.shape[1], device=tokens.device).expand(patches.shape[0], -1)
    )
    count = patches.shape[1] if selection is None else selection.kept.shape[1]
    size = evolution.cluster_sizes(cluster, count)
    x = torch.cat([tokens[:, :prefix], evolution.cluster_means(patches, cluster, size)], 1)
    places = None if selection is None else selection.kept
    for block in blocks:
        x, _, keys = block.attend(Slow(x, places, F.pad(size.log(), (prefix, 0))[:, None, None]), False)
        target = match(keys[:, :, prefix:].mean(1), r)
        count = size.shape[1] - min(r, size.shape[1] // 2)
        merged = size.new_zeros(size.shape[0], count).scatter_add(1, target, size)
        index = target.unsqueeze(-1).expand(-1, -1, x.shape[2])
        weighted = (x[:, prefix:] * size.unsqueeze(-1)).to(x.dtype)
        sums = x.new_zeros(x.shape[0], count, x.shape[2]).scatter_add(1, index, weighted)
        x = torch.cat([x[:, :prefix], (sums / merged.unsqueeze(-1)).to(x.dtype)], 1)
        # A merged token keeps the place of the one that others were merged into.
        old = torch.arange(size.shape[1], device=x.device).expand_as(target) if places is None else places
        places = old.new_zeros(old.shape[0], count).scatter(1, target[:, ::2], old[:, ::2])
        places = places.scatter(1, target[:, 1::2], old[:, 1::2])  # last, as these stay: see `match`
        size, cluster = merged, target.gather(1, cluster)
        x = block.feed_forward(x)
    patches = x[:, prefix:].gather(1, cluster.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :prefix], patches], 1), score, Selection(places, size, cluster)


def match(metric: Tensor, r: int) -> Tensor:
    """Bipartite soft matching of tokens with metric (B, n, D): where each goes, (B, n), among the n - r that remain.

    Every second token may be merged into its most similar one among the others; the r most similar pairs are.
    """
    n = metric.shape[1]
    r = min(r, n // 2)
    if r == 0:
        return torch.arange(n, device=metric.device).expand(metric.shape[0], -1)
    metric = F.normalize(metric, dim=-1)
    similarity, nearest = (metric[:, ::2] @ metric[:, 1::2].mT).max(-1)
    order = similarity.argsort(1, descending=True)
    sources, others = order.shape[1], n - order.shape[1]
    rank = order.argsort(1)  # how many pairs are more similar
    # First the sources that are not merged, in any order, then all the others.
    target = torch.where(rank < r, sources - r + nearest, rank - r)
    out = target.new_zeros(target.shape[0], n)
    out[:, ::2] = target
    out[:, 1::2] = sources - r + torch.arange(others, device=metric.device)
    return out


def random(tokens: Tensor, score: Tensor | None, *args, **kwargs):
    """A control: evolution.evolve with random numbers in place of the attention; with 'nearest' novelty counts too."""
    return evolution.evolve(tokens, None if score is None else torch.rand_like(score), *args, **kwargs)


def apply(
    model: nn.Module,
    method: str,
    keep_ratio: float | Sequence[float] = 0.7,
    stages: Sequence[int] | None = None,
    merge_r: int = 8,
) -> nn.Module:
    """Give a ViT of timm one of the rivals, in place, with the schedule of its paper; returns the model.

    Args:
        method: 'drop', 'fuse', 'merge' or 'random'.
        keep_ratio: drop, fuse: the share of the patches still there that goes on, at each of the stages (EViT: 0.7).
            random: as in `models.evolve`.
        stages: drop, fuse: the blocks before which patches leave; by default 4, 7 and 10 of 12, and in proportion.
        merge_r: merge: how many patches each block merges away.

    Raises ValueError, with the reason, for another method or a model that cannot be evolved.
    """
    if method not in METHODS:
        raise ValueError(f'method: expected one of {", ".join(METHODS)}, found {method!r}')
    if method == 'merge':
        if merge_r < 0:
            raise ValueError(f'merge_r: expected 0 or more patches, found {merge_r}')
        model = evolve(model, 1.0, stages=(), representative='none')
        model.update_group = partial(merge, r=merge_r)
        return model
    if method == 'random':
        model = evolve(model, keep_ratio, stages)
    else:
        depth = len(getattr(model, 'blocks', ()))
        # EViT drops after the attention of its blocks 3, 6 and 9 of 12: before the next block begins.
        stages = sorted({min(depth * i // 4 + 1, depth - 1) for i in (1, 2, 3)}) if stages is None else stages
        if np.ndim(stages) != 1:
            raise ValueError(f'stages: expected indices of blocks, such as (4, 7, 10), found {stages}')
        shares = evolution.check_keep_ratio(to_floats('keep_ratio', keep_ratio), len(stages))
        model = evolve(model, list(accumulate(shares, mul)), stages, representative='none')
    model.update_group = METHODS[method]
    return model


METHODS: dict[str, Callable] = {'drop': drop, 'fuse': fuse, 'merge': merge, 'random': random}
# What `apply` has of arguments for each.
ARGUMENTS = dict.fromkeys(('drop', 'fuse', 'random'), ('keep_ratio', 'stages')) | {'merge': ('merge_r',)}

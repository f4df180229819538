"""Slow-fast token evolution: the method of Evo-ViT (https://arxiv.org/abs/2108.01390) as pure functions.

A group of blocks selects the patches to which the class token attended most so far (*informative*), updates these
slowly, that is through every block, and leaves the others (*placeholders*) where they are, or, with a *representative*
token that stands for them, moves them fast, by what the blocks added to the representative. Informative patches are
gathered before the group and scattered back after it. So patches stay in raster order, nothing is sorted, the grid is
whole after every group, and the score is the only thing that goes from one group to the next.

Layer-wise selection (before every block) and stage-wise selection (before every stage of blocks) are two ways to cut
one list of blocks into groups.

Shapes: B batch, N patches, K informative patches, C channels, H heads, D channels of a head.
    tokens      (B, 1 + N, C)   class token first
    score       (B, N)          global class attention, float32
    kept        (B, K)          raster indices of the informative patches, int64, in no particular order
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A block maps tokens (B, 1 + n, C) to tokens and, if its second argument is true, the attention (B, n) that the class
# token pays to the n others; else None.
Block = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
# How much of a block's class attention enters the score: a constant, or a learned scalar.
Tradeoff = float | Tensor


class Group(NamedTuple):
    """Blocks `start` to `stop` (exclusive) that share one selection; `select` is False where the last one goes on."""

    start: int
    stop: int
    keep_ratio: float
    select: bool = True


class Selection(NamedTuple):
    """What one selection chose, kept (B, K), and the score (B, N) that it chose by."""

    kept: Tensor
    score: Tensor


def check_keep_ratio(keep_ratio: float | Sequence[float], stages: int) -> tuple[float, ...]:
    """One keep ratio for each of `stages` stages, from a single one or a list; ValueError outside (0, 1] or of wrong
    length.
    """
    ratios = (keep_ratio,) * stages if isinstance(keep_ratio, int | float) else tuple(keep_ratio)
    if len(ratios) == 1:
        ratios *= stages
    if len(ratios) != stages:
        raise ValueError(
            f'keep_ratio: expected one value or {stages} (one for each evolving stage), found {len(ratios)}: {ratios}'
        )
    if not all(0 < r <= 1 for r in ratios):
        raise ValueError(f'keep_ratio: expected values in (0, 1], found {ratios}')
    return tuple(float(r) for r in ratios)


def informative(n: int, keep_ratio: float) -> int:
    """How many of `n` patches are informative; ValueError if that is none of several."""
    # Rounded down from a product of floats, so int(100 * 0.29) is 28: the published code counts like this, and another
    # rounding would select other patches with its checkpoints.
    k = int(n * keep_ratio)
    if k == 0 and n > 1:
        raise ValueError(
            f'keep_ratio: expected at least {1 / n:.3g}, which keeps one of the {n} patches, found {keep_ratio}, which '
            'keeps none'
        )
    return k


def last_selection(groups: Sequence[Group]) -> int:
    """First block of the last group that selects, 0 if none does."""
    starts = [group.start for group in groups if group.select and group.keep_ratio < 1]
    return starts[-1] if starts else 0


def partition(
    dense: int, stages: Sequence[int], keep_ratio: Sequence[float], stage_wise: bool, cuts: Sequence[int] = ()
) -> list[Group]:
    """Cut a list of blocks into groups.

    The first `dense` blocks see every patch. The stages that follow have `stages[i]` blocks and keep `keep_ratio[i]`;
    they select once (`stage_wise`) or before each block. `cuts` are block indices after which a group must end because
    somebody wants the whole grid there; the selection then goes on in the next group, which changes nothing but
    rounding.
    """
    groups = [Group(0, dense, 1.0)] if dense else []
    start = dense
    for blocks, ratio in zip(stages, keep_ratio, strict=True):
        step = max(blocks, 1) if stage_wise else 1
        groups += [Group(i, i + step, ratio) for i in range(start, start + blocks, step)]
        start += blocks
    cut = []
    for group in groups:
        edges = [group.start, *(i + 1 for i in sorted(cuts) if group.start <= i < group.stop - 1), group.stop]
        for a, b in zip(edges, edges[1:], strict=False):
            cut.append(group._replace(start=a, stop=b, select=a == group.start))
    return cut


def class_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of the class token to all others, for each head.

    q (B, H, 1, D) its query, k (B, H, 1 + n, D) all keys; returns (B, H, n). At least in float32: in half precision
    equal scores would be common, and a selection between equals is arbitrary.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return ((q.to(dtype) * scale) @ k.to(dtype).mT).softmax(-1)[:, :, 0, 1:]


def select(score: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k patches with the highest score (B, N)."""
    return score.topk(k, dim=1, sorted=False).indices


def replace_zeros(weight: Tensor, other: Tensor | float) -> Tensor:
    """Weights (B, N) that can be divided by their sum: `other` for those images whose weights are all 0.

    A sum so small that its inverse overflows counts as 0. NaN stays NaN.
    """
    return torch.where(weight.sum(1, keepdim=True) < torch.finfo(weight.dtype).tiny, other, weight)


def represent(patches: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """Representative (B, 1, C) of all placeholders: the mean of `patches` (B, N, C) outside `kept`, weighted by score
    (B, N), or their plain mean if these scores are all 0.
    """
    placeholder = torch.ones_like(score).scatter(1, kept, 0.0)
    weight = replace_zeros(score.scatter(1, kept, 0.0), placeholder)
    weight = weight / weight.sum(1, keepdim=True)
    return weight.unsqueeze(1).to(patches.dtype) @ patches


def blend(score: Tensor | None, attention: Tensor, tradeoff: Tradeoff) -> Tensor:
    """Moving average of class attentions; the first attention of a network is the score."""
    return attention if score is None else (1 - tradeoff) * score + tradeoff * attention


def run(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    need_score: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Send tokens (B, 1 + n, C) through blocks and update the score (B, m) of the first m <= n patches among them."""
    for i, (block, tradeoff) in enumerate(zip(blocks, tradeoffs, strict=True)):
        # A later constant tradeoff of 1 forgets everything before it: those attentions need not be computed.
        forgotten = any(isinstance(t, float) and t == 1 for t in tradeoffs[i + 1 :])
        tokens, attention = block(tokens, need_score and not forgotten)
        if attention is not None:
            score = blend(score, attention if score is None else attention[:, : score.shape[1]], tradeoff)
    return tokens, score


def evolve(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    keep_ratio: float,
    representative: bool = False,
    kept: Tensor | None = None,
    need_score: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Update all tokens by one group of blocks: slowly the informative patches, fast (or not at all) the placeholders.

    Args:
        tokens: (B, 1 + N, C), class token first.
        score: (B, N), or None before the first block of a network, where every patch is informative.
        blocks, tradeoffs: the group's blocks, and for each how much of its class attention enters the score.
        keep_ratio: int(N * keep_ratio) patches are informative; ValueError if that is none of several.
        representative: add a representative token, and give its change to every placeholder.
        kept: (B, K), a selection that goes on; by default the score selects.
        need_score: False after the last selection of a network: the attentions of the class token are not computed.

    Returns:
        tokens (B, 1 + N, C) in the order they came, score (B, N), and kept (B, K) or None where all patches are
        informative.

    Source: paper, section 3.2 and figure 3. The published code sorts tokens; gathering them gives the same function.
    """
    n = tokens.shape[1] - 1
    k = informative(n, keep_ratio) if kept is None else kept.shape[1]
    if k == n:
        return *run(tokens, score, blocks, tradeoffs, need_score), None
    if kept is None:
        kept = select(score, k)
    # The class token travels with the informative patches, so one gather and one scatter move them all.
    index = torch.nn.functional.pad(kept + 1, (1, 0)).unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    slow = tokens.gather(1, index)
    if representative:
        before = represent(tokens[:, 1:], score, kept)
        slow = torch.cat([slow, before], 1)
    slow, kept_score = run(slow, score.gather(1, kept), blocks, tradeoffs, need_score)
    if representative:
        tokens = tokens + (slow[:, k + 1 :] - before)
        slow = slow[:, : k + 1]
    tokens = tokens.scatter(1, index, slow.to(tokens.dtype))
    return tokens, score.scatter(1, kept, kept_score) if need_score else score, kept

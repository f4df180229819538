"""Slow-fast token evolution: the method of Evo-ViT (https://arxiv.org/abs/2108.01390) as pure functions.

A group of blocks selects the patches to which the class token attended most so far (*informative*) and updates these
slowly, that is through every block. The others (*placeholders*) are updated fast: each receives what the group added to
the token that represents it. Who represents a placeholder is a choice:

    'none'      nobody; placeholders stay as they are (the published Evo-DeiT).
    'one'       one token for all placeholders, their mean weighted by score (the paper, the published Evo-LeViT).
    'nearest'   the informative patch with the most similar features; its token is the mean of those it stands for, and
                counts in attention as often as there are of them. Informative are then the patches that are attended
                and resemble none that is more attended. This works without any training.

Informative patches are gathered before the group and scattered back after it. So patches stay in raster order, nothing
is sorted, the grid is whole after every group, and the score is the only thing that goes from one group to the next.

Shapes: B batch, P prefix tokens (class token first), N patches, K informative patches, C channels, H heads, D channels
of a head.
    tokens      (B, P + N, C)
    score       (B, N)          global class attention, float32
    kept        (B, K)          raster indices of the informative patches, int64, in no particular order
    cluster     (B, N)          for each patch, which of the K informative ones represents it, int64
    size        (B, K)          how many patches an informative one represents, itself included
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REPRESENTATIVES = ('none', 'one', 'nearest')
COMPARED = 64  # channels in which patches are compared for novelty

# How much of a block's class attention enters the score: a constant, or a learned scalar.
Tradeoff = float | Tensor


class Slow(NamedTuple):
    """What a block gets: tokens (B, P + n, C), of which n are patches.

    places (B, n): their raster indices, for positions that rotate queries and keys; None where all N stand in order.
    key_bias (B, 1, 1, P + n): added to the attention logits; None for nothing.
    """

    tokens: Tensor
    places: Tensor | None = None
    key_bias: Tensor | None = None


# A block maps slow tokens to tokens (B, P + n, C) and, if its second argument is true, to the attention (B, n) that the
# class token pays to the n patches; else to None.
Block = Callable[[Slow, bool], tuple[Tensor, Tensor | None]]


class Group(NamedTuple):
    """Blocks `start` to `stop` (exclusive) that share one selection; `select` is False where the last one goes on."""

    start: int
    stop: int
    keep_ratio: float
    select: bool = True


class Selection(NamedTuple):
    """What one selection chose: kept (B, K), the score (B, N) that it chose by, and cluster (B, N) for 'nearest'."""

    kept: Tensor
    score: Tensor
    cluster: Tensor | None = None


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


def check_representative(representative: str | bool) -> str:
    """One of REPRESENTATIVES; False and True are old names of 'none' and 'one'. ValueError for anything else."""
    name = representative
    if isinstance(representative, bool):
        name = 'one' if representative else 'none'
    if name not in REPRESENTATIVES:
        raise ValueError(f'representative: expected one of {", ".join(REPRESENTATIVES)}, found {representative!r}')
    return name


def informative(n: int, keep_ratio: float) -> int:
    """How many of n patches are informative; ValueError if that is none of several."""
    # Rounded down from a product of floats, so int(100 * 0.29) is 28: the published code counts like this, and another
    # rounding would select other patches with its checkpoints.
    if not 0 < keep_ratio <= 1:
        raise ValueError(f'keep_ratio: expected a value in (0, 1], found {keep_ratio}')
    k = int(n * keep_ratio)
    if k == 0 and n > 1:
        raise ValueError(
            f'keep_ratio: expected at least {1 / n:.3g}, which keeps one of the {n} patches, found {keep_ratio}, which '
            'keeps none'
        )
    return k


def partition(
    depth: int,
    stages: Sequence[int],
    keep_ratio: Sequence[float],
    stage_wise: bool = True,
    new_grids: Sequence[int] = (),
    cuts: Sequence[int] = (),
) -> list[Group]:
    """Cut a list of `depth` blocks into groups.

    Layer-wise selection (before every block) and stage-wise selection (before every stage) are two ways to cut the
    same list.

    Args:
        stages: the first block of each stage that evolves, ascending; the blocks before see every patch.
        keep_ratio: the share of informative patches in each of these stages.
        stage_wise: one selection for a stage, or one for each of its blocks.
        new_grids: blocks before which the grid changes; a selection cannot go on there.
        cuts: blocks after which a group ends because somebody wants the whole grid. The selection goes on in the next
            group, which changes nothing but rounding.
    """
    first = min(stages, default=depth)
    selecting = {*stages, *(i for i in new_grids if i > first)} if stage_wise else set(range(first, depth))
    edges = sorted({0, depth, *selecting, *new_grids, *(i + 1 for i in cuts)})
    groups = []
    for start, stop in zip(edges, edges[1:], strict=False):
        ratio = next((r for s, r in zip(stages[::-1], keep_ratio[::-1], strict=True) if s <= start), 1.0)
        groups.append(Group(start, stop, ratio, start in selecting))
    return groups


# --- select


def class_attention(q: Tensor, k: Tensor, scale: float, key_bias: Tensor | None = None, prefix: int = 1) -> Tensor:
    """Attention of the class token to the patches, for each head.

    q (B, H, 1, D) its query, k (B, H, P + n, D) all keys, key_bias (B, 1, 1, P + n); returns (B, H, n). At least in
    float32: in half precision equal scores would be common, and a selection between equals is arbitrary.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(dtype) * scale) @ k.to(dtype).mT
        if key_bias is not None:
            logits = logits + key_bias.to(dtype)
        return logits.softmax(-1)[:, :, 0, prefix:]


def update_score(score: Tensor | None, attention: Tensor, tradeoff: Tradeoff) -> Tensor:
    """Moving average of class attentions; the first attention of a network is the score."""
    return attention if score is None else (1 - tradeoff) * score + tradeoff * attention


def select(score: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k patches with the highest score (B, N)."""
    return score.topk(k, dim=1, sorted=False).indices


def novelty(patches: Tensor, score: Tensor) -> Tensor:
    """How little a patch resembles those that are more attended: (B, N), from 0 (one is the same) to 2.

    It is 1 minus the highest cosine between a patch of (B, N, C) and one with a higher score (B, N). A patch that
    resembles a more attended one is well represented by it. So score * novelty chooses patches of which each
    placeholder finds one that is near: the peaks of density peak clustering (Rodriguez and Laio, 2014), with the class
    attention as density. COMPARED channels are enough to tell, and keep the N x N product cheap.
    """
    # Members of a cluster have one score, and sorts differ in how they order equals: here the first counts as higher.
    n = score.shape[1]
    order = (score * torch.linspace(1, 1 - n * 2.0**-22, n, device=score.device)).argsort(1)
    compared = patches.detach()[..., :: max(1, patches.shape[-1] // COMPARED)].contiguous()
    compared = F.normalize(take(compared, order), dim=-1)
    # In order of attention the more attended are those behind; nobody is as far as cosine -1.
    others = torch.full((n, n), -4.0, dtype=compared.dtype, device=compared.device).tril_()
    closest = torch.baddbmm(others, compared, compared.mT).amax(-1).clamp_(min=-1.0)
    return torch.empty_like(score).scatter_(1, order, (1 - closest).to(score.dtype))


# --- represent


def replace_zeros(weight: Tensor, other: Tensor | float) -> Tensor:
    """Weights (B, N) that can be divided by their sum: `other` for those images whose weights are all 0.

    A sum so small that its inverse overflows counts as 0. NaN stays NaN.
    """
    return torch.where(weight.sum(1, keepdim=True) < torch.finfo(weight.dtype).tiny, other, weight)


def weighted_mean(patches: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """The one representative (B, 1, C) of all placeholders, the patches (B, N, C) that are not kept.

    It is their mean weighted by score (B, N), or their plain mean if these scores are all 0.
    """
    placeholder = torch.ones_like(score).scatter(1, kept, 0.0)
    weight = replace_zeros(score.scatter(1, kept, 0.0), placeholder)
    weight = weight / weight.sum(1, keepdim=True)
    return weight.unsqueeze(1).to(patches.dtype) @ patches


def nearest(tokens: Tensor, order: Tensor, k: int, prefix: int = 1) -> Tensor:
    """For each patch its cluster (B, N): the informative one with the most similar features (cosine).

    tokens (B, P + N, C); order (B, N): the patches, the k informative ones first, each of which represents itself.
    """
    ordered = take(tokens.detach(), order + prefix)
    informative = F.normalize(ordered[:, :k], dim=-1)  # the length of the other one changes no argmax
    closest = torch.bmm(ordered[:, k:], informative.mT).argmax(-1)
    own = torch.arange(k, device=order.device).expand(order.shape[0], -1)
    return torch.empty_like(order).scatter_(1, order, torch.cat([own, closest], 1))


def cluster_sizes(cluster: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """How many belong to each of k clusters: (B, N) to (B, k)."""
    ones = torch.ones_like(cluster, dtype=dtype)
    return ones.new_zeros(cluster.shape[0], k).scatter_add_(1, cluster, ones)


def cluster_means(tokens: Tensor, cluster: Tensor, size: Tensor) -> Tensor:
    """Means (B, K, C) of the tokens (B, N, C) of each cluster."""
    return _means(tokens, _flat(cluster, size.shape[1]), size)


def _means(tokens: Tensor, rows: Tensor, size: Tensor) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, torch.float32)  # sums of many members overflow in half precision
    sums = torch.zeros(size.numel(), tokens.shape[2], dtype=dtype, device=tokens.device)
    sums = sums.index_add_(0, rows, tokens.flatten(0, 1).to(dtype)).view(*size.shape, -1)
    return (sums / size.unsqueeze(-1)).to(tokens.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, n, C) of x (B, N, C) at index (B, n); several times as fast on a CPU as gather with an index of C."""
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).view(*index.shape, x.shape[2])


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Indices (B, m) of patches, or of anything that stands behind P prefix tokens, to those of all (B, P + m)."""
    return torch.cat([torch.arange(prefix, device=index.device).expand(index.shape[0], -1), index + prefix], 1)


def _flat(index: Tensor, n: int) -> Tensor:
    """Indices (B, m) into rows of n each to indices (B * m) into all rows."""
    return (index + torch.arange(0, index.shape[0] * n, n, device=index.device).unsqueeze(1)).flatten()


# --- update


def run(
    slow: Slow,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    need_score: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Send tokens through blocks, and update the score (B, m) of the first m <= n patches among them."""
    for i, (block, tradeoff) in enumerate(zip(blocks, tradeoffs, strict=True)):
        # A later constant tradeoff of 1 overwrites everything before it: those attentions need not be computed.
        overwritten = any([isinstance(t, float) and t == 1 for t in tradeoffs[i + 1 :]])
        tokens, attention = block(slow, need_score and not overwritten)
        slow = slow._replace(tokens=tokens)
        if attention is not None:
            attention = attention if score is None else attention[:, : score.shape[1]]
            score = update_score(score, attention, tradeoff)
    return slow.tokens, score


def evolve(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    keep_ratio: float,
    representative: str = 'none',
    selection: Selection | None = None,
    select_anew: bool = True,
    need_score: bool = True,
    prefix: int = 1,
) -> tuple[Tensor, Tensor | None, Selection | None]:
    """Update all tokens by one group of blocks: the informative patches slowly, the placeholders fast.

    Args:
        tokens: (B, P + N, C).
        score: (B, N), or None before the first block of a network, where every patch is informative.
        blocks, tradeoffs: the group's blocks, and for each how much of its class attention enters the score.
        keep_ratio: int(N * keep_ratio) patches are informative; ValueError if that is none of several.
        representative: 'none', 'one' or 'nearest', see above.
        selection: that of the group before, None before the first; select_anew: let the score choose another one.
        need_score: False after the last selection of a network: the attentions of the class token are not computed,
            and the score stays as it is.
        prefix: P, how many tokens stand before the patches; all of them are updated slowly.

    Returns:
        tokens (B, P + N, C) in the order they came, score (B, N), and the selection, None where all patches are
        informative.

    Source: paper, section 3.2 and figure 3. The published code sorts tokens; gathering them gives the same function.
    """
    representative = check_representative(representative)
    n = tokens.shape[1] - prefix
    k = informative(n, keep_ratio)
    if k == n:
        return *run(Slow(tokens), score, blocks, tradeoffs, need_score), None
    if select_anew or selection is None:
        if representative == 'nearest' and k > 0:  # where no patch is informative there is none to represent another
            order = (score * novelty(tokens[:, prefix:], score)).argsort(1, descending=True)
            selection = Selection(order[:, :k], score, nearest(tokens, order, k, prefix))
        else:
            selection = Selection(select(score, k), score)
    update = partial(run, blocks=blocks, tradeoffs=tradeoffs, need_score=need_score)
    if selection.cluster is not None:
        tokens, score = _evolve_clusters(tokens, score, selection, update, need_score, prefix)
    else:
        tokens, score = _evolve_kept(tokens, score, selection.kept, update, prefix, representative == 'one')
    return tokens, score, selection


def _evolve_kept(
    tokens: Tensor, score: Tensor, kept: Tensor, update: Callable, prefix: int, represent: bool
) -> tuple[Tensor, Tensor]:
    """Update the kept patches slowly; the others wait or, with `represent`, move as their one representative does."""
    k = kept.shape[1]
    # The prefix tokens travel with the informative patches, so one gather and one scatter move them all.
    index = with_prefix(kept, prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    slow = tokens.gather(1, index)
    if represent:
        before = weighted_mean(tokens[:, prefix:], score, kept)
        slow = torch.cat([slow, before], 1)
    slow, kept_score = update(Slow(slow, kept), score.gather(1, kept))
    if represent:
        tokens = tokens + (slow[:, prefix + k :] - before)
        slow = slow[:, : prefix + k]
    return tokens.scatter(1, index, slow.to(tokens.dtype)), score.scatter(1, kept, kept_score)


def _evolve_clusters(
    tokens: Tensor, score: Tensor, selection: Selection, update: Callable, need_score: bool, prefix: int
) -> tuple[Tensor, Tensor]:
    """Update the mean of each cluster slowly; every token moves as the mean of its cluster does."""
    kept, _, cluster = selection
    # Each prefix token is a cluster of its own, so all tokens are treated alike.
    cluster_of_token = with_prefix(cluster, prefix)
    sizes = cluster_sizes(cluster_of_token, prefix + kept.shape[1], score.dtype)
    rows = _flat(cluster_of_token, sizes.shape[1])
    before = _means(tokens, rows, sizes)
    # The class token attends to a cluster as to all members together, so the blocks update the sum of their scores.
    total = score.new_zeros(kept.shape).scatter_add_(1, cluster, score) if need_score else None
    slow, total = update(Slow(before, kept, sizes.log()[:, None, None]), total)
    if need_score:
        score = (total / sizes[:, prefix:]).gather(1, cluster)
    change = (slow - before).to(tokens.dtype).flatten(0, 1).index_select(0, rows)
    return tokens + change.view_as(tokens), score

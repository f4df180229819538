"""Slow-fast token evolution: the method of Evo-ViT (https://arxiv.org/abs/2108.01390) as pure functions.

Before a group of blocks, the class token's attention selects the *informative* patches. They go through every block of
the group; the other patches, the *placeholders*, follow their representative: each receives the update that the group
gave to the token that represents it. There are three kinds of representatives:

    'none'      no token: placeholders stay as they are (the original Evo-DeiT).
    'one'       one token for all placeholders, their mean weighted by score (the paper, the original Evo-LeViT).
    'nearest'   the most similar informative patch. Each informative patch becomes the mean of its cluster, and
                attention counts it once for each member. A later stage that keeps fewer merges these clusters, and
                so selects among the patches kept before. It needs no training.

Patches are gathered before a group and scattered back after it: they stay in raster order, nothing is sorted, and the
grid is whole after each group. The tokens, the score and the selection pass to the next group.

Another criterion is another score: `rivals.random` replaces it before it calls `update_group`.

Shapes: B batch, P prefix tokens (class token first), N patches, K informative patches, n patches of a sequence,
C channels, H heads, D channels of a head.
    tokens      (B, P + N, C)
    score       (B, N)          class attention so far, not negative, at least float32
    kept        (B, K)          raster indices of the informative patches, int64, in no particular order
    cluster     (B, P + N)      the index (0 to P + K - 1) of each token's representative, int64; prefix tokens
                                represent themselves alone, so their numbers are 0 to P - 1
    size        (B, P + K)      how many tokens each of these represents, itself included
    attn_mask   (B, 1, 1, P + n)    log of the sizes, added to the attention logits
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REPRESENTATIVES = ('none', 'one', 'nearest')

# With more than CHUNK * C tokens, (N, N) matrices are computed in chunks of CHUNK * C rows. On large grids they would
# dominate peak memory; a chunk is no larger than the hidden layer of an MLP, (N, 4 * C).
CHUNK = 4

# The weight of a block's class attention in the score: a constant, a learned scalar, or None if no selection reads it.
Tradeoff = float | Tensor | None

# block(tokens, places=..., attn_mask=..., need_attention=...) maps tokens (B, P + n, C) to tokens of the same shape.
#   places (B, m), m <= n: raster indices of the first m patches, for rotary positions; None if all are there, in order.
#   attn_mask: see above, or None. need_attention: also return the class token's attention to the patches, (B, n).
Block = Callable[..., Tensor | tuple[Tensor, Tensor]]


class Group(NamedTuple):
    """Blocks `start` to `stop` (exclusive) that share one selection, a new one or (`select` False) the previous one."""

    start: int
    stop: int
    keep_ratio: float
    select: bool = True


class Selection(NamedTuple):
    """One selection: kept (B, K), the score (B, N) it was made by and, for 'nearest', cluster (B, P + N).

    tokens (B, P + K, C) and size (B, P + K): the prefix tokens and the clusters of 'nearest' after the group. The next
    group continues with them or, at a lower keep_ratio, merges the clusters.
    """

    kept: Tensor
    score: Tensor
    cluster: Tensor | None = None
    tokens: Tensor | None = None
    size: Tensor | None = None
    keep_ratio: float = 1.0


def check_keep_ratio(keep_ratio: float | Sequence[float], stages: int) -> tuple[float, ...]:
    """Return `stages` keep ratios, from one or a list; ValueError outside (0, 1], or for a list of another length."""
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
    """Return one of REPRESENTATIVES; False and True stand for 'none' and 'one'. ValueError for anything else."""
    name = representative
    if isinstance(representative, bool):
        name = 'one' if representative else 'none'
    if name not in REPRESENTATIVES:
        raise ValueError(f'representative: expected one of {", ".join(REPRESENTATIVES)}, found {representative!r}')
    return name


def num_informative(n: int, keep_ratio: float) -> int:
    """The number of informative patches among n: int(n * keep_ratio). ValueError if that is 0 and n > 1."""
    # int(100 * 0.29) is 28. The original rounds like this; another rounding would change what its checkpoints compute.
    if not 0 < keep_ratio <= 1:
        raise ValueError(f'keep_ratio: expected a value in (0, 1], found {keep_ratio}')
    if isinstance(n, torch.SymInt):  # exported with a dynamic image size: K is computed at run time
        return n if keep_ratio == 1 else torch.sym_int(n * keep_ratio)
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
    """Partition `depth` blocks into groups.

    Layer-wise selection (before every block) and stage-wise selection (before every stage) are two partitions of the
    same list.

    Args:
        stages: the first block of each evolving stage, ascending; earlier blocks see every patch.
        keep_ratio: the fraction of informative patches in each stage.
        stage_wise: select once per stage, or before each of its blocks.
        new_grids: blocks before which the grid changes; a selection cannot continue there.
        cuts: blocks whose output the caller needs as a whole grid; each ends a group. The selection continues in the
            next group; only rounding changes.
    """
    first = min(stages, default=depth)
    selecting = {*stages, *(i for i in new_grids if i > first)} if stage_wise else set(range(first, depth))
    edges = sorted({0, depth, *selecting, *new_grids, *(i + 1 for i in cuts)})
    groups = []
    for start, stop in zip(edges, edges[1:], strict=False):
        ratio = next((r for s, r in zip(stages[::-1], keep_ratio[::-1], strict=True) if s <= start), 1.0)
        groups.append(Group(start, stop, ratio, start in selecting))
    return groups


def drop_unread(tradeoffs: Sequence[Tradeoff], groups: Sequence[Group]) -> list[Tradeoff]:
    """Replace tradeoffs by None where no selection reads the block's attention, which is then not computed.

    That is after the last selection, and before a constant tradeoff of 1, which overwrites the score.
    """
    tradeoffs, read = list(tradeoffs), False
    for start, stop, ratio, selects in reversed(groups):
        for i in reversed(range(start, stop)):
            overwrites = isinstance(tradeoffs[i], float) and tradeoffs[i] == 1
            if not read:
                tradeoffs[i] = None
            elif overwrites:
                read = False
        read = read or (selects and ratio < 1)
    return tradeoffs


# --- select


def class_attention(q: Tensor, k: Tensor, scale: float, attn_mask: Tensor | None = None, prefix: int = 1) -> Tensor:
    """The class token's attention (B, H, n) to the patches; its query q (B, H, 1, D), all keys k (B, H, P + n, D).

    attn_mask (B, 1, 1, P + n) is added to the logits. All is computed in float32 or better: in half precision many
    scores would tie, and topk breaks ties arbitrarily.
    """
    if attention_dtype(q) in (torch.float16, torch.bfloat16):
        # Not a matrix product, which autocast would run in half precision.
        logits = (q.float() * scale * k).sum(-1)
        if attn_mask is not None:
            logits = logits + attn_mask[:, :, 0]
    else:
        # One operator scales, multiplies and adds the mask. Without a mask, beta = 0 ignores the tensor in its place.
        # -1 in place of the batch size: the TorchScript-based ONNX exporter would make it a constant.
        heads, beta = q.shape[1], 0 if attn_mask is None else 1
        mask = q.detach()[..., :1] if attn_mask is None else attn_mask.to(q.dtype).expand(-1, heads, -1, -1)
        mask, q, k = mask.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1)
        logits = torch.baddbmm(mask, q, k.transpose(1, 2), beta=beta, alpha=scale)[:, 0].unflatten(0, (-1, heads))
    return logits.softmax(-1)[..., prefix:]


def update_score(score: Tensor | None, attention: Tensor, tradeoff: float | Tensor) -> Tensor:
    """Moving average of class attentions (B, N). It starts as the first block's attention."""
    if score is None or (isinstance(tradeoff, float) and tradeoff == 1):
        return attention
    return (1 - tradeoff) * score + tradeoff * attention


def select(score: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k patches with the highest score (B, N)."""
    return score.topk(k, dim=1, sorted=False).indices


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens (B, n, C) of x (B, N, C) at index (B, n), from 0 to N - 1 (not checked)."""
    # `embedding` copies whole rows. On a CPU `gather` and indexing by two tensors take several times as long.
    offset = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return F.embedding(index.add(offset, alpha=x.shape[1]), x.flatten(0, 1))


def redundancy(cosine: Tensor, weight_i: Tensor, weight: Tensor) -> Tensor:
    """How much a patch resembles a patch of higher weight: (B, n), from 0 (nothing similar) to 1 (a duplicate).

    It is the highest cosine similarity (at least 0) to a patch of higher weight, which could represent it. So the peaks
    of weight * (1 - redundancy) are the centers of density peak clustering (Rodriguez and Laio, 2014), with the weight
    as density. cosine (B, n, N): of n of the patches, with weights weight_i (B, n), to all N, with weight (B, N).
    """
    # The lower of cosine and sign is the cosine where the other's weight is higher. Elsewhere it is at most 0; for the
    # patch itself it is 0.
    sign = (weight.unsqueeze(1) - weight_i.unsqueeze(2)).sign_()
    return sign.clamp_(max=cosine).amax(2)


def select_clusters(patches: Tensor, length: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select k of the patches (B, N, C): kept (B, K) and, for each patch, which of these K represents it (B, N).

    Selects the highest weight * novelty^3, with weight = score * length and novelty = 1 - redundancy. The power and the
    length were chosen by the KL to dense (docs/log.md). Members of a previous cluster share one score (B, N) but differ
    in length (B, N, 1), so ties are rare and the order of patches does not matter. A patch joins the informative patch
    of highest cosine similarity; an informative patch represents itself.
    """
    unit = (patches / length).to(patches.dtype)
    weight = score * length.squeeze(2)
    root = weight ** (1 / 3)  # root * novelty has the same order as weight * novelty^3, in fewer operators

    # In this order: comparing sizes would make the limit a condition of an exported program.
    if not torch.compiler.is_exporting() and patches.shape[1] <= CHUNK * patches.shape[2]:
        # One matrix (N, N) serves both the redundancy and the assignment.
        cosine = torch.bmm(unit, unit.transpose(1, 2))
        similar = redundancy(cosine, weight, weight)
        kept = select(torch.addcmul(root, root, similar.to(root.dtype), value=-1), k)
        cosine.diagonal(dim1=1, dim2=2).fill_(2)  # nothing is more similar to a patch than itself
        columns = kept.unsqueeze(1).expand(-1, cosine.shape[1], -1)
        return kept, cosine.gather(2, columns).max(2).indices  # on CPUs `max` is faster than `argmax`
    chunks = in_chunks(patches.shape[2], unit, weight)
    similar = torch.cat([redundancy(torch.bmm(u, unit.transpose(1, 2)), w, weight) for u, w in chunks], 1)
    kept = select(torch.addcmul(root, root, similar.to(root.dtype), value=-1), k)
    informative = gather_tokens(unit, kept).transpose(1, 2)
    cluster = torch.cat([torch.bmm(u, informative).max(2).indices for u, _ in chunks], 1)
    return kept, cluster.scatter(1, kept, torch.arange(k, device=kept.device).expand_as(kept))


def in_chunks(channels: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors (B, N, ...) along N into chunks of CHUNK * channels.

    An exported program does not use chunks: with a dynamic image size it cannot loop over them.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # the latter for the older ONNX exporter
    if exporting or tensors[0].shape[1] <= CHUNK * channels:
        return [tensors]
    return list(zip(*(x.split(CHUNK * channels, 1) for x in tensors), strict=True))


def vector_length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The lengths (B, N, 1) of vectors (B, N, C), at least 1e-12, so that dividing by them is safe."""
    return torch.linalg.vector_norm(x, dim=2, keepdim=True, dtype=dtype).clamp(min=1e-12)


# --- represent


def replace_zeros(weight: Tensor, other: Tensor | float) -> Tensor:
    """Weights (B, N) that are safe to divide by their sum: `other` for images whose weights are all 0.

    A sum whose inverse overflows counts as 0. NaN stays NaN.
    """
    return torch.where(weight.sum(1, keepdim=True) < torch.finfo(weight.dtype).tiny, other, weight)


def weighted_mean(patches: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """The one representative (B, 1, C) of all placeholders, which are the patches (B, N, C) that are not kept.

    It is their mean weighted by score (B, N), or their plain mean if all of these scores are 0.
    """
    # Not `ones_like`: the TorchScript-based ONNX exporter would make its batch size a constant.
    placeholder = (0 * score + 1).scatter(1, kept, 0.0)
    weight = replace_zeros(score.scatter(1, kept, 0.0), placeholder)
    weight = weight / weight.sum(1, keepdim=True)
    return weight.unsqueeze(1).to(patches.dtype) @ patches


def memberships(cluster: Tensor, k: int, dtype: torch.dtype = torch.float32, size: Tensor | None = None) -> Tensor:
    """Clusters (B, N) as a one-hot matrix (B, K, N), scaled by the members' sizes (B, N), if they have any.

    Its row sums are the sizes of the clusters.
    """
    zeros = cluster.new_zeros(cluster.shape[0], k, cluster.shape[1], dtype=dtype)
    return zeros.scatter_(1, cluster.unsqueeze(1), 1 if size is None else size.unsqueeze(1))


def memberships_in_turn(chunks: Iterable[tuple[Tensor, ...]], k: int, dtype: torch.dtype) -> Iterable[Tensor]:
    """Yield `memberships` chunk by chunk (clusters and, if any, sizes), so that only one matrix exists at a time."""
    for cluster, *size in chunks:
        yield memberships(cluster, k, dtype, *size)


def cluster_means(tokens: Tensor, length: Tensor, members: Iterable[Tensor], size: Tensor) -> Tensor:
    """The mean (B, K, C) of each cluster of tokens (B, N, C), rescaled to the mean length of its members.

    A plain mean is shorter than its members, and the blocks were trained on tokens of full length. length (B, N, 1),
    size (B, K), members (B, K, N), whole or in chunks of N. Source: ToFu (https://arxiv.org/abs/2312.01026).
    """
    # The sum replaces the mean, as it is rescaled, but not in float16, where it could overflow.
    divide = tokens.dtype == torch.float16
    total = None
    with without_autocast(tokens):  # which would round the prefix tokens too
        for member, (part, part_length) in zip(members, in_chunks(tokens.shape[2], tokens, length), strict=True):
            # Transposed, because a CPU multiplies a row by a matrix five times as fast as a matrix by a column.
            row, matrix = part_length.transpose(1, 2), member.transpose(1, 2)
            weight = (member / size.unsqueeze(2) if divide else member).to(tokens.dtype)
            if total is None:
                total, total_length = torch.bmm(weight, part), torch.bmm(row, matrix)
            else:
                total, total_length = torch.baddbmm(total, weight, part), torch.baddbmm(total_length, row, matrix)
    mean_length = total_length.transpose(1, 2) / size.unsqueeze(2)
    scale = mean_length / vector_length(total, size.dtype)
    return (total * scale).to(tokens.dtype)  # the scale of a sum of about 0 may be beyond float16


def merges_clusters(keep_ratio: float, previous: Selection | None) -> bool:
    """Whether a new selection merges the clusters of the previous one."""
    return previous is not None and previous.tokens is not None and keep_ratio < previous.keep_ratio


def make_clusters(
    tokens: Tensor, score: Tensor, k: int, keep_ratio: float, previous: Selection | None = None, prefix: int = 1
) -> tuple[Selection, Tensor | None]:
    """Cluster the patches of tokens (B, P + N, C) with a score (B, N), or the previous clusters, into k clusters.

    Each prefix token is a cluster of its own. At a lower keep ratio than before, the previous clusters are merged.
    Starting from the patches again costs more and is less close to dense (docs/log.md).

    Returns a selection whose tokens are the means of the clusters, and the one-hot matrix (B, P + K, P + N) of the
    tokens, in whose place is None after merging and on large grids.
    """
    if merges := merges_clusters(keep_ratio, previous):
        items, item_size = previous.tokens, previous.size
        # Members share a score, if blocks have updated it.
        total = score.gather(1, previous.kept) * item_size[:, prefix:]
    else:
        items, item_size, total = tokens, None, score
    length = vector_length(items, score.dtype)
    # A selection has no gradient. The means have one.
    kept, cluster = select_clusters(items[:, prefix:].detach(), length[:, prefix:].detach(), total.detach(), k)
    cluster, count = with_prefix(cluster, prefix), prefix + kept.shape[1]
    chunks = in_chunks(items.shape[2], cluster, *([item_size] if merges else []))
    if len(chunks) == 1:
        member = memberships(cluster, count, score.dtype, item_size)
        members, size = [member], member.sum(2)
    else:  # on large grids the one-hot matrix would dominate peak memory
        member, members = None, memberships_in_turn(chunks, count, score.dtype)
        weight = item_size if merges else torch.ones_like(cluster, dtype=score.dtype)
        size = score.new_zeros(score.shape[0], count).scatter_add(1, cluster, weight)
    means = cluster_means(items, length, members, size)
    if merges:  # from indices of clusters to those of patches
        kept, cluster, member = previous.kept.gather(1, kept), cluster.gather(1, previous.cluster), None
    return Selection(kept, score, cluster, means, size, keep_ratio), member


def move_clusters(selection: Selection, change: Tensor) -> Selection:
    """Move each cluster token by the mean of change (B, P + N, C), which its members made since the group."""
    tokens, size = selection.tokens, selection.size.unsqueeze(2)
    for cluster, part in in_chunks(change.shape[2], selection.cluster, change):
        weight = memberships(cluster, size.shape[1], size.dtype) / size
        tokens = tokens + torch.bmm(weight.to(tokens.dtype), part.to(tokens.dtype))
    return selection._replace(tokens=tokens)


# --- update


def run_blocks(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    places: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run blocks on tokens (B, P + n, C), and update the score (B, m) of the first m <= n patches."""
    for block, tradeoff in zip(blocks, tradeoffs, strict=True):
        if tradeoff is None:  # no selection reads this block's attention, so it is not computed
            tokens = block(tokens, places=places, attn_mask=attn_mask)
        else:
            tokens, attention = block(tokens, places=places, attn_mask=attn_mask, need_attention=True)
            if score is not None:
                attention = attention[:, : score.shape[1]]  # the one representative, the last token, has no score
            score = update_score(score, attention, tradeoff)
    return tokens, score


def update_group(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    keep_ratio: float,
    representative: str = 'none',
    selection: Selection | None = None,
    select_anew: bool = True,
    prefix: int = 1,
) -> tuple[Tensor, Tensor | None, Selection | None]:
    """Update all tokens by one group of blocks: informative patches go through the blocks, the others follow.

    Args:
        tokens: (B, P + N, C).
        score: (B, N), or None before the network's first block, where every patch is informative.
        blocks, tradeoffs: the group's blocks, and the weight of each block's class attention in the score; None if no
            selection reads it. If all are None, the score does not change.
        keep_ratio: int(N * keep_ratio) patches are informative; ValueError if that is 0 and N > 1.
        representative: 'none', 'one' or 'nearest', see above.
        selection: that of the previous group on this grid, None before the first. Blocks continue with its tokens, so
            after a change of `tokens`, call `move_clusters`.
        select_anew: select by the score, instead of continuing `selection`. At a lower keep ratio 'nearest' merges the
            clusters of `selection`.
        prefix: P, the number of prefix tokens; they go through all blocks.

    Returns tokens (B, P + N, C) in the same order, score (B, N) and the selection, None if every patch is informative.

    Source: paper, section 3.2 and figure 3. The original sorts tokens; gathering them computes the same.
    """
    representative = check_representative(representative)
    n = tokens.shape[1] - prefix
    if keep_ratio == 1:
        return *run_blocks(tokens, score, blocks, tradeoffs), None
    k = num_informative(n, keep_ratio)
    select_anew = select_anew or selection is None
    if representative == 'nearest' and k != 0:  # k = 0 only for a grid of one patch, which has no representative
        member = None
        if select_anew:
            selection, member = make_clusters(tokens, score, k, keep_ratio, selection, prefix)
        elif selection.tokens is None:
            raise ValueError("selection: expected one that a group with 'nearest' returned, found one without tokens")
        return _evolve_clusters(tokens, score, selection, member, blocks, tradeoffs, prefix)
    if select_anew:
        selection = Selection(select(score, k), score, keep_ratio=keep_ratio)
    represent = representative == 'one'
    return *_evolve_kept(tokens, score, selection.kept, blocks, tradeoffs, prefix, represent), selection


def _evolve_kept(
    tokens: Tensor,
    score: Tensor,
    kept: Tensor,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    prefix: int,
    represent: bool,
) -> tuple[Tensor, Tensor]:
    """Update the kept patches; the others stay as they are or, with `represent`, follow their one representative."""
    k = kept.shape[1]
    # Prefix tokens travel with the informative patches, so one gather and one scatter move them all.
    index = with_prefix(kept, prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    informative = tokens.gather(1, index)
    if represent:  # as the last token, which every block updates like the others
        before = weighted_mean(tokens[:, prefix:], score, kept)
        informative = torch.cat([informative, before], 1)
    informative, kept_score = run_blocks(informative, score.gather(1, kept), blocks, tradeoffs, kept)
    if represent:
        # The fast update: placeholders receive what the group added to their representative. All tokens receive it, as
        # the scatter overwrites the others.
        tokens = tokens + (informative[:, prefix + k :] - before)
        informative = informative[:, : prefix + k]
    return tokens.scatter(1, index, informative.to(tokens.dtype)), score.scatter(1, kept, kept_score)


def _evolve_clusters(
    tokens: Tensor,
    score: Tensor,
    selection: Selection,
    member: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    prefix: int,
) -> tuple[Tensor, Tensor, Selection]:
    """Update the token of each cluster; every patch receives the update of its cluster.

    member: the one-hot matrix (B, P + K, P + N) of the clusters, if there is one already.
    """
    before, cluster, size = selection.tokens, selection.cluster, selection.size
    read = [t for t in tradeoffs if t is not None]
    # A cluster token draws the attention of all its members, so blocks update the sum of their scores. It is not
    # needed if the first attention overwrites it.
    sums = len(read) > 0 and not (isinstance(read[0], float) and read[0] == 1)
    # Products with the one-hot matrix sum over members. Sums by index, also in the gradient of a gather, are atomic on
    # GPUs and differ between runs. On large grids the matrix would dominate peak memory.
    if member is None and (sums or torch.is_grad_enabled()) and len(in_chunks(tokens.shape[2], cluster)) == 1:
        member = memberships(cluster, size.shape[1], size.dtype)
    total = None
    if sums:
        if member is None:
            total = torch.zeros_like(size).scatter_add(1, cluster[:, prefix:], score)[:, prefix:]
        else:
            with without_autocast(score):  # which would round it to half precision
                total = torch.bmm(score.unsqueeze(1), member[:, prefix:, prefix:].transpose(1, 2)).squeeze(1)
    mask = log_size_mask(size, attention_dtype(tokens))
    after, total = run_blocks(before, total, blocks, tradeoffs, selection.kept, mask)
    if read:
        # Members share the score of their cluster.
        score = (total / size[:, prefix:]).gather(1, cluster[:, prefix:] - prefix)
    change = (after - before).to(tokens.dtype)
    if member is None or not torch.is_grad_enabled():  # faster than a product, but its gradient is a sum by index
        tokens = tokens + gather_tokens(change, cluster)
    else:
        with without_autocast(tokens):  # which would round the sum, the residual stream, to half precision
            tokens = torch.baddbmm(tokens, member.to(tokens.dtype).transpose(1, 2), change)
    return tokens, score, selection._replace(tokens=after)


def log_size_mask(size: Tensor, dtype: torch.dtype, prefix: int = 0) -> Tensor:
    """The log of sizes (B, n) as an additive mask (B, 1, 1, P + n), 0 for the prefix.

    Attention then counts a token that represents s patches s times. Source: proportional attention of ToMe
    (https://arxiv.org/abs/2210.09461).
    """
    # Fused kernels on GPUs need rows aligned to 8 numbers; otherwise they copy the mask in each block.
    n = prefix + size.shape[1]
    padding = 0 if size.device.type == 'cpu' or torch.compiler.is_exporting() else -n % 8
    mask = size.log().to(dtype)
    if prefix or padding:
        mask = F.pad(mask, (prefix, padding))
    return mask[:, None, None, :n]


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention on x is computed, autocast's if it is on. Masks should have it."""
    kind = x.device.type
    if kind != 'meta' and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which products are computed in the dtype of their factors; x tells the device."""
    # Nothing if autocast is off, so that exported graphs are free of it.
    kind = x.device.type
    enabled = kind != 'meta' and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Indices (B, m) of patches to indices (B, P + m) of tokens, with all prefix tokens first."""
    index = F.pad(index + prefix, (prefix, 0))
    if prefix > 1:
        index = index + F.pad(torch.arange(prefix, device=index.device), (0, index.shape[1] - prefix))
    return index

"""Slow-fast token evolution: the method of Evo-ViT (https://arxiv.org/abs/2108.01390) as pure functions.

A group of blocks selects its *informative* patches by the attention that the class token pays to them. These go through
every block of the group. The others, the *placeholders*, follow a representative: each receives what the group added to
the token that stands for it. Who stands for a placeholder is a choice:

    'none'      nobody: placeholders stay as they are (the original Evo-DeiT).
    'one'       one token for all placeholders, their mean weighted by score (the paper, the original Evo-LeViT).
    'nearest'   the informative patch with the most similar features. Each informative patch becomes the mean of its
                cluster, and counts in attention as often as the cluster has members. This needs no training.

Patches are gathered before the group and put back after it. So they stay in raster order, nothing is sorted, the grid
is whole after every group, and only the score goes from one group to the next.

Shapes: B batch, P prefix tokens (class token first), N patches, K informative patches, n patches of a sequence,
C channels, H heads, D channels of a head.
    tokens      (B, P + N, C)
    score       (B, N)          class attention so far, at least float32
    kept        (B, K)          raster indices of the informative patches, int64, in no particular order
    cluster     (B, N)          for each patch, which of the K informative patches represents it, int64
    size        (B, K)          how many patches an informative patch represents, itself included
    attn_mask   (B, 1, 1, P + n)    added to the attention logits: the log of the sizes
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REPRESENTATIVES = ('none', 'one', 'nearest')

# How much of a block's class attention enters the score: a constant, a learned scalar, or None where nobody reads it.
Tradeoff = float | Tensor | None

# block(tokens, places=..., attn_mask=..., need_attention=...) maps tokens (B, P + n, C) to tokens of the same shape.
#   places (B, m), m <= n: raster indices of the first m patches, for positions that rotate queries and keys; None where
#   all patches stand in order. attn_mask: see above, or None. With need_attention it returns tokens and the attention
#   (B, n) that the class token pays to the patches.
Block = Callable[..., Tensor | tuple[Tensor, Tensor]]


class Group(NamedTuple):
    """Blocks `start` to `stop` (exclusive) that share one selection; `select` is False where the last one goes on."""

    start: int
    stop: int
    keep_ratio: float
    select: bool = True


class Selection(NamedTuple):
    """What one selection chose: kept (B, K), the score (B, N) that it chose by, and cluster (B, N) for 'nearest'.

    tokens (B, K, C): what stands for the clusters after the group, for the next group if the selection goes on there.
    """

    kept: Tensor
    score: Tensor
    cluster: Tensor | None = None
    tokens: Tensor | None = None


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


def num_informative(n: int, keep_ratio: float) -> int:
    """How many of n patches are informative: int(n * keep_ratio). ValueError if that is 0 and n > 1."""
    # Rounded down from a product of floats, so int(100 * 0.29) is 28: the original code counts like this, and another
    # rounding would select other patches with its checkpoints.
    if not 0 < keep_ratio <= 1:
        raise ValueError(f'keep_ratio: expected a value in (0, 1], found {keep_ratio}')
    if isinstance(n, torch.SymInt):  # an exported program computes K from the image that it gets
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
    """Cut a list of `depth` blocks into groups.

    Layer-wise selection (before every block) and stage-wise selection (before every stage) are two ways to cut the
    same list.

    Args:
        stages: the first block of each stage that evolves, ascending; the blocks before see every patch.
        keep_ratio: the fraction of informative patches in each of these stages.
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


def drop_unread(tradeoffs: Sequence[Tradeoff], groups: Sequence[Group]) -> list[Tradeoff]:
    """The tradeoff of each block, None where no selection reads its attention, which then need not be computed.

    That is so after the last selection, and before a constant tradeoff of 1, which overwrites the score.
    """
    tradeoffs, read = list(tradeoffs), False
    for start, stop, ratio, select in reversed(groups):
        for i in reversed(range(start, stop)):
            overwrites = isinstance(tradeoffs[i], float) and tradeoffs[i] == 1
            if not read:
                tradeoffs[i] = None
            elif overwrites:
                read = False
        read = read or (select and ratio < 1)
    return tradeoffs


# --- select


def class_attention(q: Tensor, k: Tensor, scale: float, attn_mask: Tensor | None = None, prefix: int = 1) -> Tensor:
    """Attention of the class token to the patches, for each head.

    q (B, H, 1, D) is its query, k (B, H, P + n, D) are all keys; returns (B, H, n). At least in float32: in half
    precision equal scores would be common, and a selection between equals is arbitrary.
    """
    if attention_dtype(q) in (torch.float16, torch.bfloat16):
        # Autocast leaves a sum of products alone. A compiler fuses it; in eager mode it is one float32 tensor of keys.
        logits = (q.float() * scale * k).sum(-1)
    else:
        logits = ((q * scale) @ k.transpose(-2, -1))[:, :, 0]
    if attn_mask is not None:
        logits = logits + attn_mask[:, :, 0]
    return logits.softmax(-1)[..., prefix:]


def update_score(score: Tensor | None, attention: Tensor, tradeoff: float | Tensor) -> Tensor:
    """Moving average of class attentions; the first attention of a network is the score."""
    if score is None or (isinstance(tradeoff, float) and tradeoff == 1):
        return attention
    return (1 - tradeoff) * score + tradeoff * attention


def select(score: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k patches with the highest score (B, N)."""
    return score.topk(k, dim=1, sorted=False).indices


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, n, C) of x (B, N, C) at index (B, n)."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), index]


def novelty(cosine: Tensor, weight_i: Tensor, weight: Tensor) -> Tensor:
    """How little a patch resembles those of higher weight: (B, n), from 0 (one is the same) to 1 (none is similar).

    cosine (B, n, N): between n of the patches, whose weights are weight_i (B, n), and all, with weight (B, N). Novelty
    is 1 minus the highest cosine, at least 0, to a patch of higher weight: that one can represent it. So the peaks of
    weight * novelty are the centers of density peak clustering (Rodriguez and Laio, 2014), with `weight` as density.
    """
    # 1 where j has the higher weight, else 0: on CPUs differences and signs are several times faster than booleans.
    higher = (weight.unsqueeze(1) - weight_i.unsqueeze(2)).sign_().relu_()
    return 1 - higher.to(cosine.dtype).mul_(cosine).amax(2)


def select_clusters(patches: Tensor, length: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k patches (B, N, C) with the highest score * length * novelty^3, (B, K), and the clusters around them (B, N).

    The weight in `novelty` is score * length. Members of a cluster have one score; their lengths (B, N, 1) differ, so
    the order of patches does not matter. A patch belongs to the informative patch with the highest cosine, and an
    informative patch to its own cluster.
    """
    unit = (patches / length).to(patches.dtype)
    weight = score * length.squeeze(2)

    if patches.shape[1] <= 4 * patches.shape[2] and not torch.compiler.is_exporting():
        cosine = unit @ unit.transpose(1, 2)
        kept = select(weight * novelty(cosine, weight, weight).to(weight.dtype) ** 3, k)
        cosine.diagonal(dim1=1, dim2=2).fill_(2)
        columns = kept.unsqueeze(1).expand(-1, cosine.shape[1], -1)
        return kept, cosine.gather(2, columns).max(2).indices  # on CPUs `max` is faster than `argmax`
    chunks = in_chunks(patches.shape[2], unit, weight)
    new = torch.cat([novelty(u @ unit.transpose(1, 2), w, weight) for u, w in chunks], 1)
    kept = select(weight * new.to(weight.dtype) ** 3, k)
    informative = gather_tokens(unit, kept).transpose(1, 2)
    cluster = torch.cat([(u @ informative).max(2).indices for u, _ in chunks], 1)
    return kept, cluster.scatter(1, kept, torch.arange(k, device=kept.device).expand_as(kept))


def in_chunks(channels: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors (B, N, ...) in parts along N.

    In large grids a matrix (N, N) would be the peak of memory. One of a part takes no more than the hidden layer of an
    MLP, (N, 4 * C). A program for free sizes cannot loop over parts.
    """
    if torch.compiler.is_exporting() or tensors[0].shape[1] <= 4 * channels:
        return [tensors]
    return list(zip(*(x.split(4 * channels, 1) for x in tensors), strict=True))


def vector_length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths (B, N, 1) of vectors (B, N, C), above 0, so that one can divide by them."""
    return torch.linalg.vector_norm(x, dim=2, keepdim=True, dtype=dtype).clamp(min=1e-12)


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
    # Not `ones_like`: the older ONNX exporter takes its batch size for a constant.
    placeholder = (0 * score + 1).scatter(1, kept, 0.0)
    weight = replace_zeros(score.scatter(1, kept, 0.0), placeholder)
    weight = weight / weight.sum(1, keepdim=True)
    return weight.unsqueeze(1).to(patches.dtype) @ patches


def memberships(cluster: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Clusters (B, N) as a matrix (B, K, N): 1 where a patch is a member, else 0. Its row sums are the sizes."""
    zeros = torch.zeros(cluster.shape[0], k, cluster.shape[1], dtype=dtype, device=cluster.device)
    return zeros.scatter(1, cluster.unsqueeze(1), 1)


def memberships_in_turn(chunks: Iterable[tuple[Tensor]], k: int, dtype: torch.dtype) -> Iterable[Tensor]:
    """`memberships` of chunks of clusters, one at a time, so that only one matrix exists."""
    for (cluster,) in chunks:
        yield memberships(cluster, k, dtype)


def cluster_means(patches: Tensor, length: Tensor, members: Iterable[Tensor], size: Tensor) -> Tensor:
    """Means (B, K, C) of the patches (B, N, C) of each cluster, as long as its members are on average.

    length (B, N, 1), size (B, K), members (B, K, N), whole or in chunks of N. A plain mean is shorter than its members,
    and the blocks were trained on tokens of full length. Source: ToFu (https://arxiv.org/abs/2312.01026).
    """
    mean = None
    for member, (part, part_length) in zip(members, in_chunks(patches.shape[2], patches, length), strict=True):
        # Weights that add up to 1, in place of sums, which could overflow in half precision.
        share = member / size.unsqueeze(2)
        half = share.to(patches.dtype)
        if mean is None:
            mean, mean_length = half @ part, share @ part_length
        else:
            mean, mean_length = torch.baddbmm(mean, half, part), torch.baddbmm(mean_length, share, part_length)
    return mean * (mean_length / vector_length(mean, size.dtype)).to(mean.dtype)


# --- update


def run_blocks(
    tokens: Tensor,
    score: Tensor | None,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    places: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Send tokens (B, P + n, C) through blocks, and update the score (B, m) of the first m <= n patches among them."""
    for block, tradeoff in zip(blocks, tradeoffs, strict=True):
        if tradeoff is None:  # nobody reads the attention of this block, so it is not computed
            tokens = block(tokens, places=places, attn_mask=attn_mask)
        else:
            tokens, attention = block(tokens, places=places, attn_mask=attn_mask, need_attention=True)
            if score is not None:
                attention = attention[:, : score.shape[1]]
            score = update_score(score, attention, tradeoff)
    return tokens, score


def evolve(
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
    """Update all tokens by one group of blocks: informative patches go through them, the others follow.

    Args:
        tokens: (B, P + N, C).
        score: (B, N), or None before the first block of a network, where every patch is informative.
        blocks, tradeoffs: the group's blocks, and for each how much of its class attention enters the score; None
            where nobody reads it. Where all are None the score stays as it is.
        keep_ratio: int(N * keep_ratio) patches are informative; ValueError if that is none of several.
        representative: 'none', 'one' or 'nearest', see above.
        selection: that of the group before, None before the first; select_anew: let the score choose another one.
        prefix: P, how many tokens stand before the patches; all of them go through the blocks.

    Returns:
        tokens (B, P + N, C) in the order they came, score (B, N), and the selection, None where all patches are
        informative.

    Source: paper, section 3.2 and figure 3. The original code sorts tokens; gathering them gives the same function.
    """
    representative = check_representative(representative)
    n = tokens.shape[1] - prefix
    if keep_ratio == 1:
        return *run_blocks(tokens, score, blocks, tradeoffs), None
    k = num_informative(n, keep_ratio)
    if select_anew:
        selection = None
    if representative == 'nearest' and k != 0:  # where no patch is informative there is none to represent another
        return _evolve_clusters(tokens, score, selection, k, blocks, tradeoffs, prefix)
    selection = selection or Selection(select(score, k), score)
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
    """Update the kept patches; the others wait or, with `represent`, move as their one representative does."""
    k = kept.shape[1]
    # The prefix tokens travel with the informative patches, so one gather and one scatter move them all.
    index = with_prefix(kept, prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    informative = tokens.gather(1, index)
    if represent:
        before = weighted_mean(tokens[:, prefix:], score, kept)
        informative = torch.cat([informative, before], 1)
    informative, kept_score = run_blocks(informative, score.gather(1, kept), blocks, tradeoffs, kept)
    if represent:
        tokens = tokens + (informative[:, prefix + k :] - before)
        informative = informative[:, : prefix + k]
    return tokens.scatter(1, index, informative.to(tokens.dtype)), score.scatter(1, kept, kept_score)


def _evolve_clusters(
    tokens: Tensor,
    score: Tensor,
    selection: Selection | None,
    k: int,
    blocks: Sequence[Block],
    tradeoffs: Sequence[Tradeoff],
    prefix: int,
) -> tuple[Tensor, Tensor, Selection]:
    """Update the mean of each cluster; every patch moves as the mean of its cluster does."""
    patches, read = tokens[:, prefix:], [t for t in tradeoffs if t is not None]
    length = vector_length(patches, score.dtype)
    if selection is None:
        kept, cluster = select_clusters(patches.detach(), length.detach(), score.detach(), k)
        selection = Selection(kept, score, cluster)
    kept, scored_by, cluster, means = selection
    k, chunks = kept.shape[1], in_chunks(patches.shape[2], cluster)
    if len(chunks) == 1:
        member = memberships(cluster, k, score.dtype)
        members, size = [member], member.sum(2)
    else:  # in large grids a matrix (K, N) would be the peak of memory
        member, members = None, memberships_in_turn(chunks, k, score.dtype)
        size = torch.zeros_like(score[:, :k]).scatter_add(1, cluster, torch.ones_like(score))
    if means is None:
        means = cluster_means(patches, length, members, size)
    del length, members
    before = torch.cat([tokens[:, :prefix], means], 1)
    # The class token attends to a cluster as to all its members together, so the blocks update the sum of their scores;
    # but not where the first attention that enters overwrites it.
    total = None
    if read and not (isinstance(read[0], float) and read[0] == 1):
        if member is None:
            total = torch.zeros_like(size).scatter_add(1, cluster, score)
        else:
            total = (member @ score.unsqueeze(2)).squeeze(2)
    mask = log_size_mask(size, prefix, attention_dtype(tokens))
    after, total = run_blocks(before, total, blocks, tradeoffs, kept, mask)
    if read:
        score = (total / size).gather(1, cluster)
    change = (after[:, prefix:] - means).to(patches.dtype)
    if member is None:
        patches = patches + gather_tokens(change, cluster)
    else:
        # The product with the one-hot matrix gives each patch the change of its cluster, forward and backward, without
        # the atomic sums of a gather's gradient.
        back = member.to(patches.dtype).transpose(1, 2)
        if attention_dtype(patches) == patches.dtype:
            patches = torch.baddbmm(patches, back, change)
        else:  # autocast would round the sum, the residual stream, to half precision too
            patches = patches + back @ change
    tokens = torch.cat([after[:, :prefix].to(tokens.dtype), patches], 1)
    return tokens, score, Selection(kept, scored_by, cluster, after[:, prefix:])


def log_size_mask(size: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """The log of sizes (B, K) as an additive mask (B, 1, 1, P + K) with 0 for the prefix: a token that stands for s
    patches is attended as s patches are. Source: proportional attention of ToMe (https://arxiv.org/abs/2210.09461).
    """
    # Fused kernels on GPUs want rows that begin at multiples of 8 numbers, and would copy the mask in each block.
    n = prefix + size.shape[1]
    spare = 0 if torch.compiler.is_exporting() else -n % 8
    mask = F.pad(size.log().to(dtype), (prefix, spare))
    return mask[:, None, None, :n]


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype of queries that a linear layer makes of x, which a mask should have: that of autocast if it is on."""
    kind = x.device.type
    if kind != 'meta' and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Indices (B, m) of patches, or of anything that stands behind P prefix tokens, to those of all (B, P + m)."""
    first = torch.arange(prefix + index.shape[1], device=index.device).clamp(max=prefix)  # 0 to P - 1, then P
    return F.pad(index, (prefix, 0)) + first

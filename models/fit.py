"""`fit_schedule`: choose the stages and keep ratios with which an evolved ViT stays closest to the dense model.

Candidates are few and smooth, have equal MACs, and must beat the default by a margin, so as not to overfit to a few
dozen images.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import evolution
from .vit import EvolvingViT, evolve, why_not

# The keep ratio of stage i (0, 1, 2) as a function of t in (0, 1): it falls geometrically, or linearly.
SHAPES: tuple[Callable[[float, int], float], ...] = (lambda t, i: t ** (i + 1), lambda t, i: 1 - (1 - t) * (i + 1))
# Another schedule must beat the default by this many standard errors: 95 % after Bonferroni, for about 20 candidates.
MARGIN = 3.0


@torch.no_grad()
def fit_schedule(model: nn.Module, images: Tensor, fraction: float = 0.66, batch_size: int = 16) -> nn.Module:
    """Evolve a ViT of timm, in place, with the schedule closest to the dense model at a fraction of its MACs.

    The model gets representative 'nearest' and stage-wise selection. The distance is the KL divergence between
    predictions or, without a head, the mean cosine distance between final tokens. The default schedule, scaled to the
    fraction, stays unless the best other one is significantly closer.

    Args:
        images: about 64, (n, channels, height, width), preprocessed as for inference, without labels.
        fraction: MACs of embedding and blocks, as a fraction of the dense model's.

    Returns the model. ValueError for a fraction that no schedule reaches, and for what `evolve` refuses.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f'images: expected several, (n, channels, height, width), found {tuple(images.shape)}')
    if reason := why_not(model):
        raise ValueError(f'{type(model).__name__} cannot be evolved: {reason}')
    n = math.prod(model.patch_embed.dynamic_feat_size(images.shape[-2:]))
    schedules = candidates(model, n, fraction)
    weight, evolved = next(model.parameters()), evolve(copy.deepcopy(model)).eval()  # an error changes nothing
    batches = (batch.to(weight.device, weight.dtype) for batch in images.split(batch_size))
    found = torch.cat([distances(evolved, batch, schedules) for batch in batches], 1)
    best = int(found.mean(1).argmin())
    gain = found[0] - found[best]
    if gain.mean() <= MARGIN * gain.std() / len(gain) ** 0.5:
        best = 0
    stages, ratios = schedules[best]
    return evolve(model, ratios, stages)


def candidates(model: EvolvingViT, n: int, fraction: float) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Stages and keep ratios at a fraction of dense MACs, within 2 % or one of n patches; the first is the default."""

    def default(t: float, i: int) -> float:
        distance = min(0.2, 0.4 * t)
        return min(t + distance, 1.0) if i == 0 else t - distance

    depth = len(model.blocks)
    family = [((depth // 3, 2 * depth // 3), default)]
    for first in sorted({max(1, round(depth * part / 12)) for part in (3, 4, 5, 6)}):
        for count in (1, 2, 3):
            stages = tuple(round(first + i * (depth - first) / count) for i in range(count))
            if len({*stages, depth}) > count:  # stages coincide in networks of few blocks
                family += [(stages, shape) for shape in SHAPES[: 2 if count > 1 else 1]]
    target, found = fraction * count_macs(model, n, (), ()), []
    for stages, shape in family:
        # Bisect t, as MACs rise with it.
        low, high = 0.0, 1.0
        for _ in range(20):
            t = (low + high) / 2
            ratios = tuple(round(shape(t, i), 3) for i in range(len(stages)))
            enough = min(ratios) * n >= 1
            low, high = (low, t) if enough and count_macs(model, n, stages, ratios) > target else (t, high)
        if enough and abs(count_macs(model, n, stages, ratios) / target - 1) <= max(0.02, 1 / n):
            found.append((stages, ratios))
        elif shape is default:
            raise ValueError(f'fraction: expected a fraction of MACs that keep ratios can reach, found {fraction}')
    return found


def count_macs(model: EvolvingViT, n: int, stages: Sequence[int], ratios: Sequence[float]) -> int:
    """MACs of embedding and blocks for an image of n patches, with 'nearest'."""
    channels, prefix = model.embed_dim, model.num_prefix_tokens
    total = n * sum(p.numel() for p in model.patch_embed.parameters() if p.ndim > 1)
    previous, m = 1.0, n
    for start, stop, ratio, _ in evolution.partition(len(model.blocks), stages, ratios):
        k = evolution.num_informative(n, ratio)
        if ratio < 1:  # class attention, then similarities and means of patches or of previous clusters
            total += (prefix + m) * channels
            m = m if ratio < previous < 1 else n  # see evolution.merges_clusters
            total += m * m * channels + (prefix + k) * (prefix + m) * (channels + 1)
            if m > evolution.CHUNK * channels:  # similarities to the selected are computed again
                total += m * k * channels
        previous, m = ratio, k
        tokens = prefix + k
        for block in model.blocks[start:stop]:
            weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
            attention = 2 * tokens * block.attn.num_heads * block.attn.head_dim
            total += tokens * (weights + attention)
    return total


def distances(model: EvolvingViT, images: Tensor, schedules: Sequence[tuple]) -> Tensor:
    """The distances (S, B) from the dense model of S schedules, on images (B, channels, height, width)."""
    tokens, blocks = model.prepare(images)
    # Blocks before the first stage are dense, so they run once for all schedules.
    firsts, states, score = {stages[0] for stages, _ in schedules}, {}, None
    for i, block in enumerate(blocks):
        if i in firsts:
            states[i] = tokens, score
        tokens, score = evolution.run_blocks(tokens, None, [block], [1.0 if i + 1 in firsts else None])
    dense, found = model.norm_tokens(tokens), []
    for stages, ratios in schedules:
        (tokens, score), selection = states[stages[0]], None
        groups = evolution.partition(len(blocks), stages, ratios)
        tradeoffs = evolution.drop_unread(model.tradeoffs(), groups)
        for start, stop, ratio, _ in groups[1:]:
            part = blocks[start:stop], tradeoffs[start:stop], ratio, 'nearest'
            tokens, score, selection = evolution.update_group(
                tokens, score, *part, selection, prefix=model.num_prefix_tokens
            )
        found.append(distance(model, dense, model.norm_tokens(tokens)))
    return torch.stack(found).float().cpu()


def distance(model: EvolvingViT, dense: Tensor, evolved: Tensor) -> Tensor:
    """KL divergence of predictions or, without a head, cosine distance (B,), from tokens (B, P + N, C) of both."""
    if not model.num_classes:
        return 1 - F.cosine_similarity(dense, evolved, dim=-1).mean(1)
    p, q = (model.forward_head(tokens).float().log_softmax(-1) for tokens in (dense, evolved))
    return F.kl_div(q, p, reduction='none', log_target=True).sum(-1)

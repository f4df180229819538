"""Slow-fast evolution for networks: what every one of them shares, and `evolve`, which gives it to any ViT of timm.

    model = evolve(timm.create_model('deit_tiny_patch16_224', pretrained=True))

`Evolving.evolve` is the forward pass: it cuts the list of blocks into groups and hands each to `update_group`. That is
evolution.evolve, where tokens are selected; for another criterion, or another method such as ToMe, it is another
function with the same signature (see rivals.py).

Shapes: B batch, P prefix tokens, N patches, n of them in a sequence, C channels, H heads, D channels of a head.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import index
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, PatchEmbed, apply_rot_embed_cat
from timm.models import Eva, VisionTransformer, register_model
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import evolution
from .evolution import Group, Selection, Slow


def to_floats(name: str, value: float | Sequence[float] | np.ndarray | Tensor) -> list[float]:
    """One number or several, Python's, NumPy's or torch's, as a list; ValueError with `name` for anything else.

    In single precision a number counts as it prints: 0.7 is 0.7, not 0.69999999, which could keep one patch less.
    """
    try:
        return [float(str(np.asarray(x))) for x in (value if np.ndim(value) else [value])]
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name}: expected numbers, found {value!r}') from error


class Evolving:
    """A network whose blocks evolve tokens: its schedule, and the loop over its groups of blocks.

    Attributes; all but `first_blocks` may be changed at any time:
        first_blocks: the first block of each stage, counted over the network; the blocks before see every patch.
        keep_ratio: share of informative patches, a tuple with one number for each stage.
        representative: who represents placeholders: 'none', 'one' or 'nearest'.
        stage_wise: select before each stage, or before each of its blocks.
        evolving: False makes every block see every patch.
        update_group: what happens to a group of blocks; evolution.evolve, or another function with its signature.

    A network calls `init_evolution` once it has its blocks, and has `prepare` and `tradeoffs`. One whose grid changes
    on the way has `block_names`, `new_grids` and `change_grid` too.
    """

    update_group: Callable = staticmethod(evolution.evolve)

    def init_evolution(self, keep_ratio: float | Sequence[float], stages: Sequence[int], representative: str | bool):
        """Set the schedule; ValueError for one that cannot be."""
        depth = len(self.block_names())
        try:
            stages = tuple(index(block) for block in stages)
        except TypeError as error:
            raise ValueError(f'stages: expected indices of blocks, such as (4, 8), found {stages}') from error
        if list(stages) != sorted(set(stages)) or not all(0 < block < depth for block in stages):
            raise ValueError(
                f'stages: expected ascending indices of blocks, from 1 (the first selection needs a score) to '
                f'{depth - 1}, found {stages}'
            )
        self.first_blocks = stages
        self.representative, self.keep_ratio = representative, keep_ratio
        self.stage_wise, self.evolving = True, True

    @property
    def representative(self) -> str:
        return self._representative

    @representative.setter
    def representative(self, value: str | bool):
        self._representative = evolution.check_representative(value)

    @property
    def keep_ratio(self) -> tuple[float, ...]:
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float | Sequence[float]):
        ratios = evolution.check_keep_ratio(to_floats('keep_ratio', value), len(self.first_blocks))
        for block, ratio in zip(self.first_blocks, ratios, strict=True):
            evolution.informative(self.num_patches(block), ratio)
        self._keep_ratio = ratios

    @property
    def method(self) -> str:
        """What `update_group` is called: 'evolve', or a rival."""
        update = getattr(self.update_group, 'func', self.update_group)  # arguments may be bound to it
        return getattr(update, '__name__', type(update).__name__)

    def load_schedule(self, schedule: dict):
        """Take over what `schedule` gave of another model; ValueError for one that cannot be."""
        self.init_evolution(schedule['keep_ratio'], schedule['stages'], schedule['representative'])
        self.stage_wise, self.evolving = schedule['stage_wise'], schedule['evolving']

    def set_schedule(self, stage_wise: bool, evolving: bool = True):
        """Choose when to select."""
        self.stage_wise, self.evolving = stage_wise, evolving

    def schedule(self) -> dict:
        """All that says when, how much and how the model evolves, as plain data; `method` where it is another one."""
        schedule = {
            'stage_wise': self.stage_wise,
            'evolving': self.evolving,
            'stages': list(self.first_blocks),
            'keep_ratio': list(self.keep_ratio),
            'representative': self.representative,
        }
        if self.method == 'evolve':
            return schedule
        merge_r = getattr(self.update_group, 'keywords', {}).get('r')
        return schedule | {'method': self.method} | ({} if merge_r is None else {'merge_r': merge_r})

    def block_names(self) -> list[str]:
        """The names of all blocks, in order."""
        return [f'blocks.{i}' for i in range(len(self.blocks))]

    def num_patches(self, block: int) -> int:
        """How many patches a block sees in images of the size that the model was made for."""
        return self.patch_embed.num_patches

    def new_grids(self) -> list[int]:
        """The blocks before which the grid changes."""
        return []

    def recomputed(self, function: Callable) -> Callable:
        """The function, run again in the backward pass where gradient checkpointing is on; so are parts of a block."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return function
        again = partial(checkpoint, function, use_reentrant=False)
        for part in ('attend', 'feed_forward'):  # some rivals work between these
            if hasattr(function, part):
                setattr(again, part, partial(checkpoint, getattr(function, part), use_reentrant=False))
        return again

    def groups(self, cuts: Sequence[int] = ()) -> list[Group]:
        """The blocks as groups that share a selection; a group also ends after each of the blocks `cuts`."""
        depth = len(self.block_names())
        stages = [block for block in self.first_blocks if block < depth] if self.evolving else []  # timm may cut blocks
        ratios = self.keep_ratio[: len(stages)]
        return evolution.partition(depth, stages, ratios, self.stage_wise, self.new_grids(), cuts)

    def evolve(
        self, images: Tensor, out_indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor, dict[str, Selection], list[Tensor]]:
        """Embed images (B, channels, height, width) and run all blocks.

        Returns tokens (B, P + N, C), the selections by the name of the group's first block, and the tokens after each
        of the blocks `out_indices`; with `stop_early`, blocks after the last of these are left out.
        """
        tokens, blocks = self.prepare(images)
        blocks = [self.recomputed(block) for block in blocks]
        names, tradeoffs, groups = self.block_names(), self.tradeoffs(), self.groups(out_indices)
        last_selection = max([g.start for g in groups if g.select and g.keep_ratio < 1], default=0)
        update_group = self.update_group if self.evolving else evolution.evolve  # merging has no stages to leave out
        score, selection, selections, outputs = None, None, {}, []
        for start, stop, ratio, select in groups:
            if stop_early and start > max(out_indices):
                break
            if start in self.new_grids():
                tokens, score = self.change_grid(start, tokens, score if start <= last_selection else None)
            tokens, score, selection = update_group(
                tokens,
                score,
                blocks[start:stop],
                tradeoffs[start:stop],
                ratio,
                self.representative,
                selection,
                select,
                need_score=start < last_selection,
                prefix=self.num_prefix_tokens,
            )
            if select and selection is not None:
                selections[names[start]] = Selection(*selection[:3])  # a method may keep more in its own
            if stop - 1 in out_indices:
                outputs.append(tokens)
        return tokens, selections, outputs

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's output, and for each selection {'blocks.4': kept (B, K)}: raster indices, int64, ascending."""
        tokens, selections, _ = self.evolve(images)
        output = self.forward_head(self.norm_tokens(tokens))
        return output, {name: selection.kept.sort(1).values for name, selection in selections.items()}

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        """What stands between the blocks and the head."""
        return self.norm(tokens)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images to all tokens, the whole grid in raster order: (B, P + N, C)."""
        return self.norm_tokens(self.evolve(images)[0])

    def feature_levels(self, images: Tensor) -> list[tuple[int, tuple[int, int]]]:
        """What `forward_intermediates` can return: after which block, and its grid (rows, columns)."""
        grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        return [(block, grid) for block in range(len(self.blocks))]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
    ):
        """timm's interface: the whole grids after the chosen blocks, in Evo-LeViT after the chosen stages.

        Returns what timm's VisionTransformer does: (features, intermediates), the intermediates alone, or a dictionary;
        each (B, C, rows, columns) or (B, N, C). ValueError for an attention mask.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt: expected NCHW or NLC, found {output_fmt}')
        if attn_mask is not None:
            raise ValueError('attn_mask: expected none, as it would not be computed')
        levels = self.feature_levels(x)
        chosen = [levels[i] for i in sorted(feature_take_indices(len(levels), indices, as_set=True)[0])]
        x, _, outputs = self.evolve(x, [block for block, _ in chosen], stop_early)
        outputs = [self.norm(tokens) if norm else tokens for tokens in outputs]
        prefix, patches = zip(*(t.tensor_split([self.num_prefix_tokens], 1) for t in outputs), strict=True)
        if output_fmt == 'NCHW':
            patches = [t.mT.unflatten(-1, grid).contiguous() for t, (_, grid) in zip(patches, chosen, strict=True)]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            out = {'image_intermediates': list(patches)}
            out |= {'image_intermediates_prefix': list(prefix)} if return_prefix_tokens else {}
            return out if intermediates_only else out | {'image_features': self.norm_tokens(x)}
        intermediates = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else list(patches)
        return intermediates if intermediates_only else (self.norm_tokens(x), intermediates)

    def forward(self, images: Tensor):
        """Images (B, channels, height, width) to what the head makes of them, logits (B, classes) in evaluation."""
        return self.forward_head(self.forward_features(images))


class SavedEvolution(Evolving):
    """A published network: its schedule is saved with its weights, and `fuse` makes it ready for inference."""

    saved_attributes = 'stage_wise', 'evolving'
    fused = False

    def get_extra_state(self) -> Tensor:
        """The schedule as a tensor: it goes wherever a state dict goes, and is read without unpickling."""
        return torch.tensor([getattr(self, name) for name in self.saved_attributes])

    def set_extra_state(self, state: Tensor):
        for name, value in zip(self.saved_attributes, state.tolist(), strict=True):
            setattr(self, name, value)

    def train(self, mode: bool = True):
        if mode and self.fused:
            raise ValueError('a fused model cannot be trained, what training alone needs is gone: create one')
        return super().train(mode)


def register_variants(create: Callable, variants: Iterable[str]):
    """Register `create(variant, pretrained=False, **kwargs)` with timm under the name of each variant."""
    for variant in variants:
        entry = partial(create, variant)
        entry.__name__, entry.__module__ = variant, create.__module__
        register_model(entry)


# --- blocks and attention of timm


class TimmBlock(NamedTuple):
    """timm's Block or EvaBlock as the method calls it: with a bias on keys, rotations that travel, and a class row.

    rope (N, R) or (H, N, R): rotations of queries and keys at all places, or None. prefix: P. class_token: the first
    token is one; otherwise the score is the attention that the mean of all queries pays. score_grad: False where the
    score only selects, which needs no gradient.

    Source: timm's Block, EvaBlock, Attention, AttentionRope and EvaAttention.
    """

    block: nn.Module
    rope: Tensor | None = None
    prefix: int = 1
    class_token: bool = True
    score_grad: bool = False

    def __call__(self, slow: Slow, need_attention: bool = True) -> tuple[Tensor, Tensor | None]:
        """Slow tokens (B, P + n, C) to tokens and, if asked for, the class token's attention (B, n)."""
        tokens, attention = self.attend(slow, need_attention)[:2]  # the keys would keep all projections
        return self.feed_forward(tokens), attention

    def attend(self, slow: Slow, need_attention: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """The residual attention; also returns the class token's attention (B, n), a sum over heads, and the keys.

        A fused kernel returns no map; the one row that the method needs costs 1 / (P + n) of it.
        """
        attn, x = self.block.attn, self.block.norm1(slow.tokens)
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in _projections(attn, x))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if self.rope is not None:
            rope = _rope_at(self.rope, slow.places, x.shape[1] - self.prefix)
            q, k = (_rotate(t, rope, self.prefix, attn.rotate_half).type_as(v) for t in (q, k))
        repeats = getattr(attn, 'num_kv_groups', 1)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        bias = None if slow.key_bias is None else slow.key_bias.to(q.dtype)
        update = F.scaled_dot_product_attention(q, k, v, bias, attn.attn_drop.p if attn.training else 0.0)
        update = attn.norm(update.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            update = update * attn.gate(x).sigmoid()
        update = attn.proj_drop(attn.proj(update))
        tokens = slow.tokens + self.block.drop_path1(_layer_scale(self.block, 1, update))
        return tokens, self.class_attention(q, k, slow.key_bias) if need_attention else None, k

    def class_attention(self, q: Tensor, k: Tensor, key_bias: Tensor | None) -> Tensor:
        """The class token's attention (B, n) from queries and keys (B, H, P + n, D), summed over heads."""
        if not self.score_grad:
            q, k = q.detach(), k.detach()
        q = q[:, :, :1] if self.class_token else q[:, :, self.prefix :].mean(2, keepdim=True)
        return evolution.class_attention(q, k, self.block.attn.scale, key_bias, self.prefix).sum(1)

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """The residual MLP."""
        return tokens + self.block.drop_path2(_layer_scale(self.block, 2, self.block.mlp(self.block.norm2(tokens))))


def _projections(attn: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values (B, n, channels) of x (B, n, C)."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if getattr(attn, 'q_bias', None) is not None:
        return F.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])).chunk(3, -1)
    return attn.qkv(x).chunk(3, -1)


def _rotate(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotate queries or keys (B, H, P + n, D) of patches."""
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], 2)


def _rope_at(rope: Tensor, places: Tensor | None, n: int) -> Tensor:
    """Rotations (N, R), or (H, N, R) for each head, to those of n patches at places (B, K): (B, 1 or H, n, R).

    A token without a place, the one representative of all placeholders, is not rotated.
    """
    if places is None:
        return rope
    rope = (rope if rope.ndim == 3 else rope.unsqueeze(0))[:, places].transpose(0, 1)
    missing = n - places.shape[1]
    if missing == 0:
        return rope
    sin, cos = torch.zeros_like(rope[:, :, :1]).chunk(2, -1)
    return torch.cat([rope, torch.cat([sin, cos + 1], -1).expand(-1, -1, missing, -1)], 2)


def _layer_scale(block: nn.Module, branch: int, update: Tensor) -> Tensor:
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f'gamma_{branch}')
        return update if gamma is None else gamma * update
    return getattr(block, f'ls{branch}')(update)


# --- evolving a ViT of timm


class EvolvingViT(Evolving):
    """What the evolved classes of timm's ViTs share."""

    def tradeoffs(self) -> list[float]:
        # Nothing accumulates in the dense blocks: the first score is the attention of the last of them.
        first = min(self.first_blocks, default=len(self.blocks))
        return [1.0 if i < first else 0.5 for i in range(len(self.blocks))]

    def prepare(self, images: Tensor) -> tuple[Tensor, list[evolution.Block]]:
        """Images (B, channels, height, width) to tokens (B, P + N, C), and the blocks as functions of slow tokens."""
        self.check_images(images)
        tokens, rope = self.embed(images)
        ropes = rope if getattr(self, 'rope_mixed', False) else [rope] * len(self.blocks)
        common = self.num_prefix_tokens, self.cls_token is not None, self.representative == 'one'
        return tokens, [TimmBlock(*pair, *common) for pair in zip(self.blocks, ropes, strict=False)]

    def check_images(self, images: Tensor):
        """ValueError for images (B, channels, height, width) of a size that the model cannot take whole."""
        size, embed = tuple(images.shape[-2:]), self.patch_embed
        if not isinstance(embed, PatchEmbed):
            return
        if embed.strict_img_size and size != embed.img_size:
            raise ValueError(
                f'images: expected {embed.img_size}, the img_size of the model, found {size}. For other sizes create '
                f'the model with dynamic_img_size=True, or call set_input_size({size})'
            )
        if not embed.dynamic_img_pad and any(n % patch for n, patch in zip(size, embed.patch_size, strict=True)):
            raise ValueError(f'images: expected multiples of the patch, {embed.patch_size}, found {size}')

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images to tokens (B, P + N, C) with positions, and rotations of queries and keys, or None."""
        return self.norm_pre(self._pos_embed(self.patch_embed(images))), None


class EvolvedViT(EvolvingViT, VisionTransformer):
    """timm's VisionTransformer with slow-fast evolution; made by `evolve`."""


class EvolvedDistilledViT(EvolvingViT, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled with slow-fast evolution; made by `evolve`."""


class EvolvedEva(EvolvingViT, Eva):
    """timm's Eva (EVA, EVA-02, DINOv3, rotary ViTs) with slow-fast evolution; made by `evolve`."""

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens, rope = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(tokens), rope


EVOLVED = {VisionTransformer: EvolvedViT, VisionTransformerDistilled: EvolvedDistilledViT, Eva: EvolvedEva}


def evolve(
    model: nn.Module,
    keep_ratio: float | Sequence[float] = (0.7, 0.3),
    stages: Sequence[int] | None = None,
    representative: str | bool = 'nearest',
    stage_wise: bool = True,
) -> nn.Module:
    """Give slow-fast evolution to a ViT of timm, in place, without training; returns the model.

    Weights and their names, heads, pooling and timm's interface stay as they are; `forward_features` still returns all
    tokens in order. With keep_ratio=1 the model computes what it did before. A model that was evolved already gets
    the new schedule. Blocks and attentions are no longer called as modules, so hooks on them do not run; for features
    on the way there is `forward_intermediates`.

    Args:
        model: an instance of timm's VisionTransformer (DeiT, AugReg, DINOv2, CLIP, SigLIP, ...), its distilled
            variant, or Eva (EVA-02, DINOv3, rotary ViTs).
        keep_ratio: share of informative patches, one number or one for each stage.
        stages: the first block of each stage; the blocks before the first see every patch. By default a third and two
            thirds of the depth.
        representative: who represents placeholders: 'nearest' (their most similar informative patch), 'one' token for
            all, or 'none'; see evolution.py.
        stage_wise: select before each stage; False: before each of its blocks.

    Raises ValueError, with the reason, for a model that cannot be evolved exactly.
    """
    if reason := why_not(model):
        raise ValueError(f'{type(model).__name__} cannot be evolved: {reason}')
    depth = len(model.blocks)
    if stages is None and depth < 3:
        other = ', or stages=[1] and one keep_ratio' if depth == 2 else ''
        raise ValueError(
            f'stages: expected 3 blocks or more, for two stages, found {depth}; pass stages=[] for none{other}'
        )
    stages = (depth // 3, 2 * depth // 3) if stages is None else stages
    evolved = copy.copy(model)  # so that a refused schedule changes nothing
    evolved.__class__ = EVOLVED.get(type(model), type(model))
    evolved.init_evolution(keep_ratio, stages, representative)
    evolved.set_schedule(stage_wise)
    model.__class__ = type(evolved)
    vars(model).update(vars(evolved))
    vars(model).pop('update_group', None)  # of another method
    return model


def why_not(model: nn.Module) -> str:
    """Why a model cannot be evolved exactly, '' if it can."""
    if isinstance(model, SavedEvolution):
        return f'{type(model).__name__} evolves by itself; keep_ratio, stages and representative are its own arguments'
    if type(model) not in (*EVOLVED, *EVOLVED.values()):
        known = ', '.join(cls.__name__ for cls in EVOLVED)
        return f"expected one of timm's classes {known}, whose blocks keep one sequence of patches"
    return why_not_layers(model)


def why_not_layers(model: nn.Module) -> str:
    """Why the layers of a ViT of timm cannot be computed exactly, '' if they can."""
    for i, block in enumerate(model.blocks):
        if type(block) not in (Block, EvaBlock):
            found = type(block).__name__
            return f'block_fn: expected residual attention, then a residual MLP, found {found} in blocks.{i}'
        if type(block.attn) not in (Attention, AttentionRope, EvaAttention):
            found = type(block.attn).__name__
            return f'attn_layer: expected one softmax over all tokens, found {found} in blocks.{i}'
    if rate := getattr(model.patch_drop, 'prob', 0):
        return f'patch_drop_rate: expected 0, since dropped patches have no place in the grid, found {rate}'
    return ''

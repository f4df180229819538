"""`evolve`: add slow-fast evolution to a pretrained ViT of timm, in place and without training.

    model = evolve(timm.create_model('deit_tiny_patch16_224', pretrained=True))

The model, its blocks and its attentions become subclasses of timm's classes, with the same parameters, names and
arguments. Called with tokens alone, a block computes what timm's block computes. The forward pass is in evolving.py.

Shapes: B batch, P prefix tokens, N patches, n of them in a sequence, C channels, H heads, D channels of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, PatchEmbed, apply_rot_embed_cat
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.models import Eva, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from . import evolution
from .evolving import Evolving, SavedEvolution, default_stages, find_replaced_forward, warn_if_rising

# For methods that reduce tokens inside a block, between its attention and its MLP: a function of tokens (B, P + n, C),
# the class token's attention (B, n) or None, and keys (B, H, P + n, D) that returns fewer tokens.
Reduce = Callable[[Tensor, Tensor | None, Tensor], Tensor]


# --- attention


class EvolvedAttention(Attention):
    """timm's Attention that can also return the class token's attention and the keys; see `attend`."""

    def forward(self, x, attn_mask=None, is_causal=False, need_attention=False, need_keys=False):
        return attend(self, x, None, attn_mask, is_causal, need_attention, need_keys)


class EvolvedAttentionRope(AttentionRope):
    """timm's AttentionRope that can also return the class token's attention and the keys; see `attend`."""

    def forward(self, x, rope=None, attn_mask=None, is_causal=False, need_attention=False, need_keys=False):
        return attend(self, x, rope, attn_mask, is_causal, need_attention, need_keys)


class EvolvedEvaAttention(EvaAttention):
    """timm's EvaAttention that can also return the class token's attention and the keys; see `attend`."""

    def forward(self, x, rope=None, attn_mask=None, is_causal=False, need_attention=False, need_keys=False):
        return attend(self, x, rope, attn_mask, is_causal, need_attention, need_keys)


def attend(
    attn: nn.Module,
    x: Tensor,
    rope: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_attention: bool,
    need_keys: bool,
) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
    """The forward pass of an evolved attention: x (B, P + n, C) to the same shape.

    Args:
        rope: rotations of queries and keys, (n, R), or for each image and head (B, 1 or H, n, R).
        attn_mask: additive or boolean, broadcast to (B, H, P + n, P + n).
        need_attention: also return the class token's attention to the patches, (B, n), summed over heads; without a
            class token, that of the mean query. ValueError with any mask but an additive one (B, 1, 1, P + n).
        need_keys: also return the keys (B, H, P + n, D).

    Returns the output or, if anything else is needed, a tuple: output, attention or None, keys or None.

    Source: timm's Attention, AttentionRope and EvaAttention, whose layers `attn` has.
    """
    if need_attention and (
        is_causal or (attn_mask is not None and (attn_mask.dtype == torch.bool or attn_mask.ndim != 4))
    ):
        raise ValueError('need_attention: expected no mask, or an additive one of shape (B, 1, 1, P + n)')
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in project(attn, x))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (rotate(part, rope, attn.num_prefix_tokens, attn.rotate_half).type_as(v) for part in (q, k))
    repeats = getattr(attn, 'num_kv_groups', 1)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)  # some fused kernels would read a float32 mask as half precision

    # A hook on `attn_drop` wants the attention map, which a fused kernel does not compute.
    hooked = attn.attn_drop._forward_hooks or attn.attn_drop._forward_pre_hooks
    if attn.fused_attn and not hooked:
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        logits = maybe_add_mask(logits, resolve_self_attn_mask(x.shape[1], logits, attn_mask, is_causal))
        out = attn.attn_drop(logits.softmax(-1)) @ v
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    if not need_attention and not need_keys:
        return out
    attention = None
    if need_attention:
        # Fused kernels do not return the attention map, so the row that a selection reads is computed separately, at
        # 1 / (P + n) of the cost of the map.
        query = q[:, :, :1] if attn.class_token else q[:, :, attn.num_prefix_tokens :].mean(2, keepdim=True)
        attention = evolution.class_attention(query, k, attn.scale, attn_mask, attn.num_prefix_tokens).sum(1)
    return out, attention, k if need_keys else None


def project(attn: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values (B, n, channels) of x (B, n, C). Layers are called, as LoRA may have replaced them."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    qkv = attn.qkv(x)
    if getattr(attn, 'q_bias', None) is not None:
        qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return qkv.chunk(3, -1)


def rotate(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotate the patches of queries or keys (B, H, P + n, D)."""
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], 2)


def rope_at(rope: Tensor, places: Tensor, n: int) -> Tensor:
    """Select from rotations (N, R), or (H, N, R) per head, those of n patches at places (B, K): (B, 1 or H, n, R).

    A last token without a place, the one representative of all placeholders, is not rotated.
    """
    rope = (rope if rope.ndim == 3 else rope.unsqueeze(0))[:, places]
    missing = n - places.shape[1]
    if missing == 0:
        return rope.transpose(0, 1)
    # Not `zeros_like`: the TorchScript-based ONNX exporter would make its batch size a constant.
    sin, cos = (0 * rope[:, :, :1]).chunk(2, -1)
    return torch.cat([rope, torch.cat([sin, cos + 1], -1).expand(-1, -1, missing, -1)], 2).transpose(0, 1)


# --- blocks


class EvolvedBlock(Block):
    """timm's Block, on all tokens or some of the patches; see `forward_block`."""

    def forward(self, x, attn_mask=None, is_causal=False, places=None, need_attention=False, reduce=None):
        # `places` has no effect: positions were added before the first block.
        masks = dict(attn_mask=attn_mask, is_causal=is_causal)
        return forward_block(self, x, masks, need_attention, reduce)


class EvolvedEvaBlock(EvaBlock):
    """timm's EvaBlock, on all tokens or the patches at `places` (B, m), whose rotations it selects from `rope`."""

    def forward(self, x, rope=None, attn_mask=None, is_causal=False, places=None, need_attention=False, reduce=None):
        if rope is not None and places is not None:
            rope = rope_at(rope, places, x.shape[1] - self.attn.num_prefix_tokens)
        masks = dict(rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return forward_block(self, x, masks, need_attention, reduce)


def forward_block(
    block: nn.Module, x: Tensor, masks: dict, need_attention: bool = False, reduce: Reduce | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The forward pass of an evolved block: x (B, P + n, C) to the same shape, or to fewer tokens with `reduce`.

    With `need_attention` it returns a tuple: tokens, and the class token's attention (B, n) to the patches of x.
    Source: timm's Block and EvaBlock, whose layers `block` has.
    """
    attention = keys = None
    if need_attention or reduce is not None:
        needs = dict(need_attention=need_attention, need_keys=reduce is not None)
        update, attention, keys = block.attn(block.norm1(x), **masks, **needs)
    else:  # works with any attention that takes timm's arguments
        update = block.attn(block.norm1(x), **masks)
    x = x + block.drop_path1(layer_scale(block, 1, update))
    if reduce is not None:
        x = reduce(x, attention, keys)
    del update, keys  # frees memory for the MLP: `keys` is a view that keeps all of qkv alive
    x = x + block.drop_path2(layer_scale(block, 2, block.mlp(block.norm2(x))))
    return (x, attention) if need_attention else x


def layer_scale(block: nn.Module, branch: int, update: Tensor) -> Tensor:
    """Apply the LayerScale of the attention (branch 1) or of the MLP (2), if the block has one."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f'gamma_{branch}')
        return update if gamma is None else gamma * update
    return getattr(block, f'ls{branch}')(update)


# timm's classes, and ours with the same parameters. Other blocks and attentions are refused.
EVOLVED_BLOCKS = {Block: EvolvedBlock, EvaBlock: EvolvedEvaBlock}
EVOLVED_ATTENTIONS = {
    Attention: EvolvedAttention,
    AttentionRope: EvolvedAttentionRope,
    EvaAttention: EvolvedEvaAttention,
}


def evolve_blocks(model: nn.Module):
    """Turn the blocks of a ViT of timm, and their attentions, into ours, in place; check `why_not_layers` before."""
    for block in model.blocks:
        block.__class__ = EVOLVED_BLOCKS.get(type(block), type(block))
        block.attn.__class__ = EVOLVED_ATTENTIONS.get(type(block.attn), type(block.attn))
        block.attn.num_prefix_tokens = model.num_prefix_tokens
        block.attn.class_token = model.cls_token is not None


# --- evolving a ViT of timm


class EvolvingViT(Evolving):
    """What the evolved classes of timm's ViTs share."""

    def prepare(self, images: Tensor) -> tuple[Tensor, list[evolution.Block]]:
        self.check_images(images)
        tokens, rope = self.embed(images)
        if rope is None:
            return tokens, list(self.blocks)
        # Rotations are the same for all blocks, or with `rope_mixed` a list of each block's own.
        ropes = rope if getattr(self, 'rope_mixed', False) else [rope] * len(self.blocks)
        return tokens, [partial(block, rope=rope) for block, rope in zip(self.blocks, ropes, strict=False)]

    def check_images(self, images: Tensor):
        """ValueError for images (B, channels, height, width) of a size that the model would refuse or cut."""
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
    """Add slow-fast evolution to a ViT of timm or transformers, in place and without training; returns the model.

    Weights and their names, heads, pooling and timm's interface do not change, and `forward_features` still returns all
    tokens in order. With keep_ratio=1 the model computes what it did before. A model that evolves already gets the new
    schedule.

    Blocks are called as modules. Inside an evolving stage, a hook on a block or on a layer inside it sees prefix tokens
    and informative tokens in no particular order, (B, P + K, C). The last block before a selection returns a tuple,
    tokens and class attention. `forward_intermediates` returns whole grids (B, C, rows, columns), as Grad-CAM needs,
    and `forward_with_selection` the raster indices.

    Args:
        model: an instance of timm's VisionTransformer (DeiT, AugReg, DINOv2, CLIP, SigLIP, ...), its distilled
            variant, or Eva (EVA-02, DINOv3, rotary ViTs); or a model of Hugging Face's transformers with one vision
            encoder (ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, I-JEPA), such as a LLaVA: see transformers_vit.py.
        keep_ratio: fraction of informative patches, one number or one per stage.
        stages: the first block of each stage; earlier blocks see every patch. Default: 1/3 and 2/3 of the depth.
        representative: what placeholders follow: 'nearest' (the most similar informative patch), 'one' token for all
            of them, or 'none'; see evolution.py.
        stage_wise: select before each stage; False: before each of its blocks.

    Raises ValueError, with the reason, for a model that cannot be evolved exactly, or a schedule that is not valid.
    """
    if isinstance(model, str):
        create = 'transformers.AutoModel.from_pretrained' if '/' in model else 'timm.create_model'
        raise ValueError(f'expected a model, found the name {model!r}; pass {create}({model!r}, ...)')
    if is_from_transformers(model):
        try:
            from . import transformers_vit
        except ImportError as error:
            raise ValueError(
                f'{type(model).__name__} cannot be evolved with this version of transformers ({error}); '
                "pip install 'transformers>=5.20,<5.25' installs one that is tested"
            ) from error
        return transformers_vit.evolve_encoder(model, keep_ratio, stages, representative, stage_wise)
    if reason := why_not(model):
        raise ValueError(f'{type(model).__name__} cannot be evolved: {reason}')
    stages = default_stages(len(model.blocks)) if stages is None else stages
    before = type(model)
    model.__class__ = EVOLVED.get(before, before)
    try:
        model.init_evolution(keep_ratio, stages, representative, stage_wise)
    except ValueError:
        model.__class__ = before  # a refused schedule changes nothing
        raise
    warn_if_rising(model.keep_ratio)
    vars(model).pop('update_group', None)  # a rival's
    evolve_blocks(model)
    return model


def is_from_transformers(model: nn.Module) -> bool:
    """Whether a model, or a module inside it, is of transformers."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(type(module).__module__.startswith('transformers.') for module in modules)


def why_not(model: nn.Module) -> str:
    """Why a model cannot be evolved exactly, '' if it can."""
    if isinstance(model, SavedEvolution):
        return f'{type(model).__name__} evolves by itself; keep_ratio, stages and representative are its own arguments'
    if type(model) not in (*EVOLVED, *EVOLVED.values()):
        known = ', '.join(cls.__name__ for cls in EVOLVED)
        return f"expected one of timm's classes {known}, whose blocks keep one sequence of patches"
    return why_not_layers(model)


def why_not_layers(model: nn.Module) -> str:
    """Why the layers of a ViT of timm cannot be evolved exactly, '' if they can."""
    modules = (model, *model.blocks, *(getattr(block, 'attn', block) for block in model.blocks))
    timms = {*EVOLVED, *EVOLVED_BLOCKS, *EVOLVED_ATTENTIONS}
    if reason := find_replaced_forward(module for module in modules if type(module) in timms):
        return reason
    for i, block in enumerate(model.blocks):
        if type(block) not in (*EVOLVED_BLOCKS, *EVOLVED_BLOCKS.values()):
            found = type(block).__name__
            return f'block_fn: expected residual attention, then a residual MLP, found {found} in blocks.{i}'
        if type(block.attn) not in (*EVOLVED_ATTENTIONS, *EVOLVED_ATTENTIONS.values()):
            found = type(block.attn).__name__
            return f'attn_layer: expected one softmax over all tokens, found {found} in blocks.{i}'
    if rate := getattr(model.patch_drop, 'prob', 0):
        return f'patch_drop_rate: expected 0, since dropped patches have no place in the grid, found {rate}'
    return ''

"""Evo-LeViT: a LeViT with a class token, in which half of the patches go through each layer and the others follow their
representative (see evolution.py).

Linear+BN, BN+Linear, the MLP and the stem are timm's LeViT layers. Evo-LeViT differs from LeViT in three ways: it has a
class token; it has learned position embeddings before the first stage and each down-sampling, in place of attention
biases, so LeViT's weights do not fit; and it trains four heads, two on the mean of all patches, two on the class token.

Shapes: B batch, N patches of a stage, C channels, H heads, D channels of a key, E of a value.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_abs_pos_embed, to_2tuple
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.levit import ConvNorm, LevitMlp, LinearNorm, NormLinear, Stem16
from torch import Tensor, nn

from . import evolution, published
from .evolution import Tradeoff
from .evolving import SavedEvolution, register_variants

FIRST_EVOLVING = 2  # as in the original


class Heads(NamedTuple):
    """Logits (B, classes) in training: two from the mean of the patches, two from the class token.

    With a teacher, the second of each pair learns from it.
    """

    head: Tensor
    head_dist: Tensor
    head_cls: Tensor
    head_cls_dist: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, need_attention: bool, attn_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention of q (B, H, n, D) to k (B, H, m, D) and v (B, H, m, E); attn_mask (B, 1, 1, m) is added to the logits.

    Returns values (B, n, H * E) and, with `need_attention`, the class token's attention to the patches, (B, m - 1),
    averaged over heads, in float32 or better.
    """
    # Fused kernels do not return the attention map, so the class token's row is computed separately. CPUs have no fused
    # kernel for float32 with values wider than keys.
    scale = q.shape[-1] ** -0.5
    if q.is_cuda or q.dtype in (torch.float16, torch.bfloat16):
        x = F.scaled_dot_product_attention(q, k, v, None if attn_mask is None else attn_mask.to(q.dtype))
        row = evolution.class_attention(q[:, :, :1], k, scale, attn_mask) if need_attention else None
    else:
        logits = (q * scale) @ k.transpose(-2, -1)
        attention = (logits if attn_mask is None else logits + attn_mask).softmax(-1)
        x, row = attention @ v, attention[:, :, 0, 1:]
    return x.transpose(1, 2).flatten(2), row.mean(1) if need_attention else None


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, n, H * D) to (B, H, n, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def subsample(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every second row and column of patches (B, N, ...), in raster order."""
    return patches.unflatten(1, grid)[:, ::2, ::2].flatten(1, 2)


class Attention(nn.Module):
    """timm's levit.Attention without biases; optionally also returns the class token's attention, see `attend`."""

    def __init__(self, dim: int, key_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.split = (key_dim, key_dim, 2 * key_dim)
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.qkv = LinearNorm(dim, num_heads * sum(self.split))
        self.proj = LinearNorm(num_heads * self.split[2], dim, bn_weight_init=0)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, need_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = split_heads(self.qkv(x), self.num_heads).split(self.split, -1)
        x, attention = attend(q, k, v, need_attention, attn_mask)
        x = self.proj(F.hardswish(x))
        return (x, attention) if need_attention else x


class Block(nn.Module):
    """A layer: residual attention, then a residual MLP; it has the interface of evolution.Block."""

    def __init__(self, dim: int, key_dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.attn = Attention(dim, key_dim, num_heads)
        self.mlp = LevitMlp(dim, 2 * dim, act_layer=nn.Hardswish)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, places: Tensor | None = None, attn_mask: Tensor | None = None, need_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        update = self.attn(x, attn_mask, need_attention)
        if need_attention:
            update, attention = update
        x = x + self.drop_path(update)
        x = x + self.drop_path(self.mlp(x))
        return (x, attention) if need_attention else x


class Downsample(nn.Module):
    """timm's LevitDownsample with positions in place of biases.

    The queries are the class token and every second row and column of the incoming `grid` (rows, columns).
    """

    def __init__(self, dim: int, out_dim: int, key_dim: int, grid: tuple[int, int], drop_path: float):
        super().__init__()
        self.grid = grid
        self.num_heads = dim // key_dim
        self.split = (key_dim, 4 * key_dim)
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], dim))
        self.kv = LinearNorm(dim, self.num_heads * sum(self.split))
        self.q = LinearNorm(dim, self.num_heads * key_dim)
        self.proj = LinearNorm(self.num_heads * self.split[1], out_dim)
        self.mlp = LevitMlp(out_dim, 2 * out_dim, act_layer=nn.Hardswish)
        self.drop_path = DropPath(drop_path)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, score: Tensor | None, tradeoff: Tradeoff) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, 1 + N, C) and score (B, N), None if no selection reads it, to those of the next grid."""
        x = x + self.pos_embed  # in place of LeViT's attention biases
        q = split_heads(self.q(torch.cat([x[:, :1], subsample(x[:, 1:], self.grid)], 1)), self.num_heads)
        k, v = split_heads(self.kv(x), self.num_heads).split(self.split, -1)
        x, attention = attend(q, k, v, score is not None)
        x = self.proj(F.hardswish(x))  # no residual: channels and grid change
        x = x + self.drop_path(self.mlp(x))
        if score is not None:
            # The score keeps its sum: that of the coarser grid is rescaled to that of the finer one.
            total = score.sum(1, keepdim=True)
            score = evolution.update_score(subsample(score, self.grid), subsample(attention, self.grid), tradeoff)
            score = evolution.replace_zeros(score, 1.0)
            score = score * (total / score.sum(1, keepdim=True))
        return x, score


class Stage(nn.Module):
    """The layers on one grid (rows, columns), after the down-sampling to it, None in the first stage."""

    def __init__(self, downsample: Downsample | None, blocks: Sequence[Block], grid: tuple[int, int]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grid = grid


class EvoLeViT(SavedEvolution, nn.Module):
    """LeViT with slow-fast token evolution.

    Args:
        img_size: height and width of the images, or one number for both; multiples of 16.
        embed_dim, num_heads, depth: channels, heads and layers on each grid; down-samplings separate the grids.
        key_dim: channels of a key; values have 2 * key_dim, in a down-sampling 4 * key_dim.
        global_pool: 'avg', or '' to return all tokens, which needs num_classes=0.
        drop_rate: dropout before the heads. drop_path_rate: stochastic depth, the same in every layer.
        keep_ratio: fraction of informative patches, one number or one per stage that evolves.
        stages: the first layer of each stage that evolves, counted over the network. Default: layer 2 and the first
            layer of each further grid (2, 4, 8; in EvoLeViT_128S 2, 5). A new grid always selects anew.
        representative: what placeholders follow, see evolution.py: 'one' (the original), 'none' or 'nearest'.
        fused: create the model already fused, to load fused weights.

    Attributes that are saved with the weights:
        stage_wise: select before each stage (True, as at the end of training), or before each layer.
        learned_tradeoff: a class attention enters the score with a learned weight, or with 0.5.
        evolving: False makes every layer see every patch.

    Source: timm.models.levit.LevitDistilled, and the original Evo-LeViT.
    """

    saved_attributes = 'stage_wise', 'learned_tradeoff', 'evolving'
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (128, 256, 384),
        num_heads: Sequence[int] = (4, 8, 12),
        depth: Sequence[int] = (4, 4, 4),
        key_dim: int = 16,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        keep_ratio: float | Sequence[float] = 0.5,
        stages: Sequence[int] | None = None,
        representative: str | bool = 'one',
        fused: bool = False,
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        if any(pixels < 16 or pixels % 16 for pixels in self.img_size):
            raise ValueError(f'img_size: expected multiples of 16, found {self.img_size}')
        if min(depth) < 1:
            raise ValueError(f'depth: expected at least one layer on each grid, found {depth}')
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.grad_checkpointing = self.fused = False

        self.grid = grid = (self.img_size[0] // 16, self.img_size[1] // 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim[0]))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], embed_dim[0]))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = Stem16(in_chans, embed_dim[0], act_layer=nn.Hardswish)
        self.norm = nn.Identity()  # the heads normalize
        self.stages, self.feature_info = nn.ModuleList(), []
        for i, (dim, heads, layers) in enumerate(zip(embed_dim, num_heads, depth, strict=True)):
            downsample = None
            if i > 0:
                downsample = Downsample(embed_dim[i - 1], dim, key_dim, grid, drop_path_rate)
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            blocks = [Block(dim, key_dim, heads, drop_path_rate) for _ in range(layers)]
            self.stages.append(Stage(downsample, blocks, grid))
            self.feature_info.append(dict(num_chs=dim, reduction=16 * 2**i, module=f'stages.{i}'))
        if stages is None:
            stages = sorted(block for block in {FIRST_EVOLVING, *self.new_grids()} if block < sum(depth))
        self.init_evolution(keep_ratio, stages, representative)
        self.learned_tradeoff = True
        self.reset_classifier(num_classes, global_pool)
        if fused:
            self.fuse()

    def set_schedule(self, stage_wise: bool, evolving: bool = True):
        """Choose when to select. Tradeoffs are learned with stage-wise selection, and 0.5 with layer-wise selection."""
        super().set_schedule(stage_wise, evolving)
        self.learned_tradeoff = stage_wise

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith('pos_embed')}

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [(r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^(?:cls_token|pos_embed|patch_embed)', blocks=r'^stages\.(\d+)' if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True):
        """Run layers again in the backward pass to save memory. BatchNorm statistics then move twice per step."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The two heads that evaluation uses."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """Create new heads for `num_classes`, none for 0; ValueError for heads without a pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool != 'avg' and (pool != '' or num_classes > 0):
            raise ValueError(f"global_pool: expected 'avg', or '' without classes, found '{pool}' and {num_classes}")
        self.num_classes, self.global_pool = num_classes, pool
        for name in Heads._fields:
            head = NormLinear(self.num_features, num_classes, drop=self.drop_rate) if num_classes > 0 else nn.Identity()
            setattr(self, name, head.to(self.cls_token).train(self.training))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's interface: drop the stages after the last chosen one, and the heads; returns the chosen indices."""
        out_indices, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return out_indices

    def check_fused(self, state: dict[str, Tensor]):
        """ValueError if the model is fused and the state dict is not."""
        if self.fused and any('.bn.' in key for key in state):
            raise ValueError('a fused model cannot load weights with BatchNorms: create one, load, then fuse')

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs):
        self.check_fused(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.no_grad()
    def fuse(self):
        """Prepare for inference, in place: fold each BatchNorm into its linear layer, and drop the training heads."""
        for parent in list(self.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, ConvNorm | LinearNorm | NormLinear):
                    setattr(parent, name, layer.fuse().to(layer.linear.weight))
        self.head_cls = self.head_cls_dist = None
        self.fused = True
        return self.eval()

    def attentions(self) -> list[Attention | Downsample]:
        """All modules with a tradeoff, in order."""
        return [module for module in self.modules() if isinstance(module, Attention | Downsample)]

    def tradeoff(self, attention: Attention | Downsample) -> Tradeoff:
        """The weight of this module's class attention in the score."""
        return attention.learn_tradeoff.sigmoid() if self.learned_tradeoff else 0.5

    def tradeoffs(self) -> list[Tradeoff]:
        return [self.tradeoff(block.attn) for stage in self.stages for block in stage.blocks]

    def block_names(self) -> list[str]:
        return [f'stages.{i}.blocks.{j}' for i, stage in enumerate(self.stages) for j in range(len(stage.blocks))]

    def new_grids(self) -> list[int]:
        return list(accumulate(len(stage.blocks) for stage in self.stages))[:-1]

    def num_patches(self, block: int) -> int:
        rows, columns = self.stages[sum(start <= block for start in self.new_grids())].grid
        return rows * columns

    def prepare(self, images: Tensor) -> tuple[Tensor, list[evolution.Block]]:
        return self.embed(images), [block for stage in self.stages for block in stage.blocks]

    def change_grid(self, block: int, tokens: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apply the down-sampling before the first layer of a grid, to tokens and, if it is read, score."""
        downsample = self.stages[1 + self.new_grids().index(block)].downsample
        return self.checkpointed(downsample)(tokens, score, self.tradeoff(downsample))

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, channels, height, width) to tokens (B, 1 + N, C) with positions; ValueError for another size."""
        if x.shape[-2:] != self.img_size:
            raise ValueError(f'images: expected {self.img_size}, the img_size of the model, found {(*x.shape[-2:],)}')
        cls_token = self.cls_token
        if self.training:
            # DistributedDataParallel needs a gradient for every parameter: 0 for tradeoffs that no selection reads.
            cls_token = cls_token + 0 * torch.cat([a.learn_tradeoff for a in self.attentions()]).sum()
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed

    def get_extra_state(self) -> Tensor:
        """The schedule as a tensor, so that it is part of every state dict and loads without unpickling."""
        return torch.tensor([getattr(self, name) for name in self.saved_attributes])

    def set_extra_state(self, state: Tensor):
        for name, value in zip(self.saved_attributes, state.tolist(), strict=True):
            setattr(self, name, value)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | Heads:
        """Tokens (B, 1 + N, C) to logits (B, classes), the mean of two heads, or with `pre_logits` to their input.

        In training these are the mean of all four heads or, after `set_distilled_training`, the logits of each.
        """
        pooled = x[:, 1:].mean(1) if self.global_pool == 'avg' else x
        if pre_logits or self.num_classes == 0:
            return pooled
        head, head_dist = self.head(pooled), self.head_dist(pooled)
        if not self.training:
            return (head + head_dist) / 2
        heads = Heads(head, head_dist, self.head_cls(x[:, 0]), self.head_cls_dist(x[:, 0]))
        return heads if self.distilled_training else sum(heads) / len(heads)

    def feature_levels(self, images: Tensor) -> list[tuple[int, tuple[int, int]]]:
        last_blocks = [*self.new_grids(), len(self.block_names())]
        return [(last - 1, stage.grid) for last, stage in zip(last_blocks, self.stages, strict=True)]

    is_published = staticmethod(published.is_evo_levit)
    from_published = staticmethod(published.evo_levit_from_published)
    to_published = staticmethod(published.evo_levit_to_published)

    def convert_state(
        self, state: dict[str, Tensor], resize: bool = False, finetune: bool | None = None
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Convert a state dict in the original layout, or of this class, to one of this model.

        With `resize`, positions are resized to this model's grids; `finetune` has no effect. Returns the state dict,
        the names filled and the names dropped: none here. ValueError if the model is fused and `state` is not.
        """
        self.check_fused(state)
        state = self.from_published(state) if self.is_published(state) else dict(state)
        state.setdefault('_extra_state', self.get_extra_state())
        if resize:
            for name, module in self.named_modules():
                key = f'{name}.pos_embed'.removeprefix('.')
                if key in state:
                    state[key] = resample_abs_pos_embed(state[key], module.grid)
        return state, [], []


# A new size is one entry; each is registered for images of 224 px, and of 384 px with the ending `_384`.
SIZES = {
    '128S': dict(embed_dim=(128, 256, 384), num_heads=(4, 6, 8), depth=(2, 3, 4), key_dim=16),
    '128': dict(embed_dim=(128, 256, 384), num_heads=(4, 8, 12), depth=(4, 4, 4), key_dim=16),
    '192': dict(embed_dim=(192, 288, 384), num_heads=(3, 5, 6), depth=(4, 4, 4), key_dim=32),
    '256': dict(embed_dim=(256, 384, 512), num_heads=(4, 6, 8), depth=(4, 4, 4), key_dim=32),
    '384': dict(embed_dim=(384, 512, 768), num_heads=(6, 9, 12), depth=(4, 4, 4), key_dim=32, drop_path_rate=0.1),
}

_cfg = partial(
    PretrainedCfg,
    fixed_input_size=True,
    first_conv='patch_embed.conv1.linear',
    classifier=tuple(f'{name}.linear' for name in Heads._fields),
)
default_cfgs = generate_default_cfgs(
    {
        f'EvoLeViT_{size}{ending}': _cfg(input_size=(3, pixels, pixels))
        for ending, pixels in (('', 224), ('_384', 384))
        for size in SIZES
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs) -> EvoLeViT:
    kwargs = dict(img_size=default_cfgs[variant].default.input_size[1:], **SIZES[variant.split('_')[1]]) | kwargs
    return build_model_with_cfg(
        EvoLeViT,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state, model: model.convert_state(state, resize=True)[0],
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls='getter'),
        **kwargs,
    )


register_variants(_create, default_cfgs)

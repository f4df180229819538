"""Evo-LeViT: a LeViT with a class token, whose layers update half of the patches slowly and the rest fast.

The method is in evolution.py; Linear+BN, BN+Linear, the MLP and the stem are timm's LeViT layers. What differs from
LeViT: a class token; learned positions before the first stage and before each down-sampling in place of attention
biases, so LeViT's weights do not fit; layers and down-samplings hand on the attention of the class token; four heads in
training, two on the mean of all patches and two on the class token.

Shapes: B batch, N patches of a stage, K informative patches, C channels, H heads, D channels of a key, E of a value.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.levit import ConvNorm, LevitMlp, LinearNorm, NormLinear, Stem16
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import evolution

FIRST_EVOLVING = 2  # layers of the first stage before this one see every patch
HEADS = ('head', 'head_dist', 'head_cls', 'head_cls_dist')


class Heads(NamedTuple):
    """Logits (B, classes) that training returns: two from the mean of the patches, two from the class token.

    In each pair the second learns from a teacher where there is one.
    """

    head: Tensor
    head_dist: Tensor
    head_cls: Tensor
    head_cls_dist: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, need_attention: bool) -> tuple[Tensor, Tensor | None]:
    """Attention of q (B, H, n, D) to k (B, H, m, D) and v (B, H, m, E).

    Returns values (B, n, H * E), and the class token's attention (B, m - 1) to the others, a mean over heads, at least
    in float32. A fused kernel has no map, so that row is computed beside it; on a CPU none fits values wider than keys.
    """
    scale = q.shape[-1] ** -0.5
    if q.is_cuda or q.dtype in (torch.float16, torch.bfloat16):
        x = F.scaled_dot_product_attention(q, k, v)
        row = evolution.class_attention(q[:, :, :1], k, scale) if need_attention else None
    else:
        attention = ((q * scale) @ k.mT).softmax(-1)
        x, row = attention @ v, attention[:, :, 0, 1:]
    return x.transpose(1, 2).flatten(2), row.mean(1) if need_attention else None


def subsample(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every second row and column of patches (B, N, ...) in raster order."""
    return patches.unflatten(1, grid)[:, ::2, ::2].flatten(1, 2)


class Attention(nn.Module):
    """timm's levit.Attention without biases; also returns the class token's attention (B, N), a mean over heads."""

    def __init__(self, dim: int, key_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.split = (key_dim, key_dim, 2 * key_dim)
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.qkv = LinearNorm(dim, num_heads * sum(self.split))
        self.proj = LinearNorm(num_heads * self.split[2], dim, bn_weight_init=0)

    def forward(self, x: Tensor, need_attention: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split(self.split, -1)
        x, attention = attend(q, k, v, need_attention)
        return self.proj(F.hardswish(x)), attention


class Block(nn.Module):
    """One layer: residual attention, then a residual MLP."""

    def __init__(self, dim: int, key_dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.attn = Attention(dim, key_dim, num_heads)
        self.mlp = LevitMlp(dim, 2 * dim, act_layer=nn.Hardswish)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, need_attention: bool = True) -> tuple[Tensor, Tensor | None]:
        update, attention = self.attn(x, need_attention)
        x = x + self.drop_path(update)
        return x + self.drop_path(self.mlp(x)), attention


class Downsample(nn.Module):
    """timm's LevitDownsample with positions in place of biases.

    The class token and every second row and column of the incoming `grid` (rows, columns) gather from all tokens.
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

    def forward(self, x: Tensor, score: Tensor | None, tradeoff: evolution.Tradeoff) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, 1 + N, C) and score (B, N), or None where nobody needs it, to those of the next grid."""
        x = x + self.pos_embed
        q = self.q(torch.cat([x[:, :1], subsample(x[:, 1:], self.grid)], 1))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split(self.split, -1)
        x, attention = attend(q, k, v, score is not None)
        x = self.proj(F.hardswish(x))
        x = x + self.drop_path(self.mlp(x))
        if score is not None:
            total = score.sum(1, keepdim=True)
            score = evolution.blend(subsample(score, self.grid), subsample(attention, self.grid), tradeoff)
            score = evolution.replace_zeros(score, 1.0)
            score = score * (total / score.sum(1, keepdim=True))
        return x, score


class Stage(nn.Module):
    """The layers of one grid (rows, columns), and the down-sampling that leads to it, None in the first stage."""

    def __init__(self, downsample: Downsample | None, blocks: Sequence[Block], grid: tuple[int, int]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grid = grid


class EvoLeViT(nn.Module):
    """LeViT with slow-fast token evolution.

    Args:
        img_size: height and width of the images, or one number for both; multiples of 16.
        embed_dim, num_heads, depth: channels, heads and layers of each stage.
        key_dim: channels of a key; values have 2 * key_dim, in a down-sampling 4 * key_dim.
        global_pool: 'avg', or '' for the tokens as they are, which needs num_classes=0.
        drop_rate: dropout before the heads. drop_path_rate: the same in every layer.
        keep_ratio: share of the patches that are informative, one number or one for each stage. The first two layers of
            the network see every patch; where that is all of the first stage (EvoLeViT_128S), its ratio has no effect
            and must be 1 or that of another stage. Can be assigned later.
        representative: False leaves out the representative token and the fast update.

    Plain attributes, saved and restored with the weights:
        stage_wise: select once in each stage (True, as in the end of training), or before each layer.
        learned_tradeoff: a class attention enters the score by a learned share, or by one half.
        evolving: False makes every layer see every patch.

    Source: timm.models.levit.LevitDistilled, and the published Evo-LeViT.
    """

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
        representative: bool = True,
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        if any(pixels < 16 or pixels % 16 for pixels in self.img_size):
            raise ValueError(f'img_size: expected multiples of 16, found {self.img_size}')
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.grad_checkpointing = self.fused = False
        self.stage_wise = self.learned_tradeoff = self.evolving = True
        self.representative = representative

        self.grid = grid = (self.img_size[0] // 16, self.img_size[1] // 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim[0]))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], embed_dim[0]))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = Stem16(in_chans, embed_dim[0], act_layer=nn.Hardswish)
        self.stages, self.feature_info = nn.ModuleList(), []
        for i, (dim, heads, layers) in enumerate(zip(embed_dim, num_heads, depth, strict=True)):
            downsample = None
            if i > 0:
                downsample = Downsample(embed_dim[i - 1], dim, key_dim, grid, drop_path_rate)
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            blocks = [Block(dim, key_dim, heads, drop_path_rate) for _ in range(layers)]
            self.stages.append(Stage(downsample, blocks, grid))
            self.feature_info.append(dict(num_chs=dim, reduction=16 * 2**i, module=f'stages.{i}'))
        self.keep_ratio = keep_ratio
        self.reset_classifier(num_classes, global_pool)

    @property
    def keep_ratio(self) -> tuple[float, ...]:
        """Share of the patches that are informative, for each stage."""
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, keep_ratio: float | Sequence[float]):
        ratios = evolution.check_keep_ratio(keep_ratio, len(self.stages))
        used = {ratio for i, ratio in enumerate(ratios) if self.count_evolving(i)}
        for i, ratio in enumerate(ratios):
            if self.count_evolving(i):
                evolution.informative(self.stages[i].grid[0] * self.stages[i].grid[1], ratio)
            elif used and ratio not in {1.0, *used}:
                raise ValueError(
                    f'keep_ratio: expected 1 or the ratio of another stage for stage {i}, in which no layer evolves, '
                    f'found {ratio} in {ratios}, which would have no effect'
                )
        self._keep_ratio = ratios

    def get_extra_state(self) -> Tensor:
        """The schedule as a tensor, in every state dict: a plain one, so that it is read without unpickling.

        An average that updates parameters and buffers one by one, as timm's ModelEma, does not follow it by itself.
        """
        return torch.tensor([self.stage_wise, self.learned_tradeoff, self.evolving])

    def set_extra_state(self, state: Tensor):
        self.stage_wise, self.learned_tradeoff, self.evolving = state.tolist()

    def set_schedule(self, stage_wise: bool, evolving: bool = True):
        """Choose the schedule of selection; the tradeoff is learned from the time on that selection is stage-wise."""
        self.stage_wise = self.learned_tradeoff = stage_wise
        self.evolving = evolving

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith('pos_embed')}

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [(r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^(?:cls_token|pos_embed|patch_embed)', blocks=r'^stages\.(\d+)' if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True):
        """Run layers again in the backward pass to save memory; running BatchNorm statistics then move twice a step."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The two heads of evaluation."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """New heads for `num_classes`, none for 0; ValueError for heads without a pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool != 'avg' and (pool != '' or num_classes > 0):
            raise ValueError(f"global_pool: expected 'avg', or '' without classes, found '{pool}' and {num_classes}")
        self.num_classes, self.global_pool = num_classes, pool
        for name in HEADS:
            head = NormLinear(self.num_features, num_classes, drop=self.drop_rate) if num_classes > 0 else nn.Identity()
            setattr(self, name, head.to(self.cls_token).train(self.training))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's interface: drop the stages after the last of those chosen, and the heads; returns the chosen ones."""
        taps, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return taps

    def train(self, mode: bool = True):
        if mode and self.fused:
            raise ValueError('a fused model cannot be trained, its BatchNorms and training heads are gone: create one')
        return super().train(mode)

    def check_fused(self, state: dict[str, Tensor]):
        """ValueError if the model is fused and the weights are not."""
        if self.fused and any('.bn.' in key for key in state):
            raise ValueError('a fused model cannot load weights with BatchNorms: create one, load, then fuse')

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs):
        self.check_fused(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.no_grad()
    def fuse(self):
        """For inference: fold every BatchNorm into the layer beside it and drop the training heads, in place."""
        for parent in list(self.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, ConvNorm | LinearNorm | NormLinear):
                    setattr(parent, name, layer.fuse().to(layer.linear.weight))
        self.head_cls = self.head_cls_dist = None
        self.fused = True
        return self.eval()

    def attentions(self) -> Iterator[Attention | Downsample]:
        """Everything that has a tradeoff, in order."""
        for stage in self.stages:
            if stage.downsample is not None:
                yield stage.downsample
            yield from (block.attn for block in stage.blocks)

    def tradeoff(self, attention: Attention | Downsample) -> evolution.Tradeoff:
        """How much of this class attention enters the score."""
        return attention.learn_tradeoff.sigmoid() if self.learned_tradeoff else 0.5

    def count_evolving(self, stage: int) -> int:
        """How many layers of a stage evolve; the first ones of the network do not."""
        return max(0, len(self.stages[stage].blocks) - (FIRST_EVOLVING if stage == 0 else 0))

    def groups(self) -> list[list[evolution.Group]]:
        """For each stage, its layers as groups that share a selection."""
        ratios = self.keep_ratio if self.evolving else (1.0,) * len(self.keep_ratio)
        out = []
        for i, (stage, ratio) in enumerate(zip(self.stages, ratios, strict=False)):
            evolving = self.count_evolving(i)
            out.append(evolution.partition(len(stage.blocks) - evolving, [evolving], [ratio], self.stage_wise))
        return out

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, channels, height, width) to tokens (B, 1 + N, C) with positions; ValueError for another size."""
        if x.shape[-2:] != self.img_size:
            raise ValueError(f'images: expected {self.img_size}, the img_size of the model, found {(*x.shape[-2:],)}')
        cls_token = self.cls_token
        if self.training:
            # A tradeoff that nothing reads gets a gradient of zero, so that no schedule leaves a parameter without one.
            cls_token = cls_token + 0 * torch.cat([a.learn_tradeoff for a in self.attentions()]).sum()
        x = self.patch_embed(x).flatten(2).mT
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed

    def evolve(self, x: Tensor, stop: int | None = None) -> tuple[Tensor, dict[str, evolution.Selection], list[Tensor]]:
        """Embed images (B, channels, height, width) and run the first `stop` stages, by default all.

        Returns tokens (B, 1 + N, C), the selections {first layer of the group: (kept, score)}, and the tokens after
        each of these stages.
        """
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        groups = self.groups()
        # The score is needed up to the last selection, as (stage, layer).
        selecting = [(i, g.start) for i, stage in enumerate(groups) for g in stage if g.keep_ratio < 1]
        last_selection = selecting[-1] if selecting else (-1, -1)
        x, score, selections, outputs = self.embed(x), None, {}, []
        for i, stage in enumerate(list(self.stages)[:stop]):
            tradeoffs = [self.tradeoff(block.attn) for block in stage.blocks]
            layers = [stage.downsample, *stage.blocks]
            if recompute:
                layers = [partial(checkpoint, layer, use_reentrant=False) for layer in layers]
            downsample, *blocks = layers
            if i > 0:
                score = score if i <= last_selection[0] else None
                x, score = downsample(x, score, self.tradeoff(stage.downsample))
            for start, end, ratio, _ in groups[i]:
                score_before = score
                x, score, kept = evolution.evolve(
                    x,
                    score,
                    blocks[start:end],
                    tradeoffs[start:end],
                    ratio,
                    self.representative,
                    need_score=(i, start) < last_selection,
                )
                if kept is not None:
                    selections[f'stages.{i}.blocks.{start}'] = evolution.Selection(kept, score_before)
            outputs.append(x)
        return x, selections, outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the whole grid of the last stage in raster order, class token first: (B, 1 + N, C)."""
        return self.evolve(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | Heads:
        """Tokens (B, 1 + N, C) to logits (B, classes), in training of each head. `pre_logits` stops before them."""
        pooled = x[:, 1:].mean(1) if self.global_pool == 'avg' else x
        if pre_logits or self.num_classes == 0:
            return pooled
        head, head_dist = self.head(pooled), self.head_dist(pooled)
        if self.training:
            return Heads(head, head_dist, self.head_cls(x[:, 0]), self.head_cls_dist(x[:, 0]))
        return (head + head_dist) / 2

    def forward(self, x: Tensor) -> Tensor | Heads:
        return self.forward_head(self.forward_features(x))

    def forward_with_selection(self, x: Tensor) -> tuple[Tensor | Heads, dict[str, Tensor]]:
        """Logits, and for each selection {'stages.0.blocks.2': kept (B, K)}: raster indices, int64, ascending."""
        x, selections, _ = self.evolve(x)
        return self.forward_head(x), {name: s.kept.sort(1).values for name, s in selections.items()}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's interface: the whole grids (B, C, rows, columns) after the chosen stages.

        Returns (tokens after the last stage, grids), or the grids alone. There is no norm to apply: `norm` is accepted
        for the interface's sake.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt: expected NCHW, found {output_fmt}')
        taps, last = feature_take_indices(len(self.stages), indices)
        x, _, outputs = self.evolve(x, last + 1 if stop_early else None)
        grids = [outputs[i][:, 1:].mT.unflatten(-1, self.stages[i].grid).contiguous() for i in taps]
        return grids if intermediates_only else (x, grids)

    @staticmethod
    def is_published(state: dict[str, Tensor]) -> bool:
        """Whether a state dict has the layout of the published checkpoints: one flat list of layers."""
        return 'patch_embed.0.c.weight' in state

    @staticmethod
    def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State dict in the published layout to our names. What does not fit keeps its name, for a strict load.

        The layout has every layer twice. The second is dropped; ValueError with its name if it differs from the first.
        """
        kinds = ''
        while (d := f'blocks.{len(kinds)}.kv.c.weight' in state) or f'blocks.{len(kinds)}.m1.m.qkv.c.weight' in state:
            kinds += 'd ' if d else 'l'  # a down-sampling has two entries, itself and its MLP
        names = _published_names([stage.count('l') for stage in kinds.split('d ')])
        own = {published: name for name, (published, _) in names.items()}
        first = {second: published for published, second in names.values() if second}
        out = {}
        for key, value in state.items():
            module, *leaf = re.split(r'\.(?=(?:c|l|bn)\.)', key)
            original = '.'.join([first[module], *leaf]) if module in first else None
            if original in state:
                if not torch.equal(value, state[original]):
                    raise ValueError(f'{key}: expected the numbers of {original}, found others; the file is damaged')
                continue
            leaf = [re.sub('^[cl]', 'linear', part) for part in leaf]
            out['.'.join([own.get(module, module), *leaf])] = value
        return out

    @staticmethod
    def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State dict of this class to the published layout and order, for the published code to load."""
        layers = re.findall(r'^stages\.(\d+)\.blocks\.\d+\.attn\.qkv\.linear\.weight$', '\n'.join(state), re.M)
        if not layers:
            raise ValueError('expected whole, unfused weights, found no stages.*.attn.qkv.linear.weight')
        names = _published_names([layers.count(str(i)) for i in range(len(set(layers)))])
        body, again, heads = {}, {}, {}
        for key, value in state.items():
            module, *leaf = re.split(r'\.(?=(?:linear|bn)\.)', key)
            if module in HEADS:
                heads[key.replace('.linear.', '.l.')] = value
            elif key != '_extra_state':
                leaf = [re.sub('^linear', 'c', part) for part in leaf]
                published, second = names.get(module, (module, ''))
                body['.'.join([published, *leaf])] = value
                if second:
                    again['.'.join([second, *leaf])] = value
        return body | again | heads

    def convert_state(
        self, state: dict[str, Tensor], resize: bool = False
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """State dict of the published layout, or of this class, to one of this model.

        With `resize`, all positions are resized to this model's grids. Returns the state dict, the names that were
        filled and the names that were dropped: none in this family. ValueError if only the model is fused.
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


def _published_names(depth: Sequence[int]) -> dict[str, tuple[str, str]]:
    """Names in the published layout for a network of `depth` layers in each stage.

    {our name: (published, published a second time or '')}, down to the pairs of a linear layer and a BatchNorm.
    """
    modules, j, s = [], 0, 0  # j and s count the entries of the lists `blocks` and `stage_blocks`
    for i, layers in enumerate(depth):
        if i > 0:
            modules.append((f'stages.{i}.downsample', f'blocks.{j}', f'stage_blocks.{s}'))
            modules.append((f'stages.{i}.downsample.mlp', f'blocks.{j + 1}.m', f'stage_blocks.{s + 1}.m'))
            j, s = j + 2, s + 2
        dense = min(FIRST_EVOLVING, layers) if i == 0 else 0
        # A dense layer has two entries in `stage_blocks`; those that evolve share one.
        seconds = [f'{s + k}' for k in range(2 * dense)]
        s += len(seconds)
        seconds += [f'{s}.m.{k}' for k in range(2 * (layers - dense))]
        s += layers > dense
        for k, second in enumerate(seconds):
            layer, part = divmod(k, 2)
            own = f'stages.{i}.blocks.{layer}.{("attn", "mlp")[part]}'
            modules.append((own, f'blocks.{j + layer}.m{part + 1}.m', f'stage_blocks.{second}.m'))
        j += layers
    parts = {'learn_tradeoff': 'learn_tradeoff', 'pos_embed': 'poss', 'qkv': 'qkv', 'kv': 'kv', 'q': 'q.1'}
    parts |= {'proj': 'proj.1', 'ln1': '0', 'ln2': '2'}
    names = {f'{own}.{p}': (f'{a}.{q}', f'{b}.{q}') for own, a, b in modules for p, q in parts.items()}
    stem = {f'patch_embed.conv{i + 1}': (f'patch_embed.{2 * i}', '') for i in range(4)}
    return {'pos_embed': ('poss', '')} | stem | names


def _cfg(size: int) -> dict:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, size, size),
        'pool_size': None,
        'crop_pct': 224 / 256,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.conv1.linear',
        'classifier': tuple(f'{name}.linear' for name in HEADS),
    }


SIZES = {
    '128S': dict(embed_dim=(128, 256, 384), num_heads=(4, 6, 8), depth=(2, 3, 4), key_dim=16),
    '128': dict(embed_dim=(128, 256, 384), num_heads=(4, 8, 12), depth=(4, 4, 4), key_dim=16),
    '192': dict(embed_dim=(192, 288, 384), num_heads=(3, 5, 6), depth=(4, 4, 4), key_dim=32),
    '256': dict(embed_dim=(256, 384, 512), num_heads=(4, 6, 8), depth=(4, 4, 4), key_dim=32),
    '384': dict(embed_dim=(384, 512, 768), num_heads=(6, 9, 12), depth=(4, 4, 4), key_dim=32, drop_path_rate=0.1),
}

default_cfgs = generate_default_cfgs(
    {f'EvoLeViT_{size}': _cfg(224) for size in SIZES} | {f'EvoLeViT_{size}_384': _cfg(384) for size in SIZES}
)


def _create(variant: str, pretrained: bool, **kwargs) -> EvoLeViT:
    _, size, *pixels = variant.split('_')
    kwargs = dict(img_size=int(pixels[0]) if pixels else 224, **SIZES[size]) | kwargs
    return build_model_with_cfg(
        EvoLeViT,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state, model: model.convert_state(state, resize=True)[0],
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls='getter'),
        **kwargs,
    )


@register_model
def EvoLeViT_128S(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-128S."""
    return _create('EvoLeViT_128S', pretrained, **kwargs)


@register_model
def EvoLeViT_128(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-128."""
    return _create('EvoLeViT_128', pretrained, **kwargs)


@register_model
def EvoLeViT_192(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-192."""
    return _create('EvoLeViT_192', pretrained, **kwargs)


@register_model
def EvoLeViT_256(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-256."""
    return _create('EvoLeViT_256', pretrained, **kwargs)


@register_model
def EvoLeViT_384(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-384."""
    return _create('EvoLeViT_384', pretrained, **kwargs)


@register_model
def EvoLeViT_128S_384(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-128S*, 384 px."""
    return _create('EvoLeViT_128S_384', pretrained, **kwargs)


@register_model
def EvoLeViT_128_384(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-128*, 384 px."""
    return _create('EvoLeViT_128_384', pretrained, **kwargs)


@register_model
def EvoLeViT_192_384(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-192*, 384 px."""
    return _create('EvoLeViT_192_384', pretrained, **kwargs)


@register_model
def EvoLeViT_256_384(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-256*, 384 px."""
    return _create('EvoLeViT_256_384', pretrained, **kwargs)


@register_model
def EvoLeViT_384_384(pretrained: bool = False, **kwargs) -> EvoLeViT:
    """Evo-LeViT-384*, 384 px."""
    return _create('EvoLeViT_384_384', pretrained, **kwargs)

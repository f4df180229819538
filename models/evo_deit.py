"""Evo-DeiT: a DeiT whose blocks 4 to 11 update half of the patches slowly and let the others wait (method:
evolution.py).

The network is timm's VisionTransformer, with its parameter names, so plain DeiT and ViT weights load by name. What
differs: blocks also return the attention of the class token; groups of blocks evolve; the prediction comes from the
mean over all patches, normalised after the mean; in training a second head, `head_cls`, predicts from the class token.
The head of a plain DeiT was trained on the class token, so there the prediction comes from the class token too.

Shapes: B batch, N patches, K informative patches, C channels, H heads, D channels of a head.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import evolution

FIRST_EVOLVING = 4  # blocks before this one see every patch
BLOCKS_PER_STAGE = 4
# Poolings that need no weights of their own. The extra state holds an index into this list: append, never reorder.
POOLINGS = 'avg', 'token', 'max', 'avgmax'


class Heads(NamedTuple):
    """Logits (B, classes) that training returns: from the mean of the patches, and from the class token."""

    head: Tensor
    head_cls: Tensor


class EvoBlock(Block):
    """timm's Block; forward also returns the class token's attention (B, N) to the patches, summed over heads.

    `score_grad` is False where the score only selects, which needs no gradient.
    """

    score_grad = False

    def attend(self, x: Tensor, need_attention: bool) -> tuple[Tensor, Tensor | None]:
        """timm's Attention.forward on x (B, 1 + N, C), fused, with the class token's row of the map beside it.

        A fused kernel returns no map; the one row that the method needs costs 1 / (1 + N) of it.
        """
        attn = self.attn
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, H, 1 + N, D)
        q, k = attn.q_norm(q), attn.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if self.training else 0.0)
        x = attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))
        if not need_attention:
            return x, None
        if not self.score_grad:
            q, k = q.detach(), k.detach()
        return x, evolution.class_attention(q[:, :, :1], k, attn.scale).sum(1)

    def forward(self, x: Tensor, need_attention: bool = True) -> tuple[Tensor, Tensor | None]:
        update, attention = self.attend(self.norm1(x), need_attention)
        x = x + self.drop_path1(self.ls1(update))
        del update  # or the MLP adds its own memory on top of it
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, attention


class EvoDeiT(VisionTransformer):
    """Vision transformer with slow-fast token evolution.

    Takes the arguments of timm's VisionTransformer, and:
        keep_ratio: share of the patches that are informative, one number or one for each stage of four evolving blocks.
        representative: add the paper's representative token and fast update. The published models have neither.

    Plain attributes, saved and restored with the weights:
        stage_wise: select before blocks 4 and 8 (True, as in the end of training), or before each block from 4 on.
        evolving: False makes every block see every patch.
        global_pool: what the head reads, 'avg' the mean of the patches, 'token' the class token.

    Source: timm.models.vision_transformer.VisionTransformer, and the published Evo-DeiT.
    """

    def __init__(self, *args, keep_ratio: float | Sequence[float] = 0.5, representative: bool = False, **kwargs):
        kwargs = {'global_pool': 'avg', 'fc_norm': False, 'norm_layer': partial(nn.LayerNorm, eps=1e-6)} | kwargs
        super().__init__(*args, block_fn=EvoBlock, **kwargs)
        if self.num_prefix_tokens != 1:
            raise ValueError(
                f'Evo-DeiT needs one class token and nothing else before the patches, found {self.num_prefix_tokens}'
            )
        self.stage_wise = self.evolving = True
        self.fused = False
        self.keep_ratio = evolution.check_keep_ratio(keep_ratio, len(self.stages))
        self.representative = representative
        # Nothing accumulates in the dense blocks: the score before block 4 is the attention of block 3.
        self.tradeoffs = [1.0 if i < FIRST_EVOLVING else 0.5 for i in range(len(self.blocks))]
        for block in self.blocks:
            block.score_grad = representative
        self.norm_cls = kwargs['norm_layer'](self.embed_dim)
        self.head_cls = nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.num_classes > 0:
            self._init_weights(self.head_cls)

    def get_extra_state(self) -> Tensor:
        """The schedule and the pooling as a tensor, so that they go wherever the weights go."""
        pooling = POOLINGS.index(self.global_pool) if self.global_pool in POOLINGS else -1
        return torch.tensor([self.stage_wise, self.evolving, pooling])

    def set_extra_state(self, state: Tensor):
        stage_wise, evolving, *pooling = state.tolist()  # older files hold no pooling
        self.stage_wise, self.evolving = bool(stage_wise), bool(evolving)
        # A model that returns its tokens (global_pool='') reads no head, and goes on to return them.
        if pooling and pooling[0] >= 0 and self.global_pool in POOLINGS:
            self.global_pool = POOLINGS[pooling[0]]

    def set_schedule(self, stage_wise: bool, evolving: bool = True):
        """Choose the schedule of selection; both families have this call."""
        self.stage_wise, self.evolving = stage_wise, evolving

    def fuse(self):
        """For inference: drop the head that training alone uses, in place; both families have this call."""
        self.norm_cls = self.head_cls = None
        self.fused = True
        return self.eval()

    def train(self, mode: bool = True):
        if mode and self.fused:
            raise ValueError('a fused model cannot be trained, its training head is gone: create one')
        return super().train(mode)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {'pos_embed', 'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r'^cls_token|pos_embed|patch_embed', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        super().reset_classifier(num_classes, global_pool)
        self._init_weights(self.head)
        if self.fused:
            return
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head_cls = head.to(self.cls_token).train(self.training)
        self._init_weights(self.head_cls)

    @property
    def stages(self) -> list[int]:
        """How many blocks each evolving stage has."""
        starts = range(FIRST_EVOLVING, len(self.blocks), BLOCKS_PER_STAGE)
        return [min(BLOCKS_PER_STAGE, len(self.blocks) - start) for start in starts]

    def groups(self, cuts: Sequence[int] = ()) -> list[evolution.Group]:
        """The blocks as groups that share a selection, cut after the blocks `cuts` too."""
        dense = len(self.blocks) - sum(self.stages)
        ratios = self.keep_ratio[: len(self.stages)] if self.evolving else (1.0,) * len(self.stages)
        return evolution.partition(dense, self.stages, ratios, self.stage_wise, cuts)

    def evolve(
        self, x: Tensor, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[str, evolution.Selection], list[Tensor]]:
        """Embed images (B, channels, height, width) and run all blocks.

        Returns tokens (B, 1 + N, C), the selections {first block of the group: (kept, score)}, and the tokens after
        each of the blocks `taps`.
        """
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        blocks = list(self.blocks)
        if self.grad_checkpointing and torch.is_grad_enabled():
            blocks = [partial(checkpoint, block, use_reentrant=False) for block in blocks]
        score, kept, selections, tapped = None, None, {}, []
        groups = self.groups(taps)
        last_selection = max((g.start for g in groups if g.select and g.keep_ratio < 1), default=0)
        for start, stop, ratio, fresh in groups:
            score_before = score
            x, score, kept = evolution.evolve(
                x,
                score,
                blocks[start:stop],
                self.tradeoffs[start:stop],
                ratio,
                self.representative,
                None if fresh else kept,
                need_score=start < last_selection,
            )
            if fresh and kept is not None:
                selections[f'blocks.{start}'] = evolution.Selection(kept, score_before)
            if stop - 1 in taps:
                tapped.append(x)
        return x, selections, tapped

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the whole grid in raster order, class token first: (B, 1 + N, C), not normalised."""
        return self.evolve(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | Heads:
        """Tokens (B, 1 + N, C) to logits (B, classes); in training to both heads. `pre_logits` stops before."""
        pooled = self.head_drop(self.norm(self.pool(x)))
        if pre_logits:
            return pooled
        if self.training and self.num_classes > 0:
            return Heads(self.head(pooled), self.head_cls(self.head_drop(self.norm_cls(x[:, 0]))))
        return self.head(pooled)

    def forward(self, x: Tensor) -> Tensor | Heads:
        return self.forward_head(self.forward_features(x))

    def forward_with_selection(self, x: Tensor) -> tuple[Tensor | Heads, dict[str, Tensor]]:
        """Logits, and for each selection {'blocks.4': kept (B, K)}: raster indices, int64, ascending."""
        x, selections, _ = self.evolve(x)
        return self.forward_head(x), {name: s.kept.sort(1).values for name, s in selections.items()}

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
    ):
        """timm's interface: the whole grid after each of the chosen blocks.

        `stop_early` saves nothing here and is accepted for the interface's sake. Returns what timm's VisionTransformer
        does: (features, intermediates), the intermediates alone, or a dictionary; each (B, C, rows, columns) or (B, N,
        C).
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt: expected NCHW or NLC, found {output_fmt}')
        taps, _ = feature_take_indices(len(self.blocks), indices)
        rows, columns = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x, _, tapped = self.evolve(x, taps)
        tapped = [self.norm(t) if norm else t for t in tapped]
        prefix, grids = [t[:, :1] for t in tapped], [t[:, 1:] for t in tapped]
        if output_fmt == 'NCHW':
            grids = [g.mT.unflatten(-1, (rows, columns)).contiguous() for g in grids]
        if output_dict:
            out = {'image_intermediates': grids}
            if return_prefix_tokens:
                out['image_intermediates_prefix'] = prefix
            return out if intermediates_only else out | {'image_features': x}
        if return_prefix_tokens:
            grids = list(zip(grids, prefix, strict=True))
        return grids if intermediates_only else (x, grids)

    @staticmethod
    def is_published(state: dict[str, Tensor]) -> bool:
        """Whether a state dict has the layout of the published checkpoints: a list for each kind of layer, v apart from
        q and k.
        """
        return 'qks.0.qk.weight' in state

    @staticmethod
    def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State dict in the published layout to the names of this class. What does not fit keeps its name, for a strict
        load.
        """
        out = {}
        for key, value in state.items():
            kind, *rest = key.split('.')
            partner = {'qks': 'vs.{}.v.{}', 'vs': 'qks.{}.qk.{}'}.get(kind, '').format(*rest[::2])
            if kind == 'qks' and partner in state:
                key, value = 'blocks.{}.attn.qkv.{}'.format(*rest[::2]), torch.cat([value, state[partner]])
            elif kind == 'vs' and partner in state:
                continue
            elif kind in ('norms', 'projs'):
                key = 'blocks.{}.{}.{}'.format(rest[0], {'norms': 'norm1', 'projs': 'attn.proj'}[kind], rest[1])
            out[key] = value
        return out

    @staticmethod
    def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State dict of this class to the published layout and order, for the published code to load."""
        out = {}
        for key, value in state.items():
            if key.endswith(('attn.qkv.weight', 'attn.qkv.bias')):
                _, i, _, _, leaf = key.split('.')
                out[f'qks.{i}.qk.{leaf}'], out[f'vs.{i}.v.{leaf}'] = value.split(2 * len(value) // 3)
            elif key != '_extra_state':
                key = re.sub(r'^blocks\.(\d+)\.norm1\.', r'norms.\1.', key)
                out[re.sub(r'^blocks\.(\d+)\.attn\.proj\.', r'projs.\1.', key)] = value
        order = 'cls_token pos_embed patch_embed blocks qks vs norms projs norm head head_cls norm_cls'.split()
        return dict(sorted(out.items(), key=lambda item: order.index(item[0].split('.')[0])))

    def convert_state(
        self, state: dict[str, Tensor], resize: bool = False, finetune: bool | None = None
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """State dict of the published layout, or of a plain DeiT or ViT, to one of this model that computes the same.

        A plain DeiT or ViT has no `head_cls` and `norm_cls`; they become copies of its `head` and `norm`. LayerScale
        and positions without an entry for the class token are folded into other weights where the model lacks them.

        Args:
            resize: resize positions and patches to this model's.
            finetune: the weights are a start for training, so the pooling stays as it is and a distillation token is
                dropped. Otherwise the pooling becomes the one that the head was trained for: for a plain ViT that is
                the class token, or the mean of the patches if its norm follows the mean (`fc_norm`). Default: `resize`.

        Returns the state dict, the names that were filled with copies, and the names that were dropped. ValueError for
        weights that this model cannot reproduce.
        """
        finetune = resize if finetune is None else finetune
        published = self.is_published(state)
        state = self.from_published(state) if published else dict(state)
        plain = not published and '_extra_state' not in state and 'head_cls.weight' not in state
        pooling = 'avg' if published else None
        self._check_tokens(state)
        dropped = self._drop_distillation(state, finetune)
        self._fold_layer_scale(state)
        self._match_class_position(state, resize)
        if plain and 'fc_norm.weight' in state:
            pooling = 'avg'
            if isinstance(self.fc_norm, nn.Identity):  # then the norm after the pooling is called `norm` here
                state = {re.sub(r'^fc_norm\.', 'norm.', key): value for key, value in state.items()}
        elif plain and 'head.weight' in state:
            pooling = 'token'
        if resize:
            try:
                state = checkpoint_filter_fn(state, self)
            except Exception as error:  # timm's function meets any file, and fails in many ways
                raise ValueError(f'its positions and patches cannot be resized to this model: {error}') from error
        filled = [] if self.fused else self._fill_class_head(state)
        pooling = self.global_pool if finetune else pooling
        schedule = state.get('_extra_state', self.get_extra_state())
        if pooling or len(schedule) == 2:  # a file without a pooling leaves the model its own
            index = POOLINGS.index(pooling) if pooling in POOLINGS else -1
            schedule = torch.tensor([*schedule[:2].tolist(), index])
        state['_extra_state'] = schedule
        return state, filled, dropped

    def _check_tokens(self, state: dict[str, Tensor]):
        """ValueError for the weights of a ViT with other tokens before its patches than one class token."""
        if 'pos_embed' not in state:
            return
        found = ''
        if 'cls_token' not in state:
            found = 'it has no class token, by whose attention Evo-DeiT selects patches'
        elif (registers := state.get('reg_token', state.get('register_tokens'))) is not None:
            found = f'it has {registers.shape[1]} register tokens, which Evo-DeiT does not have'
        if found:
            raise ValueError(f'{found}; use a ViT with one class token and no registers, such as DeiT, DINO or MAE')

    def _drop_distillation(self, state: dict[str, Tensor], finetune: bool) -> list[str]:
        """Take the distillation token and its head out of `state`; returns their names, none for a plain ViT."""
        if 'dist_token' not in state or 'pos_embed' not in state:
            return []
        if not finetune:
            raise ValueError(
                'this is a distilled DeiT, which predicts by the mean of two heads; Evo-DeiT reads one, so its '
                'predictions would differ. Use a DeiT without distillation; or, to train, start from this one without '
                'its distillation token: --finetune, or adapt=True'
            )
        positions = state['pos_embed']  # of the class token, the distillation token, the patches
        state['pos_embed'] = torch.cat([positions[:, :1], positions[:, 2:]], 1)
        names = ['dist_token', 'head_dist.weight', 'head_dist.bias']
        return [name for name in names if state.pop(name, None) is not None]

    def _fold_layer_scale(self, state: dict[str, Tensor]):
        """Multiply the scales of LayerScale into the layers before them, if this model has none (`init_values`)."""
        if len(self.blocks) and not isinstance(self.blocks[0].ls1, nn.Identity):
            return
        for key in list(state):
            if found := re.fullmatch(r'(blocks\.\d+)\.(?:ls([12])\.gamma|gamma_([12]))', key):
                block, layer = found[1], {'1': 'attn.proj', '2': 'mlp.fc2'}[found[2] or found[3]]
                scale = state.pop(key)
                for name, factor in ((f'{block}.{layer}.weight', scale[:, None]), (f'{block}.{layer}.bias', scale)):
                    if name in state:
                        state[name] = factor * state[name]

    def _match_class_position(self, state: dict[str, Tensor], resize: bool):
        """Add or remove the class token's entry in the positions, as this model has one or not (`no_embed_class`).

        A file does not say whether its positions have that entry. Their number does: a grid is this model's or square.
        """
        positions = state.get('pos_embed')
        if positions is None or positions.ndim != 3 or self.pos_embed is None or 'cls_token' not in state:
            return
        count, patches = positions.shape[1], self.patch_embed.num_patches
        square = [n for n in (count, count - 1) if math.isqrt(n) ** 2 == n]
        if count in (patches, patches + 1):
            grid = patches
        elif resize and not square:
            raise ValueError(
                f'its {count} positions are of a grid that is not square, which cannot be resized; expected a square '
                f'grid, or that of this model ({patches} patches)'
            )
        else:
            grid = square[0] if square else count - 1
        if grid == count and not self.no_embed_class:
            state['pos_embed'] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
        elif grid < count and self.no_embed_class:
            state['cls_token'] = state['cls_token'] + positions[:, :1]
            state['pos_embed'] = positions[:, 1:]

    def _fill_class_head(self, state: dict[str, Tensor]) -> list[str]:
        """Give `state` copies of `norm` and `head` as `norm_cls` and `head_cls`, if it has none; returns the names."""
        norm = 'norm' if 'norm.weight' in state else 'fc_norm'
        filled = []
        for copied, plain in (('norm_cls', norm), ('head_cls', 'head')):
            for leaf in ('weight', 'bias'):
                if f'{copied}.{leaf}' not in state and f'{plain}.{leaf}' in state:
                    state[f'{copied}.{leaf}'] = state[f'{plain}.{leaf}'].clone()
                    filled.append(f'{copied}.{leaf}')
        return filled


def _pretrained_state(state: dict[str, Tensor], model: EvoDeiT) -> dict[str, Tensor]:
    """For timm's pretrained=True: with other classes than the file's, the weights are a start for training."""
    other_classes = 'head.weight' in state and len(state['head.weight']) != model.num_classes
    return model.convert_state(state, resize=True, finetune=other_classes)[0]


def _cfg(size: int = 224) -> dict:
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
        'first_conv': 'patch_embed.proj',
        'classifier': ('head', 'head_cls'),
    }


default_cfgs = generate_default_cfgs(
    {
        f'evo_deit_{size}{vis}_patch16_{pixels}': _cfg(pixels)
        for size in ('tiny', 'small', 'base')
        for vis in ('', '_vis')
        for pixels in (224, 384)
        if (size, pixels) != ('tiny', 384)
    }
    | {'evo_deit_nano_patch4_32': _cfg(32)}
)

# embed_dim, num_heads; the depth is 12 and the MLP ratio 4 in all
SIZES = {'nano': (64, 2), 'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}


def _create(variant: str, pretrained: bool, **kwargs) -> EvoDeiT:
    size = variant.split('_')[2]
    embed_dim, num_heads = SIZES[size]
    patch_size, img_size = (int(n) for n in re.search(r'patch(\d+)_(\d+)', variant).groups())
    kwargs = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=12, num_heads=num_heads) | kwargs
    return build_model_with_cfg(
        EvoDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=_pretrained_state,
        feature_cfg=dict(out_indices=3, feature_cls='getter'),
        **kwargs,
    )


@register_model
def evo_deit_nano_patch4_32(pretrained: bool = False, **kwargs) -> EvoDeiT:
    """Small enough to train on a CPU: 32 px images, patches of 4 px, 0.6 M parameters. Ours; not a published size."""
    return _create('evo_deit_nano_patch4_32', pretrained, **kwargs)


@register_model
def evo_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> EvoDeiT:
    """Evo-ViT-T."""
    return _create('evo_deit_tiny_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> EvoDeiT:
    """Evo-ViT-S."""
    return _create('evo_deit_small_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> EvoDeiT:
    """Evo-ViT-B."""
    return _create('evo_deit_base_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_small_patch16_384(pretrained: bool = False, **kwargs) -> EvoDeiT:
    """Evo-ViT-S*, 384 px."""
    return _create('evo_deit_small_patch16_384', pretrained, **kwargs)


@register_model
def evo_deit_base_patch16_384(pretrained: bool = False, **kwargs) -> EvoDeiT:
    """Evo-ViT-B*, 384 px."""
    return _create('evo_deit_base_patch16_384', pretrained, **kwargs)


# The names that the published visualiser knew; the networks are the same.


@register_model
def evo_deit_tiny_vis_patch16_224(pretrained: bool = False, **kwargs) -> EvoDeiT:
    return _create('evo_deit_tiny_vis_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_small_vis_patch16_224(pretrained: bool = False, **kwargs) -> EvoDeiT:
    return _create('evo_deit_small_vis_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_base_vis_patch16_224(pretrained: bool = False, **kwargs) -> EvoDeiT:
    return _create('evo_deit_base_vis_patch16_224', pretrained, **kwargs)


@register_model
def evo_deit_small_vis_patch16_384(pretrained: bool = False, **kwargs) -> EvoDeiT:
    return _create('evo_deit_small_vis_patch16_384', pretrained, **kwargs)


@register_model
def evo_deit_base_vis_patch16_384(pretrained: bool = False, **kwargs) -> EvoDeiT:
    return _create('evo_deit_base_vis_patch16_384', pretrained, **kwargs)

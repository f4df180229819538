"""Evo-DeiT: a DeiT whose blocks 4 to 11 update half of the patches slowly and let the others wait (method:
evolution.py).

The network is timm's VisionTransformer, with its parameter names, so plain DeiT and ViT weights load by name. What
differs: blocks also return the attention of the class token; groups of blocks evolve; the prediction comes from the
mean over all patches, normalised after the mean; in training a second head, `head_cls`, predicts from the class token.

Shapes: B batch, N patches, K informative patches, C channels, H heads, D channels of a head.
"""

import copy
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from . import published
from .vit import EvolvingViT, SavedEvolution, register_variants, why_not_arguments


class Heads(NamedTuple):
    """Logits (B, classes) that training returns: from the mean of the patches, and from the class token."""

    head: Tensor
    head_cls: Tensor


class EvoDeiT(SavedEvolution, EvolvingViT, VisionTransformer):
    """Vision transformer with slow-fast token evolution.

    Takes the arguments of timm's VisionTransformer, and:
        keep_ratio: share of the patches that are informative, one number or one for each stage.
        stages: the first block of each stage that evolves; the blocks before see every patch. By default 4, 8, ...
        representative: who represents placeholders, see evolution.py: 'none' as published, 'one', or 'nearest'.

    What would not be computed exactly is a ValueError: tokens besides the class token and the patches, no positions,
    patch dropout, pooling by attention, other blocks, other attention. The defaults differ from timm's in
    `global_pool`, 'avg', and in that the norm after the pooling is called `norm`; it has timm's name with
    `fc_norm=True`. Pooling always comes first.

    Attributes, saved and restored with the weights:
        stage_wise: select before each stage (True, as in the end of training), or before each of its blocks.
        evolving: False makes every block see every patch.

    Source: timm.models.vision_transformer.VisionTransformer, and the published Evo-DeiT.
    """

    def __init__(
        self,
        *args,
        keep_ratio: float | Sequence[float] = 0.5,
        stages: Sequence[int] | None = None,
        representative: str | bool = 'none',
        **kwargs,
    ):
        kwargs = {'global_pool': 'avg', 'fc_norm': False, 'norm_layer': partial(nn.LayerNorm, eps=1e-6)} | kwargs
        super().__init__(*args, **kwargs)
        self.check_arguments()
        self.init_evolution(keep_ratio, range(4, len(self.blocks), 4) if stages is None else stages, representative)
        self.norm_cls = copy.deepcopy(self.norm if isinstance(self.fc_norm, nn.Identity) else self.fc_norm)
        self.head_cls = nn.Identity()
        if self.num_classes > 0:
            like = dict(device=self.cls_token.device, dtype=self.cls_token.dtype)
            self.head_cls = nn.Linear(self.embed_dim, self.num_classes, **like)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.num_classes > 0:
            self._init_weights(self.head_cls)

    def check_arguments(self):
        """ValueError if timm's arguments built anything that this class does not compute exactly."""
        if reason := why_not_arguments(self):
            raise ValueError(reason)
        if not self.has_class_token or self.num_prefix_tokens != 1:
            raise ValueError(
                'class_token, reg_tokens: expected one class token and nothing else before the patches, found '
                f'class_token={self.has_class_token}, reg_tokens={self.num_reg_tokens}'
            )
        if self.attn_pool is not None:
            raise ValueError(f"global_pool: expected 'avg', 'token', 'max', 'avgmax' or '', found '{self.global_pool}'")
        if self.pos_embed is None:  # some versions of timm then leave the class token out
            raise ValueError("pos_embed: expected 'learn', found none")

    def fuse(self):
        """For inference: drop the head that training alone uses, in place; both families have this call."""
        self.norm_cls = self.head_cls = None
        self.fused = True
        return self.eval()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {'pos_embed', 'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r'^cls_token|pos_embed|patch_embed|norm_pre', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))]
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        super().reset_classifier(num_classes, global_pool)
        self._init_weights(self.head)
        if self.fused:
            return
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head_cls = head.to(self.cls_token).train(self.training)
        self._init_weights(self.head_cls)

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        """Nothing: the published network normalises after pooling."""
        return tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | Heads:
        """Tokens (B, 1 + N, C) to logits (B, classes); in training to both heads. `pre_logits` stops before."""
        pooled = self.head_drop(self.fc_norm(self.norm(self.pool(x))))
        if pre_logits:
            return pooled
        if self.training and self.num_classes > 0:
            return Heads(self.head(pooled), self.head_cls(self.head_drop(self.norm_cls(x[:, 0]))))
        return self.head(pooled)

    is_published = staticmethod(published.is_evo_deit)
    from_published = staticmethod(published.evo_deit_from_published)
    to_published = staticmethod(published.evo_deit_to_published)

    def convert_state(
        self, state: dict[str, Tensor], resize: bool = False
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """State dict of the published layout, or of a plain DeiT or ViT, to one of this model.

        A plain DeiT or ViT classifies from its class token, so `head_cls` and `norm_cls` start as copies of its `head`
        and `norm`. With `resize`, positions and patches are resized to this model's, and a distillation token is
        dropped. Returns the state dict, the names that were filled so, and the names that were dropped.
        """
        state = self.from_published(state) if self.is_published(state) else dict(state)
        filled, dropped = [], []
        if resize:
            if 'dist_token' in state:
                state['pos_embed'] = torch.cat([state['pos_embed'][:, :1], state['pos_embed'][:, 2:]], 1)
                dropped = [
                    key
                    for key in ('dist_token', 'head_dist.weight', 'head_dist.bias')
                    if state.pop(key, None) is not None
                ]
            state = checkpoint_filter_fn(state, self)
        for own, plain in () if self.fused else (('norm_cls', 'norm'), ('head_cls', 'head')):
            for leaf in ('weight', 'bias'):
                if f'{own}.{leaf}' not in state and f'{plain}.{leaf}' in state:
                    state[f'{own}.{leaf}'] = state[f'{plain}.{leaf}'].clone()
                    filled.append(f'{own}.{leaf}')
        state.setdefault('_extra_state', self.get_extra_state())
        return state, filled, dropped


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


def _create(variant: str, pretrained: bool = False, **kwargs) -> EvoDeiT:
    size = variant.split('_')[2]
    embed_dim, num_heads = SIZES[size]
    patch_size, img_size = (int(n) for n in re.search(r'patch(\d+)_(\d+)', variant).groups())
    kwargs = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=12, num_heads=num_heads) | kwargs
    return build_model_with_cfg(
        EvoDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state, model: model.convert_state(state, resize=True)[0],
        feature_cfg=dict(out_indices=3, feature_cls='getter'),
        **kwargs,
    )


register_variants(_create, default_cfgs)

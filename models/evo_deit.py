"""Evo-DeiT: a DeiT in which half of the patches go through blocks 4 to 11 and the others skip them (see evolution.py).

The network is timm's VisionTransformer, with its parameter names, so weights of plain DeiTs and ViTs load by name. It
differs in three ways: groups of blocks evolve; the prediction is made from the mean of all patches, normalized after
the mean; in training, a second head, `head_cls`, predicts from the class token. With the weights of a plain DeiT, whose
head was trained on the class token, the prediction is made from the class token too.

Shapes: B batch, N patches, C channels.
"""

import copy
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import published
from .evolving import SavedEvolution, register_variants
from .published import check_tokens, copy_class_head, drop_distillation, fold_layer_scale, match_class_position
from .vit import EvolvingViT, evolve_blocks, why_not_layers
from .weights import resize_weights

# Poolings that need no weights of their own. The extra state holds an index into this list: append, never reorder.
POOLINGS = 'avg', 'token', 'max', 'avgmax'


def pooling_index(pooling: str | None) -> int:
    return POOLINGS.index(pooling) if pooling in POOLINGS else -1


class Heads(NamedTuple):
    """Logits (B, classes) in training, from the mean of the patches and from the class token."""

    head: Tensor
    head_cls: Tensor


class EvoDeiT(SavedEvolution, EvolvingViT, VisionTransformer):
    """Vision transformer with slow-fast token evolution.

    Takes the arguments of timm's VisionTransformer, and:
        keep_ratio: fraction of informative patches, one number or one per stage.
        stages: the first block of each stage that evolves; earlier blocks see every patch. Default: 4, 8, ..., so a
            model of 4 blocks or fewer does not evolve.
        representative: what placeholders follow, see evolution.py: 'none' (the original), 'one' or 'nearest'.
        fused: create the model already fused, to load fused weights.

    ValueError for arguments that could not be computed exactly: tokens besides the class token and the patches, no
    positions, patch dropout, attention pooling, other blocks or attention. Defaults differ from timm's in
    `global_pool`, 'avg', and in the name of the norm after the pooling, `norm`; with `fc_norm=True` it has timm's name.
    The pooling always comes before the norm.

    Attributes that are saved with the weights:
        stage_wise: select before each stage (True, as at the end of training), or before each of its blocks.
        evolving: False makes every block see every patch.
        global_pool: the input of the head, 'avg' the mean of the patches, 'token' the class token.

    Source: timm.models.vision_transformer.VisionTransformer, and the original Evo-DeiT.
    """

    def __init__(
        self,
        *args,
        keep_ratio: float | Sequence[float] = 0.5,
        stages: Sequence[int] | None = None,
        representative: str | bool = 'none',
        fused: bool = False,
        **kwargs,
    ):
        kwargs = {'global_pool': 'avg', 'fc_norm': False, 'norm_layer': partial(nn.LayerNorm, eps=1e-6)} | kwargs
        super().__init__(*args, **kwargs)
        self.check_layers()
        evolve_blocks(self)
        self.init_evolution(keep_ratio, range(4, len(self.blocks), 4) if stages is None else stages, representative)
        self.norm_cls = copy.deepcopy(self.norm if isinstance(self.fc_norm, nn.Identity) else self.fc_norm)
        self.head_cls = nn.Identity()
        if self.num_classes > 0:  # initialized, not copied: a seed gives the same weights as in older runs
            like = dict(device=self.cls_token.device, dtype=self.cls_token.dtype)
            self.head_cls = nn.Linear(self.embed_dim, self.num_classes, **like)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._init_weights(self.head_cls)
        if fused:
            self.fuse()

    def check_layers(self):
        """ValueError if timm's arguments made layers that this class would not compute exactly."""
        if reason := why_not_layers(self):
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

    def get_extra_state(self) -> Tensor:
        """The schedule and the pooling as a tensor, so that they are part of every state dict."""
        return torch.tensor([self.stage_wise, self.evolving, pooling_index(self.global_pool)])

    def set_extra_state(self, state: Tensor):
        stage_wise, evolving, pooling = state.tolist()
        self.stage_wise, self.evolving = bool(stage_wise), bool(evolving)
        # A model that returns its tokens (global_pool='') has no head, and keeps returning them.
        if pooling >= 0 and self.global_pool in POOLINGS:
            self.global_pool = POOLINGS[pooling]

    def fuse(self):
        """Prepare for inference, in place: drop the head that only training uses."""
        self.norm_cls = self.head_cls = None
        self.fused = True
        return self.eval()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        super().reset_classifier(num_classes, global_pool)
        self._init_weights(self.head)
        if not self.fused:
            self.head_cls = copy.deepcopy(self.head)
            self._init_weights(self.head_cls)

    def tradeoffs(self) -> list[float]:
        # A moving average that starts with the last block before the first selection.
        first = min(self.first_blocks, default=len(self.blocks))
        return [1.0 if i < first else 0.5 for i in range(len(self.blocks))]

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        return tokens  # the original normalizes after the pooling

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | Heads:
        """Tokens (B, 1 + N, C) to logits (B, classes), or with `pre_logits` to pooled features (B, C).

        In training these are the mean of both heads or, after `set_distilled_training`, the logits of each.
        """
        pooled = self.head_drop(self.fc_norm(self.norm(self.pool(x))))
        if pre_logits:
            return pooled
        if not self.training or self.num_classes == 0:
            return self.head(pooled)
        # In training the class token, whose attention selects patches, has a loss too.
        heads = Heads(self.head(pooled), self.head_cls(self.head_drop(self.norm_cls(x[:, 0]))))
        return heads if self.distilled_training else sum(heads) / len(heads)

    is_published = staticmethod(published.is_evo_deit)
    from_published = staticmethod(published.evo_deit_from_published)
    to_published = staticmethod(published.evo_deit_to_published)

    def convert_state(
        self, state: dict[str, Tensor], resize: bool = False, finetune: bool | None = None
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Convert a state dict in the original layout, or of a plain DeiT or ViT, to one of this model.

        A plain DeiT or ViT has no `head_cls` and `norm_cls`; they become copies of its `head` and `norm`. If the model
        lacks LayerScale, or a position of the class token, these are folded into other weights.

        Args:
            resize: resize positions and patches to this model's.
            finetune: the weights are for training: the pooling does not change, and a distillation token is dropped.
                Otherwise the pooling becomes the one that the head was trained with: the class token, or the mean of
                the patches if the ViT's norm follows the mean (`fc_norm`). Default: `resize`.

        Returns the state dict, the names filled with copies, and the names dropped. ValueError for weights that this
        model cannot reproduce.
        """
        finetune = resize if finetune is None else finetune
        pooling = None
        if self.is_published(state):
            state, pooling = self.from_published(state), 'avg'
        elif '_extra_state' not in state and 'head_cls.weight' not in state:  # a plain ViT
            # Its norms say what its head was trained on; without a head there is nothing to say.
            pooling = 'avg' if 'fc_norm.weight' in state else 'token' if 'head.weight' in state else None
            if isinstance(self.fc_norm, nn.Identity):  # the norm after the pooling is called `norm` here
                state = {re.sub(r'^fc_norm\.', 'norm.', key): value for key, value in state.items()}
        state = dict(state)
        check_tokens(state)
        dropped = drop_distillation(state, finetune)
        if len(self.blocks) and isinstance(self.blocks[0].ls1, nn.Identity):
            fold_layer_scale(state)
        match_class_position(state, self.patch_embed.num_patches, self.no_embed_class, resize)
        if resize:
            state = resize_weights(self, state)
        filled = [] if self.fused else copy_class_head(state)
        pooling = self.global_pool if finetune else pooling
        schedule = state.get('_extra_state', self.get_extra_state())
        if pooling:
            schedule = torch.tensor([*schedule[:2].tolist(), pooling_index(pooling)])
        state['_extra_state'] = schedule
        return state, filled, dropped


def _pretrained_state(state: dict[str, Tensor], model: EvoDeiT) -> dict[str, Tensor]:
    """For timm's pretrained=True: with other classes than the file has, the weights are for training."""
    other_classes = 'head.weight' in state and len(state['head.weight']) != model.num_classes
    return model.convert_state(state, resize=True, finetune=other_classes)[0]


# embed_dim and num_heads; the depth is 12 and the MLP ratio 4. A new size is an entry here, and its names in NAMES.
SIZES = {'nano': (64, 2), 'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}
NAMES = [
    'nano_patch4_32', 'tiny_patch16_224', 'small_patch16_224', 'base_patch16_224', 'small_patch16_384',
    'base_patch16_384', 'tiny_vis_patch16_224', 'small_vis_patch16_224', 'base_vis_patch16_224',
    'small_vis_patch16_384', 'base_vis_patch16_384',
]  # fmt: skip
_cfg = partial(PretrainedCfg, fixed_input_size=True, first_conv='patch_embed.proj', classifier=('head', 'head_cls'))
default_cfgs = generate_default_cfgs(
    {f'evo_deit_{name}': _cfg(input_size=(3, *2 * [int(name.split('_')[-1])])) for name in NAMES}
)


def _create(variant: str, pretrained: bool = False, **kwargs) -> EvoDeiT:
    _, _, size, *_, patch_size, img_size = variant.replace('patch', '').split('_')
    embed_dim, num_heads = SIZES[size]
    patch_size, img_size = int(patch_size), int(img_size)
    kwargs = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=12, num_heads=num_heads) | kwargs
    return build_model_with_cfg(
        EvoDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=_pretrained_state,
        feature_cfg=dict(out_indices=3, feature_cls='getter'),
        **kwargs,
    )


register_variants(_create, default_cfgs)

"""What all evolving networks share: the schedule, the loop over groups of blocks, and timm's interface.

A forward pass is this chain of calls:

    model(images)                                   forward_features, then the head
        Evolving.forward_blocks(images)             embeds the images and partitions the blocks into groups
            update_group(tokens, score, ...)        one group: evolution.update_group, or a rival with its signature
                evolution.run_blocks(...)           the informative tokens go through the blocks of the group
                    blocks[i](tokens, places=..., attn_mask=...)        a block, called as a module

Shapes: B batch, P prefix tokens, N patches, K informative patches, C channels.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from operator import index

import numpy as np
import torch
from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import evolution
from .evolution import Block, Group, Selection, Tradeoff


def to_floats(name: str, value: float | Sequence[float] | np.ndarray | Tensor) -> list[float]:
    """Return one number or several, of Python, NumPy or torch, as a list; ValueError with `name` for anything else."""
    try:
        values = np.atleast_1d(np.asarray(value))
        if values.dtype.kind not in 'iuf':
            raise TypeError
        if values.dtype in (np.float16, np.float32):
            # A float32 of 0.7 is 0.69999999, which could keep one patch less than 0.7 does.
            values = values.astype(float).round(np.finfo(values.dtype).precision)
        return values.astype(float).tolist()
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name}: expected numbers, found {value!r}') from error


def default_stages(depth: int) -> tuple[int, int]:
    """The first blocks of two stages, at 1/3 and 2/3 of the depth; ValueError for fewer than 3 blocks."""
    if depth < 3:
        other = ', or stages=[1] and one keep_ratio' if depth == 2 else ''
        raise ValueError(
            f'stages: expected 3 blocks or more, for two stages, found {depth}; pass stages=[] for none{other}'
        )
    return depth // 3, 2 * depth // 3


def warn_if_rising(keep_ratio: Sequence[float]):
    """Warn of a stage with more patches than the one before."""
    if any(later > earlier for earlier, later in pairwise(keep_ratio)):
        warnings.warn(f'keep_ratio rises, {keep_ratio}: expected fewer patches in later stages', stacklevel=3)


def find_replaced_forward(modules: Iterable[nn.Module]) -> str:
    """Say which of these modules had its `forward` replaced, as accelerate does; '' if none. It would hide ours."""
    for module in modules:
        if 'forward' in vars(module):
            found = type(module).__name__
            return f'forward of {found} was replaced and would hide the evolved one: evolve first, then offload'
    return ''


class Evolving:
    """A network whose blocks evolve tokens: its schedule, and the loop over its groups of blocks.

    Attributes; all but `first_blocks` may be changed at any time:
        first_blocks: the first block of each stage, counted over the network; earlier blocks see every patch.
        keep_ratio: fraction of informative patches, a tuple with one number per stage.
        representative: what placeholders follow: 'none', 'one' or 'nearest'.
        stage_wise: select before each stage, or before each of its blocks.
        evolving: False makes every block see every patch.
        update_group: how a group of blocks updates tokens: evolution.update_group, or a function with its signature.

    A subclass calls `init_evolution` once it has its blocks, and defines `prepare`. If its grid changes on the way, it
    also defines `block_names`, `new_grids` and `change_grid`.

    Blocks are called as modules, so hooks on them and on the layers inside run once per forward pass (with gradient
    checkpointing, once more in the backward pass), and FSDP, LoRA, offloading and quantization work. Inside an evolving
    stage a hook does not see a grid but P prefix tokens and K informative tokens in no particular order, (B, P + K, C);
    `forward_intermediates` returns grids and `forward_with_selection` the raster indices. The last block before a
    selection returns a tuple: its tokens, and the attention (B, K) that the selection reads.
    """

    update_group: Callable = staticmethod(evolution.update_group)

    # --- the schedule

    def init_evolution(
        self,
        keep_ratio: float | Sequence[float],
        stages: Sequence[int],
        representative: str | bool,
        stage_wise: bool = True,
        evolving: bool = True,
    ):
        """Set the schedule; ValueError, and no change, if it is not valid."""
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
        ratios, representative = self.check_ratios(keep_ratio, stages), evolution.check_representative(representative)
        self.first_blocks, self._keep_ratio, self._representative = stages, ratios, representative
        self.stage_wise, self.evolving = stage_wise, evolving

    def check_ratios(self, keep_ratio: float | Sequence[float], stages: Sequence[int]) -> tuple[float, ...]:
        """One keep ratio per stage; ValueError if one is not valid, or keeps no patch."""
        ratios = evolution.check_keep_ratio(to_floats('keep_ratio', keep_ratio), len(stages))
        for block, ratio in zip(stages, ratios, strict=True):
            evolution.num_informative(self.num_patches(block), ratio)
        return ratios

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
        self._keep_ratio = self.check_ratios(value, self.first_blocks)

    @property
    def method(self) -> str:
        """The name of the method: 'evolve', or a rival's."""
        update = getattr(self.update_group, 'func', self.update_group)  # arguments may be bound to it
        return 'evolve' if update is evolution.update_group else update.__name__

    def load_schedule(self, schedule: dict):
        """Set the schedule to what `schedule()` returned for another model; ValueError if it does not fit this one."""
        names = 'keep_ratio', 'stages', 'representative', 'stage_wise', 'evolving'
        self.init_evolution(**{name: schedule[name] for name in names})

    def set_schedule(self, stage_wise: bool, evolving: bool = True):
        """Choose when to select."""
        self.stage_wise, self.evolving = stage_wise, evolving

    def schedule(self) -> dict:
        """When, how much and how the model evolves, as plain data; a rival adds its `method` and arguments."""
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

    def groups(self, cuts: Sequence[int] = ()) -> list[Group]:
        """Partition the blocks into groups that share a selection; a group also ends after each block in `cuts`."""
        depth = len(self.block_names())
        # timm's features_only may have dropped the last blocks, and with them the stages that begin there.
        stages = [block for block in self.first_blocks if block < depth] if self.evolving else []
        ratios = self.keep_ratio[: len(stages)]
        return evolution.partition(depth, stages, ratios, self.stage_wise, self.new_grids(), cuts)

    # --- what a network defines

    def block_names(self) -> list[str]:
        """The names of all blocks, in order."""
        return [f'blocks.{i}' for i in range(len(self.blocks))]

    def num_patches(self, block: int) -> int:
        """The number of patches on a block's grid, for images of the model's own size."""
        return self.patch_embed.num_patches

    def new_grids(self) -> list[int]:
        """The blocks before which the grid changes."""
        return []

    def prepare(self, images: Tensor) -> tuple[Tensor, list[Block]]:
        """Embed images (B, channels, height, width): tokens (B, P + N, C), and the blocks to call on them."""
        raise NotImplementedError

    def tradeoffs(self) -> list[Tradeoff]:
        """The weight of each block's class attention in the score. Here the last block before a selection decides."""
        return [1.0] * len(self.block_names())

    # --- the forward pass

    def checkpointed(self, module: Callable) -> Callable:
        """The module, wrapped to run again in the backward pass if gradient checkpointing is on."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return module
        return partial(checkpoint, module, use_reentrant=False)

    def forward_blocks(
        self,
        images: Tensor,
        out_indices: Sequence[int] = (),
        stop_early: bool = False,
        take_out: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Selection], list[Tensor]]:
        """Embed images (B, channels, height, width) and run all blocks.

        Args:
            out_indices: blocks after which the tokens, with the whole grid, are returned.
            stop_early: skip the blocks after the last of `out_indices`; ValueError if there are none.
            take_out: called with each of these outputs; the next block gets what it returns, which has the same values.

        Returns tokens (B, P + N, C), the selections by the name of their group's first block, and the outputs.
        """
        if stop_early and not out_indices:
            raise ValueError('stop_early: expected out_indices, after the last of which to stop, found none')
        tokens, blocks = self.prepare(images)
        blocks = [self.checkpointed(block) for block in blocks]
        # A group ends where the selection changes, where the grid changes, and where the caller wants the whole grid.
        names, groups = self.block_names(), self.groups(out_indices)
        # Attention is computed, and the score passed on, only as far as a later selection reads them.
        tradeoffs = evolution.drop_unread(self.tradeoffs(), groups)
        last_selection = max([g.start for g in groups if g.select and g.keep_ratio < 1], default=0)
        # A rival without stages, such as merging, would go on reducing tokens in a model that does not evolve.
        update_group = self.update_group if self.evolving else evolution.update_group
        score, selection, selections, outputs = None, None, {}, []
        for start, stop, ratio, select in groups:
            if stop_early and start > max(out_indices):
                break
            if start in self.new_grids():
                tokens, score = self.change_grid(start, tokens, score if start <= last_selection else None)
                selection = None  # its clusters were of the old grid
            # Whole grid in, whole grid out: what happens to the tokens in between is up to `update_group`.
            group = blocks[start:stop], tradeoffs[start:stop], ratio, self.representative
            tokens, score, selection = update_group(
                tokens, score, *group, selection, select, prefix=self.num_prefix_tokens
            )
            if select and selection is not None:
                # Without what the next group or a rival needs.
                selections[names[start]] = Selection(*selection[:3], keep_ratio=ratio)
            if stop - 1 in out_indices:
                if take_out is not None:
                    grid, tokens = tokens, take_out(tokens)
                    clusters = isinstance(selection, Selection) and selection.tokens is not None
                    if clusters and tokens is not grid:
                        selection = evolution.move_clusters(selection, tokens - grid)
                outputs.append(tokens)
        return tokens, selections, outputs

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's output, and each selection as {'blocks.4': kept (B, K)}: raster indices, int64, ascending."""
        tokens, selections, _ = self.forward_blocks(images)
        output = self.forward_head(self.norm_tokens(tokens))
        return output, {name: selection.kept.sort(1).values for name, selection in selections.items()}

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        """The norm between the blocks and the head."""
        return self.norm(tokens)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, channels, height, width) to all tokens (B, P + N, C), the whole grid in raster order."""
        return self.norm_tokens(self.forward_blocks(images)[0])

    def feature_levels(self, images: Tensor) -> list[tuple[int, tuple[int, int]]]:
        """The levels of `forward_intermediates`: the last block of each, and its grid (rows, columns)."""
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
        """timm's interface: the whole grid after each chosen block, in Evo-LeViT after each chosen stage.

        Returns what timm's VisionTransformer does: (features, intermediates), the intermediates alone, or a dictionary;
        each (B, C, rows, columns) or (B, N, C). ValueError for an attention mask.

        The features are computed from the intermediates (without `norm`), so `torch.autograd.grad` gives the gradients
        that Grad-CAM needs, for each block before the last.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt: expected NCHW or NLC, found {output_fmt}')
        if attn_mask is not None:
            raise ValueError('attn_mask: expected none, as masks are not supported')
        levels = self.feature_levels(x)
        chosen = [levels[i] for i in sorted(feature_take_indices(len(levels), indices, as_set=True)[0])]
        prefix, patches, grids = [], [], iter([grid for _, grid in chosen])

        def take_out(tokens: Tensor) -> Tensor:
            """Store the prefix and the grid, and return tokens that depend on them, as gradients need."""
            out = list((self.norm(tokens) if norm else tokens).tensor_split([self.num_prefix_tokens], 1))
            if output_fmt == 'NCHW':
                out[1] = out[1].transpose(1, 2).unflatten(-1, next(grids)).contiguous()
            prefix.append(out[0])
            patches.append(out[1])
            if norm or not tokens.requires_grad:
                return tokens
            return torch.cat([out[0], out[1].flatten(2).transpose(1, 2) if output_fmt == 'NCHW' else out[1]], 1)

        x = self.forward_blocks(x, [block for block, _ in chosen], stop_early, take_out)[0]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            out = {'image_intermediates': patches}
            out |= {'image_intermediates_prefix': prefix} if return_prefix_tokens else {}
            return out if intermediates_only else out | {'image_features': self.norm_tokens(x)}
        intermediates = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return intermediates if intermediates_only else (self.norm_tokens(x), intermediates)

    def forward(self, images: Tensor):
        """Images (B, channels, height, width) to the output of the head, in evaluation logits (B, classes)."""
        return self.forward_head(self.forward_features(images))


class SavedEvolution(Evolving):
    """A network of our own: its schedule is saved with its weights, and `fuse` prepares it for inference."""

    fused = False
    distilled_training = False

    def set_distilled_training(self, enable: bool = True):
        """Return the logits of all heads in training, for a loss on each; without this, their mean, as timm does."""
        self.distilled_training = enable

    def train(self, mode: bool = True):
        if mode and self.fused:
            raise ValueError('a fused model cannot be trained, as it has lost its training heads: create a new one')
        return super().train(mode)


def register_variants(create: Callable, variants: Iterable[str]):
    """Register `create(variant, pretrained=False, **kwargs)` with timm under the name of each variant."""
    for variant in variants:

        def entry(pretrained: bool = False, variant: str = variant, **kwargs) -> nn.Module:
            return create(variant, pretrained, **kwargs)

        entry.__name__, entry.__module__ = variant, create.__module__
        register_model(entry)

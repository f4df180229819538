"""What every evolving network shares: its schedule, the loop over its groups of blocks, and timm's interface.

One forward pass is this chain of calls:

    model(images)                            forward: forward_features, then the head
        Evolving.evolve(images)              embeds the images, and cuts the list of blocks into groups
            update_group(tokens, score, ...)     one group: evolution.evolve, or a rival with its signature
                evolution.run_blocks(...)        the informative tokens go through the blocks of the group
                    blocks[i](tokens, places=..., attn_mask=...)     a block, called as a module

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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import evolution
from .evolution import Block, Group, Selection, Tradeoff


def to_floats(name: str, value: float | Sequence[float] | np.ndarray | Tensor) -> list[float]:
    """One number or several, Python's, NumPy's or torch's, as a list; ValueError with `name` for anything else."""
    try:
        values = np.atleast_1d(np.asarray(value))
        if values.dtype.kind not in 'iuf':
            raise TypeError
        # A float32 counts as it prints: 0.7 is 0.7, not 0.69999999, which could keep one patch less.
        return [float(str(x)) for x in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name}: expected numbers, found {value!r}') from error


def default_stages(depth: int) -> tuple[int, int]:
    """The first blocks of two stages, at a third and at two thirds of the depth; ValueError for less than 3 blocks."""
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


class Evolving:
    """A network whose blocks evolve tokens: its schedule, and the loop over its groups of blocks.

    Attributes; all but `first_blocks` may be changed at any time:
        first_blocks: the first block of each stage, counted over the network; the blocks before see every patch.
        keep_ratio: fraction of informative patches, a tuple with one number for each stage.
        representative: who represents placeholders: 'none', 'one' or 'nearest'.
        stage_wise: select before each stage, or before each of its blocks.
        evolving: False makes every block see every patch.
        update_group: what happens to a group of blocks; evolution.evolve, or another function with its signature.

    A network calls `init_evolution` once it has its blocks, and has `prepare` and `tradeoffs`. One whose grid changes
    on the way has `block_names`, `new_grids` and `change_grid` too.

    Blocks are called as modules, so hooks on them and on the layers inside run once a forward pass (with gradient
    checkpointing once more in the backward pass), and FSDP, LoRA, offloading and quantization work. What a hook sees
    inside an evolving stage are the P prefix tokens and the K informative tokens in no particular order, (B, P + K, C),
    not a grid: `forward_intermediates` returns grids, and `forward_with_selection` the raster indices. The last block
    before a selection returns a tuple, its tokens and the attention (B, K) that the selection reads.
    """

    update_group: Callable = staticmethod(evolution.evolve)

    # --- the schedule

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
            evolution.num_informative(self.num_patches(block), ratio)
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

    def groups(self, cuts: Sequence[int] = ()) -> list[Group]:
        """The blocks as groups that share a selection; a group also ends after each of the blocks `cuts`."""
        depth = len(self.block_names())
        stages = [block for block in self.first_blocks if block < depth] if self.evolving else []  # timm may cut blocks
        ratios = self.keep_ratio[: len(stages)]
        return evolution.partition(depth, stages, ratios, self.stage_wise, self.new_grids(), cuts)

    # --- what a network fills in

    def block_names(self) -> list[str]:
        """The names of all blocks, in order."""
        return [f'blocks.{i}' for i in range(len(self.blocks))]

    def num_patches(self, block: int) -> int:
        """How many patches a block sees in images of the size that the model was made for."""
        return self.patch_embed.num_patches

    def new_grids(self) -> list[int]:
        """The blocks before which the grid changes."""
        return []

    def prepare(self, images: Tensor) -> tuple[Tensor, list[Block]]:
        """Images (B, channels, height, width) to tokens (B, P + N, C), and the blocks to call on them."""
        raise NotImplementedError

    def tradeoffs(self) -> list[Tradeoff]:
        """How much of each block's class attention enters the score."""
        raise NotImplementedError

    # --- the forward pass

    def recomputed(self, module: Callable) -> Callable:
        """The module, run again in the backward pass where gradient checkpointing is on."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return module
        return partial(checkpoint, module, use_reentrant=False)

    def evolve(
        self,
        images: Tensor,
        out_indices: Sequence[int] = (),
        stop_early: bool = False,
        take_out: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Selection], list[Tensor]]:
        """Embed images (B, channels, height, width) and run all blocks.

        Returns tokens (B, P + N, C), the selections by the name of the group's first block, and the tokens after each
        of the blocks `out_indices`; with `stop_early`, which needs these, blocks after the last of them are left out.
        `take_out` is called with each of these outputs, and the next block gets what it returns.
        """
        if stop_early and not out_indices:
            raise ValueError('stop_early: expected out_indices, after the last of which to stop, found none')
        tokens, blocks = self.prepare(images)
        blocks = [self.recomputed(block) for block in blocks]
        # A group ends where the selection changes, where the grid changes, and where somebody wants the whole grid.
        names, groups = self.block_names(), self.groups(out_indices)
        tradeoffs = evolution.drop_unread(self.tradeoffs(), groups)
        last_selection = max([g.start for g in groups if g.select and g.keep_ratio < 1], default=0)
        update_group = self.update_group if self.evolving else evolution.evolve  # merging has no stages to leave out
        score, selection, selections, outputs = None, None, {}, []
        for start, stop, ratio, select in groups:
            if stop_early and start > max(out_indices):
                break
            if start in self.new_grids():
                tokens, score = self.change_grid(start, tokens, score if start <= last_selection else None)
            # Whole grid in, whole grid out: what happens to the tokens in between is up to `update_group`.
            tokens, score, selection = update_group(
                tokens,
                score,
                blocks[start:stop],
                tradeoffs[start:stop],
                ratio,
                self.representative,
                selection,
                select,
                prefix=self.num_prefix_tokens,
            )
            if select and selection is not None:
                selections[names[start]] = Selection(*selection[:3])  # a method may keep more in its own
            if stop - 1 in out_indices:
                tokens = tokens if take_out is None else take_out(tokens)
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

        Features depend on the intermediates (without `norm`), so `torch.autograd.grad` gives gradients by grids, as
        Grad-CAM needs. Inside a stage of 'nearest' they are the gradients of the end of the stage: take its last block,
        or one before the first stage.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt: expected NCHW or NLC, found {output_fmt}')
        if attn_mask is not None:
            raise ValueError('attn_mask: expected none, as it would not be computed')
        levels = self.feature_levels(x)
        chosen = [levels[i] for i in sorted(feature_take_indices(len(levels), indices, as_set=True)[0])]
        prefix, patches, grids = [], [], iter([grid for _, grid in chosen])

        def take_out(tokens: Tensor) -> Tensor:
            """Split tokens into what is returned; with a gradient, the same tokens, made of exactly these parts."""
            out = list((self.norm(tokens) if norm else tokens).tensor_split([self.num_prefix_tokens], 1))
            if output_fmt == 'NCHW':
                out[1] = out[1].transpose(1, 2).unflatten(-1, next(grids)).contiguous()
            prefix.append(out[0])
            patches.append(out[1])
            if norm or not tokens.requires_grad:
                return tokens
            return torch.cat([out[0], out[1].flatten(2).transpose(1, 2) if output_fmt == 'NCHW' else out[1]], 1)

        x = self.evolve(x, [block for block, _ in chosen], stop_early, take_out)[0]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            out = {'image_intermediates': patches}
            out |= {'image_intermediates_prefix': prefix} if return_prefix_tokens else {}
            return out if intermediates_only else out | {'image_features': self.norm_tokens(x)}
        intermediates = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
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

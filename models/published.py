"""Checkpoint layouts: convert those of the original Evo-ViT to ours and back, and those of plain ViTs to Evo-DeiT's.

Names differ by module, not below it: `weight` is `weight` everywhere. Names that are in no table are the same in both
(`cls_token`, `pos_embed`, `head.weight`, ...). Unknown tensors keep their names, so that a strict load reports them.
"""

import math
import re
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

# Evo-DeiT: the names of the original, and ours, for the modules of block {i}. The original has one layer for queries
# and keys and one for values; ours, like timm's, has one for all three.
EVO_DEIT = {'norms.{i}': 'blocks.{i}.norm1', 'projs.{i}': 'blocks.{i}.attn.proj'}
EVO_DEIT_QKV = ('qks.{i}.qk', 'vs.{i}.v'), 'blocks.{i}.attn.qkv'
# The order of parameters in the original, which its optimizer state follows.
EVO_DEIT_ORDER = 'cls_token pos_embed patch_embed blocks qks vs norms projs norm head head_cls norm_cls'.split()

# Evo-LeViT: the names inside a module. Each `c` or `l` is our `linear`.
EVO_LEVIT_ATTENTION = {'learn_tradeoff': 'learn_tradeoff', 'qkv': 'qkv', 'proj': 'proj.1'}
EVO_LEVIT_DOWNSAMPLE = {
    'learn_tradeoff': 'learn_tradeoff', 'pos_embed': 'poss', 'kv': 'kv', 'q': 'q.1', 'proj': 'proj.1'
}  # fmt: skip
EVO_LEVIT_MLP = {'ln1': '0', 'ln2': '2'}
EVO_LEVIT_STEM = {
    'pos_embed': 'poss',
    'patch_embed.conv1': 'patch_embed.0',
    'patch_embed.conv2': 'patch_embed.2',
    'patch_embed.conv3': 'patch_embed.4',
    'patch_embed.conv4': 'patch_embed.6',
}
EVO_LEVIT_HEADS = 'head', 'head_dist', 'head_cls', 'head_cls_dist'


# --- Evo-DeiT


def is_evo_deit(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is in the original layout of Evo-DeiT, with a list for each kind of layer."""
    return 'qks.0.qk.weight' in state


def evo_deit_from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict in the original layout of Evo-DeiT to our names."""
    state, out = dict(state), {}
    for i in range(sum(key.endswith('.qk.weight') for key in state)):
        for leaf in ('weight', 'bias'):
            qk, v = (f'{name.format(i=i)}.{leaf}' for name in EVO_DEIT_QKV[0])
            if qk in state and v in state:
                out[f'{EVO_DEIT_QKV[1].format(i=i)}.{leaf}'] = torch.cat([state.pop(qk), state.pop(v)])
    return out | {_rename(key, EVO_DEIT): value for key, value in state.items()}


def evo_deit_to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of EvoDeiT to the original layout and order, for the original code to load."""
    out, ours = {}, {ours: published for published, ours in EVO_DEIT.items()}
    for key, value in state.items():
        if '.attn.qkv.' in key:
            parts = value.split(2 * len(value) // 3)
            out |= {_rename(key, {EVO_DEIT_QKV[1]: name}): x for name, x in zip(EVO_DEIT_QKV[0], parts, strict=True)}
        elif key != '_extra_state':
            out[_rename(key, ours)] = value
    return dict(sorted(out.items(), key=lambda item: EVO_DEIT_ORDER.index(item[0].split('.')[0])))


def _rename(key: str, names: dict[str, str]) -> str:
    """Rename a tensor by a table of module names, with {i} for the block."""
    module, _, leaf = key.rpartition('.')
    number = re.search(r'\.\d+', module)
    i = number[0][1:] if number else ''
    template = names.get(re.sub(r'\.\d+', '.{i}', module, count=1))
    return f'{template.format(i=i)}.{leaf}' if template else key


# --- Evo-LeViT


def evo_levit_names(depth: Sequence[int]) -> list[tuple[str, str, str]]:
    """The names of all modules and parameters of a network with depth[i] layers in stage i, in the original's order.

    Each entry is our name, that of the original, and that of its second copy, '' if there is none. In the original,
    `blocks` is one list for the network: a layer is one entry, a down-sampling and its MLP are two. `stage_blocks` has
    a second copy of each tensor: a dense layer is two entries, and the evolving layers of a stage share one.
    """
    names = [(ours, published, '') for ours, published in EVO_LEVIT_STEM.items()]

    def add(ours: str, published: str, copy: str, parts: dict[str, str]):
        names.extend((f'{ours}.{a}', f'{published}.{b}', f'{copy}.{b}') for a, b in parts.items())

    blocks, copies = count(), count()
    for stage, layers in enumerate(depth):
        if stage > 0:
            down = f'stages.{stage}.downsample'
            add(down, f'blocks.{next(blocks)}', f'stage_blocks.{next(copies)}', EVO_LEVIT_DOWNSAMPLE)
            add(f'{down}.mlp', f'blocks.{next(blocks)}.m', f'stage_blocks.{next(copies)}.m', EVO_LEVIT_MLP)
        dense = min(2, layers) if stage == 0 else 0
        layer_copies = [f'stage_blocks.{next(copies)}.m' for _ in range(2 * dense)]
        if layers > dense:
            shared = next(copies)
            layer_copies += [f'stage_blocks.{shared}.m.{part}.m' for part in range(2 * (layers - dense))]
        for layer in range(layers):
            ours, published = f'stages.{stage}.blocks.{layer}', f'blocks.{next(blocks)}'
            add(f'{ours}.attn', f'{published}.m1.m', layer_copies[2 * layer], EVO_LEVIT_ATTENTION)
            add(f'{ours}.mlp', f'{published}.m2.m', layer_copies[2 * layer + 1], EVO_LEVIT_MLP)
    return names


def is_evo_levit(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is in the original layout of Evo-LeViT, with one flat list of layers."""
    return 'patch_embed.0.c.weight' in state


def evo_levit_from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict in the original layout of Evo-LeViT to our names; second copies are dropped.

    ValueError if a second copy differs from the first.
    """
    names = evo_levit_names(_published_depth(state))
    ours = {published: ours for ours, published, _ in names}
    first = {copy: published for _, published, copy in names if copy}
    out = {}
    for key, value in state.items():
        module, leaf = _split(key, 'c|l')
        original = first.get(module, '') + leaf
        if original in state:
            if not torch.equal(value, state[original]):
                raise ValueError(f'{key}: expected the same values as {original}, found others; the file is damaged')
            continue
        out[ours.get(module, module) + re.sub(r'^\.[cl]\.', '.linear.', leaf)] = value
    return out


def evo_levit_to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of EvoLeViT to the original layout and order; ValueError for a fused model's."""
    layers = re.findall(r'^stages\.(\d+)\.blocks\.\d+\.attn\.qkv\.linear\.weight$', '\n'.join(state), re.M)
    if not layers:
        raise ValueError('expected whole, unfused weights, found no stages.*.attn.qkv.linear.weight')
    depth = [layers.count(str(i)) for i in range(len(set(layers)))]
    names = {ours: published for ours, *published in evo_levit_names(depth)}
    first, copies, heads = {}, {}, {}
    for key, value in state.items():
        module, leaf = _split(key, 'linear')
        published, copy = names.get(module, (module, ''))
        if module in EVO_LEVIT_HEADS:
            heads[module + leaf.replace('.linear.', '.l.')] = value
        elif key != '_extra_state':
            leaf = leaf.replace('.linear.', '.c.')
            first[published + leaf] = value
            if copy:
                copies[copy + leaf] = value
    return first | copies | heads


def _split(key: str, linear: str) -> tuple[str, str]:
    """Split a key before its linear layer or BatchNorm: ('head', '.bn.weight'), or (key, '') if it has none."""
    found = re.search(rf'\.(?:{linear}|bn)\.', key)
    return (key[: found.start()], key[found.start() :]) if found else (key, '')


def _published_depth(state: dict[str, Tensor]) -> list[int]:
    """The number of layers in each stage: those between down-samplings in the list `blocks`."""
    layers = re.findall(r'^blocks\.(\d+)\.(kv|m1\.m\.qkv)\.c\.weight$', '\n'.join(state), re.M)
    kinds = [kind for _, kind in sorted(layers, key=lambda layer: int(layer[0]))]
    return [len(stage) for stage in ''.join('|' if kind == 'kv' else 'x' for kind in kinds).split('|')]


# --- from plain ViTs to Evo-DeiT; each function changes the state dict in place


def check_tokens(state: dict[str, Tensor]):
    """ValueError for a ViT with other prefix tokens than one class token."""
    registers = state.get('reg_token', state.get('register_tokens'))
    if 'pos_embed' not in state or ('cls_token' in state and registers is None):
        return
    found = 'no class token' if 'cls_token' not in state else f'{registers.shape[1]} register tokens'
    raise ValueError(
        f'it has {found}; Evo-DeiT has one class token, whose attention selects patches, and no registers. Use a ViT '
        'with these tokens, such as DeiT, DINO or MAE'
    )


def drop_distillation(state: dict[str, Tensor], finetune: bool) -> list[str]:
    """Remove the distillation token and its head; returns their names, none for a plain ViT."""
    if 'dist_token' not in state or 'pos_embed' not in state:
        return []
    if not finetune:
        raise ValueError(
            'this is a distilled DeiT, which predicts with the mean of two heads; Evo-DeiT has one. Use a DeiT '
            'without distillation, or fine-tune this one without its distillation token: --finetune, or adapt=True'
        )
    positions = state['pos_embed']  # of the class token, the distillation token, the patches
    state['pos_embed'] = torch.cat([positions[:, :1], positions[:, 2:]], 1)
    names = ['dist_token', 'head_dist.weight', 'head_dist.bias']
    return [name for name in names if state.pop(name, None) is not None]


def fold_layer_scale(state: dict[str, Tensor]):
    """Fold LayerScale into the layers before it."""
    for key in list(state):
        if found := re.fullmatch(r'(blocks\.\d+)\.(?:ls([12])\.gamma|gamma_([12]))', key):
            block, layer = found[1], {'1': 'attn.proj', '2': 'mlp.fc2'}[found[2] or found[3]]
            scale = state.pop(key)
            for name, factor in ((f'{block}.{layer}.weight', scale[:, None]), (f'{block}.{layer}.bias', scale)):
                if name in state:
                    state[name] = factor * state[name]


def match_class_position(state: dict[str, Tensor], patches: int, no_embed_class: bool, resize: bool):
    """Add or remove the class token's position, as a model of `patches` patches needs it.

    A file does not say whether it has one, but the number of positions does: a grid is square, or the model's.
    """
    positions = state.get('pos_embed')
    if positions is None or positions.ndim != 3 or 'cls_token' not in state:
        return
    count = positions.shape[1]
    square = [n for n in (count, count - 1) if math.isqrt(n) ** 2 == n]
    if count in (patches, patches + 1):
        grid = patches
    elif resize and not square:
        raise ValueError(
            f'its {count} positions are of a grid that is not square and cannot be resized; expected a square grid, or '
            f"the model's {patches} patches"
        )
    else:
        grid = square[0] if square else count - 1
    if grid == count and not no_embed_class:
        state['pos_embed'] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    elif grid < count and no_embed_class:
        state['cls_token'] = state['cls_token'] + positions[:, :1]
        state['pos_embed'] = positions[:, 1:]


def copy_class_head(state: dict[str, Tensor]) -> list[str]:
    """Copy `norm` and `head` to `norm_cls` and `head_cls` if they are missing; returns the new names."""
    norm = 'norm' if 'norm.weight' in state else 'fc_norm'
    filled = []
    for copied, plain in (('norm_cls', norm), ('head_cls', 'head')):
        for leaf in ('weight', 'bias'):
            if f'{copied}.{leaf}' not in state and f'{plain}.{leaf}' in state:
                state[f'{copied}.{leaf}'] = state[f'{plain}.{leaf}'].clone()
                filled.append(f'{copied}.{leaf}')
    return filled

"""Rename weights of Hugging Face's vision towers to timm's names: ViT, DeiT, DINOv2, CLIP and SigLIP.

The tables have the names in files of the hub, and those of transformers 5 in memory. The prefix of the tower may be
anything (`vit.`, `vision_model.`, `model.vision_tower.`, ...). Unknown tensors keep their names, so that a strict load
reports them.

Names do not show the configuration, which differs from timm's in a few values: norms of ViT and DeiT have eps 1e-12
(timm, and the original DeiT, 1e-6), SigLIP has the tanh approximation of GELU (timm: `act_layer='gelu_tanh'`), and CLIP
QuickGELU or GELU (timm: vit_*_clip_quickgelu_* or vit_*_clip_*).
"""

import re
from collections.abc import Mapping

import torch
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

STEM = {
    # ViT, DeiT, DINOv2
    'embeddings.cls_token': 'cls_token', 'embeddings.distillation_token': 'dist_token',
    'embeddings.register_tokens': 'reg_token', 'embeddings.position_embeddings': 'pos_embed',
    'embeddings.patch_embeddings.projection': 'patch_embed.proj', 'layernorm': 'norm',
    # CLIP, SigLIP
    'embeddings.class_embedding': 'cls_token', 'embeddings.position_embedding.weight': 'pos_embed',
    'embeddings.patch_embedding': 'patch_embed.proj', 'pre_layrnorm': 'norm_pre', 'post_layernorm': 'norm',
    # SigLIP's pooling
    'head.probe': 'attn_pool.latent', 'head.attention.in_proj_weight': 'attn_pool.qkv.weight',
    'head.attention.in_proj_bias': 'attn_pool.qkv.bias', 'head.attention.out_proj': 'attn_pool.proj',
    'head.layernorm': 'attn_pool.norm', 'head.mlp.fc1': 'attn_pool.mlp.fc1', 'head.mlp.fc2': 'attn_pool.mlp.fc2',
}  # fmt: skip
# Names of block {i}: `encoder.layer` of ViT, DeiT and DINOv2, `layers` of ViT and DeiT in memory, and CLIP and SigLIP.
BLOCKS = 'encoder.layer.{i}.', 'layers.{i}.', 'encoder.layers.{i}.'
BLOCK = {
    # ViT, DeiT, and the attention of DINOv2
    'layernorm_before': 'norm1', 'attention.attention.query': 'attn.q', 'attention.attention.key': 'attn.k',
    'attention.attention.value': 'attn.v', 'attention.output.dense': 'attn.proj', 'layernorm_after': 'norm2',
    'intermediate.dense': 'mlp.fc1', 'output.dense': 'mlp.fc2',
    # the same in memory
    'attention.q_proj': 'attn.q', 'attention.k_proj': 'attn.k', 'attention.v_proj': 'attn.v',
    'attention.o_proj': 'attn.proj', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2',
    # DINOv2
    'norm1': 'norm1', 'norm2': 'norm2', 'layer_scale1.lambda1': 'ls1.gamma', 'layer_scale2.lambda1': 'ls2.gamma',
    'mlp.weights_in': 'mlp.fc1', 'mlp.weights_out': 'mlp.fc2',
    # the same in memory
    'mlp.gate_proj': 'mlp.gate', 'mlp.up_proj': 'mlp.up', 'mlp.down_proj': 'mlp.fc2',
    # CLIP, SigLIP
    'layer_norm1': 'norm1', 'self_attn.q_proj': 'attn.q', 'self_attn.k_proj': 'attn.k', 'self_attn.v_proj': 'attn.v',
    'self_attn.out_proj': 'attn.proj', 'layer_norm2': 'norm2',
}  # fmt: skip
TOWER = STEM | {a + name: f'blocks.{{i}}.{ours}' for a in BLOCKS for name, ours in BLOCK.items()}
# Layers that timm has as one, in this order.
JOINED = {'attn.qkv': ('attn.q', 'attn.k', 'attn.v'), 'mlp.fc1': ('mlp.gate', 'mlp.up')}

# Heads, outside the tower. A DeiT has `classifier`, or with two heads the next two.
HEADS = {
    'classifier': 'head',
    'cls_classifier': 'head',
    'distillation_classifier': 'head_dist',
    'visual_projection': 'head',
}
# What timm's ViTs do not have: the pooler, mask token and position ids; the decoder of masked images; the text towers
# of CLIP and SigLIP; the rest of LLaVA and similar models.
UNUSED = (
    'pooler', 'embeddings.mask_token', 'embeddings.position_ids', 'decoder', 'text_model', 'text_projection',
    'logit_scale', 'logit_bias', 'language_model', 'lm_head', 'multi_modal_projector', 'image_newline',
)  # fmt: skip
# Names by which CLIP, SigLIP and DINOv2 are recognized.
KINDS = 'embeddings.class_embedding', 'head.probe', 'encoder.layer.0.layer_scale1.lambda1'
PATCHES = r'((?:.*\.)?)embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.weight'


def find_tower(state: Mapping[str, Tensor]) -> str | None:
    """The prefix of the vision tower's names, '' for a bare one; None if there is not exactly one tower."""
    towers = [found[1] for key in state if (found := re.fullmatch(PATCHES, key))]
    return towers[0] if len(towers) == 1 else None


def to_timm(state: Mapping[str, Tensor], model: nn.Module | None = None) -> tuple[dict[str, Tensor], list[str], str]:
    """Rename a state dict of transformers to timm's names; any other state dict does not change.

    Args:
        model: the model that the weights are for, which may have another pooling or other heads.

    Returns the state dict, the unused names (`text_model.*` stands for all with this prefix), and a message for the
    user, '' if there is none.
    """
    tower = find_tower(state)
    if tower is None:
        return dict(state), [], ''
    expected = {} if model is None else model.state_dict()
    clip, siglip, dinov2 = (tower + name in state for name in KINDS)
    unused, notes = list(UNUSED), []
    if (clip or dinov2) and 'classifier.weight' in state:
        unused.append('classifier')
        reads = 'the mean of its patches, without a norm' if clip else 'the class token and the mean of the patches'
        notes.append(f'its classifier reads {reads}, and no head of timm does')
    if siglip and ('classifier.weight' in state or (model is not None and 'attn_pool.latent' not in expected)):
        unused.append('head')  # its classifier is applied to the mean of the patches
    if clip and model is not None and not any(isinstance(m, QuickGELU) for m in model.modules()):
        notes.append("OpenAI's CLIP has QuickGELU, as vit_*_clip_quickgelu_* do, and this model does not")

    out, theirs, dropped = {}, {}, {}
    for key, value in state.items():
        before = tower if key.startswith(tower) else 'model.' if key.startswith('model.') else ''
        name = key.removeprefix(before)
        names = TOWER | HEADS if not tower else TOWER if before == tower else HEADS
        if found := next((x for x in unused if f'{name}.'.startswith(f'{x}.')), None):
            dropped[key if name == found else f'{before}{found}.*'] = None
            continue
        ours = _rename(name, names) or key
        ours = key if ours in out else ours
        out[ours], theirs[ours] = value, key

    _join(out, theirs)
    for name in ('cls_token', 'pos_embed'):
        if name in out and out[name].ndim:
            out[name] = out[name].reshape(1, -1, out[name].shape[-1])
    for leaf in ('weight', 'bias'):
        value = out.get(f'attn_pool.qkv.{leaf}')
        if value is not None and value.ndim:
            out[f'attn_pool.q.{leaf}'], out[f'attn_pool.kv.{leaf}'] = value.tensor_split([len(value) // 3])
            del out[f'attn_pool.qkv.{leaf}']
    # With registers, timm has positions for the patches only: fold that of the class token into it.
    tokens = [out[name] for name in ('reg_token', 'cls_token', 'pos_embed') if name in out]
    if len(tokens) == 3 and len({x.shape[-1:] for x in tokens}) == 1:
        out['cls_token'] = out['cls_token'] + out['pos_embed'][:, :1]
        out['pos_embed'] = out['pos_embed'][:, 1:]
    # CLIP's projection has no bias, but timm's head has one.
    head, bias = out.get('head.weight'), expected.get('head.bias')
    if clip and head is not None and bias is not None and head.shape[:1] == bias.shape:
        out.setdefault('head.bias', torch.zeros_like(bias))
    unused = f'not used: {", ".join(dropped)}' if dropped else 'all are used'
    return out, list(dropped), '; '.join([f"weights in the names of Hugging Face's transformers, {unused}", *notes])


def _rename(name: str, names: Mapping[str, str]) -> str:
    """Look up the name of a tensor in a table of modules and parameters, with {i} for the block; '' if unknown."""
    number = re.search(r'\.(\d+)\.', name)
    template = re.sub(r'\.\d+\.', '.{i}.', name, count=1)
    module, _, leaf = template.rpartition('.')
    ours = names.get(template) or (f'{names[module]}.{leaf}' if module in names else '')
    return ours.replace('{i}', number[1]) if number else ours


def _join(state: dict[str, Tensor], theirs: Mapping[str, str]):
    """Concatenate layers that timm has as one, in place; incomplete parts get their names back."""
    for key in list(state):
        for joined, parts in JOINED.items():
            if found := re.fullmatch(rf'(blocks\.\d+)\.{re.escape(parts[0])}\.(\w+)', key):
                names, whole = [f'{found[1]}.{part}.{found[2]}' for part in parts], f'{found[1]}.{joined}.{found[2]}'
                shapes = {state[name].shape if name in state else None for name in names}
                if whole not in state and len(shapes) == 1 and shapes not in ({None}, {()}):
                    state[whole] = torch.cat([state.pop(name) for name in names])
    for key in list(state):
        if re.fullmatch(r'blocks\.\d+\.(attn\.[qkv]|mlp\.gate|mlp\.up)\.\w+', key):
            state[theirs[key]] = state.pop(key)

"""Vision towers in the names of Hugging Face's transformers compute in timm's models what they compute in theirs.

`golden/huggingface.json` has names, shapes and outputs of the classes of transformers; this file run as a script writes
it anew, where transformers is installed.
"""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import timm
import torch
from golden import fill
from torch import Tensor

import models
from models import huggingface, weights
from models.weights import InputError

GOLDEN = Path(__file__).parent / 'golden' / 'huggingface.json'
SIZE = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4)
MLP = SIZE | dict(intermediate_size=32)
TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
TEXT |= dict(max_position_embeddings=4, bos_token_id=0, eos_token_id=1)


class Case(NamedTuple):
    """A class of transformers, its configuration, timm's model, what it does not use, and features and output."""

    cls: str
    config: dict
    model: str
    kwargs: dict
    unused: set[str]
    outputs: Callable


def features_of(part: str) -> Callable:
    return lambda model, x: (getattr(model, part)(x).last_hidden_state, model(x).logits)


def tower(model, x):
    out = model(x)
    return out.last_hidden_state, out.pooler_output


def clip(model, x):
    vision = getattr(model, 'vision_model', model)  # its last_hidden_state is before the norm
    out = vision(x)
    projection = getattr(model, 'visual_projection', torch.nn.Identity())
    return vision.post_layernorm(out.last_hidden_state), projection(out.pooler_output)


CASES = {
    'ViT': Case(
        'ViTForImageClassification', MLP | dict(num_labels=3, layer_norm_eps=1e-6), 'vit_tiny_patch16_224',
        dict(num_classes=3), set(), features_of('vit'),
    ),
    'ViT without classes': Case(
        'ViTModel', MLP | dict(layer_norm_eps=1e-6), 'vit_tiny_patch16_224',
        {}, {'pooler.*'}, lambda model, x: (model(x).last_hidden_state, model(x).last_hidden_state[:, 0]),
    ),
    'DeiT': Case(
        'DeiTForImageClassificationWithTeacher', MLP | dict(num_labels=3, layer_norm_eps=1e-6),
        'deit_tiny_distilled_patch16_224', dict(num_classes=3), set(), features_of('deit'),
    ),
    'DINOv2': Case(
        'Dinov2Model', SIZE, 'vit_small_patch14_dinov2', {}, {'embeddings.mask_token'}, tower
    ),
    'DINOv2, SwiGLU': Case(
        'Dinov2ForImageClassification', SIZE | dict(use_swiglu_ffn=True, num_labels=3), 'vit_giant_patch14_dinov2',
        dict(mlp_ratio=6), {'dinov2.embeddings.mask_token', 'classifier.*'}, lambda model, x: tower(model.dinov2, x),
    ),
    'DINOv2, registers': Case(
        'Dinov2WithRegistersModel', SIZE, 'vit_small_patch14_reg4_dinov2', {}, {'embeddings.mask_token'}, tower
    ),
    'CLIP': Case(
        'CLIPModel', dict(vision_config=MLP, text_config=TEXT, projection_dim=3),
        'vit_base_patch16_clip_quickgelu_224', dict(num_classes=3),
        {'text_model.*', 'text_projection.*', 'logit_scale'}, clip,
    ),
    'CLIP, GELU': Case(
        'CLIPVisionModel', MLP | dict(hidden_act='gelu'), 'vit_base_patch16_clip_224', {}, set(), clip
    ),
    'SigLIP': Case(
        'SiglipModel', dict(vision_config=MLP, text_config=TEXT), 'vit_base_patch16_siglip_224',
        dict(act_layer='gelu_tanh'), {'text_model.*', 'logit_scale', 'logit_bias'},
        lambda model, x: tower(model.vision_model, x),
    ),
    'SigLIP, classes': Case(
        'SiglipForImageClassification', dict(vision_config=MLP, text_config=TEXT, num_labels=3),
        'vit_base_patch16_siglip_gap_224', dict(act_layer='gelu_tanh', num_classes=3), {'vision_model.head.*'},
        lambda model, x: (model.vision_model(x).last_hidden_state, model(x).logits),
    ),
    'LLaVA': Case(
        'LlavaForConditionalGeneration',
        dict(vision_config=MLP | dict(model_type='clip_vision_model'), text_config=TEXT | dict(model_type='llama')),
        'vit_base_patch16_clip_quickgelu_224', {}, {'language_model.*', 'multi_modal_projector.*'},
        lambda model, x: clip(model.model.vision_tower, x),
    ),
}  # fmt: skip


def timm_model(case: Case, **kwargs) -> torch.nn.Module:
    size = dict(img_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=0)
    return timm.create_model(case.model, **(size | case.kwargs | kwargs)).eval()


def load(case: Case, state: dict[str, Tensor], **kwargs) -> tuple[torch.nn.Module, weights.Loaded, str]:
    """The model with the weights, what load_weights gave, and what it said."""
    model, said = timm_model(case, **kwargs), []
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    loaded = weights.load_weights(model, state, report=said.append)
    return model, loaded, '\n'.join(said)


@torch.no_grad()
def check(case: Case, state: dict[str, Tensor], features: Tensor, output: Tensor):
    """Load a state dict, and compare with what it computes in transformers."""
    model, loaded, said = load(case, state)
    x = fill.images('huggingface', 1, 12)
    torch.testing.assert_close(model.forward_features(x), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-5)
    assert set(loaded.dropped) == case.unused and not loaded.missing and not loaded.filled
    assert all(name in said for name in case.unused)
    assert ('QuickGELU' in said) == (case.model == 'vit_base_patch16_clip_224')
    assert ('classifier reads' in said) == ('classifier.*' in case.unused)


# --- where transformers is installed


def transformers_model(case: Case):
    transformers = pytest.importorskip('transformers', minversion='5')
    cls = getattr(transformers, case.cls)
    return cls(cls.config_class(**case.config)).eval()


def saved(model) -> dict[str, Tensor]:
    """The state dict that transformers writes to a file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return safetensors.torch.load_file(f'{folder}/model.safetensors')


@torch.no_grad()
def filled(case: Case) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model of transformers that loaded a file of weights, functions of their names, and that file's content."""
    model = transformers_model(case)
    state = {key: fill.weight('huggingface', key, list(value.shape)) for key, value in saved(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        safetensors.torch.save_file(state, f'{folder}/model.safetensors', metadata={'format': 'pt'})
        return type(model).from_pretrained(folder).eval(), state


@pytest.mark.parametrize('name', CASES)
def test_models_of_transformers_compute_the_same_in_timm(name):
    """In the names of files and in those that the installed version has in memory."""
    case = CASES[name]
    model, state = filled(case)
    with torch.no_grad():
        expected = case.outputs(model, fill.images('huggingface', 1, 12))
    check(case, state, *expected)
    if name == 'LLaVA':
        case = case._replace(unused={'model.language_model.*', 'model.multi_modal_projector.*', 'lm_head.*'})
    check(case, model.state_dict(), *expected)


# --- everywhere


def golden(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """State dict, features and output of a model of transformers."""
    about = json.loads(GOLDEN.read_text())[name]
    names = {key.replace('{i}', str(i)): shape for key, shape in about['shapes'].items() for i in range(2)}
    state = {key: fill.weight('huggingface', key, shape) for key, shape in names.items()}
    return state, *map(torch.tensor, about['outputs'])


@pytest.mark.parametrize('name', CASES)
def test_files_of_transformers_compute_the_same_in_timm(name):
    check(CASES[name], *golden(name))


def test_position_ids_and_prefixes_of_older_files_load():
    """transformers 4 wrote `vision_model` below other prefixes, and the positions' numbers."""
    for name in ('CLIP, GELU', 'SigLIP'):
        state, features, output = golden(name)
        case = CASES[name]._replace(unused={'v.vision_model.embeddings.position_ids'})
        state = {k.removeprefix('vision_model.'): v for k, v in state.items() if 'text' not in k and 'logit' not in k}
        state = {f'v.vision_model.{k}': v for k, v in state.items()}
        check(case, state | {'v.vision_model.embeddings.position_ids': torch.arange(9)[None]}, features, output)


@pytest.mark.parametrize('name', CASES)
def test_a_load_stays_strict(name):
    """A tensor too few, too many, inside the tower or beside it, or of another shape, is an error."""
    case, (state, *_) = CASES[name], golden(name)
    tower = huggingface.find_tower(state)
    used = [k for k in state if not any(k.startswith(x.removesuffix('*')) for x in case.unused)]
    for key in used:
        with pytest.raises(InputError, match='missing|has \\d+ classes'):
            load(case, {k: v for k, v in state.items() if k != key})
        for wrong in (torch.zeros(3, 5), torch.zeros(())):
            with pytest.raises(InputError, match='does not fit'):
                load(case, state | {key: wrong})
    for key in (f'{tower}encoder.layer.0.extra.weight', f'{tower}extra', 'beside.weight'):
        with pytest.raises(InputError, match=f'1 not expected: {key}'):
            load(case, state | {key: torch.zeros(8)})


def test_heads_that_differ():
    """No classes, other classes, and SigLIP's pooling in a model without it."""
    state, *_ = golden('ViT')
    model, loaded, _ = load(CASES['ViT'], state, num_classes=0)
    assert set(loaded.dropped) == {'head.weight', 'head.bias'}
    with pytest.raises(InputError, match='has 3 classes, the model 7'):
        load(CASES['ViT'], state, num_classes=7)
    model = timm_model(CASES['ViT'], num_classes=7, img_size=16)
    loaded = weights.load_weights(model, state, adapt=True)
    assert loaded.missing == ['head.bias', 'head.weight'] and set(loaded.dropped) == {'head.weight', 'head.bias'}
    with pytest.raises(InputError, match='2 missing: head'):  # no head of timm reads what DINOv2's classifier reads
        load(CASES['DINOv2, SwiGLU'], golden('DINOv2, SwiGLU')[0], num_classes=3)
    state, features, _ = golden('SigLIP')
    _, loaded, _ = load(CASES['SigLIP, classes'], state, num_classes=0)
    assert 'vision_model.head.*' in loaded.dropped
    with pytest.raises(InputError, match='missing: attn_pool'):  # its classifier does not read the pooling
        load(CASES['SigLIP'], golden('SigLIP, classes')[0], num_classes=3)


@torch.no_grad()
def test_evo_deit_and_evolved_models_take_them():
    """A ViT in an Evo-DeiT, which tells where its head reads, and in a model that evolves."""
    state, _, output = golden('ViT')
    size = dict(img_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, stages=[1], keep_ratio=1)
    model = timm.create_model('evo_deit_tiny_patch16_224', **size).eval()
    loaded = weights.load_weights(model, state)
    assert loaded.pooling == 'token' and 'head_cls.weight' in loaded.filled
    x = fill.images('huggingface', 1, 12)
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-5)
    model = models.evolve(timm_model(CASES['ViT']), keep_ratio=1, stages=[1])
    assert not any(weights.load_weights(model, state))
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-5)


if __name__ == '__main__':
    content = {}
    for name, case in CASES.items():
        model, state = filled(case)
        with torch.no_grad():
            outputs = [
                x.double().round(decimals=6).tolist() for x in case.outputs(model, fill.images('huggingface', 1, 12))
            ]
        shapes = {re.sub(r'(layers?)\.\d\.', r'\1.{i}.', key): list(value.shape) for key, value in state.items()}
        content[name] = dict(shapes=shapes, outputs=outputs)
    GOLDEN.write_text('{\n' + ',\n'.join(f'"{name}": {json.dumps(about)}' for name, about in content.items()) + '\n}\n')

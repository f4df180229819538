"""models.evolve on the vision encoders of Hugging Face's transformers."""

import copy
import json
import pickle
import re
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, noise
from PIL import Image
from torch import Tensor, nn

import models
from measure.costs import count_gmacs
from models import evolution

transformers = pytest.importorskip('transformers', minversion='5.20')
from models.transformers_vit import Evolved, find_encoder, forward_with_selection  # noqa: E402

SIZE = dict(hidden_size=48, num_hidden_layers=6, num_attention_heads=3, image_size=64, patch_size=8)
MLP = SIZE | dict(intermediate_size=192)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
TEXT |= dict(max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2)
# A class of transformers, its configuration, and timm's model of the same shape.
ENCODERS = {
    'ViTModel': (MLP, 'vit_tiny_patch16_224'),
    'DeiTModel': (MLP, 'deit_tiny_distilled_patch16_224'),
    'Dinov2Model': (SIZE, 'vit_small_patch14_dinov2'),
    'Dinov2WithRegistersModel': (SIZE, 'vit_small_patch14_reg4_dinov2'),
    'CLIPVisionModel': (MLP | dict(hidden_act='gelu'), 'vit_base_patch16_clip_224'),
    'SiglipVisionModel': (MLP | dict(hidden_act='gelu'), 'vit_base_patch16_siglip_224'),
    'DINOv3ViTModel': (MLP | dict(num_register_tokens=4), 'vit_small_patch16_dinov3'),
    'IJepaModel': (MLP, 'vit_base_patch16_siglip_gap_224'),
}
NAMES_KNOWN = [name for name in ENCODERS if name not in ('DINOv3ViTModel', 'IJepaModel')]  # to models.load_weights
AROUND = {
    'ViTForImageClassification': MLP,
    'DeiTForImageClassificationWithTeacher': MLP,
    'IJepaForImageClassification': MLP,
    'Dinov2ForImageClassification': SIZE,
    'Dinov2Backbone': SIZE | dict(out_features=['stage2', 'stage4', 'stage6']),
    'Dinov2WithRegistersBackbone': SIZE | dict(out_features=['stage2', 'stage4', 'stage6']),
    'DINOv3ViTBackbone': MLP | dict(out_features=['stage2', 'stage4', 'stage6'], num_register_tokens=4),
}


def create(name: str, config: dict | None = None, attention: str = 'sdpa') -> nn.Module:
    """A model of transformers, its weights not so mild that every selection is as good."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class(**(config or ENCODERS[name][0]))
    config._attn_implementation = attention
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def create_llava() -> nn.Module:
    vision = MLP | dict(model_type='clip_vision_model')
    config = dict(vision_config=vision, text_config=TEXT | dict(model_type='llama'), image_token_id=39)
    return create('LlavaForConditionalGeneration', config)


def timm_model(name: str) -> nn.Module:
    size = dict(img_size=64, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=0)
    norm = {'norm_layer': partial(nn.LayerNorm, eps=1e-12)} if name in ('ViTModel', 'DeiTModel') else {}
    return timm.create_model(ENCODERS[name][1], **size | norm).eval()


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return noise(batch, 3, 64, 64, seed=seed)


def outputs(model: nn.Module, *args, **kwargs) -> dict[str, Tensor]:
    """All tensors that a model returns, by name."""
    out = model(*args, **kwargs)
    named = {}
    for name, value in out.items():
        named |= {f'{name}.{i}': x for i, x in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return {name: value for name, value in named.items() if value is not None}


@torch.no_grad()
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', [*ENCODERS, *AROUND])
def test_a_keep_ratio_of_1_is_the_untouched_model(name, attention):
    model = create(name, AROUND.get(name), attention)
    expected = outputs(model, images(), output_hidden_states=True)
    assert models.evolve(model, 1) is model
    found = outputs(model, images(), output_hidden_states=True)
    assert list(found) == list(expected) and 'hidden_states.6' in found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', ENCODERS)
def test_a_layer_that_returns_attention_computes_what_it_did(name, attention):
    """And the attention is the class token's row of the map that transformers returns, a sum over heads."""
    model = create(name, attention=attention)
    called = []
    _, loop = find_encoder(model)
    layer = (loop.layers if hasattr(loop, 'layers') else loop.layer)[3]
    hook = layer.register_forward_pre_hook(lambda module, *arguments: called.append(arguments), with_kwargs=True)
    maps = model(images(), output_attentions=attention == 'eager').attentions
    hook.remove()
    (tokens, *_), kwargs = called[0]
    kwargs = dict(position_embeddings=kwargs['position_embeddings']) if 'position_embeddings' in kwargs else {}
    before = layer(tokens, attention_mask=None, **kwargs)
    models.evolve(model)
    after, attended = layer(tokens, **kwargs, need_attention=True)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert attended.shape == (2, 64)
    if attention == 'eager' and (prefix := tokens.shape[1] - 64):
        torch.testing.assert_close(attended, maps[3][:, :, 0, prefix:].sum(1), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)
@pytest.mark.parametrize('name', NAMES_KNOWN)
def test_it_computes_what_timm_does(name, representative):
    """Tokens, hidden states and selections of the same weights in timm's model, evolved with the same arguments."""
    model, other = create(name), timm_model(name)
    models.load_weights(other, model.state_dict(), report=lambda text: None)
    models.evolve(model, (0.7, 0.3), representative=representative)
    models.evolve(other, (0.7, 0.3), representative=representative)
    out, selection = forward_with_selection(model, images(), output_hidden_states=True)
    tokens, selections, grids = other.forward_blocks(images(), range(6))
    assert {key: kept.shape for key, kept in selection.items()} == {'blocks.2': (2, 44), 'blocks.4': (2, 19)}
    for key, kept in selection.items():
        assert torch.equal(kept, selections[key].kept.sort(1).values)
    last = out.last_hidden_state
    if name == 'CLIPVisionModel':  # its output is before the norm
        last = model.post_layernorm(last)
    torch.testing.assert_close(last, other.norm(tokens), rtol=0, atol=1e-4)
    assert len(out.hidden_states) == 7
    for found, expected in zip(out.hidden_states[1:], grids, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ENCODERS)
def test_it_saves_as_much_as_timms_model_of_the_same_shape(name):
    saved = []
    for model in (create(name), timm_model(name)):
        dense = count_gmacs(model, [images()])
        saved.append(dense - count_gmacs(models.evolve(model), [images()]))
    assert saved[0] == pytest.approx(saved[1], rel=1e-3) and saved[0] > 0.25 * dense


@torch.no_grad()
@pytest.mark.parametrize('name', [*ENCODERS, *AROUND])
def test_shapes_stay_and_images_do_not_influence_each_other(name):
    model = create(name, AROUND.get(name))
    dense = outputs(model, images(), output_hidden_states=True)
    models.evolve(model)
    found = outputs(model, images(), output_hidden_states=True)
    other = outputs(model, torch.stack([images()[0], images(seed=5)[1]]), output_hidden_states=True)
    assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in dense.items()}
    for key, value in found.items():
        torch.testing.assert_close(other[key][0], value[0], rtol=0, atol=1e-5)
    assert max((found[key] - dense[key]).abs().max() for key in found) > 1e-2


@pytest.mark.parametrize('name', [*ENCODERS, *AROUND])
def test_gradients_reach_what_they_reach_in_the_dense_model(name):
    reached = []
    for evolved in (False, True):
        model = create(name, AROUND.get(name)).train()
        if evolved:
            models.evolve(model)
        sum(x.square().sum() for x in outputs(model, images()).values()).backward()
        reached.append({key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert reached[0] == reached[1] and len(reached[1]) > 50


def test_outputs_have_gradients_by_hidden_states():
    model = models.evolve(create('ViTModel'))
    out = model(images(), output_hidden_states=True)
    gradients = torch.autograd.grad(out.last_hidden_state[:, 0].square().sum(), out.hidden_states[1:6])
    assert all(gradient.abs().sum(2).all() for gradient in gradients)  # each token counts


@torch.no_grad()
def test_hidden_states_can_be_chosen_by_index():
    model = create('CLIPVisionModel')

    def choose(indices) -> dict[int, Tensor]:
        states = model(images(), output_hidden_states=indices).hidden_states
        return {i: x for i, x in enumerate(states) if x is not None}

    expected = list(choose([5, 3]))  # versions of transformers differ in what they do with negative numbers
    models.evolve(model)
    everything, some = choose(True), choose([5, 3])
    assert list(some) == expected == [3, 5]
    torch.testing.assert_close(some, {i: everything[i] for i in some}, rtol=0, atol=1e-5)


@torch.no_grad()
def test_feature_maps_of_a_backbone_are_grids_in_raster_order():
    model = models.evolve(create('Dinov2Backbone', AROUND['Dinov2Backbone']))
    out = model(images(), output_hidden_states=True)
    assert [tuple(grid.shape) for grid in out.feature_maps] == [(2, 48, 8, 8)] * 3
    for grid, block in zip(out.feature_maps, (2, 4, 6), strict=True):
        assert torch.equal(grid.flatten(2).transpose(1, 2), model.layernorm(out.hidden_states[block])[:, 1:])


@pytest.mark.parametrize('name', ['ViTModel', 'DINOv3ViTModel', 'SiglipVisionModel'])
def test_gradient_checkpointing_runs_layers_again(name):
    model, gradients, runs = models.evolve(create(name)).train(), [], []
    for module in model.modules():
        if type(module).__name__.endswith('MLP'):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        runs.clear()
        torch.manual_seed(0)  # DINOv3 moves its grid at random in training
        model(images()).last_hidden_state.square().sum().backward()
        assert len(runs) in ((12, 13) if checkpointing else (6, 7))  # SigLIP's head has one too
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize('name', ['DINOv3ViTModel', 'CLIPVisionModel'])
def test_one_graph_is_compiled(name):
    model = models.evolve(create(name))
    for kwargs in ({}, {'output_hidden_states': True}):
        expected = outputs(model, images(), **kwargs)
        found = outputs(torch.compile(model, backend='eager', fullgraph=True), images(), **kwargs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', ['ViTModel', 'DINOv3ViTModel', 'Dinov2ForImageClassification'])
def test_files_and_copies(name, tmp_path):
    model = create(name, AROUND.get(name))
    model.save_pretrained(tmp_path / 'dense')
    models.evolve(model).save_pretrained(tmp_path / 'evolved')
    files = [safetensors.torch.load_file(tmp_path / kind / 'model.safetensors') for kind in ('dense', 'evolved')]
    assert files[0].keys() == files[1].keys() and all(torch.equal(x, files[1][key]) for key, x in files[0].items())
    configs = [json.loads((tmp_path / kind / 'config.json').read_text()) for kind in ('dense', 'evolved')]
    assert configs[0] == configs[1] and configs[1]['architectures'] == [name]
    loaded = type(create(name, AROUND.get(name))).from_pretrained(tmp_path / 'evolved').eval()
    assert not any(isinstance(module, Evolved) for module in loaded.modules())
    expected = outputs(model, images())
    for other in (models.evolve(loaded), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(outputs(other, images()), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_half_precision():
    """Rounding changes tokens a little, but may change which of two equally good patches is selected."""
    for name in ('Dinov2Model', 'DINOv3ViTModel'):
        model = models.evolve(create(name))
        expected = model(images()).pooler_output
        with torch.autocast('cpu', torch.bfloat16):
            mixed = model(images()).pooler_output
        half = model.bfloat16()(images()).pooler_output
        for found in (mixed, half):
            assert torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.95


@torch.no_grad()
def test_a_llava_generates_the_same_text_at_ratio_1_and_runs_at_the_defaults(capsys):
    model = create_llava()
    ids = torch.cat([torch.tensor([[0, 5]]), torch.full((1, 64), 39), torch.tensor([[7, 8]])], 1).expand(2, -1)
    inputs = dict(input_ids=ids, pixel_values=images(), attention_mask=torch.ones_like(ids))
    generate = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = model.generate(**inputs, **generate)
    models.evolve(model, 1)
    assert 'model.vision_tower.encoder evolves' in capsys.readouterr().out
    assert torch.equal(model.generate(**inputs, **generate), expected)
    models.evolve(model)
    assert model.generate(**inputs, **generate).shape == (2, 76)
    cached = model(**inputs, use_cache=True)
    step = dict(input_ids=torch.full((2, 1), 9), past_key_values=cached.past_key_values)
    more = model(**inputs | dict(input_ids=torch.cat([ids, step['input_ids']], 1), attention_mask=torch.ones(2, 69)))
    torch.testing.assert_close(model(**step).logits[:, -1], more.logits[:, -1], rtol=0, atol=1e-4)
    _, selection = forward_with_selection(model, **inputs)
    assert {key: kept.shape for key, kept in selection.items()} == {'blocks.2': (2, 44), 'blocks.4': (2, 19)}


@torch.no_grad()
@pytest.mark.parametrize('name', ['CLIPModel', 'SiglipModel'])
def test_the_vision_tower_beside_a_text_tower(name):
    model = create(name, dict(vision_config=MLP, text_config=TEXT | dict(projection_size=48)))
    inputs = dict(input_ids=torch.tensor([[0, 5, 1], [0, 6, 1]]), pixel_values=images())
    expected = model(**inputs)
    models.evolve(model, 1)
    torch.testing.assert_close(model(**inputs).logits_per_image, expected.logits_per_image, rtol=0, atol=1e-5)
    models.evolve(model)
    found = model(**inputs)
    assert torch.equal(found.text_embeds, expected.text_embeds)
    assert (found.image_embeds - expected.image_embeds).abs().max() > 1e-3
    assert not any(isinstance(module, Evolved) for module in model.text_model.modules())


def test_another_schedule():
    model = models.evolve(create('Dinov2Model'))
    before = model.encoder.evolution.schedule()
    with pytest.raises(ValueError, match='stages: expected ascending'):
        models.evolve(model, stages=(0, 3))
    assert model.encoder.evolution.schedule() == before
    models.evolve(model, 0.5, stages=(1, 3), stage_wise=False)
    assert list(forward_with_selection(model, images())[1]) == [f'blocks.{i}' for i in range(1, 6)]
    larger = model(noise(1, 3, 80, 96)).last_hidden_state
    assert larger.shape == (1, 121, 48)


# --- what is refused


def test_what_layers_inside_a_stage_cannot_do_is_refused():
    model = create('ViTModel', attention='eager')
    expected = model(images(), output_attentions=True).attentions
    models.evolve(model)
    with pytest.raises(ValueError, match='output_attentions: expected False.*keep_ratio=1'):
        model(images(), output_attentions=True)
    models.evolve(model, 1)
    torch.testing.assert_close(model(images(), output_attentions=True).attentions, expected)


@torch.no_grad()
@pytest.mark.parametrize('name', ['ViTModel', 'Dinov2Model'])
def test_masks_are_refused_unless_they_mask_nothing(name):
    model, mask = create(name), torch.ones(2, 65)
    whole = model(images(), attention_mask=mask).last_hidden_state
    mask[:, 9:12] = 0
    masked = model(images(), attention_mask=mask).last_hidden_state
    models.evolve(model, 1)
    torch.testing.assert_close(model(images(), attention_mask=mask).last_hidden_state, masked, rtol=0, atol=1e-5)
    assert (masked - whole).abs().max() > 1e-3
    models.evolve(model)
    with pytest.raises(ValueError, match='attention_mask: expected none'):
        model(images(), attention_mask=mask)
    assert torch.equal(*(model(images(), attention_mask=m).last_hidden_state for m in (None, torch.ones(2, 65))))


def test_implementations_of_attention_without_additive_masks():
    """An error that tells what to do, when evolving and when it is set later."""
    model = create('ViTModel')
    model.config._attn_implementation = 'flash_attention_2'
    with pytest.raises(ValueError, match='expected sdpa or eager.*found flash_attention_2.*set_attn_implementation'):
        models.evolve(model)
    models.evolve(model, representative='none')
    for representative, attention in (('nearest', 'flash_attention_3'), ('none', 'flex_attention')):
        model.config._attn_implementation = 'sdpa'
        models.evolve(model, representative=representative)
        model(images())
        model.config._attn_implementation = attention
        with pytest.raises(ValueError, match=f'found {attention}'):
            model(images())


TINY = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)


@pytest.mark.parametrize(
    'name, config, reason',
    [
        ('Siglip2VisionModel', TINY, 'masks the padding of images of several sizes'),
        ('BeitModel', TINY | dict(image_size=32), 'adds relative position biases'),
        ('SwinModel', dict(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1]), 'attends in windows'),
        ('CLIPTextModel', TEXT, 'found none in CLIPTextModel'),
        ('BertModel', TINY | dict(vocab_size=9), 'found none in BertModel'),
    ],
)
def test_models_that_cannot_be_evolved_are_refused_with_the_reason(name, config, reason):
    model = create(name, config)
    with pytest.raises(ValueError, match=reason):
        models.evolve(model)


def test_windows_of_qwen_are_refused():
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = qwen.Qwen2_5_VLVisionConfig(depth=1, hidden_size=16, intermediate_size=16, num_heads=2)
    with pytest.raises(ValueError, match='attends in windows'):
        models.evolve(qwen.Qwen2_5_VisionTransformerPretrainedModel(config))


def test_two_encoders_and_another_attention_are_refused():
    two = nn.ModuleDict({'left': create('ViTModel'), 'right': create('Dinov2Model')})
    with pytest.raises(ValueError, match='one vision encoder, found left, right.encoder'):
        models.evolve(two)
    models.evolve(two['right'])
    model = create('ViTModel')
    model.layers[4].attention = nn.Identity()
    with pytest.raises(ValueError, match='expected the attention of transformers, found Identity in layer 4'):
        models.evolve(model)
    assert not any(isinstance(module, Evolved) for module in model.modules())


def test_rivals_are_refused_and_models_that_were_not_evolved_select_nothing():
    model = create('ViTModel')
    with pytest.raises(ValueError, match='drop: expected a ViT of timm, found ViTModel'):
        models.apply(model, 'drop')
    with pytest.raises(ValueError, match='expected an evolved model, found ViTModel'):
        forward_with_selection(model, images())


# --- documentation


class Processor:
    """In place of LLaVA's, which comes with its weights."""

    def __call__(self, images, text, return_tensors):
        pixels = transformers.BitImageProcessor(do_resize=False, crop_size=64)(images, return_tensors=return_tensors)
        ids = torch.tensor([[0, 5, *[39] * 64, 7]])
        return dict(pixels, input_ids=ids, attention_mask=torch.ones_like(ids)) if '<image>' in text else None

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [str(row) for row in ids.tolist()]


def test_the_python_of_the_documentation_runs(monkeypatch, tmp_path, capsys):
    """Only what must be downloaded is made here, small, and of the same class."""
    small = SIZE | dict(num_hidden_layers=12, image_size=518, patch_size=14)
    made = {
        'AutoModel': lambda name: create('Dinov2Model', small),
        'AutoImageProcessor': lambda name, **kwargs: transformers.BitImageProcessor(**kwargs),
        'AutoModelForImageTextToText': lambda name: create_llava(),
        'AutoProcessor': lambda name: Processor(),
    }
    for name, function in made.items():
        monkeypatch.setattr(getattr(transformers, name), 'from_pretrained', function)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(600, 518, 3).mul(99).byte().numpy()).save('photo.jpg')
    names, blocks = {}, re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs/transformers.md').read_text(), re.M | re.S)
    for block in blocks:
        exec(block, names)
    assert names['output'].last_hidden_state.shape == (1, 1370, 48) and names['kept'].sum() == 410
    assert Image.open('kept.png').size == (518, 518)
    assert len(blocks) == 3 and len(names['text']) == 1
    assert 'model.vision_tower.encoder evolves' in capsys.readouterr().out

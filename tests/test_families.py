"""What holds for both families, Evo-DeiT and Evo-LeViT: configurations, schedules, heads and timm's interface."""

import copy
import json
from itertools import product

import pytest
import timm
import torch
from conftest import images, nano, untouched, without_gradient
from golden import fill
from test_evo_levit import small
from timm.optim import create_optimizer_v2
from torch import nn

from models import evo_deit, evo_levit, weights

# The parameters of each size, with the heads of training and without.
PARAMETERS = {
    'evo_deit_tiny_patch16_224': (5_910_800, 5_717_416),
    'evo_deit_small_patch16_224': (22_436_432, 22_050_664),
    'evo_deit_base_patch16_224': (87_338_192, 86_567_656),
    'EvoLeViT_128S': (8_606_651, 7_835_115),
    'EvoLeViT_128': (10_041_022, 9_269_486),
    'EvoLeViT_192': (11_803_526, 11_031_990),
    'EvoLeViT_256': (20_035_278, 19_007_230),
    'EvoLeViT_384': (40_836_830, 39_295_758),
}
HEADS = {'evo_deit': evo_deit.Heads._fields, 'EvoLeViT': evo_levit.Heads._fields}
both_families = pytest.mark.parametrize('family', HEADS)


def build(family: str, **kwargs) -> nn.Module:
    """A small model in evaluation: 16 patches in Evo-DeiT; 64, 16 and 4 in Evo-LeViT."""
    return nano(**kwargs) if family == 'evo_deit' else small('EvoLeViT_128', **(dict(img_size=128) | kwargs))


@pytest.mark.parametrize('name', [*evo_deit.default_cfgs, *evo_levit.default_cfgs])
def test_configuration_tells_the_truth(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    cfg, state, family = model.default_cfg, model.state_dict(), 'EvoLeViT' if 'LeViT' in name else 'evo_deit'
    size = cfg['input_size'][1]
    assert cfg['input_size'] == (3, *images(model).shape[2:])
    assert name.endswith(f'_{size}') or (family == 'EvoLeViT' and size == 224)
    assert family == 'EvoLeViT' or f'_patch{model.patch_embed.patch_size[0]}_' in name
    assert state[f'{cfg["first_conv"]}.weight'].shape[1] == 3
    assert all(f'{head}.weight' in state for head in cfg['classifier'])
    assert tuple(head.removesuffix('.linear') for head in cfg['classifier']) == HEADS[family]


@pytest.mark.parametrize('name', PARAMETERS)
def test_number_of_parameters(name):
    with torch.device('meta'):
        counts = {key: p.numel() for key, p in timm.create_model(name).named_parameters()}
    inference = sum(count for key, count in counts.items() if not key.startswith(('head_cls', 'norm_cls')))
    assert (sum(counts.values()), inference) == PARAMETERS[name]


@pytest.mark.parametrize('name', ['evo_deit_tiny_patch16_224', 'EvoLeViT_128S'])
def test_weight_decay_is_that_of_the_original(name):
    model = timm.create_model(name)
    groups = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05).param_groups
    without = {id(p) for group in groups if not group['weight_decay'] for p in group['params']}
    original = model.to_published(dict(model.named_parameters()))
    found = {key for key, p in original.items() if id(p) in without and not key.startswith('stage_blocks')}
    if 'deit' in name:  # its layout cuts qkv in two, which makes new tensors
        found |= {key for key in original if key.endswith(('.qk.bias', '.v.bias'))}
    assert found == set(json.loads((fill.HERE / 'recipe.json').read_text())['no_weight_decay'][name])


# --- schedules


@both_families
@pytest.mark.parametrize('stage_wise, evolving, representative', [*product((True, False), repeat=3)])
def test_training_reaches_every_parameter(family, stage_wise, evolving, representative):
    size = {} if family == 'evo_deit' else dict(img_size=64, depth=(3, 2, 2))
    model = build(family, representative=representative, drop_path_rate=0.1, **size).train()
    model.set_schedule(stage_wise, evolving)
    idle = untouched if family == 'evo_deit' else without_gradient  # biases before a BatchNorm have a gradient of 0
    mean = model(images(model, 4))  # for losses of one output: the mean of all heads
    mean.square().mean().backward()
    assert mean.shape == (4, 10) and idle(model) == []
    model.zero_grad()
    model.set_distilled_training()
    heads = model(images(model, 4))
    assert heads._fields == HEADS[family] and all(head.shape == (4, 10) for head in heads)
    sum(head.square().mean() for head in heads).backward()
    assert idle(model) == []
    read = any(p.grad.any() for name, p in model.named_parameters() if 'tradeoff' in name)
    assert read == (family == 'EvoLeViT' and stage_wise and evolving and representative)


@both_families
def test_the_schedule_travels_with_the_weights(family):
    model, other = build(family), build(family)
    for stage_wise, evolving in product((True, False), repeat=2):
        model.set_schedule(stage_wise, evolving)
        other.load_state_dict(model.state_dict())
        for each in (other, copy.deepcopy(model)):
            assert each.schedule() == model.schedule() and each.schedule()['stage_wise'] == stage_wise
            assert getattr(each, 'learned_tradeoff', stage_wise) == stage_wise


@both_families
def test_keeping_everything_is_the_dense_network(family):
    model, dense = build(family, keep_ratio=1.0), build(family)
    dense.set_schedule(True, evolving=False)
    x = images(model)
    torch.testing.assert_close(model(x), dense(x))
    assert not dense.forward_with_selection(x)[1]
    assert (build(family).forward_features(x) - dense.forward_features(x)).abs().max() > 1e-2


@both_families
def test_keep_ratio_can_be_assigned(family):
    ratios, patches = ([0.75, 0.5], (16, 16)) if family == 'evo_deit' else ([0.75, 0.5, 0.25], (64, 16, 4))
    model, count = build(family), len(ratios)
    x = images(model)
    model.keep_ratio = 0.25
    assert model.keep_ratio == (0.25,) * count
    assert torch.equal(model(x), build(family, keep_ratio=0.25)(x))
    model.keep_ratio = ratios
    kept = [int(r * n) for r, n in zip(ratios, patches, strict=True)]
    assert [k.shape[1] for k in model.forward_with_selection(x)[1].values()] == kept
    wrong = {0.0: r'in \(0, 1\]', 2: r'in \(0, 1\]', float('nan'): r'in \(0, 1\]', 0.06: 'which keeps one of the'}
    for value, message in [*wrong.items(), ([0.5] * 4, f'one value or {count}')]:
        with pytest.raises(ValueError, match=f'keep_ratio: expected .*{message}'):
            model.keep_ratio = value
        with pytest.raises(ValueError, match=f'keep_ratio: expected .*{message}'):
            build(family, keep_ratio=value)
    assert model.keep_ratio == tuple(ratios)


# --- the forward pass


@both_families
def test_fusing_changes_no_prediction(family):
    model = build(family)
    x = images(model, 4)
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        expected, found = model(x), fused(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.std().item())
        assert fused.double()(x.double()).dtype == copy.deepcopy(model).double().fuse()(x.double()).dtype
    assert not [key for key in fused.state_dict() if key.startswith(('head_cls', 'norm_cls')) or '.bn.' in key]
    assert not any(weights.load_weights(fused, fused.state_dict()))
    with pytest.raises(ValueError, match='a fused model cannot be trained'):
        fused.train()
    fused.reset_classifier(3)
    assert fused(x.double()).shape == (4, 3)


@both_families
def test_forward_leaves_nothing_behind(family):
    model = build(family)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    state, x = copy.deepcopy(model.state_dict()), images(model).requires_grad_()
    before = x.detach().clone()
    model(x).sum().backward()
    assert torch.equal(x, before) and x.grad.any()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@both_families
def test_heads_and_features(family):
    model = build(family, drop_rate=0.1)
    x, prefix = images(model), model.num_prefix_tokens
    tokens, logits = model.forward_features(x), model(x)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.num_features) and model.head_hidden_size == model.num_features
    assert torch.equal(model.forward_head(tokens), logits)
    heads = [model.get_classifier()] if family == 'evo_deit' else model.get_classifier()
    torch.testing.assert_close(logits, sum(head(pooled) for head in heads) / len(heads))
    patches = tokens[:, prefix:].mean(1)
    torch.testing.assert_close(pooled, model.norm(patches))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), model.norm(tokens))
    assert model.train()(x).shape == tokens.shape
    assert build(family, num_classes=0, global_pool='')(x).shape == tokens.shape
    assert build(family, in_chans=1)(x[:, :1]).shape == (2, 10)


@both_families
def test_feature_maps_as_timm_asks_for_them(family):
    name, size, last = ('EvoLeViT_128S', 128, 2) if family == 'EvoLeViT' else ('evo_deit_nano_patch4_32', 32, 8)
    x = torch.randn(2, 3, size, size)
    everything = timm.create_model(name, img_size=size, features_only=True).eval()
    assert [grid.shape[-1] for grid in everything(x)] == ([8, 4, 2] if family == 'EvoLeViT' else [8] * 3)
    for indices in ((1, last), (1,)):
        backbone = timm.create_model(name, img_size=size, features_only=True, out_indices=indices).eval()
        grids = backbone(x)
        assert [grid.shape[1] for grid in grids] == backbone.feature_info.channels() and len(grids) == len(indices)
        # timm cuts what comes after the last feature.
        assert len(getattr(backbone.model, 'stages', None) or backbone.model.blocks) == indices[-1] + 1


@both_families
def test_pretrained_weights_through_timm(family, tmp_path):
    """The original layout, with classes of its own and with others, and another image size."""
    name, size = ('evo_deit_nano_patch4_32', 32) if family == 'evo_deit' else ('EvoLeViT_128S', 64)
    model = timm.create_model(name, img_size=size).eval()
    torch.save(model.to_published(model.state_dict()), tmp_path / 'weights.pth')
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')))
    x = torch.randn(2, 3, size, size)
    assert torch.equal(timm.create_model(name, img_size=size, **overlay).eval()(x), model(x))
    larger = timm.create_model(name, img_size=size + 32, num_classes=7, **overlay)
    assert torch.equal(larger.pos_embed[:, :1], model.pos_embed[:, :1])

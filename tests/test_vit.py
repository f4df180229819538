"""models.evolve: any ViT of timm stays what it is, and its blocks evolve."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from conftest import images, without_gradient
from conftest import small_vit as dense
from timm.models import VisionTransformer
from timm.models._features import FeatureGetterNet
from torch import nn

from measure.costs import count_gmacs
from models import evolution, vit

NAMES = [
    'vit_tiny_patch16_224',
    'deit_tiny_patch16_224',
    'deit_tiny_distilled_patch16_224',
    'deit3_small_patch16_224',  # LayerScale, no position for the class token
    'vit_small_patch14_dinov2',  # LayerScale
    'vit_small_patch14_reg4_dinov2',  # and registers
    'vit_base_patch16_clip_224',  # a norm before the blocks
    'vit_base_patch16_siglip_224',  # no class token, attention pooling
    'vit_medium_patch16_reg4_gap_256',  # registers and no class token
    'vit_so150m_patch16_reg4_gap_256',
    'eva02_tiny_patch14_224',  # rotary positions, SwiGLU
    'vit_small_patch16_dinov3',  # rotary positions and registers
    'vit_small_patch16_rope_mixed_224',  # rotary positions that differ by block and head
    'vit_pe_core_tiny_patch16_384',
]


@pytest.fixture(scope='module', params=NAMES)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A dense model, and a copy of it to evolve."""
    model = dense(request.param)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)
def test_a_keep_ratio_of_1_is_the_untouched_model(pair, representative):
    model, evolved = pair
    assert vit.evolve(evolved, 1, representative=representative) is evolved
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(evolved(x), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(evolved.forward_features(x), model.forward_features(x), rtol=1e-5, atol=1e-5)
        for ours, timms in zip(
            evolved.forward_intermediates(x, [1, 3], return_prefix_tokens=True, norm=True, intermediates_only=True),
            model.forward_intermediates(x, [1, 3], return_prefix_tokens=True, norm=True, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, timms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)
def test_the_interface_stays_and_the_tokens_evolve(pair, representative):
    model, evolved = pair
    vit.evolve(evolved, (0.7, 0.3), representative=representative)
    x = images(model)
    assert list(evolved.state_dict()) == list(model.state_dict())
    evolved.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        before, after = model.forward_features(x), evolved.forward_features(x)
        logits, selection = evolved.forward_with_selection(x)
        assert torch.equal(logits, evolved(x))
    assert after.shape == before.shape
    assert (after - before).abs().max() > 1e-3
    assert {name: kept.shape[1] for name, kept in selection.items()} == {'blocks.1': 17, 'blocks.3': 7}
    for kept in selection.values():
        assert (kept.diff() > 0).all() and kept.min() >= 0 and kept.max() < 25

    assert count_gmacs(evolved, [x]) < 0.95 * count_gmacs(model, [x])
    evolved.train().zero_grad()
    evolved(x).square().sum().backward()
    assert without_gradient(evolved) == []
    evolved.eval()

    for other in (copy.deepcopy(evolved), pickle.loads(pickle.dumps(evolved))):
        with torch.no_grad():
            assert torch.equal(other(x), logits)


@pytest.mark.parametrize('output_fmt', ['NCHW', 'NLC'])
def test_logits_have_gradients_by_grids(output_fmt):
    """At keep ratio 1 those of timm's model by its blocks' outputs; evolved, by each grid before the last block's."""

    def gradient(model, block):
        features, (grid,) = model.forward_intermediates(x, [block], output_fmt=output_fmt)
        (found,) = torch.autograd.grad(model.forward_head(features)[:, 0].sum(), grid)
        return found.flatten(2).mT if output_fmt == 'NCHW' else found

    model = dense(depth=6)
    x, outputs = images(model), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    logit = model(x)[:, 0].sum()
    expected = [t[:, 1:] for t in torch.autograd.grad(logit, outputs)]
    evolved = vit.evolve(dense(depth=6), 1)
    for block in range(6):
        torch.testing.assert_close(gradient(evolved, block), expected[block], rtol=1e-4, atol=1e-6)
    for representative in evolution.REPRESENTATIVES:
        evolved = vit.evolve(dense(depth=6), (0.7, 0.3), representative=representative)
        for block in (0, 1, 3, 4):
            moved = gradient(evolved, block).abs().sum(2)
            assert moved.isfinite().all() and (moved > 0).sum() >= x.shape[0] * 7
            assert representative != 'nearest' or (moved > 0).all()  # each patch counts in the mean of its cluster
    assert not gradient(vit.evolve(dense(depth=6)), 5).any()  # its head reads the class token alone


@pytest.mark.parametrize('stage_wise', [True, False])
@pytest.mark.parametrize('ratios', [(0.7, 0.5, 0.3), (0.7, 1.0, 0.3), (0.6, 0.3, 0.5), (0.5, 0.5, 0.4)])
@pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)
def test_grids_that_are_taken_out_change_nothing(representative, ratios, stage_wise):
    """Neither outputs nor gradients of parameters."""
    model = vit.evolve(dense(depth=6), ratios, (1, 3, 5), representative, stage_wise).double()
    x, found = images(model).double(), []
    for taken in ([], [1, 2, 3, 4]):
        model.zero_grad()
        features = model.forward_intermediates(x, taken)[0] if taken else model.forward_features(x)
        model.forward_head(features).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()} | {'features': features})
    torch.testing.assert_close(*found)


def test_timms_ways_of_changing_a_model():
    model = vit.evolve(dense(), (0.7, 0.3))
    x = images(model)
    model.reset_classifier(3)
    assert model.eval()(x).shape == (2, 3)
    model.set_input_size((96, 64))
    assert model.forward_features(torch.randn(1, 3, 96, 64)).shape == (1, 25, 192)
    vit.evolve(model, (0.9, 0.5), stages=(1, 4))  # again, with another schedule
    assert model.first_blocks == (1, 4) and model.keep_ratio == (0.9, 0.5)
    vit.evolve(model, 0.5, stages=(2, 4), stage_wise=False)
    assert list(model.forward_with_selection(torch.randn(1, 3, 96, 64))[1]) == [f'blocks.{i}' for i in (2, 3, 4)]
    dynamic = vit.evolve(dense(dynamic_img_size=True), (0.7, 0.3))
    assert dynamic.forward_features(torch.randn(1, 3, 96, 64)).shape == (1, 25, 192)
    features = FeatureGetterNet(vit.evolve(dense(), (0.7, 0.3)), out_indices=[1, 3])
    assert [tuple(grid.shape) for grid in features(x)] == [(2, 192, 5, 5)] * 2


@pytest.mark.parametrize(
    'name, kwargs, reason',
    [
        ('swin_tiny_patch4_window7_224', {}, 'SwinTransformer cannot be evolved'),
        ('convnext_atto', {}, 'ConvNeXt cannot be evolved'),
        ('levit_128s', {}, 'cannot be evolved'),
        ('hiera_tiny_224', {}, 'Hiera cannot be evolved'),
        ('vit_relpos_small_patch16_224', {}, 'cannot be evolved'),
        ('vit_base_patch16_xp_224', dict(depth=3), 'found ParallelScalingBlock in blocks.0'),
        ('vit_tiny_patch16_224', dict(depth=4, patch_drop_rate=0.5), 'patch_drop_rate'),
    ],
)
def test_models_that_cannot_be_evolved_are_refused_with_the_reason(name, kwargs, reason):
    with torch.device('meta'):
        model = timm.create_model(name, **kwargs)
    before = type(model)
    with pytest.raises(ValueError, match=reason):
        vit.evolve(model)
    assert type(model) is before


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(stages=(0, 3)), 'stages: expected ascending'),
        (dict(stages=(3, 2)), 'stages: expected ascending'),
        (dict(stages=(2, 5)), 'stages: expected ascending'),
        (dict(stages=3), 'stages: expected indices of blocks, such as .4, 8., found 3'),
        (dict(stages=(1.0, 3.0)), 'stages: expected indices of blocks.*found .1.0, 3.0.'),
        (dict(stages=('1', '3')), 'stages: expected indices of blocks'),
        (dict(keep_ratio='half'), "keep_ratio: expected numbers, found 'half'"),
        (dict(keep_ratio=None), 'keep_ratio: expected numbers, found None'),
        (dict(keep_ratio=(0.5, 0.4, 0.3)), 'keep_ratio: expected one value or 2'),
        (dict(keep_ratio=1.5), 'keep_ratio: expected values in'),
        (dict(representative='two'), 'representative: expected one of none, one, nearest'),
        (dict(representative=['one']), 'representative: expected one of none, one, nearest'),
    ],
)
def test_schedules_that_cannot_be_are_refused(wrong, message):
    model = dense()
    with pytest.raises(ValueError, match=message):
        vit.evolve(model, **wrong)
    assert type(model) is VisionTransformer


def test_a_refused_schedule_changes_nothing():
    model = vit.evolve(dense(), (0.7, 0.3))
    x, before = images(model), model.schedule()
    expected = model(x)
    for wrong in (dict(stages=(1, 2, 3)), dict(representative='two'), dict(keep_ratio=2.0), dict(keep_ratio=0.01)):
        with pytest.raises(ValueError):
            vit.evolve(model, **({'keep_ratio': (0.7, 0.3)} | wrong))
        assert model.schedule() == before and torch.equal(model(x), expected)
    model.representative = True
    assert model.representative == 'one'
    with pytest.raises(ValueError, match='expected one of none, one, nearest'):
        model.representative = 'nearst'
    model.update_group = lambda *args, **kwargs: 1 / 0
    assert vit.evolve(model, (0.7, 0.3)).schedule() == before and torch.equal(model(x), expected)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'eva02_tiny_patch14_224'])
def test_half_precision(name):
    """Rounding changes logits a little, but may change which of two equally good patches is selected."""
    model = vit.evolve(dense(name), (0.7, 0.3))
    x = images(model, 8)
    with torch.no_grad():
        expected, selected = model.forward_with_selection(x)
        with torch.autocast('cpu', torch.bfloat16):
            mixed = model.forward_with_selection(x)
        half = model.bfloat16().forward_with_selection(x.bfloat16())
    for found, selection in (mixed, half):
        assert found.isfinite().all()
        same = torch.stack([(selection[block] == kept).all(1) for block, kept in selected.items()]).all(0)
        assert same.sum() >= 4
        assert (found.float() - expected)[same].abs().max() < 0.3 * expected.std()


def test_rotations_travel_with_their_patches():
    rope = torch.arange(12.0).view(6, 2)
    places = torch.tensor([[4, 0, 2], [1, 5, 3]])
    assert torch.equal(vit.rope_at(rope, places, 3)[:, 0], rope[places])
    more = vit.rope_at(rope, places, 4)
    assert torch.equal(more[:, 0, 3], torch.tensor([[0.0, 1.0]] * 2))  # sine and cosine of no rotation
    heads = torch.stack([rope, rope + 100])
    assert torch.equal(vit.rope_at(heads, places, 3)[:, 1], rope[places] + 100)


@pytest.mark.parametrize(
    'ratio',
    [np.float32(0.7), np.float64(0.7), np.array(0.7), torch.tensor(0.7), torch.tensor([0.7, 0.7]), [torch.tensor(0.7)]],
)
def test_keep_ratios_of_numpy_and_torch(ratio):
    """As the number that they print, so that as many patches stay as with 0.7."""
    model = vit.evolve(dense(), ratio)
    assert model.keep_ratio == (0.7, 0.7) and all(type(r) is float for r in model.keep_ratio)
    model.keep_ratio = 1 / 3
    assert model.keep_ratio == (1 / 3, 1 / 3)


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_models_with_few_blocks(depth):
    model = dense(depth=depth)
    x = images(model)
    if depth == 3:
        assert list(vit.evolve(model).forward_with_selection(x)[1]) == ['blocks.1', 'blocks.2']
        return
    with pytest.raises(ValueError, match='expected 3 blocks or more' if depth == 1 else r'stages=\[1\] and one keep_'):
        vit.evolve(model)
    expected = model(x)
    if depth == 2:
        assert list(vit.evolve(model, 0.5, stages=[1]).forward_with_selection(x)[1]) == ['blocks.1']
    torch.testing.assert_close(vit.evolve(model, 1, stages=[])(x), expected)

"""Evo-DeiT: golden numbers of the published code, its checkpoint layout, timm's conventions."""

import copy
import inspect
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import nano, noise, untouched
from golden import fill
from timm.layers import Attention, PatchEmbed, SwiGLU
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block, ParallelScalingBlock
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

import utils
from models import weights
from models.evo_deit import EvoDeiT, Heads

GOLDEN = [f'evo_deit_{size}_224' for size in ('tiny_patch16', 'small_patch16', 'base_patch16')]
GOLDEN += ['evo_deit_small_patch16_384', 'evo_deit_base_patch16_384']
NAMES = [*GOLDEN, 'evo_deit_nano_patch4_32', *(name.replace('_patch', '_vis_patch') for name in GOLDEN)]


def images(batch: int = 2, *size: int, channels: int = 3) -> torch.Tensor:
    return noise(batch, channels, *(size or (16, 16)))


def golden_model(name: str):
    description, arrays = fill.load(name)
    state = fill.published_state(description)
    model = timm.create_model(name)
    assert not any(weights.load_weights(model, {'model': state}))
    size = model.patch_embed.img_size[0]
    batch = description['batch']
    return (
        model,
        state,
        arrays,
        fill.images('golden', batch, size),
        fill.labels('golden', batch),
        description['parameters'],
    )


@pytest.mark.parametrize('name', GOLDEN)
def test_everything_is_as_published(name):
    model, state, golden, x, y, parameters = golden_model(name)
    published = model.to_published(model.state_dict())
    assert list(published) == list(state)
    assert all(torch.equal(published[key], state[key]) for key in state)

    for schedule in ('stage', 'layer'):
        model.float().eval().stage_wise = schedule == 'stage'
        with torch.no_grad():
            logits, selection = model.forward_with_selection(x)
        np.testing.assert_allclose(logits[:, ::10], golden[f'eval_{schedule}'], rtol=0, atol=1e-4)
        other = golden['eval_layer' if schedule == 'stage' else 'eval_stage']
        assert 'base' in name or np.abs(logits[:, ::10] - other).max() > 1e-2  # it is this schedule that was computed
        starts = (4, 8) if schedule == 'stage' else range(4, 12)
        assert list(selection) == [f'blocks.{i}' for i in starts]
        for i in starts:
            kept = selection[f'blocks.{i}']
            assert kept.dtype == torch.int64
            if f'kept_{schedule}_block4' in golden:
                np.testing.assert_array_equal(kept, golden[f'kept_{schedule}_block{i}'])

    model.set_distilled_training()
    for schedule in ('stage', 'layer'):
        model.double().train().stage_wise = schedule == 'stage'
        model.zero_grad()
        heads = model(x.double())
        loss = 0.5 * (F.cross_entropy(heads.head, y) + F.cross_entropy(heads.head_cls, y))
        loss.backward()
        np.testing.assert_allclose(heads.head[:, ::10].detach(), golden[f'train_{schedule}_avg'], rtol=0, atol=1e-6)
        np.testing.assert_allclose(heads.head_cls[:, ::10].detach(), golden[f'train_{schedule}_cls'], rtol=0, atol=1e-6)
        np.testing.assert_allclose(loss.item(), golden[f'train_{schedule}_loss'], rtol=0, atol=1e-6)
        gradients = model.to_published({key: p.grad for key, p in model.named_parameters()})
        norms = [gradients[key].norm().item() for key in parameters]
        np.testing.assert_allclose(norms, golden[f'train_{schedule}_gradnorm'], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_configuration_tells_the_truth(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg['input_size'][1:] == model.patch_embed.img_size
    assert state[f'{cfg["first_conv"]}.weight'].shape[1] == 3
    assert all(f'{head}.weight' in state for head in cfg['classifier'])
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features
    assert f'patch{model.patch_embed.patch_size[0]}_{cfg["input_size"][1]}' in name


@pytest.mark.parametrize(
    'name, training, inference',
    [(GOLDEN[0], 5_910_800, 5_717_416), (GOLDEN[1], 22_436_432, 22_050_664), (GOLDEN[2], 87_338_192, 86_567_656)],
)
def test_parameters(name, training, inference):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == training
    assert sum(p.numel() for p in model.fuse().parameters()) == inference


def test_fusing_drops_the_training_head_alone():
    model = nano()
    expected = model(images())
    assert torch.equal(model.fuse()(images()), expected)
    with pytest.raises(ValueError, match='cannot be trained'):
        model.train()
    assert not any(weights.load_weights(model, model.state_dict()))
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)


def test_keeping_every_patch_is_timms_vit():
    ours = nano(keep_ratio=1.0)
    shape = dict(img_size=16, patch_size=4, embed_dim=32, num_heads=2, num_classes=10)
    dense = VisionTransformer(**shape, global_pool='avg', norm_layer=partial(nn.LayerNorm, eps=1e-6))
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith(('head_cls', 'norm_cls', '_extra'))}
    dense.load_state_dict({k.replace('norm.', 'fc_norm.') if k.startswith('norm.') else k: v for k, v in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), dense.eval()(images()))


class GatedAttention(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, gated=True, **kwargs)


class ScaledPatches(PatchEmbed):
    def forward(self, x):
        return 2 * super().forward(x)


# Arguments of timm's VisionTransformer, with other values than the defaults.
COMPUTED = [
    dict(img_size=(16, 24)),
    dict(patch_size=8),
    dict(in_chans=1),
    dict(num_classes=3),
    dict(embed_dim=48),
    dict(depth=6),
    dict(num_heads=4),
    dict(mlp_ratio=2.0),
    dict(qkv_bias=False),
    dict(qk_norm=True),
    dict(scale_attn_norm=True),
    dict(scale_mlp_norm=True),
    dict(proj_bias=False),
    dict(init_values=0.5),
    dict(class_token=True),
    dict(pos_embed='learn'),
    dict(no_embed_class=True),
    dict(reg_tokens=0),
    dict(pre_norm=True),
    dict(final_norm=False),
    dict(fc_norm=True),
    dict(global_pool='avg', fc_norm=True),
    dict(global_pool='avg', fc_norm=None),
    dict(global_pool='avg', fc_norm=None, pool_include_prefix=True),
    dict(global_pool='max', fc_norm=None),
    dict(global_pool='avgmax', fc_norm=None),
    dict(global_pool=''),
    dict(dynamic_img_size=True),
    dict(dynamic_img_size=True, dynamic_img_pad=True),
    dict(drop_rate=0.5),
    dict(pos_drop_rate=0.5),
    dict(proj_drop_rate=0.5),
    dict(attn_drop_rate=0.5),
    dict(drop_path_rate=0.5),
    dict(patch_drop_rate=0.0),
    dict(weight_init='jax'),
    dict(fix_init=True),
    dict(embed_layer=ScaledPatches),
    dict(embed_norm_layer='layernorm'),
    dict(norm_layer='layernorm'),
    dict(norm_layer='rmsnorm', qk_norm=True),
    dict(norm_layer=None),
    dict(act_layer='relu'),
    dict(mlp_layer=SwiGLU),
    dict(attn_layer='attn'),
    dict(block_fn=Block),
    dict(device='cpu'),
    dict(dtype=torch.float64),
]
REFUSED = [
    (dict(reg_tokens=2), 'found class_token=True, reg_tokens=2'),
    (dict(class_token=False, global_pool='avg'), 'class_token=False, reg_tokens=0'),
    (dict(class_token=False, reg_tokens=1, global_pool='avg'), 'class_token=False, reg_tokens=1'),
    (dict(global_pool='map'), "global_pool: expected 'avg'.*found 'map'"),
    (dict(global_pool='prr'), "found 'prr'"),
    (dict(pos_embed='none'), "pos_embed: expected 'learn'"),
    (dict(patch_drop_rate=0.5), 'patch_drop_rate: expected 0.*found 0.5'),
    (dict(attn_layer='diff'), 'attn_layer: expected.*found DiffAttention'),
    (dict(attn_layer=GatedAttention), 'found GatedAttention'),
    (dict(block_fn=ParallelScalingBlock), 'block_fn: expected.*ParallelScalingBlock'),
]
TIMMS = set(inspect.signature(VisionTransformer).parameters)


def known_to_timm(arguments: dict):
    """Skip where the installed timm does not have the argument yet."""
    if missing := set(arguments) - TIMMS:
        pytest.skip(f'timm has no {missing}')


def test_every_argument_of_timm_is_tried():
    assert not TIMMS - {name for arguments in COMPUTED for name in arguments}


@pytest.mark.parametrize('arguments', COMPUTED, ids=str)
def test_arguments_of_timm_are_computed_as_timm_does(arguments):
    known_to_timm(arguments)
    shape = dict(img_size=16, patch_size=4, embed_dim=32, depth=5, num_heads=2, num_classes=10)
    arguments = shape | dict(global_pool='token', norm_layer=partial(nn.LayerNorm, eps=1e-6)) | arguments
    ours, dense = EvoDeiT(**arguments, keep_ratio=1.0), VisionTransformer(**arguments)
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    extra = ('head_cls', 'norm_cls', '_extra_state')
    dense.load_state_dict({key: p for key, p in ours.state_dict().items() if not key.startswith(extra)})
    height, width = ours.patch_embed.img_size
    if arguments.get('dynamic_img_size'):
        height, width = (23, 25) if arguments.get('dynamic_img_pad') else (24, 20)
    x = images(4, height, width, channels=arguments.get('in_chans', 3)).to(ours.head.weight.dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), dense.eval()(x), rtol=0, atol=1e-5)
    # The same dropout, too.
    torch.manual_seed(0)
    expected = dense.train()(x)
    ours.set_distilled_training()
    torch.manual_seed(0)
    heads = ours.train()(x)
    torch.testing.assert_close(heads.head, expected, rtol=0, atol=1e-5)
    sum(head.square().mean() for head in heads).backward()
    assert untouched(ours) == []


@pytest.mark.parametrize('arguments, message', REFUSED, ids=str)
def test_arguments_that_would_not_be_computed_are_refused(arguments, message):
    try:
        VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, **arguments)
    except (TypeError, AssertionError) as error:
        pytest.skip(f'the installed timm does not know it: {error}')
    with pytest.raises(ValueError, match=message):
        nano(**arguments)


@pytest.mark.parametrize('stage_wise', [True, False])
@pytest.mark.parametrize('evolving', [True, False])
@pytest.mark.parametrize('representative', [True, False])
def test_training_reaches_every_parameter(stage_wise, evolving, representative):
    model = nano(representative=representative, drop_path_rate=0.1).train()
    model.set_schedule(stage_wise, evolving)
    # For losses of one output: the mean of both heads.
    mean = model(images(8))
    mean.square().mean().backward()
    assert mean.shape == (8, 10) and untouched(model) == []
    model.zero_grad()
    model.set_distilled_training()
    heads = model(images(8))
    assert isinstance(heads, Heads) and heads._fields == ('head', 'head_cls')
    sum(h.square().mean() for h in heads).backward()
    assert untouched(model) == []


def test_schedule_goes_with_the_weights():
    model, other = nano(), nano()
    model.set_schedule(stage_wise=False, evolving=False)
    other.load_state_dict(model.state_dict())
    assert (other.stage_wise, other.evolving) == (False, False)
    clone = copy.deepcopy(model)
    assert clone.stage_wise is False


def test_an_average_of_weights_can_be_kept():
    model = nano()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.head.bias += 1
    ema.update(model)
    torch.testing.assert_close(ema.module.head.bias, model.head.bias - 0.5)


def test_evaluation_keeps_the_grid_and_its_input():
    model, x = nano(), images()
    before = x.clone()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 17, 32)
        assert torch.equal(model.forward_head(features), model(x))
        assert torch.equal(model.head(model.forward_head(features, pre_logits=True)), model(x))
    assert torch.equal(x, before)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_patches_stay_at_their_place():
    # Without layers that do anything, tokens are the embedded patches, in raster order.
    model = nano()
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    with torch.no_grad():
        x = images()
        embedded = model.patch_embed(x) + model.pos_embed[:, 1:]
        torch.testing.assert_close(model.forward_features(x)[:, 1:], embedded)


@pytest.mark.parametrize('stage_wise', [True, False])
def test_intermediates_are_the_features_on_the_way(stage_wise):
    model, x = nano(representative=True), images()
    model.stage_wise = stage_wise
    with torch.no_grad():
        features, grids = model.forward_intermediates(x)
        assert len(grids) == 12 and all(g.shape == (2, 32, 4, 4) for g in grids)
        torch.testing.assert_close(features, model.forward_features(x))
        torch.testing.assert_close(grids[-1].flatten(2).mT, features[:, 1:])
        two = model.forward_intermediates(
            x, [5, -1], intermediates_only=True, output_fmt='NLC', return_prefix_tokens=True
        )
        torch.testing.assert_close(two[0][0], grids[5].flatten(2).mT)
        assert two[1][1].shape == (2, 1, 32)
        out = model.forward_intermediates(x, 2, output_dict=True, norm=True)
        assert set(out) == {'image_features', 'image_intermediates'} and len(out['image_intermediates']) == 2
    with pytest.raises(ValueError, match='NCHW or NLC'):
        model.forward_intermediates(x, output_fmt='NHWC')


def test_another_image_size():
    x = images(2, 24, 40)
    with pytest.raises(ValueError, match=r'expected \(16, 16\).*found \(24, 40\).*dynamic_img_size=True.*') as error:
        nano()(x)
    resized = nano(keep_ratio=0.25)
    exec(re.search(r'call (set_input_size\(.*\))', str(error.value))[1], {'set_input_size': resized.set_input_size})
    with torch.no_grad():
        for model in (resized, nano(keep_ratio=0.25, dynamic_img_size=True)):
            logits, selections = model.forward_with_selection(x)
            assert logits.shape == (2, 10) and logits.isfinite().all()
            assert {kept.shape for kept in selections.values()} == {(2, 15)}
            assert model.forward_intermediates(x, 1)[1][0].shape == (2, 32, 6, 10)
        assert logits.allclose(resized(x), atol=1e-5)  # both resize the same positions


def test_images_that_patches_would_cut_are_refused():
    for model in (nano(img_size=18), nano(dynamic_img_size=True)):
        with pytest.raises(ValueError, match=r'multiples of the patch, \(4, 4\), found \(18, 18\)'):
            model(images(2, 18, 18))
    assert nano(dynamic_img_size=True, dynamic_img_pad=True)(images(2, 18, 18)).shape == (2, 10)


def test_intermediate_layers_as_dino_asks_for_them():
    model, x = nano(), images()
    with torch.no_grad():
        _, grids = model.forward_intermediates(x)
        last = model.get_intermediate_layers(x, reshape=True)
        assert len(last) == 1 and torch.equal(last[0], grids[-1])
        some = model.get_intermediate_layers(x, [2, 6], norm=True, return_prefix_tokens=True)
        for (patches, prefix), i in zip(some, (2, 6), strict=True):
            torch.testing.assert_close(patches, model.norm(grids[i].flatten(2).mT))
            assert prefix.shape == (2, 1, 32)
        with pytest.raises(ValueError, match='attn_mask: expected none'):
            model.get_intermediate_layers(x, attn_mask=torch.zeros(17, 17))


def test_options_of_timm():
    with torch.no_grad():
        assert nano(num_classes=0)(images()).shape == (2, 32)
        assert nano(num_classes=0).train()(images()).shape == (2, 32)
        assert nano(in_chans=1)(images(channels=1)).shape == (2, 10)
        assert nano(img_size=(16, 24))(images(2, 16, 24)).shape == (2, 10)
        assert nano(dynamic_img_size=True)(images(2, 24, 20)).shape == (2, 10)
        model = nano(drop_rate=0.1, drop_path_rate=0.2)
        model.reset_classifier(7)
        assert model(images()).shape == (2, 7) and model.train()(images()).shape == (2, 7)
        model.reset_classifier(0, '')
        assert model.eval()(images()).shape == (2, 17, 32)
        features = timm.create_model('evo_deit_nano_patch4_32', features_only=True)(torch.randn(1, 3, 32, 32))
        assert [f.shape[-2:] for f in features] == [(8, 8)] * 3
        for last in (5, 8):  # timm drops the blocks after the last one asked for
            cut = timm.create_model('evo_deit_nano_patch4_32', features_only=True, out_indices=(1, last))
            assert len(cut(torch.randn(1, 3, 32, 32))) == 2 and len(cut.model.blocks) == last + 1


def test_keep_ratio_for_each_stage():
    model = nano(keep_ratio=[0.75, 0.25])
    with torch.no_grad():
        for stage_wise, count in ((True, 1), (False, 4)):
            model.stage_wise = stage_wise
            kept = list(model.forward_with_selection(images())[1].values())
            assert [k.shape[1] for k in kept] == [12] * count + [4] * count


def test_keep_ratio_can_be_assigned():
    model = nano()
    model.keep_ratio = 0.25
    assert model.keep_ratio == (0.25, 0.25)
    assert torch.equal(model(images()), nano(keep_ratio=0.25)(images()))
    model.keep_ratio = [0.75, 0.5]
    kept = model.forward_with_selection(images())[1].values()
    assert [k.shape[1] for k in kept] == [12, 8]
    for wrong, message in ((0.0, r'in \(0, 1\]'), ([0.5] * 3, 'one value or 2'), (0.06, 'keeps one of the 16 patches')):
        with pytest.raises(ValueError, match=message):
            model.keep_ratio = wrong
        with pytest.raises(ValueError, match=message):
            nano(keep_ratio=wrong)
    assert model.keep_ratio == (0.75, 0.5)


def test_weight_decay_is_as_published():
    recipe = json.loads((fill.HERE / 'recipe.json').read_text())
    model = timm.create_model('evo_deit_tiny_patch16_224')
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    without = {id(p) for group in groups if group['weight_decay'] == 0 for p in group['params']}
    state = {key: p for key, p in model.named_parameters() if id(p) in without}
    assert set(model.to_published(state)) == set(recipe['no_weight_decay']['evo_deit_tiny_patch16_224'])


def test_initialisation_is_as_published():
    torch.manual_seed(0)
    model = timm.create_model('evo_deit_small_patch16_224')
    for name, p in model.named_parameters():
        if 'norm' in name:
            assert (p == (1 if name.endswith('weight') else 0)).all()
        elif name.endswith('bias') and 'patch_embed' not in name:
            assert not p.any()
        elif 'patch_embed' not in name:
            assert math.isclose(p.std().item(), 0.02, rel_tol=0.15), name


def test_plain_vits_load_by_name():
    plain = timm.create_model('deit_tiny_patch16_224', img_size=32, num_classes=10, depth=5)
    model = timm.create_model('evo_deit_tiny_patch16_224', img_size=32, num_classes=10, depth=5)
    filled = {f'{kind}_cls.{leaf}' for kind in ('head', 'norm') for leaf in ('weight', 'bias')}
    loaded = weights.load_weights(model, {'model': plain.state_dict()})
    assert set(loaded.filled) == filled and not loaded.missing and not loaded.dropped
    assert torch.equal(model.head_cls.weight, plain.head.weight)
    larger = timm.create_model('evo_deit_tiny_patch16_224', img_size=(48, 64), num_classes=3, depth=5)
    with pytest.raises(utils.InputError, match='10 classes, the model 3'):
        weights.load_weights(larger, {'model': plain.state_dict()})
    head = larger.head.weight.clone()
    loaded = weights.load_weights(larger, {'model': plain.state_dict()}, adapt=True)
    heads = {f'{name}.{leaf}' for name in ('head', 'head_cls') for leaf in ('weight', 'bias')}
    assert set(loaded.missing) == heads and set(loaded.dropped) == {'head.weight', 'head.bias'}
    assert set(loaded.filled) == {'norm_cls.weight', 'norm_cls.bias'}
    assert torch.equal(larger.head.weight, head)
    assert torch.equal(larger.blocks[3].attn.qkv.weight, plain.blocks[3].attn.qkv.weight)
    distilled = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, num_classes=10, depth=5)
    assert 'dist_token' in weights.load_weights(model, {'model': distilled.state_dict()}, adapt=True).dropped


def plain_vit(name: str = 'deit_tiny_patch16_224', **kwargs) -> nn.Module:
    """A small plain ViT of timm with random weights that matter, 4 patches."""
    torch.manual_seed(1)
    model = timm.create_model(name, **(dict(img_size=32, num_classes=10, depth=5) | kwargs)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def dense(**kwargs) -> EvoDeiT:
    """An Evo-DeiT of the size of `plain_vit` that keeps every patch."""
    kwargs = dict(img_size=32, num_classes=10, depth=5, keep_ratio=1.0) | kwargs
    return timm.create_model('evo_deit_tiny_patch16_224', **kwargs).eval()


def test_a_plain_vit_is_read_as_it_was_trained(capsys):
    """Its head from the class token, or from the mean; also after the weights went through a fresh model."""
    x = images(2, 32, 32)
    for pool in ('token', 'avg'):
        plain, model = plain_vit(global_pool=pool), dense(global_pool='avg' if pool == 'token' else 'token')
        loaded = weights.load_weights(model, plain.state_dict())
        assert loaded.pooling == model.global_pool == pool
        assert f"(global_pool '{pool}', it was" in capsys.readouterr().out
        fresh = dense()
        fresh.load_state_dict(model.state_dict())
        again = dense()
        assert weights.load_weights(again, model.state_dict()).pooling == ('token' if pool == 'token' else '')
        with torch.no_grad():
            for each in (model, fresh, again, model.fuse()):
                torch.testing.assert_close(each(x), plain(x))


def test_a_plain_vit_through_timms_loading(tmp_path):
    plain, x = plain_vit(), images(2, 32, 32)
    torch.save(plain.state_dict(), tmp_path / 'w.pth')
    overlay = dict(file=str(tmp_path / 'w.pth'), num_classes=10)
    with torch.no_grad():
        torch.testing.assert_close(dense(pretrained=True, pretrained_cfg_overlay=overlay)(x), plain(x))
    assert dense(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3).global_pool == 'avg'


def test_the_pooling_asked_for_stays_in_finetuning_and_without_a_head():
    state = plain_vit().state_dict()
    model = dense()
    assert weights.load_weights(model, state, adapt=True).pooling == '' and model.global_pool == 'avg'
    tokens = dense(num_classes=0, global_pool='')
    weights.load_weights(tokens, {k: v for k, v in state.items() if not k.startswith('head')})
    assert tokens.global_pool == ''
    saved = dense(global_pool='token').state_dict()
    assert weights.load_weights(model, saved, adapt=True).pooling == '' and model.global_pool == 'avg'


def test_published_and_older_files_do_not_say_a_pooling():
    model, state = nano(), nano().state_dict()
    weights.load_weights(model, state | {'_extra_state': torch.tensor([False, True])})  # as saved before
    assert (model.stage_wise, model.evolving, model.global_pool) == (False, True, 'avg')
    model.load_state_dict(state | {'_extra_state': torch.tensor([True, False])})
    assert (model.stage_wise, model.evolving, model.global_pool) == (True, False, 'avg')
    assert weights.load_weights(nano(global_pool='token'), model.to_published(state)).pooling == 'avg'


def test_a_distilled_deit_is_no_plain_one():
    state = plain_vit('deit_tiny_distilled_patch16_224').state_dict()
    with pytest.raises(utils.InputError, match='mean of two heads.*--finetune, or adapt=True'):
        weights.load_weights(dense(), state)


@pytest.mark.parametrize('original', [False, True])
def test_layer_scale_and_positions_without_a_class_token(original):
    """DeiT III: what the model lacks is folded into other weights, and computes the same."""
    plain, x = plain_vit('deit3_small_patch16_224', embed_dim=192, num_heads=3, init_values=0.5), images(2, 32, 32)
    state = plain.state_dict()
    assert state['pos_embed'].shape[1] == 4 and 'blocks.0.ls2.gamma' in state
    names = {k: k.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2') if original else k for k in state}
    model, same = dense(), dense(init_values=1.0, no_embed_class=True)
    weights.load_weights(model, {names[k]: v for k, v in state.items()})
    weights.load_weights(same, state)
    assert torch.equal(same.blocks[2].ls1.gamma, plain.blocks[2].ls1.gamma)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(same(x), plain(x))
        without = dense(no_embed_class=True)
        weights.load_weights(without, plain_vit().state_dict())
        torch.testing.assert_close(without(x), plain_vit()(x))
    larger = dense(img_size=48, num_classes=3)
    loaded = weights.load_weights(larger, state, adapt=True)
    assert {'head.weight', 'head.bias'} == set(loaded.dropped)
    assert not larger.pos_embed[:, 0].any() and larger(images(1, 48, 48)).shape == (1, 3)


@pytest.mark.parametrize('adapt', [False, True])
def test_what_evo_deit_cannot_compute_is_refused(adapt):
    for name, says in (
        ('vit_medium_patch16_reg4_gap_256', 'has no class token'),
        ('vit_small_patch14_reg4_dinov2', '4 register tokens'),
    ):
        with pytest.raises(utils.InputError, match=f'{says}.*such as DeiT, DINO or MAE'):
            weights.load_weights(dense(), plain_vit(name).state_dict(), adapt=adapt)
    state = plain_vit().state_dict()
    state['pos_embed'] = torch.zeros(1, 12, 192)
    with pytest.raises(utils.InputError, match='12 positions are of a grid'):
        weights.load_weights(dense(), state, adapt=adapt)


def test_a_backbone_without_a_head_can_be_finetuned():
    """As DINO and MAE publish them."""
    state = {k: v for k, v in plain_vit().state_dict().items() if not k.startswith('head')}
    model = dense(img_size=48)
    loaded = weights.load_weights(model, state, adapt=True)
    assert set(loaded.missing) == {f'{h}.{leaf}' for h in ('head', 'head_cls') for leaf in ('weight', 'bias')}
    assert torch.equal(model.norm_cls.weight, state['norm.weight']) and not loaded.dropped
    with pytest.raises(utils.InputError, match='4 missing: head.weight'):
        weights.load_weights(dense(), state)
    del state['norm.bias']
    with pytest.raises(utils.InputError, match='2 missing: norm.bias, norm_cls.bias'):
        weights.load_weights(model, state, adapt=True)


def test_half_precision():
    model = nano()
    with torch.no_grad():
        expected = model(images())
        with torch.autocast('cpu', torch.bfloat16):
            assert (model(images()) - expected).abs().max() < 0.1

"""Evo-DeiT: numbers and checkpoint layout of the original, arguments of timm, weights of plain ViTs."""

import inspect
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
from torch import nn

from models import weights
from models.evo_deit import EvoDeiT

GOLDEN = [f'evo_deit_{size}_224' for size in ('tiny_patch16', 'small_patch16', 'base_patch16')]
GOLDEN += ['evo_deit_small_patch16_384', 'evo_deit_base_patch16_384']


def images(batch: int = 2, *size: int, channels: int = 3) -> torch.Tensor:
    return noise(batch, channels, *(size or (16, 16)))


@pytest.mark.parametrize('name', GOLDEN)
def test_everything_is_that_of_the_original(name):
    description, golden = fill.load(name)
    state, batch = fill.published_state(description), description['batch']
    model = timm.create_model(name)
    assert not any(weights.load_weights(model, {'model': state}))
    x, y = fill.images('golden', batch, model.patch_embed.img_size[0]), fill.labels('golden', batch)
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
        norms = [gradients[key].norm().item() for key in description['parameters']]
        np.testing.assert_allclose(norms, golden[f'train_{schedule}_gradnorm'], rtol=1e-5, atol=1e-12)


class GatedAttention(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, gated=True, **kwargs)


class ScaledPatches(PatchEmbed):
    def forward(self, x):
        return 2 * super().forward(x)


# Arguments of timm's VisionTransformer, with other values than the defaults.
COMPUTED = [
    dict(img_size=(16, 24)), dict(patch_size=8), dict(in_chans=1), dict(num_classes=3), dict(embed_dim=48),
    dict(depth=6), dict(num_heads=4), dict(mlp_ratio=2.0), dict(qkv_bias=False), dict(qk_norm=True),
    dict(scale_attn_norm=True), dict(scale_mlp_norm=True), dict(proj_bias=False), dict(init_values=0.5),
    dict(class_token=True), dict(pos_embed='learn'), dict(no_embed_class=True), dict(reg_tokens=0),
    dict(pre_norm=True), dict(final_norm=False), dict(fc_norm=True), dict(global_pool='avg', fc_norm=True),
    dict(global_pool='avg', fc_norm=None), dict(global_pool='avg', fc_norm=None, pool_include_prefix=True),
    dict(global_pool='max', fc_norm=None), dict(global_pool='avgmax', fc_norm=None), dict(global_pool=''),
    dict(dynamic_img_size=True), dict(dynamic_img_size=True, dynamic_img_pad=True), dict(drop_rate=0.5),
    dict(pos_drop_rate=0.5), dict(proj_drop_rate=0.5), dict(attn_drop_rate=0.5), dict(drop_path_rate=0.5),
    dict(patch_drop_rate=0.0), dict(weight_init='jax'), dict(fix_init=True), dict(embed_layer=ScaledPatches),
    dict(embed_norm_layer='layernorm'), dict(norm_layer='layernorm'), dict(norm_layer='rmsnorm', qk_norm=True),
    dict(norm_layer=None), dict(act_layer='relu'), dict(mlp_layer=SwiGLU), dict(attn_layer='attn'),
    dict(block_fn=Block), dict(device='cpu'), dict(dtype=torch.float64),
]  # fmt: skip
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


def test_initialization_is_that_of_the_original():
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
    with pytest.raises(weights.InputError, match='10 classes, the model 3'):
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
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pth'), num_classes=10))
    with torch.no_grad():
        torch.testing.assert_close(dense(**overlay)(x), plain(x))
    assert dense(**overlay, num_classes=3).global_pool == 'avg'


def test_the_pooling_asked_for_stays_in_finetuning_and_without_a_head():
    state, model = plain_vit().state_dict(), dense()
    for weights_of in (state, dense(global_pool='token').state_dict()):
        assert weights.load_weights(model, weights_of, adapt=True).pooling == '' and model.global_pool == 'avg'
    tokens = dense(num_classes=0, global_pool='')
    weights.load_weights(tokens, {k: v for k, v in state.items() if not k.startswith('head')})
    assert tokens.global_pool == ''
    assert weights.load_weights(nano(global_pool='token'), nano().to_published(nano().state_dict())).pooling == 'avg'


def test_a_distilled_deit_is_no_plain_one():
    state = plain_vit('deit_tiny_distilled_patch16_224').state_dict()
    with pytest.raises(weights.InputError, match='mean of two heads.*--finetune, or adapt=True'):
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
        with pytest.raises(weights.InputError, match=f'{says}.*such as DeiT, DINO or MAE'):
            weights.load_weights(dense(), plain_vit(name).state_dict(), adapt=adapt)
    state = plain_vit().state_dict()
    state['pos_embed'] = torch.zeros(1, 12, 192)
    with pytest.raises(weights.InputError, match='12 positions are of a grid'):
        weights.load_weights(dense(), state, adapt=adapt)


def test_a_backbone_without_a_head_can_be_finetuned():
    """As DINO and MAE publish them."""
    state = {k: v for k, v in plain_vit().state_dict().items() if not k.startswith('head')}
    model = dense(img_size=48)
    loaded = weights.load_weights(model, state, adapt=True)
    assert set(loaded.missing) == {f'{h}.{leaf}' for h in ('head', 'head_cls') for leaf in ('weight', 'bias')}
    assert torch.equal(model.norm_cls.weight, state['norm.weight']) and not loaded.dropped
    with pytest.raises(weights.InputError, match='4 missing: head.weight'):
        weights.load_weights(dense(), state)
    del state['norm.bias']
    with pytest.raises(weights.InputError, match='2 missing: norm.bias, norm_cls.bias'):
        weights.load_weights(model, state, adapt=True)

"""Evo-LeViT: numbers and checkpoint layout of the original, grids, positions, tradeoffs."""

import json
from itertools import product

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import noise as images
from golden import fill
from timm.models._manipulate import group_parameters
from torch import Tensor

from models.evo_levit import EvoLeViT, attend

SIZES = ('128S', '128', '192', '256', '384')
NAMES = [f'EvoLeViT_{size}{pixels}' for pixels in ('', '_384') for size in SIZES]
GOLDEN = [*NAMES[:5], 'EvoLeViT_256_384', 'EvoLeViT_384_384']
TOLD_APART = 'EvoLeViT_128', 'EvoLeViT_192', 'EvoLeViT_384'  # whose golden numbers differ with schedule and tradeoff
# The names of the original in order, and for the second copy of a tensor the name of the first. All but 128S share one.
LAYOUTS = json.loads((fill.HERE / 'EvoLeViT.json').read_text())


def small(name: str = 'EvoLeViT_128S', **kwargs) -> EvoLeViT:
    """A model for 64 px images, its grids 4, 2 and 1 patches wide, with weights less mild than random ones."""
    model = timm.create_model(name, **(dict(img_size=64, num_classes=10, drop_path_rate=0.0) | kwargs))
    own = model.state_dict()
    model.load_state_dict(
        own | {key: fill.weight('small', key, v.shape) for key, v in own.items() if key != '_extra_state'}
    )
    return model.eval()


def published_state(model: EvoLeViT) -> dict[str, Tensor]:
    """The weights of the golden files, in the original layout, with the shapes of `model`."""
    own = model.to_published(model.state_dict())
    layout = LAYOUTS['EvoLeViT_128S' if len(model.stages[0].blocks) == 2 else 'EvoLeViT_128']
    state = {key: fill.weight('golden', key, own[key].shape) for key, first in layout.items() if first is None}
    return {key: state[first or key] for key, first in layout.items()}


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(fill.HERE / f'{name}.npz') as arrays:
        return dict(arrays)


@pytest.fixture(scope='module', params=GOLDEN)
def golden_model(request) -> tuple[EvoLeViT, dict[str, Tensor], dict[str, np.ndarray], Tensor]:
    """A model, the golden weights in the original layout, the golden arrays, and images."""
    model = timm.create_model(request.param, drop_path_rate=0.0)
    state = published_state(model)
    golden = golden_arrays(request.param)
    return model, state, golden, fill.images('golden', len(golden['eval_stage_learn']), model.img_size[0])


def test_evaluation_is_that_of_the_original(golden_model):
    model, state, golden, x = golden_model
    converted, filled, dropped = model.convert_state(state)
    assert not filled and not dropped
    model.load_state_dict(converted)
    model.eval()
    ways = [f'eval_{schedule}_{tradeoff}' for schedule, tradeoff in product(('stage', 'layer'), ('learn', 'fixed'))]
    for way in ways:
        model.stage_wise, model.learned_tradeoff = 'stage' in way, 'learn' in way
        with torch.no_grad():
            logits = model(x)[:, ::10].numpy()
        np.testing.assert_allclose(logits, golden[way], rtol=0, atol=1e-4)
        # This is the way that was computed: the others give something else.
        others = [np.abs(logits - golden[other]).max() for other in ways if other != way]
        assert model.default_cfg['architecture'] not in TOLD_APART or min(others) > 1e-2


def test_training_is_that_of_the_original(golden_model):
    model, state, golden, x = golden_model
    y = fill.labels('golden', len(x))
    model.double().train().set_distilled_training()
    for schedule in ('stage', 'layer'):
        model.load_state_dict(model.convert_state(state)[0])
        model.set_schedule(schedule == 'stage')
        model.zero_grad()
        heads = model(x.double())
        loss = sum(F.cross_entropy(head, y) for head in heads) / 4
        loss.backward()
        for head, published in zip(heads, ('avg', 'avg_dist', 'cls', 'cls_dist'), strict=True):
            expected = golden[f'train_{schedule}_{published}']
            np.testing.assert_allclose(head[:, ::10].detach().numpy(), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(loss.item(), golden[f'train_{schedule}_loss'], rtol=0, atol=1e-6)

        gradients = model.to_published({key: p.grad for key, p in model.named_parameters()})
        norms = [gradients[key].norm() for key in state if key in gradients and not key.startswith('stage_blocks')]
        # Some gradients are zero but for rounding: biases before batch statistics, tradeoffs that no selection reads.
        np.testing.assert_allclose(norms, golden[f'train_{schedule}_gradnorm'], rtol=1e-5, atol=1e-9)

        after = model.to_published(model.state_dict())
        norms = [after[k].norm() for k in after if k.startswith(('blocks.', 'patch_embed')) and '.bn.running' in k]
        np.testing.assert_allclose(norms, golden[f'train_{schedule}_bnnorm'], rtol=1e-6)


@pytest.mark.parametrize('name', LAYOUTS)
def test_the_original_layout_comes_back_unchanged(name):
    model = timm.create_model(name)
    state = published_state(model)
    assert model.is_published(state) and not model.is_published(model.state_dict())
    model.load_state_dict(model.convert_state(state)[0])
    back = model.to_published(model.state_dict())
    assert list(back) == list(state) == list(LAYOUTS[name])
    for key, first in LAYOUTS[name].items():
        assert torch.equal(back[key], state[key])
        assert first is None or back[key] is back[first]


def test_second_copies_in_an_original_file():
    model = small()
    state = model.to_published(model.state_dict())
    alone = {key: value for key, value in state.items() if not key.startswith('stage_blocks')}
    assert list(model.from_published(alone)) == list(model.from_published(state))
    for key in ('stage_blocks.0.m.qkv.c.weight', 'stage_blocks.9.m.7.m.2.bn.running_var', 'stage_blocks.4.poss'):
        damaged = state | {key: state[key] + 1}
        with pytest.raises(ValueError, match=key):
            model.from_published(damaged)
    with pytest.raises(RuntimeError, match='stage_blocks.99.poss'):
        model.load_state_dict(model.convert_state(state | {'stage_blocks.99.poss': state['poss']})[0])


def test_a_fused_model_refuses_unfused_weights():
    model, fused = small(), small().fuse()
    for state in (model.state_dict(), model.to_published(model.state_dict())):
        for load in (fused.load_state_dict, fused.convert_state):
            with pytest.raises(ValueError, match='load, then fuse'):
                load(state)
    with pytest.raises(ValueError, match='unfused'):
        fused.to_published(fused.state_dict())


@pytest.mark.parametrize('size', SIZES)
def test_small_grids(size):
    model = small(f'EvoLeViT_{size}')
    assert [stage.grid for stage in model.stages] == [(4, 4), (2, 2), (1, 1)]
    logits, selections = model.forward_with_selection(images(2, 3, 64, 64))
    assert logits.isfinite().all()
    expected = {'stages.0.blocks.2': (2, 8), 'stages.1.blocks.0': (2, 2), 'stages.2.blocks.0': (2, 0)}
    if size == '128S':
        del expected['stages.0.blocks.2']  # it has no more than two layers there
    assert {name: tuple(kept.shape) for name, kept in selections.items()} == expected


def test_sizes_of_images():
    model = small(img_size=(48, 80))
    assert [stage.grid for stage in model.stages] == [(3, 5), (2, 3), (1, 2)]
    assert model(images(1, 3, 48, 80)).shape == (1, 10)
    with pytest.raises(ValueError, match=r'expected \(48, 80\).*found \(64, 64\)'):
        model(images(1, 3, 64, 64))


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(img_size=100), 'multiples of 16'),
        (dict(img_size=(64, 40)), 'multiples of 16'),
        (dict(img_size=0), 'multiples of 16'),
        (dict(stages=(0, 4)), 'stages: expected'),
        (dict(depth=(2, 0, 1)), 'depth: expected'),
        (dict(keep_ratio=(0.5, 0.5, 0.5)), 'one value or 2'),  # of the three grids of EvoLeViT_128S two evolve
        (dict(global_pool=''), 'global_pool'),
        (dict(global_pool='max', num_classes=0), 'global_pool'),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        small(**wrong)


def test_stages_can_be_chosen():
    assert small().first_blocks == (2, 5) and small('EvoLeViT_128').first_blocks == (2, 4, 8)
    model = small('EvoLeViT_128', img_size=128, stages=(3, 6), keep_ratio=(0.75, 0.5))
    kept = {name: k.shape[1] for name, k in model.forward_with_selection(images(2, 3, 128, 128))[1].items()}
    # A new grid selects anew, with the ratio of the stage that it is in.
    assert kept == {'stages.0.blocks.3': 48, 'stages.1.blocks.0': 12, 'stages.1.blocks.2': 8, 'stages.2.blocks.0': 2}
    assert small(depth=(2, 1, 1), keep_ratio=0.3, stages=())(images(1, 3, 64, 64)).shape == (1, 10)


def test_scores_that_are_all_zero_stay_finite():
    score = torch.zeros(3, 16)
    score[1, 5] = 0.6  # row 1, column 1, which down-sampling leaves out
    score[2] = torch.arange(16)
    score.requires_grad_()
    tokens = images(3, 17, 128).requires_grad_()
    x, found = small('EvoLeViT_128').stages[1].downsample(tokens, score, 0.0)
    total = score.sum(1)
    torch.testing.assert_close(found[:2], (total[:2, None] / 4).expand(-1, 4))
    torch.testing.assert_close(found[2], torch.tensor([0.0, 2.0, 8.0, 10.0]) * total[2] / 20)
    (found.square().sum() + x.sum()).backward()
    assert score.grad.isfinite().all() and tokens.grad.isfinite().all()


def test_one_head_alone_reaches_every_tradeoff():
    model = small().train()
    model.set_distilled_training()
    model(images(4, 3, 64, 64)).head_cls_dist.square().mean().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split('.')[0] for name in idle} == {'head', 'head_dist', 'head_cls'}


def test_half_precision_keeps_scores_and_indices_exact():
    model = small(img_size=384).eval()
    x = images(1, 3, 384, 384)
    exact = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        logits, selections = model.forward_with_selection(x)
        _, attention = model.stages[0].blocks[0](model.embed(x), need_attention=True)
    assert attention.dtype == torch.float32
    assert {len(kept[0].unique()) for kept in selections.values()} == {72, 18}
    assert (logits - exact).abs().max() < 0.2 * exact.std()
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_fused_attention_kernel_agrees_with_the_plain_one():
    q, k, v = (images(2, 3, n, d, seed=n + d) for n, d in ((5, 16), (17, 16), (17, 32)))
    values, row = attend(q, k, v, True)
    half, half_row = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), True)
    torch.testing.assert_close(half.float(), values, rtol=0, atol=0.02)
    torch.testing.assert_close(half_row, row, rtol=0, atol=0.005)
    torch.testing.assert_close(row, (q @ k.mT / 4).softmax(-1)[:, :, 0, 1:].mean(1))
    assert attend(q, k, v, False)[1] is None


def test_initialization():
    model = timm.create_model('EvoLeViT_128S', img_size=64)
    assert not model.cls_token.any()
    assert not any(a.learn_tradeoff.any() for a in model.attentions())
    positions = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith('pos_embed')])
    assert abs(positions.std() - 0.02) < 0.001
    block, downsample = model.stages[1].blocks[0], model.stages[1].downsample
    assert not any(bn.weight.any() for bn in (block.attn.proj.bn, block.mlp.ln2.bn, downsample.mlp.ln2.bn))
    assert downsample.proj.bn.weight.eq(1).all() and block.attn.qkv.bn.weight.eq(1).all()
    assert model.stage_wise and model.learned_tradeoff and model.evolving
    assert [m.drop_prob for m in timm.create_model('EvoLeViT_384').modules() if hasattr(m, 'drop_prob')] == [0.1] * 14


def test_positions_are_resized():
    model, larger = small('EvoLeViT_128S', img_size=64), small('EvoLeViT_128S', img_size=(96, 128))
    state = model.state_dict()
    with pytest.raises(RuntimeError, match='pos_embed'):
        larger.load_state_dict(state)
    for source in (state, model.to_published(state)):
        larger.load_state_dict(larger.convert_state(source, resize=True)[0])
        same, _, _ = model.convert_state(source, resize=True)
        assert all(torch.equal(same[key], state[key]) for key in state)
    positions = {key: p.shape[1] for key, p in larger.state_dict().items() if key.endswith('pos_embed')}
    assert positions == {
        'pos_embed': 1 + 6 * 8,
        'stages.1.downsample.pos_embed': 1 + 6 * 8,
        'stages.2.downsample.pos_embed': 1 + 3 * 4,
    }
    assert torch.equal(larger.pos_embed[:, :1], model.pos_embed[:, :1])


def test_layers_are_grouped_by_depth():
    model = timm.create_model('EvoLeViT_128S')
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers['cls_token'] == layers['patch_embed.conv1.linear.weight'] == 0
    names = (
        'stages.0.blocks.1.attn.qkv.linear.weight',
        'stages.1.downsample.pos_embed',
        'stages.2.blocks.3.mlp.ln2.bn.bias',
    )
    order = [layers[name] for name in (*names, 'head.bn.bias')]
    assert order == sorted(set(order))


def test_a_new_grid_does_not_merge_clusters_of_the_old_one():
    model = timm.create_model('EvoLeViT_128S', representative='nearest', keep_ratio=[0.8, 0.4]).eval()
    with torch.inference_mode():
        output, selections = model.forward_with_selection(torch.randn(1, 3, 224, 224))
    assert output.isfinite().all()
    assert [kept.shape[1] for kept in selections.values()] == [int(49 * 0.8), int(16 * 0.4)]

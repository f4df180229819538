"""Evo-LeViT: the published code's numbers and checkpoint layout, folding, timm's interface, no state in forward."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import noise as images
from conftest import without_gradient
from golden import fill
from test_vit import check_recomputation
from timm.models._manipulate import group_parameters
from timm.models.levit import LevitMlp
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from models.evo_levit import HEADS, EvoLeViT, Heads, attend

SIZES = ('128S', '128', '192', '256', '384')
NAMES = [f'EvoLeViT_{size}{pixels}' for pixels in ('', '_384') for size in SIZES]
GOLDEN = [*NAMES[:5], 'EvoLeViT_256_384', 'EvoLeViT_384_384']
TOLD_APART = 'EvoLeViT_128', 'EvoLeViT_192', 'EvoLeViT_384'  # whose golden numbers differ with schedule and tradeoff
# Published names in order, and for the second copy of a tensor the name of the first. All but 128S share a layout.
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
    """The weights of the golden files, in the published layout, with the shapes of `model`."""
    own = model.to_published(model.state_dict())
    layout = LAYOUTS['EvoLeViT_128S' if len(model.stages[0].blocks) == 2 else 'EvoLeViT_128']
    state = {key: fill.weight('golden', key, own[key].shape) for key, first in layout.items() if first is None}
    return {key: state[first or key] for key, first in layout.items()}


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(fill.HERE / f'{name}.npz') as arrays:
        return dict(arrays)


@pytest.fixture(scope='module', params=GOLDEN)
def golden_model(request) -> tuple[EvoLeViT, dict[str, Tensor], dict[str, np.ndarray], Tensor]:
    """A model, the golden weights in the published layout, the golden arrays, and images."""
    model = timm.create_model(request.param, drop_path_rate=0.0)
    state = published_state(model)
    golden = golden_arrays(request.param)
    return model, state, golden, fill.images('golden', len(golden['eval_stage_learn']), model.img_size[0])


def test_evaluation_is_the_published_one(golden_model):
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


def test_training_is_the_published_one(golden_model):
    model, state, golden, x = golden_model
    y = fill.labels('golden', len(x))
    model.double().train()
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
        # Some gradients are zero but for rounding: a bias before batch statistics, a tradeoff that is read in vain.
        np.testing.assert_allclose(norms, golden[f'train_{schedule}_gradnorm'], rtol=1e-5, atol=1e-9)

        after = model.to_published(model.state_dict())
        norms = [after[k].norm() for k in after if k.startswith(('blocks.', 'patch_embed')) and '.bn.running' in k]
        np.testing.assert_allclose(norms, golden[f'train_{schedule}_bnnorm'], rtol=1e-6)


@pytest.mark.parametrize('name', LAYOUTS)
def test_published_layout_comes_back_unchanged(name):
    model = timm.create_model(name)
    state = published_state(model)
    assert model.is_published(state) and not model.is_published(model.state_dict())
    model.load_state_dict(model.convert_state(state)[0])
    back = model.to_published(model.state_dict())
    assert list(back) == list(state) == list(LAYOUTS[name])
    for key, first in LAYOUTS[name].items():
        assert torch.equal(back[key], state[key])
        assert first is None or back[key] is back[first]


def test_second_copies_in_a_published_file():
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


@pytest.mark.parametrize('stage_wise', [True, False])
def test_fused_agrees(stage_wise):
    model = small('EvoLeViT_192', num_classes=100)
    model.set_schedule(stage_wise)
    x = images(4, 3, 64, 64)
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        expected, found = model(x), fused(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.std().item())
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert not [key for key in fused.state_dict() if key.startswith('head_cls')]
    assert fused.double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(model).double().fuse()(x.double()).dtype == torch.float64


def test_fused_refuses_training_and_unfused_weights():
    model = small()
    fused = copy.deepcopy(model).fuse()
    assert not fused.eval().train(False).training
    with pytest.raises(ValueError, match='cannot be trained'):
        fused.train()
    for state in (model.state_dict(), model.to_published(model.state_dict())):
        with pytest.raises(ValueError, match='load, then fuse'):
            fused.load_state_dict(state)
        with pytest.raises(ValueError, match='load, then fuse'):
            fused.convert_state(state)
    fused.load_state_dict(fused.state_dict())
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


def test_sizes_of_noise():
    model = small(img_size=(48, 80))
    assert [stage.grid for stage in model.stages] == [(3, 5), (2, 3), (1, 2)]
    assert model(images(1, 3, 48, 80)).shape == (1, 10)
    with pytest.raises(ValueError, match=r'expected \(48, 80\).*found \(64, 64\)'):
        model(images(1, 3, 64, 64))
    for size in (100, (64, 40), 0):
        with pytest.raises(ValueError, match='multiples of 16'):
            small(img_size=size)


@pytest.mark.parametrize('stage_wise', [True, False])
def test_selection(stage_wise):
    model = small('EvoLeViT_128', img_size=128)
    model.set_schedule(stage_wise)
    x = images(3, 3, 128, 128)
    logits, selections = model.forward_with_selection(x)
    assert torch.equal(logits, model(x))
    layers = {0: (2, 3), 1: range(4), 2: range(4)}
    expected = [f'stages.{i}.blocks.{j}' for i, js in layers.items() for j in (js[:1] if stage_wise else js)]
    assert list(selections) == expected
    for name, kept in selections.items():
        n = {'0': 64, '1': 16, '2': 4}[name.split('.')[1]]
        assert kept.dtype == torch.int64 and kept.shape == (3, n // 2)
        assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < n
    assert len({tuple(kept.flatten().tolist()) for kept in selections.values()}) > 2


def test_keeping_everything_is_the_dense_network():
    x = images(2, 3, 64, 64)
    model, dense = small('EvoLeViT_128', keep_ratio=1.0), small('EvoLeViT_128')
    dense.set_schedule(True, evolving=False)
    torch.testing.assert_close(model(x), dense(x))
    assert not dense.forward_with_selection(x)[1]
    assert (small('EvoLeViT_128').forward_features(x) - dense.forward_features(x)).abs().max() > 1e-2
    assert len(small('EvoLeViT_128', keep_ratio=(1.0, 0.5, 1.0)).forward_with_selection(x)[1]) == 1
    with pytest.raises(ValueError, match='keep_ratio'):
        small(keep_ratio=(0.5, 0.5, 0.5))  # of the three grids of EvoLeViT_128S two evolve


def test_keep_ratio_can_be_assigned():
    model, x = small('EvoLeViT_128', img_size=128), images(2, 3, 128, 128)
    model.keep_ratio = 0.25
    assert model.keep_ratio == (0.25, 0.25, 0.25)
    assert torch.equal(model(x), small('EvoLeViT_128', img_size=128, keep_ratio=0.25)(x))
    model.keep_ratio = [0.75, 0.5, 0.25]
    assert [kept.shape[1] for kept in model.forward_with_selection(x)[1].values()] == [48, 8, 1]
    for wrong, message in ((2, r'in \(0, 1\]'), ([0.5, 0.5], 'one value or 3'), (0.2, 'keeps one of the 4 patches')):
        with pytest.raises(ValueError, match=message):
            model.keep_ratio = wrong
        with pytest.raises(ValueError, match=message):
            small('EvoLeViT_128', img_size=128, keep_ratio=wrong)
    assert model.keep_ratio == (0.75, 0.5, 0.25)


def test_stages_can_be_chosen():
    assert small().first_blocks == (2, 5) and small('EvoLeViT_128').first_blocks == (2, 4, 8)
    model = small('EvoLeViT_128', img_size=128, stages=(3, 6), keep_ratio=(0.75, 0.5))
    kept = {name: k.shape[1] for name, k in model.forward_with_selection(images(2, 3, 128, 128))[1].items()}
    # A new grid selects anew, with the ratio of the stage that it is in.
    assert kept == {'stages.0.blocks.3': 48, 'stages.1.blocks.0': 12, 'stages.1.blocks.2': 8, 'stages.2.blocks.0': 2}
    assert small(depth=(2, 1, 1), keep_ratio=0.3, stages=())(images(1, 3, 64, 64)).shape == (1, 10)
    for wrong, message in ((dict(stages=(0, 4)), 'stages: expected'), (dict(depth=(2, 0, 1)), 'depth: expected')):
        with pytest.raises(ValueError, match=message):
            small(**wrong)


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


def test_placeholders_move_alike_or_not_at_all():
    """In a stage with one selection, all placeholders of an image are given the same update."""
    for representative in (True, False):
        model = small('EvoLeViT_128', representative=representative)
        x = images(2, 3, 64, 64)
        _, selections, outputs = model.evolve(x, [3, 7])
        kept = selections['stages.1.blocks.0'].kept
        before = model.stages[1].downsample(outputs[0], None, 0.5)[0]
        moved = torch.ones(2, 4).scatter(1, kept, 0).bool()
        update = (outputs[1] - before)[:, 1:][moved].unflatten(0, (2, -1))
        torch.testing.assert_close(update, update[:, :1].expand_as(update), atol=1e-5, rtol=1e-5)
        assert (update.abs().max() > 0.1) == representative


SCHEDULES = [(stage_wise, learned, evolving) for stage_wise, learned, evolving in product((True, False), repeat=3)]


@pytest.mark.parametrize('stage_wise, learned, evolving', SCHEDULES)
def test_every_parameter_has_a_gradient(stage_wise, learned, evolving):
    for representative in (True, False):
        model = small(depth=(3, 2, 2), representative=representative).train()
        model.stage_wise, model.learned_tradeoff, model.evolving = stage_wise, learned, evolving
        heads = model(images(4, 3, 64, 64))
        assert isinstance(heads, Heads) and [tuple(head.shape) for head in heads] == [(4, 10)] * 4
        sum(head.square().mean() for head in heads).backward()
        assert without_gradient(model) == []
        read = {name for name, p in model.named_parameters() if p.grad.any() and 'tradeoff' in name}
        assert bool(read) == (learned and evolving and representative)


def test_one_head_alone_reaches_every_tradeoff():
    model = small().train()
    model(images(4, 3, 64, 64)).head_cls_dist.square().mean().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split('.')[0] for name in idle} == {'head', 'head_dist', 'head_cls'}


def test_models_do_not_disturb_each_other():
    a, b = small('EvoLeViT_128'), small('EvoLeViT_128S')
    b.set_schedule(False)
    xs = [images(2, 3, 64, 64, seed=i) for i in range(4)]
    alone = [[model(x) for x in xs] for model in (a, b)]
    for i, x in enumerate(xs):
        assert torch.equal(b(x), alone[1][i]) and torch.equal(a(x), alone[0][i])


def test_two_threads_on_one_model():
    model = small('EvoLeViT_128')
    xs = [images(2, 3, 64, 64, seed=i) for i in range(16)]
    with torch.no_grad():
        alone = [model(x) for x in xs]

    def work(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, xs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_forward_leaves_nothing_behind():
    model = small('EvoLeViT_128')
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    x = images(2, 3, 64, 64).requires_grad_()
    before = x.detach().clone()
    model(x).sum().backward()
    assert torch.equal(x, before) and x.grad.any()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


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


PARAMETERS = {  # with the training heads, and without
    '128S': (8_606_651, 7_835_115),
    '128': (10_041_022, 9_269_486),
    '192': (11_803_526, 11_031_990),
    '256': (20_035_278, 19_007_230),
    '384': (40_836_830, 39_295_758),
}


@pytest.mark.parametrize('size', SIZES)
def test_number_of_parameters(size):
    model = timm.create_model(f'EvoLeViT_{size}')
    counts = {name: p.numel() for name, p in model.named_parameters()}
    inference = sum(count for name, count in counts.items() if not name.startswith('head_cls'))
    assert (sum(counts.values()), inference) == PARAMETERS[size]


def test_initialisation():
    model = timm.create_model('EvoLeViT_128S', img_size=64)
    assert not model.cls_token.any()
    assert not any(a.learn_tradeoff.any() for a in model.attentions())
    positions = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith('pos_embed')])
    assert abs(positions.std() - 0.02) < 0.001
    block, downsample = model.stages[1].blocks[0], model.stages[1].downsample
    assert not any(bn.weight.any() for bn in (block.attn.proj.bn, block.mlp.ln2.bn, downsample.mlp.ln2.bn))
    assert downsample.proj.bn.weight.eq(1).all() and block.attn.qkv.bn.weight.eq(1).all()
    assert model.stage_wise and model.learned_tradeoff and model.evolving


def test_schedule_travels_with_the_weights():
    model, other = small(), small()
    for stage_wise, evolving in product((True, False), repeat=2):
        model.set_schedule(stage_wise, evolving)
        assert model.learned_tradeoff == stage_wise
        other.load_state_dict(model.state_dict())
        assert (other.stage_wise, other.learned_tradeoff, other.evolving) == (stage_wise, stage_wise, evolving)
    assert small().convert_state({})[0]['_extra_state'].all()


def test_drop_path_and_dropout():
    assert [m.drop_prob for m in timm.create_model('EvoLeViT_384').modules() if hasattr(m, 'drop_prob')] == [0.1] * 14
    x = images(4, 3, 64, 64)
    for kwargs in ({'drop_path_rate': 0.5}, {'drop_rate': 0.5}):
        model = small(**kwargs)
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x).head, model(x).head)


def test_checkpointing_runs_layers_again():
    model = small('EvoLeViT_128').train()
    layers = [m for m in model.modules() if isinstance(m, LevitMlp)]
    check_recomputation(model, layers, images(4, 3, 64, 64))


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


def test_pretrained_weights_through_timm(tmp_path):
    model = small(num_classes=1000)
    torch.save(model.to_published(model.state_dict()), tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'))
    loaded = timm.create_model('EvoLeViT_128S', pretrained=True, img_size=64, pretrained_cfg_overlay=overlay).eval()
    x = images(2, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    timm.create_model('EvoLeViT_128S', pretrained=True, img_size=96, num_classes=7, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('name', NAMES)
def test_configuration(name):
    assert timm.is_model(name)
    model = timm.create_model(name)
    cfg = model.default_cfg
    assert cfg['input_size'] == (3, *model.img_size) and model.img_size[0] == (384 if name.count('_') == 2 else 224)
    state = model.state_dict()
    assert cfg['first_conv'] + '.weight' in state
    assert all(classifier + '.weight' in state for classifier in cfg['classifier'])
    assert len(cfg['classifier']) == len(HEADS)


def test_heads_and_features():
    x = images(2, 3, 64, 64)
    model = small('EvoLeViT_256')
    assert model.num_features == model.head_hidden_size == 512 and model.num_classes == 10
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 2, 512)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, tokens[:, 1:].mean(1))
    head, head_dist = model.get_classifier()
    torch.testing.assert_close(model(x), (head(pooled) + head_dist(pooled)) / 2)

    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and torch.equal(model.train().eval()(x), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), tokens)
    assert small(num_classes=0, global_pool='')(x).shape == (2, 2, 384)
    assert small(in_chans=1)(x[:, :1]).shape == (2, 10)
    for pool, classes in (('', 10), ('max', 0)):
        with pytest.raises(ValueError, match='global_pool'):
            small(global_pool=pool, num_classes=classes)


def test_intermediates():
    x = images(2, 3, 128, 128)
    model = small(img_size=128)
    tokens, grids = model.forward_intermediates(x)
    assert torch.equal(tokens, model.forward_features(x))
    assert torch.equal(grids[-1].flatten(2).mT, tokens[:, 1:])
    shapes = [(2, info['num_chs'], 128 // info['reduction'], 128 // info['reduction']) for info in model.feature_info]
    assert [tuple(grid.shape) for grid in grids] == shapes
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(early, grids[:2], strict=True))
    (patches, prefix), *_ = model.forward_intermediates(
        x, [2, 0], return_prefix_tokens=True, norm=True, output_fmt='NLC', intermediates_only=True
    )
    assert torch.equal(patches, grids[0].flatten(2).mT) and prefix.shape == (2, 1, 128)
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(x, output_fmt='NHWC')

    for indices in ((0, 1, 2), (1,)):
        backbone = timm.create_model('EvoLeViT_128S', img_size=128, features_only=True, out_indices=indices).eval()
        assert [tuple(grid.shape) for grid in backbone(x)] == [shapes[i] for i in indices]
        assert backbone.feature_info.channels() == [shapes[i][1] for i in indices]


def test_parameter_groups():
    model = timm.create_model('EvoLeViT_128S')
    groups = param_groups_weight_decay(model, 0.025, no_weight_decay_list=model.no_weight_decay())
    plain = {id(p) for group in groups if not group['weight_decay'] for p in group['params']}
    published = model.to_published(dict(model.named_parameters()))
    names = {name for name, p in published.items() if id(p) in plain and not name.startswith('stage_blocks')}
    expected = json.loads((fill.HERE / 'recipe.json').read_text())['no_weight_decay']['EvoLeViT_128S']
    assert names == set(expected)

    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers['cls_token'] == layers['patch_embed.conv1.linear.weight'] == 0
    assert layers['stages.0.blocks.1.attn.qkv.linear.weight'] < layers['stages.1.downsample.pos_embed']
    assert (
        layers['stages.1.downsample.pos_embed'] < layers['stages.2.blocks.3.mlp.ln2.bn.bias'] < layers['head.bn.bias']
    )

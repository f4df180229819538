"""Rivals: what their papers say of them, and the one seam."""

import argparse
import copy

import pytest
import timm
import torch
from conftest import images
from conftest import small_vit as dense

import models
import networks
from measure.costs import count_gmacs
from models import evolution, rivals


def run(model, x):
    with torch.no_grad():
        return model(x), model.forward_blocks(x)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_medium_patch16_reg4_gap_256', 'eva02_tiny_patch14_224'])
@pytest.mark.parametrize(
    'method, same, less',
    [
        ('drop', dict(keep_ratio=1.0), dict(keep_ratio=0.5)),
        ('fuse', dict(keep_ratio=1.0), dict(keep_ratio=0.5)),
        ('merge', dict(merge_r=0), dict(merge_r=3)),
        ('merge_norm', dict(merge_r=0), dict(merge_r=3)),
    ],
)
def test_reducing_nothing_is_dense_and_the_grid_stays_whole(name, method, same, less):
    model = dense(name)
    x = images(model)
    with torch.no_grad():
        expected, tokens = model(x), model.forward_features(x)
    reduced = rivals.apply(copy.deepcopy(model), method, **same)
    torch.testing.assert_close(run(reduced, x)[0], expected, rtol=1e-4, atol=1e-5)
    reduced = rivals.apply(copy.deepcopy(model), method, **less)
    logits, (found, selections, _) = run(reduced, x)
    assert found.shape == tokens.shape and found.isfinite().all()
    assert (logits - expected).abs().max() > 1e-3
    assert selections or 'merge' in method


def test_what_leaves_never_comes_back_and_keeps_its_last_values():
    model = rivals.apply(dense(depth=8), 'drop', keep_ratio=0.6)
    x = images(model)
    with torch.no_grad():
        _, selections, outputs = model.forward_blocks(x, [3, 5, 7])
    kept = [set(s.kept[0].tolist()) for s in selections.values()]
    assert len(kept) == 3 and kept[0] > kept[1] > kept[2]
    gone = sorted(set(range(25)) - kept[0])
    assert torch.equal(outputs[0][0, 1:][gone], outputs[2][0, 1:][gone])


class Adds:
    """A block whose attention adds 1 and whose MLP adds 10; the class token attends to patches as `attention` says.

    attention (B, N); to a fused token its mean.
    """

    def __init__(self, attention):
        self.attention = attention

    def __call__(self, x, places=None, attn_mask=None, need_attention=False, reduce=None):
        attention, keys = None, x[:, None]  # of one head
        if need_attention:
            attention = self.attention if places is None else self.attention.gather(1, places)
            fused = x.shape[1] - 1 - attention.shape[1]
            attention = torch.nn.functional.pad(attention, (0, fused), value=attention.mean().item())
        x = x + 1 if reduce is None else reduce(x + 1, attention, keys)
        return (x + 10, attention) if need_attention else x + 10


@pytest.mark.parametrize('method', ['drop', 'fuse'])
def test_patches_leave_between_attention_and_mlp(method):
    """As in EViT: the attention of blocks 2, 4 and 6 of 8 sees those that leave there, their MLP does not."""
    model, seen = rivals.apply(dense(depth=8), method, keep_ratio=0.6), []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, x, y: seen.append(y.shape[1]))
        block.mlp.register_forward_hook(lambda module, x, y: seen.append(y.shape[1]))
    with torch.no_grad():
        model(images(model))
    fused = method == 'fuse'
    a, b, c, d = 1 + 25, 1 + 15 + fused, 1 + 9 + fused, 1 + 5 + fused
    assert seen == [a, a, a, a, a, b, b, b, b, c, c, c, c, d, d, d]


def test_the_fused_token_is_the_sum_of_all_that_left():
    """Of what leaves, and of the token that is there already, as attention weighs them after the block's attention."""
    generator = torch.Generator().manual_seed(0)
    tokens, score = torch.randn(2, 11, 4, generator=generator), torch.rand(2, 10, generator=generator)
    x, s, first = rivals.fuse(tokens, None, [Adds(score)] * 2, [0.5] * 2, 0.6, 'none')
    weight = score.scatter(1, first.kept, 0)
    fused = (weight[..., None] * (tokens[:, 1:] + 1)).sum(1)
    torch.testing.assert_close(first.fused[:, 0], fused + 10 + 11)
    assert torch.equal(s, score) and torch.equal(first.score, score)
    # Those that leave keep the values after the attention.
    left = torch.ones(2, 10, dtype=torch.bool).scatter(1, first.kept, False)
    torch.testing.assert_close(x[:, 1:], tokens[:, 1:] + torch.where(left, 1, 22)[..., None])
    y, s, second = rivals.fuse(x, s, [Adds(score)], [0.5], 0.3, 'none', first)
    assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(first.kept, second.kept, strict=True))
    torch.testing.assert_close(s, score.masked_fill(left, 0))
    weight = s.scatter(1, second.kept, 0)
    mean = score.gather(1, first.kept).mean()
    again = (weight[..., None] * (x[:, 1:] + 1)).sum(1) + mean * (first.fused[:, 0] + 1)
    torch.testing.assert_close(second.fused[:, 0], again + 10)
    assert torch.equal(y[:, 1:][left], x[:, 1:][left])


def test_gradients_flow_through_the_weights_of_a_fused_token():
    tokens = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for method in (rivals.drop, rivals.fuse):
        attention = torch.linspace(0, 1, 10).expand(2, -1).clone().requires_grad_()
        x, _, selection = method(tokens, None, [Adds(attention)] * 2, [0.5] * 2, 0.6, 'none')
        left = torch.ones(2, 10, dtype=torch.bool).scatter(1, selection.kept, False)
        (x.sum() if selection.fused is None else selection.fused.sum()).backward()
        assert (attention.grad is not None and attention.grad[left].all()) == (method is rivals.fuse)


@pytest.mark.parametrize('n', [8, 9])
def test_matching_is_that_of_tome(n):
    """Its paper and code: of all tokens, the class token first, every second one, from the first on, seeks a partner
    among the others; the class token stays. What is not merged comes first, in the order in which it was."""
    torch.manual_seed(0)
    metric = torch.randn(2, n, 6)
    cosine = torch.nn.functional.cosine_similarity(metric[:, :, None], metric[:, None], dim=-1)
    for r in range(n // 2 + 1):
        for target, similar in zip(rivals.match(metric, r), cosine.tolist(), strict=True):
            sources, others = range(1, n, 2), range(0, n, 2)  # patch i is token i + 1
            best = {i: max(others, key=lambda j, i=i: similar[i][j]) for i in sources}
            merged = sorted(sources, key=lambda i: -similar[i][best[i]])[:r]
            order = [i for i in sources if i not in merged] + list(others)
            if r:
                assert target.tolist() == [order.index(best[i] if i in merged else i) for i in range(n)]
            else:
                assert target.tolist() == list(range(n))


def test_means_that_keep_the_norm_are_as_long_as_their_members():
    patches, size = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [5.0, 0.0]]]), torch.tensor([[1.0, 3.0, 1.0]])
    target, merged = torch.tensor([[0, 0, 1]]), torch.tensor([[4.0, 1.0]])
    plain, kept = (rivals._merged_means(patches, size, target, merged, keep) for keep in (False, True))
    torch.testing.assert_close(plain, torch.tensor([[[0.75, 0.75], [5.0, 0.0]]]))
    # The lengths 3, once, and 1, three times.
    torch.testing.assert_close(kept, torch.tensor([[[0.75 * 2**0.5] * 2, [5.0, 0.0]]]))


def test_merging_takes_a_rate_for_each_block():
    model, x, seen = dense(depth=4), None, []
    rivals.apply(model, 'merge_norm', merge_r=[0, 5, 0, 2])
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, x, y: seen.append(y.shape[1]))
    x = images(model)
    with torch.no_grad():
        tokens = model.forward_blocks(x)[0]
        assert seen == [26, 21, 21, 19]
        cut = model.forward_blocks(x, [0, 1])[0]  # merging goes on after a cut
        torch.testing.assert_close(cut, tokens, rtol=1e-4, atol=1e-4)
    schedule = model.schedule()
    assert (schedule['method'], schedule['merge_r']) == ('merge_norm', (0, 5, 0, 2))
    for wrong in ([3, 3], [3, -1, 3, 3], -1):
        with pytest.raises(ValueError, match='merge_r: expected 0 or more patches, one number or 4, found'):
            rivals.apply(dense(depth=4), 'merge', merge_r=wrong)


def test_merging_counts_and_unmerges():
    model = rivals.apply(dense(), 'merge', merge_r=4)
    x = images(model)
    seen = []

    def spy(*args, **kwargs):
        out = rivals.merge(*args, r=4, **kwargs)
        seen.append(out[2])
        return out

    model.update_group = spy
    with torch.no_grad():
        tokens, _, outputs = model.forward_blocks(x, [2, 4])
    for selection, count in zip(seen, (25 - 3 * 4, 25 - 5 * 4), strict=True):  # merging goes on after a cut
        size = evolution.memberships(selection.cluster, count).sum(2)
        assert torch.equal(size.sum(1), torch.full((2,), 25.0)) and (size >= 1).all()
    # Every patch has the value of its cluster.
    first = torch.stack(
        [torch.stack([o[c == j][0] for j in range(5)]) for o, c in zip(tokens[:, 1:], seen[1].cluster, strict=True)]
    )
    torch.testing.assert_close(tokens[:, 1:], first.gather(1, seen[1].cluster[..., None].expand(-1, -1, 192)))
    whole = rivals.apply(dense(), 'merge', merge_r=4)
    with torch.no_grad():
        torch.testing.assert_close(whole.forward_blocks(x)[0], tokens, rtol=1e-4, atol=1e-4)


def build(flags: str) -> torch.nn.Module:
    parser = argparse.ArgumentParser()
    networks.add_arguments(parser)
    return networks.build(argparse.Namespace(**vars(parser.parse_args(flags.split())), input_size=64), 5)


@pytest.mark.parametrize('method, flags', [('drop', '--keep-ratio 0.6'), ('merge', '--merge-r 3'), ('evolve', '')])
def test_flags_choose_the_method(method, flags):
    flags, x = f'--model vit_tiny_patch16_224 --method {method} {flags}', torch.randn(1, 3, 64, 64)
    dense = timm.create_model('vit_tiny_patch16_224', img_size=64).eval()
    assert count_gmacs(build(flags).eval(), [x]) < 0.9 * count_gmacs(dense, [x])
    with pytest.raises(models.InputError, match='representative has no effect on |--merge-r needs --method merge'):
        build(f'{flags} --merge-r 3 --representative none')


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--model test_vit --merge-r 3', '--merge-r needs --method merge'),
        ('--model evo_deit_tiny_patch16_224 --pretrained', '--pretrained: timm has no weights of evo_deit_tiny'),
        ('--model evo_deit_nano_patch4_32 --evolve', 'EvoDeiT evolves by itself'),
        ('--model EvoLeViT_128S --method drop', 'EvoLeViT evolves by itself'),
        ('--model test_vit --model-kwargs img_size=64', '--model-kwargs img_size: use --input-size'),
        ('--model test_vit --model-kwargs in_chans=1', '--model-kwargs in_chans: images are read in RGB'),
        ('--model test_vit --model-kwargs num_heads=0', 'test_vit cannot be built with .*num_heads'),
        ('--model test_vit --model-kwargs num_classes=3', '--model-kwargs num_classes: it is that of the data'),
        ('--model test_vit --model-kwargs drop_rate=0.1', '--model-kwargs drop_rate: use --drop'),
        ('--model test_vit --model-kwargs drop_path_rate=0.1', '--model-kwargs drop_path_rate: use --drop-path'),
    ],
)
def test_flags_that_do_not_fit_a_model_are_named(flags, message):
    with pytest.raises(models.InputError, match=message):
        build(flags)


def test_arguments_of_a_model_are_pairs(capsys):
    with pytest.raises(SystemExit):
        build('--model-kwargs depth=3 width')
    assert 'argument --model-kwargs: expected KEY=VALUE, found width' in capsys.readouterr().err


def test_a_download_that_fails_is_said_without_a_traceback(monkeypatch):
    def no_connection(*args, **kwargs):
        raise FileNotFoundError('no connection')

    monkeypatch.setattr(timm, 'create_model', no_connection)
    with pytest.raises(models.InputError, match='test_vit.*could not be downloaded.*no connection'):
        networks.create('test_vit', 5, pretrained=True)


def test_a_merged_token_keeps_the_place_of_the_one_that_it_was_merged_into():
    """Places go with rotary positions. The second token goes into the third, not the other way round."""
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0], [1.0, -1.0]]])

    def block(x, places, attn_mask, reduce):
        return reduce(x, None, torch.nn.functional.pad(keys, (0, 0, 1, 0))[:, None])

    tokens = torch.arange(6.0).view(1, 6, 1)
    _, _, selection = rivals.merge(tokens, None, [block], [1.0], 1.0, 'none', r=1)
    places, cluster = selection.kept[0], selection.cluster[0]
    assert cluster[2] == cluster[1] and places[cluster].tolist() == [0, 2, 2, 3, 4]


def test_all_methods_give_selections_of_one_kind():
    """Their readers, such as visualize.py, know no method. A selection at random is another one each time."""
    for method in ('drop', 'fuse', 'random'):
        model = rivals.apply(dense(), method)
        selections = run(model, images(model))[1][1]
        assert selections and all(type(selection) is evolution.Selection for selection in selections.values())
        assert all(selection.score.isfinite().all() for selection in selections.values())
    again = model.forward_blocks(images(model))[1]
    assert not all(torch.equal(again[name].kept.sort().values, s.kept.sort().values) for name, s in selections.items())


@pytest.mark.parametrize('method', rivals.METHODS)
def test_without_evolving_every_method_is_dense(method):
    model = dense()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    rivals.apply(model, method).set_schedule(stage_wise=True, evolving=False)
    logits, (_, selections, _) = run(model, x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not selections


def test_arguments():
    assert rivals.apply(dense(depth=3), 'drop', torch.tensor(0.5)).keep_ratio == (0.5, 0.25)
    for wrong, message in ((dict(keep_ratio='half'), 'keep_ratio: expected numbers'), (dict(stages=3), 'stages: ')):
        with pytest.raises(ValueError, match=message):
            rivals.apply(dense(), 'drop', **wrong)
    for apply in (models.apply, rivals.apply):
        with pytest.raises(ValueError, match='method: expected one of .*drop, .*, random, found .prune.'):
            apply(dense(), 'prune')


@pytest.mark.parametrize('schedule', [{}, dict(merge_r=[0, 0, 2, 2, 2, 0])])
@pytest.mark.parametrize('method', sorted(rivals.METHODS))
def test_outputs_have_gradients_by_grids(method, schedule):
    if schedule and 'merge' not in method:
        pytest.skip('merges nothing')
    model = rivals.apply(dense(depth=6), method, **schedule)
    features, grids = model.forward_intermediates(images(model), [0, 1, 4])
    gradients = torch.autograd.grad(model.forward_head(features).square().sum(), grids, allow_unused=True)
    assert gradients[0].isfinite().all() and ('merge' in method or gradients[0].any())  # merging keeps its own tokens

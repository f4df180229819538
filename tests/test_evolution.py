"""The method as functions: what must hold for any network."""

import pytest
import torch
from torch import nn

from models import evolution

B, N, C = 2, 10, 8
all_representatives = pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)


class ToyBlock(nn.Module):
    """A residual layer whose update mixes tokens, and an attention that depends on them."""

    def __init__(self):
        super().__init__()
        self.mix, self.score = nn.Linear(C, C), nn.Linear(C, 1)

    def forward(self, x, places=None, attn_mask=None, need_attention=False):
        bias = 0 if attn_mask is None else attn_mask[:, 0]
        out = x + torch.tanh(self.mix(torch.softmax(x @ x.mT / C + bias, -1) @ x))
        return (out, (self.score(x).mT + bias).softmax(-1)[:, 0, 1:]) if need_attention else out


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return [ToyBlock().double() for _ in range(3)]


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randn(B, 1 + N, C, dtype=torch.float64)


@pytest.fixture
def score():
    torch.manual_seed(2)
    return torch.rand(B, N, dtype=torch.float64)


def by_sorting(tokens, score, blocks, tradeoffs, k, representative):
    """The formulation of the original: sort the patches, run the first, move the others, sort back."""
    order = score.argsort(1, descending=True)
    back = order.argsort(1)
    patches = tokens[:, 1:].gather(1, order[..., None].expand(-1, -1, C))
    score = score.gather(1, order)
    rest, rest_score = patches[:, k:], score[:, k:]
    x = torch.cat([tokens[:, :1], patches[:, :k]], 1)
    if representative == 'one':
        before = (rest * (rest_score / rest_score.sum(1, keepdim=True))[..., None]).sum(1, keepdim=True)
        x = torch.cat([x, before], 1)
    kept_score = score[:, :k]
    for block, t in zip(blocks, tradeoffs, strict=True):
        x, attention = block(x, need_attention=True)
        kept_score = (1 - t) * kept_score + t * attention[:, :k]
    if representative == 'one':
        rest = rest + (x[:, -1:] - before)
        x = x[:, :-1]
    patches = torch.cat([x[:, 1:], rest], 1).gather(1, back[..., None].expand(-1, -1, C))
    score = torch.cat([kept_score, rest_score], 1).gather(1, back)
    return torch.cat([x[:, :1], patches], 1), score


@pytest.mark.parametrize('representative', ['none', 'one'])
@pytest.mark.parametrize('keep_ratio', [0.1, 0.5, 0.7, 0.95])
def test_gathering_equals_sorting(tokens, score, blocks, keep_ratio, representative):
    tradeoffs = [0.5, 0.3, 0.9]
    found = evolution.update_group(tokens, score, blocks, tradeoffs, keep_ratio, representative)
    expected = by_sorting(tokens, score, blocks, tradeoffs, int(N * keep_ratio), representative)
    torch.testing.assert_close(found[:2], expected, rtol=0, atol=1e-12)


@all_representatives
def test_keeping_everything_is_dense(tokens, score, blocks, representative):
    x = tokens
    for block in blocks:
        x = block(x)
    found, _, selection = evolution.update_group(tokens, score, blocks, [0.5] * 3, 1.0, representative)
    assert selection is None
    assert torch.equal(found, x)


@pytest.mark.parametrize(
    'representative, equal_scores', [('none', False), ('one', False), ('nearest', False), ('nearest', True)]
)
def test_order_of_patches_does_not_matter(blocks, representative, equal_scores):
    """Also where many scores are equal, as those of a cluster are: there 'nearest' selects by lengths too."""
    torch.manual_seed(4)
    tokens, score = torch.randn(B, 1 + 60, C, dtype=torch.float64), torch.rand(B, 60, dtype=torch.float64)
    if equal_scores:
        score[:, :30], score[:, 30:] = 0.5, 0.25
    before = tokens.clone(), score.clone()
    out, new_score, selection = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.4, representative)
    assert torch.equal(tokens, before[0]) and torch.equal(score, before[1])
    for _ in range(5):
        order = torch.randperm(60)
        both = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order])
        moved = evolution.update_group(tokens[:, both], score[:, order], blocks, [0.5] * 3, 0.4, representative)
        torch.testing.assert_close(moved[0], out[:, both], rtol=0, atol=1e-12)
        torch.testing.assert_close(moved[1], new_score[:, order], rtol=0, atol=1e-12)
        assert torch.equal(order[moved[2].kept].sort(1).values, selection.kept.sort(1).values)


@all_representatives
@pytest.mark.parametrize('n', [1, 2, 3, 10])
def test_any_number_of_patches_and_of_informative_ones(tokens, score, blocks, n, representative):
    tokens, score = tokens[:, : 1 + n], score[:, :n]
    for k in range(1, n + 1):
        group = blocks, [0.5] * 3, (k + 0.5) / n if k < n else 1.0
        out, new_score, selection = evolution.update_group(tokens, score, *group, representative)
        assert out.shape == (B, 1 + n, C) and out.isfinite().all() and new_score.isfinite().all()
        assert selection is None if k == n else selection.kept.shape[1] == k
    if n == 1:  # int(1 * 0.5) is 0: the one patch is a placeholder
        out, _, selection = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.5, representative)
        assert selection.kept.shape == (B, 0) and (out[:, 0] != tokens[:, 0]).all()
        assert torch.equal(out[:, 1], tokens[:, 1]) == (representative != 'one')
    else:
        with pytest.raises(ValueError, match=rf'at least {1 / n:.3g}, which keeps one of the {n} patches, found 0\.09'):
            evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.09)


@pytest.mark.parametrize('representative', ['one', 'nearest'])
def test_gradients(tokens, score, blocks, representative):
    tokens.requires_grad_(), score.requires_grad_()

    def evolve(x, s):
        return evolution.update_group(x, s, blocks, [0.5] * 3, 0.4, representative)[:2]

    assert torch.autograd.gradcheck(evolve, (tokens, score))
    evolve(tokens, score)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for block in blocks for p in block.mix.parameters())


@all_representatives
def test_all_prefix_tokens_go_through_the_blocks(tokens, score, representative):
    def block(x, need_attention, **_):
        return x + 1, x[:, 3:, 0]

    out, _, selection = evolution.update_group(tokens, score[:, :8], [block], [0.5], 0.5, representative, prefix=3)
    assert selection.kept.shape == (B, 4) and selection.kept.max() < 8
    torch.testing.assert_close(out[:, :3], tokens[:, :3] + 1)


@all_representatives
def test_a_selection_can_go_on_in_the_next_group(tokens, score, blocks, representative):
    whole = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.5, representative)
    x, s, selection = evolution.update_group(tokens, score, blocks[:1], [0.5], 0.5, representative)
    x, s, again = evolution.update_group(x, s, blocks[1:], [0.5] * 2, 0.5, representative, selection, select_anew=False)
    torch.testing.assert_close(x, whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(s, whole[1], rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(again[:2], selection[:2], strict=True))


@pytest.mark.parametrize('tiny', [0.0, 1e-310])
def test_placeholders_without_any_score_are_represented_by_their_plain_mean(tokens, score, blocks, tiny):
    kept = evolution.select(score, 4)
    score[0] = torch.full_like(score[0], tiny).scatter(0, kept[0], 1.0)
    patches = tokens[:, 1:].clone().requires_grad_()
    score.requires_grad_()
    found = evolution.weighted_mean(patches, score, kept)
    placeholder = torch.ones(N, dtype=torch.bool).scatter(0, kept[0], False)
    torch.testing.assert_close(found[0, 0], patches[0][placeholder].mean(0), rtol=0, atol=1e-12)
    found.sum().backward()
    assert patches.grad.isfinite().all() and score.grad.isfinite().all()
    # The other image of the batch does not notice.
    alone = evolution.weighted_mean(patches[1:], score[1:], kept[1:])
    assert torch.equal(found[1:], alone) and score.grad[1].any()
    out, _, _ = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.4, representative='one')
    assert out.isfinite().all()


def test_attention_is_computed_where_a_selection_reads_it(tokens, blocks):
    groups = evolution.partition(8, (3, 6), (0.5, 0.4))
    assert evolution.drop_unread([1.0] * 8, groups) == [None, None, 1.0, None, None, 1.0, None, None]
    learned = torch.tensor(1.0)
    found = evolution.drop_unread([1.0, 1.0, 0.5, learned, 0.5, 0.5, 0.5, 0.5], groups)
    assert found == [None, 1.0, 0.5, learned, 0.5, 0.5, None, None]
    assert evolution.drop_unread([0.5] * 8, evolution.partition(8, (3, 6), (0.5, 1.0))) == [0.5] * 3 + [None] * 5

    _, score, _ = evolution.update_group(tokens, None, blocks, [None, None, 1.0], 1.0)
    assert torch.equal(score, blocks[2](blocks[1](blocks[0](tokens)), need_attention=True)[1])
    # A tradeoff of 1 overwrites the score that a group begins with, also that of clusters.
    for representative in evolution.REPRESENTATIVES:
        group = blocks, [1.0] * 3, 0.4, representative
        other = torch.rand(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        kept = evolution.update_group(tokens, other, *group)[2]
        found = [evolution.update_group(tokens, s, *group, kept, select_anew=False)[1] for s in (other, 2 * other)]
        moved = torch.zeros(B, N, dtype=torch.bool).scatter(1, kept.kept, True) | (kept.cluster is not None)
        torch.testing.assert_close(found[0][moved], found[1][moved])


def test_attention_of_the_class_token_is_the_row_of_the_whole_map():
    q, k = torch.randn(2, 3, 7, 4, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    whole = (q @ k.mT * 0.5).softmax(-1)
    torch.testing.assert_close(evolution.class_attention(q[:, :, :1], k, 0.5), whole[:, :, 0, 1:])
    mask = torch.randn(2, 1, 1, 7, dtype=torch.float64)
    whole = (q @ k.mT * 0.5 + mask).softmax(-1)
    torch.testing.assert_close(evolution.class_attention(q[:, :, :1], k, 0.5, mask), whole[:, :, 0, 1:])
    q[0] = torch.nan
    assert evolution.class_attention(q[:, :, :1], k, 0.5).isfinite().flatten(1).all(1).tolist() == [False, True]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_class_attention_in_half_precision_is_computed_in_float32(dtype):
    q, k = torch.randn(2, 3, 1, 4).to(dtype), torch.randn(2, 3, 7, 4).to(dtype)
    expected = (q.float() @ k.float().mT * 0.3).softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(evolution.class_attention(q, k, 0.3), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('representative', ['none', 'nearest'])
def test_tokens_keep_their_dtype(tokens, score, representative):
    """Also if the blocks, here with parameters in float32, return another one."""
    half = tokens.bfloat16()
    out, new_score, _ = evolution.update_group(half, score, [lambda x, **_: x.float()], [None], 0.4, representative)
    assert out.dtype == torch.bfloat16 and torch.equal(out, half)
    assert new_score.dtype == score.dtype


def test_tokens_are_gathered_within_their_image():
    x = torch.randn(3, 5, 2, requires_grad=True)
    index = torch.tensor([[4, 0, 0], [1, 2, 3], [3, 3, 4]])
    found, expected = evolution.gather_tokens(x, index), torch.stack([x[i, index[i]] for i in range(3)])
    assert torch.equal(found, expected)
    weight = torch.randn(3, 3, 2)
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (found, expected)))


def test_both_schedules_cut_the_same_list():
    schedule = 12, (4, 8), (0.5, 0.4)
    stage, layer = evolution.partition(*schedule), evolution.partition(*schedule, stage_wise=False)
    assert [g[:3] for g in stage] == [(0, 4, 1.0), (4, 8, 0.5), (8, 12, 0.4)]
    assert [g.start for g in layer] == [0, *range(4, 12)]
    assert [g.keep_ratio for g in layer] == [1.0, *[0.5] * 4, *[0.4] * 4]
    cut = evolution.partition(*schedule, cuts=[1, 5, 7, 10])
    for groups in (stage, layer, cut):
        assert [i for g in groups for i in range(g.start, g.stop)] == list(range(12))
    assert [(g.start, g.select) for g in cut] == [
        (0, False), (2, False), (4, True), (6, False), (8, True), (11, False)
    ]  # fmt: skip


def test_a_new_grid_selects_anew_and_stages_may_begin_anywhere():
    groups = evolution.partition(9, (3,), (0.6,), new_grids=(2, 5))
    assert groups == [(0, 2, 1.0, False), (2, 3, 1.0, False), (3, 5, 0.6, True), (5, 9, 0.6, True)]
    assert evolution.partition(3, (), ()) == [(0, 3, 1.0, False)]


# --- one representative for each informative patch


def nearest_group(tokens, score, blocks, keep_ratio):
    return evolution.update_group(tokens, score, blocks, [0.5] * len(blocks), keep_ratio, 'nearest')


def unit(patches):
    return torch.nn.functional.normalize(patches, dim=-1)


def select_clusters(patches, score, k):
    return evolution.select_clusters(patches, evolution.vector_length(patches, score.dtype), score, k)


def cluster_means(patches, cluster, k):
    """Means of all clusters, and the sizes of these."""
    member = evolution.memberships(cluster, k, torch.promote_types(patches.dtype, torch.float32))
    length = evolution.vector_length(patches, member.dtype)
    members = member.split(4 * patches.shape[2], 2)
    return evolution.cluster_means(patches, length, members, member.sum(2)), member.sum(2)


def novelty(patches, weight):
    patches = unit(patches)
    return 1 - evolution.redundancy(patches @ patches.mT, weight, weight)


def test_sizes_add_up_and_informative_patches_represent_themselves(tokens, score):
    kept, cluster = select_clusters(tokens[:, 1:], score, 4)
    size = evolution.memberships(cluster, 4).sum(2)
    assert torch.equal(size.sum(1), torch.tensor([float(N)] * B)) and (size >= 1).all()
    assert torch.equal(cluster.gather(1, kept), torch.arange(4).expand(B, -1))
    for image in range(B):
        for patch in set(range(N)) - set(kept[image].tolist()):
            similarity = torch.cosine_similarity(tokens[image, 1 + patch], tokens[image, 1 + kept[image]], dim=-1)
            assert cluster[image, patch] == similarity.argmax()


def test_novelty_is_the_distance_to_what_has_a_higher_weight(tokens, score):
    patches = tokens[:, 1:]
    found = novelty(patches, score)
    for image in range(B):
        for patch in range(N):
            higher = score[image] > score[image, patch]
            cosines = torch.cosine_similarity(patches[image, patch], patches[image][higher], dim=-1)
            assert found[image, patch].item() == pytest.approx(1 - max([0, *cosines.tolist()]))
    # A copy of a more attended patch is not selected while others are left.
    patches[:, 3] = patches[:, 7]
    score[:, 3], score[:, 7] = 0.98, 0.99
    _, _, selection = evolution.update_group(tokens, score, [], [], 0.9, 'nearest')
    assert (selection.kept != 3).all() and (selection.cluster[:, 4] == selection.cluster[:, 8]).all()


def test_the_selected_have_the_highest_weight_times_cubed_novelty():
    torch.manual_seed(6)
    patches, score = torch.randn(B, 100, C, dtype=torch.float64), torch.rand(B, 100, dtype=torch.float64)
    weight = score * patches.norm(dim=2)
    found = select_clusters(patches, score, 40)[0].sort().values
    for power in (2, 3, 4):
        expected = (weight * novelty(patches, weight) ** power).topk(40).indices.sort().values
        assert torch.equal(found, expected) == (power == 3)


@pytest.mark.parametrize('n', [20, 100])  # one matrix, and in chunks
@pytest.mark.parametrize('groups', [1, 5])
def test_equal_patches_are_selected_once_or_represent_themselves(groups, n):
    """Informative patches represent themselves, even if others are equal to them in all respects."""
    torch.manual_seed(7)
    patches = torch.randn(B, groups, C).repeat(1, n // groups, 1)
    kept, cluster = select_clusters(patches, torch.ones(B, n), 10)
    assert all(len(image.unique()) == 10 for image in kept)
    assert torch.equal(cluster.gather(1, kept), torch.arange(10).expand(B, -1))
    assert (evolution.memberships(cluster, 10).sum(2) >= 1).all()


def test_tokens_of_zeros_are_clustered(score, blocks):
    tokens = torch.zeros(B, 1 + N, C, dtype=torch.float64)
    tokens[0, :4] = 1
    out, _, selection = nearest_group(tokens, score, blocks, 0.4)
    assert out.isfinite().all() and selection.tokens.isfinite().all()


def test_a_slightly_higher_weight_counts_in_any_place():
    patches = torch.ones(1, 2640, 4)
    weight = torch.ones(1, 2640)
    weight[0, -1] = 1.0005
    found = novelty(patches, weight)
    assert found[0, -1] == 1 and found[0, 0] == pytest.approx(0, abs=1e-6)


def test_large_grids_are_clustered_in_chunks(blocks, monkeypatch):
    """The chunks compute what one matrix does, forward and backward; test_costs.py has the memory."""
    torch.manual_seed(5)
    tokens, score = torch.randn(B, 1 + 100, C, dtype=torch.float64), torch.rand(B, 100, dtype=torch.float64)
    found = []
    for limit in (4, 100):
        monkeypatch.setattr(evolution, 'CHUNK', limit)
        leaf = tokens.clone().requires_grad_()
        out, new_score, selection = nearest_group(leaf, score, blocks, 0.6)
        out, new_score, (kept, _, cluster, *_) = evolution.update_group(
            out, new_score, blocks, [0.5] * len(blocks), 0.4, 'nearest', selection
        )
        out.square().sum().backward()
        found.append((out, new_score, kept, cluster, leaf.grad))
        assert torch.equal(cluster.gather(1, 1 + kept), torch.arange(1, 41).expand(B, -1))
    torch.testing.assert_close(*found)


def test_means_are_as_long_as_their_members(tokens, score):
    patches, cluster = tokens[:, 1:], select_clusters(tokens[:, 1:], score, 4)[1]
    found, _ = cluster_means(patches, cluster, 4)
    for image in range(B):
        for j in range(4):
            members = patches[image][cluster[image] == j]
            torch.testing.assert_close(unit(found[image, j]), unit(members.mean(0)))
            torch.testing.assert_close(found[image, j].norm(), members.norm(dim=1).mean())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_members_that_cancel_have_a_mean_of_zeros(dtype):
    patches = torch.randn(B, 1, C).repeat(1, 4, 1).mul(torch.tensor([1, -1, 1, -1])[:, None]).to(dtype)
    means, _ = cluster_means(patches, torch.zeros(B, 4, dtype=torch.int64), 1)
    assert torch.equal(means, torch.zeros_like(means))


def test_sums_do_not_overflow_in_half_precision():
    patches = torch.full((1, 1000, 8), 1000.0, dtype=torch.float16)  # their sum is far beyond 65,504
    score = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0))
    means, _ = cluster_means(patches, select_clusters(patches, score, 2)[1], 2)
    torch.testing.assert_close(means, torch.full_like(means, 1000.0))


def test_every_patch_moves_by_what_its_cluster_moved(tokens, score, blocks):
    out, new_score, (kept, _, cluster, *_) = nearest_group(tokens, score, blocks, 0.4)
    assert (cluster[:, 0] == 0).all() and (cluster[:, 1:] > 0).all()  # the class token represents itself alone
    x, size = cluster_means(tokens, cluster, 5)
    torch.testing.assert_close(x[:, 0], tokens[:, 0])
    means, cluster = x[:, 1:], cluster[:, 1:] - 1
    bias = size.log()[:, None, None]
    for block in blocks:
        x = block(x, kept, bias)
    torch.testing.assert_close(out[:, 0], x[:, 0])
    expected = (x[:, 1:] - means).gather(1, cluster[..., None].expand(-1, -1, C))
    torch.testing.assert_close(out[:, 1:] - tokens[:, 1:], expected)
    assert torch.equal(new_score, new_score.gather(1, kept).gather(1, cluster))  # a cluster has one score


@all_representatives
def test_a_score_that_no_selection_reads_stays_and_changes_no_token(tokens, score, blocks, representative):
    group = tokens, score, blocks, [0.5] * 3, 0.4, representative
    expected, _, _ = evolution.update_group(*group)
    out, same, _ = evolution.update_group(*group[:3], [None] * 3, *group[4:])
    assert torch.equal(out, expected) and torch.equal(same, score)


def test_equal_patches_act_like_themselves(score, blocks):
    """Clusters of equal patches, each with an informative one, compute what the dense group does: attention counts."""
    torch.manual_seed(3)
    different = torch.randn(B, 5, C, dtype=torch.float64)
    tokens = torch.cat([different[:, :1], different[:, [1, 2, 1, 3, 4, 1, 2, 4, 4, 3]]], 1)
    score = torch.tensor([9.0, 8, 0, 7, 6, 0, 0, 0, 0, 0], dtype=torch.float64).expand(B, -1)
    dense = evolution.update_group(tokens, score, blocks, [0.5] * 3, 1.0)
    sparse = nearest_group(tokens, score, blocks, 0.4)
    torch.testing.assert_close(sparse[0], dense[0], rtol=0, atol=1e-12)
    # The score too, when the patches of a cluster had the same before.
    score = score.gather(1, torch.tensor([[0, 1, 0, 3, 4, 0, 1, 4, 4, 3]]).expand(B, -1))
    kept, size = torch.tensor([[0, 1, 3, 4]] * B), torch.tensor([[1.0, 3, 2, 2, 3]] * B, dtype=torch.float64)
    cluster = torch.tensor([[0, 1, 2, 1, 3, 4, 1, 2, 4, 4, 3]] * B)
    kept = evolution.Selection(kept, score, cluster, tokens[:, [0, 1, 2, 4, 5]], size, 0.4)
    dense = evolution.update_group(tokens, score, blocks, [0.5] * 3, 1.0)
    sparse = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.4, 'nearest', kept, select_anew=False)
    torch.testing.assert_close(sparse[1], dense[1], rtol=0, atol=1e-12)


def test_later_stages_merge_the_clusters_of_earlier_ones(tokens, score, blocks):
    """A stage that keeps fewer makes clusters of clusters, each weighted by its size; all patches follow."""
    tokens, score, first = nearest_group(tokens, score, blocks, 0.6)
    out, new_score, second = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.3, 'nearest', first)
    share = score.gather(1, first.kept)
    kept, cluster = select_clusters(first.tokens[:, 1:], share * first.size[:, 1:], 3)
    cluster = evolution.with_prefix(cluster, 1)
    assert torch.equal(second.kept, first.kept.gather(1, kept))
    assert torch.equal(second.cluster, cluster.gather(1, first.cluster))
    assert torch.equal(second.size, torch.nn.functional.one_hot(second.cluster, 4).sum(1).to(second.size))
    for image in range(B):
        for j in range(1, 4):
            members = cluster[image] == j
            mean = (first.tokens[image] * first.size[image, :, None])[members].sum(0)
            length = (first.tokens[image].norm(dim=1) * first.size[image])[members].sum() / second.size[image, j]
            means = unit(mean) * length
            moved = (out - tokens)[image, second.cluster[image] == j]
            torch.testing.assert_close(moved, (second.tokens[image, j] - means).expand_as(moved))
            assert new_score[image][second.cluster[image, 1:] == j].unique().numel() == 1


@pytest.mark.parametrize('keep_ratio', [0.6, 0.8])
def test_a_stage_that_keeps_as_many_or_more_starts_from_the_patches(tokens, score, blocks, keep_ratio):
    tokens, score, first = nearest_group(tokens, score, blocks, 0.6)
    group = tokens, score, blocks, [0.5] * 3, keep_ratio, 'nearest'
    found, expected = evolution.update_group(*group, first), evolution.update_group(*group)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_equal_patches_act_like_themselves_in_later_stages(blocks):
    """Clusters of clusters of equal patches compute what the dense group does."""
    torch.manual_seed(3)
    different = torch.randn(B, 4, C, dtype=torch.float64)
    tokens = torch.cat([different[:, :1], different[:, [1, 2, 1, 3, 3, 1, 2, 1, 3, 3]]], 1)
    score = torch.tensor([9.0, 8, 0, 7, 6, 0, 0, 0, 0, 0], dtype=torch.float64).expand(B, -1)
    kept = torch.tensor([[0, 1, 2, 3, 4, 5]] * B)
    cluster = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 2, 1, 5, 4]] * B)
    size = torch.tensor([[1.0, 2, 2, 1, 2, 2, 1]] * B, dtype=torch.float64)
    first = evolution.Selection(kept, score, cluster, tokens[:, :7], size, 0.6)
    sparse, _, second = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.3, 'nearest', first)
    dense = evolution.update_group(tokens, score, blocks, [0.5] * 3, 1.0)[0]
    assert second.size[:, 0].tolist() == [1] * B and second.size.sort(1).values.tolist() == [[1, 2, 4, 4]] * B
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)


def test_clusters_follow_their_members(tokens, score, blocks, monkeypatch):
    """If all members of a cluster move by a step, so does its token, and by half if only half of them do."""
    _, _, selection = nearest_group(tokens, score, blocks, 0.4)
    for limit in (1, 100):  # in chunks, and whole
        monkeypatch.setattr(evolution, 'CHUNK', limit)
        step = torch.randn(B, 5, C)
        moved = evolution.move_clusters(selection, evolution.gather_tokens(step, selection.cluster))
        torch.testing.assert_close(moved.tokens, selection.tokens + step)
        first = evolution.with_prefix(selection.kept, 1)  # one member of each cluster
        one = torch.zeros(B, 1 + N, C).scatter(1, first[..., None].expand(-1, -1, C), step)
        moved = evolution.move_clusters(selection, one)
        torch.testing.assert_close(moved.tokens, selection.tokens + step / selection.size[..., None])


def test_a_selection_without_clusters_cannot_continue(tokens, score, blocks):
    _, score, selection = evolution.update_group(tokens, score, blocks, [0.5] * 3, 0.6, 'none')
    assert selection.keep_ratio == 0.6
    group = tokens, score, blocks, [0.5] * 3, 0.4, 'nearest', selection
    with pytest.raises(ValueError, match='selection: expected one that a group with'):
        evolution.update_group(*group, select_anew=False)
    torch.testing.assert_close(evolution.update_group(*group), evolution.update_group(*group[:-1]), rtol=0, atol=0)

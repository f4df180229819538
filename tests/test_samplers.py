"""Order of training images, against the original sampler, and exact shards for evaluation."""

import json
from itertools import chain
from pathlib import Path

import pytest

from samplers import RepeatedAugSampler, eval_shard

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'recipe.json').read_text())['rasampler']


def epoch_of(sampler: RepeatedAugSampler, epoch: int, start: int = 0) -> list[tuple[int, int, int]]:
    sampler.set_epoch(epoch, start)
    return list(sampler)


def shards(world_size: int, size: int, epoch: int = 0, **kwargs) -> list[list[tuple[int, int, int]]]:
    return [epoch_of(RepeatedAugSampler(size, rank, world_size, **kwargs), epoch) for rank in range(world_size)]


@pytest.mark.parametrize('row', GOLDEN, ids=lambda row: '-'.join(str(row[k]) for k in list(row)[:4]))
def test_order_is_the_published_one(row):
    sampler = RepeatedAugSampler(row['dataset'], row['rank'], row['replicas'])
    assert [index for _, _, index in epoch_of(sampler, row['epoch'])] == row['indices']
    assert len(sampler) == len(row['indices'])


def test_epochs_of_a_single_process_see_different_images():
    sampler = RepeatedAugSampler(1024)
    first, second = ({index for _, _, index in epoch_of(sampler, epoch)} for epoch in (0, 1))
    assert len(first) == len(second) == 342  # a third, each three times
    assert len(first & second) < 200  # 114 by chance


@pytest.mark.parametrize('repeats', [1, 3])
def test_seeds_and_epochs_give_different_orders(repeats):
    samplers = [RepeatedAugSampler(50, seed=seed, repeats=repeats) for seed in (0, 1)]
    orders = {tuple(index for _, _, index in epoch_of(sampler, epoch)) for sampler in samplers for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize('size', [1, 7, 100, 255, 256, 300])
@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
def test_small_data_sets_have_an_epoch(size, world_size):
    counts = {len(shard) for shard in shards(world_size, size)}
    assert counts == {-(-size // world_size) if size < 256 else 256 // world_size}


def test_repeats_go_to_neighbouring_processes():
    keys = sorted(chain(*shards(3, 300)), key=lambda key: key[1])
    assert [position for _, position, _ in keys] == list(range(255))
    for i in range(0, 255, 3):
        assert len({index for _, _, index in keys[i : i + 3]}) == 1


@pytest.mark.parametrize('size', [12, 13, 300])
@pytest.mark.parametrize('world_size', [1, 2, 5])
def test_plain_shuffling_sees_every_image_in_equal_shards(size, world_size):
    parts = shards(world_size, size, repeats=1)
    assert {len(part) for part in parts} == {-(-size // world_size)}
    assert {index for _, _, index in chain(*parts)} == set(range(size))


@pytest.mark.parametrize('repeats', [1, 3])
def test_an_epoch_resumed_goes_on_where_it_stopped(repeats):
    sampler = RepeatedAugSampler(300, rank=1, world_size=2, repeats=repeats)
    whole = epoch_of(sampler, 4)
    assert epoch_of(sampler, 4, start=17) == whole[17:]
    assert epoch_of(sampler, 4) == whole
    assert len(sampler) == len(whole)


@pytest.mark.parametrize('world_size', range(1, 9))
@pytest.mark.parametrize('size', [0, 3, *range(12, 18)])
def test_evaluation_sees_every_image_once(size, world_size):
    parts = [eval_shard(size, rank, world_size) for rank in range(world_size)]
    assert sorted(chain(*parts)) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

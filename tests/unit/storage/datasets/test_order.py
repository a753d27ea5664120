"""Orders: each sample once an epoch whoever draws it, blocks opened once, and arrays equal to single draws."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import everstep as es
from everstep.platform.training.task import TaskContext
from everstep.storage.datasets.order import BlockShuffle, Straight, keyed, order_of
from everstep.storage.datasets.shuffle import Shuffle


@given(st.integers(1, 5000), st.integers(0, 2**62), st.integers(0, 2**40), st.data())
@settings(max_examples=60, deadline=None)
def test_many_positions_at_once_are_the_same_order(samples: int, seed: int, epoch: int, data: st.DataObject):
    shuffle = Shuffle(samples, seed)
    first = data.draw(st.integers(0, samples))
    count = data.draw(st.integers(0, samples - first))
    assert shuffle.indices(epoch, first, count).tolist() == [shuffle.index(epoch, first + i) for i in range(count)]


@pytest.mark.parametrize("samples", [10**12, 2**53 + 1, 2**62])
def test_many_positions_of_huge_data_are_the_same_order_in_little_memory(samples: int):
    shuffle = Shuffle(samples, 9)
    tracemalloc.start()
    drawn = shuffle.indices(2, samples - 500, 500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn.tolist() == [shuffle.index(2, samples - 500 + i) for i in range(500)]
    assert peak < 200_000


def test_positions_outside_an_epoch_are_refused():
    with pytest.raises(IndexError, match="positions 5:11 are outside an epoch of 10 samples"):
        Shuffle(10, 0).indices(0, 5, 6)
    with pytest.raises(ValueError, match="too many for arrays of 64 bits"):
        Shuffle(2**63, 0).indices(0, 0, 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any), st.integers(1, 12), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_a_shuffle_of_blocks_gives_every_sample_once_an_epoch(sizes: list[int], together: int, seed: int):
    order = BlockShuffle(sizes, seed, together)
    for epoch in (0, 1, 2, 10**9):
        drawn = [order.at(epoch * sum(sizes) + i) for i in range(sum(sizes))]
        assert sorted(drawn) == list(range(sum(sizes)))


def test_a_shuffle_of_blocks_opens_each_once_and_few_together():
    sizes = [random.Random(i).randrange(1, 30) for i in range(100)]
    block_of = np.repeat(np.arange(100), sizes)
    order = BlockShuffle(sizes, 5, together=4)
    blocks = [int(block_of[order.at(i)]) for i in range(sum(sizes))]
    first = {block: blocks.index(block) for block in range(100)}
    last = {block: len(blocks) - 1 - blocks[::-1].index(block) for block in range(100)}
    most = max(sum(first[b] <= at <= last[b] for b in range(100)) for at in range(len(blocks)))
    assert most <= 4
    by_arrival = sorted(first, key=lambda block: first[block])
    assert by_arrival != list(range(100))
    mixed = sum(a != b for a, b in pairwise(blocks)) / len(blocks)
    assert mixed > 0.6  # of four blocks of equal size three in four neighbours differ


def test_epochs_and_seeds_give_other_orders_of_blocks_and_the_order_is_frozen():
    one = BlockShuffle([3, 0, 5, 7, 1, 4], 1, 2)
    first = [one.at(i) for i in range(20)]
    assert first == [19, 7, 4, 16, 5, 17, 3, 18, 6, 13, 15, 12, 9, 11, 8, 10, 14, 2, 0, 1]
    assert first != [one.at(20 + i) - 0 for i in range(20)]
    assert first != [BlockShuffle([3, 0, 5, 7, 1, 4], 2, 2).at(i) for i in range(20)]
    assert first == [one.at(i) for i in range(20)]  # after another epoch


def test_blocks_of_10_to_the_12_samples():
    order = BlockShuffle(np.full(1000, 10**9), 3, 8)
    tracemalloc.start()
    drawn = {order.at(7 * 10**12 + i) for i in range(2000)}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(drawn) == 2000
    assert len({index // 10**9 for index in drawn}) == 8
    assert peak < 1 << 20


def test_blocks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="every block is empty"):
        BlockShuffle([0, 0], 0, 2)
    with pytest.raises(ValueError, match="together: 0 blocks"):
        BlockShuffle([1], 0, 0)


class _Blocks:
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> int:
        return index

    def order(self, seed: int) -> BlockShuffle:
        return BlockShuffle(self.sizes, seed, 2)


def test_a_data_set_is_asked_for_its_order():
    assert isinstance(order_of([1, 2, 3], 5), Shuffle)
    assert [order_of(list(range(50)), 5).at(i) for i in range(50)] == [Shuffle(50, 5).at(i) for i in range(50)]
    assert isinstance(order_of(_Blocks([3, 4]), 5), BlockShuffle)
    assert Straight().at(10**30) == 10**30


class _Task(es.Task):
    def model(self) -> None: ...

    def dataset(self) -> es.Dataset:
        return self.args["data"]

    def loss(self, model, batch, ctx) -> None: ...

    def sample(self, step: int, lane: int) -> list[int]:
        """What the default does, by the data set's own order."""
        first = (step * self.lanes + lane) * self.lane_batch
        order = order_of(self.data, self.seed)
        return [order.at(first + i) for i in range(self.lane_batch)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("own", [True, False])
def test_each_sample_once_an_epoch_whatever_ranks_hold_the_lanes(seed: int, own: bool):
    """Ranks come and go at random steps, an aborted step is drawn again: what is committed is every sample once."""
    choice = random.Random(seed)
    data = _Blocks([choice.randrange(1, 40) for _ in range(9)]) if own else list(range(choice.randrange(50, 300)))
    context = TaskContext(seed=seed, lanes=6, lane_batch=5)
    count: Counter[int] = Counter()
    drawn: list[int] = []
    for step in range(-(-2 * len(data) // 30)):
        while True:
            ranks = [_Task({"data": data}, context) for _ in range(choice.randrange(1, 6))]  # each draws by itself
            lanes = {lane: ranks[choice.randrange(len(ranks))].sample(step, lane) for lane in range(6)}
            if choice.random() > 0.3:  # else the step is aborted
                break
        drawn += [index for lane in range(6) for index in lanes[lane]]
    for epoch in range(2):
        assert sorted(drawn[epoch * len(data) : (epoch + 1) * len(data)]) == list(range(len(data)))
    count.update(drawn[: 2 * len(data)])
    assert set(count.values()) == {2}


def test_keys_differ_where_any_part_does():
    assert len({keyed(1, "a"), keyed(2, "a"), keyed(1, "b"), keyed(1, "a", 0), keyed(1)}) == 5
    assert all(0 <= keyed(seed, "x") < 2**63 for seed in range(100))

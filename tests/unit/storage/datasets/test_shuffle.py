"""The shuffle is a permutation of every epoch, depends on its key alone, and needs no memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage.datasets.shuffle import Shuffle


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 9, 10, 16, 17, 97, 255, 256, 257, 1000, 4097])
def test_an_epoch_holds_every_sample_once(samples: int):
    shuffle = Shuffle(samples, seed=7)
    for epoch in range(3):
        assert sorted(shuffle.index(epoch, i) for i in range(samples)) == list(range(samples))


@given(st.integers(1, 600), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_any_size_seed_and_epoch_gives_a_permutation(samples: int, seed: int, epoch: int):
    shuffle = Shuffle(samples, seed)
    assert len({shuffle.index(epoch, i) for i in range(samples)}) == samples


def test_draws_go_through_one_epoch_after_the_other():
    shuffle = Shuffle(10, seed=0)
    draws = [shuffle.at(i) for i in range(30)]
    epochs = [draws[0:10], draws[10:20], draws[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_frozen():
    """A change of the algorithm changes every run's bits; it has to be meant, and said in the change log."""
    assert [Shuffle(10, seed=0).at(i) for i in range(10)] == [5, 2, 4, 8, 0, 6, 3, 7, 1, 9]
    assert [Shuffle(10**12, seed=3).index(5, i) for i in range(3)] == [
        182987185595,
        879545111130,
        360355458560,
    ]


def test_ten_to_the_twelve_samples_need_no_index_list():
    samples = 10**12
    shuffle = Shuffle(samples, seed=1)
    drawn = [shuffle.index(0, i) for i in range(3000)] + [shuffle.index(0, samples - 1 - i) for i in range(3000)]
    assert len(set(drawn)) == 6000
    assert all(0 <= index < samples for index in drawn)


def test_the_order_looks_random():
    """Means over deciles lie near the middle, and neighbours in the order are no neighbours in the data."""
    samples = 10_000
    order = [Shuffle(samples, seed=5).at(i) for i in range(samples)]
    for start in range(0, samples, 1000):
        mean = sum(order[start : start + 1000]) / 1000
        assert abs(mean - samples / 2) < 500  # 5.5 standard deviations of a mean over 1000 draws
    near = sum(abs(a - b) < 10 for a, b in pairwise(order))
    assert near < 60  # 19 expected


def test_seeds_and_epochs_give_unrelated_orders():
    one = [Shuffle(1000, seed=1).index(0, i) for i in range(1000)]
    for other in (Shuffle(1000, seed=2), Shuffle(1000, seed=1)):
        epoch = 0 if other.seed == 2 else 1
        same = sum(a == other.index(epoch, i) for i, a in enumerate(one))
        assert same < 10  # 1 expected


def test_going_back_an_epoch_gives_the_same_again():
    shuffle = Shuffle(50, seed=4)
    first = [shuffle.index(0, i) for i in range(50)]
    shuffle.index(1, 0)
    assert [shuffle.index(0, i) for i in range(50)] == first


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least one sample, not 0"):
        Shuffle(0, seed=0)
    with pytest.raises(IndexError, match="position 10 is outside an epoch of 10 samples"):
        Shuffle(10, seed=0).index(0, 10)
    with pytest.raises(IndexError):
        Shuffle(10, seed=0).index(0, -1)

"""A mixture: proportions in any window, each source's epochs whole and in order, any position by itself."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage.datasets.errors import DatasetError
from everstep.storage.datasets.mixture import Mixture
from everstep.storage.datasets.order import BlockShuffle, order_of


def _mixture(weights: dict[str, float], sizes: dict[str, int], seed: int = 0, **settings: int) -> Mixture:
    return Mixture({n: ([(n, i) for i in range(sizes[n])], w) for n, w in weights.items()}, seed, **settings)


SIZES = {"code": 7, "web": 50, "books": 13}
FROZEN = [("code", 3), ("web", 30), ("web", 44), ("web", 35), ("web", 5)]


def test_each_source_walks_whole_epochs_in_the_order_in_which_it_comes():
    mixture = _mixture({"web": 0.7, "code": 0.2, "books": 0.1}, SIZES)
    for name, size in SIZES.items():
        walked = [mixture.place(p).sample for p in range(2000) if mixture.place(p).source == name]
        epochs = [walked[i : i + size] for i in range(0, len(walked) - size, size)]
        assert len(epochs) > 10
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 0.9 * len(epochs)  # a new order each time


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=1),
    st.integers(0, 2000),
    st.integers(0, 1500),
    st.integers(0, 2**40),
)
@settings(max_examples=80, deadline=None)
def test_proportions_of_any_window_keep_to_the_bound(weights: dict[str, int], first: int, width: int, seed: int):
    mixture = _mixture(weights, dict.fromkeys(weights, 10), seed)
    shares = mixture.proportions
    count = Counter(mixture.place(p).source for p in range(first, first + width))
    for name, weight in weights.items():
        assert shares[name] == Fraction(weight, sum(weights.values()))
        bound = 2 * shares[name] * (1 - shares[name]) * mixture.period
        assert abs(count[name] - width * shares[name]) <= bound
    start = first // mixture.period * mixture.period
    count = Counter(mixture.place(p).source for p in range(start, start + width))
    for name, share in shares.items():
        assert abs(count[name] - width * share) <= share * (1 - share) * mixture.period


def test_a_period_is_shuffled_and_each_differs():
    mixture = _mixture({"web": 50, "code": 50}, SIZES)
    assert mixture.period == 2
    mixture = _mixture({"web": 51, "code": 49}, SIZES)
    periods = [tuple(mixture.place(100 * k + j).source for j in range(100)) for k in range(20)]
    assert len(set(periods)) == 20
    runs = sum(a != b for a, b in zip(periods[0], periods[0][1:], strict=False))
    assert 25 < runs < 75


def test_weights_are_taken_as_they_are_written():
    cases: list[tuple[dict[str, object], dict[str, Fraction]]] = [
        ({"a": 0.1, "b": 0.2, "c": 0.7}, {"a": Fraction(1, 10), "b": Fraction(1, 5), "c": Fraction(7, 10)}),
        ({"a": 3, "b": 1}, {"a": Fraction(3, 4), "b": Fraction(1, 4)}),
        ({"a": Decimal("0.25"), "b": Fraction(1, 4)}, {"a": Fraction(1, 2), "b": Fraction(1, 2)}),
        ({"a": 1e-3, "b": 0.999}, {"a": Fraction(1, 1000), "b": Fraction(999, 1000)}),
        ({"a": 5}, {"a": Fraction(1)}),
    ]
    for weights, shares in cases:
        assert Mixture({n: ([1], w) for n, w in weights.items()}, 0).proportions == shares  # type: ignore[misc]


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8), st.integers(150, 5000))
@settings(max_examples=80, deadline=None)
def test_weights_without_a_common_denominator_are_rounded_by_less_than_one_slot(weights: list[float], period: int):
    names = {f"s{i}": weight for i, weight in enumerate(weights)}
    if min(weights) / sum(weights) * period < 1:
        return
    mixture = _mixture(names, dict.fromkeys(names, 3), period=period)
    assert mixture.period <= period
    total = sum(Fraction(repr(weight)) for weight in weights)
    for name, weight in names.items():
        assert abs(mixture.proportions[name] - Fraction(repr(weight)) / total) < Fraction(1, period)


def test_any_position_by_itself_is_what_it_is_in_order():
    weights = {"web": 0.7, "code": 0.2, "books": 0.1}
    mixture = _mixture(weights, SIZES, seed=4)
    ordered = [mixture[p] for p in range(500)]
    positions = random.Random(0).sample(range(500), 500)
    other = _mixture(dict(reversed(weights.items())), SIZES, seed=4)  # the order of sources does not matter
    assert [other[p] for p in positions] == [ordered[p] for p in positions]
    assert [pickle.loads(pickle.dumps(mixture))[p] for p in range(20)] == ordered[:20]
    assert [_mixture(weights, SIZES, seed=5)[p] for p in range(500)] != ordered


def test_the_order_is_frozen():
    """A change of the algorithm changes every run's bits; it has to be meant, and said in the change log."""
    mixture = _mixture({"web": 0.7, "code": 0.2, "books": 0.1}, SIZES, seed=4)
    assert [tuple(mixture.place(p)) for p in (0, 1, 2, 3, 10**15)] == FROZEN


def test_far_positions_of_large_sources():
    mixture = Mixture({"a": (range(10**12), 3), "b": (range(10**9), 1)}, 7)
    window = [mixture.place(10**11 + i) for i in range(4000)]
    assert Counter(place.source for place in window) == {"a": 3000, "b": 1000}
    assert len(set(window)) == 4000
    assert len(mixture) == 4 * -(-(10**12) // 3)


def test_len_is_until_every_source_was_seen_whole():
    for weights in ({"web": 0.7, "code": 0.2, "books": 0.1}, {"web": 1, "code": 1, "books": 2}):
        mixture = _mixture(weights, SIZES)
        seen = {mixture.place(p) for p in range(len(mixture))}
        assert len(seen) == sum(SIZES.values())
        before = {mixture.place(p) for p in range(len(mixture) - mixture.period)}
        assert len(before) < sum(SIZES.values())  # a period less is too few
        assert sum(1 for _ in mixture) == len(mixture)


def test_it_says_that_its_positions_are_shuffled_already():
    mixture = _mixture({"web": 1, "code": 1}, SIZES)
    order = order_of(mixture, 99)
    assert [order.at(draw) for draw in (0, 5, 10**9)] == [0, 5, 10**9]


def test_a_source_with_an_order_of_its_own_is_walked_by_it():
    class Blocks(list[int]):
        def order(self, seed: int) -> BlockShuffle:
            return BlockShuffle([10] * 10, seed, together=1)

    mixture = Mixture({"blocks": (Blocks(range(100)), 1), "plain": (range(1000), 1)}, 3)
    walked = [p.sample for p in map(mixture.place, range(200)) if p.source == "blocks"]
    assert sorted(walked) == list(range(100))
    assert [len({index // 10 for index in walked[i : i + 10]}) for i in range(0, 100, 10)] == [1] * 10


def test_mixtures_mix():
    inner = _mixture({"web": 1, "code": 3}, SIZES)
    outer = Mixture({"inner": (inner, 1), "other": (range(9), 1)}, 5)
    walked = [p.sample for p in map(outer.place, range(100)) if p.source == "inner"]
    assert walked == list(range(50))


def test_closing_closes_the_sources():
    closed = []

    class Closable(list[int]):
        def close(self) -> None:
            closed.append(1)

    Mixture({"a": (Closable([1]), 1), "b": ([1], 1)}, 0).close()
    assert closed == [1]


@pytest.mark.parametrize(
    ("sources", "settings_", "says"),
    [
        ({}, {}, r"a mixture needs at least one source"),
        ({"a": ([], 1)}, {}, r"source 'a': it has no sample; give data that is not empty, or leave it out"),
        ({"a": ([1], 0)}, {}, r"source 'a': its weight is 0; give a positive number, or leave it out"),
        ({"a": ([1], -0.5)}, {}, r"source 'a': its weight is -0\.5; give a positive number"),
        ({"a": ([1], float("nan"))}, {}, r"source 'a': nan is no weight; give a positive number"),
        ({"a": ([1], float("inf"))}, {}, r"source 'a': inf is no weight"),
        ({"a": ([1], "1")}, {}, r"source 'a': '1' is no weight"),
        ({"a": ([1], True)}, {}, r"source 'a': True is no weight"),
        (
            {"a": ([1], 1e-7), "b": ([1], 1)},
            {},
            r"source 'a': its weight 1e-07 is 1e-07 of all, less than one of period = 10,000 positions; give it more,"
            r" or a period of at least 10,000,001",
        ),
        ({"a": ([1], 1)}, {"period": 0}, r"period: 0 positions cannot be filled"),
    ],
)
def test_what_makes_no_mixture_is_named(sources: dict, settings_: dict, says: str):
    with pytest.raises(DatasetError, match=says):
        Mixture(sources, 0, **settings_)


def test_a_negative_position_is_refused():
    with pytest.raises(IndexError, match="position -1 of a mixture: positions begin at 0"):
        _mixture({"web": 1}, SIZES)[-1]

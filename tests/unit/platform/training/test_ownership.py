"""Ownership: everything has one owner, loads are even, and no more moves than has to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.platform.training.layout import Run, intersect, merge_runs, total_of
from everstep.platform.training.ownership import assign, moved

SIZE = 16


def equal(count: int) -> list[Run]:
    return [(SIZE * i, SIZE * (i + 1)) for i in range(count)]


def loads(owned: tuple[tuple[Run, ...], ...]) -> list[int]:
    return [total_of(runs) for runs in owned]


def runs_of(indices: list[int]) -> tuple[Run, ...]:
    return merge_runs((SIZE * i, SIZE * (i + 1)) for i in indices)


def test_without_holders_each_rank_gets_one_contiguous_part() -> None:
    assert assign(equal(8), 4) == (((0, 32),), ((32, 64),), ((64, 96),), ((96, 128),))


def test_the_remainder_is_spread_and_not_left_to_the_last_rank() -> None:
    assert sorted(loads(assign(equal(6), 4))) == [16, 16, 32, 32]
    assert max(loads(assign(equal(149), 100))) == 2 * SIZE


def test_with_fewer_units_than_ranks_some_own_nothing() -> None:
    assert sorted(loads(assign(equal(2), 5))) == [0, 0, 0, 16, 16]


def test_nothing_to_own_gives_empty_parts() -> None:
    assert assign([], 3) == ((), (), ())


def test_no_rank_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="at least one rank"):
        assign(equal(2), 0)


def test_where_all_hold_everything_parts_are_contiguous_and_nothing_moves() -> None:
    everything = [((0, 7 * SIZE),)] * 3
    owned = assign(equal(7), 3, everything)
    assert [len(runs) for runs in owned] == [1, 1, 1]
    assert moved(everything, owned) == 0


def test_a_death_moves_only_what_the_dead_rank_owned() -> None:
    before = assign(equal(12), 4)
    survivors = [before[0], before[2], before[3]]
    after = assign(equal(12), 3, survivors)
    assert moved(survivors, after) == total_of(before[1])
    assert loads(after) == [64, 64, 64]


def test_a_newcomer_gets_its_share_and_nothing_else_moves() -> None:
    before = assign(equal(12), 3)
    after = assign(equal(12), 4, [*before, ()])
    assert moved([*before, ()], after) == 3 * SIZE == total_of(after[3])


def test_the_odd_unit_stays_with_whom_it_is_wherever_that_stands() -> None:
    for held in ([[0, 1, 2], [3, 4, 5, 6]], [[0, 1, 2, 3], [4, 5, 6]]):
        before = [runs_of(indices) for indices in held]
        assert moved(before, assign(equal(7), 2, before)) == 0


def test_held_memory_beside_the_units_is_ignored() -> None:
    assert assign(equal(2), 2, [((1, 16),), ((16, 31),)]) == assign(equal(2), 2)


Case = tuple[int, list[list[int]]]


@st.composite
def holdings(draw: st.DrawFn) -> Case:
    """Units of one size, and who holds which: every unit at most one holder."""
    units, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 9))
    holders = draw(st.lists(st.integers(-1, ranks - 1), min_size=units, max_size=units))
    return units, [[i for i, holder in enumerate(holders) if holder == rank] for rank in range(ranks)]


@settings(max_examples=300, deadline=None)
@given(holdings())
def test_every_unit_has_one_owner_loads_are_even_and_moves_are_minimal(case: Case) -> None:
    count, held = case
    ranks = len(held)
    before = [runs_of(indices) for indices in held]
    owned = assign(equal(count), ranks, before)
    assert merge_runs(run for runs in owned for run in runs) == ((0, count * SIZE),)
    assert sum(loads(owned)) == count * SIZE
    assert max(loads(owned)) - min(loads(owned)) <= SIZE
    share, odd = divmod(count, ranks)
    # Of an even assignment `odd` ranks own one unit more: best those who hold more than the others.
    most = sum(min(len(h), share) for h in held) + min(odd, sum(len(h) > share for h in held))
    everything_or_nothing = all(len(h) in (0, count) for h in held)
    if not everything_or_nothing:
        assert moved(before, owned) == (count - most) * SIZE


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 8))
def test_units_of_any_size_are_all_owned_and_nearly_even(sizes: list[int], ranks: int) -> None:
    units, at = [], 0
    for size in sizes:
        units.append((at, at + size))
        at += size
    first = assign(units, ranks)
    fewer = assign(units, max(1, ranks - 1), first[1:])
    for owned in (first, fewer):
        assert merge_runs(run for runs in owned for run in runs) == ((0, at),)
        assert max(loads(owned)) - min(loads(owned)) <= 2 * max(sizes)
        assert all(not intersect(a, b) for i, a in enumerate(owned) for b in owned[i + 1 :])

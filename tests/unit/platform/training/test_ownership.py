"""Ownership: everything has one owner, loads are even, and no more moves than has to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.platform.training.layout import Run, intersect, merge_runs, subtract, total_of
from everstep.platform.training.ownership import assign, assign_arcs, moved, shadows

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


# ---- with shadows: [Note: ring] -------------------------------------------------------------------------

Owned = tuple[tuple[Run, ...], ...]
Holdings = tuple[list[tuple[Run, ...]], list[tuple[Run, ...]]]
NOBODY: tuple[Run, ...] = ()


def holding(owned: Owned) -> Holdings:
    """What ranks hold that own this, and the part of it that they mirror."""
    mirrored = list(shadows(owned))
    return [merge_runs([*own, *mirror]) for own, mirror in zip(owned, mirrored, strict=True)], mirrored


def fresh(count: int, ranks: int) -> Owned:
    return assign_arcs(equal(count), [NOBODY] * ranks, [NOBODY] * ranks)


def without(holdings: Holdings, *gone: int) -> Holdings:
    held, mirrored = holdings
    left = [rank for rank in range(len(held)) if rank not in gone]
    return [held[rank] for rank in left], [mirrored[rank] for rank in left]


def with_newcomer(holdings: Holdings, at: int) -> Holdings:
    held, mirrored = holdings
    return [*held[:at], NOBODY, *held[at:]], [*mirrored[:at], NOBODY, *mirrored[at:]]


def test_each_rank_mirrors_the_one_before_it_and_one_alone_nobody() -> None:
    assert shadows((((0, 32),), ((32, 64),), ((64, 80), (96, 112)))) == (
        ((64, 80), (96, 112)), ((0, 32),), ((32, 64),),
    )  # fmt: skip
    assert shadows((((0, 32),), ((32, 64),))) == (((32, 64),), ((0, 32),))
    assert shadows((((0, 32),),)) == ((),)


def test_arcs_of_a_new_run_are_contiguous_and_even() -> None:
    assert fresh(8, 4) == assign(equal(8), 4)
    assert fresh(2, 5) == ((), ((0, 16),), (), ((16, 32),), ())
    assert assign_arcs([], [(), ()], [(), ()]) == ((), ())


@pytest.mark.parametrize("ranks", range(1, 8))
def test_where_nobody_comes_or_goes_everything_stays(ranks: int) -> None:
    owned = fresh(23, ranks)
    for _ in range(3):
        assert assign_arcs(equal(23), *holding(owned)) == owned
        owned = assign_arcs(
            equal(23), *without(holding(assign_arcs(equal(23), *with_newcomer(holding(owned), 0))), 1)
        )


@pytest.mark.parametrize("ranks", range(2, 9))
def test_after_a_loss_no_owner_fetches_and_mirrors_no_more_than_their_share(ranks: int) -> None:
    """To the element, whoever is lost, whatever was lost before."""
    count = 2 * ranks * (ranks - 1)
    total = SIZE * count
    owned = fresh(count, ranks)
    for lost in range(ranks):
        held, mirrored = without(holding(owned), lost)
        after = assign_arcs(equal(count), held, mirrored)
        assert moved(held, after) == 0
        assert set(loads(after)) == {total // (ranks - 1)}
        fetched = [total_of(subtract(runs, has)) for runs, has in zip(shadows(after), held, strict=True)]
        assert max(fetched) <= total // (ranks - 1)
        if ranks > 3:  # with fewer the first rank holds a part of what it will mirror
            assert sum(fetched) == total * (ranks + 2) // (2 * ranks), "(1/2 + 1/n) of the state"


def test_of_very_many_the_loss_of_one_costs_no_owner_anything() -> None:
    held, mirrored = without(holding(fresh(8000, 80)), 33)
    after = assign_arcs(equal(8000), held, mirrored)
    assert moved(held, after) == 0
    assert max(loads(after)) - min(loads(after)) <= SIZE


@pytest.mark.parametrize("place", range(5))
def test_who_joins_makes_nobody_else_fetch(place: int) -> None:
    count = 40
    for before in (fresh(count, 4), assign_arcs(equal(count), *without(holding(fresh(count, 5)), 2))):
        held, mirrored = with_newcomer(holding(before), place)
        after = assign_arcs(equal(count), held, mirrored)
        assert moved(held, after) == total_of(after[place]) == SIZE * count // 5
        assert moved(held, shadows(after)) == SIZE * count // 4, "and mirrors little more than the newcomer's"


@pytest.mark.parametrize("lost", range(5))
@pytest.mark.parametrize("place", range(5))
def test_one_that_takes_the_place_of_another_makes_nobody_else_fetch(lost: int, place: int) -> None:
    count = 40
    held, mirrored = with_newcomer(without(holding(fresh(count, 5)), lost), place)
    after = assign_arcs(equal(count), held, mirrored)
    assert moved(held, after) == total_of(after[place]) == SIZE * count // 5


def test_a_rank_that_is_lost_with_its_shadow_is_all_that_is_fetched() -> None:
    owned = fresh(60, 6)
    held, mirrored = without(holding(owned), 2, 3)
    after = assign_arcs(equal(60), held, mirrored)
    nowhere = subtract(((0, 60 * SIZE),), merge_runs({run for runs in owned[:2] + owned[3:] for run in runs}))
    assert nowhere == owned[2]
    assert moved(held, after) == total_of(owned[2])
    assert len(set(loads(after))) == 1


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, int]]]:
    """Sizes of units, and who is lost or joins where."""
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=40))
    return sizes, draw(
        st.lists(st.tuples(st.sampled_from(["lost", "joins", "stays"]), st.integers(0, 20)), max_size=8)
    )


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(1, 7))
def test_whatever_happens_arcs_cover_the_space_once_evenly(case: tuple[list[int], list], ranks: int) -> None:
    sizes, history = case
    units, at = [], 0
    for size in sizes:
        units.append((at, at + size))
        at += size
    owned = assign_arcs(units, [NOBODY] * ranks, [NOBODY] * ranks)
    for what, where in [("stays", 0), *history]:
        holdings = holding(owned)
        if what == "lost" and len(owned) > 1:
            holdings = without(holdings, where % len(owned))
        elif what == "joins":
            holdings = with_newcomer(holdings, where % (len(owned) + 1))
        owned = assign_arcs(units, *holdings)
        assert merge_runs(run for runs in owned for run in runs) == ((0, at),)
        assert sum(loads(owned)) == at, "nothing is owned twice"
        assert max(loads(owned)) - min(loads(owned)) <= 2 * max(sizes)
        assert all(start in {u[0] for u in units} for runs in owned for start, _ in runs), "units are not cut"


def test_holdings_that_do_not_fit_together_are_no_harm() -> None:
    """Some had taken their place in a view that the others never saw."""
    first, second = fresh(24, 4), assign_arcs(equal(24), *without(holding(fresh(24, 5)), 1))
    (held, mirrored), (held_2, mirrored_2) = holding(first), holding(second)
    mixed = [held[0], held_2[1], held[2], held_2[3]], [mirrored[0], mirrored_2[1], mirrored[2], mirrored_2[3]]
    owned = assign_arcs(equal(24), *mixed)
    assert merge_runs(run for runs in owned for run in runs) == ((0, 24 * SIZE),)
    assert loads(owned) == [96, 96, 96, 96]


def test_what_is_left_of_runs() -> None:
    runs = ((0, 10), (20, 30), (40, 50))
    assert subtract(runs, ()) == runs
    assert subtract(runs, runs) == ()
    assert subtract((), runs) == ()
    assert subtract(runs, ((5, 25), (26, 27), (40, 45))) == ((0, 5), (25, 26), (27, 30), (45, 50))

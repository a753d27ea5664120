"""The flat space: alignment, units, pieces, norm blocks, and the arithmetic of runs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.platform.training.layout import (
    ALIGN,
    MAX_BLOCKS,
    MIN_BLOCK,
    FlatLayout,
    Run,
    aligned,
    intersect,
    merge_runs,
    rows_of,
    total_of,
    units_in,
)

SHAPES = st.lists(st.tuples(st.integers(0, 3 * MIN_BLOCK), st.booleans()), max_size=8)


def layout_of(shapes: list[tuple[int, bool]]) -> FlatLayout:
    return FlatLayout.of((f"t{i}", (numel,), whole) for i, (numel, whole) in enumerate(shapes))


def elements(runs: tuple[Run, ...]) -> set[int]:
    return {i for start, stop in runs for i in range(start, stop)}


def test_every_tensor_starts_at_64_bytes_in_registration_order() -> None:
    layout = FlatLayout.of([("w", (3, 5), False), ("b", (), True), ("v", (16,), False)], [("running_mean", (4,))])
    assert [(t.name, t.start, t.numel) for t in layout.tensors] == [
        ("w", 0, 15),
        ("b", 16, 1),
        ("v", 32, 16),
        ("running_mean", 48, 4),
    ]
    assert layout.total == 64
    assert [t.name for t in layout.tensors if t.is_buffer] == ["running_mean"]
    assert layout.by_name["v"].stop == 48


def test_a_model_without_parameters_is_empty() -> None:
    layout = FlatLayout.of([])
    assert (layout.total, layout.units, layout.pieces([(0, 16)])) == (0, (), [])


def test_whole_tensors_and_buffers_are_one_unit_others_are_cut_into_blocks() -> None:
    n = 2 * MIN_BLOCK + 5
    layout = FlatLayout.of([("cut", (n,), False), ("whole", (n,), True)], [("buffer", (n,))])
    end = aligned(n)
    assert layout.units == (
        (0, MIN_BLOCK),
        (MIN_BLOCK, 2 * MIN_BLOCK),
        (2 * MIN_BLOCK, end),
        (end, 2 * end),
        (2 * end, 3 * end),
    )


@settings(max_examples=100, deadline=None)
@given(SHAPES)
def test_units_cover_the_flat_space_once_and_are_aligned(shapes: list[tuple[int, bool]]) -> None:
    layout = layout_of(shapes)
    position = 0
    for start, stop in layout.units:
        assert start == position < stop
        assert start % ALIGN == 0
        position = stop
    assert position == layout.total


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.data())
def test_pieces_of_any_units_are_their_elements_without_the_padding(
    shapes: list[tuple[int, bool]], data: st.DataObject
) -> None:
    layout = layout_of(shapes)
    chosen = data.draw(st.lists(st.sampled_from(layout.units), unique=True) if layout.units else st.just([]))
    pieces = layout.pieces(chosen)
    inside = {i for t in layout.tensors for i in range(t.start, t.stop)}
    assert {i for p in pieces for i in range(p.flat, p.flat + p.numel)} == elements(tuple(chosen)) & inside
    assert sum(p.numel for p in pieces) == len(elements(tuple(chosen)) & inside), "none twice"
    assert [p.flat for p in pieces] == sorted(p.flat for p in pieces)
    for piece in pieces:
        blocks = layout.norm_blocks(piece)
        assert (blocks[0][0], blocks[-1][1]) == (piece.start, piece.stop)
        # The same blocks whoever owns the piece: they begin at multiples of the block size of the tensor.
        assert all(start % layout.block == 0 for start, _ in blocks)


def test_a_run_over_several_tensors_gives_a_piece_of_each() -> None:
    layout = FlatLayout.of([("a", (20,), False), ("b", (10,), False), ("c", (20,), False)])
    found = [(p.tensor.name, p.start, p.stop) for p in layout.pieces([(16, 64)])]
    assert found == [("a", 16, 20), ("b", 0, 10), ("c", 0, 16)]


def test_blocks_grow_so_that_a_vote_stays_small() -> None:
    numel = MIN_BLOCK * MAX_BLOCKS * 2 + 1
    layout = FlatLayout.of([("huge", (numel,), False)])
    assert layout.block == 4 * MIN_BLOCK
    assert len(layout.units) <= MAX_BLOCKS


def test_many_small_tensors_do_not_make_blocks_grow() -> None:
    assert layout_of([(8, False)] * (2 * MAX_BLOCKS)).block == MIN_BLOCK


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=8).map(
    lambda pairs: merge_runs(_disjoint(pairs))
)


def _disjoint(pairs: list[tuple[int, int]]) -> list[Run]:
    taken: set[int] = set()
    runs = []
    for start, length in pairs:
        cells = [i for i in range(start, start + length) if i not in taken]
        taken |= set(cells)
        runs += [(i, i + 1) for i in cells]
    return runs


@given(RUNS, RUNS)
def test_intersect_is_that_of_the_sets(left: tuple[Run, ...], right: tuple[Run, ...]) -> None:
    both = intersect(left, right)
    assert elements(both) == elements(left) & elements(right)
    assert total_of(both) == len(elements(both)), "no element twice"


def test_merge_runs_sorts_and_joins_neighbours_only() -> None:
    assert merge_runs([(8, 9), (0, 4), (4, 6)]) == ((0, 6), (8, 9))
    assert merge_runs([]) == ()


def test_units_travel_as_rows_of_one_size() -> None:
    units = ((0, 4), (4, 8), (8, 12), (12, 14), (16, 18), (18, 20), (20, 24))
    assert rows_of(units) == ((0, 4, 3), (12, 2, 1), (16, 2, 2), (20, 4, 1))
    assert units_in(rows_of(units)) == units
    layout = FlatLayout.of([(f"w{i}", (1 << 22,), False) for i in range(16)])
    assert len(layout.units) == MAX_BLOCKS
    assert len(layout.rows) == 1
    assert units_in(layout.rows) == layout.units

"""Who owns which units of the flat space, so that a change of ranks moves as few as possible. Pure.

[Note: ring] With shadows the flat space is a ring: its end is followed by its start. Each rank owns an arc of it, in
rank order, and mirrors the arc before its own, so what it holds is one arc of two shares. When rank d of n is lost,
rank d+1 holds d's arc and its own. Cut anew into n-1 even arcs from where d's began, every arc lies inside what its
owner held already: no owner fetches anything (with units of one size, at least n(n-1) of them). What balance costs
are the mirrors: arcs begin elsewhere than before, so of what ranks mirror from now on they fetch at most (1/2 + 1/n)
of the state all together, and none more than its share. A rank that joins makes the others only give up: the ring is
cut so that it comes last.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain

from everstep.platform.training.layout import Run, intersect, merge_runs, subtract, total_of

# Up to so many ranks, all their places are compared: 128 cuts, 20 ms. Beyond, those next to who left or came, which
# is as good after one loss.
_COMPARED = 64


def assign(units: Sequence[Run], ranks: int, held: Sequence[Sequence[Run]] = ()) -> tuple[tuple[Run, ...], ...]:
    """Runs owned by each of `ranks`; with units of one size, balanced to within one of them.

    `held[r]` is what rank r holds already (empty for a newcomer). A rank keeps what it holds up to its fair
    share, so only the surplus of the old owners and the units of those who left are moved. Where everybody
    holds everything or nothing, the result is contiguous.
    """
    assert ranks > 0, "a view has at least one rank"
    sizes = [stop - start for start, stop in units]
    total = to_share = sum(sizes)
    starts = [start for start, _ in units]
    mine = [_inside(units, starts, merge_runs(runs)) for runs in held[:ranks]]
    owner: list[int | None] = [None] * len(units)
    load = [0] * ranks
    # Ranks whose load is final, because one more unit would be too much, leave a smaller share to the others.
    still_open, closed = ranks, [False] * ranks

    def take(rank: int, index: int) -> None:
        owner[index] = rank
        load[rank] += sizes[index]

    if any(0 < sum(map(len, spans)) < len(units) for spans in mine):
        for rank, spans in enumerate(mine):
            for index in chain.from_iterable(spans):
                if load[rank] * ranks >= total:
                    break
                if owner[index] is None and (load[rank] + sizes[index]) * ranks <= total:
                    take(rank, index)
        # What does not divide evenly stays, one unit a rank, with those who have it.
        for rank, spans in enumerate(mine):
            more = next((index for index in chain.from_iterable(spans) if owner[index] is None), None)
            if more is None or still_open == 1:
                continue
            rest = to_share - load[rank] - sizes[more]
            if load[rank] * (still_open - 1) <= rest:
                take(rank, more)
                closed[rank] = True
                still_open -= 1
                to_share = rest
    _fill(units, owner, load, [rank for rank in range(ranks) if not closed[rank]], to_share)
    owned: list[list[Run]] = [[] for _ in range(ranks)]
    for unit, rank_of_unit in zip(units, owner, strict=True):
        assert rank_of_unit is not None
        owned[rank_of_unit].append(unit)
    return tuple(merge_runs(runs) for runs in owned)


def _fill(
    units: Sequence[Run], owner: list[int | None], load: Sequence[int], ranks: Sequence[int], to_share: int
) -> None:
    """Gives what nobody owns, in flat order, to `ranks`, each up to an equal part of `to_share`."""
    count = len(ranks)
    needs = [max(0, to_share - load[rank] * count) for rank in ranks]  # in 1 / count of an element
    left = sum(stop - start for index, (start, stop) in enumerate(units) if owner[index] is None)
    needed = sum(needs)
    position = at = 0
    reach = needs[0]
    for index, (start, stop) in enumerate(units):
        if owner[index] is not None:
            continue
        # A unit goes to the rank in whose part its middle lies. Integers: rounding would misplace some.
        middle = 2 * position + (stop - start)
        while at < count - 1 and middle * needed > 2 * reach * left:
            at += 1
            reach += needs[at]
        owner[index] = ranks[at]
        position += stop - start


def _inside(units: Sequence[Run], starts: Sequence[int], runs: Sequence[Run]) -> list[range]:
    """Positions of the units that lie wholly inside `runs`; both are sorted, `starts` are those of the units.

    By search: 10,000 ranks hold one or two of 16,384 units each.
    """
    found = []
    for start, stop in runs:
        first, last = bisect_left(starts, start), bisect_left(starts, stop)
        if last > first and units[last - 1][1] > stop:
            last -= 1
        if last > first:
            found.append(range(first, last))
    return found


def moved(before: Sequence[Sequence[Run]], after: Sequence[Sequence[Run]]) -> int:
    """Elements that a rank owns in `after` and did not hold in `before` (same rank order)."""
    kept = sum(sum(b - a for a, b in intersect(old, new)) for old, new in zip(before, after, strict=False))
    return sum(b - a for runs in after for a, b in runs) - kept


# ---- with shadows: [Note: ring] -------------------------------------------------------------------------


def shadows(owned: Sequence[Sequence[Run]]) -> tuple[tuple[Run, ...], ...]:
    """The runs that each rank mirrors: those of the rank before it; none where there is only one rank."""
    return tuple(merge_runs(owned[rank - 1]) if len(owned) > 1 else () for rank in range(len(owned)))


def assign_arcs(
    units: Sequence[Run], held: Sequence[Sequence[Run]], mirrored: Sequence[Sequence[Run]]
) -> tuple[tuple[Run, ...], ...]:
    """Runs owned by each rank: arcs of the ring in rank order, even to within a unit.

    `units` cover the flat space. `held[r]` is what rank r holds already (empty for a newcomer), `mirrored[r]` the
    part of it that another owned. Where nobody left or came, owners stay. Else the ring is cut from where some arc
    began, or what its rank holds: from that of these places from which owners have to fetch the fewest elements, then
    those who mirror them.
    """
    ranks = len(held)
    assert ranks > 0, "a view has at least one rank"
    total = units[-1][1] if units else 0
    held = [merge_runs(runs) for runs in held]
    before = [subtract(h, merge_runs(m)) for h, m in zip(held, mirrored, strict=True)]
    there = [rank for rank, runs in enumerate(before) if runs]
    changes = [r for r in there if not before[r - 1] or _end(before[r - 1], total) != _begin(before[r], total)]
    if not changes and total_of(run for runs in before for run in runs) == total:
        return tuple(before)
    marks = [start for start, _ in units] + [total]
    near = there if ranks <= _COMPARED else changes
    beginnings = {(rank, _begin(runs, total)) for rank in near for runs in (before[rank], held[rank])}
    cuts = [_arcs(marks, ranks, rank, start) for rank, start in sorted(beginnings) or [(0, 0)]]
    return min(cuts, key=lambda owned: (moved(held, owned), moved(held, shadows(owned))))


def _arcs(marks: Sequence[int], ranks: int, first: int, start: int) -> tuple[tuple[Run, ...], ...]:
    """Rank `first` begins at `start`, the others follow in order. `marks`: where units begin, and the end."""
    total = marks[-1]
    owned: list[tuple[Run, ...]] = [()] * ranks
    begin = start
    for count in range(1, ranks + 1):
        rounds, place = divmod(start + total * count // ranks, total) if total else (0, 0)
        at = bisect_left(marks, place)
        if at and place - marks[at - 1] <= marks[at] - place:
            at -= 1
        end = rounds * total + marks[at]
        around = [(begin, min(end, total)), (max(begin, total) - total, end - total)]
        owned[(first + count - 1) % ranks] = merge_runs(run for run in around if run[0] < run[1])
        begin = end
    return tuple(owned)


def _begin(arc: Sequence[Run], total: int) -> int:
    """Where an arc of the ring begins; one that goes on over the end of the flat space is two runs."""
    return arc[-1][0] if _goes_over(arc, total) else arc[0][0]


def _end(arc: Sequence[Run], total: int) -> int:
    return arc[0][1] if _goes_over(arc, total) else arc[-1][1] % total


def _goes_over(arc: Sequence[Run], total: int) -> bool:
    return len(arc) > 1 and (arc[0][0], arc[-1][1]) == (0, total)

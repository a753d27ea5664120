"""Who owns which units of the flat space, so that a change of ranks moves as few as possible. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.platform.training.layout import Run, intersect, merge_runs


def assign(units: Sequence[Run], ranks: int, held: Sequence[Sequence[Run]] = ()) -> tuple[tuple[Run, ...], ...]:
    """Runs owned by each of `ranks`; with units of one size, balanced to within one of them.

    `held[r]` is what rank r holds already (empty for a newcomer). A rank keeps what it holds up to its fair
    share, so only the surplus of the old owners and the units of those who left are moved. Where everybody
    holds everything or nothing, the result is contiguous.
    """
    assert ranks > 0, "a view has at least one rank"
    sizes = [stop - start for start, stop in units]
    total = to_share = sum(sizes)
    mine = [_inside(units, merge_runs(runs)) for runs in held[:ranks]]
    owner: list[int | None] = [None] * len(units)
    load = [0] * ranks
    # Ranks whose load is final, because one more unit would be too much, leave a smaller share to the others.
    open_ranks = list(range(ranks))

    def take(rank: int, index: int) -> None:
        owner[index] = rank
        load[rank] += sizes[index]

    if any(0 < len(indices) < len(units) for indices in mine):
        for rank, indices in enumerate(mine):
            for index in indices:
                if owner[index] is None and (load[rank] + sizes[index]) * ranks <= total:
                    take(rank, index)
        # What does not divide evenly stays, one unit a rank, with those who have it.
        for rank, indices in enumerate(mine):
            more = next((index for index in indices if owner[index] is None), None)
            if more is None or len(open_ranks) == 1:
                continue
            rest = to_share - load[rank] - sizes[more]
            if load[rank] * (len(open_ranks) - 1) <= rest:
                take(rank, more)
                open_ranks.remove(rank)
                to_share = rest
    _fill(units, owner, load, open_ranks, to_share)
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


def _inside(units: Sequence[Run], runs: Sequence[Run]) -> list[int]:
    """Positions of the units that lie wholly inside `runs`; both are sorted."""
    found, at = [], 0
    for index, (start, stop) in enumerate(units):
        while at < len(runs) and runs[at][1] <= start:
            at += 1
        if at < len(runs) and runs[at][0] <= start and stop <= runs[at][1]:
            found.append(index)
    return found


def moved(before: Sequence[Sequence[Run]], after: Sequence[Sequence[Run]]) -> int:
    """Elements that a rank owns in `after` and did not hold in `before` (same rank order)."""
    kept = sum(sum(b - a for a, b in intersect(old, new)) for old, new in zip(before, after, strict=False))
    return sum(b - a for runs in after for a, b in runs) - kept

"""Who owns which units of the flat space, so that a change of ranks moves as few of them as possible. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.platform.training.layout import Run, intersect, merge_runs


def assign(units: Sequence[Run], ranks: int, held: Sequence[Sequence[Run]] = ()) -> tuple[tuple[Run, ...], ...]:
    """Runs owned by each of `ranks`, balanced to within one unit.

    `held[r]` is what rank r holds already (empty for a newcomer); where everybody holds everything, or nobody
    anything, the result is contiguous. A rank keeps what it holds up to its fair share, so only the surplus of
    the old owners and the units of those who left are moved.
    """
    assert ranks > 0, "a view has at least one rank"
    total = sum(stop - start for start, stop in units)
    owner: list[int | None] = [None] * len(units)
    load = [0] * ranks
    fair = total / ranks
    for rank in range(min(ranks, len(held))):
        mine = merge_runs(held[rank])
        for index, unit in enumerate(units):
            if owner[index] is None and intersect(mine, (unit,)) == (unit,):
                size = unit[1] - unit[0]
                if load[rank] + size <= fair + size / 2:
                    owner[index] = rank
                    load[rank] += size
    # What nobody kept goes, in order, to the first rank that is still short of its share.
    rank = 0
    for index, unit in enumerate(units):
        if owner[index] is not None:
            continue
        size = unit[1] - unit[0]
        while rank < ranks - 1 and load[rank] + size / 2 > fair:
            rank += 1
        owner[index] = rank
        load[rank] += size
    return tuple(merge_runs(unit for index, unit in enumerate(units) if owner[index] == r) for r in range(ranks))


def moved(before: Sequence[Sequence[Run]], after: Sequence[Sequence[Run]]) -> int:
    """Elements that a rank owns in `after` and did not hold in `before` (same rank order)."""
    kept = sum(sum(b - a for a, b in intersect(old, new)) for old, new in zip(before, after, strict=False))
    return sum(b - a for runs in after for a, b in runs) - kept

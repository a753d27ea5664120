"""What fits on the nodes of a cluster: whole processes, packed node by node, by vectors of resources.

Used by everstep.platform.cluster.allocation. Amounts are whole ten-thousandths, as Ray counts them, so that sums are
exact. A `Room` only ever gets smaller; it is made anew for each decision. No I/O, one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

_PARTS: Final = 10_000  # Ray's own granularity

Units = tuple[tuple[str, int], ...]
"""A vector of resources, sorted by name, without zeros."""


def units(resources: Mapping[str, float]) -> Units:
    return tuple(sorted((name, parts) for name, value in resources.items() if (parts := round(value * _PARTS)) > 0))


def plain(vector: Units) -> dict[str, float]:
    return {name: parts / _PARTS for name, parts in vector}


def shown(vector: Units) -> str:
    """For people: "2 CPU, 1 GPU"."""
    return ", ".join(f"{parts / _PARTS:g} {name}" for name, parts in vector) or "nothing"


class Room:
    """Processes are put on the first node that has room for them, in the order of the nodes' names."""

    def __init__(self, nodes: Mapping[str, Units]) -> None:
        self._free = [dict(vector) for _, vector in sorted(nodes.items())]
        self._from: dict[Units, int] = {}  # nodes before this one are full for that demand

    def take(self, demand: Units, count: int) -> int:
        """Takes room for up to `count` processes; returns for how many there was."""
        index, left = self._from.get(demand, 0), count
        while left > 0 and index < len(self._free):
            free = self._free[index]
            fit = min(_fit(free, demand, left), left)
            for name, parts in demand:
                free[name] = free.get(name, 0) - parts * fit
            left -= fit
            index += left > 0
        self._from[demand] = index
        return count - left

    def fits(self, demand: Units, count: int) -> bool:
        """Whether `take` would find room for all of them."""
        return self.count(demand, count) >= count

    def count(self, demand: Units, most: int) -> int:
        """For how many there is room, up to `most`."""
        found = 0
        for free in self._free[self._from.get(demand, 0) :]:
            found += _fit(free, demand, most)
            if found >= most:
                return most
        return found

    def share(self, wishes: Sequence[tuple[Units, int]]) -> list[int]:
        """Round-robin: each in turn one process, until it has what it wishes or there is no room for it."""
        given = [0] * len(wishes)
        if len({demand for demand, _ in wishes}) == 1:  # the usual case, without a walk a process
            demand = wishes[0][0]
            room = self.take(demand, sum(wish for _, wish in wishes))
            return _level([wish for _, wish in wishes], room)
        turn = [index for index, (_, wish) in enumerate(wishes) if wish > 0]
        while turn:
            stay = []
            for index in turn:
                demand, wish = wishes[index]
                if self.take(demand, 1):
                    given[index] += 1
                    if given[index] < wish:
                        stay.append(index)
            turn = stay
        return given


def pack(nodes: Mapping[str, Units], held: Iterable[tuple[Units, int]]) -> Room:
    """What is left beside `held`; of what does not fit, what does."""
    room = Room(nodes)
    for demand, count in held:
        room.take(demand, count)
    return room


def _fit(free: Mapping[str, int], demand: Units, most: int) -> int:
    return max(0, min((free.get(name, 0) // parts for name, parts in demand), default=most))


def _level(wishes: Sequence[int], room: int) -> list[int]:
    """The same as one each in turn."""
    given = [0] * len(wishes)
    open_ = sorted(range(len(wishes)), key=lambda index: wishes[index])
    level = 0
    while open_:
        rise = min(wishes[open_[0]] - level, room // len(open_))
        level, room = level + rise, room - rise * len(open_)
        for index in open_:
            given[index] = level
        met = [index for index in open_ if wishes[index] == level]
        if not met:  # less than one each is left: those who are first in turn
            for index in sorted(open_)[:room]:
                given[index] += 1
            break
        open_ = [index for index in open_ if wishes[index] > level]
    return given

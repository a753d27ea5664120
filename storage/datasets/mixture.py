"""Several data sets in fixed proportions, without any state.

Purpose: position p of a mixture says which source it draws from and which of the source's samples, by arithmetic
alone. Owns the order of slots of the newest period (16 bytes a slot). Thread-safety: safe, where its sources are;
what is cached is replaced as one tuple. Pickles with its sources.

Method: a period of P positions holds each source s exactly c_s times, in an order that is a keyed permutation of its
own for each period. The source's draws are numbered in the order in which they come, and each source walks its own
order, so it gives each of its samples once before it gives any a second time.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from everstep.storage.datasets.errors import DatasetError
from everstep.storage.datasets.order import Order, Straight, keyed, order_of
from everstep.storage.datasets.shuffle import Shuffle

# Up to here a loop is faster than NumPy, whose calls take 0.1 ms a period.
_SHORT_PERIOD: Final = 24

Weight = int | float | Fraction | Decimal


class Samples(Protocol):
    """What a source of a mixture has to offer."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Place(NamedTuple):
    """Where a position of a mixture draws from: the source's name, and the number of the sample in it."""

    source: str
    sample: int


class Mixture:
    """Samples of several data sets, each with its weight.

    Position p = 0, 1, 2, … goes on for ever: sources that are at their end begin their next epoch, each at its own
    time, in a new order. **Do not shuffle positions**; they are shuffled. `order` says so to whoever asks
    (`order_of`).

    `len()`: the positions after which every source was seen whole at least once, in whole periods:
    P x max over sources of ceil(samples / c). It ends iteration, and nothing else.

    Proportions: weights become whole counts c_s in a period of P positions. Where the weights are fractions of a
    common denominator up to `period`, they are exact (1 and 3: P = 4); else P = `period` and the largest remainders
    are rounded up, and |c_s / P - weight_s| < 1 / P. In any window of W positions a source comes W x c_s / P times,
    give or take at most 2 x c_s x (P - c_s) / P, however long the window; half as much where it begins at a multiple
    of P.

    `sources`: name -> (data set, weight); their order does not matter. `seed`: of the order of slots and of each
    source's shuffle. `period`: the largest P. Raises DatasetError naming the source.
    """

    def __init__(self, sources: Mapping[str, tuple[Samples, Weight]], seed: int, *, period: int = 10_000) -> None:
        if not sources:
            raise DatasetError("a mixture needs at least one source")
        self.seed = seed
        self._names = sorted(sources)
        self._sources = [sources[name][0] for name in self._names]
        for name, source in zip(self._names, self._sources, strict=True):
            if len(source) < 1:
                raise DatasetError(f"source {name!r}: it has no sample; give data that is not empty, or leave it out")
        self._counts = _counts({name: sources[name][1] for name in self._names}, period)
        self.period = sum(self._counts)
        self._ends = list(accumulate(self._counts))
        self._slots = Shuffle(self.period, keyed(seed, "mixture"))
        self._orders: list[Order] = [
            order_of(source, keyed(seed, "source", name))
            for name, source in zip(self._names, self._sources, strict=True)
        ]
        self._table: tuple[int, Any, Any] = (-1, None, None)

    @property
    def proportions(self) -> dict[str, Fraction]:
        """The exact share of each source."""
        return {name: Fraction(count, self.period) for name, count in zip(self._names, self._counts, strict=True)}

    def __len__(self) -> int:
        whole = zip(self._sources, self._counts, strict=True)
        return self.period * max(-(-len(source) // count) for source, count in whole)

    def __getitem__(self, index: int) -> Any:
        number, draw = self._draw(index)
        return self._sources[number][self._orders[number].at(draw)]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def place(self, position: int) -> Place:
        """Which sample of which source a position is, without reading it. O(log sources), once a period O(P)."""
        number, draw = self._draw(position)
        return Place(self._names[number], self._orders[number].at(draw))

    def order(self, seed: int) -> Straight:
        """Positions as they come: a mixture is in its final order already, by its own seed."""
        return Straight()

    def close(self) -> None:
        """Close every source that can be closed."""
        for source in self._sources:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    def _draw(self, position: int) -> tuple[int, int]:
        """The source's number, and how often it was drawn from before."""
        position = operator.index(position)
        if position < 0:
            raise IndexError(f"position {position} of a mixture: positions begin at 0")
        number, slot = divmod(position, self.period)
        source_of, before = self._period(number)
        source = int(source_of[slot])
        return source, number * self._counts[source] + int(before[slot])

    def _period(self, number: int) -> tuple[Any, Any]:
        """For each slot of a period its source, and how often that came before in the period."""
        cached, source_of, before = self._table
        if cached == number:
            return source_of, before
        if self.period <= _SHORT_PERIOD:
            source_of = [bisect_right(self._ends, self._slots.index(number, slot)) for slot in range(self.period)]
            before = [source_of[:slot].count(source) for slot, source in enumerate(source_of)]
        else:
            source_of = np.searchsorted(self._ends, self._slots.indices(number, 0, self.period), side="right")
            before = np.empty(self.period, dtype=np.int64)
            for source, count in enumerate(self._counts):
                before[source_of == source] = np.arange(count)
        self._table = (number, source_of, before)
        return source_of, before


def _counts(weights: Mapping[str, Weight], period: int) -> list[int]:
    """Whole numbers in the weights' proportion, exact where a sum of at most `period` allows it."""
    if period < 1:
        raise DatasetError(f"period: {period} positions cannot be filled; give at least 1")
    exact = {name: _fraction(name, weight) for name, weight in weights.items()}
    total = sum(exact.values())
    shares = [value / total for value in exact.values()]
    common = math.lcm(*(share.denominator for share in shares))
    if common <= period:
        return [int(share * common) for share in shares]
    counts = [math.floor(share * period) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * period, i))
    for number in remainders[: period - sum(counts)]:
        counts[number] += 1
    for (name, weight), count, share in zip(weights.items(), counts, shares, strict=True):
        if not count:
            raise DatasetError(
                f"source {name!r}: its weight {weight} is {float(share):.2g} of all, less than one of period ="
                f" {period:,} positions; give it more, or a period of at least {math.ceil(1 / share):,}"
            )
    return counts


def _fraction(name: str, weight: Weight) -> Fraction:
    """A weight as it is written: 0.1 is one tenth, not the float next to it."""
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float | Fraction | Decimal)
        or not math.isfinite(weight)
    ):
        raise DatasetError(f"source {name!r}: {weight!r} is no weight; give a positive number")
    value = Fraction(repr(weight)) if isinstance(weight, float) else Fraction(weight)
    if value <= 0:
        raise DatasetError(f"source {name!r}: its weight is {weight!r}; give a positive number, or leave it out")
    return value

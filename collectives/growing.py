"""A map of which every version stays what it was, and to which a key is added at the same cost however large it is.

[Note: growing] A decider hands back a new state for each event, and each of 10,000 ranks votes on each step: dicts
that are copied cost it 0.25 s, and the square of that with more. Versions of a `Growing` share one list of pairs
and one table of places, and see the first `_count` pairs of them. Adding to the newest version appends to what all
share; adding to an older one, or giving a key another value, copies. Deciders add to the newest, so they never copy.

Reading any version is safe in any thread: what it sees is never changed. Only one thread may add to versions that
share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Growing(Mapping[K, V]):
    """`copies` counts how many pairs were ever copied to make this version, for tests: 0 where all shared."""

    __slots__ = ("_count", "_pairs", "_places", "copies")

    def __init__(self, items: Mapping[K, V] | None = None, copies: int = 0) -> None:
        self._pairs: list[tuple[K, V]] = list(items.items()) if items is not None else []
        self._places: dict[K, int] = {key: place for place, (key, _) in enumerate(self._pairs)}
        self._count = len(self._pairs)
        self.copies = copies + self._count

    def __getitem__(self, key: K) -> V:
        place = self._places.get(key, self._count)
        if place >= self._count:
            raise KeyError(key)
        return self._pairs[place][1]

    def __contains__(self, key: object) -> bool:
        return self._places.get(key, self._count) < self._count  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[K]:
        for place in range(self._count):
            yield self._pairs[place][0]

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Growing({dict(self)!r})"

    def plus(self, key: K, value: V) -> Growing[K, V]:
        """With `key`; this version stays as it is."""
        if key in self:
            if self[key] == value:
                return self
            return Growing({**self, key: value}, self.copies)
        if len(self._pairs) != self._count:  # somebody has added to this version before
            return Growing({**self, key: value}, self.copies)
        self._pairs.append((key, value))
        self._places[key] = self._count
        grown: Growing[K, V] = Growing.__new__(Growing)
        grown._pairs, grown._places = self._pairs, self._places
        grown._count, grown.copies = self._count + 1, self.copies
        return grown


def grown(known: Mapping[K, V], key: K, value: V) -> Growing[K, V]:
    """`known` with `key`; a plain map is copied this once."""
    return (known if isinstance(known, Growing) else Growing(known)).plus(key, value)

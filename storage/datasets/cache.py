"""What was read lately, up to so many bytes.

Purpose: blocks, lines, row groups and open files of a data set. Owns its values and counters. Thread-safety: safe;
two threads that want the same value wait for one load. Fork-safety: a child begins with an empty cache, because the
parent's lock may be held by a thread that the child does not have. Pickles as its limit alone.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class CacheCounts:
    """`loads`: values that had to be made; `hits`: those that were there; `peak_bytes`: the most held at a time."""

    hits: int
    loads: int
    bytes: int
    peak_bytes: int


@dataclass
class _Held(Generic[Value]):
    """The contents in one process."""

    pid: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    entries: OrderedDict[Hashable, tuple[Value, int]] = field(default_factory=OrderedDict)
    loading: dict[Hashable, threading.Lock] = field(default_factory=dict)
    hits: int = 0
    loads: int = 0
    bytes: int = 0
    peak_bytes: int = 0


class Cache(Generic[Value]):
    """Values by key, the least recently used thrown out first.

    It holds at most `limit_bytes`, or one value where that alone is larger: a row group above the limit would
    otherwise be decoded again for every row.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held: _Held[Value] = _Held(os.getpid())

    def get(self, key: Hashable, load: Callable[[], tuple[Value, int]]) -> Value:
        """The value of `key`; where it is not held `load()` makes it, and says its bytes. Raises what it raises."""
        held = self._here()
        while True:
            with held.lock:
                entry = held.entries.get(key)
                if entry is not None:
                    held.entries.move_to_end(key)
                    held.hits += 1
                    return entry[0]
                loaded = held.loading.get(key)
                if loaded is None:
                    # A lock that is held while the value is made: an Event would cost 1 us more a load.
                    held.loading[key] = mine = threading.Lock()
                    mine.acquire()
                    break
            with loaded:
                pass
        try:
            value, nbytes = load()
            with held.lock:
                self._put(held, key, value, nbytes)
        finally:
            with held.lock:
                del held.loading[key]
            mine.release()
        return value

    def counts(self) -> CacheCounts:
        """The counters of this process."""
        held = self._here()
        with held.lock:
            return CacheCounts(held.hits, held.loads, held.bytes, held.peak_bytes)

    def clear(self) -> None:
        """Throw everything out; values in use live on with their users."""
        held = self._here()
        with held.lock:
            held.entries.clear()
            held.bytes = 0

    def _put(self, held: _Held[Value], key: Hashable, value: Value, nbytes: int) -> None:
        while held.entries and held.bytes + nbytes > self.limit_bytes:
            held.bytes -= held.entries.popitem(last=False)[1][1]
        held.entries[key] = (value, nbytes)
        held.loads += 1
        held.bytes += nbytes
        held.peak_bytes = max(held.peak_bytes, held.bytes)

    def _here(self) -> _Held[Value]:
        held = self._held
        if held.pid != os.getpid():
            held = self._held = _Held(os.getpid())
        return held

    def __getstate__(self) -> dict[str, Any]:
        return {"limit_bytes": self.limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

"""Writes a domain's parity rows of its group's snapshots, from the managers of the others. Never imports torch.

One thread. A version is encoded when this domain's trainer has sealed it; the others' managers say when theirs have.
What is asked for is read by pieces while it arrives (storage/parity.py), over connections that last as long as the
view. So trainers give parity neither time nor memory, only the machine's cores.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from everstep.actors.config import ParityGroup
from everstep.actors.fetch import Asker, Await, RemoteReader, Sealed
from everstep.actors.shelf import DomainShelf
from everstep.collectives.errors import HandshakeRefused
from everstep.storage.errors import SegmentChanged, StorageError
from everstep.storage.parity import Described, Reader, write_parity
from everstep.storage.segment import SegmentMap, read_seal

log = logging.getLogger(__name__)

Version = tuple[int, int, int]  # epoch, number, step
Told = Callable[[int, float, str], None]  # step, seconds of CPU, error or ""


class ParityKeeper:
    """`form` a view's group, then `protect` its versions in order; `close` ends it. Any thread but its own."""

    def __init__(self, shelf: DomainShelf, token: str, stall_s: float) -> None:
        self._shelf = shelf
        self._token = token
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._label = (0, 0)
        self._group: ParityGroup | None = None
        self._maps: list[SegmentMap] = []
        self._askers: dict[int, Asker] = {}
        self._over: list[Asker] = []  # of former views
        self._queue: queue.SimpleQueue[tuple[Version, Told] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def form(self, label: tuple[int, int], group: ParityGroup | None, paths: tuple[str, ...]) -> None:
        """From now on versions of this view; what is under way for an older one ends."""
        maps = [SegmentMap(path, writable=True) for path in paths]
        with self._lock:
            self._drop()
            self._label, self._group, self._maps = label, group, maps
        if group is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="parity", daemon=True)
            self._thread.start()

    def protect(self, version: Version, told: Told) -> None:
        """Encodes a version that this domain has sealed; says so by `told`, from this keeper's thread."""
        self._queue.put((version, told))

    def close(self) -> None:
        with self._lock:
            self._drop()
            self._group = None
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _drop(self) -> None:
        for asker in self._askers.values():
            asker.hang_up()
        self._over += self._askers.values()  # the keeper's thread may be reading: it closes them
        self._askers = {}
        for segment in self._maps:
            segment.close()
        self._maps = []

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            version, told = item
            self._close_askers(all=False)
            with self._lock:
                group, current = self._group, self._label == version[:2]
            if group is None or not current:
                continue
            began = time.thread_time()
            try:
                self._protect(version, group)
                error = ""
            except (OSError, StorageError, HandshakeRefused, ValueError) as caught:
                error = str(caught) or type(caught).__name__
                self._close_askers(all=True)
            with self._lock:
                current = self._label == version[:2]
            if current:
                if error:
                    log.warning("no parity for step %d: %s", version[2], error)
                told(version[2], time.thread_time() - began, error)
        self._close_askers(all=True)

    def _close_askers(self, all: bool) -> None:
        with self._lock:
            over, self._over = self._over, []
            if all:
                over += self._askers.values()
                self._askers = {}
        for asker in over:
            asker.close()

    def _protect(self, version: Version, group: ParityGroup) -> None:
        others = [p for p in range(len(group.members)) if p != group.position]
        for position in others:
            self._asker(position, version, group).ask(Await(*version))
        sealed: list[Sealed] = [
            self._shelf.await_sealed(version) if p == group.position else self._asker(p, version, group).sealed()
            for p in range(len(group.members))
        ]
        with self._lock:
            if self._label != version[:2]:
                raise SegmentChanged("the view is over")
            segment = min(self._maps, key=_age)

        def reader(position: int) -> Reader:
            return RemoteReader(self._asker(position, version, group), sealed[position].locator)

        write_parity(
            segment,
            version,
            [domain for domain, _ in group.members],
            group.position,
            group.parity,
            [Described(item.payload_bytes, item.index) for item in sealed],
            reader,
        )

    def _asker(self, position: int, version: Version, group: ParityGroup) -> Asker:
        if position not in self._askers:
            asker = Asker(group.members[position][1], self._token, self._stall_s)
            with self._lock:
                if self._label != version[:2]:
                    asker.close()
                    raise SegmentChanged("the view is over")
                self._askers[position] = asker
        return self._askers[position]


def _age(segment: SegmentMap) -> int:
    seal = read_seal(segment)
    return -1 if seal is None else seal.step

"""The segments of one failure domain: made, found, checked, served and released. Never imports torch.

A domain's folder outlives its manager: the next one finds every sealed version there. Any thread.

    NAME.view-EPOCH-NUMBER.SLOT.seg   a trainer's snapshot, in the layout of that view
    NAME.view-EPOCH-NUMBER.SLOT.par   this domain's parity rows of its group
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from everstep.actors.config import SlotsWanted
from everstep.actors.fetch import Sealed
from everstep.collectives.messages import ViewId
from everstep.platform.training.messages import ParityVersion, SealedVersion, Stock
from everstep.storage.errors import SegmentChanged, StorageError
from everstep.storage.index import Source
from everstep.storage.parity import PARITY_SUFFIX, read_parity_index, verify_any
from everstep.storage.segment import (
    Seal,
    SegmentMap,
    create_segment,
    read_index,
    read_index_bytes,
    read_seal,
)

log = logging.getLogger(__name__)

_SUFFIXES = (".seg", PARITY_SUFFIX)
_PARITY_SLOTS = 2  # no snapshot begins before the one before it is protected: one of them is always whole


class DomainShelf:
    """`stall_s` limits how long a version is waited for."""

    def __init__(self, folder: Path, domain: str, stall_s: float) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._domain = domain
        self._stall_s = stall_s
        self._changed = threading.Condition()
        self._sealed: dict[tuple[int, int, int], str] = {}  # epoch, number, step -> file name
        self._view = ViewId(0, 0)  # of the newest slots
        self._released = ViewId(0, 0)  # segments of views below this one are garbage
        self._writing: set[str] = set()  # paths that a checkpoint is being written from
        self._verified: dict[str, Seal] = {}
        self._closed = False

    def close(self) -> None:
        """Whoever waits here stops waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ---- making and releasing ---------------------------------------------------------------------------

    def make(self, name: str, wanted: SlotsWanted) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Segments for a trainer's snapshots and for this domain's parity of them. Raises SegmentError."""
        view = ViewId(*wanted.label)
        with self._changed:
            self._view = max(self._view, view)
            self._changed.notify_all()
        stem = f"{name}.view-{view.epoch}-{view.number}"
        slots = [self._folder / f"{stem}.{wanted.first + i}.seg" for i in range(wanted.count)]
        rows = []
        if wanted.group is not None:
            rows = [self._folder / f"{stem}.{i}{PARITY_SUFFIX}" for i in range(_PARITY_SLOTS)]
        made: list[Path] = []
        try:
            for path in slots:
                create_segment(path, wanted.capacity_bytes)
                made.append(path)
            for path in rows:
                assert wanted.group is not None
                create_segment(path, wanted.group.capacity_bytes)
                made.append(path)
        except StorageError:
            for path in made:
                path.unlink(missing_ok=True)
            raise
        return tuple(map(str, slots)), tuple(map(str, rows))

    def release(self, view: ViewId | None = None) -> None:
        """`view` is protected: segments of older layouts serve nobody any more."""
        if view is not None:
            self._released = max(self._released, view)
        for path in self._files():
            if _view_of(path) < self._released and str(path) not in self._writing:
                path.unlink(missing_ok=True)

    def destroy(self) -> None:
        """Nothing of this domain is left."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def begin_writing(self, path: str) -> None:
        """A checkpoint is being written from a segment: it stays."""
        self._writing.add(path)

    def end_writing(self, path: str) -> None:
        self._writing.discard(path)
        self.release()

    def _files(self) -> Iterator[Path]:
        return (path for path in sorted(self._folder.iterdir()) if path.suffix in _SUFFIXES)

    # ---- what is here -----------------------------------------------------------------------------------

    def stock(self) -> Stock:
        """Every sealed version of this domain, whoever wrote it."""
        versions, parities = [], []
        for path in self._files():
            try:
                with SegmentMap(path, writable=False) as segment:
                    seal = read_seal(segment)
                    if seal is None:
                        continue
                    view = (seal.epoch, seal.number)
                    if path.suffix == PARITY_SUFFIX:
                        parities.append(ParityVersion(view, seal.step, path.name, read_parity_index(segment, seal)))
                        continue
                    index = read_index(segment, seal, Source("segment", self._domain, path.name))
                    versions.append(SealedVersion(view, path.name, index))
            except StorageError as error:
                log.warning("%s is passed over: %s", path.name, error)
        return Stock(tuple(versions), tuple(parities))

    def sealed(self, version: tuple[int, int, int], path: str) -> None:
        """The trainer has sealed (epoch, number, step) there."""
        name = os.path.basename(path)
        with self._changed:
            for old in [old for old, at in self._sealed.items() if at == name]:
                del self._sealed[old]
            self._sealed[version] = name
            self._changed.notify_all()

    # ---- Shelf ------------------------------------------------------------------------------------------

    def resolve(self, locator: str) -> str | None:
        path = self._folder / locator
        known = "/" not in locator and path.suffix in _SUFFIXES and path.is_file()
        return str(path) if known else None

    def verified(self, locator: str) -> None:
        """Raises SegmentDamaged. A version is checked once: sealed memory does not change."""
        path = self._folder / locator
        with SegmentMap(path, writable=False) as segment:
            seal = read_seal(segment)
            if seal is not None and self._verified.get(locator) == seal:
                return
            self._verified[locator] = verify_any(segment)

    def await_sealed(self, version: tuple[int, int, int]) -> Sealed:
        """Raises SegmentChanged where it will not come: its view is over, or it took too long."""
        view = ViewId(*version[:2])
        with self._changed:
            self._changed.wait_for(
                lambda: version in self._sealed or self._closed or self._view > view, self._stall_s
            )
            name = self._sealed.get(version)
            over = self._closed or self._view > view
        told = f"{self._domain}: step {version[2]} of view ({version[0]}, {version[1]})"
        if name is None:
            why = "the view is over" if over else f"not sealed within {self._stall_s:g} s (timeouts.stall_s)"
            raise SegmentChanged(f"{told}: {why}")
        with SegmentMap(self._folder / name, writable=False) as segment:
            seal = read_seal(segment)
            if seal is None or (seal.epoch, seal.number, seal.step) != version:
                raise SegmentChanged(f"{told}: written over")
            return Sealed(name, seal.payload_bytes, read_index_bytes(segment, seal))


def _view_of(path: Path) -> ViewId:
    epoch, number = path.name.rsplit(".view-", 1)[1].split(".")[0].split("-")
    return ViewId(int(epoch), int(number))

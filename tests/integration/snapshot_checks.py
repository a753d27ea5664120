"""What segments hold, and what they take, seen from outside of the processes that write them. Not a test module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from everstep.platform.training.layout import Run
from everstep.storage.errors import StorageError
from everstep.storage.index import Source
from everstep.storage.parity import PARITY_SUFFIX, Part, parity_capacity, verify_any
from everstep.storage.segment import Seal, SegmentMap, payload, read_index, read_seal, required_bytes, sizes_of
from integration.snapshot_writer import METAS, NUMEL, State, content


class Local:
    """A segment in this process, as storage/parity.py reads it."""

    def __init__(self, segment: SegmentMap) -> None:
        self._segment = segment
        self._parts: list[Part] = []

    def ask(self, parts: Sequence[Part]) -> None:
        self._parts += parts

    def read(self, into: memoryview) -> None:
        part = self._parts.pop(0)
        with payload(self._segment, part.offset, part.nbytes) as data:
            into[:] = data


def verified(path: Path) -> Seal | None:
    """The seal of a segment whose every byte is right; None without one. Parity that was just being written is looked
    at again: its manager may live."""
    if not path.stat().st_size:
        return None  # its manager was killed before it had memory for it
    with SegmentMap(path, writable=False) as segment:
        while (seal := read_seal(segment)) is not None:
            try:
                verify_any(segment)
                _check_content(segment, seal)
            except (StorageError, AssertionError):
                if read_seal(segment) == seal:
                    raise
                continue
            return seal
    return None


def _check_content(segment: SegmentMap, seal: Seal) -> None:
    path = Path(segment.path)
    assert f".view-{seal.epoch}-{seal.number}." in path.name
    if path.suffix == PARITY_SUFFIX:
        return
    index = read_index(segment, seal, Source("segment", "", ""))
    bases = {meta.name: number * NUMEL for number, meta in enumerate(METAS)}
    for f in index.fragments:
        if f.stop > f.start:
            wanted = content(seal.step, bases[f.name] + f.start, bases[f.name] + f.stop)
            with payload(segment, f.offset, 8 * (f.stop - f.start)) as data:
                assert data == memoryview(wanted.numpy()).cast("B"), f"{path.name}: {f.name}[{f.start}:{f.stop}]"


def allocated_bytes(folder: Path) -> int:
    """What the segments in a run's folder take of shared memory."""
    found = 0
    for path in folder.glob("*/*"):
        if path.suffix in (".seg", PARITY_SUFFIX):
            try:
                found += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue  # released just now
    return found


def layout_bytes(owned: Sequence[Sequence[Run]], parity: int, slots: int) -> int:
    """Of one layout's segments in all domains: each has that many slots, and two parity segments."""
    state = State()
    pieces = [list(state.footprint(runs)) for runs in owned]
    rows = parity_capacity([sizes_of(item) for item in pieces], parity)
    return sum(slots * required_bytes(item) + 2 * rows for item in pieces)

"""What is decoded from parity is checked against the checksums of the lost domain, also where a part is wanted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from everstep.actors.sources import Copies, Sources
from everstep.platform.training.messages import Rebuild
from everstep.storage.errors import SegmentDamaged
from everstep.storage.index import Source, StateIndex, TensorMeta
from everstep.storage.parity import Described, Part, parity_capacity, write_parity
from everstep.storage.planner import Want, plan
from everstep.storage.segment import (
    SEAL_BYTES,
    SegmentMap,
    Writer,
    create_segment,
    payload,
    read_index,
    read_index_bytes,
    read_seal,
    required_bytes,
    sizes_of,
)

LOST, SIZE, CUT = 1, 3000, 1000
BYTES = [random.Random(n).randbytes(SIZE) for n in range(3)]
FROM_PARITY = Source("parity", "slot-1", "view-1-1.step-7")


class _Reader:
    def __init__(self, segment: SegmentMap) -> None:
        self._segment = segment
        self._parts: list[Part] = []

    def ask(self, parts: list[Part]) -> None:
        self._parts += parts

    def read(self, into: memoryview) -> None:
        part = self._parts.pop(0)
        with payload(self._segment, part.offset, part.nbytes) as data:
            into[:] = data


def group(folder: Path, flip: int | None = None) -> tuple[Rebuild, StateIndex]:
    """Three payloads with XOR parity, of which the second is lost; `flip`: its byte that changes before that."""
    maps, described = [], []
    for n, data in enumerate(BYTES):
        meta = TensorMeta(f"w{n}", "param", "uint8", (SIZE,))
        pieces = [(meta, 0, CUT), (meta, CUT, SIZE)]
        create_segment(folder / f"{n}.seg", required_bytes(pieces))
        maps.append(SegmentMap(folder / f"{n}.seg", writable=True))
        writer = Writer(maps[-1])
        writer.begin()
        offsets = [writer.put(*piece, data[piece[1] : piece[2]]) for piece in pieces]
        seal = writer.seal(1, 1, 7)
        described.append(Described(seal.payload_bytes, read_index_bytes(maps[-1], seal)))
        if n == LOST:
            index = read_index(maps[-1], seal, FROM_PARITY)
            if flip is not None:
                maps[-1].memory[SEAL_BYTES + offsets[flip >= CUT] + flip - (CUT if flip >= CUT else 0)] ^= 1
    capacity = parity_capacity([sizes_of(pieces)] * 3, 1)
    for n in range(3):
        create_segment(folder / f"{n}.par", capacity)
        with SegmentMap(folder / f"{n}.par", writable=True) as rows:
            readers = {p: _Reader(segment) for p, segment in enumerate(maps)}
            write_parity(rows, (1, 1, 7), ["slot-0", "slot-1", "slot-2"], n, 1, described, readers.__getitem__)
            assert read_seal(rows) is not None
    for segment in maps:
        segment.close()

    def left(suffix: str) -> tuple[tuple[str, str], ...]:
        return tuple(("own", f"{n}{suffix}") if n != LOST else ("", "") for n in range(3))

    sizes = tuple(item.payload_bytes for item in described)
    return Rebuild("slot-1", FROM_PARITY.locator, LOST, 1, sizes, left(".seg"), left(".par")), index


def fill(folder: Path, found: tuple[Rebuild, StateIndex], *ranges: tuple[int, int]) -> tuple[Copies, Sources]:
    wants = [Want("w1", "param", start, stop, "me") for start, stop in ranges]
    copies = [(c, memoryview(bytearray(c.nbytes))) for c in plan(found[1], wants, lambda source, want: 1)]
    sources = Sources("own", folder, "token")
    sources.fill(copies, {}, "", [found[0]], lambda: None)
    return copies, sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "ranges",
    [[(0, SIZE)], [(0, 1)], [(999, 1001)], [(1200, 1300), (10, 20)], [(0, 1000), (2000, 3000), (1100, 1101)]],
)
def test_any_part_of_a_lost_payload_is_decoded(folder: Path, ranges: list[tuple[int, int]]) -> None:
    copies, sources = fill(folder, group(folder / "own"), *ranges)
    for copy, buffer in copies:
        assert bytes(buffer) == BYTES[LOST][copy.start : copy.stop]
    assert sum(copy.nbytes for copy, _ in copies) == sum(stop - start for start, stop in ranges)
    assert not sources.damaged


@pytest.mark.parametrize("flip", [1000, 1250, 2999])
def test_parity_of_damaged_bytes_is_not_believed(folder: Path, flip: int) -> None:
    """Its own checksums are right: those of the lost segment's index tell, also for a part without the damage."""
    found = group(folder / "own", flip)
    with pytest.raises(SegmentDamaged, match="wrong checksum"):
        fill(folder, found, (1200, 1300))
    copies, _ = fill(folder, found, (0, 900))
    assert bytes(copies[0][1]) == BYTES[LOST][:900]

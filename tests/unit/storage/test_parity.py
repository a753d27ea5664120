"""Every loss that a group promises to survive, and what a damaged or torn segment does; without sockets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage.errors import SegmentDamaged
from everstep.storage.index import Source, TensorMeta
from everstep.storage.parity import (
    Described,
    Part,
    can_rebuild,
    parity_capacity,
    read_parity_index,
    rebuild,
    verify_any,
    write_parity,
)
from everstep.storage.segment import (
    SegmentMap,
    Writer,
    create_segment,
    decode_index,
    payload,
    read_index_bytes,
    read_seal,
    required_bytes,
    sizes_of,
)
from everstep.storage.stripes import Stripes

VERSION = (1, 2, 7)


class Local:
    """A reader of a segment in this process, which insists on being asked in order."""

    def __init__(self, segment: SegmentMap) -> None:
        self.segment = segment
        self.parts: list[Part] = []
        self.read_bytes = 0

    def ask(self, parts: Sequence[Part]) -> None:
        self.parts += parts

    def read(self, into: memoryview) -> None:
        part = self.parts.pop(0)
        assert len(into) == part.nbytes > 0
        self.read_bytes += part.nbytes
        with payload(self.segment, part.offset, part.nbytes) as data:
            into[:] = data


class Group:
    """Segments of random bytes of some sizes, and their parity segments."""

    def __init__(self, folder: Path, sizes: Sequence[int], parity: int, seed: int = 0) -> None:
        self.sizes, self.parity = sizes, parity
        self.bytes = [random.Random((seed, i).__hash__()).randbytes(size) for i, size in enumerate(sizes)]
        self.data: list[SegmentMap] = []
        self.rows: list[SegmentMap] = []
        self.names = [f"slot-{i}" for i in range(len(sizes))]
        pieces = [[(TensorMeta(f"w{i}", "param", "uint8", (size,)), 0, size)] for i, size in enumerate(sizes)]
        for i, piece in enumerate(pieces):
            create_segment(folder / f"{i}.seg", required_bytes(piece))
            self.data.append(SegmentMap(folder / f"{i}.seg", writable=True))
            writer = Writer(self.data[-1])
            writer.begin()
            writer.put(*piece[0], self.bytes[i])
            writer.seal(*VERSION)
        described = []
        for segment in self.data:
            seal = read_seal(segment)
            assert seal is not None
            described.append(Described(seal.payload_bytes, read_index_bytes(segment, seal)))
        capacity = parity_capacity([sizes_of(piece) for piece in pieces], parity)
        self.readers: list[dict[int, Local]] = []
        for i in range(len(sizes)):
            create_segment(folder / f"{i}.par", capacity)
            self.rows.append(SegmentMap(folder / f"{i}.par", writable=True))
            readers = {p: Local(self.data[p]) for p in range(len(sizes))}
            write_parity(self.rows[-1], VERSION, self.names, i, parity, described, readers.__getitem__)
            assert not any(reader.parts for reader in readers.values()), "more was asked for than was read"
            self.readers.append(readers)

    def rebuilt(self, lost: int, gone: set[int], ranges: Sequence[tuple[int, int]] | None = None) -> list[bytes]:
        seal = read_seal(self.rows[min(set(range(len(self.sizes))) - gone)])
        assert seal is not None
        index = read_parity_index(self.rows[min(set(range(len(self.sizes))) - gone)], seal)
        left = [p for p in range(len(self.sizes)) if p not in gone]
        buffers = [(a, bytearray(b - a)) for a, b in (ranges or [(0, self.sizes[lost])])]
        rebuild(
            index.stripes,
            lost,
            {p: Local(self.data[p]) for p in left},
            {p: Local(self.rows[p]) for p in left},
            [(a, memoryview(buffer)) for a, buffer in buffers],
        )
        return [bytes(buffer) for _, buffer in buffers]

    def close(self) -> None:
        for segment in [*self.data, *self.rows]:
            segment.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize(("n", "m"), [(n, m) for n in range(2, 9) for m in range(1, min(4, n))])
def test_every_loss_of_up_to_m_domains_is_rebuilt(folder: Path, n: int, m: int) -> None:
    sizes = [random.Random(n * 10 + m + i).randrange(0, 3000) for i in range(n)]
    group = Group(folder, sizes, m)
    for count in range(1, m + 1):
        for gone in itertools.combinations(range(n), count):
            for lost in gone:
                assert group.rebuilt(lost, set(gone)) == [group.bytes[lost]], (gone, lost)
    group.close()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes_and_ranges(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 6))
    m = data.draw(st.integers(1, n - 1))
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 63, 64, 65, 4096, 70_001, 2_300_000]), min_size=n, max_size=n))
    group = Group(tmp_path_factory.mktemp("group"), sizes, m)
    gone = set(data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, m))])
    lost = data.draw(st.sampled_from(sorted(gone)))
    cuts = sorted(data.draw(st.lists(st.integers(0, sizes[lost]), max_size=4)))
    ranges = list(itertools.pairwise(cuts))
    assert group.rebuilt(lost, gone, ranges or [(0, 0)]) == [group.bytes[lost][a:b] for a, b in ranges or [(0, 0)]]
    group.close()


def test_memory_and_traffic_are_even_and_the_least(folder: Path) -> None:
    n, m, size = 6, 2, 4 * 1024 * 64
    group = Group(folder, [size] * n, m)
    seals = [read_seal(segment) for segment in group.rows]
    assert [seal.payload_bytes for seal in seals if seal is not None] == [m * size // (n - m)] * n
    taken = [sum(reader.read_bytes for reader in readers.values()) for readers in group.readers]
    given_ = [sum(readers[p].read_bytes for readers in group.readers) for p in range(n)]
    assert taken == given_ == [m * size] * n
    group.close()


def test_padding_is_neither_kept_nor_sent(folder: Path) -> None:
    group = Group(folder, [64 * 300, 0, 10], 1)
    stripes = Stripes((64 * 300, 0, 10), 1)
    assert stripes.chunk_bytes == 64 * 150
    taken = sum(reader.read_bytes for readers in group.readers for reader in readers.values())
    assert taken == 64 * 300 + 10
    group.close()


def test_one_loss_more_than_parity_is_known_to_be_too_much() -> None:
    for n in range(2, 9):
        for m in range(1, min(4, n)):
            stripes = Stripes((1000,) * n, m)
            for gone in itertools.combinations(range(n), m + 1):
                left = [p not in gone for p in range(n)]
                assert not all(can_rebuild(stripes, lost, left, left) for lost in gone)


def test_survivors_know_what_the_lost_one_held(folder: Path) -> None:
    group = Group(folder, [500, 70, 9], 1)
    seal = read_seal(group.rows[1])
    assert seal is not None
    index = read_parity_index(group.rows[1], seal)
    assert index.members == tuple(group.names)
    source = Source("parity", "slot-2", "x")
    (fragment,) = decode_index(index.indexes[2], 7, index.payloads[2], source, "x").fragments
    assert (fragment.name, fragment.stop, fragment.source) == ("w2", 9, source)
    group.close()


@pytest.mark.parametrize("kind", ["seg", "par"])
def test_a_flipped_bit_anywhere_is_found(folder: Path, kind: str) -> None:
    group = Group(folder, [3000, 2000, 1000], 1)
    segment = (group.data if kind == "seg" else group.rows)[0]
    seal = verify_any(segment)
    for at in random.Random(1).sample(range(seal.payload_bytes), 25):
        with payload(segment, at, 1) as byte:
            byte[0] ^= 0x10
            with pytest.raises(SegmentDamaged, match=r"(does|do) not match"):
                verify_any(segment)
            byte[0] ^= 0x10
    verify_any(segment)
    group.close()


def test_a_reader_that_fails_leaves_the_parity_unsealed(folder: Path) -> None:
    group = Group(folder, [3000, 2000, 1000], 1)

    class Broken(Local):
        def read(self, into: memoryview) -> None:
            raise ConnectionError("gone")

    described = [Described(size, b"") for size in group.sizes]
    with pytest.raises(ConnectionError):
        write_parity(group.rows[0], VERSION, group.names, 0, 1, described, lambda p: Broken(group.data[p]))
    assert read_seal(group.rows[0]) is None
    group.close()

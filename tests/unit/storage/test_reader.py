"""The reader beside a reference that copies element by element."""

import itertools
import threading

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from everstep.storage import blocks as blocks_module
from everstep.storage import read_plan, reader
from everstep.storage.blocks import Blocks
from everstep.storage.errors import IndexInvalid, StoreUnavailable
from everstep.storage.index import Source
from everstep.storage.planner import Copy, Region, Want
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Folder

BLOCK = 64
SIZE = 3 * 1024 + 17


class Damaged(Exception):
    pass


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Blocks of 64 bytes, so that a small file has many, and all else in proportion."""
    for module in (blocks_module, read_plan, reader):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(read_plan, "_HOLE_BYTES", 8)
    monkeypatch.setattr(read_plan, "_DIRECT_BYTES", 24)
    monkeypatch.setattr(reader, "REQUEST_BYTES", 4 * BLOCK)
    monkeypatch.setattr(reader, "_LOCAL_REQUEST_BYTES", BLOCK)
    monkeypatch.setattr(reader, "_LOCAL_PIECE_BYTES", 24)


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(7).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, content):
    for name in ("f", "g"):
        (tmp_path / name).write_bytes(content.tobytes())
    return folder_at(tmp_path)


class Spying(type(folder_at("/").store)):
    open_file = None  # every read is seen

    """The local store, which keeps what it was asked; `far`: it looks like a bucket's."""

    def __init__(self, far=False):
        super().__init__()
        self.url = "s3://far" if far else ""
        self.reads = []

    def read_into(self, path, offset, out):
        self.reads.append((path.rpartition("/")[2], offset, offset + len(out)))
        return super().read_into(path, offset, out)


def sums(data):
    data = data.tobytes()
    return Blocks(len(data), tuple(xxhash.xxh3_64_intdigest(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)))


def flat(file, offset, nbytes, itemsize=1):
    return Copy("t", "param", 0, nbytes // itemsize, Source("file", "", file), offset, nbytes, "me", ())


def region(file, offset, extents, strides, itemsize, target, target_strides):
    count = int(np.prod(extents, dtype=np.int64))
    want = Want("t", "param", 0, count, "me", tuple((0, n) for n in extents))
    where = Region(tuple((0, n) for n in extents), tuple(strides), want, target, tuple(target_strides))
    return Copy("t", "param", 0, count, Source("file", "", file), offset, count * itemsize, "me", (), where)


def reference(copy, content, memory):
    """Puts what the copy is to bring into `memory`, one element at a time."""
    if copy.region is None:
        memory[:] = content[copy.offset : copy.offset + copy.nbytes]
        return
    size = copy.itemsize
    for place in itertools.product(*(range(n) for _, n in copy.region.box)):
        at = copy.offset + sum(i * s for i, s in zip(place, copy.region.strides, strict=True)) * size
        to = (copy.region.target + sum(i * s for i, s in zip(place, copy.region.target_strides, strict=True))) * size
        memory[to : to + size] = content[at : at + size]


def told(file, first, end):
    return Damaged(file, first, end)


@st.composite
def regions(draw):
    """A box of a fused, padded or transposed array in the file, to the box in its want's memory."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    extents = draw(st.lists(st.integers(1, 6), max_size=3))
    padding = [draw(st.integers(0, 9)) for _ in extents]
    order = draw(st.permutations(range(len(extents))))
    strides = [0] * len(extents)
    step = draw(st.integers(1, 3))
    for dim in order:
        strides[dim] = step
        step = (step * extents[dim]) + padding[dim]
    target_step, target_strides = 1, [0] * len(extents)
    for dim in reversed(range(len(extents))):
        target_strides[dim] = target_step
        target_step *= extents[dim] + draw(st.integers(0, 1))
    span = (sum((n - 1) * s for n, s in zip(extents, strides, strict=True)) + 1) * size
    if span > SIZE:
        extents, strides, target_strides, span = [], [], [], size
    offset = draw(st.integers(0, SIZE - span))
    target = draw(st.integers(0, 2))
    length = (target + sum((n - 1) * s for n, s in zip(extents, target_strides, strict=True)) + 1) * size
    file = draw(st.sampled_from(["f", "g"]))
    return region(file, offset, extents, strides, size, target, target_strides), length + draw(
        st.integers(0, 2)
    ) * size


@st.composite
def flats(draw):
    first, end = sorted((draw(st.integers(0, SIZE)), draw(st.integers(0, SIZE))))
    return flat(draw(st.sampled_from(["f", "g"])), first, end - first), end - first


copies_of = st.lists(st.one_of(flats(), regions()), max_size=8)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(copies_of, st.integers(1, 4), st.sampled_from([1, 100, 1 << 20]), st.booleans(), st.booleans())
def test_every_target_gets_its_bytes_and_no_others(folder, content, copies, threads, memory_bytes, verified, far):
    store = Spying(far)
    files = dict.fromkeys("fg", sums(content) if verified else None)
    got = [np.full(length, 99, np.uint8) for _, length in copies]
    expected = [np.full(length, 99, np.uint8) for _, length in copies]
    for (copy, _), memory in zip(copies, expected, strict=True):
        reference(copy, content, memory)
    heard = []
    reader.read_copies(
        Folder(store, folder.path), files,
        [(copy, memoryview(memory)) for (copy, _), memory in zip(copies, got, strict=True)],
        threads=threads, memory_bytes=memory_bytes, on_bytes=heard.append, damaged=told,
    )  # fmt: skip
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.tobytes() == b.tobytes(), copies[i]
    assert sum(heard) == sum(end - first for _, first, end in store.reads)
    for file in "fg":
        spans = sorted((first, end) for name, first, end in store.reads if name == file)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "bytes were read twice"
        wanted = {b for copy, _ in copies if copy.source.locator == file for b in blocks_of(copy)}
        if verified:
            assert {b for first, end in spans for b in range(first // BLOCK, -(-end // BLOCK))} == wanted


def blocks_of(copy):
    """The blocks that some of the copied bytes are in."""
    touched = np.zeros(SIZE, np.uint8)
    if copy.region is None:
        touched[copy.offset : copy.offset + copy.nbytes] = 1
    else:
        size = copy.itemsize
        for place in itertools.product(*(range(n) for _, n in copy.region.box)):
            at = copy.offset + sum(i * s for i, s in zip(place, copy.region.strides, strict=True)) * size
            touched[at : at + size] = 1
    return set((np.flatnonzero(touched) // BLOCK).tolist())


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_flipped_bit_in_any_block_that_is_read_is_found(folder, content, tmp_path, threads, far):
    files = {"f": sums(content), "g": sums(content)}
    data = bytearray(content.tobytes())
    for at in range(0, SIZE, 37):
        data[at] ^= 4
        (tmp_path / "f").write_bytes(data)
        data[at] ^= 4
        block = (at // BLOCK * BLOCK, min((at // BLOCK + 1) * BLOCK, SIZE))
        here = Folder(Spying(far), folder.path)
        targets = [(flat("f", 0, SIZE), memoryview(bytearray(SIZE)))]
        with pytest.raises(Damaged) as caught:
            reader.read_copies(here, files, targets, threads=threads, damaged=told)
        assert caught.value.args == ("f", *block)
        with pytest.raises(Damaged):
            reader.verify_blocks(here, files, threads=threads, damaged=told)
        others = [
            (flat("f", 0, block[0]), memoryview(bytearray(block[0]))),
            (flat("f", block[1], SIZE - block[1]), memoryview(bytearray(SIZE - block[1]))),
        ]
        reader.read_copies(here, files, others, threads=threads, damaged=told)


@pytest.mark.parametrize("verified", [False, True])
def test_a_file_that_ends_early_or_is_gone(folder, content, tmp_path, verified):
    files = {"f": sums(content) if verified else None}
    target = [(flat("f", 1000, 1500), memoryview(bytearray(1500)))]
    (tmp_path / "f").write_bytes(content[:1700].tobytes())
    with pytest.raises(Damaged) as caught:
        reader.read_copies(folder, files, target, threads=1, damaged=told)
    _, first, end = caught.value.args
    assert first <= 1700 < end
    (tmp_path / "f").unlink()
    with pytest.raises(Damaged):
        reader.read_copies(folder, files, target, damaged=told)


def test_a_store_that_fails_is_no_damage_and_ends_every_thread(folder, content):
    class Failing(Spying):
        def read_into(self, path, offset, out):
            if offset > 500:
                raise StoreUnavailable("no answer")
            return super().read_into(path, offset, out)

    store = Failing()
    before = threading.active_count()
    with pytest.raises(StoreUnavailable):
        reader.verify_blocks(Folder(store, folder.path), {"f": sums(content)}, threads=4, damaged=told)
    assert threading.active_count() == before
    assert len(store.reads) < SIZE // 24


def test_neighbours_share_a_request_and_rows_of_a_wide_array_are_read_alone(folder, content):
    far = Spying(far=True)
    small = [(flat("f", 100 + 10 * i, 9), memoryview(bytearray(9))) for i in range(12)]
    reader.read_copies(Folder(far, folder.path), {"f": sums(content)}, small, damaged=told)
    assert far.reads == [("f", 64, 256)]
    far.reads.clear()
    reader.read_copies(Folder(far, folder.path), {"f": None}, small, damaged=told)
    assert far.reads == [("f", 100, 219)]
    far.reads.clear()
    column = region("f", 0, (10, 4), (200, 1), 1, 0, (4, 1))
    reader.read_copies(Folder(far, folder.path), {"f": None}, [(column, memoryview(bytearray(40)))], damaged=told)
    assert sorted(far.reads) == [("f", 200 * i, 200 * i + 4) for i in range(10)]
    far.reads.clear()
    half = region("f", 0, (10, 100), (200, 1), 1, 0, (100, 1))
    reader.read_copies(Folder(far, folder.path), {"f": None}, [(half, memoryview(bytearray(1000)))], damaged=told)
    assert sum(end - first for _, first, end in far.reads) == 1900


def test_what_is_long_is_read_straight_into_its_target(folder, content, monkeypatch):
    taken = []
    honest = bytearray

    def counted(size=b""):
        taken.append(size)
        return honest(size)

    monkeypatch.setattr(reader, "bytearray", counted, raising=False)
    targets = [(flat("f", i * 500, 500), memoryview(honest(500))) for i in range(6)]
    targets.append((flat("f", 3000, SIZE - 3000), memoryview(honest(SIZE - 3000))))
    reader.read_copies(folder, {"f": sums(content)}, targets, threads=1, damaged=told)
    assert sum(size for size in taken if size != b"") == 0
    for copy, memory in targets:
        assert bytes(memory) == content[copy.offset : copy.offset + copy.nbytes].tobytes()


def test_memory_is_bounded_whatever_is_read(folder, content, monkeypatch):
    taken = []
    honest = bytearray

    def counted(size=b""):
        taken.append(0 if size == b"" else size)
        return honest(size)

    monkeypatch.setattr(reader, "bytearray", counted, raising=False)
    far = Folder(Spying(far=True), folder.path)
    for memory_bytes, most in ((1, BLOCK), (3 * BLOCK, 3 * BLOCK), (100 * BLOCK, 16 * BLOCK)):
        taken.clear()
        reader.verify_blocks(
            far, {"f": sums(content)}, threads=4, memory_bytes=memory_bytes, damaged=told
        )  # fmt: skip
        assert 0 < sum(taken) <= most


def test_copies_that_cannot_be_are_refused_before_anything_is_read(content, folder):
    store = Spying()
    files = {"f": sums(content)}
    memory = memoryview(bytearray(40))
    for copy, target in (
        (flat("h", 0, 40), memory),
        (flat("f", -1, 40), memory),
        (flat("f", SIZE - 39, 40), memory),
        (flat("f", 0, 41), memory),
        (flat("f", 0, 40), memory.toreadonly()),
        (region("f", SIZE - 39, (40,), (1,), 1, 0, (1,)), memory),
        (region("f", 0, (40,), (1,), 1, 1, (1,)), memory),
        (replace(region("f", 0, (2, 2), (2, 1), 1, 0, (2, 1)), stop=2), memory),
        (region("f", 0, (2, 2), (1,), 1, 0, (2, 1)), memory),
        (region("f", 0, (2, 2), (0, 1), 1, 0, (2, 1)), memory),
        (region("f", 0, (2, 2), (2, -1), 1, 0, (2, 1)), memory),
        (region("f", 0, (2, 2), (2, 1), 1, -1, (2, 1)), memory),
    ):
        with pytest.raises(IndexInvalid):
            reader.read_copies(Folder(store, folder.path), files, [(copy, target)], damaged=told)
    assert store.reads == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_store_that_opens_files_is_asked_once_a_file_and_thread(folder, content, threads):
    opened, closed = [], []

    class Opened:
        def __init__(self, store, path):
            self.store, self.path = store, path

        def read_into(self, offset, out):
            return self.store.read_into(self.path, offset, out)

        def close(self):
            closed.append(self.path)

    class Opening(Spying):
        def open_file(self, path):
            self.size(path)
            opened.append(path)
            return Opened(self, path)

    here = Folder(Opening(), folder.path)
    files = {"f": sums(content), "g": sums(content)}
    memory = [memoryview(bytearray(SIZE)) for _ in files]
    targets = [(flat(file, 0, SIZE), target) for file, target in zip(files, memory, strict=True)]
    reader.read_copies(here, files, targets, threads=threads, damaged=told)
    assert all(bytes(target) == content.tobytes() for target in memory)
    assert len(opened) <= 2 * threads
    assert sorted(opened) == sorted(closed)
    with pytest.raises(Damaged):
        reader.verify_blocks(here, {"gone": sums(content)}, threads=threads, damaged=told)
    wrong = Blocks(SIZE, tuple(checksum ^ 1 for checksum in sums(content).checksums))
    with pytest.raises(Damaged):
        reader.verify_blocks(here, {"f": wrong}, threads=threads, damaged=told)
    assert sorted(opened) == sorted(closed)

import os
import random
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep.storage.errors import (
    IndexInvalid,
    SegmentChanged,
    SegmentDamaged,
    SegmentError,
    SegmentFull,
)
from everstep.storage.index import Source, TensorMeta
from everstep.storage.segment import (
    SEAL_BYTES,
    Seal,
    SegmentMap,
    Writer,
    create_segment,
    payload,
    read_index,
    read_range,
    read_seal,
    required_bytes,
    verify,
)

W = TensorMeta("w", "param", "float32", (40,))
STEP = TensorMeta("w", "step", "float32", (), python=True)
SOURCE = Source("segment", "domain-0", "seg-0")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "segment"


def written(path: Path, step: int = 7, fill: int = 1) -> tuple[SegmentMap, Seal]:
    """A sealed segment with W in two pieces and STEP."""
    if not path.exists():
        create_segment(path, required_bytes([(W, 0, 13), (W, 13, 40), (STEP, 0, 1)]))
    segment = SegmentMap(path, writable=True)
    writer = Writer(segment)
    writer.begin()
    writer.put(W, 0, 13, bytes([fill]) * 52)
    writer.put(W, 13, 40, bytes([fill + 1]) * 108)
    writer.put(STEP, 0, 1, bytes([fill + 2]) * 4)
    return segment, writer.seal(3, 5, step)


def test_what_is_written_is_read(path):
    segment, seal = written(path)
    with segment, SegmentMap(path, writable=False) as reader:
        assert read_seal(reader) == seal
        assert (seal.epoch, seal.number, seal.step) == (3, 5, 7)
        index = read_index(reader, seal, SOURCE)
        assert index.step == 7
        assert index.tensors == (W, STEP)
        assert index.missing() == []
        assert [(f.start, f.stop, f.source) for f in index.fragments] == [
            (0, 13, SOURCE),
            (13, 40, SOURCE),
            (0, 1, SOURCE),
        ]
        assert all(f.offset % 64 == 0 for f in index.fragments)
        parts = [read_range(reader, seal, f.offset, (f.stop - f.start) * 4) for f in index.fragments]
        assert parts == [b"\1" * 52, b"\2" * 108, b"\3" * 4]
        assert bytes(payload(reader, index.fragments[1].offset, 8)) == b"\2" * 8
        assert verify(reader) == seal


def test_a_segment_is_its_owners_only_and_all_its_memory_is_there(path):
    create_segment(path, 3 * 4096)
    info = path.stat()
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert info.st_size == 3 * 4096
    assert info.st_blocks * 512 >= 3 * 4096
    with SegmentMap(path, writable=False) as segment:
        assert read_seal(segment) is None
        with pytest.raises(SegmentDamaged, match="not sealed"):
            verify(segment)
        with pytest.raises(SegmentError, match="read-only"):
            Writer(segment)


def test_a_full_device_is_an_error_that_leaves_nothing(path):
    with pytest.raises(SegmentError, match=r"takes \d+ bytes.*free|cannot allocate"):
        create_segment(path, 1 << 60)
    assert not path.exists()


def test_files_that_cannot_be_segments_are_refused(path):
    with pytest.raises(SegmentError, match="No such file"):
        SegmentMap(path, writable=False)
    with pytest.raises(SegmentError, match="capacity"):
        create_segment(path, SEAL_BYTES)
    path.write_bytes(b"x" * SEAL_BYTES)
    with pytest.raises(SegmentError, match="no segment"):
        SegmentMap(path, writable=False)
    with pytest.raises(SegmentError, match="File exists"):
        create_segment(path, 2 * SEAL_BYTES)
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(SegmentError):
        SegmentMap(link, writable=True)


def test_a_seal_is_gone_from_begin_to_seal(path):
    segment, seal = written(path)
    with segment:
        writer = Writer(segment)
        writer.begin()
        assert read_seal(segment) is None
        with pytest.raises(SegmentChanged, match="there is nothing sealed"):
            read_range(segment, seal, 0, 4)
        with pytest.raises(SegmentChanged):
            read_index(segment, seal, SOURCE)
        writer.put(W, 0, 40, bytes(160))
        assert read_seal(segment) is None
        again = writer.seal(3, 5, 8)
        assert read_seal(segment) == again
        with pytest.raises(SegmentChanged, match="step 8"):
            read_range(segment, seal, 0, 4)


def test_a_writer_that_has_not_begun_writes_nothing(path):
    segment, seal = written(path)
    with segment:
        writer = Writer(segment)
        with pytest.raises(SegmentError, match="before begin"):
            writer.put(W, 0, 40, bytes(160))
        with pytest.raises(SegmentError, match="before begin"):
            writer.seal(1, 1, 1)
        assert verify(segment) == seal


def test_a_reader_that_is_overtaken_in_the_middle_of_its_copy_notices(path, monkeypatch):
    from everstep.storage import segment as module

    segment, seal = written(path)
    with segment:
        honest = module.payload

        def overtaken(*args):
            view = honest(*args)
            other, _ = written(path, step=8, fill=100)
            other.close()
            return view

        monkeypatch.setattr(module, "payload", overtaken)
        with pytest.raises(SegmentChanged):
            read_range(segment, seal, 0, 52)


@pytest.mark.parametrize("before", ["cleared", "older"])
def test_a_seal_torn_at_any_byte_is_no_seal(path, before):
    segment, _ = written(path, step=6, fill=9)
    with segment:
        older = bytes(segment.memory[:SEAL_BYTES])
    segment, seal = written(path)
    with segment:
        whole = bytes(segment.memory[:SEAL_BYTES])
        base = older if before == "older" else bytes(SEAL_BYTES)
        length = len(whole.rstrip(b"\0"))
        for torn_at in [*range(length + 8), SEAL_BYTES]:
            header = whole[:torn_at] + base[torn_at:]
            segment.memory[:SEAL_BYTES] = header
            held = read_seal(segment)
            if held is not None:
                assert header in (whole, older)
        segment.memory[:SEAL_BYTES] = whole
        assert read_seal(segment) == seal


def test_clearing_that_is_torn_at_any_byte_leaves_no_seal(path):
    segment, _ = written(path)
    with segment:
        whole = bytes(segment.memory[:SEAL_BYTES])
        for torn_at in range(1, len(whole.rstrip(b"\0"))):
            segment.memory[:SEAL_BYTES] = bytes(torn_at) + whole[torn_at:]
            assert read_seal(segment) is None


def test_any_flipped_bit_of_the_header_unseals(path):
    segment, seal = written(path)
    with segment:
        whole = bytes(segment.memory[:128])
        for bit in range(len(whole.rstrip(b"\0")) * 8):
            header = bytearray(whole)
            header[bit // 8] ^= 1 << bit % 8
            segment.memory[:128] = bytes(header)
            assert read_seal(segment) is None
        segment.memory[:128] = whole
        assert read_seal(segment) == seal


def test_flipped_bytes_are_named(path):
    segment, seal = written(path)
    with segment:
        index = read_index(segment, seal, SOURCE)
        second = index.fragments[1]
        segment.memory[SEAL_BYTES + second.offset + 100] ^= 1
        with pytest.raises(SegmentDamaged, match=r"elements 13:40 of 'w' \(param\)"):
            verify(segment)
        segment.memory[SEAL_BYTES + second.offset + 100] ^= 1
        for at in range(seal.index_bytes):
            segment.memory[SEAL_BYTES + seal.index_offset + at] ^= 0x40
            with pytest.raises(SegmentDamaged, match="index"):
                verify(segment)
            segment.memory[SEAL_BYTES + seal.index_offset + at] ^= 0x40
        assert verify(segment) == seal


def test_ranges_outside_are_refused(path):
    segment, seal = written(path)
    with segment:
        for offset, length in (
            (-1, 4),
            (0, -1),
            (0, seal.payload_bytes + 1),
            (seal.payload_bytes, 1),
            (2**62, 4),
        ):
            with pytest.raises(SegmentError, match="bytes"):
                read_range(segment, seal, offset, length)
        with pytest.raises(SegmentError):
            payload(segment, 0, segment.size)


def test_what_does_not_fit_or_does_not_belong_is_refused(path):
    create_segment(path, 2 * SEAL_BYTES)
    big = TensorMeta("big", "param", "int8", (5000,))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        with pytest.raises(SegmentFull, match="5000 bytes"):
            writer.put(big, 0, 5000, bytes(5000))
        for start, stop, size in ((0, 41, 164), (-1, 3, 16), (3, 1, 0), (0, 4, 15)):
            with pytest.raises(IndexInvalid, match="'w'"):
                writer.put(W, start, stop, bytes(size))
        writer.put(W, 0, 4, bytes(16))
        with pytest.raises(IndexInvalid, match="before"):
            writer.put(TensorMeta("w", "param", "float32", (41,)), 4, 5, bytes(4))
        writer.put(big, 0, 4000, bytes(4000))
        with pytest.raises(SegmentFull):
            writer.seal(1, 1, 1)
        assert read_seal(segment) is None


def test_a_full_write_fits_exactly_what_was_asked_for(path):
    metas = [TensorMeta(f"layers.{i}.weight", "exp_avg_sq", "float32", (i, 3)) for i in range(30)]
    pieces = [(meta, 0, meta.numel) for meta in metas]
    create_segment(path, required_bytes(pieces))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        for meta, start, stop in pieces:
            writer.put(meta, start, stop, random.Random(meta.name).randbytes(meta.nbytes))
        writer.seal(2**32 - 1, 2**32 - 1, 2**63)
        assert verify(segment).step == 2**63


def test_views_outlive_close_without_harm(path):
    segment, _ = written(path)
    view = payload(segment, 0, 4)
    segment.close()
    segment.close()
    assert bytes(view) == b"\1" * 4


def test_other_buffers_than_bytes_are_taken(path):
    import array

    create_segment(path, 2 * SEAL_BYTES)
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        offset = writer.put(W, 0, 40, array.array("f", range(40)))
        writer.put(TensorMeta("none", "param", "float32", (0, 2)), 0, 0, memoryview(b""))
        seal = writer.seal(1, 1, 1)
        assert read_range(segment, seal, offset, 160) == array.array("f", range(40)).tobytes()


def test_ranges_of_boxes_come_back_with_their_boxes(path):
    box, other = ((2, 3), (1, 2)), ((0, 5), (3, 1))
    meta = TensorMeta("m", "param", "int16", (5, 4))
    pieces = [(meta, 0, 4, box), (W, 0, 3), (meta, 4, 6, box), (meta, 0, 5, other), (meta, 0, 20), (meta, 2, 2, box)]
    create_segment(path, required_bytes(pieces))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        for n, (tensor, start, stop, *rest) in enumerate(pieces):
            writer.put(tensor, start, stop, bytes([n] * ((stop - start) * tensor.itemsize)), box=(*rest, ())[0])
        seal = writer.seal(1, 2, 3)
        index = read_index(segment, seal, SOURCE)
        assert [(f.name, f.start, f.stop, *([f.box] if f.box else [])) for f in index.fragments] == [
            (tensor.name, *rest) for tensor, *rest in pieces
        ]
        assert verify(segment) == seal
        segment.memory[SEAL_BYTES + index.fragments[2].offset] ^= 1
        with pytest.raises(SegmentDamaged, match=r"elements 4:6 of 'm'\[2:5, 1:3\] \(param\)"):
            verify(segment)


def test_a_full_write_of_boxes_fits_exactly_what_was_asked_for(path):
    # Boxes of many dimensions, and enough of them that rounding up to a page hides nothing.
    meta = TensorMeta("w", "param", "int8", (2,) * 30)
    pieces = [(meta, 0, 1, tuple((i >> d & 1, 1) for d in range(30))) for i in range(300)]
    create_segment(path, required_bytes(pieces))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        for meta, start, stop, box in pieces:
            writer.put(meta, start, stop, b"x", box=box)
        seal = writer.seal(1, 1, 1)
        assert verify(segment) == seal


def test_boxes_outside_their_tensor_are_refused(path):
    create_segment(path, 2 * SEAL_BYTES)
    meta = TensorMeta("m", "param", "int16", (5, 4))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        for box in (((0, 6), (0, 4)), ((0, 5),), ((1, 5), (0, 4)), ((-1, 2), (0, 4))):
            with pytest.raises(IndexInvalid, match=r"'m'\[.*whose shape is \[5, 4\]"):
                writer.put(meta, 0, 1, b"xx", box=box)
        with pytest.raises(IndexInvalid, match=r"0:7 of 'm'\[0:2, 1:4\] \(param\), which has 6 elements"):
            writer.put(meta, 0, 7, bytes(14), box=((0, 2), (1, 3)))
        assert writer.placed == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["float32", "int64", "bool"]), st.integers(0, 300)),
        max_size=12,
    ),
    st.integers(0, 2**32 - 1),
)
def test_any_pieces_come_back(tmp_path, shapes, seed):
    rng = random.Random(seed)
    metas = {(f"t{n}", dtype): TensorMeta(f"t{n}", dtype, dtype, (300,)) for n, dtype, _ in shapes}
    pieces = []
    for n, dtype, stop in shapes:
        start = rng.randint(0, stop)
        meta = metas[f"t{n}", dtype]
        pieces.append((meta, start, stop, rng.randbytes((stop - start) * meta.itemsize)))
    path = tmp_path / os.urandom(8).hex()
    create_segment(path, required_bytes((m, a, b) for m, a, b, _ in pieces))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        for piece in pieces:
            writer.put(*piece)
        seal = writer.seal(1, 2, 3)
        index = read_index(segment, seal, SOURCE)
        got = [
            (f.name, f.kind, f.start, f.stop, bytes(payload(segment, f.offset, len(data))))
            for f, (_, _, _, data) in zip(index.fragments, pieces, strict=True)
        ]
        assert got == [(m.name, m.kind, a, b, data) for m, a, b, data in pieces]
        assert verify(segment) == seal
    path.unlink()

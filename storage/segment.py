"""Segments: one snapshot slot each, a plain file (in /dev/shm) that we map ourselves.

[Note: segment layout]
    0       seal: one header, written last and cleared first (see `_HEADER`); the rest of the page is zero
    4096    payload: fragments at 64-byte boundaries
    ...     index: msgpack of the tensors, of (tensor, start, stop, offset, xxh3_64) for each fragment, of the boxes
            that fragments are ranges of, and of (number of the fragment, of the box) for each that is
A seal counts only with its own checksum right, and it carries the checksum of the index, which carries those
of the payload: a header torn at any byte is no seal, and two equal seals stand for equal bytes.

Owns the file format, the mapping, the one writer and the readers. One `Writer` a segment at a time, in one
thread (slots see to it, `versions.py`). Any number of readers in any process: they check the seal again after
they have copied. Plain files, because `multiprocessing.shared_memory` unlinks a segment when any process that
attached it is killed (Python 3.11).
"""

import contextlib
import errno
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import msgspec
import xxhash

from everstep.storage import boxes
from everstep.storage.errors import (
    IndexInvalid,
    SegmentChanged,
    SegmentDamaged,
    SegmentError,
    SegmentFull,
)
from everstep.storage.index import Box, Fragment, Source, StateIndex, TensorKey, TensorMeta

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

SEAL_BYTES: Final = 4096
ALIGN_BYTES: Final = 64
FORMAT_VERSION: Final = 2
_MAGIC: Final = b"ESSEGMT\x01"
# magic, format version, epoch, number, zero, step, payload bytes, index offset (from the payload's start),
# index bytes, xxh3_64 of the index; then the xxh3_64 of all of that. Little endian.
_HEADER: Final = struct.Struct("<8sIIIIQQQQQ")
_DIGEST: Final = struct.Struct("<Q")
# Copied and hashed piece by piece, so that the hash reads what is still in cache.
_PIECE_BYTES: Final = 1 << 20
_UNKNOWN: Final = -1
_EMPTY_CHECKSUM: Final = xxhash.xxh3_64_intdigest(b"")


class Seal(msgspec.Struct, frozen=True):
    """What a sealed segment holds: the state at `step`, cut for view (epoch, number). Sizes in bytes."""

    epoch: int
    number: int
    step: int
    payload_bytes: int
    index_offset: int
    index_bytes: int
    index_checksum: int


class _Index(msgspec.Struct, frozen=True, array_like=True):
    tensors: tuple[TensorMeta, ...]
    rows: list[tuple[int, int, int, int, int]]  # tensor, start, stop, offset in the payload, xxh3_64
    boxes: list[Box]
    cuts: list[tuple[int, int]]  # row, box


# (tensor, start, stop), with the box that they count in where that is not the whole tensor
Piece = tuple[TensorMeta, int, int] | tuple[TensorMeta, int, int, Box]


def sizes_of(pieces: Iterable[Piece]) -> tuple[int, int]:
    """(bytes of the payload, at most as many of the index) of a segment of these pieces."""
    total = 0
    index = 64
    for meta, start, stop, *box in pieces:
        total += _aligned((stop - start) * meta.itemsize)
        # An upper bound: names and shape once a piece, five numbers of at most nine bytes each; the same for a box.
        index += len(msgspec.msgpack.encode(meta)) + 5 * 9 + 1
        if box:
            index += len(msgspec.msgpack.encode(box[0])) + 2 * 9 + 1
    return total, index


def required_bytes(pieces: Iterable[Piece]) -> int:
    """File size that is enough for a segment of these pieces, whole pages."""
    return capacity_of(*sizes_of(pieces))


def capacity_of(payload_bytes: int, index_bytes: int) -> int:
    """File size for a payload and an index, whole pages."""
    return -(-(SEAL_BYTES + _aligned(payload_bytes) + index_bytes) // SEAL_BYTES) * SEAL_BYTES


def create_segment(path: str | os.PathLike[str], capacity_bytes: int) -> None:
    """Create an unsealed segment file of `capacity_bytes` in all (see `required_bytes`), readable by its
    owner only.

    The memory is taken here, so that a full /dev/shm is an error and not a SIGBUS at the first write.
    Raises SegmentError when the file exists or the memory is not there; leaves nothing behind then.
    """
    if capacity_bytes <= SEAL_BYTES:
        raise SegmentError(f"{path}: capacity of {capacity_bytes} bytes; a segment takes more than {SEAL_BYTES}")
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SegmentError(f"{path}: cannot create a segment: {error.strerror}") from error
    try:
        os.posix_fallocate(fd, 0, capacity_bytes)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if error.errno in (errno.ENOSPC, errno.EFBIG):
            stats = os.fstatvfs(fd)
            free = stats.f_bavail * stats.f_frsize
            raise SegmentError(
                f"{path}: a segment takes {capacity_bytes} bytes, {Path(path).parent} has {free} free; "
                "make it larger (docker: --shm-size; Kubernetes: an emptyDir of medium Memory)"
            ) from error
        raise SegmentError(f"{path}: cannot allocate {capacity_bytes} bytes: {error.strerror}") from error
    finally:
        os.close(fd)


class SegmentMap:
    """A mapped segment file, a context manager. Raises SegmentError when there is none.

    `close` gives up this object's hold; memory that a view handed out still refers to stays mapped until the
    view goes. Only what `create_segment` made is mapped writable; nobody ever truncates a segment, only
    unlinks it.
    """

    def __init__(self, path: str | os.PathLike[str], writable: bool) -> None:
        self.path = os.fspath(path)
        self.writable = writable
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self.path, flags)
        except OSError as error:
            raise SegmentError(f"{self.path}: cannot open the segment: {error.strerror}") from error
        try:
            self.size = os.fstat(fd).st_size
            if self.size <= SEAL_BYTES:
                raise SegmentError(f"{self.path}: {self.size} bytes are no segment")
            # A writer's pages are mapped now: first touches would make its first snapshot several times
            # slower.
            populate = getattr(mmap, "MAP_POPULATE", 0) if writable else 0
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._mmap = mmap.mmap(fd, self.size, flags=mmap.MAP_SHARED | populate, prot=prot)
        finally:
            os.close(fd)
        self.memory = memoryview(self._mmap)

    def close(self) -> None:
        """Unmap; idempotent."""
        self.memory.release()
        # While a view of ours is exported elsewhere the mapping cannot go: it does when that view is
        # collected.
        with contextlib.suppress(BufferError):
            self._mmap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Writer:
    """Writes one version into a segment: `begin`, `put` for each piece, `seal`. Not thread-safe.

    Called by the trainer that owns the slot. Until `seal` returns, and from `begin` on, the segment counts as
    empty.
    """

    def __init__(self, segment: SegmentMap) -> None:
        if not segment.writable:
            raise SegmentError(f"{segment.path}: mapped read-only")
        self._segment = segment
        self._begun = False
        self._reset()

    def _reset(self) -> None:
        self._position = 0
        self._tensors: dict[TensorKey, tuple[int, TensorMeta]] = {}
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._boxes: dict[Box, int] = {}
        self._cuts: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Clear the seal: from here on the slot's former version is gone."""
        unseal(self._segment)
        self._reset()
        self._begun = True

    def place(self, meta: TensorMeta, start: int, stop: int, *, box: Box = ()) -> memoryview:
        """Room for elements [start, stop) of a tensor, or of a box of it, behind what was placed before: fill it,
        and say its checksum (`checked`) before `seal`.

        Raises SegmentFull when it does not fit, IndexInvalid when the range or the box is wrong.
        """
        if not self._begun:
            raise SegmentError(f"{self._segment.path}: put before begin")
        if box and not boxes.inside(box, meta.shape):
            raise IndexInvalid(f"{_told(meta, start, stop, box)}, whose shape is {list(meta.shape)}")
        numel = boxes.numel(box) if box else meta.numel
        if not 0 <= start <= stop <= numel:
            raise IndexInvalid(f"{_told(meta, start, stop, box)}, which has {numel} elements")
        number, known = self._tensors.setdefault(meta.key, (len(self._tensors), meta))
        if known != meta:
            raise IndexInvalid(f"{meta.name!r} ({meta.kind}) was put as {known} before, now as {meta}")
        offset, length = _aligned(self._position), (stop - start) * meta.itemsize
        room = _room(self._segment, offset, length)
        if box:
            self._cuts.append((len(self._rows), self._boxes.setdefault(box, len(self._boxes))))
        self._rows.append((number, start, stop, offset, _EMPTY_CHECKSUM if not length else _UNKNOWN))
        self._position = offset + length
        return room

    @property
    def placed(self) -> int:
        """How many places this version has so far."""
        return len(self._rows)

    def checked(self, n: int, checksum: int) -> None:
        """The xxh3_64 of what was filled into the n-th place (from 0) of this version. Any thread."""
        number, start, stop, offset, _ = self._rows[n]
        self._rows[n] = (number, start, stop, offset, checksum)

    def put(self, meta: TensorMeta, start: int, stop: int, buffer: "Buffer", *, box: Box = ()) -> int:
        """Append elements [start, stop) of a tensor, or of a box of it; returns their byte offset in the payload.

        `buffer`: C-contiguous memory of exactly (stop - start) * itemsize bytes. Raises SegmentFull when it
        does not fit, IndexInvalid when the range or the length is wrong.
        """
        data = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
        if data.nbytes != (stop - start) * meta.itemsize:
            raise IndexInvalid(
                f"{data.nbytes} bytes for {_told(meta, start, stop, box)}, "
                f"which has {meta.numel} elements of {meta.itemsize} bytes"
            )
        room = self.place(meta, start, stop, box=box)
        self.checked(len(self._rows) - 1, copy_hashed(data, room))
        return self._rows[-1][3]

    def seal(self, epoch: int, number: int, step: int) -> Seal:
        """Write the index and then the seal: from here on the segment holds `step` for view (epoch,
        number).
        """
        if not self._begun:
            raise SegmentError(f"{self._segment.path}: seal before begin")
        assert all(row[4] != _UNKNOWN for row in self._rows), "a fragment was placed and its checksum never said"
        tensors = tuple(meta for _, meta in self._tensors.values())
        index = msgspec.msgpack.encode(_Index(tensors, self._rows, list(self._boxes), self._cuts))
        seal = seal_raw(self._segment, (epoch, number, step), self._position, index)
        self._begun = False
        return seal


def copy_hashed(data: memoryview, room: memoryview) -> int:
    """Copies `data` into `room`, of the same length in bytes; returns its xxh3_64. Any thread."""
    checksum = xxhash.xxh3_64()
    for first in range(0, len(data), _PIECE_BYTES):
        piece = data[first : first + _PIECE_BYTES]
        room[first : first + len(piece)] = piece
        checksum.update(piece)
    return checksum.intdigest()


def read_seal(segment: SegmentMap) -> Seal | None:
    """The segment's seal; None when it is not sealed, or its header is torn, damaged or of another format."""
    header = bytes(segment.memory[: _HEADER.size + _DIGEST.size])
    (digest,) = _DIGEST.unpack_from(header, _HEADER.size)
    if header[:8] != _MAGIC or xxhash.xxh3_64_intdigest(header[: _HEADER.size]) != digest:
        return None
    _, version, epoch, number, _, step, payload_bytes, offset, length, checksum = _HEADER.unpack_from(header)
    room = segment.size - SEAL_BYTES
    if version != FORMAT_VERSION or not (payload_bytes <= offset <= room and length <= room - offset):
        return None
    return Seal(epoch, number, step, payload_bytes, offset, length, checksum)


def read_index_bytes(segment: SegmentMap, seal: Seal) -> bytes:
    """The index as it is written. Raises SegmentChanged when the segment is no longer sealed with `seal`,
    SegmentDamaged when the index is not what the seal says.
    """
    data = bytes(segment.memory[SEAL_BYTES + seal.index_offset :][: seal.index_bytes])
    _check_unchanged(segment, seal)
    if xxhash.xxh3_64_intdigest(data) != seal.index_checksum:
        raise SegmentDamaged(f"{segment.path}: the index does not match its checksum")
    return data


def read_index(segment: SegmentMap, seal: Seal, source: Source) -> StateIndex:
    """The fragments that the segment holds, as fragments of `source`; offsets count from the payload's start.

    Raises SegmentChanged when the segment is no longer sealed with `seal`, SegmentDamaged when its index is
    not what the seal says.
    """
    data = read_index_bytes(segment, seal)
    return decode_index(data, seal.step, seal.payload_bytes, source, segment.path)


def decode_index(data: bytes, step: int, payload_bytes: int, source: Source, path: str) -> StateIndex:
    """An index that was read from a segment, or kept by its group. Raises SegmentDamaged; `path` is for it."""
    try:
        wire = msgspec.msgpack.decode(data, type=_Index)
        box_of = {row: wire.boxes[number] for row, number in wire.cuts}
        fragments = tuple(
            Fragment(
                wire.tensors[t].name, wire.tensors[t].kind, start, stop, source, offset, checksum, box_of.get(n, ()),
            )
            for n, (t, start, stop, offset, checksum) in enumerate(wire.rows)
        )  # fmt: skip
        index = StateIndex(step, wire.tensors, fragments)
        index.validate()
    except (msgspec.MsgspecError, ValueError, IndexError) as error:  # IndexInvalid is a ValueError
        raise SegmentDamaged(f"{path}: the index cannot be read: {error}") from error
    metas = index.metas()
    for f in fragments:
        if f.offset + (f.stop - f.start) * metas[f.key].itemsize > payload_bytes:
            raise SegmentDamaged(f"{path}: {f} end behind the payload")
    return index


def unseal(segment: SegmentMap) -> None:
    """From here on the segment's former version is gone."""
    segment.memory[:SEAL_BYTES] = bytes(SEAL_BYTES)


def seal_raw(segment: SegmentMap, version: tuple[int, int, int], payload_bytes: int, index: bytes) -> Seal:
    """Writes an index behind the payload, and then the seal of `version` (epoch, number, step).

    Raises SegmentFull.
    """
    offset = _aligned(payload_bytes)
    _room(segment, offset, len(index))[:] = index
    epoch, number, step = version
    seal = Seal(epoch, number, step, payload_bytes, offset, len(index), xxhash.xxh3_64_intdigest(index))
    header = _pack(seal)
    segment.memory[: len(header)] = header
    return seal


def _room(segment: SegmentMap, offset: int, length: int) -> memoryview:
    first = SEAL_BYTES + offset
    if first + length > segment.size:
        raise SegmentFull(
            f"{segment.path}: {length} bytes at {offset} do not fit, there is room for {segment.size - SEAL_BYTES}"
        )
    return segment.memory[first : first + length]


def payload(segment: SegmentMap, offset: int, length: int) -> memoryview:
    """The bytes [offset, offset + length) of the payload, not copied; raises SegmentError outside of the
    file.
    """
    if offset < 0 or length < 0 or offset + length > segment.size - SEAL_BYTES:
        raise SegmentError(
            f"{segment.path}: bytes {offset}:{offset + length}, there is room for {segment.size - SEAL_BYTES}"
        )
    return segment.memory[SEAL_BYTES + offset : SEAL_BYTES + offset + length]


def read_range(segment: SegmentMap, expected_seal: Seal, offset: int, length: int) -> bytes:
    """Copy bytes of the payload that is sealed with `expected_seal`.

    Raises SegmentChanged when the segment has another seal, or none, before or after the copy, and
    SegmentError for a range outside the payload.
    """
    _check_unchanged(segment, expected_seal)
    if offset < 0 or length < 0 or offset + length > expected_seal.payload_bytes:
        raise SegmentError(
            f"{segment.path}: bytes {offset}:{offset + length} of a payload of {expected_seal.payload_bytes}"
        )
    data = bytes(payload(segment, offset, length))
    _check_unchanged(segment, expected_seal)
    return data


def verify(segment: SegmentMap) -> Seal:
    """Check every checksum of a sealed segment; returns its seal.

    Raises SegmentDamaged naming tensor and range, also when it is not sealed, and SegmentChanged when it was
    rewritten meanwhile.
    """
    seal = read_seal(segment)
    if seal is None:
        raise SegmentDamaged(f"{segment.path}: not sealed")
    index = read_index(segment, seal, Source("segment", "", segment.path))
    metas = index.metas()
    for f in index.fragments:
        data = payload(segment, f.offset, (f.stop - f.start) * metas[f.key].itemsize)
        if xxhash.xxh3_64_intdigest(data) != f.checksum:
            _check_unchanged(segment, seal)
            what = _told(metas[f.key], f.start, f.stop, f.box)
            raise SegmentDamaged(f"{segment.path}: elements {what} do not match their checksum")
    _check_unchanged(segment, seal)
    return seal


def _check_unchanged(segment: SegmentMap, seal: Seal) -> None:
    now = read_seal(segment)
    if now != seal:
        held = "nothing sealed" if now is None else f"step {now.step} of view ({now.epoch}, {now.number})"
        raise SegmentChanged(
            f"{segment.path}: expected step {seal.step} of view ({seal.epoch}, {seal.number}), there is {held}"
        )


def _told(meta: TensorMeta, start: int, stop: int, box: Box) -> str:
    return f"{start}:{stop} of {meta.name!r}{boxes.spell(box)} ({meta.kind})"


def _pack(seal: Seal) -> bytes:
    header = _HEADER.pack(
        _MAGIC, FORMAT_VERSION, seal.epoch, seal.number, 0, seal.step,
        seal.payload_bytes, seal.index_offset, seal.index_bytes, seal.index_checksum,
    )  # fmt: skip
    return header + _DIGEST.pack(xxhash.xxh3_64_intdigest(header))


def _aligned(position: int) -> int:
    return -(-position // ALIGN_BYTES) * ALIGN_BYTES

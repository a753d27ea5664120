"""Rank files: the safetensors file that holds one rank's fragments in a checkpoint.

Owns the writing of the safetensors format, by hand, because the file is streamed from a mapped
segment (nothing is held in memory but one piece). Every fragment is a 1-D tensor with
the key `name|kind|start:stop`; any safetensors library can read the file. Functions here keep no state and
are safe in any thread; a segment must be pinned while `write_rank_file` reads it (`versions.py`).

    8 bytes   length of the header, little endian
    header    JSON {"__metadata__": {…}, key: {"dtype", "shape", "data_offsets": [first, end]}, …}, blanks
    data      the fragments without gaps, largest elements first, so that each is aligned to its element size
"""

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

from everstep.storage.errors import (
    CheckpointError,
    CheckpointExists,
    IndexInvalid,
    SegmentChanged,
    SegmentDamaged,
)
from everstep.storage.index import Fragment, Source, StateIndex, TensorKey, TensorMeta
from everstep.storage.segment import Seal, SegmentMap, payload, read_index, read_seal

SAFETENSORS_DTYPES: Final = {
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
    "complex64": "C64",
    "float32": "F32",
    "int32": "I32",
    "uint32": "U32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "uint16": "U16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_LENGTH: Final = struct.Struct("<Q")
_HEADER_LIMIT_BYTES: Final = 100_000_000  # the safetensors library's own limit
_ALIGN_BYTES: Final = 64
PIECE_BYTES: Final = 1 << 20


class FileRecord(msgspec.Struct, frozen=True):
    """One written file: its name in the checkpoint's folder, size, xxh3_64, and the fragments in it.

    The offsets of the fragments count from the start of the file.
    """

    name: str
    bytes: int
    xxh3: int
    tensors: tuple[TensorMeta, ...]
    fragments: tuple[Fragment, ...]

    def index(self, step: int) -> StateIndex:
        """What the file holds, as an index."""
        return StateIndex(step, self.tensors, self.fragments)


def write_rank_file(segment: SegmentMap, seal: Seal, folder: str | os.PathLike[str], name: str) -> FileRecord:
    """Write a sealed segment into `folder`/`name`, flushed to the disk; called by the segment's manager.

    Every byte is checked against the segment's checksums on its way. Raises SegmentChanged or SegmentDamaged
    when the segment is not what `seal` says, CheckpointExists when the file is there (names are never
    reused), CheckpointError when storage refuses (full, no rights). A file that could not be finished is
    removed.
    """
    path = Path(folder) / checked_file_name(name)
    index = read_index(segment, seal, Source("file", "", name))
    metas = index.metas()
    order = sorted(index.fragments, key=lambda f: (-metas[f.key].itemsize, f.offset))
    header, offsets = _header(index, order, seal)
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except FileExistsError as error:
        raise CheckpointExists(f"{path} is there already") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot create it: {error.strerror}") from error
    try:
        try:
            size, xxh3 = _stream(fd, header, order, metas, segment, seal)
        finally:
            os.close(fd)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path}: cannot write it: {error.strerror}") from error
        raise
    fragments = tuple(
        Fragment(f.name, f.kind, f.start, f.stop, f.source, offset, f.checksum)
        for f, offset in zip(order, offsets, strict=True)
    )
    return FileRecord(name, size, xxh3, index.tensors, fragments)


def checked_file_name(name: str) -> str:
    """The name, when it is a plain visible one; raises CheckpointError for one that would leave the
    folder.
    """
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
        raise CheckpointError(f"{name!r} is no name for a file of a checkpoint")
    return name


def fragment_key(fragment: Fragment) -> str:
    """The fragment's key in a rank file: `name|kind|start:stop`."""
    return f"{fragment.name}|{fragment.kind}|{fragment.start}:{fragment.stop}"


def _header(index: StateIndex, order: list[Fragment], seal: Seal) -> tuple[bytes, list[int]]:
    """The length and header of a file with these fragments in this order, and the offset of each in the
    file.
    """
    metas = index.metas()
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "everstep": "rank file 1",
            "step": str(seal.step),
            "view": f"{seal.epoch}.{seal.number}",
        }
    }
    starts: list[int] = []
    position = 0
    for f in order:
        if "|" in f.kind:
            raise IndexInvalid(f"kind {f.kind!r} of {f.name!r} has a '|'")
        meta = metas[f.key]
        end = position + (f.stop - f.start) * meta.itemsize
        key = fragment_key(f)
        if key in entries:
            raise IndexInvalid(f"the segment holds {f.start}:{f.stop} of {f.name!r} ({f.kind}) twice")
        entries[key] = {
            "dtype": SAFETENSORS_DTYPES[meta.dtype],
            "shape": [f.stop - f.start],
            "data_offsets": [position, end],
        }
        starts.append(position)
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGN_BYTES)
    if len(text) > _HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{len(order)} fragments make a header of {len(text)} bytes; the limit is 10^8")
    header = _LENGTH.pack(len(text)) + text
    return header, [len(header) + start for start in starts]


def _stream(
    fd: int,
    header: bytes,
    order: list[Fragment],
    metas: dict[TensorKey, TensorMeta],
    segment: SegmentMap,
    seal: Seal,
) -> tuple[int, int]:
    """Write header and fragments, flush them; returns the file's size in bytes and its xxh3_64."""
    whole = xxhash.xxh3_64()
    _write(fd, header, whole)
    try:
        for f in order:
            _write_fragment(fd, segment, f, (f.stop - f.start) * metas[f.key].itemsize, whole)
    finally:
        # Looked at last, and also when a checksum is wrong: a rewritten segment is not a damaged one.
        if read_seal(segment) != seal:
            raise SegmentChanged(f"{segment.path}: rewritten while a checkpoint was written from it")
    os.fsync(fd)
    return os.fstat(fd).st_size, whole.intdigest()


def _write_fragment(fd: int, segment: SegmentMap, f: Fragment, length: int, whole: xxhash.xxh3_64) -> None:
    data = payload(segment, f.offset, length)
    own = xxhash.xxh3_64()
    for first in range(0, length, PIECE_BYTES):
        # Copied once, so that what is hashed is what is written, even when the segment changes under us.
        piece = bytes(data[first : first + PIECE_BYTES])
        own.update(piece)
        _write(fd, piece, whole)
    if own.intdigest() != f.checksum:
        raise SegmentDamaged(
            f"{segment.path}: elements {f.start}:{f.stop} of {f.name!r} ({f.kind}) do not match their checksum"
        )


def _write(fd: int, data: bytes, whole: xxhash.xxh3_64) -> None:
    whole.update(data)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]

"""Rank files: the safetensors file that holds one rank's fragments in a checkpoint.

Owns the writing of the safetensors format, by hand, because the file is streamed: nothing is held in memory but the
parts that are on their way. Every fragment is a 1-D tensor with the key `name|kind|start:stop`, or
`name|kind|first+extent,first+extent|start:stop` where it is a box of its tensor; any safetensors library can read the
file. Functions here keep no state and are safe in any thread; a segment must be pinned while `write_rank_file` reads
it (`versions.py`).

    8 bytes   length of the header, little endian
    header    JSON {"__metadata__": {…}, key: {"dtype", "shape", "data_offsets": [first, end]}, …}, blanks
    data      the fragments without gaps, largest elements first, so that each is aligned to its element size

One producer (the caller's thread) fills the store's parts and hashes them, `threads` writers hand them to the store.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np
import xxhash

from everstep.storage.blocks import BLOCK_BYTES
from everstep.storage.errors import (
    CheckpointError,
    CheckpointExists,
    IndexInvalid,
    SegmentChanged,
    SegmentDamaged,
    StoreExists,
)
from everstep.storage.index import Fragment, Source, StateIndex, TensorKey, TensorMeta
from everstep.storage.part_writers import PartWriters
from everstep.storage.segment import Seal, SegmentMap, payload, read_index, read_seal
from everstep.storage.stores.port import Folder

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
# A page: then tensors of whole pages lie on pages too, which is where copies out of the page cache are fastest.
_ALIGN_BYTES: Final = 4096
# Filled and hashed piece by piece, so that the hashes read what is still in a core's cache.
_PIECE_BYTES: Final = 512 << 10

# Delivers bytes [first, first + len(out)) of a fragment into `out`.
Fill = Callable[[Fragment, int, memoryview], None]


class FileRecord(msgspec.Struct, frozen=True):
    """One written file: its name in the checkpoint's folder, size, the xxh3_64 of each of its blocks, and the
    fragments in it. The offsets of the fragments count from the start of the file.
    """

    name: str
    bytes: int
    blocks: tuple[int, ...]
    tensors: tuple[TensorMeta, ...]
    fragments: tuple[Fragment, ...]

    def index(self, step: int) -> StateIndex:
        """What the file holds, as an index."""
        return StateIndex(step, self.tensors, self.fragments)


def write_file(
    folder: Folder,
    name: str,
    index: StateIndex,
    fill: Fill,
    *,
    threads: int = 2,
    memory_bytes: int = 64 << 20,
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> FileRecord:
    """Write the fragments of `index` into a new file; returns once it would survive a power cut.

    `fill(fragment, first, out)` delivers bytes of a fragment of `index`, called in the order of the file by the
    calling thread; what it put into `out` is what is hashed and written. Sources, offsets and strides in `index` are
    the filler's own. A fragment whose checksum is known is compared with it. At most `memory_bytes` are held, or one
    part of the store where that is longer; `on_bytes(n)` hears of n more bytes written, from any thread.

    Raises CheckpointExists when the file is there (names are never reused), SegmentDamaged when what is delivered
    does not match its checksum, StoreError when the store refuses, and what `fill` raises. Nothing is left then.
    """
    return _write(folder, name, index, fill, threads, memory_bytes, metadata or {}, on_bytes, lambda: None)


def write_rank_file(
    segment: SegmentMap,
    seal: Seal,
    folder: Folder,
    name: str,
    *,
    threads: int = 2,
    memory_bytes: int = 64 << 20,
    on_bytes: Callable[[int], None] | None = None,
) -> FileRecord:
    """Write a sealed segment into the file `name` of `folder`; called by the segment's manager.

    Every byte is checked against the segment's checksums on its way. Raises SegmentChanged or SegmentDamaged when the
    segment is not what `seal` says, and as `write_file` does.
    """
    index = read_index(segment, seal, Source("segment", "", segment.path))
    by_offset = sorted(index.fragments, key=lambda f: f.offset)  # a stable order of reading, whatever the index has

    def fill(f: Fragment, first: int, out: memoryview) -> None:
        data = payload(segment, f.offset + first, len(out))
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(data, np.uint8))  # releases the interpreter's lock

    def unchanged() -> None:
        if read_seal(segment) != seal:
            raise SegmentChanged(f"{segment.path}: rewritten while a checkpoint was written from it")

    pieces = StateIndex(index.step, index.tensors, tuple(by_offset))
    metadata = {"step": str(seal.step), "view": f"{seal.epoch}.{seal.number}"}
    return _write(folder, name, pieces, fill, threads, memory_bytes, metadata, on_bytes, unchanged)


def checked_file_name(name: str) -> str:
    """The name, when it is a plain visible one; raises CheckpointError for one that would leave the
    folder.
    """
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
        raise CheckpointError(f"{name!r} is no name for a file of a checkpoint")
    return name


def fragment_key(fragment: Fragment) -> str:
    """The fragment's key in a rank file, see the top of this file."""
    box = ",".join(f"{first}+{extent}" for first, extent in fragment.box)
    return f"{fragment.name}|{fragment.kind}|{box}{'|' if box else ''}{fragment.start}:{fragment.stop}"


def _write(
    folder: Folder,
    name: str,
    index: StateIndex,
    fill: Fill,
    threads: int,
    memory_bytes: int,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] | None,
    unchanged: Callable[[], None],
) -> FileRecord:
    """`write_file`, with a last look at where the bytes came from before the file becomes visible."""
    path = folder.child(checked_file_name(name)).path
    metas = index.metas()
    order = sorted(index.fragments, key=lambda f: -metas[f.key].itemsize)
    header, offsets = _header(metas, order, metadata)
    last_bytes = (order[-1].stop - order[-1].start) * metas[order[-1].key].itemsize if order else 0
    nbytes = offsets[-1] + last_bytes if order else len(header)
    try:
        upload = folder.store.upload(path, nbytes)
        try:
            writers = PartWriters(upload, nbytes, folder.store.part_bytes(nbytes), threads, memory_bytes, on_bytes)
            try:
                with writers:
                    blocks, checksums = _Producer(writers, fill).produce(header, order, metas)
            finally:
                # Looked at last, and also when a checksum is wrong: a rewritten segment is not a damaged one.
                unchanged()
            upload.finish()
        except BaseException:
            upload.abort()
            raise
    except StoreExists as error:
        raise CheckpointExists(f"{folder.child(name)} is there already") from error
    source = Source("file", "", name)
    fragments = tuple(
        Fragment(f.name, f.kind, f.start, f.stop, source, offset, checksum, f.box)
        for f, offset, checksum in zip(order, offsets, checksums, strict=True)
    )
    return FileRecord(name, nbytes, tuple(blocks), index.tensors, fragments)


def _header(
    metas: dict[TensorKey, TensorMeta], order: Sequence[Fragment], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The length and header of a file with these fragments in this order, and the offset of each in the
    file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "everstep": "rank file 2", **metadata}}
    starts: list[int] = []
    position = 0
    for f in order:
        if "|" in f.kind:
            raise IndexInvalid(f"kind {f.kind!r} of {f.name!r} has a '|'")
        meta = metas[f.key]
        end = position + (f.stop - f.start) * meta.itemsize
        key = fragment_key(f)
        if key in entries:
            raise IndexInvalid(f"{f.start}:{f.stop} of {f.name!r} ({f.kind}) is to be written twice into one file")
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


class _Producer:
    """Fills one part after the other; hashes blocks and fragments as it goes. One thread."""

    def __init__(self, writers: PartWriters, fill: Fill) -> None:
        self._writers = writers
        self._fill = fill
        self._position = 0
        self._block = xxhash.xxh3_64()
        self._blocks: list[int] = []

    def produce(
        self, header: bytes, order: Sequence[Fragment], metas: dict[TensorKey, TensorMeta]
    ) -> tuple[list[int], list[int]]:
        """The whole file; the xxh3_64 of each block and of each fragment."""
        checksums = []

        def copy_header(first: int, out: memoryview) -> None:
            out[:] = header[first : first + len(out)]

        self._put(len(header), copy_header, None)
        for f in order:
            own = xxhash.xxh3_64()
            self._put((f.stop - f.start) * metas[f.key].itemsize, partial(self._fill, f), own)
            checksum = own.intdigest()
            if f.checksum and checksum != f.checksum:
                where = f"{f.source.locator}: " if f.source.locator else ""
                raise SegmentDamaged(
                    f"{where}elements {f.start}:{f.stop} of {f.name!r} ({f.kind}) do not match their checksum",
                    f.source.locator,
                )
            checksums.append(checksum)
        if self._position % BLOCK_BYTES:
            self._end_block()
        return self._blocks, checksums

    def _put(self, length: int, fill: Callable[[int, memoryview], None], own: xxhash.xxh3_64 | None) -> None:
        first = 0
        while first < length:
            room = self._writers.room(self._position)
            in_block = BLOCK_BYTES - self._position % BLOCK_BYTES
            piece = room[: min(length - first, in_block, _PIECE_BYTES)]
            fill(first, piece)
            if own is not None:
                own.update(piece)
            self._block.update(piece)
            first += len(piece)
            self._position += len(piece)
            self._writers.filled(self._position)
            if len(piece) == in_block:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.intdigest())
        self._block = xxhash.xxh3_64()

"""What a damaged block of a checkpoint's file means: which tensor, which elements.

Owns the search; slow, and done only when something is wrong already. Keeps no state, any thread.
"""

from typing import Final

import xxhash

from everstep.storage.blocks import BLOCK_BYTES
from everstep.storage.errors import CheckpointCorrupt, StoreNotFound
from everstep.storage.index import Fragment, StateIndex
from everstep.storage.stores.port import Folder

_MISMATCH: Final = "its bytes do not match their checksum"


def corrupt_block(folder: Folder, file: str, index: StateIndex, first: int, end: int) -> CheckpointCorrupt:
    """The error for bytes [first, end) of a file, a block that does not match its checksum.

    The fragments that the block has bytes of are read once more and compared with their own checksums, to name the
    one that is damaged. Raises StoreError.
    """
    url = folder.child(file).url
    metas = index.metas()
    mine = [f for f in index.fragments if f.source.locator == file]
    touched = sorted(
        (
            f
            for f in mine
            if f.start < f.stop and f.offset < end and f.offset + (f.stop - f.start) * metas[f.key].itemsize > first
        ),
        key=lambda f: f.offset,
    )
    for f in touched:
        if _digest(folder, file, f.offset, (f.stop - f.start) * metas[f.key].itemsize) != f.checksum:
            box = f" (of the box {'x'.join(f'{a}+{n}' for a, n in f.box)} of it)" if f.box else ""
            return CheckpointCorrupt(url, _MISMATCH + box, f.name, f.kind, f.start, f.stop)
    if not touched or first < touched[0].offset:
        return CheckpointCorrupt(url, "damaged outside of its tensors (the header)")
    f = touched[0]
    reason = f"bytes {first}:{end} did not match their checksum, and matched when they were read again"
    return CheckpointCorrupt(url, reason, f.name, f.kind, f.start, f.stop)


def fragment_at(index: StateIndex, file: str, position: int) -> Fragment | None:
    """The first fragment of a file that does not end before byte `position`."""
    metas = index.metas()
    touched = [
        f
        for f in index.fragments
        if f.source.locator == file and f.offset + (f.stop - f.start) * metas[f.key].itemsize > position
    ]
    return min(touched, key=lambda f: f.offset, default=None)


def _digest(folder: Folder, file: str, offset: int, length: int) -> int:
    """xxh3_64 of bytes of a file; another one where it ends early."""
    own = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(length, BLOCK_BYTES)))
    end = offset + length
    while offset < end:
        piece = buffer[: min(end - offset, BLOCK_BYTES)]
        try:
            got = folder.store.read_into(folder.child(file).path, offset, piece)
        except StoreNotFound:
            got = 0
        if not got:
            break
        own.update(piece[:got])
        offset += got
    return own.intdigest()

"""Checkpoints: reading them, and finding the newest that can be trusted.

Owns `Checkpoint` and `find_newest`. Nothing is ever unpickled, and every length is checked before memory is
taken. A `Checkpoint` is an immutable view of a folder that does not change any more: safe in any thread.
torch is imported only by `read`, which returns tensors.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash

from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    IndexInvalid,
)
from everstep.storage.index import Fragment, StateIndex, TensorKey, TensorMeta
from everstep.storage.manifest import (
    CheckpointName,
    FileEntry,
    Manifest,
    local_path,
    names,
    read_manifest,
)
from everstep.storage.planner import Copy, Want, plan
from everstep.storage.state_hash import combine, tensor_line

if TYPE_CHECKING:
    import torch

_PIECE_BYTES: Final = 1 << 20
_READER: Final = "reader"


class Rejected(NamedTuple):
    """A checkpoint's folder that was passed over, and why."""

    folder: Path
    reason: str


class Newest(NamedTuple):
    """What `find_newest` found; manifest and folder are None when nothing verified."""

    manifest: Manifest | None
    folder: Path | None
    rejected: tuple[Rejected, ...]


class Checkpoint:
    """One checkpoint; get it from `Checkpoint.open`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files = {entry.name: entry for entry in manifest.files}
        self._verified: set[Fragment] = set()

    @staticmethod
    def open(url: str | os.PathLike[str]) -> "Checkpoint":
        """Open a checkpoint's folder, or the newest that verifies of a run's folder; a path or a file:// URL.

        Raises CheckpointNotFound, CheckpointUnsupported (a schema or URL of another version) or
        CheckpointCorrupt (the manifest). The files are looked at by `verify` and the reads.
        """
        folder = local_path(url)
        try:
            manifest = read_manifest(folder)
        except CheckpointNotFound:
            newest = find_newest(folder)
            if newest.manifest is not None and newest.folder is not None:
                return Checkpoint(newest.folder, newest.manifest)
            if newest.rejected:
                reasons = "; ".join(f"{path.name}: {reason}" for path, reason in newest.rejected)
                raise CheckpointNotFound(f"{folder}: no checkpoint verifies: {reasons}") from None
            raise
        name = CheckpointName.parse(folder.name)
        if name is not None and name != manifest.name:
            raise CheckpointCorrupt(str(folder), f"its manifest is that of {manifest.name}")
        return Checkpoint(folder, manifest)

    @property
    def index(self) -> StateIndex:
        """Tensors and fragments; the fragments' sources are the files, offsets count from a file's start."""
        return self.manifest.index

    def check_sizes(self) -> None:
        """Check that every file is there with its size, without reading it; raises CheckpointCorrupt."""
        for entry in self.manifest.files:
            path = self.folder / entry.name
            try:
                size = path.stat(follow_symlinks=False).st_size
            except OSError as error:
                raise CheckpointCorrupt(str(path), f"cannot be read: {error.strerror}") from error
            if size != entry.bytes:
                raise CheckpointCorrupt(str(path), f"{size} bytes instead of {entry.bytes}", *self._at(entry, size))

    def verify(self) -> None:
        """Read every byte and check it; raises CheckpointCorrupt naming file, tensor and element range."""
        self.check_sizes()
        fragments: dict[str, list[Fragment]] = {entry.name: [] for entry in self.manifest.files}
        for fragment in self.index.fragments:
            fragments[fragment.source.locator].append(fragment)
        for entry in self.manifest.files:
            self._verify_file(entry, sorted(fragments[entry.name], key=lambda f: (f.offset, f.stop - f.start)))

    def read(self, name: str, kind: str = "param") -> "torch.Tensor":
        """One whole tensor, on the CPU, in its own memory.

        Raises KeyError when there is no such tensor, CheckpointCorrupt when its bytes are damaged.
        """
        import torch

        meta, data = self.read_bytes(name, kind)
        dtype: torch.dtype = getattr(torch, meta.dtype)
        if not data:
            return torch.empty(meta.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(meta.shape)

    def read_bytes(self, name: str, kind: str = "param") -> tuple[TensorMeta, bytearray]:
        """One whole tensor as its row-major bytes, and what it is; raises as `read` does."""
        part = self._by_tensor.get((name, kind))
        if part is None:
            known = sorted({k for n, k in self._by_tensor if n == name})
            hint = f"it has the kinds {', '.join(known)}" if known else f"it has {len(self._by_tensor)} tensors"
            raise KeyError(f"{self.folder} has no tensor {name!r} of kind {kind!r}; {hint}")
        meta = part.tensors[0]
        data = bytearray(meta.nbytes)
        for copy in plan(part, [Want(name, kind, 0, meta.numel, _READER)], lambda source, want: 0):
            self.read_into(copy, memoryview(data)[copy.start * meta.itemsize :][: copy.nbytes])
        return meta, data

    def read_range(self, copy: Copy, *, verify: bool = True) -> bytes:
        """The bytes of a planned copy out of this checkpoint; see `read_into`."""
        if not 0 <= copy.nbytes <= self._entry(copy).bytes:
            raise IndexInvalid(f"{copy.nbytes} bytes of {copy.source.locator}")
        data = bytearray(copy.nbytes)
        self.read_into(copy, memoryview(data), verify=verify)
        return bytes(data)

    def read_into(self, copy: Copy, out: memoryview, *, verify: bool = True) -> None:
        """Read a planned copy into `out` (exactly its length).

        A fragment that is copied whole is checked as it is read. One that is copied in part is read whole
        once to be checked, unless it was before (by `verify` too), or `verify` is off. Raises
        CheckpointCorrupt.
        """
        entry = self._entry(copy)
        if copy.offset < 0 or copy.offset + copy.nbytes > entry.bytes or out.nbytes != copy.nbytes:
            raise IndexInvalid(f"bytes {copy.offset}:{copy.offset + copy.nbytes} of {entry.name}, {entry.bytes} long")
        out = out.cast("B") if out.nbytes else out
        path = self.folder / entry.name
        with _opened(path) as fd:
            got = _read_fully(fd, out, copy.offset)
            if got != copy.nbytes:
                raise CheckpointCorrupt(str(path), "cut off", copy.name, copy.kind, copy.start, copy.stop)
            if not verify or not copy.nbytes:
                return
            size = copy.itemsize
            for f in copy.fragments:
                if not f.checksum or f.start == f.stop:
                    continue
                if copy.start <= f.start and f.stop <= copy.stop:
                    part = out[(f.start - copy.start) * size : (f.stop - copy.start) * size]
                    self._check(path, f, xxhash.xxh3_64_intdigest(part))
                elif f not in self._verified:
                    self._check(path, f, self._digest(fd, f, (f.stop - f.start) * size))

    def state_sha256(self) -> str:
        """The design's hash of the whole state, as a run that stands at this checkpoint reports it."""
        lines = []
        for meta in self.index.tensors:
            _, data = self.read_bytes(meta.name, meta.kind)
            lines.append(tensor_line(meta, hashlib.sha256(data).hexdigest()))
        return combine(lines, self.manifest.step)

    @cached_property
    def _by_tensor(self) -> dict[TensorKey, StateIndex]:
        fragments: dict[TensorKey, list[Fragment]] = {meta.key: [] for meta in self.index.tensors}
        for f in self.index.fragments:
            fragments[f.key].append(f)
        return {
            meta.key: StateIndex(self.index.step, (meta,), tuple(fragments[meta.key])) for meta in self.index.tensors
        }

    def _entry(self, copy: Copy) -> FileEntry:
        entry = self._files.get(copy.source.locator)
        if copy.source.kind != "file" or entry is None:
            raise IndexInvalid(f"{copy.source} is no file of {self.folder}")
        return entry

    def _at(self, entry: FileEntry, position: int) -> tuple[str, str, int, int]:
        """The first fragment of a file that does not end before byte `position`."""
        metas = self.index.metas()
        touched = [
            f
            for f in self.index.fragments
            if f.source.locator == entry.name and f.offset + (f.stop - f.start) * metas[f.key].itemsize > position
        ]
        first = min(touched, key=lambda f: f.offset, default=None)
        return ("", "", 0, 0) if first is None else (first.name, first.kind, first.start, first.stop)

    def _verify_file(self, entry: FileEntry, fragments: list[Fragment]) -> None:
        """One pass: the checksum of each fragment, and of the file, which the bytes between them are part
        of.
        """
        path = self.folder / entry.name
        metas = self.index.metas()
        whole = xxhash.xxh3_64()
        position = 0
        with _opened(path) as fd:
            for f in fragments:
                length = (f.stop - f.start) * metas[f.key].itemsize
                _hash(fd, position, f.offset - position, whole)
                self._check(path, f, self._digest(fd, f, length, whole))
                position = f.offset + length
            _hash(fd, position, entry.bytes - position, whole)
        if whole.intdigest() != entry.xxh3:
            raise CheckpointCorrupt(str(path), "damaged outside of its tensors (the header)")

    def _digest(self, fd: int, f: Fragment, length: int, whole: xxhash.xxh3_64 | None = None) -> int:
        own = xxhash.xxh3_64()
        _hash(fd, f.offset, length, own, whole)
        return own.intdigest()

    def _check(self, path: Path, f: Fragment, digest: int) -> None:
        if digest != f.checksum:
            reason = "its bytes do not match their checksum"
            raise CheckpointCorrupt(str(path), reason, f.name, f.kind, f.start, f.stop)
        self._verified.add(f)


def find_newest(root: str | os.PathLike[str]) -> Newest:
    """The newest checkpoint of a run's folder (see `run_folder`) that verifies, by (step, epoch, attempt).

    Reads all its bytes. Also says which newer ones were passed over, and why, so that a user sees what is
    lost.
    """
    base = local_path(root)
    rejected = []
    for name in reversed(names(base)):
        folder = base / str(name)
        try:
            manifest = read_manifest(folder)
            if manifest.name != name:
                raise CheckpointCorrupt(str(folder), f"its manifest is that of {manifest.name}")
            Checkpoint(folder, manifest).verify()
        except CheckpointError as error:
            rejected.append(Rejected(folder, str(error)))
            continue
        return Newest(manifest, folder, tuple(rejected))
    return Newest(None, None, tuple(rejected))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file of a checkpoint, as a descriptor to read; what the system refuses is CheckpointCorrupt."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointCorrupt(str(path), f"cannot be read: {error.strerror}") from error


def _read_fully(fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` from byte `offset`; returns how many bytes there were."""
    got = 0
    while got < out.nbytes:
        count = os.preadv(fd, [out[got:]], offset + got)
        if count == 0:
            break
        got += count
    return got


def _hash(fd: int, offset: int, length: int, *hashes: xxhash.xxh3_64 | None) -> None:
    """Feed bytes of a file to hashes, piece by piece; a file that ends early gives another digest."""
    buffer = memoryview(bytearray(min(length, _PIECE_BYTES)))
    end = offset + length
    while offset < end:
        piece = buffer[: min(end - offset, _PIECE_BYTES)]
        piece = piece[: _read_fully(fd, piece, offset)]
        if not piece:
            return
        for digest in hashes:
            if digest is not None:
                digest.update(piece)
        offset += len(piece)

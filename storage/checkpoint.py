"""Checkpoints: reading them, and finding the newest that can be trusted.

Owns `Checkpoint` and `find_newest`. Nothing is ever unpickled, and every length is checked before memory is
taken. A `Checkpoint` is an immutable view of a folder that does not change any more: safe in any thread.
torch is imported only by `read`, which returns tensors.

Damage (bytes, sizes or names that are not what the manifest says) is CheckpointCorrupt; a store that cannot be asked
is StoreError, and says nothing about the checkpoint.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from everstep.storage.blocks import Blocks
from everstep.storage.damage import corrupt_block, fragment_at
from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    IndexInvalid,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from everstep.storage.index import Fragment, StateIndex, TensorKey, TensorMeta
from everstep.storage.manifest import CheckpointName, Manifest, names, read_manifest
from everstep.storage.planner import Copy, Want, plan
from everstep.storage.reader import read_copies, verify_blocks
from everstep.storage.state_hash import combine, tensor_line
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Folder

if TYPE_CHECKING:
    import torch

# Tensors are hashed in lots of that many bytes: small ones share a read of the blocks that they lie in.
_LOT_BYTES: Final = 64 << 20

Url = str | os.PathLike[str]


class Rejected(NamedTuple):
    """A checkpoint's folder that was passed over, and why."""

    folder: Folder
    reason: str


class Newest(NamedTuple):
    """What `find_newest` found; manifest and folder are None when nothing verified."""

    manifest: Manifest | None
    folder: Folder | None
    rejected: tuple[Rejected, ...]


class Checkpoint:
    """One checkpoint; get it from `Checkpoint.open`."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._blocks: dict[str, Blocks] = {entry.name: entry.as_blocks() for entry in manifest.files}

    @staticmethod
    def open(url: Url) -> "Checkpoint":
        """Open a checkpoint's folder, or the newest that verifies of a run's folder; a path or a URL.

        Raises CheckpointNotFound, CheckpointUnsupported (a schema or URL of another version), CheckpointCorrupt (the
        manifest) or StoreError. The files are looked at by `verify` and the reads.
        """
        folder = folder_at(url)
        try:
            return Checkpoint.of(folder)
        except CheckpointNotFound:
            newest = find_newest(folder)
            if newest.manifest is not None and newest.folder is not None:
                return Checkpoint(newest.folder, newest.manifest)
            if newest.rejected:
                reasons = "; ".join(f"{rejected.name}: {reason}" for rejected, reason in newest.rejected)
                raise CheckpointNotFound(f"{folder}: no checkpoint verifies: {reasons}") from None
            raise

    @staticmethod
    def of(folder: Folder) -> "Checkpoint":
        """The checkpoint in just this folder; raises as `open` does."""
        manifest = read_manifest(folder)
        name = CheckpointName.parse(folder.name)
        if name is not None and name != manifest.name:
            raise CheckpointCorrupt(folder.url, f"its manifest is that of {manifest.name}")
        return Checkpoint(folder, manifest)

    @classmethod
    def import_from(cls, format: str, src: str, url: str, **options: Any) -> "Checkpoint":
        """Write what is at `src` in another format ("dcp", "deepspeed", "safetensors", "megatron") as a checkpoint
        under `url`; see `formats/convert.py`.
        """
        from everstep.storage.formats.convert import import_checkpoint

        return import_checkpoint(format, src, url, **options)

    def export(self, format: str, dst: str, **options: Any) -> None:
        """Write it in another format ("safetensors", "dcp") to `dst`; see `formats/convert.py`."""
        from everstep.storage.formats.convert import export_checkpoint

        export_checkpoint(self, format, dst, **options)

    @property
    def url(self) -> str:
        """The folder's URL; a plain path for a local one."""
        return self.folder.url

    @property
    def index(self) -> StateIndex:
        """Tensors and fragments; the fragments' sources are the files, offsets count from a file's start."""
        return self.manifest.index

    def check_sizes(self) -> None:
        """Check that every file is there with its size, without reading it; raises CheckpointCorrupt."""
        sizes = {e.name: e.bytes for e in self.folder.store.entries(self.folder.path) if not e.is_folder}
        for entry in self.manifest.files:
            size = sizes.get(entry.name)
            if size is None:
                raise CheckpointCorrupt(self._file(entry.name), "there is no such file", *self._at(entry.name, 0))
            if size != entry.bytes:
                reason = f"{size} bytes instead of {entry.bytes}"
                raise CheckpointCorrupt(self._file(entry.name), reason, *self._at(entry.name, size))

    def verify(self, threads: int = 4, on_bytes: Callable[[int], None] | None = None) -> None:
        """Read every byte and check it; raises CheckpointCorrupt naming file, tensor and element range.

        `on_bytes(n)` hears of n more bytes read, one call at a time.
        """
        self.check_sizes()
        verify_blocks(self.folder, self._blocks, threads=threads, on_bytes=on_bytes, damaged=self._damaged)

    def load(
        self,
        targets: Sequence[tuple[Want, memoryview]],
        threads: int = 4,
        memory_bytes: int = 64 << 20,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Fill each want's memory, (stop - start) * itemsize bytes, with its elements one behind the other.

        Only the blocks that are needed are read, each once; `memory_bytes` are held besides. `on_bytes(n)` hears of n
        more bytes read. Raises CheckpointCorrupt, when targets may hold anything, Unrecoverable for a tensor that is
        not there, IndexInvalid for a range or memory that does not fit, StoreError.
        """
        self._load(self.index, targets, threads, memory_bytes, on_bytes)

    def read_copies(
        self,
        targets: Sequence[tuple[Copy, memoryview]],
        threads: int = 4,
        memory_bytes: int = 64 << 20,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Fill the targets of copies that were planned on `index`; see `load`, and `reader.py` for the memory."""
        read_copies(
            self.folder, self._blocks, targets, threads=threads, memory_bytes=memory_bytes, on_bytes=on_bytes,
            damaged=self._damaged,
        )  # fmt: skip

    def read_into(self, copy: Copy, out: memoryview) -> None:
        """Read one planned copy into `out` (exactly its length, or for a region its want's memory), in this thread.

        Every byte is checked: the blocks that it lies in are read whole. For many copies take `read_copies`, which
        reads a block that several of them lie in once. Raises as that does.
        """
        self.read_copies([(copy, out)], threads=1)

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
        self._load(part, [(Want(name, kind, 0, meta.numel, ""), memoryview(data))])
        return meta, data

    def state_sha256(self) -> str:
        """The design's hash of the whole state, as a run that stands at this checkpoint reports it."""
        lines = []
        for lot in _lots(self.index.tensors):
            data = [bytearray(meta.nbytes) for meta in lot]
            wants = [Want(meta.name, meta.kind, 0, meta.numel, "") for meta in lot]
            self.load([(want, memoryview(part)) for want, part in zip(wants, data, strict=True)])
            lines += [tensor_line(m, hashlib.sha256(part).hexdigest()) for m, part in zip(lot, data, strict=True)]
        return combine(lines, self.manifest.step)

    @cached_property
    def _by_tensor(self) -> dict[TensorKey, StateIndex]:
        fragments: dict[TensorKey, list[Fragment]] = {meta.key: [] for meta in self.index.tensors}
        for f in self.index.fragments:
            fragments[f.key].append(f)
        return {
            meta.key: StateIndex(self.index.step, (meta,), tuple(fragments[meta.key])) for meta in self.index.tensors
        }

    def _load(
        self,
        index: StateIndex,
        targets: Sequence[tuple[Want, memoryview]],
        threads: int = 4,
        memory_bytes: int = 64 << 20,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.read_copies(planned(index, targets), threads, memory_bytes, on_bytes)

    def _file(self, name: str) -> str:
        return self.folder.child(name).url

    def _at(self, file: str, position: int) -> tuple[str, str, int, int]:
        f = fragment_at(self.index, file, position)
        return ("", "", 0, 0) if f is None else (f.name, f.kind, f.start, f.stop)

    def _damaged(self, file: str, first: int, end: int) -> Exception:
        """What is wrong with bytes [first, end) of a file, which are not what they should be."""
        try:
            self.check_sizes()
            return corrupt_block(self.folder, file, self.index, first, end)
        except (CheckpointCorrupt, StoreError) as error:
            return error


def planned(index: StateIndex, targets: Sequence[tuple[Want, memoryview]]) -> list[tuple[Copy, memoryview]]:
    """The copies that fill each want's memory, and the memory of each, as `read_copies` takes it.

    Raises IndexInvalid for memory of another length than the want's.
    """
    metas = index.metas()
    # A holder for each want: copies of one holder may be joined over its wants, whose memories are not one.
    wants = [
        Want(want.name, want.kind, want.start, want.stop, str(number), want.box)
        for number, (want, _) in enumerate(targets)
    ]
    found = []
    for copy in plan(index, wants, lambda source, want: 0):
        want, (_, target) = wants[int(copy.holder)], targets[int(copy.holder)]
        size = metas[copy.name, copy.kind].itemsize
        if target.nbytes != (want.stop - want.start) * size:
            text = f"{target.nbytes} bytes of memory for {want.start}:{want.stop} of {copy.name!r} ({copy.kind})"
            raise IndexInvalid(f"{text}, {size} bytes each")
        memory = target.cast("B")
        if copy.region is None:
            memory = memory[(copy.start - want.start) * size : (copy.stop - want.start) * size]
        found.append((copy, memory))
    return found


def find_newest(root: Folder | Url) -> Newest:
    """The newest checkpoint of a run's folder (see `run_folder`) that verifies, by (step, epoch, attempt).

    Reads all its bytes. Also says which newer ones were passed over, and why, so that a user sees what is
    lost. Raises StoreError when storage cannot be asked: a checkpoint that cannot be reached for now is not damaged.
    """
    base = root if isinstance(root, Folder) else folder_at(root)
    rejected = []
    for name in reversed(names(base)):
        folder = base.child(str(name))
        try:
            checkpoint = Checkpoint.of(folder)
            checkpoint.verify()
        except (StoreUnavailable, StoreDenied):
            raise
        except (CheckpointError, StoreError) as error:
            rejected.append(Rejected(folder, str(error)))
            continue
        return Newest(checkpoint.manifest, folder, tuple(rejected))
    return Newest(None, None, tuple(rejected))


def _lots(metas: Sequence[TensorMeta]) -> Iterator[list[TensorMeta]]:
    lot: list[TensorMeta] = []
    for meta in metas:
        if lot and sum(m.nbytes for m in lot) + meta.nbytes > _LOT_BYTES:
            yield lot
            lot = []
        lot.append(meta)
    if lot:
        yield lot

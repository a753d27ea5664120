"""The manifest: what makes a folder of rank files a checkpoint.

Owns `manifest.json` and the names of run and checkpoint folders. `commit` writes it last, after every file's size was
checked: all or nothing, durable, and exclusive (`Store.put_new`). No manifest, no checkpoint; a name is never used
twice. Functions keep no state; one writer a folder.

[Note: manifest format]
One line of JSON. The first field is `schema` (an integer; a reader refuses what it does not know), the last
is `xxh3`, the xxh3_64 of everything before `,"xxh3":`, as 16 hex digits. Fragments are rows of
[tensor number, start, stop, byte offset in the file, "xxh3_64 of the bytes"], grouped by file; a fragment that is cut
from a box has a sixth number, of its box in `boxes` ([first, extent, first, extent, …]). `blocks` of a file are the
xxh3_64 of its blocks (`blocks.py`), 16 hex digits each, in one string.
"""

import os
import re
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
import xxhash

from everstep.storage.blocks import Blocks, block_count
from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointExists,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsupported,
    IndexInvalid,
    IndexMismatch,
    StoreError,
    StoreExists,
    StoreNotFound,
)
from everstep.storage.index import Box, Fragment, Source, StateIndex, TensorMeta, merge
from everstep.storage.rank_file import FileRecord, checked_file_name
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Folder

MANIFEST: Final = "manifest.json"
SCHEMA: Final = 2
# 10^7 fragments of some 60 bytes each; larger than that is not ours, and is not read into memory.
_LIMIT_BYTES: Final = 1 << 30
_FOLDER: Final = re.compile(r"step-(0|[1-9]\d*)\.epoch-(0|[1-9]\d*)\.attempt-(0|[1-9]\d*)")
_HEX: Final = re.compile("[0-9a-f]*")
_TAIL: Final = re.compile(rb',"xxh3":"([0-9a-f]{16})"}\n?\Z')


class CheckpointName(msgspec.Struct, frozen=True, order=True):
    """`step-N.epoch-E.attempt-A`; names order as checkpoints do, the newest last."""

    step: int
    epoch: int
    attempt: int

    def __str__(self) -> str:
        return f"step-{self.step}.epoch-{self.epoch}.attempt-{self.attempt}"

    @staticmethod
    def parse(name: str) -> "CheckpointName | None":
        """The name's numbers, or None when the folder is not one of ours."""
        match = _FOLDER.fullmatch(name)
        return CheckpointName(*map(int, match.groups())) if match else None


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the checkpoint: its name, size in bytes and the xxh3_64 of each of its blocks."""

    name: str
    bytes: int
    blocks: tuple[int, ...]

    def as_blocks(self) -> Blocks:
        """What a reader checks it by."""
        return Blocks(self.bytes, self.blocks)


class Manifest(msgspec.Struct, frozen=True):
    """Everything about a checkpoint but its tensors' bytes.

    `created` is wall-clock time in seconds; `spec` is the JobSpec; `progress` belongs to whoever wrote it; `origin`
    says where an imported one came from.
    """

    job: str
    run: str
    step: int
    epoch: int
    attempt: int
    created: float
    versions: dict[str, str]
    spec: dict[str, Any]
    progress: dict[str, Any]
    files: tuple[FileEntry, ...]
    index: StateIndex
    origin: dict[str, Any] = {}

    @property
    def name(self) -> CheckpointName:
        """The name of the folder it was written for."""
        return CheckpointName(self.step, self.epoch, self.attempt)


class _Row(msgspec.Struct, frozen=True, array_like=True):
    tensor: Annotated[int, msgspec.Meta(ge=0)]
    start: int
    stop: int
    offset: int
    checksum: str
    box: int = -1  # its number in the manifest's list; -1: the whole tensor


class _File(msgspec.Struct, frozen=True):
    name: str
    bytes: int
    blocks: str
    fragments: list[_Row]


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    python: bool = False


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    schema: int
    job: str
    run: str
    step: int
    epoch: int
    attempt: int
    created: float
    versions: dict[str, str]
    spec: dict[str, Any]
    progress: dict[str, Any]
    origin: dict[str, Any]
    tensors: list[_Tensor]
    boxes: list[tuple[int, ...]]
    files: list[_File]


class _Versioned(msgspec.Struct):
    schema: int


def run_folder(to: str | os.PathLike[str], job: str, run: str) -> Folder:
    """TO/JOB/RUN, where a run's checkpoints are; raises CheckpointError where a name cannot be a folder's, and as
    `folder_at` does for the URL."""
    return folder_at(to).child(checked_file_name(job)).child(checked_file_name(run))


def new_folder(root: Folder, step: int, epoch: int, attempt: int = 0) -> tuple[Folder, CheckpointName]:
    """Create the folder of a checkpoint that is about to be written; `root`: see `run_folder`, created too.

    `attempt` is the lowest to try. Attempts that are there are passed over; a caller that lets `collect`
    remove failed ones counts up itself, so that no name is used twice. Raises StoreError when storage
    refuses.
    """
    taken = [name.attempt for name in names(root) if (name.step, name.epoch) == (step, epoch)]
    attempt = max([attempt, *(number + 1 for number in taken)])
    while True:
        name = CheckpointName(step, epoch, attempt)
        folder = root.child(str(name))
        try:
            folder.store.claim_folder(folder.path)
        except StoreExists:
            attempt += 1
            continue
        return folder, name


def names(root: Folder) -> list[CheckpointName]:
    """The checkpoint folders under `root`, with a manifest or without, the newest last; links are not
    followed. Raises StoreError.
    """
    parsed = [CheckpointName.parse(entry.name) for entry in root.store.entries(root.path) if entry.is_folder]
    return sorted(name for name in parsed if name is not None)


def commit(
    folder: Folder,
    records: Sequence[FileRecord],
    *,
    job: str,
    run: str,
    name: CheckpointName,
    spec: Mapping[str, Any],
    progress: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    created: float | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Manifest:
    """Make the written files a checkpoint; returns once it would survive a power cut.

    `folder` and `name` are from `new_folder`, `records` from `write_file`, one a file. `spec`, `progress`, `versions`
    and `origin` must be plain JSON. `created` defaults to now. May be called again after a StoreError: a manifest
    that is there already and differs in nothing but `created` is this one, whose answer was lost, and is returned.

    Raises CheckpointIncomplete when a file has not the size that was reported or the files do not cover every tensor,
    CheckpointExists when there is another manifest, StoreError when storage refuses.
    """
    index = _whole_state(folder, records, name.step)
    files = sorted((FileEntry(r.name, r.bytes, r.blocks) for r in records), key=lambda entry: entry.name)
    manifest = Manifest(
        job, run, name.step, name.epoch, name.attempt, time.time() if created is None else created,
        dict(versions or {}), dict(spec), dict(progress or {}), tuple(files), index, dict(origin or {}),
    )  # fmt: skip
    place = folder.child(MANIFEST)
    data = encode(manifest)
    ours = _checked(decode(data, place.url), place.url)
    try:
        folder.store.put_new(place.path, data)
    except StoreExists as error:
        theirs = _twin(folder, ours)
        if theirs is None:
            raise CheckpointExists(f"{place} is there already") from error
        return theirs
    except StoreError:
        theirs = _twin(folder, ours)
        if theirs is None:
            raise
        return theirs
    return manifest


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises CheckpointNotFound when there is none, CheckpointUnsupported when its schema is of another version,
    CheckpointCorrupt when it is damaged or says what cannot be, StoreError when storage cannot be asked.
    """
    place = folder.child(MANIFEST)
    try:
        size = folder.store.size(place.path)
        if size > _LIMIT_BYTES:
            raise CheckpointCorrupt(place.url, f"{size} bytes; a manifest has at most {_LIMIT_BYTES}")
        data = bytearray(size)
        got = folder.store.read_into(place.path, 0, memoryview(data)) if size else 0
    except StoreNotFound as error:
        raise CheckpointNotFound(f"{folder}: no {MANIFEST}, so no checkpoint") from error
    return _checked(decode(memoryview(data)[:got], place.url), place.url)


def encode(manifest: Manifest) -> bytes:
    """See [Note: manifest format]."""
    number = {meta.key: i for i, meta in enumerate(manifest.index.tensors)}
    rows: dict[str, list[tuple[int | str, ...]]] = {file.name: [] for file in manifest.files}
    boxes: dict[Box, int] = {}
    for f in manifest.index.fragments:
        row = (number[f.key], f.start, f.stop, f.offset, _hex(f.checksum))
        rows[f.source.locator].append((*row, boxes.setdefault(f.box, len(boxes))) if f.box else row)
    body = {
        "schema": SCHEMA, "job": manifest.job, "run": manifest.run, "step": manifest.step, "epoch": manifest.epoch,
        "attempt": manifest.attempt, "created": manifest.created, "versions": manifest.versions,
        "spec": manifest.spec, "progress": manifest.progress, "origin": manifest.origin,
        "tensors": [_Tensor(m.name, m.kind, m.dtype, m.shape, m.python) for m in manifest.index.tensors],
        "boxes": [[number for pair in box for number in pair] for box in boxes],
        "files": [
            {"name": f.name, "bytes": f.bytes, "blocks": _all_hex(f.blocks), "fragments": rows[f.name]}
            for f in manifest.files
        ],
    }  # fmt: skip
    head = msgspec.json.encode(body)[:-1]
    return head + f',"xxh3":"{_hex(xxhash.xxh3_64_intdigest(head))}"}}\n'.encode()


def decode(data: bytes | memoryview, file: str) -> Manifest:
    """The inverse of `encode`; `file` is for messages. Raises as `read_manifest` does, but checks no
    ranges.
    """
    try:
        schema = msgspec.json.decode(data, type=_Versioned).schema
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise CheckpointCorrupt(file, f"not a manifest: {error}") from error
    if schema != SCHEMA:
        which, advice = ("an older", "read it with the version that wrote it") if schema < SCHEMA else (
            "a newer", "update everstep to read it")  # fmt: skip
        raise CheckpointUnsupported(
            f"{file}: manifest of schema {schema}, by {which} everstep; this one reads schema {SCHEMA}: {advice}"
        )
    tail = _TAIL.search(data, max(0, len(data) - 64))
    if tail is None or tail[1].decode() != _hex(xxhash.xxh3_64_intdigest(memoryview(data)[: tail.start()])):
        raise CheckpointCorrupt(file, "it does not match its own checksum")
    try:
        body = msgspec.json.decode(data, type=_Body)
        tensors = tuple(TensorMeta(t.name, t.kind, t.dtype, t.shape, t.python) for t in body.tensors)
        boxes = [_box(numbers) for numbers in body.boxes]
        fragments = tuple(
            Fragment(
                tensors[row.tensor].name, tensors[row.tensor].kind, row.start, row.stop, source, row.offset,
                int(row.checksum, 16), boxes[row.box] if row.box >= 0 else (),
            )
            for source, rows in ((Source("file", "", f.name), f.fragments) for f in body.files)
            for row in rows
        )  # fmt: skip
        files = tuple(FileEntry(f.name, f.bytes, _block_checksums(f)) for f in body.files)
    except (msgspec.MsgspecError, ValueError, IndexError) as error:
        raise CheckpointCorrupt(file, f"says what cannot be: {error}") from error
    return Manifest(
        body.job, body.run, body.step, body.epoch, body.attempt, body.created, body.versions, body.spec,
        body.progress, files, StateIndex(body.step, tensors, fragments), body.origin,
    )  # fmt: skip


def _checked(manifest: Manifest, file: str) -> Manifest:
    """The manifest, when it describes a whole state in files that can be; raises CheckpointCorrupt."""
    try:
        manifest.index.validate()
        for entry in manifest.files:
            checked_file_name(entry.name)
    except (IndexInvalid, CheckpointError) as error:
        raise CheckpointCorrupt(file, str(error)) from error
    sizes = {entry.name: entry.bytes for entry in manifest.files}
    if len(sizes) < len(manifest.files):
        raise CheckpointCorrupt(file, "lists a file twice")
    metas = manifest.index.metas()
    ends = dict.fromkeys(sizes, 0)
    for f in sorted(manifest.index.fragments, key=lambda f: (f.source.locator, f.offset, f.stop - f.start)):
        end = f.offset + (f.stop - f.start) * metas[f.key].itemsize
        if end > sizes[f.source.locator] or f.offset < ends[f.source.locator]:
            reason = f"bytes {f.offset}:{end} of {f.source.locator} overlap others or end behind the file"
            raise CheckpointCorrupt(file, reason, f.name, f.kind, f.start, f.stop)
        ends[f.source.locator] = end
    for name, kind, start, stop in manifest.index.missing():
        raise CheckpointCorrupt(file, "no file holds these", name, kind, start, stop)
    return manifest


def _whole_state(folder: Folder, records: Sequence[FileRecord], step: int) -> StateIndex:
    """The merged index of files that are there with the sizes reported; raises CheckpointIncomplete."""
    if not records:
        raise CheckpointIncomplete(f"{folder}: no files")
    sizes = {entry.name: entry.bytes for entry in folder.store.entries(folder.path) if not entry.is_folder}
    for record in records:
        if record.name not in sizes:
            raise CheckpointIncomplete(f"{folder.child(record.name)}: there is no such file")
        if sizes[record.name] != record.bytes:
            raise CheckpointIncomplete(
                f"{folder.child(record.name)}: {sizes[record.name]} bytes, {record.bytes} were reported"
            )
    try:
        index = merge(*(record.index(step) for record in records))
    except (IndexMismatch, IndexInvalid) as error:
        raise CheckpointIncomplete(f"{folder}: {error}") from error
    for name, kind, start, stop in index.missing():
        raise CheckpointIncomplete(f"{folder}: no file holds elements {start}:{stop} of {name!r} ({kind})")
    return index


def _twin(folder: Folder, ours: Manifest) -> Manifest | None:
    """The manifest that is there, when it is `ours` but for the time of its making."""
    try:
        theirs = read_manifest(folder)
    except (CheckpointError, StoreError):
        return None
    return theirs if msgspec.structs.replace(theirs, created=ours.created) == ours else None


def _box(numbers: Sequence[int]) -> Box:
    if len(numbers) % 2 or not numbers:
        raise ValueError(f"a box of {len(numbers)} numbers")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _block_checksums(file: _File) -> tuple[int, ...]:
    """Raises ValueError when there is not one for every block; looked at before memory is taken."""
    count = block_count(file.bytes) if file.bytes >= 0 else -1
    if len(file.blocks) != 16 * count or not _HEX.fullmatch(file.blocks):
        raise ValueError(f"{len(file.blocks)} hex digits of block checksums for {file.bytes} bytes of {file.name!r}")
    return struct.unpack(f">{count}Q", bytes.fromhex(file.blocks))


def _all_hex(numbers: Sequence[int]) -> str:
    return struct.pack(f">{len(numbers)}Q", *numbers).hex()


def _hex(number: int) -> str:
    return f"{number:016x}"

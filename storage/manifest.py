"""The manifest: what makes a folder of rank files a checkpoint.

Owns `manifest.json` and the names of run and checkpoint folders. `commit` writes it last: every file's size
is checked, then a temporary file, fsync, rename, fsync of the folder. No manifest, no checkpoint; a name is
never used twice. Functions keep no state; one writer a folder.

[Note: manifest format]
One line of JSON. The first field is `schema` (an integer; a reader refuses what it does not know), the last
is `xxh3`, the xxh3_64 of everything before `,"xxh3":`, as 16 hex digits. Fragments are rows of
[tensor number, start, stop, byte offset in the file, "xxh3_64 of the bytes"], grouped by file.
"""

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import msgspec
import xxhash

from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointExists,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsupported,
    IndexInvalid,
    IndexMismatch,
)
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta, merge
from everstep.storage.rank_file import FileRecord, checked_file_name

MANIFEST: Final = "manifest.json"
SCHEMA: Final = 1
# 10^7 fragments of some 60 bytes each; larger than that is not ours, and is not read into memory.
_LIMIT_BYTES: Final = 1 << 30
_FOLDER: Final = re.compile(r"step-(0|[1-9]\d*)\.epoch-(0|[1-9]\d*)\.attempt-(0|[1-9]\d*)")
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
    """A file of the checkpoint: its name, size in bytes and xxh3_64."""

    name: str
    bytes: int
    xxh3: int


class Manifest(msgspec.Struct, frozen=True):
    """Everything about a checkpoint but its tensors' bytes.

    `created` is wall-clock time in seconds; `spec` is the JobSpec; `progress` belongs to whoever wrote it.
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

    @property
    def name(self) -> CheckpointName:
        """The name of the folder it was written for."""
        return CheckpointName(self.step, self.epoch, self.attempt)


class _File(msgspec.Struct, frozen=True):
    name: str
    bytes: int
    xxh3: str
    fragments: list[tuple[int, int, int, int, str]]


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
    tensors: list[_Tensor]
    files: list[_File]


class _Versioned(msgspec.Struct):
    schema: int


def local_path(url: str | os.PathLike[str]) -> Path:
    """The folder that a path or a file:// URL names; raises CheckpointUnsupported for other schemes."""
    text = os.fspath(url)
    if "://" not in text:
        return Path(text)
    parts = urlsplit(text)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise CheckpointUnsupported(f"{text}: checkpoints are kept in local folders: a path, or file:///PATH")
    return Path(unquote(parts.path))


def run_folder(to: str | os.PathLike[str], job: str, run: str) -> Path:
    """TO/JOB/RUN, where a run's checkpoints are; raises CheckpointError where a name cannot be a folder's."""
    return local_path(to) / checked_file_name(job) / checked_file_name(run)


def new_folder(root: str | os.PathLike[str], step: int, epoch: int, attempt: int = 0) -> tuple[Path, CheckpointName]:
    """Create the folder of a checkpoint that is about to be written; `root`: see `run_folder`, created too.

    `attempt` is the lowest to try. Attempts that are there are passed over; a caller that lets `collect`
    remove failed ones counts up itself, so that no name is used twice. Raises CheckpointError when storage
    refuses.
    """
    base = Path(root)
    try:
        _make_durable(base)
        taken = [name.attempt for name in names(base) if (name.step, name.epoch) == (step, epoch)]
        attempt = max([attempt, *(number + 1 for number in taken)])
        while True:
            name = CheckpointName(step, epoch, attempt)
            try:
                (base / str(name)).mkdir()
            except FileExistsError:
                attempt += 1
                continue
            sync_folder(base)
            return base / str(name), name
    except OSError as error:
        raise CheckpointError(f"{base}: cannot create a checkpoint's folder: {error.strerror}") from error


def names(root: str | os.PathLike[str]) -> list[CheckpointName]:
    """The checkpoint folders under `root`, with a manifest or without, the newest last; links are not
    followed.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as entries:
        parsed = [CheckpointName.parse(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        return sorted(name for name in parsed if name is not None)
    return []


def commit(
    folder: str | os.PathLike[str],
    records: Sequence[FileRecord],
    *,
    job: str,
    run: str,
    name: CheckpointName,
    spec: Mapping[str, Any],
    progress: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    created: float | None = None,
) -> Manifest:
    """Make the written files a checkpoint; returns once it would survive a power cut.

    `folder` and `name` are from `new_folder`, `records` from `write_rank_file`, one a file. `spec`,
    `progress` and `versions` must be plain JSON. `created` defaults to now. Raises CheckpointIncomplete when
    a file has not the size that was reported or the files do not cover every tensor, CheckpointExists when
    there is a manifest.
    """
    path = Path(folder)
    index = _whole_state(path, records, name.step)
    files = sorted((FileEntry(r.name, r.bytes, r.xxh3) for r in records), key=lambda entry: entry.name)
    manifest = Manifest(
        job, run, name.step, name.epoch, name.attempt, time.time() if created is None else created,
        dict(versions or {}), dict(spec), dict(progress or {}), tuple(files), index,
    )  # fmt: skip
    data = encode(manifest)
    _checked(decode(data, str(path / MANIFEST)), str(path / MANIFEST))
    if (path / MANIFEST).exists():
        raise CheckpointExists(f"{path / MANIFEST} is there already")
    try:
        sync_folder(path)
        _write_durably(path / f".{MANIFEST}.tmp", data)
        os.rename(path / f".{MANIFEST}.tmp", path / MANIFEST)
        sync_folder(path)
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot write it: {error.strerror}") from error
    return manifest


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises CheckpointNotFound when there is none, CheckpointUnsupported when its schema is of another version,
    CheckpointCorrupt when it is damaged or says what cannot be.
    """
    path = Path(folder) / MANIFEST
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LIMIT_BYTES:
                raise CheckpointCorrupt(str(path), f"{size} bytes; a manifest has at most {_LIMIT_BYTES}")
            data = file.read(size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(f"{folder}: no {MANIFEST}, so no checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _checked(decode(data, str(path)), str(path))


def encode(manifest: Manifest) -> bytes:
    """See [Note: manifest format]."""
    number = {meta.key: i for i, meta in enumerate(manifest.index.tensors)}
    rows: dict[str, list[tuple[int, int, int, int, str]]] = {file.name: [] for file in manifest.files}
    for f in manifest.index.fragments:
        rows[f.source.locator].append((number[f.key], f.start, f.stop, f.offset, _hex(f.checksum)))
    body = _Body(
        schema=SCHEMA, job=manifest.job, run=manifest.run, step=manifest.step, epoch=manifest.epoch,
        attempt=manifest.attempt, created=manifest.created, versions=manifest.versions, spec=manifest.spec,
        progress=manifest.progress,
        tensors=[_Tensor(m.name, m.kind, m.dtype, m.shape, m.python) for m in manifest.index.tensors],
        files=[_File(f.name, f.bytes, _hex(f.xxh3), rows[f.name]) for f in manifest.files],
    )  # fmt: skip
    head = msgspec.json.encode(body)[:-1]
    return head + f',"xxh3":"{_hex(xxhash.xxh3_64_intdigest(head))}"}}\n'.encode()


def decode(data: bytes, file: str) -> Manifest:
    """The inverse of `encode`; `file` is for messages. Raises as `read_manifest` does, but checks no
    ranges.
    """
    try:
        schema = msgspec.json.decode(data, type=_Versioned).schema
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise CheckpointCorrupt(file, f"not a manifest: {error}") from error
    if schema != SCHEMA:
        raise CheckpointUnsupported(f"{file}: manifest of schema {schema}; this everstep reads schema {SCHEMA}")
    tail = _TAIL.search(data, max(0, len(data) - 64))
    if tail is None or tail[1].decode() != _hex(xxhash.xxh3_64_intdigest(memoryview(data)[: tail.start()])):
        raise CheckpointCorrupt(file, "it does not match its own checksum")
    try:
        body = msgspec.json.decode(data, type=_Body)
        tensors = tuple(TensorMeta(t.name, t.kind, t.dtype, t.shape, t.python) for t in body.tensors)
        fragments = tuple(
            Fragment(tensors[t].name, tensors[t].kind, start, stop, source, offset, int(checksum, 16))
            for source, rows in ((Source("file", "", f.name), f.fragments) for f in body.files)
            for t, start, stop, offset, checksum in rows
        )
        files = tuple(FileEntry(f.name, f.bytes, int(f.xxh3, 16)) for f in body.files)
    except (msgspec.MsgspecError, ValueError, IndexError) as error:
        raise CheckpointCorrupt(file, f"says what cannot be: {error}") from error
    return Manifest(
        body.job, body.run, body.step, body.epoch, body.attempt, body.created, body.versions, body.spec,
        body.progress, files, StateIndex(body.step, tensors, fragments),
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


def _whole_state(folder: Path, records: Sequence[FileRecord], step: int) -> StateIndex:
    """The merged index of files that are there with the sizes reported; raises CheckpointIncomplete."""
    for record in records:
        path = folder / record.name
        try:
            size = path.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise CheckpointIncomplete(f"{path}: {error.strerror}") from error
        if size != record.bytes:
            raise CheckpointIncomplete(f"{path}: {size} bytes, {record.bytes} were reported")
    if not records:
        raise CheckpointIncomplete(f"{folder}: no files")
    try:
        index = merge(*(record.index(step) for record in records))
    except (IndexMismatch, IndexInvalid) as error:
        raise CheckpointIncomplete(f"{folder}: {error}") from error
    for name, kind, start, stop in index.missing():
        raise CheckpointIncomplete(f"{folder}: no file holds elements {start}:{stop} of {name!r} ({kind})")
    return index


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_durable(folder: Path) -> None:
    """mkdir -p whose new entries survive a power cut."""
    if folder.is_dir():
        return
    _make_durable(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hex(number: int) -> str:
    return f"{number:016x}"

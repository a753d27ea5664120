"""Between other people's checkpoints and ours.

Owns `import_checkpoint` and `export_checkpoint`. An import is the planner once more: what is there is an index over
foreign files (`foreign.py`), what is wanted are our own files; bytes stream through bounded memory, reading ahead of
writing. Functions keep no state; no torch but for exports that need it.
"""

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointExists,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsupported,
    IndexInvalid,
    StoreError,
    StoreExists,
    StoreNotFound,
)
from everstep.storage.formats.foreign import Foreign
from everstep.storage.formats.stream import ReadAhead, Targets
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
from everstep.storage.manifest import MANIFEST, CheckpointName, commit, new_folder
from everstep.storage.rank_file import FileRecord, write_file
from everstep.storage.reader import read_copies
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Folder

Progress = Callable[[int, int], None]
FORMATS_IN: Final = {"dcp": "dcp", "deepspeed": "deepspeed", "safetensors": "hf", "megatron": "megatron"}
FORMATS_OUT: Final = {"dcp": "dcp_out", "safetensors": "hf_out"}
_FRAGMENT_BYTES: Final = 64 << 20  # what a reader that finds damage can name, and a load can be cut by


def import_checkpoint(
    format: str,
    src: str,
    url: str,
    *,
    step: int | None = None,
    job: str | None = None,
    run: str | None = None,
    patterns: Any = None,
    names: Sequence[tuple[str, str]] | None = None,
    threads: int = 2,
    memory_bytes: int = 128 << 20,
    file_bytes: int = 4 << 30,
    progress: Progress | None = None,
    **options: Any,
) -> Checkpoint:
    """Write the checkpoint of another format at `src` as one of ours under `url`, and open it.

    `format`: "dcp", "deepspeed", "safetensors" or "megatron". `url`: a run's folder TO/JOB/RUN, in which a new
    step-STEP.epoch-0.attempt-A is made, or such a folder itself. `job` and `run` default to the names in the URL.
    `step` overrides the one that the format knows. `patterns`, `names` and further options go to the format's reader.
    `memory_bytes` bounds buffers; files have `file_bytes` where no tensor is larger. `progress(done, total)` hears of
    bytes written, from any thread.

    Raises CheckpointUnsupported, CheckpointNotFound, CheckpointCorrupt, CheckpointIncomplete (naming the range that
    the source lacks), CheckpointExists, StoreError. Nothing of the new checkpoint is left then.
    """
    if step is not None and step < 0:
        raise CheckpointUnsupported(f"step {step} is negative")
    source = _source(format, src, options)
    given = {"step": step, "patterns": patterns, "names": names, **options}
    foreign = _foreign(format, source, {name: value for name, value in given.items() if value is not None})
    _check_whole(source, foreign)
    sizes = _sizes(source, foreign)
    folder, name = _target(url, foreign.index.step if step is None else step, step is not None)
    root = Folder(folder.store, folder.path.rpartition("/")[0])
    run = root.name if run is None else run
    job = root.path.rpartition("/")[0].rpartition("/")[2] if job is None else job
    try:
        if not job or not run:
            raise CheckpointUnsupported(f"{url}: no TO/JOB/RUN to take job and run from; give job= and run=")
        records = _write(source, foreign, folder, name.step, threads, memory_bytes, file_bytes, progress)
        _check_unchanged(source, sizes)
        origin = {
            "format": format,
            "source": source.url,
            "files": sizes,
            "ignored": list(foreign.ignored),
            "tied": dict(foreign.tied),
            "notes": list(foreign.notes),
            "everstep": _version(),
        }
        manifest = commit(
            folder, records, job=job, run=run, name=name, spec={}, progress={}, versions={"everstep": _version()},
            origin=origin,
        )  # fmt: skip
    except BaseException:
        _remove(folder)
        raise
    return Checkpoint(folder, manifest)


def export_checkpoint(checkpoint: Checkpoint, format: str, dst: str, **options: Any) -> None:
    """Write a checkpoint of ours in another format to `dst`, a folder that is empty or not there.

    `format`: "safetensors" (see `hf_out.py` for its options) or "dcp" (`dcp_out.py`). Raises CheckpointUnsupported,
    CheckpointExists where `dst` is not empty, CheckpointCorrupt when the checkpoint is damaged, StoreError. What was
    written is removed then.
    """
    module = FORMATS_OUT.get(format)
    if module is None:
        raise CheckpointUnsupported(f"format {format!r} cannot be written; {', '.join(sorted(FORMATS_OUT))} can")
    folder = folder_at(dst)
    if folder.store.entries(folder.path):
        raise CheckpointExists(f"{folder} is not empty; give a folder that is empty or not there")
    write = importlib.import_module(f"everstep.storage.formats.{module}").write
    try:
        _called(format, write, checkpoint, folder, **options)
    except BaseException:
        _remove(folder)
        raise


def _source(format: str, src: str, options: dict[str, Any]) -> Folder:
    if format not in FORMATS_IN:
        raise CheckpointUnsupported(f"format {format!r} cannot be read; {', '.join(sorted(FORMATS_IN))} can")
    source = folder_at(src, links=True)
    if format == "safetensors" and "file" not in options:
        from everstep.storage.formats.hf import single_file

        place = single_file(source)
        if place is not None:
            source, options["file"] = place
    if not source.store.entries(source.path):
        raise CheckpointNotFound(f"{source}: there is nothing")
    return source


def _foreign(format: str, source: Folder, options: Mapping[str, Any]) -> Foreign:
    read = importlib.import_module(f"everstep.storage.formats.{FORMATS_IN[format]}").read
    foreign = _called(format, read, source, **options)
    assert isinstance(foreign, Foreign)
    try:
        foreign.index.validate()
    except IndexInvalid as error:
        raise CheckpointCorrupt(source.url, f"describes what cannot be: {error}") from error
    return foreign


def _called(format: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The format's function; an option that it does not have is the user's mistake."""
    known = function.__kwdefaults__ or {}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise CheckpointUnsupported(
            f"format {format} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    return function(*args, **options)


def _check_whole(source: Folder, foreign: Foreign) -> None:
    if not foreign.index.tensors:
        raise CheckpointIncomplete(f"{source}: there are no tensors in it that can be taken")
    metas = foreign.index.metas()
    for key, data in foreign.inline.items():
        assert len(data) == metas[key].nbytes
    for name, kind, start, stop in foreign.index.missing():
        if (name, kind) not in foreign.inline:
            raise CheckpointIncomplete(f"{source}: no file holds elements {start}:{stop} of {name!r} ({kind})")


def _sizes(source: Folder, foreign: Foreign) -> dict[str, int]:
    """The files that bytes are taken from, and their sizes."""
    metas = foreign.index.metas()
    found: dict[str, int] = {}
    for f in foreign.index.fragments:
        path = f.source.locator
        if path not in found:
            place = source.child(path)
            try:
                found[path] = place.store.size(place.path)
            except StoreNotFound:
                raise CheckpointCorrupt(place.url, "missing", f.name, f.kind, f.start, f.stop) from None
        if not f.strides and f.offset + (f.stop - f.start) * metas[f.key].itemsize > found[path]:
            reason = f"{found[path]} bytes, cut off before the end of a tensor"
            raise CheckpointCorrupt(source.child(path).url, reason, f.name, f.kind, f.start, f.stop)
    return found


def _check_unchanged(source: Folder, sizes: Mapping[str, int]) -> None:
    for path, size in sizes.items():
        place = source.child(path)
        try:
            now = place.store.size(place.path)
        except StoreNotFound:
            now = -1
        if now != size:
            what = "was removed" if now < 0 else f"has {now} bytes instead of {size}"
            raise CheckpointCorrupt(place.url, f"changed while it was read: {what}; import it again")


def _target(url: str, step: int, given: bool) -> tuple[Folder, CheckpointName]:
    """The new checkpoint's folder, claimed."""
    root = folder_at(url)
    name = CheckpointName.parse(root.name)
    if name is None:
        return new_folder(root, step, 0)
    if name.step != step and (given or step):
        raise CheckpointUnsupported(
            f"{url}: is for step {name.step}, the source stands at step {step}; give step= too"
        )
    try:
        root.store.claim_folder(root.path)
    except StoreExists:
        raise CheckpointExists(f"{url} is there already; names are never used twice") from None
    return root, name


def _write(
    source: Folder,
    foreign: Foreign,
    folder: Folder,
    step: int,
    threads: int,
    memory_bytes: int,
    file_bytes: int,
    progress: Progress | None,
) -> list[FileRecord]:
    files = list(_files(foreign.index.tensors, file_bytes))
    told = _Told(progress, sum(meta.nbytes for meta in foreign.index.tensors))
    foreign_files = {f.source.locator: None for f in foreign.index.fragments}

    def damaged(file: str, first: int, end: int) -> Exception:
        return CheckpointCorrupt(source.child(file).url, f"ends before byte {end}: changed while it was read")

    def read(targets: Targets) -> None:
        read_copies(source, foreign_files, targets, threads=threads, memory_bytes=memory_bytes // 4, damaged=damaged)

    order = [meta for metas in files for meta in metas]
    records = []
    with ReadAhead(foreign.index, order, read, inline=foreign.inline, memory_bytes=memory_bytes // 2) as ahead:
        for number, metas in enumerate(files):
            pieces = StateIndex(step, tuple(metas), tuple(_pieces(metas)))
            file = f"import-{number:05d}.safetensors"
            records.append(
                write_file(
                    folder, file, pieces, lambda fragment, first, out: ahead.take(out), threads=threads,
                    memory_bytes=memory_bytes // 4, metadata={"step": str(step)}, on_bytes=told.more,
                )
            )  # fmt: skip
    told.all()
    return records


def _files(tensors: Sequence[TensorMeta], file_bytes: int) -> Iterator[list[TensorMeta]]:
    """Whole tensors in the order of their names, the files' worth of each; in a file, as `write_file` orders them."""
    batch: list[TensorMeta] = []
    used = 0
    for meta in sorted(tensors, key=lambda meta: meta.key):
        if batch and used + meta.nbytes > file_bytes:
            yield sorted(batch, key=lambda meta: -meta.itemsize)
            batch, used = [], 0
        batch.append(meta)
        used += meta.nbytes
    if batch:
        yield sorted(batch, key=lambda meta: -meta.itemsize)


def _pieces(metas: Sequence[TensorMeta]) -> Iterator[Fragment]:
    """The tensors cut into fragments of at most `_FRAGMENT_BYTES`."""
    nowhere = Source("file", "", "")
    for meta in metas:
        step = _FRAGMENT_BYTES // meta.itemsize
        for start in range(0, meta.numel, step):
            yield Fragment(meta.name, meta.kind, start, min(start + step, meta.numel), nowhere, 0)


class _Told:
    """Bytes done of a total, told from any thread; headers and padding are not counted beyond the total."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def more(self, count: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done = min(self._done + count, self._total)
                self._progress(self._done, self._total)

    def all(self) -> None:
        self.more(self._total)


def _remove(folder: Folder) -> None:
    """After an error, which is what matters: one of the store's here is not told."""
    try:
        folder.store.remove_folder(folder.path, first=MANIFEST)
    except StoreError:
        pass


def _version() -> str:
    try:
        return version("everstep")
    except PackageNotFoundError:
        return "unknown"

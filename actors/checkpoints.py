"""A run's checkpoints: folders begun, rank files reported, manifests written, old ones collected.

Files are written by the managers; this desk commits a manifest once all of a view's ranks have reported.
Manifests and collection touch the disk, so they run in one worker thread; `on_done(folder, step, error)` is
called from it.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from everstep.actors.config import Saved
from everstep.actors.journal import Journal
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.spec import JobSpec
from everstep.storage.errors import StorageError
from everstep.storage.manifest import CheckpointName, commit, names, new_folder, run_folder
from everstep.storage.rank_file import FileRecord
from everstep.storage.retention import collect


@dataclass
class _Open:
    view: tuple[int, int]
    step: int
    name: CheckpointName
    files: int
    progress: dict[str, Any]
    records: list[FileRecord] = field(default_factory=list)
    failed: str = ""
    reported: set[str] = field(default_factory=set)  # domains


def claim_epoch(root: Path) -> int:
    """A number that no execution of this run ever had, taken by creating its file. Raises OSError."""
    claims = root / "epochs"
    claims.mkdir(parents=True, exist_ok=True)
    claimed = [int(file.name) for file in claims.iterdir() if file.name.isdecimal()]
    epoch = max([*claimed, *(name.epoch for name in names(root))], default=0) + 1
    while True:
        try:
            (claims / str(epoch)).touch(exist_ok=False)
        except FileExistsError:  # another driver was faster
            epoch += 1
            continue
        for old in sorted(claimed)[:-1]:
            (claims / str(old)).unlink(missing_ok=True)
        return epoch


class _InProgress(Collection[str]):
    """Names of the folders that have no manifest yet and must not be collected.

    The loop makes folders while the worker collects: who asks about a folder waits until it is registered.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._names: set[str] = set()

    def add(self, folder: str) -> None:
        """Its caller has held `lock` since before the folder was made."""
        self._names.add(Path(folder).name)

    def discard(self, folder: str) -> None:
        with self.lock:
            self._names.discard(Path(folder).name)

    def __contains__(self, name: object) -> bool:
        with self.lock:
            return name in self._names

    def __iter__(self) -> Iterator[str]:
        with self.lock:
            return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


class CheckpointDesk:
    """Checkpoints of one execution; methods are called by the supervisor's loop."""

    def __init__(self, spec: JobSpec, spec_dir: Path, epoch: int, on_done: Callable[[str, int, str], None]) -> None:
        assert spec.checkpoint is not None
        folder = spec.checkpoint_dir(spec_dir)
        assert folder is not None
        self.root = run_folder(str(folder), spec.name, spec.run_name)
        self._spec = spec
        self._epoch = epoch
        self._on_done = on_done
        self._open: dict[str, _Open] = {}
        self._in_progress = _InProgress()
        self._attempts: dict[int, int] = {}  # by step: the next number; a collected folder's name is not used again
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._pending: list[Future[None]] = []
        self.trusted: set[str] = set()
        self.newest: Resume | None = None
        self.urls: list[str] = []  # finished by this execution, oldest first

    def begin(self, view: tuple[int, int], step: int, files: int, progress: dict[str, Any]) -> str:
        """A new folder for `step`, to be filled by the `files` ranks of `view` (epoch, number); "" (and on_done) when
        storage refuses."""
        try:
            with self._in_progress.lock:
                folder, name = new_folder(self.root, step, self._epoch, self._attempts.get(step, 0))
                self._attempts[step] = name.attempt + 1
                self._in_progress.add(str(folder))
        except StorageError as error:
            self._on_done("", step, str(error))
            return ""
        self._open[str(folder)] = _Open(view, step, name, files, progress)
        return str(folder)

    def saved(self, saved: Saved, domain: str) -> None:
        """The manager of `domain` has written a rank's file, or could not."""
        entry = self._open.get(saved.folder)
        if entry is None:
            return
        entry.reported.add(domain)
        if saved.error:
            entry.failed = saved.error
        else:
            entry.records.append(msgspec.msgpack.decode(saved.record, type=FileRecord))
        if len(entry.reported) == entry.files:
            del self._open[saved.folder]
            self._pending.append(self._worker.submit(self._finish, saved.folder, entry))

    def abandon(self, base_step: int, sealed: Mapping[tuple[tuple[int, int], int], Collection[str]]) -> set[int]:
        """A view has ended: what its ranks had not all sealed will never be complete. The steps of it.

        `sealed`: by view and step, the domains that hold that version.
        """
        steps = set()
        for folder, entry in list(self._open.items()):
            there = entry.reported | set(sealed.get((entry.view, entry.step), ()))
            if entry.step > base_step or len(there) < entry.files:
                del self._open[folder]
                self._in_progress.discard(folder)
                self._on_done(folder, entry.step, "its view ended before every rank had sealed it")
                steps.add(entry.step)
        return steps

    def note(self, journal: Journal, folder: str, step: int, error: str) -> None:
        """Books what `on_done` told; called by the loop."""
        if error:
            text = f"the checkpoint of step {step} failed: {error}"
            journal.add("finding", text, {"syndrome": "checkpoint", "step": step, "error": error})
        else:
            self.urls.append(folder)
            journal.add("checkpoint", f"checkpoint of step {step}: {folder}", {"step": step, "checkpoint": folder})

    @property
    def busy(self) -> bool:
        return bool(self._open) or not all(future.done() for future in self._pending)

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _finish(self, folder: str, entry: _Open) -> None:
        try:
            if entry.failed:
                raise StorageError(entry.failed)
            spec = self._spec
            versions = {name: version(name) for name in ("everstep", "torch")} | {"python": platform.python_version()}
            manifest = commit(
                folder, entry.records, job=spec.name, run=spec.run_name, name=entry.name, spec=spec.to_dict(),
                progress=entry.progress, versions=versions,
            )  # fmt: skip
        except Exception as error:  # in the worker nobody else would hear of it
            self._on_done(folder, entry.step, str(error) or type(error).__name__)
            return
        finally:
            self._in_progress.discard(folder)
        self.trusted.add(str(entry.name))
        row = int(entry.progress["nonfinite_in_a_row"])
        if self.newest is None or self.newest.step < entry.step:
            self.newest = Resume(folder, manifest.index, row)
        self._on_done(folder, entry.step, "")
        assert spec.checkpoint is not None
        collect(
            self.root, spec.checkpoint.keep, self._epoch,
            in_progress=self._in_progress, trusted=self.trusted,
        )  # fmt: skip

"""A run's checkpoints: folders named, rank files reported, manifests written, old ones collected.

Files are written by the managers; this desk commits a manifest once all of a view's ranks have reported. Everything
that touches storage runs in one worker thread, so that a store that hangs holds up nobody; `on_done(folder, step,
error)` is called from it.
"""

from __future__ import annotations

import platform
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import msgspec

from everstep.actors.claims import Claims
from everstep.actors.config import Saved
from everstep.actors.journal import Journal
from everstep.actors.run_config import RunConfig
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.spec import JobSpec
from everstep.storage.errors import CheckpointError, StorageError
from everstep.storage.manifest import CheckpointName, commit, names, read_manifest, run_folder
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
    scored: bool = True  # else its evaluation has not been heard of
    failed: str = ""
    reported: set[str] = field(default_factory=set)  # domains


class _InProgress(Collection[str]):
    """Names of the folders that have no manifest yet and must not be collected; asked while the loop adds to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def add(self, name: str) -> None:
        """Before anything is written there."""
        with self._lock:
            self._names.add(name)

    def discard(self, name: str) -> None:
        with self._lock:
            self._names.discard(name)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._names

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


class CheckpointDesk:
    """Checkpoints of one execution; methods are called by the supervisor's loop."""

    def __init__(
        self,
        spec: JobSpec,
        url: str,
        epoch: int,
        on_done: Callable[[str, int, str], None],
        commit_id: str = "",
        claims: Claims | None = None,
    ) -> None:
        """`url`: the job's `checkpoint.to`, absolute. `commit_id`: of the task's repository, where there is one.
        `claims`: no manifest is committed once a later epoch is taken."""
        assert spec.checkpoint is not None
        self.root = run_folder(url, spec.name, spec.run_name)
        self._spec = spec
        self._rules = spec.checkpoint
        self._epoch = epoch
        self._on_done = on_done
        self._commit_id = commit_id
        self._claims = claims
        self._open: dict[str, _Open] = {}
        self._in_progress = _InProgress()
        self._attempts: dict[int, int] = {}  # by step: the next number; no name is used twice in an epoch
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._pending: list[Future[None]] = []
        self._unheard = 0  # manifests given to the worker whose news the loop has not booked
        self._scores: dict[str, float | None] = {}  # of the metric that the best is kept by; the worker's
        self.trusted: set[str] = set()
        self.newest: Resume | None = None
        self.urls: list[str] = []  # finished by this execution, in the order of their steps
        self._steps: list[int] = []  # of them

    def go_on(self, finished: Sequence[tuple[int, str]]) -> None:
        """(step, url) of what the supervisors before this one finished in this execution. Raises CheckpointError,
        StoreError: then memory has to serve, or the checkpoint that the run was started from."""
        self._steps[:] = [step for step, _ in finished]
        self.urls[:] = [url for _, url in finished]
        folders = [url.rstrip("/").rpartition("/")[2] for url in self.urls]
        self.trusted |= set(folders)
        if finished:
            manifest = read_manifest(self.root.child(folders[-1]))
            row = int(manifest.progress.get("nonfinite_in_a_row", 0))
            self.newest = Resume(self.urls[-1], manifest.index, row)

    @property
    def finished(self) -> tuple[tuple[int, str], ...]:
        """(step, url) in the order of steps."""
        return tuple(zip(self._steps, self.urls, strict=True))

    def begin(self, view: tuple[int, int], step: int, files: int, progress: dict[str, Any]) -> str:
        """The folder for `step`, to be filled by the `files` ranks of `view` (epoch, number). Touches no storage: the
        epoch is this execution's alone, so a name that it has not given out is new."""
        name = CheckpointName(step, self._epoch, self._attempts.get(step, 0))
        self._attempts[step] = name.attempt + 1
        self._in_progress.add(str(name))
        url = self.root.child(str(name)).url
        every = self._spec.eval.every
        self._open[url] = _Open(view, step, name, files, progress, scored=not every or step % every > 0)
        return url

    def saved(self, saved: Saved, domain: str) -> bool:
        """The manager of `domain` has written a rank's file, or could not; True when it was the last of them."""
        entry = self._open.get(saved.folder)
        if entry is None:
            return False
        entry.reported.add(domain)
        if saved.error:
            entry.failed = saved.error
        else:
            entry.records.append(msgspec.msgpack.decode(saved.record, type=FileRecord))
        self._finish_if_whole(saved.folder, entry)
        return len(entry.reported) == entry.files

    def scored(self, step: int, metrics: Mapping[str, float]) -> None:
        """The evaluation of `step`: the manifest of its checkpoint says so."""
        for url, entry in list(self._open.items()):
            if entry.step == step:
                entry.progress["metrics"] |= metrics
                entry.scored = True
                self._finish_if_whole(url, entry)

    def _finish_if_whole(self, url: str, entry: _Open) -> None:
        if entry.scored and len(entry.reported) == entry.files:
            del self._open[url]
            self._pending = [future for future in self._pending if not future.done()]
            self._unheard += 1
            self._pending.append(self._worker.submit(self._finish, url, entry))

    def abandon(self, base_step: int, sealed: Mapping[tuple[tuple[int, int], int], Collection[str]]) -> set[int]:
        """A view has ended: what its ranks had not all sealed will never be complete. The steps of it.

        `sealed`: by view and step, the domains that hold that version.
        """
        steps = set()
        for folder, entry in list(self._open.items()):
            there = entry.reported | set(sealed.get((entry.view, entry.step), ()))
            if entry.step > base_step or len(there) < entry.files:
                del self._open[folder]
                self._in_progress.discard(str(entry.name))
                steps.add(entry.step)
        return steps

    def note(self, journal: Journal, folder: str, step: int, error: str, what: str) -> None:
        """Books what `on_done` told; called by the loop. `what`: what follows from a failure."""
        self._unheard -= bool(folder)
        if error:
            text = f"the checkpoint of step {step} failed: {error}; {what}" if folder else error
            journal.add("finding", text, {"syndrome": "checkpoint", "step": step, "error": error})
        else:
            self._steps.insert(at := bisect_right(self._steps, step), step)  # a later one may be whole earlier
            self.urls.insert(at, folder)
            journal.add("checkpoint", f"checkpoint of step {step}: {folder}", {"step": step, "checkpoint": folder})

    @property
    def busy(self) -> bool:
        return bool(self._open) or self._unheard > 0 or not all(future.done() for future in self._pending)

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    # ---- the worker -------------------------------------------------------------------------------------

    def _finish(self, url: str, entry: _Open) -> None:
        folder = self.root.child(str(entry.name))
        try:
            if entry.failed:
                raise StorageError(entry.failed)
            if self._claims is not None and (newest := self._claims.newest()) > self._epoch:
                raise StorageError(f"epoch {newest} has taken over from epoch {self._epoch}")
            spec = self._spec
            versions = {name: version(name) for name in ("everstep", "torch")} | {"python": platform.python_version()}
            if self._commit_id:
                versions["commit"] = self._commit_id
            manifest = commit(
                folder, entry.records, job=spec.name, run=spec.run_name, name=entry.name, spec=spec.to_dict(),
                progress=entry.progress, versions=versions,
            )  # fmt: skip
        except Exception as error:  # in the worker nobody else would hear of it
            self._in_progress.discard(str(entry.name))
            self._on_done(url, entry.step, str(error) or type(error).__name__)
            return
        self._in_progress.discard(str(entry.name))
        self.trusted.add(str(entry.name))
        row = int(entry.progress["nonfinite_in_a_row"])
        if self.newest is None or self.newest.step < entry.step:
            self.newest = Resume(url, manifest.index, row)
        self._on_done(url, entry.step, "")
        try:
            self._collect()
        except StorageError as error:  # the checkpoint stands; what is old is collected with the next one
            self._on_done("", entry.step, f"older ones could not be collected: {error}")

    def _collect(self) -> None:
        done = collect(
            self.root, self._rules.keep, self._epoch, keep_every=self._rules.keep_every, keep_best=self._best(),
            in_progress=self._in_progress, trusted=self.trusted,
        )  # fmt: skip
        self.trusted |= set(done.verified)

    def _best(self) -> tuple[str, ...]:
        """The name of the checkpoint with the best metric, where one is to be kept; of equals the newest."""
        best = self._rules.best
        if best is None:
            return ()
        there = [str(name) for name in names(self.root) if str(name) not in self._in_progress]
        for name in there:
            if name not in self._scores:
                self._scores[name] = self._score(name, best.metric)
        scored = [(score, name) for name in there if (score := self._scores[name]) is not None]
        if not scored:
            return ()
        wanted = min(scored)[0] if best.mode == "min" else max(scored)[0]
        return ([name for score, name in scored if score == wanted][-1],)

    def _score(self, name: str, metric: str) -> float | None:
        try:
            metrics = read_manifest(self.root.child(name)).progress.get("metrics", {})
        except CheckpointError:
            return None
        value = metrics.get(metric)
        return float(value) if isinstance(value, int | float) else None


def checkpoint_desk(config: RunConfig, on_done: Callable[[str, int, str], None]) -> CheckpointDesk | None:
    """A run's desk; None where it writes no checkpoints."""
    url = config.spec.checkpoint_url(config.spec_dir)
    if url is None:
        return None
    claims = config.plan.claims if config.plan is not None else None
    return CheckpointDesk(config.spec, url, config.epoch, on_done, config.commit_id, claims)

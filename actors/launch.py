"""Starts a run on one of the hosts, and hands back what steers it.

processes   the supervisor runs in this process; managers and ranks are its children through a zygote
ray         an embedded local Ray or a cluster; supervisor, managers and ranks are detached, named actors
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

from everstep.actors.claims import FolderClaims
from everstep.actors.host import OnExit
from everstep.actors.process_host import ProcessHost
from everstep.actors.provenance import commit_of
from everstep.actors.run_config import RunConfig
from everstep.actors.run_folder import RunFolder
from everstep.actors.supervisor import Supervisor
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.check import check, check_nodes
from everstep.platform.job.client import RunHandle
from everstep.platform.job.errors import Problem, SpecError
from everstep.platform.job.facts import TaskFacts
from everstep.platform.job.registry import Registration, Registry
from everstep.platform.job.result import RunResult
from everstep.platform.job.rules import absolute
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event, Status
from everstep.storage.checkpoint import find_newest
from everstep.storage.errors import StoreError
from everstep.storage.manifest import Manifest, run_folder

log = logging.getLogger(__name__)

# May change from one execution of a run to the next; everything else decides about the bits.
_FREE_FIELDS = frozenset(
    {
        "steps",
        "ranks",
        "priority",
        "layout",
        "faults",
        "resources",
        "runtime_env",
        "snapshot",
        "checkpoint",
        "limits",
        "timeouts",
        "log",
        "data",
        "eval",
    }
)


def resume_point(spec: JobSpec, spec_dir: Path) -> tuple[Resume, int]:
    """Where the run goes on, and its epoch. Raises SpecError naming what was changed and may not be."""
    url = spec.checkpoint_url(spec_dir)
    if spec.checkpoint is None or url is None:
        return Resume(), 1
    root = run_folder(url, spec.name, spec.run_name)
    try:
        epoch = FolderClaims(root).next()
        if spec.checkpoint.resume == "never":
            return Resume(), epoch
        newest = find_newest(root)
    except StoreError as error:
        raise SpecError(
            [
                Problem(
                    field="checkpoint.to",
                    value=spec.checkpoint.to,
                    allowed="a folder or bucket that can be read and written",
                    fix="correct its rights, or try again when it answers",
                    why=str(error),
                )
            ]
        ) from error
    passed_over = tuple(f"{rejected.folder.name}: {rejected.reason}" for rejected in newest.rejected)
    if newest.manifest is None:
        return Resume(passed_over=passed_over), epoch
    _check_unchanged(spec, newest.manifest)
    progress = newest.manifest.progress
    row, fingerprint = int(progress.get("nonfinite_in_a_row", 0)), dict(progress.get("fingerprint", {}))
    assert newest.folder is not None
    return Resume(newest.folder.url, newest.manifest.index, row, fingerprint, passed_over), epoch


def _check_unchanged(spec: JobSpec, manifest: Manifest) -> None:
    if not manifest.spec:  # imported: what it was trained with is not known here
        return
    before, after = dict(manifest.spec), spec.to_dict()
    for plain in (before, after):  # of all resources only these decide about the bits
        plain["resources.threads"] = plain.get("resources", {}).get("threads")
    problems = []
    for field in sorted((set(before) | set(after)) - _FREE_FIELDS):
        if before.get(field) != after.get(field):
            problems.append(
                Problem(
                    field=field,
                    value=after.get(field),
                    allowed=f"{before.get(field)!r}, as in the checkpoint of step {manifest.step}",
                    fix="change it back, or start a new run: --set run=NAME, or --set checkpoint.resume=never",
                )
            )
    if problems:
        raise SpecError(problems)


def _anchored(spec: JobSpec, spec_dir: Path) -> JobSpec:
    """The job with absolute checkpoint folders: relative ones are relative to the job file, wherever actors run."""
    url = spec.checkpoint_url(spec_dir)
    if spec.checkpoint is None or url is None:
        return spec
    changed: dict[str, Any] = {"to": url}
    if (initial := spec.checkpoint.init_from) is not None:
        changed["init_from"] = initial.model_copy(update={"url": absolute(initial.url, spec_dir)})
    return spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update=changed)})


def launch(
    spec: JobSpec,
    *,
    spec_dir: Path,
    host: str,
    address: str | None,
    facts: TaskFacts,
    registration: Registration,
) -> RunHandle:
    """Starts the run; returns at once. Raises SpecError for what only the storage can tell."""
    spec = _anchored(spec, spec_dir)
    if host == "processes":
        check_nodes(spec, 1)
    resume, epoch = resume_point(spec, spec_dir)
    if host == "ray":
        from everstep.actors.ray_launch import launch_ray  # Ray takes half a second to import

        return launch_ray(spec, spec_dir, address, resume, epoch, registration)
    return _LocalRun(spec, spec_dir, resume, epoch, registration)


def run(spec: JobSpec, *, spec_dir: Path | str = ".", host: str = "ray", address: str | None = None) -> RunResult:
    """Runs a job to its end and returns its result. Raises SpecError for a job that cannot run."""
    folder = Path(spec_dir).absolute()
    facts = check(spec, folder)
    registration = Registry().register(spec.name, spec.run_name, host=host, steps=spec.steps)
    result: RunResult | None = None
    try:
        handle = launch(spec, spec_dir=folder, host=host, address=address, facts=facts, registration=registration)
        try:
            while (result := handle.result()) is None:
                handle.wait(1.0)
        finally:
            handle.close()
    finally:
        registration.finish(result, 0 if result is not None and result.ok else 1)
        registration.close()
    return result


class _LocalRun:
    """A run whose supervisor is in this process. Implements `RunHandle`."""

    def __init__(self, spec: JobSpec, spec_dir: Path, resume: Resume, epoch: int, registration: Registration) -> None:
        self._folder = RunFolder(f"{spec.name}-{secrets.token_hex(4)}")
        self._folder.create()
        self._folder.hold()
        self._closed = False
        try:
            self._folder.ensure_reaper()
            self._log = logging.FileHandler(registration.logs / "supervisor.log")
            self._log.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
            logging.getLogger("everstep").addHandler(self._log)
            logging.getLogger("everstep").setLevel(logging.INFO)
            logging.getLogger("everstep").propagate = False  # reasons are for the log file, not for the terminal
            config = RunConfig(
                spec, spec_dir, self._folder.runid, self._folder.path, registration.token, epoch, resume,
                registration.metrics if "jsonl" in spec.log else None, "processes", commit_id=commit_of(spec_dir),
            )  # fmt: skip

            def make_host(on_exit: OnExit) -> ProcessHost:
                return ProcessHost(on_exit, log_dir=registration.logs, run_folder=self._folder)

            self._supervisor = Supervisor(config, make_host)
            registration.update(supervisor=self._supervisor.address, state="running")
            self._supervisor.start()
        except BaseException:
            self.close()
            raise

    def status(self) -> Status:
        return self._supervisor.status()

    def events(self, after: int) -> list[Event]:
        return self._supervisor.events(after)

    def scale(self, ranks: int) -> str:
        return self._supervisor.scale(ranks)

    def save(self) -> str:
        return self._supervisor.save()

    def drain(self, node: str, rank: int | None) -> str:
        return self._supervisor.drain(node, rank)

    def stop(self, reason: str) -> None:
        self._supervisor.stop(reason)

    def result(self) -> RunResult | None:
        return self._supervisor.result()

    def wait(self, timeout_s: float) -> bool:
        return self._supervisor.wait(timeout_s)

    def leave(self) -> bool:
        return False

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        supervisor: Any = getattr(self, "_supervisor", None)
        if supervisor is not None:
            supervisor.close()
        handler: logging.Handler | None = getattr(self, "_log", None)
        if handler is not None:
            logging.getLogger("everstep").removeHandler(handler)
            logging.getLogger("everstep").propagate = True
            handler.close()
        self._folder.release()

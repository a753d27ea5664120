"""`everstep submit` and `everstep.submit`: the same run, through a cluster's job server.

    check here -> upload the job file's folder -> Ray starts `everstep run` on the head -> follow its log -> exit code

The job file is checked twice: here, before anything is sent, and by `everstep run` on the cluster, which also looks
at what only the cluster has (shared memory, storage, room). Ctrl-C asks the run to stop, as under `run`; a second
one ends it through Ray.

Never imports ray or torch at import time. Owns: a thread that follows the log; signal handlers while it does.
"""

from __future__ import annotations

import json
import queue
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import everstep
from everstep.platform.job.check import check
from everstep.platform.job.errors import Problem, SpecError
from everstep.platform.job.result import RunResult
from everstep.platform.job.shipping import rays_own
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.versions import RESULT_MARK, SUBMITTED
from everstep.running import EXIT_FAILED, EXIT_OK, EXIT_REFUSED, EXIT_STOPPED, Interrupts, writable

if TYPE_CHECKING:
    from everstep.actors.ray_jobs import JobServer, JobState

_LOOK_S = 0.2


@dataclass(frozen=True)
class SubmitRequest:
    """What the command line asked for."""

    spec_path: Path
    address: str
    overrides: tuple[str, ...] = ()
    id: str | None = None
    detach: bool = False
    result_path: Path | None = None
    as_json: bool = False
    check: bool = True


class Job:
    """A run that was submitted. Calls raise ConnectionError where the job server cannot be reached."""

    def __init__(self, server: JobServer, id: str, name: str, variables: Mapping[str, str]) -> None:
        """Not for callers: use `everstep.submit`."""
        self.id = id
        self.name = name  # JOB/RUN
        self._server = server
        self._variables = dict(variables)

    def status(self) -> str:
        """Ray's word: PENDING, RUNNING, SUCCEEDED, FAILED (also where the run was stopped in order), STOPPED."""
        return self._server.state(self.id).status

    def scale(self, ranks: int) -> None:
        """Asks for another number of ranks; takes some seconds. Raises ValueError with why where it cannot be."""
        code, said = self._control("scale", self.name, "--ranks", str(ranks))
        if code:
            raise ValueError(said)

    def stop(self) -> None:
        """Asks the run to stop after its step, with a checkpoint; where it cannot be asked (it is still starting,
        say), Ray ends its driver."""
        if self._server.state(self.id).status == "RUNNING" and self._control("stop", self.name)[0] == 0:
            return
        self.kill()

    def kill(self) -> None:
        """Has Ray end the driver, which asks the run to stop and leaves within 3 s."""
        self._server.stop(self.id)

    def logs(self) -> str:
        """What the driver and the ranks have printed so far."""
        return self._server.logs(self.id)

    def result(self, timeout_s: float | None = None) -> RunResult:
        """Waits for the end and returns the result.

        Raises TimeoutError where it has not ended by then, and RuntimeError, with the end of its log, where it
        ended without a result: refused, or its driver was killed.
        """
        state = self._server.wait(self.id, timeout_s)
        text = self._server.logs(self.id)
        tail = "\n".join(text.splitlines()[-20:])
        if state is None:
            raise TimeoutError(f"job {self.id} has not ended within {timeout_s:g} s; its log ends:\n{tail}")
        result = result_in(text)
        if result is None:
            tail = tail or state.message
            raise RuntimeError(f"job {self.id} ended ({state.status}) without a result:\n{tail}")
        return result

    def _control(self, *words: str) -> tuple[int, str]:
        code, said = self._server.run(words, {"env_vars": self._variables})
        return code, said.strip().removeprefix("everstep: ")


def submit(
    spec: JobSpec | str | Path,
    address: str,
    *,
    spec_dir: Path | str = ".",
    id: str | None = None,
    overrides: tuple[str, ...] = (),
    look: bool = True,
) -> Job:
    """Submits a job to the cluster whose job server is at http://HEAD:8265; returns once it is accepted there.

    spec: a job file, or a JobSpec, whose files are in `spec_dir`. That folder is uploaded. look: check the task
    here first. Raises SpecError for a job that cannot run, ConnectionError for a cluster that cannot be reached.
    """
    if isinstance(spec, JobSpec):
        folder = Path(spec_dir).resolve()
        with _written(spec, folder) as path:
            return _submitted(spec, path, address, id, (), look)
    path = Path(spec).resolve()
    return _submitted(JobSpec.load(path, list(overrides)), path, address, id, overrides, look)


def _submitted(
    spec: JobSpec, path: Path, address: str, id: str | None, overrides: tuple[str, ...], look: bool, *more: str
) -> Job:
    folder = working_dir(spec, path)
    if look:
        check(spec, path.parent, source=str(path), here=False)
    from everstep.actors.ray_jobs import JobServer  # Ray takes half a second to import

    server = JobServer(address)
    variables = {SUBMITTED: everstep.__version__}
    given = spec.runtime_env.get("env_vars")
    if isinstance(given, dict):
        variables = {**{str(k): str(v) for k, v in given.items()}, **variables}
    runtime_env = {**spec.runtime_env, "working_dir": str(folder), "env_vars": variables}
    left_out: Any = spec.runtime_env.get("excludes") or []
    if excludes := [*left_out, *rays_own(folder)]:
        runtime_env["excludes"] = excludes
    words = ["run", str(path.relative_to(folder))] + [word for value in overrides for word in ("--set", value)]
    accepted = server.submit(
        [*words, *more],
        id=id or f"{spec.name}-{secrets.token_hex(4)}",
        runtime_env=runtime_env,
        metadata={"job": spec.name, "run": spec.run_name, "everstep": everstep.__version__},
    )
    return Job(server, accepted, f"{spec.name}/{spec.run_name}", variables)


def working_dir(spec: JobSpec, path: Path) -> Path:
    """The folder to upload: runtime_env.working_dir, which must then hold the job file, else the job file's."""
    given = spec.runtime_env.get("working_dir")
    folder = path.parent if given is None else (path.parent / str(given)).resolve()
    if not folder.is_dir() or not path.is_relative_to(folder):
        problem = Problem(
            "runtime_env.working_dir",
            given,
            "a local folder that holds the job file",
            "leave it out: the job file's folder is uploaded",
            "the cluster would not have the job file",
        )
        raise SpecError([problem], str(path))
    return folder


@contextmanager
def _written(spec: JobSpec, folder: Path) -> Iterator[Path]:
    """The job as a file in its folder, for as long as the upload takes."""
    path = folder / f"{spec.name}.{secrets.token_hex(4)}.yaml"
    try:
        path.write_text(spec.to_yaml(), encoding="utf-8")
    except OSError as error:
        fix = "submit a job file instead of a JobSpec"
        raise SpecError(
            [Problem("spec_dir", str(folder), "a folder that can be written", fix, str(error))]
        ) from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def result_in(text: str) -> RunResult | None:
    """The result that a submitted run's driver prints at its end."""
    for line in reversed(text.splitlines()):
        if line.startswith(RESULT_MARK):
            try:
                return RunResult.from_json(line.removeprefix(RESULT_MARK))
            except msgspec.DecodeError:
                return None
    return None


# ---- the command ----------------------------------------------------------------------------------------


def submit_job(request: SubmitRequest) -> int:
    """Submits, follows, and returns the exit code; prints what the command prints."""
    try:
        with Interrupts() as interrupts:
            return _run(request, interrupts)
    except SpecError as refused:
        print(f"everstep: {refused}", file=sys.stderr)
        return EXIT_REFUSED
    except ConnectionError as error:
        print(f"everstep: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("everstep: interrupted", file=sys.stderr)
        return EXIT_STOPPED


def _run(request: SubmitRequest, interrupts: Interrupts) -> int:
    path = request.spec_path.resolve()
    spec = JobSpec.load(request.spec_path, list(request.overrides))
    writable(request.result_path)
    more = ("--json",) if request.as_json and not request.detach else ()
    job = _submitted(spec, path, request.address, request.id, request.overrides, request.check, *more)
    out = _Lines(request.as_json)
    if request.detach:
        out.say(*_next_commands(job, request.address), kind="submitted", id=job.id, address=request.address)
        return EXIT_OK
    out.say(f"submitted as {job.id} to {request.address}; Ctrl-C stops the run in order", kind="submitted", id=job.id)
    for note in notes(spec):
        out.say(note)
    interrupts.watching = True
    state = _followed(job, out, interrupts)
    if state is None:
        return EXIT_STOPPED
    if request.result_path is not None:
        result = result_in(job.logs())
        if result is not None:
            result.write(request.result_path)
        else:
            print(f"everstep: there is no result, so {request.result_path} is not written", file=sys.stderr)
    if state.status == "SUCCEEDED":
        return EXIT_OK
    if state.status == "STOPPED":
        return EXIT_STOPPED
    if state.exit_code is None and state.message:
        print(f"everstep: {state.message}", file=sys.stderr)
    return state.exit_code if state.exit_code in (EXIT_REFUSED, EXIT_STOPPED) else EXIT_FAILED


def _followed(job: Job, out: _Lines, interrupts: Interrupts) -> JobState | None:
    """Prints the log until the job has ended; passes the first signal on as a request to stop.

    None where the terminal was closed: the job goes on.
    """
    server = job._server
    news: queue.SimpleQueue[str | JobState | BaseException | None] = queue.SimpleQueue()
    ended, told = threading.Event(), False

    def follow() -> None:
        try:
            news.put(server.follow(job.id, news.put, ended))
        except BaseException as error:
            news.put(error)

    thread = threading.Thread(target=follow, name="job-log", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = news.get(timeout=_LOOK_S)
            except queue.Empty:
                item = ""
            if isinstance(item, str):
                out.text(item)
            elif isinstance(item, BaseException):
                raise item
            elif item is not None:
                out.close()
                return item
            if interrupts.asked == "SIGHUP":
                return None
            if interrupts.asked and not told:
                told = True
                out.say(f"{interrupts.asked}: asking the run to stop after its step; once more ends it")
                threading.Thread(target=_stop, args=(job,), name="job-stop", daemon=True).start()
    except KeyboardInterrupt:
        out.say("ending the run's driver through Ray; what the run had protected stays in its checkpoints")
        job.kill()
        raise
    finally:
        ended.set()


def _stop(job: Job) -> None:
    try:
        job.stop()
    except ConnectionError as error:
        print(f"everstep: the run could not be asked to stop: {error}", file=sys.stderr)


def notes(spec: JobSpec) -> list[str]:
    """What a user should know before a run on a cluster that is fine otherwise."""
    if spec.checkpoint is None or "://" in spec.checkpoint.to or Path(spec.checkpoint.to).is_absolute():
        return []
    return [
        f"note: checkpoint.to {spec.checkpoint.to!r} is relative: checkpoints are in Ray's copy of the job's folder,"
        " and go with it. To resume, take an absolute path that all nodes share, or a bucket"
    ]


def _next_commands(job: Job, address: str) -> list[str]:
    at, name = f"--address {address}", job.name
    return [
        f"submitted as {job.id}",
        f"  logs    ray job logs {job.id} --follow {at}        on the head: everstep logs {name} --follow",
        f"  status  ray job status {job.id} {at}               on the head: everstep status {name}",
        f"  stop    ray job stop {job.id} {at}                 on the head: everstep stop {name}",
    ]


class _Lines:
    """The job's log, line by line, without the line that is for programs; with `as_json` one object a line."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._half = ""

    def say(self, *lines: str, **data: Any) -> None:
        if self._as_json:
            print(json.dumps({"kind": "note", "text": "\n".join(lines), **data}), flush=True)
            return
        for line in lines:
            print(line, flush=True)

    def text(self, text: str) -> None:
        *whole, self._half = (self._half + text).split("\n")
        for line in whole:
            self._line(line)

    def close(self) -> None:
        if self._half:
            self._line(self._half)
        self._half = ""

    def _line(self, line: str) -> None:
        if line.startswith(RESULT_MARK):
            return
        if self._as_json and not line.startswith("{"):
            if line:
                self.say(line, kind="log")
            return
        print(line, flush=True)

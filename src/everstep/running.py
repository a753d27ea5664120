"""`everstep run`: from a job file to an exit code.

    check -> register -> launch -> watch until there is a result -> show it -> close

| exit | meaning                                                           |
|------|-------------------------------------------------------------------|
| 0    | the run did all its steps (`result.ok`)                           |
| 1    | it failed                                                         |
| 2    | it was refused before anything started                            |
| 130  | it was stopped before its last step, by a signal or `everstep stop` |

Owns: the process's SIGINT, SIGTERM and SIGHUP handlers while it works. Call from the main thread.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from everstep import display as displays
from everstep.platform.job.check import check
from everstep.platform.job.client import RunHandle
from everstep.platform.job.errors import AlreadyRunning, Problem, SpecError, VersionMismatch
from everstep.platform.job.facts import TaskFacts
from everstep.platform.job.registry import Registration, Registry
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.versions import RESULT_MARK, SUBMITTED, check_submitter

EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED = 0, 1, 2, 130
POLL_S = 0.1
LEAVE_S = 1.5  # `ray job stop` sends SIGKILL 3 s after SIGTERM
FINISHING_S = 90.0  # how long a run of the same name may take to end that was asked to
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class RunRequest:
    """What the command line asked for."""

    spec_path: Path
    overrides: tuple[str, ...] = ()
    host: str = "ray"
    address: str | None = None
    result_path: Path | None = None
    as_json: bool = False

    def command(self) -> str:
        """The command line that resumes this run."""
        words = ["everstep", "run", str(self.spec_path)]
        words += [word for value in self.overrides for word in ("--set", value)]
        words += ["--host", self.host] if self.host != "ray" else []
        words += ["--address", self.address] if self.address else []
        words += ["--result", str(self.result_path)] if self.result_path else []
        words += ["--json"] if self.as_json else []
        return shlex.join(words)


class Interrupts:
    """Counts signals. The first, while a run is watched, only asks; any other raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = ""
        self.watching = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # nohup, or a shell's background job, asked us not to listen
                self._before[number] = before
                signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = not self.asked
        self.asked = signal.Signals(number).name
        if not (first and self.watching):
            raise KeyboardInterrupt


def run_job(request: RunRequest) -> int:
    """Runs a job to its end and returns the exit code; prints what the command prints."""
    out = displays.choose(sys.stdout, as_json=request.as_json)
    try:
        with Interrupts() as interrupts:
            return _run(request, out, interrupts)
    except (SpecError, AlreadyRunning, VersionMismatch) as refused:
        print(f"everstep: {refused}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("everstep: interrupted", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        out.close()


def _run(request: RunRequest, out: displays.Display, interrupts: Interrupts) -> int:
    check_submitter()
    spec = JobSpec.load(request.spec_path, list(request.overrides))
    spec_dir = request.spec_path.resolve().parent
    facts = check(spec, spec_dir, source=str(request.spec_path))
    writable(request.result_path)
    registration = _registered(request, spec, out)
    code, result, left = EXIT_FAILED, None, False
    try:
        out.start(spec, facts, request.host, spec_dir)
        code, result = _launched(request, spec, facts, registration, out, interrupts)
        left = registration.record.state == "stopping"
        return code
    except KeyboardInterrupt:
        code = EXIT_STOPPED
        raise
    except (SpecError, VersionMismatch):
        code = EXIT_REFUSED
        raise
    except ConnectionError as error:
        print(f"everstep: {error}", file=sys.stderr)
        return code
    finally:
        if not left:  # else the run goes on, and its supervisor takes over the name
            registration.finish(result, code)
        registration.close()


def _registered(request: RunRequest, spec: JobSpec, out: displays.Display) -> Registration:
    """Takes the run's name; waits for a run of this name that is finishing without a driver."""
    deadline, told = time.monotonic() + FINISHING_S, False
    registry = Registry()
    while True:
        try:
            return registry.register(
                spec.name, spec.run_name, host=request.host, spec=str(request.spec_path.resolve()), steps=spec.steps
            )
        except AlreadyRunning:
            former = registry.find(f"{spec.name}/{spec.run_name}")
            if (former.live and former.record.state != "stopping") or time.monotonic() > deadline:
                raise
        if not told:
            told = True
            out.note(f"the run {former.name} before this one is still finishing; waiting for its end")


def _launched(
    request: RunRequest,
    spec: JobSpec,
    facts: TaskFacts,
    registration: Registration,
    out: displays.Display,
    interrupts: Interrupts,
) -> tuple[int, RunResult | None]:
    from everstep.actors.launch import launch
    from everstep.actors.ray_driver import under_job

    handle: RunHandle = launch(
        spec,
        spec_dir=request.spec_path.resolve().parent,
        host=request.host,
        address=request.address,
        facts=facts,
        registration=registration,
    )
    try:
        try:
            interrupts.watching = True
            registration.update(state="running")
            result = watch(handle, out, interrupts, leave_s=LEAVE_S if under_job() else None)
            if result is None:
                registration.update(state="stopping")
                name = f"{spec.name}/{spec.run_name}"
                out.note(
                    f"{interrupts.asked}: this driver leaves, for Ray would kill it; the run finishes its step and"
                    f" its checkpoint by itself and ends (here: everstep status {name}); submit it again to resume"
                )
                return EXIT_STOPPED, None
        except KeyboardInterrupt:
            interrupts.watching = False
            print("everstep: ending at once", file=sys.stderr)
            handle.close()
            ended = handle.result()
            if ended is not None:
                _show(request, ended, out)
            _say_how_to_resume(request, spec, ended)
            return EXIT_STOPPED, ended
        _show(request, result, out)
        out.close()
        for line in displays.failure_lines(result):
            print(line, file=sys.stderr)
        if result.ok:
            return EXIT_OK, result
        if result.stopped or (interrupts.asked and result.error is None):
            _say_how_to_resume(request, spec, result)
            return EXIT_STOPPED, result
        if result.checkpoints:
            print(f"last checkpoint: {result.checkpoints[-1]}", file=sys.stderr)
        return EXIT_FAILED, result
    finally:
        handle.close()


def watch(
    handle: RunHandle,
    out: displays.Display,
    interrupts: Interrupts,
    sleep: Callable[[float], None] = time.sleep,
    leave_s: float | None = None,
) -> RunResult | None:
    """Shows a run until it has a result; passes the first signal on as a request to stop.

    leave_s: after SIGTERM there is only so much time, and the run can do without us: None where it was left.
    """
    seen, told, asked_at = 0, False, 0.0
    while True:
        result = handle.result()  # before the events: none of those before the end may be missed
        for event in handle.events(seen):
            seen = max(seen, event.id)
            out.event(event)
        out.status(handle.status())
        if result is not None:
            return result
        if interrupts.asked and not told:
            told, asked_at = True, time.monotonic()
            out.note(f"{interrupts.asked}: stopping after this step; once more ends at once")
            handle.stop(interrupts.asked)
        hurried = leave_s is not None and interrupts.asked == "SIGTERM" and told
        if hurried and time.monotonic() - asked_at > (leave_s or 0.0) and handle.leave():
            return None
        sleep(POLL_S)


def _show(request: RunRequest, result: RunResult, out: displays.Display) -> None:
    if request.result_path is not None:
        result.write(request.result_path)
    out.result(result)
    if SUBMITTED in os.environ:  # `everstep submit` reads it out of the job's log
        print(RESULT_MARK + result.to_json(indent=0), flush=True)


def _say_how_to_resume(request: RunRequest, spec: JobSpec, result: RunResult | None) -> None:
    if spec.checkpoint is None:
        text = "this job writes no checkpoints: it can only start over (set checkpoint.to to change that)"
    elif spec.checkpoint.resume == "never":
        text = f"resume with: {request.command()} --set checkpoint.resume=auto"
    elif result is not None and not result.checkpoints:
        text = f"no checkpoint by this execution; go on from the last one before it with: {request.command()}"
    else:
        text = f"resume with: {request.command()}"
    print(text, file=sys.stderr if request.as_json else sys.stdout, flush=True)


def writable(path: Path | None) -> None:
    """Refuses a result file that could not be written, before hours of work; leaves the file as it is."""
    if path is None:
        return
    problem = ""
    if path.is_dir():
        problem = "this is a folder"
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            probe = path.with_name(f".{path.name}.probe")
            probe.touch()
            with suppress(OSError):
                probe.unlink()
        except OSError as error:
            problem = str(error.strerror)
    if problem:
        fix = "choose another: --result FILE"
        raise SpecError([Problem("--result", str(path), "a file that can be written", fix, problem)])

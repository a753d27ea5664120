"""Starts real runs, in this process or through the command line, and compares them with one that nothing
happened to: a Session that holds all lanes in this process.

Waiting is always for a condition with a deadline. Not a test module.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from everstep.actors.launch import launch
from everstep.platform.job.facts import TaskFacts
from everstep.platform.job.registry import Registry
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event
from everstep.platform.training.engine import settings_of
from everstep.platform.training.session import Session
from everstep.platform.training.task import TaskContext, keyed_seed
from everstep.platform.training.task_loader import load_task
from everstep.storage.state_hash import combine

HERE = Path(__file__).parent
PATIENCE_S = 90.0  # runs take seconds; this much only on a machine with a great deal else to do
LOOK_S = 0.01

# One weight matrix is of several blocks, so that optimizer state is cut inside a tensor, not only between.
ARGS: dict[str, dict[str, Any]] = {
    "Mlp": {"samples": 512, "width": 160},
    "Gated": {"samples": 512, "width": 160},
    "Evaluated": {"samples": 512, "width": 160},
    "Failing": {"samples": 512},
    "OwnLoop": {"samples": 512, "width": 160},
    "Norm": {"samples": 256},
    "Tokens": {"samples": 256, "vocabulary": 251, "width": 48},
}
_FACTS = TaskFacts(parameters=0, state_bytes=0, samples=0, tensors=0, optimizer="")


def job_dict(task: str = "Mlp", *, args: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A small job as plain data; its name is its own."""
    return {
        "name": f"it-{secrets.token_hex(4)}",
        "task": f"{HERE / 'tasks.py'}:{task}",
        "args": {**ARGS[task], **(args or {})},
        "steps": 14,
        "seed": 3,
        "lanes": 8,
        "lane_batch": 4,
        "ranks": {"min": 1, "max": 3, "spares": 0},
        "snapshot": {"every": 1},  # so that a loss costs a step at most
        "train": {"clip_norm": 0.5, "warmup": 4, "optimizer": {"lr": 3e-3, "weight_decay": 0.01}},
    } | changes


def job(task: str = "Mlp", *, args: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    """`job_dict`, as a JobSpec."""
    return JobSpec.parse(job_dict(task, args=args, **changes))


def ranks(count: int, spares: int = 0) -> dict[str, int]:
    return {"min": 1, "max": count, "spares": spares}


# ---- what a run must come to ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """losses[i] is that of step i + 1; NaN where it was skipped."""

    losses: tuple[float, ...]
    state_sha256: str


def reference(spec: JobSpec) -> Reference:
    """The same job as one Session in this process: all lanes, no group, no faults."""
    plain = spec.to_dict()
    for field in ("name", "run", "ranks", "layout", "faults", "checkpoint", "timeouts", "log", "snapshot", "limits"):
        del plain[field]
    for steering in ("gates", "trace", "armed"):
        plain["args"].pop(steering, None)
    if plain["args"].get("how") == "raise-once":
        plain["args"]["how"] = "never"
    plain["task"] = plain["task"].replace(":OwnLoop", ":Mlp")
    return _reference(json.dumps({"name": "reference", "ranks": ranks(1), **plain}, sort_keys=True))


@cache
def _reference(text: str) -> Reference:
    spec = JobSpec.parse(json.loads(text))
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.resources.threads)
    try:
        task = load_task(spec.task, HERE, spec.args, TaskContext.of(spec))
        torch.manual_seed(keyed_seed(spec.seed, "model"))
        model = task.model()
        with Session(model, task.optimizer(model.parameters()), settings=settings_of(spec), task=task) as s:
            for _ in s.steps():
                for lane in s.lanes():
                    s.backward(lane, task.loss(model, s.batch(lane), s.context(lane)))
                s.commit()
    finally:
        torch.set_num_threads(threads)
    return Reference(tuple(s.losses), combine(s.state_lines, spec.steps))


def assert_same_bits(result: RunResult, spec: JobSpec, start: int = 0) -> None:
    """A run from step `start` to the end did all its steps, and each of them, and its state, are bit-equal."""
    expected = reference(spec)
    assert result.error is None, f"{result.error.message}\n{result.error.traceback}"
    assert result.ok
    assert result.steps == spec.steps
    pairs = zip(result.losses, expected.losses[start:], strict=True)
    differing = [start + 1 + i for i, (a, b) in enumerate(pairs) if not same(math.nan if a is None else a, b)]
    assert not differing, f"losses differ at steps {differing}"
    assert result.state_sha256 == expected.state_sha256


def same(a: float, b: float) -> bool:
    """Equal, NaN being equal to NaN."""
    return a == b or (math.isnan(a) and math.isnan(b))


# ---- runs in this process -------------------------------------------------------------------------------


class Live:
    """A run that this process started and steers."""

    def __init__(self, spec: JobSpec, host: str = "processes") -> None:
        self.spec = spec
        self._registration = Registry().register(spec.name, spec.run_name, host=host, steps=spec.steps)
        self.metrics = self._registration.metrics
        self.logs = self._registration.logs
        self.folder: Path | None = None
        try:
            self.handle = launch(
                spec, spec_dir=HERE, host=host, address=None, facts=_FACTS, registration=self._registration
            )
        except BaseException:
            self._registration.close()
            raise

    def close(self) -> None:
        self.handle.close()
        self._registration.finish(self.handle.result(), 0)
        self._registration.close()

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.handle.events(0) if event.kind == kind]

    def until(self, look: Callable[[], Any], what: str) -> Any:
        """Waits until `look` gives something true; fails where the run ends before."""

        def see() -> Any:
            found = look()
            done = self.handle.result()
            assert found or done is None, f"the run ended before {what}: {done}"
            return found

        return until(see, what)

    def step(self) -> int:
        return self.handle.status().step

    def result(self) -> RunResult:
        """Waits for the end."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.handle.wait(0.5):
                found = self.handle.result()
                assert found is not None
                return found
        raise AssertionError(f"no result after {PATIENCE_S:g} s: {self.handle.status()}")

    def lines(self) -> list[dict[str, Any]]:
        """What was written down of every verdict, those of steps that were computed again included."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def committed(self) -> list[tuple[int, float]]:
        """(step, loss) of `lines`."""
        return [(line["step"], math.nan if line["loss"] is None else line["loss"]) for line in self.lines()]


@contextlib.contextmanager
def live(spec: JobSpec, host: str = "processes") -> Iterator[Live]:
    run = Live(spec, host)
    try:
        yield run
    finally:
        run.close()


@dataclass(frozen=True)
class Finished:
    result: RunResult
    events: list[Event]
    committed: list[tuple[int, float]]

    def kinds(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def finish(spec: JobSpec, host: str = "processes") -> Finished:
    """Runs a job to its end."""
    with live(spec, host) as run:
        result = run.result()
        return Finished(result, run.handle.events(0), run.committed())


def until(look: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Waits until `look` gives something true, and returns it."""
    deadline = time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {patience_s:g} s in vain for {what}"
        time.sleep(LOOK_S)
    return found


class Gates:
    """Holds a run of the task `Gated` in front of steps; `shut(n)`: n steps commit and no more."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def shut(self, step: int) -> None:
        (self.folder / str(step)).touch()

    def open(self, step: int) -> None:
        (self.folder / str(step)).unlink()


# ---- runs through the command line ----------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "everstep", *words]


class Cli:
    """One `everstep run` in a process of its own; everything that it starts carries `mark`."""

    def __init__(self, folder: Path, spec: dict[str, Any], *options: str, host: str = "processes") -> None:
        self.name: str = spec["name"]
        self.mark = f"EVERSTEP_TEST_RUN={secrets.token_hex(8)}"
        name, _, value = self.mark.partition("=")
        folder.mkdir(exist_ok=True)
        self.file = folder / f"{self.name}.yaml"
        self.file.write_text(yaml.safe_dump(spec))
        self.result_file = folder / f"{self.name}.{secrets.token_hex(2)}.json"
        self._out, self._err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command("run", str(self.file), "--host", host, "--result", str(self.result_file), *options),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, name: value},
                cwd=folder,
            )

    def wait(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"everstep run did not end:\n{self.out}\n{self.err}") from None

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def result(self) -> RunResult:
        return RunResult.from_json(self.result_file.read_bytes())

    def until(self, look: Callable[[], Any], what: str) -> Any:
        """Waits until `look` gives something true; fails where the command ends before."""

        def see() -> Any:
            found = look()
            assert found or self.process.poll() is None, f"it ended before {what}:\n{self.out}\n{self.err}"
            return found

        return until(see, what)

    def status(self) -> dict[str, Any]:
        """`everstep status --json`; {} where it cannot be told yet."""
        done = ask("status", self.name, "--json", check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def at_step(self, step: int) -> None:
        """Waits until so many steps are committed."""
        metrics = Registry().root / "runs" / self.name / self.name / "metrics.jsonl"
        wanted = f'"step":{step},'
        self.until(lambda: metrics.exists() and wanted in metrics.read_text(), f"step {step}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """For the end of a failed test: nothing may outlive it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        if self.process.poll() is None:
            self.kill()


@contextlib.contextmanager
def cli(folder: Path, spec: dict[str, Any], *options: str, host: str = "processes") -> Iterator[Cli]:
    run = Cli(folder, spec, *options, host=host)
    try:
        yield run
    finally:
        run.close()


def ask(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Any other `everstep` command."""
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert not check or done.returncode == 0, f"everstep {' '.join(words)}: {done.stdout}\n{done.stderr}"
    return done


# ---- what is in the system ------------------------------------------------------------------------------


def run_folders(name: str) -> list[Path]:
    """The folders in shared memory of the runs of a job."""
    return list(Path("/dev/shm").glob(f"everstep-{name}-*"))


def run_processes(name: str) -> dict[str, int]:
    """Process name -> pid of what a live run on the process host has registered: rank-1.1, manager-0.1, …"""
    found = {}
    for folder in run_folders(name):
        for file in folder.glob("pids/[0-9]*"):
            with contextlib.suppress(OSError):
                found[Path(f"/proc/{file.name}/comm").read_text().strip()] = int(file.name)
    return found


def marked(mark: str) -> list[psutil.Process]:
    """Every living process that was started with this environment entry."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


def ports_of(processes: list[psutil.Process]) -> set[int]:
    """Where they listen."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            connections = process.net_connections("tcp")
            found |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return found

"""A live run for benchmarks: `everstep run` in a process of its own, watched from outside.

Owns the child process and one thread that follows the run's metrics.jsonl. One thread may use a `LiveRun`.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from everstep.actors.client import SupervisorClient
from everstep.platform.job.registry import Registry
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event, Status

TAIL_S = 0.002
START_LIMIT_S = 60.0
LEFT_S = 15.0  # the limit of the project for collecting everything after a run, however it ended


class BenchmarkFailed(Exception):
    """Something did not happen in its time; the message says what, and holds the end of the log."""


@dataclass(frozen=True)
class Line:
    """One committed step as seen from outside; `at_s` is wall time."""

    at_s: float
    step: int
    ranks: int


class Tail(threading.Thread):
    """Follows a file of JSON lines and notes when each was first seen."""

    def __init__(self, path: Path, every_s: float) -> None:
        super().__init__(name="tail", daemon=True)
        self._path = path
        self._every_s = every_s
        self._end = threading.Event()
        self.lines: list[Line] = []  # only appended to

    def run(self) -> None:
        while not self._path.exists():
            if self._end.wait(self._every_s):
                return
        rest = ""
        with self._path.open() as file:
            while not self._end.wait(self._every_s):
                text = file.read()
                if not text:
                    continue
                now = time.time()
                *whole, rest = (rest + text).split("\n")
                for line in map(json.loads, whole):
                    self.lines.append(Line(now, line["step"], line.get("ranks", 0)))

    def stop(self) -> None:
        self._end.set()
        self.join()


class LiveRun:
    """A job that runs as `everstep run` in a process of its own, watched through its public client."""

    def __init__(
        self,
        spec_path: Path,
        overrides: Sequence[str],
        host: str,
        state: Path,
        *,
        tail_s: float = TAIL_S,
        address: str | None = None,
    ) -> None:
        """tail_s: how often the metrics are looked at. address: of a Ray cluster; None embeds one."""
        name = f"bench-{secrets.token_hex(4)}"
        self._state = state
        self._log = state / "run.log"
        command = [sys.executable, "-m", "everstep", "run", str(spec_path), "--host", host]
        command += ["--address", address] if address else []
        command += [word for value in [*overrides, f"run={name}"] for word in ("--set", value)]
        with self._log.open("ab") as log:
            environment = {**os.environ, "EVERSTEP_STATE": str(state)}
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        self._client: SupervisorClient | None = None
        self._job = JobSpec.load(spec_path, list(overrides)).name
        self._folder = state / "runs" / self._job / name
        self.tail = Tail(self._folder / "metrics.jsonl", tail_s)
        self.tail.start()

    def connect(self) -> None:
        """Waits until the supervisor answers, the present one where there was another. Raises BenchmarkFailed."""

        def ready() -> bool:
            entry = next((e for e in Registry(self._state).runs() if e.path == self._folder), None)
            if entry is None or not entry.record.supervisor:
                return False
            self._client = SupervisorClient(entry.record.supervisor, entry.token())
            with suppress(ConnectionError):
                self.status()
                return True
            return False

        self.wait(ready, START_LIMIT_S, "the run to start", every_s=0.1)

    def status(self) -> Status:
        assert self._client is not None
        return self._client.status()

    def events(self, after: int) -> list[Event]:
        assert self._client is not None
        return self._client.events(after)

    def scale(self, ranks: int) -> str:
        assert self._client is not None
        return self._client.scale(ranks)

    def drain(self, rank: int) -> str:
        assert self._client is not None
        return self._client.drain("", rank)

    @property
    def pid(self) -> int:
        """Of `everstep run`."""
        return self._process.pid

    def over(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> RunResult:
        """Of a run that is over. Raises BenchmarkFailed where it left none."""
        entry = next((e for e in Registry(self._state).runs() if e.path == self._folder), None)
        result = entry.result() if entry is not None else None
        if result is None:
            raise BenchmarkFailed(f"the run ended without a result: {end_of(self._log)}")
        return result

    def wait(self, ready: Callable[[], bool], limit_s: float, what: str, every_s: float = 0.01) -> None:
        """Raises BenchmarkFailed after `limit_s`, or when the run has ended."""
        deadline = time.monotonic() + limit_s
        while not ready():
            if self._process.poll() is not None:
                raise BenchmarkFailed(f"the run ended (exit {self._process.returncode}): {end_of(self._log)}")
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"waited {limit_s:g} s for {what}: {end_of(self._log)}")
            time.sleep(every_s)

    def close(self) -> None:
        """Stops the run; after 30 s with violence."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
                break
        self.tail.stop()


def left_of(folder: Path) -> list[int]:
    """Processes that were started for `folder` (they inherit EVERSTEP_STATE) and live 15 s after their run's end."""
    mark = f"EVERSTEP_STATE={folder}".encode()
    deadline = time.monotonic() + LEFT_S
    while True:
        living = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _has(pid, mark)]
        if not living or time.monotonic() > deadline:
            return sorted(living)
        time.sleep(0.2)


def _has(pid: int, mark: bytes) -> bool:
    """A zombie has no environment any more."""
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def end_of(log: Path) -> str:
    """The last lines of a log, for an error message."""
    return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])

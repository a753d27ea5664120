"""The runs of this user on this machine, one folder each: what `everstep jobs`, `status` and `stop` look at.

    $EVERSTEP_STATE, or $XDG_STATE_HOME/everstep, or ~/.local/state/everstep
    └── runs/JOB/RUN/        0700
        ├── run.json         RunRecord, replaced atomically
        ├── lock             flock held while the run lives; the kernel lets go when its owner dies, however
        ├── token            0600: the run's secret
        ├── result.json      RunResult, when it ended
        ├── logs/            one file a process
        └── metrics.jsonl    one line a committed step

A run that is resumed keeps its folder. Owns: these files. Thread-safety: a `Registration` belongs to one
process and may be used from any of its threads; readers may be any process of the user.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from everstep.platform.job.errors import AlreadyRunning, UnknownJob
from everstep.platform.job.result import RunResult, write_atomic

SCHEMA = 1
# A reader that asks whether a run lives holds the lock for some microseconds; a starter waits that out.
_LOCK_PATIENCE_S = 0.5
_LOCK_RETRY_S = 0.02


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What run.json holds. state: starting, running, stopping, ended or failed (a dead owner may have left running);
    supervisor: address for `connect`, "" until known; started, ended: wall clock, seconds since 1970."""

    job: str
    run: str
    host: str = ""
    machine: str = ""
    supervisor: str = ""
    pid: int = 0
    started: float = 0.0
    ended: float | None = None
    state: str = "starting"
    exit: int | None = None
    result: str | None = None
    spec: str = ""
    steps: int = 0
    schema: int = SCHEMA


@dataclass(frozen=True)
class RunEntry:
    """One run as a reader sees it. live: its owner's lock is held now."""

    path: Path
    record: RunRecord
    live: bool

    @property
    def name(self) -> str:
        """`JOB`, or `JOB/RUN` when the run has a name of its own."""
        return self.record.job if self.record.run == self.record.job else f"{self.record.job}/{self.record.run}"

    @property
    def state(self) -> str:
        """The recorded state; "died" when the owner is gone without having ended the run."""
        unfinished = self.record.state in ("starting", "running", "stopping")
        return "died" if unfinished and not self.live else self.record.state

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def token(self) -> str:
        """Reads the run's token; raises OSError. Never print it."""
        return (self.path / "token").read_text(encoding="utf-8").strip()

    def result(self) -> RunResult | None:
        """Reads the run's result, None when there is none (yet)."""
        try:
            return RunResult.from_json((self.path / "result.json").read_bytes())
        except (FileNotFoundError, msgspec.DecodeError):
            return None


class Registration:
    """A run that this process owns: holds its name until `close`, or until the process is gone."""

    def __init__(self, path: Path, record: RunRecord, lock_fd: int, token: str) -> None:
        self.path = path
        self.token = token
        self._record = record
        self._lock_fd: int | None = lock_fd
        self._guard = threading.Lock()

    @property
    def record(self) -> RunRecord:
        return self._record

    @property
    def logs(self) -> Path:
        """Folder for one log file a process (NAME.log)."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """File for one JSON line a committed step; a resumed run appends."""
        return self.path / "metrics.jsonl"

    def update(self, **changes: Any) -> None:
        """Replaces fields of run.json (supervisor=…, state=…); raises OSError, AttributeError."""
        with self._guard:
            self._record = msgspec.structs.replace(self._record, **changes)
            self._write()

    def finish(self, result: RunResult | None, exit_code: int) -> None:
        """Records how the run ended, and its result, before the name is given back by `close`."""
        if result is not None:
            result.write(self.path / "result.json")
        state = "ended" if exit_code == 0 else "stopped" if result is not None and result.stopped else "failed"
        file = str(self.path / "result.json") if result is not None else None
        self.update(state=state, exit=exit_code, ended=time.time(), result=file)

    def close(self) -> None:
        """Gives the name back. Idempotent."""
        with self._guard:
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None

    def _write(self) -> None:
        _put(self.path, self._record)


class Registry:
    """The folder of all runs."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or state_folder()

    def register(
        self,
        job: str,
        run: str,
        *,
        host: str = "",
        spec: str = "",
        steps: int = 0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Registration:
        """Takes a run's name for this process; raises AlreadyRunning, OSError."""
        path = self.root / "runs" / job / run
        for folder in (self.root, self.root / "runs", path.parent, path, path / "logs"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = _take(path / "lock", sleep)
        if lock_fd is None:
            raise AlreadyRunning(
                f"a run named {job!r}" + (f" / {run!r}" if run != job else "") + " is live"
                f" (process {_pid_of(path)}): two of one name would write the same checkpoints;"
                f" stop it (everstep stop {job}), or give this one a name: --set run=OTHER"
            )
        token = secrets.token_hex(32)
        write_atomic(path / "token", token + "\n", mode=0o600)
        (path / "result.json").unlink(missing_ok=True)
        record = RunRecord(
            job=job,
            run=run,
            host=host,
            machine=socket.gethostname(),
            pid=os.getpid(),
            started=clock(),
            spec=spec,
            steps=steps,
        )
        registration = Registration(path, record, lock_fd, token)
        registration.update()
        return registration

    def runs(self) -> list[RunEntry]:
        """Returns every known run, newest first; folders without a readable run.json are passed over."""
        entries = []
        for file in self.root.glob("runs/*/*/run.json"):
            try:
                record = msgspec.json.decode(file.read_bytes(), type=RunRecord)
            except (OSError, msgspec.DecodeError):
                continue
            entries.append(RunEntry(file.parent, record, is_held(file.parent / "lock")))
        return sorted(entries, key=lambda e: e.record.started, reverse=True)

    def live_runs(self) -> list[RunEntry]:
        """Returns the runs whose owner lives."""
        return [entry for entry in self.runs() if entry.live]

    def find(self, job: str, *, live: bool = False) -> RunEntry:
        """Returns the run named `JOB` or `JOB/RUN`: the live one, else (unless `live`) the newest.

        Raises UnknownJob, listing what there is, when there is none or more than one live one.
        """
        name, _, run = job.partition("/")
        every = self.runs()
        named = [e for e in every if e.record.job == name and (not run or e.record.run == run)]
        alive = [e for e in named if e.live]
        if len(alive) > 1:
            names = ", ".join(e.name for e in alive)
            raise UnknownJob(f"{job!r} has more than one live run: name one of {names}")
        if alive:
            return alive[0]
        if named and not live:
            return named[0]
        if named:
            raise UnknownJob(f"{job!r} is not live (it {_past(named[0])}); {_list('live runs', every, live=True)}")
        raise UnknownJob(f"no run named {job!r}; {_list('known runs', every)}")


def readdress(path: Path, supervisor: str) -> None:
    """Notes in a run's folder where its supervisor is now. Does nothing where the folder is on another machine."""
    try:
        record = msgspec.json.decode((path / "run.json").read_bytes(), type=RunRecord)
    except (OSError, msgspec.DecodeError):
        return
    _put(path, msgspec.structs.replace(record, supervisor=supervisor))


def _put(path: Path, record: RunRecord) -> None:
    text = msgspec.json.format(msgspec.json.encode(record), indent=2).decode()
    write_atomic(path / "run.json", text + "\n", mode=0o600)


def state_folder() -> Path:
    """Returns the registry's folder, from the environment."""
    explicit = os.environ.get("EVERSTEP_STATE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "everstep"


def is_held(lock: Path) -> bool:
    """Says whether a living process holds this lock file."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _take(lock: Path, sleep: Callable[[float], None]) -> int | None:
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(int(_LOCK_PATIENCE_S / _LOCK_RETRY_S)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            sleep(_LOCK_RETRY_S)
    os.close(handle)
    return None


def _pid_of(path: Path) -> str:
    try:
        return str(msgspec.json.decode((path / "run.json").read_bytes(), type=RunRecord).pid)
    except (OSError, msgspec.DecodeError):
        return "unknown"


def _past(entry: RunEntry) -> str:
    return {"ended": "ended well", "failed": "failed", "stopped": "was stopped"}.get(entry.state, entry.state)


def _list(what: str, entries: list[RunEntry], *, live: bool = False) -> str:
    names = list(dict.fromkeys(e.name for e in entries if e.live or not live))
    return f"{what}: {', '.join(names[:10])}" if names else f"there are no {what}"

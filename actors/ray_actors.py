"""The actor classes of a run: a shell that runs an entry point, and nothing else.

One class per role, so that Ray's tools show what a process is. A sync method of an actor with the default
concurrency of one runs on the main thread of its process, where torch and signal handlers want to be; so
`whereabouts` is asked for before `run`, which lasts as long as the process is of use.

Imported by the processes of Ray. Never imports torch: the entry points do.
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import ray

import everstep
from everstep.actors.host import run_entry
from everstep.actors.run_folder import RunFolder, start_time
from everstep.collectives.addresses import NODE_VARIABLE, boot_id
from everstep.platform.job.versions import check_starter


@dataclass(frozen=True)
class Whereabouts:
    """Where an actor's process is. `machine` tells whether a pid means anything to the reader."""

    pid: int
    started: int
    machine: str
    node_id: str


@dataclass(frozen=True)
class Home:
    """What actors on the host's own machine share with it."""

    machine: str
    log_dir: str
    run_folder: str | None
    version: str = everstep.__version__  # of who starts the actor


def machine_id() -> str:
    """Equal for processes that see each other's pids: the boot, and the pid namespace in it (containers)."""
    return f"{boot_id()}/{os.readlink('/proc/self/ns/pid')}"


class Shell:
    """The body of every actor."""

    def __init__(self, name: str, home: Home) -> None:
        self._name = name
        check_starter(home.version)
        if home.machine == machine_id() and Path(home.log_dir).is_dir():
            file = Path(home.log_dir, f"{name}.log")
            log = open(file, "a", buffering=1)  # noqa: SIM115  # open for the process's life
            sys.stdout = _Tee(sys.stdout, log)
            sys.stderr = _Tee(sys.stderr, log)
        if home.machine == machine_id() and home.run_folder is not None:
            RunFolder.at(Path(home.run_folder)).register_pid()

    def __repr__(self) -> str:
        """What Ray calls the process in its logs."""
        return self._name

    def whereabouts(self) -> Whereabouts:
        """Where this process is."""
        pid = os.getpid()
        node_id = ray.get_runtime_context().get_node_id()
        return Whereabouts(pid, start_time(pid) or 0, machine_id(), node_id)

    def run(self, entry: str, config: bytes) -> int:
        """Runs the entry point to its end; returns its exit code."""
        os.environ[NODE_VARIABLE] = ray.get_runtime_context().get_node_id()
        return run_entry(entry, config)

    def leave(self) -> None:
        """Ends the process; the caller gets the actor's death, and so knows that it is gone."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class TrainerRank(Shell):
    """A rank of a run, or a spare."""


class SnapshotManager(Shell):
    """A snapshot manager."""


class _Tee(io.TextIOBase):
    """Writes to Ray's log and to ours."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self._first, self._second = first, second

    def write(self, text: str) -> int:
        self._second.write(text)
        return self._first.write(text)

    def flush(self) -> None:
        self._second.flush()
        self._first.flush()

    def fileno(self) -> int:
        return self._first.fileno()

    def writable(self) -> bool:
        return True

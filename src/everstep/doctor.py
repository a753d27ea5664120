"""`everstep doctor`: looks at this machine and says what to fix before a run does.

Each look is one function from nothing to a `Look`; none imports torch or ray or changes anything that stays. A
cluster is looked at where its address is given.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

import everstep
from everstep.platform.cluster.survey import judge
from everstep.platform.job.check import gib
from everstep.platform.job.registry import state_folder

Verdict = Literal["ok", "warn", "fail"]

# Oldest versions that the project is built for (pyproject.toml).
_PYTHON = (3, 11)
_LIBRARIES = {"torch": (2, 9), "ray": (2, 60), "grpcio": (1, 70), "msgspec": (0, 19)}
_SHM_BYTES = 1 << 30
_FILES = 4096


class Look(msgspec.Struct, frozen=True):
    """What one look found. fix: what to do about it, "" when there is nothing to do."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine() -> list[Look]:
    """Looks at everything."""
    looks: list[Callable[[], Look]] = [python, cores, shared_memory, loopback, process_control, open_files]
    return [*(look() for look in looks), *(library(name) for name in _LIBRARIES), state()]


def examine_cluster(address: str) -> list[Look]:
    """Looks at a Ray cluster: at its head's HOST:PORT, or through its job server's URL."""
    from everstep.actors.ray_doctor import survey  # Ray takes half a second to import

    try:
        facts = survey(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        fix = "take http://HEAD:8265 (the job server) or HEAD:6379 (the cluster), and the head's token"
        return [Look("cluster", "fail", " ".join(str(error).split()), fix)]
    judged = judge(facts, everstep.__version__, metadata.version("ray"))
    return [Look(one.name, one.verdict, one.found, one.fix) for one in judged]


def python() -> Look:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] < _PYTHON:
        return Look("python", "fail", found, "use Python 3.11 or newer")
    return Look("python", "ok", found)


def library(name: str) -> Look:
    """Looks at an installed package's version, without importing it."""
    least = _LIBRARIES[name]
    wanted = ".".join(str(part) for part in least)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Look(name, "fail", "not installed", f"pip install '{name}>={wanted}'")
    digits = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if digits < least:
        return Look(name, "fail", found, f"pip install '{name}>={wanted}'")
    return Look(name, "ok", found)


def cores() -> Look:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return Look("cores", "warn", str(count), "ranks will take turns on one core; expect slow steps")
    return Look("cores", "ok", str(count))


def shared_memory(path: Path = Path("/dev/shm")) -> Look:
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Look("shared memory", "fail", f"{path}: {error.strerror}", f"mount a tmpfs at {path}")
    if not os.access(path, os.W_OK):
        return Look("shared memory", "fail", f"{path} cannot be written", f"chmod 1777 {path}")
    if free < _SHM_BYTES:
        fix = "docker run --shm-size=2g …, or mount -o remount,size=2g /dev/shm"
        return Look("shared memory", "warn", f"{gib(free)} free", fix)
    return Look("shared memory", "ok", f"{gib(free)} free at {path}")


def loopback() -> Look:
    """Connects to itself over 127.0.0.1, as ranks do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(2)
            with socket.create_connection(server.getsockname(), timeout=2):
                server.accept()[0].close()
    except OSError as error:
        return Look("loopback", "fail", str(error), "bring it up: ip link set lo up; allow 127.0.0.1")
    return Look("loopback", "ok", "127.0.0.1 answers")


def process_control() -> Look:
    """Looks for pidfds, through which a frozen rank is killed for sure."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return Look("process control", "fail", f"no pidfd: {error}", "use Linux 5.3 or newer, without a filter")
    return Look("process control", "ok", "pidfd works")


def open_files() -> Look:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES:
        return Look("open files", "warn", str(soft), f"ulimit -n {_FILES if hard < 0 else min(_FILES, hard)}")
    return Look("open files", "ok", str(soft))


def state() -> Look:
    """Writes into the registry's folder."""
    folder = state_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Look(
            "state folder", "fail", f"{folder}: {error.strerror}", "correct its rights, or set EVERSTEP_STATE"
        )
    return Look("state folder", "ok", str(folder))

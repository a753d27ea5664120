"""What every test obeys: one that starts processes leaves nothing behind.

Also makes the modules of tests/integration importable as `integration.<module>`, and those of benchmarks/parts, whose
churn is that of the tests too, as `parts.<module>`.

Tests below tests/integration, tests/chaos and tests/contract are checked after each one, any other test that
asks for the fixture `leaves_nothing_behind` as well. What is there before a test (a module's shared Ray) is
not its leak.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

_TESTS = Path(__file__).resolve().parent
sys.path += [str(_TESTS), str(_TESTS.parent / "benchmarks")]
_CHECKED = {"integration", "chaos", "contract"}
# All of ours is collected within 15 s, even after a SIGKILL of the driver; 5 s more for a loaded machine.
_PATIENCE_S = 20.0
# Children inherit it, so a process that was orphaned on purpose is still known to be ours.
_MARK = f"EVERSTEP_TEST_SESSION={secrets.token_hex(8)}"
os.environ["EVERSTEP_TEST_SESSION"] = _MARK.partition("=")[2]
# Ray starts and ends its idle workers and agents as it likes; its own fixture ends Ray as a whole.
_RAYS_OWN = (
    "ray::IDLE",
    "default_worker.py",
    "/ray/dashboard/",
    "/ray/_private/",
    "/raylet/raylet",
    "/gcs_server",
)
_OWN_THREADS = ("pytest_timeout", "asyncio_", "ray_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.relative_to(here).parts[0] in _CHECKED:
            item.add_marker(pytest.mark.usefixtures("leaves_nothing_behind"))


@dataclass(frozen=True)
class _Footprint:
    """What this test session has in the system; every entry as it is shown when it leaks."""

    processes: frozenset[str]
    segments: frozenset[str]
    threads: frozenset[str]
    ports: frozenset[str]

    @staticmethod
    def now() -> _Footprint:
        return _Footprint(
            processes=frozenset(_our_processes()),
            segments=frozenset(_our_segments()),
            threads=frozenset(
                f"thread {thread.name} ({thread.ident})"
                for thread in threading.enumerate()
                if not thread.name.startswith(_OWN_THREADS)
            ),
            ports=frozenset(
                f"listening on port {connection.laddr.port}"
                for connection in psutil.Process().net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ),
        )

    def beyond(self, before: _Footprint) -> list[str]:
        """What is here and was not before."""
        return sorted(
            (self.processes - before.processes)
            | (self.segments - before.segments)
            | (self.threads - before.threads)
            | (self.ports - before.ports)
        )


@pytest.fixture
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test after which a process, a segment, a thread or a port of this session is left."""
    before = _Footprint.now()
    yield
    leaks = _wait_until_none(lambda: _Footprint.now().beyond(before))
    if leaks:
        pytest.fail(f"left behind {_PATIENCE_S:g} s after the test:\n  " + "\n  ".join(leaks), pytrace=False)


def _wait_until_none(look: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + _PATIENCE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _our_processes() -> Iterator[str]:
    """Every process with our mark, whoever its parent is now; a zombie only if it is our own child."""
    for process in psutil.process_iter():
        if process.pid == os.getpid() or not _is_ours(process):
            continue
        try:
            command = " ".join(process.cmdline()) or process.status()
            started = process.create_time()
        except psutil.Error:
            continue
        if not any(part in command for part in _RAYS_OWN):
            yield f"process {process.pid} (started {started:.2f}): {command[:200]}"


def _is_ours(process: psutil.Process) -> bool:
    try:
        if process.ppid() == os.getpid():
            return True
        return _MARK.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except (OSError, psutil.Error):  # gone, a zombie, or another user's
        return False


def _our_segments() -> Iterator[str]:
    """Run folders in shared memory, but for those that a process of somebody else's run has registered in."""
    for folder in Path("/dev/shm").glob("everstep-*"):
        if not any(_is_foreign(pid.name) for pid in folder.glob("pids/*")):
            yield f"shared memory {folder}"


def _is_foreign(pid: str) -> bool:
    try:
        process = psutil.Process(int(pid))
    except (ValueError, psutil.Error):
        return False
    return process.pid != os.getpid() and not _is_ours(process)

"""Faults of soak.py, struck from outside on a live run: real signals, real memory gone.

One thread. A fault that finds nobody to strike strikes nobody, and says so.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from parts.live_run import LiveRun
from parts.soak_plan import Blow, one_of

from everstep.actors.run_folder import SHM
from everstep.platform.job.status import Status


class Striker:
    """Strikes one run of the job `job`. `ranks`: least and most."""

    def __init__(self, run: LiveRun, job: str, ranks: tuple[int, int]) -> None:
        self._run = run
        self._job = job
        self._ranks = ranks

    def strike(self, blow: Blow) -> str:
        """Returns what was done, or "" where there was nobody to strike. Raises ConnectionError."""
        status = self._run.status()
        if status.phase not in ("training", "recovering"):
            return ""
        if blow.kind == "supervisor":
            return self._supervisor(status)
        if blow.kind == "drain":
            return self._drain(status, blow.pick)
        if blow.kind == "scale":
            return self._scale(status, blow.pick)
        if blow.kind == "lose":
            return self._lose(status, blow.pick)
        wanted = {"kill": "rank-", "freeze": "rank-", "manager": "manager-"}[blow.kind]
        victim = one_of([member for member in _living(status) if member["name"].startswith(wanted)], blow.pick)
        number = signal.SIGSTOP if blow.kind == "freeze" else signal.SIGKILL
        if victim is None or not _signal(victim["pid"], number):
            return ""
        return f"{number.name} to {victim['name']}"

    def _scale(self, status: Status, pick: float) -> str:
        low, high = self._ranks
        ranks = one_of([n for n in range(low, high + 1) if n != status.ranks_target], pick)
        if ranks is None or self._run.scale(ranks):
            return ""
        return f"scale to {ranks} ranks"

    def _lose(self, status: Status, pick: float) -> str:
        """As if the machine of a slot had gone: nobody of it acts between the first signal and the last byte."""
        slot = one_of(sorted({member["slot"] for member in _living(status) if member["rank"] is not None}), pick)
        pids = [member["pid"] for member in _living(status) if member["slot"] == slot]
        if slot is None or not pids:
            return ""
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        for folder in SHM.glob(f"everstep-{self._job}-*/slot-{slot}"):
            for file in folder.iterdir():
                file.unlink(missing_ok=True)
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        return f"slot {slot} lost with its memory"

    def _drain(self, status: Status, pick: float) -> str:
        rank = one_of(sorted(m["rank"] for m in status.members if m["rank"] is not None), pick)
        if rank is None or self._run.drain(rank):
            return ""
        return f"rank {rank} told to leave in order"

    def _supervisor(self, status: Status) -> str:
        """Only where somebody stands by: the loss of both ends a run."""
        leader = next(member for member in status.members if member["name"] == "supervisor")
        if not any(member["state"] == "stands by" for member in status.members):
            return ""
        if not _signal(leader["pid"], signal.SIGKILL):
            return ""
        self._run.connect()
        return f"SIGKILL to the supervisor, pid {leader['pid']}"


def memory_left(job: str) -> list[str]:
    """What a job's runs left in shared memory."""
    return sorted(str(path) for path in SHM.glob(f"everstep-{job}-*"))


def ports_of(pids: list[int]) -> list[int]:
    """The ports that these processes listen on."""
    found: set[int] = set()
    for pid in pids:
        with suppress(psutil.Error):
            connections: list[Any] = psutil.Process(pid).net_connections(kind="inet")
            found |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return sorted(found)


def _living(status: Status) -> list[dict[str, Any]]:
    return [member for member in status.members if member.get("pid") and Path(f"/proc/{member['pid']}").exists()]


def _signal(pid: int, number: signal.Signals) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False

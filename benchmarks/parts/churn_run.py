"""Runs a churn: a coordinator, two to ten peers that never stop doing transactions, and faults from a seed.

Owns every process that it starts and ends them all. Peers are forked from a server that has imported torch, so that
one that joins costs milliseconds. What happened is read from the peers' logs (churn_member.py, churn_log.py).
"""

import json
import multiprocessing as mp
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts import churn_member
from parts.churn_log import Fault, Findings, Line, study
from parts.churn_member import Part

MIN_PEERS, MAX_PEERS = 2, 10
GROUP_TIMEOUT_S = 10.0
_START_LIMIT_S = 60.0
_STUCK_S = 15.0  # of a peer that lives: more than any limit of the group
_STOP_LIMIT_S = 15.0
_OUT_LIMIT_S = 10.0  # for a peer that was woken to learn that it is out
_SURELY_OUT_S = 1.5  # a peer frozen for longer is evicted; one frozen for a blink may be seen or not
_LOOK_S = 0.02
context = mp.get_context("forkserver")
context.set_forkserver_preload(["parts.churn_member", "everstep.collectives.group"])


def warm_up() -> None:
    """Starts the server that peers are forked from, which imports torch: it stays until this process ends."""
    process = context.Process(target=time.monotonic)
    process.start()
    process.join()
    process.close()


@dataclass(frozen=True)
class Plan:
    seconds: float
    seed: int
    start: int = 4
    coordinator_kills: int = 0
    every_s: tuple[float, float] = (0.5, 2.0)


@dataclass
class Outcome:
    plan: Plan
    faults: list[Fault] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    peers: int = 0  # ever started
    violations: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(fault.kind == kind for fault in self.faults)


class Peer:
    """A peer's process and what its log has said so far."""

    def __init__(self, part: Part) -> None:
        self.name = part.name
        self.lines: list[Line] = []
        self.struck = False
        self.stopped_until = 0.0  # while frozen: when to wake or kill it
        self.to_wake = False
        self.woken_at = 0.0
        self._log = Path(part.folder) / f"{part.name}.log"
        self._read = 0
        self._process = context.Process(target=churn_member.serve, args=(part,), name=part.name)
        self._process.start()
        assert self._process.pid is not None
        self._handle = os.pidfd_open(self._process.pid)
        self.heard = time.monotonic()

    def send(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._handle, number)
        except ProcessLookupError:
            pass

    def look(self) -> None:
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        self.lines += map(json.loads, whole.splitlines())
        if whole:
            self.heard = time.monotonic()

    @property
    def lives(self) -> bool:
        return self._process.is_alive()

    @property
    def last(self) -> str:
        return self.lines[-1]["what"] if self.lines else "started"

    @property
    def inside(self) -> bool:
        """In a view, as far as its log says."""
        return any("members" in line for line in self.lines) and self.last not in ("evicted", "left")

    def end(self) -> int | None:
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        self._process.close()
        os.close(self._handle)
        return code


class Coordinator:
    """`everstep coordinator` on one port, with its record on disk."""

    def __init__(self, folder: Path, token: str, address: str = "", prefix: Sequence[str] = ()) -> None:
        """`address`: a free port of loopback if left out. `prefix` goes before the command."""
        if not address:
            with socket.create_server(("127.0.0.1", 0)) as listening:
                address = f"127.0.0.1:{listening.getsockname()[1]}"
        self.address = address
        self._folder, self._prefix = folder, prefix
        (folder / "token").write_text(token)
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns at once; `ready` waits."""
        command = [*self._prefix, sys.executable, "-m", "everstep", "coordinator", "--json"]
        command += ["--token-file", str(self._folder / "token")]
        command += ["--bind", self.address, "--min-peers", str(MIN_PEERS)]
        command += ["--timeout", str(GROUP_TIMEOUT_S), "--state", str(self._folder / "state")]
        with (self._folder / "coordinator.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def ready(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the coordinator ended: {tail(self._folder / 'coordinator.log')}")

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None


class Churn:
    """One run. `tell` gets a line of progress now and then."""

    def __init__(self, plan: Plan, folder: Path, tell: Callable[[str], Any] = lambda line: None) -> None:
        self.plan, self.folder, self.tell = plan, folder, tell
        self.outcome = Outcome(plan)
        self.token = secrets.token_hex(16)
        self.chance = random.Random(plan.seed)
        self.target = MAX_PEERS  # where the number of peers drifts to; drawn anew now and then
        self.coordinator = Coordinator(folder, self.token)
        self.peers: dict[str, Peer] = {}

    def run(self) -> Outcome:
        self.coordinator.start()
        try:
            self.coordinator.ready()
            self._churn()
            self._stop()
        finally:
            for peer in self.peers.values():
                peer.look()
                peer.end()
            self.coordinator.kill(signal.SIGTERM)
        self.outcome.peers = len(self.peers)
        self.outcome.findings = study({name: peer.lines for name, peer in self.peers.items()}, self.outcome.faults)
        self.outcome.violations += self.outcome.findings.violations
        return self.outcome

    # ---- faults -----------------------------------------------------------------------------------------

    def _churn(self) -> None:
        for _ in range(self.plan.start):
            self._join()
        self._wait(lambda: sum(peer.inside for peer in self.peers.values()) >= MIN_PEERS, _START_LIMIT_S)
        began = time.monotonic()
        end = began + self.plan.seconds
        kills = self.plan.coordinator_kills
        due = [began + (i + self.chance.uniform(0.2, 0.8)) * self.plan.seconds / kills for i in range(kills)]
        strike_at = began + self.chance.uniform(*self.plan.every_s)
        told = began
        while (now := time.monotonic()) < end and not self.outcome.violations:
            self._look(now)
            if due and now >= due[0]:
                due.pop(0)
                self._kill_coordinator()
            if now >= strike_at:
                self._strike()
                strike_at = time.monotonic() + self.chance.uniform(*self.plan.every_s)
            if now - told >= 10:
                told = now
                self.tell(f"{now - began:.0f} s: {self._told()}")
            time.sleep(_LOOK_S)

    def _told(self) -> str:
        commits = max((line.get("txn", 0) for peer in self.peers.values() for line in peer.lines[-3:]), default=0)
        inside = len(self._members())
        return f"{inside} members, transaction {commits}, {len(self.outcome.faults)} faults"

    def _members(self) -> list[Peer]:
        """Who is in the newest view that anybody has logged, lives and was not struck."""
        views = [line for peer in self.peers.values() for line in peer.lines[-20:] if "members" in line]
        newest = max(views, key=lambda line: line["at"], default={"members": []})
        return [
            peer for name in newest["members"] if (peer := self.peers[name]).lives and not peer.struck and peer.inside
        ]

    def _join(self) -> str:
        name = f"peer-{len(self.peers)}"
        part = Part(str(self.folder), name, self.coordinator.address, self.token, self.plan.seed, GROUP_TIMEOUT_S)
        self.peers[name] = Peer(part)
        return name

    def _strike(self) -> None:
        living = [peer for peer in self.peers.values() if peer.lives]  # one that was woken counts: it may be inside
        members = self._members()
        spare = len(members) - MIN_PEERS
        if self.chance.random() < 0.15:
            self.target = self.chance.randint(MIN_PEERS + 1, MAX_PEERS)
        if spare <= 0 or self.chance.random() < (0.75 if len(living) < self.target else 0.25):
            if len(living) < MAX_PEERS:
                self._note("join", (self._join(),))
            return
        candidates = members
        waiting = [peer for peer in living if not peer.inside and not peer.struck]
        if waiting and self.chance.random() < 0.1:
            candidates, spare = waiting, 1
        count = 2 if spare >= 2 and self.chance.random() < 0.15 else 1
        victims = self.chance.sample(candidates, count)
        kind = self.chance.choice(("kill", "stop"))
        self._note(kind, tuple(peer.name for peer in victims))
        for peer in victims:
            peer.struck = True
            peer.send(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            if kind == "stop":
                peer.to_wake = self.chance.random() < 0.6
                peer.stopped_until = time.monotonic() + self.chance.choice((0.02, 0.3, 1.6, 3.0, 5.0))

    def _note(self, kind: str, victims: tuple[str, ...] = ()) -> None:
        self.outcome.faults.append(Fault(time.monotonic(), kind, victims))

    def _kill_coordinator(self) -> None:
        self._note("coordinator")
        self.coordinator.kill()
        time.sleep(self.chance.choice((0.0, 0.1, 0.5)))
        self.coordinator.start()  # its answer is not waited for: faults go on while it comes back

    def _look(self, now: float) -> None:
        if not self.coordinator.running():
            self.outcome.violations.append(f"the coordinator ended: {tail(self.folder / 'coordinator.log')}")
        for peer in self.peers.values():
            peer.look()
            if peer.stopped_until and now >= peer.stopped_until:
                peer.stopped_until = 0.0
                if peer.to_wake:
                    peer.woken_at = now
                    self._note("wake", (peer.name,))
                peer.send(signal.SIGCONT if peer.to_wake else signal.SIGKILL)
            if peer.lives and not peer.struck and peer.inside and now - peer.heard > _STUCK_S:
                self._blame(peer, f"has done nothing for {now - peer.heard:.0f} s")
            if not peer.lives and not peer.struck and peer.last not in ("evicted", "left", "refused"):
                self._blame(peer, "died by itself")
            if not peer.lives and not peer.struck and peer.last == "refused":
                self._blame(peer, f"could not join: {peer.lines[-1]['text']}")
            self._check_woken(peer, now)

    def _check_woken(self, peer: Peer, now: float) -> None:
        """Out, or, where its nap was too short to be seen, a member like any other."""
        if not peer.woken_at or peer.last in ("evicted", "left", "refused") or not peer.lives:
            return
        if peer.lines and peer.lines[-1]["at"] > peer.woken_at + _SURELY_OUT_S:
            return
        if now - peer.woken_at > _OUT_LIMIT_S and peer.last != "joining":
            peer.woken_at = 0.0
            self._blame(peer, f"was woken {_OUT_LIMIT_S:g} s ago, and is neither out nor at work")

    # ---- the end ----------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Everybody leaves; who does not is stuck, but for those who wait to be admitted."""
        for peer in self.peers.values():
            if peer.stopped_until:
                peer.send(signal.SIGKILL)
        (self.folder / churn_member.STOP).touch()
        self._wait(lambda: not any(peer.lives and peer.inside for peer in self.peers.values()), _STOP_LIMIT_S)
        for peer in self.peers.values():
            if peer.lives and peer.inside:
                self._blame(peer, f"has not left within {_STOP_LIMIT_S:g} s")

    def _wait(self, ready: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not ready() and time.monotonic() < deadline:
            for peer in self.peers.values():
                peer.look()
            time.sleep(_LOOK_S)

    def _blame(self, peer: Peer, what: str) -> None:
        """With the stacks of its threads, where it can still write them."""
        peer.send(signal.SIGUSR1)
        time.sleep(0.5)
        text = tail(self.folder / f"{peer.name}.err", 60)
        self.outcome.violations.append(f"{peer.name} {what}; last: {peer.lines[-1:]}\n{text}")


def tail(file: Path, lines: int = 15) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) if file.exists() else ""

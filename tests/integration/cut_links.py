"""Peers in network namespaces of their own, joined by a bridge, so that one direction of one link can be cut.

All traffic stays in namespaces that are made here and removed at the end; the host's own network is not touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parts import churn_member
from parts.churn_log import Fault, Findings, Line, study
from parts.churn_member import Part
from parts.churn_run import GROUP_TIMEOUT_S, Coordinator, Peer, tail

_TOKEN = "the group's token"
_PORT = 7070
_READY_S = 60.0
_SEED = 1
_NOBODY = "02:00:00:00:00:fe"


def why_not() -> str:
    """Why namespaces cannot be used here; "" where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip`: install iproute2 (tests/debian-packages.sh does)"
    try:
        with namespaces(2) as network:
            network.cut(0, 1)
    except subprocess.CalledProcessError as error:
        return f"network namespaces do not work here: {' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


class Network:
    """Namespace i has address 10.97.0.(i+1); the bridge is in one more, with the coordinator."""

    def __init__(self, size: int) -> None:
        self._prefix = f"everstep-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        self.hub = f"{self._prefix}-hub"
        self.names = [f"{self._prefix}-{i}" for i in range(size)]
        self.address = f"10.97.0.254:{_PORT}"

    def up(self) -> None:
        _ip("netns", "add", self.hub)
        _ip("-n", self.hub, "link", "set", "lo", "up")
        _ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.hub, "addr", "add", "10.97.0.254/24", "dev", "br0")
        _ip("-n", self.hub, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", self.hub)
            _ip("-n", self.hub, "link", "set", f"port{i}", "master", "br0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{ip_of(i)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def down(self) -> None:
        for name in (*self.names, self.hub):
            if Path(f"/run/netns/{name}").exists():
                _ip("netns", "del", name)

    def cut(self, source: int, target: int) -> None:
        """Nothing that `source` sends to `target` arrives any more; the other direction goes on.

        Its frames are addressed to a card that nobody has: the bridge passes them on and everybody drops them. That
        needs no traffic control, which not every kernel has.
        """
        where = ("-n", self.names[source], "neigh", "replace", ip_of(target))
        _ip(*where, "lladdr", _NOBODY, "nud", "permanent", "dev", "eth0")


def ip_of(i: int) -> str:
    return f"10.97.0.{i + 1}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def namespaces(size: int) -> Iterator[Network]:
    network = Network(size)
    try:
        network.up()
        yield network
    finally:
        network.down()


class CutGroup:
    """A group over a network; its peers do transactions all the time (parts/churn_member.py)."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder, self.network = folder, network
        self.coordinator = Coordinator(folder, _TOKEN, network.address, prefix=("ip", "netns", "exec", network.hub))
        self.peers: list[Peer] = []

    def __enter__(self) -> CutGroup:
        self.coordinator.start()
        self.coordinator.ready()
        for i, name in enumerate(self.network.names):
            part = Part(
                str(self.folder), f"peer-{i}", self.coordinator.address, _TOKEN, _SEED, GROUP_TIMEOUT_S, 0.0,
                f"/run/netns/{name}",
            )  # fmt: skip
            self.peers.append(Peer(part))
        everybody = {peer.name for peer in self.peers}
        self.wait(lambda: all(set(self.members(peer)) == everybody for peer in self.peers), _READY_S, "all to meet")
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / churn_member.STOP).touch()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(peer.lives for peer in self.peers):
            time.sleep(0.02)
        for peer in self.peers:
            peer.end()
        self.coordinator.kill(signal.SIGTERM)

    def ranks(self) -> list[str]:
        """Names in rank order, of the view of the last commit."""
        return self.members(next(peer for peer in self.peers if peer.last != "evicted"))

    def members(self, peer: Peer) -> list[str]:
        """Of the view in which it committed last."""
        return next((line["members"] for line in reversed(peer.lines) if line["what"] == "commit"), [])

    def cut(self, *edges: tuple[str, str]) -> float:
        """(from, to): when."""
        began = time.monotonic()
        for source, target in edges:
            self.network.cut(int(source.partition("-")[2]), int(target.partition("-")[2]))
        return began

    def wait(self, ready: Callable[[], bool], limit_s: float, what: str) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}:\n{self.told()}"
            for peer in self.peers:
                peer.look()
                assert peer.lives or peer.last == "evicted", f"{peer.name} died:\n{self.told()}"
            time.sleep(0.02)

    def told(self) -> str:
        logs = [self.folder / "coordinator.log", *(self.folder / f"{peer.name}.err" for peer in self.peers)]
        return "\n".join(f"--- {log.name}\n{tail(log, 30)}" for log in logs)

    def resolved_s(self, at: float, out: set[str], limit_s: float) -> float:
        """Waits until all others commit without `out`, and `out` know; the time from `at` to the last's commit."""
        rest = [peer for peer in self.peers if peer.name not in out]

        def first(peer: Peer) -> Line | None:
            return next(
                (x for x in peer.lines if x["what"] == "commit" and x["at"] > at and not out & set(x["members"])),
                None,
            )

        self.wait(lambda: all(first(peer) for peer in rest), limit_s, f"{', '.join(sorted(out))} to be evicted")
        self.wait(
            lambda: all(peer.last == "evicted" for peer in self.peers if peer.name in out),
            limit_s, f"{', '.join(sorted(out))} to know",
        )  # fmt: skip
        return max(line["at"] - at for peer in rest if (line := first(peer)))

    def findings(self, at: float, out: set[str]) -> Findings:
        for peer in self.peers:
            peer.look()
        return study({peer.name: peer.lines for peer in self.peers}, [Fault(at, "stop", tuple(out))])

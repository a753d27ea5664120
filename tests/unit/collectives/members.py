"""Members of one view in one process, each with its own listener and mesh, for tests of operations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from everstep.collectives.members import Members as ViewMembers
from everstep.collectives.mesh import Mesh
from everstep.collectives.messages import Member, View, ViewId
from everstep.collectives.transport.listener import Listener

LIMIT_S = 20.0
T = TypeVar("T")


class Peer(ViewMembers):
    """What `Group` is on top of a mesh, without a coordinator."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.mesh = mesh


class Members:
    def __init__(self, n: int, transport: str, local: Callable[[int, str], str]) -> None:
        self.listeners = [Listener("127.0.0.1", "token") for _ in range(n)]
        self.lost: list[tuple[int, int, str]] = []  # rank, about, error
        members = tuple(
            Member(f"m{i}", i, "d", each.address, local=local(i, each.local if transport == "auto" else ""))
            for i, each in enumerate(self.listeners)
        )
        view = View(ViewId(1, 1), members, 0)
        self.peers = [
            Peer(Mesh(view, i, each, lambda rank, error, i=i: self.lost.append((i, rank, error)), LIMIT_S, transport))
            for i, each in enumerate(self.listeners)
        ]
        self.run(lambda peer: peer.mesh.connect(LIMIT_S))

    def run(self, part: Callable[[Peer], T], ranks: list[int] | None = None) -> list[T]:
        """`part` on every member at once, each in its own thread; results by rank."""
        results: dict[int, T] = {}
        errors: dict[int, BaseException] = {}

        def run(peer: Peer) -> None:
            try:
                results[peer.rank] = part(peer)
            except BaseException as error:
                errors[peer.rank] = error

        chosen = [self.peers[rank] for rank in (ranks if ranks is not None else range(len(self.peers)))]
        threads = [threading.Thread(target=run, args=(peer,)) for peer in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3 * LIMIT_S)
            assert not thread.is_alive(), "a member hangs"
        for error in errors.values():
            raise error
        return [results[peer.rank] for peer in chosen]

    def close(self) -> None:
        for peer in self.peers:
            peer.mesh.close()
        for each in self.listeners:
            each.close()


@contextmanager
def members(
    n: int, transport: str = "auto", local: Callable[[int, str], str] = lambda rank, name: name
) -> Iterator[Members]:
    """`local(rank, its local address)` may place members on hosts of their own."""
    each = Members(n, transport, local)
    try:
        yield each
    finally:
        each.close()

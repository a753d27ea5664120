"""The control streams of a run's managers, as the supervisor sees them: who is there, and how to reach members.

Belongs to the supervisor's loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from everstep.collectives import messages as m
from everstep.collectives.control import Peer


@dataclass
class Watcher:
    """One living manager. `members` are all that ever spoke through it."""

    peer: Peer
    domain: str
    slot: int
    fetch: str
    last_beat: float
    node: str = ""
    members: set[str] = field(default_factory=set)


class Watchers:
    def __init__(self) -> None:
        self._by_domain: dict[str, Watcher] = {}
        self._domain_of: dict[int, str] = {}  # control peer -> domain

    def add(self, peer: Peer, said: m.Watching, now: float) -> None:
        self._domain_of[peer.ident] = said.domain
        self._by_domain[said.domain] = Watcher(peer, said.domain, said.slot, said.fetch, now, said.node)

    def of(self, peer: Peer) -> Watcher | None:
        """The watcher behind a stream; None for one that was given up."""
        return self._by_domain.get(self._domain_of.get(peer.ident, ""))

    def drop(self, domain: str) -> Watcher | None:
        """Gives a watcher up; what its stream still brings is ignored."""
        watcher = self._by_domain.pop(domain, None)
        if watcher is not None:
            self._domain_of.pop(watcher.peer.ident, None)
            watcher.peer.close()
        return watcher

    def late(self, now: float, limit_s: float) -> list[Watcher]:
        """Those that have not been heard of for longer than the limit."""
        return [watcher for watcher in self._by_domain.values() if now - watcher.last_beat > limit_s]

    def forgive(self, now: float) -> None:
        """Counts everybody's silence from now: the judge itself was held up."""
        for watcher in self._by_domain.values():
            watcher.last_beat = now

    def fetch_addresses(self) -> dict[str, str]:
        return {domain: watcher.fetch for domain, watcher in self._by_domain.items()}

    def nodes(self) -> dict[str, str]:
        """Domain -> the machine that its manager is on."""
        return {domain: watcher.node for domain, watcher in self._by_domain.items()}

    def tell(self, domain: str, message: m.CoordinatorMessage) -> None:
        """To the watcher itself."""
        if domain in self._by_domain:
            self._by_domain[domain].peer.send(m.encode(m.ToMembers((), message)))

    def tell_all(self, message: m.CoordinatorMessage) -> None:
        data = m.encode(m.ToMembers((), message))
        for watcher in self._by_domain.values():
            watcher.peer.send(data)

    def tell_members(self, names: Iterable[str], message: m.CoordinatorMessage) -> None:
        """To members, one envelope a domain."""
        wanted = tuple(names)
        for watcher in self._by_domain.values():
            local = tuple(name for name in wanted if name in watcher.members)
            if local:
                watcher.peer.send(m.encode(m.ToMembers(local, message)))

    def end(self) -> None:
        """The run is over: every member and every watcher may go."""
        for watcher in self._by_domain.values():
            if watcher.members:
                order = m.Order("end", b"the run has ended")
                watcher.peer.send(m.encode(m.ToMembers(tuple(sorted(watcher.members)), order)))
            watcher.peer.send(m.encode(m.ToMembers((), m.Order("end"))))

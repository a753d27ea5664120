"""The control streams of a run's managers, as the supervisor sees them: who is there, and how to reach members.

Belongs to the supervisor's loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

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

    def leave(self, domain: str) -> Watcher | None:
        """Ends a watcher that is not needed any more: from now on it is not one of them."""
        watcher = self._by_domain.pop(domain, None)
        if watcher is not None:
            self._domain_of.pop(watcher.peer.ident, None)
            watcher.peer.send(m.encode(m.ToMembers((), m.Order("end"))))  # it hangs up
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

    def tell_slot(self, slot: int, message: m.CoordinatorMessage) -> None:
        """To all members of a slot's watcher."""
        for watcher in self._by_domain.values():
            if watcher.slot == slot and watcher.members:
                watcher.peer.send(m.encode(m.ToMembers(tuple(sorted(watcher.members)), message)))

    def tell_all(self, message: m.CoordinatorMessage) -> None:
        data = m.encode(m.ToMembers((), message))
        for watcher in self._by_domain.values():
            watcher.peer.send(data)

    def tell_members(self, names: Iterable[str], message: m.CoordinatorMessage) -> None:
        """To members, one envelope a domain."""
        place = {name: at for at, name in enumerate(names)}
        data = m.encode(message)
        for watcher in self._by_domain.values():
            local = _known(watcher, place)
            if local:
                watcher.peer.send(m.envelope(local, data))

    def prepare(self, prepare: m.Prepare, domain: str = "") -> None:
        """To all watchers, or to that of `domain`; each is told of its own members and of those that nobody knows.

        The names of 10,000 members to each of their watchers would be a gigabyte.
        """
        place = {name: at for at, name in enumerate(prepare.asked)}
        locals_ = {watcher.domain: _known(watcher, place) for watcher in self._by_domain.values()}
        unknown = tuple(
            sorted(place.keys() - {name for names in locals_.values() for name in names}, key=place.__getitem__)
        )
        for watcher in self._by_domain.values():
            if domain in ("", watcher.domain):
                asked = (*locals_[watcher.domain], *unknown)
                watcher.peer.send(m.encode(m.ToMembers((), msgspec.structs.replace(prepare, asked=asked))))

    def end(self) -> None:
        """The run is over: every member and every watcher may go."""
        for watcher in self._by_domain.values():
            if watcher.members:
                order = m.Order("end", b"the run has ended")
                watcher.peer.send(m.encode(m.ToMembers(tuple(sorted(watcher.members)), order)))
            watcher.peer.send(m.encode(m.ToMembers((), m.Order("end"))))


def _known(watcher: Watcher, place: dict[str, int]) -> tuple[str, ...]:
    """Those of `place` that speak through the watcher, in their order. It has a few, `place` may have thousands."""
    return tuple(sorted((name for name in watcher.members if name in place), key=place.__getitem__))

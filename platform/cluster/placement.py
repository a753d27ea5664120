"""On which node a slot's processes go, and which nodes are left alone for a while. Pure.

a node that                     is taken
------------------------------  ------------------------------------------------------------------------------
is lost, or drains              never
is doubted (a slot was lost     never, until Ray has made up its mind or DOUBT_S is over
there without a word of Ray)
is the slot's own, and healthy  first: its memory holds what the slot's manager has sealed
is cordoned (its ranks failed   only where no other has room: a run goes on rather than stops
again and again)
has room                        the one with the fewest slots of ours first, so that ranks, their parity and
                                the spares that would replace them do not sit on one node
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

CORDON_LOSSES = 3  # so many
CORDON_WINDOW_S = 600.0  # within so long
CORDON_S = 1800.0  # and the node is left alone for so long: a reboot, or somebody who has a look
INCIDENT_S = 2.0  # losses this close together are one: what takes a node's ranks takes several
DOUBT_S = 30.0  # Ray notices a killed node in 13-15 s


@dataclass(frozen=True)
class Node:
    """One node as the cluster tells of it. `capacity`: how many slots the empty node would hold; `room`: how many
    more it holds now. `draining_until`: monotonic seconds, inf where no deadline was given, None where it stays."""

    id: str
    capacity: int
    room: int
    alive: bool = True
    draining_until: float | None = None


@dataclass(frozen=True)
class Seat:
    """Where another slot is. `settled`: its processes have begun there, so that the node's `room` knows of it."""

    node: str
    settled: bool


@dataclass(frozen=True)
class Record:
    """Losses on one node that were neither planned nor a user's error. Cordoned until `until`."""

    losses: tuple[float, ...] = ()
    until: float = -math.inf


def choose(
    nodes: Iterable[Node],
    seats: Iterable[Seat],
    home: str = "",
    avoid: Collection[str] = (),
    cordoned: Collection[str] = (),
) -> str | None:
    """The node of a slot, None where there is no room. `home`: where the slot is already, its place being held."""
    held = list(seats)
    ours = Counter(seat.node for seat in held)
    coming = Counter(seat.node for seat in held if not seat.settled)
    usable = [n for n in nodes if n.alive and n.draining_until is None and n.id not in avoid]
    if home and home not in cordoned and any(node.id == home for node in usable):
        return home
    # A slot that was just placed may or may not be in what the node says is left: counted twice for a moment.
    free = [n for n in usable if min(n.capacity - ours[n.id], n.room - coming[n.id]) > 0 or n.id == home]
    order = sorted(free, key=lambda n: (n.id in cordoned, ours[n.id], n.id))
    return order[0].id if order else None


def charge(record: Record, now: float) -> tuple[Record, bool]:
    """One more loss on a node; True where it is cordoned for it."""
    recent = tuple(at for at in record.losses if now - at < CORDON_WINDOW_S)
    if recent and now - recent[-1] < INCIDENT_S:
        return Record((*recent[:-1], now), record.until), False
    losses = (*recent, now)
    if len(losses) >= CORDON_LOSSES and now >= record.until:
        return Record((), now + CORDON_S), True
    return Record(losses, record.until), False


def slots_in(resources: Mapping[str, float], demand: Mapping[str, float]) -> int:
    """How many slots that each ask for `demand` fit into `resources`."""
    counts = [math.floor(resources.get(name, 0.0) / each + 1e-6) for name, each in demand.items() if each > 0]
    return max(0, min(counts, default=1_000_000))


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Ray's label selectors: "v", "!v", "in(a,b)", "!in(a,b)"."""
    return all(_holds(labels.get(key), wanted) for key, wanted in selector.items())


def _holds(value: str | None, wanted: str) -> bool:
    unwanted = wanted.startswith("!")
    text = wanted.removeprefix("!")
    choices = [text]
    if text.startswith("in(") and text.endswith(")"):
        choices = [choice.strip() for choice in text[3:-1].split(",")]
    return (value in choices) != unwanted

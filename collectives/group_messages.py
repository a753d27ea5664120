"""What members of a group, the watchers of their hosts and the coordinator say to each other.

Views, ids, complaints, and what watchers say are the words of everstep.collectives.messages, and so is the rule
that views fence everything. Other than in a job there is no relay: each member has a control stream of its own.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from everstep.collectives.messages import (
    Beat,
    Complaint,
    Count,
    Died,
    Excluded,
    Lost,
    Member,
    View,
    ViewId,
    Watching,
    decoded,
)

# "closing": the block has ended and its operations still run; it tells their number early, so that members that
# brought different numbers hear of it before their surplus runs into a deadline. The others are votes.
BallotKind = Literal["closing", "ok", "abort", "admit"]
# Why a view began: see group_membership.py. The first two end a transaction, not a member.
Cause = Literal["aborted", "mismatch", "lost", "retry", "anew", "admitted", "first", "missed"]
Outcome = Literal["commit", "nobody"]


class Ballot(msgspec.Struct, frozen=True, tag="ballot"):
    """On transaction `txn` of the view. `operations`: how many the block brought."""

    id: ViewId
    txn: Count
    kind: BallotKind
    operations: int = 0
    reason: str = ""
    mismatch: bool = False  # with "abort": operations that do not fit each other, not an error of the block


class Settled(msgspec.Struct, frozen=True):
    """A transaction that needed every member's vote and got it."""

    txn: Count
    outcome: Outcome


class Report(msgspec.Struct, frozen=True):
    """What a member knows when it enters again: its view, what it saw settled last, and its vote in doubt.

    `over`: the view has ended for it, so it cannot go on in it."""

    view: View
    over: bool = False
    settled: Settled | None = None
    doubt: Ballot | None = None


class Enter(msgspec.Struct, frozen=True, tag="enter"):
    """First word of a member on every control stream."""

    member: Member
    report: Report | None = None


class Anew(msgspec.Struct, frozen=True, tag="anew"):
    """The sender cannot use its view any more (a deadline passed, say): the same members in another one."""

    id: ViewId
    reason: str


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    pass


class Formed(msgspec.Struct, frozen=True, tag="formed"):
    """A view that the receiver is in. `joiners` wait to be admitted."""

    view: View
    cause: Cause
    reason: str
    lost: tuple[Lost, ...] = ()
    joiners: tuple[str, ...] = ()


class Over(msgspec.Struct, frozen=True, tag="over"):
    """View `id` is over and there are too few members for a next one; wait."""

    id: ViewId
    reason: str
    lost: tuple[Lost, ...] = ()


class Decided(msgspec.Struct, frozen=True, tag="decided"):
    settled: Settled


class Joiners(msgspec.Struct, frozen=True, tag="joiners"):
    names: tuple[str, ...]


FromPeer = Enter | Ballot | Complaint | Anew | Leave | Watching | Died | Beat
FromCoordinator = Formed | Over | Decided | Joiners | Excluded

_from_peer: Any = msgspec.msgpack.Decoder(FromPeer)
_from_coordinator: Any = msgspec.msgpack.Decoder(FromCoordinator)


def decode_from_peer(data: bytes) -> FromPeer:
    """Raises msgspec.ValidationError for anything but a FromPeer."""
    message: FromPeer = decoded(_from_peer, data)
    return message


def decode_from_coordinator(data: bytes) -> FromCoordinator:
    message: FromCoordinator = decoded(_from_coordinator, data)
    return message


def key_of(name: str, incarnation: str) -> str:
    """One incarnation of a member, as watchers name it in Died."""
    return f"{name}/{incarnation}"

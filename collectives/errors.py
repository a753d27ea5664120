"""Errors of the collectives.

CollectiveError
├── PeerLost            a member of the view is gone; survivors get it from every pending operation
├── Evicted             this member itself was excluded; it must resynchronise
├── CollectiveTimeout   an operation's deadline passed
├── TransactionAborted  a member's own error ended a transaction for all; inputs are restored, the view goes on
├── Mismatch            members brought different operations, shapes or types; nothing was changed
├── HandshakeRefused    wrong token, version or view on a connection
├── CoordinatorLost     the control stream to the coordinator or manager broke
└── InvalidTransition   a state machine got an event that its table does not allow (a bug of ours)
"""

from __future__ import annotations


class CollectiveError(Exception):
    """Base of everything that this folder raises."""


class PeerLost(CollectiveError):
    """A member died or froze; the view is over and nothing of the running operation counts."""


class Evicted(CollectiveError):
    """This member was excluded from the view; its state is stale until it resynchronises."""


class TransactionAborted(CollectiveError):
    """A member left its transaction by an error of its own: none of it counts on any member. Names who and why."""


class CollectiveTimeout(CollectiveError):
    """An operation did not end in time; names operation, rank, elapsed seconds, limit and setting.

    `about` names the members that it waited for, as far as that is known.
    """

    def __init__(self, what: str, about: tuple[str, ...] = ()) -> None:
        super().__init__(what)
        self.about = about


class Mismatch(CollectiveError):
    """Members began different operations under one tag; names the operation, the ranks and what each brought."""


class HandshakeRefused(CollectiveError):
    """A connection was refused before any payload was exchanged."""


class CoordinatorLost(CollectiveError):
    """The control stream broke."""


class InvalidTransition(CollectiveError):
    """An event came that the transition table does not allow. Carries the recent events."""

    def __init__(self, what: str, recent: tuple[str, ...] = ()) -> None:
        super().__init__(what, recent)
        self.what = what
        self.recent = recent

    def __str__(self) -> str:
        trail = "".join(f"\n  {event}" for event in self.recent)
        return f"{self.what}; recent events:{trail or ' none'}"

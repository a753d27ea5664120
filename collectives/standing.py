"""What a member knows of its group: the views and verdicts that it was told of, and its vote in doubt. No I/O.

The member's half of group_membership.py ([Note: in doubt]). A `Seat` guards it with its lock; the simulation uses it
as it is.
"""

from __future__ import annotations

from everstep.collectives.errors import CollectiveError, Evicted, Mismatch, PeerLost, TransactionAborted
from everstep.collectives.group_messages import (
    Anew,
    Ballot,
    Decided,
    Enter,
    Formed,
    FromCoordinator,
    Joiners,
    Outcome,
    Over,
    Report,
    Settled,
)
from everstep.collectives.messages import Complaint, Excluded, Member, View

_ENDS_A_TRANSACTION = {"aborted", "mismatch"}


class Standing:
    """Changed by `hear`, what the coordinator says; and by what this member does: `link_broke`, `adopt`, `doubt`."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.newest: Formed | None = None
        self.used: View | None = None  # what the member's own thread works with
        self.news: list[Formed] = []  # since then
        self.over: Over | None = None  # of the newest view
        self.broken: PeerLost | None = None  # a link of the newest view, before the coordinator says who is gone
        self.excluded: CollectiveError | None = None  # for ever
        self.joiners: tuple[str, ...] = ()
        self.settled: Settled | None = None
        self.doubt: Ballot | None = None  # voted, and nothing heard
        self.txn = 0  # the last one that is over in the view in use
        self._unheard: list[Complaint | Anew | Ballot] = []  # about the newest view; said again on every new stream

    def hear(self, message: FromCoordinator) -> bool:
        """True where what runs has to end: `error` says why. What is older than what is known is ignored."""
        match message:
            case Formed(view):
                if self.newest is not None and view.id <= self.newest.view.id:
                    return False
                self.newest, self.over, self.broken = message, None, None
                self._unheard.clear()
                self.joiners = message.joiners
                self.news.append(message)
                return True
            case Over(id):
                if self.newest is None or id < self.newest.view.id:
                    return False
                self.over = message
                return True
            case Excluded(reason):
                self.excluded = self.excluded or Evicted(f"{reason} (this member is {self.member.name})")
                return True
            case Decided(settled):
                self.settled = settled
            case Joiners(names):
                self.joiners = names
        return False

    def greeting(self) -> list[Enter | Complaint | Anew | Ballot]:
        """The first words on a new stream: nothing that was said to a coordinator before has to be known to it."""
        if self.excluded is not None:
            return []
        report = None
        if self.newest is not None:
            view = self.newest.view
            doubt = self.doubt if self.doubt is not None and self.doubt.id == view.id else None
            report = Report(view, self.over is not None, self.settled, doubt)
        return [Enter(self.member, report), *self._unheard]

    def error(self) -> CollectiveError | None:
        """Why the view in use can be used no more; None while it can."""
        if self.excluded is not None:
            return self.excluded
        if self.over is not None:
            return PeerLost(f"view {self.over.id} is over: {self.over.reason}")
        if {formed.cause for formed in self.news} - _ENDS_A_TRANSACTION:
            return PeerLost("; ".join(f"view {formed.view.id}: {formed.reason}" for formed in self.news))
        if self.news:
            kind = Mismatch if self.news[0].cause == "mismatch" else TransactionAborted
            return kind(self.news[0].reason)
        return self.broken

    def admitted(self) -> bool:
        """Whether all that happened to the view in use is that joiners were let in."""
        return bool(self.news) and self.over is None and {f.cause for f in self.news} == {"admitted"}

    def say_of(self, message: Complaint | Anew | Ballot) -> bool:
        """Whether it is worth saying: its view is the newest. It is said again until that view is over."""
        if self.newest is None or self.newest.view.id != message.id:
            return False
        self._unheard.append(message)
        return True

    def link_broke(self, view: View, rank: int, why: str) -> None:
        if self.newest is not None and self.newest.view.id == view.id and self.broken is None:
            self.broken = PeerLost(f"the connection to {view.members[rank].name} (rank {rank}) broke: {why}")

    def can_adopt(self, view: View | None) -> bool:
        """Whether `view`, which is connected, is a new one and the newest."""
        healthy = self.excluded is None and self.over is None and self.broken is None
        return healthy and view is not None and bool(self.news) and view.id == self.news[-1].view.id

    def adopt(self, view: View) -> None:
        self.news.clear()
        self.used = view
        self.txn = view.base_step

    def ballot(self) -> Ballot:
        """An empty one for the transaction that comes next in the view in use."""
        if self.used is None:
            raise CollectiveError("this member is in no view yet")
        return Ballot(self.used.id, self.txn + 1, "closing")

    def outcome(self, ballot: Ballot) -> Outcome | str:
        """Of a vote: "commit", "nobody", "superseded" by another view or by none; "" while it is in doubt.

        Raises Evicted, where others decided without this member."""
        if self.settled is not None and self.settled.txn == ballot.txn:
            self.txn = ballot.txn
            return self.settled.outcome
        if self.excluded is not None:
            raise self.excluded
        if (self.newest is not None and self.newest.view.id > ballot.id) or self.over is not None:
            return "superseded"
        return ""

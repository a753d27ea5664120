"""The words of a group's membership machine: phases, events, commands. See group_membership.py for the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from everstep.collectives.group_messages import Ballot, Cause, Report, Settled
from everstep.collectives.links import Edge
from everstep.collectives.messages import Lost, Member, View, ViewId

NO_VIEW = ViewId(0, 0)

# ---- phases ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waiting:
    since: float
    stayed: tuple[Member, ...] = ()  # of the view that ended, by rank: they come first in the next one
    over: ViewId = NO_VIEW  # that view, and why it ended
    reason: str = ""


@dataclass(frozen=True)
class Recovering:
    """A view of an earlier epoch: its members are on their way, or they are gone."""

    since: float
    view: View
    reports: Mapping[str, Report] = field(default_factory=dict)
    gone: Mapping[str, Lost] = field(default_factory=dict)
    later: tuple[Event, ...] = ()  # what they said of their view, for when it goes on


@dataclass(frozen=True)
class Complained:
    at: float
    edge: Edge  # (who complains, about whom)
    error: str


@dataclass(frozen=True)
class Active:
    view: View
    since: float
    votes: Mapping[str, Ballot] = field(default_factory=dict)  # on the transaction after State.txn
    operations: Mapping[str, int] = field(default_factory=dict)  # how many each brought to it
    complaints: tuple[Complained, ...] = ()
    retried: tuple[Complained, ...] = ()  # for these links this view was formed: new connections, same members


Phase = Waiting | Recovering | Active


@dataclass(frozen=True)
class Limits:
    """All from the coordinator's `timeout_s`."""

    frozen_s: float = 2.0  # without a sign of a watcher, or of a member whose control stream broke
    blind_s: float = 5.0  # without any watcher for a host whose members' control streams stand
    settle_s: float = 0.5  # before the first view, so that members of an earlier epoch can report first
    recover_s: float = 1.0  # for members of an earlier epoch to report, where no watcher says that they live

    @staticmethod
    def of(timeout_s: float) -> Limits:
        frozen_s = timeout_s / 5
        return Limits(frozen_s, 2.5 * frozen_s, 0.5, min(1.0, timeout_s / 4))


@dataclass(frozen=True)
class State:
    epoch: int
    minimum: int
    limits: Limits
    phase: Phase
    began: float
    newest: ViewId = NO_VIEW  # of all that an earlier epoch is known to have formed
    number: int = 0
    txn: int = 0  # the last number used, settled or not; numbers are never used again
    settled: Settled | None = None
    ready: Mapping[str, Member] = field(default_factory=dict)  # entered and living, in order of entering
    hung: Mapping[str, float] = field(default_factory=dict)  # without a control stream, since
    watchers: Mapping[str, float] = field(default_factory=dict)  # domain: last heard of
    blind: Mapping[str, float] = field(default_factory=dict)  # domains with members and no watcher, since
    excluded: Mapping[str, str] = field(default_factory=dict)  # key of an incarnation: why; the newest ones
    last_tick: float | None = None
    recent: tuple[str, ...] = ()


# ---- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entered:
    member: Member
    report: Report | None = None


@dataclass(frozen=True)
class HungUp:
    """The control stream of this incarnation broke."""

    key: str


@dataclass(frozen=True)
class MemberDied:
    key: str
    cause: str
    detected_ms: float = 0.0


@dataclass(frozen=True)
class Left:
    key: str


@dataclass(frozen=True)
class WatcherHeard:
    """It came, or it beats."""

    domain: str


@dataclass(frozen=True)
class WatcherLost:
    domain: str


@dataclass(frozen=True)
class Voted:
    name: str
    ballot: Ballot


@dataclass(frozen=True)
class LinkBroke:
    name: str
    id: ViewId
    about: str
    error: str


@dataclass(frozen=True)
class AskedAnew:
    name: str
    id: ViewId
    reason: str


@dataclass(frozen=True)
class Tick:
    pass


Event = (
    Entered | HungUp | MemberDied | Left | WatcherHeard | WatcherLost | Voted | LinkBroke | AskedAnew | Tick
)  # fmt: skip

# ---- commands -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SendView:
    """To be on disk before anybody hears of it."""

    to: tuple[str, ...]
    view: View
    cause: Cause
    reason: str
    lost: tuple[Lost, ...]
    joiners: tuple[str, ...]


@dataclass(frozen=True)
class SendOver:
    to: tuple[str, ...]
    id: ViewId
    reason: str
    lost: tuple[Lost, ...]


@dataclass(frozen=True)
class SendDecided:
    to: tuple[str, ...]
    settled: Settled


@dataclass(frozen=True)
class SendJoiners:
    to: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Refuse:
    """This incarnation is in the group no more, or never comes in; its stream is closed."""

    key: str
    reason: str


Command = SendView | SendOver | SendDecided | SendJoiners | Refuse
Decision = tuple[State, tuple[Command, ...], str]

"""The words of the membership machine: its phases, its events and its commands. See membership.py for the rules.

What members add to one by one (`ready`, inventories, votes) are maps that share what they have in common with those
of the state before ([Note: growing]): an event costs the same with 10,000 members as with 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from everstep.collectives.messages import Lost, Member, Prepare, View, ViewId

# ---- phases ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waiting:
    since: float
    enough_since: float | None = None


@dataclass(frozen=True)
class Gathering:
    id: ViewId
    members: tuple[Member, ...]  # of the view to come
    asked: frozenset[str]  # members whose inventory is awaited, leaving ones included
    watchers: frozenset[str]  # domains whose stock is awaited
    since: float
    inventories: Mapping[str, bytes] = field(default_factory=dict)
    stocks: Mapping[str, bytes] = field(default_factory=dict)
    unchoosable: str = ""
    held_back: Chosen | None = None  # behind what was protected: taken if no missing watcher comes back


@dataclass(frozen=True)
class Leveling:
    view: View
    awaited: frozenset[str]  # its members
    level: Mapping[str, None] = field(default_factory=dict)


@dataclass(frozen=True)
class Active:
    view: View
    step: int  # the step that is being voted on
    votes: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    reason: str
    ok: bool


Phase = Waiting | Gathering | Leveling | Active | Ended


@dataclass(frozen=True)
class State:
    epoch: int
    minimum: int
    target: int
    phase: Phase
    number: int = 0
    ready: Mapping[str, Member] = field(default_factory=dict)  # joined and living, in the view or not
    watchers: frozenset[str] = frozenset()  # domains with a living watcher
    missing: frozenset[str] = frozenset()  # domains whose watcher was lost and not replaced
    unfenced: tuple[str, ...] = ()  # declared dead, not yet known to be gone
    lost: tuple[Lost, ...] = ()  # since the last view became active
    complained: tuple[ViewId, float, str] | None = None  # first complaint about a link of the current view
    floor: int | None = None  # newest step known to be protected; None: an earlier epoch knew
    patience_s: float = 30.0
    steady: bool = False  # nothing has come since the last verdict that could change the wanted members
    unwanted: frozenset[str] = frozenset()  # they go last: somebody else is taken where there is somebody
    leaving: frozenset[str] = frozenset()  # they are left out even so, down to the minimum
    recent: tuple[str, ...] = ()


# ---- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    member: Member


@dataclass(frozen=True)
class MemberDied:
    name: str
    cause: str
    detected_ms: float = 0.0


@dataclass(frozen=True)
class WatcherUp:
    domain: str


@dataclass(frozen=True)
class WatcherLost:
    domain: str
    planned: bool = False  # it is known to hold nothing that is needed


@dataclass(frozen=True)
class Inventoried:
    name: str
    id: ViewId
    payload: bytes


@dataclass(frozen=True)
class Stocked:
    domain: str
    id: ViewId
    fenced: tuple[str, ...]
    payload: bytes


@dataclass(frozen=True)
class Chosen:
    id: ViewId
    base_step: int
    payload: bytes


@dataclass(frozen=True)
class Unchoosable:
    id: ViewId
    reason: str


@dataclass(frozen=True)
class Levelled:
    name: str
    id: ViewId


@dataclass(frozen=True)
class Voted:
    name: str
    id: ViewId
    step: int
    payload: bytes


@dataclass(frozen=True)
class Judged:
    id: ViewId
    step: int
    payload: bytes
    finished: bool = False
    protected_step: int = -1  # newest step that all members have sealed


@dataclass(frozen=True)
class Complained:
    """A data connection broke under `name`; usually its peer's death is about to be reported."""

    name: str
    id: ViewId
    about: str
    error: str


@dataclass(frozen=True)
class Retarget:
    ranks: int


@dataclass(frozen=True)
class Unwanted:
    """Who is to go: takes the place of what was said before, and effect at the next step boundary."""

    unwanted: frozenset[str]
    leaving: frozenset[str]


@dataclass(frozen=True)
class Finish:
    reason: str
    ok: bool = False


@dataclass(frozen=True)
class Roused:
    """A successor has heard everybody who is left: it goes on with those."""


@dataclass(frozen=True)
class Tick:
    pass


Event = (
    Joined | MemberDied | WatcherUp | WatcherLost | Inventoried | Stocked | Chosen | Unchoosable | Levelled
    | Voted | Judged | Complained | Retarget | Unwanted | Finish | Roused | Tick
)  # fmt: skip

# ---- commands -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SendPrepare:
    """To every watcher, or to that of `domain` only; they pass it on to the local members in `asked`."""

    prepare: Prepare
    domain: str = ""


@dataclass(frozen=True)
class Choose:
    id: ViewId
    members: tuple[Member, ...]
    inventories: Mapping[str, bytes]
    stocks: Mapping[str, bytes]


@dataclass(frozen=True)
class SendView:
    view: View


@dataclass(frozen=True)
class SendGo:
    view: View
    lost: tuple[Lost, ...]


@dataclass(frozen=True)
class Judge:
    view: View
    step: int
    votes: Mapping[str, bytes]


@dataclass(frozen=True)
class SendVerdict:
    view: View
    step: int
    payload: bytes
    reform: bool


@dataclass(frozen=True)
class Refuse:
    name: str
    reason: str


@dataclass(frozen=True)
class Fail:
    reason: str


Command = SendPrepare | Choose | SendView | SendGo | Judge | SendVerdict | Refuse | Fail
Decision = tuple[State, tuple[Command, ...], str]

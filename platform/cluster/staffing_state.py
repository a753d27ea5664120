"""The words of the staffing machine: its state, its events and its commands. See staffing.py for the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from everstep.platform.cluster.placement import Node, Record


@dataclass(frozen=True)
class Slot:
    manager: str = ""  # name; "" where there is none
    manager_up: bool = False
    control: str = ""
    fetch: str = ""
    trainer: str = ""
    ready: bool = False
    incarnation: int = 0
    manager_incarnation: int = 0
    failed_starts: int = 0
    failed_managers: int = 0  # in a row, before they were up
    not_before: float = 0.0
    active: bool = False  # in use: it was given a manager, and has not been vacated
    node: str = ""  # where its place is
    settled: bool = False  # its processes have begun there
    vacating: bool = False
    leave_at: float = math.inf  # vacating: out of the view even without a successor
    preempted: bool = False
    lost_at: float = math.inf  # its manager is silent since


@dataclass(frozen=True)
class State:
    slots: tuple[Slot, ...]
    target: int
    spares: int
    infrastructure_limit: int  # -1: none
    losses: int = 0
    closed: bool = False
    stopping: frozenset[str] = frozenset()
    seats: int = 0  # slots in use at most, those that are vacated aside
    user_limit: int = 0
    preemption_limit: int = -1
    user_errors: int = 0
    preemptions: int = 0
    excused: frozenset[str] = frozenset()  # trainers whose end is charged already
    placed: bool = False  # there are nodes to choose from
    begun: bool = False
    nodes: tuple[Node, ...] | None = None  # None: not known yet
    records: Mapping[str, Record] = field(default_factory=dict)  # by node
    doubted: Mapping[str, float] = field(default_factory=dict)  # node -> until
    ending: frozenset[str] = frozenset()  # managers that were asked to end
    view: frozenset[str] = frozenset()  # that acts, or acted last
    outside: frozenset[str] = frozenset()  # ready ones that it did without
    protected: bool = True  # the view's own first snapshot is
    unwanted: Unwanted | None = None  # as told last
    short_since: float = math.inf
    asked: int = 0  # slots in all, told while some have no room


@dataclass(frozen=True)
class Begin:
    pass


@dataclass(frozen=True)
class NodesAre:
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class ManagerUp:
    slot: int
    name: str
    control: str
    fetch: str


@dataclass(frozen=True)
class RankReady:
    name: str


@dataclass(frozen=True)
class ProcessExit:
    name: str
    cause: str


@dataclass(frozen=True)
class SlotLost:
    slot: int
    why: str


@dataclass(frozen=True)
class UserError:
    name: str


@dataclass(frozen=True)
class Vacate:
    """`within_s`: what remains until the processes are ended by others; None: nobody said. `planned`: asked for by
    hand, and on no budget."""

    slots: frozenset[int]
    why: str
    within_s: float | None = None
    planned: bool = False


@dataclass(frozen=True)
class Scale:
    ranks: int
    spares: int | None = None  # as before


@dataclass(frozen=True)
class ViewActs:
    names: frozenset[str]


@dataclass(frozen=True)
class Protected:
    pass


@dataclass(frozen=True)
class Tick:
    pass


@dataclass(frozen=True)
class Close:
    pass


Event = (
    Begin | NodesAre | ManagerUp | RankReady | ProcessExit | SlotLost | UserError | Vacate | Scale | ViewActs
    | Protected | Tick | Close
)  # fmt: skip


@dataclass(frozen=True)
class StartManager:
    slot: int
    name: str
    node: str = ""


@dataclass(frozen=True)
class StartRank:
    slot: int
    name: str
    node: str = ""


@dataclass(frozen=True)
class StopRank:
    """It leaves in order, and no view may count on it."""

    name: str


@dataclass(frozen=True)
class Kill:
    name: str


@dataclass(frozen=True)
class EndManager:
    """It is not needed any more: no loss."""

    slot: int
    name: str


@dataclass(frozen=True)
class Free:
    """Nothing of the slot comes back to where it was."""

    slot: int


@dataclass(frozen=True)
class Unwanted:
    """For the membership: who goes when there is somebody else, and who goes at the next boundary."""

    soft: frozenset[str] = frozenset()
    hard: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Want:
    """Not all of so many slots have room; 0: they do."""

    slots: int


@dataclass(frozen=True)
class Tell:
    """News for people. A `finding` is one of its kinds; `names`: those who leave, for the books."""

    kind: str
    text: str
    data: Mapping[str, object] = field(default_factory=dict)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class GiveUp:
    kind: str
    message: str


Command = StartManager | StartRank | StopRank | Kill | EndManager | Free | Unwanted | Want | Tell | GiveUp
Decision = tuple[State, tuple[Command, ...], str]


def with_slot(state: State, index: int, **changes: object) -> State:
    slots = list(state.slots)
    slots[index] = replace(slots[index], **changes)  # type: ignore[arg-type]
    return replace(state, slots=tuple(slots))

"""Which processes a run has: managers, trainers and spares on their slots. Pure.

`decide(state, event, now) -> (state, commands, reason)`; who is in the view is decided by
everstep.collectives.membership, this file only sees to it that there is somebody to take.

    event             effect
    ----------------  ----------------------------------------------------------------------------------
    Begin             managers for target + spares slots
    ManagerUp         a trainer on its slot, where trainers are short
    RankReady         the slot's failed starts are forgotten
    ProcessExit       of a manager: a successor, which adopts its segments; of a trainer: a successor on the
                      lowest slot that is free; a budget (limits.infrastructure) is charged once it was ready,
                      and a slot whose trainers cannot start ends the run after MAX_FAILED_STARTS
    Scale             another target
    ViewActs          trainers outside the view beyond the spares are stopped
    Close             nothing is started any more
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_FAILED_STARTS = 3
RESTART_DELAY_S = 0.5  # after a failed start, so that a crash at import does not spin


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
    not_before: float = 0.0


@dataclass(frozen=True)
class State:
    slots: tuple[Slot, ...]
    target: int
    spares: int
    infrastructure_limit: int  # -1: none
    losses: int = 0
    closed: bool = False
    stopping: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Begin:
    pass


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
class Scale:
    ranks: int


@dataclass(frozen=True)
class ViewActs:
    names: frozenset[str]


@dataclass(frozen=True)
class Tick:
    pass


@dataclass(frozen=True)
class Close:
    pass


Event = Begin | ManagerUp | RankReady | ProcessExit | Scale | ViewActs | Tick | Close


@dataclass(frozen=True)
class StartManager:
    slot: int
    name: str


@dataclass(frozen=True)
class StartRank:
    slot: int
    name: str


@dataclass(frozen=True)
class StopRank:
    name: str


@dataclass(frozen=True)
class GiveUp:
    kind: str
    message: str


Command = StartManager | StartRank | StopRank | GiveUp
Decision = tuple[State, tuple[Command, ...], str]


def initial(slots: int, target: int, spares: int, infrastructure_limit: int) -> State:
    return State((Slot(),) * slots, target, spares, infrastructure_limit)


def decide(state: State, event: Event, now: float) -> Decision:
    if state.closed:
        return state, (), "the run is ending"
    match event:
        case Begin() | Tick():
            return _staffed(state, now, "looking for work")
        case ManagerUp(slot, name, control, fetch):
            if state.slots[slot].manager != name:
                return state, (), f"{name} is not the manager of slot {slot} any more"
            state = _with(state, slot, manager_up=True, control=control, fetch=fetch)
            return _staffed(state, now, f"{name} is up")
        case RankReady(name):
            index = slot_of(state, name)
            if index is None:
                return state, (), f"{name} is not known"
            return _with(state, index, ready=True, failed_starts=0), (), f"{name} is ready"
        case ProcessExit():
            return _exited(state, event, now)
        case Scale(ranks):
            return _staffed(replace(state, target=ranks), now, f"target is {ranks} ranks")
        case ViewActs(names):
            return _trimmed(state, names)
        case Close():
            return replace(state, closed=True), (), "the run is ending"


def slot_of(state: State, name: str) -> int | None:
    """The slot of a trainer or manager, None where it is not (or no longer) one of ours."""
    return next((i for i, slot in enumerate(state.slots) if name in (slot.trainer, slot.manager) and name), None)


def _with(state: State, index: int, **changes: object) -> State:
    slots = list(state.slots)
    slots[index] = replace(slots[index], **changes)  # type: ignore[arg-type]
    return replace(state, slots=tuple(slots))


def _staffed(state: State, now: float, reason: str) -> Decision:
    commands: list[Command] = []
    wanted = min(state.target + state.spares, len(state.slots))
    short = wanted - sum(1 for slot in state.slots if slot.trainer and slot.trainer not in state.stopping)
    for index, slot in enumerate(state.slots):
        if not slot.manager and (index < wanted or slot.trainer):
            incarnation = slot.manager_incarnation + 1
            name = f"manager-{index}.{incarnation}"
            state = _with(state, index, manager=name, manager_up=False, manager_incarnation=incarnation)
            commands.append(StartManager(index, name))
    for index, slot in enumerate(state.slots):
        if short > 0 and slot.manager_up and not slot.trainer and now >= slot.not_before:
            incarnation = slot.incarnation + 1
            name = f"rank-{index}.{incarnation}"
            state = _with(state, index, trainer=name, ready=False, incarnation=incarnation)
            commands.append(StartRank(index, name))
            short -= 1
    return state, tuple(commands), reason


def _exited(state: State, event: ProcessExit, now: float) -> Decision:
    index = slot_of(state, event.name)
    if index is None:
        return state, (), f"{event.name} ended: {event.cause}"
    slot = state.slots[index]
    if slot.manager == event.name:
        state = _with(state, index, manager="", manager_up=False)
        return _staffed(state, now, f"{event.name} ended: {event.cause}")
    if event.name in state.stopping:
        state = replace(_with(state, index, trainer="", ready=False), stopping=state.stopping - {event.name})
        return _staffed(state, now, f"{event.name} was stopped")
    if not slot.ready:
        failed = slot.failed_starts + 1
        state = _with(state, index, trainer="", failed_starts=failed, not_before=now + RESTART_DELAY_S)
        if failed >= MAX_FAILED_STARTS:
            why = f"{event.name} ended before it was ready ({event.cause}), {failed} times in a row on slot {index}"
            return state, (GiveUp("start", why),), why
        return _staffed(state, now, f"{event.name} ended before it was ready: {event.cause}")
    state = replace(_with(state, index, trainer="", ready=False), losses=state.losses + 1)
    if 0 <= state.infrastructure_limit < state.losses:
        limit = f"limits.infrastructure: {state.infrastructure_limit}"
        why = f"{state.losses} ranks were lost ({limit}), last {event.name}: {event.cause}"
        return state, (GiveUp("infrastructure", why),), why
    return _staffed(state, now, f"{event.name} ended: {event.cause}")


def _trimmed(state: State, names: frozenset[str]) -> Decision:
    outside = [slot.trainer for slot in state.slots if slot.trainer and slot.trainer not in names | state.stopping]
    surplus = outside[max(0, state.target + state.spares - len(names)) :]
    if not surplus:
        return state, (), "a view acts"
    state = replace(state, stopping=state.stopping | set(surplus))
    return (
        state,
        tuple(StopRank(name) for name in surplus),
        f"{len(surplus)} trainers are not needed any more",
    )

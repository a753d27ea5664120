"""Which processes a run has: managers, trainers and spares on their slots, and on which nodes. Pure.

`decide(state, event, now) -> (state, commands, reason)`; who is in the view is decided by
everstep.collectives.membership, this file only sees to it that there is somebody to take. Which node a slot goes to
is placement's choice; a host without nodes (one machine) has none to choose from.

    event             effect
    ----------------  ----------------------------------------------------------------------------------
    Begin             managers for target + spares slots
    NodesAre          slots on a node that is gone are given up, those on one that drains are vacated, and slots
                      that found no room are tried again
    ManagerUp         a trainer on its slot, where trainers are short
    RankReady         the slot's failed starts are forgotten
    ProcessExit       of a manager: a successor, which adopts its segments; of a trainer: a successor on the
                      lowest slot that is free; a budget is charged once it was ready, and a slot whose trainers
                      cannot start ends the run after MAX_FAILED_STARTS
    SlotLost          its manager is silent: where nobody confirms its end within GIVE_UP_S, the slot is given up
                      and goes to another node
    UserError         the task raised in a rank: limits.user is charged, and not what its end would cost
    Vacate            the slots are left in order: replaced elsewhere, out of the view at a step boundary, and
                      ended once the next layout is protected
    Scale             another target; with a number of spares, trainers outside the view beyond those are stopped
    ViewActs          trainers outside the view beyond the spares are stopped
    Protected         what the view began with no longer needs anybody outside of it
    Close             nothing is started any more

    budget                  charged for
    ----------------------  ----------------------------------------------------------------------------
    limits.user             an error that the task raised
    limits.preemption       a ready rank on a node that drains, or a notice; its later death costs nothing more
    limits.infrastructure   every other loss of a ready rank

[Note: leaving in order] A slot to vacate holds state that others need, so it goes last. Its trainer is "unwanted":
the membership takes somebody else at the next boundary where there is somebody, and from `leave_at` on leaves it
out even so, down to ranks.min. At that boundary every step is sealed: none is lost. Its manager ends when the view
without it is protected, for until then its segments are the copy.
"""

from __future__ import annotations

import math
from dataclasses import replace

from everstep.platform.cluster import placement as pl
from everstep.platform.cluster import staffing_leaving as leaving
from everstep.platform.cluster.staffing_state import Begin as Begin
from everstep.platform.cluster.staffing_state import Close as Close
from everstep.platform.cluster.staffing_state import Command as Command
from everstep.platform.cluster.staffing_state import Decision as Decision
from everstep.platform.cluster.staffing_state import EndManager as EndManager
from everstep.platform.cluster.staffing_state import Event as Event
from everstep.platform.cluster.staffing_state import Free as Free
from everstep.platform.cluster.staffing_state import GiveUp as GiveUp
from everstep.platform.cluster.staffing_state import Kill as Kill
from everstep.platform.cluster.staffing_state import ManagerUp as ManagerUp
from everstep.platform.cluster.staffing_state import NodesAre as NodesAre
from everstep.platform.cluster.staffing_state import ProcessExit as ProcessExit
from everstep.platform.cluster.staffing_state import Protected as Protected
from everstep.platform.cluster.staffing_state import RankReady as RankReady
from everstep.platform.cluster.staffing_state import Scale as Scale
from everstep.platform.cluster.staffing_state import Slot as Slot
from everstep.platform.cluster.staffing_state import SlotLost as SlotLost
from everstep.platform.cluster.staffing_state import StartManager as StartManager
from everstep.platform.cluster.staffing_state import StartRank as StartRank
from everstep.platform.cluster.staffing_state import State as State
from everstep.platform.cluster.staffing_state import StopRank as StopRank
from everstep.platform.cluster.staffing_state import Tell as Tell
from everstep.platform.cluster.staffing_state import Tick as Tick
from everstep.platform.cluster.staffing_state import Unwanted as Unwanted
from everstep.platform.cluster.staffing_state import UserError as UserError
from everstep.platform.cluster.staffing_state import Vacate as Vacate
from everstep.platform.cluster.staffing_state import ViewActs as ViewActs
from everstep.platform.cluster.staffing_state import Want as Want
from everstep.platform.cluster.staffing_state import with_slot

MAX_FAILED_STARTS = 3
RESTART_DELAY_S = 0.5  # after a failed start, so that a crash at import does not spin
LONGEST_DELAY_S = 30.0  # between starts of a manager that fails again and again
GIVE_UP_S = 0.5  # a process that ended on a living node is told of within 40 ms
ASK_AFTER_S = 5.0  # without room for so long, it is told
NOTICE_S = 30.0  # from SIGTERM to SIGKILL, of Kubernetes


def initial(
    slots: int,
    target: int,
    spares: int,
    infrastructure_limit: int,
    *,
    user_limit: int = 0,
    preemption_limit: int = -1,
    placed: bool = False,
) -> State:
    return State(
        (Slot(),) * slots,
        target,
        spares,
        infrastructure_limit,
        seats=slots,
        user_limit=user_limit,
        preemption_limit=preemption_limit,
        placed=placed,
    )


def inherited(state: State) -> State:
    """The staff that a lost supervisor had, as its successor begins with it: times were by another clock, so whoever
    is to leave leaves at the first boundary."""
    slots = tuple(
        replace(slot, not_before=0.0, lost_at=math.inf, leave_at=-math.inf if slot.vacating else math.inf)
        for slot in state.slots
    )
    return replace(
        state, slots=slots, closed=False, nodes=None, records={}, doubted={}, unwanted=None, short_since=math.inf
    )


def decide(state: State, event: Event, now: float) -> Decision:
    if state.closed:
        return state, (), "the run is ending"
    state, commands, reason = _decided(state, event, now)
    if any(isinstance(command, GiveUp) for command in commands):
        return state, commands, reason
    unwanted = leaving.unwanted(state, now)
    if unwanted != (state.unwanted or Unwanted()):
        state, commands = replace(state, unwanted=unwanted), (*commands, unwanted)
    return state, commands, reason


def _decided(state: State, event: Event, now: float) -> Decision:
    match event:
        case Begin():
            return _staffed(replace(state, begun=True), now, "looking for work")
        case Tick():
            return _ticked(state, now)
        case NodesAre(nodes):
            return _nodes(state, nodes, now)
        case ManagerUp(slot, name, control, fetch):
            if state.slots[slot].manager != name:
                return state, (), f"{name} is not the manager of slot {slot} any more"
            state = with_slot(
                state, slot, manager_up=True, settled=True, control=control, fetch=fetch, failed_managers=0
            )
            return _staffed(state, now, f"{name} is up")
        case RankReady(name):
            index = slot_of(state, name)
            if index is None:
                return state, (), f"{name} is not known"
            return with_slot(state, index, ready=True, failed_starts=0), (), f"{name} is ready"
        case ProcessExit():
            return _exited(state, event, now)
        case SlotLost(slot, why):
            if not state.placed or not state.slots[slot].manager:
                return state, (), f"slot {slot}: {why}"
            return with_slot(state, slot, lost_at=min(now, state.slots[slot].lost_at)), (), f"slot {slot}: {why}"
        case UserError(name):
            excused = state.excused | {name}
            return (
                replace(state, user_errors=state.user_errors + 1, excused=excused),
                (),
                f"the task raised in {name}",
            )
        case Vacate(slots, why, within_s, planned):
            state, commands = leaving.vacated(state, slots, why, within_s, planned, now)
            return _then(state, commands, now, why)
        case Scale(ranks, spares):
            state, stops = replace(state, target=ranks), tuple[Command, ...]()
            if spares is not None:
                state = replace(state, spares=spares)
                state, stops, _ = _stopped(state, leaving.surplus(state), now, "") if state.view else (state, (), "")
            return _then(state, stops, now, f"target is {ranks} ranks")
        case ViewActs(names):
            return _trimmed(state, names, now)
        case Protected():
            return _staffed(replace(state, protected=True), now, "the view is protected")
        case Close():
            return replace(state, closed=True), (), "the run is ending"


def forgiven(state: State) -> bool:
    """Whether limits.user allows for the errors that the task has raised."""
    return state.user_limit < 0 or state.user_errors <= state.user_limit


def slot_of(state: State, name: str) -> int | None:
    """The slot of a trainer or manager, None where it is not (or no longer) one of ours."""
    number = name.partition("-")[2].partition(".")[0]  # rank-SLOT.INCARNATION, manager-SLOT.INCARNATION
    if not number.isdecimal() or int(number) >= len(state.slots):
        return None
    slot = state.slots[int(number)]
    return int(number) if name in (slot.trainer, slot.manager) else None


def held(state: State) -> int:
    """The places that are taken: of trainers that start, run or end; on nodes, also of managers, which end later."""
    return sum(1 for slot in state.slots if slot.trainer or (state.placed and slot.manager))


def _then(state: State, commands: tuple[Command, ...], now: float, reason: str) -> Decision:
    """`_staffed`, after other commands; not once it is decided to give up."""
    if any(isinstance(command, GiveUp) for command in commands):
        return state, commands, reason
    state, more, reason = _staffed(state, now, reason)
    return state, (*commands, *more), reason


# ---- starting -------------------------------------------------------------------------------------------


def _staffed(state: State, now: float, reason: str) -> Decision:
    if not state.begun or (state.placed and state.nodes is None):
        return state, (), f"{reason}; the nodes are not known yet"
    wanted = min(state.target + state.spares, state.seats)
    state, commands = _emptied(state, wanted)
    kept = sum(not slot.vacating for slot in state.slots)
    state = replace(state, slots=state.slots + (Slot(),) * (wanted - kept))
    active = sum(slot.active and not slot.vacating for slot in state.slots)
    homeless = 0
    for index, slot in enumerate(state.slots):
        needed = slot.trainer or (active <= wanted if slot.active else active < wanted)
        if slot.manager or slot.vacating or not needed:
            continue
        active += not slot.active
        if slot.failed_managers and now < slot.not_before:
            continue
        node = _node_for(state, index, now)
        if node is None:
            homeless += 1
            state = with_slot(state, index, active=True, node="")
            continue
        incarnation = slot.manager_incarnation + 1
        name = f"manager-{index}.{incarnation}"
        settled = slot.settled and slot.node == node
        state = with_slot(
            state, index, manager=name, manager_up=False, manager_incarnation=incarnation, active=True, node=node,
            settled=settled, lost_at=math.inf,
        )  # fmt: skip
        commands.append(StartManager(index, name, node))
    busy = sum(1 for slot in state.slots if slot.trainer not in state.stopping | {""} and not slot.vacating)
    short = wanted - busy
    for index, slot in enumerate(state.slots):
        if short > 0 and slot.manager_up and not slot.trainer and not slot.vacating and now >= slot.not_before:
            incarnation = slot.incarnation + 1
            name = f"rank-{index}.{incarnation}"
            state = with_slot(state, index, trainer=name, ready=False, incarnation=incarnation)
            commands.append(StartRank(index, name, slot.node))
            short -= 1
    state, wish = _wished(state, wanted if homeless else 0, now)
    return state, (*commands, *wish), reason


def _emptied(state: State, wanted: int) -> tuple[State, list[Command]]:
    """Slots that are vacated and hold nothing that is needed lose their managers; on a cluster, idle ones too."""
    commands: list[Command] = []
    surplus = sum(slot.active and not slot.vacating for slot in state.slots) - wanted
    for index in reversed(range(len(state.slots) if state.placed else 0)):
        slot = state.slots[index]
        if surplus > 0 and slot.active and not slot.trainer and not slot.vacating:
            state, surplus = with_slot(state, index, vacating=True), surplus - 1
    for index, slot in enumerate(state.slots):
        if not slot.vacating or slot.trainer:
            continue
        if not slot.manager:
            state = _freed(state, index)
            commands.append(Free(index))
        elif state.protected and slot.manager not in state.ending:
            state = replace(state, ending=state.ending | {slot.manager})
            commands.append(EndManager(index, slot.manager) if slot.manager_up else Kill(slot.manager))
    return state, commands


def _freed(state: State, index: int) -> State:
    slot = state.slots[index]
    fresh = Slot(incarnation=slot.incarnation, manager_incarnation=slot.manager_incarnation)
    slots = (*state.slots[:index], fresh, *state.slots[index + 1 :])
    return replace(state, slots=slots)


def _node_for(state: State, index: int, now: float) -> str | None:
    """ "" on a host without nodes."""
    if not state.placed:
        return ""
    others = [pl.Seat(s.node, s.settled) for i, s in enumerate(state.slots) if i != index and s.node]
    avoid = [node for node, until in state.doubted.items() if now < until]
    cordoned = [node for node, record in state.records.items() if now < record.until]
    return pl.choose(state.nodes or (), others, state.slots[index].node, avoid, cordoned)


def _wished(state: State, slots: int, now: float) -> tuple[State, tuple[Command, ...]]:
    since = min(state.short_since, now) if slots else math.inf
    asked = slots if now - since >= ASK_AFTER_S else state.asked if slots else 0
    told = (Want(asked),) if asked != state.asked else ()
    return replace(state, short_since=since, asked=asked), told


# ---- leaving in order -----------------------------------------------------------------------------------


def _trimmed(state: State, names: frozenset[str], now: float) -> Decision:
    ready = frozenset(slot.trainer for slot in state.slots if slot.trainer and slot.ready)
    state = replace(state, view=names, outside=ready - names, protected=False)
    return _stopped(state, leaving.surplus(state), now, "a view acts")


def _stopped(state: State, slots: list[Slot], now: float, reason: str) -> Decision:
    if slots:
        reason = f"{len(slots)} trainers are not needed any more"
    state = replace(state, stopping=state.stopping | {slot.trainer for slot in slots})
    return state, tuple(StopRank(slot.trainer) if slot.ready else Kill(slot.trainer) for slot in slots), reason


def _ticked(state: State, now: float) -> Decision:
    lost = [i for i, slot in enumerate(state.slots) if now - slot.lost_at >= GIVE_UP_S]
    commands: tuple[Command, ...] = ()
    for index in lost:
        state, more = _given_up(state, index, "nobody confirms its end", now)
        commands = (*commands, *more)
    idle = [
        slot for slot in state.slots
        if slot.vacating and slot.trainer and slot.trainer in state.outside - state.view - state.stopping
    ]  # fmt: skip
    state, stops, _ = _stopped(state, idle, now, "")
    return _then(state, (*commands, *stops), now, "looking for work")


# ---- nodes ----------------------------------------------------------------------------------------------


def _nodes(state: State, nodes: tuple[pl.Node, ...], now: float) -> Decision:
    state = replace(state, nodes=nodes)
    alive = {node.id: node for node in nodes if node.alive}
    commands: tuple[Command, ...] = ()
    for index, slot in enumerate(state.slots):
        if not slot.node:
            continue
        node = alive.get(slot.node)
        if node is None:
            state, more = _given_up(state, index, f"Ray says that node {slot.node[:8]} is gone", now)
            commands = (*commands, *more)
    for node in alive.values():
        until = node.draining_until
        here = frozenset(i for i, s in enumerate(state.slots) if s.node == node.id and s.active and not s.preempted)
        if until is None or not here:
            continue
        left = f"within {until - now:.0f} s" if math.isfinite(until) else "without a deadline"
        state, more = leaving.vacated(state, here, f"node {node.id[:8]} drains {left}", until - now, False, now)
        commands = (*commands, *more)
    return _then(state, commands, now, f"there are {len(alive)} nodes")


def _given_up(state: State, index: int, why: str, now: float) -> tuple[State, tuple[Command, ...]]:
    """Nobody will tell how this slot's processes ended: it goes on elsewhere. Late news of them changes nothing."""
    slot = state.slots[index]
    commands: list[Command] = [Kill(name) for name in (slot.manager, slot.trainer) if name]
    cause = f"its node {slot.node[:8]} is lost ({why})"
    state = replace(state, doubted={**state.doubted, slot.node: now + pl.DOUBT_S})
    state = with_slot(state, index, manager="", manager_up=False, lost_at=math.inf)
    state = replace(state, ending=state.ending - {slot.manager})
    if slot.trainer and slot.ready:
        state, more = _trainer_gone(state, index, slot.trainer, cause, now)
        commands += more
    # One that was not ready yet is no failed start: nothing was wrong with it.
    state = replace(state, stopping=state.stopping - {slot.trainer}, excused=state.excused - {slot.trainer})
    state = with_slot(state, index, trainer="", ready=False, node="", settled=False)
    if slot.vacating:
        state = _freed(state, index)
        commands.append(Free(index))
    return state, tuple(commands)


# ---- ends -----------------------------------------------------------------------------------------------


def _exited(state: State, event: ProcessExit, now: float) -> Decision:
    index = slot_of(state, event.name)
    if index is None:
        return state, (), f"{event.name} ended: {event.cause}"
    slot = state.slots[index]
    if slot.manager == event.name:
        failed = 0 if slot.manager_up or event.name in state.ending else slot.failed_managers + 1
        delay_s = min(RESTART_DELAY_S * 2 ** (failed - 2), LONGEST_DELAY_S) if failed > 1 else 0.0
        state = with_slot(
            state, index, manager="", manager_up=False, lost_at=math.inf, failed_managers=failed,
            not_before=max(slot.not_before, now + delay_s if delay_s else 0.0),
        )  # fmt: skip
        state = replace(state, ending=state.ending - {event.name})
        if failed >= MAX_FAILED_STARTS and not state.view:  # a run that trains goes on without it
            why = f"{event.name} ended before it was up ({event.cause}), {failed} times in a row on slot {index}"
            return state, (GiveUp("start", why),), why
        return _staffed(state, now, f"{event.name} ended: {event.cause}")
    state, commands = _trainer_gone(state, index, event.name, event.cause, now)
    return _then(state, commands, now, f"{event.name} ended: {event.cause}")


def _trainer_gone(state: State, index: int, name: str, cause: str, now: float) -> tuple[State, tuple[Command, ...]]:
    slot = state.slots[index]
    state = with_slot(state, index, trainer="", ready=False)
    known = state.stopping | state.excused
    state = replace(state, stopping=state.stopping - {name}, excused=state.excused - {name})
    if name in known or slot.preempted:
        return state, ()
    if not slot.ready:
        failed = slot.failed_starts + 1
        state = with_slot(state, index, failed_starts=failed, not_before=now + RESTART_DELAY_S)
        if failed >= MAX_FAILED_STARTS:
            why = f"{name} ended before it was ready ({cause}), {failed} times in a row on slot {index}"
            return state, (GiveUp("start", why),)
        return state, ()
    state = replace(state, losses=state.losses + 1)
    if 0 <= state.infrastructure_limit < state.losses:
        limit = f"limits.infrastructure: {state.infrastructure_limit}"
        why = f"{state.losses} ranks were lost ({limit}), last {name}: {cause}"
        return state, (GiveUp("infrastructure", why),)
    if not slot.node:
        return state, ()
    record, cordoned = pl.charge(state.records.get(slot.node, pl.Record()), now)
    state = replace(state, records={**state.records, slot.node: record})
    if not cordoned:
        return state, ()
    text = (
        f"node {slot.node[:8]} is cordoned for {pl.CORDON_S / 60:.0f} min: ranks were lost there {pl.CORDON_LOSSES}"
        f" times within {pl.CORDON_WINDOW_S / 60:.0f} min, last {name}: {cause}"
    )
    return state, (Tell("finding", text, {"syndrome": "cordoned", "node": slot.node}),)

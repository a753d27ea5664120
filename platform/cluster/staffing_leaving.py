"""Who leaves a run, and what is told and charged for it: a part of staffing. Pure.

See staffing.py for the rules, [Note: leaving in order] above all.
"""

from __future__ import annotations

import math
from dataclasses import replace

from everstep.platform.cluster.staffing_state import Command, GiveUp, Kill, Slot, State, Tell, Unwanted, with_slot

NO_DEADLINE_S = 60.0  # to replace who is to leave, where no deadline was given


def vacated(
    state: State, slots: frozenset[int], why: str, within_s: float | None, planned: bool, now: float
) -> tuple[State, tuple[Command, ...]]:
    """[Note: leaving in order]"""
    commands: list[Command] = []
    # Half of what remains is for a successor to come; the other half for a boundary, and for being protected.
    leave_at = now + (NO_DEADLINE_S if within_s is None or math.isinf(within_s) else within_s / 2)
    names = []
    for index in sorted(slots):
        slot = state.slots[index]
        if not slot.active:
            continue
        charged = slot.ready and not planned and not slot.preempted and slot.trainer not in state.stopping
        state = with_slot(
            state,
            index,
            vacating=True,
            leave_at=min(leave_at, slot.leave_at),
            preempted=slot.preempted or not planned,
        )
        state = replace(state, preemptions=state.preemptions + charged)
        if slot.trainer and slot.ready:
            names.append(slot.trainer)
        elif slot.trainer and slot.trainer not in state.stopping:
            state = replace(state, stopping=state.stopping | {slot.trainer})
            commands.append(Kill(slot.trainer))
    if names:
        kind = "drain" if planned else "preemption"
        commands.append(Tell(kind, f"{', '.join(names)} will leave: {why}", {"names": names}, tuple(names)))
    if 0 <= state.preemption_limit < state.preemptions:
        limit = f"limits.preemption: {state.preemption_limit}"
        commands.append(GiveUp("preemption", f"{state.preemptions} ranks were preempted ({limit}), last: {why}"))
    return state, tuple(commands)


def unwanted(state: State, now: float) -> Unwanted:
    leaving = [s for s in state.slots if s.vacating and s.ready and s.trainer and s.trainer not in state.stopping]
    hard = frozenset(slot.trainer for slot in leaving if now >= slot.leave_at)
    return Unwanted(frozenset(slot.trainer for slot in leaving) - hard, hard)


def surplus(state: State) -> list[Slot]:
    """Outside the view that acts, and beyond the spares, or to be vacated."""
    known = state.view | state.stopping
    free = [slot for slot in state.slots if slot.trainer and slot.trainer not in known]
    kept = sum(1 for slot in state.slots if slot.trainer in state.view and not slot.vacating)
    staying = [slot for slot in free if not slot.vacating]
    return staying[max(0, state.target + state.spares - kept) :] + [slot for slot in free if slot.vacating]

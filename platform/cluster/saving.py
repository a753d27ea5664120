"""When a checkpoint is begun: due by steps, asked for, or the last one; never two that are being written.

Pure. Belongs to the supervisor's loop. A rank's segment stays until its file is written, so a store that is slow or
away must not be given more and more of them: training would wait for storage. One that is late is begun as soon as
may be; so with steps shorter than a write, checkpoints are not at multiples of `every`.

    event              what follows
    Committed          begins where one is due, the snapshot may be taken now, none is being written, not too many
                       wait for their manifest, and no pause is on; after the last step always
    Asked              one is due
    Written            the ranks' files are there, their segments are free; the manifest follows
    Finished           the pause and its count are over
    Failed             one is due again, after a pause that doubles with each failure in a row
    Abandoned          one is due again, at once: a view has ended, no store has failed
"""

from __future__ import annotations

from typing import Final

import msgspec

FIRST_PAUSE_S: Final = 5.0  # a restarted endpoint is back after some seconds
LONGEST_PAUSE_S: Final = 300.0
_MOST_UNCOMMITTED: Final = 2  # a manifest takes milliseconds, on a bucket some hundred; a queue of them means trouble


class Saving(msgspec.Struct, frozen=True):
    """`every`: steps between two, 0 without checkpoints. Times are the caller's clock, in seconds."""

    every: int
    due: bool = False
    writing: tuple[int, ...] = ()  # steps
    written: tuple[int, ...] = ()  # steps without a manifest yet
    failures: int = 0  # in a row
    not_before_s: float = 0.0
    good_step: int = -1  # of the newest that is whole, -1 without one
    good_at_s: float = 0.0


class Committed(msgspec.Struct, frozen=True):
    """`ready`: the newest snapshot is protected, so another one may begin. `last`: no step follows."""

    step: int
    ready: bool
    last: bool


class Asked(msgspec.Struct, frozen=True):
    """By somebody, for the next step."""


class Begun(msgspec.Struct, frozen=True):
    """Of the base step of a view, whose checkpoint the former view could not finish."""

    step: int


class Written(msgspec.Struct, frozen=True):
    step: int


class Finished(msgspec.Struct, frozen=True):
    step: int


class Failed(msgspec.Struct, frozen=True):
    step: int


class Abandoned(msgspec.Struct, frozen=True):
    step: int


Event = Committed | Asked | Begun | Written | Finished | Failed | Abandoned


def decide(state: Saving, event: Event, now: float) -> tuple[Saving, bool, str]:
    """(state, whether to begin one of the event's step, why if that is news)"""
    replace = msgspec.structs.replace
    match event:
        case Committed(step, ready, last):
            if not state.every:
                return state, False, ""
            state = replace(state, due=state.due or step % state.every == 0 or last)
            if not last:
                if not (state.due and ready) or now < state.not_before_s:
                    return state, False, ""
                if state.writing or len(state.written) >= _MOST_UNCOMMITTED:
                    steps = ", ".join(map(str, state.writing or state.written))
                    late = step % state.every == 0
                    return state, False, f"the checkpoint due at step {step} waits for that of step {steps}" * late
            return replace(state, due=False, writing=(*state.writing, step)), True, ""
        case Asked():
            return replace(state, due=state.every > 0, not_before_s=0.0), False, ""
        case Begun(step):
            return replace(state, due=False, writing=(*state.writing, step)), True, ""
        case Written(step):
            return replace(_without(state, step), written=(*state.written, step)), False, ""
        case Finished(step):
            state = replace(_without(state, step), failures=0, not_before_s=0.0)
            if step > state.good_step:  # a later one may be whole earlier
                state = replace(state, good_step=step, good_at_s=now)
            return state, False, ""
        case Failed(step):
            pause_s = min(FIRST_PAUSE_S * 2**state.failures, LONGEST_PAUSE_S)
            state = replace(_without(state, step), failures=state.failures + 1, due=True)
            return replace(state, not_before_s=now + pause_s), False, f"tried again in {pause_s:.0f} s"
        case Abandoned(step):
            return replace(_without(state, step), due=True), False, ""


def _without(state: Saving, step: int) -> Saving:
    """One of that step less: the one whose files are there, if there is one."""
    for field in ("written", "writing"):
        steps = list(getattr(state, field))
        if step in steps:
            steps.remove(step)
            return msgspec.structs.replace(state, **{field: tuple(steps)})
    return state


def at_risk(state: Saving, step: int, now: float) -> str:
    """What the newest whole checkpoint is, and how old, for people."""
    if state.good_step < 0:
        return "this run has no whole checkpoint yet"
    return (
        f"the newest good one is of step {state.good_step}, {step - state.good_step} steps and "
        f"{now - state.good_at_s:.0f} s ago"
    )

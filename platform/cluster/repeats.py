"""Whether a task's errors are always the same one, which no other attempt will do without. Pure.

the same error   same message, same step, same lane: lanes compute the same bits on every rank and machine, so an
                 error that comes back there comes back everywhere
the limit        SAME_ERRORS times in a row ends the run, whatever is left of limits.user
another one      begins to count from 1: the run has got further, or chance is involved
"""

from __future__ import annotations

from dataclasses import dataclass

SAME_ERRORS = 3  # twice may be one machine and its replacement; a third time is on yet another rank


@dataclass(frozen=True)
class Repeats:
    """The last error, and how many times in a row it has come."""

    error: tuple[str, int, int] | None = None
    times: int = 0


def seen(state: Repeats, message: str, step: int, lane: int) -> Repeats:
    """The state after one more error."""
    error = (message, step, lane)
    return Repeats(error, state.times + 1 if error == state.error else 1)


def hopeless(state: Repeats) -> bool:
    """Whether trying again is of no use."""
    return state.times >= SAME_ERRORS

"""Members that keep a view from forming, or a step from being decided, for longer than `timeouts.stall_s`.

The one deadline for a rank that runs but does not answer (see [Note: liveness]); belongs to the loop.
"""

from __future__ import annotations

from everstep.collectives import membership as mb
from everstep.collectives.messages import ViewId


class StallJudge:
    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._waiting: tuple[ViewId, int, float] | None = None  # view, step (-1: forming), since

    def look(self, membership: mb.State, now: float) -> list[tuple[str, str]]:
        """(member, cause) of those that are overdue now."""
        phase = membership.phase
        if isinstance(phase, mb.Gathering):
            id, step, missing = phase.id, -1, phase.asked - set(phase.inventories)
            what = "no answer"
        elif isinstance(phase, mb.Active) and phase.votes:
            members = {member.name for member in phase.view.members}
            id, step, missing = phase.view.id, phase.step, frozenset(members - set(phase.votes))
            what = f"no vote on step {phase.step}"
        else:
            self._waiting = None
            return []
        if self._waiting is None or self._waiting[:2] != (id, step):
            self._waiting = (id, step, now)
        if now - self._waiting[2] <= self._stall_s:
            return []
        self._waiting = None
        return [(name, f"{what} for {self._stall_s:g} s (timeouts.stall_s)") for name in sorted(missing)]

"""Members that keep a view from forming, or a step from being decided, for longer than `timeouts.stall_s`.

The one deadline for a rank that runs but does not answer (see [Note: liveness]); belongs to the loop.
"""

from __future__ import annotations

from everstep.collectives import membership as mb
from everstep.collectives.messages import ViewId

_EVERYONE = 3


class StallJudge:
    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._waiting: tuple[ViewId, int, bool, float] | None = None  # view, step (-1: forming), all of them, since

    def look(self, membership: mb.State, now: float) -> list[tuple[str, str]]:
        """(member, cause) of those that are overdue now."""
        phase = membership.phase
        if isinstance(phase, mb.Gathering):
            id, step, missing = phase.id, -1, phase.asked - set(phase.inventories)
            what = "no answer"
        elif isinstance(phase, mb.Active):
            members = {member.name for member in phase.view.members}
            id, step, missing = phase.view.id, phase.step, frozenset(members - set(phase.votes))
            what = f"no vote on step {phase.step}"
        else:
            self._waiting = None
            return []
        everyone = isinstance(phase, mb.Active) and not phase.votes
        if self._waiting is None or self._waiting[:3] != (id, step, everyone):
            self._waiting = (id, step, everyone, now)
        # One rank that hangs before it votes holds up all: their own waits end after stall_s, they complain, and a
        # new view shows who does not answer. Only where nobody complains is it everyone.
        limit_s = self._stall_s * (_EVERYONE if everyone else 1)
        if now - self._waiting[3] <= limit_s:
            return []
        self._waiting = None
        setting = f"timeouts.stall_s: {self._stall_s:g}"
        return [(name, f"{what} for {limit_s:g} s ({setting})") for name in sorted(missing)]

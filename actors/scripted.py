"""Scripted faults as the supervisor sees them: each strikes once in a run, however often its step is redone.

Belongs to the supervisor's loop.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from everstep.actors.config import FaultReached, Wake
from everstep.actors.watchers import Watchers
from everstep.collectives import messages as m
from everstep.platform.job.spec import Fault


class Script:
    """The job's `faults`. `scales` are asked for after their step has committed."""

    def __init__(self, faults: tuple[Fault, ...], watchers: Watchers, scaled: Collection[int] = ()) -> None:
        """`scaled`: steps whose scale was done by a supervisor before this one."""
        self._faults = faults
        self._watchers = watchers
        self._woken: set[str] = set()
        scales = {f.at_step: f.to for f in faults if f.do == "scale" and f.to is not None}
        self._steps = tuple(sorted(scales))
        self.scales = {step: to for step, to in scales.items() if step not in scaled}

    def scaled(self) -> tuple[int, ...]:
        """Steps whose scale is done."""
        return tuple(step for step in self._steps if step not in self.scales)

    def reached(self, name: str, domain: str, reached: FaultReached) -> str:
        """Member `name` waits at a fault: lets it strike, and returns what will happen, for the journal."""
        fault = self._faults[reached.index]
        if fault.wake_s is not None:
            self._woken.add(name)
            self._watchers.tell(domain, m.Order("wake", msgspec.msgpack.encode(Wake(name, fault.wake_s))))
        self._watchers.tell_members((name,), m.Order("fault", msgspec.msgpack.encode(reached.index)))
        return f"scripted: {fault.do} rank {fault.rank} ({name}) at step {reached.step}, phase {fault.phase}"

    def is_woken(self, name: str) -> bool:
        """Whether its watcher is to wake this member before it kills it, so that nobody else may kill it first."""
        return name in self._woken

"""The books of a run: losses, recoveries, rescales, and where every second of wall time went.

One writer (the supervisor's loop). Times are monotonic seconds that the caller passes in. The parts of the
goodput add up to the wall time: each moment is booked once, under what the run was doing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from everstep.collectives.messages import Lost
from everstep.platform.job.result import Goodput, Recovery, Rescale, Snapshots
from everstep.platform.training.messages import Verdict

_RECENT_STEPS = 20


@dataclass
class _Incident:
    """From the first loss to the next committed step."""

    detected_at: float
    fault_at: float
    names: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    step_before: int = 0
    base_step: int = 0


class Ledger:
    """Books of one execution that starts at `start_step` at time `now`."""

    def __init__(self, start_step: int, now: float) -> None:
        self.start_step = start_step
        self.step = start_step  # newest committed
        self.losses: dict[int, float] = {}
        self.metrics: dict[str, float] = {}
        self.weight = 0.0  # of the newest step's loss
        self.recoveries: list[Recovery] = []
        self.rescales: list[Rescale] = []
        self.skipped = 0
        self._began = self._mark = now
        self._booked = {
            "productive": 0.0,
            "startup": 0.0,
            "snapshot": 0.0,
            "recovery": 0.0,
            "lost_work": 0.0,
            "waiting": 0.0,
        }
        self._incident: _Incident | None = None
        self._acting = False
        self._redone_until = start_step
        self.ranks = 0
        self.parity = 0  # failure domains that may be lost together in the present view
        self._waits: list[float] = []  # seconds, by snapshot, newest last: of the slowest rank, until the next one
        self._step_times: list[float] = []
        self._fault_at: float | None = None
        self._explained: dict[str, str] = {}

    def _book(self, kind: str, now: float) -> float:
        spent, self._mark = now - self._mark, now
        self._booked[kind] += spent
        return spent

    def fault_reached(self, now: float) -> None:
        """A scripted fault is about to strike; recoveries count from here."""
        self._fault_at = now

    def lost(self, lost: Lost, now: float) -> None:
        """A member of the view was declared dead."""
        if self._acting:
            self._book("lost_work", now)
            self._acting = False
        if self._incident is None:
            fault_at = self._fault_at if self._fault_at is not None else now - lost.detected_ms / 1000
            self._incident = _Incident(now, min(fault_at, now), step_before=self.step)
        self._incident.names.append(lost.name)
        seen = "exited" if _is_unexplained(lost.cause) else lost.cause
        self._incident.causes.append(self._explained.get(lost.name, seen))
        self._incident.ranks.append(lost.rank)
        self._fault_at = None

    def explain(self, name: str, cause: str) -> None:
        """How a process ended, from whoever reaped it; a judge that only saw it go knows less."""
        if _is_unexplained(cause):
            return
        self._explained[name] = cause
        if self._incident is not None and name in self._incident.names:
            place = self._incident.names.index(name)
            if not self._incident.causes[place].startswith("frozen"):
                self._incident.causes[place] = cause

    def pause(self, now: float) -> None:
        """A view ends in order, at a step boundary."""
        self._acting = False
        self._book("waiting", now)

    def acts(self, base_step: int, ranks: int, now: float) -> None:
        """A view acts from `base_step`."""
        first = self.ranks == 0
        spent = self._book("startup" if first else "recovery" if self._incident else "waiting", now)
        if not first and ranks != self.ranks and self._incident is None:
            self.rescales.append(Rescale(step=base_step, from_=self.ranks, to=ranks, pause_ms=spent * 1000))
        if self._incident is not None:
            self._incident.base_step = base_step
            self._redone_until = max(self._redone_until, self.step)
        self.step = base_step
        self.ranks = ranks
        self._acting = True
        self._waits.append(0.0)  # its first snapshot has begun

    def committed(self, step: int, verdict: Verdict, stalls: Sequence[float], now: float) -> float:
        """The verdict committed or skipped `step`; returns the seconds it took.

        `stalls` are what the ranks waited for snapshots since their last votes, in seconds; the longest held it up.
        """
        spent = now - self._mark
        if step <= self._redone_until:
            self._book("lost_work", now)
        else:
            self._book("productive", now)
            moved = min(max(stalls, default=0.0), spent)
            self._booked["productive"] -= moved
            self._booked["snapshot"] += moved
            self.skipped += verdict.outcome == "skip"
        if self._waits:
            self._waits[-1] += max(stalls, default=0.0)
        if verdict.snapshot:
            self._waits.append(0.0)
        self._step_times = [*self._step_times[-_RECENT_STEPS:], spent]
        self.step = step
        self.losses[step] = verdict.loss
        self.metrics |= verdict.metrics
        self.weight = verdict.weight
        if self._incident is not None:
            self._close_incident(self._incident, now)
        return spent

    def _close_incident(self, incident: _Incident, now: float) -> None:
        self.recoveries.append(
            Recovery(
                step=incident.base_step,
                cause=", ".join(dict.fromkeys(incident.causes)),
                ranks=incident.ranks,
                detect_ms=(incident.detected_at - incident.fault_at) * 1000,
                resume_ms=(now - incident.fault_at) * 1000,
                steps_lost=max(0, incident.step_before - incident.base_step),
            )
        )
        self._incident = None

    @property
    def step_s(self) -> float | None:
        return statistics.median(self._step_times) if self._step_times else None

    @property
    def in_incident(self) -> bool:
        return self._incident is not None

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """The newest evaluation, shown with the newest step's metrics."""
        self.metrics |= metrics

    def goodput(self, now: float) -> Goodput:
        self._book("waiting", now)
        return Goodput(**{f"{kind}_s": seconds for kind, seconds in self._booked.items()})

    def since_last(self, now: float) -> float:
        """Seconds of the step in flight."""
        return now - self._mark

    def snapshots(self, interval: int = 0) -> Snapshots:
        # What the newest one costs is not known yet.
        median = statistics.median(self._waits[:-1]) * 1000 if self._waits[:-1] else 0.0
        total = self._booked["productive"] + self._booked["snapshot"]
        return Snapshots(
            count=len(self._waits),
            stall_ms_median=median,
            stall_share=self._booked["snapshot"] / total if total else 0.0,
            parity=self.parity,
            interval=interval,
        )

    def committed_losses(self) -> list[float]:
        return [self.losses[step] for step in sorted(self.losses) if self.start_step < step <= self.step]

    def wall_s(self, now: float) -> float:
        return now - self._began


def _is_unexplained(cause: str) -> bool:
    """Ray reaps for its actors and does not tell the status ("died: …"): that says no more than a judge's "exited",
    whichever of the two is heard first."""
    return cause.startswith("died")

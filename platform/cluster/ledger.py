"""The books of a run: losses, recoveries, rescales, and where every second of wall time went.

One writer (the supervisor's loop). Times are monotonic seconds that the caller passes in. The parts of the
goodput add up to the wall time: each moment is booked once, under what the run was doing.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from everstep.collectives.messages import Lost
from everstep.platform.cluster.chronicle import Account, Chronicle
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
        self.commits = 0  # steps done again are counted again
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
        self._members: frozenset[str] = frozenset()  # of the view
        self._redone_until = start_step
        self.ranks = 0
        self.parity = 0  # failure domains that may be lost together in the present view
        self._waits: list[float] = []  # seconds, by snapshot, newest last: of the slowest rank, until the next one
        self._earlier_snapshots = 0  # of the supervisors before this one
        self._step_times: list[float] = []
        self._fault_at: float | None = None
        self._explained: dict[str, str] = {}
        self._leaving: dict[str, str] = {}  # who is to leave in order -> "drain" or "preemption"

    @classmethod
    def go_on(cls, known: Chronicle, silent_s: float, now: float) -> Ledger:
        """The books of a supervisor that was lost, which was last heard of `silent_s` ago."""
        account = known.account
        ledger = cls(account.start_step, now - silent_s)
        ledger._began = now - silent_s - account.wall_s
        ledger._booked |= account.booked
        ledger.step, ledger.ranks, ledger.parity = account.step, account.ranks, account.parity
        ledger.skipped, ledger.metrics, ledger.weight = account.skipped, dict(account.metrics), account.weight
        ledger._redone_until, ledger._earlier_snapshots = account.redone_until, account.snapshots
        ledger.losses = dict(known.losses)
        ledger.recoveries, ledger.rescales = list(known.recoveries), list(known.rescales)
        ledger._acting = True
        return ledger

    def account(self, now: float) -> Account:
        """What a successor has to know beside losses, recoveries and rescales."""
        booked = dict(self._booked)
        booked["waiting"] += now - self._mark  # not booked yet; nothing between two commits
        return Account(
            start_step=self.start_step,
            step=self.step,
            ranks=self.ranks,
            parity=self.parity,
            skipped=self.skipped,
            snapshots=self._earlier_snapshots + len(self._waits),
            redone_until=self._redone_until,
            wall_s=now - self._began,
            booked=booked,
            metrics=self.metrics,
            weight=self.weight,
        )

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
        if lost.rank >= 0:  # else it was no rank: the supervisor
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

    def leave(self, names: Iterable[str], cause: str) -> None:
        """These are to leave in order; the view that does without them is booked as a rescale for that cause."""
        self._leaving.update(dict.fromkeys(names, cause))

    def acts(self, base_step: int, ranks: int, now: float, names: Collection[str] = ()) -> None:
        """A view of `names` acts from `base_step`."""
        causes = {cause for name, cause in self._leaving.items() if name not in names and name in self._members}
        cause = "preemption" if "preemption" in causes else "".join(causes) or "scale"
        self._members = frozenset(names)
        first = self.ranks == 0
        spent = self._book("startup" if first else "recovery" if self._incident else "waiting", now)
        if not first and (ranks != self.ranks or causes) and self._incident is None:
            pause_ms = spent * 1000
            self.rescales.append(Rescale(step=base_step, from_=self.ranks, to=ranks, pause_ms=pause_ms, cause=cause))
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
        self.commits += 1
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
            count=self._earlier_snapshots + len(self._waits),
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

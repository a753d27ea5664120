"""How many steps lie between two snapshots: the smallest number at which they cost no more than a share of training.

    a view acts         ->  the interval stays, the first steps are not counted: memory is touched for the first time
    a step ends         ->  it ran beside a snapshot (its cost grows), or beside none (what a step takes by itself)
    a snapshot is safe  ->  its cost is known: what ranks waited, and how much longer its steps took than others
    costs are known     ->  keep the interval, or change it where that is more than noise

[Note: looking] At interval 1 every step runs beside a snapshot, and nothing is known of steps without. CPU seconds
would not tell: on idle cores they slow nobody. So a snapshot is left out, every second one at first and then one in
ten: its step could be done twice, no more.

Pure: no clock, no I/O; every time is handed in. Nothing here reaches the training state.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_WARM_UP_STEPS = 3  # at interval 1 each of two or three segments is written once in that time
_ENOUGH = 3  # of either kind before anything is decided
_SURE = 10  # snapshots before a choice is changed to less than twice, or more than a quarter, of it
_KEPT = 32  # of either kind: the median's error is then a fifth of a step's own scatter
_LOOK_EVERY = 10  # snapshots
_MAX_LOST_S = 60.0  # a recovery loads state in seconds: more than a minute of work would dwarf it
_LIMIT = f"at most {_MAX_LOST_S:g} s of work may be lost"
_BEYOND_CPU = 2.0  # a copy takes memory bandwidth from others, and is served by threads that are not in the votes
_OVER = 1.1  # so much above the share is noise: nothing is changed for it
_SHRINK = 0.8  # a smaller interval has to be worth it
_GROW = 8  # times, at once: what is measured while steps change their length is off by as much
_PATIENCE = 64, 512  # snapshots until an interval that was too dear is tried again; doubles each time, up to this


@dataclass(frozen=True)
class Step:
    """A committed step. `wall_s`: since the one before; `stall_s`: what the slowest rank waited for snapshots in it;
    `cpu_s`: of all ranks' copies, checksums and parity; `protected`: the newest snapshot is, at the step's end."""

    wall_s: float
    stall_s: float
    cpu_s: float
    protected: bool


@dataclass(frozen=True)
class Cost:
    """Of the steps beside one snapshot, summed up. `slow_s`: by how much they were longer than as many of `quiet_s`,
    not counting what was waited for; noise may make it negative."""

    steps: int = 0
    slow_s: float = 0.0
    stall_s: float = 0.0
    cpu_s: float = 0.0

    def plus(self, step: Step, quiet_s: float) -> Cost:
        slow_s = self.slow_s + step.wall_s - step.stall_s - quiet_s
        return Cost(self.steps + 1, slow_s, self.stall_s + step.stall_s, self.cpu_s + step.cpu_s)


@dataclass(frozen=True)
class Dear:
    """The largest interval at which ranks waited too long, and for how many snapshots that is remembered.

    What is waited for at a small interval is nobody's wait at a larger one, from where the small one looks cheap.
    """

    interval: int = 0
    left: int = 0
    patience: int = _PATIENCE[0]

    def again(self, interval: int) -> Dear:
        return Dear(interval, self.patience, min(2 * self.patience, _PATIENCE[1]))

    def older(self) -> Dear:
        return Dear(self.interval if self.left > 1 else 0, max(0, self.left - 1), self.patience)


@dataclass(frozen=True)
class Pace:
    """What is known. `share`: of step time that snapshots may cost; `interval`: what ranks are told."""

    share: float
    interval: int = 1
    why: str = ""  # of the interval; "" until anything was measured
    warm_up: int = _WARM_UP_STEPS  # steps that are still not counted
    step_s: float = 0.0  # the newest step's
    since_s: float = 0.0  # since the newest snapshot was begun
    quiet_s: tuple[float, ...] = ()  # steps beside no snapshot, newest last
    costs: tuple[Cost, ...] = ()  # of snapshots at this interval, newest last
    under_way: Cost | None = None
    unseen: int = 0  # snapshots since a step beside none
    dear: Dear = Dear()

    @property
    def gap(self) -> int:
        """Steps from the newest snapshot to the next: the interval, or one more [Note: looking], or fewer where steps
        have become longer."""
        if self.since_s + self.step_s > _MAX_LOST_S:
            return 1
        if self.interval > 1 or self.warm_up or 2 * self.step_s > _MAX_LOST_S:
            return self.interval
        return 2 if len(self.quiet_s) < _ENOUGH or self.unseen >= _LOOK_EVERY else 1


def acts(pace: Pace) -> Pace:
    """A view acts: its layout has costs of its own, and its first snapshot has begun."""
    return Pace(pace.share, pace.interval, pace.why, under_way=Cost())


def begun(pace: Pace) -> Pace:
    """A snapshot follows the step that was decided last."""
    return replace(pace, under_way=Cost(), since_s=0.0)


def decide(pace: Pace, step: Step) -> tuple[Pace, str]:
    """A step has ended. The reason is "" as long as the interval stays what it was said to be."""
    running = pace.under_way
    since_s = pace.since_s + step.wall_s
    pace = replace(pace, step_s=step.wall_s, since_s=since_s, under_way=None if step.protected else running)
    if pace.warm_up:  # to its end with the snapshot that is under way, which is a first one, too
        return replace(pace, warm_up=max(pace.warm_up - 1, 0 if step.protected else 1)), ""
    if running is None:
        return replace(pace, quiet_s=(*pace.quiet_s, step.wall_s)[-_KEPT:], unseen=0), ""
    if not pace.quiet_s:  # nothing to compare it with
        if pace.why or 2 * step.wall_s <= _MAX_LOST_S:
            return pace, ""
        why = f"a snapshot every step: one takes {_time(step.wall_s)}, and {_LIMIT}"
        return replace(pace, why=why), why
    cost = running.plus(step, statistics.median(pace.quiet_s))
    if not step.protected:
        return replace(pace, under_way=cost), ""
    costs = (*pace.costs, cost)[-_KEPT:]
    pace = replace(pace, costs=costs, unseen=pace.unseen + 1, dear=pace.dear.older())
    return (pace, "") if min(len(costs), len(pace.quiet_s)) < _ENOUGH else _reconsider(pace)


def _reconsider(pace: Pace) -> tuple[Pace, str]:
    step_s = statistics.median(pace.quiet_s)
    stall_s = statistics.median(cost.stall_s for cost in pace.costs)
    slow_s = statistics.median(cost.slow_s for cost in pace.costs)
    steps = statistics.median(cost.steps for cost in pace.costs)
    error_s = math.hypot(_error([cost.slow_s for cost in pace.costs]), steps * _error(pace.quiet_s))
    most_s = _BEYOND_CPU * statistics.median(cost.cpu_s for cost in pace.costs)
    cap = max(1, int(_MAX_LOST_S / step_s)) if step_s > 0 else pace.interval

    def slow(errors: float) -> float:
        return min(max(slow_s + errors * error_s, 0.0), most_s)

    def wanted(errors: float, over: float) -> int:
        whole = over * pace.share * step_s
        return max(1, math.ceil((stall_s + slow(errors)) / whole - 1e-6)) if whole > 0 else pace.interval

    interval = min(_settled(pace, _next(pace, wanted, cap)), cap)
    if interval == pace.interval and pace.why:
        return pace, ""
    costs = f"each costs {_time(stall_s + slow(0))} ({_time(stall_s)} stall, {_time(slow(0))} slower steps)"
    why = f"a snapshot every {_steps(interval)}: {costs}, a step takes {_time(step_s)}, share {100 * pace.share:g} %"
    if wanted(0, 1.0) > cap:
        why += f"; {wanted(0, 1.0)} steps would keep the share, but {_LIMIT}"
    if interval == pace.interval:
        return replace(pace, why=why), why
    waited = interval > pace.interval and stall_s > pace.share * pace.interval * step_s
    dear = pace.dear.again(pace.interval) if waited else pace.dear
    # What a snapshot costs depends on the interval: with more room, less of it is waited for.
    return replace(pace, interval=interval, why=why, costs=(), dear=dear), why


def _next(pace: Pace, wanted: Callable[[float, float], int], cap: int) -> int:
    """Grows by one standard error, shrinks by two: the share is the promise, more snapshots are a gift.

    By two also where few are known."""
    now, sure = pace.interval, len(pace.costs) >= _SURE
    if now > cap:
        return cap
    if wanted(-1 if sure else -2, _OVER) > now or (not pace.why and wanted(0, 1.0) > now):
        grown = min(wanted(0, 1.0), _GROW * now, cap)
        return grown if grown < cap or now <= _SHRINK * cap else now  # the cap itself moves with every step
    smaller = max(wanted(0, 1.0), pace.dear.interval + 1)
    return smaller if max(wanted(2, 1.0), smaller) <= _SHRINK * now else now


def _settled(pace: Pace, interval: int) -> int:
    """Few snapshots' costs happen to lie close together now and then."""
    far = interval >= 2 * pace.interval or 4 * interval <= pace.interval
    return interval if far or not pace.why or len(pace.costs) >= _SURE else pace.interval


def _error(values: Sequence[float]) -> float:
    """The standard error of their median, for values that scatter normally but for a few: 1.25 sigma / sqrt(n).

    More for few values, which do not show how they scatter.
    """
    middle, n = statistics.median(values), len(values)
    deviation = 1.48 * statistics.median(abs(value - middle) for value in values)
    return 1.25 * deviation / math.sqrt(n) * (1 + 3 / n)


def _steps(interval: int) -> str:
    return "step" if interval == 1 else f"{interval} steps"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"

"""How often snapshots are taken: measured costs, a share that is kept, and no change without a reason.

`Model` is a run whose costs are known: what it decides is compared with what would be right.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field

import pytest

from everstep.platform.cluster.interval import Pace, Step, acts, begun, decide


@dataclass
class Model:
    """Steps of `step_s`; a snapshot makes ranks wait `stall_s` and slows the steps beside it by `slow_s` in all.

    `work_s`: how long it is under way; at interval 1 what is left of it when the step is done is waited for, too.
    `noise`: standard deviation of a step's time, as a part of it. `cpu_s`: of a snapshot, as votes tell it.
    """

    step_s: float = 0.3
    stall_s: float = 0.003
    slow_s: float = 0.009
    work_s: float = 0.05
    cpu_s: float = 1.0
    noise: float = 0.0
    share: float = 0.01
    seed: int = 0
    reasons: list[tuple[int, str]] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)
    intervals: list[int] = field(default_factory=list)
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.pace = acts(Pace(self.share))
        self.step = self.newest = 0
        self.left_s = self.work_s

    def run(self, steps: int) -> Model:
        for _ in range(steps):
            self.one()
        return self

    def one(self) -> None:
        self.step += 1
        wall_s = max(0.0, self.rng.gauss(1.0, self.noise)) * self.step_s
        stall_s = cpu_s = 0.0
        if self.left_s > 0:
            first = self.newest == self.step - 1
            beside_s = min(self.left_s, self.step_s)
            wall_s += self.slow_s * beside_s / self.work_s
            self.left_s -= beside_s
            stall_s = self.stall_s if first else 0.0
            if self.step - self.newest >= self.pace.interval:  # the next one may follow
                stall_s, self.left_s = stall_s + self.left_s, 0.0
            cpu_s = self.cpu_s if self.left_s <= 0 else 0.0
        wall_s += stall_s
        self.wall_s += wall_s
        protected = self.left_s <= 0
        self.pace, reason = decide(self.pace, Step(wall_s, stall_s, cpu_s, protected))
        if reason:
            self.reasons.append((self.step, reason))
        self.intervals.append(self.pace.interval)
        if protected and self.step - self.newest >= self.pace.gap:
            self.pace = begun(self.pace)
            self.newest, self.left_s = self.step, self.work_s
            self.snapshots.append(self.step)

    @property
    def interval(self) -> int:
        return self.pace.interval

    def share_of(self, steps: int) -> float:
        """What snapshots cost in the next `steps` steps, as a part of what the steps would take without."""
        noise, began = self.noise, self.wall_s
        self.noise = 0.0
        self.run(steps)
        self.noise = noise
        return (self.wall_s - began) / (steps * self.step_s) - 1

    @property
    def right(self) -> int:
        return max(1, math.ceil((self.stall_s + self.slow_s) / (self.share * self.step_s) - 1e-6))


def test_it_begins_with_a_snapshot_every_step_and_says_what_it_chose_once() -> None:
    model = Model().run(3)
    assert model.snapshots == [1, 2], "the third is left out to look"
    model.run(200)
    assert model.reasons == [
        (model.reasons[0][0], "a snapshot every 4 steps: each costs 12 ms (3 ms stall, 9 ms slower steps), "
         "a step takes 300 ms, share 1 %")
    ]  # fmt: skip
    assert model.reasons[0][0] <= 12
    gaps = {b - a for a, b in itertools.pairwise(model.snapshots[-20:])}
    assert gaps == {4}


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 1.0])
@pytest.mark.parametrize(("stall_s", "slow_s"), [(0.0001, 0.0), (0.003, 0.009), (0.0, 0.07), (0.02, 0.1)])
def test_it_ends_at_the_smallest_interval_that_keeps_the_share(share: float, stall_s: float, slow_s: float) -> None:
    model = Model(stall_s=stall_s, slow_s=slow_s, share=share).run(800)
    cap = int(60 / model.step_s)
    assert model.interval == min(model.right, cap)
    if model.right <= cap:
        assert model.share_of(4 * model.interval) <= share + 1e-9
    told = model.reasons[-1][0]
    assert all(interval == model.interval for interval in model.intervals[told:]), "a choice that stays is told once"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("slow_s", "noise"), [(0.009, 0.02), (0.03, 0.02), (0.03, 0.1), (0.15, 0.05), (0.001, 0.05)])
def test_it_stays_put_under_noise(slow_s: float, noise: float, seed: int) -> None:
    model = Model(slow_s=slow_s, noise=noise, cpu_s=max(slow_s, 0.0005), seed=seed).run(4000)
    assert model.share_of(max(200, 4 * model.interval)) <= 0.015, model.reasons
    assert model.interval <= 2 * model.right + 2, model.reasons
    assert len([step for step, _ in model.reasons if 1000 < step <= 4000]) <= 6, model.reasons


def test_what_is_waited_for_at_interval_1_only_does_not_make_it_go_to_and_fro() -> None:
    """Parity takes longer than a step: at 1 ranks wait for it, from 2 on nobody does."""
    model = Model(stall_s=0.0001, slow_s=0.0, work_s=0.31).run(3000)
    assert model.interval == 2
    assert len(model.reasons) <= 16
    late = model.intervals[1500:]
    assert sum(a != b for a, b in itertools.pairwise(late)) <= 4
    assert sum(i == 1 for i in late) < 0.05 * len(late)


def test_no_more_than_a_minute_of_work_can_be_lost() -> None:
    model = Model(step_s=5.0, stall_s=1.0, slow_s=0.5, work_s=3.0).run(300)
    assert model.interval == 12
    assert "30 steps would keep the share, but at most 60 s of work may be lost" in model.reasons[-1][1]
    assert max(b - a for a, b in itertools.pairwise(model.snapshots)) == 11, "one of them takes longer: 12 are 61.5 s"
    slow = Model(step_s=40.0, stall_s=8.0, work_s=10.0).run(20)
    assert slow.snapshots == list(range(1, 21)), "one is never left out to look"
    assert [reason for _, reason in slow.reasons] == [
        "a snapshot every step: one takes 48.0 s, and at most 60 s of work may be lost"
    ]


def test_steps_that_become_longer_are_no_more_than_a_minute_of_work_at_once() -> None:
    model = Model(step_s=0.1, slow_s=0.15).run(1500)
    assert model.interval == 153
    began, model.step_s = model.step, 10.0
    model.run(100)
    assert max(b - a for a, b in itertools.pairwise(step for step in model.snapshots if step > began)) <= 6


def test_steps_that_get_slower_or_faster_are_followed() -> None:
    model = Model(slow_s=0.03).run(500)
    assert model.interval == 11
    model.step_s = 0.03  # the same costs beside a tenth of the work
    assert model.run(3000).interval == 110
    model.step_s = 3.0
    assert model.run(1500).interval <= 3


def test_a_burst_on_the_machine_is_forgotten() -> None:
    model = Model().run(300)
    model.slow_s, model.cpu_s = 0.3, 10.0
    model.run(300)
    assert model.interval > 4
    model.slow_s = 0.009
    assert model.run(6000).interval <= 5


def test_what_steps_scatter_by_is_not_taken_for_a_snapshots_cost() -> None:
    """The work of a snapshot bounds how much it can slow anybody."""
    model = Model(stall_s=0.0005, slow_s=0.0, cpu_s=0.0003, noise=0.3, seed=5).run(400)
    assert set(model.intervals[60:]) == {1}


def test_now_and_then_a_snapshot_is_left_out_at_interval_1() -> None:
    model = Model(stall_s=0.001, slow_s=0.0).run(500)
    gaps = [b - a for a, b in itertools.pairwise(model.snapshots[50:])]
    assert model.interval == 1
    assert set(gaps) == {1, 2}
    assert 0.08 < gaps.count(2) / len(gaps) < 0.12


def test_a_view_measures_anew_from_the_interval_that_it_finds() -> None:
    model = Model().run(100)
    assert model.interval == 4
    model.pace = acts(model.pace)
    model.newest, model.left_s = model.step, model.work_s
    assert model.interval == 4
    model.stall_s = 5.0  # the first touch of new segments
    model.run(3)
    model.stall_s = 0.003
    assert model.run(100).interval == 4
    model.pace = acts(model.pace)
    model.newest, model.left_s, model.slow_s = model.step, model.work_s, 0.057  # other costs in another layout
    assert model.run(100).interval == 20


def test_a_clock_that_stands_still_decides_nothing() -> None:
    model = Model(step_s=0.0, stall_s=0.0, slow_s=0.0).run(50)
    assert model.interval == 1

"""The pure parts of the soak: when faults come, how many steps there are, what is said of the end."""

from __future__ import annotations

import statistics
from itertools import islice

import pytest
from parts.soak_plan import WEIGHTS, Soak, blows, one_of, steps_for, summary

from everstep.platform.job.result import Goodput, Recovery, RunResult

KINDS = ("kill", "freeze", "lose")


def result(**changes: object) -> RunResult:
    goodput = Goodput(productive_s=95.0, startup_s=1.0, recovery_s=2.0, lost_work_s=1.0, waiting_s=1.0)
    recovery = Recovery(step=4, cause="signal 9", ranks=[1], detect_ms=20, resume_ms=150, steps_lost=1)
    fields = {
        "job": "j", "run": "r", "ok": True, "steps": 40, "state_sha256": "ab", "wall_s": 100.0, "goodput": goodput,
        "recoveries": [recovery],
    }  # fmt: skip
    return RunResult(**(fields | changes))  # type: ignore[arg-type]


def soak(**changes: object) -> Soak:
    fields = {
        "host": "processes", "seed": 1, "steps": 40, "step_s": 2.0, "undisturbed": result(recoveries=[], wall_s=90.0),
        "undisturbed_wall_s": 90.0, "result": result(), "faults": ["kill"],
    }  # fmt: skip
    return Soak(**(fields | changes))  # type: ignore[arg-type]


def test_a_seed_gives_the_same_faults_again():
    first = list(islice(blows(7, 20.0, KINDS), 50))
    assert first == list(islice(blows(7, 20.0, KINDS), 50))
    assert first != list(islice(blows(8, 20.0, KINDS), 50))


def test_times_between_faults_have_the_mean_asked_for_and_spread_as_an_exponential():
    waits = [blow.wait_s for blow in islice(blows(3, 20.0, KINDS), 20_000)]
    assert statistics.mean(waits) == pytest.approx(20.0, rel=0.05)
    assert statistics.stdev(waits) == pytest.approx(20.0, rel=0.05)


def test_kinds_come_as_often_as_they_weigh():
    drawn = [blow.kind for blow in islice(blows(3, 20.0, KINDS), 20_000)]
    total = sum(WEIGHTS[kind] for kind in KINDS)
    for kind in KINDS:
        assert drawn.count(kind) / len(drawn) == pytest.approx(WEIGHTS[kind] / total, abs=0.02)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="earthquake"):
        next(blows(1, 20.0, ("kill", "earthquake")))


@pytest.mark.parametrize(("pick", "chosen"), [(0.0, "a"), (0.34, "b"), (0.999, "c")])
def test_a_pick_chooses_by_position(pick: float, chosen: str):
    assert one_of(["a", "b", "c"], pick) == chosen


def test_nobody_is_chosen_of_nobody():
    assert one_of([], 0.5) is None


def test_steps_fill_the_time_and_are_never_too_few():
    assert steps_for(30, 0.15) == 12_000
    assert steps_for(0.1, 100.0) == 20


def test_a_good_end_is_told_in_figures():
    found = summary(soak())
    assert found["goodput"] == pytest.approx(0.95)
    assert found["wall_ratio"] == pytest.approx(100 / 90)
    assert (found["recoveries"], found["steps_lost"], found["resume_worst_s"]) == (1, 1, 0.15)
    assert found["ok"]
    assert all(found["checks"].values())


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"result": result(state_sha256="cd")}, "same_bits"),
        ({"result": result(steps=39)}, "complete"),
        ({"result": result(ok=False)}, "complete"),
        ({"result": result(wall_s=120.0)}, "goodput"),
        ({"undisturbed_wall_s": 80.0}, "wall"),
        ({"left": [17]}, "nothing_left"),
        ({"memory": ["/dev/shm/everstep-x"]}, "nothing_left"),
    ],
)
def test_each_broken_promise_is_seen(changes: dict[str, object], check: str):
    found = summary(soak(**changes))
    assert not found["checks"][check]
    assert not found["ok"]


def test_without_an_undisturbed_run_the_bits_are_not_compared():
    found = summary(soak(undisturbed=None))
    assert found["same_bits"] is None
    assert found["checks"]["same_bits"]


def test_a_soak_without_a_result_is_not_good():
    assert summary(soak(result=None, failed=["interrupted"]))["ok"] is False

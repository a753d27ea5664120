"""The books: every second once, each recovery and rescale, and what was worked for in vain."""

from __future__ import annotations

import random

import msgspec
import pytest

from everstep.collectives.messages import Lost
from everstep.platform.cluster.ledger import Ledger
from everstep.platform.training.messages import Verdict


def commit(loss: float = 1.0, **fields) -> Verdict:
    return Verdict("commit", loss, **fields)


def gone(name: str = "rank-1.1", rank: int = 1, cause: str = "exited", detected_ms: float = 50.0) -> Lost:
    return Lost(name, cause, rank, detected_ms)


def parts(ledger: Ledger, now: float) -> dict[str, float]:
    booked = msgspec.to_builtins(ledger.goodput(now))
    return {name.removesuffix("_s"): seconds for name, seconds in booked.items() if seconds}


def test_a_run_without_incidents() -> None:
    ledger = Ledger(0, 100.0)
    ledger.acts(0, 4, 103.0)
    assert ledger.committed(1, commit(5.0, weight=8.0, metrics={"a": 1.0}), [0.25, 0.5], 105.0) == 2.0
    assert ledger.since_last(106.0) == 1.0
    assert ledger.committed(2, commit(4.0, snapshot=False), [0.125, 0.0], 106.0) == 1.0
    assert ledger.committed(3, Verdict("skip", float("nan"), snapshot=False), [], 107.5) == 1.5
    assert ledger.wall_s(108.0) == 8.0
    assert parts(ledger, 108.0) == {"startup": 3.0, "productive": 3.875, "snapshot": 0.625, "waiting": 0.5}
    assert (ledger.step, ledger.ranks, ledger.skipped, ledger.step_s) == (3, 4, 1, 1.5)
    assert ledger.committed_losses()[:2] == [5.0, 4.0]
    assert ledger.metrics == {"a": 1.0}, "a step without metrics keeps the last ones"
    assert (ledger.recoveries, ledger.rescales) == ([], [])
    shown = ledger.snapshots(interval=4)
    assert (shown.count, shown.stall_ms_median, shown.interval) == (2, 500.0, 4), "the view's first, and step 1's"
    assert shown.stall_share == pytest.approx(0.625 / 4.5)


def test_what_a_snapshot_cost_is_waited_for_in_every_step_until_the_next() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 2, 1.0)
    for step, waited in enumerate((0.5, 0.25, 0.0, 0.125, 0.25, 0.5), 1):
        ledger.committed(step, commit(snapshot=step % 3 == 0), [waited, 0.0], 1.0 + step)
    shown = ledger.snapshots()
    assert (shown.count, shown.stall_ms_median) == (3, pytest.approx(1000 * (0.75 + 0.875) / 2))


def test_a_loss_in_a_step_costs_the_attempt_the_recovery_and_the_steps_that_are_redone() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 3, 1.0)
    for step in (1, 2, 3):
        ledger.committed(step, commit(float(step)), [], 1.0 + step)
    ledger.lost(gone(detected_ms=50.0), 4.5)
    assert ledger.in_incident
    ledger.acts(1, 2, 6.5)
    assert (ledger.step, ledger.ranks) == (1, 2)
    for step in (2, 3, 4):
        ledger.committed(step, commit(float(step)), [], 5.5 + step)
    # 0.5 s of the attempt, 2 s for steps 2 and 3 again
    assert parts(ledger, 9.5) == {"startup": 1.0, "productive": 4.0, "lost_work": 2.5, "recovery": 2.0}
    (recovery,) = ledger.recoveries
    assert (recovery.step, recovery.cause, recovery.ranks, recovery.steps_lost) == (1, "exited", [1], 2)
    assert recovery.detect_ms == pytest.approx(50.0)
    assert recovery.resume_ms == pytest.approx(3000.0 + 50.0)
    assert ledger.rescales == [], "a loss is not a rescale"
    assert ledger.committed_losses() == [1.0, 2.0, 3.0, 4.0]


def test_losses_before_the_next_commit_are_one_recovery() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 4, 1.0)
    ledger.committed(1, commit(), [], 2.0)
    ledger.lost(gone("a", 1, "exited", 0.0), 2.5)
    ledger.lost(gone("b", 2, "frozen (stopped by a signal)", 0.0), 2.6)
    ledger.acts(1, 2, 3.0)
    ledger.lost(gone("c", 1, "exited", 0.0), 3.25)
    ledger.acts(1, 1, 4.0)
    ledger.committed(2, commit(), [], 5.0)
    (recovery,) = ledger.recoveries
    assert (recovery.ranks, recovery.steps_lost) == ([1, 2, 1], 0)
    assert recovery.cause == "exited, frozen (stopped by a signal)"
    assert recovery.resume_ms == pytest.approx(2500.0)
    # the attempts of both views that broke; the step that nobody had committed is productive
    expected = {"startup": 1.0, "productive": 2.0, "lost_work": 0.75, "recovery": 0.4 + 0.1 + 0.75}
    assert parts(ledger, 5.0) == pytest.approx(expected)


def test_a_scripted_fault_is_where_a_recovery_counts_from() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 2, 1.0)
    ledger.fault_reached(1.5)
    ledger.lost(gone(detected_ms=1.0), 1.75)
    ledger.acts(0, 1, 2.0)
    ledger.committed(1, commit(), [], 2.5)
    assert ledger.recoveries[0].detect_ms == pytest.approx(250.0)
    ledger.lost(gone("later", 0, detected_ms=100.0), 3.0)
    ledger.acts(1, 1, 3.5)
    ledger.committed(2, commit(), [], 4.0)
    assert ledger.recoveries[1].detect_ms == pytest.approx(100.0), "it counts once"


def test_rescales_pause_and_are_no_recoveries() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 2, 1.0)
    ledger.committed(1, commit(), [], 2.0)
    ledger.pause(2.1)
    ledger.acts(1, 4, 2.5)
    ledger.committed(2, commit(), [], 3.5)
    ledger.pause(3.5)
    ledger.acts(2, 4, 3.75)  # other members, as many
    (rescale,) = ledger.rescales
    assert (rescale.step, rescale.from_, rescale.to) == (1, 2, 4)
    assert rescale.pause_ms == pytest.approx(400.0)
    assert ledger.recoveries == []
    assert parts(ledger, 3.75) == pytest.approx({"startup": 1.0, "productive": 2.0, "waiting": 0.75})


@pytest.mark.parametrize("before", [True, False])
def test_who_reaped_a_process_knows_better_than_who_saw_it_go(before: bool) -> None:
    """Its host's word on how it ended comes before or after the judge's verdict."""
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 2, 1.0)
    if before:
        ledger.explain("rank-1.1", "signal 9")
    ledger.lost(gone(), 1.5)
    ledger.explain("rank-1.1", "signal 9")
    ledger.explain("somebody else", "exit 3")
    ledger.acts(0, 1, 2.0)
    ledger.committed(1, commit(), [], 2.5)
    assert ledger.recoveries[0].cause == "signal 9"


@pytest.mark.parametrize("first", ["exited", "died: Ray knows no status"])
def test_a_reaper_that_knows_no_status_says_what_a_judge_does(first: str) -> None:
    """Either may be heard first."""
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 2, 1.0)
    ledger.lost(gone(cause=first), 1.5)
    ledger.explain("rank-1.1", "died: Ray knows no status")
    ledger.acts(0, 1, 2.0)
    ledger.committed(1, commit(), [], 2.5)
    assert ledger.recoveries[0].cause == "exited"


def test_a_frozen_rank_was_not_lost_by_the_kill_that_fenced_it() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 2, 1.0)
    ledger.lost(gone(cause="frozen (stopped by a signal)"), 1.5)
    ledger.explain("rank-1.1", "signal 9")
    ledger.acts(0, 1, 2.0)
    ledger.committed(1, commit(), [], 2.5)
    assert ledger.recoveries[0].cause == "frozen (stopped by a signal)"


def test_a_resumed_run_counts_its_own_steps_only() -> None:
    ledger = Ledger(10, 0.0)
    ledger.acts(10, 1, 1.0)
    ledger.committed(11, commit(2.0), [], 2.0)
    assert (ledger.step, ledger.committed_losses()) == (11, [2.0])


def test_a_step_that_was_rolled_back_and_not_done_again_is_no_committed_step() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 2, 1.0)
    for step in (1, 2):
        ledger.committed(step, commit(float(step)), [], 1.0 + step)
    ledger.lost(gone(), 3.5)
    ledger.acts(1, 1, 4.0)
    assert (ledger.step, ledger.committed_losses()) == (1, [1.0])


def test_a_stall_is_never_longer_than_its_step() -> None:
    ledger = Ledger(0, 0.0)
    ledger.acts(0, 1, 1.0)
    ledger.committed(1, commit(), [30.0], 2.0)
    assert parts(ledger, 2.0) == {"startup": 1.0, "snapshot": 1.0}


@pytest.mark.parametrize("seed", range(30))
def test_the_parts_add_up_to_the_wall_time_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    now = rng.uniform(0, 1000)
    ledger = Ledger(rng.randrange(3), now)
    began, step = now, ledger.start_step
    for _ in range(60):
        now += rng.choice([0.0, rng.expovariate(1)])
        match rng.randrange(7):
            case 0:
                ledger.acts(rng.randint(ledger.start_step, step), rng.randint(1, 4), now)
                step = ledger.step
            case 1:
                ledger.lost(gone(detected_ms=rng.uniform(0, 100)), now)
            case 2:
                ledger.pause(now)
            case 3:
                ledger.fault_reached(now)
            case _:
                step += 1
                ledger.committed(step, commit(), [rng.uniform(0, 2)], now)
        booked = msgspec.to_builtins(ledger.goodput(now))
        assert sum(booked.values()) == pytest.approx(now - began)
        assert all(seconds >= -1e-9 for seconds in booked.values()), booked
    assert ledger.wall_s(now) == now - began
    assert all(r.resume_ms >= r.detect_ms >= 0 and r.steps_lost >= 0 for r in ledger.recoveries)

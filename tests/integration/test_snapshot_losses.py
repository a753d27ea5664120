"""Failure domains that are lost with all of their memory: what parity brings back, and what happens beyond it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from integration.harness import (
    Finished,
    Gates,
    assert_same_bits,
    finish,
    job,
    live,
    ranks,
    run_folders,
    run_processes,
)

Losses = list[tuple[int, str, tuple[int, ...]]]  # step, phase, ranks that are lost together


def lost(losses: Losses, count: int, parity: int, zero: int) -> Finished:
    """A run in which they are; its bits are those of one in which they are not."""
    faults = [
        {"at_step": step, "rank": rank, "do": "lose", "phase": phase} for step, phase, who in losses for rank in who
    ]
    snapshot = {"parity": parity, "every": 1}
    spec = job("Norm", ranks=ranks(count), layout={"zero": zero}, snapshot=snapshot, faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert len(done.kinds("fault")) == len(faults)
    assert done.kinds("rebuilt"), "the lost memory was needed"
    return done


@pytest.mark.parametrize(("zero", "count", "parity", "losses"), [
    (1, 5, 1, [(3, "gradient", (1,)), (6, "reduce", (2,)), (9, "vote", (0,)), (12, "verdict", (1,))]),
    (2, 5, 1, [(3, "apply", (4,)), (6, "snapshot", (0,)), (9, "gather", (1,)), (12, "gradient", (0,))]),
    (2, 5, 2, [(4, "vote", (1, 3)), (9, "snapshot", (0, 1))]),
    (1, 6, 2, [(4, "apply", (0, 5)), (9, "gradient", (1, 2))]),
])  # fmt: skip
def test_as_many_domains_as_parity_covers_cost_one_step_at_most(
    zero: int, count: int, parity: int, losses: Losses
) -> None:
    """A step that was committed is done again where it was not protected yet, or its verdict not applied."""
    done = lost(losses, count, parity, zero)
    assert done.result.recoveries
    for recovery in done.result.recoveries:
        assert recovery.steps_lost <= 1, done.result.recoveries
        assert any(step - 2 <= recovery.step <= step for step, _, _ in losses), done.result.recoveries


@pytest.mark.parametrize(("zero", "checkpoints"), [(1, False), (2, True)])
def test_more_losses_than_parity_go_back_to_the_newest_checkpoint_or_the_seed(
    zero: int, checkpoints: bool, tmp_path: Path
) -> None:
    """Two of four domains, with parity of one, at the same instant: while all stand in front of step 7."""
    gates = Gates(tmp_path / "gates")
    gates.shut(6)
    more = {"checkpoint": {"to": str(tmp_path / "runs"), "every": 4}} if checkpoints else {}
    snapshot = {"every": 1, "parity": 1}
    args = {"gates": str(gates.folder)}
    spec = job("Gated", args=args, ranks=ranks(4), layout={"zero": zero}, snapshot=snapshot, **more)
    with live(spec) as run:
        run.until(lambda: run.step() == 6, "the gate is reached")
        if checkpoints:
            run.until(lambda: run.events("checkpoint"), "the checkpoint of step 4")
        managers = [run_processes(spec.name)[f"manager-{slot}.1"] for slot in (0, 2)]
        (folder,) = run_folders(spec.name)
        for slot in (0, 2):
            for path in (folder / f"slot-{slot}").iterdir():
                path.unlink()
        for pid in managers:
            os.kill(pid, signal.SIGKILL)
        run.until(lambda: len(run.events("lost")) >= 2, "the losses are told")
        gates.open(6)
        result = run.result()
    assert_same_bits(result, spec)
    assert [(r.step, r.steps_lost) for r in result.recoveries] == [(4, 2) if checkpoints else (0, 6)]

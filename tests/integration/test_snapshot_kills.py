"""SIGKILLs of trainers and managers at random instants of a snapshot; tests/chaos has ten times as many."""

from __future__ import annotations

import os
import random
import secrets
import signal
import time
from pathlib import Path

import pytest
import torch

from integration.harness import Gates, assert_same_bits, job, live, ranks, run_processes
from integration.snapshot_kills import SnapshotKills

KILLS = 50


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_what_is_protected_survives_fifty_sigkills(tmp_path: Path) -> None:
    seed = secrets.randbelow(1 << 16)
    print(f"seed {seed}")
    kills = SnapshotKills(tmp_path, seed)
    try:
        for _ in range(KILLS):
            kills.strike()
    finally:
        kills.close()
    print(kills.told())
    assert kills.rebuilt >= KILLS
    assert not kills.folder.path.exists()


def test_a_run_survives_sigkills_of_its_managers(tmp_path: Path) -> None:
    """At random instants: a manager's memory outlives it, and its successor serves it.

    A gate every twelve steps: however fast the run is, it does not end before the last manager is killed.
    """
    seed = secrets.randbelow(1 << 16)
    print(f"seed {seed}")
    rng = random.Random(seed)
    gates, shut = Gates(tmp_path / "gates"), range(3, 50, 12)
    for step in shut:
        gates.shut(step)
    snapshot = {"every": 1, "parity": 1}
    spec = job(
        "Gated", args={"gates": str(gates.folder)}, steps=60, ranks=ranks(3), snapshot=snapshot, layout={"zero": 1}
    )
    with live(spec) as run:
        for at in shut:
            run.until(lambda at=at: run.step() >= at, f"step {at}")
            managers = {n: pid for n, pid in run_processes(spec.name).items() if n.startswith("manager")}
            gates.open(at)
            time.sleep(rng.uniform(0, 0.05))  # the instant
            os.kill(managers[rng.choice(sorted(managers))], signal.SIGKILL)
        result = run.result()
    assert_same_bits(result, spec)
    assert len(result.recoveries) >= 2
    # A verdict that died with a manager never reached its rank: that one step is done again.
    assert all(r.steps_lost <= 1 for r in result.recoveries), result.recoveries

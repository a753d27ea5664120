"""A minute of joins, kills, freezes and coordinator crashes: the driver of benchmarks/churn.py, with its checks."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from parts.churn_run import MAX_PEERS, MIN_PEERS, Churn, Plan, warm_up

LONGEST_S = 10.0  # without a commit, for a peer that lives: the group's timeout


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Is started before the first test, for it stays."""
    warm_up()


def seed() -> int:
    """EVERSTEP_SEED repeats a run as far as the machine's timing lets it."""
    found = int(os.environ.get("EVERSTEP_SEED", secrets.randbelow(1 << 16)))
    print(f"seed {found}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_minute_of_churn_with_five_coordinator_crashes_breaks_no_promise(tmp_path: Path) -> None:
    outcome = Churn(Plan(60.0, seed(), coordinator_kills=5), tmp_path, print).run()
    found = outcome.findings
    assert not outcome.violations, "\n\n".join(outcome.violations)
    assert outcome.count("coordinator") == 5
    assert outcome.count("kill") + outcome.count("stop") >= 10
    assert found.commits > 100
    assert MIN_PEERS <= found.sizes[0] <= found.sizes[1] <= MAX_PEERS
    assert found.longest_s < LONGEST_S

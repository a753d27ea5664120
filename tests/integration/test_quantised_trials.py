"""A few dozen trials of tests/chaos/test_quantised_trials.py in every test run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from everstep.collectives import Coordinator
from integration.group_peers import TOKEN, Peer
from integration.quantised_trials import Trials


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Is started before the first test, for it stays."""
    Peer("warm").end()


@contextmanager
def quantised_trials() -> Iterator[Trials]:
    """EVERSTEP_SEED repeats a run as far as the machine's timing lets it."""
    seed = int(os.environ.get("EVERSTEP_SEED", secrets.randbelow(1 << 16)))
    print(f"seed {seed}")
    coordinator = Coordinator(token=TOKEN, min_peers=1)
    coordinator.start()
    trials: Trials | None = None
    try:
        trials = Trials(coordinator.address, seed)
        yield trials
    finally:
        if trials is not None:
            trials.end()
        coordinator.stop()


@pytest.mark.slow
def test_the_same_bits_on_all_members_while_some_are_killed() -> None:
    with quantised_trials() as trials:
        for _ in range(40):
            trials.play(kill_share=0.3)
    print(trials.told())
    assert not trials.violations, "\n\n".join(trials.violations)
    assert trials.in_the_middle > 0
    assert trials.exact > 10

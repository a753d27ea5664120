"""Membership, recovery and snapshot versions under random faults in virtual time.

EVERSTEP_SEEDS=N runs seeds 0..N-1 instead of 0..99. A seed that fails prints its number and its event log;
`FAILED_ONCE` keeps every seed that ever did.
"""

from __future__ import annotations

import os

import pytest
from simulation.cluster import simulate

SEEDS = int(os.environ.get("EVERSTEP_SEEDS", "100"))
CHUNK = 10
FAILED_ONCE: tuple[int, ...] = ()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_seed_keeps_the_invariants(first: int) -> None:
    for seed in range(first, min(first + CHUNK, SEEDS)):
        simulate(seed)


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_a_seed_that_failed_once_stays_fixed(seed: int) -> None:
    simulate(seed)

"""Membership, recovery and snapshot versions under random faults in virtual time.

EVERSTEP_SEEDS=N runs seeds 0..N-1 instead of 0..99. A seed that fails prints its number and its event log;
`FAILED_ONCE` and `FAILED_IN_DOUBT` keep every seed that ever did, with the faults that there were then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from everstep.collectives import membership
from everstep.platform.training import recovery
from simulation import trainer
from simulation.cluster import Failed, simulate
from simulation.state import Value, advance

SEEDS = int(os.environ.get("EVERSTEP_SEEDS", "100"))
CHUNK = 10

FAILED_ONCE = (
    68,  # a replaced coordinator started a view of one joiner from step 0 while the others moved house
    117,  # the same, after the watcher of the domain that held the state was cut off
    130,  # a new epoch forgot what the one before it had protected
    240,  # segments were freed under a trainer that did not know yet that its view was over
    862,  # a new epoch chose a spare's old memory before the domain with the newer state was back
    1831,  # the same within an epoch
)
FAILED_IN_DOUBT = (
    720,  # a rank whose own end of a fetch broke waited for ever: both ends hear of it
    3428,  # the referee counted on a layout given up for one that lost a host just before the verdict
    9552,  # the same
)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_seed_keeps_the_invariants(first: int) -> None:
    for seed in range(first, min(first + CHUNK, SEEDS)):
        simulate(seed)


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_a_seed_that_failed_once_stays_fixed(seed: int) -> None:
    simulate(seed, in_doubt=False)


@pytest.mark.parametrize("seed", FAILED_IN_DOUBT)
def test_a_seed_that_failed_with_verdicts_in_doubt_stays_fixed(seed: int) -> None:
    simulate(seed)


def test_a_seed_gives_the_same_run_every_time() -> None:
    assert simulate(7) == simulate(7)


def test_all_kinds_of_faults_occur() -> None:
    seen: set[str] = set()
    outcomes = [simulate(seed) for seed in range(60)]
    for outcome in outcomes:
        seen |= set(outcome.faults)
    assert len(seen) == 15, sorted(seen)
    assert sum(outcome.half_told for outcome in outcomes) > 10
    assert sum(outcome.woken_late for outcome in outcomes) > 10


# ---- the simulation can fail ------------------------------------------------------------------------------


def _forgets_missing(patch: pytest.MonkeyPatch) -> None:
    """A new coordinator starts with whoever is there, and never waits for the others."""
    initial = membership.initial
    patch.setattr(membership, "initial", lambda *args: initial(*args[:5]))


def _hides_the_newest_step(patch: pytest.MonkeyPatch) -> None:
    choose = recovery.choose

    def worse(ranks: Any, inventories: Any, stocks: Mapping[str, Any], checkpoint: Any, initial_step: int) -> Any:
        return choose(ranks, inventories, {}, checkpoint, initial_step)

    patch.setattr(recovery, "choose", worse)


def _computes_wrong_bits(patch: pytest.MonkeyPatch) -> None:
    def wrong(value: Value, step: int, unit: int) -> Value:
        step, bits = advance(value, step, unit)
        return (step, bits ^ (step == 30 and unit == 3))

    patch.setattr(trainer, "advance", wrong)


def _gives_up_on_the_dead(patch: pytest.MonkeyPatch) -> None:
    """Nobody hears of a death: the view waits for a vote that never comes."""
    decide = membership.decide

    def deaf(state: Any, event: Any, now: float) -> Any:
        if isinstance(event, membership.MemberDied | membership.Complained):
            return state, (), "not my business"
        return decide(state, event, now)

    patch.setattr(membership, "decide", deaf)


@pytest.mark.parametrize(
    ("sabotage", "sees"),
    [
        (_forgets_missing, "was protected"),
        (_hides_the_newest_step, "was protected"),
        (_computes_wrong_bits, "unit 3 holds"),
        (_gives_up_on_the_dead, "nothing has moved"),
    ],
)
def test_a_broken_protocol_is_seen_and_the_log_is_shown(
    sabotage: Callable[[pytest.MonkeyPatch], None], sees: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    failures = []
    for seed in range(40):
        try:
            simulate(seed)
        except Failed as failed:
            failures.append((seed, str(failed)))
            if sees in failures[-1][1]:
                break
    seed, text = failures[-1]
    assert text.startswith(f"seed {seed} failed: ")
    assert sees in text
    assert len(text.splitlines()) > 20

"""Groups under random faults in virtual time, coordinators' restarts with transactions in doubt above all.

EVERSTEP_SEEDS=N runs seeds 0..N-1 instead of 0..99.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from everstep.collectives import group_membership, group_views
from everstep.collectives.standing import Standing
from simulation.groups import Violation, World

SEEDS = int(os.environ.get("EVERSTEP_SEEDS", "100"))
CHUNK = 25


@pytest.mark.timeout(0)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_transaction_ends_differently_on_two_members(first: int) -> None:
    for seed in range(first, min(first + CHUNK, SEEDS)):
        run(seed)


def run(seed: int) -> World:
    world = World(seed)
    try:
        world.simulate()
    except Exception as error:
        raise Violation(f"seed {seed}: {type(error).__name__}: {error}") from error
    return world


def test_a_seed_gives_the_same_run_every_time() -> None:
    assert run(3).lines == run(3).lines


def test_all_kinds_of_faults_occur() -> None:
    assert len({kind for seed in range(5) for kind in run(seed).faults}) == 9


def _forgets_what_was_settled(patch: pytest.MonkeyPatch) -> None:
    """A restarted coordinator does not listen to who saw a commit."""
    resolve = group_views.resolve_if_all

    def deaf(state: Any, phase: Any, now: float, **more: Any) -> Any:
        reports = {name: type(r)(r.view, r.over, None, r.doubt) for name, r in phase.reports.items()}
        return resolve(replace(state, settled=None), replace(phase, reports=reports), now, **more)

    patch.setattr(group_views, "resolve_if_all", deaf)
    patch.setattr(group_membership, "resolve_if_all", deaf)


def _keeps_its_doubt_to_itself(patch: pytest.MonkeyPatch) -> None:
    """A member that comes back does not say that it waits for a verdict."""
    greeting = Standing.greeting

    def silent(self: Standing) -> Any:
        doubt, self.doubt = self.doubt, None
        said = greeting(self)
        self.doubt = doubt
        return said

    patch.setattr(Standing, "greeting", silent)


@pytest.mark.parametrize(
    ("sabotage", "sees"),
    [(_forgets_what_was_settled, "ended differently"), (_keeps_its_doubt_to_itself, "no commit in the last 3 s")],
)
def test_a_broken_protocol_is_seen(sabotage: Any, sees: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch)
    for seed in range(60):
        try:
            run(seed)
        except Violation as violation:
            if sees in str(violation):
                return
    pytest.fail("no seed showed it")

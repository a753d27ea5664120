"""A conductor for one rank that is alone: the same verdicts, no group, no snapshots.

This is what `es.Session` uses outside of a job, and what every other way of holding the lanes is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from everstep.collectives.errors import CollectiveError
from everstep.platform.training.conductor import RunOver, Seat
from everstep.platform.training.layout import Run, merge_runs, units_in
from everstep.platform.training.messages import Inventory, Verdict, ViewPlan, Vote
from everstep.platform.training.verdict import Progress, Rules, judge_step
from everstep.storage.planner import Copy

if TYPE_CHECKING:
    from everstep.platform.training.settings import Settings
    from everstep.platform.training.shard import RankState


class Solo:
    """Implements `Conductor`."""

    name = "solo"

    def __init__(self, settings: Settings) -> None:
        self._rules = Rules(settings.lanes, settings.clip_norm, settings.nonfinite_limit)
        self._progress = Progress()
        self.verdicts: list[Verdict] = []

    def empty(self, elements: int) -> torch.Tensor:
        return torch.empty(elements)

    def take_seat(self, inventory: Callable[[], Inventory]) -> Seat:
        offer = inventory()
        plan = ViewPlan((merge_runs(units_in(offer.units)),), None)
        return Seat("0.1", 0, 0, plan, None, (self.name,))

    def fetch(self, seat: Seat, copies: list[tuple[Copy, memoryview]]) -> None:
        raise AssertionError("a rank that is alone has nobody to fetch from")

    def own_domain(self, domain: str) -> bool:
        return False

    def level(self, seat: Seat) -> None:
        pass

    def over(self) -> bool:
        return False

    def vote(self, seat: Seat, step: int, vote: Vote) -> Verdict:
        if vote.kind != "step":
            return Verdict("sealed" if vote.kind == "seal" else "finished")
        verdict, self._progress = judge_step(step, {self.name: vote}, self._rules, self._progress)
        self.verdicts.append(verdict)
        if verdict.outcome == "failed":
            raise RunOver(verdict.error)
        return verdict

    def snapshot(
        self,
        state: RankState,
        before_seal: Callable[[], None],
        runs: Sequence[Run] | None = None,
        wait: bool = False,
    ) -> float:
        before_seal()
        return 0.0

    def seal_mirror(self, state: RankState) -> None:
        raise AssertionError("a rank that is alone mirrors nobody")

    def release(self) -> float:
        return 0.0

    def protect(self, step: int, now: bool = False) -> float:
        return 0.0

    def sealed_step(self) -> int:
        return -1

    def background_s(self) -> float:
        return 0.0

    def fault_point(self, phase: str, step: int) -> None:
        pass

    def stand_up(self, error: CollectiveError | None) -> None:
        pass

    def slow_factor(self, step: int) -> float:
        return 1.0

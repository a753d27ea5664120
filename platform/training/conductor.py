"""The port between a session and whatever decides for its group.

Two implementations: `solo.Solo` (one rank, decisions in the same process) and the rank process of
everstep.actors (views and verdicts from a supervisor). All calls come from the training thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from everstep.collectives.errors import CollectiveError
from everstep.collectives.errors import PeerLost as ViewOver
from everstep.platform.training.exchange import Group
from everstep.platform.training.layout import Run
from everstep.platform.training.messages import Inventory, ViewPlan, Vote
from everstep.platform.training.messages import Verdict as Decided
from everstep.platform.training.shard import RankState
from everstep.storage.planner import Copy


class RunOver(Exception):
    """The run has ended for this rank; the reason is for its log."""


@dataclass(frozen=True)
class Seat:
    """A rank's place in one view. `group` is None where it is alone."""

    view: str
    rank: int
    base_step: int
    plan: ViewPlan
    group: Group | None
    names: tuple[str, ...]

    @property
    def ranks(self) -> int:
        return len(self.plan.owned)

    @property
    def mirrored(self) -> tuple[Run, ...]:
        """The runs that this rank holds for another ([Note: shadows])."""
        return self.plan.shadowed[self.rank] if self.plan.shadowed else ()


class Conductor(Protocol):
    name: str

    def empty(self, elements: int) -> torch.Tensor:
        """Float32 memory, undefined, that is best for sending from."""

    def take_seat(self, inventory: Callable[[], Inventory]) -> Seat:
        """Waits for the next view with this rank in it. Raises RunOver."""

    def fetch(self, seat: Seat, copies: list[tuple[Copy, memoryview]]) -> None:
        """Fills each buffer with its copy's bytes, verified. Raises ViewOver, or StorageError."""

    def own_domain(self, domain: str) -> bool:
        """Whether a segment of this domain is this rank's own."""

    def level(self, seat: Seat) -> None:
        """Says that this rank holds the base step; returns when all do. Raises ViewOver."""

    def over(self) -> bool:
        """Whether the view is over; cheap, for checks inside backward."""

    def vote(self, seat: Seat, step: int, vote: Vote) -> Decided:
        """Raises ViewOver."""

    def snapshot(
        self,
        state: RankState,
        before_seal: Callable[[], None],
        runs: Sequence[Run] | None = None,
        wait: bool = False,
    ) -> float:
        """Begins to write the state at its stamp ([Note: window]), `runs` of what is held (all); with `wait` returns
        when it is sealed. Does nothing where that version is there. Seconds that training waited."""

    def seal_mirror(self, state: RankState) -> None:
        """Writes and seals what is mirrored, at its stamp: others restore from it where its owner is lost."""

    def release(self) -> float:
        """Returns when the state may change; seconds waited."""

    def protect(self, step: int, now: bool = False) -> float:
        """Before the vote on `step`: waits for the newest snapshot's protection where a snapshot may follow that
        step, or `now`; seconds waited. Raises ViewOver."""

    def sealed_step(self) -> int:
        """Step of the newest snapshot of the present layout that is sealed here, parity included, or -1."""

    def background_s(self) -> float:
        """CPU time that snapshots took beside training since this was last asked."""

    def fault_point(self, phase: str, step: int) -> None:
        """Scripted faults strike here."""

    def stand_up(self, error: CollectiveError | None) -> None:
        """The session has left the view because of `error` (None at the end): its connections may be closed."""

    def slow_factor(self, step: int) -> float:
        """How much slower a scripted fault makes this rank's lanes; 1.0 without one."""


__all__ = ["Conductor", "RunOver", "Seat", "ViewOver"]

"""The port between a session and whatever decides for its group.

Two implementations: `solo.Solo` (one rank, decisions in the same process) and the rank process of
everstep.actors (views and verdicts from a supervisor). All calls come from the training thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from everstep.collectives.errors import CollectiveError
from everstep.collectives.errors import PeerLost as ViewOver
from everstep.platform.training.exchange import Group
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

    def snapshot(self, state: RankState, before_seal: Callable[[], None]) -> float:
        """Writes and seals the state at its stamp; seconds that training waited."""

    def sealed_step(self) -> int:
        """Step of the newest snapshot that this rank sealed under the present layout, or -1."""

    def fault_point(self, phase: str, step: int) -> None:
        """Scripted faults strike here."""

    def stand_up(self, error: CollectiveError | None) -> None:
        """The session has left the view because of `error` (None at the end): its connections may be closed."""

    def slow_factor(self, step: int) -> float:
        """How much slower a scripted fault makes this rank's lanes; 1.0 without one."""


__all__ = ["Conductor", "RunOver", "Seat", "ViewOver"]

"""What a session is told: its settings, and inside a rank process everything that the job gives it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everstep.platform.training.conductor import Conductor
    from everstep.platform.training.task import Task


@dataclass(frozen=True)
class Settings:
    """What of a job matters to a session. `steps`: the last one; `stall_s` in seconds."""

    steps: int
    lanes: int = 1
    lane_batch: int = 1
    seed: int = 0
    zero: int = 2
    clip_norm: float | None = None
    nonfinite_limit: int = 10
    stall_s: float = 60.0
    eval_every: int = 0


@dataclass(frozen=True)
class JobContext:
    """What a rank process gives to a session that its task makes by itself (`Task.loop`)."""

    settings: Settings
    task: Task
    conductor: Conductor


current_job: ContextVar[JobContext | None] = ContextVar("current_job", default=None)

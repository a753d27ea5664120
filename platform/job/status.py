"""What a live run says about itself: one `Status` (now) and numbered `Event`s (since).

Owns: the wire form between a run and whoever watches it (CLI, dashboards). Immutable.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Phase = Literal["starting", "training", "recovering", "finishing", "ended"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment. step: newest committed of `steps`; started_at: wall clock, seconds since 1970;
    step_s: recent seconds a step; None where nothing is known yet. members: one map a process, with name,
    rank (None for spares and managers), slot, domain, pid and state."""

    job: str
    run: str
    phase: Phase
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    samples_per_s: float | None = None
    step_s: float | None = None
    ranks: int = 0
    ranks_target: int = 0
    members: list[dict[str, Any]] = []
    last_event: str = ""
    recoveries: int = 0
    checkpoint: str | None = None
    started_at: float = 0.0
    error: str | None = None
    host: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened. id grows by one; at_s: wall clock, seconds since 1970; kind: a short word, as
    "view", "lost", "recovered", "checkpoint", "finding"; text: for people; data: for programs."""

    id: int
    at_s: float
    kind: str
    text: str
    data: dict[str, Any] = {}

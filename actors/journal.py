"""What happened, in order: events for those who watch, findings for the result, one metrics line a step.

Written by the supervisor's loop, read from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from everstep.platform.cluster.chronicle import finding_of
from everstep.platform.job.result import Finding, Recovery
from everstep.platform.job.status import Event
from everstep.platform.training.messages import Verdict, Vote

_KEPT_EVENTS = 10_000


class Journal:
    def __init__(self, metrics: Path | None, told: Callable[[Event], None] = lambda event: None) -> None:
        """`told` hears every event; called by the loop."""
        self._told = told
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._next = 1
        if metrics is not None:
            metrics.parent.mkdir(parents=True, exist_ok=True)
        self._file = metrics.open("a", encoding="utf-8") if metrics is not None else None
        self.findings: list[Finding] = []
        self.last_text = ""

    def go_on(self, events: Iterable[Event], findings: Iterable[Finding]) -> None:
        """What was said by the supervisors before this one."""
        self._events.extend(events)
        self.findings.extend(findings)
        if self._events:
            self._next, self.last_text = self._events[-1].id + 1, self._events[-1].text

    def add(self, kind: str, text: str, data: dict[str, Any]) -> None:
        with self._lock:
            event = Event(id=self._next, at_s=time.time(), kind=kind, text=text, data=data)
            self._events.append(event)
            self._next += 1
            self.last_text = text
            if kind == "finding":
                self.findings.append(finding_of(event))
        self._told(event)

    def recovered(self, recovery: Recovery) -> None:
        text = (
            f"recovered from {recovery.cause}: detected after {recovery.detect_ms:.0f} ms, next step committed "
            f"after {recovery.resume_ms:.0f} ms, {recovery.steps_lost} steps lost"
        )
        self.add("recovered", text, msgspec.to_builtins(recovery))

    def after(self, ident: int) -> list[Event]:
        with self._lock:
            return [event for event in self._events if event.id > ident]

    def metrics(self, step: int, verdict: Verdict, seconds: float, votes: Mapping[str, Vote]) -> None:
        """One JSON line a committed step; a step that is computed again after a rollback is written again."""
        if self._file is None:
            return
        line = {
            "step": step,
            "loss": verdict.loss,
            "grad_norm": verdict.grad_norm,
            "skipped": verdict.outcome == "skip",
            "step_s": seconds,
            "ranks": len(votes),
            "compute_s": max((vote.compute_s for vote in votes.values()), default=0.0),
            "exchange_s": max((vote.exchange_s for vote in votes.values()), default=0.0),
            "snapshot_s": max((vote.stall_s for vote in votes.values()), default=0.0),
            **verdict.metrics,
        }
        self._file.write(msgspec.json.encode(line).decode() + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

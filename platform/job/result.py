"""How a run ended: the `RunResult` that `--result FILE` gets and that outside programs read.

Owns: the field names of the result file (design §13; frozen by a golden test). Fields are only ever added.
Thread-safety: immutable; `write` is atomic (a reader sees the old file or the new one, never a part).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """First and last committed loss of this execution; None when no step committed."""

    first: float | None = None
    last: float | None = None


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """One recovery. step: the base step it went back to. ranks: who was lost. detect_ms: from the fault, as
    far as known, to the verdict. resume_ms: from the fault to the next committed step. steps_lost: redone."""

    step: int
    cause: str
    ranks: list[int]
    detect_ms: float
    resume_ms: float
    steps_lost: int


class Rescale(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the ranks in order, with no step lost. pause_ms: how long no step was worked on. cause: "scale"
    (asked for, or ranks that joined), "preemption" (a node drained, or a notice came) or "drain" (by hand)."""

    step: int
    from_: int = msgspec.field(name="from")
    to: int
    pause_ms: float
    cause: str = "scale"


class Snapshots(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshots taken; what trainers waited for them (median ms a snapshot; share of step time); parity they had;
    steps from one to the next at the end (0: shadows stood in for them)."""

    count: int = 0
    stall_ms_median: float = 0.0
    stall_share: float = 0.0
    parity: int = 0
    interval: int = 0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One verdict of the detector; links are pairs of ranks."""

    syndrome: str
    ranks: list[int] = []
    links: list[tuple[int, int]] = []
    first_step: int = 0
    detected_after_steps: int = 0
    detected_after_ms: float = 0.0
    evidence: Any = None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Where the wall time went, in seconds; the parts add up to the run's wall time."""

    productive_s: float = 0.0
    startup_s: float = 0.0
    snapshot_s: float = 0.0
    recovery_s: float = 0.0
    lost_work_s: float = 0.0
    waiting_s: float = 0.0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run ended badly. kind: "task", "nonfinite", "limit", "ranks", "internal"…; message: one or two
    lines; step, rank and lane when known; traceback: the task's own, "" when it raised nothing."""

    kind: str
    message: str
    step: int | None = None
    rank: int | None = None
    lane: int | None = None
    traceback: str = ""


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. ok: it did all its steps. steps: the last committed step. losses: this execution's
    committed steps, in order; None (null, for JSON has no NaN) where the step was skipped, its loss not being
    finite. stopped: ended early because someone asked. metrics: last values, by name; None where not finite."""

    job: str
    run: str
    ok: bool
    steps: int
    state_sha256: str
    loss: Loss = Loss()
    losses: list[float | None] = []
    wall_s: float = 0.0
    ranks_final: int = 0
    recoveries: list[Recovery] = []
    rescales: list[Rescale] = []
    snapshots: Snapshots = Snapshots()
    checkpoints: list[str] = []
    findings: list[Finding] = []
    goodput: Goodput = Goodput()
    host: str = ""
    skipped: int = 0
    stopped: bool = False
    metrics: dict[str, float | None] = {}
    error: Failure | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-able data under the public names (`from`, not `from_`)."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    def to_json(self, indent: int = 2) -> str:
        """Returns the result as JSON; indent=0 gives one line."""
        raw = msgspec.json.encode(self)
        return (msgspec.json.format(raw, indent=indent) if indent else raw).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> RunResult:
        """Reads what `to_json` wrote; unknown fields are passed over. Raises msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls)

    def write(self, path: str | Path) -> None:
        """Writes the result as JSON, atomically, making the folder when it is missing; raises OSError."""
        write_atomic(Path(path), self.to_json() + "\n")


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Replaces a file by a finished one (temporary file beside it, fsync, rename); raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

"""A run's status and result, put together from what its supervisor keeps. No state, no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everstep.actors.journal import Journal
from everstep.collectives import membership as mb
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.desk import Desk
from everstep.platform.cluster.ledger import Ledger
from everstep.platform.job.result import Failure, Loss, RunResult
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Phase, Status


@dataclass(frozen=True)
class Books:
    """Everything that reports draw on. `urls`: finished checkpoints; `finished()`: with their steps."""

    spec: JobSpec
    host: str
    started_at: float  # wall clock
    desk: Desk
    ledger: Ledger
    journal: Journal
    urls: list[str]
    finished: Callable[[], tuple[tuple[int, str], ...]] = tuple


def domain_of(slot: int) -> str:
    """In the embedded mode a failure domain is a rank's slot."""
    return f"slot-{slot}"


def status_of(
    books: Books,
    phase: Phase,
    membership: mb.State,
    staffing: st.State,
    failure: Failure | None,
    pid: Callable[[str], int | None],
    leaders: list[dict[str, Any]],
) -> Status:
    """`leaders`: the supervisor and its standby, as members are shown."""
    spec, ledger = books.spec, books.ledger
    step_s = ledger.step_s
    samples = spec.lanes * spec.lane_batch / step_s if step_s else None
    # A loss that weighs tokens says how many there were; one that weighs samples says nothing new.
    tokens = ledger.weight if ledger.weight != spec.lanes * spec.lane_batch else None
    ended = phase in ("finishing", "ended")
    return Status(
        job=spec.name,
        run=spec.run_name,
        phase=phase,
        step=ledger.step,
        steps=spec.steps,
        loss=ledger.losses.get(ledger.step),
        samples_per_s=samples,
        tokens_per_s=tokens / step_s if step_s and tokens else None,
        step_s=step_s,
        ranks=ledger.ranks if ended else len(mb.current_members(membership)),
        ranks_target=membership.target,
        members=[*_members(membership, staffing, pid), *leaders],
        last_event=books.journal.last_text,
        recoveries=len(ledger.recoveries),
        checkpoint=books.urls[-1] if books.urls else None,
        started_at=books.started_at,
        error=failure.message if failure else None,
        host=books.host,
    )


def _members(membership: mb.State, staffing: st.State, pid: Callable[[str], int | None]) -> list[dict[str, Any]]:
    ranks = {member.name: rank for rank, member in enumerate(mb.current_members(membership))}
    shown: list[dict[str, Any]] = []
    for index, slot in enumerate(staffing.slots):
        common = {"slot": index, "domain": domain_of(index)}
        if slot.trainer:
            rank = ranks.get(slot.trainer)
            state = "in view" if rank is not None else "spare" if slot.ready else "starting"
            state = "leaving" if slot.trainer in staffing.stopping else state
            shown.append({"name": slot.trainer, "rank": rank, "pid": pid(slot.trainer), "state": state, **common})
        if slot.manager:
            state = "up" if slot.manager_up else "starting"
            shown.append({"name": slot.manager, "rank": None, "pid": pid(slot.manager), "state": state, **common})
    return shown


def result_of(books: Books, failure: Failure | None, problem: str, now: float) -> RunResult:
    """The run's end. `problem` is why a run without failure did not get to its last step."""
    spec, ledger, desk = books.spec, books.ledger, books.desk
    losses = ledger.committed_losses()
    finite = [loss for loss in losses if math.isfinite(loss)]
    complete = bool(desk.state_sha256) and failure is None
    stopped = bool(desk.stop_reason) and ledger.step < spec.steps
    if failure is None and not complete and not stopped:
        failure = Failure(kind="internal", message=problem or "the run was ended before its last step")
    goodput = ledger.goodput(now)
    return RunResult(
        job=spec.name,
        run=spec.run_name,
        ok=complete and not stopped,
        steps=ledger.step,
        state_sha256=desk.state_sha256,
        loss=Loss(first=finite[0] if finite else None, last=finite[-1] if finite else None),
        losses=[_finite(loss) for loss in losses],
        wall_s=ledger.wall_s(now),
        ranks_final=ledger.ranks,
        recoveries=ledger.recoveries,
        rescales=ledger.rescales,
        snapshots=ledger.snapshots(desk.interval),
        checkpoints=books.urls,
        findings=books.journal.findings,
        goodput=goodput,
        host=books.host,
        skipped=ledger.skipped,
        stopped=stopped,
        metrics={name: _finite(value) for name, value in ledger.metrics.items()},
        error=failure,
    )


def digest_of(result: RunResult) -> dict[str, Any]:
    """What the cluster's controller keeps of a run that has ended."""
    return {
        "job": result.job,
        "run": result.run,
        "ok": result.ok,
        "stopped": result.stopped,
        "steps": result.steps,
        "wall_s": result.wall_s,
        "ranks_final": result.ranks_final,
        "state_sha256": result.state_sha256,
        "error": result.error.message if result.error else None,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None

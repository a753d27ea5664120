"""How long a run stands still when a rank is killed, frozen or busy; beside it torchrun, killed the same way.

A job runs as `everstep run` in a process of its own. From outside, at a random moment of a step, a rank gets a
real SIGKILL or SIGSTOP; what counts is the time from the signal to the first step that the next view commits,
seen in the run's metrics.jsonl (read every 2 ms). The peer is torchrun with DDP over gloo, the same model and
a torch.save checkpoint after every step. Times depend on the machine and are never asserted.
"""

import itertools
import json
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from parts.live_run import START_LIMIT_S, TAIL_S, BenchmarkFailed, LiveRun, left_of
from peers.torchrun import measure_peer
from rich import box
from rich.console import Console
from rich.table import Table

from everstep.platform.job.errors import SpecError
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event, Status

_ROOT = Path(__file__).resolve().parent.parent
_SETTLE_STEPS = 5  # ordinary steps before each signal; they also give the ordinary step time
_BUSY_STEP = 8
_BUSY_RANK = 1
_STEPS = 1_000_000  # the run is stopped, it never ends by itself
_RECOVERY_LIMIT_S = 30.0
_TARGET_S = {"kill": 0.5, "freeze": 1.0}  # beyond one ordinary step
_TARGET_STEPS_LOST = 1


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class HostKind(StrEnum):
    """What rank processes are started with."""

    ray = "ray"
    processes = "processes"


@dataclass(frozen=True)
class Strike:
    """One signal and what followed, in seconds since the signal."""

    rank: int
    detected_s: float
    resumed_s: float
    steps_lost: int


@dataclass
class Report:
    """What was measured. Times in seconds."""

    host: str
    spec: str
    seed: int
    ranks: int
    cores: int = os.cpu_count() or 1
    load: list[float] = field(default_factory=list)  # one-minute load averages: start, end
    ordinary_step_s: float = 0.0
    cases: dict[str, list[Strike]] = field(default_factory=dict)
    busy: dict[str, Any] | None = None
    peer: dict[str, Any] | None = None
    left: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # what could not be measured, and why


# ---- everstep -------------------------------------------------------------------------------------------


def settle(run: LiveRun, ranks: int, spares: int) -> tuple[Status, list[float]]:
    """Waits for all ranks and spares and some ordinary steps after that; returns those steps' times."""

    def complete() -> bool:
        status = run.status()
        waiting = sum(member["state"] == "spare" for member in status.members)
        return status.phase == "training" and status.ranks == ranks and waiting >= spares

    run.wait(complete, START_LIMIT_S, f"{ranks} ranks and {spares} spares", every_s=0.1)
    first = len(run.tail.lines)
    run.wait(lambda: len(run.tail.lines) > first + _SETTLE_STEPS, _RECOVERY_LIMIT_S, "ordinary steps")
    lines = run.tail.lines[first:]
    return run.status(), [b.at_s - a.at_s for a, b in itertools.pairwise(lines)]


def strike(run: LiveRun, status: Status, number: int, step_s: float, chance: random.Random) -> Strike:
    """Signals a random rank at a random moment of a step, and waits for the first commit without it."""
    victim = chance.choice([member for member in status.members if member["rank"] is not None])
    known = max((event.id for event in run.events(0)), default=0)
    count = len(run.tail.lines)
    run.wait(lambda: len(run.tail.lines) > count, _RECOVERY_LIMIT_S, "a step to begin", every_s=TAIL_S)
    time.sleep(chance.uniform(0, step_s))
    struck_s = time.time()
    os.kill(victim["pid"], number)
    seen: list[Event] = []

    def acts_again() -> bool:
        """Asked rarely, so that asking costs the run nothing; the times come from the events and the tail."""
        seen[:] = run.events(known)
        lost = next((e for e in seen if e.kind == "lost" and e.data.get("name") == victim["name"]), None)
        view = next((e for e in seen if lost and e.kind == "view" and e.id > lost.id), None)
        return view is not None and run.tail.lines[-1].at_s > view.at_s

    run.wait(acts_again, _RECOVERY_LIMIT_S, f"a commit after signal {number} to {victim['name']}", every_s=0.1)
    lost = next(e for e in seen if e.kind == "lost" and e.data.get("name") == victim["name"])
    view = next(e for e in seen if e.kind == "view" and e.id > lost.id)
    before = [line for line in run.tail.lines if line.at_s <= view.at_s]
    resumed = next(line for line in run.tail.lines if line.at_s > view.at_s)
    steps_lost = max(0, before[-1].step - int(view.data["step"]))
    return Strike(victim["rank"], lost.at_s - struck_s, resumed.at_s - struck_s, steps_lost)


def busy(run: LiveRun, seconds: float) -> dict[str, Any]:
    """Waits for the step in which a rank holds the interpreter lock; says whether it was let live."""

    def over() -> bool:
        return bool(run.tail.lines) and run.tail.lines[-1].step > _BUSY_STEP

    run.wait(over, START_LIMIT_S + 3 * seconds, "the busy rank's step")
    lines = run.tail.lines
    longest = max(b.at_s - a.at_s for a, b in itertools.pairwise(lines))
    lost = [event.text for event in run.events(0) if event.kind == "lost"]
    struck = any(event.kind == "fault" for event in run.events(0))
    problem = lost or ("" if struck and longest > seconds * 0.8 else "the lock was not held that long")
    return {"seconds": seconds, "longest_step_s": longest, "problem": problem, "ok": not problem}


def measure(
    report: Report, run: LiveRun, spec: JobSpec, counts: dict[str, int], busy_s: float, deadline: float
) -> None:
    chance = random.Random(report.seed)
    run.connect()
    if busy_s > 0:
        report.busy = busy(run, busy_s)
    ordinary: list[float] = []
    signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
    # Kills and freezes take turns, so that a noisy minute on the machine does not fall on one of them alone.
    rounds = [case for i in range(max(counts.values())) for case in counts if i < counts[case]]
    report.cases = {case: [] for case in counts}
    for case in rounds:
        if time.monotonic() > deadline:
            report.notes.append("--limit-s was reached: fewer repetitions than asked for")
            break
        status, steps = settle(run, spec.ranks.max, spec.ranks.spares)
        ordinary += steps
        report.cases[case].append(strike(run, status, signals[case], statistics.median(ordinary), chance))
    report.ordinary_step_s = statistics.median(ordinary) if ordinary else 0.0


# ---- the report -----------------------------------------------------------------------------------------


def summary(report: Report) -> dict[str, dict[str, Any]]:
    """Per case: numbers, and whether the targets of the project are met."""
    found = {}
    for case, strikes in report.cases.items():
        if not strikes:
            continue
        resumed = [s.resumed_s for s in strikes]
        median, lost = statistics.median(resumed), max(s.steps_lost for s in strikes)
        limit = report.ordinary_step_s + _TARGET_S[case]
        found[case] = {
            "repetitions": len(strikes),
            "detected_median_s": statistics.median(s.detected_s for s in strikes),
            "resumed_median_s": median,
            "resumed_worst_s": max(resumed),
            "median_minus_step_s": median - report.ordinary_step_s,
            "worst_minus_step_s": max(resumed) - report.ordinary_step_s,
            "steps_lost_worst": lost,
            "target_s": limit,
            "ok": median <= limit and lost <= _TARGET_STEPS_LOST,
        }
    return found


def show(report: Report, console: Console) -> None:
    console.print(
        f"{report.spec} on host {report.host}: {report.ranks} ranks, {report.cores} cores, load "
        f"{' to '.join(f'{load:.1f}' for load in report.load)}, seed {report.seed}; "
        f"ordinary step {_ms(report.ordinary_step_s)} (median)"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in (
        "signal to next commit",
        "n",
        "median",
        "worst",
        "median - step",
        "detected",
        "steps lost",
        "target",
    ):
        table.add_column(column, justify="left" if column in ("signal to next commit", "target") else "right")
    for case, row in summary(report).items():
        verdict = "pass" if row["ok"] else "FAIL"
        table.add_row(
            {"kill": "SIGKILL", "freeze": "SIGSTOP"}[case], str(row["repetitions"]), _ms(row["resumed_median_s"]),
            _ms(row["resumed_worst_s"]), _ms(row["median_minus_step_s"]), _ms(row["detected_median_s"]),
            str(row["steps_lost_worst"]),
            f"{verdict}: median <= step + {_TARGET_S[case]:g} s, at most {_TARGET_STEPS_LOST} step lost",
        )  # fmt: skip
    console.print(table)
    if report.busy is not None:
        verdict = "pass: not killed" if report.busy["ok"] else f"FAIL: {report.busy['problem']}"
        console.print(
            f"busy for {report.busy['seconds']:g} s (holds the interpreter lock): "
            f"longest step {report.busy['longest_step_s']:.1f} s; {verdict}"
        )
    if report.peer is not None and "resumed_s" in report.peer:
        peer = report.peer
        console.print(
            f"{peer['what']}: SIGKILL to next step {peer['resumed_s']:.2f} s, {peer['steps_lost']} steps lost, "
            f"ordinary step {_ms(peer['ordinary_step_s'])} with its checkpoint (one repetition)"
        )
        if "ratio" in peer:
            console.print(f"ratio: torchrun stands still {peer['ratio']:.1f} times as long as everstep after a kill")
    for note in [*report.notes, *report.failed]:
        console.print(f"note: {note}", markup=False)
    console.print(f"processes left: {', '.join(map(str, report.left)) or 'none'}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


@app.command()
def main(
    spec: Annotated[Path, typer.Argument(metavar="[SPEC]", help="The job.")] = _ROOT / "examples" / "gpt.yaml",
    host: Annotated[
        HostKind, typer.Option(help="Start ranks as Ray actors or local processes.")
    ] = HostKind.processes,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=VALUE", help="Change a field of the job, as `run` does.")
    ] = None,
    kills: Annotated[int, typer.Option(min=0, help="How often a rank gets SIGKILL.")] = 5,
    freezes: Annotated[int, typer.Option(min=0, help="How often a rank gets SIGSTOP.")] = 5,
    busy_s: Annotated[float, typer.Option(min=0, help="How long one rank holds the interpreter lock; 0: not.")] = 5.0,
    peer: Annotated[bool, typer.Option(help="Measure torchrun too.")] = True,
    limit_s: Annotated[float, typer.Option(help="No new repetition begins after this; the peer follows.")] = 140.0,
    seed: Annotated[int | None, typer.Option(help="Of ranks and moments; random and printed if left out.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure recovery: SIGKILL, SIGSTOP and a busy interpreter, beside torchrun. Under 4 minutes by default.

    \b
    python benchmarks/recovery.py
    python benchmarks/recovery.py --host ray --kills 3 --freezes 3 --no-peer
    python benchmarks/recovery.py examples/tiny.yaml --set ranks.max=2 --json
    """
    changes = [*(set_ or []), f"steps={_STEPS}", "checkpoint=null"]
    faults = [{"at_step": _BUSY_STEP, "rank": _BUSY_RANK, "do": "busy", "seconds": busy_s}] if busy_s > 0 else []
    try:
        job = JobSpec.load(spec, [*changes, f"faults={json.dumps(faults)}"])
    except SpecError as error:
        _refuse(str(error))
    if job.ranks.max < 2 or kills + freezes + busy_s == 0:
        _refuse(f"nothing to measure: ranks.max {job.ranks.max}, kills {kills}, freezes {freezes}, busy {busy_s:g} s")
    shown = str(spec.resolve().relative_to(_ROOT)) if spec.resolve().is_relative_to(_ROOT) else str(spec)
    report = Report(host.value, shown, secrets.randbelow(1 << 16) if seed is None else seed, job.ranks.max)
    report.load.append(os.getloadavg()[0])
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as folder:
        deadline = time.monotonic() + limit_s
        run = LiveRun(spec, [*changes, f"faults={json.dumps(faults)}"], host.value, Path(folder))
        try:
            measure(report, run, job, {"kill": kills, "freeze": freezes}, busy_s, deadline)
        except (BenchmarkFailed, OSError) as error:  # OSError: it cannot be reached, or a rank left by itself
            report.failed.append(str(error))
        finally:
            run.close()
        if peer:
            theirs = Path(folder) / "peer"
            theirs.mkdir()
            try:
                report.peer = measure_peer(spec, [*changes, "faults=[]"], job.ranks.max, report.seed, theirs)
            except BenchmarkFailed as error:
                report.failed.append(str(error))
        report.left = left_of(Path(folder))
    report.load.append(os.getloadavg()[0])
    ours = summary(report).get("kill")
    if report.peer is not None and ours is not None:
        report.peer["ratio"] = report.peer["resumed_s"] / ours["resumed_median_s"]
    if json_:
        print(json.dumps({**asdict(report), "summary": summary(report)}))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 160))
    raise typer.Exit(1 if report.failed or report.left else 0)


def _refuse(message: str) -> NoReturn:
    print(f"recovery.py: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()

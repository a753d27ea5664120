"""How long a run stands still when a rank is killed, frozen or busy; beside it Ray Train, torchrun and torchft.

A job runs as `everstep run` in a process of its own. From outside, at a random moment of a step, a rank gets a
real SIGKILL or SIGSTOP; what counts is the time from the signal to the first step that the next view commits,
seen in the run's metrics.jsonl (read every 2 ms). The peers train the same model on the same data with DDP over
gloo and get the same signals; those that restart from storage write a torch.save checkpoint after every step.
Peers that are not installed are named. Times depend on the machine and are never asserted.
"""

import itertools
import json
import os
import random
import secrets
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
from parts.strikes import SIGNALS, Side, Strike, measure_peer
from peers.restarted import missing_for_ray_train, ray_train, torchrun
from peers.torchft_replicas import missing_torchft, torchft
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
_TARGET_RATIO = 15.0  # Ray Train v2's stand-still over ours
_TARGET_FROZEN_S = 3.0
_TARGET_STEPS_LOST = 1


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class HostKind(StrEnum):
    """What rank processes are started with."""

    ray = "ray"
    processes = "processes"


@dataclass
class Report:
    """What was measured. Times in seconds. The first side is the one that the others are compared with."""

    spec: str
    seed: int
    ranks: int
    peer_wait_s: float
    cores: int = os.cpu_count() or 1
    load: list[float] = field(default_factory=list)  # one-minute load averages: start, end
    sides: list[Side] = field(default_factory=list)
    busy: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # what could not be measured of everstep, and why


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
    report: Report, side: Side, run: LiveRun, spec: JobSpec, counts: dict[str, int], busy_s: float, deadline: float
) -> None:
    chance = random.Random(report.seed)
    run.connect()
    if busy_s > 0:
        report.busy[side.name] = busy(run, busy_s)
    ordinary: list[float] = []
    # Kills and freezes take turns, so that a noisy minute on the machine does not fall on one of them alone.
    rounds = [case for i in range(max(counts.values())) for case in counts if i < counts[case]]
    side.cases = {case: [] for case in counts}
    for case in rounds:
        if time.monotonic() > deadline:
            side.missing = "--limit-s was reached: fewer repetitions than asked for"
            break
        status, steps = settle(run, spec.ranks.max, spec.ranks.spares)
        ordinary += steps
        side.ordinary_step_s = statistics.median(ordinary)
        side.cases[case].append(strike(run, status, SIGNALS[case], side.ordinary_step_s, chance))


# ---- the peers ------------------------------------------------------------------------------------------


def measure_peers(report: Report, order: "PeerOrder", folder: Path) -> None:
    """Every peer that is installed, one after the other, with the same model and signals."""
    peers: list[tuple[str, str, str, Any]] = [
        ("Ray Train v2", "TorchTrainer, DDP over gloo, all ranks restarted", missing_for_ray_train(), ray_train),
        ("torchrun", "DDP over gloo, all ranks restarted", "", torchrun),
        (
            "torchft",
            "its gloo, a replica a rank, the survivors go on",
            missing_torchft(),
            torchft,
        ),
    ]
    for number, (name, what, missing, start) in enumerate(peers):
        side = Side(name, what, missing=missing)
        report.sides.append(side)
        if missing:
            continue
        theirs = folder / f"peer-{number}"
        theirs.mkdir()
        try:
            with start(order.spec, order.changes, order.ranks, theirs) as peer:
                measure_peer(
                    side, peer, order.ranks, order.counts, report.seed, START_LIMIT_S, order.wait_s, order.limit_s
                )
        except (BenchmarkFailed, OSError) as error:
            side.missing = str(error)
        report.left += left_of(theirs)


@dataclass(frozen=True)
class PeerOrder:
    """What peers are asked for; `wait_s`: for a recovery."""

    spec: Path
    changes: tuple[str, ...]
    ranks: int
    counts: dict[str, int]
    wait_s: float
    limit_s: float


# ---- the report -----------------------------------------------------------------------------------------


def summary(report: Report) -> list[dict[str, Any]]:
    """A row for each system and case; ratio: how many times as long as everstep's first host it stands still."""
    rows: list[dict[str, Any]] = []
    ours: dict[str, float] = {}
    for side in report.sides:
        for case, strikes in side.cases.items():
            resumed = [strike.resumed_s for strike in strikes if strike.resumed_s is not None]
            if not strikes:
                continue
            lost = [strike.steps_lost for strike in strikes if strike.steps_lost is not None]
            detected = [strike.detected_s for strike in strikes if strike.detected_s is not None]
            median = statistics.median(resumed) if resumed else None
            row: dict[str, Any] = {
                "system": side.name,
                "case": case,
                "repetitions": len(strikes),
                "never": len(strikes) - len(resumed),
                "detected_median_s": statistics.median(detected) if detected else None,
                "resumed_median_s": median,
                "resumed_worst_s": max(resumed, default=None),
                "steps_lost_worst": max(lost, default=None),
                "ordinary_step_s": side.ordinary_step_s,
            }
            if side.name.startswith("everstep") and median is not None:
                ours.setdefault(case, median)
            row["ratio"] = median / ours[case] if median is not None and case in ours else None
            rows.append(row)
    return rows


def show(report: Report, console: Console) -> None:
    console.print(
        f"{report.spec}: {report.ranks} ranks, {report.cores} cores, load "
        f"{' to '.join(f'{load:.1f}' for load in report.load)}, seed {report.seed}"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("system", "signal to next step", "n", "median", "worst", "steps lost", "step", "x everstep"):
        table.add_column(column, justify="left" if column in ("system", "signal to next step") else "right")
    for row in summary(report):
        never = f"> {report.peer_wait_s:g} s" if row["never"] else None
        table.add_row(
            row["system"], SIGNALS[row["case"]].name, str(row["repetitions"]),
            _seconds(row["resumed_median_s"]) or never or "-", never or _seconds(row["resumed_worst_s"]) or "-",
            "-" if row["steps_lost_worst"] is None else str(row["steps_lost_worst"]),
            f"{row['ordinary_step_s'] * 1000:.0f} ms",
            f"{row['ratio']:.1f}" if row["ratio"] is not None else "-",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"aims: SIGKILL at least {_TARGET_RATIO:g} x faster than Ray Train v2 and faster than the others; "
        f"SIGSTOP at most {_TARGET_FROZEN_S:g} s; at most {_TARGET_STEPS_LOST} step lost"
    )
    for side in report.sides:
        if side.missing:
            console.print(f"{side.name}: {side.missing}", markup=False)
    for host, found in report.busy.items():
        verdict = "pass: not killed" if found["ok"] else f"FAIL: {found['problem']}"
        console.print(
            f"{host}: busy for {found['seconds']:g} s (holds the interpreter lock): "
            f"longest step {found['longest_step_s']:.1f} s; {verdict}"
        )
    for note in report.failed:
        console.print(f"note: {note}", markup=False)
    console.print(f"processes left: {', '.join(map(str, report.left)) or 'none'}")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


@app.command()
def main(
    spec: Annotated[Path, typer.Argument(metavar="[SPEC]", help="The job.")] = _ROOT / "examples" / "gpt.yaml",
    host: Annotated[
        list[HostKind] | None,
        typer.Option(help="Start ranks as Ray actors or local processes; both if left out, Ray first."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=VALUE", help="Change a field of the job, as `run` does.")
    ] = None,
    kills: Annotated[int, typer.Option(min=0, help="How often a rank gets SIGKILL.")] = 5,
    freezes: Annotated[int, typer.Option(min=0, help="How often a rank gets SIGSTOP.")] = 5,
    busy_s: Annotated[float, typer.Option(min=0, help="How long one rank holds the interpreter lock; 0: not.")] = 5.0,
    peer: Annotated[bool, typer.Option(help="Measure Ray Train v2, torchrun and torchft too.")] = True,
    peer_kills: Annotated[int, typer.Option(min=1, help="How often a peer's rank gets SIGKILL.")] = 3,
    peer_freezes: Annotated[int, typer.Option(min=0, help="How often a peer's rank gets SIGSTOP.")] = 1,
    peer_wait_s: Annotated[float, typer.Option(help="How long a peer's recovery is waited for.")] = 40.0,
    limit_s: Annotated[float, typer.Option(help="No new repetition of a system begins after this.")] = 140.0,
    seed: Annotated[int | None, typer.Option(help="Of ranks and moments; random and printed if left out.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure recovery: SIGKILL, SIGSTOP and a busy interpreter, beside the peers. About ten minutes by default.

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
    report = Report(shown, secrets.randbelow(1 << 16) if seed is None else seed, job.ranks.max, peer_wait_s)
    report.load.append(os.getloadavg()[0])
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as folder:
        for kind in dict.fromkeys(host or [HostKind.ray, HostKind.processes]):
            ours = Path(folder) / kind.value
            ours.mkdir()
            side = Side(f"everstep, {kind.value}", f"host {kind.value}")
            report.sides.append(side)
            deadline = time.monotonic() + limit_s
            run = LiveRun(spec, [*changes, f"faults={json.dumps(faults)}"], kind.value, ours)
            try:
                measure(report, side, run, job, {"kill": kills, "freeze": freezes}, busy_s, deadline)
            except (BenchmarkFailed, OSError) as error:  # OSError: it cannot be reached, or a rank left by itself
                report.failed.append(f"{side.name}: {error}")
            finally:
                run.close()
            report.left += left_of(ours)
        if peer:
            theirs = (*changes, "faults=[]")
            counts = {"kill": peer_kills, "freeze": peer_freezes}
            measure_peers(report, PeerOrder(spec, theirs, job.ranks.max, counts, peer_wait_s, limit_s), Path(folder))
    report.load.append(os.getloadavg()[0])
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

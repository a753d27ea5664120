"""A long run under random faults: kills, freezes, lost domains, scales; what it costs, and whether the bits hold.

The number of steps is fixed before the run, from a measured undisturbed step, so that the run lasts as long as asked
for and an undisturbed run of as many steps can be compared with it: the same state_sha256, and the wall time. Times
between faults are exponential; the seed is printed. Exit code 1 if the bits differ, the run failed or something is
left; figures beyond a target are shown and are not errors, for times depend on the machine.
"""

import json
import os
import secrets
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from parts.live_run import START_LIMIT_S, BenchmarkFailed, LiveRun, left_of
from parts.soak_faults import Striker, memory_left, ports_of
from parts.soak_plan import TARGET_GOODPUT, TARGET_WALL, Soak, blows, steps_for, summary
from rich import box
from rich.console import Console
from rich.table import Table

from everstep.platform.job.errors import SpecError
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec

_ROOT = Path(__file__).resolve().parent.parent
_LOOK_S = 0.2
_TAIL_S = 0.1
_TOLD_EVERY_S = 10.0  # where the progress line cannot be overwritten
_PATIENCE = 5.0  # times the planned time: a run that has not ended by then never will
_SETTLED_STEPS = 5  # the first steps of a process are slower

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class HostKind(StrEnum):
    """What rank processes are started with."""

    ray = "ray"
    processes = "processes"


@dataclass(frozen=True)
class Order:
    """What was asked for. `changes`: of the job, as `--set` has them; the steps come in addition."""

    spec: Path
    changes: tuple[str, ...]
    host: str
    minutes: float
    mtbf_s: float
    seed: int
    kinds: tuple[str, ...]
    calibrate_s: float
    address: str | None = None


class Progress:
    """One line that is overwritten on a terminal, and comes every ten seconds elsewhere; on stderr."""

    def __init__(self) -> None:
        self._told = 0.0

    def tell(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{text}")
        elif time.monotonic() - self._told >= _TOLD_EVERY_S:
            self._told = time.monotonic()
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")


def _job(order: Order) -> str:
    return JobSpec.load(order.spec, list(order.changes)).name


def _run(order: Order, steps: int, folder: Path, checkpoints: str) -> LiveRun:
    """Each run has a folder of its own, so that none resumes from another's checkpoints."""
    (folder / checkpoints).mkdir()
    where = json.dumps({"to": str(folder / checkpoints), "every": max(50, steps // 20), "keep": 2})
    changes = [*order.changes, f"steps={steps}", f"checkpoint={where}"]
    return LiveRun(order.spec, changes, order.host, folder, tail_s=_TAIL_S, address=order.address)


def calibrate(order: Order, folder: Path, progress: Progress) -> float:
    """Seconds of an undisturbed step, over a run of `calibrate_s`."""
    run = _run(order, 1_000_000, folder, "calibration")
    try:
        run.connect()
        ranks = JobSpec.load(order.spec, list(order.changes)).ranks
        run.wait(lambda: run.status().ranks == ranks.max, START_LIMIT_S, f"{ranks.max} ranks", every_s=0.2)
        first, until = len(run.tail.lines) + _SETTLED_STEPS, time.monotonic() + order.calibrate_s

        def measured() -> bool:
            progress.tell(f"calibrating: {len(run.tail.lines)} steps")
            return time.monotonic() > until and len(run.tail.lines) > first + _SETTLED_STEPS

        run.wait(measured, order.calibrate_s + START_LIMIT_S, "undisturbed steps", every_s=_LOOK_S)
        lines = run.tail.lines[first:]
        # From the first to the last, not a median: what comes rarely (a checkpoint) is part of a step's price.
        return (lines[-1].at_s - lines[0].at_s) / (lines[-1].step - lines[0].step)
    finally:
        run.close()


def undisturbed(order: Order, steps: int, folder: Path, progress: Progress) -> RunResult:
    run = _run(order, steps, folder, "undisturbed")
    try:
        limit_s = time.monotonic() + START_LIMIT_S + order.minutes * 60 * _PATIENCE
        while not run.over():
            if time.monotonic() > limit_s:
                raise BenchmarkFailed("the undisturbed run does not end")
            progress.tell(f"undisturbed: step {run.tail.lines[-1].step if run.tail.lines else 0} of {steps}")
            time.sleep(_LOOK_S)
        return run.result()
    finally:
        run.close()


def soak_run(order: Order, soak: Soak, folder: Path, progress: Progress) -> None:
    """The run under faults."""
    run = _run(order, soak.steps, folder, "soak")
    spec = JobSpec.load(order.spec, list(order.changes))
    striker = Striker(run, spec.name, (spec.ranks.min, spec.ranks.max))
    planned = blows(order.seed, order.mtbf_s, order.kinds)
    log = (folder / "faults.log").open("a")
    try:
        run.connect()
        run.wait(lambda: bool(run.tail.lines), START_LIMIT_S, "the first step", every_s=_LOOK_S)
        began = time.monotonic()
        blow = next(planned)
        due = began + blow.wait_s
        limit_s = began + order.minutes * 60 * _PATIENCE + START_LIMIT_S
        while not run.over():
            now = time.monotonic()
            if now > limit_s:
                raise BenchmarkFailed(f"the run does not end: {run.status()}")
            if now >= due:
                done = _strike(striker, blow, run)
                if done:
                    soak.faults.append(blow.kind)
                    log.write(f"{time.time():.3f} {done}\n")
                    log.flush()
                blow = next(planned)
                due = time.monotonic() + blow.wait_s
            step = run.tail.lines[-1].step
            progress.tell(
                f"{now - began:.0f} s, step {step} of {soak.steps}, {run.tail.lines[-1].ranks} ranks, "
                f"{len(soak.faults)} faults, last: {soak.faults[-1] if soak.faults else 'none'}"
            )
            time.sleep(min(_LOOK_S, max(0.0, due - time.monotonic())))
        soak.result = run.result()
    finally:
        log.close()
        run.close()


def _strike(striker: Striker, blow: object, run: LiveRun) -> str:
    try:
        return striker.strike(blow)  # type: ignore[arg-type]
    except ConnectionError:
        if run.over():
            return ""  # it ended between the look and the blow
        raise


def show(soak: Soak, console: Console) -> None:
    found = summary(soak)
    faults = ", ".join(f"{count} {kind}" for kind, count in found["faults"].items()) or "none"
    console.print(
        f"host {soak.host}, seed {soak.seed}, {os.cpu_count()} cores: {soak.steps} steps, undisturbed "
        f"{soak.step_s * 1000:.0f} ms each; {len(soak.faults)} faults: {faults}"
    )
    if soak.result is not None:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("seconds", "productive", "startup", "snapshot", "recovery", "lost work", "waiting", "wall"):
            table.add_column(column, justify="left" if column == "seconds" else "right")
        for name, result in (("under faults", soak.result), ("undisturbed", soak.undisturbed)):
            if result is None:
                continue
            parts = result.goodput
            row = (
                parts.productive_s, parts.startup_s, parts.snapshot_s, parts.recovery_s, parts.lost_work_s,
                parts.waiting_s, result.wall_s,
            )  # fmt: skip
            table.add_row(name, *(f"{seconds:.1f}" for seconds in row))
        console.print(table)
        checks = found["checks"]
        ratio = found["wall_ratio"]
        how = "measured" if soak.undisturbed is not None else "extrapolated from the calibration"
        console.print(
            f"goodput {found['goodput']:.1%} ({_verdict(checks['goodput'])}: at least {TARGET_GOODPUT:.0%}); "
            f"wall {ratio:.3f} x undisturbed ({_verdict(checks['wall'])}: at most {TARGET_WALL:g}; {how})"
        )
        worst = found["resume_worst_s"]
        console.print(
            f"{found['recoveries']} recoveries"
            + (f" (median {found['resume_median_s']:.2f} s, worst {worst:.2f} s)" if worst is not None else "")
            + f", {found['rescales']} rescales, {found['steps_lost']} steps lost, {found['steps_lost_worst']} at most"
        )
        same = {True: "the same bits as undisturbed", False: "OTHER BITS than undisturbed", None: "not compared"}
        console.print(f"end state {soak.result.state_sha256[:16]}: {same[found['same_bits']]}")
        if soak.result.error is not None:
            console.print(f"the run failed: {soak.result.error.message}", markup=False)
    for failure in soak.failed:
        console.print(f"note: {failure}", markup=False)
    left = [*map(str, soak.left), *soak.memory, *(f"port {port}" for port in soak.ports)]
    console.print(f"left behind: {', '.join(left) or 'nothing'}")


def _verdict(ok: bool) -> str:
    return "pass" if ok else "FAIL"


def _reference(text: str, order: Order, soak: Soak, folder: Path, progress: Progress) -> None:
    """Fills in what the soak is compared with, and how many steps it has."""
    file = Path(text) if text not in ("full", "none") else None
    if file is not None and file.exists():
        kept = json.loads(file.read_text())
        if kept["changes"] != list(order.changes) or kept["host"] != order.host:
            raise BenchmarkFailed(f"{file} is of another job or host: {kept['host']}, {kept['changes']}")
        soak.undisturbed = RunResult.from_json(json.dumps(kept["result"]))
        soak.steps, soak.step_s = soak.undisturbed.steps, kept["step_s"]
    else:
        soak.step_s = calibrate(order, folder, progress)
        soak.steps = steps_for(order.minutes, soak.step_s)
        soak.undisturbed_wall_s = soak.steps * soak.step_s
        if text == "none":
            return
        soak.undisturbed = undisturbed(order, soak.steps, folder, progress)
        if file is not None:
            kept = {"changes": list(order.changes), "host": order.host, "step_s": soak.step_s}
            file.write_text(json.dumps({**kept, "result": soak.undisturbed.to_dict()}))
    soak.undisturbed_wall_s = soak.undisturbed.wall_s
    if not soak.undisturbed.ok:
        raise BenchmarkFailed(f"the undisturbed run failed: {soak.undisturbed.error}")


@app.command()
def main(
    spec: Annotated[Path, typer.Argument(metavar="[SPEC]", help="The job.")] = _ROOT / "examples" / "gpt.yaml",
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the run would last undisturbed.")] = 30.0,
    mtbf: Annotated[float, typer.Option(min=0.5, help="Mean seconds between two faults.")] = 20.0,
    seed: Annotated[int | None, typer.Option(help="Of the faults; random and printed if left out.")] = None,
    host: Annotated[HostKind, typer.Option(help="Start ranks as Ray actors or local processes.")] = HostKind.ray,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=VALUE", help="Change a field of the job, as `run` does.")
    ] = None,
    also: Annotated[list[str] | None, typer.Option(help="A further kind of fault: supervisor (Ray only).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="These kinds of faults instead of all.")] = None,
    reference: Annotated[
        str,
        typer.Option(
            help="full: an undisturbed run of as many steps first. none: extrapolate; bits are not compared. "
            "FILE: kept there, and used again."
        ),
    ] = "full",
    calibrate_s: Annotated[float, typer.Option(min=5, help="How long undisturbed steps are measured.")] = 60.0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Soak a run in random faults and compare it with an undisturbed one. An hour by default: half of it each.

    \b
    python benchmarks/soak.py --host processes --minutes 5
    python benchmarks/soak.py --minutes 30 --mtbf 20 --seed 7 --reference undisturbed.json --json
    """
    kinds = tuple(dict.fromkeys([*(only or ("kill", "freeze", "manager", "lose", "scale", "drain")), *(also or ())]))
    chosen = secrets.randbelow(1 << 16) if seed is None else seed
    if host is HostKind.processes and "supervisor" in kinds:
        _refuse("with --host processes the supervisor lives in the process that is measured")
    # A limit on losses is for real machines; here losing is the point.
    fixed = ["faults=[]", "limits.infrastructure=-1", *(set_ or [])]
    try:
        next(blows(chosen, mtbf, kinds))
        name = JobSpec.load(spec, fixed).name
    except (SpecError, ValueError) as error:
        _refuse(str(error))
    # A name of its own, by which its shared memory is known from other runs'.
    changes = (*fixed, f"name={name}-soak")
    order = Order(spec, changes, host.value, minutes, mtbf, chosen, kinds, calibrate_s)
    soak, progress = Soak(host.value, chosen, 0, 0.0), Progress()
    print(f"seed {chosen}", file=sys.stderr)
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="everstep-soak-")))
        try:
            _reference(reference, order, soak, folder, progress)
            soak_run(order, soak, folder, progress)
        except BenchmarkFailed as error:
            soak.failed.append(str(error))
        except KeyboardInterrupt:
            interrupted = True
            soak.failed.append("interrupted")
        progress.end()
        soak.left = left_of(folder)
        soak.ports = ports_of(soak.left)
        soak.memory = memory_left(_job(order))
    if json_:
        print(json.dumps(summary(soak)))
    else:
        show(soak, Console(width=None if sys.stdout.isatty() else 160))
    if interrupted:
        raise typer.Exit(130)
    found = summary(soak)
    broken = soak.failed or soak.left or soak.memory or not found["checks"]["complete"] or found["same_bits"] is False
    raise typer.Exit(1 if broken else 0)


def _refuse(message: str) -> NoReturn:
    print(f"soak.py: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()

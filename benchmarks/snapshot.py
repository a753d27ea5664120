"""What snapshots cost on the CPU; beside them torch.distributed.checkpoint.async_save, and a plain copy as the unit.

Worst case first, without processes: a capture that is waited for at once. Then real runs (`everstep run`, two rank
processes, parity 1) of one job without snapshots, with one every step, and with `every: auto`, each for --seconds
after it has settled; without once more at the end, so that a machine that drifts shows. The peer saves as many bytes
a rank from a plain loop with the same layers. Times depend on the machine and are never asserted.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from parts.capture_wait import CaptureWait, measure_capture
from parts.live_run import BenchmarkFailed, LiveRun, left_of
from peers.dcp_async import Shape, measure_dcp
from rich import box
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parent
_BYTES_A_PARAMETER = 12  # float32 master, exp_avg, exp_avg_sq
# Of a rank's state, estimated from a run that was too large: itself, two slots, parity, parameters, gradients.
_COPIES = 12
_WARM_UP_STEPS = 4
_NEVER = 1_000_000
_TARGET_STALL = 1.3  # plain copies
_TARGET_SLOWER = 0.05

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Mode:
    """One run, from when it had settled. `stall_s`: a snapshot; of the slowest rank."""

    name: str
    steps: int
    mean_step_s: float
    median_step_s: float
    stall_s: float | None
    interval: int  # 0: none
    settled_after_s: float
    said: str  # the run's own words on its interval


@dataclass
class Report:
    """Times in seconds. `load`: one-minute averages at the start, after each part, at the end."""

    ranks: int
    state_bytes: int  # of a rank
    parameters: int
    share: float
    cores: int = os.cpu_count() or 1
    load: list[float] = field(default_factory=list)
    capture: CaptureWait | None = None
    modes: list[Mode] = field(default_factory=list)
    peer: dict[str, Any] | None = None
    failed: list[str] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


def job_of(report: Report, args: dict[str, int], every: int | str, batch: int, lanes: int) -> dict[str, Any]:
    return {
        "name": "snapshot-bench",
        "task": f"{_ROOT / 'parts' / 'big_mlp.py'}:BigMlp",
        "args": args,
        "steps": _NEVER,
        "lanes": lanes,
        "lane_batch": batch,
        "ranks": {"min": report.ranks, "max": report.ranks, "spares": 0},
        "layout": {"zero": 2},
        "resources": {"threads": 1},
        "snapshot": {"every": every, "share": report.share, "parity": min(1, report.ranks - 1)},
        "timeouts": {"frozen_s": 10, "stall_s": 120},
    }


def measure_mode(name: str, job: dict[str, Any], seconds: float, settle_s: float, folder: Path) -> Mode:
    """Lets the run settle (auto: until its choice has lasted for two snapshots, or `settle_s`), then watches it."""
    spec = folder / "job.yaml"
    spec.write_text(yaml.safe_dump(job))
    run = LiveRun(spec, [], "processes", folder)
    try:
        run.connect()
        began = time.monotonic()
        tail = run.tail
        run.wait(lambda: len(tail.lines) > _WARM_UP_STEPS, 240, "the first steps", every_s=0.1)

        def chosen() -> tuple[int, str]:
            told = [event for event in run.events(0) if event.kind == "snapshots"]
            return (int(told[-1].data["interval"]), told[-1].text) if told else (1, "")

        interval, said = 0, ""
        if job["snapshot"]["every"] == "auto":
            told_at, (interval, said) = len(tail.lines), chosen()
            while time.monotonic() < began + settle_s:
                if (now := chosen()) != (interval, said):
                    told_at, (interval, said) = len(tail.lines), now
                if said and len(tail.lines) > told_at + 4 * interval:
                    break
                seen = len(tail.lines)
                run.wait(lambda seen=seen: len(tail.lines) > seen, 120, "a step")  # type: ignore[misc]
        settled_s = time.monotonic() - began
        first = len(tail.lines)
        ends = time.monotonic() + seconds
        run.wait(lambda: time.monotonic() > ends and len(tail.lines) > first + 1, seconds + 240, "a minute", 0.05)
        last = len(tail.lines)
        if interval:
            interval, said = chosen()
    finally:
        run.close()
    (metrics,) = folder.glob("runs/*/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][first:last]
    every = interval or job["snapshot"]["every"]
    spent = [line["step_s"] for line in lines]
    count = len(lines) / every
    stall = sum(line["snapshot_s"] for line in lines) / count if every != _NEVER else None
    return Mode(
        name, len(lines), statistics.mean(spent), statistics.median(spent), stall, 0 if every == _NEVER else every,
        settled_s, said,
    )  # fmt: skip


def slower(report: Report, mode: Mode) -> float:
    """Against the mean of the runs without."""
    plain = statistics.mean(m.mean_step_s for m in report.modes if not m.interval)
    return mode.mean_step_s / plain - 1


def show(report: Report, console: Console) -> None:
    console.print(
        f"{report.ranks} ranks, {report.state_bytes / 2**30:.2f} GiB of state a rank ({report.parameters / 1e6:.0f} "
        f"million parameters, AdamW, ZeRO 2), parity {min(1, report.ranks - 1)}, {report.cores} cores, one thread a "
        f"rank, load {', '.join(f'{load:.1f}' for load in report.load)}"
    )
    if (capture := report.capture) is not None:
        verdict = "pass" if capture.ratio <= _TARGET_STALL else "FAIL"
        console.print(
            f"worst case, apply at once: waited {_ms(capture.wait_s)}, plain copy {_ms(capture.copy_s)}, "
            f"into the segment {_ms(capture.segment_copy_s)}, sealed after {_ms(capture.sealed_s)}; ratio to the "
            f"plain copy {capture.ratio:.2f} (median of {capture.repetitions}, {min(capture.ratios):.2f} to "
            f"{max(capture.ratios):.2f}); {verdict}: at most {_TARGET_STALL:g}"
        )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("run", "steps", "mean step", "median step", "against none", "stall a snapshot", "plain copies"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for mode in report.modes:
        stall = mode.stall_s
        table.add_row(
            mode.name, str(mode.steps), _ms(mode.mean_step_s), _ms(mode.median_step_s),
            f"{100 * slower(report, mode):+.1f} %" if mode.interval else "", _ms(stall) if stall is not None else "",
            f"{stall / capture.copy_s:.2f}" if stall is not None and capture else "",
        )  # fmt: skip
    if (peer := report.peer) is not None:
        table.add_row(
            f"DCP async_save every {peer['every']} ({peer['saves']} saves)", "", _ms(peer["mean_step_s"]),
            _ms(peer["quiet_step_s"]), f"{100 * (peer['mean_step_s'] / peer['quiet_step_s'] - 1):+.1f} %",
            _ms(peer["blocking_s"]), f"{peer['blocking_s'] / capture.copy_s:.2f}" if capture else "",
        )  # fmt: skip
    console.print(table)
    for mode in report.modes:
        if mode.said:
            console.print(f"auto, after {mode.settled_after_s:.0f} s: {mode.said}")
            verdict = "pass" if slower(report, mode) <= _TARGET_SLOWER else "FAIL"
            console.print(f"{verdict}: at that interval at most {100 * _TARGET_SLOWER:g} % slower")
    if peer is not None:
        beside = peer["beside_step_s"]
        console.print(
            f"DCP: a save takes {_ms(peer['save_s'])}; steps beside it {_ms(beside) if beside else 'none'}, others "
            f"{_ms(peer['quiet_step_s'])}"
            + (f" ({100 * (beside / peer['quiet_step_s'] - 1):+.0f} %)" if beside else "")
        )
        stalls = [mode.stall_s for mode in report.modes if mode.stall_s is not None]
        if stalls:
            console.print(
                f"ratio: DCP blocks {peer['blocking_s'] / min(stalls):.1f} times as long as a snapshot stalls"
            )
    for line in report.failed:
        console.print(f"not measured: {line}", markup=False)
    console.print(f"processes left: {', '.join(map(str, report.left)) or 'none'}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


@app.command()
def main(
    ranks: Annotated[int, typer.Option(min=1, help="Rank processes; with two or more they keep parity.")] = 2,
    state_gib: Annotated[float, typer.Option(min=0.001, help="Training state of a rank, GiB.")] = 1.0,
    width: Annotated[int, typer.Option(min=16, help="Of the layers; their number follows from the state.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Samples a lane; makes the step longer.")] = 128,
    lanes: Annotated[int, typer.Option(min=1, help="Lanes, as many on each rank.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="How long each run is watched.")] = 60.0,
    settle_s: Annotated[float, typer.Option(min=0, help="How long auto may take to settle.")] = 240.0,
    share: Annotated[float, typer.Option(help="snapshot.share of the run with auto.")] = 0.01,
    repetitions: Annotated[int, typer.Option(min=1, help="Of the capture that is waited for.")] = 7,
    runs: Annotated[bool, typer.Option(help="Real runs, too.")] = True,
    peer: Annotated[bool, typer.Option(help="torch.distributed.checkpoint.async_save, too.")] = True,
    peer_every: Annotated[int, typer.Option(min=1, help="Steps between the peer's saves.")] = 8,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure snapshots: stall, slower steps, the interval of auto; beside DCP. About 8 minutes by default.

    \b
    python benchmarks/snapshot.py
    python benchmarks/snapshot.py --no-runs --no-peer            # the worst case only, seconds
    python benchmarks/snapshot.py --ranks 1                      # 12 GiB of memory instead of 24
    python benchmarks/snapshot.py --state-gib 0.1 --width 1024 --seconds 10 --json
    """
    layers = max(1, round(ranks * state_gib * 2**30 / _BYTES_A_PARAMETER / width**2))
    parameters = layers * width**2
    report = Report(ranks, parameters * _BYTES_A_PARAMETER // ranks, parameters, share, load=[os.getloadavg()[0]])
    needed = ranks * _COPIES * report.state_bytes
    free = _available()
    if runs and free < needed:
        _refuse(
            f"{needed / 2**30:.0f} GiB of memory are needed, {free / 2**30:.0f} are free: use a smaller --state-gib"
        )
    report.capture = measure_capture(report.state_bytes, repetitions)
    report.load.append(os.getloadavg()[0])
    args = {"layers": layers, "width": width}
    wanted = {"none": _NEVER, "every step": 1, "auto": "auto", "none again": _NEVER} if runs else {}
    for name, every in wanted.items():
        with tempfile.TemporaryDirectory(prefix="everstep-bench-") as made:
            folder = Path(made)
            try:
                job = job_of(report, args, every, batch, lanes)
                report.modes.append(measure_mode(name, job, seconds, settle_s, folder))
            except (BenchmarkFailed, OSError) as error:
                report.failed.append(f"{name}: {error}")
            report.left += left_of(folder)
        report.load.append(os.getloadavg()[0])
    if peer:
        folder = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir="/dev/shm"))
        try:
            shape = Shape(layers, width, batch, max(1, lanes // ranks), report.state_bytes)
            report.peer = measure_dcp(ranks, shape, peer_every, seconds, folder)
        except RuntimeError as error:
            report.failed.append(f"DCP: {error}")
        finally:
            shutil.rmtree(folder)
        report.load.append(os.getloadavg()[0])
    if json_:
        plain = {**asdict(report), "slower": {m.name: slower(report, m) for m in report.modes if m.interval}}
        plain["stall_ratio"] = report.capture.ratio
        print(json.dumps(plain))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 150))
    raise typer.Exit(1 if report.failed or report.left else 0)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _refuse(message: str) -> NoReturn:
    print(f"snapshot.py: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()

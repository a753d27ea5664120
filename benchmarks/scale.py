"""What 10,000 ranks cost the deciders: one run of 10,000, and 100 jobs of 100, in virtual time.

The deciders are everstep's own (membership, staffing, desk, ledger, stalls); the ranks, managers and machines around
them are simulated, and answer at random moments drawn from a seed. No peer: others' deciders cannot be run without
their processes. Times are CPU time of single decisions, which never wait; they are printed, never asserted.
"""

import gc
import json
import os
import resource
import sys
import time
from typing import Annotated, Any

import typer
from parts.scale_run import Allocator, Meter, Plan, Run, World
from rich import box
from rich.console import Console
from rich.table import Table

_FAULTS = ("kill", "freeze", "node", "drain", "take-over")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def simulate(
    jobs: int,
    ranks: int,
    steps: int,
    tensors: int,
    faults: dict[str, int],
    seed: int,
    allocator: Allocator | None = None,
) -> dict[str, Any]:
    """`jobs` runs of `ranks` each; what was measured. `faults` are for all jobs together.

    `allocator` gives jobs other numbers of ranks when one is enrolled or leaves; without one they keep theirs.
    """
    world, meter = World(seed), Meter()
    began = time.perf_counter()
    shares: list[dict[str, int]] = [{} for _ in range(jobs)]
    for kind, count in faults.items():
        for _ in range(count):
            job = world.rng.randrange(jobs)
            shares[job][kind] = shares[job].get(kind, 0) + 1
    runs = [Run(number, world, meter, Plan(ranks, steps, tensors, shares[number])) for number in range(jobs)]
    if allocator is not None:
        for run in runs:
            ask, now = allocator.enrolled, world.now
            grants = meter.time("allocator enrolled", lambda a=ask, r=run, t=now: a(r.number, r.least, ranks, t))
            for job, granted in grants.items():
                runs[job].retarget(granted)
    world.run(lambda: all(run.done for run in runs), 3600.0)
    times = meter.all()
    struck: dict[str, int] = {}
    for run in runs:
        for kind, count in run.seen.items():
            struck[kind] = struck.get(kind, 0) + count
    return {
        "jobs": jobs,
        "ranks": ranks,
        "virtual_s": world.now,
        "wall_s": time.perf_counter() - began,
        "happened": struck,
        "views": sum(run.state.number for run in runs),
        "view_bytes": max(run.view_bytes for run in runs),
        "decisions": len(times),
        "decisions_per_s": len(times) / sum(times),
        "p50_ms": _at(times, 0.5),
        "p99_ms": _at(times, 0.99),
        "max_ms": times[-1] * 1000,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "kinds": {
            kind: [len(found), _at(found, 0.5), _at(found, 0.99), found[-1] * 1000, sum(found)]
            for kind, found in sorted(((k, sorted(v)) for k, v in meter.seconds.items()), key=lambda i: -sum(i[1]))
        },
    }


def _at(times: list[float], share: float) -> float:
    """In ms."""
    return times[min(len(times) - 1, int(len(times) * share))] * 1000


def show(found: dict[str, Any], console: Console) -> None:
    jobs = "one run" if found["jobs"] == 1 else f"{found['jobs']} jobs"
    happened = ", ".join(f"{count} {kind}" for kind, count in found["happened"].items())
    console.print(
        f"{jobs} of {found['ranks']} ranks, {found['virtual_s']:.0f} virtual s: {happened}; "
        f"{found['views']} views, one of {found['view_bytes'] / 1e6:.1f} MB"
    )
    console.print(
        f"{found['decisions']} decisions, {found['decisions_per_s']:.0f} a second; p50 {found['p50_ms']:.3f} ms, "
        f"p99 {found['p99_ms']:.3f} ms, longest {found['max_ms']:.0f} ms; {found['resident_mib']:.0f} MiB with the "
        f"simulated ranks' own memory; {found['wall_s']:.0f} s"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("event", "n", "p50 ms", "p99 ms", "longest ms", "all s"):
        table.add_column(column, justify="left" if column == "event" else "right")
    for kind, (count, p50, p99, longest, total) in found["kinds"].items():
        table.add_row(kind, str(count), f"{p50:.3f}", f"{p99:.3f}", f"{longest:.1f}", f"{total:.2f}")
    console.print(table)


@app.command()
def main(
    ranks: Annotated[int, typer.Option(min=16, help="Of the one run.")] = 10_000,
    jobs: Annotated[int, typer.Option(min=0, help="Jobs beside each other, afterwards; 0: none.")] = 100,
    job_ranks: Annotated[int, typer.Option(min=16, help="Of each of them.")] = 100,
    steps: Annotated[int, typer.Option(min=4, help="Of every run.")] = 5,
    faults: Annotated[int, typer.Option(min=0, help="Of each kind, in all runs together.")] = 1,
    tensors: Annotated[int, typer.Option(min=1, help="Parameters of the model; each has three tensors.")] = 4,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 1,
    collect: Annotated[bool, typer.Option(help="Leave Python's collector of cycles on.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Drive the deciders of one large run and of many small ones, with deaths, drains and take-overs.

    \b
    python benchmarks/scale.py
    python benchmarks/scale.py --steps 50 --faults 10
    python benchmarks/scale.py --ranks 1000 --jobs 0 --json
    """
    if not collect:
        gc.disable()  # most of this process is the simulated world: walking it is not a decider's cost
    kinds = dict.fromkeys(_FAULTS, faults)
    measured = [simulate(1, ranks, steps, tensors, kinds, seed)]
    if jobs:
        measured.append(simulate(jobs, job_ranks, steps, tensors, dict.fromkeys(_FAULTS, 10 * faults), seed))
    if json_:
        print(json.dumps({"runs": measured, "load": os.getloadavg()[0], "cores": os.cpu_count()}))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for found in measured:
        show(found, console)


if __name__ == "__main__":
    app()

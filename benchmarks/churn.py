"""Groups under constant change: peers join, are killed and are frozen at random moments while all do transactions.

Two to ten processes on this host; every 0.5 to 2 s a fault, drawn from a seed that is printed. Each peer compares
every committed tensor with the exact sum over the view's members and every undone one with its input; at the end the
logs of all are compared with one another. Times depend on the machine and are never asserted; a broken promise is
exit code 1.
"""

import json
import os
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from parts.churn_log import rows, spread
from parts.churn_run import MAX_PEERS, MIN_PEERS, Churn, Outcome, Plan
from rich import box
from rich.console import Console
from rich.table import Table

_WHAT = {"kill": "SIGKILL", "stop": "SIGSTOP", "coordinator": "SIGKILL of the coordinator"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def summary(outcome: Outcome) -> dict[str, Any]:
    """For programs; times in seconds, as (median, worst) of the slowest survivor's."""
    found = outcome.findings
    return {
        "plan": asdict(outcome.plan),
        "peers": outcome.peers,
        "faults": dict(Counter(fault.kind for fault in outcome.faults)),
        "transactions_committed": found.commits,
        "operations_committed": found.operations,
        "undone_on_a_member": found.aborts,
        "admissions": found.admissions,
        "view_sizes": found.sizes,
        "fault_to_error_s": {kind: spread([w.lost_s for w in waits]) for kind, waits in rows(found.waits).items()},
        "fault_to_commit_s": {kind: spread([w.commit_s for w in waits]) for kind, waits in rows(found.waits).items()},
        "longest_between_commits_s": found.longest_s,
        "evicted": found.evicted,
        "fenced": found.fenced,
        "violations": outcome.violations,
    }


def show(outcome: Outcome, console: Console) -> None:
    plan, found, numbers = outcome.plan, outcome.findings, summary(outcome)
    faults = ", ".join(f"{count} {kind}" for kind, count in numbers["faults"].items())
    console.print(
        f"{plan.seconds:g} s, seed {plan.seed}: {outcome.peers} peers, {found.sizes[0]} to {found.sizes[1]} at "
        f"a time; faults: {faults or 'none'}"
    )
    console.print(
        f"{found.commits} transactions committed ({found.operations} all-reduces over all members), {found.aborts} "
        f"undone on a member, {found.admissions} admissions, {found.evicted} woke up to learn that they are out"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("fault to, slowest survivor", "n", "error: median", "worst", "next commit: median", "worst"):
        table.add_column(column, justify="left" if column.startswith("fault") else "right")
    for kind, waits in rows(found.waits).items():
        times = [spread([wait.lost_s for wait in waits]), spread([wait.commit_s for wait in waits])]
        cells = [text for pair in times for text in (map(_ms, pair) if pair else ("-", "-"))]
        table.add_row(_WHAT.get(kind, kind), str(len(waits)), *cells)
    console.print(table)
    console.print(f"longest time between two commits of one living peer: {found.longest_s:.2f} s")
    if found.fenced:
        console.print(f"alive, but too slow for a restarted coordinator, so evicted: {', '.join(found.fenced)}")
    console.print(f"violations: {len(outcome.violations) or 'none'}")
    for violation in outcome.violations:
        console.print(violation, markup=False, highlight=False)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


@app.command()
def main(
    minutes: Annotated[float, typer.Option(min=0, help="How long faults go on.")] = 10.0,
    seconds: Annotated[float | None, typer.Option(min=1, help="The same in seconds.", show_default=False)] = None,
    start: Annotated[int, typer.Option(min=MIN_PEERS, max=MAX_PEERS, help="Peers at the beginning.")] = 4,
    coordinator_kills: Annotated[int, typer.Option(min=0, help="How often the coordinator gets SIGKILL.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Of all faults; random and printed if left out.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Copy all logs there.", show_default=False)] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Kill, freeze and add peers at random for some minutes, and check every result. 10 minutes by default.

    \b
    python benchmarks/churn.py
    python benchmarks/churn.py --seconds 60 --coordinator-kills 5
    python benchmarks/churn.py --minutes 2 --seed 7 --keep /tmp/churn --json
    """
    plan = Plan(
        seconds if seconds is not None else minutes * 60,
        secrets.randbelow(1 << 16) if seed is None else seed,
        start,
        coordinator_kills,
    )
    _say(f"seed {plan.seed}, {plan.seconds:g} s")
    with tempfile.TemporaryDirectory(prefix="everstep-churn-") as folder:
        try:
            outcome = Churn(plan, Path(folder), _say).run()
        finally:
            if keep is not None:
                shutil.copytree(folder, keep, dirs_exist_ok=True)
    if json_:
        print(json.dumps({**summary(outcome), "load": os.getloadavg()[0], "cores": os.cpu_count()}))
    else:
        show(outcome, Console(width=None if sys.stdout.isatty() else 160))
    raise typer.Exit(1 if outcome.violations else 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()

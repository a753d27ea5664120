"""The `everstep` command: run jobs, and look at, steer and end those that run.

Thin: reads arguments, asks the registry and a run's client, prints. `run` is in `running.py`, the wording in
`display.py`. Never imports torch or ray at import time. Owns nothing; one thread.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.table import Table

from everstep import display as displays
from everstep import doctor as doctors
from everstep.checkpoint_cli import app as checkpoint_app
from everstep.cluster_jobs import cluster_jobs
from everstep.command import AsJson, JobName, connect_to, fail, find_run, print_table
from everstep.platform.job.registry import Registry, RunEntry
from everstep.platform.job.result import Finding
from everstep.platform.job.status import Status
from everstep.running import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, RunRequest, run_job

app = typer.Typer(
    help="Trains sharded PyTorch models on Ray; no failure stops a run, and no failure changes its result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(checkpoint_app, name="checkpoint")
_FOLLOW_S = 0.3


class HostKind(StrEnum):
    """What rank processes are started with."""

    ray = "ray"
    processes = "processes"


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The job file (YAML).", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=VALUE", help="Change a field; VALUE is YAML. May be repeated."),
    ] = None,
    host: Annotated[HostKind, typer.Option(help="Start ranks as Ray actors or as local processes.")] = HostKind.ray,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Ray cluster; else $RAY_ADDRESS, else an embedded local Ray."),
    ] = None,
    result: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the RunResult there, as JSON.")] = None,
    json_: AsJson = False,
) -> None:
    """Run a job to its end.

    Exits 0 only if all steps were done; 1 if the run failed, 2 if the job was refused before it started, 130
    if it was stopped. Ctrl-C stops after the step in flight, with a checkpoint; a second one ends at once.

    \b
    everstep run examples/gpt.yaml
    everstep run job.yaml --set steps=50 --set faults=[] --set checkpoint=null
    everstep run job.yaml --set ranks.max=2 --host processes --result result.json
    """
    if host is HostKind.processes and address:
        fail("--address is for --host ray; local processes have no address: leave it out", EXIT_REFUSED)
    if host is HostKind.ray:
        address = address or os.environ.get("RAY_ADDRESS") or None
    request = RunRequest(spec, tuple(set_ or ()), host.value, address, result, json_)
    raise typer.Exit(run_job(request))


@app.command()
def submit(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The job file (YAML).", show_default=False)],
    address: Annotated[
        str, typer.Option(metavar="URL", help="The cluster's job server: http://HEAD:8265.", show_default=False)
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=VALUE", help="Change a field; VALUE is YAML. May be repeated."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and return.")] = False,
    id_: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Ray's name of the job; else JOB-XXXXXXXX.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Build the task here first; needs its data here.")
    ] = True,
    result: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the RunResult here, as JSON.")] = None,
    json_: AsJson = False,
) -> None:
    """Run a job on a Ray cluster through its job server, as `ray job submit` does.

    Uploads the job file's folder, starts `everstep run` there, prints its log, exits as it exits: 0 done, 1 failed,
    2 refused, 130 stopped. Ctrl-C asks the run to stop after its step, with a checkpoint; a second one ends it. The
    cluster needs this very version of everstep. A token is taken from where Ray looks: RAY_AUTH_TOKEN_PATH,
    RAY_AUTH_TOKEN, ~/.ray/auth_token. The run itself is on the cluster: closing this terminal ends nothing.

    \b
    everstep submit job.yaml --address http://HEAD:8265
    everstep submit job.yaml --address http://HEAD:8265 --set ranks.max=8 --detach
    ray job submit --address http://HEAD:8265 --working-dir . -- everstep run job.yaml
    """
    from everstep.submitting import SubmitRequest, submit_job

    request = SubmitRequest(spec, address, tuple(set_ or ()), id_, detach, result, json_, check)
    raise typer.Exit(submit_job(request))


@app.command()
def jobs(
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Show the jobs of this Ray cluster, as its controller sees them."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """List the runs of this user on this machine, newest first; with --address, all jobs of a cluster.

    \b
    everstep jobs
    everstep jobs --json
    everstep jobs --address 10.0.0.1:6379
    """
    if address is not None:
        cluster_jobs(address, json_)
        return
    entries = Registry().runs()
    if json_:
        rows = [
            {**msgspec.to_builtins(e.record), "state": e.state, "live": e.live, "path": str(e.path)} for e in entries
        ]
        print(json.dumps(rows))
        return
    if not entries:
        print("no runs yet; start one: everstep run SPEC")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("job", "state", "host", "started", "pid", "spec"):
        table.add_column(column)
    for e in entries:
        started = f"{datetime.fromtimestamp(e.record.started):%Y-%m-%d %H:%M:%S}"
        table.add_row(e.name, e.state, e.record.host, started, str(e.record.pid), e.record.spec)
    print_table(table)


@app.command()
def status(job: JobName, json_: AsJson = False) -> None:
    """Show where a run is: step, loss, speed, ranks, last event; or how it ended.

    \b
    everstep status gpt
    everstep status gpt --json | jq .step
    """
    entry = find_run(job)
    now = connect_to(entry).status() if entry.live else _ended(entry)
    if json_:
        print(json.dumps({**msgspec.to_builtins(now), "live": entry.live, "state": entry.state}))
        return
    print(f"{entry.name}: {entry.state}")
    print(displays.status_line(now))
    for member in now.members:
        role = "manager" if str(member["name"]).startswith("manager") else "spare"
        rank = role if member.get("rank") is None else f"rank {member['rank']}"
        print(f"  {member.get('name', '?')}: {rank}, {member.get('state', '')}, pid {member.get('pid', '')}")
    if now.checkpoint:
        print(f"checkpoint: {now.checkpoint}")
    if now.error:
        print(f"error: {now.error}")


@app.command()
def logs(
    job: JobName,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="Only the processes rank-R.*, of every incarnation.", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    json_: AsJson = False,
) -> None:
    """Print what a run's processes wrote, live or ended.

    \b
    everstep logs gpt
    everstep logs gpt --rank 1 --follow
    """
    entry = find_run(job)
    seen: dict[Path, int] = {}
    while True:
        live = is_live(entry)  # asked first, so that the last lines are read after the end
        for process, line in _new_lines(entry.logs, rank, seen, final=not (follow and live)):
            print(json.dumps({"process": process, "line": line}) if json_ else f"{process} | {line}", flush=True)
        if not (follow and live):
            break
        time.sleep(_FOLLOW_S)
    if not seen:
        which = "no logs" if rank is None else f"no logs of rank {rank}"
        print(f"everstep: {which} in {entry.logs}", file=sys.stderr)


@app.command()
def findings(job: JobName, json_: AsJson = False) -> None:
    """Show what the detector found: what, which rank or link, since when, and the evidence.

    \b
    everstep findings gpt
    """
    entry = find_run(job)
    if entry.live:
        client = connect_to(entry)
        done = client.result()
        found = list(done.findings) if done is not None else []
        if done is None:
            for event in client.events(0):
                if event.kind == "finding":
                    found.append(msgspec.convert({"syndrome": event.text, "ranks": [], **event.data}, Finding))
    else:
        ended = entry.result()
        found = list(ended.findings) if ended is not None else []
    if json_:
        print(json.dumps([msgspec.to_builtins(f) for f in found]))
        return
    if not found:
        print(f"{entry.name}: no findings")
    for f in found:
        ranks = ", ".join(str(r) for r in f.ranks) or "-"
        links = ", ".join(f"{a}-{b}" for a, b in f.links)
        print(
            f"{f.syndrome}: rank {ranks}{f', link {links}' if links else ''}, since step {f.first_step},"
            f" detected after {f.detected_after_ms:.0f} ms; evidence: {json.dumps(f.evidence)}"
        )


@app.command()
def scale(
    job: JobName,
    ranks: Annotated[int, typer.Option(metavar="N", min=1, help="Number of ranks.", show_default=False)],
    json_: AsJson = False,
) -> None:
    """Change the number of ranks of a live run, within ranks.min and ranks.max. The result keeps its bits.

    \b
    everstep scale gpt --ranks 2
    """
    entry = find_run(job, live=True)
    refused = connect_to(entry).scale(ranks)
    if refused:
        fail(f"{entry.name}: {refused}")
    print(json.dumps({"job": entry.name, "ranks": ranks}) if json_ else f"{entry.name}: scaling to {ranks} ranks")


@app.command()
def drain(
    job: JobName,
    node: Annotated[str, typer.Option(metavar="ID", help="A Ray node, or how its id begins.")] = "",
    rank: Annotated[int | None, typer.Option(metavar="R", min=0, help="One rank.", show_default=False)] = None,
    json_: AsJson = False,
) -> None:
    """Have the ranks of a node, or one rank, replaced elsewhere and leave in order. No step is lost.

    \b
    everstep drain gpt --rank 1
    everstep drain gpt --node 4f1c09aa
    """
    if bool(node) == (rank is not None):
        fail("name what is to be drained: --node ID or --rank R", EXIT_REFUSED)
    entry = find_run(job, live=True)
    refused = connect_to(entry).drain(node, rank)
    if refused:
        fail(f"{entry.name}: {refused}")
    what = f"node {node}" if node else f"rank {rank}"
    print(json.dumps({"job": entry.name, "draining": what}) if json_ else f"{entry.name}: draining {what}")


@app.command()
def stop(job: JobName, json_: AsJson = False) -> None:
    """Stop a live run after the step in flight, with a checkpoint. The same `everstep run` resumes it.

    \b
    everstep stop gpt
    """
    entry = find_run(job, live=True)
    connect_to(entry).stop("everstep stop")
    print(json.dumps({"job": entry.name, "stopping": True}) if json_ else f"{entry.name}: stopping after this step")


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Also a cluster: http://HEAD:8265 or HEAD:6379.", show_default=False),
    ] = None,
    survey: Annotated[bool, typer.Option("--survey", hidden=True)] = False,
    json_: AsJson = False,
) -> None:
    """Check this machine: versions, cores, shared memory, loopback, rights; say what to fix.

    With --address a Ray cluster too: is it reachable, does it take the token, its job server, its nodes with their
    CPUs, GPUs, /dev/shm and versions. Exits 1 when something must be fixed before a run can work.

    \b
    everstep doctor
    everstep doctor --address http://HEAD:8265
    """
    if survey:  # on the head, for a doctor elsewhere
        from everstep.actors.ray_doctor import survey as look_around

        print(msgspec.json.encode(look_around(address or os.environ.get("RAY_ADDRESS", "auto"))).decode())
        return
    looks = doctors.examine() + (doctors.examine_cluster(address) if address else [])
    if json_:
        print(json.dumps([msgspec.to_builtins(look) for look in looks]))
    else:
        for look in looks:
            print(f"{look.verdict:4}  {look.name:16} {look.found}" + (f"\n      fix: {look.fix}" if look.fix else ""))
    raise typer.Exit(EXIT_FAILED if any(look.verdict == "fail" for look in looks) else 0)


@app.command()
def coordinator(
    bind: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where members join; port 0 takes a free one.")
    ] = "127.0.0.1:0",
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="EVERSTEP_TOKEN_FILE",
            help="Holds the secret that members must know too.",
            show_default=False,
        ),
    ] = None,
    min_peers: Annotated[int, typer.Option(metavar="N", min=1, help="No view has fewer members.")] = 2,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=1.0, help="Limits follow from it: a host is dead that is silent for a fifth."
        ),
    ] = 10.0,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lets a successor go on where this one was killed.", show_default=False),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Run the coordinator of a group (everstep.collectives), without Ray, until Ctrl-C or SIGTERM.

    Prints its address. Members go on without it for a while; start it again with the same --bind and --state.

    \b
    head -c 32 /dev/urandom | base64 > token && chmod 600 token
    everstep coordinator --bind 127.0.0.1:7070 --token-file token --min-peers 2
    python -c 'from everstep.collectives import Group; print(Group.join.__doc__)'
    """
    from everstep.coordinating import coordinate

    coordinate(bind, token_file, min_peers, timeout, state, json_)


def main() -> None:
    """Entry point of the `everstep` script."""
    try:
        app()
    except SystemExit as ended:
        if ended.code != EXIT_STOPPED:
            raise
        # A second Ctrl-C strikes anywhere, also inside Ray's or gRPC's own code: one command in thirty printed its
        # last line and never ended. All that is ours is closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_STOPPED)
    except BrokenPipeError:  # `everstep logs … | head` is no error; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def is_live(entry: RunEntry) -> bool:
    """Whether the run lives now (an entry is a look at one moment)."""
    return any(e.path == entry.path for e in Registry().live_runs())


def _ended(entry: RunEntry) -> Status:
    """What is left to say of a run that is no longer live."""
    done, record = entry.result(), entry.record
    error = "its process died without ending the run" if entry.state == "died" else None
    if done is not None and done.error is not None:
        error = done.error.message
    return Status(
        job=record.job,
        run=record.run,
        phase="ended",
        step=done.steps if done else 0,
        steps=record.steps,
        loss=done.loss.last if done else None,
        ranks=done.ranks_final if done else 0,
        recoveries=len(done.recoveries) if done else 0,
        checkpoint=done.checkpoints[-1] if done and done.checkpoints else None,
        started_at=record.started,
        error=error,
        host=record.host,
    )


def _new_lines(folder: Path, rank: int | None, seen: dict[Path, int], *, final: bool) -> Iterator[tuple[str, str]]:
    """Yields (process, line) of what was written since the offsets in `seen`; a half line only if final."""
    wanted = re.compile(r".*" if rank is None else rf"rank-{rank}(\..*)?$")
    for file in sorted(folder.glob("*.log")):
        if not wanted.match(file.stem):
            continue
        with file.open("rb") as handle:
            handle.seek(seen.setdefault(file, 0))
            text = handle.read()
        end = len(text) if final else text.rfind(b"\n") + 1
        seen[file] += end
        for line in text[:end].decode(errors="replace").splitlines():
            yield file.stem, line

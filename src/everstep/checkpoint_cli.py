"""`everstep checkpoint …`: list, show, verify, compare, import and export checkpoints; ask a live run for one.

Thin: reads arguments, asks everstep.storage or a run's client, prints. Never imports torch at import time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from everstep.command import AsJson, JobName, Url, connect_to, fail, find_run, print_table, progress_bar, refusing
from everstep.convert_cli import export, import_
from everstep.platform.job.check import gib
from everstep.running import EXIT_FAILED, EXIT_REFUSED
from everstep.storage.errors import CheckpointError, CheckpointNotFound, StorageError

if TYPE_CHECKING:
    from everstep.storage.checkpoint import Checkpoint
    from everstep.storage.stores.port import Folder

app = typer.Typer(
    help="Checkpoints on storage: list, show, verify, compare, import, export; ask a live run for one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("import")(import_)
app.command()(export)
_POLL_S = 0.1


@app.command("ls")
def list_(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="A run's folder, or what lies above it: TO or TO/JOB.", show_default=False
        ),
    ],
    json_: AsJson = False,
) -> None:
    """List checkpoints, the newest last. Reads manifests only; `verify` reads everything.

    \b
    everstep checkpoint ls runs
    everstep checkpoint ls s3://bucket/runs/gpt/gpt --json
    """
    from everstep.storage.manifest import names, read_manifest
    from everstep.storage.stores.opening import folder_at

    rows: list[dict[str, Any]] = []
    with refusing():
        for run in _runs(folder_at(url), 2):
            for name in names(run):
                row: dict[str, Any] = {"url": run.child(str(name)).url, "step": name.step, "epoch": name.epoch}
                try:
                    m = read_manifest(run.child(str(name)))
                    row |= {
                        "state": "whole",
                        "created": m.created,
                        "bytes": sum(file.bytes for file in m.files),
                        "files": len(m.files),
                        "tensors": len(m.index.tensors),
                        "job": m.job,
                        "run": m.run,
                    }
                except CheckpointNotFound:
                    row |= {"state": "no manifest: half-written, or being written now"}
                except CheckpointError as error:
                    row |= {"state": f"cannot be used: {error}"}
                rows.append(row)
    if json_:
        print(json.dumps(rows))
        return
    if not rows:
        print(f"no checkpoints in {url}")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("step", "created", "size", "files", "tensors", "state", "url"):
        table.add_column(column, overflow="fold", justify="right" if column in ("step", "size") else "left")
    for row in rows:
        created = f"{datetime.fromtimestamp(row['created']):%Y-%m-%d %H:%M:%S}" if "created" in row else "-"
        size = gib(row["bytes"]) if "bytes" in row else "-"
        table.add_row(
            str(row["step"]), created, size, str(row.get("files", "-")), str(row.get("tensors", "-")), row["state"],
            row["url"],
        )  # fmt: skip
    print_table(table)


@app.command()
def show(
    url: Url,
    tensors: Annotated[bool, typer.Option("--tensors", "-t", help="Every tensor, too.")] = False,
    json_: AsJson = False,
) -> None:
    """Show what a checkpoint holds: sizes, layout, where it comes from.

    \b
    everstep checkpoint show runs/gpt/gpt
    everstep checkpoint show runs/gpt/gpt/step-200.epoch-1.attempt-0 --tensors
    """
    with refusing():
        checkpoint = _open(url)
    m = checkpoint.manifest
    kinds: dict[str, list[int]] = {}
    for meta in m.index.tensors:
        count = kinds.setdefault(meta.kind, [0, 0, 0])
        count[0], count[1], count[2] = count[0] + 1, count[1] + meta.numel, count[2] + meta.nbytes
    layout = m.spec.get("layout", {})
    facts: dict[str, Any] = {
        "url": checkpoint.url,
        "job": m.job,
        "run": m.run,
        "step": m.step,
        "epoch": m.epoch,
        "created": m.created,
        "bytes": sum(file.bytes for file in m.files),
        "files": len(m.files),
        "layout": layout,
        "versions": m.versions,
        "progress": {k: v for k, v in m.progress.items() if k != "fingerprint"},
        "fingerprint": m.progress.get("fingerprint", {}),
        "origin": m.origin,
        "kinds": {kind: dict(zip(("tensors", "elements", "bytes"), n, strict=True)) for kind, n in kinds.items()},
    }
    if tensors:
        facts["tensors"] = [
            {"name": t.name, "kind": t.kind, "dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes}
            for t in m.index.tensors
        ]
    if json_:
        print(json.dumps(facts))
        return
    cut = ", ".join(f"{k} {v}" for k, v in layout.items())
    print(f"{checkpoint.url}")
    print(f"  job         {m.job}, run {m.run}, step {m.step}, epoch {m.epoch}")
    print(f"  created     {datetime.fromtimestamp(m.created):%Y-%m-%d %H:%M:%S}")
    files = "1 file" if len(m.files) == 1 else f"{len(m.files)} files"
    print(f"  size        {gib(facts['bytes'])} in {files}{f' ({cut})' if cut else ''}")
    print(f"  versions    {', '.join(f'{k} {v}' for k, v in m.versions.items()) or 'unknown'}")
    for key, value in facts["progress"].items():
        print(f"  {key:11} {json.dumps(value)}")
    for key, value in m.origin.items():
        text = json.dumps(value)
        print(f"  from {key:6} {text if len(text) < 300 else f'{text[:300]} … (--json has all)'}")
    for kind, (count_, elements, nbytes) in sorted(kinds.items()):
        print(f"  {kind:11} {count_} tensors, {elements:,} elements, {gib(nbytes)}")
    if tensors:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("tensor", "kind", "dtype", "shape", "size"):
            table.add_column(column, overflow="fold")
        for t in m.index.tensors:
            table.add_row(t.name, t.kind, t.dtype, str(list(t.shape)), gib(t.nbytes))
        print_table(table)


@app.command()
def verify(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A checkpoint, or a run's folder: all of them.", show_default=False)
    ],
    json_: AsJson = False,
) -> None:
    """Read every byte and check it. Exits 1 and names file, tensor and range where something is damaged.

    \b
    everstep checkpoint verify runs/gpt/gpt
    """
    from everstep.storage.checkpoint import Checkpoint
    from everstep.storage.manifest import MANIFEST, names
    from everstep.storage.stores.opening import folder_at

    with refusing():
        folder = folder_at(url)
        whole = any(entry.name == MANIFEST for entry in folder.store.entries(folder.path))
        folders = [folder] if whole else [folder.child(str(name)) for name in names(folder)]
    if not folders:
        fail(f"{url}: no checkpoint there", EXIT_REFUSED)
    rows = []
    for each in folders:
        began, problem, size = time.perf_counter(), "", 0
        try:
            checkpoint = Checkpoint.open(each.url)
            size = sum(file.bytes for file in checkpoint.manifest.files)
            with progress_bar(f"verifying {each.name}", quiet=json_) as moved:
                checkpoint.verify(on_bytes=partial(_of, moved, size))
        except StorageError as error:
            problem = str(error)
        seconds = time.perf_counter() - began
        rows.append({"url": each.url, "ok": not problem, "bytes": size, "seconds": seconds, "problem": problem})
        if not json_:
            print(f"{each.url}: {problem or f'whole, {gib(size)} in {seconds:.1f} s'}")
    if json_:
        print(json.dumps(rows))
    raise typer.Exit(0 if all(row["ok"] for row in rows) else EXIT_FAILED)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="URL1", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="URL2", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", "-a", help="Equal tensors, too.")] = False,
    json_: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever their layouts. Exits 0 if every bit is equal, else 1.

    \b
    everstep checkpoint diff runs/gpt/gpt/step-100.epoch-1.attempt-0 runs/gpt/other
    """
    from everstep.storage.compare import compare

    rows = []
    with refusing():
        a, b = _open(first), _open(second)
        total = sum(meta.nbytes for meta in a.index.tensors)
        done = 0
        with progress_bar("comparing", quiet=json_) as moved:
            for row in compare(a, b):
                rows.append(row)
                done += row.nbytes
                moved(row.nbytes, total)
    shown = [row for row in rows if everything or row.verdict != "equal"]
    equal = all(row.verdict == "equal" for row in rows)
    if json_:
        keys = ("name", "kind", "verdict", "differing", "elements", "largest", "relative", "detail")
        body = [{key: getattr(row, key) for key in keys} for row in shown]
        print(json.dumps({"equal": equal, "steps": [a.manifest.step, b.manifest.step], "tensors": body}))
        raise typer.Exit(0 if equal else EXIT_FAILED)
    if shown:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("tensor", "kind", "verdict", "elements that differ", "largest", "relative"):
            table.add_column(column, overflow="fold")
        for row in shown:
            numbers = row.verdict == "differs"
            table.add_row(
                row.name, row.kind, row.detail or row.verdict, f"{row.differing:,} of {row.elements:,}" * numbers,
                f"{row.largest:.3g}" * numbers, f"{row.relative:.3g}" * numbers,
            )  # fmt: skip
        print_table(table)
    differing = sum(row.verdict != "equal" for row in rows)
    steps = f"steps {a.manifest.step} and {b.manifest.step}"
    print(f"{steps}: " + ("every bit is equal" if equal else f"{differing} of {len(rows)} tensors differ"))
    raise typer.Exit(0 if equal else EXIT_FAILED)


@app.command()
def now(
    job: JobName,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait until it is whole; 0: not at all.")
    ] = 120.0,
    json_: AsJson = False,
) -> None:
    """Ask a live run for a checkpoint of its next step, and wait until it is whole. Training does not wait.

    \b
    everstep checkpoint now gpt
    """
    entry = find_run(job, live=True)
    client = connect_to(entry)
    seen = max((event.id for event in client.events(0)), default=0)
    refused = client.save()
    if refused:
        fail(f"{entry.name}: {refused}")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        try:
            events, ended = client.events(seen), client.result() is not None
        except ConnectionError as error:
            fail(f"{entry.name} ended before its checkpoint was whole: {error}")
        for event in events:
            seen = event.id
            if event.kind == "checkpoint":
                print(json.dumps(event.data) if json_ else event.text)
                return
            if event.kind == "finding" and event.data.get("syndrome") == "checkpoint":
                fail(f"{entry.name}: {event.text}")
        if ended:
            fail(f"{entry.name} ended before its checkpoint was whole")
        time.sleep(_POLL_S)
    if wait:
        fail(f"{entry.name}: no whole checkpoint after {wait:g} s; it is still being written (everstep logs {job})")
    print(json.dumps({"job": entry.name, "asked": True}) if json_ else f"{entry.name}: asked for a checkpoint")


def _of(moved: Callable[[int, int], None], total: int, count: int) -> None:
    moved(count, total)


def _open(url: str) -> Checkpoint:
    from everstep.storage.checkpoint import Checkpoint

    return Checkpoint.open(url)


def _runs(folder: Folder, levels: int) -> Iterator[Folder]:
    """`folder`, and what is `levels` below it, where there are checkpoints."""
    from everstep.storage.manifest import CheckpointName, names

    if names(folder):
        yield folder
    elif levels:
        for entry in folder.store.entries(folder.path):
            if entry.is_folder and CheckpointName.parse(entry.name) is None and not entry.name.startswith("."):
                yield from _runs(folder.child(entry.name), levels - 1)

"""What every `everstep` command does alike: find a run, reach it, print a table or a bar, refuse.

Never imports torch or ray. Owns nothing; one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from everstep import display as displays
from everstep.platform.job.client import RunClient
from everstep.platform.job.errors import UnknownJob
from everstep.platform.job.registry import Registry, RunEntry
from everstep.running import EXIT_FAILED, EXIT_REFUSED
from everstep.storage.errors import CheckpointCorrupt, IndexInvalid, StorageError

JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="JOB, or JOB/RUN when a job has several.", show_default=False)
]
Url = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        help="A checkpoint, or a run's folder (its newest that verifies): a path or a URL.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def find_run(job: str, *, live: bool = False) -> RunEntry:
    """The run called JOB or JOB/RUN; ends the command where there is none."""
    try:
        return Registry().find(job, live=live)
    except UnknownJob as error:
        fail(str(error))


def connect_to(entry: RunEntry) -> RunClient:
    """A client of a live run; ends the command where it cannot be reached."""
    from everstep.actors.client import connect

    if not entry.record.supervisor:
        fail(f"{entry.name} is still starting and has no address yet; try again in some seconds")
    try:
        client: RunClient = connect(entry.record.supervisor, entry.token())
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{entry.name} cannot be reached at {entry.record.supervisor}: {error}")
    return client


def print_table(table: Table) -> None:
    """On a terminal as wide as that is, in a pipe as wide as a log may be."""
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
    else:
        Console(width=displays.PIPE_WIDTH, no_color=True, highlight=False).print(table)


def fail(text: str, code: int = EXIT_FAILED) -> NoReturn:
    """Ends the command with one line on standard error."""
    print(f"everstep: {text}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def refusing() -> Iterator[None]:
    """What storage or a bad argument says becomes one line and the exit status 2; damage exits with 1."""
    try:
        yield
    except (IndexInvalid, KeyError, ValueError) as error:
        fail(str(error), EXIT_REFUSED)
    except StorageError as error:
        fail(str(error), EXIT_FAILED if isinstance(error, CheckpointCorrupt) else EXIT_REFUSED)


@contextmanager
def progress_bar(text: str, *, quiet: bool, totals: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error where that is a terminal. What it yields takes (bytes, total): moved now, or, with
    `totals`, moved in all.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda moved, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)

        def moved(count: int, total: int) -> None:
            if totals:
                progress.update(task, completed=count, total=total or None)
            else:
                progress.update(task, advance=count, total=total or None)

        yield moved

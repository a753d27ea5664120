"""`everstep jobs --address`: the table of a cluster's controller. Never imports torch or ray at import time."""

from __future__ import annotations

import json

import msgspec
from rich import box
from rich.table import Table

from everstep.command import fail, print_table

_SHOWN_RESULTS = 10


def cluster_jobs(address: str, as_json: bool) -> None:
    """Prints it. Fails where nobody answers at `address`."""
    from everstep.actors.ray_controller import read_table  # Ray takes half a second to import

    try:
        found = read_table(address)
    except ConnectionError as error:
        fail(str(error))
    if as_json:
        print(json.dumps(msgspec.to_builtins(found)))
        return
    if found is None:
        print(f"no job has run on the cluster at {address} yet; start one: everstep run SPEC --address {address}")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("job", "run", "priority", "state", "granted", "held", "min", "max", "reason"):
        table.add_column(column)
    for row in found.jobs:
        most = f"{row.max}+{row.spares}" if row.spares else str(row.max)
        numbers = (str(row.granted), str(row.held), str(row.min), most)
        table.add_row(row.job, row.run, str(row.priority), row.state, *numbers, row.reason)
    for result in found.results[-_SHOWN_RESULTS:]:
        state = "done" if result["ok"] else "stopped" if result["stopped"] else "failed"
        reason = result["error"] or f"{result['steps']} steps in {result['wall_s']:.0f} s"
        table.add_row(result["job"], result["run"], "", state, "", "", "", "", reason)
    print_table(table)

"""The port through which a run starts, watches and kills its processes.

Two implementations pass the same contract tests (tests/contract/test_host.py): `ProcessHost` (plain local
processes, no Ray) and `RayHost` (Ray actors). A host knows nothing of training: it runs the entry point of a
role with the bytes it was given, and says once how that ended.

Every method of a host may be called from any thread. `on_exit` is called from one thread of the host, so it
should hand the news over and return; it may call `start` and `kill`.
"""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from everstep.platform.cluster.placement import Node

OnExit = Callable[[str, str], None]
"""(name, cause), once for every started name, after the process is gone.

Causes: "exit N" (the entry returned: 0; it raised: 1; it called sys.exit(N)), "signal N", or "died: WHY"
where the exit status is not known (a Ray actor that vanished, a process whose parent vanished, no memory to
fork).
"""

OnNodes = Callable[[tuple[Node, ...]], None]

Entries = Mapping[str, str]
"""Role ("manager", "rank") -> "module:function", imported in the started process, called with the config."""

DEFAULT_ENTRIES: Entries = {
    "manager": "everstep.actors.manager_process:main",
    "rank": "everstep.actors.rank_process:main",
}


class HostClosed(RuntimeError):
    """`start` on a host that was closed."""


class Host(Protocol):
    """Starts, watches and kills the processes of one run."""

    def start(self, role: str, name: str, slot: int, config: bytes, node: str = "") -> None:
        """Starts `role` under a name this host has never used; returns at once.

        `node`: where, on a host that has nodes; the slot's place moves there with all that is started later.
        Whatever goes wrong afterwards is told through `on_exit`. Raises ValueError for a role without an
        entry or a name used before, HostClosed after `close`.
        """

    def kill(self, name: str) -> None:
        """SIGKILL now, frozen or not, even while it is still being started. Unknown or dead names are
        ignored.
        """

    def pid(self, name: str) -> int | None:
        """The process id while `name` is known to run, on whatever machine it runs; None before and after."""

    def adopt(self, role: str, name: str, slot: int, where: bytes) -> None:
        """Watches over a process that another host object of this run started, as if this one had; `where` is what
        that one said in `located`, or b"". One that cannot be found is reported as an exit.
        """

    def located(self, name: str) -> bytes:
        """Where `name` runs, for `adopt`; b"" where that is not known."""

    def watch_nodes(self, on_nodes: OnNodes) -> bool:
        """Tells of all nodes, first and whenever something changes, from a thread of the host; False where this
        machine is all there is.
        """

    def free(self, slot: int) -> None:
        """Nothing of this slot comes back to where it was: its place is given back."""

    def close(self) -> None:
        """Kills what still lives, waits until it is gone, reports it, frees everything; idempotent."""


def entry_of(entries: Entries, role: str) -> str:
    """The "module:function" of a role; raises ValueError for a role without one."""
    if role not in entries:
        raise ValueError(f"role {role!r} has no entry point; known: {', '.join(sorted(entries))}")
    return entries[role]


def run_entry(entry: str, config: bytes) -> int:
    """Runs "module:function" in this process and returns its exit code; a traceback goes to stderr."""
    try:
        module, _, function = entry.partition(":")
        main = cast("Callable[[bytes], None]", getattr(importlib.import_module(module), function))
        main(config)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

"""The port through which anyone watches and steers a live run. Implemented in `everstep.actors`.

Calls may come from any one thread at a time. They raise `ConnectionError` when the run cannot be reached.
"""

from __future__ import annotations

from typing import Protocol

from everstep.platform.job.result import RunResult
from everstep.platform.job.status import Event, Status


class RunClient(Protocol):
    """A live run, seen from outside."""

    def status(self) -> Status:
        """Returns the run as it is now."""

    def events(self, after: int) -> list[Event]:
        """Returns the events whose id is greater than `after`, oldest first."""

    def scale(self, ranks: int) -> str:
        """Asks for a number of ranks; returns "" when accepted, else why not."""

    def save(self) -> str:
        """Asks for a checkpoint of the next step; returns "" when accepted, else why not."""

    def drain(self, node: str, rank: int | None) -> str:
        """Asks a node's ranks (`rank` None), or a rank, to leave in order; returns "" when accepted, or why not."""

    def stop(self, reason: str) -> None:
        """Asks the run to finish its step, write a checkpoint and end. Returns at once."""

    def result(self) -> RunResult | None:
        """Returns how the run ended, None while it goes on."""


class RunHandle(RunClient, Protocol):
    """A run that this process started and has to end."""

    def wait(self, timeout_s: float) -> bool:
        """Waits for the result, at most this long; True once there is one."""

    def leave(self) -> bool:
        """Lets go of the run, which goes on without this process; False where it would not. Returns at once."""

    def close(self) -> None:
        """Ends everything that the run started, now if it still goes on, and waits. Idempotent."""

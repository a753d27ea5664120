"""`Work`: an operation under way, as its caller holds it."""

from __future__ import annotations

from typing import Protocol

from everstep.collectives.errors import CollectiveError


class Waiter(Protocol):
    """What drives the operation on: a mesh."""

    def wait(self, work: Work, timeout_s: float | None) -> None: ...
    def look(self, work: Work) -> None: ...


class Work:
    """One operation of this member. `wait` may be called from any thread, by several, and more than once."""

    def __init__(self, waiter: Waiter, what: str) -> None:
        self.what = what
        self.error: CollectiveError | None = None
        self.finished = False
        self._waiter = waiter

    def done(self) -> bool:
        """Whether it has ended, well or not; never blocks. Takes what has come, so it may be asked in a loop."""
        if not self.finished:
            self._waiter.look(self)
        return self.finished

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when the operation is done and its tensors may be used and changed again.

        `timeout_s` defaults to the group's. Raises PeerLost or Evicted (the view is over; what the tensors hold is
        undefined outside of a transaction), Mismatch (nothing was changed), or CollectiveTimeout: then the
        operation goes on, its tensors still belong to it, and it may be waited for again.
        """
        if not self.finished:
            self._waiter.wait(self, timeout_s)
        if self.error is not None:
            raise self.error

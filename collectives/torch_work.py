"""`TorchWork`: operations of a group as torch.distributed sees them, and `Completer`, which completes their futures.

Owns no operation: a group's threads move them on. Thread-safety: `wait` may be called from any thread, as torch's
autograd threads do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from everstep.collectives.errors import CollectiveError, CollectiveTimeout, Evicted, Mismatch, PeerLost
from everstep.collectives.work import Work

_SLICE_S = 0.01  # how long one operation is waited for before the futures of later ones are looked at


class TorchPeerLost(PeerLost, dist.DistBackendError):
    """PeerLost, for those who expect torch's error (a RuntimeError)."""


class TorchEvicted(Evicted, dist.DistBackendError):
    """Evicted, likewise."""


class TorchTimeout(CollectiveTimeout, dist.DistBackendError):
    """CollectiveTimeout, likewise."""


class TorchMismatch(Mismatch, dist.DistBackendError):
    """Mismatch, likewise."""


def as_torch(error: CollectiveError) -> CollectiveError:
    """The same error as one that is torch's, too."""
    match error:
        case PeerLost():
            return TorchPeerLost(*error.args)
        case Evicted():
            return TorchEvicted(*error.args)
        case CollectiveTimeout():
            return TorchTimeout(str(error), error.about)
        case Mismatch():
            return TorchMismatch(*error.args)
    return error


class TorchWork(dist.Work):
    """One call of torch.distributed: one operation of the group or several, and what is to be copied afterwards.

    `result` is what its future holds. It keeps the tensors alive until it is done.
    """

    def __init__(
        self,
        works: Sequence[Work],
        after: Sequence[Callable[[], object]],
        result: list[torch.Tensor],
        timeout_s: float,
        completer: Completer,
    ) -> None:
        super().__init__()
        self._works = tuple(works)
        self._after = tuple(after)
        self._result = result
        self._deadline = time.monotonic() + timeout_s
        self._completer = completer
        self._lock = threading.Lock()
        self._future: torch.futures.Future[Any] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises TorchPeerLost, TorchEvicted, TorchMismatch; TorchTimeout after `timeout` or the call's own one."""
        asked_s = timeout.total_seconds() if timeout is not None else 0.0
        self.finish(time.monotonic() + asked_s if asked_s > 0 else self._deadline)
        return True

    def finish(self, until: float) -> None:
        try:
            for work in self._works:
                work.wait(max(0.0, until - time.monotonic()))
        except CollectiveError as error:
            raise as_torch(error) from None
        with self._lock, torch.no_grad():
            after, self._after = self._after, ()
            for copy in after:
                copy()

    def overdue(self, now: float) -> bool:
        return now >= self._deadline

    def is_completed(self) -> bool:
        return all([work.done() for work in self._works])

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> Any:
        error = next((work.error for work in self._works if work.error is not None), None)
        return as_torch(error) if error is not None else None

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._result

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        """Holds the tensors, or an error that names what was lost. Needs a thread, which `wait` does not."""
        with self._lock:
            if self._future is not None:
                return self._future
            begun: torch.futures.Future[Any] = torch.futures.Future()
            # set_exception would only raise in Python: C++ (DDP) would take the exception for the value.
            self._future = begun.then(_value_or_raise)
        self._completer.add(self, begun)
        return self._future

    def value(self) -> list[torch.Tensor]:
        return self._result


def _value_or_raise(done: torch.futures.Future[Any]) -> Any:
    value = done.value()
    if isinstance(value, BaseException):
        raise value
    return value


class Completer:
    """A thread that waits for works with a future; begins with the first, ends with `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._pending: list[tuple[TorchWork, torch.futures.Future[Any]]] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, work: TorchWork, future: torch.futures.Future[Any]) -> None:
        with self._changed:
            if self._closed:
                raise TorchPeerLost(f"{self._name} was destroyed")
            self._pending.append((work, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"futures of {self._name}", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Call it when every operation has ended, by itself or by the group's end. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                pending = list(self._pending)
            # The first is waited for, which moves all of them on; a later one may be done before it.
            ended = {id(pair[0]) for at, pair in enumerate(pending) if self._complete(*pair, wait=at == 0)}
            with self._changed:
                self._pending = [pair for pair in self._pending if id(pair[0]) not in ended]

    def _complete(self, work: TorchWork, future: torch.futures.Future[Any], wait: bool) -> bool:
        """Whether it has ended, well or not; its future says so then."""
        value: Any = None
        try:
            if not wait and not work.is_completed():
                return False
            work.finish(time.monotonic() + _SLICE_S)
            value = work.value()
        except CollectiveTimeout as error:
            if not work.overdue(time.monotonic()) and not self._closed:
                return False
            value = error
        except Exception as error:  # whoever holds the future is to hear of it, not this thread
            value = error
        future.set_result(value)
        return True

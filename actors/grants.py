"""A supervisor's side of the controller: enrols, says what the run holds, and hands on what it is granted.

One thread keeps a stream to the controller, wherever that is now. While there is none the run goes on with its last
grant. The other methods may be called from any thread and do not wait, but for `leave`. Never imports ray.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from everstep.collectives.control import ControlClient
from everstep.collectives.errors import CollectiveError
from everstep.platform.cluster import controller_messages as cm

log = logging.getLogger(__name__)

Finder = Callable[[], tuple[str, str] | None]
"""() -> (address, token) of the controller, None where there is none now; may take seconds."""

_RETRY_S = 0.5
_CONNECT_S = 5.0
_KEEPALIVE_S = 5.0  # a controller's node that vanishes says no goodbye
_LEAVE_S = 5.0


class Granter(Protocol):
    """What a supervisor asks of it."""

    def start(self) -> None: ...
    def report(self, granted: int, held: int, number: int) -> None: ...
    def leave(self, result: dict[str, Any]) -> None: ...


class Grants:
    """`on_grant(processes, reason, number)` (0: queued) and `on_refused(reason)` come from the stream's thread."""

    def __init__(
        self,
        find: Finder,
        enrolment: cm.Enrol,
        on_grant: Callable[[int, str, int], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self._find = find
        self._said = enrolment
        self._on_grant = on_grant
        self._on_refused = on_refused
        self._lock = threading.Lock()
        self._client: ControlClient | None = None
        self._result: dict[str, Any] | None = None
        self._wake = threading.Event()  # the stream broke, or the run leaves
        self._left = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="grants", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def report(self, granted: int, held: int, number: int) -> None:
        """The run acts on this grant, and has so many processes now, those included that it is starting or ending."""
        with self._lock:
            said = msgspec.structs.replace(self._said, granted=granted, held=held, number=number)
            if said == self._said:
                return
            self._said = said
            if self._client is not None:
                self._client.send(cm.encode(cm.Held(held, number)))

    def leave(self, result: dict[str, Any]) -> None:
        """The run has ended: says so if the controller can be reached within a few seconds, and ends the thread."""
        if self._thread.ident is None or self._closed:
            return
        with self._lock:
            self._result = result
        self._wake.set()
        if not self._left.wait(_LEAVE_S):
            log.warning("the controller could not be told that the run has ended; it will miss it")
        self._closed = True
        self._wake.set()
        self._thread.join(_CONNECT_S + _RETRY_S)

    def _run(self) -> None:
        while not self._closed and not self._left.is_set():
            client = self._connect()
            if client is None:
                if not self._closed:
                    self._wake.wait(_RETRY_S)
                continue
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                self._client = None
                if self._result is not None:
                    client.send(cm.encode(cm.Done(self._result)))
                    self._left.set()
            client.close()

    def _connect(self) -> ControlClient | None:
        try:
            found = self._find()
        except Exception as error:  # whatever a finder meets, the run goes on
            log.warning("the controller cannot be looked for: %s", error)
            return None
        if found is None:
            return None
        self._wake.clear()
        try:
            client = ControlClient(
                *found, self._on_message, self._on_close, timeout_s=_CONNECT_S, keepalive_s=_KEEPALIVE_S
            )
        except CollectiveError as error:
            log.info("the controller at %s: %s", found[0], error)
            return None
        with self._lock:
            self._client = client
            client.send(cm.encode(self._said))
            if self._result is not None:
                self._wake.set()
        return client

    def _on_close(self, reason: str) -> None:
        log.info("the stream to the controller ended: %s", reason)
        self._wake.set()

    def _on_message(self, data: bytes) -> None:
        message = cm.decode_to_supervisor(data)
        if isinstance(message, cm.Refused):
            self._on_refused(message.reason)
            return
        self._on_grant(message.processes, message.reason, message.number)

"""A control stream to a coordinator that may go away and come back: the coordinator's death is no member's.

Owns one thread, which connects again every 50 ms after the stream broke, for as long as it is open. What is sent
meanwhile is dropped: `greet` says on each new stream what the coordinator has to know, so nothing is missing.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from everstep.collectives.control import ControlClient
from everstep.collectives.errors import CollectiveError, CoordinatorLost, HandshakeRefused

log = logging.getLogger(__name__)

_CLOSE_S = 5.0
_RETRY_S = 0.05
_DIAL_S = 1.0
_HANDSHAKE_S = 5.0
_KEEPALIVE_S = 2.0


class Uplink:
    """`greet() -> messages` is called under the lock that `send` takes, so a stream begins with what was true then.

    `on_message(data)` is called from one thread a stream, never from two at once. `timeout_s`: how long `__init__`
    tries; it raises HandshakeRefused or CoordinatorLost, unless `patient`: then it goes on in the background.
    """

    def __init__(
        self,
        address: str,
        token: str,
        greet: Callable[[], list[bytes]],
        on_message: Callable[[bytes], None],
        timeout_s: float,
        patient: bool = False,
    ) -> None:
        self.address = address
        self._token = token
        self._greet = greet
        self._on_message = on_message
        self._lock = threading.Lock()
        self._client: ControlClient | None = None
        self._broke = threading.Event()
        self._stop = threading.Event()
        try:
            self._first(timeout_s)
        except CollectiveError as error:
            if not patient:
                raise
            log.warning("%s", error)
            self._broke.set()
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)
        self._thread.start()

    @property
    def up(self) -> bool:
        return self._client is not None and not self._broke.is_set()

    def send(self, data: bytes) -> None:
        """To the coordinator, if it is there. Never blocks."""
        with self._lock:
            if self._client is not None:
                self._client.send(data)

    def close(self) -> None:
        """Ends the stream after what was sent has left; idempotent."""
        self._stop.set()
        self._broke.set()
        self._thread.join(_CLOSE_S)  # it may be in the middle of a handshake with nobody
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _first(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._connect(min(_HANDSHAKE_S, max(deadline - time.monotonic(), 0.1)))
            except HandshakeRefused as error:
                setting = " (token=)" if "token" in str(error) else ""
                raise HandshakeRefused(f"{error}{setting}") from None
            except (OSError, CoordinatorLost) as error:
                if time.monotonic() + _RETRY_S > deadline:
                    raise CoordinatorLost(
                        f"no coordinator at {self.address}: {error}; tried for {timeout_s:g} s (timeout_s=)"
                    ) from None
            self._stop.wait(_RETRY_S)

    def _connect(self, timeout_s: float) -> None:
        host, _, port = self.address.rpartition(":")
        # gRPC backs off for a second where nobody listens; a bare connection says at once when somebody does.
        socket.create_connection((host, int(port)), min(_DIAL_S, timeout_s)).close()
        self._broke.clear()
        client = ControlClient(
            self.address, self._token, self._on_message, self._on_close, timeout_s, keepalive_s=_KEEPALIVE_S
        )
        with self._lock:
            for message in self._greet():
                client.send(message)
            self._client = client

    def _on_close(self, reason: str) -> None:
        if not self._stop.is_set():
            log.info("the control stream to %s broke: %s", self.address, reason)
        self._broke.set()

    def _run(self) -> None:
        while True:
            self._broke.wait()
            with self._lock:
                client = self._client
                if not self._stop.is_set():
                    self._client = None
            if self._stop.is_set():
                return
            if client is not None:
                client.close()
            try:
                self._connect(_HANDSHAKE_S)
            except (OSError, CollectiveError) as error:
                log.debug("no coordinator at %s: %s", self.address, error)
                self._broke.set()
                self._stop.wait(_RETRY_S)

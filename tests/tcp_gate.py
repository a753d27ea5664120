"""A door in front of a TCP server, for tests: closed, nobody answers there, and whoever was inside is cut off."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class TcpGate:
    """Forwards connections to `port` of this machine while it is open; `self.port` stays the same."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._lock = threading.Lock()
        self._inside: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.open()

    def open(self) -> None:
        self._listener = listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """From now on connections are refused."""
        with self._lock:
            listener, self._listener = self._listener, None
            inside, self._inside = self._inside, []
        for each in [*inside, *([listener] if listener else [])]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._to))
                with self._lock:
                    if self._listener is not listener:
                        near.close()
                        far.close()
                        return
                    self._inside += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def _pass(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
        with contextlib.suppress(OSError):
            b.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def tcp_gate(port: int) -> Iterator[TcpGate]:
    gate = TcpGate(port)
    try:
        yield gate
    finally:
        gate.close()

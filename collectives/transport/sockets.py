"""Reading exactly so many bytes from a stream socket. Blocking; raises ConnectionError when the other side ends."""

from __future__ import annotations

import socket


def read_into(connection: socket.socket, view: memoryview) -> None:
    """Fills `view`. Raises ConnectionError, TimeoutError under the socket's own timeout."""
    done = 0
    while done < len(view):
        # The kernel fills the whole view: one turn for the interpreter lock instead of one a piece.
        count = connection.recv_into(view[done:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionError("closed by the other side")
        done += count


def read_exactly(connection: socket.socket, length: int) -> bytes:
    """`length` bytes; the caller has bounded it."""
    data = bytearray(length)
    read_into(connection, memoryview(data))
    return bytes(data)

"""What several kinds of connections need of sockets."""

from __future__ import annotations

import socket


def hang_up(connection: socket.socket) -> None:
    """Ends both directions, so that whoever waits on it wakes up; it is still to be closed."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already

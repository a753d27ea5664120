"""Which address a peer can reach this machine at."""

from __future__ import annotations

import socket


def interface_towards(address: str) -> str:
    """The address of this machine's interface that faces host:port; loopback for loopback."""
    host, port = address.rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting UDP sends nothing
        probe.connect((host, int(port)))
        found: str = probe.getsockname()[0]
    return found

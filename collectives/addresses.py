"""Which machine this is, and which address a peer can reach it at."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

NODE_VARIABLE: Final = "EVERSTEP_NODE"


def interface_towards(address: str) -> str:
    """The address of this machine's interface that faces host:port; loopback for loopback."""
    host, port = address.rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting UDP sends nothing
        probe.connect((host, int(port)))
        found: str = probe.getsockname()[0]
    return found


def node_name() -> str:
    """Of this machine: what its scheduler calls it (the variable EVERSTEP_NODE), else its boot."""
    return os.environ.get(NODE_VARIABLE) or boot_id()


def boot_id() -> str:
    """Of this boot of this machine: the same in all its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

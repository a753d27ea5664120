"""The connections of one pair of members, and how a member dials another. Used by the mesh, under its lock."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from everstep.collectives.messages import Member
from everstep.collectives.transport.arena import Window
from everstep.collectives.transport.channel import Channel, Sent
from everstep.collectives.transport.frames import READ, Header
from everstep.collectives.transport.greeting import Hello, await_acceptance, introduce
from everstep.collectives.transport.listener import Listener

# On loopback two connections let one be filled while the other is emptied; more cost polls (benchmarks/allreduce.py).
TCP_CONNECTIONS = 2
_BUFFER_BYTES = 1 << 20
_KEPT_RELEASES = 2  # one alone would wake the other side for nothing; more would have it write to colder slots
_DIAL_S = 1.0  # a host that lives answers a SYN in one round trip, also where the process it is for is busy


class Link:
    """All connections to one peer. Frames without data go over the first, pieces over all in turn."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.window: Window | None = None
        self._lanes: dict[int, Channel] = {}
        self.channels: list[Channel] = []
        self._turn = 0
        self._releases: list[Header] = []
        self.owes_reads = False  # a READ is among them

    def has(self, lane: int) -> bool:
        return lane in self._lanes

    def add(self, lane: int, channel: Channel, window: Window | None) -> None:
        self._lanes[lane] = channel
        self.channels = [self._lanes[i] for i in sorted(self._lanes)]
        self.window = window

    def complete(self) -> bool:
        return self.window is not None or len(self._lanes) == TCP_CONNECTIONS

    def send(self, header: Header, payload: memoryview | None = None, sent: Sent | None = None) -> Channel:
        channel = self.channels[0]
        if payload is not None and len(self.channels) > 1:
            self._turn = (self._turn + 1) % len(self.channels)
            channel = self.channels[self._turn]
        if self._releases:
            channel.send([*self._releases, header], payload, sent)
            self._releases.clear()
            self.owes_reads = False
        else:
            channel.send([header], payload, sent)
        return channel

    def release(self, header: Header) -> Channel | None:
        """Says that shared memory was read, with the next frame or when enough have come together."""
        self._releases.append(header)
        self.owes_reads = self.owes_reads or header.kind == READ
        return self.flush_releases() if len(self._releases) >= _KEPT_RELEASES else None

    def flush_releases(self) -> Channel:
        self.owes_reads = False
        return self.send(self._releases.pop())

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


def shares_memory(mine: str, member: Member) -> bool:
    """Whether `member` is on this host: its Unix socket can be reached from here."""
    return bool(member.local) and host_of(member) == mine.split("/", 1)[0]


def host_of(member: Member) -> str:
    """Of members that share memory it is the same; "" of one that never does."""
    return member.local.split("/", 1)[0]


def dial(
    member: Member,
    hello: Hello,
    listener: Listener,
    local: bool,
    deadline: float,
    watch: Callable[[socket.socket], None],
) -> tuple[socket.socket, Window | None]:
    """A connection that the other side has accepted. Raises HandshakeRefused, ProtocolError or OSError.

    `watch` is told of the socket, so that an abort can shut it down from another thread.
    """
    if local:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: str | tuple[str, int] = "\0" + member.local.split("/", 1)[1]
    else:
        host, port = member.address.rsplit(":", 1)
        connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        target = (host.strip("[]"), int(port))
    watch(connection)
    try:
        connection.settimeout(max(0.01, min(_DIAL_S, deadline - time.monotonic())))
        connection.connect(target)
        if not local:
            tune(connection)
        introduce(connection, hello, listener.token, deadline)
        await_acceptance(connection, deadline)
        window = listener.swap_arenas(connection, first=True) if local else None
    except BaseException:
        connection.close()
        raise
    return connection, window


def tune(connection: socket.socket) -> None:
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)

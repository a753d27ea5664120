"""One data connection without blocking: frames out of its bytes, bytes out of its queue.

A channel belongs to the engine of one mesh and is used under its lock. It knows nothing of operations: `deliver`
is asked where a frame's payload goes, and told when it is there.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from everstep.collectives.transport import frames
from everstep.collectives.transport.frames import Header, ProtocolError
from everstep.collectives.transport.sockets import hang_up

_READ_BYTES = 16 << 10
_MAX_IOVECS = 64
_TCP_INFO_BYTES = 64
Sent = Callable[[], None]


class Receiver(Protocol):
    """What a channel does with frames; both are called under the mesh's lock."""

    def place(self, peer: int, header: Header) -> memoryview | None:
        """Where the payload goes; None: it is read and dropped. Raises ProtocolError."""

    def deliver(self, peer: int, header: Header, payload: memoryview | None) -> None:
        """The frame is complete. Raises ProtocolError."""


class Channel:
    def __init__(self, connection: socket.socket, peer: int, view: tuple[int, int], receiver: Receiver) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.peer = peer
        self.tcp = connection.family != socket.AF_UNIX
        self._view = view
        self._receiver = receiver
        self._buffer = bytearray(_READ_BYTES)
        self._window = memoryview(self._buffer)
        self._have = 0  # bytes at the start of the buffer that belong to frames not taken yet
        self._header: Header | None = None  # whose payload is being read
        self._into: memoryview | None = None
        self._left = 0
        self._queue: deque[tuple[memoryview, Sent | None]] = deque()
        self._waiting_since: float | None = None  # for an acknowledgement

    # ---- out --------------------------------------------------------------------------------------------

    def send(self, headers: Sequence[Header], payload: memoryview | None = None, sent: Sent | None = None) -> None:
        """Queues frames, the last one with the payload, which must not change until `sent` is called.

        Raises the socket's OSError.
        """
        head = memoryview(b"".join([frames.pack(self._view, header) for header in headers]))
        if payload is None and not self._queue:
            try:
                done = self.socket.send(head)
            except BlockingIOError:
                done = 0
            if done == len(head):
                if sent is not None:
                    sent()
                return
            head = head[done:]
        self._queue.append((head, sent if payload is None else None))
        if payload is not None:
            self._queue.append((payload, sent))

    @property
    def queued(self) -> int:
        """Frames and payloads that the kernel has not taken yet."""
        return len(self._queue)

    @property
    def pending(self) -> bool:
        return bool(self._queue)

    def flush(self) -> None:
        """Writes what the kernel takes."""
        while self._queue:
            vectors = [item[0] for item, _ in zip(self._queue, range(_MAX_IOVECS), strict=False)]
            try:
                done = self.socket.sendmsg(vectors)
            except BlockingIOError:
                return
            whole = sum(map(len, vectors)) == done
            while done or (self._queue and not len(self._queue[0][0])):
                data, sent = self._queue[0]
                if done < len(data):
                    self._queue[0] = (data[done:], sent)
                    break
                done -= len(data)
                self._queue.popleft()
                if sent is not None:
                    sent()
            if not whole:
                return

    # ---- in ---------------------------------------------------------------------------------------------

    def receive(self, budget: int = 8 << 20) -> None:
        """Reads what is there, up to about `budget` bytes. Raises ProtocolError or OSError (EOF: ConnectionError)."""
        while budget > 0:
            if self._header is not None and not self._read_payload():
                return
            try:
                got = self.socket.recv_into(self._window[self._have :])
            except BlockingIOError:
                return
            if not got:
                raise ConnectionError("closed by the other side")
            budget -= got
            self._have += got
            self._take()
            if self._header is None and self._have < _READ_BYTES // 2 and got < _READ_BYTES // 2:
                return  # the poll says when there is more
            if self._header is not None:
                budget -= self._left

    def _take(self) -> None:
        """Every whole frame in the buffer; of a payload that is not whole, what there is."""
        at = 0
        while self._have - at >= frames.HEADER_BYTES:
            header = frames.unpack(self._view, self._buffer, at)
            at += frames.HEADER_BYTES
            length = frames.payload_bytes(header)
            if not length:
                self._receiver.deliver(self.peer, header, None)
                continue
            into = self._receiver.place(self.peer, header)
            part = min(length, self._have - at)
            if into is not None:
                into[:part] = self._window[at : at + part]
            at += part
            if part < length:
                self._header, self._into, self._left = header, into, length - part
                self._have = 0
                return
            self._receiver.deliver(self.peer, header, into)
        if at:
            rest = self._have - at
            self._window[:rest] = bytes(self._window[at : self._have])
            self._have = rest

    def _read_payload(self) -> bool:
        """True when the payload that was begun is complete and delivered."""
        while self._left:
            if self._into is None:
                target = self._window[: min(self._left, _READ_BYTES)]  # dropped: the buffer is empty meanwhile
            else:
                target = self._into[len(self._into) - self._left :]
            try:
                got = self.socket.recv_into(target)
            except BlockingIOError:
                return False
            if not got:
                raise ConnectionError("closed by the other side")
            self._left -= got
        header, into = self._header, self._into
        assert header is not None
        self._header = self._into = None
        self._receiver.deliver(self.peer, header, into)
        return True

    def forget(self, dead: Callable[[Header], bool]) -> None:
        """A payload that is being read, if `dead(its header)`, is read on and dropped: its place is gone."""
        if self._header is not None and dead(self._header):
            self._into = None

    # ---- state of the path ------------------------------------------------------------------------------

    def unacknowledged_s(self, now: float) -> float:
        """Seconds since the other host acknowledged anything while something is under way, as far as was looked.

        A host that lives acknowledges even where its process does not read, so a busy process is no cut link.
        """
        if not self.tcp:
            return 0.0
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        probes = info[3]
        (unacked,) = struct.unpack_from("=I", info, 24)
        (last_ack_ms,) = struct.unpack_from("=I", info, 56)
        if not unacked and not probes:
            self._waiting_since = None
            return 0.0
        if self._waiting_since is None:  # the last acknowledgement may be of long ago, when nothing was sent
            self._waiting_since = now
        return float(min(last_ack_ms / 1000, now - self._waiting_since))

    def close(self) -> None:
        self._queue.clear()
        self._into = None
        hang_up(self.socket)
        self.socket.close()


__all__ = ["Channel", "ProtocolError", "Receiver"]

"""TCP between the members of one view: tagged frames, one connection a pair, threads that block.

A `Listener` lives as long as its process; a `Mesh` belongs to one view and its connections die with it, so a
frame of an older view cannot arrive ([Note: views fence everything]). A member's reader threads put frames
where `recv` finds them; a sender thread a peer writes what `send` queued, so neither side can block the other
by the order of its operations. `abort` ends every pending and later operation with PeerLost; it may be called
from any thread.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from everstep.collectives.errors import CollectiveTimeout, HandshakeRefused, PeerLost
from everstep.collectives.handshake import (
    NONCE_BYTES,
    PROOF_BYTES,
    PROTOCOL_VERSION,
    new_nonce,
    proof,
    proof_matches,
)
from everstep.collectives.messages import View, ViewId
from everstep.collectives.transport.sockets import read_exactly, read_into

_MAGIC = b"EVST"
# magic, version, epoch, view number, rank of the caller, nonce
_HELLO = struct.Struct(f"<4sHIIi{NONCE_BYTES}s")
_ANSWER = struct.Struct(f"<{NONCE_BYTES}s{PROOF_BYTES}s")
_FRAME = struct.Struct("<IIQQ")  # epoch, view number, tag, length
MAX_FRAME_BYTES = 1 << 31
HANDSHAKE_TIMEOUT_S = 10.0
_BUFFER_BYTES = 4 << 20

Buffer = bytes | bytearray | memoryview


class Listener:
    """Accepts connections for the views of one member; hands each to the mesh of its view.

    A connection for a view that this side has not heard of yet waits up to HANDSHAKE_TIMEOUT_S for it.
    """

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        self._socket = socket.create_server((host, 0), backlog=512)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._condition = threading.Condition()
        self._mesh: Mesh | None = None
        self._closed = False
        self._greeting: dict[socket.socket, threading.Thread] = {}
        self._accepting = threading.Thread(target=self._accept, name="mesh-accept", daemon=True)
        self._accepting.start()

    def expect(self, mesh: Mesh | None) -> None:
        """From now on connections of `mesh`'s view are its own; older ones are refused."""
        with self._condition:
            self._mesh = mesh
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._accepting.join(2)
        with self._condition:
            greeting = dict(self._greeting)
        for connection, thread in greeting.items():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(2)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._greet, args=(connection,), name="mesh-greet", daemon=True)
            with self._condition:
                self._greeting[connection] = thread
            thread.start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            self._admit(connection)
        except (OSError, HandshakeRefused):
            connection.close()
        finally:
            with self._condition:
                del self._greeting[connection]

    def _admit(self, connection: socket.socket) -> None:
        # One deadline for all of it: a caller that drips bytes would else hold its thread for minutes.
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        hello = _read_by(deadline, connection, _HELLO.size)
        magic, version, epoch, number, rank, nonce = _HELLO.unpack(hello)
        if magic != _MAGIC or version != PROTOCOL_VERSION:
            raise HandshakeRefused(f"magic {magic!r} version {version}")
        context = _context(ViewId(epoch, number), rank)
        mine = new_nonce()
        connection.sendall(_ANSWER.pack(mine, proof(self._token, "server", nonce, mine, context)))
        given = _read_by(deadline, connection, PROOF_BYTES)
        if not proof_matches(given, self._token, "client", nonce, mine, context):
            raise HandshakeRefused("wrong token")
        mesh = self._mesh_of(ViewId(epoch, number))
        if mesh is None:
            raise HandshakeRefused(f"view {epoch}.{number} is not mine")
        connection.sendall(b"\x01")
        mesh.adopt(rank, connection)

    def _mesh_of(self, id: ViewId) -> Mesh | None:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        with self._condition:
            while not self._closed:
                if self._mesh is not None and self._mesh.view.id == id:
                    return self._mesh
                if self._mesh is not None and self._mesh.view.id > id:
                    return None
                if not self._condition.wait(max(0.0, deadline - time.monotonic())):
                    return None
        return None


class Mesh:
    """Connections of one member to all others of a view. Rank r dials every lower rank.

    `on_broken(rank, error)` is told, from a mesh thread, when a connection breaks while the mesh is in use.
    """

    def __init__(self, view: View, rank: int, token: str, on_broken: Callable[[int, str], None]) -> None:
        self.view = view
        self.rank = rank
        self._token = token
        self._on_broken = on_broken
        self._condition = threading.Condition()
        self._links: dict[int, _Link] = {}
        self._frames: dict[tuple[int, int], bytearray] = {}
        self._error: BaseException | None = None
        self._closed = False

    @property
    def size(self) -> int:
        return len(self.view.members)

    def connect(self, timeout_s: float) -> None:
        """Dials the lower ranks and waits for the higher ones. Raises PeerLost or CollectiveTimeout."""
        deadline = time.monotonic() + timeout_s
        for peer in range(self.rank):
            self._dial(peer, deadline)
        with self._condition:
            while len(self._links) < self.size - 1:
                self._check()
                if not self._condition.wait(max(0.0, deadline - time.monotonic())):
                    there = sorted(set(range(self.size)) - set(self._links) - {self.rank})
                    raise CollectiveTimeout(
                        f"rank {self.rank}: connecting view {self.view.id}: ranks {there} did not come within "
                        f"{timeout_s:g} s (timeouts.stall_s)"
                    )

    def send(self, peer: int, tag: int, buffers: Sequence[Buffer]) -> None:
        """Queues one frame; `buffers` must not change until the step is over. Never blocks."""
        with self._condition:
            self._check()
            link = self._links[peer]
        link.put(tag, buffers)

    def recv(self, peer: int, tag: int, timeout_s: float) -> bytearray:
        """The payload of the frame `tag` from `peer`. Raises PeerLost or CollectiveTimeout."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while (frame := self._frames.pop((peer, tag), None)) is None:
                self._check()
                if not self._condition.wait(max(0.0, deadline - time.monotonic())):
                    raise CollectiveTimeout(
                        f"rank {self.rank}: waiting for rank {peer}, tag {tag:#x}, view {self.view.id}: nothing for "
                        f"{timeout_s:g} s (timeouts.stall_s)"
                    )
        return frame

    def flush(self) -> None:
        """Waits until everything queued has been handed to the kernel, so that buffers may be reused.

        Raises PeerLost where it was not.
        """
        for link in list(self._links.values()):
            link.drain(self._check)
        self._check()  # a link that was closed has nothing queued either

    def abort(self, error: BaseException) -> None:
        """Ends every pending and later operation with `error`; idempotent, any thread."""
        with self._condition:
            if self._error is None:
                self._error = error
            self._condition.notify_all()
            links = list(self._links.values())
        for link in links:
            link.close()

    def close(self) -> None:
        """Ends the mesh and its threads. What was sent arrives only if `flush` came before."""
        with self._condition:
            self._closed = True
        self.abort(PeerLost(f"view {self.view.id} is over"))
        for link in list(self._links.values()):
            link.join()

    # ---- used by the listener and the links -------------------------------------------------------------

    def adopt(self, peer: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        with self._condition:
            stranger = peer == self.rank or not 0 <= peer < self.size
            if self._error is not None or self._closed or stranger or peer in self._links:
                connection.close()
                return
            self._links[peer] = _Link(self, peer, connection)
            self._condition.notify_all()

    def deliver(self, peer: int, tag: int, payload: bytearray) -> None:
        with self._condition:
            if (peer, tag) in self._frames:
                raise ValueError(f"rank {peer} sent tag {tag:#x} twice")
            self._frames[(peer, tag)] = payload
            self._condition.notify_all()

    def broken(self, peer: int, error: str) -> None:
        with self._condition:
            if self._closed or self._error is not None:
                return
        self.abort(PeerLost(f"rank {self.rank} lost its connection to rank {peer} in view {self.view.id}: {error}"))
        self._on_broken(peer, error)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _dial(self, peer: int, deadline: float) -> None:
        address = self.view.members[peer].address
        host, port = address.rsplit(":", 1)
        context = _context(self.view.id, self.rank)
        connection = None
        try:
            connection = socket.create_connection((host, int(port)), max(0.1, deadline - time.monotonic()))
            connection.settimeout(HANDSHAKE_TIMEOUT_S)
            nonce = new_nonce()
            id = self.view.id
            connection.sendall(_HELLO.pack(_MAGIC, PROTOCOL_VERSION, id.epoch, id.number, self.rank, nonce))
            theirs, given = _ANSWER.unpack(read_exactly(connection, _ANSWER.size))
            if not proof_matches(given, self._token, "server", nonce, theirs, context):
                raise HandshakeRefused(f"{address} does not know this run's token")
            connection.sendall(proof(self._token, "client", nonce, theirs, context))
            self._await_acceptance(connection)
        except (OSError, HandshakeRefused, PeerLost) as error:
            if connection is not None:
                connection.close()
            with self._condition:
                self._check()
            self.broken(peer, f"connecting to {address}: {error}")
            with self._condition:
                self._check()
            raise PeerLost(f"rank {self.rank}: connecting to rank {peer}: {error}") from None
        self.adopt(peer, connection)

    def _await_acceptance(self, connection: socket.socket) -> None:
        """The other side may still be restoring; an abort must not wait for it."""
        connection.settimeout(0.2)
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        while True:
            with self._condition:
                self._check()
            try:
                if connection.recv(1) == b"\x01":
                    return
                raise HandshakeRefused("the other side is in another view")
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise


class _Link:
    """One connection: a reader thread and a sender thread."""

    def __init__(self, mesh: Mesh, peer: int, connection: socket.socket) -> None:
        self._mesh = mesh
        self._peer = peer
        self._socket = connection
        self._condition = threading.Condition()
        self._queue: deque[tuple[int, Sequence[Buffer]]] = deque()
        self._busy = False
        self._closing = False
        names = f"mesh-{mesh.rank}-{peer}"
        self._reader = threading.Thread(target=self._read, name=f"{names}-read", daemon=True)
        self._sender = threading.Thread(target=self._send, name=f"{names}-send", daemon=True)
        self._reader.start()
        self._sender.start()

    def put(self, tag: int, buffers: Sequence[Buffer]) -> None:
        with self._condition:
            self._queue.append((tag, buffers))
            self._condition.notify_all()

    def drain(self, check: Callable[[], None]) -> None:
        with self._condition:
            while self._queue or self._busy:
                check()
                self._condition.wait(0.5)

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._queue.clear()
            self._condition.notify_all()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        for thread in (self._reader, self._sender):
            if thread is not threading.current_thread():
                thread.join(5)
        self._socket.close()

    def _read(self) -> None:
        id = self._mesh.view.id
        header = bytearray(_FRAME.size)
        try:
            while True:
                read_into(self._socket, memoryview(header))
                epoch, number, tag, length = _FRAME.unpack(header)
                if (epoch, number) != (id.epoch, id.number) or length > MAX_FRAME_BYTES:
                    raise ConnectionError(f"bad frame: view {epoch}.{number}, {length} bytes")
                payload = bytearray(length)
                read_into(self._socket, memoryview(payload))
                self._mesh.deliver(self._peer, tag, payload)
        except (OSError, ValueError) as error:
            self._mesh.broken(self._peer, str(error) or type(error).__name__)

    def _send(self) -> None:
        id = self._mesh.view.id
        try:
            while True:
                with self._condition:
                    self._busy = False
                    self._condition.notify_all()
                    while not self._queue:
                        if self._closing:
                            return
                        self._condition.wait()
                    tag, buffers = self._queue.popleft()
                    self._busy = True
                views = [memoryview(b).cast("B") for b in buffers]
                header = _FRAME.pack(id.epoch, id.number, tag, sum(len(v) for v in views))
                _send_all(self._socket, [memoryview(header), *views])
        except OSError as error:
            with self._condition:
                self._busy = False
                self._queue.clear()
                self._condition.notify_all()
            self._mesh.broken(self._peer, str(error))


def _context(id: ViewId, rank: int) -> bytes:
    return f"mesh {id} {rank}".encode()


def _read_by(deadline: float, connection: socket.socket, length: int) -> bytes:
    """Raises TimeoutError at the deadline, however steadily the bytes come."""
    data = b""
    while len(data) < length:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{len(data)} of {length} bytes came in time")
        connection.settimeout(left)
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionError("closed by the other side")
        data += piece
    return data


_MAX_IOVECS = 512


def _send_all(connection: socket.socket, views: list[memoryview]) -> None:
    index = 0
    while index < len(views):
        sent = connection.sendmsg(views[index : index + _MAX_IOVECS])
        while index < len(views) and sent >= len(views[index]):
            sent -= len(views[index])
            index += 1
        if index < len(views) and sent:
            views[index] = views[index][sent:]

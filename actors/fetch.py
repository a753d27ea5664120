"""Segments across domains: a manager serves its sealed segments, ranks and other managers ask for them.

One connection, any number of requests, answered in turn; mutual proof of the token first. The server reads only files
that its `Shelf` knows, sealed ones only ([Note: segment layout]), and checks bounds against the segment. Whoever asks
checks every fragment that it gets whole against its checksum, and has the server check the segment first where it
gets a part of one: no byte is used that nobody has checked.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import xxhash

from everstep.collectives.errors import HandshakeRefused
from everstep.collectives.handshake import NONCE_BYTES, PROOF_BYTES, new_nonce, proof, proof_matches
from everstep.collectives.transport.sockets import hang_up
from everstep.storage.errors import SegmentDamaged, StorageError
from everstep.storage.index import Fragment
from everstep.storage.parity import Part
from everstep.storage.planner import Copy
from everstep.storage.segment import SegmentMap, payload, read_seal

_LENGTH = struct.Struct("<Q")
_MAX_REQUEST_BYTES = 64 << 20
_MAX_ANSWER_BYTES = 256 << 20  # of a described segment: its index
_MAX_CONNECTIONS = 512
_CONTEXT = b"fetch"
_TIMEOUT_S = 20.0
_GOOD, _BAD = b"\x01", b"\x00"


class Range(msgspec.Struct, frozen=True, array_like=True):
    locator: str
    offset: int
    nbytes: int


class Ranges(msgspec.Struct, frozen=True, tag="ranges"):
    """`verify`: every checksum of the segments is to be right before a byte is sent."""

    items: list[Range]
    verify: bool = False


class Await(msgspec.Struct, frozen=True, tag="await"):
    """Waits until the domain has sealed this version."""

    epoch: int
    number: int
    step: int


class Sealed(msgspec.Struct, frozen=True):
    locator: str
    payload_bytes: int
    index: bytes


Request = Ranges | Await


class Shelf(Protocol):
    """The segments of a domain. Any thread."""

    def resolve(self, locator: str) -> str | None:
        """The path of a segment, None for what this domain does not have."""

    def verified(self, locator: str) -> None:
        """Raises SegmentDamaged where a byte of it is not what its seal says."""

    def await_sealed(self, version: tuple[int, int, int]) -> Sealed:
        """Waits for (epoch, number, step). Raises StorageError where it will not come."""


class FetchServer:
    """Serves what is on a shelf; a thread a connection."""

    def __init__(self, host: str, token: str, shelf: Shelf) -> None:
        self._token = token
        self._shelf = shelf
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="fetch-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the listener and every connection."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                hang_up(connection)
        hang_up(self._socket)
        self._socket.close()
        self._thread.join(2)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with self._lock:
                refused = self._closed or len(self._open) >= _MAX_CONNECTIONS
                if not refused:
                    self._open.add(connection)
            if refused:
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="fetch-serve", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_TIMEOUT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs = read_exactly(connection, NONCE_BYTES)
            mine = new_nonce()
            connection.sendall(mine + proof(self._token, "server", theirs, mine, _CONTEXT))
            if not proof_matches(
                read_exactly(connection, PROOF_BYTES), self._token, "client", theirs, mine, _CONTEXT
            ):
                return
            while True:
                connection.settimeout(None)  # between requests; `close` hangs up
                first = read_exactly(connection, 1)
                connection.settimeout(_TIMEOUT_S)
                (length,) = _LENGTH.unpack(first + read_exactly(connection, _LENGTH.size - 1))
                if length > _MAX_REQUEST_BYTES:
                    return
                request = msgspec.msgpack.decode(read_exactly(connection, length), type=Request)
                if not self._answer(connection, request):
                    return
        except (OSError, msgspec.MsgspecError, ValueError):  # ValueError: text that is not UTF-8
            return
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, request: Request) -> bool:
        try:
            if isinstance(request, Await):
                said = msgspec.msgpack.encode(self._shelf.await_sealed((request.epoch, request.number, request.step)))
                connection.sendall(_GOOD + _LENGTH.pack(len(said)) + said)
            else:
                self._send(connection, request)
        except StorageError as error:
            text = str(error).encode()
            connection.sendall(_BAD + _LENGTH.pack(len(text)) + text)
            return False
        return True

    def _send(self, connection: socket.socket, request: Ranges) -> None:
        maps: dict[str, SegmentMap] = {}
        try:
            for item in request.items:
                if item.locator not in maps:
                    path = self._shelf.resolve(item.locator)
                    if path is None:
                        raise SegmentDamaged(f"there is no segment {item.locator!r} here")
                    if request.verify:
                        self._shelf.verified(item.locator)
                    maps[item.locator] = SegmentMap(path, writable=False)
                    if read_seal(maps[item.locator]) is None:
                        raise SegmentDamaged(f"segment {item.locator!r} is not sealed")
                with payload(maps[item.locator], item.offset, item.nbytes) as data:
                    connection.sendall(_GOOD)
                    connection.sendall(data)
        finally:
            for segment in maps.values():
                segment.close()


class Asker:
    """A connection to the manager at `address`; one thread. Raises HandshakeRefused or OSError."""

    def __init__(self, address: str, token: str, timeout_s: float = _TIMEOUT_S) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), _TIMEOUT_S)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce = new_nonce()
            self._socket.sendall(nonce)
            answer = read_exactly(self._socket, NONCE_BYTES + PROOF_BYTES)
            theirs, given = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
            if not proof_matches(given, token, "server", nonce, theirs, _CONTEXT):
                raise HandshakeRefused(f"{address} does not know this run's token")
            self._socket.sendall(proof(token, "client", nonce, theirs, _CONTEXT))
            self._socket.settimeout(timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, request: Request) -> None:
        data = msgspec.msgpack.encode(request)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def read(self, into: memoryview) -> None:
        """The next range. Raises SegmentDamaged (refused), OSError (the manager is gone)."""
        self._status()
        read_into(self._socket, into)

    def sealed(self) -> Sealed:
        """The answer to an `Await`. Raises SegmentDamaged where it will not come, OSError."""
        self._status()
        (length,) = _LENGTH.unpack(read_exactly(self._socket, _LENGTH.size))
        if length > _MAX_ANSWER_BYTES:
            raise SegmentDamaged(f"an index of {length} bytes; at most {_MAX_ANSWER_BYTES} are taken")
        return msgspec.msgpack.decode(read_exactly(self._socket, length), type=Sealed)

    def _status(self) -> None:
        if read_exactly(self._socket, 1) != _GOOD:
            (length,) = _LENGTH.unpack(read_exactly(self._socket, _LENGTH.size))
            raise SegmentDamaged(read_exactly(self._socket, min(length, 4096)).decode(errors="replace"))

    def hang_up(self) -> None:
        """Ends what another thread waits for here."""
        hang_up(self._socket)

    def close(self) -> None:
        self._socket.close()


class RemoteReader(NamedTuple):
    """One segment of another domain, as storage/parity.py reads it."""

    asker: Asker
    locator: str
    verify: bool = False

    def ask(self, parts: Sequence[Part]) -> None:
        self.asker.ask(Ranges([Range(self.locator, part.offset, part.nbytes) for part in parts], self.verify))

    def read(self, into: memoryview) -> None:
        self.asker.read(into)


def fetch(address: str, token: str, copies: Sequence[tuple[Copy, memoryview]]) -> None:
    """Fills each buffer from the manager at `address`. Fragments that come whole are checked against their checksums;
    where one comes in part, that manager checks the segments first.

    Raises SegmentDamaged (refused, or a wrong checksum) with the locator, OSError (the manager is gone).
    """
    asker = Asker(address, token)
    try:
        ranges = [Range(c.source.locator, c.offset, c.nbytes) for c, _ in copies]
        asker.ask(Ranges(ranges, verify=any(cut_fragments(c) for c, _ in copies)))
        for copy, buffer in copies:
            try:
                asker.read(buffer)
            except SegmentDamaged as error:
                raise SegmentDamaged(str(error), copy.source.locator) from error
            check(copy, buffer)
    finally:
        asker.close()


def fetch_local(path: str, copies: Sequence[tuple[Copy, memoryview]]) -> None:
    """The same out of this domain's own segment file."""
    checked: set[Fragment] = set()
    with SegmentMap(path, writable=False) as segment:
        if read_seal(segment) is None:
            raise SegmentDamaged(f"segment {path} is not sealed")
        for copy, buffer in copies:
            with payload(segment, copy.offset, copy.nbytes) as data:
                buffer[:] = data
            check(copy, buffer)
            for f in set(cut_fragments(copy)) - checked:
                with payload(segment, f.offset, (f.stop - f.start) * copy.itemsize) as data:
                    _compare(copy, data, f.checksum)
                checked.add(f)


def cut_fragments(copy: Copy) -> list[Fragment]:
    """The fragments of which only a part is copied: its bytes alone cannot be checked."""
    return [f for f in copy.fragments if f.checksum and not (copy.start <= f.start and f.stop <= copy.stop)]


def check(copy: Copy, buffer: memoryview) -> None:
    for start, stop, checksum in copy.whole_fragments():
        _compare(copy, buffer[start:stop], checksum)


def _compare(copy: Copy, data: memoryview, checksum: int) -> None:
    if xxhash.xxh3_64_intdigest(data) != checksum:
        raise SegmentDamaged(
            f"{copy.name}/{copy.kind}[{copy.start}:{copy.stop}] from {copy.source.locator} has a wrong checksum",
            copy.source.locator,
        )


def read_into(connection: socket.socket, view: memoryview) -> None:
    """Fills `view`. Raises ConnectionError, or TimeoutError under the socket's own timeout."""
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

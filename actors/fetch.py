"""Segments across domains: a manager serves byte ranges of its sealed segments, a rank asks for them.

One connection, one request, one answer; mutual proof of the token first. The server reads only files that its
`resolve` knows, sealed ones only ([Note: segment layout]), and checks bounds against the segment; the asker checks
every fragment that it gets whole against its checksum.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence

import msgspec
import xxhash

from everstep.collectives.errors import HandshakeRefused
from everstep.collectives.handshake import NONCE_BYTES, PROOF_BYTES, new_nonce, proof, proof_matches
from everstep.collectives.transport.sockets import hang_up
from everstep.storage.errors import SegmentDamaged, StorageError
from everstep.storage.planner import Copy
from everstep.storage.segment import SegmentMap, payload, read_seal

_LENGTH = struct.Struct("<Q")
_MAX_REQUEST_BYTES = 64 << 20
_CONTEXT = b"fetch"
_TIMEOUT_S = 20.0


class Range(msgspec.Struct, frozen=True, array_like=True):
    locator: str
    offset: int
    nbytes: int


class FetchServer:
    """Serves segments. `resolve(locator)` gives a path, or None for what this domain does not have."""

    def __init__(self, host: str, token: str, resolve: Callable[[str], str | None]) -> None:
        self._token = token
        self._resolve = resolve
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="fetch-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        hang_up(self._socket)
        self._socket.close()
        self._thread.join(2)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="fetch-serve", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(_TIMEOUT_S)
                theirs = read_exactly(connection, NONCE_BYTES)
                mine = new_nonce()
                connection.sendall(mine + proof(self._token, "server", theirs, mine, _CONTEXT))
                if not proof_matches(
                    read_exactly(connection, PROOF_BYTES), self._token, "client", theirs, mine, _CONTEXT
                ):
                    return
                (length,) = _LENGTH.unpack(read_exactly(connection, _LENGTH.size))
                if length > _MAX_REQUEST_BYTES:
                    return
                self._answer(connection, msgspec.msgpack.decode(read_exactly(connection, length), type=list[Range]))
            except (OSError, msgspec.MsgspecError, ValueError):  # ValueError: text that is not UTF-8
                return

    def _answer(self, connection: socket.socket, ranges: Sequence[Range]) -> None:
        maps: dict[str, SegmentMap] = {}
        try:
            for item in ranges:
                try:
                    if item.locator not in maps:
                        path = self._resolve(item.locator)
                        if path is None:
                            raise SegmentDamaged(f"there is no segment {item.locator!r} here")
                        maps[item.locator] = SegmentMap(path, writable=False)
                        if read_seal(maps[item.locator]) is None:
                            raise SegmentDamaged(f"segment {item.locator!r} is not sealed")
                    data = payload(maps[item.locator], item.offset, item.nbytes)
                except StorageError as error:
                    text = str(error).encode()
                    connection.sendall(b"\x00" + _LENGTH.pack(len(text)) + text)
                    return
                connection.sendall(b"\x01")
                connection.sendall(data)
                data.release()
        finally:
            for segment in maps.values():
                segment.close()


def fetch(address: str, token: str, copies: Sequence[tuple[Copy, memoryview]]) -> None:
    """Fills each buffer from the manager at `address`; whole fragments are checked against their checksums.

    Raises SegmentDamaged (refused, or a wrong checksum), OSError (the manager is gone).
    """
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), _TIMEOUT_S) as connection:
        nonce = new_nonce()
        connection.sendall(nonce)
        answer = read_exactly(connection, NONCE_BYTES + PROOF_BYTES)
        theirs, given = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        if not proof_matches(given, token, "server", nonce, theirs, _CONTEXT):
            raise HandshakeRefused(f"{address} does not know this run's token")
        request = msgspec.msgpack.encode([Range(c.source.locator, c.offset, c.nbytes) for c, _ in copies])
        connection.sendall(proof(token, "client", nonce, theirs, _CONTEXT) + _LENGTH.pack(len(request)) + request)
        for copy, buffer in copies:
            if read_exactly(connection, 1) != b"\x01":
                (length,) = _LENGTH.unpack(read_exactly(connection, _LENGTH.size))
                raise SegmentDamaged(read_exactly(connection, min(length, 4096)).decode(errors="replace"))
            read_into(connection, buffer)
            check(copy, buffer)


def fetch_local(path: str, copies: Sequence[tuple[Copy, memoryview]]) -> None:
    """The same out of this domain's own segment file."""
    with SegmentMap(path, writable=False) as segment:
        if read_seal(segment) is None:
            raise SegmentDamaged(f"segment {path} is not sealed")
        for copy, buffer in copies:
            with payload(segment, copy.offset, copy.nbytes) as data:
                buffer[:] = data
            check(copy, buffer)


def check(copy: Copy, buffer: memoryview) -> None:
    for start, stop, checksum in copy.whole_fragments():
        if xxhash.xxh3_64_intdigest(buffer[start:stop]) != checksum:
            raise SegmentDamaged(
                f"{copy.name}/{copy.kind}[{copy.start}:{copy.stop}] from {copy.source.locator} has a wrong checksum"
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

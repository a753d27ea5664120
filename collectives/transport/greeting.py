"""How a data connection begins: who calls, for which view, and a mutual proof of the token.

    caller                                  listener
    magic, version                          ->
    view, rank, callee's rank, lane, nonce  ->
                                            <- nonce, proof
    proof                                   ->
                                            <- accepted, as soon as the listener is in that view
    arena (Unix sockets only)               ->
                                            <- arena

The proofs are bound to view, both ranks and lane, and both nonces are fresh, so nothing of an earlier connection can
be used again, and a port that another member has taken over lets nobody in. Nothing is allocated for a stranger but
these few bytes, and each side has one deadline for all of it. Who does not begin with the magic is dropped at once.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass

from everstep.collectives.addresses import boot_id
from everstep.collectives.errors import HandshakeRefused
from everstep.collectives.handshake import NONCE_BYTES, PROOF_BYTES, PROTOCOL_VERSION, new_nonce, proof, proof_matches
from everstep.collectives.messages import ViewId

_MAGIC = b"EVST"
_START = struct.Struct("<4sH")
_HELLO = struct.Struct(f"<IIIII{NONCE_BYTES}s")
_ANSWER = struct.Struct(f"<{NONCE_BYTES}s{PROOF_BYTES}s")
_ACCEPTED = b"\x01"
_OTHER_VERSION = b"\x02"
_WRONG_TOKEN = b"\x03"
HELLO_TIMEOUT_S = 5.0  # a member sends these bytes at once


@dataclass(frozen=True)
class Hello:
    """Who is calling whom. `lane` numbers the connections of one pair."""

    view: ViewId
    rank: int
    to: int
    lane: int

    @property
    def context(self) -> bytes:
        return f"mesh {self.view} {self.rank} {self.to} {self.lane}".encode()


def host_id() -> str:
    """Of this kernel and network namespace: members with the same one reach each other by Unix sockets."""
    return f"{boot_id()}.{os.stat('/proc/self/ns/net').st_ino}"


def greet(connection: socket.socket, token: str) -> Hello:
    """The listener's side, up to the acceptance. Raises HandshakeRefused or OSError."""
    deadline = time.monotonic() + HELLO_TIMEOUT_S
    magic, version = _START.unpack(read_by(deadline, connection, _START.size))
    if magic != _MAGIC:
        raise HandshakeRefused(f"magic {magic!r}")
    if version != PROTOCOL_VERSION:
        connection.sendall(_OTHER_VERSION + struct.pack("<H", PROTOCOL_VERSION))
        raise HandshakeRefused(f"protocol version {version}, this side speaks {PROTOCOL_VERSION}")
    epoch, number, rank, to, lane, nonce = _HELLO.unpack(read_by(deadline, connection, _HELLO.size))
    hello = Hello(ViewId(epoch, number), rank, to, lane)
    mine = new_nonce()
    connection.sendall(_ACCEPTED + _ANSWER.pack(mine, proof(token, "server", nonce, mine, hello.context)))
    given = read_by(deadline, connection, PROOF_BYTES)
    if not proof_matches(given, token, "client", nonce, mine, hello.context):
        connection.sendall(_WRONG_TOKEN)
        raise HandshakeRefused("wrong token")
    return hello


def accept(connection: socket.socket) -> None:
    connection.sendall(_ACCEPTED)


def introduce(connection: socket.socket, hello: Hello, token: str, deadline: float) -> None:
    """The caller's side, up to its proof. Raises HandshakeRefused (with the reason) or OSError."""
    nonce = new_nonce()
    view = hello.view
    connection.settimeout(max(0.01, deadline - time.monotonic()))
    start = _START.pack(_MAGIC, PROTOCOL_VERSION)
    connection.sendall(start + _HELLO.pack(view.epoch, view.number, hello.rank, hello.to, hello.lane, nonce))
    said = read_by(deadline, connection, 1)
    if said == _OTHER_VERSION:
        (theirs,) = struct.unpack("<H", read_by(deadline, connection, 2))
        raise HandshakeRefused(f"it speaks protocol version {theirs}, this side {PROTOCOL_VERSION}")
    theirs, given = _ANSWER.unpack(read_by(deadline, connection, _ANSWER.size))
    if not proof_matches(given, token, "server", nonce, theirs, hello.context):
        raise HandshakeRefused("it does not know this group's token (token=)")
    connection.sendall(proof(token, "client", nonce, theirs, hello.context))


def await_acceptance(connection: socket.socket, deadline: float) -> None:
    """Raises HandshakeRefused, or TimeoutError where the other side does not enter the view in time."""
    said = read_by(deadline, connection, 1)
    if said != _ACCEPTED:
        raise HandshakeRefused("wrong token (token=)" if said == _WRONG_TOKEN else f"answer {said!r}")


def read_by(deadline: float, connection: socket.socket, length: int) -> bytes:
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

"""A host's watcher: a small process that says which members on its host are dead. Never imports torch.

Members of one group on one host share it. The first one binds an abstract Unix socket, so that there is no second,
and starts this process with it; it ends when it has had no member for half a second. A member connects, both sides
prove the group's token, and the kernel says which process it is. From then on the judge ([Note: liveness]) watches
it; a connection that ends without a death is a member that left.

Threads: the main one serves the socket and beats; the judge's and the uplink's call `_on_dead` and `_greeting`.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from everstep.collectives.group_messages import key_of
from everstep.collectives.handshake import NONCE_BYTES, PROTOCOL_VERSION, new_nonce, proof, proof_matches
from everstep.collectives.liveness import Judge
from everstep.collectives.messages import Beat, Died, Watching, encode
from everstep.collectives.uplink import Uplink

log = logging.getLogger(__name__)

_BEAT_S = 0.25
_IDLE_S = 0.5
_GREETING_S = 5.0
_FIRST_S = 2.0  # for the coordinator, before members are told that they are watched anyway
_MAX_PACKET_BYTES = 4096
_MAX_CONNECTIONS = 4096
_MAX_GREETINGS = 256
_KEPT_DEATHS = 256


class WatcherConfig(msgspec.Struct, frozen=True):
    """Comes through stdin: it holds the token."""

    coordinator: str
    token: str
    domain: str


class Register(msgspec.Struct, frozen=True):
    """A member's first word."""

    version: int
    nonce: bytes
    name: str
    incarnation: str


class Challenge(msgspec.Struct, frozen=True):
    nonce: bytes
    proof: bytes


class Registered(msgspec.Struct, frozen=True):
    refused: str = ""


@dataclass
class _Connection:
    socket: socket.socket
    since: float
    pid: int
    register: Register | None = None
    nonce: bytes = b""
    key: str = ""  # once it is watched
    receive: Callable[[bytes], None] = field(default=lambda data: None)


class Watcher:
    def __init__(self, config: WatcherConfig, listening: socket.socket) -> None:
        self._config = config
        self._listening = listening
        listening.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}
        self._leaving: dict[str, float] = {}  # judged until then: a death closes the connection first
        self._deaths: dict[str, Died] = {}
        self._lock = threading.Lock()
        self._judge = Judge(self._on_dead)
        self._uplink = Uplink(
            config.coordinator, config.token, self._greeting, lambda data: None, _FIRST_S, patient=True
        )

    def run(self) -> None:
        """Until there is nobody left to watch."""
        beat = Beat(self._config.domain)
        idle_since, next_beat = time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            if now >= next_beat:
                self._uplink.send(encode(beat))
                next_beat = now + _BEAT_S
            self._sweep(now)
            if self._connections or self._leaving:
                idle_since = now
            elif now - idle_since > _IDLE_S:
                break
            for key, _ in self._selector.select(min(_BEAT_S, max(0.0, next_beat - now))):
                if key.fileobj is self._listening:
                    self._accept()
                elif (member := self._connections.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                    self._read(member)  # None: it had to make room for one that came after
        self._listening.close()
        self._selector.close()
        self._judge.close()
        self._uplink.close()

    def _greeting(self) -> list[bytes]:
        watching = Watching(self._config.domain, 0, "", os.getpid())
        with self._lock:
            return [encode(watching), *(encode(died) for died in self._deaths.values())]

    def _on_dead(self, key: str, cause: str, detected_ms: float) -> None:
        died = Died(key, cause, detected_ms)
        with self._lock:
            self._deaths[key] = died
            while len(self._deaths) > _KEPT_DEATHS:
                del self._deaths[next(iter(self._deaths))]
        self._uplink.send(encode(died))

    # ---- members ----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:  # gone again, or no descriptors left: who has proved nothing makes room
            self._make_room(0)
            return
        self._make_room(_MAX_GREETINGS)
        connection.setblocking(False)
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if len(self._connections) >= _MAX_CONNECTIONS:
            connection.close()
            return
        self._connections[connection] = _Connection(connection, time.monotonic(), pid)
        self._selector.register(connection, selectors.EVENT_READ)

    def _make_room(self, limit: int) -> None:
        """Drops the oldest stranger where there are over `limit`; a member takes milliseconds."""
        strangers = [member for member in self._connections.values() if not member.key]
        if len(strangers) > limit:
            self._drop(strangers[0])

    def _read(self, member: _Connection) -> None:
        try:
            data = member.socket.recv(_MAX_PACKET_BYTES)
            if not data:
                return self._drop(member)
            if member.register is None:
                self._challenge(member, msgspec.msgpack.decode(data, type=Register))
            elif not member.key:
                self._admit(member, data)
        except BlockingIOError:
            return None
        except (OSError, ValueError, RecursionError) as error:  # msgspec's own are ValueErrors
            log.info("process %d is dropped: %s", member.pid, error)
            self._drop(member)
        return None

    def _challenge(self, member: _Connection, register: Register) -> None:
        if register.version != PROTOCOL_VERSION or len(register.nonce) != NONCE_BYTES:
            text = f"protocol version {register.version}, this host's watcher speaks {PROTOCOL_VERSION}"
            member.socket.send(msgspec.msgpack.encode(Challenge(b"", text.encode())))
            raise ValueError(text)
        member.register, member.nonce = register, new_nonce()
        mine = proof(self._config.token, "watcher", register.nonce, member.nonce)
        member.socket.send(msgspec.msgpack.encode(Challenge(member.nonce, mine)))

    def _admit(self, member: _Connection, given: bytes) -> None:
        register = member.register
        assert register is not None
        if not proof_matches(given, self._config.token, "member", register.nonce, member.nonce):
            raise ValueError("wrong token")
        key = key_of(register.name, register.incarnation)
        refused = ""
        if member.pid == 0 or not self._judge.watch(key, member.pid):
            refused = f"the watcher does not see process {member.pid}"
        else:
            member.key = key
            self._leaving.pop(key, None)
        member.socket.send(msgspec.msgpack.encode(Registered(refused)))

    def _drop(self, member: _Connection) -> None:
        self._selector.unregister(member.socket)
        del self._connections[member.socket]
        member.socket.close()
        if member.key:
            self._leaving[member.key] = time.monotonic() + _IDLE_S

    def _sweep(self, now: float) -> None:
        """Ends what is over: members that left, those that are dead, strangers that never proved anything."""
        for key, until in list(self._leaving.items()):
            if now > until:
                del self._leaving[key]
                self._judge.forget(key)
        for member in list(self._connections.values()):
            dead = bool(member.key) and not self._judge.alive(member.key)
            if dead or (not member.key and now - member.since > _GREETING_S):
                self._drop(member)


def main(fd: int) -> None:
    """Entry point of the process: `fd` is the listening socket, the config comes through stdin."""
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WatcherConfig)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    Watcher(config, socket.socket(fileno=fd)).run()
    os._exit(0)  # nothing is left to be told, and gRPC's threads must not keep a process that nobody knows

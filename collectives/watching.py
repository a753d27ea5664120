"""A member's side of its host's watcher: has one started, is watched by it, and has another started if it dies.

[Note: one watcher a host] Whoever binds the abstract Unix socket starts the process and hands the listening socket to
it, so the others connect at once, nobody polls, and there is never a second. The name of the socket holds what must
be the same: coordinator, token (hashed), network and process namespaces.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

import everstep
from everstep.collectives.addresses import boot_id
from everstep.collectives.errors import CoordinatorLost, HandshakeRefused
from everstep.collectives.handshake import PROTOCOL_VERSION, new_nonce, proof, proof_matches
from everstep.collectives.transport.sockets import hang_up
from everstep.collectives.watcher import Challenge, Register, Registered, WatcherConfig

log = logging.getLogger(__name__)

_ANSWER_S = 10.0
_RETRY_S = 0.05
# Leaves at once, so that the watcher is nobody's child: it must not die with, or be waited for by, who started it.
_LAUNCH = """
import json, os, sys
if os.fork(): os._exit(0)
os.chdir("/")
sys.path[:] = json.loads(sys.argv[1])
from everstep.collectives.watcher import main
main(int(sys.argv[2]))
"""


def domain_of_this_host() -> str:
    """What one watcher can see: this boot of this machine, in these namespaces."""
    spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
    return f"{socket.gethostname()}-{hashlib.sha256('|'.join((boot_id(), *spaces)).encode()).hexdigest()[:12]}"


class Watch:
    """This process is watched as NAME/INCARNATION from the constructor's return until `close`."""

    def __init__(self, coordinator: str, token: str, name: str, incarnation: str, timeout_s: float) -> None:
        """Raises HandshakeRefused or CoordinatorLost."""
        self.domain = domain_of_this_host()
        self._config = WatcherConfig(coordinator, token, self.domain)
        self._name, self._incarnation = name, incarnation
        text = f"{coordinator}|{token}|{self.domain}|{PROTOCOL_VERSION}"
        self._address = "\0everstep-watch-" + hashlib.sha256(text.encode()).hexdigest()[:32]
        self._closed = False
        self._lock = threading.Lock()
        self._socket = self._register(time.monotonic() + timeout_s)
        self._thread = threading.Thread(target=self._keep, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            hang_up(self._socket)
        self._thread.join()
        self._socket.close()

    def _keep(self) -> None:
        while True:
            try:
                self._socket.recv(1)  # nothing comes: it returns when the watcher is gone
            except OSError:
                pass
            if self._closed:
                return
            try:
                found = self._register(time.monotonic() + _ANSWER_S)
            except (CoordinatorLost, HandshakeRefused) as error:
                log.warning("%s", error)
                continue
            with self._lock:
                self._socket.close()
                self._socket = found
                if self._closed:
                    return

    def _register(self, deadline: float) -> socket.socket:
        error: Exception | None = None
        while not self._closed:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.settimeout(max(0.1, min(_ANSWER_S, deadline - time.monotonic())))
                self._reach(connection)
                self._greet(connection)
                connection.settimeout(None)
                return connection
            except OSError as caught:  # it was just ending, or died while it started
                connection.close()
                error = caught
            except BaseException:
                connection.close()
                raise
            if time.monotonic() > deadline:
                break
            time.sleep(_RETRY_S)
        raise CoordinatorLost(f"this host's watcher cannot be reached: {error} (timeout_s=)")

    def _reach(self, connection: socket.socket) -> None:
        while True:
            try:
                return connection.connect(self._address)
            except OSError as error:
                if error.errno != errno.ECONNREFUSED:
                    raise
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
                try:
                    listening.bind(self._address)
                except OSError:
                    continue  # another member was faster, and its watcher listens in a moment
                listening.listen(512)
                self._start(listening)

    def _start(self, listening: socket.socket) -> None:
        root = str(Path(everstep.__file__).parents[1])
        path = json.dumps([root, *(entry for entry in sys.path if entry)])
        arguments = [sys.executable, "-I", "-S", "-c", _LAUNCH, path, str(listening.fileno())]
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(listening.fileno(),),
            start_new_session=True,  # a terminal's Ctrl-C is for the members
        )
        process.communicate(msgspec.msgpack.encode(self._config))
        log.debug("started a watcher of this host")

    def _greet(self, connection: socket.socket) -> None:
        nonce = new_nonce()
        connection.send(msgspec.msgpack.encode(Register(PROTOCOL_VERSION, nonce, self._name, self._incarnation)))
        challenge = msgspec.msgpack.decode(_receive(connection), type=Challenge)
        token = self._config.token
        if not proof_matches(challenge.proof, token, "watcher", nonce, challenge.nonce):
            raise HandshakeRefused("who listens as this host's watcher does not know the group's token (token=)")
        connection.send(proof(token, "member", nonce, challenge.nonce))
        answer = msgspec.msgpack.decode(_receive(connection), type=Registered)
        if answer.refused:
            raise HandshakeRefused(f"this host's watcher refuses {self._name}: {answer.refused}")


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(4096)
    if not data:
        raise ConnectionError("the watcher ended")
    return data

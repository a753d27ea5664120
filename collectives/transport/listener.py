"""Accepts the data connections of one member, over TCP and over a Unix socket, for whatever view it is in.

Lives as long as its member; a view's connections die with the view's mesh, so a frame of an older view cannot
arrive ([Note: views fence everything]). Owns one accepting thread, one short-lived thread a connection while
something is read from it, and the member's arena.

    a connection is   until                                        how many
    ----------------  -------------------------------------------  ----------------------------------------------
    greeting          it proves the token, by HELLO_TIMEOUT_S      MAX_GREETINGS; the oldest goes first
    parked            this member enters the view that it is for,  MAX_PARKED, one a view, rank and lane: the newest;
                      by _VIEW_WAIT_S                              without a thread
    entering          it has swapped arenas, by _SWAP_S            _MAX_ENTERING; the oldest goes first

Who floods the listener competes with others that have proved nothing, and never with a member that has.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from everstep.collectives.errors import HandshakeRefused
from everstep.collectives.messages import View
from everstep.collectives.transport.arena import Arena, Window, recv_with_fd, send_fd
from everstep.collectives.transport.frames import ProtocolError
from everstep.collectives.transport.greeting import Hello, accept, greet, host_id
from everstep.collectives.transport.sockets import hang_up

# A flood costs no more threads than this; who has been at it longest goes first, and members take milliseconds.
MAX_GREETINGS = 64
MAX_PARKED = 4096  # descriptors, no threads; two connections of each member of a large view
_MAX_ENTERING = 1024
_VIEW_WAIT_S = 10.0
_SWAP_S = 5.0  # a member does it at once
_ARENA_ID_BYTES = 16
_KEPT_WINDOWS = 64


_Threads = dict[threading.Thread, socket.socket]


class Adopter(Protocol):
    """A mesh, as the listener sees it."""

    view: View
    rank: int

    def adopt(self, peer: int, lane: int, connection: socket.socket, window: Window | None) -> None: ...


class _Parked(NamedTuple):
    connection: socket.socket
    until: float


class Listener:
    """One a member. `host` is the interface to listen on; `arena` this member's shared memory."""

    def __init__(self, host: str, token: str) -> None:
        self.token = token
        self.arena = Arena()
        self._tcp = socket.create_server((host, 0), backlog=512)
        self.address = f"{host}:{self._tcp.getsockname()[1]}"
        name = f"everstep-{os.urandom(8).hex()}"
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind(f"\0{name}")
        self._unix.listen(512)
        for listening in (self._tcp, self._unix):
            listening.setblocking(False)  # who hung up again before it was accepted must not hold up the others
        self.local = f"{host_id()}/{name}"
        self._condition = threading.Condition()
        self._mesh: Adopter | None = None
        self._closed = False
        self._greeting: _Threads = {}  # in the order they came
        self._parked: dict[Hello, _Parked] = {}  # in the order they came, so the first one's time is up first
        self._entering: _Threads = {}
        self._windows: dict[bytes, Window] = {}
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._accepting = threading.Thread(target=self._accept, name="mesh-accept", daemon=True)
        self._accepting.start()

    def expect(self, mesh: Adopter | None) -> None:
        """From now on connections of `mesh`'s view are its own; older ones are refused."""
        with self._condition:
            self._mesh = mesh
            if mesh is None:
                return
            for hello in [hello for hello in self._parked if hello.view <= mesh.view.id]:
                connection = self._parked.pop(hello).connection
                part = partial(self._enter, connection, hello)
                if hello.view < mesh.view.id or not self._start(connection, part, self._entering):
                    connection.close()

    def close(self) -> None:
        """Ends every connection that no mesh has adopted, and every thread."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify_all()
        self._wake()
        self._accepting.join()
        with self._condition:  # from here on nothing is begun
            threads = {**self._greeting, **self._entering}
            for connection in (*threads.values(), *(parked.connection for parked in self._parked.values())):
                hang_up(connection)
        for thread in threads:
            thread.join()
        for parked in self._parked.values():
            parked.connection.close()
        self._parked.clear()
        self._tcp.close()
        self._unix.close()
        os.close(self._wake_r)
        os.close(self._wake_w)
        self._windows.clear()
        self.arena.close()

    def swap_arenas(self, connection: socket.socket, first: bool) -> Window:
        """Shows the other side this arena and gets its own; `first` speaks first. Raises ProtocolError, OSError."""
        connection.settimeout(_SWAP_S)  # of each of two packets that are sent whole
        if first:
            send_fd(connection, self.arena.id, self.arena.fd)
        id, fd = recv_with_fd(connection, _ARENA_ID_BYTES)
        try:
            if not first:
                send_fd(connection, self.arena.id, self.arena.fd)
        except OSError:
            os.close(fd)
            raise
        with self._condition:
            known = self._windows.get(id)
        if known is not None:  # mapped in an earlier view: mapping it again would cost a fault a page
            os.close(fd)
            return known
        window = Window(fd)
        with self._condition:
            while len(self._windows) >= _KEPT_WINDOWS:
                del self._windows[next(iter(self._windows))]
            self._windows[id] = window
        return window

    # ---- accepting --------------------------------------------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        for fd in (self._tcp.fileno(), self._unix.fileno(), self._wake_r):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._sweep())}
            if self._closed:
                return
            if self._wake_r in ready:
                os.read(self._wake_r, 4096)
            for listening in (self._tcp, self._unix):
                if listening.fileno() in ready:
                    self._accept_one(listening)

    def _accept_one(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except BlockingIOError:  # gone again
            return
        except OSError:  # no descriptors or no memory left: who has proved nothing gives up its own first
            with self._condition:
                if self._greeting:
                    hang_up(next(iter(self._greeting.values())))
                self._condition.wait(0.01)
            return
        with self._condition:
            while len(self._greeting) >= MAX_GREETINGS and not self._closed:
                hang_up(next(iter(self._greeting.values())))
                self._condition.wait()  # its thread ends at once
            if self._closed or not self._start(connection, partial(self._greet, connection), self._greeting):
                connection.close()

    def _sweep(self) -> float | None:
        """Ends what was parked for too long; milliseconds until the next one's time is up."""
        with self._condition:
            now = time.monotonic()
            while self._parked:
                hello, parked = next(iter(self._parked.items()))
                if parked.until > now:
                    return (parked.until - now) * 1000 + 1
                del self._parked[hello]
                parked.connection.close()
        return None

    def _start(self, connection: socket.socket, part: Callable[[], bool], into: _Threads) -> bool:
        """A thread that is in `into` until it ends; False where the system has none left. Under the lock."""
        thread = threading.Thread(target=self._run, args=(connection, part), name="mesh-greet", daemon=True)
        into[thread] = connection
        try:
            thread.start()
        except RuntimeError:
            del into[thread]
            return False
        return True

    def _run(self, connection: socket.socket, part: Callable[[], bool]) -> None:
        kept = False
        try:
            kept = part()
        except (OSError, HandshakeRefused, ProtocolError):
            pass  # a stranger, or a member that is gone: it finds its connection closed
        finally:
            if not kept:
                connection.close()
            me = threading.current_thread()
            with self._condition:
                self._greeting.pop(me, None)
                self._entering.pop(me, None)
                self._condition.notify_all()

    # ---- one connection; True where it was handed on --------------------------------------------------------

    def _greet(self, connection: socket.socket) -> bool:
        hello = greet(connection, self.token)
        me = threading.current_thread()
        with self._condition:
            if len(self._entering) >= _MAX_ENTERING:
                hang_up(next(iter(self._entering.values())))
            self._entering[me] = self._greeting.pop(me)  # it has proved the token: no stranger's flood ends it
            self._condition.notify_all()
            mesh = self._mesh
            if self._closed:
                return False
            if mesh is None or mesh.view.id < hello.view:
                self._park(hello, connection)
                return True
        return self._enter(connection, hello)

    def _park(self, hello: Hello, connection: socket.socket) -> None:
        older = self._parked.pop(hello, None)
        if older is None and len(self._parked) >= MAX_PARKED:
            older = self._parked.pop(next(iter(self._parked)))
        if older is not None:
            older.connection.close()
        self._parked[hello] = _Parked(connection, time.monotonic() + _VIEW_WAIT_S)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # then there are enough wakes in the pipe
            os.write(self._wake_w, b"\0")

    def _enter(self, connection: socket.socket, hello: Hello) -> bool:
        with self._condition:
            mesh = self._mesh
        if mesh is None or mesh.view.id != hello.view:
            raise HandshakeRefused(f"view {hello.view} is over")
        if hello.to != mesh.rank or hello.rank <= mesh.rank:  # each pair has one side that dials
            raise HandshakeRefused(f"rank {hello.rank} calls rank {hello.to}; this is rank {mesh.rank}")
        connection.settimeout(_SWAP_S)
        accept(connection)
        window = self.swap_arenas(connection, first=False) if connection.family == socket.AF_UNIX else None
        mesh.adopt(hello.rank, hello.lane, connection, window)
        return True

"""Members, strangers and broken members of one process, for the tests of the data connections."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from tests.unit.collectives.members import Peer

from everstep.collectives.errors import CollectiveError
from everstep.collectives.mesh import Mesh
from everstep.collectives.messages import Member, View, ViewId
from everstep.collectives.operations import Operation
from everstep.collectives.transport import frames
from everstep.collectives.transport.arena import Arena, Window
from everstep.collectives.transport.frames import Header
from everstep.collectives.transport.greeting import Hello, await_acceptance, introduce
from everstep.collectives.transport.listener import Listener
from everstep.collectives.work import Work

_libc = ctypes.CDLL(None)
TOKEN = "a token"
WAIT_S = 20.0
SCALE = int(os.environ.get("EVERSTEP_FUZZ", "1"))
# All bytes of what broken members bring are alike: whatever offset or key a frame is bent to, a finished sum of
# zeros and this has one right value, and missing or foreign bytes show.
BYTE = b"\x40"
(VALUE,) = torch.frombuffer(bytearray(BYTE * 4), dtype=torch.float32).tolist()


def view_of(listeners: Sequence[Listener], number: int = 1) -> View:
    members = [Member(f"m{i}", i, "d", one.address, local=one.local) for i, one in enumerate(listeners)]
    return View(ViewId(1, number), tuple(members), 0)


@contextlib.contextmanager
def listening(count: int) -> Iterator[list[Listener]]:
    listeners = [Listener("127.0.0.1", TOKEN) for _ in range(count)]
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


@contextlib.contextmanager
def connected(
    listeners: Sequence[Listener], number: int = 1, transport: str = "auto", timeout_s: float = WAIT_S
) -> Iterator[list[Peer]]:
    view = view_of(listeners, number)
    meshes = [
        Mesh(view, rank, listener, lambda peer, error: None, timeout_s, transport)
        for rank, listener in enumerate(listeners)
    ]
    try:
        in_threads([lambda mesh=mesh: mesh.connect(WAIT_S) for mesh in meshes])
        yield [Peer(mesh) for mesh in meshes]
    finally:
        for mesh in meshes:
            mesh.close()


def in_threads(parts: Sequence[Callable[[], object]]) -> None:
    """Raises what any of them raises."""
    errors: list[BaseException] = []

    def run(part: Callable[[], object]) -> None:
        try:
            part()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Summing:
    """Members that sum small and large tensors, each sum checked, until `stop`, which says how many there were."""

    def __init__(self, members: Sequence[Peer]) -> None:
        self._members = members
        self._stop = threading.Event()
        self._rounds = 0
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(member,)) for member in members]
        for thread in self._threads:
            thread.start()
        while self._rounds < 3 and not self._errors:
            time.sleep(0.01)

    def _run(self, member: Peer) -> None:
        try:
            go_on = True
            while go_on:
                for elements in (100, 100_000):
                    tensor = torch.arange(elements, dtype=torch.float32) + member.rank
                    member.all_reduce(tensor).wait()
                    n = member.size
                    right = torch.arange(elements, dtype=torch.float32) * n + n * (n - 1) / 2
                    assert torch.equal(tensor, right), "a wrong sum"
                flag = torch.tensor([int(self._stop.is_set())])
                member.all_reduce(flag, op="max").wait()
                go_on = not flag.item()
                if member.rank == 0:
                    self._rounds += 1
                    time.sleep(0.005)  # the cores are for what happens meanwhile, too
        except BaseException as error:
            self._errors.append(error)

    def stop(self) -> int:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return self._rounds


class Footprint:
    """What must not grow: descriptors, threads, memory, objects.

    Objects are what tells a leak of a few thousand connections from an allocator that keeps what it had.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.fds, self.threads, self.bytes, self.objects = self._now()

    def _now(self) -> tuple[int, int, int, int]:
        gc.collect()
        _libc.malloc_trim(0)  # what the allocator keeps for later is no leak
        # A mesh starts its own thread when it first wants it, and keeps it.
        threads = [one.name for one in threading.enumerate() if not re.fullmatch(r"mesh-\d+", one.name)]
        return self._process.num_fds(), len(threads), self._process.memory_info().rss, len(gc.get_objects())

    def check(self, more_bytes: int, more_objects: int) -> None:
        until = time.monotonic() + WAIT_S
        while True:  # what was hung up on takes a moment to end
            fds, threads, used, objects = self._now()
            if fds <= self.fds and threads <= self.threads:
                break
            assert time.monotonic() < until, f"{self.fds} fds and {self.threads} threads became {fds} and {threads}"
            time.sleep(0.02)
        assert objects - self.objects < more_objects, f"{objects - self.objects} objects more"
        assert used - self.bytes < more_bytes, f"{(used - self.bytes) >> 20} MiB more"


# ---- strangers and members by hand ------------------------------------------------------------------------


def dial(listener: Listener, local: bool = False) -> socket.socket:
    if local:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(WAIT_S)
        connection.connect("\0" + listener.local.split("/", 1)[1])
        return connection
    host, port = listener.address.split(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def prove(connection: socket.socket, hello: Hello, token: str = TOKEN) -> None:
    introduce(connection, hello, token, time.monotonic() + WAIT_S)


def enter(listener: Listener, hello: Hello, local: bool = False) -> socket.socket:
    connection = dial(listener, local)
    prove(connection, hello)
    await_acceptance(connection, time.monotonic() + WAIT_S)
    return connection


def is_dropped(connection: socket.socket, within_s: float = WAIT_S) -> bool:
    connection.settimeout(within_s)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


class _Driven(Mesh):
    """Only `look` moves it on: what a frame does is done when `look` returns."""

    def _help(self) -> None:
        pass


class Broken:
    """A view of one member, `me`, rank 0, and of members that say what a test has them say."""

    def __init__(self, listener: Listener, number: int = 1, size: int = 2, arena: Arena | None = None) -> None:
        members = tuple(Member(f"m{i}", i, "d", "127.0.0.1:9") for i in range(size))
        self.id = (1, number)
        self.blamed: list[tuple[int, str]] = []
        self.mesh = _Driven(
            View(ViewId(*self.id), members, 0), 0, listener, lambda *blame: self.blamed.append(blame), WAIT_S
        )
        self.me = Peer(self.mesh)
        self.lanes: dict[tuple[int, int], socket.socket] = {}
        self._mine: dict[tuple[int, int], socket.socket] = {}
        for peer in range(1, size):
            for lane in range(2 if arena is None else 1):
                family = socket.AF_INET if arena is None else socket.AF_UNIX
                theirs, mine = _pair(family)
                window = None if arena is None else Window(os.dup(arena.fd))
                self.mesh.adopt(peer, lane, mine, window)
                self.lanes[(peer, lane)], self._mine[(peer, lane)] = theirs, mine
        self.pending = self.me.barrier(tag=-1)  # nobody else comes to it: what `look` is asked for

    def say(self, header: Header, payload: bytes = b"", peer: int = 1, lane: int = 0) -> None:
        self.raw(frames.pack(self.id, header) + payload, peer, lane)

    def open(self, operation: Operation, data: bytes = b"", peer: int = 1, lane: int = 0) -> None:
        payload = frames.pack_open(operation.descriptor, data)
        self.say(Header(frames.OPEN, 0, 0, operation.tag, 1, 0, 0, 0, len(payload)), payload, peer, lane)

    def raw(self, data: bytes, peer: int = 1, lane: int = 0) -> None:
        """`me` has dealt with it when this returns, or its view is over."""
        connection, mine = self.lanes[(peer, lane)], self._mine[(peer, lane)]
        with contextlib.suppress(OSError):
            while not self.blamed and (data or _unread(mine)):
                connection.settimeout(0.0)
                try:
                    data = data[connection.send(data) :] if data else data
                except BlockingIOError:
                    pass
                self.mesh.look(self.pending)
        self.mesh.look(self.pending)

    def error_of(self, work: Work) -> CollectiveError | None:
        try:
            work.wait(0)
        except CollectiveError as error:
            return error
        return None

    def close(self) -> None:
        self.mesh.close()
        for connection in self.lanes.values():
            connection.close()


def _unread(connection: socket.socket) -> int:
    """Bytes. Raises OSError once it is closed."""
    if connection.fileno() < 0:
        raise OSError("closed")
    (count,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4)))
    return count


def _pair(family: int) -> tuple[socket.socket, socket.socket]:
    if family == socket.AF_UNIX:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other

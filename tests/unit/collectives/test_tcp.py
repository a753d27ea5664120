"""The mesh of a view over real sockets: frames, aborts, deaths, and callers that are none of its members."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from everstep.collectives.errors import CollectiveTimeout, PeerLost
from everstep.collectives.handshake import NONCE_BYTES, PROOF_BYTES, proof
from everstep.collectives.messages import Member, View, ViewId
from everstep.collectives.transport import tcp
from everstep.collectives.transport.tcp import Listener, Mesh

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
TOKEN = "a token"
WAIT_S = 15.0
SOURCE = str(Path(__file__).parents[3] / "src")


class Net:
    """Listeners of some members, and the meshes of their views."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.listeners = [Listener("127.0.0.1", token) for token in tokens]
        self.broken: list[list[tuple[int, str]]] = [[] for _ in tokens]
        self.meshes: list[Mesh] = []

    def view(self, number: int = 1, extra: tuple[str, ...] = ()) -> View:
        addresses = [*(listener.address for listener in self.listeners), *extra]
        members = tuple(Member(f"rank-{i}.1", i, f"slot-{i}", address) for i, address in enumerate(addresses))
        return View(ViewId(1, number), members, 0)

    def mesh(self, rank: int, view: View) -> Mesh:
        mesh = Mesh(view, rank, self.tokens[rank], lambda peer, error: self.broken[rank].append((peer, error)))
        self.meshes.append(mesh)
        self.listeners[rank].expect(mesh)
        return mesh

    def connect(self, number: int = 1) -> list[Mesh]:
        meshes = [self.mesh(rank, self.view(number)) for rank in range(len(self.tokens))]
        each(meshes, lambda mesh: mesh.connect(WAIT_S))
        return meshes

    def close(self) -> None:
        for mesh in self.meshes:
            mesh.close()
        for listener in self.listeners:
            listener.close()


def each(meshes: list[Mesh], work: Callable) -> list:
    with ThreadPoolExecutor(len(meshes)) as pool:
        return list(pool.map(work, meshes))


@pytest.fixture
def net() -> Iterator[Callable[..., Net]]:
    """Everything that a test opens is closed by it, and leaves no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    nets: list[Net] = []

    def make(count: int, tokens: list[str] | None = None) -> Net:
        nets.append(Net(tokens or [TOKEN] * count))
        return nets[-1]

    yield make
    for made in nets:
        made.close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# ---- frames ---------------------------------------------------------------------------------------------


def test_frames_of_every_pair_are_found_by_tag_in_any_order(net) -> None:
    meshes = net(4).connect()

    def work(mesh: Mesh) -> None:
        rng = random.Random(mesh.rank)
        peers = [peer for peer in range(4) if peer != mesh.rank]
        sends = [(peer, tag) for peer in peers for tag in range(50)]
        for peer, tag in rng.sample(sends, len(sends)):
            mesh.send(peer, tag << 40, [b"%d>%d:" % (mesh.rank, peer), b"", b"%d" % tag])
        for peer, tag in rng.sample(sends, len(sends)):
            assert mesh.recv(peer, tag << 40, WAIT_S) == b"%d>%d:%d" % (peer, mesh.rank, tag)
        mesh.flush()

    each(meshes, work)


def test_large_frames_both_ways_at_once_do_not_block_each_other(net) -> None:
    """Each side sends far more than the sockets hold before it receives."""
    meshes = net(2).connect()
    parts = [os.urandom(9 << 20), os.urandom(3), os.urandom(5 << 20)]

    def work(mesh: Mesh) -> None:
        for tag in range(4):
            mesh.send(1 - mesh.rank, tag, [memoryview(part) for part in parts])
        for tag in reversed(range(4)):
            assert mesh.recv(1 - mesh.rank, tag, WAIT_S) == b"".join(parts)

    each(meshes, work)


def test_many_small_frames_and_frames_of_many_parts(net) -> None:
    meshes = net(2).connect()
    parts = [b"%d," % i for i in range(3000)]  # more than one call to the kernel takes

    def work(mesh: Mesh) -> None:
        peer = 1 - mesh.rank
        for tag in range(5000):
            mesh.send(peer, tag, [struct.pack("<I", tag)])
        mesh.send(peer, 5000, parts)
        for tag in range(5000):
            assert mesh.recv(peer, tag, WAIT_S) == struct.pack("<I", tag)
        assert mesh.recv(peer, 5000, WAIT_S) == b"".join(parts)

    each(meshes, work)


def test_after_flush_a_buffer_may_be_used_again(net) -> None:
    first, second = net(2).connect()
    buffer = bytearray(16 << 20)

    def send() -> None:
        for number in range(3):
            buffer[:] = bytes([number]) * len(buffer)
            first.send(1, number, [buffer])
            first.flush()

    sender = threading.Thread(target=send)
    sender.start()
    for number in range(3):
        data = second.recv(0, number, WAIT_S)
        assert data == bytes([number]) * len(buffer)
    sender.join()


def test_waiting_for_a_frame_ends_in_time_and_says_for_what(net) -> None:
    first, _ = net(2).connect()
    began = time.monotonic()
    with pytest.raises(CollectiveTimeout, match=r"rank 0: waiting for rank 1, tag 0x7b, view 1\.1: .*0\.2 s"):
        first.recv(1, 123, 0.2)
    assert 0.2 <= time.monotonic() - began < 2


def test_a_view_that_does_not_come_together_says_who_is_missing(net) -> None:
    made = net(3)
    with pytest.raises(CollectiveTimeout, match=r"ranks \[1, 2\] did not come within 0\.2 s"):
        made.mesh(0, made.view()).connect(0.2)


def test_a_frame_that_comes_twice_breaks_the_connection(net) -> None:
    made = net(2)
    first, second = made.connect()
    first.send(1, 5, [b"a"])
    first.send(1, 5, [b"b"])
    with pytest.raises(PeerLost, match="tag 0x5 twice"):
        second.recv(0, 6, WAIT_S)


# ---- the end of a view ----------------------------------------------------------------------------------


def test_abort_wakes_every_waiter_at_once_and_ends_what_comes_later(net) -> None:
    first, _, _ = net(3).connect()
    errors: list[tuple[BaseException, float]] = []

    def wait(work: Callable[[], object]) -> None:
        try:
            work()
        except PeerLost as error:
            errors.append((error, time.monotonic()))

    works = [lambda: first.recv(1, 1, 60), lambda: first.recv(2, 2, 60), lambda: first.recv(2, 3, 60)]
    waiters = [threading.Thread(target=wait, args=(work,)) for work in works]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)
    began = time.monotonic()
    why = PeerLost("the view is over")
    first.abort(why)
    first.abort(PeerLost("said again"))
    for waiter in waiters:
        waiter.join(WAIT_S)
    assert [error for error, _ in errors] == [why] * 3
    assert max(at for _, at in errors) - began < 0.3
    for work in (lambda: first.send(1, 4, [b""]), lambda: first.recv(1, 1, 60), first.flush):
        with pytest.raises(PeerLost, match="the view is over"):
            work()


def test_abort_wakes_a_flush_whose_peer_does_not_read(net) -> None:
    made = net(2)
    view = made.view()
    first = made.mesh(0, view)
    with _accepted_by_hand(view, 1) as connection:
        first.connect(WAIT_S)
        first.send(1, 0, [bytearray(64 << 20)])
        threading.Timer(0.1, first.abort, (PeerLost("over"),)).start()
        began = time.monotonic()
        with pytest.raises(PeerLost, match="over"):
            first.flush()
        assert time.monotonic() - began < 1.5
        connection.close()
    assert made.broken[0] == [], "an abort is nobody's fault"


def test_close_leaves_no_thread(net) -> None:
    made = net(3)
    meshes = made.connect()
    assert [t for t in threading.enumerate() if t.name.startswith("mesh-0-")]
    for mesh in meshes:
        mesh.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("mesh-") and t.name != "mesh-accept"] == []
    with pytest.raises(PeerLost, match=r"view 1\.1 is over"):
        meshes[0].recv(1, 1, 60)
    assert made.broken[0] == [], "who closes first loses nobody"
    for reports in made.broken[1:]:
        assert {peer for peer, _ in reports} <= {0, 1, 2}


def test_a_listener_serves_one_view_after_the_other(net) -> None:
    made = net(3)
    for number in (1, 2, 5):
        meshes = made.connect(number)
        each(meshes, lambda mesh, n=number: mesh.send((mesh.rank + 1) % 3, 7, [b"view %d" % n]))
        frames = each(meshes, lambda mesh: bytes(mesh.recv((mesh.rank + 2) % 3, 7, WAIT_S)))
        assert frames == [b"view %d" % number] * 3
        for mesh in meshes:
            mesh.close()


PEER = """
import sys, time
from everstep.collectives.messages import View
from everstep.collectives.transport.tcp import Listener, Mesh
import msgspec
listener = Listener("127.0.0.1", "a token")
print(listener.address, flush=True)
view = msgspec.json.decode(sys.stdin.readline(), type=View)
mesh = Mesh(view, 3, "a token", lambda peer, error: None)
listener.expect(mesh)
mesh.connect(60)
mesh.send(0, 1, [b"here"])
mesh.send(1, 1, [b"here"])
mesh.send(2, 1, [b"here"])
time.sleep(600)
"""


def test_everybody_notices_a_killed_process_at_once(net) -> None:
    import msgspec

    made = net(3)
    with subprocess.Popen(
        [sys.executable, "-c", PEER],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            view = made.view(extra=(process.stdout.readline().decode().strip(),))
            meshes = [made.mesh(rank, view) for rank in range(3)]
            process.stdin.write(msgspec.json.encode(view) + b"\n")
            process.stdin.flush()

            def work(mesh: Mesh) -> float:
                mesh.connect(WAIT_S)
                assert mesh.recv(3, 1, WAIT_S) == b"here"
                ready.wait(WAIT_S)
                with pytest.raises(PeerLost):
                    mesh.recv((mesh.rank + 1) % 3, 2, 60)  # from one that lives
                return time.monotonic()

            ready = threading.Barrier(4)
            with ThreadPoolExecutor(3) as pool:
                done = [pool.submit(work, mesh) for mesh in meshes]
                ready.wait(WAIT_S)
                time.sleep(0.05)
                killed = time.monotonic()
                process.send_signal(signal.SIGKILL)
                assert max(future.result() for future in done) - killed < 0.5
            # Who notices first hangs up on the others: they may lose a survivor, and somebody names the dead.
            assert 3 in {peer for reports in made.broken for peer, _ in reports}
            assert all(len(reports) <= 1 for reports in made.broken)
        finally:
            process.kill()


# ---- callers that are no members ------------------------------------------------------------------------


def _dial(address: str) -> socket.socket:
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), WAIT_S)


def _hello(
    view: ViewId, rank: int, nonce: bytes = b"n" * NONCE_BYTES, magic: bytes = b"EVST", version: int = 1
) -> bytes:
    return struct.pack(f"<4sHIIi{NONCE_BYTES}s", magic, version, view.epoch, view.number, rank, nonce)


def _accepted_by_hand(view: View, rank: int, token: str = TOKEN) -> socket.socket:
    """A connection to rank 0 as `rank` makes it, up to and with the proof."""
    connection = _dial(view.members[0].address)
    nonce = b"n" * NONCE_BYTES
    connection.sendall(_hello(view.id, rank, nonce))
    answer = _read(connection, NONCE_BYTES + PROOF_BYTES)
    context = f"mesh {view.id} {rank}".encode()
    assert len(answer) == NONCE_BYTES + PROOF_BYTES
    connection.sendall(proof(token, "client", nonce, answer[:NONCE_BYTES], context))
    return connection


def _read(connection: socket.socket, length: int) -> bytes:
    """Up to `length` bytes; fewer when the other side hangs up."""
    data = b""
    connection.settimeout(WAIT_S)
    try:
        while len(data) < length and (piece := connection.recv(length - len(data))):
            data += piece
    except ConnectionError:
        pass
    return data


def _frame(view: ViewId, tag: int, length: int) -> bytes:
    return struct.pack("<IIQQ", view.epoch, view.number, tag, length)


def test_a_connection_of_an_older_view_is_refused_and_harms_nobody(net) -> None:
    made = net(2)
    old = made.view(number=1)
    first, second = made.connect(number=2)
    with _accepted_by_hand(old, 1) as zombie:
        assert _read(zombie, 1) == b""
    stale = Mesh(old, 1, TOKEN, lambda peer, error: None)
    with pytest.raises(PeerLost):
        stale.connect(WAIT_S)
    stale.close()
    second.send(0, 1, [b"fine"])
    assert first.recv(1, 1, WAIT_S) == b"fine"


def test_a_connection_of_a_newer_view_waits_until_it_is_heard_of(net) -> None:
    made = net(2)
    made.connect(number=1)
    view = made.view(number=2)
    with ThreadPoolExecutor(1) as pool:
        second = made.mesh(1, view)
        early = pool.submit(second.connect, WAIT_S)
        time.sleep(0.1)
        assert not early.done()
        first = made.mesh(0, view)
        first.connect(WAIT_S)
        early.result(WAIT_S)
    second.send(0, 1, [b"x"])
    assert first.recv(1, 1, WAIT_S) == b"x"


@pytest.mark.parametrize("which", [0, 1])
def test_another_token_on_either_side_is_refused_with_the_reason(net, which: int) -> None:
    tokens = [TOKEN, TOKEN]
    tokens[which] = "another token"
    made = net(2, tokens)
    view = made.view()
    made.mesh(0, view)
    with pytest.raises(PeerLost, match="does not know this run's token"):
        made.mesh(1, view).connect(WAIT_S)


def test_a_caller_without_the_token_is_refused_though_it_does_not_ask_for_ours(net) -> None:
    made = net(2)
    made.mesh(0, made.view())
    with _accepted_by_hand(made.view(), 1, token="another token") as connection:
        assert _read(connection, 1) == b""


@pytest.mark.parametrize("rank", [0, -1, 2, 2**31 - 1])
def test_a_rank_that_is_not_in_the_view_gets_no_connection(net, rank: int) -> None:
    made = net(2)
    mesh = made.mesh(0, made.view())
    with _accepted_by_hand(made.view(), rank) as connection:
        assert _read(connection, 2) in (b"\x01", b"")
    with pytest.raises(CollectiveTimeout, match=r"ranks \[1\]"):
        mesh.connect(0.2)


def test_a_length_that_is_too_large_is_refused_before_memory_is_taken(net) -> None:
    made = net(2)
    view = made.view()
    first = made.mesh(0, view)
    with _accepted_by_hand(view, 1) as connection:
        first.connect(WAIT_S)
        tracemalloc.start()
        try:
            connection.sendall(_frame(view.id, 1, tcp.MAX_FRAME_BYTES + 1))
            with pytest.raises(PeerLost, match=f"{tcp.MAX_FRAME_BYTES + 1} bytes"):
                first.recv(1, 1, WAIT_S)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("id", [ViewId(1, 2), ViewId(2, 1), ViewId(0, 1)])
def test_a_frame_of_another_view_breaks_the_connection(net, id: ViewId) -> None:
    made = net(2)
    view = made.view()
    first = made.mesh(0, view)
    with _accepted_by_hand(view, 1) as connection:
        first.connect(WAIT_S)
        connection.sendall(_frame(id, 1, 3) + b"abc")
        with pytest.raises(PeerLost, match=rf"bad frame: view {id.epoch}\.{id.number}"):
            first.recv(1, 1, WAIT_S)


def test_a_connection_that_breaks_inside_a_frame_delivers_nothing_of_it(net) -> None:
    made = net(2)
    view = made.view()
    first = made.mesh(0, view)
    with _accepted_by_hand(view, 1) as connection:
        first.connect(WAIT_S)
        connection.sendall(_frame(view.id, 1, 1000) + b"x" * 999)
    with pytest.raises(PeerLost, match=r"closed by the other side|reset by peer"):
        first.recv(1, 1, WAIT_S)
    wait_until(lambda: len(made.broken[0]) == 1)


def _drip(connection: socket.socket, data: bytes) -> None:
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def test_garbage_and_silence_do_no_harm(net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that send nonsense, nothing, or a byte now and then; all are hung up on, members get through."""
    monkeypatch.setattr(tcp, "HANDSHAKE_TIMEOUT_S", 0.5)
    made = net(2)
    view = made.view()
    rng = random.Random(6)
    hellos = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n" * 20,
        rng.randbytes(500),
        _hello(view.id, 1, magic=b"EVSX") + bytes(500),
        _hello(view.id, 1, version=2) + bytes(500),
        _hello(view.id, 1)[:-1],
        _hello(view.id, 1),
        _hello(view.id, 1) + rng.randbytes(PROOF_BYTES),
    ]
    callers = [_dial(made.listeners[0].address) for _ in hellos]
    for caller, hello in zip(callers, hellos, strict=True):
        caller.sendall(hello)
    dripping = _dial(made.listeners[0].address)
    began = time.monotonic()
    first, second = made.connect()
    assert time.monotonic() - began < 0.5, "nobody waits for them"
    second.send(0, 1, [b"fine"])
    assert first.recv(1, 1, WAIT_S) == b"fine"
    with pytest.raises(OSError):  # noqa: PT011  # a reset or a broken pipe: it was hung up on
        _drip(dripping, _hello(view.id, 1))
    assert time.monotonic() - began < 3
    for caller in callers:
        assert len(_read(caller, 10_000)) in (0, NONCE_BYTES + PROOF_BYTES)
        caller.close()
    dripping.close()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "mesh-greet"])


def test_closing_a_listener_hangs_up_on_those_it_still_greets(net) -> None:
    made = net(2)
    with _dial(made.listeners[0].address) as silent, _accepted_by_hand(made.view(3), 1) as early:
        wait_until(lambda: len([t for t in threading.enumerate() if t.name == "mesh-greet"]) == 2)
        made.listeners[0].close()
        assert [t for t in threading.enumerate() if t.name == "mesh-greet"] == []
        assert (_read(silent, 1), _read(early, 1)) == (b"", b"")
    with pytest.raises(OSError):  # noqa: PT011
        _dial(made.listeners[0].address)

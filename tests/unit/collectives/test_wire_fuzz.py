"""Garbage, by the ten thousand, at one listener and through the channels of members: no crash, leak or wrong sum.

EVERSTEP_FUZZ=N does N times as much. Every random choice follows from the seed that a failure prints.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.collectives.wire import (
    BYTE,
    SCALE,
    VALUE,
    Broken,
    Footprint,
    Summing,
    connected,
    dial,
    is_dropped,
    listening,
    prove,
)

from everstep.collectives.errors import HandshakeRefused, Mismatch, PeerLost
from everstep.collectives.messages import ViewId
from everstep.collectives.operations import Operation
from everstep.collectives.transport import frames
from everstep.collectives.transport.arena import Arena
from everstep.collectives.transport.frames import Header, ProtocolError
from everstep.collectives.transport.greeting import HELLO_TIMEOUT_S, Hello
from everstep.collectives.transport.listener import Listener

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
CONNECTIONS = 10_000 * SCALE
FRAMES = 10_000 * SCALE
_KEPT_BYTES = 64 << 20  # staging that meshes keep, and pieces of the heap that cannot be given back
_RESULT = 1 << 31


@pytest.fixture(autouse=True)
def _one_core_an_operation() -> Iterator[None]:
    """Threads of torch's own that wait for each other would take the cores from everybody else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- strangers ------------------------------------------------------------------------------------------


class Recorder:
    """A socket that remembers what was sent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data
        self._connection.sendall(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


@dataclass
class Stranger:
    connection: socket.socket
    rng: random.Random
    recorded: bytes
    drips: list[socket.socket]

    def says_garbage(self) -> None:
        self.connection.sendall(self.rng.randbytes(self.rng.randrange(1, 200)))

    def says_nothing(self) -> None:
        pass

    def speaks_http(self) -> None:
        self.connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

    def breaks_off(self) -> None:
        self.connection.sendall(self.recorded[: self.rng.randrange(len(self.recorded))])

    def has_another_version(self) -> None:
        self.connection.sendall(b"EVST" + struct.pack("<H", self.rng.randrange(2, 1 << 16)) + bytes(50))

    def has_another_token(self) -> None:
        with pytest.raises(HandshakeRefused, match="token"):
            prove(self.connection, Hello(ViewId(1, 1), 2, 0, 0), "another token")

    def proves_nothing(self) -> None:
        self.connection.sendall(self.recorded[:-32] + self.rng.randbytes(32))

    def replays(self) -> None:
        self.connection.sendall(self.recorded)

    def says_all_ones(self) -> None:
        """Every length and number as large as it gets."""
        self.connection.sendall(self.recorded[:6] + b"\xff" * 4096)

    def goes_on_and_on(self) -> None:
        self.connection.sendall(self.recorded[:-32] + bytes(1 << 16))

    def resets(self) -> None:
        self.connection.sendall(self.recorded[:20])
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def drips(self) -> None:
        raise AssertionError

    def is_a_member_of_another_view(self) -> None:
        prove(self.connection, Hello(ViewId(1, 0), 2, 0, 0))

    def calls_a_wrong_rank(self) -> None:
        ranks = self.rng.choice([(2, 1), (0, 0), (1 << 31, 0), (2, 1 << 31)])
        prove(self.connection, Hello(ViewId(1, 1), *ranks, 0))

    def is_there_twice(self) -> None:
        prove(self.connection, Hello(ViewId(1, 1), 2, 0, self.rng.choice([0, 1, 7])))


def test_strangers_by_the_thousand_harm_nobody() -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    with listening(3) as listeners:
        target = listeners[0]
        with connected(listeners) as members:
            summing = Summing(members)
            recorder = Recorder(dial(target))
            prove(recorder, Hello(ViewId(1, 1), 2, 0, 0))  # type: ignore[arg-type]  # as far as it is asked
            recorder.close()  # type: ignore[operator]
            kinds = [name for name, part in vars(Stranger).items() if callable(part) and name[0] != "_"]
            kinds.remove("drips")
            before = Footprint()
            counts = dict.fromkeys(kinds, 0)
            dripping: list[socket.socket] = []
            for number in range(CONNECTIONS):
                if number % 400 == 0:  # byte by byte, for as long as anybody listens
                    dripping.append(dial(target))
                    for slow in dripping:
                        _drip(slow, recorder.sent, rng)
                kind = rng.choice(kinds)
                counts[kind] += 1
                with dial(target, local=rng.random() < 0.5) as connection:
                    try:
                        getattr(Stranger(connection, rng, recorder.sent, dripping), kind)()
                    except OSError:
                        pass  # hung up on, which is what is asked for
            for slow in dripping:
                assert is_dropped(slow, HELLO_TIMEOUT_S + 5)
                slow.close()
            assert min(counts.values()) > CONNECTIONS // 50, counts
            assert summing.stop() > 10, "it summed meanwhile"
            before.check(_KEPT_BYTES, CONNECTIONS // 4)
        with connected(listeners, number=2) as members:  # and goes on to serve
            assert Summing(members).stop() >= 3


def _drip(slow: socket.socket, recorded: bytes, rng: random.Random) -> None:
    try:
        slow.send(rng.choice([recorded[:1], b"E", b"\0"]))
    except OSError:
        pass


# ---- broken members ---------------------------------------------------------------------------------------


class Scene:
    """A broken member of a view in which operations of every kind are under way, and frames that it might send."""

    def __init__(self, listener: Listener, number: int, arena: Arena | None) -> None:
        self.broken = Broken(listener, number, arena=arena)
        me = self.broken.me
        self.arena = arena
        self.small, self.large, self.cast, self.got = (torch.zeros(n) for n in (64, 300_000, 200_000, 70_000))
        self.small_cast, self.all = torch.zeros(10), torch.zeros(2 * 80_000)
        mine = torch.full((80_000,), VALUE)
        self.tensors = [self.small, self.large, self.cast, self.got, self.small_cast, self.all]
        self.operations: list[Operation] = []
        submit = me._submit
        me._submit = lambda operation: self.operations.append(operation) or submit(operation)  # type: ignore[method-assign]
        self.works = [
            me.all_reduce(self.small, tag=0),
            me.all_reduce(self.large, tag=1),
            me.broadcast(self.cast, root=1, tag=2),
            me.recv(self.got, source=1, tag=3),
            me.broadcast(self.small_cast, root=1, tag=4),
            me.all_gather(self.all, mine, tag=5),
            me.send(torch.full((50_000,), VALUE), to=1, tag=6),
        ]

    def frames(self, rng: random.Random) -> tuple[Header, bytes]:
        """One that it may send at some time, if not now."""
        tag = rng.randrange(7)
        operation = self.operations[tag]
        role = {3: frames.SENDER, 6: frames.RECEIVER}.get(tag, frames.COLLECTIVE)
        kind = rng.choice([frames.OPEN, frames.OPEN, frames.PIECE, frames.PIECE, *range(3, 7)])
        key = rng.choice([0, 0, 1, 2, _RESULT, _RESULT | 1])
        if kind == frames.OPEN:
            data = BYTE * {0: 256, 4: 40}.get(tag, 0)
            payload = frames.pack_open(operation.descriptor, data)
            return Header(kind, role, 0, tag, 1, 0, 0, 0, len(payload)), payload
        size = rng.choice([1 << 20, 600_000, 800_000 - (1 << 20) // 4, 280_000, 320_000, 75_776 * 4, 64])
        slot, generation = 0, 1
        if kind == frames.SPAN:
            slot, generation = 0, rng.choice([0, 4096, 1, 3])
        length = 0 if kind in (frames.RELEASE, frames.READ) else size
        payload = BYTE * size if kind == frames.PIECE else b""
        return Header(kind, role, 0, tag, 1, key, slot, generation, length), payload

    def check(self) -> None:
        """What ended well is right, and what did not says why."""
        for work, tensor in zip(self.works, self.tensors, strict=False):
            error = self.broken.error_of(work) if work.done() else None
            assert error is None or isinstance(error, PeerLost | Mismatch), error
            if work.done() and error is None:
                assert torch.all(tensor == VALUE), f"a wrong result of {work.what}: {tensor.unique()}"
        assert len(self.broken.blamed) <= 1
        for peer, why in self.broken.blamed:
            assert peer == 1, why


_NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 23, 24, 64, 255, 4095, 4096, 4097, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1)


def bend(header: Header, payload: bytes, rng: random.Random) -> bytes:
    """A frame of view 1.x with something wrong in it: the view is put in by the caller."""
    values = list(header)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        field = rng.randrange(len(values))
        values[field] = rng.choice(_NUMBERS) & (0xFF if field < 2 else 0xFFFFFFFF)
    if values[0] == frames.SPAN:  # of the sender's memory, only what holds its value, or what nobody has
        values[6], values[7] = (0, values[7] % (1 << 20)) if not values[6] else ((1 << 32) - 1, values[7])
    if rng.random() < 0.2:
        values[8] = rng.choice([(1 << 64) - 1, 1 << 63, 1 << 40])
    if rng.random() < 0.3 and payload:
        payload = bytes(rng.choices((0x40, 0x91, 0xFF, 0xC1, 0xDD, 0xA2), k=rng.randrange(len(payload[:300]))))
    return struct.pack("<BBHIIIqQIIIQ", values[0], values[1], 0x5EED, 1, 0, *values[2:]) + payload


def test_frames_by_the_thousand_end_their_view_and_nothing_else() -> None:
    """Each is sent while its view stands; members of another view in the same process sum meanwhile."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    before: Footprint | None = None
    scene: Scene | None = None
    sent = views = done = 0
    with listening(2) as good, listening(1) as (sacrificed,), connected(good) as members:
        summing = Summing(members)
        arena = _arena_full_of_it()
        while sent < FRAMES:
            views += 1
            if views == 50:  # the allocator has what it wants by now
                scene = None
                before = Footprint()
            scene = Scene(sacrificed, views, arena if rng.random() < 0.5 else None)
            for _ in range(60):
                header, payload = scene.frames(rng)
                whole = frames.pack(scene.broken.id, header) + payload
                if rng.random() < 0.7:
                    whole = bend(header, payload, rng)
                    whole = whole[:8] + struct.pack("<I", views) + whole[12:]
                    if rng.random() < 0.1 and whole[0] != frames.SPAN:
                        flipped = bytearray(whole)
                        flipped[rng.randrange(min(len(flipped), 60))] ^= 1 << rng.randrange(8)
                        whole = bytes(flipped)
                    sent += 1
                scene.broken.raw(whole, lane=0 if arena is scene.arena else rng.randrange(2))
                if scene.broken.blamed:
                    break
            scene.check()
            done += sum(work.done() and scene.broken.error_of(work) is None for work in scene.works)
            scene.broken.close()
        assert done > views // 50, "nothing ended well: the frames are not what members send"
        assert summing.stop() > 10, "it summed meanwhile"
        scene = None
        assert before is not None
        before.check(_KEPT_BYTES, views // 4)
        arena.close()


def _arena_full_of_it() -> Arena:
    arena = Arena()
    for _ in range(24):
        slot = arena.take()
        assert slot is not None
        arena.bytes_of(slot).fill_(BYTE[0])
    arena.empty((4 << 20,), torch.uint8).fill_(BYTE[0])
    return arena


# ---- bytes ------------------------------------------------------------------------------------------------


@settings(max_examples=1000 * SCALE, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    padded = data.ljust(frames.HEADER_BYTES, b"\0")
    for view in ((1, 1), struct.unpack_from("<II", padded, 4)):
        try:
            header = frames.unpack(view, padded)
        except ProtocolError:
            continue
        assert frames.payload_bytes(header) <= frames.MAX_PIECE_BYTES
        assert frames.pack(view, header) == padded[: frames.HEADER_BYTES]
    try:
        descriptor, rest = frames.unpack_open(data)
    except ProtocolError:
        return
    assert len(descriptor) + len(rest) + 2 == len(data)


@settings(max_examples=1000 * SCALE, deadline=None, derandomize=True)
@given(st.binary(max_size=4096) | st.integers(0, 4096).map(lambda n: b"\x91" * n))
def test_any_descriptor_is_told_in_few_words(descriptor: bytes) -> None:
    made: Callable[..., object] = lambda flow: None  # noqa: E731
    text = Operation("barrier", (), 0, made).describe(descriptor)  # type: ignore[arg-type]
    assert len(text) <= 400
    assert text.isprintable()


@pytest.fixture(scope="module")
def listener() -> Listener:
    listener = Listener("127.0.0.1", "a token")
    yield listener  # type: ignore[misc]
    listener.close()


@settings(
    max_examples=150 * SCALE,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_frames_end_their_view_at_most(listener: Listener, data: st.DataObject) -> None:
    """What hypothesis thinks of, and it shrinks what it finds."""
    number = st.sampled_from(_NUMBERS)
    small = st.integers(0, 7)
    header = st.tuples(small, st.integers(0, 3), number, small, number, number, number, number, number)
    said = data.draw(st.lists(st.tuples(header, st.integers(0, 1), st.binary(max_size=300)), max_size=8))
    scene = Scene(listener, 1, None)
    try:
        for values, lane, payload in said:
            scene.broken.raw(frames.pack(scene.broken.id, Header(*values)) + payload, lane=lane)
        scene.check()
    finally:
        scene.broken.close()

"""What a broken member could send, one thing at a time: each ends its view, names the member, and harms no sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import psutil
import pytest
import torch
from tests.unit.collectives.wire import BYTE, TOKEN, VALUE, Broken

from everstep.collectives.errors import Mismatch, PeerLost
from everstep.collectives.operations import Operation
from everstep.collectives.transport import frames
from everstep.collectives.transport.arena import Arena
from everstep.collectives.transport.frames import Header
from everstep.collectives.transport.listener import Listener

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
_PIECE = 1 << 20
Make = Callable[..., Broken]


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener("127.0.0.1", TOKEN)
    yield listener
    listener.close()


@pytest.fixture
def make(listener: Listener) -> Iterator[Make]:
    made: list[Broken] = []

    def one(size: int = 2, arena: Arena | None = None) -> Broken:
        made.append(Broken(listener, 1 + len(made), size, arena))
        return made[-1]

    yield one
    for broken in made:
        broken.close()


def _begun(broken: Broken, begin: Callable[[], object]) -> tuple[Operation, object]:
    """What `begin` submits, too."""
    submit, found = broken.me._submit, list[Operation]()
    broken.me._submit = lambda operation: found.append(operation) or submit(operation)  # type: ignore[method-assign]
    work = begin()
    broken.me._submit = submit  # type: ignore[method-assign]
    return found[0], work


def _header(kind: int, tag: int, length: int, key: int = 0, slot: int = 0, generation: int = 0) -> Header:
    return Header(kind, 0, 0, tag, 1, key, slot, generation, length)


@pytest.mark.parametrize("kind", [frames.OPEN, frames.PIECE, frames.SLOT, frames.SPAN])
def test_a_part_of_no_bytes_is_no_part(make: Make, kind: int) -> None:
    broken, tensor = make(), torch.zeros(_PIECE // 4)
    operation, work = _begun(broken, lambda: broken.me.broadcast(tensor, root=1))
    broken.open(operation)
    broken.say(_header(kind, 0, 0))
    assert isinstance(broken.error_of(work), PeerLost)  # type: ignore[arg-type]
    assert [peer for peer, _ in broken.blamed] == [1]


def test_one_piece_on_two_connections_is_taken_once(make: Make) -> None:
    """The second would go on being written after the operation is over, into a tensor that is the caller's again."""
    broken, tensor = make(), torch.zeros(_PIECE // 4)
    operation, work = _begun(broken, lambda: broken.me.broadcast(tensor, root=1))
    broken.open(operation)
    whole = frames.pack(broken.id, _header(frames.PIECE, 0, _PIECE)) + BYTE * _PIECE
    broken.raw(whole[:1000])
    broken.raw(whole[:1000].replace(BYTE, b"\x01"), lane=1)
    assert isinstance(broken.error_of(work), PeerLost)  # type: ignore[arg-type]
    assert "came twice" in broken.blamed[0][1]


def test_what_is_still_coming_when_an_operation_fails_is_dropped(make: Make) -> None:
    """The caller has its tensor back; the frame's rest is read, so the view goes on."""
    broken, tensor = make(), torch.zeros(_PIECE // 4)
    _, work = _begun(broken, lambda: broken.me.broadcast(tensor, root=1))
    whole = frames.pack(broken.id, _header(frames.PIECE, 0, _PIECE)) + BYTE * _PIECE
    broken.raw(whole[:1000])
    other, _ = _begun(broken, lambda: broken.me.barrier(tag=7))
    other.tag = 0
    broken.open(other, lane=1)
    assert isinstance(broken.error_of(work), Mismatch)  # type: ignore[arg-type]
    tensor.zero_()
    broken.raw(whole[1000:])
    assert not tensor.any()
    assert broken.blamed == []
    small = torch.zeros(4)
    operation, work = _begun(broken, lambda: broken.me.all_reduce(small, tag=9))
    broken.open(operation, BYTE * 16)
    work.wait(1)  # type: ignore[attr-defined]
    assert small.tolist() == [VALUE] * 4


@pytest.mark.parametrize("given", [0, 4, 39, 41, 1000])
def test_a_small_part_of_a_wrong_length_is_a_mismatch(make: Make, given: int) -> None:
    """One element would be spread over all."""
    broken, tensor = make(), torch.zeros(10)
    operation, work = _begun(broken, lambda: broken.me.broadcast(tensor, root=1))
    broken.open(operation, BYTE * given)
    assert isinstance(broken.error_of(work), Mismatch)  # type: ignore[arg-type]
    assert not tensor.any()


def test_a_slot_is_released_by_who_reads_it_and_once(make: Make) -> None:
    """Else it would be written again while the other reader is at it."""
    for releases in ([1, 1], [1, 2, 2]):
        broken = make(3, arena := Arena())
        operation, _ = _begun(
            broken, lambda broken=broken: broken.me.all_gather(torch.zeros(3 * _PIECE // 4), torch.ones(_PIECE // 4))
        )
        for peer in (1, 2):
            broken.open(operation, peer=peer)
        assert broken.blamed == []
        slot, same = (
            next(h for h in _headers(broken.id, broken.lanes[(peer, 0)].recv(1 << 16)) if h.kind == frames.SLOT)
            for peer in (1, 2)
        )
        assert slot == same, "this is about a slot with two readers"
        for peer in releases:
            broken.say(slot._replace(kind=frames.RELEASE, length=0), peer=peer)
        assert [peer for peer, _ in broken.blamed] == [releases[-1]]
        arena.close()


def _headers(view: tuple[int, int], data: bytes) -> Iterator[Header]:
    at = 0
    while at < len(data):
        header = frames.unpack(view, data, at)
        at += frames.HEADER_BYTES + frames.payload_bytes(header)
        yield header


def test_a_registered_tensor_is_read_by_whom_it_was_shown_to_and_once(make: Make, listener: Listener) -> None:
    broken = make(3, arena := Arena())
    tensor = listener.arena.empty((_PIECE // 4,), torch.float32).fill_(1)
    operation, work = _begun(broken, lambda: broken.me.broadcast(tensor, root=0))
    for peer in (1, 2):
        broken.open(operation, peer=peer)
    read = _header(frames.READ, 0, 0)
    broken.say(read, peer=1)
    assert not work.done()  # type: ignore[attr-defined]
    broken.say(read, peer=1)
    assert isinstance(broken.error_of(work), PeerLost)  # type: ignore[arg-type]
    arena.close()


@pytest.mark.parametrize(
    "header",
    [
        _header(frames.SLOT, 0, _PIECE, slot=24, generation=1),
        _header(frames.SLOT, 0, _PIECE, slot=(1 << 32) - 1),
        _header(frames.SLOT, 0, _PIECE, slot=3, generation=77),
        _header(frames.SPAN, 0, _PIECE, slot=(1 << 32) - 1, generation=(1 << 32) - 1),
        _header(frames.SLOT, 0, _PIECE - 1),
        _header(frames.SLOT, 0, _PIECE, key=1),
        _header(frames.SLOT, 0, _PIECE, key=(1 << 32) - 1),
        _header(frames.PIECE, 0, 4 << 20),
        _header(frames.PIECE, 99, 1),
        _header(frames.SLOT, 99, 1),
        _header(frames.READ, 0, 0),
        _header(frames.RELEASE, 0, 0, slot=5),
        _header(frames.RELEASE, 0, 0, slot=(1 << 32) - 1),
        _header(frames.PIECE, 0, (1 << 64) - 1),
        _header(9, 0, 0),
    ],
    ids=str,
)
def test_what_points_nowhere_ends_the_view(make: Make, header: Header) -> None:
    broken, tensor = make(2, arena := Arena()), torch.zeros(_PIECE // 4)
    operation, work = _begun(broken, lambda: broken.me.broadcast(tensor, root=1))
    broken.open(operation)
    broken.say(header)
    assert isinstance(broken.error_of(work), PeerLost)  # type: ignore[arg-type]
    assert not work.error or tensor.sum() == 0  # type: ignore[attr-defined]
    arena.close()


def test_a_large_part_that_lies_askew_is_refused(make: Make) -> None:
    broken, tensor = make(2, arena := Arena()), torch.zeros(100_000)
    operation, work = _begun(broken, lambda: broken.me.all_reduce(tensor))
    broken.open(operation)
    broken.say(_header(frames.SPAN, 0, 50_000 * 4, slot=0, generation=1))
    assert isinstance(broken.error_of(work), PeerLost)  # type: ignore[arg-type]
    arena.close()


def test_who_changed_its_memory_is_blamed_not_who_spoke_last(make: Make) -> None:
    broken, tensor = make(3, arena := Arena()), torch.zeros(150_000)
    operation, _ = _begun(broken, lambda: broken.me.all_reduce(tensor))
    for peer in (1, 2):
        broken.open(operation, peer=peer)
    size = 50_000 * 4
    slot = arena.take()
    assert slot is not None
    broken.say(_header(frames.SLOT, 0, size, slot=slot, generation=arena.generation(slot) + 1), peer=2)
    broken.say(_header(frames.SLOT, 0, size, slot=slot, generation=arena.generation(slot)), peer=1)
    assert [peer for peer, _ in broken.blamed] == [2], broken.blamed
    arena.close()


@pytest.mark.parametrize("rides", [0, frames.EAGER_BYTES])
def test_operations_begun_early_take_bounded_memory(make: Make, rides: int) -> None:
    broken, before = make(), psutil.Process().memory_info().rss
    descriptor = msgspec.msgpack.encode(["barrier"])
    payload = frames.pack_open(descriptor, bytes(rides))
    count = 0
    while not broken.blamed and count < 10_000:
        count += 1
        broken.say(Header(frames.OPEN, 0, 0, count, 1, 0, 0, 0, len(payload)), payload)
    assert 1000 < count < 5000, "as far ahead as a member may be"
    assert count * rides < 66 << 20
    assert psutil.Process().memory_info().rss - before < 128 << 20


@pytest.mark.parametrize("seq", [4098, 1 << 31, (1 << 32) - 1])
def test_an_operation_that_nobody_can_have_come_to_yet_is_refused(make: Make, seq: int) -> None:
    broken = make()
    payload = frames.pack_open(b"\x91\xa1x")
    broken.say(Header(frames.OPEN, 0, 0, 0, seq, 0, 0, 0, len(payload)), payload)
    assert [peer for peer, _ in broken.blamed] == [1]


@pytest.mark.parametrize(
    "descriptor",
    [b"", b"\x90", b"\x91" * 4096, b"\x91\xa2\xff\xfe", b"\xdd\xff\xff\xff\xff", b"\xc1", b"\x91\x81\x91\x01\x01",
     b"\x92\xa1x\xa5\n\x1b[2J", b"\x91\xda\x0f\xf0" + b"x" * 4080],
)  # fmt: skip
def test_a_descriptor_of_anything_is_a_mismatch_in_few_words(make: Make, descriptor: bytes) -> None:
    broken, tensor = make(), torch.zeros(10)
    work = broken.me.all_reduce(tensor)
    payload = frames.pack_open(descriptor)
    broken.say(_header(frames.OPEN, 0, len(payload)), payload)
    error = broken.error_of(work)
    assert isinstance(error, Mismatch)
    assert len(str(error)) < 1000
    assert str(error).isprintable()
    assert broken.blamed == []


def test_a_member_that_asks_on_and_reads_nothing_is_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.collectives.outbox._MAX_UNREAD", 100)
    broken = make(2, arena := Arena())
    operation, work = _begun(broken, lambda: broken.me.barrier(tag=3))
    broken.open(operation)
    work.wait(1)  # type: ignore[attr-defined]
    header = frames.pack(broken.id, _header(frames.SLOT, 3, 1))  # of what is over: it is given back
    for _ in range(3000):
        broken.raw(header * 100)
        if broken.blamed:
            break
    assert "reads nothing" in broken.blamed[0][1]
    arena.close()

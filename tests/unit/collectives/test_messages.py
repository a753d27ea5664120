"""Wire messages: what is sent arrives, and no bytes whatever raise anything but what a reader catches."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from everstep.collectives import messages as m

ID = m.ViewId(3, 14)
MEMBER = m.Member("rank-0.1", 0, "slot-0", "127.0.0.1:5", "127.0.0.1:6", 77)
VIEW = m.View(ID, (MEMBER, m.Member("rank-1.4", 1, "slot-1", "h:2")), 9, b"plan")
FROM_MEMBERS: list[m.MemberMessage] = [
    m.Join(MEMBER, {"torch": "2"}),
    m.Inventory(ID, b"i"),
    m.Level(ID),
    m.Vote(ID, 5, b"v"),
    m.Complaint(ID, "rank-1.4", "reset"),
    m.Note("hello", b"\xff\x00"),
]
FROM_WATCHERS: list[m.WatcherMessage] = [
    m.Watching("slot-0", 0, "h:1", 12),
    m.FromMember("rank-0.1", m.encode(FROM_MEMBERS[0])),
    m.Died("rank-0.1", "signal 9", 1.5),
    m.Stock(ID, "slot-0", ("rank-0.0",), b"s"),
    m.Beat("slot-0"),
    m.WatcherNote("listening", b"n"),
    m.StandsBy("standby-1", 12, "n"),
]
FROM_COORDINATOR: list[m.CoordinatorMessage] = [
    m.Prepare(ID, ("rank-0.1",), ("rank-1.4",), (m.Lost("rank-1.4", "frozen", 1, 40.0),)),
    m.NewView(VIEW),
    m.Go(ID),
    m.Verdict(ID, 5, b"v", reform=True),
    m.Excluded("no"),
    m.Order("end", b"o"),
]
DECODERS: dict[str, tuple[Callable[[bytes], Any], list[Any]]] = {
    "member": (m.decode_member, FROM_MEMBERS),
    "watcher": (m.decode_watcher, FROM_WATCHERS),
    "coordinator": (m.decode_coordinator, FROM_COORDINATOR),
    "envelope": (m.decode_envelope, [m.ToMembers(("a", "b"), message) for message in FROM_COORDINATOR]),
}
CAUGHT = (msgspec.MsgspecError, ValueError)


@pytest.mark.parametrize("direction", DECODERS)
def test_every_message_arrives_as_it_was_sent(direction: str) -> None:
    decode, messages = DECODERS[direction]
    for message in messages:
        assert decode(m.encode(message)) == message


def test_every_message_has_an_example_here() -> None:
    unions = [(m.MemberMessage, FROM_MEMBERS), (m.WatcherMessage, FROM_WATCHERS)]
    for union, examples in [*unions, (m.CoordinatorMessage, FROM_COORDINATOR)]:
        assert set(union.__args__) == {type(example) for example in examples}


@pytest.mark.parametrize("direction", DECODERS)
def test_a_message_of_another_direction_is_refused(direction: str) -> None:
    decode, _ = DECODERS[direction]
    for other, (_, messages) in DECODERS.items():
        for message in messages:
            if other != direction:
                with pytest.raises(CAUGHT):
                    decode(m.encode(message))


@pytest.mark.parametrize("direction", DECODERS)
def test_garbage_and_damaged_messages_raise_only_what_readers_catch(direction: str) -> None:
    decode, messages = DECODERS[direction]
    rng = random.Random(direction)
    refused = 0
    for _ in range(3000):
        data = bytearray(m.encode(rng.choice(messages)))
        match rng.randrange(4):
            case 0:
                data = bytearray(rng.randbytes(rng.randint(0, 40)))
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                for _ in range(rng.randint(1, 3)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            case 3:
                data += rng.randbytes(rng.randint(1, 4))
        try:
            decode(bytes(data))
        except CAUGHT:
            refused += 1
    assert refused > 1500


def test_text_that_is_not_utf_8_is_refused_like_other_garbage() -> None:
    """msgspec has an error of another kind for it, which readers do not catch."""
    data = m.encode(m.Excluded("?")).replace(b"?", b"\xff")
    with pytest.raises(msgspec.ValidationError):
        m.decode_coordinator(data)


def test_nesting_that_would_exhaust_the_stack_is_refused_like_other_garbage() -> None:
    deep = b"\x82\xa4type\xa5level\xa1?" + b"\x91" * 1_000_000  # in a field that is skipped
    for data in (b"\x91" * 1_000_000, deep):
        with pytest.raises(msgspec.ValidationError):
            m.decode_member(data)


@pytest.mark.parametrize("epoch", [-1, 1 << 32])
def test_an_epoch_that_frames_cannot_name_is_refused(epoch: int) -> None:
    data = m.encode(m.Level(m.ViewId(epoch, 1)))
    with pytest.raises(msgspec.ValidationError):
        m.decode_member(data)


def test_views_are_ordered_by_epoch_and_then_number() -> None:
    ids = [m.ViewId(1, 9), m.ViewId(2, 0), m.ViewId(2, 1), m.ViewId(10, 0)]
    assert sorted(random.Random(1).sample(ids, 4)) == ids
    assert str(ids[0]) == "1.9"
    assert [VIEW.rank_of(name) for name in ("rank-0.1", "rank-1.4")] == [0, 1]
    with pytest.raises(ValueError, match="not in list"):
        VIEW.rank_of("rank-9.9")

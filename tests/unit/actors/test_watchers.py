"""The managers' streams as the supervisor sees them, and scripted faults that go through them."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from everstep.actors.config import FaultReached, Wake
from everstep.actors.scripted import Script
from everstep.actors.watchers import Watchers
from everstep.collectives import messages as m
from everstep.platform.job.spec import Fault

_idents = itertools.count(1)


class Stream:
    """The server's end of a control stream."""

    def __init__(self) -> None:
        self.ident = next(_idents)
        self.sent: list[m.ToMembers] = []
        self.closed = False

    def send(self, data: bytes) -> None:
        self.sent.append(m.decode_envelope(data))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def streams() -> list[Stream]:
    return [Stream(), Stream(), Stream()]


@pytest.fixture
def watchers(streams: list[Stream]) -> Watchers:
    watchers = Watchers()
    for slot, stream in enumerate(streams):
        watchers.add(stream, m.Watching(f"slot-{slot}", slot, f"f:{slot}", 100 + slot), now=10.0)
        found = watchers.of(stream)
        assert found is not None
        found.members.add(f"rank-{slot}.1")
    return watchers


def test_members_are_told_through_their_own_manager_in_one_envelope(
    watchers: Watchers, streams: list[Stream]
) -> None:
    found = watchers.of(streams[0])
    assert found is not None
    found.members.add("rank-0.2")
    go = m.Go(m.ViewId(1, 1))
    watchers.tell_members(iter(["rank-0.1", "rank-0.2", "rank-2.1", "nobody"]), go)
    assert [stream.sent for stream in streams] == [
        [m.ToMembers(("rank-0.1", "rank-0.2"), go)],
        [],
        [m.ToMembers(("rank-2.1",), go)],
    ]


def test_managers_are_told_without_names(watchers: Watchers, streams: list[Stream]) -> None:
    order = m.Order("release")
    watchers.tell("slot-1", order)
    watchers.tell("nowhere", order)
    assert [len(stream.sent) for stream in streams] == [0, 1, 0]
    watchers.tell_all(order)
    assert [stream.sent[-1] for stream in streams] == [m.ToMembers((), order)] * 3


def test_a_manager_that_was_given_up_is_deaf_and_dumb(watchers: Watchers, streams: list[Stream]) -> None:
    dropped = watchers.drop("slot-1")
    assert dropped is not None
    assert streams[1].closed
    assert watchers.of(streams[1]) is None
    watchers.tell_all(m.Order("end"))
    watchers.tell_members(["rank-1.1"], m.Order("end"))
    assert streams[1].sent == []
    assert watchers.drop("slot-1") is None
    assert set(watchers.fetch_addresses()) == {"slot-0", "slot-2"}


def test_a_successor_takes_the_domain_over_and_what_its_predecessor_still_brings_is_not_its_own(
    watchers: Watchers,
) -> None:
    watchers.drop("slot-1")
    successor = Stream()
    watchers.add(successor, m.Watching("slot-1", 1, "f:9", 200), now=20.0)
    found = watchers.of(successor)
    assert found is not None
    assert (found.domain, found.fetch, found.members) == ("slot-1", "f:9", set())
    assert watchers.fetch_addresses()["slot-1"] == "f:9"
    assert watchers.of(Stream()) is None


def test_lateness_and_forgiveness(watchers: Watchers, streams: list[Stream]) -> None:
    found = watchers.of(streams[2])
    assert found is not None
    found.last_beat = 11.5
    assert watchers.late(12.0, 2.0) == []
    assert {w.domain for w in watchers.late(12.1, 2.0)} == {"slot-0", "slot-1"}
    watchers.forgive(12.1)
    assert watchers.late(14.0, 2.0) == []
    assert len(watchers.late(14.2, 2.0)) == 3


def test_at_the_end_members_and_managers_are_sent_home(watchers: Watchers, streams: list[Stream]) -> None:
    found = watchers.of(streams[1])
    assert found is not None
    found.members.clear()
    watchers.end()
    assert [[(e.names, e.message.kind) for e in s.sent] for s in streams] == [  # type: ignore[union-attr]
        [(("rank-0.1",), "end"), ((), "end")],
        [((), "end")],
        [(("rank-2.1",), "end"), ((), "end")],
    ]


FAULTS = (
    Fault(at_step=3, rank=1, do="kill", phase="vote"),
    Fault(at_step=4, do="scale", to=2),
    Fault(at_step=5, rank=0, do="freeze", wake_s=0.5),
    Fault(at_step=9, do="scale", to=3),
)


def test_a_fault_strikes_when_its_member_is_told_so(watchers: Watchers, streams: list[Stream]) -> None:
    script = Script(FAULTS, watchers)
    said = script.reached("rank-1.1", "slot-1", FaultReached(0, 3))
    assert said == "scripted: kill rank 1 (rank-1.1) at step 3, phase vote"
    ((envelope,), others) = streams[1].sent, streams[0].sent + streams[2].sent
    assert others == []
    assert envelope == m.ToMembers(("rank-1.1",), m.Order("fault", msgspec.msgpack.encode(0)))
    assert not script.is_woken("rank-1.1")


def test_one_that_is_to_be_woken_is_announced_to_its_manager_before_it_freezes(
    watchers: Watchers, streams: list[Stream]
) -> None:
    script = Script(FAULTS, watchers)
    script.reached("rank-0.1", "slot-0", FaultReached(2, 5))
    wake, strike = streams[0].sent
    assert wake == m.ToMembers((), m.Order("wake", msgspec.msgpack.encode(Wake("rank-0.1", 0.5))))
    assert strike.names == ("rank-0.1",)
    assert script.is_woken("rank-0.1")
    assert not script.is_woken("rank-0.2"), "its successor may be killed at once"


def test_scales_are_the_supervisors_own() -> None:
    assert Script(FAULTS, Watchers()).scales == {4: 2, 9: 3}


def test_a_prepare_names_to_each_manager_its_own_members_and_those_that_nobody_knows(
    watchers: Watchers, streams: list[Stream]
) -> None:
    asked = ("rank-0.1", "rank-2.1", "stranger", "rank-9.1")
    prepare = m.Prepare(m.ViewId(1, 2), asked, ("rank-1.1",), (m.Lost("rank-1.1", "signal 9", 1),))
    watchers.prepare(prepare)
    told = [envelope.message for stream in streams for envelope in stream.sent]
    assert [message.asked for message in told if isinstance(message, m.Prepare)] == [
        ("rank-0.1", "stranger", "rank-9.1"),
        ("stranger", "rank-9.1"),
        ("rank-2.1", "stranger", "rank-9.1"),
    ]
    assert all(isinstance(message, m.Prepare) and message.lost == prepare.lost for message in told)
    watchers.prepare(prepare, "slot-1")
    assert [len(stream.sent) for stream in streams] == [1, 2, 1]


def test_a_message_to_many_members_is_encoded_once_and_arrives_as_it_was(
    watchers: Watchers, streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[object] = []
    encode = m.encode
    monkeypatch.setattr(m, "encode", lambda message: encoded.append(message) or encode(message))
    verdict = m.Verdict(m.ViewId(1, 1), 7, b"payload", reform=True)
    watchers.tell_members(["rank-0.1", "rank-1.1", "rank-2.1"], verdict)
    assert [stream.sent for stream in streams] == [[m.ToMembers((f"rank-{i}.1",), verdict)] for i in range(3)]
    assert encoded == [verdict]

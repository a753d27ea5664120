"""A member that has the token and speaks nonsense loses its stream; the coordinator serves the others."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from everstep.collectives.control import ControlClient
from everstep.collectives.coordinator import Coordinator
from everstep.collectives.group_messages import Ballot, Enter, Formed, Report, decode_from_coordinator
from everstep.collectives.messages import Beat, Died, Member, View, ViewId, Watching, encode

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
TOKEN = "a token"
WAIT_S = 10.0


def _member(name: str) -> Member:
    return Member(name, 0, "host", "127.0.0.1:9", incarnation="1")


class Client:
    def __init__(self, address: str) -> None:
        self.heard: queue.Queue[bytes] = queue.Queue()
        self.closed: queue.Queue[str] = queue.Queue()
        self.stream = ControlClient(address, TOKEN, self.heard.put, self.closed.put, timeout_s=5.0)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    coordinator = Coordinator("127.0.0.1:0", TOKEN, 1)
    coordinator.start()
    yield coordinator
    coordinator.stop()


def _serves(coordinator: Coordinator, name: str) -> None:
    client = Client(coordinator.address)
    client.stream.send(encode(Watching("host", 0, "", 1)))
    member = Client(coordinator.address)
    member.stream.send(encode(Enter(_member(name))))
    deadline = time.monotonic() + WAIT_S
    while member.heard.empty() and time.monotonic() < deadline:
        client.stream.send(encode(Beat("host")))  # a silent watcher's members are dead, after 2 s
        time.sleep(0.1)
    formed = decode_from_coordinator(member.heard.get(timeout=1))
    assert isinstance(formed, Formed)
    assert not coordinator.wait(0), "it has ended"
    for one in (client, member):
        one.stream.close()


_VIEW = View(ViewId(0, 1), (_member("a"), _member("a")), 5)
_DEEP = b"\x82\xa4type\xa4beat\xa1?" + b"\x91" * 100_000


@pytest.mark.parametrize(
    "messages",
    [
        [b""],
        [b"\xc1"],
        [_DEEP],
        [b"\x91" * 100_000],
        [encode(Died("x", "y")).replace(b"y", b"\xff")],
        [encode(Enter(_member("x"))), encode(Enter(_member("y")))],
        [encode(Watching("h", 0, "", 1)), encode(Watching("i", 0, "", 1))],
        [encode(Enter(_member("x"), Report(View(ViewId(1 << 32, 1), (_member("x"),), 0))))],
        [encode(Enter(_member("x"), Report(View(ViewId(1, 1), (_member("x"),), (1 << 64) - 1))))],
        [encode(Enter(_member("x"))), encode(Ballot(ViewId(1, 1), (1 << 64) - 1, "ok"))],
    ],
)
def test_nonsense_ends_its_stream_only(coordinator: Coordinator, messages: list[bytes]) -> None:
    client = Client(coordinator.address)
    for message in messages:
        client.stream.send(message)
    assert client.closed.get(timeout=WAIT_S)
    client.stream.close()
    _serves(coordinator, "honest")


def test_messages_with_anything_in_them_leave_it_running(coordinator: Coordinator) -> None:
    """What a member says may be nonsense of the right types: unknown names, views of the future, twice the same."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    said: list[Callable[[], msgspec.Struct]] = [
        lambda: Enter(_member(rng.choice("abc")), rng.choice([None, Report(_VIEW, doubt=_ballot(rng))])),
        lambda: _ballot(rng),
        lambda: Died(rng.choice(["a/1", "", "/"]), "nobody knows"),
        lambda: Watching(rng.choice(["host", ""]), -5, "", -1),
    ]
    for _ in range(30):
        client = Client(coordinator.address)
        for _ in range(rng.randrange(1, 20)):
            data = bytearray(encode(rng.choice(said)()))
            if rng.random() < 0.3:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            client.stream.send(bytes(data))
        client.stream.close()
    assert not coordinator.wait(0.3), "it has ended"


def _ballot(rng: random.Random) -> Ballot:
    kind = rng.choice(["closing", "ok", "abort", "admit"])
    return Ballot(ViewId(rng.randrange(3), rng.randrange(3)), rng.choice([-1, 0, 1, 5, 6, 1 << 62]), kind)

"""Who may hold up a listener, and for how long: nobody that has proved nothing."""

from __future__ import annotations

import array
import os
import resource
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from tests.unit.collectives.wire import TOKEN, WAIT_S, Footprint, Summing, connected, dial, enter, is_dropped, prove

from everstep.collectives.errors import HandshakeRefused
from everstep.collectives.messages import ViewId
from everstep.collectives.transport import greeting, listener
from everstep.collectives.transport.arena import Window
from everstep.collectives.transport.frames import ProtocolError
from everstep.collectives.transport.greeting import Hello, await_acceptance
from everstep.collectives.transport.listener import Listener

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")


@pytest.fixture
def pair() -> Iterator[list[Listener]]:
    listeners = [Listener("127.0.0.1", TOKEN) for _ in range(2)]
    yield listeners
    for one in listeners:
        one.close()


def _sums(listeners: list[Listener], number: int = 2) -> None:
    with connected(listeners, number) as members:
        assert Summing(members).stop() >= 3


def test_a_member_that_waits_for_its_view_outlives_a_flood(pair: list[Listener]) -> None:
    """It has proved the token and was first: the oldest of all is not the oldest stranger."""
    with dial(pair[0]) as member:
        prove(member, Hello(ViewId(1, 5), 1, 0, 0))
        strangers = [dial(pair[0]) for _ in range(3 * listener.MAX_GREETINGS)]
        assert is_dropped(strangers[0])
        assert not is_dropped(strangers[-1], 0.05), "the newest have their time"
        assert not is_dropped(member, 0.05)
        with connected(pair, 4) as members:
            assert Summing(members).stop() >= 3
        assert not is_dropped(member, 0.05)
        for stranger in strangers:
            stranger.close()


def test_a_parked_member_is_accepted_when_its_view_begins(pair: list[Listener]) -> None:
    class View:
        id = ViewId(1, 5)

    class Mesh:
        view, rank, adopted = View(), 0, None

        def adopt(self, *what: object) -> None:
            self.adopted = what
            what[2].close()  # type: ignore[attr-defined]

    mesh = Mesh()
    with dial(pair[0]) as old, dial(pair[0]) as same, dial(pair[0]) as member, dial(pair[0]) as new:
        for connection, view in ((old, 4), (same, 5), (member, 5), (new, 6)):
            prove(connection, Hello(ViewId(1, view), 1, 0, 0))
            time.sleep(0.05)
        assert is_dropped(same), "the newer of two that call themselves the same"
        pair[0].expect(mesh)  # type: ignore[arg-type]
        await_acceptance(member, time.monotonic() + WAIT_S)
        assert is_dropped(old)
        assert is_dropped(member)
        assert mesh.adopted is not None
        assert mesh.adopted[:2] == (1, 0)
        assert not is_dropped(new, 0.05)


def test_who_waits_too_long_for_a_view_is_dropped(pair: list[Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_VIEW_WAIT_S", 0.2)
    with dial(pair[0]) as member:
        prove(member, Hello(ViewId(1, 5), 1, 0, 0))
        assert is_dropped(member, 2.0)


def test_slow_drip_ends_at_one_deadline(pair: list[Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "HELLO_TIMEOUT_S", 0.4)
    began = time.monotonic()
    with dial(pair[0]) as slow:
        for byte in b"EVST\x01\x00" + bytes(30):
            try:
                slow.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        assert is_dropped(slow)
    assert time.monotonic() - began < 1.5


def test_who_never_shows_its_arena_holds_nobody_up(pair: list[Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_SWAP_S", 1.0)
    with connected(pair, 1) as members:
        stuck = [enter(pair[0], Hello(ViewId(1, 1), 1, 0, 0), local=True) for _ in range(100)]
        began = time.monotonic()
        strangers = [dial(pair[0]) for _ in range(2 * listener.MAX_GREETINGS)]
        assert not is_dropped(stuck[-1], 0.05), "it has proved the token: its time is its own"
        for stranger in strangers:
            stranger.close()
        assert Summing(members).stop() >= 3
        with dial(pair[0]) as stranger:
            stranger.sendall(b"GET / ")
            assert is_dropped(stranger, 0.9)
        for one in stuck:
            assert is_dropped(one)
            one.close()
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("what", ["none", "two", "small", "shrinkable", "a pipe", "a file"])
def test_what_is_no_arena_is_refused_and_leaks_nothing(pair: list[Listener], what: str, tmp_path: object) -> None:
    with connected(pair, 1) as members:
        before = Footprint()
        for _ in range(20):
            connection = enter(pair[0], Hello(ViewId(1, 1), 1, 0, 0), local=True)
            fds = _wrong_arenas(what, tmp_path)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            connection.sendmsg([bytes(16)], rights)
            for fd in fds:
                os.close(fd)
            assert is_dropped(connection)
            connection.close()
        before.check(64 << 20, 2000)
        assert Summing(members).stop() >= 3


def _wrong_arenas(what: str, folder: object) -> list[int]:
    if what == "none":
        return []
    if what == "a pipe":
        read, write = os.pipe()
        os.close(write)
        return [read]
    if what == "a file":
        fd = os.open(f"{folder}/arena", os.O_RDWR | os.O_CREAT)
    else:
        fd = os.memfd_create("no arena", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 100 if what == "small" else 32 << 20)
    return [fd, os.dup(fd)] if what == "two" else [fd]


def test_an_arena_that_could_shrink_is_never_mapped() -> None:
    """Reading what was cut off would be a SIGBUS: the end of the process."""
    fd = os.memfd_create("shrinks", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 30)
    with pytest.raises(ProtocolError, match="shrink"):
        Window(fd)


def test_the_listener_survives_having_no_descriptors_left(pair: list[Listener]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    strangers: list[socket.socket] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 20, hard))
        try:
            while len(strangers) < 100:
                strangers.append(dial(pair[0]))
        except OSError as error:
            assert "Too many open files" in str(error)  # noqa: PT017
        assert len(strangers) < 100
        time.sleep(0.1)
        for stranger in strangers:
            stranger.close()
        with dial(pair[0]) as member:
            prove(member, Hello(ViewId(1, 5), 1, 0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    _sums(pair)


def test_a_connection_is_for_the_rank_that_it_was_meant_for(pair: list[Listener]) -> None:
    """A port that another member has taken over lets nobody in."""
    with connected(pair, 1):
        for rank, to in ((1, 1), (0, 0), (2, 1)):
            with dial(pair[0]) as member:
                prove(member, Hello(ViewId(1, 1), rank, to, 0))
                with pytest.raises(ConnectionError):  # and not accepted first
                    await_acceptance(member, time.monotonic() + WAIT_S)


def test_closing_ends_every_thread_and_connection() -> None:
    before = Footprint()
    one = Listener("127.0.0.1", TOKEN)
    connections = [dial(one) for _ in range(100)]
    for number in range(20):
        connections.append(dial(one))
        prove(connections[-1], Hello(ViewId(1, 5), number, 0, 0))
    began = time.monotonic()
    one.close()
    one.close()
    assert time.monotonic() - began < greeting.HELLO_TIMEOUT_S / 2, "nobody's time is waited for"
    for connection in connections:
        assert is_dropped(connection)
        connection.close()
    del one  # its arena's mapping goes with it
    before.check(64 << 20, 2000)


def test_another_token_is_refused_by_both_sides(pair: list[Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    with dial(pair[0]) as caller, pytest.raises(HandshakeRefused, match="token"):
        prove(caller, Hello(ViewId(1, 1), 1, 0, 0), "another")
    real = greeting.proof_matches

    def careless(given: bytes, token: str, role: str, *rest: bytes) -> bool:
        return role == "server" or real(given, token, role, *rest)  # a caller that does not look

    monkeypatch.setattr(greeting, "proof_matches", careless)
    with dial(pair[0]) as caller:
        prove(caller, Hello(ViewId(1, 1), 1, 0, 0), "another")
        with pytest.raises(HandshakeRefused, match="wrong token"):
            await_acceptance(caller, time.monotonic() + WAIT_S)

"""The control plane of groups over real processes: who is in, who is dead, what is committed, who says so."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.collectives import Coordinator, CoordinatorLost, Group, HandshakeRefused, control
from integration.group_peers import TOKEN, CoordinatorProcess, Peer, all_of

Start = Callable[..., list[Peer]]
MAX_BLOCKED_S = 3.0


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    Peer("warm").end()


@pytest.fixture
def start() -> Iterator[Start]:
    peers: list[Peer] = []

    def start(*names: str, join: str = "") -> list[Peer]:
        started = [Peer(name) for name in names]
        peers.extend(started)
        if join:
            all_of(started, "join", join)
        return started

    yield start
    for peer in peers:
        peer.end()


@pytest.fixture
def serve() -> Iterator[Callable[[int], str]]:
    served: list[Coordinator] = []

    def serve(min_peers: int) -> str:
        served.append(Coordinator(token=TOKEN, min_peers=min_peers))
        served[-1].start()
        return served[-1].address

    yield serve
    for coordinator in served:
        coordinator.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def failed(found: Any, error: str, *texts: str) -> None:
    assert isinstance(found, dict), found
    assert found["error"] == error, found
    for text in texts:
        assert text in found["text"], found
    assert found.get("restored", True), found
    assert found["after_s"] < MAX_BLOCKED_S, found


def test_members_agree_on_the_view_and_the_sum_until_one_leaves(serve, start: Start) -> None:
    peers = start("a", "b", "c")
    views = all_of(peers, "join", serve(3))
    assert sorted(rank for rank, _ in views) == [0, 1, 2]
    assert len({members for _, members in views}) == 1
    assert all_of(peers, "sum", 2.0, 3) == [[6.0, 9.0, 12.0]] * 3
    a, b, c = peers
    c.ask("leave")
    for found in all_of([a, b], "sum", 1.0):
        failed(found, "PeerLost", "left")


def test_two_of_three_wait_for_a_third(serve, start: Start) -> None:
    address = serve(3)
    a, b, c = start("a", "b", "c", join=address)
    c.ask("leave")
    failed(a.ask("reform", 0.3), "CollectiveTimeout", "2 of 3 members are left (min_peers)", "timeout_s")
    for peer in (a, b):
        peer.tell("reform")
    (d,) = start("d", join=address)
    views = [set(a.answer()), set(b.answer())]
    assert views == [{"a", "b", "d"}] * 2
    assert all_of([a, b, d], "sum", 1.0) == [[3.0]] * 3


def test_who_joins_later_comes_in_when_the_members_say_so(serve, start: Start) -> None:
    address = serve(2)
    a, b = start("a", "b", join=address)
    assert all_of([a, b], "admit") == [False, False]
    (c,) = start("c")
    c.tell("join", address)
    assert a.ask("pending", ("c",)) == ("c",)
    assert all_of([a, b], "sum", 1.0) == [[2.0]] * 2
    assert all_of([a, b], "admit") == [True, True]
    rank, members = c.answer()
    assert rank == 2
    assert members[2] == "c"
    assert a.ask("pending", ()) == ()
    assert all_of([a, b, c], "sum", 1.0) == [[3.0]] * 3


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_death_costs_its_transaction_and_little_time(how: str, serve, start: Start) -> None:
    a, b, c, d = peers = start("a", "b", "c", "d")
    address = serve(4)
    all_of(peers, "join", address)
    (e,) = start("e")
    e.tell("join", address)
    a.ask("pending", ("e",))
    for peer in (a, b, c):
        peer.tell("sum", 1.0, 2, 1 << 20)
    time.sleep(0.1)
    getattr(d, how)()
    cause = "exited" if how == "kill" else "frozen"
    for peer in (a, b, c):
        failed(peer.answer(), "PeerLost", "d (rank", cause)
    # min_peers is 4, so whoever waits is taken in at once.
    assert [set(members) for members in all_of([a, b, c], "reform")] == [{"a", "b", "c", "e"}] * 3
    e.answer()
    assert all_of([a, b, c, e], "sum", 1.0) == [[4.0]] * 4
    if how == "stop":
        d.wake()
        failed(d.ask("sum", 1.0), "Evicted", "frozen", "this member is d")
        failed(d.ask("reform"), "Evicted")


def test_an_error_in_a_block_ends_it_for_all_and_the_group_goes_on(serve, start: Start) -> None:
    a, b, c = peers = start("a", "b", "c", join=serve(3))
    for peer in (a, b):
        peer.tell("sum", 1.0, 2)
    failed(c.ask("sum", 1.0, 2, fail="no luck"), "ArithmeticError", "no luck")
    for peer in (a, b):
        failed(peer.answer(), "TransactionAborted", "c: ArithmeticError: no luck")
    assert all_of(peers, "sum", 1.0) == [[3.0]] * 3


def test_different_numbers_of_operations_are_a_mismatch_not_a_hang(serve, start: Start) -> None:
    a, b = start("a", "b", join=serve(2))
    a.tell("sum", 1.0, 2)
    b.tell("sum", 1.0, 3)
    for found in (a.answer(), b.answer()):
        failed(found, "Mismatch", "a brought 2 operations", "b brought 3 operations")
    assert all_of([a, b], "sum", 1.0, 2) == [[2.0, 4.0]] * 2


def test_a_watcher_that_is_killed_is_replaced_and_deaths_are_still_seen_at_once(serve, start: Start) -> None:
    address = serve(2)
    a, b, c = start("a", "b", "c")
    all_of([a, b], "join", address)
    c.tell("join", address)
    a.ask("pending", ("c",))
    assert all_of([a, b], "admit") == [True, True]
    c.answer()
    watcher = a.ask("watcher_pid")
    os.kill(watcher, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while a.ask("watcher_pid") in (0, watcher):
        assert time.monotonic() < deadline
    assert all_of([a, b, c], "sum", 1.0) == [[3.0]] * 3
    time.sleep(1.0)  # the new one reaches the coordinator
    for peer in (a, b):
        peer.tell("sum", 1.0)
    c.stop()
    for peer in (a, b):
        failed(peer.answer(), "PeerLost", "c (rank", "frozen")


def test_work_goes_on_over_restarts_of_the_coordinator(tmp_path: Path, start: Start) -> None:
    """Killed in the middle of transactions, with and without its record; one member dies while it is away."""
    bind, state = f"127.0.0.1:{free_port()}", tmp_path / "state"
    coordinator = CoordinatorProcess(tmp_path, 2, bind, state)
    peers = start("a", "b", "c")
    all_of(peers[:2], "join", coordinator.address)
    peers[2].tell("join", coordinator.address)
    peers[0].ask("pending", ("c",))
    assert all_of(peers[:2], "admit") == [True, True]
    peers[2].answer()
    for value, peer in zip((1.0, 2.0, 4.0), peers, strict=True):
        peer.tell("churn", value)
    try:
        for turn in range(4):
            time.sleep(0.3)
            coordinator.kill()
            if turn == 3:
                peers[2].kill()
            if turn == 1:
                state.unlink()
            coordinator = CoordinatorProcess(tmp_path, 2, bind, state)
        time.sleep(1.5)
        for peer in peers[:2]:
            peer.tell("nothing")
        first, second = (peer.answer() for peer in peers[:2])
        for peer in peers[:2]:
            peer.answer()
        log = (tmp_path / "coordinator.log").read_text()
        assert first["committed"] == second["committed"], log
        sums = {("a", "b", "c"): 7.0, ("a", "b"): 3.0}
        for members, total in first["committed"].values():
            assert total == sums[tuple(sorted(members))]
        assert len(first["lost"]) == 1, (first["lost"], log)
        assert "c (rank" in first["lost"][0]
        assert max(first["longest_s"], second["longest_s"]) < MAX_BLOCKED_S, log
        assert {tuple(sorted(members)) for members, _ in first["committed"].values()} == set(sums)
    finally:
        assert coordinator.end() == 0


def test_a_link_that_stays_cut_ends_in_an_eviction_that_the_log_explains(
    serve, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "everstep.collectives.coordinator")
    address = serve(2)
    peers = start("a", "b", "c")
    all_of(peers[:2], "join", address)
    peers[2].tell("join", address)
    peers[0].ask("pending", ("c",))
    all_of(peers[:2], "admit")
    peers[2].answer()
    by_rank = sorted(peers, key=lambda peer: peer.ask("view")[0])
    began = time.monotonic()
    by_rank[0].ask("cut_from", by_rank[1].name)
    left = [by_rank[0], by_rank[2]]
    while {members for _, members in all_of(left, "view")} != {tuple(peer.name for peer in left)}:
        assert time.monotonic() - began < 5
        all_of(left, "reform")
    assert all_of(left, "sum", 1.0) == [[2.0]] * 2
    assert time.monotonic() - began < 5
    failed(by_rank[1].ask("sum", 1.0), "Evicted", "evicted for its links", "new connections were tried")
    assert f"{by_rank[1].name} is a smallest set that covers them, of the highest ranks" in caplog.text


def test_what_cannot_join_is_refused_with_the_reason_and_the_setting(serve, start: Start) -> None:
    address = serve(2)
    with pytest.raises(HandshakeRefused, match=r"token.*token="):
        Group.join(address, token="another", name="x", timeout_s=5)
    a, b = start("a", "b", join=address)
    (c,) = start("c")
    found = c.ask("join", address, name="a")
    assert found["error"] == "HandshakeRefused"
    assert "the name is taken by process" in found["text"]
    assert "name=" in found["text"]
    found = c.ask("join", address, timeout_s=0.5)
    assert found["error"] == "CollectiveTimeout"
    assert "admit()" in found["text"]
    unreachable = f"127.0.0.1:{free_port()}"
    with pytest.raises(CoordinatorLost, match=rf"no coordinator at {unreachable}.*refused.*timeout_s="):
        Group.join(unreachable, token=TOKEN, name="x", timeout_s=0.5)
    assert all_of([a, b], "sum", 1.0) == [[2.0]] * 2


def test_another_version_of_the_protocol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = CoordinatorProcess(tmp_path, 1)
    monkeypatch.setattr(control, "PROTOCOL_VERSION", control.PROTOCOL_VERSION + 1)
    try:
        with pytest.raises(HandshakeRefused, match=r"protocol version 2, this side speaks 1$"):
            Group.join(coordinator.address, token=TOKEN, name="x", timeout_s=5)
    finally:
        assert coordinator.end() == 0


def test_the_watcher_ends_soon_after_its_last_member(serve, start: Start) -> None:
    peers = start("a", "b", join=serve(2))
    watcher = psutil.Process(peers[0].ask("watcher_pid"))
    for peer in peers:
        peer.kill()
    watcher.wait(3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"token": ""}, "token is empty"),
        ({"min_peers": 0}, "min_peers is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"bind": "7070"}, "HOST:PORT"),
    ],
)
def test_a_coordinator_refuses_settings_that_cannot_work(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Coordinator(**{"token": "t", **given})


def test_a_state_file_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"state.*remove it or name another"):
        Coordinator(token="t", state=file).start()

"""A manager and its coordinators: it follows each later epoch, tells it what it has passed on, and no earlier one."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from everstep.actors.config import Follow, Followed, Heard, ManagerConfig
from everstep.actors.manager_process import Manager
from everstep.actors.run_folder import RunFolder
from everstep.collectives import messages as m
from everstep.collectives.control import ControlClient, ControlServer, Peer, call

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")

TOKEN = "a token"
PATIENCE_S = 20.0
ORPHAN_S = 1.0


class Coordinator:
    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[tuple[Peer, m.WatcherMessage]] = queue.SimpleQueue()
        self.server = ControlServer("127.0.0.1:0", TOKEN, self._on_message, lambda peer: None)
        self.peer: Peer | None = None

    def _on_message(self, peer: Peer, data: bytes) -> None:
        self.heard.put((peer, m.decode_watcher(data)))

    def next(self, kind: type[m.WatcherMessage]) -> m.WatcherMessage:
        """The next message of a kind; others are passed over."""
        while True:
            self.peer, message = self.heard.get(timeout=PATIENCE_S)
            if isinstance(message, kind):
                return message

    def note(self, kind: str) -> bytes:
        while True:
            message = self.next(m.WatcherNote)
            assert isinstance(message, m.WatcherNote)
            if message.kind == kind:
                return message.payload

    def say(self, names: tuple[str, ...], message: m.CoordinatorMessage) -> None:
        assert self.peer is not None
        self.peer.send(m.encode(m.ToMembers(names, message)))


class Run:
    """A manager in a thread, with one trainer (this process) that has joined."""

    def __init__(self, folder: Path) -> None:
        self.first = Coordinator()
        self.others: list[Coordinator] = []
        folder.mkdir()
        run_folder = RunFolder("following", folder)
        run_folder.create()
        config = ManagerConfig(
            run_id="following", run_folder=str(run_folder.path), name="manager-0.1", slot=0, domain="slot-0",
            token=TOKEN, coordinator=self.first.server.address, frozen_s=2.0, stall_s=10.0, embedded=True, epoch=1,
            orphan_s=ORPHAN_S,
        )  # fmt: skip
        self.manager = Manager(config)
        self.thread = threading.Thread(target=self.manager.run)
        self.thread.start()
        self.control = msgspec.msgpack.decode(self.first.note("listening"), type=dict[str, str])["control"]
        self.told: queue.SimpleQueue[m.CoordinatorMessage] = queue.SimpleQueue()
        self.trainer = ControlClient(
            self.control, TOKEN, lambda data: self.told.put(m.decode_coordinator(data)), lambda reason: None
        )
        self.trainer.send(m.encode(m.Note("hello", b"rank-0.1")))
        member = m.Member("rank-0.1", 0, "slot-0", "a", pid=os.getpid())
        self.trainer.send(m.encode(m.Join(member)))
        self.first.next(m.FromMember)

    def follow(self, epoch: int, coordinator: Coordinator, known_step: int = 0) -> str:
        request = msgspec.msgpack.encode(Follow(epoch, coordinator.server.address, known_step))
        return msgspec.msgpack.decode(call(self.control, TOKEN, request), type=Followed).refused

    def other(self) -> Coordinator:
        self.others.append(Coordinator())
        return self.others[-1]

    def close(self) -> None:
        self.trainer.close()
        self.manager._judge.forget("rank-0.1")  # or it would end this process with the run
        for coordinator in (self.first, *self.others):
            coordinator.server.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "it waits for ever"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "shm")
    yield run
    run.close()


def verdict(step: int) -> m.Verdict:
    return m.Verdict(m.ViewId(1, 1), step, b"payload")


def test_a_successor_hears_who_lives_and_which_verdicts_it_does_not_know(run: Run) -> None:
    for step in (4, 5, 6):
        run.first.say(("rank-0.1",), verdict(step))
        assert run.told.get(timeout=PATIENCE_S) == verdict(step)
    second = run.other()
    assert run.follow(2, second, known_step=4) == ""
    assert msgspec.msgpack.decode(run.first.note("superseded"), type=int) == 2
    watching = second.next(m.Watching)
    assert isinstance(watching, m.Watching)
    assert watching.domain == "slot-0"
    joined = second.next(m.FromMember)
    assert isinstance(joined, m.FromMember)
    assert joined.name == "rank-0.1"
    heard = msgspec.msgpack.decode(second.note("heard"), type=Heard)
    assert heard.verdicts == (verdict(5), verdict(6))


def test_who_is_not_followed_any_more_changes_nothing(run: Run) -> None:
    second = run.other()
    assert run.follow(2, second) == ""
    second.note("heard")
    run.first.say(("rank-0.1",), verdict(7))
    second.say(("rank-0.1",), verdict(8))
    assert run.told.get(timeout=PATIENCE_S) == verdict(8)
    assert run.told.empty()
    assert "epoch 2 is followed" in run.follow(2, run.other())
    assert "epoch 2 is followed" in run.follow(1, run.other())


def test_one_that_cannot_be_reached_is_not_followed(run: Run) -> None:
    nobody = run.other()
    nobody.server.stop()
    assert run.follow(2, nobody) != ""
    run.first.say(("rank-0.1",), verdict(4))
    assert run.told.get(timeout=PATIENCE_S) == verdict(4), "the former is followed still"


def test_without_a_supervisor_it_waits_so_long_and_no_longer(run: Run) -> None:
    run.manager._judge.forget("rank-0.1")
    began = time.monotonic()
    run.first.server.stop()
    run.thread.join(PATIENCE_S)
    assert not run.thread.is_alive()
    assert time.monotonic() - began >= ORPHAN_S

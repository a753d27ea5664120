"""A supervisor's standby: what it is told, when it takes over, when it must not; over real control streams."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.actors.claims import FolderClaims
from everstep.actors.config import Heard
from everstep.actors.inheritance import Inheritance
from everstep.actors.standby import Standby
from everstep.actors.succession import Plan, Succession
from everstep.actors.takeover import Takeover
from everstep.collectives import membership as mb
from everstep.collectives import messages as m
from everstep.collectives.control import ControlServer, Peer
from everstep.platform.cluster import chronicle as ch
from everstep.platform.cluster import staffing as st
from everstep.storage.stores.opening import folder_at

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")

TOKEN = "a token"
FROZEN_S = 0.6
PATIENCE_S = 20.0


class Leader:
    """The supervisor's end, with the real Succession."""

    def __init__(self, claims: FolderClaims) -> None:
        self.peers: queue.SimpleQueue[tuple[Peer, m.StandsBy]] = queue.SimpleQueue()
        self.server = ControlServer("127.0.0.1:0", TOKEN, self._on_message, lambda peer: None)
        self.started: list[tuple[int, str]] = []
        plan = Plan(claims, lambda number, address: self.started.append((number, address)))
        self.succession = Succession(plan, 1, self.server.address, FROZEN_S)

    def _on_message(self, peer: Peer, data: bytes) -> None:
        message = m.decode_watcher(data)
        assert isinstance(message, m.StandsBy)
        self.peers.put((peer, message))

    def welcome(self) -> Peer:
        """Takes the standby that comes; it has the books then."""
        peer, message = self.peers.get(timeout=PATIENCE_S)
        self.succession.came(peer, message, known())
        return peer


class Follower(threading.Thread):
    """The standby, in a thread instead of a process."""

    def __init__(self, address: str, claims: FolderClaims) -> None:
        super().__init__(daemon=True)
        self._standby = Standby("standby-1", address, TOKEN, FROZEN_S, claims)
        self.found: tuple[ch.Chronicle, str, float] | None = None
        self.start()

    def run(self) -> None:
        self.found = self._standby.run()

    def ended(self) -> tuple[ch.Chronicle, str, float] | None:
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the standby still stands by"
        return self.found


def known() -> ch.Chronicle:
    slots = (st.Slot(manager="manager-0.1", manager_up=True, control="c:0", trainer="rank-0.1", ready=True),
             st.Slot(manager="manager-1.1", manager_up=True, control="c:1", trainer="rank-1.1", ready=True),
             st.Slot(manager="manager-2.1", trainer=""))  # fmt: skip
    standing = ch.Standing(staffing=st.State(slots, 2, 1, 100), target=2)
    return ch.Chronicle(epoch=1, started_at=0.0, standing=standing, account=ch.Account(step=6))


@pytest.fixture
def claims(tmp_path: Path) -> FolderClaims:
    claims = FolderClaims(folder_at(str(tmp_path / "run")))
    assert claims.next() == 1
    return claims


@pytest.fixture
def leader(claims: FolderClaims) -> Iterator[Leader]:
    leader = Leader(claims)
    yield leader
    leader.server.stop()


def test_each_epoch_is_taken_once(claims: FolderClaims) -> None:
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda: taken.append(claims.take(2))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 7 + [True]
    assert claims.newest() == 2


def test_a_broken_stream_makes_the_standby_take_the_next_epoch_with_all_it_was_told(
    leader: Leader, claims: FolderClaims
) -> None:
    follower = Follower(leader.server.address, claims)
    leader.welcome()
    leader.succession.tell(ch.Committed(7, 0.25, 0, 6, ch.Account(step=7)), 0.0)
    time.sleep(0.1)  # for the record to arrive: what had not left a dead process is heard from managers instead
    leader.server.stop()
    found = follower.ended()
    assert found is not None
    assert found[0].losses == {7: 0.25}
    assert claims.newest() == 2
    assert leader.succession.superseded() == 2


def test_silence_is_as_good_as_a_broken_stream_and_beats_prevent_it(leader: Leader, claims: FolderClaims) -> None:
    follower = Follower(leader.server.address, claims)
    leader.welcome()
    until = time.monotonic() + 2 * FROZEN_S
    while time.monotonic() < until:
        leader.succession.tick(time.monotonic())
        time.sleep(0.02)
    assert follower.is_alive()
    assert leader.succession.superseded() == 0
    found = follower.ended()  # nobody ticks any more
    assert found is not None
    assert "timeouts.frozen_s" in found[1]
    assert found[2] >= FROZEN_S


def test_an_orderly_end_is_not_taken_over(leader: Leader, claims: FolderClaims) -> None:
    follower = Follower(leader.server.address, claims)
    leader.welcome()
    leader.succession.end(0.0)
    assert follower.ended() is None
    assert claims.newest() == 1


def test_whoever_is_late_for_the_epoch_takes_nothing(leader: Leader, claims: FolderClaims) -> None:
    follower = Follower(leader.server.address, claims)
    leader.welcome()
    assert claims.take(2)
    leader.server.stop()
    assert follower.ended() is None


def test_one_that_has_no_books_yet_takes_nothing(leader: Leader, claims: FolderClaims) -> None:
    follower = Follower(leader.server.address, claims)
    leader.peers.get(timeout=PATIENCE_S)
    leader.server.stop()
    assert follower.ended() is None
    assert claims.newest() == 1


def test_a_standby_is_started_once_something_can_go_on_and_again_when_it_is_lost(
    leader: Leader, claims: FolderClaims
) -> None:
    succession = leader.succession
    succession.tick(0.0)
    assert leader.started == []
    succession.begin(1.0)
    succession.tick(1.0)
    succession.tick(2.0)
    wait(lambda: leader.started == [(1, leader.server.address)])
    follower = Follower(leader.server.address, claims)
    peer = leader.welcome()
    succession.tick(100.0)
    assert succession.gone(peer, 101.0) == "standby-1 is lost: another one is started"
    succession.tick(101.5)
    assert len(leader.started) == 1
    succession.tick(104.0)
    wait(lambda: leader.started[1:] == [(2, leader.server.address)])
    leader.server.stop()
    follower.ended()


def wait(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- a successor's first moments ------------------------------------------------------------------------


def verdict(step: int, number: int = 3) -> m.Verdict:
    return m.Verdict(m.ViewId(1, number), step, b"v")


def takeover(now: float = 10.0) -> Takeover:
    return Takeover(Inheritance(known(), "gone", 1.0), 2.0, now, lambda manager, refused: None)


def test_nothing_is_decided_before_all_have_answered_or_it_is_too_late() -> None:
    taken = takeover()
    assert not taken.complete(11.0)
    taken.heard["manager-0.1"] = Heard()
    assert not taken.complete(11.9)
    assert taken.complete(12.1)
    taken.refused["manager-1.1"] = "nobody there"
    assert taken.complete(11.0)
    assert taken.silent() == {"manager-1.1": "nobody there", "manager-2.1": "it was being started"}
    taken.joined.add("rank-0.1")
    assert taken.orphans(known().standing.staffing) == ["rank-1.1"]


def test_verdicts_of_the_newest_view_that_somebody_has_heard_are_completed_in_order() -> None:
    taken = takeover()
    taken.heard = {
        "manager-0.1": Heard((verdict(8), verdict(9))),
        "manager-1.1": Heard((verdict(8),)),
        "manager-2.1": Heard((verdict(12, number=2),)),
    }
    assert taken.in_doubt() == [verdict(8), verdict(9)]
    assert [taken.lacks(f"manager-{i}.1", verdict(9)) for i in range(3)] == [False, True, True]
    assert not taken.lacks("manager-7.1", verdict(9)), "it does not follow"


def test_a_successor_begins_with_whoever_is_left() -> None:
    state = mb.initial(2, 2, 3, 0.0, missing=frozenset({"slot-0"}), floor=5)
    for slot in (0, 1):
        member = m.Member(f"rank-{slot}.1", slot, f"slot-{slot}", "a")
        state, commands, _ = mb.decide(state, mb.Joined(member), 1.0)
        assert not commands
    state, commands, _ = mb.decide(state, mb.Roused(), 1.0)
    [prepare] = commands
    assert isinstance(prepare, mb.SendPrepare)
    assert prepare.prepare.id == m.ViewId(2, 2)
    alone = mb.initial(2, 2, 3, 0.0)
    alone, commands, _ = mb.decide(alone, mb.Roused(), 1.0)
    assert not commands
    for slot in (0, 1):
        member = m.Member(f"rank-{slot}.1", slot, f"slot-{slot}", "a")
        alone, commands, _ = mb.decide(alone, mb.Joined(member), 2.0)
    assert commands, "a view was there before: the minimum is enough"

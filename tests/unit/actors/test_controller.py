"""The controller and its clients over real streams, without Ray: who is told what, its death, its replacement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.actors import controller as controllers
from everstep.actors.controller import Controller
from everstep.actors.controller_state import AnotherController, FolderState, StateBook, StateUnavailable, this_process
from everstep.actors.grants import Grants
from everstep.actors.orphans import Orphans, by_run
from everstep.platform.cluster import controller_messages as cm
from everstep.platform.cluster.allocation import Capacity
from everstep.storage.stores.opening import folder_at

PATIENCE_S = 20.0


class Nodes:
    """A cluster of as many CPUs as it is told."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self.wanted: list[Any] = []

    def capacity(self, runs: frozenset[str]) -> Capacity:
        return Capacity({"node": {"CPU": self.cpus}})

    def want(self, bundles: Any) -> None:
        self.wanted.append(bundles)


class Run:
    """A supervisor's side, that holds at once what it is granted, unless it is `slow`."""

    def __init__(self, where: dict[str, Any], name: str, low: int, high: int, priority: int = 0) -> None:
        self.seen: list[tuple[int, str]] = []
        self.refused = ""
        self.slow = False
        self._last = (0, 0)
        said = cm.Enrol(cm.VERSION, name, name, priority, low, high, 0, {"CPU": 1.0})
        self.grants = Grants(lambda: where["is"], said, self._on_grant, self._on_refused)
        self.grants.start()

    def _on_grant(self, processes: int, reason: str, number: int) -> None:
        self.seen.append((processes, reason))
        self._last = (processes, number)
        if not self.slow:
            self.obey()

    def obey(self) -> None:
        processes, number = self._last
        self.grants.report(processes, processes, number)

    def _on_refused(self, reason: str) -> None:
        self.refused = reason

    @property
    def has(self) -> int:
        return self.seen[-1][0] if self.seen else -1


@pytest.fixture
def closing() -> Iterator[list[Callable[[], None]]]:
    steps: list[Callable[[], None]] = []
    yield steps
    for step in reversed(steps):
        step()


@pytest.fixture
def where() -> dict[str, Any]:
    return {"is": None}


def until(look: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def serve(folder: Path, where: dict[str, Any], closing: list[Any], cpus: int = 4, **options: Any) -> Controller:
    made = Controller(FolderState(folder_at(folder)), Nodes(cpus), sample_s=0.05, **options)
    closing.append(made.close)
    where["is"] = made.address, made.token
    return made


def run(where: dict[str, Any], closing: list[Any], *arguments: Any, **more: Any) -> Run:
    made = Run(where, *arguments, **more)
    closing.append(lambda: made.grants.leave({"job": "x"}))
    return made


def test_a_higher_job_waits_until_the_lower_one_has_said_that_it_let_go(tmp_path: Path, where, closing):
    serve(tmp_path, where, closing)
    low = run(where, closing, "low", 1, 4)
    until(lambda: low.has == 4, "the grant")
    low.slow = True
    high = run(where, closing, "high", 2, 3, priority=1)
    until(lambda: low.has == 1 and high.has == 0, "the order to shrink")
    assert high.seen[-1][1].startswith("queued: ")
    low.obey()
    until(lambda: high.has == 3, "the higher one's grant")
    high.grants.leave({"job": "high", "ok": True})
    until(lambda: low.has == 4, "the lower one grows back")


def test_a_run_goes_on_without_a_controller_and_the_next_one_knows_it(tmp_path: Path, where, closing):
    first = serve(tmp_path, where, closing)
    low = run(where, closing, "low", 1, 2)
    high = run(where, closing, "high", 1, 2, priority=1)
    until(lambda: (low.has, high.has) == (2, 2), "the grants")
    until(lambda: all(row.held == 2 for row in first.table().jobs), "the reports")
    before = first.table()
    first.close()
    where["is"] = None
    told = len(low.seen)
    second = serve(tmp_path, where, closing)
    until(lambda: [row.state for row in second.table().jobs] == ["running", "running"], "both enrol again")
    until(lambda: len(low.seen) > told, "its grant is confirmed")
    assert second.table().jobs == before.jobs
    assert (low.has, high.has) == (2, 2)


def test_who_does_not_come_back_is_forgotten_and_results_are_not(tmp_path: Path, where, closing):
    first = serve(tmp_path, where, closing)
    gone = run(where, closing, "gone", 1, 3)
    done = run(where, closing, "done", 1, 1)
    until(lambda: gone.has == 3 and done.has == 1, "the grants")
    done.grants.leave({"job": "done", "ok": True})
    until(lambda: first.table().results, "the result")
    where["is"] = None
    first.close()
    gone.grants._find = lambda: None
    second = serve(tmp_path, where, closing, grace_s=0.3)
    assert [row.state for row in second.table().jobs] == ["absent"]
    other = run(where, closing, "other", 1, 4)
    until(lambda: other.has == 4, "the room of the one that is gone")
    assert [row.job for row in second.table().jobs] == ["other"]
    assert [result["job"] for result in second.table().results] == ["done"]


def test_only_the_newest_results_are_kept(tmp_path: Path, where, closing, monkeypatch):
    monkeypatch.setattr(controllers, "KEPT_RESULTS", 2)
    served = serve(tmp_path, where, closing)
    for name in ("a", "b", "c"):
        made = run(where, closing, name, 1, 1)
        until(lambda made=made: made.has == 1, "the grant")
        made.grants.leave({"job": name})
        until(lambda name=name: [r for r in served.table().results if r["job"] == name], "the result")
    assert [result["job"] for result in served.table().results] == ["b", "c"]


def test_a_supervisor_that_takes_over_speaks_for_the_job_from_then_on(tmp_path: Path, where, closing):
    served = serve(tmp_path, where, closing, grace_s=0.3)
    before = run(where, closing, "job", 1, 4)
    until(lambda: before.has == 4, "the grant")
    before.grants._find = lambda: None  # it does not try again: it is dead, but its stream still stands
    said = cm.Enrol(cm.VERSION, "job", "job", 0, 1, 4, 0, {"CPU": 1.0}, granted=4, held=4)
    seen = threading.Event()
    after = Grants(lambda: where["is"], said, lambda *_: seen.set(), lambda reason: None)
    after.start()
    closing.append(lambda: after.leave({"job": "job"}))
    assert seen.wait(PATIENCE_S)
    until(lambda: before.grants._client is None, "the end of the older stream")
    time.sleep(0.6)  # longer than the grace: the end of the older stream is not the job's
    assert [(row.state, row.granted) for row in served.table().jobs] == [("running", 4)]


def test_a_job_that_never_fits_is_told(tmp_path: Path, where, closing):
    serve(tmp_path, where, closing)
    big = run(where, closing, "big", 5, 8)
    until(lambda: big.refused, "the refusal")
    assert "the empty cluster holds 4 of them" in big.refused


def test_a_run_of_another_version_is_refused_naming_both(tmp_path: Path, where, closing):
    serve(tmp_path, where, closing)
    told: list[str] = []
    said = cm.Enrol(99, "job", "job", 0, 1, 4, 0, {"CPU": 1.0})
    odd = Grants(lambda: where["is"], said, lambda *_: told.append("granted"), told.append)
    odd.start()
    closing.append(lambda: odd.leave({"job": "job"}))
    until(lambda: told, "the refusal")
    assert f"speaks version {cm.VERSION}, the run version 99" in told[0]


def test_a_second_one_is_refused_while_the_first_lives(tmp_path: Path, where, closing):
    first = serve(tmp_path, where, closing)
    with pytest.raises(AnotherController, match="two controllers on one place are impossible") as error:
        Controller(FolderState(folder_at(tmp_path)), Nodes(4))
    assert first.address in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_one_that_was_replaced_stops_and_grants_nothing_more(tmp_path: Path, where, closing):
    ends: list[str] = []
    served = serve(tmp_path, where, closing, on_end=ends.append)
    low = run(where, closing, "low", 1, 4)
    until(lambda: low.has == 4, "the grant")
    other = this_process("other", "elsewhere:7")
    book = StateBook(FolderState(folder_at(tmp_path)), other, alive=lambda owner: False)
    kept = book.open()
    assert kept is not None
    book.write(cm.Kept(cm.STATE_VERSION, other, kept.jobs, kept.arrivals, kept.grants, []))
    late = run(where, closing, "late", 1, 1, priority=1)
    until(lambda: ends, "its end")
    assert "the controller at elsewhere:7" in ends[0]
    assert served.address in ends[0]
    assert (low.has, late.has) == (4, -1)


def test_nothing_is_granted_before_it_is_kept(tmp_path: Path, where, closing):
    class Sulky(FolderState):
        sulks = False

        def put_new(self, number: int, data: bytes) -> bool:
            if self.sulks:
                raise StateUnavailable("not now")
            return super().put_new(number, data)

    store = Sulky(folder_at(tmp_path))
    served = Controller(store, Nodes(4), sample_s=0.05)
    closing.append(served.close)
    where["is"] = served.address, served.token
    store.sulks = True
    job = run(where, closing, "job", 1, 4)
    until(lambda: [row.granted for row in served.table().jobs] == [4], "the decision")
    time.sleep(0.3)
    assert job.has == -1
    store.sulks = False
    until(lambda: job.has == 4, "the grant")


def test_a_run_is_an_orphan_after_a_grace_without_supervisor_and_standby():
    orphans = Orphans(60.0)
    alone = by_run(
        ["everstep/a.a/rank-0.1", "everstep/b.b/rank-0.1", "everstep/b.b/supervisor", "everstep/controller"]
    )
    assert alone == {"a.a": {"rank-0.1"}, "b.b": {"rank-0.1", "supervisor"}}
    assert orphans.look(alone, 0.0) == []
    assert orphans.look(by_run(["everstep/a.a/rank-0.1", "everstep/a.a/standby-1"]), 30.0) == []
    assert orphans.look(alone, 59.0) == []
    assert orphans.look(alone, 118.0) == []
    assert orphans.look(alone, 119.0) == ["a.a"]

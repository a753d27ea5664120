"""Ranks as threads of this process: in-memory groups to send by, and one that forms views, judges and keeps segments.

`Group` is a `Conductor` for each of its threads: the real chooser, planner, segments and verdict, without
sockets and processes. `faults` maps (phase, step, rank) to what happens there, once: "abort" ends the view, "die"
ends the rank too, "join" makes one rank more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from everstep.actors.fetch import fetch_local
from everstep.collectives.errors import CollectiveError, PeerLost
from everstep.collectives.work import Work
from everstep.platform.training.capture import write_snapshot
from everstep.platform.training.conductor import Seat
from everstep.platform.training.layout import Run
from everstep.platform.training.messages import Inventory, SealedVersion, Stock, Verdict, ViewPlan, Vote
from everstep.platform.training.recovery import choose
from everstep.platform.training.session import Session, Settings
from everstep.platform.training.shard import RankState
from everstep.platform.training.verdict import Progress, Rules, judge_step
from everstep.storage.index import Source, StateIndex
from everstep.storage.planner import Copy
from everstep.storage.segment import SegmentMap, create_segment, read_index, read_seal, required_bytes
from everstep.storage.state_hash import combine

PATIENCE_S = 20.0


Parts = Sequence[torch.Tensor]


@dataclass(eq=False)
class Move:
    """What one rank sends another; either end may be there first."""

    source: Parts | None = None
    target: Parts | None = None
    works: list[Work] = field(default_factory=list)


class Post:
    """The groups of one view, in memory. Every second move is made when both ends are there, the others when one of
    them waits: nothing may rely on either."""

    def __init__(self, ranks: int) -> None:
        self.condition = threading.Condition()
        self.moves: dict[tuple[int, int, int], list[Move]] = {}  # by source, target, tag
        self.sent: list[tuple[int, int, int]] = []  # source, target, parts
        self.over = ""
        self.hold = False  # no move is made before one of its ends waits
        self.groups = [InMemory(self, rank, ranks) for rank in range(ranks)]

    def end(self, why: str) -> None:
        with self.condition:
            self.over = self.over or why
            self.condition.notify_all()

    def begin(self, key: tuple[int, int, int], source: Parts | None, target: Parts | None) -> Work:
        with self.condition:
            pending = self.moves.setdefault(key, [])
            fits = (move for move in pending if (move.source if source is not None else move.target) is None)
            if (move := next(fits, None)) is None:
                pending.append(move := Move())
            move.source = source if source is not None else move.source
            move.target = target if target is not None else move.target
            work = Work(self, f"move {key}")
            move.works.append(work)
            if source is not None:
                self.sent.append((*key[:2], len(source)))
                if len(self.sent) % 2 and not self.hold:
                    self._make(move)
            self.condition.notify_all()
        return work

    def wait(self, work: Work, timeout_s: float | None) -> None:
        with self.condition:
            there = lambda: work.finished or self._make(self._move_of(work)) or self.over  # noqa: E731
            assert self.condition.wait_for(there, PATIENCE_S), f"nobody has the other end of {work.what}"
            if not work.finished:
                raise PeerLost(self.over)

    def look(self, work: Work) -> None:
        """Nothing comes by itself."""

    def _move_of(self, work: Work) -> Move:
        return next(move for moves in self.moves.values() for move in moves if work in move.works)

    def _make(self, move: Move) -> bool:
        """Copies if both ends are there."""
        if self.over or move.source is None or move.target is None:
            return False
        for source, target in zip(move.source, move.target, strict=True):
            target.copy_(source)
        for work in move.works:
            work.finished = True
        for moves in self.moves.values():
            if move in moves:
                moves.remove(move)
        self.condition.notify_all()
        return True


@dataclass
class Both:
    """Several moves as one work."""

    works: list[Work]

    def done(self) -> bool:
        return all(work.done() for work in self.works)

    def wait(self, timeout_s: float | None = None) -> None:
        for work in self.works:
            work.wait(timeout_s)


@dataclass
class InMemory:
    """One rank's group."""

    post: Post
    rank: int
    size: int

    def send_parts(self, parts: Parts, to: int, tag: int = 0) -> Work:
        return self.post.begin((self.rank, to, tag), list(parts), None)

    def recv_parts(self, parts: Parts, source: int, tag: int = 0) -> Work:
        return self.post.begin((source, self.rank, tag), None, list(parts))

    def share_parts(self, parts: Sequence[Parts], tag: int = 0) -> Any:
        peers = [peer for peer in range(self.size) if peer != self.rank]
        ways = [
            (self.send_parts(parts[self.rank], peer, tag), self.recv_parts(parts[peer], peer, tag)) for peer in peers
        ]
        return Both([work for pair in ways for work in pair])

    def all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, tag: int = 0) -> Any:
        output[self.rank] = tensor[self.rank]
        works = []
        for peer in range(self.size):
            if peer != self.rank:
                works.append(self.send_parts([tensor[peer]], peer, tag))
                works.append(self.recv_parts([output[peer]], peer, tag))
        return Both(works)


def in_threads(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all; raises the first error of any."""
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []

    def call(at: int) -> None:
        try:
            results[at] = work[at]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(at,), name=f"rank-{at}") for at in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} hangs"
    if errors:
        raise errors[0]
    return results


class Died(BaseException):
    """Ends a rank's thread as a SIGKILL ends its process."""


@dataclass
class Outcome:
    """What a group's run came to."""

    state_sha256: str
    verdicts: dict[int, set[tuple[str, float]]]  # by step: (outcome, loss), also of steps that were redone
    yielded: dict[str, list[int]]  # by rank: the steps that its session yielded
    views: list[tuple[int, int]]  # (base step, ranks)
    sessions: dict[str, Session]


@dataclass
class Group:
    """Views, verdicts and segments of some ranks. One lock; ranks wait on its condition."""

    folder: Path
    settings: Settings
    faults: dict[tuple[str, int, int], str]
    start: Callable[[str], None]
    shadow: bool = False
    alive: set[str] = field(default_factory=set)
    condition: threading.Condition = field(default_factory=threading.Condition)
    offers: dict[str, Inventory] = field(default_factory=dict)
    seats: dict[str, Seat] = field(default_factory=dict)
    votes: dict[int, dict[str, Vote]] = field(default_factory=dict)
    decided: dict[int, Verdict] = field(default_factory=dict)
    levelled: set[str] = field(default_factory=set)
    view: int = 0
    over: bool = True
    post: Post = field(default_factory=lambda: Post(0))
    stocks: dict[str, dict[str, StateIndex]] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=lambda: {0: Progress()})
    outcome: Outcome = field(default_factory=lambda: Outcome("", {}, {}, [], {}))

    def end_view(self, why: str) -> None:
        with self.condition:
            self.over = True
            self.post.end(why)
            self._form()
            self.condition.notify_all()

    def _form(self) -> None:
        """The next view, once all that live have made their offer."""
        if not self.over or not self.alive or set(self.offers) != self.alive:
            return
        names = sorted(self.alive)
        stocks = {
            name: Stock(tuple(SealedVersion((1, 1), at, i) for at, i in versions.items()))
            for name, versions in self.stocks.items()
        }
        choice = choose(names, self.offers, stocks, None, 0, self.shadow)
        final = choice.base_step >= self.settings.steps
        self.view += 1
        self.post = Post(len(names))
        self.over = False
        self.offers.clear()
        self.votes.clear()
        self.decided.clear()
        self.levelled.clear()
        plan = ViewPlan(choice.owned, choice.have, final=final, shadowed=choice.shadowed)
        for rank, name in enumerate(names):
            group = self.post.groups[rank] if len(names) > 1 else None
            self.seats[name] = Seat(str(self.view), rank, choice.base_step, plan, group, tuple(names))
        self.outcome.views.append((choice.base_step, len(names)))

    def judge(self, step: int) -> Verdict:
        votes = self.votes[step]
        kind = {vote.kind for vote in votes.values()}.pop()
        if kind == "seal":
            return Verdict("sealed")
        if kind == "hash":
            lines = [line for vote in votes.values() for line in vote.hash_lines]
            self.outcome.state_sha256 = combine(lines, step - 2)
            return Verdict("finished")
        settings = self.settings
        rules = Rules(settings.lanes, settings.clip_norm, settings.nonfinite_limit)
        verdict, self.progress[step] = judge_step(step, votes, rules, self.progress[step - 1])
        self.outcome.verdicts.setdefault(step, set()).add((verdict.outcome, verdict.loss))
        if self.shadow and len(votes) > 1:  # a view of one rank has no shadow
            verdict = msgspec.structs.replace(verdict, snapshot=step >= settings.steps)
        return verdict


class Rank:
    """One rank's `Conductor`."""

    def __init__(self, group: Group, name: str) -> None:
        self.name = name
        self._group = group
        self._seat: Seat | None = None
        self._sealed = -1

    def empty(self, elements: int) -> torch.Tensor:
        return torch.full((elements,), float("nan"))

    def take_seat(self, inventory: Callable[[], Inventory]) -> Seat:
        group = self._group
        offer = inventory()
        with group.condition:
            group.seats.pop(self.name, None)
            group.offers[self.name] = offer
            group._form()
            group.condition.notify_all()
            assert group.condition.wait_for(lambda: self.name in group.seats, PATIENCE_S), "no view forms"
            self._seat = group.seats[self.name]
        self._sealed = -1
        return self._seat

    def fetch(self, seat: Seat, copies: list[tuple[Copy, memoryview]]) -> None:
        for copy, buffer in copies:
            assert copy.source.kind == "segment", "a rank's own memory is not fetched"
            fetch_local(str(self._group.folder / copy.source.locator), [(copy, buffer)])

    def own_domain(self, domain: str) -> bool:
        return domain == self.name

    def level(self, seat: Seat) -> None:
        group = self._group
        with group.condition:
            group.levelled.add(self.name)
            group.condition.notify_all()
            self._wait(lambda: group.levelled == set(seat.names))

    def over(self) -> bool:
        return self._group.over or self._group.seats.get(self.name) is not self._seat

    def vote(self, seat: Seat, step: int, vote: Vote) -> Verdict:
        group = self._group
        with group.condition:
            if self.over():
                raise PeerLost("the view is over")
            group.votes.setdefault(step, {})[self.name] = vote
            if set(group.votes[step]) == set(seat.names):
                group.decided[step] = group.judge(step)
                group.condition.notify_all()
            decided = group.decided
            self._wait(lambda: step in decided)
            return decided[step]

    def _wait(self, ready: Callable[[], bool]) -> None:
        condition = self._group.condition
        assert condition.wait_for(lambda: ready() or self.over(), PATIENCE_S), f"{self.name} hangs"
        if not ready():
            raise PeerLost("the view is over")

    def snapshot(
        self,
        state: RankState,
        before_seal: Callable[[], None],
        runs: Sequence[Run] | None = None,
        wait: bool = False,
    ) -> float:
        self._write(state, runs, "own", before_seal)
        self._sealed = state.stamp
        return 0.0

    def seal_mirror(self, state: RankState) -> None:
        self._write(state, state.mirrored, "mirror", lambda: None)

    def _write(
        self, state: RankState, runs: Sequence[Run] | None, what: str, before_seal: Callable[[], None]
    ) -> None:
        assert self._seat is not None
        label = int(self._seat.view)
        locator = f"{self.name}.view-{label}.step-{state.stamp}.{what}"
        if locator in self._group.stocks.setdefault(self.name, {}):
            return
        path = self._group.folder / locator
        path.unlink(missing_ok=True)  # begun and not sealed: the view ended in between
        create_segment(path, required_bytes(state.footprint(runs)))
        with SegmentMap(path, writable=True) as segment:
            write_snapshot(segment, state, (1, label), before_seal, runs)
            seal = read_seal(segment)
            assert seal is not None
            index = read_index(segment, seal, Source("segment", self.name, locator))
        with self._group.condition:
            self._group.stocks[self.name][locator] = index

    def release(self) -> float:
        return 0.0

    def protect(self, step: int, now: bool = False) -> float:
        return 0.0

    def background_s(self) -> float:
        return 0.0

    def sealed_step(self) -> int:
        return self._sealed

    def fault_point(self, phase: str, step: int) -> None:
        assert self._seat is not None
        group = self._group
        with group.condition:
            what = group.faults.pop((phase, step, self._seat.rank), "")
        if what == "join":
            with group.condition:
                name = f"rank-{len(group.outcome.sessions)}"
                group.alive.add(name)
            group.start(name)
        elif what == "die":
            with group.condition:
                group.alive.discard(self.name)
                group.offers.pop(self.name, None)
                if group.shadow:
                    group.stocks.pop(self.name, None)
        if what:
            group.end_view(f"{what} of {self.name} at {phase} of step {step}")
            raise Died if what == "die" else PeerLost(what)

    def stand_up(self, error: CollectiveError | None) -> None:
        pass

    def slow_factor(self, step: int) -> float:
        return 1.0


MakeSession = Callable[[Any], Session]
Train = Callable[[Session, str], None]


def run_group(
    folder: Path,
    settings: Settings,
    ranks: int,
    make: MakeSession,
    lane_loss: Callable[[Session, int, int], Any],
    faults: Mapping[tuple[str, int, int], str] | None = None,
    shadow: bool = False,
) -> Outcome:
    """Trains with `ranks` threads; `make(conductor)` builds a session, `lane_loss(session, step, lane)` a loss.

    With `shadow` each rank mirrors the one before it, and a rank that dies takes its segments with it.
    """
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []

    def body(name: str) -> None:
        session = group.outcome.sessions[name]
        try:
            with session as s:
                for step in s.steps():
                    group.outcome.yielded.setdefault(name, []).append(step)
                    for lane in s.lanes():
                        s.backward(lane, lane_loss(s, step, lane))
                    s.commit()
        except Died:
            pass
        except BaseException as error:
            errors.append(error)
            with group.condition:  # the others end without it, and the error is raised when they have
                group.alive.discard(name)
                group.offers.pop(name, None)
            group.end_view(f"{name} failed")

    def start(name: str) -> None:
        with building:  # models are built from torch's one random state
            torch.manual_seed(settings.seed)
            group.outcome.sessions[name] = make(Rank(group, name))
        thread = threading.Thread(target=body, args=(name,), name=name)
        threads.append(thread)
        thread.start()

    building = threading.Lock()
    group = Group(folder, settings, dict(faults or {}), start, shadow)
    group.alive = {f"rank-{rank}" for rank in range(ranks)}
    for rank in range(ranks):
        start(f"rank-{rank}")
    for thread in threads:  # a joiner's is appended before the one that let it in ends
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} hangs"
    if errors:
        raise errors[0]
    assert not group.faults, f"never reached: {group.faults}"
    return group.outcome


Owned = Sequence[Sequence[Run]]


@pytest.fixture
def group_run(tmp_path: Path) -> Callable[..., Outcome]:
    """`run_group` in a folder of its own, as often as a test likes."""
    count = [0]

    def run(*args: Any, **kwargs: Any) -> Outcome:
        count[0] += 1
        folder = tmp_path / f"group-{count[0]}"
        folder.mkdir()
        return run_group(folder, *args, **kwargs)

    return run


@pytest.fixture
def groups() -> Callable[[int], list[InMemory]]:
    return lambda ranks: Post(ranks).groups


@pytest.fixture
def threads() -> Callable[[Sequence[Callable[[], Any]]], list[Any]]:
    return in_threads

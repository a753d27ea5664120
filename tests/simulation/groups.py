"""A group in virtual time: the coordinator's machine, members' standings, streams that break, everybody may die.

Faults come at random for some time; then all is healed and every living member that was not evicted has to commit
again. The referee compares what became of each transaction on them.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from everstep.collectives import group_membership as gm
from everstep.collectives.errors import Evicted
from everstep.collectives.group_messages import (
    Anew,
    Ballot,
    Decided,
    Enter,
    Formed,
    Joiners,
    Leave,
    Over,
    key_of,
)
from everstep.collectives.group_state import (
    AskedAnew,
    Entered,
    Event,
    HungUp,
    Left,
    Limits,
    LinkBroke,
    MemberDied,
    Refuse,
    SendDecided,
    SendJoiners,
    SendOver,
    SendView,
    Tick,
    Voted,
    WatcherHeard,
)
from everstep.collectives.messages import Complaint, Excluded, Member
from everstep.collectives.standing import Standing

FAULTY_S = 12.0
HEALED_S = 12.0
LIMITS = Limits()
KEPT_LINES = 400


class Violation(AssertionError):
    """A seed failed; carries the event log."""


class Stream:
    """One control stream. Messages keep their order; what is under way is lost when it breaks."""

    def __init__(self, world: World, member: Peer, coordinator: Coordinator) -> None:
        self.world, self.member, self.coordinator = world, member, coordinator
        self.open = True
        coordinator.accepted.append(self)
        self._arrives = {True: 0.0, False: 0.0}

    def send(self, message: Any, up: bool) -> None:
        self._arrives[up] = max(self._arrives[up], self.world.now + self.world.rng.expovariate(500))
        self.world.at(self._arrives[up], lambda: self._deliver(message, up))

    def _deliver(self, message: Any, up: bool) -> None:
        if self.open and up and self.coordinator.alive:
            self.coordinator.hear(self, message)
        elif self.open and not up:
            self.member.hear(self, message)

    def close(self) -> None:
        """Both ends notice, each at its time."""
        if self.open:
            self.open = False
            self.world.after(self.world.rng.expovariate(200), lambda: self.coordinator.closed(self))
            self.world.after(self.world.rng.expovariate(200), lambda: self.member.closed(self))


class Coordinator:
    def __init__(self, world: World) -> None:
        self.world, self.alive = world, True
        self.doomed = False  # dies while it tells a verdict
        epoch, view, settled = world.disk if world.disk is not None else (0, None, None)
        self.state = gm.initial(epoch + 1, world.minimum, LIMITS, world.now, view, settled)
        self.world.disk = (self.state.epoch, view, settled)
        self.streams: dict[str, Stream] = {}
        self.key_of: dict[Stream, str] = {}
        self.accepted: list[Stream] = []
        self._tick()

    def _tick(self) -> None:
        if self.alive:
            self.feed(WatcherHeard("host"))
            self.feed(Tick())
            self.world.after(0.05, self._tick)

    def feed(self, event: Event) -> None:
        if not self.alive:
            return
        self.state, commands, reason = gm.decide(self.state, event, self.world.now)
        if commands:
            self.world.log(f"coordinator: {reason}")
        for command in commands:
            if not self.alive:
                return  # it died within
            match command:
                case SendView(to, view, cause, why, lost, joiners):
                    self.world.disk = (self.state.epoch, view, self.state.settled)
                    self._tell(to, Formed(view, cause, why, lost, joiners))
                case SendOver(to, id, why, lost):
                    self._tell(to, Over(id, why, lost))
                case SendDecided(to, settled):
                    self._tell(to, Decided(settled))
                case SendJoiners(to, names):
                    self._tell(to, Joiners(names))
                case Refuse(key, why):
                    stream = self.streams.pop(key, None)
                    if stream is not None:
                        stream.send(Excluded(why), up=False)

    def _tell(self, names: tuple[str, ...], message: Any) -> None:
        last = self.world.rng.randrange(len(names) + 1) if self.doomed and isinstance(message, Decided) else None
        for told, name in enumerate(names):
            if told == last:
                return self.world.kill_coordinator()
            member = self.state.ready.get(name)
            stream = self.streams.get(key_of(name, member.incarnation)) if member is not None else None
            if stream is not None:
                stream.send(message, up=False)
        return self.world.kill_coordinator() if last is not None else None

    def hear(self, stream: Stream, message: Any) -> None:
        if isinstance(message, Enter):
            key = key_of(message.member.name, message.member.incarnation)
            self.key_of[stream], self.streams[key] = key, stream
            return self.feed(Entered(message.member, message.report))
        key = self.key_of.get(stream, "")
        if self.streams.get(key) is not stream:
            return None
        name = key.partition("/")[0]
        match message:
            case Ballot():
                self.feed(Voted(name, message))
            case Complaint(id, about, error):
                self.feed(LinkBroke(name, id, about, error))
            case Anew(id, reason):
                self.feed(AskedAnew(name, id, reason))
            case Leave():
                self.feed(Left(key))
        return None

    def closed(self, stream: Stream) -> None:
        key = self.key_of.pop(stream, "")
        if self.streams.get(key) is stream:
            del self.streams[key]
            self.feed(HungUp(key))

    def die(self) -> None:
        self.alive = False
        for stream in self.accepted:
            if self.doomed:  # what it managed to say arrives
                self.world.after(0.02, stream.close)
            else:
                stream.close()


class Peer:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.standing = Standing(Member(name, 0, "host", "", incarnation="1"))
        self.dead = self.frozen = False
        self.unreachable_until = 0.0
        self.stream: Stream | None = None
        self.connected: Any = None
        self.gave_up: Any = None  # a view in which it aborted: it waits for the next one
        self.asleep: list[Callable[[], None]] = []
        self.outcomes: dict[int, str] = {}
        self.last_commit = 0.0
        self._reconnect()
        self._act()

    @property
    def counts(self) -> bool:
        return not self.dead and self.standing.excluded is None

    def hear(self, stream: Stream, message: Any) -> None:
        if self.dead or stream is not self.stream:
            return
        if self.frozen:
            self.asleep.append(lambda: self.hear(stream, message))
            return
        if self.standing.hear(message) and isinstance(message, Formed):
            self.world.after(self.world.rng.expovariate(100), lambda: self._connect(message.view))

    def _connect(self, view: Any) -> None:
        newest = self.standing.newest
        if newest is not None and newest.view.id == view.id:
            self.connected = view

    def closed(self, stream: Stream) -> None:
        if stream is self.stream and not self.dead:
            self.stream = None
            self.world.after(0.05, self._reconnect)

    def _reconnect(self) -> None:
        if self.dead or self.stream is not None:
            return
        coordinator = self.world.coordinator
        if self.frozen or coordinator is None or not coordinator.alive or self.world.now < self.unreachable_until:
            self.world.after(0.05, self._reconnect)
            return
        self.stream = Stream(self.world, self, coordinator)
        for message in self.standing.greeting():
            self.stream.send(message, up=True)

    def send(self, message: Any) -> None:
        if self.stream is not None:
            self.stream.send(message, up=True)

    def _act(self) -> None:
        if self.dead:
            return
        if not self.frozen:
            self._step()
        if self.standing.excluded is None:
            self.world.after(self.world.rng.uniform(0.002, 0.02), self._act)

    def _step(self) -> None:
        standing, rng = self.standing, self.world.rng
        if standing.doubt is not None:
            ballot = standing.doubt
            try:
                outcome = standing.outcome(ballot)
            except Evicted:
                outcome = "evicted"
            if outcome:
                standing.doubt = None
                self.outcomes[ballot.txn] = outcome
                self.last_commit = self.world.now if outcome == "commit" else self.last_commit
            return
        if standing.used is None or standing.used is self.gave_up or standing.error() is not None:
            if standing.can_adopt(self.connected):
                standing.adopt(self.connected)
            return
        ballot = standing.ballot()
        kind = "admit" if ballot.txn % 7 == 0 else "ok"
        if rng.random() < 0.01 and self.world.faulty:
            kind = "abort"
        ballot = Ballot(ballot.id, ballot.txn, kind, 1, "by chance" if kind == "abort" else "")
        if kind == "abort":
            self.outcomes[ballot.txn] = "superseded"
            standing.say_of(ballot)
            self.gave_up = standing.used
        else:
            standing.doubt = ballot
        self.send(ballot)

    def complain(self, about: str) -> None:
        if self.standing.newest is not None:
            view = self.standing.newest.view
            names = [m.name for m in view.members]
            if about in names and about != self.name:
                self.standing.link_broke(view, names.index(about), "cut")
                complaint = Complaint(view.id, about, "cut")
                if self.standing.say_of(complaint):
                    self.send(complaint)

    def die(self) -> None:
        self.dead = True
        self._lost("exited")

    def freeze(self) -> None:
        self.frozen = True
        self._lost("frozen")

    def wake(self) -> None:
        self.frozen = False
        asleep, self.asleep = self.asleep, []
        for action in asleep:
            action()

    def _lost(self, cause: str) -> None:
        """The watcher tells whatever coordinator there is, or will be."""
        key = key_of(self.name, "1")
        self.world.deaths.append((key, cause))
        self.world.after(self.world.rng.uniform(0.002, 0.05), lambda: self.world.tell_death(key, cause))
        if self.dead and self.stream is not None:
            self.stream.close()


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now, self.faulty = 0.0, True
        self.lines: list[str] = []
        self.faults: dict[str, int] = {}
        self.disk: Any = None
        self.deaths: list[tuple[str, str]] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.minimum = self.rng.randint(1, 3)
        self.keeps_disk = self.rng.random() < 0.6
        self.coordinator: Coordinator | None = None
        self.peers: list[Peer] = []
        self._names = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), action))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay, action)

    def log(self, line: str) -> None:
        self.lines.append(f"{self.now:8.3f} {line}")

    def run_until(self, end: float) -> None:
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end

    def start_coordinator(self) -> None:
        self.log("a coordinator starts")
        self.coordinator = Coordinator(self)
        for death in self.deaths[-50:]:  # the watcher was quick
            self.tell_death(*death)

    def tell_death(self, key: str, cause: str) -> None:
        if self.coordinator is not None and self.coordinator.alive:
            self.coordinator.feed(MemberDied(key, cause))

    def join(self) -> None:
        self.peers.append(Peer(self, f"p{next(self._names)}"))

    # ---- faults -------------------------------------------------------------------------------------------

    def fault(self) -> None:
        if self.now > FAULTY_S:
            return
        kinds = [
            self.kill_coordinator, self.kill_coordinator_in_a_verdict, self.kill_peer, self.freeze_peer,
            self.break_stream, self.break_stream, self.cut_off, self.complain, self.add_peer, self.leave,
        ]  # fmt: skip
        kind = self.rng.choice(kinds)
        self.faults[kind.__name__] = self.faults.get(kind.__name__, 0) + 1
        self.log(f"fault: {kind.__name__}")
        kind()
        self.after(self.rng.choice([0.005, 0.05, 0.5]) * self.rng.uniform(0.2, 2), self.fault)

    def _any(self) -> Peer | None:
        living = [p for p in self.peers if p.counts and not p.frozen]
        return self.rng.choice(living) if living else None

    def kill_coordinator(self) -> None:
        if self.coordinator is not None and self.coordinator.alive:
            self.coordinator.die()
            if not self.keeps_disk:
                self.disk = None
            self.after(self.rng.choice([0.05, 0.3, 1.5]), self.start_coordinator)

    def kill_coordinator_in_a_verdict(self) -> None:
        if self.coordinator is not None:
            self.coordinator.doomed = True

    def kill_peer(self) -> None:
        if peer := self._any():
            self.log(f"{peer.name} dies")
            peer.die()

    def freeze_peer(self) -> None:
        if peer := self._any():
            self.log(f"{peer.name} freezes")
            peer.freeze()
            self.after(self.rng.uniform(0.02, 3), peer.wake)

    def break_stream(self) -> None:
        peer = self._any()
        if peer is not None and peer.stream is not None:
            peer.stream.close()

    def cut_off(self) -> None:
        if peer := self._any():
            peer.unreachable_until = self.now + self.rng.choice([0.2, 1.0, 4.0])
            if peer.stream is not None:
                peer.stream.close()

    def complain(self) -> None:
        peer, about = self._any(), self._any()
        if peer is not None and about is not None:
            peer.complain(about.name)

    def add_peer(self) -> None:
        if sum(p.counts for p in self.peers) < 7:
            self.join()

    def leave(self) -> None:
        if (peer := self._any()) and sum(p.counts for p in self.peers) > 3:
            self.log(f"{peer.name} leaves")
            peer.send(Leave())
            peer.dead = True
            if peer.stream is not None:
                self.after(0.05, peer.stream.close)

    # ---- the referee --------------------------------------------------------------------------------------

    def simulate(self) -> None:
        self.start_coordinator()
        for _ in range(4):
            self.join()
        self.after(1.0, self.fault)
        self.run_until(FAULTY_S)
        self.faulty = False
        if self.coordinator is None or not self.coordinator.alive:
            self.run_until(self.now + 2)
        for _ in range(self.minimum):
            self.join()
        self.run_until(self.now + HEALED_S)
        self._judge()

    def _judge(self) -> None:
        living = [peer for peer in self.peers if peer.counts]
        ends: dict[int, dict[str, str]] = {}
        for peer in living:
            for txn, outcome in peer.outcomes.items():
                ends.setdefault(txn, {})[peer.name] = outcome
        for txn, outcomes in sorted(ends.items()):
            if "commit" in outcomes.values() and set(outcomes.values()) != {"commit"}:
                self.fail(f"transaction {txn} ended differently: {outcomes}")
        stuck = [p.name for p in living if p.last_commit < self.now - 3 and p.standing.used is not None]
        if stuck or not any(p.last_commit > self.now - 3 for p in living):
            self.fail(f"no commit in the last 3 s: {stuck or [p.name for p in living]}")

    def fail(self, text: str) -> None:
        raise Violation(text + "\n" + "\n".join(self.lines[-KEPT_LINES:]))

"""The simulated shell of the coordinator: real decisions, simulated sockets and clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from everstep.collectives import membership as m
from everstep.collectives import messages as wire
from everstep.collectives.messages import (
    CoordinatorMessage,
    Excluded,
    Go,
    NewView,
    Order,
    ToMembers,
    Verdict,
    View,
    ViewId,
    Watching,
    decode_member,
)
from everstep.platform.training import messages as training
from everstep.platform.training import recovery
from simulation.referee import Referee
from simulation.state import ALL, CHECKPOINT, Memory, index_of
from simulation.world import Connection, Process, World

TICK_S = 0.25
FROZEN_S = 1.0  # without a word from a watcher, it is lost
PATIENCE_S = 5.0

_inventory = msgspec.msgpack.Decoder(training.Inventory)
_stock = msgspec.msgpack.Decoder(training.Stock)
_vote = msgspec.msgpack.Decoder(training.Vote)
_pack = msgspec.msgpack.encode


@dataclass
class Job:
    """What outlives coordinators. `target` is changed by scale orders."""

    minimum: int
    target: int
    steps: int
    domains: tuple[str, ...]
    replicated: bool  # ZeRO 0: every rank holds everything
    offers_live: bool  # stamped memory is a source for others; else it is sealed before it is offered
    every: int  # steps between snapshots
    start: int  # step of the checkpoint that the run resumes; 0: from the seed


@dataclass
class Directory:
    """Where the coordinator of the highest epoch is found: Ray's key-value store, in a real run."""

    coordinator: Coordinator | None = None
    epoch: int = 0


class Coordinator(Process):
    def __init__(self, world: World, job: Job, directory: Directory, referee: Referee) -> None:
        directory.epoch += 1  # compare and swap
        super().__init__(world, f"coordinator-{directory.epoch}", f"head-{directory.epoch}")
        directory.coordinator = self
        self.epoch = directory.epoch
        self.job = job
        self.referee = referee
        # A successor knows which domains there are, not which of them still have a watcher.
        missing = frozenset(job.domains) if self.epoch > 1 else frozenset()
        self.state = m.initial(self.epoch, job.minimum, job.target, world.now, PATIENCE_S, missing)
        self._links: dict[str, Connection] = {}  # by domain
        self._heard_s: dict[str, float] = {}
        self._pending: deque[m.Event] = deque()
        self._busy = False
        self._gave_up = False  # on watchers that may still hold something
        self._last_tick_s = world.now
        self._announced: ViewId | None = None
        self.doubt: Callable[[], None] | None = None  # strikes when a part of a verdict is out
        self.after(TICK_S, self._tick)

    # ---- from outside -----------------------------------------------------------------------------------

    def on_message(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Watching):
            self._watching(connection, message)
            return
        domain = self._domain_of(connection)
        if domain is None:
            return
        self._heard_s[domain] = self.world.now
        match message:
            case wire.FromMember(name, payload):
                self._from_member(name, payload)
            case wire.Died(name, cause, detected_ms):
                self._lose_member(name, cause, detected_ms)
            case wire.Stock(id, _, fenced, payload):
                self.feed(m.Stocked(domain, id, fenced, payload))
            case wire.Beat():
                pass

    def on_closed(self, connection: Connection) -> None:
        domain = self._domain_of(connection)
        if domain is not None:
            self._lose_watcher(domain, "its stream ended")

    def retarget(self) -> None:
        if self.state.target != self.job.target:
            self.feed(m.Retarget(self.job.target))

    def _domain_of(self, connection: Connection) -> str | None:
        return next((d for d, link in self._links.items() if link is connection), None)

    def _watching(self, connection: Connection, message: Watching) -> None:
        if message.domain in self._links:
            self._lose_watcher(message.domain, "another watcher has taken its place")
        self._links[message.domain] = connection
        self._heard_s[message.domain] = self.world.now
        self.feed(m.WatcherUp(message.domain))

    def _from_member(self, name: str, payload: bytes) -> None:
        match decode_member(payload):
            case wire.Join(member):
                self.feed(m.Joined(member))
            case wire.Inventory(id, body):
                self.feed(m.Inventoried(name, id, body))
            case wire.Level(id):
                self.feed(m.Levelled(name, id))
            case wire.Vote(id, step, body):
                self.feed(m.Voted(name, id, step, body))
            case wire.Complaint(id, about, error):
                self.feed(m.Complained(name, id, about, error))

    def _lose_member(self, name: str, cause: str, detected_ms: float = 0.0) -> None:
        self.feed(m.MemberDied(name, cause, detected_ms))

    def _lose_watcher(self, domain: str, cause: str) -> None:
        """Whoever it watched can no longer be judged, so its members die with it."""
        self._links.pop(domain).close(self)
        names = [n for n, member in self.state.ready.items() if member.domain == domain]
        deaths: list[m.Event] = [m.MemberDied(n, f"watcher of {domain} is lost: {cause}") for n in names]
        events = [*deaths, m.WatcherLost(domain)]
        self.world.rng.shuffle(events)  # the core must not care
        for event in events:
            self.feed(event)

    def _tick(self) -> None:
        overslept = self.world.now - self._last_tick_s > 2 * TICK_S
        self._last_tick_s = self.world.now
        for domain in list(self._links):
            if overslept:  # not theirs, but my silence
                self._heard_s[domain] = self.world.now
            elif self.world.now - self._heard_s[domain] > FROZEN_S:
                self._lose_watcher(domain, f"silent for {FROZEN_S} s")
        self.retarget()
        self.feed(m.Tick())
        self.after(TICK_S, self._tick)

    # ---- decisions and what follows ---------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        """Events that come up while commands are carried out wait until all of them are."""
        self._pending.append(event)
        if self._busy:
            return
        self._busy = True
        while self._pending and not self.dead:
            event = self._pending.popleft()
            if isinstance(event, m.MemberDied) and event.name in self.state.ready:
                self.referee.declared_dead(self.epoch, event.name)
            phase, before = self.state.phase, self.world.now - PATIENCE_S
            self._gave_up = isinstance(phase, m.Gathering) and bool(self.state.missing) and phase.since < before
            self.state, commands, reason = m.decide(self.state, event, self.world.now)
            if not isinstance(event, m.Tick) or commands:
                self.world.log("%s: %s", self.name, reason)
            for command in commands:
                self._perform(command)
        self._busy = False
        if isinstance(self.state.phase, m.Ended):
            self.deliver(self._ended)

    def _ended(self) -> None:
        if isinstance(self.state.phase, m.Ended):
            self.referee.ended(self.epoch, self.state.phase.ok, self.state.phase.reason)
            self.die("the run has ended")

    def _perform(self, command: m.Command) -> None:
        match command:
            case m.SendPrepare(prepare, domain):
                for name in (domain,) if domain else tuple(self._links):
                    self._send(name, (), prepare)
            case m.Choose():
                self._choose(command)
            case m.SendView(view):
                self.referee.admitted(view.id, {member.name for member in view.members})
                self.referee.chose(view.id, view.base_step, patience_was_over=self._gave_up)
                self._to_members(view, NewView(view))
            case m.SendGo(view, _):
                self.referee.went(view.id)
                self._to_members(view, Go(view.id))
            case m.Judge(view, step, votes):
                self._judge(view, step, votes)
            case m.SendVerdict(view, step, payload, reform):
                self._to_members(view, Verdict(view.id, step, payload, reform))
                self._announce(view, payload)
            case m.Refuse(name, reason):
                for domain in self._links:
                    self._send(domain, (name,), Excluded(reason))
            case m.Fail():
                pass

    def _choose(self, command: m.Choose) -> None:
        inventories = {n: _inventory.decode(p) for n, p in command.inventories.items()}
        stocks = {d: _stock.decode(p) for d, p in command.stocks.items()}
        names = [member.name for member in command.members]
        try:
            start = self.job.start
            checkpoint = index_of(start, ALL, CHECKPOINT) if start else None
            choice = recovery.choose(names, inventories, stocks, checkpoint, start)
        except recovery.Lost as lost:
            self.feed(m.Unchoosable(command.id, str(lost)))
            return
        plan = training.ViewPlan(choice.owned, choice.have, final=choice.base_step == self.job.steps)
        self.world.log("%s: %s", self.name, choice.reason)
        self.feed(m.Chosen(command.id, choice.base_step, _pack(plan)))

    def _judge(self, view: View, step: int, payloads: Any) -> None:
        votes = {n: _vote.decode(p) for n, p in payloads.items()}
        protected = min(vote.sealed_step for vote in votes.values())
        last = self.job.steps
        outcome = ("skip" if step % 7 == 0 else "commit") if step <= last else "sealed"
        if step == last + 2:
            outcome = "finished"
            values: Memory = {}
            for vote in votes.values():
                values |= msgspec.msgpack.decode(bytes.fromhex(vote.hash_lines[0]), type=dict[int, tuple[int, int]])
            self.referee.whole(values)
        payload = _pack(training.Verdict(outcome, protected_step=protected, last=step >= last))
        self.referee.judged(view.id, step, payload, set(votes), protected)
        self.referee.reforms(view.id, len(votes), min(len(self.state.ready), self.state.target))
        self.feed(m.Judged(view.id, step, payload, outcome == "finished", protected))

    def _announce(self, view: View, payload: bytes) -> None:
        """The first verdict of a view says that its base step is protected: older cuts may go everywhere."""
        if self._announced != view.id:
            self._announced = view.id
            for domain in self._links:
                self._send(domain, (), Order("protected", _pack(view.id)))

    def _to_members(self, view: View, message: CoordinatorMessage) -> None:
        domains: dict[str, list[str]] = {}
        for member in view.members:
            domains.setdefault(member.domain, []).append(member.name)
        strike_at = -1
        if self.doubt is not None and isinstance(message, Verdict):
            strike_at = self.world.rng.randrange(len(domains))
        for at, (domain, names) in enumerate(domains.items()):
            if at == strike_at and self.doubt is not None:
                strike, self.doubt = self.doubt, None
                self.world.log("%s is struck with %d of %d messages of a verdict out", self.name, at, len(domains))
                strike()
            self._send(domain, tuple(names), message)

    def _send(self, domain: str, names: tuple[str, ...], message: CoordinatorMessage) -> None:
        if self.frozen:  # stopped between two messages: it says the rest, in order, when it is woken
            self.deliver(lambda: self._send(domain, names, message))
        elif domain in self._links:
            self._links[domain].send(self, ToMembers(names, message))

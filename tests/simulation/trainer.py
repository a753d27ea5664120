"""The simulated trainer: the member's side of the protocol, without tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from everstep.collectives import messages as wire
from everstep.collectives.messages import Go, Member, NewView, Prepare, Verdict, View, ViewId
from everstep.platform.training import messages as training
from everstep.platform.training.layout import rows_of
from everstep.storage.index import Source
from everstep.storage.planner import Copy, Want, plan
from simulation import watcher as w
from simulation.coordinator import Job
from simulation.referee import Referee
from simulation.state import (
    ALL,
    CHECKPOINT,
    UNITS,
    Memory,
    advance,
    index_of,
    reference,
    runs_of,
    units_between,
    units_of,
    wants_of,
)
from simulation.world import Connection, Process, World

TORN = -1
_pack = msgspec.msgpack.encode


class Exchange(msgspec.Struct, frozen=True):
    """A rank's gradients for a step; `stamp` is the step of the state they were computed from."""

    view: ViewId
    step: int
    name: str
    stamp: int


class Trainer(Process):
    def __init__(
        self,
        world: World,
        name: str,
        host: str,
        slot: int,
        job: Job,
        referee: Referee,
        find: Callable[[str], Process | None],
    ) -> None:
        """`find` resolves an address: a trainer's name, or a domain for its watcher."""
        super().__init__(world, name, host)
        self.job = job
        self.referee = referee
        self._find = find
        self._member = Member(name, slot, f"domain-{slot}", name)
        self._rng = random.Random(f"{name} {world.rng.random()}")
        self._pace_s = self._rng.uniform(0.05, 0.12)
        # State; it is built from the seed while the process starts.
        self.memory: Memory = {}
        self.stamp = TORN
        # Membership.
        self._watcher: Connection | None = None
        self._highest = ViewId(0, 0)
        self._view: View | None = None
        self._plan: training.ViewPlan | None = None
        self._active = False
        self._promise: Prepare | None = None  # its inventory is owed when the writers are through
        self._term = 0  # timers of an older term are void
        # The step.
        self._step = 0
        self._computed = False
        self._voted = False
        self._heard: dict[tuple[ViewId, int], set[str]] = {}
        self._peers: dict[str, Connection] = {}
        self._applying = False
        # Snapshots.
        self._label: ViewId | None = None  # view in whose layout the memory is cut
        self._sealed = TORN  # newest, in whatever view
        self._due = TORN  # no vote before this step is sealed in the acting view
        self._reserving = False
        self._writing: tuple[ViewId, int, int] | None = None  # view, step, slot
        # Restore.
        self._fetching: dict[Connection, int] = {}
        self.after(self._rng.uniform(0.2, 0.8), self._built)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        """A timer that a Prepare voids."""
        term = self._term
        self.after(delay_s, lambda: action() if self._term == term else None)

    def _tell(self, message: Any) -> None:
        assert self._watcher is not None
        self._watcher.send(self, message)

    def _say(self, message: wire.MemberMessage) -> None:
        self._tell(w.Relay(wire.encode(message)))

    # ---- life -------------------------------------------------------------------------------------------

    def _built(self) -> None:
        self.memory = {u: reference(0, u) for u in ALL} if self.job.replicated else {}
        self.stamp = 0
        watcher = self._find(self._member.domain)
        self._watcher = self.world.connect(self, watcher)
        if self._watcher is None:
            self.die("there is no watcher")
            return
        self._tell(w.Hello(self.name))
        self._say(wire.Join(self._member))

    def on_message(self, connection: Connection, message: Any) -> None:
        if connection is self._watcher:
            self._from_watcher(message)
            return
        match message:
            case Exchange(view, step, name, stamp):
                if stamp != min(step - 1, self.job.steps):
                    self.referee.fail(f"{name} sent gradients of state {stamp} for step {step}")
                self._peers.setdefault(name, connection)
                self._heard.setdefault((view, step), set()).add(name)
                self._advance()
            case w.Fetch():
                self._serve(connection, message)
            case w.Fetched():
                self._fetched(connection, message)

    def on_closed(self, connection: Connection) -> None:
        if connection is self._watcher:
            self.die("its watcher is gone")
        elif connection in self._fetching:
            self._complain(connection.other(self).name, "the stream of a source ended")
        elif self._active and connection in self._peers.values():
            self._complain(connection.other(self).name, "the stream of a peer ended")

    def break_stream(self, connection: Connection) -> None:
        """A fault: its own end breaks, too, and it hears of that, but for its watcher.s."""
        connection.close(self)
        if connection is not self._watcher:
            self.deliver(lambda: self.on_closed(connection))

    def _complain(self, about: str, error: str) -> None:
        """The view is over for me: I wait for the next one."""
        if self._view is not None:
            self._say(wire.Complaint(self._view.id, about, error))
        self._stop()

    def _from_watcher(self, message: Any) -> None:
        match message:
            case Prepare():
                self._prepare(message)
            case NewView(view):
                self._new_view(view)
            case Go(id):
                self._go(id)
            case Verdict():
                self._verdict(message)
            case w.Reserved():
                self._reserved(message)
            case w.Rejoin():
                self._say(wire.Join(self._member))
            case wire.Excluded(reason):
                self.die(f"excluded: {reason}")

    # ---- the view before is over ------------------------------------------------------------------------

    def _stop(self) -> None:
        self._term += 1
        self._active = False
        self._voted = False
        for connection in [*self._peers.values(), *self._fetching]:
            connection.close(self)
        self._peers.clear()
        self._fetching.clear()

    def _prepare(self, prepare: Prepare) -> None:
        if prepare.id < self._highest:
            return  # of a view or an epoch that is over
        self._highest = prepare.id
        self._stop()
        self._view = None
        self._heard = {key: names for key, names in self._heard.items() if key[0] >= prepare.id}
        self._promise = prepare
        if self._writing is not None and self._rng.random() < 0.5:
            view, _, index = self._writing
            self._writing = None
            self._tell(w.Abandoned(view, index))
        self._keep_promise()

    def _keep_promise(self) -> None:
        """The inventory comes after the last write: an apply in progress ends first, as does a snapshot."""
        if self._promise is None or self._applying or self._reserving or self._writing is not None:
            return
        live = None
        if self.stamp != TORN and self.job.offers_live:
            live = index_of(self.stamp, self.memory, Source("live", self.name, ""))
        elif self.stamp not in (TORN, self._sealed) and self._label is not None:
            self._snapshot(self._label)
            return
        id, self._promise = self._promise.id, None
        inventory = training.Inventory(self.stamp, runs_of(self.memory), live, rows_of(UNITS))
        self._say(wire.Inventory(id, _pack(inventory)))

    # ---- restore ----------------------------------------------------------------------------------------

    def _new_view(self, view: View) -> None:
        if view.id != self._highest or self._promise is not None:
            return
        self._view = view
        self._plan = msgspec.msgpack.decode(view.payload, type=training.ViewPlan)
        base, have = view.base_step, self._plan.have
        if have is None:
            self.memory = {u: reference(0, u) for u in self._mine()}
            self.stamp = 0
            self._level()
            return
        if self.stamp != base:
            self.memory, self.stamp = {}, TORN
        wanted = [u for u in self._mine() if u not in self.memory]
        if wanted and not self.job.offers_live:
            self.stamp = TORN  # new stores are taken, the old ones are nobody's source
        asks: dict[tuple[str, str, str], list[int]] = {}
        for copy in plan(have, wants_of(wanted, self.name), self._cost):
            source = copy.source
            asks.setdefault((source.kind, source.holder, source.locator), []).extend(_units(copy))
        for (kind, holder, locator), units in asks.items():
            if kind == CHECKPOINT.kind:
                self.memory |= {u: reference(base, u) for u in units}
                continue
            link = self.world.connect(self, self._find(holder))
            if link is None:
                self._complain(holder, "cannot reach a source")
                return
            self._fetching[link] = len(units)
            link.send(self, w.Fetch(view.id, locator, base, tuple(units)))
        if not self._fetching:
            self._level()

    def _cost(self, source: Source, want: Want) -> int:
        if source.kind == "segment":
            return 1 if source.holder == self._member.domain else 2
        return 0 if source.holder == self.name else 2

    def _mine(self) -> list[int]:
        assert self._view is not None
        assert self._plan is not None
        return list(ALL) if self.job.replicated else units_of(self._plan.owned[self._view.rank_of(self.name)])

    def _serve(self, connection: Connection, ask: w.Fetch) -> None:
        if ask.view != self._highest or self.stamp != ask.step or not set(ask.units) <= set(self.memory):
            connection.send(self, w.Fetched(ask.view, {}, f"{self.name} holds step {self.stamp}, not {ask.step}"))
        else:
            connection.send(self, w.Fetched(ask.view, {u: self.memory[u] for u in ask.units}))

    def _fetched(self, connection: Connection, answer: w.Fetched) -> None:
        if self._fetching.pop(connection, None) is None or self._view is None:
            return
        connection.close(self)
        if answer.error:
            self._complain(connection.other(self).name, answer.error)
            return
        self.referee.holds(self.name, "restores", answer.values, self._view.base_step)
        self.memory |= answer.values
        if not self._fetching:
            self._level()

    def _level(self) -> None:
        assert self._view is not None
        self.stamp = self._view.base_step
        self._label = self._view.id
        self.referee.holds(self.name, "is level with", self.memory, self.stamp)
        self._say(wire.Level(self._view.id))

    # ---- the step ---------------------------------------------------------------------------------------

    def _go(self, id: ViewId) -> None:
        if self._view is None or id != self._view.id:
            return
        self.memory = {u: self.memory[u] for u in self._mine()}
        self._active = True
        self._due = self.stamp
        self._snapshot(id)
        self._begin(self._view.base_step + 1)

    def _begin(self, step: int) -> None:
        self._step = step
        self._computed = self._voted = False
        if self.stamp > self._due and (self.stamp % self.job.every == 0 or self.stamp == self.job.steps):
            self._due = self.stamp
            self._snapshot(self._label)
        self._later(self._pace_s if step <= self.job.steps else 0.01, self._compute)

    def _compute(self) -> None:
        assert self._view is not None
        self._computed = True
        for member in self._view.members:
            if member.name != self.name:
                link = self._peers.get(member.name)
                if link is None or link.closed:
                    link = self.world.connect(self, self._find(member.address))
                if link is None:
                    self._complain(member.name, "cannot reach a peer")
                    return
                self._peers[member.name] = link
                link.send(self, Exchange(self._view.id, self._step, self.name, self.stamp))
        self._advance()

    def _advance(self) -> None:
        """Votes when the gradients of all have come and the state they change is sealed."""
        if not self._active or not self._computed or self._voted or self._view is None:
            return
        others = {member.name for member in self._view.members} - {self.name}
        if (
            self._sealed != self._due
            or self._reserving
            or self._writing
            or not self._heard.get((self._view.id, self._step), set()) >= others
        ):
            return
        self._heard.pop((self._view.id, self._step), None)
        self._voted = True
        kind = {1: "seal", 2: "hash"}.get(self._step - self.job.steps, "step")
        lines = (_pack(self.memory).hex(),) if kind == "hash" else ()
        self._say(
            wire.Vote(
                self._view.id,
                self._step,
                _pack(training.Vote(kind, sealed_step=self._sealed, hash_lines=lines)),
            )
        )

    def _verdict(self, verdict: Verdict) -> None:
        view = self._view
        if view is None or verdict.id != view.id or not self._active:
            return
        if verdict.step != self._step or not self._voted:
            self.referee.fail(f"{self.name} gets a verdict on step {verdict.step}, it is at {self._step}")
        self.referee.applies(self.name, view.id, verdict.step, verdict.payload)
        decision = msgspec.msgpack.decode(verdict.payload, type=training.Verdict)
        self._tell(w.Protected(view.id, decision.protected_step))
        if decision.outcome == "finished":
            self._stop()
        elif decision.outcome == "sealed":
            self._begin(verdict.step + 1)
        else:
            self._apply(verdict.step)

    def _apply(self, step: int) -> None:
        """Goes on to its end, whatever comes in between; only then the memory is stamped again."""
        self._applying = True
        self.stamp = TORN
        units = sorted(self.memory)
        half = len(units) // 2
        for unit in units[:half]:
            self.memory[unit] = advance(self.memory[unit], step, unit)
        term = self._term

        def rest() -> None:
            for unit in units[half:]:
                self.memory[unit] = advance(self.memory[unit], step, unit)
            self.stamp = step
            self._applying = False
            self.referee.holds(self.name, "has applied", self.memory, step)
            if self._term == term:
                self._begin(step + 1)
            self._keep_promise()

        self.after(self._rng.uniform(0.002, 0.02), rest)

    # ---- snapshots --------------------------------------------------------------------------------------

    def _snapshot(self, label: ViewId | None) -> None:
        assert label is not None
        assert self.stamp != TORN
        self._reserving = True
        self._tell(w.Reserve(label, self.stamp))

    def _reserved(self, slot: w.Reserved) -> None:
        self._reserving = False
        if slot.segment is None:  # the state of this view is protected elsewhere, in a newer one
            self._sealed = self.stamp
            self._keep_promise()
            return
        assert (slot.step, slot.view) == (self.stamp, self._label), "nothing changes before the slot is there"
        self._writing = (slot.view, slot.step, slot.index)
        slot.segment.seal = None
        slot.segment.values = {}
        copy = dict(self.memory)  # a staging copy: the next apply does not wait for the segment
        self.after(self._rng.uniform(0.005, 0.05), lambda: self._write(slot, copy))

    def _write(self, slot: w.Reserved, copy: Memory) -> None:
        if self._writing != (slot.view, slot.step, slot.index):
            return
        assert slot.segment is not None
        half = len(copy) // 2
        slot.segment.values = dict(sorted(copy.items())[:half])
        self.after(self._rng.uniform(0.005, 0.05), lambda: self._seal(slot, copy))

    def _seal(self, slot: w.Reserved, copy: Memory) -> None:
        if self._writing != (slot.view, slot.step, slot.index):
            return
        assert slot.segment is not None
        self._writing = None
        slot.segment.values = copy
        slot.segment.seal = (slot.step, slot.view)
        self.referee.holds(self.name, "seals", copy, slot.step)
        self._tell(w.Sealed(slot.view, slot.step, slot.index))
        self._sealed = slot.step
        self._advance()
        self._keep_promise()


def _units(copy: Copy) -> list[int]:
    return units_between(copy.name, copy.start, copy.stop)

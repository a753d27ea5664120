"""The simulated shell of a domain's watcher, which is its snapshot manager too.

It judges and fences the local trainer, relays its messages, keeps its segments with the real slot machine,
and serves them to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from everstep.collectives import messages as wire
from everstep.collectives.messages import CoordinatorMessage, Prepare, ToMembers, ViewId
from everstep.platform.training import messages as training
from everstep.storage.index import Source
from everstep.storage.versions import Slots, Version
from simulation.coordinator import FROZEN_S, Coordinator, Directory
from simulation.state import Cut, Host, Memory, Segment, index_of
from simulation.world import Connection, Process, World

LOOK_S = 0.1  # at the local trainer's /proc state
DIRECTORY_S = 0.4  # between looks for a newer coordinator
SLOTS = 2


# ---- between a trainer and its watcher --------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    name: str


@dataclass(frozen=True)
class Relay:
    payload: bytes  # a MemberMessage


@dataclass(frozen=True)
class Rejoin:
    """There is a new coordinator."""


@dataclass(frozen=True)
class Reserve:
    view: ViewId
    step: int


@dataclass(frozen=True)
class Reserved:
    view: ViewId
    step: int
    index: int
    segment: Segment | None  # mapped; None: the view's segments have been freed


@dataclass(frozen=True)
class Sealed:
    view: ViewId
    step: int
    index: int


@dataclass(frozen=True)
class Abandoned:
    view: ViewId
    index: int


@dataclass(frozen=True)
class Protected:
    view: ViewId
    step: int


@dataclass(frozen=True)
class Fetch:
    """Of a sealed segment, from its watcher, or (`ident` empty) of a trainer's stamped memory."""

    view: ViewId
    ident: str
    step: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class Fetched:
    view: ViewId
    values: Memory
    error: str = ""


@dataclass
class Owed:
    """A stock that waits for a fence, and perhaps for an inventory."""

    prepare: Prepare
    fencing: set[str]
    inventory_of: str | None


class Watcher(Process):
    def __init__(self, world: World, name: str, home: Host, directory: Directory, locals_: list[Process]) -> None:
        """`locals_`: the trainers that run, or ran, on this host, as the system knows them."""
        super().__init__(world, name, home.name)
        self.home = home
        self.domain = f"domain-{home.slot}"
        self.kill_delay_s = 0.0  # how long a kill takes from the decision to the end (scripted zombies)
        self._directory = directory
        self._locals = locals_
        self._trainer: tuple[str, Connection] | None = None
        self._condemned: set[str] = set()
        self._coordinator: Connection | None = None
        self._epoch = 0
        self._highest = ViewId(0, 0)
        self._freed_below = ViewId(0, 0)
        self._owed: Owed | None = None
        for trainer in locals_:  # of my predecessor: nobody relays for them any more
            trainer.die("its watcher was replaced")
        for cut in home.cuts:
            versions = [
                Version(s.seal[0], tuple(msgspec.structs.astuple(s.seal[1]))) if s.seal else None
                for s in cut.segments
            ]
            cut.slots = Slots.adopt(versions)
        self._look()
        self._find_coordinator()
        self._beat()

    # ---- the local trainer ------------------------------------------------------------------------------

    def _look(self) -> None:
        for trainer in self._locals:
            if trainer.name not in self._condemned and (trainer.dead or trainer.frozen):
                self._condemn(trainer, trainer.cause if trainer.dead else "frozen")
        self.after(LOOK_S, self._look)

    def _condemn(self, trainer: Process, cause: str) -> None:
        self._condemned.add(trainer.name)
        self._report(wire.Died(trainer.name, cause))
        if self._trainer and self._trainer[0] == trainer.name:
            self._trainer = None
        self.after(self.kill_delay_s if trainer.frozen else 0.01, lambda: self._kill(trainer))

    def _kill(self, trainer: Process) -> None:
        trainer.die("killed by its watcher")
        for cut in self.home.cuts:
            for index, slot in enumerate(cut.slots.slots):
                if cut.owner == trainer.name and slot.state == "writing":
                    cut.slots = self._settled(cut, index)
        if self._owed:
            self._owed.fencing.discard(trainer.name)
            self._pay()

    def _settled(self, cut: Cut, index: int) -> Slots:
        """Of a slot whose writer is dead: what counts is the seal."""
        seal, version = cut.segments[index].seal, cut.slots.slots[index].version
        assert version is not None
        if seal is not None and seal[0] == version.step:
            return cut.slots.sealed(index, version.step)
        return cut.slots.abandoned(index)

    def _from_trainer(self, name: str, message: Any) -> None:
        match message:
            case Relay(payload):
                self._report(wire.FromMember(name, payload))
                decoded = wire.decode_member(payload)
                if isinstance(decoded, wire.Inventory) and self._owed and decoded.id == self._owed.prepare.id:
                    self._owed.inventory_of = None
                    self._pay()
            case Reserve(view, step):
                self._reserve(name, view, step)
            case Sealed(view, step, index):
                if cut := self._cut(view):
                    cut.slots = cut.slots.sealed(index, step)
            case Abandoned(view, index):
                if cut := self._cut(view):
                    cut.slots = cut.slots.abandoned(index)
            case Protected(view, step):
                if cut := self._cut(view):
                    cut.slots = cut.slots.protected(step, (view.epoch, view.number))

    # ---- segments ---------------------------------------------------------------------------------------

    def _cut(self, view: ViewId) -> Cut | None:
        """None when it was freed: the trainer may not know yet that its view is over."""
        return next((cut for cut in self.home.cuts if cut.view == view), None)

    def _reserve(self, name: str, view: ViewId, step: int) -> None:
        assert self._trainer is not None
        if view < self._freed_below:
            self._trainer[1].send(self, Reserved(view, step, -1, None))
            return
        cut = self._cut(view)
        if cut is None:
            segments = tuple(Segment(f"{name}-{view}-{i}") for i in range(SLOTS))
            cut = Cut(view, name, segments, Slots.empty(SLOTS))
            self.home.cuts.append(cut)
        cut.slots, index, reason = cut.slots.reserve(step, (view.epoch, view.number))
        assert index is not None, f"{self.name} has no slot: {reason}"
        self._trainer[1].send(self, Reserved(view, step, index, cut.segments[index]))

    def _free_below(self, view: ViewId) -> None:
        self._freed_below = max(self._freed_below, view)
        self.home.cuts = [cut for cut in self.home.cuts if cut.view >= view]

    def _stock(self) -> bytes:
        """What the seals say, whoever wrote them."""
        versions = [
            training.SealedVersion(
                (cut.view.epoch, cut.view.number),
                segment.ident,
                index_of(segment.seal[0], segment.values, Source("segment", self.domain, segment.ident)),
            )
            for cut in self.home.cuts
            for segment in cut.segments
            if segment.seal is not None
        ]
        return msgspec.msgpack.encode(training.Stock(tuple(versions)))

    def _fetch(self, connection: Connection, ask: Fetch) -> None:
        segments = [s for cut in self.home.cuts for s in cut.segments if s.ident == ask.ident]
        if not segments or segments[0].seal is None or segments[0].seal[0] != ask.step:
            connection.send(self, Fetched(ask.view, {}, f"{ask.ident} does not hold step {ask.step}"))
        else:
            connection.send(self, Fetched(ask.view, {u: segments[0].values[u] for u in ask.units}))

    # ---- the coordinator --------------------------------------------------------------------------------

    def _find_coordinator(self) -> None:
        newest = self._directory.coordinator
        if newest is not None and (newest.epoch > self._epoch or self._coordinator is None):
            link = self.world.connect(self, newest)
            if link is not None:
                if self._coordinator is not None:
                    self._coordinator.close(self)
                self._coordinator, self._epoch, self._owed = link, newest.epoch, None
                self._report(wire.Watching(self.domain, self.home.slot, "", 0))
                if self._trainer:
                    self._trainer[1].send(self, Rejoin())
        self.after(DIRECTORY_S, self._find_coordinator)

    def _beat(self) -> None:
        self._report(wire.Beat(self.domain))
        self.after(FROZEN_S / 3, self._beat)

    def _report(self, message: wire.WatcherMessage) -> None:
        if self._coordinator is not None:
            self._coordinator.send(self, message)

    def _from_coordinator(self, names: tuple[str, ...], message: CoordinatorMessage) -> None:
        match message:
            case Prepare():
                self._prepare(message)
            case wire.Order("protected", payload):
                self._free_below(msgspec.msgpack.decode(payload, type=ViewId))
            case _:
                if self._trainer and self._trainer[0] in names:
                    self._trainer[1].send(self, message)

    def _prepare(self, prepare: Prepare) -> None:
        if prepare.id < self._highest:
            return
        self._highest = prepare.id
        mine = {t.name: t for t in self._locals if t.name in prepare.fence and not t.dead}
        asked = self._trainer[0] if self._trainer and self._trainer[0] in prepare.asked else None
        self._owed = Owed(prepare, set(mine), asked)
        for name, trainer in mine.items():
            if name not in self._condemned:
                self._condemn(trainer, "declared dead by the coordinator")
        if asked and self._trainer:
            self._trainer[1].send(self, prepare)
        self._pay()

    def _pay(self) -> None:
        owed = self._owed
        if owed is None or owed.fencing or owed.inventory_of:
            return
        self._owed = None
        here = f"rank-{self.home.slot}."
        fenced = tuple(name for name in owed.prepare.fence if name.startswith(here))
        self._report(wire.Stock(owed.prepare.id, self.domain, fenced, self._stock()))

    # ---- streams ----------------------------------------------------------------------------------------

    def on_message(self, connection: Connection, message: Any) -> None:
        if connection is self._coordinator:
            assert isinstance(message, ToMembers)
            self._from_coordinator(message.names, message.message)
        elif isinstance(connection.other(self), Coordinator):
            return  # of an epoch that is over
        elif isinstance(message, Hello):
            if message.name not in self._condemned:
                self._trainer = (message.name, connection)
        elif isinstance(message, Fetch):
            self._fetch(connection, message)
        elif self._trainer and connection is self._trainer[1]:
            self._from_trainer(self._trainer[0], message)

    def on_closed(self, connection: Connection) -> None:
        if connection is self._coordinator:
            self._coordinator = None
        elif self._trainer and connection is self._trainer[1]:
            name = self._trainer[0]
            self._condemn(next(t for t in self._locals if t.name == name), "its stream ended")

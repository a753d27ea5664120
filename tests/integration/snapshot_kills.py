"""SIGKILLs of writers and managers at random instants of a snapshot, and what must hold after each.

Real are the managers (actors/manager_process.py) and all of a writer but its training (snapshot_writer.py): streams,
slots, captures, parity, inventories, the chooser, restore. The coordinator is this process, and it does one thing at
a time: a view with all domains, some steps, a kill, and, when all who live have answered and nothing moves any more,
checks from outside. Not a test module.

    every sealed segment verifies, is cut for the view in its name, and holds what its step says, bit by bit
    the version that was protected last is there with its parity, which rebuilds the segment of each domain
    the chooser finds no older step, whichever parity domains are lost together
    a successor tells the same stock as what its predecessor left
    shared memory holds no more than two layouts, or one more for each view that was killed before it was protected

Shared memory: one run folder. Threads: those of ProcessHost and ControlServer; their news goes through one queue.
"""

from __future__ import annotations

import itertools
import queue
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from everstep.actors.config import ManagerConfig, RankConfig
from everstep.actors.process_host import ProcessHost
from everstep.actors.run_folder import RunFolder
from everstep.actors.shelf import DomainShelf
from everstep.collectives import messages as m
from everstep.collectives.control import ControlServer, Peer
from everstep.platform.training.layout import Run
from everstep.platform.training.messages import Inventory, ParityPlan, Stock, Verdict, ViewPlan, Vote
from everstep.platform.training.protection import rebuilds
from everstep.platform.training.recovery import choose
from everstep.storage.parity import PARITY_SUFFIX, rebuild
from everstep.storage.segment import Seal, SegmentMap, payload
from everstep.storage.stripes import Stripes
from integration.snapshot_checks import Local, allocated_bytes, layout_bytes, verified
from integration.snapshot_writer import TOTAL, UNIT

DOMAINS = 3
PATIENCE_S = 30.0
KILL_WITHIN_S = 0.15  # of a view's beginning: its slots and first parity take some 50 ms, then a step 20 ms (2 cores)
ENTRIES = {
    "manager": "everstep.actors.manager_process:main",
    "rank": "integration.snapshot_writer:main",
}


@dataclass
class Slot:
    """One domain's living processes; "" where there is none."""

    domain: str
    manager: str = ""
    trainer: str = ""
    peer: Peer | None = None
    fetch: str = ""
    control: str = ""
    member: m.Member | None = None


@dataclass
class Told:
    """What has come in under the newest view id."""

    id: m.ViewId
    stocks: dict[str, Stock] = field(default_factory=dict)
    inventories: dict[str, Inventory] = field(default_factory=dict)
    level: set[str] = field(default_factory=set)
    votes: dict[str, tuple[int, Vote]] = field(default_factory=dict)


class SnapshotKills:
    """`strike` kills once and checks; `close` ends everything and checks that nothing is left. One thread."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._token = secrets.token_hex(16)
        self._events: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._told = Told(m.ViewId(1, 0))
        self._members: tuple[m.Member, ...] = ()  # of the view that acts
        self._interval = 1
        self._snapshot_step = 0  # of the newest one that was begun
        self._protected: tuple[tuple[int, int], int] = ((0, 0), -1)  # view and step of the newest
        self._unprotected: list[int] = []  # bytes of the layouts that came after it
        self._protected_bytes = 0
        self._exits: dict[str, str] = {}
        self._incarnations = itertools.count(1)
        self.kills = {"manager": 0, "rank": 0}
        self.torn = 0  # segments that a kill left unsealed
        self.rebuilt = 0
        self.steps = 0
        self.trained_s = 0.0
        self.phases: dict[str, int] = {}
        self.folder = RunFolder(f"kills-{secrets.token_hex(4)}")
        self.folder.create()
        self.folder.hold()
        self.folder.ensure_reaper()
        self._server = ControlServer("127.0.0.1:0", self._token, self._on_message, self._on_gone, max_peers=64)
        preload = ("torch", "everstep.actors.manager_process", "integration.snapshot_writer")
        self._host = ProcessHost(
            lambda name, cause: self._events.put(("exit", name, cause)),
            log_dir=folder,
            entries=ENTRIES,
            preload=preload,
            run_folder=self.folder,
        )
        self._slots = [Slot(f"slot-{i}") for i in range(DOMAINS)]

    # ---- one kill ---------------------------------------------------------------------------------------

    def strike(self) -> None:
        dead = {slot.domain for slot in self._slots if not slot.manager}
        left = self._from_outside()
        self._staff()
        self._prepare(())
        for domain in dead:
            assert self._told.stocks[domain] == self._unreleased(left[domain]), "a successor tells another stock"
        self._check_memory()
        began = time.monotonic()
        self._form()
        self._train(began + self._random.uniform(0.0, KILL_WITHIN_S))
        victim = self._random.choice(self._slots)
        role = self._random.choice(("manager", "rank"))
        self._kill(victim, role)
        self._check()

    def _kill(self, victim: Slot, role: str) -> None:
        self.kills[role] += 1
        phase = "forming" if len(self._told.level) < DOMAINS else "training"
        self.phases[phase] = self.phases.get(phase, 0) + 1
        dead = victim.trainer  # a trainer does not outlive its manager
        self._host.kill(victim.manager if role == "manager" else dead)
        self._until(lambda: dead in self._exits and (role == "rank" or victim.manager in self._exits), "the death")
        victim.trainer, victim.member = "", None
        if role == "manager":
            victim.manager, victim.peer, victim.fetch, victim.control = "", None, "", ""
        self._prepare((dead,))

    def _staff(self) -> None:
        """Starts who is missing, and waits until all have joined."""
        for number, slot in enumerate(self._slots):
            if not slot.manager:
                slot.manager = f"manager-{number}.{next(self._incarnations)}"
                manager = ManagerConfig(
                    self.folder.runid, str(self.folder.path), slot.manager, number, slot.domain, self._token,
                    self._server.address, 2.0, 20.0, True,
                )  # fmt: skip
                self._host.start("manager", slot.manager, number, msgspec.msgpack.encode(manager))
        for number, slot in enumerate(self._slots):
            if not slot.trainer:
                self._until(lambda slot=slot: slot.control and slot.fetch, f"{slot.manager} to listen")
                slot.trainer = f"rank-{number}.{next(self._incarnations)}"
                spec = {"checkpoint": None, "steps": 1 << 40}
                rank = RankConfig(
                    self.folder.runid, str(self.folder.path), slot.trainer, number, slot.domain, self._token,
                    slot.control, slot.fetch, spec, "",
                )  # fmt: skip
                self._host.start("rank", slot.trainer, number, msgspec.msgpack.encode(rank))
        self._until(lambda: all(slot.member is not None for slot in self._slots), "everybody to join")

    # ---- views ------------------------------------------------------------------------------------------

    def _prepare(self, fence: tuple[str, ...]) -> None:
        """The view is over; returns when all who live have answered: then no segment changes any more."""
        asked = tuple(slot.member.name for slot in self._slots if slot.member is not None)
        self._told = Told(m.ViewId(1, next(self._numbers)))
        self._tell_released(self._protected[0])  # once more, as actors/transactions.py: there may be successors
        for slot in self._slots:
            self._tell(slot, (), m.Prepare(self._told.id, asked, fence))
        managers = {slot.domain for slot in self._slots if slot.peer is not None}
        self._until(
            lambda: self._told.stocks.keys() == managers and self._told.inventories.keys() == set(asked),
            "stocks and inventories",
        )

    def _form(self) -> None:
        members = tuple(slot.member for slot in self._slots if slot.member is not None)
        names = [member.name for member in members]
        choice = choose(names, self._told.inventories, self._told.stocks, None, 0)
        assert choice.base_step >= self._protected[1], choice
        owned = self._cut()
        parity, self._interval = self._random.choice((1, 2)), self._random.choice((1, 1, 3))
        self._snapshot_step = choice.base_step
        fetch = {slot.domain: slot.fetch for slot in self._slots}
        groups = ParityPlan((tuple(range(DOMAINS)),), (parity,))
        plan = ViewPlan(owned, choice.have, fetch=fetch, parity=groups, rebuilds=choice.rebuilds)
        view = m.View(self._told.id, members, choice.base_step, msgspec.msgpack.encode(plan))
        self._members = members
        self._unprotected.append(layout_bytes(owned, parity, 2 + (self._interval > 1)))
        for slot in self._slots:
            self._tell(slot, (slot.trainer,), m.NewView(view))

    def _cut(self) -> tuple[tuple[Run, ...], ...]:
        """Other shares in every view."""
        ends = sorted(self._random.randrange(1, TOTAL // UNIT) * UNIT for _ in range(DOMAINS - 1))
        return tuple(((a, b),) if b > a else () for a, b in zip([0, *ends], [*ends, TOTAL], strict=True))

    def _train(self, until: float) -> None:
        began = time.monotonic()
        while (left_s := until - time.monotonic()) > 0:
            self._take(left_s)
        self.trained_s += time.monotonic() - began

    def _tell(self, slot: Slot, names: tuple[str, ...], message: m.CoordinatorMessage) -> None:
        if slot.peer is not None:
            slot.peer.send(m.encode(m.ToMembers(names, message)))

    def _tell_members(self, message: m.CoordinatorMessage) -> None:
        for slot in self._slots:
            self._tell(slot, (slot.trainer,), message)

    # ---- what comes in ----------------------------------------------------------------------------------

    def _on_message(self, peer: Peer, data: bytes) -> None:
        self._events.put(("message", peer, data))

    def _on_gone(self, peer: Peer) -> None:
        """Its process's end is told by the host."""

    def _until(self, ready: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"waited {PATIENCE_S:g} s in vain for {what}"
            self._take(left_s)

    def _take(self, timeout_s: float) -> None:
        """Handles one event, if one comes in time."""
        try:
            kind, who, what = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return
        if kind == "exit":
            self._exits[who] = what
            return
        message = m.decode_watcher(what)
        if isinstance(message, m.Watching):
            slot = self._slots[message.slot]
            slot.peer, slot.fetch = who, message.fetch
            return
        found = next((slot for slot in self._slots if slot.peer is who), None)
        if found is None:
            return  # the last words of a manager that was killed
        if isinstance(message, m.WatcherNote):
            found.control = msgspec.msgpack.decode(message.payload)["control"]
        elif isinstance(message, m.Stock) and message.id == self._told.id:
            self._told.stocks[message.domain] = msgspec.msgpack.decode(message.payload, type=Stock)
        elif isinstance(message, m.FromMember):
            self._from_member(found, message.name, m.decode_member(message.message))

    def _from_member(self, slot: Slot, name: str, message: m.MemberMessage) -> None:
        if isinstance(message, m.Join) and name == slot.trainer:
            slot.member = message.member
        elif isinstance(message, m.Note):
            raise AssertionError(f"{name}: {message.kind}: {msgspec.msgpack.decode(message.payload)}")
        elif isinstance(message, m.Join | m.Complaint) or message.id != self._told.id:
            return
        elif isinstance(message, m.Inventory):
            self._told.inventories[name] = msgspec.msgpack.decode(message.payload, type=Inventory)
        elif isinstance(message, m.Level):
            self._told.level.add(name)
            if len(self._told.level) == DOMAINS:
                self._tell_members(m.Go(self._told.id))
        elif isinstance(message, m.Vote):
            self._told.votes[name] = (message.step, msgspec.msgpack.decode(message.payload, type=Vote))
            if len(self._told.votes) == DOMAINS:
                self._verdict()

    def _verdict(self) -> None:
        votes, self._told.votes = self._told.votes, {}
        self.steps += 1
        (step,) = {step for step, _ in votes.values()}
        protected = min(vote.sealed_step for _, vote in votes.values())
        view = (self._told.id.epoch, self._told.id.number)
        if protected >= 0:
            if self._protected[0] != view:
                self._tell_released(view)
                self._protected_bytes, self._unprotected = self._unprotected[-1], []
            assert (view, protected) >= self._protected
            self._protected = (view, protected)
        # As the desk decides: only what is protected may be followed by another snapshot ([Note: one at a time]).
        snapshot = protected >= self._snapshot_step and step - self._snapshot_step >= self._interval
        if snapshot:
            self._snapshot_step = step
        verdict = Verdict("commit", protected_step=protected, snapshot=snapshot, interval=self._interval)
        self._tell_members(m.Verdict(self._told.id, step, msgspec.msgpack.encode(verdict)))

    def _unreleased(self, stock: Stock) -> Stock:
        """What is left of it where everybody knows what is protected."""
        view = self._protected[0]
        versions = tuple(version for version in stock.versions if version.view >= view)
        return Stock(versions, tuple(parity for parity in stock.parities if parity.view >= view))

    def _tell_released(self, view: tuple[int, int]) -> None:
        for slot in self._slots:
            self._tell(slot, (), m.Order("release", msgspec.msgpack.encode(m.ViewId(*view))))

    # ---- checks -----------------------------------------------------------------------------------------

    def _check_memory(self) -> None:
        """The protected layout, and those of views that were over before they were protected."""
        used = allocated_bytes(self.folder.path)
        allowed = 1.05 * (self._protected_bytes + sum(self._unprotected))
        assert used <= allowed, f"{used} bytes of segments; allowed are {allowed:.0f}"

    def _check(self) -> None:
        sealed: dict[tuple[str, str], Seal] = {}
        for path in self._segments():
            seal = verified(path)
            if seal is None:
                self.torn += 1
            else:
                sealed[path.parent.name, path.name] = seal
        stocks = self._from_outside()
        for domain, stock in self._told.stocks.items():  # as their managers tell it; parity may have gone on since
            assert stock.versions == stocks[domain].versions
        view, step = self._protected
        if step < 0:
            return
        kinds = {
            (domain, Path(name).suffix)
            for (domain, name), seal in sealed.items()
            if (seal.epoch, seal.number) == view and seal.step == step
        }
        wanted = {(slot.domain, suffix) for slot in self._slots for suffix in (".seg", PARITY_SUFFIX)}
        assert kinds == wanted, f"of step {step} of view {view} there is no more than {sorted(kinds)}"
        parity = next(p.index.parity for p in stocks["slot-0"].parities if (p.view, p.step) == (view, step))
        names = sorted(self._told.inventories)
        for gone in itertools.combinations(stocks, parity):
            left = {domain: stock for domain, stock in stocks.items() if domain not in gone}
            found = [
                item for item in rebuilds(step, left, frozenset()) if f"view-{view[0]}-{view[1]}." in item[0].locator
            ]
            assert {item.domain for item, _ in found} == set(gone)
            for item, _ in found:
                there = next(v for v in stocks[item.domain].versions if (v.view, v.index.step) == (view, step))
                self._check_rebuilt(item, self.folder.path / item.domain / there.locator)
            assert choose(names, self._told.inventories, left, None, 0).base_step >= step

    def _check_rebuilt(self, item: Any, path: Path) -> None:
        """`item` decodes to what is there."""
        length = item.payloads[item.position]
        buffer = bytearray(length)
        maps = []

        def readers(places: Sequence[tuple[str, str]]) -> Mapping[int, Local]:
            found = {}
            for position, (domain, locator) in enumerate(places):
                if domain:
                    maps.append(SegmentMap(self.folder.path / domain / locator, writable=False))
                    found[position] = Local(maps[-1])
            return found

        rebuild(
            Stripes(item.payloads, item.parity),
            item.position,
            readers(item.data),
            readers(item.rows),
            [(0, memoryview(buffer))],
        )
        with SegmentMap(path, writable=False) as segment, payload(segment, 0, length) as there:
            assert buffer == there, f"{item.domain} is rebuilt to other bytes"
        for segment in maps:
            segment.close()
        self.rebuilt += 1

    def _segments(self) -> Iterator[Path]:
        return (path for path in sorted(self.folder.path.glob("slot-*/*")) if path.suffix in (".seg", PARITY_SUFFIX))

    def _from_outside(self) -> dict[str, Stock]:
        """What a manager of each domain would tell."""
        return {
            slot.domain: DomainShelf(self.folder.path / slot.domain, slot.domain, 1.0).stock() for slot in self._slots
        }

    def told(self) -> str:
        """What was done, for who reads the test's output."""
        return (
            f"killed {self.kills}, while {self.phases}; {self.torn} unsealed segments seen, {self.rebuilt} payloads"
            f" rebuilt; {self.steps} steps in {self.trained_s:.1f} s of training"
        )

    # ---- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets everybody go where `strike` has not failed."""
        for slot in self._slots:
            if slot.trainer:
                self._tell(slot, (slot.trainer,), m.Order("end", b"over"))
            self._tell(slot, (), m.Order("end"))
        names = {name for slot in self._slots for name in (slot.manager, slot.trainer) if name}
        try:
            self._until(lambda: names <= self._exits.keys(), "everybody to leave")
        finally:
            self._host.close()
            self._server.stop()
            self.folder.release()
        assert {self._exits[name] for name in names} == {"exit 0"}

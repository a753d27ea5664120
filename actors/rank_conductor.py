"""A rank's side of the control stream: views and verdicts for its session. Implements `Conductor`.

The control thread only files messages and aborts the mesh of a view that is over ([Note: views fence everything]);
the training thread waits on the condition. Segments are mapped and written by the training thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from everstep.actors.config import (
    FaultReached,
    RankConfig,
    SaveSegment,
    SlotsGiven,
    SlotsWanted,
)
from everstep.actors.fetch import fetch, fetch_local
from everstep.collectives import messages as m
from everstep.collectives.addresses import interface_towards
from everstep.collectives.control import ControlClient
from everstep.collectives.errors import CollectiveError, CollectiveTimeout, PeerLost
from everstep.collectives.members import Members
from everstep.collectives.mesh import Mesh
from everstep.collectives.transport.listener import Listener
from everstep.platform.faults.strike import strike
from everstep.platform.training.conductor import RunOver, Seat
from everstep.platform.training.messages import Inventory, LiveFault, Verdict, ViewPlan, Vote
from everstep.platform.training.shard import RankState
from everstep.platform.training.snapshot import write_snapshot
from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import SegmentError, StorageError
from everstep.storage.planner import Copy
from everstep.storage.segment import SegmentMap, required_bytes
from everstep.storage.versions import Slots

_ANSWER_S = 30.0  # a manager answers in milliseconds; it has its own watcher


class RankConductor:
    """One rank's conductor. `stall_s` limits every wait for another rank."""

    def __init__(self, config: RankConfig, stall_s: float, pid: int, fingerprint: dict[str, str]) -> None:
        self._fingerprint = fingerprint
        self._joined = False
        self.name = config.name
        self._config = config
        self._stall_s = stall_s
        self._pid = pid
        self._condition = threading.Condition()
        self._prepare: m.Prepare | None = None  # newest
        self._answered: m.ViewId | None = None
        self._view: m.View | None = None  # offered, or acting while nothing newer is prepared
        self._acting: m.View | None = None  # the one this rank has taken its seat in
        self._go: m.ViewId | None = None
        self._verdicts: dict[int, m.Verdict] = {}
        self._over = False
        self._ended: str | None = None
        self._given: SlotsGiven | None = None
        self._acknowledged: set[int] = set()
        self._saved: list[str] = []  # segment paths whose checkpoint file is written
        self._pinned: dict[str, int] = {}  # segment path -> step, while it is being written to a checkpoint
        self._mesh: Mesh | None = None
        self._seat: Seat | None = None
        self._faults: list[LiveFault] = []
        self._slow: tuple[float, int] = (1.0, -1)  # factor, up to which step
        self._label = (0, 0)
        self._slots_label: tuple[int, int] | None = None
        self._slots = Slots.empty(2)
        self._maps: list[SegmentMap] = []
        self._sealed = -1
        self._checkpoint_to = (-1, "")  # step and folder of the checkpoint that the newest verdict asked for
        self._listener = Listener(interface_towards(config.manager), config.token)
        self._control = ControlClient(config.manager, config.token, self._on_message, self._on_lost)
        self.note("hello", config.name.encode())

    def join(self, fingerprint: dict[str, str]) -> None:
        """This rank is ready: from now on it is watched, and may be taken into a view."""
        self._joined = True
        member = m.Member(
            self.name,
            self._config.slot,
            self._config.domain,
            self._listener.address,
            self._config.fetch,
            self._pid,
            self._listener.local,
        )
        self._send(m.Join(member, fingerprint))

    def note(self, kind: str, payload: bytes = b"") -> None:
        self._send(m.Note(kind, payload))

    def close(self) -> None:
        self.stand_up(None)
        self._control.close()
        self._listener.close()
        self._drop_maps()

    # ---- Conductor: views -------------------------------------------------------------------------------

    def empty(self, elements: int) -> torch.Tensor:
        """Other ranks on this host read it where it is."""
        return self._listener.arena.empty((elements,), torch.float32)

    def take_seat(self, inventory: Callable[[], Inventory]) -> Seat:
        if not self._joined:  # a task with its own loop has no dry lane to be compared by
            self.join(self._fingerprint)
        while True:
            with self._condition:
                while not self._something_new():
                    self._check_ended()
                    self._condition.wait()
                view, prepare = self._view, self._prepare
                answer = prepare is not None and prepare.id != self._answered
                if answer:
                    assert prepare is not None
                    self._answered = prepare.id
            if answer:
                assert prepare is not None
                if self.name in prepare.asked:
                    self._send(m.Inventory(prepare.id, msgspec.msgpack.encode(inventory())))
                continue
            assert view is not None
            return self._seat_in(view)

    def level(self, seat: Seat) -> None:
        assert self._acting is not None
        view_id = self._acting.id
        if self._mesh is not None:
            self._mesh.connect(self._stall_s)
        self._send(m.Level(view_id))
        with self._condition:
            self._wait(lambda: self._go == view_id, "the other ranks to be level")

    def over(self) -> bool:
        return self._over

    def vote(self, seat: Seat, step: int, vote: Vote) -> Verdict:
        assert self._acting is not None
        self._send(m.Vote(self._acting.id, step, msgspec.msgpack.encode(vote)))
        with self._condition:
            self._wait(lambda: step in self._verdicts, f"the verdict on step {step}")
            message = self._verdicts.pop(step)
        verdict = msgspec.msgpack.decode(message.payload, type=Verdict)
        if verdict.protected_step >= 0 and self._slots.index_of(verdict.protected_step, self._label) is not None:
            self._slots = self._slots.protected(verdict.protected_step, self._label)
        self._checkpoint_to = (step, verdict.checkpoint)
        return verdict

    def stand_up(self, error: CollectiveError | None) -> None:
        mesh, self._mesh = self._mesh, None
        with self._condition:
            self._view = None  # a seat that was given up is not taken again
        self._listener.expect(None)
        if mesh is not None:
            if error is not None and not self._over:
                about = error.about if isinstance(error, CollectiveTimeout) else ()
                for name in about or ("",):
                    self._send(m.Complaint(mesh.view.id, name, str(error)))
            mesh.close()
        self._seat = None

    def own_domain(self, domain: str) -> bool:
        return domain == self._config.domain

    def fetch(self, seat: Seat, copies: list[tuple[Copy, memoryview]]) -> None:
        by_source: dict[tuple[str, str, str], list[tuple[Copy, memoryview]]] = {}
        for item in copies:
            source = item[0].source
            key = (source.kind, source.holder, source.locator if self.own_domain(source.holder) else "")
            by_source.setdefault(key, []).append(item)
        checkpoint = Checkpoint.open(seat.plan.checkpoint) if seat.plan.checkpoint else None
        try:
            for (kind, domain, locator), group in sorted(by_source.items(), key=lambda entry: entry[0]):
                if self._over:
                    raise PeerLost("the view is over")
                if kind == "file":
                    assert checkpoint is not None, "a file source without a checkpoint"
                    for copy, buffer in group:
                        checkpoint.read_into(copy, buffer)
                elif self.own_domain(domain):
                    fetch_local(str(Path(self._config.run_folder) / domain / locator), group)
                else:
                    fetch(seat.plan.fetch[domain], self._config.token, group)
        except (OSError, SegmentError) as error:
            raise PeerLost(f"{self.name}: reading state for view {seat.view}: {error}") from error

    # ---- Conductor: snapshots ---------------------------------------------------------------------------

    def sealed_step(self) -> int:
        return self._sealed

    def snapshot(self, state: RankState, before_seal: Callable[[], None]) -> float:
        began = time.perf_counter()
        if self._slots_label != self._label:
            self._take_slots(state)
        step = state.stamp
        if self._slots.index_of(step, self._label) is not None:
            self._sealed = step
            return 0.0
        index = self._reserve(step)
        try:
            write_snapshot(self._maps[index], state, self._label, before_seal)
        except BaseException:
            self._slots = self._slots.abandoned(index)
            raise
        self._slots = self._slots.sealed(index, step)
        self._sealed = step
        (wanted, folder), self._checkpoint_to = self._checkpoint_to, (-1, "")
        if folder and wanted == step:
            assert self._seat is not None
            self._slots = self._slots.pin(step)
            self._pinned[self._maps[index].path] = step
            file = f"rank-{self._seat.rank:05d}.safetensors"
            self.note("save", msgspec.msgpack.encode(SaveSegment(self._maps[index].path, step, folder, file)))
        return time.perf_counter() - began

    def _reserve(self, step: int) -> int:
        deadline = time.monotonic() + self._stall_s
        while True:
            with self._condition:
                for path in self._saved:  # of an older layout's segments nothing is kept here any more
                    if (pinned := self._pinned.pop(path, None)) is not None:
                        self._slots = self._slots.unpin(pinned)
                self._saved.clear()
                self._slots, index, why = self._slots.reserve(step, self._label)
                if index is not None:
                    return index
                self._check_ended()
                if not self._condition.wait(max(0.0, deadline - time.monotonic())):
                    raise CollectiveTimeout(
                        f"{self.name}: snapshot of step {step}: {why} for {self._stall_s:g} s (timeouts.stall_s)"
                    )

    def _take_slots(self, state: RankState) -> None:
        """Segments for this view's layout; the old ones stay with the manager until these are protected."""
        count = 3 if self._config.spec["checkpoint"] else 2
        wanted = SlotsWanted(self._label, required_bytes(state.footprint()), count)
        with self._condition:
            self._given = None
        self.note("slots", msgspec.msgpack.encode(wanted))
        with self._condition:
            self._wait(
                lambda: self._given is not None and self._given.label == wanted.label,
                "segments",
                heed_view=False,
            )
            given = self._given
        assert given is not None
        if given.error:
            raise StorageError(given.error)
        self._drop_maps()
        self._maps = [SegmentMap(path, writable=True) for path in given.paths]
        self._slots = Slots.empty(count)
        self._pinned.clear()
        self._slots_label = self._label

    def _drop_maps(self) -> None:
        for segment in self._maps:
            segment.close()
        self._maps = []

    # ---- Conductor: faults ------------------------------------------------------------------------------

    def slow_factor(self, step: int) -> float:
        factor, until = self._slow
        return factor if step <= until else 1.0

    def fault_point(self, phase: str, step: int) -> None:
        seat = self._seat
        if not self._faults or seat is None:
            return
        for fault in self._faults:
            due = step >= fault.at_step - 1 if phase == "recovery" else step == fault.at_step
            if fault.phase == phase and fault.rank == seat.rank and due:
                self._faults.remove(fault)
                reached = msgspec.msgpack.encode(FaultReached(fault.index, step))
                self.note("fault", reached)
                with self._condition:  # it strikes once in a run: the supervisor has to know before it does
                    self._wait(lambda index=fault.index: index in self._acknowledged, "a scripted fault")  # type: ignore[misc]
                if fault.do == "slow":
                    self._slow = (fault.factor, step + fault.steps - 1)
                else:
                    strike(fault)
                return

    # ---- control thread ---------------------------------------------------------------------------------

    def _on_message(self, data: bytes) -> None:
        message = m.decode_coordinator(data)
        mesh = None
        with self._condition:
            match message:
                case m.Prepare():
                    if self._prepare is None or message.id > self._prepare.id:
                        self._prepare, self._over, self._view = message, True, None
                        mesh = self._mesh
                case m.NewView(view):
                    if self._prepare is not None and view.id == self._prepare.id:
                        self._view = view
                case m.Go(id):
                    self._go = id
                case m.Verdict():
                    if self._acting is not None and message.id == self._acting.id:
                        self._verdicts[message.step] = message
                case m.Excluded(reason):
                    self._ended = reason
                case m.Order():
                    self._on_order(message)
            self._condition.notify_all()
        if mesh is not None and isinstance(message, m.Prepare):
            names = ", ".join(f"{lost.name} ({lost.cause})" for lost in message.lost) or "membership changes"
            mesh.abort(PeerLost(f"view {mesh.view.id} is over: {names}"))

    def _on_order(self, order: m.Order) -> None:
        if order.kind == "slots":
            self._given = msgspec.msgpack.decode(order.payload, type=SlotsGiven)
        elif order.kind == "fault":
            self._acknowledged.add(msgspec.msgpack.decode(order.payload, type=int))
        elif order.kind == "saved":
            self._saved.append(msgspec.msgpack.decode(order.payload, type=str))
        elif order.kind == "end":
            self._ended = order.payload.decode(errors="replace")

    def _on_lost(self, reason: str) -> None:
        with self._condition:
            self._ended = f"the manager is gone: {reason}"
            mesh = self._mesh
            self._condition.notify_all()
        if mesh is not None:
            mesh.abort(PeerLost(self._ended))

    # ---- waiting ----------------------------------------------------------------------------------------

    def _something_new(self) -> bool:
        if self._prepare is None:
            return False
        return self._prepare.id != self._answered or (self._view is not None and self._view.id == self._answered)

    def _seat_in(self, view: m.View) -> Seat:
        plan = msgspec.msgpack.decode(view.payload, type=ViewPlan)
        rank = view.rank_of(self.name)
        with self._condition:
            self._over = self._prepare is not None and self._prepare.id > view.id
            self._verdicts.clear()
        mesh = None
        if len(view.members) > 1:
            mesh = Mesh(view, rank, self._listener, self._on_broken, self._stall_s, setting="timeouts.stall_s")
            self._mesh = mesh
            self._listener.expect(mesh)
        self._acting = view
        self._label = (view.id.epoch, view.id.number)
        self._faults = list(plan.faults)
        self._seat = Seat(
            str(view.id),
            rank,
            view.base_step,
            plan,
            Members(mesh) if mesh is not None else None,
            tuple(member.name for member in view.members),
        )
        return self._seat

    def _on_broken(self, peer: int, error: str) -> None:
        view = self._acting
        if view is not None and not self._over:
            self._send(m.Complaint(view.id, view.members[peer].name, error))

    def _wait(self, ready: Callable[[], bool], what: str, heed_view: bool = True) -> None:
        """Holds the condition. Raises PeerLost when the view is over, RunOver when the run is."""
        while not ready():
            self._check_ended()
            if heed_view and self._over:
                raise PeerLost("the view is over")
            if not self._condition.wait(self._stall_s if heed_view else _ANSWER_S) and not ready():
                limit = self._stall_s if heed_view else _ANSWER_S
                raise CollectiveTimeout(f"{self.name}: waited {limit:g} s for {what} (timeouts.stall_s)")

    def _check_ended(self) -> None:
        if self._ended is not None:
            raise RunOver(self._ended)

    def _send(self, message: m.MemberMessage) -> None:
        self._control.send(m.encode(message))

"""A rank's side of the control stream: views and verdicts for its session. Implements `Conductor`.

The control thread only files messages and aborts the mesh of a view that is over ([Note: views fence everything]);
the training thread waits on the condition. Segments are mapped and written by the training thread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from everstep.actors.config import FaultReached, RankConfig
from everstep.actors.snapshots import Place, Snapshots
from everstep.actors.sources import Sources
from everstep.collectives import messages as m
from everstep.collectives.addresses import interface_towards
from everstep.collectives.control import ControlClient
from everstep.collectives.errors import CollectiveError, CollectiveTimeout, HandshakeRefused, PeerLost
from everstep.collectives.members import Members
from everstep.collectives.mesh import Mesh
from everstep.collectives.transport.listener import Listener
from everstep.platform.faults.strike import strike
from everstep.platform.training.conductor import RunOver, Seat
from everstep.platform.training.layout import Run
from everstep.platform.training.messages import Inventory, LiveFault, Verdict, ViewPlan, Vote
from everstep.platform.training.shard import RankState
from everstep.storage.errors import SegmentError
from everstep.storage.planner import Copy

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
        self._acknowledged: set[int] = set()
        self._mesh: Mesh | None = None
        self._seat: Seat | None = None
        self._faults: list[LiveFault] = []
        self._slow: tuple[float, int] = (1.0, -1)  # factor, up to which step
        checkpoint = config.spec["checkpoint"]
        every = checkpoint["every"] if checkpoint else 0
        self._snapshots = Snapshots(self, self._condition, config.spec["steps"], every)
        self._sources = Sources(config.domain, Path(config.run_folder), config.token)
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
        self._snapshots.close()

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
                    self._snapshots.finish()
                    offer = msgspec.structs.replace(inventory(), damaged=tuple(sorted(self._sources.damaged)))
                    self._send(m.Inventory(prepare.id, msgspec.msgpack.encode(offer)))
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
            self.wait(lambda: self._go == view_id, "the other ranks to be level")

    def over(self) -> bool:
        return self._over

    def vote(self, seat: Seat, step: int, vote: Vote) -> Verdict:
        assert self._acting is not None
        self._send(m.Vote(self._acting.id, step, msgspec.msgpack.encode(vote)))
        with self._condition:
            self.wait(lambda: step in self._verdicts, f"the verdict on step {step}")
            message = self._verdicts.pop(step)
        verdict = msgspec.msgpack.decode(message.payload, type=Verdict)
        self._snapshots.heed(step, verdict)
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
        def go_on() -> None:
            if self._over:
                raise PeerLost("the view is over")

        plan = seat.plan
        try:
            self._sources.fill(copies, plan.fetch, plan.checkpoint, plan.rebuilds, go_on)
        except (OSError, SegmentError, HandshakeRefused) as error:
            raise PeerLost(f"{self.name}: reading state for view {seat.view}: {error}") from error

    # ---- Conductor: snapshots ---------------------------------------------------------------------------

    def sealed_step(self) -> int:
        return self._snapshots.secured_step()

    def snapshot(
        self,
        state: RankState,
        before_seal: Callable[[], None],
        runs: Sequence[Run] | None = None,
        wait: bool = False,
    ) -> float:
        here = self._fault_due("snapshot", state.stamp) is not None  # it strikes in the training thread
        return self._snapshots.begin(state, before_seal, runs, wait=wait or here, protect=not wait)

    def seal_mirror(self, state: RankState) -> None:
        self._snapshots.seal_mirror(state)

    def release(self) -> float:
        return self._snapshots.release()

    def protect(self, step: int, now: bool = False) -> float:
        return self._snapshots.protect(step, now)

    def background_s(self) -> float:
        return self._snapshots.take_cpu_s()

    # ---- Conductor: faults ------------------------------------------------------------------------------

    def slow_factor(self, step: int) -> float:
        factor, until = self._slow
        return factor if step <= until else 1.0

    def fault_point(self, phase: str, step: int) -> None:
        fault = self._fault_due(phase, step)
        if fault is None:
            return
        self._faults.remove(fault)
        self.note("fault", msgspec.msgpack.encode(FaultReached(fault.index, step)))
        with self._condition:  # it strikes once in a run: the supervisor has to know before it does
            self.wait(lambda: fault.index in self._acknowledged, "a scripted fault")
        if fault.do == "lose":
            self.note("lose")  # the manager takes all of its domain with it
            signal.pause()
        elif fault.do == "slow":
            self._slow = (fault.factor, step + fault.steps - 1)
        else:
            strike(fault)

    def _fault_due(self, phase: str, step: int) -> LiveFault | None:
        if self._seat is None:
            return None
        for fault in self._faults:
            due = step >= fault.at_step - 1 if phase == "recovery" else step == fault.at_step
            if fault.phase == phase and fault.rank == self._seat.rank and due:
                return fault
        return None

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
        if order.kind == "fault":
            self._acknowledged.add(msgspec.msgpack.decode(order.payload, type=int))
        elif order.kind == "end":
            self._ended = order.payload.decode(errors="replace")
        else:
            self._snapshots.heard(order.kind, order.payload)

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
        self._snapshots.sit(_place(view, rank, plan), (view.base_step, plan.save))
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

    def wait(self, ready: Callable[[], bool], what: str, heed_view: bool = True) -> None:
        """For `Snapshots`, too; holds the condition. Raises PeerLost when the view is over, RunOver at the end."""
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


def _place(view: m.View, rank: int, plan: ViewPlan) -> Place:
    group, parity = plan.parity.group_of(rank)
    members = [(view.members[r].domain, plan.fetch.get(view.members[r].domain, ""), plan.owned[r]) for r in group]
    return Place((view.id.epoch, view.id.number), rank, members, group.index(rank), parity)

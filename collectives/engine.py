"""Moves operations on: takes what the connections bring, gives them what to send, resumes what can go on.

Has no thread, lock or poll of its own: everything is called under the lock of its mesh, which drives it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from everstep.collectives.errors import CollectiveError, Mismatch
from everstep.collectives.flow import Flow, Key, OpId
from everstep.collectives.messages import View
from everstep.collectives.outbox import OTHER_ROLE, Outbox
from everstep.collectives.tensors import bytes_of
from everstep.collectives.transport import frames
from everstep.collectives.transport.arena import SLOTS, Arena
from everstep.collectives.transport.frames import Header, ProtocolError
from everstep.collectives.work import Work

if TYPE_CHECKING:
    from everstep.collectives.operations import Operation

_MAX_AHEAD = 4096  # operations that a member may have begun and this one not
_MAX_AHEAD_BYTES = 64 << 20  # and what rode in their OPENs
_MAX_STAGING = 64


class Engine:
    """The operations of one member in one view. `lost(rank, error)` ends the view; `ended()` says that a work did."""

    def __init__(
        self, view: View, rank: int, arena: Arena, lost: Callable[[int, str], None], ended: Callable[[], None]
    ) -> None:
        self.view = view
        self.rank = rank
        self.size = len(view.members)
        self.outbox = Outbox(view, arena, self._complete_if_sent)
        self.flows: dict[OpId, Flow] = {}
        self._id = (view.id.epoch, view.id.number)
        self._lost = lost
        self._ended = ended
        self._next: dict[OpId, int] = {}  # by OpId with seq 0
        self._early: dict[OpId, dict[int, _Early]] = {}
        self._ahead: dict[int, int] = {}
        self._ahead_bytes: dict[int, int] = {}
        self._newest: dict[int, str] = {}  # what each member began last
        # By operation, mesh rank and key: what a channel is reading into; None: the final place.
        self._landing: dict[tuple[OpId, Key], torch.Tensor | None] = {}
        self._staging: list[torch.Tensor] = []
        self._staged: dict[tuple[OpId, Key], torch.Tensor] = {}
        self._shown: dict[tuple[OpId, Key], tuple[int, Header]] = {}  # mesh rank, SLOT or SPAN
        self._roomless: list[Flow] = []

    # ---- for the mesh -----------------------------------------------------------------------------------

    def begin(self, operation: Operation, work: Work) -> None:
        flow = self._begin(operation)
        flow.work = work
        try:
            self._open(flow)
            self._catch_up(flow)
            if not work.finished:
                self._resume(flow)
        except ProtocolError as error:
            self._lost(self.rank if error.peer is None else error.peer, str(error))

    def look_for_gone(self) -> None:
        """Ends the view where an operation waits for a member that has hung up."""
        for flow in list(self.flows.values()) if self.outbox.gone else ():
            for rank in sorted(set(flow.ranks) & self.outbox.gone.keys()):
                if flow.unsent or flow.unread or rank in flow.waits_for():
                    self._lost(rank, self.outbox.gone[rank])
                    return

    def busy(self) -> bool:
        """Whether something is under way that has to be moved on though nobody waits for it."""
        return any(not flow.operation.eager for flow in self.flows.values())

    def abort(self, error: CollectiveError) -> None:
        self.outbox.end_view()  # first: who sees its work ended may write its tensors
        for flow in list(self.flows.values()):
            flow.steps.close()
            self._end(flow, error)
        self._early.clear()
        self.outbox.close()

    def overdue(self, work: Work) -> str:
        """What a work is waiting for, in words."""
        flow = next((flow for flow in self.flows.values() if flow.work is work), None)
        if flow is None:
            return "the network"
        doing = "has not begun it" if len(flow.opens) < flow.size - 1 else "has not sent its part"
        newest = dict(self._newest)
        for id, early in self._early.items():
            newest |= {p: f"{flow.operation.describe(e.descriptor)}, tag {id.tag}" for p, e in early.items()}
        peers = [
            f"{self.name(p)}, which {doing}" + (f" (it began {newest[p]})" if p in newest else "")
            for p in flow.waits_for()
        ]
        return "; ".join(peers) or "the network"

    def awaited(self, work: Work) -> tuple[str, ...]:
        """The names of the members that a work is waiting for."""
        ranks = {rank for flow in self.flows.values() if flow.work is work for rank in flow.waits_for()}
        return tuple(self.view.members[rank].name for rank in sorted(ranks))

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.view.members[rank].name})"

    # ---- beginning --------------------------------------------------------------------------------------

    def _begin(self, operation: Operation) -> Flow:
        peer = operation.peer if operation.peer is not None else -1
        base = OpId(operation.role, operation.scope, operation.tag, peer, 0)
        seq = self._next[base] = self._next.get(base, 0) + 1
        id = base._replace(seq=seq)
        ranks = operation.ranks if operation.ranks is not None else range(self.size)
        flow = Flow(self.outbox, self._release, operation, id, ranks, list(ranks).index(self.rank))
        flow.algorithm = operation.algorithm(flow)
        flow.steps = flow.algorithm.steps()
        self.flows[id] = flow
        return flow

    def _catch_up(self, flow: Flow) -> None:
        """Takes what members sent that have begun before this one."""
        for peer, early in self._early.pop(flow.id, {}).items():
            self._ahead[peer] -= 1
            self._ahead_bytes[peer] -= early.nbytes
            try:
                if not flow.work.finished:
                    self._opened(flow, peer, early.descriptor, early.data)
                for header in early.slots:
                    self.deliver(peer, header, None)
            except ProtocolError as error:
                raise ProtocolError(str(error), peer if error.peer is None else error.peer) from None

    def _open(self, flow: Flow) -> None:
        operation = flow.operation
        for peer in flow.peers:
            payload = frames.pack_open(operation.descriptor, flow.algorithm.opening(peer))
            header = self.outbox.header(flow, frames.OPEN, 0, len(payload))
            self.outbox.send(flow.ranks[peer], header, memoryview(payload))

    # ---- frames: Receiver -------------------------------------------------------------------------------

    def place(self, peer: int, header: Header) -> memoryview | None:
        if header.kind == frames.OPEN:
            return memoryview(bytearray(header.length))
        id = _local_id(peer, header)
        flow = self.flows.get(id)
        if flow is None:
            self._must_be_over(id, header)
            return None
        size, final = self._expected(flow, peer, header)
        if final is not None:
            self._landing[(id, (peer, header.key))] = None
            return bytes_of(final)
        staging = self._stage(size)
        self._landing[(id, (peer, header.key))] = staging
        return bytes_of(staging[:size])  # an older one may be longer

    def deliver(self, peer: int, header: Header, payload: memoryview | None) -> None:
        if header.kind == frames.RELEASE:
            self.outbox.released(peer, header.slot, header.generation)
            roomless, self._roomless = self._roomless, []
            for waiting in roomless:
                self._resume(waiting)
            return
        id = _local_id(peer, header)
        flow = self.flows.get(id)
        if header.kind == frames.READ:
            self._on_read(id, flow, peer, header)
            return
        if header.kind == frames.OPEN:
            assert payload is not None
            self._on_open(id, flow, peer, *frames.unpack_open(payload))
            return
        if flow is None and header.kind in (frames.SLOT, frames.SPAN) and peer in self._early.get(id, {}):
            self._early[id][peer].add(header)
            return
        if flow is None:
            self._must_be_over(id, header)
            if header.kind in (frames.SLOT, frames.SPAN):
                self.outbox.give_back(peer, header)
            else:
                self._landing.pop((id, (peer, header.key)), None)
            return
        key = (_index(flow, peer), header.key)
        if header.kind == frames.PIECE:
            staging = self._landing.pop((id, (peer, header.key)))
            if staging is not None:
                self._staged[(id, key)] = staging
            piece = staging[: header.length] if staging is not None else None
        else:
            piece = self._from_memory(flow, peer, key, header)
        if flow.put(key, piece):
            self._resume(flow)

    def _from_memory(self, flow: Flow, peer: int, key: Key, header: Header) -> torch.Tensor | None:
        """What a SLOT or SPAN points at; None where it was copied to its final place."""
        window = self.outbox.links[peer].window
        if window is None:
            raise ProtocolError("shared memory of a member on another host")
        _, final = self._expected(flow, peer, header)
        if header.kind == frames.SLOT:
            data = window.read(header.slot, header.length)
        else:
            data = window.read_heap(header.slot << 32 | header.generation, header.length)
        if final is None:
            self._shown[(flow.id, key)] = (peer, header)
            return data
        final.copy_(data)
        self._was_read(peer, header)
        return None

    def _was_read(self, peer: int, header: Header) -> None:
        """What a SLOT or SPAN showed was read. Ends the view where it may have changed meanwhile."""
        window = self.outbox.links[peer].window
        assert window is not None
        if header.kind == frames.SLOT:
            same = window.still(header.slot, header.generation)
        else:
            same = not window.is_over(self._id)
        if not same:
            raise ProtocolError("its view is over: memory was used again before it was read", peer)
        self.outbox.give_back(peer, header)

    def _on_read(self, id: OpId, flow: Flow | None, peer: int, header: Header) -> None:
        if flow is None:
            self._must_be_over(id, header)
            return
        if (peer, header.key) not in flow.unread:
            raise ProtocolError("it has read what it was not shown")
        flow.unread.discard((peer, header.key))
        self._complete_if_sent(flow)

    def _expected(self, flow: Flow, peer: int, header: Header) -> tuple[int, torch.Tensor | None]:
        key = (_index(flow, peer), header.key)
        try:
            if key in flow.arrived or (flow.id, (peer, header.key)) in self._landing:
                raise ProtocolError(f"piece {header.key:#x} of {flow.operation.what} came twice")
            size, final = flow.algorithm.place(*key)
        except KeyError:
            raise ProtocolError(f"piece {header.key:#x} is none of {flow.operation.what}") from None
        if size != header.length:
            raise ProtocolError(
                f"piece {header.key:#x} of {flow.operation.what} has {header.length} bytes, not {size}"
            )
        return size, final

    def _must_be_over(self, id: OpId, header: Header) -> None:
        if id.seq > self._next.get(id._replace(seq=0), 0):
            raise ProtocolError(f"data of kind {header.kind} for an operation that was not begun: tag {id.tag}")

    # ---- the course of an operation ---------------------------------------------------------------------

    def _on_open(self, id: OpId, flow: Flow | None, peer: int, descriptor: bytes, data: memoryview) -> None:
        if flow is not None:
            self._opened(flow, peer, descriptor, data)
            return
        begun = self._next.get(id._replace(seq=0), 0)
        if id.seq <= begun:
            return  # it failed here, and the other side finds the same
        early = _Early(descriptor, data)
        self._ahead[peer] = self._ahead.get(peer, 0) + 1
        self._ahead_bytes[peer] = self._ahead_bytes.get(peer, 0) + early.nbytes
        if max(self._ahead[peer], id.seq - begun) > _MAX_AHEAD or self._ahead_bytes[peer] > _MAX_AHEAD_BYTES:
            raise ProtocolError(
                f"it has begun {self._ahead[peer]} operations, of {self._ahead_bytes[peer]} bytes, that this member"
                f" has not, the last one as number {id.seq} after {begun}"
            )
        if self._early.setdefault(id, {}).setdefault(peer, early) is not early:
            raise ProtocolError(f"it began operation {id.seq} with tag {id.tag} twice")

    def _opened(self, flow: Flow, peer: int, descriptor: bytes, data: memoryview) -> None:
        index = _index(flow, peer)
        if index in flow.opens:
            raise ProtocolError(f"it began {flow.operation.what} twice")
        self._newest[peer] = flow.operation.what
        flow.opens[index] = (descriptor, data)
        why = flow.operation.mismatch(flow, index, descriptor, len(data))
        if why:
            self._fail(flow, Mismatch(self._differ(flow, why)))
        elif len(flow.opens) == flow.size - 1 and flow.begun:
            self._resume(flow)

    def _resume(self, flow: Flow) -> None:
        if flow.ended or flow.work.finished:
            return
        flow.begun = True
        try:
            wants_room = next(flow.steps)
        except StopIteration:
            flow.ended = True
            self.outbox.tell_reads(flow)
            self._complete_if_sent(flow)
            return
        if wants_room:
            self._roomless.append(flow)

    def _complete_if_sent(self, flow: Flow) -> None:
        if flow.ended and not flow.unsent and not flow.unread and not flow.work.finished:
            flow.operation.finish()
            self._end(flow, None)

    def _fail(self, flow: Flow, error: CollectiveError) -> None:
        flow.steps.close()
        for where in [where for where in self._staged if where[0] == flow.id]:
            del self._staged[where]
        for rank in {where[1][0] for where in self._landing if where[0] == flow.id}:
            for channel in self.outbox.links[rank].channels:  # its tensors are the caller's again
                channel.forget(partial(_belongs, flow.id, rank))
        for where in [where for where in self._shown if where[0] == flow.id]:
            self.outbox.give_back(*self._shown.pop(where))
        self.outbox.tell_reads(flow)
        self._end(flow, error)

    def _end(self, flow: Flow, error: CollectiveError | None) -> None:
        self.flows.pop(flow.id, None)
        flow.work.error = error
        flow.work.finished = True
        self._ended()

    def _release(self, flow: Flow, key: Key) -> None:
        where = (flow.id, key)
        shown = self._shown.pop(where, None)
        if shown is not None:
            self._was_read(*shown)
        elif (staging := self._staged.pop(where, None)) is not None and len(self._staging) < _MAX_STAGING:
            self._staging.append(staging)

    def _stage(self, size: int) -> torch.Tensor:
        for i, staging in enumerate(self._staging):
            if staging.numel() >= size:
                return self._staging.pop(i)
        return torch.empty(size, dtype=torch.uint8)

    def _differ(self, flow: Flow, why: str) -> str:
        said = {flow.me: flow.operation.what}
        said |= {peer: flow.operation.describe(descriptor) for peer, (descriptor, _) in flow.opens.items()}
        brought = "; ".join(f"{self.name(flow.ranks[peer])} brought {text}" for peer, text in sorted(said.items()))
        absent = [self.name(flow.ranks[p]) for p in flow.peers if p not in flow.opens]
        late = f"; {', '.join(absent)} had not come yet" if absent else ""
        return f"operation {flow.id.seq} with tag {flow.id.tag}: {why}: {brought}{late}"


class _Early:
    """What a member has sent of an operation that this one has not begun."""

    def __init__(self, descriptor: bytes, data: memoryview) -> None:
        self.descriptor = descriptor
        self.data = data
        self.nbytes = len(descriptor) + len(data)
        self.slots: list[Header] = []

    def add(self, header: Header) -> None:
        if len(self.slots) >= SLOTS:
            raise ProtocolError("more slots than there are")
        self.slots.append(header)


def _index(flow: Flow, peer: int) -> int:
    """The member's position in the operation. Raises ProtocolError for one that has no part in it."""
    if peer not in flow.ranks:
        raise ProtocolError(f"it has no part in {flow.operation.what}")
    return flow.ranks.index(peer)


def _belongs(id: OpId, peer: int, header: Header) -> bool:
    return header.kind == frames.PIECE and _local_id(peer, header) == id


def _local_id(peer: int, header: Header) -> OpId:
    role = OTHER_ROLE[header.role]
    return OpId(role, header.scope, header.tag, -1 if role == frames.COLLECTIVE else peer, header.seq)

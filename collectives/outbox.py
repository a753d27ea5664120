"""What one member sends in one view: pieces through shared memory or a connection, and word of what it has read.

Everything is called under the lock of the mesh. A member that has hung up is remembered; wanting something of it ends
the view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from everstep.collectives.flow import Flow, Slot
from everstep.collectives.messages import View
from everstep.collectives.tensors import bytes_of
from everstep.collectives.transport import frames
from everstep.collectives.transport.arena import SLOTS, Arena
from everstep.collectives.transport.channel import Channel
from everstep.collectives.transport.frames import Header, ProtocolError
from everstep.collectives.transport.links import Link, host_of

_MAX_UNREAD = 1 << 16  # answers that a member leaves unread while it asks for more

OTHER_ROLE = {
    frames.COLLECTIVE: frames.COLLECTIVE,
    frames.SENDER: frames.RECEIVER,
    frames.RECEIVER: frames.SENDER,
}


class Outbox:
    """`sent(flow)` is called when the kernel has taken a piece of it."""

    def __init__(self, view: View, arena: Arena, sent: Callable[[Flow], None]) -> None:
        self.links: dict[int, Link] = {}
        self.gone: dict[int, str] = {}  # members that hung up, and how; it matters when something is wanted of them
        self.dirty: set[Channel] = set()  # have something to write
        self._view = view
        self._id = (view.id.epoch, view.id.number)
        self._arena = arena
        self._sent = sent
        self._unsent = 0  # pieces of any operation
        self._lent: dict[int, set[int]] = {}  # slots that this view has taken, and the ranks that still read each

    def hung_up(self, peer: int, error: str) -> None:
        """Its connections are closed; what it has sent before still counts."""
        self.gone.setdefault(peer, error)

    def end_view(self) -> None:
        """What others read of this member's registered tensors from now on no longer counts."""
        self._arena.end_view(self._id)

    def close(self) -> None:
        self.dirty.clear()
        self._arena.give(self._lent)
        self._lent.clear()

    # ---- pieces -----------------------------------------------------------------------------------------

    def post(self, flow: Flow, peers: Sequence[int], key: int, data: torch.Tensor) -> None:
        raw = data if data.dtype == torch.uint8 else data.view(torch.uint8)
        ranks = [flow.ranks[peer] for peer in peers]
        near = [rank for rank in ranks if self.is_near(rank)]
        offset = self._arena.offset_of(raw) if near else None
        if offset is not None:
            header = self.header(flow, frames.SPAN, key, raw.numel(), offset >> 32, offset & 0xFFFFFFFF)
            flow.unread.update((rank, key) for rank in near)
            for rank in near:
                self.send(rank, header)
        elif near and (slot := self.reserve(near)) is not None:
            slot.memory[: raw.numel()].copy_(raw)
            self.post_slot(flow, slot, near, key, raw.numel())
        else:
            near = []  # all of it through the connections
        if far := [rank for rank in ranks if rank not in near]:
            header, payload = self.header(flow, frames.PIECE, key, raw.numel()), bytes_of(raw)
            for rank in far:
                flow.unsent += 1
                self._unsent += 1
                self.send(rank, header, payload, flow)

    def is_registered(self, data: torch.Tensor) -> bool:
        return self._arena.offset_of(data) is not None

    def reserve(self, ranks: Sequence[int]) -> Slot | None:
        if not all(map(self.is_near, ranks)):
            return None
        number = self._arena.take()
        if number is None:
            return None
        self._lent[number] = set()
        return Slot(number, self._arena.bytes_of(number))

    def post_slot(self, flow: Flow, slot: Slot, ranks: Sequence[int], key: int, length: int) -> None:
        self._lent[slot.number] = set(ranks)
        generation = self._arena.generation(slot.number)
        header = self.header(flow, frames.SLOT, key, length, slot.number, generation)
        for rank in ranks:
            self.send(rank, header)

    def is_near(self, rank: int) -> bool:
        return self.links[rank].window is not None

    def host_of(self, rank: int) -> str:
        member = self._view.members[rank]
        return host_of(member) or member.name

    def may_hurry(self, flow: Flow) -> bool:
        """Slots of operations that others may not begin for long: half of them stay for those under way."""
        return self._arena.free >= SLOTS // 2 and all(self.is_near(flow.ranks[peer]) for peer in flow.peers)

    def has_room(self, peers: Sequence[int]) -> bool:
        """Whether the next piece would go through shared memory where it can."""
        return self._arena.free > 0 or not any(map(self.is_near, peers))

    def header(self, flow: Flow, kind: int, key: int, length: int, slot: int = 0, generation: int = 0) -> Header:
        id = flow.id
        return Header(kind, id.role, id.scope, id.tag, id.seq, key, slot, generation, length)

    def send(self, rank: int, header: Header, payload: memoryview | None = None, flow: Flow | None = None) -> None:
        sent = None
        if flow is not None:

            def sent() -> None:
                flow.unsent -= 1
                self._unsent -= 1
                self._sent(flow)

        if rank in self.gone:
            raise ProtocolError(self.gone[rank], rank)
        self._write(rank, lambda link: link.send(header, payload, sent))

    def _write(self, rank: int, write: Callable[[Link], Channel | None]) -> Channel | None:
        """The channel that has taken it and has something left to write, if there is one."""
        try:
            channel = write(self.links[rank])
        except OSError as error:
            self.hung_up(rank, str(error) or type(error).__name__)
            return None
        if channel is None or not channel.pending:
            return None
        self.dirty.add(channel)
        return channel

    # ---- word of what was read --------------------------------------------------------------------------

    def released(self, peer: int, slot: int, generation: int) -> None:
        """A member has read a slot. Raises ProtocolError."""
        readers = self._lent.get(slot, set())
        if peer not in readers or self._arena.generation(slot) != generation:
            raise ProtocolError(f"release of slot {slot} generation {generation}, which is not lent to it")
        readers.discard(peer)
        if not readers:
            del self._lent[slot]
            self._arena.give((slot,))

    def give_back(self, peer: int, header: Header) -> None:
        if peer in self.gone:
            return
        kind = frames.RELEASE if header.kind == frames.SLOT else frames.READ
        answer = header._replace(kind=kind, role=OTHER_ROLE[header.role], length=0)
        channel = self._write(peer, lambda link: link.release(answer))
        if channel is not None and channel.queued > _MAX_UNREAD and not self._unsent:
            raise ProtocolError("it goes on sending, and reads nothing", peer)

    def tell_reads(self, flow: Flow) -> None:
        """The owners of registered tensors wait for their readers' last word, which must not wait for more to say."""
        for rank in (flow.ranks[peer] for peer in flow.peers):
            if self.links[rank].owes_reads and rank not in self.gone:
                self._write(rank, Link.flush_releases)

"""One operation under way on one member: what has come, what is still to come, and the steps that use it.

[Note: steps] An algorithm is a generator. It posts pieces, and yields where it needs some that have not come; the
engine resumes it when the last of them is there. So any number of operations go on at once, in whatever order the
members began them, in one thread and without a thread switch between them.

Everything here is called under the mesh's lock. Peers are positions in `ranks`, the operation's members.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from everstep.collectives.transport.frames import ProtocolError
from everstep.collectives.work import Work

if TYPE_CHECKING:
    from everstep.collectives.operations import Operation

Steps = Generator[bool, None, None]  # yields True where it waits for a slot, False where it waits for members
Key = tuple[int, int]  # peer, key


class OpId(NamedTuple):
    """The same on all members; `role` and `peer` tell the two ends of a point-to-point pair apart."""

    role: int
    scope: int
    tag: int
    peer: int  # mesh rank of the other end, -1 for collectives
    seq: int


class Slot(NamedTuple):
    number: int
    memory: torch.Tensor  # bytes


class Algorithm(Protocol):
    name: str  # all members must have chosen the same one: it is part of what they bring

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        """Bytes of the piece `key` from `peer`, and its final place if it has one. KeyError: there is none."""

    def opening(self, peer: int) -> bytes | memoryview:
        """Data for `peer` that is small enough to ride in the OPEN."""

    def steps(self) -> Steps:
        """The whole operation, from the members' OPENs to the result in its tensors."""


class Outbox(Protocol):
    def post(self, flow: Flow, peers: Sequence[int], key: int, data: torch.Tensor) -> None: ...
    def reserve(self, ranks: Sequence[int]) -> Slot | None: ...
    def post_slot(self, flow: Flow, slot: Slot, ranks: Sequence[int], key: int, length: int) -> None: ...
    def is_registered(self, data: torch.Tensor) -> bool: ...
    def is_near(self, rank: int) -> bool: ...
    def host_of(self, rank: int) -> str: ...
    def may_hurry(self, flow: Flow) -> bool: ...
    def has_room(self, ranks: Sequence[int]) -> bool: ...


class Flow:
    def __init__(
        self,
        outbox: Outbox,
        release: Callable[[Flow, Key], None],
        operation: Operation,
        id: OpId,
        ranks: Sequence[int],
        me: int,
    ) -> None:
        self.operation = operation
        self.id = id
        self.ranks = tuple(ranks)
        self.me = me
        self.size = len(ranks)
        self.peers = tuple(p for p in range(self.size) if p != me)
        self.work: Work
        self.opens: dict[int, tuple[bytes, memoryview]] = {}  # peer -> descriptor, small data
        self.arrived: dict[Key, torch.Tensor | None] = {}  # None: it is in its final place
        self.unsent = 0  # pieces that the kernel has not taken yet
        self.unread: set[Key] = set()  # (mesh rank, key): pieces of registered tensors that it has not read yet
        self.algorithm: Algorithm
        self.steps: Steps
        self.begun = False
        self.in_turn = False
        self.ended = False  # the steps have; complete when everything has been sent, too
        self._missing: set[Key] = set()
        self._outbox = outbox
        self._release = release  # a piece that was taken is no longer needed

    # ---- for algorithms ---------------------------------------------------------------------------------

    def opened(self) -> Steps:
        """Waits until every other member has begun this operation too."""
        while len(self.opens) < self.size - 1:
            yield False

    def need(self, keys: Iterable[Key]) -> Steps:
        """Waits for pieces."""
        self._missing = set(keys) - self.arrived.keys()
        if self._missing:
            yield False
            assert not self._missing, "resumed too early"

    def need_in_turn(self, keys: Iterable[Key]) -> Steps:
        """The same, for pieces none of whose senders waits for room: the others' arrival wakes nobody until the
        first has come."""
        self.in_turn = True
        yield from self.need(keys)
        self.in_turn = False

    def hosts(self) -> tuple[str, ...]:
        """Of the operation's members; known from the view, so the same on all of them."""
        return tuple(map(self._outbox.host_of, self.ranks))

    def may_hurry(self) -> bool:
        """Whether a few pieces may be posted before the others' OPENs have come: as slots they ask for no memory."""
        return self._outbox.may_hurry(self)

    def take(self, peer: int, key: int, dtype: torch.dtype) -> torch.Tensor:
        """A piece without a final place, flat. It lasts until `done_with`."""
        piece = self.arrived[(peer, key)]
        assert piece is not None
        if piece.storage_offset() % dtype.itemsize:
            raise ProtocolError(f"piece {key:#x} of {self.operation.what} lies askew", self.ranks[peer])
        return piece.view(dtype)

    def done_with(self, peer: int, key: int) -> None:
        self._release(self, (peer, key))
        self.arrived[(peer, key)] = None

    def post(self, peers: Sequence[int], key: int, data: torch.Tensor) -> None:
        """Sends one piece to some members; `data` is flat and must not change before the operation is over."""
        if data.numel() and peers:
            self._outbox.post(self, peers, key, data)

    def reserve(self, peers: Sequence[int]) -> Slot | None:
        """A slot to write a result into, where all of the peers read slots and one is free; `post_slot` is due."""
        return self._outbox.reserve([self.ranks[peer] for peer in peers])

    def post_slot(self, slot: Slot, peers: Sequence[int], key: int, data: torch.Tensor) -> None:
        """Sends what was written into a reserved slot, `data` says how much."""
        self._outbox.post_slot(self, slot, [self.ranks[peer] for peer in peers], key, data.nbytes)

    def is_registered(self, data: torch.Tensor) -> bool:
        return self._outbox.is_registered(data)

    def room(self, peers: Sequence[int]) -> Steps:
        """Waits for a free slot where some of the peers read slots.

        Only for pieces that have a final place: those are read as soon as they come, so a slot is always on its way.
        """
        ranks = [self.ranks[peer] for peer in peers]
        while not self._outbox.has_room(ranks):
            yield True

    # ---- for the engine ---------------------------------------------------------------------------------

    def put(self, key: Key, piece: torch.Tensor | None) -> bool:
        """A piece is there; True when the steps can go on. Raises ProtocolError for one that came before."""
        if key in self.arrived:
            raise ProtocolError(f"piece {key[1]:#x} of {self.operation.what} came twice")
        self.arrived[key] = piece
        if key in self._missing:
            self._missing.discard(key)
            return not self._missing
        return False

    def first_awaited(self) -> int:
        """Mesh rank to listen to first, -1 for all."""
        return self.ranks[min(self._missing)[0]] if self.in_turn and self._missing else -1

    def waits_for(self) -> tuple[int, ...]:
        """Mesh ranks of the members that it is waiting for."""
        if len(self.opens) < self.size - 1:
            return tuple(self.ranks[p] for p in self.peers if p not in self.opens)
        return tuple(sorted({self.ranks[peer] for peer, _ in self._missing}))

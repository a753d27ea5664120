"""Reduce by owners: every member owns one part, gets all others' pieces of it, combines them, and sends the result.

Each member sends and receives (n-1)/n of the tensor twice, which is the least that any algorithm can do, in two
trips, whatever n is. What grows with n is the number of connections, and how small the pieces get.

n members, P elements a piece, blocks of n*P: while a block is combined the next ones are on their way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from everstep.collectives.algorithms.reduction import Reducer
from everstep.collectives.flow import Flow, Slot, Steps
from everstep.collectives.transport.arena import SLOT_BYTES

_ALIGN = 16  # elements: 64 bytes of float32
_IN_FLIGHT_BYTES = 16 << 20  # of one block, to all members
_LEAST_MOST_BYTES = 64 << 10  # however many they are
_TILE_BYTES = 512 << 10
_LEAST_PIECE_BYTES = 512 << 10
_AHEAD = 2  # blocks sent before the first one's result is needed
_RESULT = 1 << 31  # in a key: the piece is a result


class DirectReduce:
    """`tensor` flat; `output` for reduce_scatter: this member's part, where all_reduce leaves all in `tensor`."""

    name = "direct"

    def __init__(self, flow: Flow, op: str, tensor: torch.Tensor, output: torch.Tensor | None) -> None:
        self._flow = flow
        self._tensor = tensor
        self._raw = tensor.view(torch.uint8)
        self._output = output
        self._reducer = Reducer(op, flow.size, tensor.dtype)
        n, numel, width = flow.size, tensor.numel(), tensor.element_size()
        # The same on all members, whether their tensors are registered or not.
        most = min(SLOT_BYTES, max(_IN_FLIGHT_BYTES // max(n - 1, 1), _LEAST_MOST_BYTES)) // width // _ALIGN * _ALIGN
        share = -(-numel // n)
        # One block where a share is small: a trip costs more than the overlap of two blocks saves.
        least = _LEAST_PIECE_BYTES // width
        self._piece = min(_up(share), least) if share <= 2 * least else min(most, _up(share // 2))
        self._blocks = -(-share // self._piece) if output is not None else -(-numel // (n * self._piece))
        self._share = share
        self._width = width
        self._tile = _TILE_BYTES // width
        self._bounds: list[list[tuple[int, int]]] = []  # by block and part, in elements; filled as blocks are reached

    def opening(self, peer: int) -> bytes:
        return b""

    def span(self, block: int, part: int) -> tuple[int, int]:
        """Elements of the tensor."""
        while block >= len(self._bounds):
            self._bounds.append([self._span(len(self._bounds), p) for p in range(self._flow.size)])
        return self._bounds[block][part]

    def _span(self, block: int, part: int) -> tuple[int, int]:
        if self._output is not None:
            start = part * self._share + block * self._piece
            return start, min(start + self._piece, (part + 1) * self._share)
        first = block * self._flow.size * self._piece
        left = min(self._flow.size * self._piece, self._tensor.numel() - first)
        width = _up(-(-left // self._flow.size))
        return first + min(part * width, left), first + min((part + 1) * width, left)

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        block = key & ~_RESULT
        result = block != key
        if block >= self._blocks or (result and self._output is not None):
            raise KeyError(key)
        start, stop = self.span(block, peer if result else self._flow.me)
        if stop <= start:
            raise KeyError(key)
        start, stop = start * self._width, stop * self._width
        return stop - start, self._raw[start:stop] if result else None

    def steps(self) -> Steps:
        flow, me = self._flow, self._flow.me
        sent = 0
        while sent < min(_AHEAD, self._blocks) and flow.may_hurry():
            self._send(sent)
            sent += 1
        yield from flow.opened()
        for block in range(self._blocks):
            while sent < min(block + _AHEAD, self._blocks):
                self._send(sent)
                sent += 1
            start, stop = self.span(block, me)
            if start < stop:
                yield from flow.need_in_turn([(peer, block) for peer in flow.peers])
                self._combine(block, start, stop)
        if self._output is None:
            results = ((peer, block) for block in range(self._blocks) for peer in flow.peers)
            yield from flow.need([(peer, _RESULT | block) for peer, block in results if self._has(block, peer)])

    def _has(self, block: int, part: int) -> bool:
        start, stop = self.span(block, part)
        return start < stop

    def _send(self, block: int) -> None:
        width = self._width
        for peer in self._flow.peers:
            start, stop = self.span(block, peer)
            if start < stop:
                self._flow.post((peer,), block, self._raw[start * width : stop * width])

    def _combine(self, block: int, start: int, stop: int) -> None:
        flow, me = self._flow, self._flow.me
        mine = self._tensor[start:stop]
        parts = [mine if rank == me else flow.take(rank, block, mine.dtype) for rank in range(flow.size)]
        if self._output is not None:
            at = start - me * self._share
            self._reduce(parts, self._output[at : at + stop - start], None)
            self._done_with(block)
        else:
            slot = None if flow.is_registered(mine) else flow.reserve(flow.peers)
            self._reduce(parts, mine, slot)
            self._done_with(block)
            raw = self._raw[start * self._width : stop * self._width]
            if slot is None:
                flow.post(flow.peers, _RESULT | block, raw)
            else:
                flow.post_slot(slot, flow.peers, _RESULT | block, raw)

    def _done_with(self, block: int) -> None:
        """Before its result is sent: this is where it shows that a piece changed while it was read."""
        for peer in self._flow.peers:
            self._flow.done_with(peer, block)

    def _reduce(self, parts: Sequence[torch.Tensor], out: torch.Tensor, slot: Slot | None) -> None:
        """In tiles, so that what was just combined is copied from the nearest cache."""
        me, tile, into = self._flow.me, self._tile, self._reducer.into
        outs = torch.split(out, tile)
        copies = torch.split(slot.memory[: out.nbytes].view(out.dtype), tile) if slot is not None else ()
        for i, pieces in enumerate(zip(*(torch.split(part, tile) for part in parts), strict=True)):
            into(outs[i], pieces, me)
            if copies:
                copies[i].copy_(outs[i])


def _up(elements: int) -> int:
    return -(-elements // _ALIGN) * _ALIGN

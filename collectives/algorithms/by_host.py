"""Reduce inside each host first, then between hosts, so that each byte leaves a host once instead of once a member.

h hosts of m members. Member i of a host owns part i of every block: it combines the m members' pieces of it (A), then
the members i of all hosts reduce that part by owners (B, C), and each hands the result to its neighbours (D). While
one block is between hosts the next one is inside them.

[Note: aligned hosts] Where m is a power of two and each host holds m ranks that follow each other, a host is a
subtree of [Note: rank tree], and the hosts' tree is the rest of it: the bits are those of every other algorithm.
Other placements give an order of their own: only where `deterministic` is False.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from everstep.collectives.algorithms.reduction import Reducer
from everstep.collectives.flow import Flow, Steps
from everstep.collectives.transport.arena import SLOT_BYTES

_AHEAD = 2
_BLOCK = 1 << 8  # keys of one block: its phases
_LEAST_BYTES = 64 << 10  # of what goes between two hosts at once
Span = tuple[int, int]
A, B, C, D = range(4)


class HostReduce:
    name = "by host"

    def __init__(self, flow: Flow, op: str, tensor: torch.Tensor, hosts: Sequence[Sequence[int]]) -> None:
        """`hosts`: the members of each, equally many."""
        self._flow = flow
        self._tensor = tensor
        self._reducer = Reducer(op, flow.size, tensor.dtype)
        self._host = next(i for i, members in enumerate(hosts) if flow.me in members)
        self._near = hosts[self._host]
        self._index = self._near.index(flow.me)
        self._column = [members[self._index] for members in hosts]
        h, m, width = len(hosts), len(self._near), tensor.element_size()
        share = -(-tensor.numel() // m)
        least = h * _LEAST_BYTES // width
        self._part = max(1, min(SLOT_BYTES // width, max(least, -(-share // 4)), share))
        self._blocks = -(-share // self._part)
        self._h, self._m = h, m

    def opening(self, peer: int) -> bytes:
        return b""

    def _span(self, block: int, index: int) -> Span:
        """The part of member `index` of each host."""
        size, first = self._tensor.numel(), block * self._m * self._part
        width = -(-min(self._m * self._part, size - first) // self._m)
        return min(first + index * width, size), min(first + (index + 1) * width, size)

    def _sub(self, block: int, host: int) -> Span:
        """What of this member's part is finished on `host`."""
        low, high = self._span(block, self._index)
        width = -(-(high - low) // self._h)
        return min(low + host * width, high), min(low + (host + 1) * width, high)

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        block, phase = divmod(key, _BLOCK)
        if block >= self._blocks or peer not in (self._near if phase in (A, D) else self._column):
            raise KeyError(key)
        if phase == A:
            low, high = self._span(block, self._index)
        elif phase == B:
            low, high = self._sub(block, self._host)
        elif phase == C:
            low, high = self._sub(block, self._column.index(peer))
        elif phase == D:
            low, high = self._span(block, self._near.index(peer))
        else:
            raise KeyError(key)
        if low >= high:
            raise KeyError(key)
        final = self._tensor[low:high].view(torch.uint8)
        return final.numel(), final if phase in (C, D) else None

    def steps(self) -> Steps:
        yield from self._flow.opened()
        for block in range(min(_AHEAD, self._blocks)):
            self._inside(block)
        for turn in range(self._blocks + 2):
            if turn < self._blocks:
                yield from self._between(turn)
                if turn + _AHEAD < self._blocks:
                    self._inside(turn + _AHEAD)
            if 0 <= turn - 1 < self._blocks:
                yield from self._finish(turn - 1)
            if turn - 2 >= 0:
                yield from self._hand_out(turn - 2)
        for block in range(self._blocks):
            yield from self._flow.need(
                self._keys(block, D, self._near, [self._span(block, i) for i in range(self._m)])
            )

    def _keys(self, block: int, phase: int, members: Sequence[int], spans: Sequence[Span]) -> list[tuple[int, int]]:
        each = zip(members, spans, strict=True)
        return [(peer, block * _BLOCK + phase) for peer, (a, b) in each if peer != self._flow.me and a < b]

    def _post(self, block: int, phase: int, peers: Sequence[int], span: Span) -> None:
        others = [peer for peer in peers if peer != self._flow.me]
        self._flow.post(others, block * _BLOCK + phase, self._tensor[slice(*span)])

    def _inside(self, block: int) -> None:
        for i, peer in enumerate(self._near):
            self._post(block, A, (peer,), self._span(block, i))

    def _between(self, block: int) -> Steps:
        span = self._span(block, self._index)
        yield from self._combine(block, A, self._near, span)
        for host, peer in enumerate(self._column):
            self._post(block, B, (peer,), self._sub(block, host))

    def _finish(self, block: int) -> Steps:
        span = self._sub(block, self._host)
        yield from self._combine(block, B, self._column, span)
        self._reducer.finish(self._tensor[slice(*span)], self._flow.size)
        self._post(block, C, self._column, span)

    def _hand_out(self, block: int) -> Steps:
        spans = [self._sub(block, host) for host in range(self._h)]
        yield from self._flow.need(self._keys(block, C, self._column, spans))
        self._post(block, D, self._near, self._span(block, self._index))

    def _combine(self, block: int, phase: int, members: Sequence[int], span: Span) -> Steps:
        if span[0] >= span[1]:
            return
        flow, key = self._flow, block * _BLOCK + phase
        yield from flow.need(self._keys(block, phase, members, [span] * len(members)))
        mine = self._tensor[slice(*span)]
        parts = [mine if peer == flow.me else flow.take(peer, key, mine.dtype) for peer in members]
        self._reducer.subtree(mine, parts, members.index(flow.me))
        for peer in members:
            if peer != flow.me:
                flow.done_with(peer, key)

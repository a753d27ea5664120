"""A ring: every member talks to its two neighbours only, 2(n-1) times.

Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009). Part p is summed
along the ring beginning at rank p, so its order is not that of [Note: rank tree] and differs from part to part: only
where `deterministic` is False. It sends what reducing by owners sends, but no member ever hears from two at once.
"""

from __future__ import annotations

import torch

from everstep.collectives.algorithms.reduction import Reducer
from everstep.collectives.flow import Flow, Steps
from everstep.collectives.transport.arena import SLOT_BYTES

_RESULT = 1 << 31
_ROUND = 1 << 18  # keys of one round; a key is result, round and piece


class RingReduce:
    name = "ring"

    def __init__(self, flow: Flow, op: str, tensor: torch.Tensor) -> None:
        self._flow = flow
        self._tensor = tensor
        self._reducer = Reducer(op, flow.size, tensor.dtype)
        self._share = -(-tensor.numel() // flow.size)
        self._piece = max(1, min(SLOT_BYTES // tensor.element_size(), -(-self._share // 2)))
        self._left, self._right = (flow.me - 1) % flow.size, (flow.me + 1) % flow.size

    def opening(self, peer: int) -> bytes:
        return b""

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        turn, i = (key & ~_RESULT) // _ROUND, key % _ROUND
        pieces = self._pieces(self._flow.me - turn - (0 if key & _RESULT else 1))
        if peer != self._left or turn >= self._flow.size - 1 or i >= len(pieces):
            raise KeyError(key)
        start, stop = pieces[i]
        final = self._tensor[start:stop].view(torch.uint8)
        return final.numel(), final if key & _RESULT else None

    def steps(self) -> Steps:
        flow, last = self._flow, self._flow.size - 2
        yield from flow.opened()
        for i, (start, stop) in enumerate(self._pieces(flow.me)):
            flow.post((self._right,), i, self._tensor[start:stop])
        for turn in range(last + 1):
            for i, (start, stop) in enumerate(self._pieces(flow.me - turn - 1)):
                key = turn * _ROUND + i
                yield from flow.need([(self._left, key)])
                mine = self._tensor[start:stop]
                self._reducer.subtree(mine, (flow.take(self._left, key, mine.dtype), mine), 1)
                flow.done_with(self._left, key)
                if turn == last:
                    self._reducer.finish(mine, flow.size)
                    flow.post((self._right,), _RESULT | i, mine)
                else:
                    flow.post((self._right,), key + _ROUND, mine)
        for turn in range(last + 1):
            for i, (start, stop) in enumerate(self._pieces(flow.me - turn)):
                key = _RESULT | turn * _ROUND + i
                yield from flow.need([(self._left, key)])
                if turn < last:
                    flow.post((self._right,), key + _ROUND, self._tensor[start:stop])

    def _pieces(self, part: int) -> list[tuple[int, int]]:
        low = part % self._flow.size * self._share
        high = min(low + self._share, self._tensor.numel())
        return [(at, min(at + self._piece, high)) for at in range(low, high, self._piece)]

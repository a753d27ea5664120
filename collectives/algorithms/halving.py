"""Recursive halving and doubling: log2(n) exchanges with one member each, then the same back.

Rabenseifner, "Optimization of Collective Reduction Operations" (2004), section 4; there the furthest member is the
first partner. Here it is the nearest one, so that what is combined is always a subtree of [Note: rank tree]: the bits
are those of every other algorithm. Sends as much as reducing by owners does, in fewer messages and more trips.

n is a power of two, the tensor of a type that is combined without widening.
"""

from __future__ import annotations

import torch

from everstep.collectives.algorithms.reduction import Reducer
from everstep.collectives.flow import Flow, Steps
from everstep.collectives.transport.arena import SLOT_BYTES

_RESULT = 1 << 31
_ROUND = 1 << 24  # keys of one round; a key is result, round and piece


class HalvingReduce:
    name = "halving"

    def __init__(self, flow: Flow, op: str, tensor: torch.Tensor) -> None:
        assert flow.size & (flow.size - 1) == 0
        self._flow = flow
        self._tensor = tensor
        self._reducer = Reducer(op, flow.size, tensor.dtype)
        self._piece = SLOT_BYTES // tensor.element_size()
        # _kept[k]: what this member still combines before round k; it gives its partner the rest of it.
        self._kept = [(0, tensor.numel())]
        for k in range(flow.size.bit_length() - 1):
            low, high = self._kept[k]
            middle = (low + high + 1) // 2
            self._kept.append((middle, high) if flow.me >> k & 1 else (low, middle))

    def opening(self, peer: int) -> bytes:
        return b""

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        k, piece = (key & ~_RESULT) // _ROUND, key % _ROUND
        if k + 1 >= len(self._kept) or peer != self._partner(k):
            raise KeyError(key)
        span = self._given(k) if key & _RESULT else self._kept[k + 1]
        start = span[0] + piece * self._piece
        stop = min(start + self._piece, span[1])
        if start >= stop:
            raise KeyError(key)
        final = self._tensor[start:stop].view(torch.uint8)
        return final.numel(), final if key & _RESULT else None

    def steps(self) -> Steps:
        flow, rounds = self._flow, len(self._kept) - 1
        yield from flow.opened()
        for k in range(rounds):
            partner, span = self._partner(k), self._kept[k + 1]
            self._send(partner, k * _ROUND, self._given(k))
            for i, (start, stop) in enumerate(self._pieces(span)):
                key = k * _ROUND + i
                yield from flow.need([(partner, key)])
                mine = self._tensor[start:stop]
                theirs = flow.take(partner, key, mine.dtype)
                self._reducer.subtree(
                    mine, (mine, theirs) if flow.me < partner else (theirs, mine), flow.me > partner
                )
                flow.done_with(partner, key)
        low, high = self._kept[rounds]
        self._reducer.finish(self._tensor[low:high], flow.size)
        for k in reversed(range(rounds)):
            self._send(self._partner(k), _RESULT | k * _ROUND, self._kept[k + 1])
            pieces = range(len(self._pieces(self._given(k))))
            yield from flow.need([(self._partner(k), _RESULT | k * _ROUND + i) for i in pieces])

    def _partner(self, k: int) -> int:
        return self._flow.me ^ 1 << k

    def _given(self, k: int) -> tuple[int, int]:
        (low, high), (start, stop) = self._kept[k], self._kept[k + 1]
        return (stop, high) if start == low else (low, start)

    def _pieces(self, span: tuple[int, int]) -> list[tuple[int, int]]:
        return [(at, min(at + self._piece, span[1])) for at in range(*span, self._piece)]

    def _send(self, peer: int, key: int, span: tuple[int, int]) -> None:
        for i, (start, stop) in enumerate(self._pieces(span)):
            self._flow.post((peer,), key + i, self._tensor[start:stop])

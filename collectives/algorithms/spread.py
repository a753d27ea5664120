"""Broadcast to far members: the root sends each a part, and they pass the parts on to each other.

The root's connection carries the tensor once instead of n-1 times (van de Geijn, "On optimizing collective
communication", 1994: scatter, then all-gather); its members send what they would only have received.
"""

from __future__ import annotations

import torch

from everstep.collectives.flow import Flow, Steps
from everstep.collectives.transport.arena import SLOT_BYTES

_LEAST_BYTES = 64 << 10


class Spread:
    name = "spread"

    def __init__(self, flow: Flow, tensor: torch.Tensor, root: int) -> None:
        self._flow = flow
        self._raw = tensor.view(torch.uint8)
        self._root = root
        self._others = [rank for rank in range(flow.size) if rank != root]
        share = -(-self._raw.numel() // len(self._others))
        self._piece = min(SLOT_BYTES, max(_LEAST_BYTES, -(-share // 8)))  # small: passing on begins with the first
        self._count = -(-self._raw.numel() // self._piece)

    def opening(self, peer: int) -> bytes:
        return b""

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        owner = self._owner(key)
        wanted = self._root if owner == self._flow.me else owner
        if key >= self._count or self._flow.me == self._root or peer != wanted:
            raise KeyError(key)
        piece = self._data(key)
        return piece.numel(), piece

    def steps(self) -> Steps:
        flow = self._flow
        yield from flow.opened()
        keys = range(self._count)
        if flow.me == self._root:
            for key in keys:
                flow.post((self._owner(key),), key, self._data(key))
            return
        others = [rank for rank in self._others if rank != flow.me]
        for key in keys:
            if self._owner(key) == flow.me:
                yield from flow.need([(self._root, key)])
                flow.post(others, key, self._data(key))
        yield from flow.need([(self._owner(key), key) for key in keys if self._owner(key) != flow.me])

    def _owner(self, key: int) -> int:
        return self._others[key % len(self._others)]

    def _data(self, key: int) -> torch.Tensor:
        return self._raw[key * self._piece : (key + 1) * self._piece]

"""Operations that only move data: each piece has its final place, so it is put there as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from everstep.collectives.flow import Flow, Steps
from everstep.collectives.transport.arena import SLOT_BYTES


class Moves:
    """`outgoing`: (to whom, flat tensor), in order; `incoming`: flat tensor by sender, at most one a sender;
    `own`: (where, what) stays here. Nothing is written before all have brought the same operation."""

    name = "moves"

    def __init__(
        self,
        flow: Flow,
        outgoing: Sequence[tuple[Sequence[int], torch.Tensor]],
        incoming: Mapping[int, torch.Tensor],
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._own = own
        self._flow = flow
        self._outgoing = [(tuple(peers), tensor.view(torch.uint8)) for peers, tensor in outgoing]
        self._incoming = {peer: tensor.view(torch.uint8) for peer, tensor in incoming.items()}

    def opening(self, peer: int) -> bytes:
        return b""

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        tensor = self._incoming[peer]
        start = key * SLOT_BYTES
        if start >= tensor.numel():
            raise KeyError(key)
        piece = tensor[start : start + SLOT_BYTES]
        return piece.numel(), piece

    def steps(self) -> Steps:
        flow = self._flow
        yield from flow.opened()
        if self._own is not None:
            where, what = self._own
            where.copy_(what)
        longest = max((tensor.numel() for _, tensor in self._outgoing), default=0)
        for key in range(-(-longest // SLOT_BYTES)):  # a piece to each in turn, so that all receive at once
            for peers, tensor in self._outgoing:
                piece = tensor[key * SLOT_BYTES : (key + 1) * SLOT_BYTES]
                if peers and piece.numel():
                    if not flow.is_registered(piece):
                        yield from flow.room(peers)
                    flow.post(peers, key, piece)
        for peer, tensor in self._incoming.items():
            yield from flow.need((peer, key) for key in range(-(-tensor.numel() // SLOT_BYTES)))

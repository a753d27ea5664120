"""Operations that only move data: each piece has its final place, so it is put there as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch

from everstep.collectives.flow import Flow, Steps
from everstep.collectives.transport.arena import SLOT_BYTES

Parts = Sequence[torch.Tensor]  # flat, contiguous CPU tensors


class Moves:
    """`outgoing`: (to whom, what), each to members of its own; `incoming`: what comes from each, and where it goes;
    `own`: (where, what) stays here. Nothing is written before all have brought the same operation.

    What a member sends is cut into pieces in the order of its tensors; both sides cut alike.
    """

    name = "moves"

    def __init__(
        self,
        flow: Flow,
        outgoing: Sequence[tuple[Sequence[int], Parts]],
        incoming: Mapping[int, Parts],
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._own = own
        self._flow = flow
        self._outgoing = [(tuple(peers), _pieces(parts)) for peers, parts in outgoing if peers]
        self._incoming = {peer: _pieces(parts) for peer, parts in incoming.items()}

    def opening(self, peer: int) -> bytes:
        return b""

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        pieces = self._incoming[peer]
        if key >= len(pieces):
            raise KeyError(key)
        return pieces[key].numel(), pieces[key]

    def steps(self) -> Steps:
        flow = self._flow
        yield from flow.opened()
        if self._own is not None:
            where, what = self._own
            where.copy_(what)
        rows = [pieces for _, pieces in self._outgoing]
        for key, row in enumerate(zip_longest(*rows)):  # a piece to each in turn, so that all receive at once
            for (peers, _), piece in zip(self._outgoing, row, strict=True):
                if piece is not None:
                    if not flow.is_registered(piece):
                        yield from flow.room(peers)
                    flow.post(peers, key, piece)
        yield from flow.need((peer, key) for peer, pieces in self._incoming.items() for key in range(len(pieces)))


def _pieces(parts: Parts) -> list[torch.Tensor]:
    """Bytes, a slot at most each."""
    rows = [part.view(torch.uint8) for part in parts]
    return [row[at : at + SLOT_BYTES] for row in rows for at in range(0, row.numel(), SLOT_BYTES)]

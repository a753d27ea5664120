"""Moves of several tensors of any sizes at once: from where they are to where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from everstep.collectives.algorithms.build import Build
from everstep.collectives.algorithms.eager import Eager
from everstep.collectives.flow import Algorithm, Flow, Steps
from everstep.collectives.transport.arena import SLOT_BYTES
from everstep.collectives.transport.frames import EAGER_BYTES

Parts = Sequence[torch.Tensor]  # flat, contiguous CPU tensors


class PartMoves:
    """`outgoing` goes to all peers; `incoming`: what comes from each, and where it goes.

    What a member sends is cut into pieces in the order of its tensors; both sides cut alike.
    """

    name = "parts"

    def __init__(self, flow: Flow, outgoing: Parts, incoming: Mapping[int, Parts]) -> None:
        self._flow = flow
        self._outgoing = _pieces(outgoing)
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
        for key, piece in enumerate(self._outgoing):
            if not flow.is_registered(piece):
                yield from flow.room(flow.peers)
            flow.post(flow.peers, key, piece)
        yield from flow.need((peer, key) for peer, pieces in self._incoming.items() for key in range(len(pieces)))


def pair(parts: Parts, sending: bool) -> Build:
    """One end of a pair: `parts` go to the other end, or come from there."""

    def build(flow: Flow) -> Algorithm:
        (other,) = flow.peers
        mine, theirs = (parts, ()) if sending else ((), parts)
        if not are_small(parts):
            return PartMoves(flow, mine, {other: theirs})

        def combine(data: Mapping[int, memoryview]) -> None:
            at = 0
            for part in theirs:
                _bytes(part)[:] = data[other][at : at + part.nbytes]
                at += part.nbytes

        give = b"".join(map(_bytes, mine))
        return Eager(flow, lambda peer: give, combine, lambda peer: sum(part.nbytes for part in theirs))

    return build


def share(parts: Sequence[Parts]) -> Build:
    """`parts[r]` are what member r brings, and where it goes on all others."""

    def build(flow: Flow) -> Algorithm:
        return PartMoves(flow, parts[flow.me], {peer: parts[peer] for peer in flow.peers})

    return build


def are_small(parts: Parts) -> bool:
    return sum(part.nbytes for part in parts) <= EAGER_BYTES


def _pieces(parts: Parts) -> list[torch.Tensor]:
    """Bytes, a slot at most each."""
    rows = [part.view(torch.uint8) for part in parts]
    return [row[at : at + SLOT_BYTES] for row in rows for at in range(0, row.numel(), SLOT_BYTES)]


def _bytes(part: torch.Tensor) -> memoryview:
    array: Any = part.view(torch.uint8).numpy()
    return memoryview(array) if part.numel() else memoryview(bytearray())

"""Moves of several tensors of any sizes at once: from where they are to where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from everstep.collectives.algorithms.build import Build
from everstep.collectives.algorithms.eager import Eager
from everstep.collectives.algorithms.moves import Moves, Parts
from everstep.collectives.flow import Algorithm, Flow
from everstep.collectives.tensors import bytes_of
from everstep.collectives.transport.frames import EAGER_BYTES


def pair(parts: Parts, sending: bool) -> Build:
    """One end of a pair: `parts` go to the other end, or come from there."""

    def build(flow: Flow) -> Algorithm:
        (other,) = flow.peers
        mine, theirs = (parts, ()) if sending else ((), parts)
        if not are_small(parts):
            return Moves(flow, [(flow.peers, mine)], {other: theirs})

        def combine(data: Mapping[int, memoryview]) -> None:
            at = 0
            for part in theirs:
                bytes_of(part)[:] = data[other][at : at + part.nbytes]
                at += part.nbytes

        give = b"".join(map(bytes_of, mine))
        return Eager(flow, lambda peer: give, combine, lambda peer: sum(part.nbytes for part in theirs))

    return build


def share(parts: Sequence[Parts]) -> Build:
    """`parts[r]` are what member r brings, and where it goes on all others."""

    def build(flow: Flow) -> Algorithm:
        return Moves(flow, [(flow.peers, parts[flow.me])], {peer: parts[peer] for peer in flow.peers})

    return build


def are_small(parts: Parts) -> bool:
    return sum(part.nbytes for part in parts) <= EAGER_BYTES

"""Which algorithm carries out an operation, and where it takes and leaves its data. Tensors are flat here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from everstep.collectives.algorithms.by_host import HostReduce
from everstep.collectives.algorithms.choose import by_host, choose_broadcast, choose_reduce
from everstep.collectives.algorithms.direct import DirectReduce
from everstep.collectives.algorithms.eager import Eager
from everstep.collectives.algorithms.halving import HalvingReduce
from everstep.collectives.algorithms.moves import Moves
from everstep.collectives.algorithms.reduction import HALVES, Reducer
from everstep.collectives.algorithms.ring import RingReduce
from everstep.collectives.algorithms.spread import Spread
from everstep.collectives.flow import Algorithm, Flow
from everstep.collectives.tensors import bytes_of
from everstep.collectives.transport.frames import EAGER_BYTES

Build = Callable[[Flow], Algorithm]


def is_small(tensor: torch.Tensor) -> bool:
    return tensor.nbytes <= EAGER_BYTES


def all_reduce(op: str, flat: torch.Tensor, deterministic: bool) -> Build:
    if not is_small(flat):
        return lambda flow: _large_reduce(flow, op, flat, deterministic)

    def build(flow: Flow) -> Algorithm:
        def combine(data: Mapping[int, memoryview]) -> None:
            parts = [flat if rank == flow.me else _typed(data[rank], flat.dtype) for rank in range(flow.size)]
            Reducer(op, flow.size, flat.dtype).into(flat, parts, flow.me)

        return Eager(flow, lambda peer: bytes_of(flat), combine, lambda peer: flat.nbytes)

    return build


def _large_reduce(flow: Flow, op: str, flat: torch.Tensor, deterministic: bool) -> Algorithm:
    hosts = flow.hosts()
    exact = op in ("max", "min") or not flat.dtype.is_floating_point  # in any order
    match choose_reduce(flat.nbytes, hosts, deterministic and not exact, flat.dtype in HALVES):
        case "halving":
            return HalvingReduce(flow, op, flat)
        case "by host":
            return HostReduce(flow, op, flat, by_host(hosts))
        case "ring":
            return RingReduce(flow, op, flat)
    return DirectReduce(flow, op, flat, None)


def reduce_scatter(op: str, flat: torch.Tensor, out: torch.Tensor) -> Build:
    if not is_small(flat):
        return lambda flow: DirectReduce(flow, op, flat, out)

    def build(flow: Flow) -> Algorithm:
        def combine(data: Mapping[int, memoryview]) -> None:
            mine = _part(flat, flow.me, flow.size).clone()
            parts = [mine if rank == flow.me else _typed(data[rank], flat.dtype) for rank in range(flow.size)]
            Reducer(op, flow.size, flat.dtype).into(mine, parts, flow.me)
            out.copy_(mine)

        return Eager(flow, lambda peer: bytes_of(_part(flat, peer, flow.size)), combine, lambda peer: out.nbytes)

    return build


def all_gather(flat: torch.Tensor, out: torch.Tensor) -> Build:
    def build(flow: Flow) -> Algorithm:
        def part(peer: int) -> torch.Tensor:
            return _part(out, peer, flow.size)

        def combine(data: Mapping[int, memoryview]) -> None:
            part(flow.me).copy_(flat)
            for peer, given in data.items():
                part(peer).copy_(_typed(given, flat.dtype))

        if is_small(flat):
            return Eager(flow, lambda peer: bytes_of(flat), combine, lambda peer: flat.nbytes)
        own = (part(flow.me), flat)
        return Moves(flow, [(flow.peers, (flat,))], {peer: (part(peer),) for peer in flow.peers}, own)

    return build


def all_to_all(flat: torch.Tensor, out: torch.Tensor) -> Build:
    def build(flow: Flow) -> Algorithm:
        def part(tensor: torch.Tensor, peer: int) -> torch.Tensor:
            return _part(tensor, peer, flow.size)

        def combine(data: Mapping[int, memoryview]) -> None:
            part(out, flow.me).copy_(part(flat, flow.me))
            for peer, given in data.items():
                part(out, peer).copy_(_typed(given, flat.dtype))

        if is_small(flat):
            size = flat.nbytes // flow.size
            return Eager(flow, lambda peer: bytes_of(part(flat, peer)), combine, lambda peer: size)
        outgoing = [((peer,), (part(flat, peer),)) for peer in flow.peers]
        own = (part(out, flow.me), part(flat, flow.me))
        return Moves(flow, outgoing, {peer: (part(out, peer),) for peer in flow.peers}, own)

    return build


def broadcast(flat: torch.Tensor, root: int) -> Build:
    def build(flow: Flow) -> Algorithm:
        mine = flow.me == root

        def combine(data: Mapping[int, memoryview]) -> None:
            if not mine:
                flat.copy_(_typed(data[root], flat.dtype))

        if is_small(flat):
            give: Callable[[int], memoryview] = lambda peer: bytes_of(flat) if mine else memoryview(b"")  # noqa: E731
            return Eager(flow, give, combine, lambda peer: flat.nbytes if peer == root else 0)
        if choose_broadcast(flat.nbytes, flow.hosts()) == "spread":
            return Spread(flow, flat, root)
        return Moves(flow, [(flow.peers, (flat,))] if mine else [], {} if mine else {root: (flat,)})

    return build


def barrier(flow: Flow) -> Algorithm:
    return Eager(flow, lambda peer: b"", lambda data: None, lambda peer: 0)


def pair(flat: torch.Tensor, sending: bool) -> Build:
    def build(flow: Flow) -> Algorithm:
        other = flow.peers[0]

        def combine(data: Mapping[int, memoryview]) -> None:
            if not sending:
                flat.copy_(_typed(data[other], flat.dtype))

        if is_small(flat):
            give: Callable[[int], memoryview] = lambda peer: bytes_of(flat) if sending else memoryview(b"")  # noqa: E731
            return Eager(flow, give, combine, lambda peer: 0 if sending else flat.nbytes)
        return Moves(flow, [(flow.peers, (flat,))] if sending else [], {} if sending else {other: (flat,)})

    return build


def _part(tensor: torch.Tensor, index: int, count: int) -> torch.Tensor:
    width = tensor.numel() // count
    return tensor[index * width : (index + 1) * width]


def _typed(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)

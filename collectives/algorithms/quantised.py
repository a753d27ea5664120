"""Sums as 8 bit codes: about a quarter of float32's bytes each way, and the same bits on every member.

[Note: quantised sum] The result is Q(tree(Q(x_0), Q(x_1), ...)), Q being encoding and decoding by the blocks of
[Note: codes], and tree the float32 sum along [Note: rank tree]. The owner of a part puts its own piece through the
codec as well, and blocks are counted from the tensor's beginning; so the result is a function of the members' tensors
in rank order and nothing else: not of who owns what, of the transport, or of how the pieces are cut. The owner
encodes the result once, everybody gets those bytes, and everybody, the owner too, decodes them.

What is small rides in the OPENs: everybody decodes and sums everything, encodes the sum and decodes it. One trip, and
the same function.

n members, P elements a piece, blocks of n*P as in direct.py: while a block is combined the next ones are under way.
Scratch: some tiles (quantisation.TILE) for the tree, and of codes what waits to be sent, usually two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from everstep.collectives.algorithms.eager import Eager
from everstep.collectives.algorithms.reduction import split
from everstep.collectives.flow import Algorithm, Flow, Slot, Steps
from everstep.collectives.quantisation import BLOCK, CODECS, TILE, Codec
from everstep.collectives.tensors import bytes_of
from everstep.collectives.transport.frames import EAGER_BYTES

_MOST_PIECE = 512 * BLOCK  # 512 KiB of codes: about a millisecond of encoding, where a frame costs 50 us
_LEAST_PIECE = 64 * BLOCK
_AHEAD = 2  # blocks sent before the first one's result is needed
_RESULT = 1 << 31  # in a key: the piece is a result


def is_small(numel: int, quantize: str) -> bool:
    return CODECS[quantize]().size(numel) <= EAGER_BYTES


def quantised(
    op: str, flat: torch.Tensor, quantize: str, residual: torch.Tensor | None, lost: torch.Tensor | None
) -> Callable[[Flow], Algorithm]:
    """`flat` is summed in place. `residual` is added before; `lost` becomes what is to be added the next time."""

    def build(flow: Flow) -> Algorithm:
        sums = _Sums(op, flow.size, flow.me, CODECS[quantize](), flat, residual, lost)
        return _small(flow, sums) if is_small(flat.numel(), quantize) else QuantisedReduce(flow, sums)

    return build


def _small(flow: Flow, sums: _Sums) -> Algorithm:
    numel = sums.flat.numel()
    mine = sums.encoded(0, numel)

    def combine(data: Mapping[int, memoryview]) -> None:
        parts = {peer: torch.frombuffer(bytearray(given), dtype=torch.uint8) for peer, given in data.items()}
        parts[flow.me] = mine
        result = torch.empty_like(mine)
        sums.combine(parts, result, 0, numel, owns=flow.me == 0)
        sums.install(result, 0, numel)

    if not numel:
        return Eager(flow, lambda peer: b"", lambda data: None, lambda peer: 0)
    return Eager(flow, lambda peer: bytes_of(mine), combine, lambda peer: mine.numel())


class _Sums:
    """The arithmetic of one operation, tile by tile. Elements are the tensor's."""

    def __init__(
        self,
        op: str,
        size: int,
        me: int,
        codec: Codec,
        flat: torch.Tensor,
        residual: torch.Tensor | None,
        lost: torch.Tensor | None,
    ) -> None:
        self.flat = flat
        self.codec = codec
        self._average = op == "avg"
        self._size = size
        self._me = me
        self._residual = residual
        self._lost = lost
        self._tiles: list[torch.Tensor] = []

    def encoded(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """This member's elements as it sends them; in `into` where given, which may be longer."""
        data = torch.empty(self.codec.size(stop - start), dtype=torch.uint8) if into is None else into
        numel = stop - start
        for at in range(0, numel, TILE):
            low, high = start + at, start + min(at + TILE, numel)
            values = self._values(low, high)
            self.codec.encode(values, data, at, numel)
            if self._lost is not None:
                decoded = self._tile(1, high - low)
                self.codec.decode(data, decoded, at, numel)
                _keep_lost(torch.sub(values, decoded, out=self._lost[low:high]))
        return data

    def combine(
        self, parts: Mapping[int, torch.Tensor], result: torch.Tensor, start: int, stop: int, owns: bool
    ) -> None:
        """Encodes the members' sum. `owns`: this member keeps what that loses."""
        numel = stop - start
        for at in range(0, numel, TILE):
            count = min(TILE, numel - at)
            total = self._tree(parts, 0, self._size, 0, at, count, numel)
            if self._average:
                total.div_(self._size)
            self.codec.encode(total, result, at, numel)
            if owns and self._lost is not None:
                decoded = self._tile(1, count)
                self.codec.decode(result, decoded, at, numel)
                total.sub_(decoded)
                if self._average:
                    total.mul_(self._size)
                _keep_lost(self._lost[start + at : start + at + count].add_(total))

    def install(self, result: torch.Tensor, start: int, stop: int) -> None:
        """Into the tensor, whoever made it."""
        numel = stop - start
        for at in range(0, numel, TILE):
            out = self.flat[start + at : start + min(at + TILE, numel)]
            if out.dtype == torch.float32:
                self.codec.decode(result, out, at, numel)
                continue
            decoded = self._tile(0, out.numel())
            self.codec.decode(result, decoded, at, numel)
            out.copy_(decoded)
            if bool(decoded.isnan().any()):  # one NaN for all: how it is narrowed depends on the processor
                out.masked_fill_(decoded.isnan(), float("nan"))

    def _values(self, low: int, high: int) -> torch.Tensor:
        values = self.flat[low:high]
        if values.dtype == torch.float32 and self._residual is None:
            return values
        wide = self._tile(0, high - low)
        wide.copy_(values)
        return wide if self._residual is None else wide.add_(self._residual[low:high])

    def _tree(
        self, parts: Mapping[int, torch.Tensor], low: int, high: int, depth: int, at: int, count: int, numel: int
    ) -> torch.Tensor:
        """As deep in tiles as the tree is."""
        total = self._tile(depth, count)
        if high - low == 1:
            self.codec.decode(parts[low], total, at, numel)
            return total
        middle = low + split(high - low)
        self._tree(parts, low, middle, depth, at, count, numel)
        return total.add_(self._tree(parts, middle, high, depth + 1, at, count, numel))

    def _tile(self, depth: int, count: int) -> torch.Tensor:
        while len(self._tiles) <= depth:
            self._tiles.append(torch.empty(min(TILE, self.flat.numel())))
        return self._tiles[depth][:count]


class QuantisedReduce:
    name = "quantised"

    def __init__(self, flow: Flow, sums: _Sums) -> None:
        self._flow = flow
        self._sums = sums
        self._numel = sums.flat.numel()
        share = _up(-(-self._numel // flow.size))
        self._piece = min(_MOST_PIECE, share if share <= 2 * _LEAST_PIECE else _up(share // 2))
        self._blocks = -(-self._numel // (flow.size * self._piece))

    def opening(self, peer: int) -> bytes:
        return b""

    def span(self, block: int, part: int) -> tuple[int, int]:
        """Elements of the tensor, whole blocks of the codec but for the tensor's last one."""
        first = block * self._flow.size * self._piece
        left = min(self._flow.size * self._piece, self._numel - first)
        width = _up(-(-left // self._flow.size))
        return first + min(part * width, left), first + min((part + 1) * width, left)

    def place(self, peer: int, key: int) -> tuple[int, torch.Tensor | None]:
        block = key & ~_RESULT
        if block >= self._blocks:
            raise KeyError(key)
        start, stop = self.span(block, peer if block != key else self._flow.me)
        if stop <= start:
            raise KeyError(key)
        return self._sums.codec.size(stop - start), None

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
            if block:
                yield from self._install(block - 1)  # the others' results have had a block's time to come
        if self._blocks:
            yield from self._install(self._blocks - 1)

    def _send(self, block: int) -> None:
        for peer in self._flow.peers:
            start, stop = self.span(block, peer)
            if start < stop:
                self._write((peer,), block, start, stop, partial(self._sums.encoded, start, stop))

    def _combine(self, block: int, start: int, stop: int) -> None:
        flow, sums = self._flow, self._sums
        parts = {peer: flow.take(peer, block, torch.uint8) for peer in flow.peers}
        parts[flow.me] = sums.encoded(start, stop)  # before the result is written where it comes from

        def make(data: torch.Tensor) -> None:
            sums.combine(parts, data, start, stop, owns=True)
            for peer in flow.peers:  # before the result is sent: here it shows that a piece changed while it was read
                flow.done_with(peer, block)
            sums.install(data, start, stop)

        self._write(flow.peers, _RESULT | block, start, stop, make)

    def _install(self, block: int) -> Steps:
        spans = {peer: self.span(block, peer) for peer in self._flow.peers}
        spans = {peer: (start, stop) for peer, (start, stop) in spans.items() if start < stop}
        yield from self._flow.need([(peer, _RESULT | block) for peer in spans])
        for peer, (start, stop) in spans.items():
            self._sums.install(self._flow.take(peer, _RESULT | block, torch.uint8), start, stop)
            self._flow.done_with(peer, _RESULT | block)

    def _write(
        self, peers: tuple[int, ...], key: int, start: int, stop: int, make: Callable[[torch.Tensor], object]
    ) -> None:
        """Codes are made where they are sent from: in a slot, or else in memory that lives until they have left."""
        size = self._sums.codec.size(stop - start)
        slot: Slot | None = self._flow.reserve(peers) if peers else None
        data = slot.memory[:size] if slot is not None else torch.empty(size, dtype=torch.uint8)
        make(data)
        if slot is not None:
            self._flow.post_slot(slot, peers, key, data)
        else:
            self._flow.post(peers, key, data)


def _keep_lost(lost: torch.Tensor) -> None:
    """What is not finite cannot be made good later; it would spoil every call from now on."""
    torch.nan_to_num(lost, nan=0.0, posinf=0.0, neginf=0.0, out=lost)


def _up(elements: int) -> int:
    return -(-elements // BLOCK) * BLOCK

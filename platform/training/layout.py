"""The flat space: where every trainable element stands, and which units may change hands. Pure, no torch.

All trainable parameters stand in registration order in one float32 space; every tensor starts at a multiple of
ALIGN elements (64 bytes, since some CPU kernels give other bits at other alignments). Float buffers follow:
they are reduced like gradients. A unit is the smallest piece that has one owner: a norm block, or a whole
tensor where the optimizer is not element-wise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

ALIGN = 16  # float32 elements: 64 bytes
MIN_BLOCK = 4096  # sums of 4,096 elements were seen not to depend on pointer alignment
MAX_BLOCKS = 16384  # a vote carries one float64 a block: at most 128 KiB

Run = tuple[int, int]  # [start, stop) in the flat space
Row = tuple[int, int, int]  # (first, size, count): units of one size, one behind the other


def aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


@dataclass(frozen=True)
class FlatTensor:
    """`start` is its place in the flat space; `is_buffer` marks averaged buffers."""

    name: str
    shape: tuple[int, ...]
    numel: int
    start: int
    is_buffer: bool = False
    whole: bool = False  # may not be cut

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Piece:
    """A part of one tensor inside a run: elements [start, stop) of the tensor, at `flat` in the flat space."""

    tensor: FlatTensor
    start: int
    stop: int

    @property
    def flat(self) -> int:
        return self.tensor.start + self.start

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class FlatLayout:
    tensors: tuple[FlatTensor, ...]
    block: int  # elements in a norm block

    @classmethod
    def of(
        cls,
        params: Iterable[tuple[str, tuple[int, ...], bool]],
        buffers: Iterable[tuple[str, tuple[int, ...]]] = (),
    ) -> FlatLayout:
        """`params`: (name, shape, whole) in registration order; `buffers`: float buffers (name, shape)."""
        tensors, at = [], 0
        specs = [(n, s, w, False) for n, s, w in params] + [(n, s, True, True) for n, s in buffers]
        for name, shape, whole, is_buffer in specs:
            numel = 1
            for dim in shape:
                numel *= dim
            tensors.append(FlatTensor(name, shape, numel, at, is_buffer, whole))
            at += aligned(numel)
        block = MIN_BLOCK
        while sum(-(-t.numel // block) for t in tensors) > max(MAX_BLOCKS, 2 * len(tensors)):
            block *= 2
        return cls(tuple(tensors), block)

    @cached_property
    def total(self) -> int:
        """Elements of the flat space, padding included."""
        return aligned(self.tensors[-1].stop) if self.tensors else 0

    @cached_property
    def by_name(self) -> dict[str, FlatTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def units(self) -> tuple[Run, ...]:
        """Runs that may change hands; together they cover the flat space, padding included."""
        units: list[Run] = []
        for tensor in self.tensors:
            end = tensor.start + aligned(tensor.numel)
            step = max(tensor.numel, 1) if tensor.whole else self.block
            cuts = list(range(tensor.start, max(tensor.stop, tensor.start + 1), step))
            units += [(a, b) for a, b in zip(cuts, [*cuts[1:], end], strict=True) if b > a]
        return tuple(units)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The units as they travel."""
        return rows_of(self.units)

    def pieces(self, runs: Sequence[Run]) -> list[Piece]:
        """The parts of tensors inside `runs`, without padding, in flat order."""
        found = []
        index = 0
        for start, stop in sorted(runs):
            while (
                index < len(self.tensors) and self.tensors[index].start + aligned(self.tensors[index].numel) <= start
            ):
                index += 1
            at = index
            while at < len(self.tensors) and self.tensors[at].start < stop:
                tensor = self.tensors[at]
                a, b = max(start, tensor.start), min(stop, tensor.stop)
                if b > a:
                    found.append(Piece(tensor, a - tensor.start, b - tensor.start))
                at += 1
        return found

    def norm_blocks(self, piece: Piece) -> list[Run]:
        """The norm blocks of a piece, as [start, stop) inside the tensor; pieces are cut on block boundaries."""
        return [(a, min(a + self.block, piece.stop)) for a in range(piece.start, piece.stop, self.block)]


def rows_of(units: Sequence[Run]) -> tuple[Row, ...]:
    """The same units in few words: a tensor of 16,384 blocks is one row, not 160 KB in every rank's inventory."""
    rows: list[list[int]] = []
    for start, stop in units:
        if rows and stop - start == rows[-1][1] and start == rows[-1][0] + rows[-1][1] * rows[-1][2]:
            rows[-1][2] += 1
        else:
            rows.append([start, stop - start, 1])
    return tuple((first, size, count) for first, size, count in rows)


def units_in(rows: Iterable[Row]) -> tuple[Run, ...]:
    """The inverse of `rows_of`."""
    return tuple((first + size * i, first + size * (i + 1)) for first, size, count in rows for i in range(count))


def merge_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Sorted and coalesced."""
    merged: list[list[int]] = []
    for start, stop in sorted(runs):
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return tuple((a, b) for a, b in merged)


def intersect(left: Sequence[Run], right: Sequence[Run]) -> tuple[Run, ...]:
    """Of two sorted run lists."""
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if stop > start:
            out.append((start, stop))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(out)


def subtract(left: Sequence[Run], right: Sequence[Run]) -> tuple[Run, ...]:
    """What of `left` is not in `right`; both sorted, neither with runs that overlap."""
    out = []
    for start, stop in left:
        for a, b in intersect(((start, stop),), right):
            if start < a:
                out.append((start, a))
            start = b
        if start < stop:
            out.append((start, stop))
    return tuple(out)


def total_of(runs: Iterable[Run]) -> int:
    return sum(stop - start for start, stop in runs)

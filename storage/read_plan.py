"""What the reader asks the store for: requests, and where the bytes of each go.

Owns `Request`, the two kinds of delivery, and `plan_requests`. All of it is decided before the first byte is read; no
I/O here. Deliveries write into the targets' memory, each request's into other bytes of it: any threads.

    file with blocks       whole blocks, each once; neighbours share a request
    file without blocks    what is wanted, and holes of up to `_HOLE_BYTES` between; of a region its rows, where the
                           bytes from its first to its last are more than `_WASTE` times what is wanted

What belongs to a flat copy is read straight into its target, where it is long enough; the rest into a buffer, and
copied from there. On this machine a request is read in parts, each to where it belongs. On a bucket it is one read,
so only what fills requests of its own goes straight to its target.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np

from everstep.storage.blocks import BLOCK_BYTES, Blocks
from everstep.storage.errors import IndexInvalid
from everstep.storage.planner import Copy

_WASTE: Final = 4
# A request to a local file costs some 15 us here, in which 64 KiB are read.
_HOLE_BYTES: Final = 64 << 10
# Below that, a copy costs less than a read of its own.
_DIRECT_BYTES: Final = 256 << 10
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}

Span = tuple[int, int]  # [first, end) bytes of a file


@dataclass(frozen=True)
class _Flat:
    """Bytes [first, end), one behind the other, to `target`."""

    first: int
    end: int
    target: memoryview

    def deliver(self, first: int, data: memoryview) -> None:
        """Take what belongs to it from `data`, which is what the file has from byte `first` on."""
        start, stop = max(first, self.first), min(first + len(data), self.end)
        if start < stop:
            there = np.frombuffer(self.target, np.uint8, stop - start, start - self.first)
            np.copyto(there, np.frombuffer(data, np.uint8, stop - start, start - first))


_Dim = tuple[int, int, int]  # extent, bytes between neighbours in the file, and in the target


@dataclass(frozen=True)
class _Strided:
    """An n-d box of elements: `dims` by falling distance in the file, the last one the bytes of an element."""

    first: int
    end: int
    target: memoryview
    target_first: int
    dims: tuple[_Dim, ...]

    def deliver(self, first: int, data: memoryview) -> None:
        """Take what belongs to it from `data`, which is what the file has from byte `first` on."""
        self._scatter(self.dims, self.first - first, self.target_first, data)

    def _scatter(self, dims: tuple[_Dim, ...], at: int, to: int, data: memoryview) -> None:
        """The part of a box that lies in `data`; `at` (which may be outside) and `to` are of its first byte."""
        length = _length(dims)
        if at >= 0 and at + length <= len(data):
            _copy_box(dims, at, to, data, self.target)
            return
        if at >= len(data) or at + length <= 0:
            return
        (extent, step, target_step), rest = dims[0], dims[1:]
        inner = _length(rest)
        # Slices that touch the data, and of these the ones that lie in it wholly: they go in one piece.
        low = max(0, -((at + inner - 1) // step))
        high = min(extent, -((at - len(data)) // step))
        whole_low = min(max(low, -(at // step)), high)
        whole_high = max(min(high, (len(data) - at - inner) // step + 1), whole_low)
        if whole_high > whole_low:
            whole = ((whole_high - whole_low, step, target_step), *rest)
            _copy_box(whole, at + whole_low * step, to + whole_low * target_step, data, self.target)
        for i in chain(range(low, whole_low), range(whole_high, high)):
            self._scatter(rest, at + i * step, to + i * target_step, data)


Delivery = _Flat | _Strided


class Part(NamedTuple):
    """Bytes [first, end) of a request: read into the target of `flat`, or into a buffer where that is None."""

    first: int
    end: int
    flat: _Flat | None

    @property
    def into(self) -> memoryview | None:
        """Where it is read to."""
        if self.flat is None:
            return None
        return self.flat.target[self.first - self.flat.first : self.end - self.flat.first]


class Request(NamedTuple):
    """Bytes [first, end) of a file: `parts` without gaps, and who wants a copy of some of them."""

    file: str
    first: int
    end: int
    parts: Sequence[Part]
    deliveries: Sequence[Delivery]

    @property
    def buffer_bytes(self) -> int:
        """How much of it is not read straight into a target."""
        return sum(part.end - part.first for part in self.parts if part.flat is None)


def plan_requests(
    files: Mapping[str, Blocks | None], targets: Sequence[tuple[Copy, memoryview]], request_bytes: int, *, local: bool
) -> list[Request]:
    """The requests that fill the targets, in the order of files and bytes; none is longer than `request_bytes`, a
    multiple of BLOCK_BYTES. Those of a store that is not `local` have one part each. Raises IndexInvalid for a copy
    that does not lie in its file or fit its target.
    """
    by_file: dict[str, list[tuple[Copy, memoryview]]] = {}
    for copy, target in targets:
        if copy.source.kind != "file" or copy.source.locator not in files:
            raise IndexInvalid(f"{copy.source} is none of the {len(files)} files")
        if copy.nbytes:
            by_file.setdefault(copy.source.locator, []).append((copy, target))
    return [
        request
        for file in sorted(by_file)
        for request in _requests_of(file, files[file], by_file[file], request_bytes, local)
    ]


def whole_file(file: str, blocks: Blocks, request_bytes: int) -> Iterator[Request]:
    """Requests for every block of a file, whose bytes go nowhere."""
    for first in range(0, blocks.bytes, request_bytes):
        end = min(first + request_bytes, blocks.bytes)
        yield Request(file, first, end, (Part(first, end, None),), ())


def _requests_of(
    file: str, blocks: Blocks | None, targets: Sequence[tuple[Copy, memoryview]], request_bytes: int, local: bool
) -> Iterator[Request]:
    unit, nbytes = (1, 1 << 63) if blocks is None else (BLOCK_BYTES, blocks.bytes)
    deliveries: list[Delivery] = []
    spans: list[Span] = []
    direct: list[_Flat] = []
    for copy, target in targets:
        delivery = _delivery(file, nbytes, copy, target)
        deliveries.append(delivery)
        if isinstance(delivery, _Flat):
            spans.append((delivery.first, delivery.end))
            direct.append(delivery)
        else:
            spans += _spans(delivery.dims, delivery.first, blocks is not None)
    runs = _united(
        ((first // unit * unit, min(-(-end // unit) * unit, nbytes)) for first, end in spans),
        0 if blocks is not None else _HOLE_BYTES,
    )
    least = (1, _DIRECT_BYTES) if local else (unit, BLOCK_BYTES)
    parts = _parts(runs, _direct_parts(direct, nbytes, *least))
    waiting = _Waiting(deliveries)
    for together in _together(parts) if local else ([part] for part in parts):
        for cut in _cut(together, request_bytes):
            first, end = cut[0].first, cut[-1].end
            takers = waiting.at(first, end)
            yield Request(file, first, end, cut, [one for one in takers if not _served(one, cut)])


def _delivery(file: str, nbytes: int, copy: Copy, target: memoryview) -> Delivery:
    memory = target.cast("B")
    what = f"{copy.start}:{copy.stop} of {copy.name!r} ({copy.kind})"
    if memory.readonly:
        raise IndexInvalid(f"{what}: its target cannot be written")
    if copy.region is None:
        if copy.offset < 0 or copy.nbytes < 0 or copy.offset + copy.nbytes > nbytes or len(memory) != copy.nbytes:
            span = f"bytes {copy.offset}:{copy.offset + copy.nbytes} of {file}"
            raise IndexInvalid(f"{what}: {span}, into a target of {len(memory)} bytes")
        return _Flat(copy.offset, copy.offset + copy.nbytes, memory)
    region, size = copy.region, copy.itemsize
    extents = [extent for _, extent in region.box]
    possible = (
        len(extents) == len(region.strides) == len(region.target_strides)
        and math.prod(extents) == copy.stop - copy.start > 0
        and all(step >= (extent > 1) for extent, step in zip(extents, region.strides, strict=False))
        and min([*extents, 1]) == 1
        and min([*region.target_strides, region.target, 0]) == 0
    )
    if not possible:
        raise IndexInvalid(f"{what}: a region of {region.box} by {region.strides} to {region.target_strides}")
    dims = [
        (extent, step * size, to * size)
        for extent, step, to in zip(extents, region.strides, region.target_strides, strict=True)
    ]
    length = _length([*dims, (size, 1, 1)])
    target_end = region.target * size + _length([(n, to, 0) for n, _, to in dims] + [(size, 1, 0)])
    if copy.offset < 0 or copy.offset + length > nbytes or target_end > len(memory):
        span = f"bytes {copy.offset}:{copy.offset + length} of {file}"
        raise IndexInvalid(f"{what}: {span}, up to byte {target_end} of a target of {len(memory)}")
    dims = _merged(sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: -dim[1]))
    return _Strided(copy.offset, copy.offset + length, memory, region.target * size, (*dims, (size, 1, 1)))


def _merged(dims: Sequence[_Dim]) -> list[_Dim]:
    """Fewer dimensions where one goes on where the other ends, in the file and in the target."""
    merged: list[_Dim] = []
    for extent, step, to in dims:
        if merged and merged[-1][1] == extent * step and merged[-1][2] == extent * to:
            merged[-1] = (merged[-1][0] * extent, step, to)
        else:
            merged.append((extent, step, to))
    return merged


def _length(dims: Sequence[_Dim]) -> int:
    """Bytes of the file from the first to behind the last of a box that ends with the bytes of an element."""
    return sum((extent - 1) * step for extent, step, _ in dims) + 1


def _copy_box(dims: Sequence[_Dim], at: int, to: int, data: memoryview, target: memoryview) -> None:
    """The bytes of a whole box."""
    *outer, (size, _, _) = dims
    if outer and outer[-1][1:] == (size, size):  # elements one behind the other on both sides
        size *= outer.pop()[0]
    dtype = _UNSIGNED.get(size)
    shape = [extent for extent, _, _ in outer]
    steps = [step for _, step, _ in outer]
    target_steps = [step for _, _, step in outer]
    if dtype is None:
        dtype, shape, steps, target_steps = _UNSIGNED[1], [*shape, size], [*steps, 1], [*target_steps, 1]
    source = np.ndarray(shape, dtype, data, at, steps)
    np.copyto(np.ndarray(shape, dtype, target, to, target_steps), source)


def _spans(dims: Sequence[_Dim], first: int, in_blocks: bool) -> Iterator[Span]:
    """The bytes of a box: from its first to its last, or in parts where there is too much between."""
    if len(dims) > 1:
        (extent, step, _), rest = dims[0], dims[1:]
        inner = _length(rest)
        hole = step - inner
        wasteful = _length(dims) > _WASTE * math.prod(n for n, _, _ in dims)
        if hole >= BLOCK_BYTES if in_blocks else hole > _HOLE_BYTES and wasteful:
            for i in range(extent):
                yield from _spans(rest, first + i * step, in_blocks)
            return
    yield first, first + _length(dims)


def _united(spans: Iterator[Span], hole_bytes: int) -> list[Span]:
    """The bytes of all spans, sorted; those with at most `hole_bytes` between them are one."""
    united: list[Span] = []
    for first, end in sorted(spans):
        if united and first <= united[-1][1] + hole_bytes:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        else:
            united.append((first, end))
    return united


def _direct_parts(direct: Sequence[_Flat], nbytes: int, unit: int, least_bytes: int) -> list[Part]:
    """What is read straight into a target: whole units, each for one target."""
    parts: list[Part] = []
    taken = 0
    for flat in sorted(direct, key=lambda flat: (flat.first, -flat.end)):
        first = max(-(-flat.first // unit) * unit, taken)
        end = flat.end if flat.end == nbytes else flat.end // unit * unit
        if end - first >= least_bytes:
            parts.append(Part(first, end, flat))
            taken = end
    return parts


def _parts(runs: Sequence[Span], direct: Sequence[Part]) -> Iterator[Part]:
    """The runs, cut where direct parts, which all lie in some run, begin and end."""
    ahead = iter(direct)
    part = next(ahead, None)
    for first, end in runs:
        position = first
        while part is not None and part.first < end:
            if position < part.first:
                yield Part(position, part.first, None)
            yield part
            position = part.end
            part = next(ahead, None)
        if position < end:
            yield Part(position, end, None)


def _together(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """The parts in lots that have no gap."""
    lot: list[Part] = []
    for part in parts:
        if lot and lot[-1].end != part.first:
            yield lot
            lot = []
        lot.append(part)
    if lot:
        yield lot


def _cut(parts: Sequence[Part], request_bytes: int) -> Iterator[list[Part]]:
    """Parts without gaps, cut into requests' lengths, counted from the first byte."""
    request: list[Part] = []
    end = parts[0].first + request_bytes
    for part in parts:
        first = part.first
        while first < part.end:
            stop = min(part.end, end)
            request.append(Part(first, stop, part.flat))
            first = stop
            if stop == end:
                yield request
                request, end = [], end + request_bytes
    if request:
        yield request


def _served(one: Delivery, parts: Sequence[Part]) -> bool:
    """Whether all that it wants of these parts is read straight into its target."""
    return all(part.flat is one or part.end <= one.first or part.first >= one.end for part in parts)


class _Waiting:
    """Deliveries by where their bytes are; asked with rising positions."""

    def __init__(self, deliveries: Sequence[Delivery]) -> None:
        self._ahead = sorted(deliveries, key=lambda one: one.first)
        self._next = 0
        self._live: list[Delivery] = []

    def at(self, first: int, end: int) -> list[Delivery]:
        """Those that have bytes between the first and the last of which some are in [first, end)."""
        while self._next < len(self._ahead) and self._ahead[self._next].first < end:
            self._live.append(self._ahead[self._next])
            self._next += 1
        self._live = [one for one in self._live if one.end > first]
        return self._live.copy()

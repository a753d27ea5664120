"""The geometry of boxes: n-dimensional ranges of a tensor.

Owns `Box` and pure functions on it; no state, safe in any thread. A box is (first, extent) along each dimension of
its tensor, and its elements are counted in row-major order: elements [start, stop) of a box means that order. A 0-dim
tensor has one box, (), of one element. An empty box has an extent of 0.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Final

Box = tuple[tuple[int, int], ...]  # (first, extent) along each dimension; () is the whole tensor

# Of more boundaries than this along a dimension only so many are looked at, evenly spread: near enough to the median.
_CUTS_TRIED: Final = 8


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, extent) for extent in shape)


def extents(box: Box) -> tuple[int, ...]:
    """Its shape."""
    return tuple(extent for _, extent in box)


def numel(box: Box) -> int:
    """Number of elements; 1 for the box of a 0-dim tensor."""
    product = 1
    for _, extent in box:
        product *= extent
    return product


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each dimension of an array without gaps."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 1, 0, -1):
        strides[d - 1] = strides[d] * shape[d]
    return tuple(strides)


def inside(box: Box, shape: Sequence[int]) -> bool:
    """Whether the box has the tensor's rank and leaves it nowhere."""
    return len(box) == len(shape) and all(
        0 <= first <= first + extent <= size for (first, extent), size in zip(box, shape, strict=True)
    )


def contains(outer: Box, inner: Box) -> bool:
    """Whether every element of `inner` is one of `outer`."""
    for (a, b), (c, d) in zip(outer, inner, strict=True):  # noqa: SIM110, all(...) takes three times as long
        if c < a or a + b < c + d:
            return False
    return True


def touch(a: Box, b: Box) -> bool:
    """Whether there is an element that both hold."""
    for (first, extent), (other, length) in zip(a, b, strict=True):
        if first + extent <= other or other + length <= first or not (extent and length):
            return False
    return True


def intersection(a: Box, b: Box) -> Box | None:
    """What both hold; None where that is nothing."""
    if not touch(a, b):
        return None
    common = []
    for (first, extent), (other, length) in zip(a, b, strict=True):
        start = max(first, other)
        common.append((start, min(first + extent, other + length) - start))
    return tuple(common)


def parts(box: Box, start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a box as boxes, in order, each one run of it: at most 2n - 1 for n dimensions."""
    if start >= stop:
        return []
    if start == 0 and stop == numel(box):
        return [box]
    (first, _), rest = box[0], box[1:]
    inner = numel(rest)
    begin, end = -(-start // inner), stop // inner  # rows [begin, end) are there as a whole
    if begin > end:
        return [((first + end, 1), *part) for part in parts(rest, start - end * inner, stop - end * inner)]
    result: list[Box] = []
    if start < begin * inner:
        row = begin - 1
        result += [((first + row, 1), *part) for part in parts(rest, start - row * inner, inner)]
    if begin < end:
        result.append(((first + begin, end - begin), *rest))
    if end * inner < stop:
        result += [((first + end, 1), *part) for part in parts(rest, 0, stop - end * inner)]
    return result


def position(box: Box, strides: Sequence[int]) -> int:
    """How many elements the box's first one is behind that of the tensor, in memory of these strides."""
    elements = 0
    for (first, _), stride in zip(box, strides, strict=True):
        elements += first * stride
    return elements


def span(box: Box, strides: Sequence[int]) -> int:
    """Elements of memory from the box's first to its last one, both counted, where it lies with these strides."""
    if not numel(box):
        return 0
    return 1 + sum((extent - 1) * stride for (_, extent), stride in zip(box, strides, strict=True))


def without_gaps(box: Box, strides: Sequence[int]) -> bool:
    """Whether the box's elements lie one behind the other, in its row-major order, in memory of these strides."""
    dense = row_major(extents(box))
    return all(a == b or extent < 2 for (_, extent), a, b in zip(box, strides, dense, strict=True)) or not numel(box)


def one_run(box: Box, shape: Sequence[int]) -> tuple[int, int] | None:
    """The tensor's elements [start, stop) that the box is; None where they are not one run of the tensor."""
    if not numel(box):
        return (0, 0)
    start, stop = first_run(box, shape)
    return (start, stop) if stop - start == numel(box) else None


def first_run(box: Box, shape: Sequence[int]) -> tuple[int, int]:
    """The tensor's elements [start, stop) from the box's first one on, as far as they are all in the box."""
    start = position(box, row_major(shape))
    run = 1
    for (_, extent), size in zip(reversed(box), reversed(shape), strict=True):
        run *= extent
        if extent != size:
            break  # dimensions before this one add nothing, however far the box goes there
    return start, start + run


def uncovered(box: Box, boxes: Sequence[Box]) -> Box | None:
    """A box of `box` that none of the others touches; None where they cover all of it.

    O(n log^2 n) boxes where they lie side by side.
    """
    stack = [(box, [other for other in boxes if touch(box, other)])] if numel(box) else []
    while stack:
        rest, touching = stack.pop()
        if not touching:
            return rest
        if any(contains(other, rest) for other in touching):
            continue
        d, at = best_cut(rest, touching)
        low, high = cut(rest, d, at)
        stack.append((high, [other for other in touching if sum(other[d]) > at]))
        stack.append((low, [other for other in touching if other[d][0] < at]))
    return None


def cut(box: Box, dimension: int, at: int) -> tuple[Box, Box]:
    """The box in two: what lies before coordinate `at` of a dimension, and from there on."""
    first, extent = box[dimension]
    before, behind = box[:dimension], box[dimension + 1 :]
    return (*before, (first, at - first), *behind), (*before, (at, first + extent - at), *behind)


def best_cut(box: Box, boxes: Sequence[Box]) -> tuple[int, int]:
    """(dimension, coordinate) where to cut a box so that each half has as few of `boxes` as can be.

    All of them touch it, none contains it: so one at least has a boundary inside. Depends on the set of `boxes` only.
    """
    best: tuple[int, int, int, int] | None = None
    for d, (first, extent) in enumerate(box):
        last = first + extent
        starts = sorted([other[d][0] for other in boxes])
        ends = sorted([other[d][0] + other[d][1] for other in boxes])
        cuts = sorted({c for c in starts if c > first}.union(c for c in ends if c < last))
        step = max(1, len(cuts) // _CUTS_TRIED)
        for c in cuts[step // 2 :: step]:
            low, high = bisect_left(starts, c), len(boxes) - bisect_right(ends, c)
            score = (max(low, high), low + high, d, c)
            if best is None or score < best:
                best = score
    assert best is not None, f"no boundary inside {box}"
    return best[2], best[3]


def spell(box: Box) -> str:
    """For messages, as it would be written in Python: [0:4, 3:5]; nothing for a whole tensor."""
    return f"[{', '.join(f'{first}:{first + extent}' for first, extent in box)}]" if box else ""

"""The planner's part for boxes: which source each n-d box of a want comes from.

Owns `Cells`, the fragments of one tensor as boxes, and `cover`, which gives a want a source for every element. Pure
and safe in any thread. The rules are those of `planner.py`, whose `load` it adds to.

A want is cut at the boundaries of its cheapest fragments until each part lies inside one of them or touches none,
then at those of the next cheapest. Each cut takes the boundary that leaves the fewest fragments on both sides. That
is O(log n + m log^2 m) for one want that touches m of the n fragments of its tensor, where they lie side by side.
Parts that turn out to be one box of one source are joined again.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from everstep.storage import boxes
from everstep.storage.boxes import Box
from everstep.storage.index import Fragment, TensorMeta

# A request of 1 MiB costs a millisecond to move and some ten microseconds to ask for: finer spreading gains
# nothing.
GRAIN_BYTES: Final = 1 << 20
_MOST_GRAINS: Final = 256  # of one want: its copies stay few, and its load even to half a percent


class Cell(NamedTuple):
    """A box of a tensor that one source holds.

    strides   elements between neighbours in the source, along each dimension
    base      byte offset in the source at which the tensor's element (0, 0, ...) would lie; may be negative
    """

    box: Box
    source: int
    strides: tuple[int, ...]
    base: int
    fragments: tuple[Fragment, ...]


class Cells:
    """The fragments of one tensor as boxes, ordered along the dimension that tells them best apart.

    Of two lengths within a factor of two of each other, those that touch [a, b) start in one range: one bisect finds
    them.
    """

    def __init__(self, meta: TensorMeta, fragments: Iterable[tuple[Fragment, int]]) -> None:
        self.cells = sorted(
            (cell for fragment, source in fragments for cell in _cells(meta, fragment, source)), key=_cell_order
        )
        dimensions = range(len(meta.shape))
        self._along = max(dimensions, key=lambda d: (len({c.box[d][0] for c in self.cells}), -d), default=None)
        self._classes: dict[int, list[tuple[int, int]]] = {}  # (first, number of the cell) by size class
        self._firsts: dict[int, list[int]] = {}
        if self._along is None:
            return
        for n, cell in enumerate(self.cells):
            first, extent = cell.box[self._along]
            self._classes.setdefault(extent.bit_length(), []).append((first, n))
        for size_class, entries in self._classes.items():
            entries.sort()
            self._firsts[size_class] = [first for first, _ in entries]

    def touching(self, box: Box) -> list[Cell]:
        """Those that share an element with `box`, in an order that does not depend on that of the fragments."""
        if self._along is None:
            return self.cells
        start, extent = box[self._along]
        numbers: list[int] = []
        for size_class, entries in self._classes.items():
            firsts = self._firsts[size_class]
            low = bisect_right(firsts, start - (1 << size_class))
            numbers += [n for _, n in entries[low : bisect_left(firsts, start + extent)]]
        numbers.sort()
        return [self.cells[n] for n in numbers if boxes.touch(self.cells[n].box, box)]


class Gap(Exception):
    """Nothing covers this box of a want; never leaves the planner."""

    def __init__(self, box: Box) -> None:
        super().__init__(box)
        self.box = box


def cover(
    wanted: Sequence[Box], itemsize: int, cells: Cells, cost: Callable[[int], int], load: list[int]
) -> list[Cell]:
    """What to take from where, so that each element of the wanted boxes is taken once; ordered by box.

    `cost` is asked once for each source, by number; `load` has the bytes given to each. Raises Gap.
    """
    costs: dict[int, int] = {}
    grain = max(GRAIN_BYTES, sum(map(boxes.numel, wanted)) * itemsize // _MOST_GRAINS)
    taken: list[Cell] = []
    last: int | None = None
    for whole in wanted:
        touching = cells.touching(whole)
        for cell in touching:
            if cell.source not in costs:
                costs[cell.source] = cost(cell.source)
        stack = [(whole, touching)]
        while stack:
            box, near = stack.pop()
            if not near:
                raise Gap(box)
            lowest = min([costs[cell.source] for cell in near])
            cheapest = [cell for cell in near if costs[cell.source] == lowest]
            holding = [cell for cell in cheapest if boxes.contains(cell.box, box)]
            if not holding:
                d, at = boxes.best_cut(box, [cell.box for cell in cheapest])
                low, high = boxes.cut(box, d, at)
                stack.append((high, [cell for cell in near if sum(cell.box[d]) > at]))
                stack.append((low, [cell for cell in near if cell.box[d][0] < at]))
                continue
            nbytes = boxes.numel(box) * itemsize
            if nbytes > 2 * grain and len({cell.source for cell in holding}) > 1:
                low, high = _halves(box)
                stack += [(high, holding), (low, holding)]
                continue
            least = min(load[cell.source] for cell in holding)
            stays = last is not None and load[last] < least + grain
            chosen = next((cell for cell in holding if stays and cell.source == last), None)
            # Cells are ordered by source among others: the first of those that are equal is the smallest source.
            chosen = chosen or min(holding, key=lambda cell: (load[cell.source], cell.source))
            last = chosen.source
            load[last] += nbytes
            taken.append(chosen._replace(box=box))
    return _joined(taken)


def _cells(meta: TensorMeta, f: Fragment, source: int) -> list[Cell]:
    if f.start >= f.stop:
        return []
    box = f.box or boxes.whole(meta.shape)
    strides = f.strides or boxes.row_major(boxes.extents(box))
    base = f.offset - (boxes.position(box, strides) + f.start) * meta.itemsize
    return [Cell(part, source, strides, base, (f,)) for part in boxes.parts(box, f.start, f.stop)]


def _cell_order(cell: Cell) -> tuple[object, ...]:
    (f,) = cell.fragments
    return (cell.box, cell.source, cell.strides, cell.base, f.box, f.start, f.stop, f.offset, f.checksum)


def _halves(box: Box) -> tuple[Box, Box]:
    """A box of more than one element in two, along its first dimension that can be cut: so that runs stay long."""
    d = next(d for d, (_, extent) in enumerate(box) if extent > 1)
    first, extent = box[d]
    return boxes.cut(box, d, first + extent // 2)


def _joined(taken: list[Cell]) -> list[Cell]:
    """The same, with neighbours that are one box of one source with the same strides made one."""
    if len(taken) < 2:
        return taken
    for d in reversed(range(len(taken[0].box))):
        taken.sort(key=lambda cell: (cell.source, cell.strides, cell.base, _without(cell.box, d), cell.box[d]))
        result: list[Cell] = []
        run: list[Cell] = []
        for cell in taken:
            if run and not _continues(run[-1], cell, d):
                result.append(_one(run, d))
                run = []
            run.append(cell)
        taken = [*result, _one(run, d)]
    return sorted(taken, key=lambda cell: cell.box)


def _one(run: list[Cell], d: int) -> Cell:
    """Cells that follow each other along a dimension, as one."""
    if len(run) == 1:
        return run[0]
    first, last = run[0].box, run[-1].box
    box = (*first[:d], (first[d][0], last[d][0] + last[d][1] - first[d][0]), *first[d + 1 :])
    return run[0]._replace(box=box, fragments=tuple(dict.fromkeys(f for cell in run for f in cell.fragments)))


def _without(box: Box, d: int) -> Box:
    return (*box[:d], *box[d + 1 :])


def _continues(a: Cell, b: Cell, d: int) -> bool:
    """Whether `b` is what follows `a` along a dimension, in the tensor and in the source."""
    return (
        a.source == b.source
        and a.base == b.base
        and a.strides == b.strides
        and a.box[d][0] + a.box[d][1] == b.box[d][0]
        and _without(a.box, d) == _without(b.box, d)
    )

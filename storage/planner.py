"""The planner: which bytes go where.

`plan(have, want, cost)` is a pure function, safe in any thread. Recovery, join, rescale, restart and
checkpoint load are all this one function with another `have`, `want` and `cost`.

Rules, in this order:
1. Every wanted element is copied exactly once, from a fragment that holds it.
2. It comes from the cheapest source that holds it.
3. Among equally cheap sources the one that has been given the fewest bytes so far is taken; where that is
   equal too, the smallest `Source`. A source that can simply read on keeps the range until it is
   `GRAIN_BYTES` ahead.
4. Adjacent copies of one holder that are also adjacent in one source are one copy.
The result depends on the sets of fragments and wants, never on their order.

Ranges that are one run of their tensor are planned here, flat. A want of a box, and every want of a tensor that has a
fragment which is no run of it, is planned in boxes (`box_planner.py`), by the same rules and with the same load.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import msgspec

from everstep.storage import boxes
from everstep.storage.box_planner import GRAIN_BYTES, Cells, Gap, cover
from everstep.storage.errors import IndexInvalid, Unrecoverable
from everstep.storage.index import Box, Fragment, Source, StateIndex, TensorKey, TensorMeta


class Want(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Elements [start, stop) of a box of a tensor, in its row-major order, that `holder` (a member's name) needs.

    `box` () is the whole tensor. What is wanted goes into memory that holds just these elements, without gaps.
    """

    name: str
    kind: str
    start: int
    stop: int
    holder: str
    box: Box = ()


class Region(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What a copy moves where that is not one run of the tensor: an n-d box of it, from strided to strided memory.

    box             (first, extent) along each dimension of the tensor
    strides         elements between neighbours in the source; the copy's `offset` is that of the box's first element
    want            whose memory it goes to
    target          element of that memory that the box's first element goes to
    target_strides  elements between neighbours there
    """

    box: Box
    strides: tuple[int, ...]
    want: Want
    target: int
    target_strides: tuple[int, ...]


class Copy(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Move elements [start, stop), `nbytes` bytes from byte `offset` of the source's payload, to `holder`.

    `fragments` are those of the source that the bytes belong to, in order; one that lies wholly inside
    [start, stop) can be verified by its checksum when the bytes arrive (`whole_fragments`). In a flat copy they are
    flat ranges too, whatever box the index tells them as; in one of a region they are the index's own.
    """

    name: str
    kind: str
    start: int
    stop: int
    source: Source
    offset: int
    nbytes: int
    holder: str
    fragments: tuple[Fragment, ...]
    region: Region | None = None  # then start is 0 and stop the number of elements moved

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.nbytes // (self.stop - self.start)

    def whole_fragments(self) -> list[tuple[int, int, int]]:
        """(first byte, end byte, xxh3_64) of every fragment inside the copied bytes whose checksum is
        known. None for a region.
        """
        if self.region is not None:
            return []
        size = self.itemsize
        return [
            ((f.start - self.start) * size, (f.stop - self.start) * size, f.checksum)
            for f in self.fragments
            if f.checksum and self.start <= f.start and f.stop <= self.stop
        ]


Cost = Callable[[Source, Want], int]


def plan(have: StateIndex, want: Sequence[Want], cost: Cost) -> tuple[Copy, ...]:
    """The copies that give every holder what it wants, ordered by holder, tensor and range; regions come last there.

    Raises Unrecoverable, naming tensor and range, where no fragment of `have` covers a wanted element, and
    IndexInvalid for a range or a box outside its tensor. `cost` is asked once for each source of a want; lower is
    better.
    """
    metas = have.metas()
    sources = sorted({fragment.source for fragment in have.fragments})
    number = {source: rank for rank, source in enumerate(sources)}
    tables = {(w.name, w.kind): _Table() for w in want}
    cut: set[TensorKey] = set()  # tensors with a fragment that is no run of them
    for fragment in have.fragments:
        key = (fragment.name, fragment.kind)
        table = tables.get(key)
        if table is not None and fragment.start < fragment.stop:
            if fragment.box or fragment.strides:
                flat = fragment.as_run(metas[key].shape) if key in metas else None
                if flat is None:
                    cut.add(key)
                    continue
                fragment = flat
            table.add(fragment, number[fragment.source])
    for table in tables.values():
        table.sort()
    cells = _cells(have, metas, cut.union((w.name, w.kind) for w in want if w.box), number)
    load = [0] * len(sources)
    reading: dict[str, tuple[int, int]] = {}
    copies: list[Copy] = []
    regions: list[Copy] = []
    for w in sorted(want, key=lambda w: (w.name, w.kind, w.start, w.stop, w.holder, w.box)):
        meta = _checked(metas, w)
        if w.start < w.stop:
            if w.box or meta.key in cut:
                regions += _regions(w, meta, cells[meta.key], sources, cost, load)
            else:
                copies += _cover(w, meta.itemsize, tables[meta.key], sources, cost, load, reading)
    if not regions:
        return tuple(_coalesced(copies))
    return tuple(sorted([*_coalesced(copies), *regions], key=lambda c: (c.holder, c.name, c.kind)))


def _checked(metas: dict[TensorKey, TensorMeta], w: Want) -> TensorMeta:
    meta = metas.get((w.name, w.kind))
    if meta is None:
        raise Unrecoverable(w.name, w.kind, w.start, w.stop, w.holder)
    if w.box and not boxes.inside(w.box, meta.shape):
        shape = list(meta.shape)
        raise IndexInvalid(
            f"{w.holder!r} wants {boxes.spell(w.box)} of {w.name!r} ({w.kind}), whose shape is {shape}"
        )
    numel = boxes.numel(w.box) if w.box else meta.numel
    if not 0 <= w.start <= w.stop <= numel:
        what = f"{w.name!r}{boxes.spell(w.box)} ({w.kind})"
        raise IndexInvalid(f"{w.holder!r} wants {w.start}:{w.stop} of {what}, which has {numel}")
    return meta


def _cells(
    have: StateIndex, metas: dict[TensorKey, TensorMeta], keys: set[TensorKey], number: dict[Source, int]
) -> dict[TensorKey, Cells]:
    """All that there is of these tensors, in boxes; those that the index does not list are left out."""
    if not keys:
        return {}
    held: dict[TensorKey, list[tuple[Fragment, int]]] = {key: [] for key in keys if key in metas}
    for fragment in have.fragments:
        found = held.get((fragment.name, fragment.kind))
        if found is not None:
            found.append((fragment, number[fragment.source]))
    return {key: Cells(metas[key], fragments) for key, fragments in held.items()}


def _regions(
    w: Want, meta: TensorMeta, cells: Cells, sources: Sequence[Source], cost: Cost, load: list[int]
) -> list[Copy]:
    """Cover one want with boxes, in the order of the boxes."""
    box = w.box or boxes.whole(meta.shape)
    wanted = boxes.parts(box, w.start, w.stop)
    try:
        taken = cover(wanted, meta.itemsize, cells, lambda source: cost(sources[source], w), load)
    except Gap as gap:
        raise Unrecoverable(w.name, w.kind, *boxes.first_run(gap.box, meta.shape), w.holder) from None
    target_strides = boxes.row_major(boxes.extents(box))
    target_base = -boxes.position(box, target_strides) - w.start
    copies = []
    for cell in taken:
        numel = boxes.numel(cell.box)
        target = target_base + boxes.position(cell.box, target_strides)
        offset = cell.base + boxes.position(cell.box, cell.strides) * meta.itemsize
        region = Region(cell.box, cell.strides, w, target, target_strides)
        nbytes = numel * meta.itemsize
        source = sources[cell.source]
        copies.append(Copy(w.name, w.kind, 0, numel, source, offset, nbytes, w.holder, cell.fragments, region))
    return copies


_Hit = tuple[int, int, int, Fragment]  # start, stop, number of the source, fragment


class _Table:
    """The fragments of one tensor, by size class (powers of two) and start.

    A fragment of class c is shorter than 2**c, so those that touch [a, b) start in (a - 2**c, b): one bisect
    finds them however the fragments of different holders nest, with at most a factor of two looked at in
    vain.
    """

    def __init__(self) -> None:
        self._classes: dict[int, list[_Hit]] = {}
        self._starts: dict[int, list[int]] = {}

    def add(self, fragment: Fragment, source: int) -> None:
        size_class = (fragment.stop - fragment.start).bit_length()
        self._classes.setdefault(size_class, []).append((fragment.start, fragment.stop, source, fragment))

    def sort(self) -> None:
        for size_class, hits in self._classes.items():
            hits.sort(key=_hit_order)
            self._starts[size_class] = [hit[0] for hit in hits]

    def touching(self, start: int, stop: int) -> list[_Hit]:
        found: list[_Hit] = []
        for size_class, hits in self._classes.items():
            starts = self._starts[size_class]
            first = bisect_right(starts, start - (1 << size_class))
            found += [hit for hit in hits[first : bisect_left(starts, stop)] if hit[1] > start]
        if len(self._classes) > 1:
            found.sort(key=_hit_order)
        return found


def _hit_order(hit: _Hit) -> tuple[int, int, int, int, int]:
    return (hit[0], hit[1], hit[2], hit[3].offset, hit[3].checksum)


def _cover(
    w: Want,
    itemsize: int,
    table: _Table,
    sources: Sequence[Source],
    cost: Cost,
    load: list[int],
    reading: dict[str, tuple[int, int]],
) -> list[Copy]:
    """Cover one want from left to right.

    Adds what each source is given to `load` (bytes by source number), and keeps in `reading` for each holder
    the source that it took the last copy from, and the byte at which that source could read on.
    """
    hits = table.touching(w.start, w.stop)
    costs: dict[int, int] = {}
    for hit in hits:
        if hit[2] not in costs:
            costs[hit[2]] = cost(sources[hit[2]], w)
    copies: list[Copy] = []
    live: list[_Hit] = []
    ahead = 0  # hits[ahead:] start behind `position`
    position = w.start
    while position < w.stop:
        live = [hit for hit in live if hit[1] > position]
        while ahead < len(hits) and hits[ahead][0] <= position:
            if hits[ahead][1] > position:
                live.append(hits[ahead])
            ahead += 1
        if not live:
            gap_end = hits[ahead][0] if ahead < len(hits) else w.stop
            raise Unrecoverable(w.name, w.kind, position, gap_end, w.holder)
        _, hit_stop, source, fragment = _choose(live, costs, load, position, itemsize, reading.get(w.holder))
        end = min(hit_stop, w.stop)
        behind = ahead  # a cheaper source takes over where its fragment starts
        while behind < len(hits) and hits[behind][0] < end:
            if costs[hits[behind][2]] < costs[source]:
                end = hits[behind][0]
            behind += 1
        offset = fragment.offset + (position - fragment.start) * itemsize
        nbytes = (end - position) * itemsize
        copies.append(Copy(w.name, w.kind, position, end, sources[source], offset, nbytes, w.holder, (fragment,)))
        load[source] += nbytes
        reading[w.holder] = (source, offset + nbytes)
        position = end
    return copies


def _choose(
    live: Sequence[_Hit],
    costs: dict[int, int],
    load: Sequence[int],
    position: int,
    itemsize: int,
    previous: tuple[int, int] | None,
) -> _Hit:
    if len(live) == 1:
        return live[0]
    lowest = min(costs[hit[2]] for hit in live)
    cheapest = [hit for hit in live if costs[hit[2]] == lowest]
    least = min(load[hit[2]] for hit in cheapest)
    if previous is not None and load[previous[0]] < least + GRAIN_BYTES:
        for hit in cheapest:
            if (hit[2], hit[3].offset + (position - hit[3].start) * itemsize) == previous:
                return hit
    # The longest of a source's fragments makes the fewest copies.
    return min(cheapest, key=lambda hit: (load[hit[2]], hit[2], -hit[1], hit[3].offset))


def _coalesced(copies: list[Copy]) -> list[Copy]:
    copies.sort(key=lambda c: (c.holder, c.name, c.kind, c.start, c.stop, c.source))
    result: list[Copy] = []
    run: list[Copy] = []
    for copy in copies:
        if run and not _adjacent(run[-1], copy):
            result.append(_joined(run))
            run = []
        run.append(copy)
    if run:
        result.append(_joined(run))
    return result


def _adjacent(a: Copy, b: Copy) -> bool:
    return (
        a.stop == b.start
        and a.offset + a.nbytes == b.offset
        and a.name == b.name
        and a.kind == b.kind
        and a.holder == b.holder
        and a.source == b.source
    )


def _joined(run: Sequence[Copy]) -> Copy:
    if len(run) == 1:
        return run[0]
    first, last = run[0], run[-1]
    fragments = dict.fromkeys(fragment for copy in run for fragment in copy.fragments)
    nbytes = sum(copy.nbytes for copy in run)
    return Copy(
        first.name, first.kind, first.start, last.stop, first.source, first.offset, nbytes, first.holder,
        tuple(fragments),
    )  # fmt: skip

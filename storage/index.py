"""The state index: which tensors a training state has, and where the bytes of each range of them are.

Owns `TensorMeta`, `Source`, `Fragment` and `StateIndex`. All are immutable values, safe in any thread, and
travel as msgpack. Coordinates are those of the row-major, unpadded tensor: elements [start, stop) of it, or of a box
of it (`boxes.py`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from everstep.storage import boxes
from everstep.storage.errors import IndexInvalid, IndexMismatch

ITEMSIZE_BYTES: Final[dict[str, int]] = {
    "float64": 8,
    "int64": 8,
    "uint64": 8,
    "complex64": 8,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
_WIRE_VERSION: Final = 2
_LARGEST: Final = 2**63 - 1  # offsets and lengths must fit what the operating system takes (off_t)
_MOST_DIMENSIONS: Final = 64  # as many as torch has

TensorKey = tuple[str, str]  # (name, kind)
Box = boxes.Box


class TensorMeta(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One tensor of the state: fully qualified name, kind, element type, global shape.

    `python` marks a Python scalar of an optimizer that is stored as a 0-dim tensor.
    Raises IndexInvalid for an unknown dtype or a shape that cannot be.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    python: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE_BYTES:
            raise IndexInvalid(
                f"{self.name!r} ({self.kind}): dtype {self.dtype!r}; known: {', '.join(ITEMSIZE_BYTES)}"
            )
        if len(self.shape) > _MOST_DIMENSIONS:
            raise IndexInvalid(
                f"{self.name!r} ({self.kind}): {len(self.shape)} dimensions; there can be {_MOST_DIMENSIONS}"
            )
        if any(extent < 0 for extent in self.shape):
            raise IndexInvalid(f"{self.name!r} ({self.kind}): shape {self.shape} has a negative extent")
        if self.nbytes > _LARGEST:
            raise IndexInvalid(f"{self.name!r} ({self.kind}): shape {self.shape} is larger than any file")

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-dim tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return ITEMSIZE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, unpadded."""
        return self.numel * self.itemsize

    @property
    def key(self) -> TensorKey:
        """What identifies the tensor in an index: (name, kind)."""
        return (self.name, self.kind)


class Source(msgspec.Struct, frozen=True, order=True, gc=False, array_like=True):
    """Something that holds bytes of the state.

    kind     holder        locator
    live     member name   ""               stamped memory of a running rank
    segment  domain        segment file id  read through that domain's manager
    parity   lost domain   its version      decoded from what its group has left
    file     ""            file name        relative to the checkpoint's folder
    """

    kind: str
    holder: str
    locator: str


class Fragment(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Elements [start, stop) of a box of one tensor, counted in the box's own row-major order, and where they are.

    `offset` is the byte offset of element `start` in the source's payload (for a file: in the file).
    `checksum` is the xxh3_64 of the fragment's bytes, 0 where unknown. `box` () is the whole tensor.
    `strides` () says that the elements lie one behind the other. Otherwise they are the elements between neighbours
    in the source, along each dimension of the box, and [start, stop) is the whole box: a part of a fused, padded or
    transposed array. There is no checksum then.
    """

    name: str
    kind: str
    start: int
    stop: int
    source: Source
    offset: int
    checksum: int = 0
    box: Box = ()
    strides: tuple[int, ...] = ()

    @property
    def key(self) -> TensorKey:
        """(name, kind) of the fragment's tensor."""
        return (self.name, self.kind)

    def __str__(self) -> str:
        """For messages: `'w'[0:4, 3:5] (param) elements 0:8`."""
        return f"{self.name!r}{boxes.spell(self.box)} ({self.kind}) elements {self.start}:{self.stop}"

    def parts(self, shape: Sequence[int]) -> list[Box]:
        """What it holds of its tensor, of this shape, as boxes: one behind the other in the source."""
        return boxes.parts(self.box or boxes.whole(shape), self.start, self.stop)

    def as_run(self, shape: Sequence[int]) -> "Fragment | None":
        """The same bytes as a flat range of their tensor, of this shape; None where they are not one run of it."""
        if not (self.box or self.strides):
            return self
        box = self.box or boxes.whole(shape)
        if self.strides and not boxes.without_gaps(box, self.strides):
            return None
        run: tuple[int, int] | None = None
        for part in boxes.parts(box, self.start, self.stop):
            found = boxes.one_run(part, shape)
            if found is None or (run is not None and run[1] != found[0]):
                return None
            run = found if run is None else (run[0], found[1])
        return Fragment(self.name, self.kind, *(run or (0, 0)), self.source, self.offset, self.checksum)


_Form = tuple[Box, tuple[int, ...]]  # box, strides


class _Versioned(msgspec.Struct, frozen=True, array_like=True):
    version: int


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    """Compact form: names, sources and boxes once, fragments as rows of numbers.

    `cuts`: (row, number in `forms`) of the fragments that are no flat ranges.
    """

    version: int
    step: int
    tensors: tuple[TensorMeta, ...]
    sources: tuple[Source, ...]
    rows: list[tuple[int, int, int, int, int, int]]  # tensor, source, start, stop, offset, checksum
    forms: tuple[_Form, ...]
    cuts: list[tuple[int, int]]


class StateIndex(msgspec.Struct, frozen=True):
    """The tensors of a state at one step, and the fragments of them that are known."""

    step: int
    tensors: tuple[TensorMeta, ...]
    fragments: tuple[Fragment, ...]

    def metas(self) -> dict[TensorKey, TensorMeta]:
        """The tensors by (name, kind)."""
        return {meta.key: meta for meta in self.tensors}

    def missing(self) -> list[tuple[str, str, int, int]]:
        """Ranges (name, kind, start, stop) that no fragment covers, in the order of `tensors`.

        All of them for a tensor that is there in flat ranges only. One, the longest run from some first missing
        element, for a tensor of which there are boxes.
        """
        spans: dict[TensorKey, list[tuple[int, int]]] = {meta.key: [] for meta in self.tensors}
        cut: dict[TensorKey, set[_Held]] = {}
        for f in self.fragments:
            if f.box or f.strides:
                cut.setdefault(f.key, set()).add((f.box, f.start, f.stop))
            else:
                spans[f.key].append((f.start, f.stop))
        known: dict[tuple[tuple[int, ...], frozenset[_Held]], tuple[int, int] | None] = {}  # layers are alike
        missing = []
        for meta in self.tensors:
            held = cut.get(meta.key)
            if held is None:
                gaps: Iterable[tuple[int, int]] = _gaps(sorted(spans[meta.key]), meta.numel)
            else:
                alike = (meta.shape, frozenset(held.union(((), *span) for span in spans[meta.key])))
                if alike not in known:
                    known[alike] = _gap(*alike)
                gap = known[alike]
                gaps = [] if gap is None else [gap]
            missing += [(meta.name, meta.kind, start, stop) for start, stop in gaps]
        return missing

    def validate(self) -> None:
        """Check that every fragment lies inside a listed tensor; raises IndexInvalid naming the first that
        does not.
        """
        if self.step < 0:
            raise IndexInvalid(f"step {self.step} is negative")
        sizes: dict[TensorKey, tuple[int, int, TensorMeta]] = {}
        for meta in self.tensors:
            if meta.key in sizes:
                raise IndexInvalid(f"{meta.name!r} ({meta.kind}) is listed twice")
            sizes[meta.key] = (meta.numel, meta.itemsize, meta)
        for f in self.fragments:
            size = sizes.get((f.name, f.kind))
            if size is None:
                raise IndexInvalid(f"fragment {f}, which is not a listed tensor")
            numel, itemsize, meta = size
            length = f.stop - f.start
            if f.box or f.strides:
                numel, length = _extent(f, meta)
            if not 0 <= f.start <= f.stop <= numel:
                raise IndexInvalid(f"fragment {f}: there are {numel} elements")
            if not 0 <= f.offset <= _LARGEST - length * itemsize:
                raise IndexInvalid(f"fragment {f} at byte offset {f.offset}")
            if not 0 <= f.checksum < 2**64:
                raise IndexInvalid(f"fragment {f} has checksum {f.checksum}")

    def to_bytes(self) -> bytes:
        """msgpack for a message or a file; fragments must belong to listed tensors."""
        tensor_of = {meta.key: number for number, meta in enumerate(self.tensors)}
        sources: dict[Source, int] = {}
        forms: dict[_Form, int] = {}
        rows: list[tuple[int, int, int, int, int, int]] = []
        cuts: list[tuple[int, int]] = []
        for f in self.fragments:
            if (f.name, f.kind) not in tensor_of:
                raise IndexInvalid(f"fragment {f}, which is not a listed tensor")
            if f.box or f.strides:
                cuts.append((len(rows), forms.setdefault((f.box, f.strides), len(forms))))
            source = sources.setdefault(f.source, len(sources))
            rows.append((tensor_of[f.name, f.kind], source, f.start, f.stop, f.offset, f.checksum))
        return msgspec.msgpack.encode(
            _Wire(_WIRE_VERSION, self.step, self.tensors, tuple(sources), rows, tuple(forms), cuts)
        )

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> "StateIndex":
        """The inverse of `to_bytes`, for bytes that nobody vouches for; raises IndexInvalid."""
        try:
            wire = msgspec.msgpack.decode(data, type=_Wire)
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise IndexInvalid(f"not a state index{_version_told(data)}: {error}") from error
        if wire.version != _WIRE_VERSION:
            raise IndexInvalid(f"a state index{_version_told(data)}")
        fragments = list(_fragments(wire.tensors, wire.sources, wire.rows))
        for row, number in wire.cuts:
            if not (0 <= row < len(fragments) and 0 <= number < len(wire.forms)):
                raise IndexInvalid(f"box {number} of {len(wire.forms)} for fragment {row} of {len(fragments)}")
            f, (box, strides) = fragments[row], wire.forms[number]
            fragments[row] = Fragment(f.name, f.kind, f.start, f.stop, f.source, f.offset, f.checksum, box, strides)
        index = StateIndex(wire.step, wire.tensors, tuple(fragments))
        index.validate()
        return index


def merge(*indices: StateIndex) -> StateIndex:
    """One index over everything that the given ones know; the order of the arguments does not matter.

    Raises IndexMismatch when steps differ, or two indices disagree on a tensor.
    """
    if not indices:
        raise IndexMismatch("nothing to merge")
    steps = sorted({index.step for index in indices})
    if len(steps) > 1:
        raise IndexMismatch(f"indices of different steps: {', '.join(map(str, steps))}")
    metas: dict[TensorKey, TensorMeta] = {}
    # Whose lists are one object agree: 10,000 domains list the same tensors.
    for tensors in {id(index.tensors): index.tensors for index in indices}.values():
        for meta in tensors:
            known = metas.setdefault(meta.key, meta)
            if known != meta:
                raise IndexMismatch(
                    f"{meta.name!r} ({meta.kind}) is {_form(known)} in one index, {_form(meta)} in another"
                )
    fragments = dict.fromkeys(fragment for index in indices for fragment in index.fragments)
    merged = StateIndex(
        steps[0],
        tuple(metas[key] for key in sorted(metas)),
        tuple(sorted(fragments, key=_order)),
    )
    merged.validate()
    return merged


def _order(f: Fragment) -> tuple[object, ...]:
    return (f.name, f.kind, f.start, f.stop, f.source, f.offset, f.checksum, f.box, f.strides)


def _version_told(data: bytes | memoryview) -> str:
    """What to say of the version of something that may be a state index of another one."""
    try:
        version = msgspec.msgpack.decode(data, type=_Versioned).version
    except (msgspec.MsgspecError, ValueError):
        return ""
    return "" if version == _WIRE_VERSION else f" of version {version}; this everstep reads version {_WIRE_VERSION}"


def _form(meta: TensorMeta) -> str:
    return f"{meta.dtype}{list(meta.shape)}{' (python)' if meta.python else ''}"


def _fragments(
    tensors: Sequence[TensorMeta],
    sources: Sequence[Source],
    rows: Iterable[tuple[int, int, int, int, int, int]],
) -> Iterator[Fragment]:
    for tensor, source, start, stop, offset, checksum in rows:
        if not (0 <= tensor < len(tensors) and 0 <= source < len(sources)):
            raise IndexInvalid(
                f"a fragment names tensor {tensor} of {len(tensors)}, source {source} of {len(sources)}"
            )
        meta = tensors[tensor]
        yield Fragment(meta.name, meta.kind, start, stop, sources[source], offset, checksum)


def _gaps(spans: Sequence[tuple[int, int]], stop: int) -> Iterator[tuple[int, int]]:
    """What of [0, stop) the spans, sorted, leave open."""
    position = 0
    for start, end in spans:
        if start > position:
            yield position, start
        position = max(position, end)
    if position < stop:
        yield position, stop


_Held = tuple[Box, int, int]  # box, start, stop


def _gap(shape: tuple[int, ...], held: Iterable[_Held]) -> tuple[int, int] | None:
    """A flat range of a tensor that is in none of these ranges of boxes; None where there is none."""
    everything = boxes.whole(shape)
    covered = [part for box, start, stop in held for part in boxes.parts(box or everything, start, stop)]
    # Sorted: which of several gaps is named must not depend on the order of a set.
    gap = boxes.uncovered(everything, sorted(set(covered)))
    return None if gap is None else boxes.first_run(gap, shape)


def _extent(f: Fragment, meta: TensorMeta) -> tuple[int, int]:
    """(elements in the fragment's box, elements from its first to its last one in the source).

    Raises IndexInvalid when box or strides cannot be.
    """
    if f.box and not boxes.inside(f.box, meta.shape):
        raise IndexInvalid(f"fragment {f}, whose shape is {list(meta.shape)}")
    box = f.box or boxes.whole(meta.shape)
    numel = boxes.numel(box)
    if not f.strides:
        return numel, f.stop - f.start
    if len(f.strides) != len(box) or any(stride < 0 for stride in f.strides):
        raise IndexInvalid(f"fragment {f} has strides {f.strides}; its shape is {list(meta.shape)}")
    if (f.start, f.stop) != (0, numel) or f.checksum:
        raise IndexInvalid(f"fragment {f} has strides: it must be all {numel} elements, and have no checksum")
    return numel, boxes.span(box, f.strides)

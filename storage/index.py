"""The state index: which tensors a training state has, and where the bytes of each range of them are.

Owns `TensorMeta`, `Source`, `Fragment` and `StateIndex`. All are immutable values, safe in any thread, and
travel as msgpack. Coordinates are flat: elements [start, stop) of the row-major, unpadded tensor.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

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
_WIRE_VERSION: Final = 1
_LARGEST: Final = 2**63 - 1  # offsets and lengths must fit what the operating system takes (off_t)

TensorKey = tuple[str, str]  # (name, kind)


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
    """Elements [start, stop) of one tensor, and where they are.

    `offset` is the byte offset of element `start` in the source's payload (for a file: in the file).
    `checksum` is the xxh3_64 of the fragment's bytes, 0 where unknown.
    """

    name: str
    kind: str
    start: int
    stop: int
    source: Source
    offset: int
    checksum: int = 0

    @property
    def key(self) -> TensorKey:
        """(name, kind) of the fragment's tensor."""
        return (self.name, self.kind)


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    """Compact form: names and sources once, fragments as rows of numbers."""

    version: int
    step: int
    tensors: tuple[TensorMeta, ...]
    sources: tuple[Source, ...]
    rows: list[tuple[int, int, int, int, int, int]]  # tensor, source, start, stop, offset, checksum


class StateIndex(msgspec.Struct, frozen=True):
    """The tensors of a state at one step, and the fragments of them that are known."""

    step: int
    tensors: tuple[TensorMeta, ...]
    fragments: tuple[Fragment, ...]

    def metas(self) -> dict[TensorKey, TensorMeta]:
        """The tensors by (name, kind)."""
        return {meta.key: meta for meta in self.tensors}

    def missing(self) -> list[tuple[str, str, int, int]]:
        """The ranges (name, kind, start, stop) that no fragment covers, in the order of `tensors`."""
        spans: dict[TensorKey, list[tuple[int, int]]] = {meta.key: [] for meta in self.tensors}
        for fragment in self.fragments:
            spans[fragment.key].append((fragment.start, fragment.stop))
        return [
            (meta.name, meta.kind, start, stop)
            for meta in self.tensors
            for start, stop in _gaps(sorted(spans[meta.key]), meta.numel)
        ]

    def validate(self) -> None:
        """Check that every fragment lies inside a listed tensor; raises IndexInvalid naming the first that
        does not.
        """
        if self.step < 0:
            raise IndexInvalid(f"step {self.step} is negative")
        sizes: dict[TensorKey, tuple[int, int]] = {}
        for meta in self.tensors:
            if meta.key in sizes:
                raise IndexInvalid(f"{meta.name!r} ({meta.kind}) is listed twice")
            sizes[meta.key] = (meta.numel, meta.itemsize)
        for f in self.fragments:
            size = sizes.get((f.name, f.kind))
            if size is None:
                raise IndexInvalid(
                    f"fragment {f.start}:{f.stop} of {f.name!r} ({f.kind}), which is not a listed tensor"
                )
            numel, itemsize = size
            if not 0 <= f.start <= f.stop <= numel:
                raise IndexInvalid(
                    f"fragment {f.start}:{f.stop} of {f.name!r} ({f.kind}), which has {numel} elements"
                )
            if not 0 <= f.offset <= _LARGEST - (f.stop - f.start) * itemsize:
                raise IndexInvalid(f"fragment {f.start}:{f.stop} of {f.name!r} ({f.kind}) at byte offset {f.offset}")
            if not 0 <= f.checksum < 2**64:
                raise IndexInvalid(f"fragment {f.start}:{f.stop} of {f.name!r} ({f.kind}) has checksum {f.checksum}")

    def to_bytes(self) -> bytes:
        """msgpack for a message or a file; fragments must belong to listed tensors."""
        tensor_of = {meta.key: number for number, meta in enumerate(self.tensors)}
        sources: dict[Source, int] = {}
        rows = []
        for f in self.fragments:
            if (f.name, f.kind) not in tensor_of:
                raise IndexInvalid(
                    f"fragment {f.start}:{f.stop} of {f.name!r} ({f.kind}), which is not a listed tensor"
                )
            source = sources.setdefault(f.source, len(sources))
            rows.append((tensor_of[f.name, f.kind], source, f.start, f.stop, f.offset, f.checksum))
        return msgspec.msgpack.encode(_Wire(_WIRE_VERSION, self.step, self.tensors, tuple(sources), rows))

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> "StateIndex":
        """The inverse of `to_bytes`, for bytes that nobody vouches for; raises IndexInvalid."""
        try:
            wire = msgspec.msgpack.decode(data, type=_Wire)
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise IndexInvalid(f"not a state index: {error}") from error
        if wire.version != _WIRE_VERSION:
            raise IndexInvalid(f"state index of version {wire.version}; this everstep reads version {_WIRE_VERSION}")
        index = StateIndex(wire.step, wire.tensors, tuple(_fragments(wire.tensors, wire.sources, wire.rows)))
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
    for index in indices:
        for meta in index.tensors:
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


def _order(f: Fragment) -> tuple[str, str, int, int, str, str, str, int, int]:
    source = f.source
    return (f.name, f.kind, f.start, f.stop, source.kind, source.holder, source.locator, f.offset, f.checksum)


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

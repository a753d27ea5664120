"""Shards of tensors, as ranks wrote them, made into whole tensors by patterns.

Owns `Piece`, `Shard`, `Joined` and `join`. Values are immutable; functions keep no state. Bytes are read only where
something has to be compared (replicas, tied tensors) or computed (averages), in blocks of 4 MiB.
"""

import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import numpy as np
import xxhash

from everstep.storage import boxes
from everstep.storage.errors import CheckpointCorrupt, CheckpointUnsupported
from everstep.storage.formats.foreign import PARAM, file_source
from everstep.storage.formats.patterns import Patterns, Place, Rule, places
from everstep.storage.formats.saved import StoredTensor
from everstep.storage.index import ITEMSIZE_BYTES, Fragment, TensorKey, TensorMeta
from everstep.storage.stores.port import Folder

BLOCK_BYTES: Final = 4 << 20
_LARGEST_BYTES: Final = 256 << 20  # an average, or a strided replica, is held in memory as a whole
_COMPARERS: Final = 4


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Elements [start, stop) of a shard in row-major order: byte `offset` of `file` is the first one's.

    With `strides` (elements) it is the whole shard, and they say how it lies there.
    """

    start: int
    stop: int
    file: str
    offset: int
    strides: tuple[int, ...] = ()


class Shard(msgspec.Struct, frozen=True):
    """What one rank holds of a tensor: in pieces of files, or as the bytes of a small `value`.

    `tensor` and `stage` are the rank's place in its tensor-parallel group and in the pipeline.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    value: bytes | None = None
    python: bool = False
    tensor: int = 0
    stage: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def file(self) -> str:
        """A file that it is in, for messages."""
        return self.pieces[0].file if self.pieces else f"tensor rank {self.tensor} of stage {self.stage}"


class Joined(msgspec.Struct):
    """Whole tensors: what `Foreign` has, less the step. Grows while they are joined."""

    tensors: list[TensorMeta] = []
    fragments: list[Fragment] = []
    inline: dict[TensorKey, bytes] = {}
    tied: dict[str, str] = {}
    ignored: list[str] = []

    def add(self, shard: Shard) -> None:
        """A shard that is the whole tensor."""
        box = boxes.whole(shard.shape)
        meta = TensorMeta(shard.name, shard.kind, shard.dtype, shard.shape, shard.python)
        self.tensors.append(meta)
        self.fragments += _fragments(meta, shard, Place(0, box, box))
        if shard.value is not None:
            self.inline[meta.key] = shard.value


_Copies = dict[int, dict[int, Shard]]  # stage → tensor rank → shard


def join(src: Folder, shards: Sequence[Shard], patterns: Patterns, ranks: int, stages: int = 1) -> Joined:
    """The tensors that the shards of `ranks` tensor-parallel ranks and `stages` pipeline stages make.

    Raises CheckpointUnsupported where patterns do not fit or a rank lacks something, CheckpointCorrupt where what
    should be equal is not, both naming tensors and files.
    """
    shards = _renumbered(shards, patterns, stages)
    rules = patterns.matched(sorted({shard.name for shard in shards}))
    experts = _experts(shards, rules, ranks)
    groups: dict[TensorKey, _Copies] = defaultdict(lambda: defaultdict(dict))
    origin: dict[str, tuple[str, Rule]] = {}
    joined = Joined()
    for shard in shards:
        rule, name = rules[shard.name]
        if rule.form == "ignore":
            continue
        if rule.form == "experts":
            name = experts[shard.name, shard.tensor]
        elif origin.setdefault(name, (shard.name, rule))[0] != shard.name:
            raise CheckpointUnsupported(f"patterns: {origin[name][0]!r} and {shard.name!r} are both renamed {name!r}")
        held = groups[name, shard.kind][shard.stage]
        if (0 if rule.form == "experts" else shard.tensor) in held:
            raise CheckpointUnsupported(f"{name!r} ({shard.kind}) is there twice, in {shard.file}")
        held[0 if rule.form == "experts" else shard.tensor] = shard
    joined.ignored += [f"{name} (ignored by a pattern)" for name in rules if rules[name][0].form == "ignore"]
    same: list[tuple[str, Shard, Shard]] = []
    for (name, kind), copies in sorted(groups.items()):
        first = copies[min(copies)]
        source = next(iter(first.values())).name
        rule = rules[source][0]
        for stage, held in copies.items():
            if rule.form != "experts" and len(held) != ranks:
                lacking = sorted(set(range(ranks)) - set(held))
                raise CheckpointUnsupported(f"{name!r} ({kind}) is not on tensor ranks {lacking} of stage {stage}")
            same += [(name, first[rank], held[rank]) for rank in held if held is not first]
        if rule.form == "tied":
            joined.tied[name] = rule.to
            target = groups.get((rule.to, kind))
            if target is None:
                if kind == PARAM:
                    raise CheckpointUnsupported(f"patterns: {name!r} is tied to {rule.to!r}, which is not there")
                joined.ignored.append(f"{name} ({kind}: tied)")
                continue
            same += [(name, target[min(target)][rank], first[rank]) for rank in first]
            continue
        same += _add(src, joined, name, kind, rule, first, groups.get((name, PARAM)))
    for name, to in joined.tied.items():
        if to in joined.tied:
            raise CheckpointUnsupported(f"patterns: {name!r} is tied to {to!r}, which is itself tied")
    _compare(src, same)
    return joined


def stored(name: str, kind: str, value: Any, tensor: int = 0, stage: int = 0) -> Shard:
    """A shard that is one tensor of a torch.save file; raises CheckpointUnsupported where `value` is none."""
    if not isinstance(value, StoredTensor):
        raise CheckpointUnsupported(f"{name!r} ({kind}) is a {type(value).__name__}, not a tensor")
    pieces = (Piece(0, value.numel, value.file, value.offset, () if value.contiguous else value.strides),)
    return Shard(name, kind, value.dtype, value.shape, pieces if value.numel else (), None, False, tensor, stage)


def scalar(src: Folder, value: Any) -> tuple[str, bytes, bool] | None:
    """(dtype, bytes, whether a Python number) of a number or a tensor without dimensions; None for anything else."""
    if isinstance(value, StoredTensor):
        return None if value.shape else (value.dtype, read_bytes(src, value.file, value.offset, value.nbytes), False)
    if type(value) is bool:
        return "bool", bytes((value,)), True
    if type(value) is int and -(2**63) <= value < 2**63:
        return "int64", value.to_bytes(8, "little", signed=True), True
    return ("float64", struct.pack("<d", value), True) if type(value) is float else None


def content(src: Folder, shard: Shard) -> np.ndarray:
    """The shard's bytes, in row-major order."""
    nbytes = shard.numel * ITEMSIZE_BYTES[shard.dtype]
    if nbytes > _LARGEST_BYTES:
        raise CheckpointUnsupported(f"{shard.name!r} ({shard.kind}): {nbytes} bytes; at most {_LARGEST_BYTES} here")
    return np.frombuffer(b"".join(_blocks(src, shard)), np.uint8)


def _renumbered(shards: Sequence[Shard], patterns: Patterns, stages: int) -> list[Shard]:
    """With the layers' numbers in the model instead of in the stage."""
    layers = patterns.layers
    if layers is None:
        return list(shards)
    found = [(shard, layers.match.fullmatch(shard.name)) for shard in shards]
    own: list[set[int]] = [set() for _ in range(stages)]
    for shard, hit in found:
        if hit:
            own[shard.stage].add(int(hit["layer"]))
    if not any(own):
        raise CheckpointUnsupported(f"patterns: layers: match {layers.match.pattern!r} matches nothing")
    counts = layers.per_stage or tuple(len(numbers) for numbers in own)
    if len(counts) != stages or any(numbers != set(range(n)) for numbers, n in zip(own, counts, strict=True)):
        raise CheckpointUnsupported(
            f"patterns: layers: per_stage {list(counts)}, but the {stages} stages have layers "
            f"{[sorted(numbers) for numbers in own]}; each has to number its own from 0 without a gap"
        )
    return [
        shard if hit is None else msgspec.structs.replace(
            shard, name=_with_number(hit, "layer", int(hit["layer"]) + sum(counts[: shard.stage]))
        )
        for shard, hit in found
    ]  # fmt: skip


def _experts(
    shards: Sequence[Shard], rules: Mapping[str, tuple[Rule, str]], ranks: int
) -> dict[tuple[str, int], str]:
    """The name of every (expert's name on its rank, tensor rank)."""
    own: dict[Rule, list[set[int]]] = {}
    for shard in shards:
        rule, _ = rules[shard.name]
        if rule.form == "experts" and (hit := rule.match.fullmatch(shard.name)):
            own.setdefault(rule, [set() for _ in range(ranks)])[shard.tensor].add(int(hit["expert"]))
    names = {}
    for rule, numbers in own.items():
        counts = rule.per_rank or (len(numbers[0]),) * ranks
        if len(counts) != ranks or any(held != set(range(n)) for held, n in zip(numbers, counts, strict=True)):
            raise CheckpointUnsupported(
                f"patterns: {rule.match.pattern!r}: per_rank {list(counts)}, but the {ranks} ranks have experts "
                f"{[sorted(held) for held in numbers]}; each has to number its own from 0 without a gap"
            )
        for name in [name for name in rules if rules[name][0] is rule]:
            hit = rule.match.fullmatch(name)
            assert hit is not None
            for rank in range(ranks):
                number = int(hit["expert"]) + sum(counts[:rank])
                told = _with_number(hit, "expert", number)
                again = rule.match.fullmatch(told)
                names[name, rank] = told if again is None else rule.renamed(told, again)
    return names


def _with_number(hit: re.Match[str], group: str, number: int) -> str:
    first, end = hit.span(group)
    return f"{hit.string[:first]}{number}{hit.string[end:]}"


def _add(
    src: Folder,
    joined: Joined,
    name: str,
    kind: str,
    rule: Rule,
    held: dict[int, Shard],
    params: _Copies | None,
) -> list[tuple[str, Shard, Shard]]:
    """Adds one tensor; returns what has to be compared."""
    ranks = sorted(held)
    shards = [held[rank] for rank in ranks]
    if len({(shard.dtype, shard.python) for shard in shards}) > 1:
        raise CheckpointUnsupported(f"{name!r} ({kind}) is of different dtypes: {[s.dtype for s in shards]}")
    if kind != PARAM and params is not None:
        first = params[min(params)]
        if any(first[rank].shape != held[rank].shape for rank in ranks if rank in first):
            rule = Rule("replicated")
    shape, found = places(rule, name, [shard.shape for shard in shards])
    meta = TensorMeta(name, kind, shards[0].dtype, shape, shards[0].python)
    joined.tensors.append(meta)
    if rule.form == "average" and len(shards) > 1:
        joined.inline[meta.key] = _mean(src, shards)
        return []
    if shards[0].value is not None:
        joined.inline[meta.key] = shards[0].value
    for place in found:
        joined.fragments += _fragments(meta, shards[place.rank], place)
    if rule.form in ("cat", "vocabulary", "parts") and shape:
        return []
    return [(name, shards[0], shard) for shard in shards[1:]]


def _fragments(meta: TensorMeta, shard: Shard, place: Place) -> Iterator[Fragment]:
    """Where box `place.local` of a shard lies, as box `place.box` of the tensor."""
    for piece in shard.pieces:
        if piece.strides:
            yield from _boxed(meta, piece, piece.strides, 0, place.local, place)
            continue
        strides = boxes.row_major(shard.shape)
        run = boxes.one_run(place.local, shard.shape)
        if run is not None:  # however the piece cuts it, it stays a range of the box
            start, stop = max(run[0], piece.start), min(run[1], piece.stop)
            if start < stop:
                offset = piece.offset + (start - piece.start) * meta.itemsize
                yield _ranged(meta, piece.file, offset, place.box, start - run[0], stop - run[0])
            continue
        for part in boxes.parts(boxes.whole(shard.shape), piece.start, piece.stop):
            common = boxes.intersection(part, place.local)
            if common is not None:
                yield from _boxed(meta, piece, strides, piece.start, common, place)


def _boxed(
    meta: TensorMeta, piece: Piece, strides: tuple[int, ...], start: int, local: boxes.Box, place: Place
) -> Iterator[Fragment]:
    """A box of the shard, whose element `start` is the piece's first one."""
    offset = piece.offset + (boxes.position(local, strides) - start) * meta.itemsize
    box = tuple(
        (to + first - origin, extent)
        for (first, extent), (origin, _), (to, _) in zip(local, place.local, place.box, strict=True)
    )
    numel = boxes.numel(box)
    if boxes.without_gaps(box, strides):
        yield _ranged(meta, piece.file, offset, box, 0, numel)
    elif numel:
        yield Fragment(meta.name, meta.kind, 0, numel, file_source(piece.file), offset, 0, box, strides)


def _ranged(meta: TensorMeta, file: str, offset: int, box: boxes.Box, start: int, stop: int) -> Fragment:
    """Elements [start, stop) of a box, one behind the other in the file; flat where they are one run."""
    run = boxes.one_run(box, meta.shape)
    if run is not None:
        return Fragment(meta.name, meta.kind, run[0] + start, run[0] + stop, file_source(file), offset)
    fragment = Fragment(meta.name, meta.kind, start, stop, file_source(file), offset, 0, box)
    return fragment.as_run(meta.shape) or fragment


def _compare(src: Folder, same: Sequence[tuple[str, Shard, Shard]]) -> None:
    """Raises CheckpointCorrupt naming the first pair whose bytes differ; every shard is read once."""
    shards = list({id(shard): shard for _, *pair in same for shard in pair}.values())
    with ThreadPoolExecutor(_COMPARERS) as pool:
        found = pool.map(lambda shard: _digest(src, shard), shards)
        digests = {id(shard): digest for shard, digest in zip(shards, found, strict=True)}
    for name, a, b in same:
        if a.shape != b.shape or a.dtype != b.dtype or digests[id(a)] != digests[id(b)]:
            raise CheckpointCorrupt(
                b.file,
                f"differs from {a.file}, and should be equal: it is replicated, tied, or on several stages; "
                "files of different steps, or a pattern that does not fit",
                name, a.kind, 0, b.numel,
            )  # fmt: skip


def _digest(src: Folder, shard: Shard) -> int:
    digest = xxhash.xxh3_64()
    for block in _blocks(src, shard):
        digest.update(block)
    return digest.intdigest()


def _blocks(src: Folder, shard: Shard) -> Iterator[bytes]:
    """The shard's bytes in row-major order."""
    if shard.value is not None:
        yield shard.value
        return
    size = ITEMSIZE_BYTES[shard.dtype]
    for piece in shard.pieces:
        nbytes = (piece.stop - piece.start) * size
        if piece.strides and not boxes.without_gaps(boxes.whole(shard.shape), piece.strides):
            span = boxes.span(boxes.whole(shard.shape), piece.strides) * size
            if span > _LARGEST_BYTES:
                raise CheckpointUnsupported(f"{shard.name!r}: {span} strided bytes; at most {_LARGEST_BYTES} here")
            memory = np.frombuffer(read_bytes(src, piece.file, piece.offset, span), np.dtype((np.void, size)))
            steps = tuple(stride * size for stride in piece.strides)
            yield np.lib.stride_tricks.as_strided(memory, shard.shape, steps).tobytes()
            continue
        for first in range(0, nbytes, BLOCK_BYTES):
            yield read_bytes(src, piece.file, piece.offset + first, min(BLOCK_BYTES, nbytes - first))


def read_bytes(src: Folder, file: str, offset: int, nbytes: int) -> bytes:
    """Bytes of a file of the folder; raises CheckpointCorrupt where it ends before."""
    data = bytearray(nbytes)
    where = src.child(file)
    if nbytes and where.store.read_into(where.path, offset, memoryview(data)) != nbytes:
        raise CheckpointCorrupt(file, f"ends before byte {offset + nbytes}")
    return bytes(data)


def as_float64(data: bytes | np.ndarray, dtype: str) -> np.ndarray:
    """Elements of a float dtype as float64; raises CheckpointUnsupported for any other."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype not in ("float16", "float32", "float64"):
        raise CheckpointUnsupported(f"no arithmetic on {dtype}; only on floats of 16 bits and more")
    return np.frombuffer(data, dtype).astype(np.float64)


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """Floats as the bytes of a dtype, to nearest, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype).tobytes()
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        # Towards zero, with the last bit set where something is lost: then the second rounding is the only one.
        above = np.abs(single.astype(np.float64)) > np.abs(values)
    bits = single.view(np.uint32) - above.astype(np.uint32)
    bits |= (single.astype(np.float64) != values).astype(np.uint32)
    up = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding up the payload of a NaN could make it an infinity.
    return np.where(np.isnan(values), np.uint16(0x7FC0), up).tobytes()


def _mean(src: Folder, shards: Sequence[Shard]) -> bytes:
    dtype = shards[0].dtype
    try:
        total = sum(as_float64(content(src, shard), dtype) for shard in shards)
    except CheckpointUnsupported as error:
        raise CheckpointUnsupported(f"{shards[0].name!r} as average: {error}") from error
    return rounded(np.asarray(total) / len(shards), dtype)

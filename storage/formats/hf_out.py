"""Writes a checkpoint as Hugging Face's safetensors: one file, or shards with `model.safetensors.index.json`.

Owns the layout of the shards. Tensors are streamed; torch is imported only to cast. Functions keep no state.
"""

import itertools
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import CheckpointUnsupported
from everstep.storage.formats.foreign import BUFFER, PARAM
from everstep.storage.formats.stream import ReadAhead, Sink, Targets
from everstep.storage.index import TensorMeta
from everstep.storage.rank_file import SAFETENSORS_DTYPES
from everstep.storage.stores.port import Folder

FLOATING: Final = ("float64", "float32", "float16", "bfloat16")
CASTS: Final = ("float32", "float16", "bfloat16")
_LENGTH: Final = struct.Struct("<Q")
_HEADER_LIMIT_BYTES: Final = 100_000_000
_ALIGN_BYTES: Final = 64
# torch's grain: up to that many elements it works in the calling thread, and waits for no others.
_CAST_ELEMENTS: Final = 1 << 15


def write(
    checkpoint: Checkpoint,
    dst: Folder,
    *,
    shard_bytes: int = 5 << 30,
    dtype: str | None = None,
    kinds: Sequence[str] = (PARAM, BUFFER),
    threads: int = 2,
    memory_bytes: int = 128 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the tensors of these `kinds` to `dst`, in shards of `shard_bytes` where no tensor is larger.

    Names are unchanged; other kinds than parameters and buffers are called NAME|KIND, which our own import takes
    apart. `dtype`: "float32", "float16" or "bfloat16" to cast floating-point parameters and buffers to. The index, or
    the only file, comes last. `progress(done, total)` hears of bytes written.

    Raises CheckpointUnsupported for an option that cannot be, or a value that `dtype` cannot hold;
    CheckpointCorrupt, StoreError.
    """
    if dtype is not None and dtype not in CASTS:
        raise CheckpointUnsupported(f"dtype {dtype!r}: floating-point tensors can be cast to {', '.join(CASTS)}")
    if shard_bytes < 1:
        raise CheckpointUnsupported(f"shard_bytes {shard_bytes}: at least 1")
    tensors = _chosen(checkpoint, kinds)
    written = {meta.key: _as_written(meta, dtype) for meta in tensors}
    shards = list(_shards(tensors, shard_bytes, lambda meta: written[meta.key].nbytes))
    total = sum(meta.nbytes for meta in written.values())
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress is not None:
            progress(done, total)

    def read(targets: Targets) -> None:
        checkpoint.read_copies(targets, threads=threads, memory_bytes=memory_bytes // 4)

    order = [meta for shard in shards for meta in shard]
    weight_map: dict[str, str] = {}
    with ReadAhead(checkpoint.index, order, read, memory_bytes=memory_bytes // 2) as ahead:
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            head = _header([written[meta.key] for meta in shard])
            nbytes = len(head) + sum(written[meta.key].nbytes for meta in shard)
            with Sink(dst, name, nbytes, threads=threads, memory_bytes=memory_bytes // 4, on_bytes=more) as sink:
                sink.write(head)
                for meta in shard:
                    target = written[meta.key]
                    if target.dtype == meta.dtype:
                        sink.fill(meta.nbytes, ahead.take)
                    else:
                        _cast(meta, target.dtype, ahead, sink)
            weight_map |= {file_key(meta): name for meta in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        place = dst.child("model.safetensors.index.json")
        dst.store.put_new(place.path, json.dumps(index, indent=2).encode() + b"\n")


def file_key(meta: TensorMeta) -> str:
    """What a tensor is called in the files."""
    return meta.name if meta.kind in (PARAM, BUFFER) else f"{meta.name}|{meta.kind}"


def _chosen(checkpoint: Checkpoint, kinds: Sequence[str]) -> list[TensorMeta]:
    """The tensors to write, by name; raises CheckpointUnsupported where there are none, or names are not unique."""
    chosen = sorted((meta for meta in checkpoint.index.tensors if meta.kind in kinds), key=file_key)
    if not chosen:
        known = ", ".join(sorted({meta.kind for meta in checkpoint.index.tensors}))
        raise CheckpointUnsupported(f"{checkpoint.url} has no tensors of kind {', '.join(kinds)}; it has {known}")
    for a, b in itertools.pairwise(chosen):
        if file_key(a) == file_key(b):
            raise CheckpointUnsupported(f"{a.name!r} is there as {a.kind} and as {b.kind}; choose one by kinds=")
    return chosen


def _as_written(meta: TensorMeta, dtype: str | None) -> TensorMeta:
    """The form that it has in the files."""
    if dtype is None or meta.dtype not in FLOATING or meta.kind not in (PARAM, BUFFER):
        return meta
    return TensorMeta(meta.name, meta.kind, dtype, meta.shape)


def _shards(
    tensors: Sequence[TensorMeta], limit: int, size: Callable[[TensorMeta], int]
) -> Iterator[list[TensorMeta]]:
    """Whole tensors in the given order; in a shard the widest elements first, so that each is aligned."""
    shard: list[TensorMeta] = []
    used = 0
    for meta in tensors:
        if shard and used + size(meta) > limit:
            yield _aligned(shard, size)
            shard, used = [], 0
        shard.append(meta)
        used += size(meta)
    yield _aligned(shard, size)


def _aligned(shard: list[TensorMeta], size: Callable[[TensorMeta], int]) -> list[TensorMeta]:
    return sorted(shard, key=lambda meta: -(size(meta) // meta.numel if meta.numel else 0))


def _header(metas: Sequence[TensorMeta]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for meta in metas:
        end = position + meta.nbytes
        entries[file_key(meta)] = {
            "dtype": SAFETENSORS_DTYPES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGN_BYTES)
    if len(text) > _HEADER_LIMIT_BYTES:
        raise CheckpointUnsupported(f"{len(metas)} tensors make a header of {len(text)} bytes; take smaller shards")
    return _LENGTH.pack(len(text)) + text


def _cast(meta: TensorMeta, dtype: str, ahead: ReadAhead, sink: Sink) -> None:
    """Stream a tensor in another type; a finite value that becomes infinite is refused."""
    import torch

    source: torch.dtype = getattr(torch, meta.dtype)
    target: torch.dtype = getattr(torch, dtype)
    buffer = bytearray(_CAST_ELEMENTS * meta.itemsize)
    for start in range(0, meta.numel, _CAST_ELEMENTS):
        count = min(_CAST_ELEMENTS, meta.numel - start)
        piece = memoryview(buffer)[: count * meta.itemsize]
        ahead.take(piece)
        values = torch.frombuffer(piece, dtype=source)
        cast = values.to(target)
        if not bool(torch.isfinite(cast).all()) and bool((torch.isinf(cast) & ~torch.isinf(values)).any()):
            largest = float(values[torch.isfinite(values)].abs().max())
            raise CheckpointUnsupported(
                f"{meta.name!r} ({meta.kind}) has values up to {largest:.6g}, too large for {dtype}: choose another"
            )
        sink.write(cast.view(torch.uint8).numpy().data)

"""Writes a checkpoint as `torch.distributed.checkpoint` does, so that stock `dcp.load` reads it.

Owns the layout of the .distcp files. Tensors are streamed; torch is imported for the classes of `.metadata` alone.
Functions keep no state.

What a checkpoint of ours does not know are the settings of the optimizer (`param_groups`: learning rate, betas, …),
because a job's file has them. `dcp.load` asks for the ones that the state dict to load has: give them by
`param_groups=`, or load with `DefaultLoadPlanner(allow_partial_load=True)` and keep those of the optimizer.
"""

import dataclasses
import io
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from everstep.storage import boxes
from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import CheckpointUnsupported
from everstep.storage.formats.archive import LARGEST_BYTES, Archive, archive
from everstep.storage.formats.foreign import BUFFER, PARAM
from everstep.storage.formats.stream import ReadAhead, Sink, Targets
from everstep.storage.index import Box, TensorMeta
from everstep.storage.stores.port import Folder

_VERSION: Final = "1.0.0"
_PYTHON: Final[dict[str, Callable[[bytes], bool | int | float]]] = {
    "bool": lambda data: bool(data[0]),
    "int64": lambda data: int(struct.unpack("<q", data)[0]),
    "float64": lambda data: float(struct.unpack("<d", data)[0]),
    "float32": lambda data: float(struct.unpack("<f", data)[0]),
}


class _Chunk(NamedTuple):
    meta: TensorMeta
    key: str
    box: Box
    archive: Archive


def write(
    checkpoint: Checkpoint,
    dst: Folder,
    *,
    model_prefix: str = "model.",
    optim_prefix: str = "optim.",
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    kinds: Sequence[str] | None = None,
    chunk_bytes: int = 1 << 30,
    file_bytes: int = 5 << 30,
    threads: int = 2,
    memory_bytes: int = 128 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write every tensor (of these `kinds`, where given) to `dst`; `.metadata` comes last.

    Keys: MODEL_PREFIX + NAME for parameters and buffers, OPTIM_PREFIX + "state.NAME.KIND" for the rest, as a state
    dict {"model": get_model_state_dict(…), "optim": get_optimizer_state_dict(…)} has them. `param_groups`: the
    optimizer's groups, plain values; "params" (names) is added to a single group that has none. A tensor is one chunk
    up to `chunk_bytes`, and a file has `file_bytes` where no chunk is larger. `progress(done, total)`: bytes written.

    Raises CheckpointUnsupported, CheckpointCorrupt, StoreError.
    """
    if not 1 <= chunk_bytes <= LARGEST_BYTES or file_bytes < 1:
        raise CheckpointUnsupported(
            f"chunk_bytes {chunk_bytes}: 1 to {LARGEST_BYTES}; file_bytes {file_bytes}: from 1"
        )
    metas = [m for m in checkpoint.index.tensors if kinds is None or m.kind in kinds]
    if not metas:
        known = ", ".join(sorted({m.kind for m in checkpoint.index.tensors}))
        raise CheckpointUnsupported(
            f"{checkpoint.url} has no tensors of kind {', '.join(kinds or ())}; it has {known}"
        )
    keys = {m.key: _key(m, model_prefix, optim_prefix) for m in metas}
    if len(set(keys.values())) < len(keys):
        raise CheckpointUnsupported("model_prefix and optim_prefix make two tensors' keys the same; choose others")
    tensors = [m for m in metas if not m.python]
    chunks = [chunk for m in tensors for chunk in _chunks(m, keys[m.key], chunk_bytes)]
    values = [(keys[m.key], _path(m, model_prefix, optim_prefix), _value(checkpoint, m)) for m in metas if m.python]
    values += _settings(param_groups, optim_prefix, metas)
    done, total = 0, sum(chunk.archive.total for chunk in chunks)

    def more(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    def read(targets: Targets) -> None:
        checkpoint.read_copies(targets, threads=threads, memory_bytes=memory_bytes // 4)

    table = _Table()
    for m in tensors:
        table.tensor(m, keys[m.key], _path(m, model_prefix, optim_prefix))
    files = list(_files(chunks, file_bytes))
    with ReadAhead(checkpoint.index, tensors, read, memory_bytes=memory_bytes // 2) as ahead:
        for number, file in enumerate(files):
            name = f"__0_{number}.distcp"
            total_bytes = sum(chunk.archive.total for chunk in file)
            with Sink(dst, name, total_bytes, threads=threads, memory_bytes=memory_bytes // 4, on_bytes=more) as sink:
                for chunk in file:
                    table.chunk(chunk, name, sink.position)
                    _stream(chunk.archive, ahead, sink)
    if values:
        name = f"__0_{len(files)}.distcp"
        parts = [_saved(value) for _, _, value in values]
        data = b"".join(parts)
        position = 0
        for (key, path, _), part in zip(values, parts, strict=True):
            table.value(key, path, name, position, len(part))
            position += len(part)
        with Sink(dst, name, len(data), threads=threads, memory_bytes=memory_bytes // 4) as sink:
            sink.write(data)
    dst.store.put_new(dst.child(".metadata").path, table.pickled())


def _key(meta: TensorMeta, model_prefix: str, optim_prefix: str) -> str:
    if meta.kind in (PARAM, BUFFER):
        return f"{model_prefix}{meta.name}"
    return f"{optim_prefix}state.{meta.name}.{meta.kind}"


def _path(meta: TensorMeta, model_prefix: str, optim_prefix: str) -> tuple[str | int, ...]:
    """The key's place in the nested state dict, which DCP keeps so that it can be built again."""
    if meta.kind in (PARAM, BUFFER):
        return (*_parts(model_prefix), meta.name)
    return (*_parts(optim_prefix), "state", meta.name, meta.kind)


def _parts(prefix: str) -> list[str]:
    return [part for part in prefix.split(".") if part]


def _chunks(meta: TensorMeta, key: str, limit: int) -> Iterator[_Chunk]:
    """The tensor in order, cut into runs of at most `limit` bytes where it has more."""
    for box in _runs(boxes.whole(meta.shape), max(1, limit // meta.itemsize)):
        yield _Chunk(meta, key, box, archive(meta.dtype, boxes.extents(box)))


def _runs(box: Box, most: int) -> Iterator[Box]:
    if boxes.numel(box) <= most:
        yield box
        return
    cut = next(d for d, (_, extent) in enumerate(box) if extent > 1)
    first, extent = box[cut]
    rows = max(1, most // boxes.numel(box[cut + 1 :]))
    for start in range(0, extent, rows):
        yield from _runs((*box[:cut], (first + start, min(rows, extent - start)), *box[cut + 1 :]), most)


def _files(chunks: Sequence[_Chunk], limit: int) -> Iterator[list[_Chunk]]:
    file: list[_Chunk] = []
    used = 0
    for chunk in chunks:
        if file and used + chunk.archive.total > limit:
            yield file
            file, used = [], 0
        file.append(chunk)
        used += chunk.archive.total
    if file:
        yield file


def _stream(whole: Archive, ahead: ReadAhead, sink: Sink) -> None:
    checksum = 0

    def take(out: memoryview) -> None:
        nonlocal checksum
        ahead.take(out)
        checksum = zlib.crc32(out, checksum)

    sink.write(whole.head)
    sink.fill(whole.nbytes, take)
    sink.write(whole.tail(checksum))


def _value(checkpoint: Checkpoint, meta: TensorMeta) -> bool | int | float:
    _, data = checkpoint.read_bytes(meta.name, meta.kind)
    return _PYTHON[meta.dtype](bytes(data))


def _settings(
    groups: Sequence[Mapping[str, Any]] | None, optim_prefix: str, metas: Sequence[TensorMeta]
) -> list[tuple[str, tuple[str | int, ...], Any]]:
    """The entries of param_groups, one a setting, as DCP flattens them."""
    found: list[tuple[str, tuple[str | int, ...], Any]] = []
    for number, group in enumerate(groups or ()):
        settings = dict(group)
        if "params" not in settings:
            if groups is None or len(groups) > 1:
                raise CheckpointUnsupported(
                    f"param_groups[{number}]: of several groups each needs its params (names)"
                )
            settings["params"] = sorted({m.name for m in metas if m.kind not in (PARAM, BUFFER)})
        for name, value in settings.items():
            if not _plain(value):
                raise CheckpointUnsupported(f"param_groups[{number}].{name}: {value!r:.80} is no plain value")
            path: tuple[str | int, ...] = (*_parts(optim_prefix), "param_groups", number, name)
            found.append((f"{optim_prefix}param_groups.{number}.{name}", path, value))
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _saved(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Table:
    """What `.metadata` says, in torch's own classes."""

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}
        self._paths: dict[str, tuple[str | int, ...]] = {}
        self._places: dict[Any, Any] = {}

    def tensor(self, meta: TensorMeta, key: str, path: tuple[str | int, ...]) -> None:
        import torch
        from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

        properties = TensorProperties(dtype=getattr(torch, meta.dtype))
        self._entries[key] = TensorStorageMetadata(properties, torch.Size(meta.shape), [])
        self._paths[key] = path

    def chunk(self, chunk: _Chunk, file: str, at: int) -> None:
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        offsets = torch.Size([first for first, _ in chunk.box])
        sizes = torch.Size(boxes.extents(chunk.box))
        known = self._entries[chunk.key].chunks
        known.append(ChunkStorageMetadata(offsets, sizes))
        self._place(chunk.key, offsets, len(known) - 1, file, at, chunk.archive.total)

    def value(self, key: str, path: tuple[str | int, ...], file: str, at: int, length: int) -> None:
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        self._entries[key] = BytesStorageMetadata()
        self._paths[key] = path
        self._place(key, None, None, file, at, length)

    def pickled(self) -> bytes:
        from torch.distributed.checkpoint.metadata import Metadata

        known = {field.name for field in dataclasses.fields(Metadata)}
        more: dict[str, Any] = {"version": _VERSION} if "version" in known else {}
        metadata = Metadata(
            state_dict_metadata=self._entries, planner_data=self._paths, storage_data=self._places, **more
        )
        return pickle.dumps(metadata)

    def _place(self, key: str, offsets: Any, index: int | None, file: str, at: int, length: int) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        self._places[MetadataIndex(key, offsets, index)] = _StorageInfo(file, at, length)

"""Checkpoints of `torch.distributed.checkpoint` (DCP), read without torch.

Owns the reading of `.metadata` and of where each chunk's bytes lie in its .distcp file: every chunk is a torch.save
archive of its own there, and a fragment points at the bytes in it. Functions keep no state; `read` uses threads of
its own and returns when they have ended.

Keys become (name, kind) by these rules, the first that fits:

    a rule of `names` gave "NAME|KIND"             that
    [app.]optim[izer][.N].state.NAME.KIND          an optimizer's state
    optim[izer].NAME.KIND, NAME a parameter        the same, as older flattened forms have it
    anything else that is a tensor                 NAME without model., module., app. in front, and without what
                                                   wrappers put in between; its kind is guessed (`guessed_kind`)

An optimizer's param_groups, and values that are no tensors, are left out and listed in `ignored`.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsupported,
    IndexInvalid,
    StoreNotFound,
)
from everstep.storage.formats.foreign import Foreign, Renames, fragment_at, guessed_kind
from everstep.storage.formats.saved import StoredTensor, read_plain, read_saved
from everstep.storage.formats.unpickle import StandIn, stand_in
from everstep.storage.index import Fragment, StateIndex, TensorKey, TensorMeta
from everstep.storage.stores.port import Folder

METADATA: Final = ".metadata"
_NEW, _OLD = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.checkpoint.metadata"
_SHARDED: Final = "torch.distributed._shard.sharded_tensor.metadata"
_CLASSES: Final = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_ALLOWED: Final[dict[str, Any]] = {
    name: stand_in(name)
    for name in (
        *(f"{module}.{cls}" for module in (_NEW, _OLD) for cls in _CLASSES),
        f"{_SHARDED}.TensorProperties",
        f"{_SHARDED}.MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *(f"{module}.{cls}Path" for module in ("pathlib", "pathlib._local") for cls in ("Posix", "Windows")),
        *(f"{module}.Pure{cls}Path" for module in ("pathlib", "pathlib._local") for cls in ("Posix", "Windows")),
    )
}
_STATE: Final = re.compile(r"(?:app\.)?(?:optim|optimizer)(?:\.\d+)?\.state\.(.+)\.([^.|]+)")
_FLAT: Final = re.compile(r"(?:app\.)?(?:optim|optimizer)\.(.+)\.([^.|]+)")
_GROUPS: Final = re.compile(r"(?:app\.)?(?:optim|optimizer)(?:\.\d+)?\.param_groups(?:\..*)?")
_FRONT: Final = re.compile(r"^(?:(?:app|model|module)\.)+")
_WRAPPER: Final = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_STEPS: Final = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}
_STEP_LIMIT: Final = 2**53


class _Chunk(NamedTuple):
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: str
    at: int
    length: int


class _Entry(NamedTuple):
    """One key of the checkpoint: dtype "" and no shape for what is no tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


def read(src: Folder, *, names: Sequence[tuple[str, str]] = (), step: int | None = None, threads: int = 8) -> Foreign:
    """The state in a DCP folder.

    `names`: (regular expression, replacement) pairs, applied to each key one after the other (`re.sub`) before the
    rules above; "NAME|KIND" as a result is final. `step` overrides the one that the optimizer's states give.
    Raises CheckpointNotFound, CheckpointCorrupt, CheckpointUnsupported (naming what is refused), StoreError.
    """
    entries = list(_entries(src))
    _check_files(src, entries)
    placed, ignored = _placed(src, entries, names)
    notes: list[str] = []
    with ThreadPoolExecutor(max(1, threads), "everstep-dcp") as pool:
        located = list(pool.map(lambda chunk: _located(src, chunk), [c for e in placed.values() for c in e.chunks]))
    metas: list[TensorMeta] = []
    fragments: list[Fragment] = []
    inline: dict[TensorKey, bytes] = {}
    position = 0
    for (name, kind), entry in placed.items():
        found = located[position : position + len(entry.chunks)]
        position += len(entry.chunks)
        if entry.dtype:
            metas.append(_meta(src, entry.key, TensorMeta, name, kind, entry.dtype, entry.shape))
            fragments += [_fragment(src, name, kind, entry, c, t) for c, t in zip(entry.chunks, found, strict=True)]
            continue
        value = found[0]
        if isinstance(value, StoredTensor):
            metas.append(_meta(src, entry.key, TensorMeta, name, kind, value.dtype, value.shape))
            fragments.append(fragment_at(name, kind, value.shape, value.file, value.offset, strides=value.strides))
        elif isinstance(value, bool | int | float) and _packed(value) is not None:
            dtype, data = _packed(value) or ("", b"")
            metas.append(TensorMeta(name, kind, dtype, (), python=True))
            inline[name, kind] = data
        else:
            ignored.append(f"{entry.key} ({_reason(value)})")
    index = StateIndex(0, tuple(metas), tuple(fragments))
    index.validate()
    if step is None:
        step, note = _step(src, index, inline)
        notes += note
    return Foreign(StateIndex(step, index.tensors, index.fragments), tuple(ignored), {}, inline, tuple(notes))


def _entries(src: Folder) -> Iterator[_Entry]:
    """What `.metadata` lists, checked for form."""
    where = src.child(METADATA).url
    try:
        metadata = read_plain(src, METADATA, allow=_ALLOWED)
    except StoreNotFound:
        if any(entry.name == f"__0{METADATA}" for entry in src.store.entries(src.path)):
            raise CheckpointUnsupported(
                f"{src}: one metadata file a rank; save with use_collectives=True (the default)"
            ) from None
        raise CheckpointNotFound(f"{src}: no {METADATA}, so no DCP checkpoint: a save that was cut off") from None
    try:
        fields = metadata.fields()
        places = {_place_key(index): info for index, info in fields["storage_data"].items()}
        for key, entry in fields["state_dict_metadata"].items():
            if not isinstance(key, str) or not isinstance(entry, StandIn):
                raise ValueError("a key that is none")
            if entry.qualified.endswith(".BytesStorageMetadata"):
                place = places.get((key, ()))
                yield _Entry(key, "", (), (_chunk(src, key, (), (), place),) if place is not None else ())
                continue
            tensor = entry.fields()
            properties = tensor["properties"]
            dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.fields()["dtype"]
            boxes = [(c.fields()["offsets"], c.fields()["sizes"]) for c in tensor["chunks"]]
            chunks = [_chunk(src, key, offsets, sizes, places.get((key, offsets))) for offsets, sizes in boxes]
            yield _Entry(key, dtype.name, tensor["size"], tuple(chunks))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointCorrupt(where, f"its entries are not those of a DCP checkpoint: {error!r}") from error


def _place_key(index: Any) -> tuple[str, tuple[int, ...]]:
    fields = index.fields()
    return fields["fqn"], fields.get("offset") or ()


def _chunk(src: Folder, key: str, offsets: Any, sizes: Any, info: Any) -> _Chunk:
    where = src.child(METADATA).url
    if info is None:
        raise CheckpointCorrupt(where, f"it does not say where the chunk of {key!r} at {offsets} is")
    fields = info.fields()
    if fields.get("transform_descriptors"):
        raise CheckpointUnsupported(f"{src}: {key!r} was written through an extension (compression); save it without")
    path, at, length = fields["relative_path"], fields["offset"], fields["length"]
    if type(path) is not str or not {".", "..", ""}.isdisjoint(path.split("/")):
        raise CheckpointCorrupt(where, f"{key!r} lies in {path!r:.200}, which is no file of the folder")
    if type(at) is not int or type(length) is not int or at < 0 or length < 0:
        raise ValueError(f"{key!r} has no place")
    return _Chunk(key, tuple(offsets), tuple(sizes), path, at, length)


def _check_files(src: Folder, entries: Iterable[_Entry]) -> None:
    """Every file is there and long enough."""
    ends: dict[str, _Chunk] = {}
    for entry in entries:
        for chunk in entry.chunks:
            known = ends.get(chunk.path)
            if known is None or known.at + known.length < chunk.at + chunk.length:
                ends[chunk.path] = chunk
    for path, last in sorted(ends.items()):
        where = src.child(path)
        try:
            size = where.store.size(where.path)
        except StoreNotFound:
            raise CheckpointCorrupt(where.url, f"missing; it has {last.key!r} and maybe more") from None
        if size < last.at + last.length:
            reason = f"{size} bytes; {last.key!r} ends at byte {last.at + last.length}"
            raise CheckpointCorrupt(where.url, reason)


def _placed(
    src: Folder, entries: Sequence[_Entry], names: Sequence[tuple[str, str]]
) -> tuple[dict[TensorKey, _Entry], list[str]]:
    """What is taken, by (name, kind), and the keys of what is not."""
    rename = Renames(names)
    renamed = {entry.key: rename(entry.key) for entry in entries}
    rename.check_used()
    parameters = {_name(text) for key, text in renamed.items() if not _STATE.fullmatch(text)}
    placed: dict[TensorKey, _Entry] = {}
    ignored: list[str] = []
    for entry in entries:
        key = _key(renamed[entry.key], entry, parameters)
        if isinstance(key, str):
            ignored.append(f"{entry.key} ({key})")
        elif key in placed:
            raise CheckpointUnsupported(
                f"{src}: {placed[key].key!r} and {entry.key!r} are both {key[0]!r} ({key[1]}); rename one by names="
            )
        elif entry.chunks or entry.dtype:
            placed[key] = entry
        else:
            ignored.append(f"{entry.key} (without bytes)")
    return placed, ignored


def _key(text: str, entry: _Entry, parameters: set[str]) -> TensorKey | str:
    """(name, kind), or why it is not taken."""
    name, bar, kind = text.rpartition("|")
    if bar:
        return (name, kind) if name and kind else "the rule gives no name or no kind"
    if _GROUPS.fullmatch(text):
        return "a setting of the optimizer"
    match = _STATE.fullmatch(text)
    if match is None:
        flat = _FLAT.fullmatch(text)
        match = flat if flat is not None and _name(flat[1]) in parameters else None
    if match is not None:
        name = _name(match[1])
        return (name, match[2]) if name in parameters else f"state of {name!r}, which is no tensor of the model"
    if not entry.dtype:
        return "no tensor"
    name = _name(text)
    return name, guessed_kind(name, entry.dtype)


def _name(text: str) -> str:
    return _FRONT.sub("", _WRAPPER.sub("", text)) or text


def _located(src: Folder, chunk: _Chunk) -> Any:
    """The chunk's tensor (or value); an error of a value is returned, one of a tensor raised."""
    try:
        return read_saved(src, chunk.path, offset=chunk.at, length=chunk.length)
    except CheckpointUnsupported as error:
        return error


def _fragment(src: Folder, name: str, kind: str, entry: _Entry, chunk: _Chunk, tensor: Any) -> Fragment:
    if isinstance(tensor, CheckpointError):
        raise tensor
    where = f"{src.child(chunk.path).url} at byte {chunk.at}"
    if not isinstance(tensor, StoredTensor):
        raise CheckpointCorrupt(where, f"a {type(tensor).__name__} instead of a tensor of {entry.key!r}")
    if (tensor.dtype, tensor.shape) != (entry.dtype, chunk.sizes):
        raise CheckpointCorrupt(
            where, f"{tensor.dtype}{list(tensor.shape)} of {entry.key!r} instead of {entry.dtype}{list(chunk.sizes)}"
        )
    return fragment_at(
        name, kind, entry.shape, tensor.file, tensor.offset, first=chunk.offsets, extent=chunk.sizes,
        strides=tensor.strides,
    )  # fmt: skip


def _meta(src: Folder, key: str, make: type[TensorMeta], *args: Any) -> TensorMeta:
    try:
        return make(*args)
    except IndexInvalid as error:
        raise CheckpointUnsupported(f"{src}: {key!r}: {error}") from error


def _packed(value: bool | int | float) -> tuple[str, bytes] | None:
    """A Python number as the 0-dim tensor that stands for it; None for one that does not fit."""
    if isinstance(value, bool):
        return "bool", bytes((value,))
    if isinstance(value, int):
        return ("int64", struct.pack("<q", value)) if -(2**63) <= value < 2**63 else None
    return "float64", struct.pack("<d", value)


def _reason(value: Any) -> str:
    if isinstance(value, CheckpointUnsupported):
        return "holds what is not read"
    return f"a {type(value).__name__}, no tensor"


def _step(src: Folder, index: StateIndex, inline: dict[TensorKey, bytes]) -> tuple[int, list[str]]:
    """The training step that the optimizer's states stand at, and what is to be said about it."""
    metas = index.metas()
    values: set[int] = set()
    for f in index.fragments:
        form = _STEPS.get(metas[f.key].dtype)
        if f.kind == "step" and form is not None and metas[f.key].numel == 1:
            scalar = bytearray(struct.calcsize(form))
            where = src.child(f.source.locator)
            if where.store.read_into(where.path, f.offset, memoryview(scalar)) == len(scalar):
                values.update(_whole(struct.unpack(form, scalar)[0]))
    for (name, kind), data in inline.items():
        form = _STEPS.get(metas[name, kind].dtype)
        if kind == "step" and form is not None:
            values.update(_whole(struct.unpack(form, data)[0]))
    if not values:
        return 0, ["no training step is known: step 0 is assumed; give step= to set it"]
    if len(values) > 1:
        seen = ", ".join(map(str, sorted(values)[:8]))
        return max(values), [f"the optimizer's states stand at different steps ({seen}); the highest is taken"]
    return values.pop(), []


def _whole(value: float) -> list[int]:
    return [int(value)] if 0 <= value < _STEP_LIMIT else []

"""Safetensors as Hugging Face lays them out: one file, a folder with an index, a folder of files without one.

Owns the reading of their headers and of `*.safetensors.index.json`. A header says where each tensor's bytes are,
and so fragments point at them. As strict as the safetensors library: no overlaps, no gaps, nothing behind the last
tensor, at most 10^8 bytes of header. Functions keep no state; `read` uses threads of its own.
"""

import math
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    CheckpointUnsupported,
    IndexInvalid,
    StoreNotFound,
)
from everstep.storage.formats.foreign import Foreign, Renames, file_source, guessed_kind
from everstep.storage.index import Fragment, StateIndex, TensorKey, TensorMeta
from everstep.storage.rank_file import SAFETENSORS_DTYPES
from everstep.storage.stores.port import Folder

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
_HEADER_LIMIT_BYTES: Final = 100_000_000
_LENGTH: Final = struct.Struct("<Q")
_DTYPES: Final = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


_Placed = dict[str, tuple[str, tuple[int, ...], int]]  # name → dtype, shape, byte offset in the file


def read(
    src: Folder,
    *,
    file: str | None = None,
    names: Sequence[tuple[str, str]] = (),
    step: int | None = None,
    threads: int = 8,
) -> Foreign:
    """The tensors of a folder's safetensors, or of its one `file`.

    A name "NAME|KIND", as our own export writes optimizer states, is taken apart; of other names the kind is guessed
    (`guessed_kind`). `names`: (regular expression, replacement) pairs, applied first. Raises CheckpointNotFound,
    CheckpointCorrupt, CheckpointUnsupported, StoreError.
    """
    weight_map, index_name = (None, "") if file is not None else _weight_map(src)
    if file is not None:
        files = [file]
    elif weight_map is not None:
        files = sorted(set(weight_map.values()))
        _check_listed(src, index_name, files)
    else:
        files = sorted(e.name for e in src.store.entries(src.path) if not e.is_folder and e.name.endswith(SUFFIX))
    if not files:
        raise CheckpointNotFound(f"{src}: no *{SUFFIX} files")
    with ThreadPoolExecutor(max(1, threads), "everstep-safetensors") as pool:
        headers = dict(zip(files, pool.map(lambda name: header(src, name), files), strict=True))
    owner, ignored = _owners(src, headers, weight_map, index_name)
    rename = Renames(names)
    placed: dict[TensorKey, str] = {}
    metas, fragments = [], []
    for name, path in sorted(owner.items()):
        dtype, shape, offset = headers[path][name]
        text = rename(name)
        base, bar, kind = text.rpartition("|")
        key = (base, kind) if bar and base and kind else (text, guessed_kind(text, dtype))
        if key in placed:
            raise CheckpointUnsupported(f"{src}: {placed[key]!r} and {name!r} are both {key[0]!r} ({key[1]})")
        placed[key] = name
        metas.append(TensorMeta(*key, dtype, shape))
        fragments.append(Fragment(*key, 0, math.prod(shape), file_source(path), offset))
    rename.check_used()
    notes = () if step is not None else ("safetensors know no training step: 0 is assumed; give step= to set it",)
    return Foreign(StateIndex(step or 0, tuple(metas), tuple(fragments)), tuple(ignored), {}, {}, notes)


def header(src: Folder, name: str) -> _Placed:
    """The tensors of one file, checked against its size; raises CheckpointCorrupt, CheckpointUnsupported."""
    where = src.child(name)
    size = where.store.size(where.path)
    (length,) = _LENGTH.unpack(_read(where, 0, _LENGTH.size)) if size >= _LENGTH.size else (-1,)
    if not 0 <= length <= min(_HEADER_LIMIT_BYTES, size - _LENGTH.size):
        raise CheckpointCorrupt(where.url, f"{size} bytes, and a header of {length}: not a safetensors file")
    try:
        entries = msgspec.json.decode(_read(where, _LENGTH.size, length), type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        parsed = {key: msgspec.json.decode(raw, type=_Entry) for key, raw in entries.items()}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: text that is not UTF-8
        raise CheckpointCorrupt(where.url, f"its header is not that of a safetensors file: {error}") from error
    base = _LENGTH.size + length
    placed: _Placed = {}
    position = 0
    for key, entry in sorted(parsed.items(), key=lambda item: item[1].data_offsets):
        first, end = entry.data_offsets
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointUnsupported(
                f"{where.url}: {key!r} is of type {entry.dtype}; known: {', '.join(sorted(_DTYPES))}"
            )
        try:
            meta = TensorMeta(key, "", dtype, entry.shape)
        except IndexInvalid as error:
            raise CheckpointCorrupt(where.url, str(error)) from error
        if first != position or end - first != meta.nbytes or base + end > size:
            raise CheckpointCorrupt(
                where.url,
                f"{key!r} at bytes {first}:{end} of {size - base}, {meta.nbytes} are needed: "
                "overlaps others, leaves a gap, or ends behind the file",
            )
        placed[key] = (dtype, entry.shape, base + first)
        position = end
    if base + position != size:
        raise CheckpointCorrupt(where.url, f"{size} bytes; its last tensor ends at {base + position}")
    return placed


def _weight_map(src: Folder) -> tuple[dict[str, str] | None, str]:
    """The index's tensor → file, and the index's name; None where there is no index."""
    found = [e for e in src.store.entries(src.path) if not e.is_folder and e.name.endswith(INDEX_SUFFIX)]
    chosen = [e for e in found if e.name == f"model{INDEX_SUFFIX}"] or found
    if not chosen:
        return None, ""
    if len(chosen) > 1:
        listed = ", ".join(e.name for e in chosen)
        raise CheckpointUnsupported(f"{src}: several indices ({listed}); give a folder with one, or a single file")
    where = src.child(chosen[0].name)
    if chosen[0].bytes > _HEADER_LIMIT_BYTES:
        raise CheckpointUnsupported(f"{where}: {chosen[0].bytes} bytes; at most {_HEADER_LIMIT_BYTES} are read")
    size = where.store.size(where.path)
    try:
        weight_map = msgspec.json.decode(_read(where, 0, size), type=_Index).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointCorrupt(where.url, f"not an index of safetensors: {error}") from error
    return weight_map, chosen[0].name


def _check_listed(src: Folder, index_name: str, files: Sequence[str]) -> None:
    where = src.child(index_name).url
    for name in files:
        if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise CheckpointCorrupt(where, f"names {name!r:.200}, which is no file of the folder")
        try:
            place = src.child(name)
            place.store.size(place.path)
        except StoreNotFound:
            raise CheckpointCorrupt(where, f"names {name!r}, which is missing") from None


def _owners(
    src: Folder, headers: dict[str, _Placed], weight_map: dict[str, str] | None, index_name: str
) -> tuple[dict[str, str], list[str]]:
    """Tensor → file, and what the index does not list."""
    owner: dict[str, str] = {}
    ignored = []
    for path, placed in headers.items():
        for name in placed:
            listed = path if weight_map is None else weight_map.get(name)
            if listed is None:
                ignored.append(f"{name} (in {path}, not in {index_name})")
                continue
            if listed != path:
                reason = f"says that {name!r} is in {listed!r}; it is in {path!r}"
                raise CheckpointCorrupt(src.child(index_name).url, reason)
            if name in owner:
                raise CheckpointUnsupported(
                    f"{src}: {name!r} is in {owner[name]!r} and in {path!r}; give the one file to take, or an index"
                )
            owner[name] = path
    for name, path in (weight_map or {}).items():
        if name not in owner:
            raise CheckpointCorrupt(src.child(index_name).url, f"says that {name!r} is in {path!r}; it is not there")
    return owner, ignored


def _read(where: Folder, offset: int, count: int) -> bytes:
    data = bytearray(count)
    got = where.store.read_into(where.path, offset, memoryview(data)) if count else 0
    if got != count:
        raise CheckpointCorrupt(where.url, f"ends at byte {offset + got}, too early")
    return bytes(data)


def single_file(src: Folder) -> tuple[Folder, str] | None:
    """Folder and name where `src` is a file's place, not a folder's."""
    if not src.name.endswith(SUFFIX):
        return None
    try:
        src.store.size(src.path)
    except StoreNotFound:
        return None
    return Folder(src.store, src.path.rpartition("/")[0]), src.name

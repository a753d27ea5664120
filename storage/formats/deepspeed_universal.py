"""DeepSpeed's universal checkpoints: a folder `zero` with a folder a parameter, and in it a file a kind.

Owns `read`. `fp32.pt` are the weights, every other file's name is its kind. Buffers come from the model_states file
beside `zero`, since the converter writes them as floats. Functions keep no state, safe in any thread.
"""

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec

from everstep.storage.boxes import row_major
from everstep.storage.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported
from everstep.storage.formats.foreign import BUFFER, PARAM, Foreign, Renames
from everstep.storage.formats.saved import StoredTensor, read_saved
from everstep.storage.formats.shards import Joined, Shard, scalar, stored
from everstep.storage.index import StateIndex
from everstep.storage.stores.port import Folder

_READERS: Final = 8
_WEIGHTS: Final = "fp32"
_MODELS: Final = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def read(
    src: Folder,
    sub: str,
    names: Sequence[str],
    allow: Mapping[str, Any],
    *,
    renames: Renames,
    step: int | None = None,
) -> Foreign:
    """The universal checkpoint in folder `sub` ("" for itself) of `src`, whose files are `names`.

    `allow` are the classes that its files may mention; `renames` are applied to the tensors' names.

    Raises CheckpointIncomplete, CheckpointCorrupt, CheckpointUnsupported, StoreError.
    """
    prefix = f"{sub}/" if sub else ""
    models = [name for name in _MODELS if name in names]
    model: Any = read_saved(src, prefix + models[0], allow=allow) if models else {}
    if not isinstance(model, dict):
        raise CheckpointCorrupt(prefix + models[0], f"holds a {type(model).__name__}, not a dict")
    groups = model.get("param_shapes") or []
    shapes = {str(name): tuple(shape) for group in groups for name, shape in group.items()}
    module = model.get("module") or {}
    buffers = {name: module[name] for name in model.get("buffer_names") or () if name in module}
    tied = {str(name): str(to) for name, to in (model.get("shared_params") or {}).items()}
    files, settings = _files(src, prefix)
    parameters = {path.split("/")[-2] for path in files}
    left = {name for name in parameters if name in buffers or (name in tied and tied[name] in parameters)}
    missing = sorted(set(shapes) - parameters)
    if missing:
        raise CheckpointIncomplete(
            f"{src.url}: {prefix}zero has no folder for {missing[0]!r} ({len(missing)} lacking)"
        )

    def opened(path: str) -> Shard | str:
        name, file = path.split("/")[-2:]
        kind = file.removesuffix(".pt")
        value = read_saved(src, path, allow=allow)
        shape = shapes.get(name) if model.get("mp_world_size", 1) == 1 else None  # else it is that of a cut
        return _shard(src, path, name, PARAM if kind == _WEIGHTS else kind, value, shape)

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(opened, [path for path in files if path.split("/")[-2] not in left]))
    shards = [shard for shard in found if isinstance(shard, Shard)]
    ignored = [text for text in found if isinstance(text, str)]
    weights = {shard.name for shard in shards if shard.kind == PARAM}
    lacking = sorted({shard.name for shard in shards} - weights)
    if lacking:
        raise CheckpointIncomplete(f"{src.url}: {prefix}zero/{lacking[0]} has no {_WEIGHTS}.pt")
    shards += [stored(name, BUFFER, value) for name, value in buffers.items()]
    joined = Joined()
    for shard in shards:
        joined.add(msgspec.structs.replace(shard, name=renames(shard.name)))
    renames.check_used()
    notes = [f"DeepSpeed {model.get('ds_version') or '(unknown version)'}, universal checkpoint"]
    if not models:
        notes.append("There is no model_states file: buffers may be missing, and tied tensors be stored twice.")
    if settings:
        optimizer = read_saved(src, settings, allow=allow)
        param_groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        for number, group in enumerate(param_groups or []):
            told = {key: value for key, value in group.items() if key != "params"}
            notes.append(f"Optimizer group {number}: {json.dumps(told, default=str, sort_keys=True)}")
    saved = model.get("global_steps")
    number = step if step is not None else saved if type(saved) is int and saved >= 0 else 0
    index = StateIndex(number, tuple(sorted(joined.tensors, key=lambda m: m.key)), tuple(joined.fragments))
    known = {renames(name): renames(to) for name, to in tied.items() if to in weights and name not in weights}
    return Foreign(index, tuple(ignored), known, joined.inline, tuple(notes))


def _files(src: Folder, prefix: str) -> tuple[list[str], str]:
    """(every parameter's files, the file of the optimizer's settings)."""
    zero = src.child(f"{prefix}zero")
    entries = zero.store.entries(zero.path)
    folders = [entry.name for entry in entries if entry.is_folder]

    def listed(name: str) -> list[str]:
        where = zero.child(name)
        inside = where.store.entries(where.path)
        return [f"{prefix}zero/{name}/{e.name}" for e in inside if not e.is_folder and e.name.endswith(".pt")]

    with ThreadPoolExecutor(_READERS) as pool:
        files = [path for paths in pool.map(listed, folders) for path in paths]
    if not files:
        raise CheckpointIncomplete(f"{zero.url}: no parameter's folder in it")
    common = [entry.name for entry in entries if not entry.is_folder and entry.name == "optimizer_state.pt"]
    return files, f"{prefix}zero/{common[0]}" if common else ""


def _shard(src: Folder, path: str, name: str, kind: str, value: Any, shape: tuple[int, ...] | None) -> Shard | str:
    """The tensor in a file, or why it is left out."""
    if isinstance(value, dict):
        value = value.get("param")
    if isinstance(value, StoredTensor) and value.shape:
        if shape is not None and value.shape != shape and len(value.shape) == 1 and value.contiguous:
            # Stage 3's converter keeps no shapes.
            if value.numel != math.prod(shape):
                raise CheckpointCorrupt(path, f"has {value.numel} elements, shape {list(shape)} needs others", name)
            value = StoredTensor(value.dtype, shape, row_major(shape), value.file, value.offset)
        if shape is not None and kind == PARAM and value.shape != shape:
            raise CheckpointCorrupt(path, f"has shape {list(value.shape)}, the model {list(shape)}", name)
        return stored(name, kind, value)
    if isinstance(value, StoredTensor) and kind == PARAM:
        return stored(name, kind, value)
    number = scalar(src, value)
    if number is None:
        if kind == PARAM:
            raise CheckpointUnsupported(f"{path}: holds a {type(value).__name__}, not a tensor")
        return f"{name} ({kind}: a {type(value).__name__})"
    dtype, data, python = number
    return Shard(name, kind, dtype, (), value=data, python=python)

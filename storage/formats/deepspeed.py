"""DeepSpeed's ZeRO checkpoints, stages 1 to 3, as an index over their files.

Owns `read`. Nothing is copied: the fp32 weights and the optimizer's state lie in flat groups, and every parameter's
elements are ranges of them (`deepspeed_flat.py`). Optimizer state is taken by the name it has there, whichever
optimizer it was, as long as it is element-wise. A universal folder goes to `deepspeed_universal.py`. Functions
keep no state, safe in any thread.
"""

import json
from collections.abc import Sequence
from typing import Any, Final, TypeGuard

import msgspec
import numpy as np

from everstep.storage.errors import CheckpointCorrupt, CheckpointUnsupported, StorageError
from everstep.storage.formats import deepspeed_universal
from everstep.storage.formats.deepspeed_files import RankFile, agreed, allowed, opened, optimizer_of, subfolder
from everstep.storage.formats.deepspeed_flat import Group, cut_groups, even_groups, split
from everstep.storage.formats.foreign import BUFFER, PARAM, Foreign, Renames
from everstep.storage.formats.patterns import parse
from everstep.storage.formats.saved import StoredTensor
from everstep.storage.formats.shards import (
    Joined,
    Piece,
    Shard,
    as_float64,
    join,
    read_bytes,
    rounded,
    scalar,
    stored,
)
from everstep.storage.index import ITEMSIZE_BYTES, StateIndex
from everstep.storage.stores.port import Folder

_SAMPLE: Final = 64  # elements of each rank's partition that are compared with the weights beside them
_TAKEN: Final = (
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_version", "num_experts",
)  # fmt: skip


def read(
    src: Folder,
    *,
    tag: str | None = None,
    patterns: Any = None,
    names: Sequence[tuple[str, str]] = (),
    step: int | None = None,
    opaque: Sequence[str] = (),
    compare_weights: bool = True,
) -> Foreign:
    """The checkpoint in `src`: a run's folder, whose file `latest` names the one (or `tag` does), or its own folder.

    `patterns` (see patterns.py) join model-parallel ranks. `names`: (regular expression, replacement) pairs for the
    tensors' names, applied first. `opaque` names classes ("module.name", "module.*") that the files may mention
    besides DeepSpeed's; nothing of them is built. `compare_weights` compares a sample of each rank's fp32 weights
    with those that the model was running with, which shows files of different saves.

    Raises CheckpointNotFound, CheckpointIncomplete naming missing or surplus files, CheckpointCorrupt,
    CheckpointUnsupported, StoreError.
    """
    try:
        return _read(src, tag, patterns, Renames(names), step, opaque, compare_weights)
    except StorageError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise CheckpointCorrupt(
            src.url, f"not laid out as DeepSpeed does: {type(error).__name__}: {error}"
        ) from error


def _read(
    src: Folder,
    tag: str | None,
    patterns: Any,
    renames: Renames,
    step: int | None,
    opaque: Sequence[str],
    compare_weights: bool,
) -> Foreign:
    sub = subfolder(src, tag)
    folder = src.child(sub) if sub else src
    entries = folder.store.entries(folder.path)
    listed = [entry.name for entry in entries if not entry.is_folder]
    allow = allowed(opaque)
    if any(entry.is_folder and entry.name == "zero" for entry in entries):
        if patterns is not None:
            raise CheckpointUnsupported(f"{folder.url}: a universal checkpoint is not cut, so patterns do not apply")
        return deepspeed_universal.read(src, sub, listed, allow, step=step, renames=renames)
    there = opened(src, sub, listed, allow)
    zero, parallel, optims, models = there.zero, there.parallel, there.optims, there.models
    agreed(optims, lambda f: _notes(f, zero), "settings of the optimizer")
    saved_step = agreed(models, lambda f: f.tree.get("global_steps"), "global_steps")
    shards: list[Shard] = []
    ignored: dict[str, None] = {}
    notes = [
        f"DeepSpeed {_version(models, optims)}, ZeRO stage {zero}, {there.world} data-parallel ranks, "
        f"{parallel} model-parallel"
    ]
    for rank in range(parallel):
        own = [f for f in models if f.model == rank]
        ranks = [f for f in optims if f.model == rank]
        found = _Rank(src, zero, rank, own, ranks, ignored)
        shards += found.shards()
        if zero < 3 and compare_weights:
            _compare_weights(src, own[0], found.trained)
    shards = [msgspec.structs.replace(shard, name=renames(shard.name)) for shard in shards]
    tied = {renames(name): renames(to) for name, to in _tied(models).items()}
    renames.check_used()
    notes += _notes(optims[0], zero)
    ignored |= {
        f"{key} (no tensor of the state)": None
        for key, v in models[0].tree.items()
        if key not in _TAKEN and v is not None
    }
    skipped = models[0].tree.get("skipped_steps")
    steps = {_number(shard) for shard in shards if shard.kind == "step" and shard.value}
    if steps and type(saved_step) is int and type(skipped) is int and steps != {float(saved_step - skipped)}:
        notes.append(f"The optimizer counts {sorted(steps)} steps, the run {saved_step - skipped}.")
    return _foreign(src, shards, tied, parallel, patterns, ignored, notes, _step(step, saved_step, folder))


class _Rank:
    """What one model-parallel rank has; a namespace for one call of `read`."""

    def __init__(
        self,
        src: Folder,
        zero: int,
        number: int,
        models: list[RankFile],
        optims: list[RankFile],
        ignored: dict[str, None],
    ) -> None:
        self.src, self.zero, self.number, self.models, self.optims, self.ignored = (
            src, zero, number, models, optims, ignored,
        )  # fmt: skip
        self.tree = models[0].tree
        self.trained: list[list[Shard]] = []  # by group

    def shards(self) -> list[Shard]:
        shapes = self.tree.get("param_shapes")
        if not isinstance(shapes, list) or not all(isinstance(group, dict) for group in shapes):
            raise CheckpointUnsupported(f"{self.models[0].path}: no param_shapes, so not a ZeRO checkpoint")
        weights = [self._flat_groups(f) for f in self.optims]
        if len({len(groups) for groups in weights}) > 1:
            raise CheckpointCorrupt(self.optims[-1].path, "has another number of groups than the other ranks")
        if self.zero == 3:
            groups = split(shapes, [group.numel for group in weights[0]], len(self.optims))
        else:
            groups = [self._even(number, shapes, weights) for number in range(len(weights[0]))]
        shards = []
        for number, group in enumerate(groups):
            tensors = [held[number] for held in weights]
            for rank, tensor in enumerate(tensors):
                if tensor.numel not in group.held(rank):
                    raise CheckpointCorrupt(
                        tensor.file, f"flat group {number} has {tensor.numel} elements, not {group.held(rank)[1]}"
                    )
            self.trained.append(self._cut(group, PARAM, tensors))
            for kind, values in self._states(number).items():
                shards += self._state(group, number, kind, values)
        return [
            *(shard for held in self.trained for shard in held),
            *shards,
            *self._others({name for group in groups for name in group.shapes}),
        ]

    def _flat_groups(self, f: RankFile) -> list[StoredTensor]:
        key = "fp32_flat_groups" if self.zero == 3 else "single_partition_of_fp32_groups"
        groups = optimizer_of(f).get(key)
        if not isinstance(groups, list) or not all(_is_flat(group) for group in groups):
            raise CheckpointUnsupported(
                f"{f.path}: {key} is not a list of flat tensors; state kept on NVMe is not in the checkpoint"
            )
        return groups

    def _even(self, number: int, shapes: list[Any], weights: list[list[StoredTensor]]) -> Group:
        if len(shapes) != len(weights[0]):
            raise CheckpointCorrupt(
                self.optims[0].path, f"has {len(weights[0])} groups, {self.models[0].path} {len(shapes)}"
            )
        pads = optimizer_of(self.optims[0]).get("param_alignment_paddings")
        own = pads[number] if isinstance(pads, list) and number < len(pads) else [0] * len(shapes[number])
        spare = []
        for f in self.optims:
            paddings = optimizer_of(f).get("group_paddings")
            spare.append(paddings[number] if isinstance(paddings, list) and number < len(paddings) else 0)
        if len(own) != len(shapes[number]) or any(type(n) is not int or n < 0 for n in (*own, *spare)):
            raise CheckpointCorrupt(self.optims[0].path, f"the paddings of group {number} do not fit its parameters")
        return even_groups(shapes[number], own, [held[number] for held in weights], spare)

    def _cut(self, group: Group, kind: str, tensors: Sequence[StoredTensor]) -> list[Shard]:
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise CheckpointCorrupt(tensors[-1].file, f"{kind} is of dtypes {sorted(dtypes)} on different ranks")
        return [
            Shard(name, kind, tensors[0].dtype, shape, group.pieces(name, tensors), tensor=self.number)
            for name, shape in group.shapes.items()
        ]

    def _states(self, number: int) -> dict[str, list[Any]]:
        """The optimizer's state of a group: by kind, rank by rank."""
        held = []
        for f in self.optims:
            base = optimizer_of(f).get("optimizer_state_dict" if self.zero == 3 else "base_optimizer_state")
            if isinstance(base, list):  # elastic checkpoints: a list of states, without the groups' settings
                state: Any = base[number] if number < len(base) else {}
                settings: Any = {"step": optimizer_of(f).get("base_optimizer_state_step")}
            else:
                state = (base or {}).get("state", {}).get(number, {})
                groups = (base or {}).get("param_groups", [])
                settings = next((g for g in groups if number in g.get("params", ())), {})
            state = {kind: value for kind, value in state.items() if value is not None}
            if "step" not in state and settings.get("step") is not None:
                state["step"] = settings["step"]
            held.append(state)
        kinds = dict.fromkeys(kind for state in held for kind in state if isinstance(kind, str))
        return {kind: [state.get(kind) for state in held] for kind in kinds}

    def _state(self, group: Group, number: int, kind: str, values: list[Any]) -> list[Shard]:
        if kind in (PARAM, BUFFER):
            self.ignored[f"{kind} of optimizer group {number} (a name that stands for something else)"] = None
            return []
        lacking = [f.path for f, value in zip(self.optims, values, strict=True) if value is None]
        if lacking:
            raise CheckpointCorrupt(lacking[0], f"has no {kind} for group {number}, which other ranks have")
        if all(_is_flat(value) and value.numel in group.held(rank) for rank, value in enumerate(values)):
            return self._cut(group, kind, values)
        numbers = [scalar(self.src, value) for value in values]
        first = numbers[0]
        if first is None or None in numbers:
            self.ignored[f"{kind} of optimizer group {number} (neither element-wise nor a number)"] = None
            return []
        for f, told in zip(self.optims, numbers, strict=True):
            if told != first:
                raise CheckpointCorrupt(
                    f.path, f"{kind} of group {number} is not that in {self.optims[0].path}: files of different saves"
                )
        dtype, data, python = first
        return [Shard(name, kind, dtype, (), value=data, python=python, tensor=self.number) for name in group.shapes]

    def _others(self, trained: set[str]) -> list[Shard]:
        """Buffers and frozen parameters."""
        module = self.tree.get("module")
        buffers = self.tree.get("buffer_names") or []
        if not isinstance(module, dict):
            raise CheckpointUnsupported(f"{self.models[0].path}: no module; pipeline stages are not read")
        shared = self.tree.get("shared_params") or {}
        shards = [stored(name, BUFFER, module[name], self.number) for name in buffers if name in module]
        if self.zero < 3:
            names = [n for n in module if n not in trained and n not in buffers and n not in shared]
            frozen = {name: module[name] for name in names}
            for name in [name for name, value in frozen.items() if not isinstance(value, StoredTensor)]:
                self.ignored[f"{name} (no tensor)"] = None
                del frozen[name]
            return shards + [stored(name, PARAM, value, self.number) for name, value in frozen.items()]
        shapes = self.tree.get("frozen_param_shapes") or {}
        for name, shape in shapes.items():
            found = [(f.tree.get("frozen_param_fragments") or {}).get(name) for f in self.models]
            group = cut_groups({name: shape}, len(self.models))
            parts = [part for part in found if _is_flat(part) and part.numel in group.held(0)]
            if len(parts) < len(found):
                raise CheckpointCorrupt(self.models[0].path, "a frozen parameter's parts do not fit its shape", name)
            shards += self._cut(group, PARAM, parts)
        return shards


def _foreign(
    src: Folder,
    shards: list[Shard],
    tied: dict[str, str],
    parallel: int,
    patterns: Any,
    ignored: dict[str, None],
    notes: list[str],
    step: int,
) -> Foreign:
    if patterns is not None:
        joined = join(src, shards, parse(patterns), parallel)
    elif parallel == 1:
        joined = Joined()
        for shard in shards:
            joined.add(shard)
    else:
        raise CheckpointUnsupported(
            f"{src.url}: {parallel} model-parallel ranks; how they cut the tensors has to be said by `patterns`"
        )
    known = {meta.name for meta in joined.tensors}
    for name, to in tied.items():
        if to in known and name not in known:
            joined.tied[name] = to
        else:
            ignored[f"{name} (shared with {to}, which is not there under this name)"] = None
    index = StateIndex(step, tuple(sorted(joined.tensors, key=lambda meta: meta.key)), tuple(joined.fragments))
    return Foreign(index, (*ignored, *joined.ignored), joined.tied, joined.inline, tuple(notes))


def _compare_weights(src: Folder, model: RankFile, trained: list[list[Shard]]) -> None:
    """The fp32 weights, rounded, are those that the model ran with: some of every partition are looked at."""
    module = model.tree.get("module") or {}
    seen: set[tuple[str, int]] = set()
    for group, shards in enumerate(trained):
        for shard in shards:
            stored = module.get(shard.name)
            if not isinstance(stored, StoredTensor) or not stored.contiguous or stored.shape != shard.shape:
                continue
            if {shard.dtype, stored.dtype} - {"float32", "float16", "bfloat16", "float64"}:
                continue
            for piece in shard.pieces:
                if (piece.file, group) not in seen:
                    seen.add((piece.file, group))
                    _compare_piece(src, model, shard, piece, stored)


def _compare_piece(src: Folder, model: RankFile, shard: Shard, piece: Piece, stored: StoredTensor) -> None:
    count = min(_SAMPLE, piece.stop - piece.start)
    size, own = ITEMSIZE_BYTES[stored.dtype], ITEMSIZE_BYTES[shard.dtype]
    master = read_bytes(src, piece.file, piece.offset, count * own)
    running = read_bytes(src, stored.file, stored.offset + piece.start * size, count * size)
    same = master if shard.dtype == stored.dtype else rounded(as_float64(master, shard.dtype), stored.dtype)
    if same != running:
        raise CheckpointCorrupt(
            piece.file,
            f"its weights are not those in {model.path}: files of different saves (compare_weights=False leaves this "
            "check out)",
            shard.name, PARAM, piece.start, piece.start + count,
        )  # fmt: skip


def _is_flat(value: Any) -> TypeGuard[StoredTensor]:
    return isinstance(value, StoredTensor) and len(value.shape) == 1 and value.contiguous


def _number(shard: Shard) -> float:
    value = shard.value or b""
    if shard.dtype in ("int64", "int32", "int16"):
        return float(np.frombuffer(value, shard.dtype)[0])
    return float(as_float64(value, shard.dtype)[0])


def _tied(models: Sequence[RankFile]) -> dict[str, str]:
    shared = [f.tree.get("shared_params") or {} for f in models]
    return {str(name): str(to) for pairs in shared for name, to in pairs.items()}


def _notes(optim: RankFile, zero: int) -> list[str]:
    base = optimizer_of(optim).get("optimizer_state_dict" if zero == 3 else "base_optimizer_state")
    groups = base.get("param_groups", []) if isinstance(base, dict) else []
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    return [f"Optimizer group {n}: {json.dumps(s, default=str, sort_keys=True)}" for n, s in enumerate(settings)]


def _version(models: Sequence[RankFile], optims: Sequence[RankFile]) -> str:
    return str(models[0].tree.get("ds_version") or optims[0].tree.get("ds_version") or "(unknown version)")


def _step(step: int | None, saved: Any, folder: Folder) -> int:
    if step is not None:
        return step
    return saved if type(saved) is int and saved >= 0 else 0

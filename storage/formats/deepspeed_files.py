"""The files of a DeepSpeed ZeRO checkpoint: which there are, which there have to be, opened.

Owns `RankFile`, `Opened`, and what opens them. Functions keep no state, safe in any thread.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from everstep.storage.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointNotFound, CheckpointUnsupported
from everstep.storage.formats.saved import read_saved
from everstep.storage.formats.shards import read_bytes
from everstep.storage.formats.unpickle import StandIn, stand_in
from everstep.storage.stores.port import Folder

_OPTIM: Final = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL: Final = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_CUT_MODEL: Final = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT: Final = re.compile(r"layer_\d+_expert_\d+_.*|expp_rank_.*|.*_expert_\d+_.*")
_STAGE: Final = re.compile(r"layer_\d+-model_.*")
_READERS: Final = 8
_LARGEST_NAME_BYTES: Final = 4096


@dataclass(frozen=True)
class RankFile:
    """A file that a rank wrote: its place, its path in the folder read, what is in it."""

    data: int
    model: int
    path: str
    tree: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """A ZeRO checkpoint's files: those of the optimizer and those of the model, by (model, data) rank; its stage and
    degrees.
    """

    zero: int
    world: int
    parallel: int
    optims: list[RankFile]
    models: list[RankFile]


def opened(src: Folder, sub: str, names: Sequence[str], allow: Mapping[str, Any]) -> Opened:
    """The files in folder `sub` of `src`, whose files are `names`; just those that its ranks must have written."""
    folder = src.child(sub) if sub else src
    refused = [name for name in names if _EXPERT.fullmatch(name) or _STAGE.fullmatch(name)]
    if refused:
        what = "experts" if _EXPERT.fullmatch(refused[0]) else "pipeline stages"
        raise CheckpointUnsupported(
            f"{folder.url}: {refused[0]}: {what} in files of their own are not read; convert it with DeepSpeed's "
            "ds_to_universal and import that"
        )
    optims = _read_all(src, sub, names, _OPTIM, allow)
    if not optims:
        raise CheckpointNotFound(
            f"{folder.url}: no zero_pp_rank_*_optim_states.pt, so no ZeRO checkpoint (stage 0 has none of its own)"
        )
    zero = agreed(optims, _stage, "ZeRO stage")
    models = _read_all(src, sub, names, _CUT_MODEL if zero == 3 else _MODEL, allow)
    world, parallel = _checked_files(folder, names, zero, optims, models)
    return Opened(zero, world, parallel, optims, models)


def subfolder(src: Folder, tag: str | None) -> str:
    """The folder of the checkpoint inside of `src`, "" for `src` itself."""
    entries = src.store.entries(src.path)
    if tag is None:
        if any(_OPTIM.fullmatch(e.name) or (e.is_folder and e.name == "zero") for e in entries):
            return ""
        latest = next((e for n in ("latest", "latest_universal") for e in entries if e.name == n), None)
        if latest is None or latest.is_folder or latest.bytes > _LARGEST_NAME_BYTES:
            folders = ", ".join(e.name for e in entries if e.is_folder)
            raise CheckpointNotFound(
                f"{src.url}: no DeepSpeed checkpoint and no file `latest`; give `tag`, one of: {folders or 'nothing'}"
            )
        tag = read_bytes(src, latest.name, 0, latest.bytes).decode("utf-8", "replace").strip()
    if not tag or "/" in tag or tag in (".", "..") or not any(e.is_folder and e.name == tag for e in entries):
        raise CheckpointNotFound(f"{src.url}: tag {tag!r} names no folder there")
    return tag


def allowed(opaque: Sequence[str]) -> dict[str, Any]:
    """What the files may mention: DeepSpeed's classes and the user's, all of them as stand-ins."""
    names = [opaque] if isinstance(opaque, str) else opaque
    allow: dict[str, Any] = {"deepspeed.*": True, "argparse.Namespace": stand_in("argparse.Namespace")}
    return allow | {name: True if name.endswith(".*") else stand_in(name) for name in names}


def _read_all(
    src: Folder, sub: str, names: Sequence[str], pattern: re.Pattern[str], allow: Mapping[str, Any]
) -> list[RankFile]:
    """The files of this form by (model, data) rank."""
    places: dict[tuple[int, int], str] = {}
    for name in names:
        hit = pattern.fullmatch(name)
        if hit is None:
            continue
        data, model = (int(hit[1]), int(hit[2])) if pattern.groups == 2 else (0, int(hit[1]))
        other = places.setdefault((model, data), name)
        if other != name:
            raise CheckpointIncomplete(f"{src.url}: {other} and {name} are both of the same rank: remove the older")

    def one(place: tuple[int, int]) -> RankFile:
        path = f"{sub}/{places[place]}" if sub else places[place]
        tree = read_saved(src, path, allow=allow)
        if not isinstance(tree, dict):
            raise CheckpointCorrupt(path, f"holds a {type(tree).__name__}, not a dict")
        return RankFile(place[1], place[0], path, tree)

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(one, sorted(places)))


def _checked_files(
    folder: Folder, names: Sequence[str], zero: int, optims: list[RankFile], models: list[RankFile]
) -> tuple[int, int]:
    """(data-parallel, model-parallel) ranks, as the files say; and just those files are there."""
    world = agreed(optims, _partitions, "partition_count")
    if not models:
        raise CheckpointIncomplete(f"{folder.url}: no model_states file of ZeRO stage {zero}")
    told = agreed(models, lambda f: f.tree.get("mp_world_size"), "mp_world_size")
    parallel = told if type(told) is int and told > 0 else max(f.model for f in optims) + 1
    prefix = next(name for name in names if _OPTIM.fullmatch(name)).partition("zero_")[0]
    wanted = {
        f"{prefix}zero_pp_rank_{d}_mp_rank_{m:02d}_optim_states.pt" for m in range(parallel) for d in range(world)
    }
    if zero == 3:
        wanted |= {f"zero_pp_rank_{d}_mp_rank_{m:02d}_model_states.pt" for m in range(parallel) for d in range(world)}
    else:
        wanted |= {f"mp_rank_{m:02d}_model_states.pt" for m in range(parallel)}
    there = {n for n in names if _OPTIM.fullmatch(n) or _MODEL.fullmatch(n) or _CUT_MODEL.fullmatch(n)}
    problems = []
    if wanted - there:
        problems.append(f"missing: {_some(wanted - there)}")
    if there - wanted:
        problems.append(f"of another save: {_some(there - wanted)}")
    if problems:
        raise CheckpointIncomplete(
            f"{folder.url}: {world} data-parallel and {parallel} model-parallel ranks wrote it; {'; '.join(problems)}"
        )
    return world, parallel


def optimizer_of(f: RankFile) -> dict[str, Any]:
    """The optimizer's part of a file."""
    tree = f.tree.get("optimizer_state_dict")
    if not isinstance(tree, dict):
        raise CheckpointCorrupt(f.path, "has no optimizer_state_dict")
    return tree


def _stage(f: RankFile) -> int:
    stage = optimizer_of(f).get("zero_stage")
    if isinstance(stage, StandIn):
        stage = stage.args[0] if stage.args else None
    if stage is None and "single_partition_of_fp32_groups" in optimizer_of(f):
        return 1  # the optimizer for bfloat16 does not say
    if stage not in (1, 2, 3):
        raise CheckpointUnsupported(f"{f.path}: ZeRO stage {stage!r}; 1, 2 and 3 are read")
    return int(stage)


def _partitions(f: RankFile) -> int:
    count = optimizer_of(f).get("partition_count")
    counts = set(count) if isinstance(count, list) else {count}
    if len(counts) != 1:
        raise CheckpointUnsupported(f"{f.path}: groups over {sorted(map(str, counts))} ranks (experts) are not read")
    number = counts.pop()
    if type(number) is not int or number < 1:
        raise CheckpointCorrupt(f.path, f"partition_count is {number!r}")
    return number


def agreed(files: Sequence[RankFile], of: Callable[[RankFile], Any], what: str) -> Any:
    """What all files say; raises CheckpointCorrupt naming the first that says something else."""
    first = of(files[0]) if files else None
    for f in files:
        if of(f) != first:
            raise CheckpointCorrupt(
                f.path, f"{what} is {of(f)!r}, in {files[0].path} {first!r}: files of different saves"
            )
    return first


def _some(names: set[str], most: int = 8) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")

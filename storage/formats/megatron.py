"""Megatron-style shards, a file a (tensor-parallel, pipeline) rank, as an index over them.

Owns `read`. Files are those of `torch.save`, or safetensors where the template ends so; how the tensors were cut is
said by patterns (patterns.py). Nothing is copied. Functions keep no state, safe in any thread.

In a torch.save file the weights are the tree "model" (`trees` gives others, such as an optimizer's by name): nested
dicts, whose keys are joined by ".". Megatron numbers its own optimizer's state instead of naming it; it stays out.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsupported,
    StorageError,
)
from everstep.storage.formats.foreign import PARAM, Foreign, guessed_kind
from everstep.storage.formats.hf import header
from everstep.storage.formats.patterns import Patterns, parse
from everstep.storage.formats.saved import StoredTensor, read_saved
from everstep.storage.formats.shards import Piece, Shard, join, scalar, stored
from everstep.storage.formats.unpickle import stand_in
from everstep.storage.index import StateIndex
from everstep.storage.stores.port import Folder

FILES: Final = "mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt"
_ONE_STAGE: Final = "mp_rank_{tp:02d}/model_optim_rng.pt"
_READERS: Final = 8
_LARGEST_NAME_BYTES: Final = 64
_STEPS: Final = ("iteration", "step", "global_step", "global_steps")
# What Megatron and its forks put beside the weights; nothing of it is built.
_OPAQUE: Final = ("argparse.Namespace", "megatron.*", "apex.*", "transformer_engine.*", "_io.BytesIO")


def read(
    src: Folder,
    *,
    patterns: Any = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    step: int | None = None,
    files: str | None = None,
    trees: Mapping[str, str] | None = None,
    opaque: Sequence[str] = (),
) -> Foreign:
    """The checkpoint whose shards are in `src`, or in the folder that `latest_checkpointed_iteration.txt` names.

    `files` is the shards' path with {tp} and {pp} (and formats such as {pp:03d}); left out: Megatron's, with or
    without the stage. `tensor` and `pipeline` are the degrees; left out: what is there. `trees` maps a kind to the
    place of its dict in the files ({"param": "model"}). `opaque` names further classes that the files may mention.
    Which tensors are buffers is guessed (`guessed_kind`).

    Raises CheckpointNotFound, CheckpointIncomplete naming files, CheckpointCorrupt, CheckpointUnsupported,
    StoreError.
    """
    if patterns is None:
        raise CheckpointUnsupported(f"{src.url}: how the tensors were cut has to be said by `patterns`")
    try:
        return _read(src, parse(patterns), tensor, pipeline, step, files, trees, opaque)
    except StorageError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise CheckpointCorrupt(src.url, f"not shards by rank: {type(error).__name__}: {error}") from error


def _read(
    src: Folder,
    rules: Patterns,
    tensor: int | None,
    pipeline: int | None,
    step: int | None,
    files: str | None,
    trees: Mapping[str, str] | None,
    opaque: Sequence[str],
) -> Foreign:
    sub = _subfolder(src)
    paths = _paths(src, sub, files, tensor, pipeline)
    ranks, stages = max(tp for tp, _ in paths) + 1, max(pp for _, pp in paths) + 1
    allow = {name: True if name.endswith(".*") else stand_in(name) for name in (*_OPAQUE, *_list(opaque))}
    ignored: dict[str, None] = {}
    places = dict(trees) if trees else {PARAM: "model"}

    def opened(rank: tuple[int, int]) -> tuple[str, list[Shard], dict[str, Any]]:
        path = paths[rank]
        if path.endswith(".safetensors"):
            return path, list(_safetensors(src, path, *rank)), {}
        tree = read_saved(src, path, allow=allow)
        if not isinstance(tree, dict):
            raise CheckpointCorrupt(path, f"holds a {type(tree).__name__}, not a dict")
        return path, list(_shards(src, path, tree, places, *rank, ignored)), tree

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(opened, sorted(paths)))
    saved = _agreed_step(found)
    joined = join(src, [shard for _, shards, _ in found for shard in shards], rules, ranks, stages)
    own = {place.split(".")[0] for place in places.values()}
    ignored |= {f"{key} (no tensor of the state)": None for key in found[0][2] if key not in own}
    number = step if step is not None else saved
    index = StateIndex(number, tuple(sorted(joined.tensors, key=lambda m: m.key)), tuple(joined.fragments))
    notes = (f"{len(paths)} shards: {ranks} tensor-parallel ranks, {stages} pipeline stages",)
    return Foreign(index, (*ignored, *joined.ignored), joined.tied, joined.inline, notes)


def _subfolder(src: Folder) -> str:
    """What Megatron's tracker file names, else ""."""
    name = "latest_checkpointed_iteration.txt"
    entries = src.store.entries(src.path)
    tracker = next((e for e in entries if e.name == name and not e.is_folder), None)
    if tracker is None:
        return ""
    data = bytearray(min(tracker.bytes, _LARGEST_NAME_BYTES))
    where = src.child(name)
    where.store.read_into(where.path, 0, memoryview(data))
    text = data.decode("utf-8", "replace").strip()
    folder = f"iter_{int(text):07d}" if text.isdecimal() else text
    if not any(e.is_folder and e.name == folder for e in entries):
        raise CheckpointNotFound(f"{src.url}: {name} says {text!r}, but there is no folder {folder!r}")
    return folder


def _paths(
    src: Folder, sub: str, files: str | None, tensor: int | None, pipeline: int | None
) -> dict[tuple[int, int], str]:
    """The shards' paths by (tensor-parallel rank, stage): all that are there, without a gap."""
    for degree, name in ((tensor, "tensor"), (pipeline, "pipeline")):
        if degree is not None and (type(degree) is not int or degree < 1):
            raise CheckpointUnsupported(f"{name} is {degree!r}; allowed: a degree from 1 on")
    templates = (FILES, _ONE_STAGE) if files is None else (files,)
    there = {path for template in templates for path in _listed(src, sub, template)}
    for template in templates:
        _check_template(template)
        prefix = f"{sub}/" if sub else ""

        def path(tp: int, pp: int, form: str = prefix + template) -> str:
            return form.format(tp=tp, pp=pp)

        staged = re.search(r"\{pp", template) is not None
        split = re.search(r"\{tp", template) is not None
        ranks = tensor or (_count(there, lambda n: path(n, 0)) if split else 1)
        stages = pipeline or (_count(there, lambda n: path(0, n)) if staged else 1)
        if not ranks or not stages or (stages > 1 and not staged) or (ranks > 1 and not split):
            continue
        wanted = {(tp, pp): path(tp, pp) for tp in range(ranks) for pp in range(stages)}
        if files is None and not any(p in there for p in wanted.values()):
            continue
        missing = sorted(set(wanted.values()) - there)
        if missing:
            raise CheckpointIncomplete(
                f"{src.url}: {ranks} tensor-parallel ranks and {stages} stages, but missing: {', '.join(missing[:8])}"
            )
        more = [path(ranks, 0)] if split else []
        more += [path(0, stages)] if staged else []
        surplus = sorted(there & set(more))
        if surplus:
            raise CheckpointIncomplete(
                f"{src.url}: {surplus[0]} is there besides {ranks} tensor-parallel ranks and {stages} stages"
            )
        return wanted
    raise CheckpointNotFound(
        f"{src.url}: no shards {' or '.join(templates)}; `files` gives their path, with {{tp}} and {{pp}}"
    )


def _count(there: set[str], path: Any) -> int:
    """How many from 0 on are there; all that are there by a number of up to five digits count."""
    found = [number for number in range(len(there) + 1) if path(number) in there]
    return found[-1] + 1 if found else 0


def _listed(src: Folder, sub: str, template: str) -> Iterator[str]:
    """Every file that may be a shard: in the folder, or one folder deeper where the template has one."""
    depth = template.count("/")
    pending = [(sub, depth)]
    while pending:
        path, deeper = pending.pop()
        where = src.child(path) if path else src
        for entry in where.store.entries(where.path):
            inner = f"{path}/{entry.name}" if path else entry.name
            if not entry.is_folder and not deeper:
                yield inner
            elif entry.is_folder and deeper:
                pending.append((inner, deeper - 1))


def _check_template(template: str) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        template.format(tp=0, pp=0)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointUnsupported(f"files is {template!r}: {error}; allowed: a path with {{tp}}, {{pp}}") from error
    if set(fields) - {"tp", "pp"} or template.startswith("/") or ".." in template.split("/"):
        raise CheckpointUnsupported(
            f"files is {template!r}; allowed: a path inside of the folder, with {{tp}}, {{pp}}"
        )


def _shards(
    src: Folder,
    path: str,
    tree: dict[str, Any],
    places: Mapping[str, str],
    tp: int,
    pp: int,
    ignored: dict[str, None],
) -> Iterator[Shard]:
    for kind, place in places.items():
        held: Any = tree
        for key in place.split("."):
            held = held.get(key) if isinstance(held, dict) else None
        if not isinstance(held, dict):
            known = ", ".join(str(key) for key in tree)
            raise CheckpointUnsupported(f"{path}: no dict {place!r} for {kind} (`trees`); it has: {known}")
        for name, value in _flattened(held, ""):
            if isinstance(value, StoredTensor):
                yield stored(name, _kind(kind, name, value.dtype), value, tp, pp)
            elif kind != PARAM and (number := scalar(src, value)) is not None:
                yield Shard(name, kind, number[0], (), (), number[1], number[2], tp, pp)
            elif value is not None:
                ignored[f"{name} ({kind}: a {type(value).__name__})"] = None


def _safetensors(src: Folder, path: str, tp: int, pp: int) -> Iterator[Shard]:
    for name, (dtype, shape, offset) in header(src, path).items():
        numel = 1
        for extent in shape:
            numel *= extent
        pieces = (Piece(0, numel, path, offset),) if numel else ()
        yield Shard(name, _kind(PARAM, name, dtype), dtype, shape, pieces, None, False, tp, pp)


def _flattened(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _kind(kind: str, name: str, dtype: str) -> str:
    return guessed_kind(name, dtype) if kind == PARAM else kind


def _agreed_step(found: Sequence[tuple[str, list[Shard], dict[str, Any]]]) -> int:
    """The step that all files tell, 0 where none does."""
    told = {}
    for path, _, tree in found:
        number = next((tree[key] for key in _STEPS if type(tree.get(key)) is int and tree[key] >= 0), 0)
        told[path] = number
    first = found[0][0]
    for path, number in told.items():
        if number != told[first]:
            raise CheckpointCorrupt(
                path, f"is of step {number}, {first} of step {told[first]}: files of different saves"
            )
    return told[first]


def _list(names: Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names

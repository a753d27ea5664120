"""How tensors were cut over ranks, said by patterns on their names.

Owns the pattern language (`Patterns`, `Rule`, `parse`) and its geometry (`places`). All values are immutable, all
functions pure, safe in any thread. A document, YAML or a dict:

    default: cat                  # what no rule matches: cat along dimension 0 | replicated | error. Has to be given.
    layers:                       # where stages number their layers from 0
      match: 'decoder\\.layers\\.(?P<layer>\\d+)\\..*'
      per_stage: [12, 12]         # left out: as many as each stage has
    rules:
      - {match: '.*norm.*', as: replicated}

`match` is a regular expression for the whole name (with the layer's number in the model). Forms:

    replicated   the same on every rank; that is checked, byte by byte
    average      the mean of all ranks, in float64, rounded once
    cat          cut along `dim` (0)
    vocabulary   cut along dimension 0; rows from `rows` on are padding, and are left out
    parts        along `dim` (0) lie several tensors, each cut over the ranks by itself: `widths` [q, k, v], or named
                 {q: 8, k: 3, v: 3}; where a part's cut is not as even as it can be (the first ranks one more), its
                 widths rank by rank: {q: [4, 4], k: [2, 1]}
    experts      the number in group `expert` counts a rank's own experts; each rank holds as many as the next, or
                 `per_rank` [4, 4]
    tied         the same memory as the tensor `to`; that is checked, and it is not stored again
    ignore       left out

`rename` gives the name that the tensor gets (`\\1`, `\\g<group>`). Optimizer state whose shapes are those of its
parameter is cut as that is; any other is replicated. A tensor without dimensions is replicated under `default: cat`.
Everything has to fit: a rule that matches nothing, and a name that two rules match, are errors.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from everstep.storage.boxes import Box
from everstep.storage.errors import CheckpointUnsupported

_FIELDS: Final = {
    "replicated": (),
    "average": (),
    "cat": ("dim",),
    "vocabulary": ("rows",),
    "parts": ("dim", "widths"),
    "experts": ("per_rank",),
    "tied": ("to",),
    "ignore": (),
}
_DEFAULTS: Final = ("cat", "replicated", "error")


@dataclass(frozen=True)
class Rule:
    """One rule; `form` is its `as`. `parts` are (name, width) or (name, widths rank by rank)."""

    form: str
    match: re.Pattern[str] = re.compile("")
    rename: str | None = None
    dim: int = 0
    rows: int = 0
    to: str = ""
    parts: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
    per_rank: tuple[int, ...] = ()

    def renamed(self, name: str, found: re.Match[str]) -> str:
        """What the tensor is called from now on."""
        return name if self.rename is None else found.expand(self.rename)


@dataclass(frozen=True)
class Layers:
    """Layers numbered from 0 in every stage."""

    match: re.Pattern[str]
    per_stage: tuple[int, ...] = ()


@dataclass(frozen=True)
class Patterns:
    """A document, checked."""

    default: str
    rules: tuple[Rule, ...] = ()
    layers: Layers | None = None

    def matched(self, names: Sequence[str]) -> dict[str, tuple[Rule, str]]:
        """(rule, new name) of every name; raises CheckpointUnsupported listing all that does not fit."""
        used: set[Rule] = set()
        found: dict[str, tuple[Rule, str]] = {}
        problems = []
        for name in names:
            hits = [(rule, hit) for rule in self.rules if (hit := rule.match.fullmatch(name))]
            used.update(rule for rule, _ in hits)
            if len(hits) > 1:
                patterns = ", ".join(repr(rule.match.pattern) for rule, _ in hits)
                problems.append(f"{name!r} is matched by {len(hits)} rules: {patterns}")
            elif hits:
                found[name] = (hits[0][0], hits[0][0].renamed(name, hits[0][1]))
            elif self.default == "error":
                problems.append(f"{name!r} is matched by no rule, and default is 'error'")
            else:
                found[name] = (Rule(self.default), name)
        problems += [f"{rule.match.pattern!r} matches nothing" for rule in self.rules if rule not in used]
        if problems:
            raise CheckpointUnsupported("patterns: " + "; ".join(problems))
        return found


@dataclass(frozen=True)
class Place:
    """Box `local` of one rank's shard is box `box` of the tensor."""

    rank: int
    local: Box
    box: Box


def parse(value: "Patterns | Mapping[str, Any] | str | os.PathLike[str]") -> Patterns:
    """A document: a dict, YAML text, or the path of a YAML file; raises CheckpointUnsupported naming the field."""
    if isinstance(value, Patterns):
        return value
    if isinstance(value, os.PathLike) or (isinstance(value, str) and "\n" not in value and ":" not in value):
        try:
            value = Path(value).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointUnsupported(f"patterns: {os.fspath(value)!r} cannot be read: {error}") from error
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CheckpointUnsupported(f"patterns: not YAML: {error}") from error
    document = _mapping(value, "patterns", ("default", "layers", "rules"))
    if document.get("default") not in _DEFAULTS:
        raise _bad("patterns", "default", document.get("default"), f"one of {', '.join(_DEFAULTS)}")
    rules = document.get("rules") or []
    if not isinstance(rules, list | tuple):
        raise _bad("patterns", "rules", rules, "a list")
    layers = document.get("layers")
    return Patterns(
        document["default"],
        tuple(_rule(number, rule) for number, rule in enumerate(rules, 1)),
        None if layers is None else _layers(layers),
    )


def places(rule: Rule, name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], list[Place]]:
    """The tensor's shape, and where every rank's shard of it belongs; `shapes` are the shards' by rank.

    For replicated, average, experts and tied it is the first rank's. Raises CheckpointUnsupported where the shapes
    do not fit the rule.
    """
    first = shapes[0]
    if rule.form not in ("cat", "vocabulary", "parts") or (rule.form == "cat" and not first):
        if any(shape != first for shape in shapes):
            raise CheckpointUnsupported(f"{name!r} as {rule.form} has different shapes: {_spelt(shapes)}")
        whole = tuple((0, extent) for extent in first)
        return first, [Place(0, whole, whole)]
    dim = rule.dim
    others = {(len(shape), *shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if dim >= len(first) or len(others) > 1:
        raise CheckpointUnsupported(f"{name!r} as {rule.form} along dimension {dim} has shapes {_spelt(shapes)}")
    extents = [shape[dim] for shape in shapes]
    if rule.form == "parts":
        runs = _part_runs(rule, name, extents)
    else:
        starts = itertools.accumulate(extents, initial=0)
        runs = [(rank, 0, start, extent) for rank, (start, extent) in enumerate(zip(starts, extents, strict=False))]
    total = sum(extents)
    if rule.form == "vocabulary":
        if rule.rows > total:
            raise CheckpointUnsupported(f"{name!r} as vocabulary of {rule.rows} rows has only {total}")
        total = rule.rows
        runs = [(rank, local, to, max(0, min(extent, total - to))) for rank, local, to, extent in runs]

    def box(at: int, extent: int) -> Box:
        return tuple((at, extent) if d == dim else (0, size) for d, size in enumerate(first))

    shape = (*first[:dim], total, *first[dim + 1 :])
    return shape, [Place(rank, box(at, extent), box(to, extent)) for rank, at, to, extent in runs if extent]


def _part_runs(rule: Rule, name: str, extents: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(rank, where in the shard, where in the tensor, extent) of every rank's piece of every part."""
    ranks = len(extents)
    cuts = []
    for part, width in rule.parts:
        if isinstance(width, int):
            cuts.append([width // ranks + (rank < width % ranks) for rank in range(ranks)])
        elif len(width) == ranks:
            cuts.append(list(width))
        else:
            raise CheckpointUnsupported(f"{name!r}: part {part} has widths for {len(width)} ranks; there are {ranks}")
    sums = [sum(cut[rank] for cut in cuts) for rank in range(ranks)]
    if sums != list(extents):
        raise CheckpointUnsupported(
            f"{name!r}: widths {dict(rule.parts)} make {sums} rank by rank, but the shards have {list(extents)}; "
            "give a part's widths rank by rank where it is not cut evenly"
        )
    runs = []
    locals_ = [0] * ranks
    to = 0
    for cut in cuts:
        for rank, extent in enumerate(cut):
            runs.append((rank, locals_[rank], to, extent))
            locals_[rank] += extent
            to += extent
    return runs


def _rule(number: int, value: Any) -> Rule:
    where = f"patterns: rule {number}"
    raw = _mapping(value, where)
    where += f" ({raw.get('match')!r})"
    match = _regex(where, raw.get("match"))
    form = raw.get("as")
    if form not in _FIELDS:
        raise _bad(where, "as", form, f"one of {', '.join(_FIELDS)}")
    _mapping(raw, where, ("match", "as", "rename", *_FIELDS[form]))
    rename = raw.get("rename")
    if rename is not None:
        if not isinstance(rename, str):
            raise _bad(where, "rename", rename, "a text")
        try:
            re.sub(match, rename, "")
        except (re.error, IndexError) as error:
            raise _bad(where, "rename", rename, f"a replacement that fits match ({error})") from error
    rows = raw.get("rows", 0)
    if form == "vocabulary" and (type(rows) is not int or rows < 1):
        raise _bad(where, "rows", rows, "the number of rows without padding")
    dim = raw.get("dim", 0)
    if type(dim) is not int or dim < 0:
        raise _bad(where, "dim", dim, "a dimension from 0 on")
    to = raw.get("to", "")
    if form == "tied" and not (isinstance(to, str) and to):
        raise _bad(where, "to", to, "the name of the tensor it is tied to")
    if form == "experts" and "expert" not in match.groupindex:
        raise _bad(where, "match", match.pattern, "a pattern with a group (?P<expert>\\d+)")
    parts = _parts(where, raw.get("widths")) if form == "parts" else ()
    per_rank = _numbers(where, "per_rank", raw.get("per_rank", ())) if form == "experts" else ()
    return Rule(form, match, rename, dim, rows, to, parts, per_rank)


def _parts(where: str, widths: Any) -> tuple[tuple[str, int | tuple[int, ...]], ...]:
    allowed = "a list of widths, or widths by name, each a number or a list with one a rank"
    named = widths.items() if isinstance(widths, Mapping) else enumerate(widths) if isinstance(widths, list) else ()
    parts = tuple((str(name), tuple(width) if isinstance(width, list | tuple) else width) for name, width in named)
    numbers = [n for _, width in parts for n in (width if isinstance(width, tuple) else (width,))]
    if not parts or any(type(n) is not int or n < 0 for n in numbers):
        raise _bad(where, "widths", widths, allowed)
    return parts


def _layers(value: Any) -> Layers:
    raw = _mapping(value, "patterns: layers", ("match", "per_stage"))
    match = _regex("patterns: layers", raw.get("match"))
    if "layer" not in match.groupindex:
        raise _bad("patterns: layers", "match", match.pattern, "a pattern with a group (?P<layer>\\d+)")
    return Layers(match, _numbers("patterns: layers", "per_stage", raw.get("per_stage", ())))


def _numbers(where: str, field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or any(type(n) is not int or n < 0 for n in value):
        raise _bad(where, field, value, "a list of numbers")
    return tuple(value)


def _regex(where: str, value: Any) -> re.Pattern[str]:
    if not isinstance(value, str):
        raise _bad(where, "match", value, "a regular expression")
    try:
        return re.compile(value)
    except re.error as error:
        raise _bad(where, "match", value, f"a regular expression ({error})") from error


def _mapping(value: Any, where: str, fields: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointUnsupported(f"{where}: a {type(value).__name__}; a mapping is wanted")
    unknown = [] if fields is None else [field for field in value if field not in fields]
    if unknown:
        allowed = ", ".join(fields or ())
        raise CheckpointUnsupported(f"{where}: unknown field {unknown[0]!r}; known here: {allowed}")
    return value


def _bad(where: str, field: str, value: Any, allowed: str) -> CheckpointUnsupported:
    return CheckpointUnsupported(f"{where}: {field} is {value!r}; allowed: {allowed}")


def _spelt(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)

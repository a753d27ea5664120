"""Layouts: which rank holds which part of a training state.

Owns `Layout`, the rules that say how tensor and pipeline parallelism cut tensors by name, and `pieces`. A pure
description: nothing here knows an engine, and index and planner need none of it. Safe in any thread.

Ranks are numbered with tensor parallelism innermost and pipeline stages outermost:
rank = (stage * data + d) * tensor + t, for the d-th data-parallel rank.

    zero 0     every rank holds everything of its (stage, t) cell
    zero 1, 2  parameters and buffers as with 0; optimizer state is cut over the data-parallel ranks
    zero 3     everything is cut over them
What is cut over data-parallel ranks lies one tensor behind the other, by kind and type, in a flat array, which is
padded to equal shares: a share may hold parts of several tensors, or none. Padding is no piece.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from everstep.storage import boxes
from everstep.storage.boxes import Box
from everstep.storage.errors import IndexInvalid
from everstep.storage.index import TensorMeta

REPLICATED_KINDS: Final = ("param", "buffer")  # with zero 1 and 2

Piece = tuple[TensorMeta, int, int, Box]  # elements [start, stop) of a box; () is the whole tensor


@dataclass(frozen=True)
class Layout:
    """How a state is cut over ranks. Raises IndexInvalid for one that cannot be."""

    ranks: int
    zero: int = 0
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise IndexInvalid(f"zero {self.zero}; it can be 0, 1, 2 or 3")
        if min(self.ranks, self.tensor, self.pipeline) < 1 or self.ranks % (self.tensor * self.pipeline):
            raise IndexInvalid(
                f"{self.ranks} ranks with tensor {self.tensor} and pipeline {self.pipeline}; "
                "ranks must be a multiple of tensor x pipeline"
            )

    @property
    def data(self) -> int:
        """Data-parallel ranks in each cell."""
        return self.ranks // (self.tensor * self.pipeline)

    def place(self, rank: int) -> tuple[int, int, int]:
        """(stage, data-parallel rank, tensor-parallel rank) of a rank."""
        rest, t = divmod(rank, self.tensor)
        return (*divmod(rest, self.data), t)


@dataclass(frozen=True)
class Split:
    """Tensors whose whole name the regular expression matches are cut along `dimension` over tensor-parallel ranks.

    `widths`: the tensor is several ones joined along the dimension, of these extents (query, key and value), each cut
    by itself. Shares differ by one where they do not divide.
    """

    pattern: str
    dimension: int = 0
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Tensors whose whole name the regular expression matches are in one pipeline stage.

    `of` layers, equally many in each stage: the pattern's first group is the layer's number. Without: the first
    stage, or the last one where `last` is set. A tensor that no pattern matches is in every stage.
    """

    pattern: str
    of: int = 0
    last: bool = False


@dataclass(frozen=True)
class Rules:
    """Patterns are tried on every name: one that matches nothing, and two that match one name, are errors."""

    tensor: tuple[Split, ...] = ()
    pipeline: tuple[Stage, ...] = ()


def pieces(layout: Layout, metas: Sequence[TensorMeta], rules: Rules) -> list[list[Piece]]:
    """What each rank holds, in the order of `metas`; replicas are equal.

    No piece is empty but those of tensors without elements.

    Raises IndexInvalid for a rule that does not fit.
    """
    splits = _matched([rule.pattern for rule in rules.tensor], metas, "tensor")
    stages = _matched([rule.pattern for rule in rules.pipeline], metas, "pipeline")
    order = {meta.key: n for n, meta in enumerate(metas)}
    held: list[list[Piece]] = []
    for rank in range(layout.ranks):
        stage, d, t = layout.place(rank)
        mine: list[Piece] = []
        cut: dict[tuple[str, str], list[Piece]] = {}
        for meta in metas:
            if meta.name in stages and stage != _stage(rules.pipeline[stages[meta.name]], meta.name, layout.pipeline):
                continue
            split = rules.tensor[splits[meta.name]] if meta.name in splits else None
            share = _share(meta, split, layout.tensor, t)
            parts = [(meta, 0, boxes.numel(box) if box else meta.numel, box) for box in share]
            zero = 3 if meta.kind in REPLICATED_KINDS else 1  # cut over data-parallel ranks from here on
            if layout.zero >= zero and meta.numel:
                cut.setdefault((meta.kind, meta.dtype), []).extend(parts)
            else:
                mine += parts
        for run in cut.values():
            mine += _flat_share(run, d, layout.data)
        held.append(sorted(mine, key=lambda piece: (order[piece[0].key], piece[3], piece[1])))
    return held


def once(held: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """The same without replicas: each piece stays with one rank that holds it, the one with the fewest bytes yet."""
    holders: dict[Piece, list[int]] = {}
    for rank, mine in enumerate(held):
        for piece in mine:
            holders.setdefault(piece, []).append(rank)
    kept: list[list[Piece]] = [[] for _ in held]
    nbytes = [0] * len(held)
    for piece, ranks in holders.items():
        rank = min(ranks, key=lambda rank: (nbytes[rank], rank))
        nbytes[rank] += (piece[2] - piece[1]) * piece[0].itemsize
        kept[rank].append(piece)
    return kept


def from_placements(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[int | None], coordinate: Sequence[int]
) -> Box:
    """The box of a distributed tensor that lies at `coordinate` of a device mesh.

    `placements`, one a mesh dimension: the tensor dimension that it shards, or None where it replicates. As torch
    does it: mesh dimensions one after the other, each in shares of ceil(extent / ranks), the last ones shorter or
    empty (`torch.distributed.tensor.Shard`). Raises IndexInvalid for what does not fit.
    """
    if not len(mesh_shape) == len(placements) == len(coordinate):
        raise IndexInvalid(f"placements {placements} and coordinate {coordinate} on a mesh of shape {mesh_shape}")
    box = list(boxes.whole(shape))
    for ranks, dimension, at in zip(mesh_shape, placements, coordinate, strict=True):
        if not 0 <= at < ranks:
            raise IndexInvalid(f"coordinate {coordinate} on a mesh of shape {mesh_shape}")
        if dimension is None:
            continue
        if not -len(shape) <= dimension < len(shape):
            raise IndexInvalid(f"placements {placements} of a tensor of shape {list(shape)}")
        first, extent = box[dimension]
        share = -(-extent // ranks)
        skipped = min(at * share, extent)
        box[dimension] = (first + skipped, min(share, extent - skipped))
    return tuple(box)


def _matched(patterns: Sequence[str], metas: Iterable[TensorMeta], what: str) -> dict[str, int]:
    """The number of the pattern that matches each name, for those that one does."""
    found: dict[str, int] = {}
    names = dict.fromkeys(meta.name for meta in metas)
    for n, pattern in enumerate(patterns):
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise IndexInvalid(f"{what} pattern {pattern!r}: {error}") from error
        matching = [name for name in names if compiled.fullmatch(name)]
        if not matching:
            raise IndexInvalid(f"{what} pattern {pattern!r} matches no tensor")
        for name in matching:
            if found.setdefault(name, n) != n:
                raise IndexInvalid(f"{what} patterns {patterns[found[name]]!r} and {pattern!r} both match {name!r}")
    return found


def _stage(rule: Stage, name: str, pipeline: int) -> int:
    if not rule.of:
        return pipeline - 1 if rule.last else 0
    match = re.fullmatch(rule.pattern, name)
    assert match is not None, (rule, name)
    try:
        layer = int(match[1])
    except (IndexError, TypeError, ValueError) as error:
        raise IndexInvalid(f"pipeline pattern {rule.pattern!r}: its first group must be a layer's number") from error
    if not 0 <= layer < rule.of:
        raise IndexInvalid(f"{name!r} is layer {layer} of {rule.of} (pipeline pattern {rule.pattern!r})")
    return layer * pipeline // rule.of


def _share(meta: TensorMeta, split: Split | None, ranks: int, t: int) -> list[Box]:
    """The boxes that the t-th tensor-parallel rank holds; () is the whole tensor. A 0-dim one (a step) is not cut."""
    if split is None or ranks == 1 or not meta.shape:
        return [()]
    d = split.dimension
    if not 0 <= d < len(meta.shape):
        raise IndexInvalid(f"tensor pattern {split.pattern!r} cuts dimension {d} of {meta.name!r} {list(meta.shape)}")
    widths = split.widths or (meta.shape[d],)
    if sum(widths) != meta.shape[d]:
        raise IndexInvalid(
            f"tensor pattern {split.pattern!r}: widths {widths} of dimension {d} of {meta.name!r} {list(meta.shape)}"
        )
    box = boxes.whole(meta.shape)
    result: list[Box] = []
    first = 0
    for width in widths:
        start, stop = width * t // ranks, width * (t + 1) // ranks
        if start < stop:
            result.append((*box[:d], (first + start, stop - start), *box[d + 1 :]))
        first += width
    return result


def _flat_share(run: Sequence[Piece], d: int, data: int) -> list[Piece]:
    """What of these pieces, one behind the other, is in the d-th of `data` equal shares."""
    share = -(-sum(stop - start for _, start, stop, _ in run) // data)
    low, high = share * d, share * (d + 1)
    result: list[Piece] = []
    position = 0
    for meta, start, stop, box in run:
        a, b = max(low, position), min(high, position + stop - start)
        if a < b:
            result.append((meta, start + a - position, start + b - position, box))
        position += stop - start
    return result

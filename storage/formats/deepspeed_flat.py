"""Where a parameter's elements are in the flat groups that DeepSpeed's ZeRO keeps; no file is touched here.

Owns `Group`, `even_groups` (stages 1 and 2) and `cut_groups` (stage 3). Pure functions on values, safe in any thread.

Stages 1 and 2 lay a group's parameters one behind the other, some with padding behind them, pad the whole to a
multiple of the ranks (and of 2 elements a rank), and give each rank one equal partition. Files lack the padding of
the last partitions in most versions, in some only that of the weights. Stage 3 cuts every parameter by itself into
equal parts, the last padded, and each rank's group holds its parts one behind the other; a stage-3 group may be
written in several pieces (sub-groups).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everstep.storage.errors import CheckpointCorrupt
from everstep.storage.formats.saved import StoredTensor
from everstep.storage.formats.shards import Piece
from everstep.storage.index import ITEMSIZE_BYTES

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Group:
    """One group's parameters: shape and first element by name. `partition` is a rank's elements of stage 1 or 2,
    0 in stage 3, where `ranks` tell how each parameter is cut and positions count in a rank's own elements.
    """

    shapes: dict[str, tuple[int, ...]]
    at: dict[str, int]
    ranks: int
    partition: int = 0

    def pieces(self, name: str, tensors: Sequence[StoredTensor]) -> tuple[Piece, ...]:
        """Where the parameter is in the ranks' flat tensors."""
        numel, at = math.prod(self.shapes[name]), self.at[name]
        if not numel:
            return ()
        if not self.partition:
            part = -(-numel // self.ranks)
            cuts = [(r, r * part, min((r + 1) * part, numel), at) for r in range(-(-numel // part))]
        else:
            size = self.partition
            owners = range(at // size, (at + numel - 1) // size + 1)
            cuts = [
                (r, max(0, r * size - at), min(numel, (r + 1) * size - at), max(at, r * size) - r * size)
                for r in owners
            ]
        return tuple(_piece(tensors[r], start, stop, first, name) for r, start, stop, first in cuts)

    def held(self, rank: int) -> tuple[int, int]:
        """(without, with padding) how many elements a rank's flat tensor may have."""
        if not self.partition:
            total = sum(-(-math.prod(shape) // self.ranks) for shape in self.shapes.values())
            return total, total
        end = max((self.at[name] + math.prod(shape) for name, shape in self.shapes.items()), default=0)
        return max(0, min(self.partition, end - rank * self.partition)), self.partition


def even_groups(
    shapes: Shapes, paddings: Sequence[int], tensors: Sequence[StoredTensor], spare: Sequence[int]
) -> Group:
    """A group of stage 1 or 2; `tensors` are the ranks' weights, `spare` how many elements each lacks or pads.

    Raises CheckpointCorrupt where lengths and shapes do not fit.
    """
    ranks = len(tensors)
    at, position = {}, 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        at[name] = position
        position += math.prod(shape) + padding
    sizes = [tensor.numel for tensor in tensors]
    if len(set(sizes)) > 1:  # without padding: then it makes them equal
        sizes = [size + more for size, more in zip(sizes, spare, strict=True)]
    group = Group(dict(shapes), at, ranks, sizes[0])
    step = 2 * ranks
    if len(set(sizes)) > 1 or -(-position // step) != -(-(sizes[0] * ranks) // step):
        lengths = [tensor.numel for tensor in tensors]
        raise CheckpointCorrupt(
            tensors[0].file,
            f"a group of {len(shapes)} parameters has {position} elements, but the {ranks} ranks' partitions have "
            f"{lengths}, with padding {list(spare)}",
            next(iter(shapes), ""),
        )
    return group


def cut_groups(shapes: Shapes, ranks: int) -> Group:
    """A group of stage 3."""
    at, position = {}, 0
    for name, shape in shapes.items():
        at[name] = position
        position += -(-math.prod(shape) // ranks)
    return Group(dict(shapes), at, ranks)


def split(shapes: Sequence[Shapes], lengths: Sequence[int], ranks: int) -> list[Group]:
    """Stage 3's parameters as one group for each flat tensor of `lengths` elements.

    Newer versions list the parameters a flat tensor; older ones a group of the optimizer, which several flat tensors
    may make up, each with whole parameters. Raises CheckpointCorrupt where they do not fit.
    """
    listed = [dict(group) for group in shapes]
    groups = [cut_groups(group, ranks) for group in listed]
    if [group.held(0)[0] for group in groups] == list(lengths):
        return groups
    rest = [item for group in listed for item in group.items()]
    groups.clear()
    for length in lengths:
        taken: dict[str, tuple[int, ...]] = {}
        size = 0
        while rest and size < length:
            name, shape = rest.pop(0)
            taken[name] = shape
            size += -(-math.prod(shape) // ranks)
        if size != length:
            raise CheckpointCorrupt(
                "param_shapes", f"a flat group of {length} elements ends inside {next(reversed(taken), '')!r}"
            )
        groups.append(cut_groups(taken, ranks))
    if any(math.prod(shape) for _, shape in rest):
        raise CheckpointCorrupt("param_shapes", f"no flat group holds {rest[0][0]!r}", rest[0][0])
    return groups


def _piece(tensor: StoredTensor, start: int, stop: int, first: int, name: str) -> Piece:
    if first + stop - start > tensor.numel:
        raise CheckpointCorrupt(tensor.file, f"a flat group of {tensor.numel} elements is too short", name)
    return Piece(start, stop, tensor.file, tensor.offset + first * ITEMSIZE_BYTES[tensor.dtype])

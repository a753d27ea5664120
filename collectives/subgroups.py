"""Some members of a group, with the same operations among themselves; and a grid of such.

    pair = group.subgroup([1, 3])                 # rank 1 of the group is rank 0 of the pair
    grid = group.grid(data=2, tensor=2)           # of four members
    grid.tensor.all_reduce(activations)
    with group.transaction() as tx:
        tx.grid(data=2, tensor=2).data.all_reduce(gradients)   # counts with the transaction, or not at all

Making one sends nothing: members agree on it because they name the same ranks in the same order, and the same name.
A subgroup has tags of its own; two with the same ranks and name are one. It is of one view: when the group has gone
on to another, its operations raise PeerLost, and it is made again from the new ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from everstep.collectives.arguments import is_integer
from everstep.collectives.errors import PeerLost
from everstep.collectives.operations import Collectives, Operation
from everstep.collectives.work import Work


class Subgroup(Collectives):
    """`parent` is what it was made from: a group, a transaction of it, or another subgroup."""

    def __init__(self, parent: Collectives, ranks: Sequence[int], name: str = "") -> None:
        self.ranks = _checked(ranks, parent)
        self.name = name or f"subgroup {list(self.ranks)}"
        self.deterministic = parent.deterministic
        self._parent = parent
        self._view = parent._view_in_use()
        self._rank = self.ranks.index(parent.rank)
        self._scope: int = scope_of(self.ranks, name, parent._scope if isinstance(parent, Subgroup) else 0)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self.ranks)

    def _submit(self, operation: Operation) -> Work:
        view = self._parent._view_in_use()
        if view != self._view:
            raise PeerLost(f"{self.name} is of view {self._view}, which is over; make it again in view {view}")
        operation.within(self.ranks, self._scope, self.name)
        return self._parent._submit(operation)

    def _view_in_use(self) -> object:
        return self._parent._view_in_use()


@dataclass(frozen=True)
class Grid:
    """This member's subgroups along each axis, and where it stands on them (its rank in each).

    rank = (pipeline index * data + data index) * tensor + tensor index: the ranks of one tensor subgroup follow each
    other, as what talks most should be on one host; stages of a pipeline, which talk least, are furthest apart.
    """

    data: Subgroup
    tensor: Subgroup
    pipeline: Subgroup


def grid_of(parent: Collectives, data: int, tensor: int, pipeline: int) -> Grid:
    axes = {"pipeline": pipeline, "data": data, "tensor": tensor}  # the slowest first
    for name, length in axes.items():
        if not is_integer(length):
            raise TypeError(f"grid: {name} is {length!r}; a number of members is needed")
        if length < 1:
            raise ValueError(f"grid: {name} is {length}; it must be at least 1")
    if data * tensor * pipeline != parent.size:
        raise ValueError(
            f"grid: data * tensor * pipeline is {data} * {tensor} * {pipeline} = {data * tensor * pipeline}; "
            f"it must be {parent.size}, the number of members"
        )
    subgroups, stride = {}, parent.size
    for name, length in axes.items():
        stride //= length
        first = parent.rank - parent.rank // stride % length * stride
        subgroups[name] = Subgroup(parent, [first + i * stride for i in range(length)], name)
    return Grid(**subgroups)


def scope_of(ranks: Sequence[int], name: str = "", outer: int = 0) -> int:
    """Tells subgroups apart on the wire; 0 is the whole group. What decides is the same on all their members."""
    return zlib.crc32(f"{outer}:{','.join(map(str, ranks))}:{name}".encode()) | 1


def _checked(ranks: Sequence[int], parent: Collectives) -> tuple[int, ...]:
    ranks = tuple(ranks)
    if not all(map(is_integer, ranks)):
        raise TypeError(f"subgroup: ranks are {list(ranks)}; integers are needed")
    if len(set(ranks)) != len(ranks) or any(not 0 <= rank < parent.size for rank in ranks):
        raise ValueError(f"subgroup: ranks are {list(ranks)}; different ones of 0 to {parent.size - 1} are allowed")
    if parent.rank not in ranks:
        raise ValueError(f"subgroup: ranks are {list(ranks)}; this member, rank {parent.rank}, must be among them")
    return ranks

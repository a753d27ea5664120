"""Moves gradients to their owners along the lane tree, and updated parameters back.

The sums are those of [Note: lane tree]; this file only decides which rank sends which nodes when. ZeRO 2: each
lane's buckets leave as soon as backward has filled them, so a rank never keeps more than its shard and what is
on its way. ZeRO 0 and 1: a rank first sums its own contiguous lanes and sends the subtrees that remain.

[Note: rounds] What a rank sends of one bucket goes in rounds, a move to each owner in every round: ZeRO 2 has a round
for each of its lanes, ZeRO 0 and 1 have one, of all subtrees. Both ends know the rounds from the numbers of lanes and
ranks, so the receiver begins them before the data is there: it comes straight into the memory that the tree adds.

Belongs to the training thread. What is under way belongs to its Work: gradients are not changed before it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from everstep.collectives.work import Work
from everstep.platform.training.lanes import LaneTree, Node, cover, lanes_of
from everstep.platform.training.layout import FlatLayout, Run, intersect, total_of
from everstep.platform.training.shard import RankState, ShardStore

BUCKET_ELEMENTS = 1 << 18  # 1 MiB of float32: large against an operation's cost, small against a shard
_AHEAD = 2  # rounds begun before they are due: one on its way while the one before is waited for


class Group(Protocol):
    """What the exchange needs of the members of one view (everstep.collectives.members)."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def send_parts(self, parts: Sequence[torch.Tensor], to: int, tag: int = 0) -> Work: ...
    def recv_parts(self, parts: Sequence[torch.Tensor], source: int, tag: int = 0) -> Work: ...
    def share_parts(self, parts: Sequence[Sequence[torch.Tensor]], tag: int = 0) -> Work: ...
    def all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, tag: int = 0) -> Work: ...


class Bucket:
    """A contiguous part of the flat space, cut at tensor starts, that is reduced in one go."""

    def __init__(self, index: int, start: int, stop: int, params: Sequence[int], gaps: Sequence[Run]) -> None:
        self.index = index
        self.start = start
        self.stop = stop
        self.params = tuple(params)  # positions of the tensors that start here
        self._gaps = [slice(a - start, b - start) for a, b in gaps]

    def clear_gaps(self, flat: torch.Tensor) -> torch.Tensor:
        """Zeros in the padding only: clearing all of it costs as much as filling it."""
        for gap in self._gaps:
            flat[gap].zero_()
        return flat


def buckets_of(layout: FlatLayout) -> list[Bucket]:
    buckets: list[Bucket] = []
    start, members = 0, []
    for position in range(len(layout.tensors)):
        members.append(position)
        end = layout.tensors[position + 1].start if position + 1 < len(layout.tensors) else layout.total
        if end - start >= BUCKET_ELEMENTS or position + 1 == len(layout.tensors):
            ends = [*(layout.tensors[i].start for i in members[1:]), end]
            stops = [layout.tensors[i].stop for i in members]
            gaps = [(a, b) for a, b in zip(stops, ends, strict=True) if a < b]
            buckets.append(Bucket(len(buckets), start, end, members, gaps))
            start, members = end, []
    return buckets


def _add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.add_(right)


class GradientPool:
    """Memory for gradients, by bucket, used again as soon as they have left: other ranks on this host read it where
    it is, and its first use costs a page fault every 4 KiB."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, bucket: Bucket) -> torch.Tensor:
        """Undefined but for the padding, which is zero."""
        free = self._free.setdefault(bucket.index, [])
        return free.pop() if free else bucket.clear_gaps(self._allocate(bucket.stop - bucket.start))

    def give(self, bucket: Bucket, flat: torch.Tensor) -> None:
        self._free.setdefault(bucket.index, []).append(flat)


class _Leaving(NamedTuple):
    """Gradients that are being sent."""

    bucket: Bucket
    flat: torch.Tensor
    works: list[Work]


class _Coming(NamedTuple):
    """Nodes of a bucket that a peer sends in one round."""

    nodes: list[Node]
    values: list[torch.Tensor]
    work: Work


class Reduction:
    """The reduction of one step's lane gradients to their owners.

    `owned[r]` are rank r's runs; `waves` is ZeRO 2's order. `group` may be None for a single rank. Gradients come
    from `pool`, and go back to it.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        owned: Sequence[Sequence[Run]],
        lanes: int,
        waves: bool,
        group: Group | None,
        timeout_s: float,
        pool: GradientPool,
    ) -> None:
        self._pool = pool
        self._buckets = buckets
        self._waves = waves
        self._group = group
        self._rank = group.rank if group is not None else 0
        self._timeout_s = timeout_s
        self._local: list[LaneTree[torch.Tensor]] = [LaneTree(lanes, self._add_local(bucket)) for bucket in buckets]
        self._mine: list[LaneTree[torch.Tensor]] = [LaneTree(lanes, _add) for _ in buckets]
        self._parts = [[intersect(runs, ((b.start, b.stop),)) for runs in owned] for b in buckets]
        self._rounds = [_rounds(rank, len(owned), lanes, waves) for rank in range(len(owned))]
        self._expected = [0 for _ in buckets]  # rounds whose moves to this rank have begun
        self._coming: list[list[_Coming]] = [[] for _ in buckets]
        self._leaving: list[_Leaving] = []
        self._turn = 0
        for bucket in reversed(buckets):  # as backward fills them
            self._expect(bucket, _AHEAD)

    def add(self, bucket: Bucket, lane: int, gradient: torch.Tensor) -> None:
        """One lane's gradient over a bucket, out of the pool."""
        if self._waves:
            turn = self._rounds[self._rank].index([(0, lane)])
            if turn != self._turn:
                self._next_turn(turn)
            self._ship(bucket, turn, {(0, lane): gradient})
        else:
            self._local[bucket.index].add((0, lane), gradient)

    def finish(self, into: ShardStore) -> None:
        """Waits for everybody's part and leaves the sums over all lanes in `into`. Raises PeerLost."""
        for bucket in self._buckets:
            self._expect(bucket, max(map(len, self._rounds)))
            if not self._waves:
                self._ship(bucket, 0, self._local[bucket.index].nodes)
        for bucket in self._buckets:
            part = self._parts[bucket.index][self._rank]
            if not part:
                continue
            self._take(bucket, wait=True)
            root, at = self._mine[bucket.index].root(), 0
            for start, stop in part:
                into.view(start, stop).copy_(root[at : at + stop - start])
                at += stop - start
        for leaving in self._leaving:
            for work in leaving.works:
                work.wait(self._timeout_s)
        self._reuse()

    def _add_local(self, bucket: Bucket) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            left.add_(right)
            self._pool.give(bucket, right)
            return left

        return add

    def _reuse(self) -> None:
        while self._leaving and all(work.done() for work in self._leaving[0].works):
            item = self._leaving.pop(0)
            self._pool.give(item.bucket, item.flat)

    def _next_turn(self, turn: int) -> None:
        """Once a lane, since looking costs system calls: what has come is added, so memory stays shard-sized."""
        self._turn = turn
        for bucket in self._buckets:
            self._expect(bucket, turn + 1 + _AHEAD)
            self._take(bucket, wait=False)
        self._reuse()

    def _expect(self, bucket: Bucket, rounds: int) -> None:
        """Begins to receive what the others send of this rank's part in the first `rounds` rounds."""
        part = self._parts[bucket.index][self._rank]
        if self._group is None or not part:
            return
        for turn in range(self._expected[bucket.index], rounds):
            for peer, theirs in enumerate(self._rounds):
                if peer != self._rank and turn < len(theirs):
                    values = [torch.empty(total_of(part)) for _ in theirs[turn]]
                    places = [place for value in values for place in _cut(value, part)]
                    work = self._group.recv_parts(places, peer, _tag(bucket, turn))
                    self._coming[bucket.index].append(_Coming(theirs[turn], values, work))
        self._expected[bucket.index] = max(rounds, self._expected[bucket.index])

    def _take(self, bucket: Bucket, wait: bool) -> None:
        """Adds what has come, in order; with `wait` all that was expected."""
        coming = self._coming[bucket.index]
        while coming and (wait or coming[0].work.done()):
            item = coming.pop(0)
            item.work.wait(self._timeout_s)
            for node, value in zip(item.nodes, item.values, strict=True):
                self._mine[bucket.index].add(node, value)

    def _ship(self, bucket: Bucket, turn: int, nodes: dict[Node, torch.Tensor]) -> None:
        order = self._rounds[self._rank][turn]
        works = []
        for peer, part in enumerate(self._parts[bucket.index]):
            if not part:
                continue
            slices = {node: [nodes[node][a - bucket.start : b - bucket.start] for a, b in part] for node in order}
            if peer == self._rank:
                for node in order:
                    self._mine[bucket.index].add(node, torch.cat(slices[node]))
            elif self._group is not None:
                parts = [place for node in order for place in slices[node]]
                works.append(self._group.send_parts(parts, peer, _tag(bucket, turn)))
        self._leaving += [_Leaving(bucket, nodes[node], works) for node in order]


def _rounds(rank: int, ranks: int, lanes: int, waves: bool) -> list[list[Node]]:
    """The nodes that a rank sends of each bucket, by round ([Note: rounds])."""
    held = lanes_of(rank, ranks, lanes, waves)
    return [[(0, lane)] for lane in held] if waves else [cover(held, lanes)]


def _cut(flat: torch.Tensor, runs: Sequence[Run]) -> Sequence[torch.Tensor]:
    return torch.split(flat, [stop - start for start, stop in runs])


def _tag(bucket: Bucket, turn: int) -> int:
    """Unique within a step (those of the next step follow in order)."""
    return (bucket.index << 32) | turn


_GATHER = 1 << 62
_SHARE = 1 << 61
_MIRROR = 1 << 59  # 1 << 60: the state hash


def gather(state: RankState, owned: Sequence[Sequence[Run]], group: Group | None, timeout_s: float) -> None:
    """Every owner's master runs into every rank's `compute`. Raises PeerLost."""
    for start, stop in owned[group.rank if group is not None else 0]:
        state.compute[start:stop].copy_(state.master.view(start, stop))
    if group is not None:
        group.share_parts([[state.compute[a:b] for a, b in runs] for runs in owned], _GATHER).wait(timeout_s)


def share_gradients(store: ShardStore, owned: Sequence[Sequence[Run]], group: Group | None, timeout_s: float) -> None:
    """ZeRO 0: every owner's reduced runs into every rank's full `store`. Raises PeerLost."""
    if group is not None:
        group.share_parts([[store.view(a, b) for a, b in runs] for runs in owned], _SHARE).wait(timeout_s)


def mirror_gradients(
    store: ShardStore,
    owned: Sequence[Sequence[Run]],
    shadowed: Sequence[Sequence[Run]],
    group: Group | None,
    timeout_s: float,
) -> None:
    """Every owner's reduced runs to the rank that mirrors them; `shadowed` is empty where nobody does.

    Both directions are begun before either is waited for. Raises PeerLost.
    """
    if group is None or not shadowed:
        return
    works = []
    for peer in range(group.size):
        if peer != group.rank and (coming := intersect(shadowed[group.rank], owned[peer])):
            works.append(group.recv_parts([store.view(a, b) for a, b in coming], peer, _MIRROR))
    for peer in range(group.size):
        if peer != group.rank and (going := intersect(owned[group.rank], shadowed[peer])):
            works.append(group.send_parts([store.view(a, b) for a, b in going], peer, _MIRROR))
    for work in works:
        work.wait(timeout_s)

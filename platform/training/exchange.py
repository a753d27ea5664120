"""Moves gradients to their owners along the lane tree, and updated parameters back.

The sums are those of [Note: lane tree]; this file only decides which rank sends which nodes when. ZeRO 2: each
lane's buckets leave as soon as backward has filled them, so a rank never keeps more than its shard and what is
on its way. ZeRO 0 and 1: a rank first sums its own contiguous lanes and sends the subtrees that remain.

Belongs to the training thread. Wire order within a step is the same on every rank, tags are unique in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from everstep.platform.training.lanes import LaneTree, Node, cover, lanes_of
from everstep.platform.training.layout import FlatLayout, Run, intersect, total_of
from everstep.platform.training.shard import RankState, ShardStore, bytes_of

BUCKET_ELEMENTS = 1 << 18  # 1 MiB of float32: large against a frame's cost, small against a shard


class Wire(Protocol):
    """Tagged frames between the members of one view (everstep.collectives.transport)."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def send(self, peer: int, tag: int, buffers: Sequence[memoryview]) -> None: ...
    def recv(self, peer: int, tag: int, timeout_s: float) -> bytearray: ...
    def flush(self) -> None: ...


class Bucket:
    """A contiguous part of the flat space, cut at tensor starts, that is reduced in one go."""

    def __init__(self, index: int, start: int, stop: int, params: Sequence[int], gaps: Sequence[Run]) -> None:
        self.index = index
        self.start = start
        self.stop = stop
        self.params = tuple(params)  # positions of the tensors that start here
        self._gaps = [slice(a - start, b - start) for a, b in gaps]

    def empty(self) -> torch.Tensor:
        """Memory for its gradients, zeros only in the padding: clearing all of it costs as much as filling it."""
        flat = torch.empty(self.stop - self.start)
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


def _floats(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)


class Reduction:
    """The reduction of one step's lane gradients to their owners.

    `owned[r]` are rank r's runs; `waves` is ZeRO 2's order. `wire` may be None for a single rank.
    """

    def __init__(
        self,
        layout: FlatLayout,
        buckets: Sequence[Bucket],
        owned: Sequence[Sequence[Run]],
        lanes: int,
        waves: bool,
        wire: Wire | None,
        timeout_s: float,
    ) -> None:
        self._layout = layout
        self._buckets = buckets
        self._owned = owned
        self._lanes = lanes
        self._waves = waves
        self._wire = wire
        self._rank = wire.rank if wire is not None else 0
        self._ranks = len(owned)
        self._timeout_s = timeout_s
        self._local: list[LaneTree[torch.Tensor]] = [LaneTree(lanes, _add) for _ in buckets]
        self._mine: list[LaneTree[torch.Tensor]] = [LaneTree(lanes, _add) for _ in buckets]
        self._parts = [[intersect(runs, ((b.start, b.stop),)) for runs in owned] for b in buckets]

    def add(self, bucket: Bucket, lane: int, gradient: torch.Tensor) -> None:
        """One lane's gradient over a bucket; this object keeps it."""
        if self._waves:
            self._ship(bucket, (0, lane), gradient)
        else:
            self._local[bucket.index].add((0, lane), gradient)

    def finish(self, into: ShardStore) -> None:
        """Waits for everybody's part and leaves the sums over all lanes in `into`. Raises PeerLost."""
        if not self._waves:
            for bucket in self._buckets:
                for node, value in sorted(self._local[bucket.index].nodes.items()):
                    self._ship(bucket, node, value)
        for bucket in self._buckets:
            part = self._parts[bucket.index][self._rank]
            if not part:
                continue
            tree = self._mine[bucket.index]
            for peer in range(self._ranks):
                if peer != self._rank:
                    for node in self._nodes_of(peer):
                        tree.add(node, _floats(self._recv(peer, _tag(bucket, node))))
            root, at = tree.root(), 0
            for start, stop in part:
                into.view(start, stop).copy_(root[at : at + stop - start])
                at += stop - start
        if self._wire is not None:
            self._wire.flush()

    def _nodes_of(self, peer: int) -> list[Node]:
        held = lanes_of(peer, self._ranks, self._lanes, self._waves)
        return [(0, lane) for lane in held] if self._waves else cover(held, self._lanes)

    def _ship(self, bucket: Bucket, node: Node, value: torch.Tensor) -> None:
        for peer, part in enumerate(self._parts[bucket.index]):
            if not part:
                continue
            slices = [value[a - bucket.start : b - bucket.start] for a, b in part]
            if peer == self._rank:
                self._mine[bucket.index].add(node, torch.cat(slices))
            elif self._wire is not None:
                self._wire.send(peer, _tag(bucket, node), [bytes_of(s) for s in slices])

    def _recv(self, peer: int, tag: int) -> bytearray:
        assert self._wire is not None
        return self._wire.recv(peer, tag, self._timeout_s)


def _tag(bucket: Bucket, node: Node) -> int:
    """Unique within a step of one view: bucket, level, index (steps follow each other on one connection)."""
    level, index = node
    return (bucket.index << 32) | (level << 24) | index


_GATHER = 1 << 62
_SHARE = 1 << 61


def gather(state: RankState, owned: Sequence[Sequence[Run]], wire: Wire | None, timeout_s: float) -> None:
    """Every owner's master runs into every rank's `compute`. Raises PeerLost."""
    _spread(state.master, state.compute, owned, wire, _GATHER, timeout_s)


def share_gradients(store: ShardStore, owned: Sequence[Sequence[Run]], wire: Wire | None, timeout_s: float) -> None:
    """ZeRO 0: every owner's reduced runs into every rank's full `store`. Raises PeerLost."""
    if wire is None:
        return
    mine = owned[wire.rank]
    _send_runs(store, mine, wire, _SHARE)
    for peer, runs in enumerate(owned):
        if peer != wire.rank and runs:
            data, at = _floats(wire.recv(peer, _SHARE, timeout_s)), 0
            for start, stop in runs:
                store.view(start, stop).copy_(data[at : at + stop - start])
                at += stop - start
    wire.flush()


def _spread(
    store: ShardStore,
    into: torch.Tensor,
    owned: Sequence[Sequence[Run]],
    wire: Wire | None,
    tag: int,
    timeout_s: float,
) -> None:
    rank = wire.rank if wire is not None else 0
    for start, stop in owned[rank]:
        into[start:stop].copy_(store.view(start, stop))
    if wire is None:
        return
    _send_runs(store, owned[rank], wire, tag)
    for peer, runs in enumerate(owned):
        if peer != rank and runs:
            data, at = _floats(wire.recv(peer, tag, timeout_s)), 0
            assert data.numel() == total_of(runs), (
                f"rank {peer} sent {data.numel()} elements, it owns {total_of(runs)}"
            )
            for start, stop in runs:
                into[start:stop].copy_(data[at : at + stop - start])
                at += stop - start
    wire.flush()


def _send_runs(store: ShardStore, runs: Sequence[Run], wire: Wire, tag: int) -> None:
    if not runs:
        return
    views = [bytes_of(store.view(start, stop)) for start, stop in runs]
    for peer in range(wire.size):
        if peer != wire.rank:
            wire.send(peer, tag, views)

"""Brings a rank's state to a view's base step: own stamped memory ([Note: stamps]) first, then segments,
then what parity rebuilds, then files.

Everything goes through `plan()`. Belongs to the training thread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from everstep.collectives.tensors import bytes_of
from everstep.platform.training.conductor import Conductor, Seat
from everstep.platform.training.layout import Run, merge_runs
from everstep.platform.training.shard import Place, RankState
from everstep.storage.index import Source, StateIndex, merge
from everstep.storage.planner import Copy, Want, plan

_COST = {"live": 0, "segment": 2, "parity": 3, "file": 4}


def restore(state: RankState, runs: Sequence[Run], seat: Seat, conductor: Conductor) -> None:
    """Afterwards `state` holds `runs`, and what it mirrors, at `seat.base_step`, stamped.

    Raises ViewOver, or StorageError.
    """
    have, mirrored = seat.plan.have, seat.mirrored
    if have is None:
        state.hold(runs, mirrored)
        state.reset()
        return
    if state.stamp == seat.base_step and (state.own, state.mirrored) == (merge_runs(runs), merge_runs(mirrored)):
        return
    kept: list[Place] = []
    usable = StateIndex(have.step, have.tensors, tuple(f for f in have.fragments if f.source.kind != "live"))
    live = state.live_index(conductor.name)
    if live is not None and live.step == have.step:
        kept = list(state.places())
        usable = merge(usable, live)
    state.hold(runs, mirrored)

    def cost(source: Source, _want: Want) -> int:
        return 1 if source.kind == "segment" and conductor.own_domain(source.holder) else _COST[source.kind]

    copies = plan(usable, state.wants(have, conductor.name), cost)
    whole: dict[Want, torch.Tensor] = {}  # what regions are put together in
    buffers = [_room(copy, whole) for copy in copies]
    remote = []
    for copy, buffer in zip(copies, buffers, strict=True):
        if copy.source.kind == "live":
            _copy_live(kept, copy, bytes_of(buffer))
        else:
            remote.append((copy, bytes_of(buffer)))
    if remote:
        conductor.fetch(seat, remote)
    found = _Filled(copies, buffers)
    state.install(have, found.fill)


class _Filled:
    """Copies that have arrived, found by tensor and range."""

    def __init__(self, copies: Sequence[Copy], buffers: Sequence[torch.Tensor]) -> None:
        self._by_tensor: dict[tuple[str, str], list[tuple[int, int, torch.Tensor]]] = {}
        seen: set[Want] = set()
        for copy, buffer in zip(copies, buffers, strict=True):
            part: Copy | Want = copy
            if copy.region is not None:  # all regions of a want are in one buffer
                part = copy.region.want
                if part in seen:
                    continue
                seen.add(part)
            self._by_tensor.setdefault((copy.name, copy.kind), []).append((part.start, part.stop, buffer))
        for ranges in self._by_tensor.values():
            ranges.sort(key=lambda item: item[:2])

    def fill(self, want: Want, target: torch.Tensor) -> None:
        """Writes elements [want.start, want.stop) into the flat `target`."""
        ranges = self._by_tensor.get((want.name, want.kind), [])
        done = want.start
        first = max(bisect_right([start for start, _, _ in ranges], want.start) - 1, 0)
        for start, stop, buffer in ranges[first:]:
            a, b = max(start, done), min(stop, want.stop)
            if a != done or b <= a:
                continue
            size = target.element_size()
            source = buffer[(a - start) * size : (b - start) * size]
            target.view(torch.uint8)[(a - want.start) * size : (b - want.start) * size].copy_(source)
            done = b
        assert done == want.stop, f"{want.name}/{want.kind}: {done} of {want.start}:{want.stop} arrived"


def _room(copy: Copy, whole: dict[Want, torch.Tensor]) -> torch.Tensor:
    """Memory for a copy's bytes; all regions of one want share that of the want.

    Not a bytearray: that writes zeros first, in one thread, which halves the speed of what follows.
    """
    if copy.region is None:
        return torch.empty(copy.nbytes, dtype=torch.uint8)
    want = copy.region.want
    if want not in whole:
        whole[want] = torch.empty((want.stop - want.start) * copy.itemsize, dtype=torch.uint8)
    return whole[want]


def _copy_live(kept: Sequence[Place], copy: Copy, buffer: memoryview) -> None:
    done = copy.start
    for place in kept:
        if place.meta.key == (copy.name, copy.kind) and place.start <= done < place.stop:
            stop = min(place.stop, copy.stop)
            size = place.tensor.element_size()
            source = bytes_of(place.tensor[done - place.start : stop - place.start])
            buffer[(done - copy.start) * size : (stop - copy.start) * size] = source
            done = stop
    assert done == copy.stop, f"{copy.name}/{copy.kind}: own memory holds up to {done} of {copy.stop}"

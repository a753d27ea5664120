"""Writes one snapshot of a rank into a segment. Belongs to the training thread."""

from __future__ import annotations

from collections.abc import Callable

from everstep.collectives.tensors import bytes_of
from everstep.platform.training.shard import RankState
from everstep.storage.segment import Seal, SegmentMap, Writer


def write_snapshot(
    segment: SegmentMap, state: RankState, view: tuple[int, int], before_seal: Callable[[], None] = lambda: None
) -> Seal:
    """Writes and seals `state` at its stamp, cut for `view` (epoch, number). Raises SegmentFull.

    `before_seal` is called when everything but the seal is written; what it raises leaves the segment unsealed.
    """
    writer = Writer(segment)
    writer.begin()
    for meta in state.metas():
        # Every index lists the whole state's tensors: one that only a lost domain holds would otherwise be in
        # nobody's index, and its step would wrongly count as covered.
        writer.put(meta, 0, 0, b"")
    for place in state.places():
        writer.put(place.meta, place.start, place.stop, bytes_of(place.tensor))
    before_seal()
    return writer.seal(*view, state.stamp)

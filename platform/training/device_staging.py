"""Staging: device memory through which a copy of the state passes on its way to the host. See `device_copy.py`.

Owns that memory, and the layouts that name places in it. Belongs to the training thread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch

from everstep.platform.training.device_port import Mark, Port

log = logging.getLogger(__name__)

ALIGN: Final = 64  # of fragments in a segment, and of buckets in staging
# Words are copied, never numbers: a conversion of bfloat16 through float32 would rewrite NaNs.
_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True)
class Slice:
    """Bytes [start, stop) of item `item`, `at` bytes into their bucket."""

    item: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Bucket:
    """`nbytes` bytes that reach the host in one copy, `offset` bytes into target `target`."""

    target: int
    offset: int
    nbytes: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Layout:
    """How the items of a copy are cut, and their places in staging; used again while both stay the same."""

    buckets: Sequence[Bucket]
    last: Sequence[int]  # by item, the bucket that completes it; -1: nothing of it is on the device
    slots: int  # buckets that staging holds at a time; 0: none
    rooms: Sequence[torch.Tensor]  # by bucket: its slot, uint8
    views: Sequence[Sequence[torch.Tensor]]  # by bucket: the slices in its slot, as words
    marks: Sequence[Mark]  # by bucket: arrived

    @property
    def needed(self) -> int:
        """How many buckets must have been sent before the last source is read."""
        return max(0, len(self.buckets) - self.slots)


class Staging:
    """Memory of at most what a copy takes, with `margin_bytes` of the device left free; grows, never shrinks."""

    def __init__(self, port: Port, bucket_bytes: int, margin_bytes: int) -> None:
        self._port = port
        self._bucket_bytes = bucket_bytes
        self._margin_bytes = margin_bytes
        self._memory: torch.Tensor | None = None
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._told = -1

    def known(self, key: tuple[object, ...]) -> Layout | None:
        """The layout made under `key`, unless staging has changed since."""
        return self._layouts.get(key)

    def lay_out(self, key: tuple[object, ...], buckets: Sequence[Bucket], sizes: Sequence[int]) -> Layout:
        """Finds places for `buckets`; `sizes`: bytes an element of each item. Nothing may be under way."""
        last = [-1] * len(sizes)
        for b, bucket in enumerate(buckets):
            for part in bucket.slices:
                last[part.item] = b
        starts = list(accumulate((-(-bucket.nbytes // ALIGN) * ALIGN for bucket in buckets), initial=0))
        slots = self._take(starts[-1], len(buckets))
        rooms, views = [], []
        if slots and self._memory is not None:
            for b, bucket in enumerate(buckets):
                start = starts[b] if slots == len(buckets) else b % slots * self._bucket_bytes
                room = self._memory[start : start + bucket.nbytes]
                rooms.append(room)
                views.append(
                    [room[p.at : p.at + p.stop - p.start].view(_WORDS[sizes[p.item]]) for p in bucket.slices]
                )
        layout = Layout(buckets, last, slots, rooms, views, [self._port.mark() for _ in buckets])
        self._layouts[key] = layout
        return layout

    def _take(self, whole_bytes: int, count: int) -> int:
        """How many of `count` buckets fit at a time, after the memory has grown as far as wanted and possible."""
        have = 0 if self._memory is None else self._memory.numel()
        if have < whole_bytes:
            free = self._port.free_bytes() - self._margin_bytes
            want = whole_bytes if whole_bytes <= free else free // self._bucket_bytes * self._bucket_bytes
            if want > have:
                self.clear()
                self._memory = self._port.device_buffer(want)
                have = 0 if self._memory is None else want
        if have >= whole_bytes:
            return count
        slots = have // self._bucket_bytes
        slots = slots if slots >= 2 else 0
        if slots == self._told:
            return slots
        self._told = slots
        log.warning(
            "to release the state at once, a snapshot needs %d bytes of device memory beside a margin of %d: it goes "
            "%s, and the next step may have to wait for it",
            whole_bytes,
            self._margin_bytes,
            f"through a ring of {slots} buckets" if slots else "straight from the state to the host",
        )
        return slots

    def clear(self) -> None:
        """Gives the memory back, and forgets the layouts that name it."""
        self._layouts.clear()
        self._memory = None


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor as a flat one of integers, not copied; it costs thousands of calls a snapshot."""
    flat = tensor if tensor.dim() == 1 else tensor.view(-1)
    return flat.view(_WORDS[tensor.element_size()])

"""Which sample is drawn when, for data sets that should not be shuffled one by one.

Purpose: an order says the sample index of draw number 0, 1, 2, … over all epochs. `Shuffle` is the usual one; a data
set that knows a better one offers it by a method `order(seed)`, and `order_of` asks for it. Owns no state that would
have to be saved. Thread-safety: safe; what is cached is replaced as one tuple.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from everstep.storage.datasets.shuffle import Shuffle


class Order(Protocol):
    """The order in which samples are drawn; depends on nothing but how it was made."""

    def at(self, draw: int, /) -> int:
        """The sample index of draw number `draw` >= 0."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """A data set that brings its own order."""

    def order(self, seed: int, /) -> Order: ...


def order_of(dataset: Sized, seed: int) -> Order:
    """The data set's own order where it has one, else a shuffle of its samples."""
    return dataset.order(seed) if isinstance(dataset, Ordered) else Shuffle(len(dataset), seed)


class Straight:
    """Draw number i is index i: for data that is in its final order already."""

    def at(self, draw: int) -> int:
        return draw


class BlockShuffle:
    """A shuffle of samples that come in blocks, which are dear to open and cheap to read from.

    Every epoch puts the blocks into a new order, takes `together` of them at a time, and shuffles the samples of
    these. So whoever draws one sample after the other has at most `together` blocks open, and opens each once an
    epoch. With `together` at least the number of blocks it is a shuffle of all samples. Keyed by (seed, epoch) alone.

    `sizes`: samples of each block, int64[blocks]. Memory: 32 bytes a block. Raises ValueError without any sample.
    """

    def __init__(self, sizes: npt.ArrayLike, seed: int, together: int) -> None:
        sizes = np.asarray(sizes, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        kept = np.flatnonzero(sizes)  # an empty block has no place in the order
        if not kept.size:
            raise ValueError("a shuffle needs at least one sample, and every block is empty")
        if together < 1:
            raise ValueError(f"together: {together} blocks cannot be shuffled; give at least 1")
        self.samples = int(starts[-1])
        self.seed = seed
        self.together = together
        self._sizes = sizes[kept]
        self._starts = starts[kept]
        self._blocks = Shuffle(len(kept), seed)
        self._epoch: tuple[int, Any, Any] = (-1, None, None)
        self._mixed: tuple[int, Shuffle | None] = (-1, None)

    def at(self, draw: int) -> int:
        """Sample index of draw number `draw`: each once an epoch. O(log blocks), once an epoch O(blocks)."""
        epoch, position = divmod(draw, self.samples)
        blocks, ends = self._blocks_of(epoch)
        group = int(np.searchsorted(ends, position, side="right")) // self.together
        first = group * self.together
        last = min(first + self.together, len(blocks)) - 1
        begin = int(ends[first - 1]) if first else 0
        mixed = begin + self._shuffle_of(epoch, group, int(ends[last]) - begin).index(epoch, position - begin)
        at = int(np.searchsorted(ends, mixed, side="right"))
        return int(self._starts[blocks[at]]) + mixed - (int(ends[at - 1]) if at else 0)

    def _blocks_of(self, epoch: int) -> tuple[Any, Any]:
        """The epoch's order of blocks, and the position at which each ends."""
        cached, blocks, ends = self._epoch
        if cached != epoch:
            blocks = self._blocks.indices(epoch, 0, len(self._sizes))
            ends = np.cumsum(self._sizes[blocks])
            self._epoch = (epoch, blocks, ends)
        return blocks, ends

    def _shuffle_of(self, epoch: int, group: int, samples: int) -> Shuffle:
        cached, shuffle = self._mixed
        if shuffle is None or cached != group or shuffle.samples != samples:
            shuffle = Shuffle(samples, keyed(self.seed, "blocks", group))
            self._mixed = (group, shuffle)
        return shuffle


def keyed(seed: int, *key: int | str) -> int:
    """63 bits that depend on seed and key only."""
    text = " ".join(str(part) for part in ("everstep order 1", seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

"""The order in which samples are drawn: a keyed permutation that is computed, never stored.

Purpose: sample number `position` of epoch `epoch` is `Shuffle(samples, seed).index(epoch, position)`, the
same on every rank, after every restart and under every number of ranks, because nothing but the key decides.
Owns nothing but two numbers and the round keys of the newest epoch; no index list, so 10^12 samples cost the
same as ten. Thread-safety: safe; the cached round keys are replaced as one tuple.

Method: an alternating Feistel network over Z_a x Z_b (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002, section 5) with a x b just above the number of samples, and cycle walking for the few
values that fall outside. It shuffles; it is no cipher.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

# Four rounds are the least that mix both halves twice; six cost 2 microseconds more a sample.
_ROUNDS = 6
_MASK = (1 << 64) - 1


class Shuffle:
    """A permutation of range(samples) for every epoch, keyed by (seed, epoch).

    `samples` is the size of the data set. Raises ValueError when it is not positive.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError(f"a shuffle needs at least one sample, not {samples}")
        self.samples = samples
        self.seed = seed
        self._rows = max(1, math.isqrt(samples - 1) + 1)  # a: ceil(sqrt(samples))
        self._columns = -(-samples // self._rows)  # b: the least with a x b >= samples
        self._keys: tuple[int, tuple[int, ...]] = (-1, ())

    def index(self, epoch: int, position: int) -> int:
        """Sample index at `position` (0 <= position < samples) of `epoch`; a bijection within each epoch."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} is outside an epoch of {self.samples} samples")
        keys = self._round_keys(epoch)
        value = self._permute(position, keys)
        while value >= self.samples:  # ends: the walk follows a cycle that contains `position`
            value = self._permute(value, keys)
        return value

    def at(self, draw: int) -> int:
        """Sample index of draw number `draw` (0, 1, 2, ... over all epochs): each once an epoch."""
        epoch, position = divmod(draw, self.samples)
        return self.index(epoch, position)

    def indices(self, epoch: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """`index` of positions [first, first + count) at once: int64[count], about 20 times as fast as one by one.

        Raises IndexError for positions outside the epoch, ValueError above 2^62 samples.
        """
        if not 0 <= first <= first + count <= self.samples:
            raise IndexError(f"positions {first}:{first + count} are outside an epoch of {self.samples} samples")
        if self.samples > 1 << 62:
            raise ValueError(f"{self.samples} samples are too many for arrays of 64 bits; use index()")
        keys = self._round_keys(epoch)
        values = self._permute_all(np.arange(first, first + count, dtype=np.uint64), keys)
        while (outside := np.flatnonzero(values >= self.samples)).size:
            values[outside] = self._permute_all(values[outside], keys)
        return values.astype(np.int64)

    def _permute_all(self, values: npt.NDArray[Any], keys: tuple[int, ...]) -> npt.NDArray[Any]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row: Any = values // columns
        column: Any = values % columns
        for number, key in enumerate(keys):  # reduced before the addition, which would not fit into 64 bits
            if number % 2:
                column = (column + _mix_all(row ^ np.uint64(key)) % columns) % columns
            else:
                row = (row + _mix_all(column ^ np.uint64(key)) % rows) % rows
        permuted: npt.NDArray[Any] = row * columns + column
        return permuted

    def _permute(self, value: int, keys: tuple[int, ...]) -> int:
        rows, columns = self._rows, self._columns
        row, column = divmod(value, columns)
        for number, key in enumerate(keys):
            if number % 2:
                column = (column + _mix(row ^ key)) % columns
            else:
                row = (row + _mix(column ^ key)) % rows
        return row * columns + column

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        cached_epoch, keys = self._keys
        if cached_epoch == epoch:
            return keys
        digest = hashlib.blake2b(f"everstep shuffle 1 {self.seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        keys = tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
        self._keys = (epoch, keys)
        return keys


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): 64 bits in, 64 well-mixed bits out."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`_mix` of every element; unsigned arrays wrap at 64 bits by themselves."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[Any] = values ^ (values >> np.uint64(31))
    return mixed

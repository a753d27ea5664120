"""What multiplies and adds shards in host memory: a port of two operations, and the choice among its kernels.

Owns the port, the kernel for machines without ISA-L, and the padding of short shards, which is never done by
copying: each stretch of the result is computed from the shards that reach it. Any thread.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from everstep.storage.gf256 import horner_steps
from everstep.storage.isal import load_isal

Bytes = npt.NDArray[np.uint8]  # 1-D, contiguous, at any address

# Two to four of these fit into a second-level cache. 4+2 encodes at 3 GB/s of data, and decodes two losses at 1.
_TILE_BYTES: Final = 32 << 10


class Kernel(Protocol):
    """Arithmetic over GF(2^8), polynomial 0x11d, on bytes. Any thread, several at a time."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def combine(self, rows: tuple[bytes, ...], sources: Sequence[Bytes], results: Sequence[Bytes]) -> None:
        """results[i] = sum over j of rows[i][j] * sources[j].

        At least one row and one source; all arrays of one length, which may be 0; results overlap nothing.
        """
        ...

    def add(self, factor: int, source: Bytes, into: Bytes) -> None:
        """into += factor * source; both of one length."""
        ...


class NumpyKernel:
    """Doubles and XORs whole tiles, by Horner's rule over the bits of the factors. Needs numpy only."""

    name: Final = "numpy"

    def combine(self, rows: tuple[bytes, ...], sources: Sequence[Bytes], results: Sequence[Bytes]) -> None:
        """See `Kernel.combine`."""
        nbytes = len(results[0])
        spare = np.empty(min(_TILE_BYTES, nbytes), dtype=np.uint8)
        for at in range(0, nbytes, _TILE_BYTES):
            tile = slice(at, at + _TILE_BYTES)
            pieces = [source[tile] for source in sources]
            for row, result in zip(rows, results, strict=True):
                _horner(row, pieces, result[tile], spare)

    def add(self, factor: int, source: Bytes, into: Bytes) -> None:
        """See `Kernel.add`."""
        spare = np.empty((2, min(_TILE_BYTES, len(source))), dtype=np.uint8)
        for at in range(0, len(source), _TILE_BYTES):
            piece = source[at : at + _TILE_BYTES]
            product = spare[0, : len(piece)]
            _horner(bytes([factor]), [piece], product, spare[1])
            total = into[at : at + _TILE_BYTES]
            np.bitwise_xor(total, product, out=total)


def _horner(row: bytes, pieces: list[Bytes], total: Bytes, spare: Bytes) -> None:
    carry = spare[: len(total)]
    steps = horner_steps(row)
    total[:] = pieces[steps[0][0]] if steps else 0
    for number, columns in enumerate(steps):
        if number:
            # Doubling: shift left, and where a bit falls out, XOR with the polynomial's low byte.
            np.right_shift(total, 7, out=carry)
            np.multiply(carry, 0x1D, out=carry)
            np.add(total, total, out=total)
            np.bitwise_xor(total, carry, out=total)
        for column in columns if number else columns[1:]:
            np.bitwise_xor(total, pieces[column], out=total)


def best_kernel() -> Kernel:
    """ISA-L where it can be loaded, else numpy; the same bytes from both."""
    return load_isal() or NumpyKernel()


def combine_padded(
    kernel: Kernel, rows: tuple[bytes, ...], sources: Sequence[Bytes | None], results: Sequence[Bytes]
) -> None:
    """`Kernel.combine` of sources that may be shorter than the results (as if zeros followed) or None (all zeros)."""
    nbytes = len(results[0])
    lengths = [0 if source is None else len(source) for source in sources]
    for start, stop in pairwise(sorted({0, nbytes, *lengths})):
        reaching = [source[start:stop] for source in sources if source is not None and len(source) >= stop]
        parts = [result[start:stop] for result in results]
        if len(reaching) == len(sources):
            kernel.combine(rows, reaching, parts)
        elif reaching:
            columns = [at for at, length in enumerate(lengths) if length >= stop]
            kernel.combine(tuple(bytes(row[at] for at in columns) for row in rows), reaching, parts)
        else:
            for part in parts:
                part[:] = 0

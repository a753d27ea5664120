"""GF(2^8) and the matrices of the erasure code. Standard library only.

Owns the field (polynomial 0x11d), the parity matrix, the rows by which lost shards are rebuilt, and the order of
shifts and XORs that multiplies without tables. Pure functions of their arguments, from any thread; the caches
lock themselves.

[Note: parity matrix]
    row 0      1                            the plain XOR
    row 1      2^j                          j: the data shard's index
    row i >= 2 1 / (2^(i-1) + 2^-j)         + is XOR
This is a Cauchy matrix 1 / (x_i + y_j) with y_j = 2^-j, x_i = 2^(i-1), x_1 = 0 and x_0 at infinity, its rows scaled.
All x_i and y_j differ as long as data + parity <= 257, so the determinant of every square submatrix (a product of
differences of x's and y's; those with x_0 drop out) is not zero: any `data` of the data + parity shards give all the
others. Cauchy matrices: Bloemer et al., "An XOR-based erasure-resilient coding scheme", 1995; rows 0 and 1 are those
of H. P. Anvin, "The mathematics of RAID-6", and cheapest where there is no table look-up (GPUs).
A coefficient depends on (row, index) alone, not on how many there are, so a code with fewer data shards or fewer
parities is this one with the rest left out. Stored parity depends on this note: a change is a change of format.
"""

from functools import lru_cache
from typing import Final

POLYNOMIAL: Final = 0x11D
MAX_SHARDS: Final = 255
_ORDER: Final = 255  # of the multiplicative group; 2 generates it


def _powers() -> tuple[bytes, bytes]:
    power = bytearray(2 * _ORDER)
    log = bytearray(256)
    value = 1
    for exponent in range(_ORDER):
        power[exponent] = power[exponent + _ORDER] = value
        log[value] = exponent
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return bytes(power), bytes(log)


_POWER, _LOG = _powers()


def multiply(a: int, b: int) -> int:
    """a * b in the field; both 0..255."""
    return _POWER[_LOG[a] + _LOG[b]] if a and b else 0


def inverse(a: int) -> int:
    """1 / a in the field, for a 1..255."""
    assert 0 < a < 256
    return _POWER[_ORDER - _LOG[a]]


@lru_cache(maxsize=256)
def times(factor: int) -> bytes:
    """factor * x for x = 0..255, a table for `bytes.translate`."""
    return bytes(multiply(factor, x) for x in range(256))


def coefficient(row: int, index: int) -> int:
    """The factor of data shard `index` in parity `row`, 1..255. See [Note: parity matrix]."""
    if row == 0:
        return 1
    if row == 1:
        return _POWER[index]
    return inverse(_POWER[row - 1] ^ _POWER[_ORDER - index])


@lru_cache(maxsize=256)
def parity_row(row: int, data: int) -> bytes:
    """The factors of data shards 0..data-1 in parity `row`."""
    return bytes(coefficient(row, index) for index in range(data))


@lru_cache(maxsize=64)
def rebuild_rows(data: int, wanted: tuple[int, ...], have: tuple[int, ...]) -> tuple[bytes, ...]:
    """How the shards `wanted` follow from the shards `have`: one row each, one factor for each of `have`.

    Indices: 0..data-1 are data, data and more are parity. `have` are exactly `data` different ones. Gauss and
    Jordan on the lost data only: a matrix as wide as data shards are lost.
    """
    assert len(set(have)) == len(have) == data
    column = {index: at for at, index in enumerate(have)}
    lost = [index for index in range(data) if index not in column]
    parities = [index for index in have if index >= data]
    # For each parity that stands in: its factors of the lost data | itself and its factors of the data at hand.
    left = []
    right = []
    for index in parities:
        factors = parity_row(index - data, data)
        known = bytearray(data)
        known[column[index]] = 1
        for at, other in enumerate(have):
            if other < data:
                known[at] = factors[other]
        left.append(bytes(factors[other] for other in lost))
        right.append(bytes(known))
    rows = dict(zip(lost, _solve(left, right), strict=True))
    for index in have:
        if index < data:
            rows[index] = _unit(data, column[index])
    return tuple(rows[index] if index < data else _combined(index - data, data, rows) for index in wanted)


def _unit(width: int, at: int) -> bytes:
    return bytes(int(column == at) for column in range(width))


def _combined(row: int, data: int, rows: dict[int, bytes]) -> bytes:
    total = bytes(data)
    for index, factor in enumerate(parity_row(row, data)):
        total = _add(total, rows[index].translate(times(factor)))
    return total


def _solve(left: list[bytes], right: list[bytes]) -> list[bytes]:
    """The rows X with left * X = right; `left` is square and can be inverted."""
    size = len(left)
    rows = [a + b for a, b in zip(left, right, strict=True)]
    for at in range(size):
        pivot = next(row for row in range(at, size) if rows[row][at])
        rows[at], rows[pivot] = rows[pivot], rows[at]
        rows[at] = rows[at].translate(times(inverse(rows[at][at])))
        for row in range(size):
            if row != at and rows[row][at]:
                rows[row] = _add(rows[row], rows[at].translate(times(rows[row][at])))
    return [row[size:] for row in rows]


def _add(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a) ^ int.from_bytes(b)).to_bytes(len(a))


@lru_cache(maxsize=4096)
def horner_steps(row: bytes) -> tuple[tuple[int, ...], ...]:
    """Multiply and add without tables: which columns to XOR in, the total being doubled before each later step.

    Step i holds the columns whose factor has bit (steps - 1 - i) set (Horner's rule over the bits of the factors).
    Few and small factors take few steps: the XOR takes one. No steps: all factors are zero.
    """
    bits = max((factor.bit_length() for factor in row), default=0)
    return tuple(tuple(at for at, factor in enumerate(row) if factor >> bit & 1) for bit in reversed(range(bits)))

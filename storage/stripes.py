"""Where the parity of a group of failure domains stands. Pure.

A group has n domains and tolerates the loss of m of them; k = n - m. Each domain's payload is cut into k chunks.
There are n stripes, each of k chunks of k different domains and of their m parity rows on the m other domains:

    stripe j:  parity row r  on position (j + r) mod n          r = 0..m-1
               data chunk i  of position (j + m + i) mod n      i = 0..k-1, as that position's chunk i

So every position holds one row of m stripes and a chunk in the k others: memory and traffic are even, and the loss of
any m positions takes at most m elements of a stripe. It is RAID-5's rotation for any m (redset does it for m = 1).

Shorter payloads end in zeros that nobody stores or sends.
"""

from __future__ import annotations

from dataclasses import dataclass

_ALIGN_BYTES = 64


@dataclass(frozen=True)
class Stripes:
    """`lengths[p]`: bytes of the payload at position p. Needs 0 < parity < members."""

    lengths: tuple[int, ...]
    parity: int

    def __post_init__(self) -> None:
        assert 0 < self.parity < self.members, f"parity {self.parity} in a group of {self.members}"

    @property
    def members(self) -> int:
        return len(self.lengths)

    @property
    def data(self) -> int:
        return self.members - self.parity

    @property
    def chunk_bytes(self) -> int:
        """Of every chunk and every parity row."""
        return chunk_bytes(max(self.lengths), self.members, self.parity)

    def stripe_of_row(self, position: int, row: int) -> int:
        """The stripe whose parity row `row` stands on `position`."""
        return (position - row) % self.members

    def stripe_of_chunk(self, position: int, chunk: int) -> int:
        """The stripe that chunk `chunk` of `position` belongs to; it is the stripe's data element `chunk`."""
        return (position - self.parity - chunk) % self.members

    def data_position(self, stripe: int, element: int) -> int:
        return (stripe + self.parity + element) % self.members

    def parity_position(self, stripe: int, row: int) -> int:
        return (stripe + row) % self.members

    def chunk_range(self, position: int, chunk: int) -> tuple[int, int]:
        """(offset in the payload, bytes) of a chunk without the zeros behind its end."""
        start = min(chunk * self.chunk_bytes, self.lengths[position])
        return start, min(self.chunk_bytes, self.lengths[position] - start)


def chunk_bytes(longest: int, members: int, parity: int) -> int:
    """Bytes of a chunk where the longest payload has `longest`."""
    per_chunk = -(-longest // (members - parity))
    return -(-per_chunk // _ALIGN_BYTES) * _ALIGN_BYTES


def parity_bytes(longest: int, members: int, parity: int) -> int:
    """Bytes of the parity rows that one domain holds for one version."""
    return parity * chunk_bytes(longest, members, parity)

"""Blocks: what the files of a checkpoint are checked by.

Owns their length and the value `Blocks`. A file is cut into blocks of `BLOCK_BYTES` from its first byte on, header
included; the last one is shorter. The manifest has the xxh3_64 of each. Immutable, safe in any thread.
"""

from typing import Final, NamedTuple

# As long as a part of a local upload. Who wants some bytes reads their whole blocks: longer blocks cost more where
# little is wanted, shorter ones make a larger manifest (16 hex digits a block: 4 MB of them for a terabyte).
BLOCK_BYTES: Final = 4 << 20


class Blocks(NamedTuple):
    """A file's size in bytes and the xxh3_64 of each of its blocks."""

    bytes: int
    checksums: tuple[int, ...]


def block_count(nbytes: int) -> int:
    """How many blocks a file of `nbytes` has."""
    return -(-nbytes // BLOCK_BYTES)

"""What travels on a data connection: a fixed header, then `length` bytes for the kinds that carry any.

[Note: frames] Every frame names its view and its operation (scope, tag, sequence number). An operation begins
with an OPEN of every member to every other; it says what the member is about to do (operation, dtype, shape),
so a mismatch is found before any data moves. Data follows only to a member whose OPEN has come: it never meets
one that has no place for it, and memory for strangers' data is never needed. Small payloads ride in the OPEN.

Pure functions; no socket here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

OPEN = 1  # a member's part of an operation begins; payload: descriptor and perhaps small data
PIECE = 2  # payload: data
SLOT = 3  # data lies in a slot of the sender's arena; no payload
RELEASE = 4  # the receiver has done with a slot; no payload
SPAN = 5  # data lies in a registered tensor of the sender, at `slot` and `generation` as one offset; no payload
READ = 6  # the receiver has done with a span; no payload

COLLECTIVE = 0
SENDER = 1  # of a point-to-point pair: the frame's sender sends the tensor
RECEIVER = 2

_HEADER = struct.Struct("<BBHIIIqQIIIQ")
HEADER_BYTES = _HEADER.size
_MAGIC = 0x5EED
MAX_DESCRIPTOR_BYTES = 4096
EAGER_BYTES = 32 << 10  # up to here one trip to every member beats two through an owner
MAX_OPEN_BYTES = 2 + MAX_DESCRIPTOR_BYTES + EAGER_BYTES
MAX_PIECE_BYTES = 4 << 20
_OPEN_HEAD = struct.Struct("<H")
_LIMITS = {  # least and most bytes; a piece of none would count as come with nothing in it
    OPEN: (_OPEN_HEAD.size, MAX_OPEN_BYTES),
    PIECE: (1, MAX_PIECE_BYTES),
    SLOT: (1, MAX_PIECE_BYTES),
    RELEASE: (0, 0),
    SPAN: (1, MAX_PIECE_BYTES),
    READ: (0, 0),
}


class ProtocolError(Exception):
    """The other side sent what this protocol does not allow; its connection is given up.

    `peer`: its rank, where that is not who the frame came from that brought it to light.
    """

    def __init__(self, text: str, peer: int | None = None) -> None:
        super().__init__(text)
        self.peer = peer


class Header(NamedTuple):
    kind: int
    role: int
    scope: int
    tag: int
    seq: int
    key: int
    slot: int
    generation: int
    length: int


def pack(view: tuple[int, int], header: Header) -> bytes:
    kind, role, scope, tag, seq, key, slot, generation, length = header
    return _HEADER.pack(kind, role, _MAGIC, *view, scope, tag, seq, key, slot, generation, length)


def unpack(view: tuple[int, int], data: bytes | bytearray | memoryview, at: int = 0) -> Header:
    """Raises ProtocolError for anything that a member of this view does not send."""
    kind, role, magic, epoch, number, scope, tag, seq, key, slot, generation, length = _HEADER.unpack_from(data, at)
    limits = _LIMITS.get(kind)
    if magic != _MAGIC or limits is None or role > RECEIVER:
        raise ProtocolError(f"not a frame: magic {magic:#x}, kind {kind}, role {role}")
    if (epoch, number) != view:
        raise ProtocolError(f"frame of view {epoch}.{number}, this is {view[0]}.{view[1]}")
    if not limits[0] <= length <= limits[1]:
        raise ProtocolError(f"frame kind {kind} of {length} bytes; {limits[0]} to {limits[1]} are allowed")
    return Header(kind, role, scope, tag, seq, key, slot, generation, length)


def payload_bytes(header: Header) -> int:
    return header.length if header.kind in (OPEN, PIECE) else 0


def pack_open(descriptor: bytes, data: bytes | memoryview = b"") -> bytes:
    return b"".join((_OPEN_HEAD.pack(len(descriptor)), descriptor, data))


def unpack_open(payload: bytes | bytearray | memoryview) -> tuple[bytes, memoryview]:
    view = memoryview(payload)
    if len(view) < _OPEN_HEAD.size:
        raise ProtocolError(f"OPEN of {len(view)} bytes")
    (length,) = _OPEN_HEAD.unpack_from(view)
    if length > MAX_DESCRIPTOR_BYTES or _OPEN_HEAD.size + length > len(view):
        raise ProtocolError(f"OPEN with a descriptor of {length} bytes in {len(view)}")
    start = _OPEN_HEAD.size + length
    return bytes(view[_OPEN_HEAD.size : start]), view[start:]

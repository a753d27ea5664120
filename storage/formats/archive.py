"""Archives of `torch.save` with one tensor in each, written without having the tensor.

Owns `Archive`: what stands before and behind the tensor's bytes, of lengths that are known in advance, so that the
bytes can be streamed into a file whose size must be. A value; the functions keep no state.

    data.pkl, byteorder, version    in front
    data/0                          the bytes, at a multiple of 64; its checksum stands behind it (zip's flag bit 3)
    directory                       with the checksums of all
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from everstep.storage.boxes import row_major
from everstep.storage.index import ITEMSIZE_BYTES

LARGEST_BYTES: Final = (1 << 32) - (1 << 16)  # without zip64
_ALIGN_BYTES: Final = 64
_STORAGES: Final = {
    "float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long",
    "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool", "complex64": "ComplexFloat",
}  # fmt: skip
_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL: Final = struct.Struct("<4sHHHHHHIIIHHHHHII")
_BEHIND: Final = struct.Struct("<4sIII")
_END: Final = struct.Struct("<4sHHHHIIH")
_VERSION: Final = 20
_SUM_BEHIND: Final = 1 << 3


class _Record(NamedTuple):
    name: bytes
    flags: int
    nbytes: int
    at: int
    checksum: int


class Archive(NamedTuple):
    """`head`, then `nbytes` of a tensor, then `tail(crc32 of them)`; `total` bytes in all."""

    head: bytes
    nbytes: int
    records: tuple[_Record, ...]
    total: int

    def tail(self, checksum: int) -> bytes:
        """What stands behind the tensor's bytes, whose zlib.crc32 is `checksum`."""
        *front, data = self.records
        records = [*front, data._replace(checksum=checksum)]
        behind = _BEHIND.pack(b"PK\x07\x08", checksum, self.nbytes, self.nbytes)
        directory = b"".join(
            _CENTRAL.pack(
                b"PK\x01\x02", _VERSION, _VERSION, r.flags, 0, 0, 0, r.checksum, r.nbytes, r.nbytes, len(r.name),
                0, 0, 0, 0, 0, r.at,
            )
            + r.name
            for r in records
        )  # fmt: skip
        at = len(self.head) + self.nbytes + len(behind)
        end = _END.pack(b"PK\x05\x06", 0, 0, len(records), len(records), len(directory), at, 0)
        return behind + directory + end


def archive(dtype: str, shape: Sequence[int]) -> Archive:
    """The archive of a contiguous CPU tensor; it may have up to LARGEST_BYTES."""
    nbytes = math.prod(shape) * ITEMSIZE_BYTES[dtype]
    assert nbytes <= LARGEST_BYTES
    head = b""
    records = []
    small = {"data.pkl": _pickle(dtype, shape), "byteorder": b"little", "version": b"3\n"}
    for name, data in small.items():
        path = f"archive/{name}".encode()
        records.append(_Record(path, 0, len(data), len(head), zlib.crc32(data)))
        head += _LOCAL.pack(
            b"PK\x03\x04", _VERSION, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(path), 0
        ) + path + data  # fmt: skip
    path = b"archive/data/0"
    start = len(head) + _LOCAL.size + len(path) + 4
    padding = -start % _ALIGN_BYTES
    records.append(_Record(path, _SUM_BEHIND, nbytes, len(head), 0))
    head += _LOCAL.pack(b"PK\x03\x04", _VERSION, _SUM_BEHIND, 0, 0, 0, 0, 0, 0, len(path), 4 + padding)
    head += path + struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # torch's own padding field
    whole = Archive(head, nbytes, tuple(records), 0)
    return whole._replace(total=len(head) + nbytes + len(whole.tail(0)))


def _pickle(dtype: str, shape: Sequence[int]) -> bytes:
    """data.pkl: the call of torch's rebuild function, protocol 2."""
    typed = dtype in _STORAGES
    numel = math.prod(shape)
    kind = f"ctorch\n{_STORAGES[dtype]}Storage\n" if typed else "ctorch.storage\nUntypedStorage\n"
    length = numel if typed else numel * ITEMSIZE_BYTES[dtype]
    storage = b"(" + _text("storage") + kind.encode() + _text("0") + _text("cpu") + _number(length) + b"tQ"
    args = storage + _number(0) + _tuple(shape) + _tuple(row_major(shape)) + b"\x89ccollections\nOrderedDict\n)R"
    rebuild = b"_rebuild_tensor_v2" if typed else b"_rebuild_tensor_v3"
    last = b"" if typed else f"ctorch\n{dtype}\n".encode()
    return b"\x80\x02ctorch._utils\n" + rebuild + b"\n(" + args + last + b"tR."


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(data),)) + data


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"

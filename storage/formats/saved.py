"""Files of `torch.save`, read without torch and without running anything from them.

Owns `StoredTensor`, `read_saved` (zip archives, also those that lie inside another file) and `read_plain` (bare
pickles). The tree of values comes back with its tensors as `StoredTensor`: dtype, shape, strides and the byte
where the first element is. No tensor's bytes are read. Lengths are checked before memory is taken. Functions
keep no state, safe in any thread.
"""

import codecs
import io
import math
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from everstep.storage import boxes
from everstep.storage.errors import CheckpointCorrupt, CheckpointUnsupported
from everstep.storage.formats.unpickle import LIMIT_BYTES, StandIn, stand_in, unpickle
from everstep.storage.index import ITEMSIZE_BYTES
from everstep.storage.stores.port import Folder

_BLOCK_BYTES: Final = 1 << 14  # a directory and its pickle are some kilobytes, at both ends of the archive
_BLOCKS: Final = 16
_DIRECTORY_BYTES: Final = 1 << 26  # of 10^6 storages
_LOCAL: Final = struct.Struct("<4s22xHH")  # what a local header says about its own length
_LEGACY: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor in a file: `strides` in elements, `offset` in bytes from the file's start to its first element."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    file: str
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * ITEMSIZE_BYTES[self.dtype]

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie one behind the other in row-major order."""
        return boxes.without_gaps(boxes.whole(self.shape), self.strides)


class Dtype(NamedTuple):
    """A torch.dtype, by its name without "torch."."""

    name: str


class _StorageType(NamedTuple):
    dtype: str  # "" for untyped


class _Storage(NamedTuple):
    dtype: str
    offset: int
    nbytes: int


_STORAGES: Final = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
}  # fmt: skip


def read_saved(
    folder: Folder, path: str, *, allow: Mapping[str, Any] | None = None, offset: int = 0, length: int | None = None
) -> Any:
    """The value in a torch.save archive: file `path` of `folder`, or `length` bytes from byte `offset` of it.

    `allow` adds to what may be built: "module.name" → a StandIn subclass, a function, or a value; "module.*" lets
    everything below a module be a stand-in. Raises CheckpointUnsupported (naming what it refuses to build),
    CheckpointCorrupt, StoreError.
    """
    where = folder.child(path)
    if length is None:
        length = where.store.size(where.path) - offset
    window = _Window(where, offset, length)
    url = window.url
    try:
        found = {info.filename: info for info in zipfile.ZipFile(window).infolist()}
        pickles = [name for name in found if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointUnsupported(f"{url}: a zip archive without a data.pkl: not written by torch.save")
        prefix = pickles[0].removesuffix("data.pkl")
        order = found.get(f"{prefix}byteorder")
        if order is not None and _small(window, order, 16) != b"little":
            raise CheckpointUnsupported(f"{url}: not written on a little-endian machine")
        data = _small(window, found[pickles[0]], LIMIT_BYTES)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, ValueError, KeyError) as error:
        raise _not_a_zip(window, error) from error
    builder = _Builder(window, path, prefix, found)
    return unpickle(data, url, {**_PLAIN_NAMES, **builder.names(), **(allow or {})}, builder.storage)


def read_plain(folder: Folder, path: str, *, allow: Mapping[str, Any] | None = None) -> Any:
    """The value of a file that is one bare pickle, without tensors; `allow` and errors: see `read_saved`."""
    where = folder.child(path)
    size = where.store.size(where.path)
    if size > LIMIT_BYTES:
        raise CheckpointUnsupported(f"{where.url}: a pickle of {size} bytes; at most {LIMIT_BYTES} are read")
    data = bytearray(size)
    if where.store.read_into(where.path, 0, memoryview(data)) != size:
        raise CheckpointCorrupt(where.url, "cut off")
    return unpickle(bytes(data), where.url, {**_PLAIN_NAMES, **(allow or {})})


class _Window(io.RawIOBase):
    """Bytes [offset, offset + length) of a file as a file of their own, read in blocks of which a few are kept."""

    def __init__(self, where: Folder, offset: int, length: int) -> None:
        self._where, self.offset, self.length = where, offset, length
        self.url = f"{where.url} at byte {offset}" if offset else where.url
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        at = to + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if at < 0:
            raise ValueError("a position before the start")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        end = self.length if size < 0 else min(self.length, self._at + size)
        if end - self._at > _DIRECTORY_BYTES:
            raise ValueError(f"a directory of {end - self._at} bytes")
        data = self.at(self._at, max(0, end - self._at))
        self._at += len(data)
        return data

    def at(self, first: int, count: int) -> bytes:
        """Bytes [first, first + count), which must be there."""
        if first < 0 or count < 0 or first + count > self.length:
            raise ValueError(f"bytes {first}:{first + count} of {self.length}")
        if count > _BLOCK_BYTES:
            return self._fetch(first, count)
        blocks = range(first // _BLOCK_BYTES, (first + max(count, 1) - 1) // _BLOCK_BYTES + 1)
        joined = b"".join(self._block(number) for number in blocks)
        skip = first - blocks.start * _BLOCK_BYTES
        return joined[skip : skip + count]

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            first = number * _BLOCK_BYTES
            block = self._fetch(first, min(_BLOCK_BYTES, self.length - first))
            self._blocks[number] = block
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        return block

    def _fetch(self, first: int, count: int) -> bytes:
        data = bytearray(count)
        got = self._where.store.read_into(self._where.path, self.offset + first, memoryview(data)) if count else 0
        if got != count:
            raise CheckpointCorrupt(self._where.url, f"ends at byte {self.offset + first + got}, too early")
        return bytes(data)


class _Builder:
    """Turns the storages and rebuild calls of one archive into StoredTensor."""

    def __init__(self, window: _Window, path: str, prefix: str, found: dict[str, zipfile.ZipInfo]) -> None:
        self._window, self._path, self._url, self._prefix, self._found = window, path, window.url, prefix, found
        self._offsets: dict[str, int] = {}

    def storage(self, pid: Any) -> _Storage:
        """A persistent id: ("storage", type, key, device, number of elements)."""
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise CheckpointUnsupported(f"{self._url}: a reference to something that is no tensor's storage")
        dtype, key, numel = pid[1].dtype, pid[2], pid[4]
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise ValueError("a storage without a length")
        info = self._found.get(f"{self._prefix}data/{key}")
        nbytes = numel * (ITEMSIZE_BYTES[dtype] if dtype else 1)
        if info is None:
            raise CheckpointCorrupt(self._url, f"storage {key[:40]!r} is missing")
        if nbytes > info.file_size:
            raise CheckpointCorrupt(self._url, f"{info.filename} has {info.file_size} bytes, {nbytes} are needed")
        start = self._offsets.get(key)
        if start is None:
            start = self._offsets[key] = _data_start(self._window, info)
        return _Storage(dtype, self._window.offset + start, nbytes)

    def names(self) -> dict[str, Any]:
        return {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
        }

    def _tensor_v2(self, storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
        if len(rest) > 2 and rest[2]:
            raise CheckpointUnsupported(f"{self._url}: a tensor that is a conjugated or negated view; save a copy")
        return self._tensor(storage, first, shape, strides)

    def _tensor_v3(
        self, storage: Any, first: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> StoredTensor:
        if not isinstance(dtype, Dtype):
            raise ValueError("a tensor without a dtype")
        return self._tensor_v2(storage._replace(dtype=dtype.name), first, shape, strides, grad, hooks, *rest)

    def _tensor(self, storage: Any, first: Any, shape: Any, strides: Any) -> StoredTensor:
        shape, strides = _size(shape), _size(strides)
        if type(first) is not int or first < 0 or len(shape) != len(strides):
            raise ValueError("a tensor whose shape and strides do not fit")
        if storage.dtype not in ITEMSIZE_BYTES:
            raise CheckpointUnsupported(
                f"{self._url}: a tensor of dtype {storage.dtype or 'unknown'}; known: {', '.join(ITEMSIZE_BYTES)}"
            )
        size = ITEMSIZE_BYTES[storage.dtype]
        last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * size > storage.nbytes:
            raise CheckpointCorrupt(self._url, f"a tensor ends behind its storage of {storage.nbytes} bytes")
        return StoredTensor(storage.dtype, shape, strides, self._path, storage.offset + first * size)


def _small(window: _Window, info: zipfile.ZipInfo, limit: int) -> bytes:
    """A record that is no tensor; its checksum is compared where torch wrote one (it can be told not to)."""
    data = window.at(_data_start(window, info), info.file_size if info.file_size <= limit else -1)
    if info.CRC and zlib.crc32(data) != info.CRC:
        raise CheckpointCorrupt(window.url, f"{info.filename} does not match its checksum")
    return data


def _data_start(window: _Window, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes are, which its local header says; refused unless they are stored plainly."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointUnsupported(f"{window.url}: {info.filename} is compressed or encrypted; save it plainly")
    signature, name, extra = _LOCAL.unpack(window.at(info.header_offset, _LOCAL.size))
    start: int = info.header_offset + _LOCAL.size + name + extra
    if signature != b"PK\x03\x04" or info.file_size != info.compress_size or start + info.file_size > window.length:
        raise CheckpointCorrupt(window.url, f"{info.filename} is not where the directory says")
    return start


def _not_a_zip(window: _Window, error: Exception) -> Exception:
    head = window.at(0, min(16, window.length))
    if head.startswith(_LEGACY):
        return CheckpointUnsupported(
            f"{window.url}: written by torch.save before torch 1.6, or with _use_new_zipfile_serialization=False; "
            "load it and torch.save it again with a recent torch"
        )
    return CheckpointCorrupt(window.url, f"not a file of torch.save: {error}")


def _size(*args: Any) -> tuple[int, ...]:
    """torch.Size, or a tuple of extents or strides."""
    numbers = args[0] if args else ()
    if not isinstance(numbers, tuple | list) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a size that is none")
    return tuple(numbers)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, StoredTensor):
        raise ValueError("a parameter without a tensor")
    return data


def _rebuild_from_type(rebuild: Any, kind: Any, args: Any, *_: Any) -> Any:
    """A tensor with attributes of its own, or a parameter of a subclass: the tensor is what counts."""
    tensor = rebuild(*args) if callable(rebuild) and type(args) is tuple else None
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a tensor that is none")
    return tensor


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    pairs = args[0] if args and isinstance(args[0], list | tuple) else ()
    built: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise ValueError("a dict with an odd key")
        built[key] = value
    return built


def _set_of(make: Callable[[Any], Any]) -> Callable[..., Any]:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple) or not all(isinstance(i, str | int | float | None) for i in items):
            raise ValueError("a set with odd members")
        return make(items)

    return build


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`, which is how protocol 2 writes bytes."""
    if not isinstance(text, str) or not isinstance(encoding, str) or codecs.lookup(encoding).name != "iso8859-1":
        raise ValueError("bytes that are none")
    return text.encode("latin1")


def _bytes_of(make: Callable[[bytes], Any]) -> Callable[..., Any]:
    def build(data: Any = b"", encoding: Any = "latin1") -> Any:
        return make(_encoded(data, encoding) if isinstance(data, str) else bytes(_checked_bytes(data)))

    return build


def _checked_bytes(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray):  # a number would be a length to take
        raise ValueError("bytes that are none")
    return bytes(data)


def _member(owner: Any, name: Any) -> StandIn:
    """How some Pythons write a member of an enumeration; only ever one of a stand-in, and nothing is looked up."""
    if not (isinstance(owner, type) and issubclass(owner, StandIn)) or not isinstance(name, str):
        raise CheckpointUnsupported("refuses to build builtins.getattr of something that is no stand-in")
    return owner(name)


def _device(kind: Any = "", number: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(number, int | None):
        raise ValueError("a device that is none")
    return kind if number is None else f"{kind}:{number}"


def _numpy_scalar(kind: Any, data: Any = b"") -> Any:
    code = kind.args[0] if isinstance(kind, StandIn) and kind.args else ""
    code = code if isinstance(code, str) else ""
    form = {
        "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H",
        "u1": "B", "b1": "?",
    }.get(code)  # fmt: skip
    if form is None or not isinstance(data, bytes):
        raise CheckpointUnsupported(f"refuses to build a numpy value of dtype {code[:40]!r}")
    if isinstance(kind.state, tuple) and ">" in kind.state:
        raise CheckpointUnsupported("refuses to build a big-endian numpy value")
    return struct.unpack(f"<{form}", data)[0]


_NumpyDtype: Final = stand_in("numpy.dtype")
_Any: Final = stand_in("torch.Tensor")
_PLAIN_NAMES: Final[dict[str, Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *_: {},
    **{f"{b}.set": _set_of(set) for b in ("builtins", "__builtin__")},
    **{f"{b}.frozenset": _set_of(frozenset) for b in ("builtins", "__builtin__")},
    **{f"{b}.bytes": _bytes_of(bytes) for b in ("builtins", "__builtin__")},
    **{f"{b}.bytearray": _bytes_of(bytearray) for b in ("builtins", "__builtin__")},
    **{f"{b}.getattr": _member for b in ("builtins", "__builtin__")},
    **{f"{b}.{t.__name__}": t.__name__ for b in ("builtins", "__builtin__") for t in (dict, list, int, float)},
    "_codecs.encode": _encoded,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": lambda *_: "",
    "torch.Tensor": _Any,
    "torch.nn.parameter.Parameter": _Any,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.storage.UntypedStorage": _StorageType(""),
    **{f"torch.{name}Storage": _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{dtype}": Dtype(dtype) for dtype in (*ITEMSIZE_BYTES, "complex128", "float8_e8m0fnu")},
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}

"""GF(2^8) arithmetic by Intel's ISA-L, the library that the `pyeclib` wheel brings along.

Owns the search for the library and the calls into it, by pointers: nothing is copied, nothing of the size of a
shard is allocated. Any thread; the calls release the interpreter's lock while they work.

Why this one (`benchmarks/erasure.py`, one thread, memory beyond the caches, GB/s of data): XOR 12 to 19, which is
what a core can read; numpy and torch in the best of tiles 7 to 10, zfec 2.2. 4+2: 8 to 9.5; numpy 1 to 3, zfec 1.1,
and this same library behind pyeclib's interface, which copies, 1 to 4.6.
"""

import ctypes
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from everstep.storage.gf256 import multiply

_log = logging.getLogger(__name__)

_TABLE_BYTES: Final = 32  # for each factor
# The library takes up to six rows in one pass over the sources, three without AVX-512; for more it reads them again.
# In tiles it finds them in cache: 8+8 at 7.0 GB/s instead of 4.8. Few rows run best in one call.
_ONE_PASS_ROWS: Final = 3
_TILE_BYTES: Final = 64 << 10
_CALL_BYTES: Final = 1 << 30  # its lengths are C ints
# What its XOR asks for. From memory beyond the caches that is 9% faster than factors of one.
_XOR_ALIGN_BYTES: Final = 32


class IsaL:
    """A kernel (see `kernels.Kernel`) over the functions of a loaded library, at most `call_bytes` a call.

    Raises AttributeError when the library lacks one of them.
    """

    name: Final = "isa-l"

    def __init__(self, library: ctypes.CDLL, call_bytes: int = _CALL_BYTES) -> None:
        self.library = library
        self._call_bytes = call_bytes
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._init: Any = library.ec_init_tables
        self._init.argtypes, self._init.restype = [integer, integer, pointer, pointer], None
        self._encode: Any = library.ec_encode_data
        self._encode.argtypes, self._encode.restype = [integer, integer, integer, pointer, pointer, pointer], None
        self._xor: Any = library.xor_gen
        self._xor.argtypes, self._xor.restype = [integer, integer, pointer], integer
        self._update: Any = library.ec_encode_data_update
        self._update.argtypes = [integer, integer, integer, integer, pointer, pointer, pointer]
        self._update.restype = None
        # 64 sets of factors: what a run's layout, and one loss in it, ask for again and again.
        self._tables = lru_cache(maxsize=64)(self._new_tables)

    def _new_tables(self, rows: tuple[bytes, ...]) -> ctypes.Array[ctypes.c_char]:
        columns = len(rows[0])
        tables = ctypes.create_string_buffer(_TABLE_BYTES * columns * len(rows))
        self._init(columns, len(rows), b"".join(rows), tables)
        return tables

    def combine(
        self,
        rows: tuple[bytes, ...],
        sources: Sequence[npt.NDArray[np.uint8]],
        results: Sequence[npt.NDArray[np.uint8]],
    ) -> None:
        """See `kernels.Kernel.combine`."""
        nbytes = len(results[0])
        inputs = [_address(source) for source in sources]
        outputs = [_address(result) for result in results]
        plain = len(rows) == 1 and len(inputs) > 1 and not rows[0].strip(b"\1")  # all factors are one
        if plain and not any(number % _XOR_ALIGN_BYTES for number in (*inputs, *outputs, self._call_bytes)):
            self._xor_all([*inputs, *outputs], nbytes)
            return
        tables = self._tables(rows)
        tile = self._call_bytes if len(rows) <= _ONE_PASS_ROWS else _TILE_BYTES
        input_pointers = ctypes.c_void_p * len(inputs)
        output_pointers = ctypes.c_void_p * len(outputs)
        for at in range(0, nbytes, tile):
            self._encode(
                min(tile, nbytes - at), len(inputs), len(outputs), tables,
                input_pointers(*[address + at for address in inputs]),
                output_pointers(*[address + at for address in outputs]),
            )  # fmt: skip

    def _xor_all(self, addresses: list[int], nbytes: int) -> None:
        pointers = ctypes.c_void_p * len(addresses)
        for at in range(0, nbytes, self._call_bytes):
            length = min(self._call_bytes, nbytes - at)
            failed = self._xor(len(addresses), length, pointers(*[address + at for address in addresses]))
            assert not failed

    def add(self, factor: int, source: npt.NDArray[np.uint8], into: npt.NDArray[np.uint8]) -> None:
        """See `kernels.Kernel.add`."""
        tables = self._tables((bytes([factor]),))
        for at in range(0, len(source), self._call_bytes):
            length = min(self._call_bytes, len(source) - at)
            output = (ctypes.c_void_p * 1)(_address(into) + at)
            self._update(length, 1, 1, 0, tables, _address(source) + at, output)


def _address(array: npt.NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


@lru_cache(maxsize=1)
def load_isal() -> IsaL | None:
    """ISA-L from pyeclib's wheel, else the system's; None when there is none that works here."""
    for path in _candidates():
        try:
            kernel = IsaL(ctypes.CDLL(path))
        except (OSError, AttributeError) as error:  # built for another machine; too old
            _log.info("%s: not used for erasure codes: %s", path, error)
            continue
        if agrees(kernel):
            return kernel
        _log.warning("%s: not used for erasure codes: its results are not those of GF(256) over 0x11d", path)
    return None


def _candidates() -> Iterator[str]:
    found = importlib.util.find_spec("pyeclib")
    for folder in (found.submodule_search_locations or ()) if found else ():
        # Where auditwheel puts the libraries of a wheel; nothing of pyeclib itself is imported.
        yield from sorted(map(str, Path(folder).parent.glob("pyeclib.libs/libisal*.so*")))
    yield "libisal.so.2"


def agrees(kernel: IsaL) -> bool:
    """Whether the kernel multiplies as `gf256` does: every product once, and a length that leaves a vector's tail.

    Parity that another field made would restore garbage; this costs about a millisecond, once a process.
    """
    every = np.arange(256, dtype=np.uint8)
    source = np.concatenate([every, every[:75]])
    result = np.zeros_like(source)
    total = np.zeros_like(source)
    for factor in (1, 2, 29, 142, 255):
        wanted = np.array([multiply(factor, int(x)) for x in source], dtype=np.uint8)
        kernel.combine((bytes([factor]),), [source], [result])
        kernel.add(factor, source, total)
        if not np.array_equal(result, wanted):
            return False
    kernel.combine((bytes([1, 2, 29, 142, 255]),), [source] * 5, [result])
    if not np.array_equal(result, total):
        return False
    room = np.zeros(3 * 512 + _XOR_ALIGN_BYTES, dtype=np.uint8)
    first = -_address(room) % _XOR_ALIGN_BYTES  # so that XOR is done by the function that is meant for it
    a, b, both = (room[at : at + len(source)] for at in range(first, first + 3 * 512, 512))
    a[:], b[:] = source, total
    kernel.combine((b"\1\1",), [a, b], [both])
    return np.array_equal(both, source ^ total)

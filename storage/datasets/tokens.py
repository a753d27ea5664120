"""Token ids in windows, from raw arrays on a disk or in a bucket.

Purpose: the data of a language model that was tokenised beforehand. Owns a cache of blocks (remote files only), up to
128 open files and 16 bytes a file; nothing grows with the number of tokens. Thread-, fork- and pickle-safety: safe
(source.py). Local files are read by pread, not mapped: source.py says why.
"""

from __future__ import annotations

import ast
import operator
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from everstep.storage.datasets.cache import Cache, CacheCounts
from everstep.storage.datasets.errors import DatasetDamaged, DatasetError
from everstep.storage.datasets.source import DataFile, Where, open_files

if TYPE_CHECKING:
    import torch

SUFFIXES: Final = (".bin", ".npy")
DTYPES: Final = ("uint8", "uint16", "uint32", "int32", "int64")
_NPY: Final = b"\x93NUMPY"
_MOST_HEADER: Final = 64 << 10


class Tokens:
    """Windows over files of token ids: sample i is int64[length + 1].

    As in `TextBytes`, the last token of a window is the first of the next, so that inputs [:-1] cover a file without
    overlap and targets [1:] are the inputs one token on. No window crosses from one file into the next; what is left
    at a file's end is not used.

    `where`: files, folders (*.bin, *.npy), globs or URLs. `length`: tokens a window. `dtype`: of raw files, in this
    machine's byte order (uint8 for bytes of text); .npy files say theirs. `cache_bytes`, `block_bytes`: remote files
    are read in blocks of the second, and blocks of at most the first are kept.
    Raises DatasetError and its kinds; IndexError for a sample that is not there.
    """

    def __init__(
        self,
        where: Where,
        length: int,
        dtype: str | None = None,
        *,
        cache_bytes: int = 64 << 20,
        block_bytes: int = 256 << 10,
    ) -> None:
        if length < 1:
            raise DatasetError(f"length: a window of {length} tokens cannot be; give at least 1")
        if dtype is not None and dtype not in DTYPES:
            raise DatasetError(f"dtype: {dtype!r} is no type of token ids; allowed: {', '.join(DTYPES)}")
        if block_bytes < 1:
            raise DatasetError(f"block_bytes: {block_bytes} cannot be read; give at least 1")
        self.length = length
        self._block_bytes = block_bytes
        self._files = open_files(where, SUFFIXES)
        self._arrays = [_array(file, dtype) for file in self._files]
        self._ends = list(accumulate((tokens - 1) // length if tokens else 0 for _, _, tokens in self._arrays))
        self._cache: Cache[bytes] = Cache(cache_bytes)
        if not len(self):
            most = max(self._arrays, key=lambda array: array[2])[2]
            raise DatasetError(
                f"{self._files[0].url}{' and others' if len(self._files) > 1 else ''}: the longest file has {most:,}"
                f" tokens, less than one window of {length} + 1; name more data, or shorten the window"
            )

    @property
    def tokens(self) -> int:
        """Token ids in all files, those left over at their ends included."""
        return sum(tokens for _, _, tokens in self._arrays)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> torch.Tensor:
        import torch

        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside a data set of {len(self)} windows")
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number - 1] if number else 0)
        dtype, first_byte, _ = self._arrays[number]
        start = first_byte + within * self.length * dtype.itemsize
        data = self._read(self._files[number], start, (self.length + 1) * dtype.itemsize)
        return torch.from_numpy(np.frombuffer(data, dtype=dtype).astype(np.int64))

    def cache_counts(self) -> CacheCounts:
        """What the cache of remote blocks did in this process."""
        return self._cache.counts()

    def close(self) -> None:
        """Close files and empty the cache; a later access opens them again."""
        self._cache.clear()
        self._files[0].close()

    def _read(self, file: DataFile, start: int, nbytes: int) -> bytes:
        if file.is_local:
            return file.read(start, nbytes)  # the kernel's page cache holds what was read
        size = self._block_bytes
        blocks = [self._block(file, number) for number in range(start // size, (start + nbytes - 1) // size + 1)]
        skip = start % size
        return blocks[0][skip : skip + nbytes] if len(blocks) == 1 else b"".join(blocks)[skip : skip + nbytes]

    def _block(self, file: DataFile, number: int) -> bytes:
        def load() -> tuple[bytes, int]:
            first = number * self._block_bytes
            data = file.read(first, min(self._block_bytes, file.bytes - first))
            return data, len(data)

        return self._cache.get((file.url, number), load)


def _array(file: DataFile, dtype: str | None) -> tuple[np.dtype[Any], int, int]:
    """Element type, first byte and number of the ids in a file."""
    if file.bytes >= len(_NPY) and file.read(0, len(_NPY)) == _NPY:
        return _npy(file, dtype)
    if dtype is None:
        raise DatasetError(
            f"{file.url}: a raw file does not say the type of its tokens; give dtype= one of {', '.join(DTYPES)}"
        )
    element = np.dtype(dtype)
    if file.bytes % element.itemsize:
        raise DatasetDamaged(
            f"{file.url}: {file.bytes:,} bytes are no whole number of {dtype} ({element.itemsize} bytes each): the"
            " file is cut off, or of another dtype"
        )
    return element, 0, file.bytes // element.itemsize


def _npy(file: DataFile, dtype: str | None) -> tuple[np.dtype[Any], int, int]:
    """The header of NumPy's format 1.0 to 3.0 (numpy.lib.format); a Python literal, which is not evaluated."""
    start = file.read(0, min(12, file.bytes))
    wide = start[6:7] in (b"\x02", b"\x03")
    prefix = 12 if wide else 10
    length = int.from_bytes(start[8:prefix], "little")
    if len(start) < prefix or start[6] not in (1, 2, 3) or length > _MOST_HEADER or prefix + length > file.bytes:
        raise DatasetDamaged(f"{file.url}: begins like a .npy file, but its header is not one; write it again")
    try:
        header = ast.literal_eval(file.read(prefix, length).decode("utf-8").strip())
        element, shape = np.dtype(header["descr"]), tuple(header["shape"])
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise DatasetDamaged(f"{file.url}: the header of this .npy file cannot be read: {error}") from error
    if (
        element.newbyteorder("=").name not in DTYPES
        or len(shape) != 1
        or not isinstance(shape[0], int)
        or shape[0] < 0
    ):
        raise DatasetError(
            f"{file.url}: holds {element.name}{list(shape)}; token ids must be one dimension of {', '.join(DTYPES)}"
        )
    if dtype is not None and element.newbyteorder("=").name != dtype:
        raise DatasetError(
            f"{file.url}: holds {element.name}, and dtype= says {dtype}; leave dtype out for .npy files"
        )
    if prefix + length + shape[0] * element.itemsize > file.bytes:
        raise DatasetDamaged(
            f"{file.url}: should hold {shape[0]:,} {element.name}, but ends after"
            f" {(file.bytes - prefix - length) // element.itemsize:,}: the file is cut off"
        )
    return element, prefix + length, shape[0]

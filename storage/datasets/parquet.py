"""Parquet: rows by number, over one file or many.

Purpose: sample i is row i as a dictionary. Opening reads footers only; a row group is read and decoded when one of
its rows is wanted, in the chosen columns, and kept while there is room. Owns two caches: decoded row groups, and
footers. Thread-, fork- and pickle-safety: safe (source.py); pyarrow's own thread pools are not used.

A row group is the least that Parquet can decode, so drawing rows in a plain shuffle decodes one row group a row
unless all of them fit into the cache. `order` gives the shuffle that reads each row group once an epoch (order.py).
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from everstep.storage.datasets.cache import Cache, CacheCounts
from everstep.storage.datasets.errors import DatasetDamaged, DatasetError
from everstep.storage.datasets.order import BlockShuffle
from everstep.storage.datasets.source import DataFile, Where, open_files

SUFFIXES: Final = (".parquet", ".pq")
_MAGIC: Final = b"PAR1"
# One request for a footer of up to 64 KiB; larger ones take a second.
_TAIL_BYTES: Final = 64 << 10
_MOST_FOOTER_BYTES: Final = 256 << 20
# A request takes about as long as 1 MiB of data at 100 MB/s, so reading less at a time saves nothing.
_AHEAD_BYTES: Final = 1 << 20
_FOOTERS_BYTES: Final = 64 << 20


class Parquet:
    """Rows of Parquet files as dictionaries: sample i is row i, over all files in their order.

    `where`: files, folders (*.parquet, *.pq), globs or URLs; all of one schema. `columns`: those to read, by default
    all. `cache_bytes`: decoded row groups of so much are kept, or one, where that is larger. `together`: how many row
    groups `order` shuffles with each other, and so how many should fit into the cache. `threads`: for reading
    footers. Raises DatasetError and its kinds; IndexError for a row that is not there.
    """

    def __init__(
        self,
        where: Where,
        columns: Sequence[str] | None = None,
        *,
        cache_bytes: int = 512 << 20,
        together: int = 8,
        threads: int = 4,
    ) -> None:
        if together < 1 or threads < 1:
            raise DatasetError(f"together ({together}) and threads ({threads}): give at least 1")
        if isinstance(columns, str):
            raise DatasetError(f"columns: {columns!r} is one text; give a list: [{columns!r}]")
        self.together = together
        self._files = open_files(where, SUFFIXES)
        self._footers: Cache[pq.FileMetaData] = Cache(_FOOTERS_BYTES)
        self._groups: Cache[_Rows] = Cache(cache_bytes)
        with ThreadPoolExecutor(threads, thread_name_prefix="footers") as pool:
            opened = list(pool.map(self._opened, range(len(self._files))))
        # Of a file without rows the types do not matter, and some writers do not know them.
        filled = [at for at, (_, rows) in enumerate(opened) if rows.sum()]
        if not filled:
            raise DatasetError(f"{self._files[0].url}: no file has a row; name data with samples")
        self.schema = _one_schema([self._files[at] for at in filled], [opened[at][0] for at in filled], columns)
        self._starts = [0, *accumulate(len(rows) for _, rows in opened)]  # of each file's row groups
        self._sizes = np.concatenate([rows for _, rows in opened])
        self._ends: list[int] = np.cumsum(self._sizes).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside a data set of {len(self)} rows")
        group = bisect_right(self._ends, index)
        rows = self._groups.get(group, lambda: self._load(group))
        return rows.row(index - (self._ends[group - 1] if group else 0))

    @property
    def row_groups(self) -> int:
        """How many there are in all files."""
        return len(self._ends)

    def order(self, seed: int) -> BlockShuffle:
        """A shuffle that opens each row group once an epoch, `together` at a time."""
        return BlockShuffle(self._sizes, seed, self.together)

    def cache_counts(self) -> CacheCounts:
        """What the cache of decoded row groups did in this process."""
        return self._groups.counts()

    def close(self) -> None:
        """Close files and empty the caches; a later access opens them again."""
        self._groups.clear()
        self._footers.clear()
        self._files[0].close()

    def _opened(self, number: int) -> tuple[pa.Schema, npt.NDArray[np.int64]]:
        """Schema, and rows of each row group, from a file's footer."""
        file, footer = self._files[number], self._footer(number)
        try:
            schema = footer.schema.to_arrow_schema()
            rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        except _UNREADABLE as error:
            raise DatasetDamaged(f"{file.url}: its schema cannot be read: {_first_line(error)}") from error
        if min(rows, default=0) < 0:
            raise DatasetDamaged(f"{file.url}: says that a row group has {min(rows):,} rows: its footer is damaged")
        return schema, np.asarray(rows, dtype=np.int64)

    def _footer(self, number: int) -> pq.FileMetaData:
        return self._footers.get(number, lambda: _footer(self._files[number]))

    def _load(self, group: int) -> tuple[_Rows, int]:
        number = bisect_right(self._starts, group) - 1
        file, within = self._files[number], group - self._starts[number]
        file.check()
        footer = self._footer(number)
        if within >= footer.num_row_groups or footer.row_group(within).num_rows != self._sizes[group]:
            raise file.changed(f"row group {within} is not what it was")
        try:
            source = pa.PythonFile(_Bytes(file), mode="r")
            # No pre_buffer: it reads in threads of pyarrow's own, which do not live on in a forked child.
            with pq.ParquetFile(source, metadata=footer, pre_buffer=False, page_checksum_verification=True) as reader:
                table = reader.read_row_group(within, columns=self.schema.names, use_threads=False)
        except DatasetError:
            raise
        except _UNREADABLE as error:
            raise DatasetDamaged(
                f"{file.url}: row group {within} of {footer.num_row_groups} cannot be decoded: {_first_line(error)};"
                " write the file again"
            ) from error
        if table.num_rows != self._sizes[group]:
            raise DatasetDamaged(
                f"{file.url}: row group {within} has {table.num_rows:,} rows, not {self._sizes[group]:,}"
            )
        return _Rows(f"{file.url}: row {{}} of row group {within}", table), max(1, table.nbytes)


class _Rows:
    """One decoded row group."""

    def __init__(self, place: str, table: pa.Table) -> None:
        self._place = place
        columns = ((name, table.column(name)) for name in table.column_names)
        # A chunk's element is found faster than a column's of several chunks, and mostly there is but one.
        self._columns = [(name, column.chunk(0) if column.num_chunks == 1 else column) for name, column in columns]

    def row(self, number: int) -> dict[str, Any]:
        try:
            return {name: column[number].as_py() for name, column in self._columns}
        except (ValueError, OverflowError, pa.ArrowException):
            raise self._no_value(number) from None

    def _no_value(self, number: int) -> DatasetDamaged:
        for name, column in self._columns:
            try:
                column[number].as_py()
            except (ValueError, OverflowError, pa.ArrowException) as error:
                return DatasetDamaged(
                    f"{self._place.format(number)}, column {name!r} ({column.type}): {_first_line(error)}; correct"
                    " the file, or leave the column out by columns="
                )
        raise AssertionError("a value that could not be had a moment ago")


class _Bytes:
    """The file that a decoder sees. It reads column after column, each at once; from another machine each read takes
    what follows too, so that many small columns are one request.

    The columns' places are not asked of pyarrow (RowGroupMetaData.column): for some damaged footers that ends the
    process by std::terminate (version 26).
    """

    closed = False

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._at = 0
        self._ahead = 0 if file.is_local else _AHEAD_BYTES
        self._start = 0
        self._held = b""

    def read(self, nbytes: int = -1) -> bytes:
        stop = self._file.bytes if nbytes < 0 else min(self._file.bytes, self._at + nbytes)
        if not self._start <= self._at <= stop <= self._start + len(self._held):
            end = min(self._file.bytes, max(stop, self._at + self._ahead))
            self._start, self._held = self._at, self._file.read(self._at, max(0, end - self._at))
        data = self._held[self._at - self._start : max(self._at, stop) - self._start]
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.bytes)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._file.bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _footer(file: DataFile) -> tuple[pq.FileMetaData, int]:
    tail = file.read(max(0, file.bytes - _TAIL_BYTES), min(file.bytes, _TAIL_BYTES))
    if len(tail) < 12 or tail[-4:] != _MAGIC:
        what = "is encrypted" if tail[-4:] == b"PARE" else "does not end as a Parquet file does"
        raise DatasetDamaged(
            f"{file.url}: {what} (its last bytes are {tail[-4:]!r}, not {_MAGIC!r}): it is cut off, or of another"
            " format"
        )
    length = int.from_bytes(tail[-8:-4], "little")
    if length > min(file.bytes - 12, _MOST_FOOTER_BYTES):
        raise DatasetDamaged(
            f"{file.url}: says that its footer has {length:,} bytes, of {file.bytes:,} in all: it is damaged"
        )
    if length + 8 > len(tail):
        tail = file.read(file.bytes - 8 - length, length + 8)
    # The footer as a file of its own: what is before it is not needed.
    try:
        footer = pq.read_metadata(pa.BufferReader(_MAGIC + tail[-8 - length :]))
    except _UNREADABLE as error:
        raise DatasetDamaged(f"{file.url}: its footer cannot be read: {_first_line(error)}") from error
    return footer, 8 * length  # decoded it takes several times its length


def _one_schema(files: list[DataFile], schemas: list[pa.Schema], columns: Sequence[str] | None) -> pa.Schema:
    """The chosen columns' names and types, equal in every file. Raises DatasetError that names what differs."""
    first = schemas[0]
    twice = sorted({name for name in first.names if first.names.count(name) > 1})
    if twice:
        raise DatasetError(f"{files[0].url}: has several columns called {', '.join(twice)}; rename them")
    chosen = list(first.names if columns is None else columns)
    for name in chosen:
        if name not in first.names:
            raise DatasetError(
                f"columns: {name!r} is no column of {files[0].url}; it has: {', '.join(first.names) or 'none'}"
            )
    if not chosen or len(set(chosen)) != len(chosen):
        raise DatasetError(f"columns: {chosen} names {'a column twice' if chosen else 'none'}; give each once")
    for file, schema in zip(files[1:], schemas[1:], strict=True):
        differences = [
            f"{name} is {_type(schema, name)} (there {_type(first, name)})"
            for name in (chosen if columns is not None else sorted({*first.names, *schema.names}))
            if _type(schema, name) != _type(first, name)
        ]
        if differences:
            raise DatasetError(
                f"{file.url}: its schema is not that of {files[0].url}: {'; '.join(differences)}; make them equal,"
                " choose columns= that are, or make two data sets of them"
            )
    return pa.schema([first.field(name) for name in chosen])


def _type(schema: pa.Schema, name: str) -> str:
    return str(schema.field(name).type) if schema.names.count(name) == 1 else "missing"


# What pyarrow raises for damaged files, among them UnicodeDecodeError for names and a plain MemoryError for lengths.
_UNREADABLE: Final = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

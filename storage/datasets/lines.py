"""Where the lines of a file are: a sparse index that is made by reading the file once.

Purpose: line i of a file of any size by one short read. Owns the arrays of `LineIndex`, and the file in which indices
are kept. Pure but for `scan`, which reads a file from several threads, and `load`/`keep`. Thread-safety: safe; an
index never changes.

A mark is set at the first line that begins in each `span_bytes` of the file, so a mark costs 24 bytes for at least
`span_bytes` of data (0.6 % at 4 KiB), and the way from a mark to the next is at most `span_bytes` and one line.
Lines are ended by "\\n"; the last one need not be. Lines of nothing but white space (space, tab, "\\r") are no
samples: they are counted, for error messages, and skipped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from everstep.storage.datasets.errors import DatasetError
from everstep.storage.datasets.source import DataFile

SPAN_BYTES: Final = 4 << 10
# Large enough that the threads, not Python, are busy; with 2 in hand a thread, 64 MiB for four threads at most.
CHUNK_BYTES: Final = 4 << 20
_BLANK: Final = b" \t\r"
_MAGIC: Final = b"everstep lines 1\n"
_HEAD: Final = struct.Struct("<QQ")  # bytes of the JSON after it, xxh3_64 of all that follows the JSON

Marks = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class LineIndex:
    """One file's lines. `offsets[m]`, `samples[m]`, `numbers[m]`: the byte at which mark m's line begins, and how
    many samples and how many lines (blank ones too) are before it. `lines`: samples in the whole file."""

    offsets: Marks
    samples: Marks
    numbers: Marks
    lines: int

    def place(self, sample: int, file_bytes: int) -> tuple[int, int, int, int]:
        """(mark, first byte, bytes, samples to skip) of the stretch that holds a sample."""
        mark = int(self.samples.searchsorted(np.uint64(sample), side="right")) - 1
        first = int(self.offsets[mark])
        stop = int(self.offsets[mark + 1]) if mark + 1 < len(self.offsets) else file_bytes
        return mark, first, stop - first, sample - int(self.samples[mark])


def samples_in(stretch: bytes) -> list[bytes]:
    """The lines of a stretch that are samples, without their ends."""
    return [line for line in stretch.split(b"\n") if line.strip(_BLANK)]


def is_blank(line: bytes) -> bool:
    """Whether a line is no sample."""
    return not line.strip(_BLANK)


def scan(
    file: DataFile,
    *,
    span_bytes: int = SPAN_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    most_line_bytes: int,
    threads: int,
) -> LineIndex:
    """Read a file once and mark its lines; chunks are read and searched by `threads` threads.

    Memory: about 2 x threads x chunk_bytes, and twice as much for chunks of nothing but newlines; and the index.
    Raises DatasetError (a line longer than `most_line_bytes`) and what DataFile.read raises.
    """
    marker = _Marker(file.url, span_bytes, most_line_bytes)
    for first, newlines, blanks, starts_blank, ends_blank in _chunks(file, chunk_bytes, threads):
        marker.chunk(first, min(chunk_bytes, file.bytes - first), newlines, blanks, starts_blank, ends_blank)
    return marker.finish(file.bytes)


# What a chunk's thread finds: its first byte's offset, the offsets of newlines in it, which lines that begin and end
# in it are blank (bool[newlines - 1]), and whether what is before its first and after its last newline is blank.
_Found = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.bool_], bool, bool]


def _chunks(file: DataFile, chunk_bytes: int, threads: int) -> Iterator[_Found]:
    with ThreadPoolExecutor(threads, thread_name_prefix="lines") as pool:
        waiting: list[Future[_Found]] = []
        try:
            for first in range(0, file.bytes, chunk_bytes):
                waiting.append(pool.submit(_search, file, first, min(chunk_bytes, file.bytes - first)))
                if len(waiting) >= 2 * threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _search(file: DataFile, first: int, nbytes: int) -> _Found:
    data = file.read(first, nbytes)
    seen = np.frombuffer(data, dtype=np.uint8)
    newlines = np.flatnonzero(seen == 10)
    if not newlines.size:
        blank = is_blank(data)
        return first, newlines, np.zeros(0, dtype=np.bool_), blank, blank
    starts, ends = newlines[:-1] + 1, newlines[1:]
    begins = seen[starts]
    blanks = starts == ends
    # Only a line that begins with white space can be all white space; few do.
    for at in np.flatnonzero((begins == 32) | (begins == 9) | ((begins == 13) & ~blanks)):
        blanks[at] = is_blank(data[starts[at] : ends[at]])
    return first, newlines, blanks, is_blank(data[: newlines[0]]), is_blank(data[newlines[-1] + 1 :])


class _Marker:
    """Puts what was found in each chunk, in order, together into an index."""

    def __init__(self, url: str, span_bytes: int, most_line_bytes: int) -> None:
        self._url = url
        self._span = span_bytes
        self._most = most_line_bytes
        self._marks: list[tuple[Any, Any, Any]] = []
        self._samples = 0  # before the line that is open
        self._numbers = 0
        self._start = 0  # of the open line
        self._blank = True  # so far
        self._bucket = -1  # of the newest line's beginning

    def chunk(
        self, first: int, nbytes: int, newlines: Any, blanks: npt.NDArray[np.bool_], starts: bool, ends: bool
    ) -> None:
        self._blank = self._blank and starts
        if not newlines.size:
            self._check(np.asarray([self._start]), np.asarray([first + nbytes]))
            return
        lines = np.concatenate([[self._start], first + newlines[:-1] + 1])
        self._check(lines, first + newlines)
        self._add(lines, np.concatenate([[self._blank], blanks]))
        self._start = first + int(newlines[-1]) + 1
        self._blank = ends
        self._check(np.asarray([self._start]), np.asarray([first + nbytes]))

    def finish(self, file_bytes: int) -> LineIndex:
        if self._start < file_bytes:
            self._add(np.asarray([self._start]), np.asarray([self._blank]))
        columns = zip(*self._marks, strict=True) if self._marks else ([], [], [])
        offsets, samples, numbers = (np.concatenate([np.zeros(0, np.uint64), *column]) for column in columns)
        return LineIndex(
            offsets.astype(np.uint64), samples.astype(np.uint64), numbers.astype(np.uint64), self._samples
        )

    def _add(self, starts: Any, blanks: Any) -> None:
        """Lines that are whole: where each begins, and whether it is blank."""
        before = np.concatenate([[0], np.cumsum(~blanks)])
        buckets = starts // self._span
        marked = np.flatnonzero(np.diff(buckets, prepend=self._bucket))
        self._marks.append((
            starts[marked].astype(np.uint64),
            (self._samples + before[marked]).astype(np.uint64),
            (self._numbers + marked).astype(np.uint64),
        ))  # fmt: skip
        self._bucket = int(buckets[-1])
        self._samples += int(before[-1])
        self._numbers += len(starts)

    def _check(self, starts: Any, ends: Any) -> None:
        long = np.flatnonzero(ends - starts > self._most)
        if long.size:
            raise DatasetError(
                f"{self._url}: line {self._numbers + int(long[0]) + 1:,} (from byte {int(starts[long[0]]):,}) is"
                f" longer than max_line_bytes = {self._most:,}; is it JSON Lines? If so, raise max_line_bytes"
            )


class _KeptFile(msgspec.Struct, frozen=True):
    url: str
    version: str
    lines: int
    marks: int


class _Kept(msgspec.Struct, frozen=True):
    span_bytes: int
    files: list[_KeptFile]


def keep(path: str, files: Sequence[DataFile], indices: Sequence[LineIndex], span_bytes: int) -> None:
    """Write the indices of `files` to one file of this machine, all or nothing. Raises DatasetError."""
    entries = [
        _KeptFile(file.url, file.version, index.lines, len(index.offsets))
        for file, index in zip(files, indices, strict=True)
    ]
    head = msgspec.json.encode(_Kept(span_bytes, entries))
    head += b" " * (-(len(_MAGIC) + _HEAD.size + len(head)) % 8)  # the arrays are mapped, so they are aligned
    digest = xxhash.xxh3_64()
    arrays = [
        array.astype("<u8").tobytes() for index in indices for array in (index.offsets, index.samples, index.numbers)
    ]
    for array in arrays:
        digest.update(array)
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as out:
            out.write(_MAGIC + _HEAD.pack(len(head), digest.intdigest()) + head)
            out.writelines(arrays)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise DatasetError(
            f"index: {path} cannot be written ({error.strerror}); name a file in a folder that can be written, or"
            " leave index out"
        ) from error


def load(path: str, files: Sequence[DataFile], span_bytes: int) -> list[LineIndex] | None:
    """The indices that `keep` wrote, mapped into memory; None where there are none, they are damaged, or they are of
    other files, of other versions of them, or of another span."""
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # not there, or empty
        return None
    data = memoryview(mapped)  # type: ignore[arg-type]
    begin = len(_MAGIC) + _HEAD.size
    if bytes(data[: len(_MAGIC)]) != _MAGIC or len(data) < begin:
        return None
    length, checksum = _HEAD.unpack(data[len(_MAGIC) : begin])
    if begin + length > len(data):
        return None
    try:
        kept = msgspec.json.decode(data[begin : begin + length], type=_Kept)
    except msgspec.DecodeError:
        return None
    wanted = [(file.url, file.version) for file in files]
    if kept.span_bytes != span_bytes or [(entry.url, entry.version) for entry in kept.files] != wanted:
        return None
    body = data[begin + length :]
    if xxhash.xxh3_64_intdigest(body) != checksum or len(body) != 24 * sum(entry.marks for entry in kept.files):
        return None
    values = np.frombuffer(body, dtype="<u8")
    ends = [0, *(3 * marks for marks in _sums([entry.marks for entry in kept.files]))]
    return [
        _index(values[start:stop].reshape(3, entry.marks), entry.lines)
        for entry, (start, stop) in zip(kept.files, pairwise(ends), strict=True)
    ]


def _index(rows: Marks, count: int) -> LineIndex:
    return LineIndex(rows[0], rows[1], rows[2], count)


def _sums(counts: list[int]) -> list[int]:
    return [int(value) for value in np.cumsum(counts)]

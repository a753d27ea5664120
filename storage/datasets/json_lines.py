"""JSON Lines: a value a line, any line at once.

Purpose: sample i is the decoded value of line i, over one file or many, here or in a bucket. Owns the sparse indices
of the files (lines.py) and a cache of the stretches that were read lately. Thread-, fork- and pickle-safety: safe
(source.py).
"""

from __future__ import annotations

import json
import logging
import operator
import os
from bisect import bisect_right
from itertools import accumulate
from typing import Any, Final

import msgspec

from everstep.storage.datasets import lines
from everstep.storage.datasets.cache import Cache, CacheCounts
from everstep.storage.datasets.errors import DatasetDamaged, DatasetError
from everstep.storage.datasets.lines import LineIndex, is_blank
from everstep.storage.datasets.source import DataFile, Where, is_remote, open_files

SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
_log = logging.getLogger(__name__)
# What Python takes for a line besides its bytes: the object's head and its place in a list.
_LINE_BYTES: Final = 48
_BOM: Final = b"\xef\xbb\xbf"
# First bytes of files that are no JSON Lines, what they are, and what to do.
_REFUSED: Final = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it (gzip -d): a packed file has no random access"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it (zstd -d): a packed file has no random access"),
    (b"BZh", "compressed by bzip2", "unpack it (bzip2 -d): a packed file has no random access"),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it (xz -d): a packed file has no random access"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it (lz4 -d): a packed file has no random access"),
    (b"PK\x03\x04", "a zip archive", "unpack it (unzip): a packed file has no random access"),
    (b"PAR1", "a Parquet file", "use Parquet(...)"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)


class JsonLines:
    """Samples from JSON Lines: sample i is the value (mostly a dictionary) of line i, over all files in their order.

    Each file is read once at the opening, to find its lines; "\\r\\n" and a last line without its end are fine, blank
    lines are skipped. NaN and Infinity are taken as Python writes them.

    `where`: files, folders (*.jsonl, *.ndjson, *.json), globs or URLs. `index`: a file of this machine where the
    lines' places are kept for the next time; it is made again when a file's size, time of writing or version has
    changed. `span_bytes`: how much is read for one sample, at most, besides one line; the index takes 24 bytes for
    each. `cache_bytes`: stretches of so much are kept. `max_line_bytes`: a longer line is refused. `threads`: for
    finding lines. Raises DatasetError and its kinds, DatasetDamaged for a line that is no JSON when it is drawn;
    IndexError.
    """

    def __init__(
        self,
        where: Where,
        *,
        index: str | os.PathLike[str] | None = None,
        span_bytes: int = lines.SPAN_BYTES,
        cache_bytes: int = 16 << 20,
        max_line_bytes: int = 64 << 20,
        threads: int = 2,
    ) -> None:
        if min(span_bytes, max_line_bytes, threads) < 1:
            raise DatasetError("span_bytes, max_line_bytes and threads: give at least 1")
        self._files = open_files(where, SUFFIXES)
        for file in self._files:
            _refuse(file)
        self._indices = _indices(self._files, index, span_bytes, max_line_bytes, threads)
        self._ends = list(accumulate(one.lines for one in self._indices))
        self._cache: Cache[list[bytes]] = Cache(cache_bytes)
        if not len(self):
            raise DatasetError(f"{self._files[0].url}: no line with anything in it; name data with samples")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside a data set of {len(self)} lines")
        number = bisect_right(self._ends, index)
        file, found = self._files[number], self._indices[number]
        sample = index - (self._ends[number - 1] if number else 0)
        mark, first, nbytes, skip = found.place(sample, file.bytes)

        def load() -> tuple[list[bytes], int]:
            stretch = lines.samples_in(file.read(first, nbytes))
            return stretch, nbytes + _LINE_BYTES * len(stretch)

        stretch = self._cache.get((number, mark), load)
        if skip >= len(stretch):
            raise file.changed(f"sample {sample:,} is not where it was")
        line = stretch[skip]
        try:
            return _decoded(line.removeprefix(_BOM) if first == 0 and skip == 0 else line)
        except ValueError as error:
            before = int(found.numbers[mark]) + _lines_before(file.read(first, nbytes), skip)
            raise DatasetDamaged(_bad_line(file.url, before + 1, line, error)) from error

    @property
    def index_bytes(self) -> int:
        """Memory that the places of the lines take (where `index=` is given, mapped from that file)."""
        return sum(one.offsets.nbytes + one.samples.nbytes + one.numbers.nbytes for one in self._indices)

    def cache_counts(self) -> CacheCounts:
        """What the cache of stretches did in this process."""
        return self._cache.counts()

    def close(self) -> None:
        """Close files and empty the cache; a later access opens them again."""
        self._cache.clear()
        self._files[0].close()


def _indices(
    files: list[DataFile], kept: str | os.PathLike[str] | None, span_bytes: int, most: int, threads: int
) -> list[LineIndex]:
    path = os.path.abspath(os.path.expanduser(os.fspath(kept))) if kept is not None else None
    if kept is not None and path is not None:
        if is_remote(os.fspath(kept)):
            raise DatasetError(f"index: {kept!r} is not on this machine; give a path")
        if any(file.url == path for file in files):
            raise DatasetError(f"index: {path} is one of the data files; give another path")
        found = lines.load(path, files, span_bytes)
        if found is not None:
            return found
        _log.info("%s: no index of these files as they are now; it is made", path)
    made = [lines.scan(file, span_bytes=span_bytes, most_line_bytes=most, threads=threads) for file in files]
    if path is not None:
        for file in files:
            file.check()  # what is kept must not pair new lines with an old version
        lines.keep(path, files, made, span_bytes)
    return made


def _lines_before(stretch: bytes, skip: int) -> int:
    """Lines, blank ones too, before the sample that follows `skip` others."""
    samples = [number for number, line in enumerate(stretch.split(b"\n")) if not is_blank(line)]
    return samples[skip] if skip < len(samples) else 0


def _decoded(line: bytes) -> Any:
    """Raises ValueError (JSONDecodeError, UnicodeDecodeError), also for what is nested too deep."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # it may be what Python writes and the standard does not have: NaN, 1e999, lone surrogates
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _bad_line(url: str, number: int, line: bytes, error: ValueError) -> str:
    shown = line[:60].decode("utf-8", "replace") + ("…" if len(line) > 60 else "")
    if isinstance(error, UnicodeDecodeError):
        why = f"is not UTF-8 ({error.reason} at byte {error.start} of the line)"
    elif isinstance(error, json.JSONDecodeError):
        why = f"is not JSON ({error.msg} at character {error.pos} of the line)"
    else:
        why = f"is not JSON ({error})"
    advice = "correct or remove the line"
    if number == 1 and line.strip() in (b"[", b"{"):
        advice = "it looks like one JSON value over many lines: write one value a line (jq -c '.[]')"
    return f"{url}: line {number:,} {why}: {shown!r}; {advice}"


def _refuse(file: DataFile) -> None:
    start = file.read(0, min(8, file.bytes))
    for magic, what, advice in _REFUSED:
        if start.startswith(magic):
            raise DatasetError(f"{file.url}: is {what}, not JSON Lines; {advice}")

"""The files of a data set: which ones a path, a URL, a glob or a folder stands for, and ranges of their bytes.

Purpose: the one place where data sets touch a disk or a network. Files of this machine are read by pread(2), others
through `storage/stores`. Owns up to 128 open files a data set. Thread-safety: safe. Fork- and pickle-safety: every
process opens its own files, and checks that they are those that the data set was made of.

Why pread and not a mapping: a mapped file that somebody truncates kills the process by SIGBUS, and an I/O error does
so too; a pread of the same window returns an error that names the file, and costs 0.7 us more (2.2 against 1.4 us for
1,025 tokens, their conversion included).
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import xxhash

from everstep.storage.datasets.cache import Cache
from everstep.storage.datasets.errors import DatasetChanged, DatasetError, DatasetNotFound, DatasetUnavailable
from everstep.storage.errors import StorageError, StoreNotFound, StoreUnavailable
from everstep.storage.stores.port import Folder

Where = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Result = TypeVar("Result")

# 7 s in all: a store that fails over answers again within a few seconds, and a training step may wait that long.
RETRY_WAITS_S: Final = (0.2, 1.0, 2.0, 4.0)
_OPEN_FILES: Final = 128
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SAMPLED_BYTES: Final = 64 << 10


class DataFile:
    """One file as it was when it was opened: `url` (a plain absolute path on this machine), `bytes`, `version`."""

    def __init__(self, url: str, handles: Cache[Any]) -> None:
        """Raises DatasetNotFound, DatasetUnavailable, DatasetError (no rights)."""
        self.url = url
        self.is_local = not is_remote(url)
        self._handles = handles
        self._version = ""
        if self.is_local:
            status = self._status()
            self.bytes = status.st_size
            self._version = _local_version(status)
        else:
            self.bytes = self._remote(lambda at: at.store.size(at.path))

    @property
    def version(self) -> str:
        """Changes when the file does. On this machine size and time of writing; elsewhere what the store says of its
        version, or else size and a hash of the first and last 64 KiB."""
        if not self._version:
            self._version = self._remote_version()
        return self._version

    def check(self) -> None:
        """Raises DatasetChanged where the file was written since it was opened; elsewhere where its size differs."""
        if self.is_local:
            self._compare(self._status())
        elif (now := self._remote(lambda at: at.store.size(at.path))) != self.bytes:
            raise self.changed(f"it has {now:,} bytes")

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes. Raises DatasetChanged where the file ends before."""
        data = self._read_local(offset, nbytes) if self.is_local else self._read_remote(offset, nbytes)
        if len(data) != nbytes:
            raise self.changed(f"it ends at byte {offset + len(data):,}")
        return data

    def close(self) -> None:
        """Close the files of the whole data set; a later read opens its file again."""
        self._handles.clear()

    def changed(self, what: str) -> DatasetChanged:
        """The error for a file that is not what it was."""
        return DatasetChanged(
            f"{self.url}: changed while it was in use: {what}, and had {self.bytes:,} bytes when it was opened; put"
            " the old file back, or start the run again (a changed file changes the run's samples)"
        )

    def _read_local(self, offset: int, nbytes: int) -> bytes:
        opened: _OpenFile = self._handles.get((self.url, "fd"), self._open)
        try:
            data = os.pread(opened.fd, nbytes, offset)
            while len(data) < nbytes and (more := os.pread(opened.fd, nbytes - len(data), offset + len(data))):
                data += more  # one call returns at most 2 GiB
        except OSError as error:
            raise self._unreadable(error) from error
        return data

    def _open(self) -> tuple[_OpenFile, int]:
        try:
            opened = _OpenFile(os.open(self.url, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            raise self._unreadable(error) from error
        self._compare(os.fstat(opened.fd))
        return opened, 1

    def _status(self) -> os.stat_result:
        try:
            status = os.stat(self.url)
        except OSError as error:
            raise self._unreadable(error) from error
        if not stat.S_ISREG(status.st_mode):
            raise DatasetNotFound(f"{self.url}: not a file; name a file, a folder of files or a glob")
        return status

    def _compare(self, status: os.stat_result) -> None:
        if _local_version(status) != self._version:
            raise self.changed(f"it has {status.st_size:,} bytes, written {time.ctime(status.st_mtime)}")

    def _unreadable(self, error: OSError) -> DatasetError:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return DatasetNotFound(f"{self.url}: there is no such file; put it there, or name another one")
        return DatasetError(f"{self.url}: cannot be read ({error.strerror}); make it readable, or name other data")

    def _read_remote(self, offset: int, nbytes: int) -> bytes:
        out = bytearray(nbytes)
        got = self._remote(lambda at: at.store.read_into(at.path, offset, memoryview(out)))
        return bytes(out[:got])

    def _remote_version(self) -> str:
        version = getattr(self._place().store, "version", None)  # not part of the port: a store may have it
        if version is not None:
            return str(self._remote(lambda at: version(at.path)))
        head = self.read(0, min(self.bytes, _SAMPLED_BYTES))
        tail = self.read(self.bytes - len(head), len(head))
        return f"{self.bytes}-{xxhash.xxh3_128_hexdigest(head + tail)}"

    def _place(self) -> Folder:
        place: Folder = self._handles.get((self.url, "place"), lambda: (file_at(self.url), 1))
        return place

    def _remote(self, ask: Callable[[Folder], Result]) -> Result:
        return asked(self.url, lambda: ask(self._place()))


class _OpenFile:
    """A descriptor that is closed when nobody uses it any more, be it cached or not."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound early: `os` may be gone at exit
        close(self.fd)


def open_files(where: Where, suffixes: tuple[str, ...]) -> list[DataFile]:
    """The files of a data set, in its order: as listed, and sorted by path within a folder or a glob.

    `where`: a path, file:// or any URL of `storage/stores` (s3://, memory://, http://, …); a glob over one (`*`, `?`,
    `[]`, `**` crosses folders); a folder (its files that end in one of `suffixes`; names that begin with '.' or '_'
    are left out); or a list of these. Raises DatasetError and its kinds.
    """
    listed = [where] if isinstance(where, str | os.PathLike) else list(where)
    if not listed:
        raise DatasetNotFound("no file was named: the list is empty; name a file, a folder, a glob or a URL")
    handles: Cache[Any] = Cache(_OPEN_FILES)
    urls = [url for one in listed for url in expanded(os.fspath(one), suffixes)]
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise DatasetError(f"{url}: named twice; name each file once, or give it more weight in a Mixture")
        seen.add(url)
    return [DataFile(url, handles) for url in urls]


def is_remote(url: str) -> bool:
    """Whether it is a URL of another machine's file."""
    return _SCHEME.match(url) is not None


def asked(url: str, ask: Callable[[], Result]) -> Result:
    """What a store answers; a store that does not answer is asked again. Raises DatasetError and its kinds."""
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return ask()
        except StoreNotFound as error:
            raise DatasetNotFound(f"{url}: there is no such file; put it there, or name another one") from error
        except StoreUnavailable as error:
            if wait_s is None:
                tries = len(RETRY_WAITS_S) + 1
                raise DatasetUnavailable(
                    f"{url}: no answer in {tries} tries over {sum(RETRY_WAITS_S):g} s: {error}"
                ) from error
            time.sleep(wait_s)
        except DatasetError:
            raise
        except StorageError as error:
            raise DatasetError(f"{url}: cannot be read: {error}") from error
    raise AssertionError("unreachable")


def file_at(url: str) -> Folder:
    """The place of a remote file."""
    from everstep.storage.stores.opening import folder_at  # late: it imports drivers

    parent, _, name = url.rpartition("/")
    return folder_at(parent).child(name)


def expanded(spec: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files' URLs that one path, URL, glob or folder stands for; see `open_files`."""
    if re.match(r"(?:file|local)://", spec):
        path = unquote(spec.partition("://")[2])
        if not path.startswith("/"):
            raise DatasetError(f"{spec}: a file URL names no host; give file:///PATH")
        return _local(path, suffixes, spec)
    return _remote(spec, suffixes) if is_remote(spec) else _local(os.path.expanduser(spec), suffixes, spec)


def _local(path: str, suffixes: tuple[str, ...], spec: str) -> list[str]:
    absolute = os.path.abspath(path)
    if os.path.isfile(absolute):
        return [absolute]
    if os.path.isdir(absolute):
        return _some(
            sorted(_files_below(absolute, suffixes)), spec, f"the folder has no file that ends in {_or(suffixes)}"
        )
    if glob.has_magic(path):
        return _some(sorted(filter(os.path.isfile, glob.glob(absolute, recursive=True))), spec, "it matches no file")
    if os.path.lexists(absolute):
        raise DatasetNotFound(f"{spec}: neither a file nor a folder, or a link to nowhere; name a file or a folder")
    raise DatasetNotFound(
        f"{spec}: there is no such file or folder (looked at {absolute}); put it there, or name another"
    )


def _files_below(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if name[0] not in "._"]
        for name in names:
            if name[0] not in "._" and name.endswith(suffixes) and os.path.isfile(os.path.join(parent, name)):
                yield os.path.join(parent, name)


def _remote(url: str, suffixes: tuple[str, ...]) -> list[str]:
    from everstep.storage.stores.opening import folder_at  # late: it imports drivers

    scheme, _, path = url.partition("://")
    parts = path.rstrip("/").split("/")
    magic = next((i for i, part in enumerate(parts) if i and glob.has_magic(part)), None)
    if magic is not None:
        base = f"{scheme}://{'/'.join(parts[:magic])}"
        folder = asked(url, lambda: folder_at(base))
        depth = None if "**" in parts[magic:] else len(parts) - magic
        below = list(_walk(folder, url, depth))
        matching = [
            place for place in below if _matches(place[len(folder.path) :].strip("/").split("/"), parts[magic:])
        ]
        found = [f"{base}/{place[len(folder.path) :].strip('/')}" for place in matching]
        return _some(sorted(found), url, "it matches no file")
    if len(parts) > 1:
        place = asked(url, lambda: file_at(url.rstrip("/")))
        try:
            asked(url, lambda: place.store.size(place.path))
        except DatasetNotFound:
            pass  # a folder, perhaps
        else:
            return [url]
    folder = asked(url, lambda: folder_at(url.rstrip("/")))
    every = [place[len(folder.path) :].strip("/") for place in _walk(folder, url, None)]
    if not every:
        raise DatasetNotFound(f"{url}: there is no such file or folder; put it there, or name another")
    shown = [
        name for name in every if name.endswith(suffixes) and not any(part[0] in "._" for part in name.split("/"))
    ]
    return _some(
        sorted(f"{url.rstrip('/')}/{name}" for name in shown),
        url,
        f"the folder has no file that ends in {_or(suffixes)}",
    )


def _walk(folder: Folder, url: str, depth: int | None) -> Iterator[str]:
    """Paths of the files below a remote folder; `depth`: so many levels."""
    for entry in asked(url, lambda: folder.store.entries(folder.path)):
        if not entry.is_folder:
            yield folder.child(entry.name).path
        elif depth is None or depth > 1:
            yield from _walk(folder.child(entry.name), url, None if depth is None else depth - 1)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's components match a glob's; `**` stands for any number of them, as in glob.glob."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if any(part.startswith(".") for part in parts[:1]):
            return _matches(parts, pattern[1:])
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _some(urls: list[str], spec: str, lack: str) -> list[str]:
    if not urls:
        raise DatasetNotFound(f"{spec}: {lack}; name a file, a folder or a glob of files")
    return urls


def _or(suffixes: Sequence[str]) -> str:
    return " or ".join(suffixes)


def _local_version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"

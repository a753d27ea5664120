"""Folders of this machine as a store.

Owns the names `.partial-…` (files being written) and `.trash-…` (folders being removed), which listings do not
show and `sweep` removes. A file appears under its own name by link(2), which is exclusive and all or nothing, on NFS
too; a folder goes out of sight by one rename. A store keeps no state; an upload may be used from several threads.

Links: a folder may be reached through symbolic links; below it neither files nor folders that are links are seen,
unless the store was made with `links=True` (for foreign folders that consist of links, like Hugging Face's cache).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Final

from everstep.storage.errors import (
    StoreDenied,
    StoreError,
    StoreExists,
    StoreFull,
    StoreNotFound,
    StoreUnavailable,
)
from everstep.storage.stores.paths import SamePlace, check_complete, check_part, checked_path
from everstep.storage.stores.port import Entry

# As long as a block of a checkpoint's file: larger parts are not faster, and hold more memory.
PART_BYTES: Final = 4 << 20
_PARTIAL: Final = re.compile(r"\.partial-[0-9a-f]{16}")
_TRASH: Final = ".trash-"
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_KINDS: Final[dict[int, tuple[type[StoreError], str]]] = {
    errno.EACCES: (StoreDenied, "give the user that runs this the right to read and write there"),
    errno.EPERM: (StoreDenied, "the file system does not allow it; choose another folder"),
    errno.EROFS: (StoreDenied, "mount it writable, or choose another folder"),
    errno.ENAMETOOLONG: (StoreDenied, "choose a shorter name"),
    errno.ENOTDIR: (StoreDenied, "a file stands where a folder is needed; choose another path"),
    errno.EISDIR: (StoreDenied, "a folder stands where a file is needed; choose another path"),
    errno.ELOOP: (StoreDenied, "a symbolic link stands there, which is not followed; choose another path"),
    errno.EINVAL: (StoreDenied, "the file system does not allow it; choose another folder"),
    errno.ENOSPC: (StoreFull, "free some room, or choose another file system"),
    errno.EDQUOT: (StoreFull, "the user's quota is used up; free some room, or have it raised"),
    errno.EFBIG: (StoreFull, "the file system, or a limit of this process, allows no files that large"),
    errno.EIO: (StoreError, "the medium is damaged there"),  # asking again does not help; an older copy may
    errno.ENOENT: (StoreNotFound, ""),
    errno.EEXIST: (StoreExists, ""),
}
_NO_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class LocalStore(SamePlace):
    """Every file system of this machine; paths are absolute ones without their leading '/'. Implements `Store`."""

    url = ""

    def __init__(self, *, links: bool = False) -> None:
        self._links = links

    def __repr__(self) -> str:
        return f"LocalStore(links={self._links})"

    def entries(self, path: str) -> list[Entry]:
        full = _full(path)
        found = []
        with _translated(full, missing=True), os.scandir(full) as children:
            for child in children:
                if not _is_ours(child.name):
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        found += self._entry(child)
        return sorted(found)

    def size(self, path: str) -> int:
        fd = self._open(path)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def read_into(self, path: str, offset: int, out: memoryview) -> int:
        with contextlib.closing(LocalFile(_full(path), self._open(path))) as file:
            return file.read_into(offset, out)

    def open_file(self, path: str) -> LocalFile:
        """The file, open for many reads: opening takes as long as reading 100 KB. Raises StoreNotFound."""
        return LocalFile(_full(path), self._open(path))

    def put_new(self, path: str, data: bytes) -> None:
        upload = LocalUpload(_full(path), len(data))
        try:
            upload.append(data)
            upload.finish()
        except BaseException:
            upload.abort()
            raise

    def claim_folder(self, path: str) -> None:
        full = _full(path)
        parent = os.path.dirname(full)
        with _translated(full):
            _make_durable(parent)
            os.mkdir(full)
            sync_folder(parent)

    def part_bytes(self, nbytes: int) -> int:
        return PART_BYTES

    def upload(self, path: str, nbytes: int) -> LocalUpload:
        return LocalUpload(_full(path), nbytes)

    def remove_file(self, path: str) -> None:
        with _translated(_full(path), missing=True):
            os.unlink(_full(path))

    def remove_folder(self, path: str, first: str) -> None:
        full = _full(path)
        trash = _trash_of(full)
        with _translated(full):
            if not path or not _is_folder(full):
                return
            _remove_tree(trash)  # of a removal of this name that was killed
            with contextlib.suppress(FileNotFoundError):  # another remover was first
                os.rename(full, trash)
            # Durable before anything goes: after a power cut the folder must not be back with half of its files.
            sync_folder(os.path.dirname(full))
            _remove_tree(trash)

    def sweep(self, path: str, spare: Callable[[str], bool] | None = None) -> int:
        full = _full(path)

        def spared(folder: str, name: str) -> bool:
            if spare is None:
                return False
            first = os.path.relpath(os.path.join(folder, name), full).split(os.sep)[0]
            return spare(first.removeprefix(_TRASH))

        removed = 0
        with _translated(full):
            if path and _is_folder(_trash_of(full)):
                _remove_tree(_trash_of(full))
                removed += 1
            for folder, folders, files in os.walk(full, onerror=_raise_unless_gone):
                if folder == full:
                    folders[:] = [name for name in folders if not spared(folder, name)]
                for name in [name for name in folders if name.startswith(_TRASH)]:
                    folders.remove(name)
                    if _is_folder(os.path.join(folder, name)):
                        _remove_tree(os.path.join(folder, name))
                        removed += 1
                for name in [name for name in files if _PARTIAL.fullmatch(name) and not spared(folder, name)]:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, name))
                        removed += 1
        return removed

    def _open(self, path: str) -> int:
        """A regular file, for reading. Without O_NONBLOCK, opening a FIFO would wait for its writer."""
        full = _full(path)
        try:
            fd = os.open(full, os.O_RDONLY | os.O_NONBLOCK | (0 if self._links else os.O_NOFOLLOW))
        except OSError as error:
            if error.errno in _NO_FILE:
                raise StoreNotFound(f"{full}: there is no such file") from error
            raise _store_error(full, error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreNotFound(f"{full}: not a file")
        return fd

    def _entry(self, child: os.DirEntry[str]) -> list[Entry]:
        """One entry, or none for links, devices and the like."""
        if child.is_dir(follow_symlinks=self._links):
            return [Entry(child.name, True, 0)]
        if child.is_file(follow_symlinks=self._links):
            return [Entry(child.name, False, child.stat(follow_symlinks=self._links).st_size)]
        return []


class LocalFile:
    """A file that is open for reading. One thread."""

    def __init__(self, full: str, fd: int) -> None:
        self._full = full
        self._fd = fd

    def read_into(self, offset: int, out: memoryview) -> int:
        """As `Store.read_into`."""
        with _translated(self._full):
            view, done = out.cast("B"), 0
            while done < len(view) and (got := os.preadv(self._fd, [view[done:]], offset + done)):
                done += got
            return done

    def close(self) -> None:
        os.close(self._fd)


class LocalUpload:
    """A hidden file with its room reserved, which gets its name at `finish`. Implements `Upload`."""

    def __init__(self, full: str, nbytes: int) -> None:
        """Raises StoreExists, StoreFull, StoreDenied, StoreUnavailable."""
        self._full = full
        self._folder = os.path.dirname(full)
        self._hidden = os.path.join(self._folder, f".partial-{secrets.token_hex(8)}")
        self._nbytes = nbytes
        self._written = 0
        self._writing = 0  # threads inside `write`; closed under one of them, the descriptor could be another file's
        self._fd = -1
        self._changed = threading.Condition()
        with _translated(full):
            if os.path.lexists(full):
                raise StoreExists(f"{full}: it is there already")
            _make_durable(self._folder)
            self._fd = os.open(self._hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with _translated(full):
                _reserve(self._fd, nbytes)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, data: memoryview | bytes) -> None:
        check_part(offset, memoryview(data).nbytes, PART_BYTES, self._nbytes)
        self._write(offset, data)

    def append(self, data: bytes) -> None:
        """All of the file in one call."""
        self._write(0, data)

    def _write(self, offset: int, data: memoryview | bytes) -> None:
        with self._changed:
            if self._fd < 0:
                raise StoreError(f"{self._full}: a part came after the end of its upload")
            self._writing += 1
        done = 0
        try:
            with _translated(self._full):
                view = memoryview(data).cast("B")
                while done < len(view):
                    done += os.pwrite(self._fd, view[done:], offset + done)
        finally:
            with self._changed:
                self._writing -= 1
                self._written += done
                self._changed.notify_all()

    def finish(self) -> None:
        check_complete(self._full, self._written, self._nbytes)
        with _translated(self._full):
            os.fsync(self._fd)
            _name_exclusively(self._hidden, self._full, self._fd)
            try:
                sync_folder(self._folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(self._full)
                raise
        self._close()

    def abort(self) -> None:
        self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._hidden)

    def _close(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._writing == 0)
            fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # what was to be kept has been synced
                os.close(fd)


def sync_folder(folder: str) -> None:
    """Make the entries of a folder durable; raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _full(path: str) -> str:
    return "/" + checked_path("", path)


def _trash_of(full: str) -> str:
    folder, _, name = full.rpartition("/")
    return f"{folder}/{_TRASH}{name}"


def _is_ours(name: str) -> bool:
    return name.startswith(_TRASH) or _PARTIAL.fullmatch(name) is not None


def _is_folder(full: str) -> bool:
    """A folder, and not a link to one."""
    return os.path.isdir(full) and not os.path.islink(full)


def _make_durable(folder: str) -> None:
    """mkdir -p whose new entries survive a power cut; a link to a folder is as good as a folder."""
    if os.path.isdir(folder):
        return
    _make_durable(os.path.dirname(folder))
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
    sync_folder(os.path.dirname(folder))


def _reserve(fd: int, nbytes: int) -> None:
    """Take the room now, so that a full disk shows before anything was written."""
    if not nbytes:
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # file systems that cannot reserve
            raise


def _name_exclusively(hidden: str, full: str, fd: int) -> None:
    """Give the file its name, unless the name is taken (FileExistsError)."""
    try:
        os.link(hidden, full, follow_symlinks=False)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: the name is taken, by us.
        if os.fstat(fd).st_nlink < 2:
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _rename_new(hidden, full)  # FAT, exFAT and some FUSE file systems have no links
        return
    with contextlib.suppress(OSError):  # the file is there and whole: a second name is for `sweep`
        os.unlink(hidden)


def _rename_new(hidden: str, full: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE, which Python does not offer."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_AT_FDCWD, os.fsencode(hidden), _AT_FDCWD, os.fsencode(full), _RENAME_NOREPLACE)
    if not hasattr(libc, "renameat2") or libc.renameat2(*arguments) == 0:
        number = 0 if hasattr(libc, "renameat2") else errno.ENOSYS
    else:
        number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        why = "this file system has neither hard links nor exclusive renames, so nothing can be committed safely"
        raise StoreDenied(f"{full}: {why}; choose a folder on another file system")
    if number:
        raise OSError(number, os.strerror(number), full)


def _remove_tree(full: str) -> None:
    """rm -r that does not mind another remover at work, or none to do; links are removed, not followed."""
    with contextlib.suppress(FileNotFoundError):
        for _, folders, files, fd in os.fwalk(full, topdown=False, onerror=_raise_unless_gone):
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
            for name in folders:
                with contextlib.suppress(FileNotFoundError):
                    try:
                        os.rmdir(name, dir_fd=fd)
                    except NotADirectoryError:  # a link to a folder
                        os.unlink(name, dir_fd=fd)
        os.rmdir(full)


def _raise_unless_gone(error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error


@contextlib.contextmanager
def _translated(full: str, *, missing: bool = False) -> Iterator[None]:
    """Errors of the system as StoreError; `missing`: that there is no such thing is no error."""
    try:
        yield
    except OSError as error:
        if not (missing and error.errno in _NO_FILE):
            raise _store_error(full, error) from error
    except ValueError as error:  # a name that the system cannot have, like one that is not text
        raise StoreDenied(f"{full!r}: {error}; choose another name") from error


def _store_error(full: str, error: OSError) -> StoreError:
    kind, advice = _KINDS.get(error.errno or 0, (StoreUnavailable, ""))
    return kind(f"{full}: {error.strerror or error}" + (f"; {advice}" if advice else ""))

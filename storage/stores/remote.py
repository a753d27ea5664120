"""Whatever else fsspec reaches: Google Cloud Storage, Azure, a web server, memory://, …

Owns the use of fsspec: listings are asked for anew each time, and a write is exclusive or refused. Where a driver has
exclusive writes (Google's, Azure's, memory://) its folders can be written; all others can only be read, because
nothing can be committed safely there. A driver repeats requests itself; where the answer to a write that had
succeeded is lost, StoreExists is raised although the file is ours. Any thread may call.

The parts of an upload are gathered in a nameless file in the system's folder for temporary files (TMPDIR), because
drivers take a file's bytes in order only; memory stays at what the driver needs.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import fsspec

from everstep.storage.errors import (
    CheckpointUnsupported,
    StoreDenied,
    StoreError,
    StoreExists,
    StoreFull,
    StoreNotFound,
    StoreUnavailable,
)
from everstep.storage.stores.paths import SamePlace, check_complete, check_part, checked_path
from everstep.storage.stores.port import Entry, Folder

PART_BYTES: Final = 4 << 20
CLAIM: Final = ".claim"  # as on S3: object stores have no folders that one could make exclusively
# What was looked at: gcsfs 2026.10 sends ifGenerationMatch=0, adlfs 2026.8 If-None-Match.
_EXCLUSIVE: Final = ("memory", "gs", "gcs", "az", "abfs", "abfss")
_STATUS: Final[dict[int, tuple[type[StoreError], str]]] = {
    401: (StoreDenied, "check the credentials that its driver takes from the environment"),
    403: (StoreDenied, "check the credentials that its driver takes from the environment, and their rights"),
    404: (StoreNotFound, ""),
    409: (StoreExists, ""),
    412: (StoreExists, ""),
    413: (StoreFull, ""),
    507: (StoreFull, ""),
}
# memory:// looks and writes in two steps, and all readers of a file share one position.
_memory_lock = threading.RLock()


def remote_folder(scheme: str, rest: str) -> Folder:
    """The folder SCHEME://REST. Raises CheckpointUnsupported for a scheme that nobody knows, StoreDenied where the
    driver is not installed.
    """
    try:
        driver = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise StoreDenied(f"{scheme}://{rest}: its driver is not installed: {error}") from error
    except ValueError as error:
        raise CheckpointUnsupported(f"{scheme}://{rest}: nobody knows {scheme}:// URLs ({error})") from error
    host, _, path = rest.partition("/")
    store = RemoteStore(scheme, host, driver)
    return Folder(store, checked_path(store.url, path.strip("/")))


class RemoteStore(SamePlace):
    """What `driver`, an fsspec file system class, shows at SCHEME://HOST. Implements `Store`."""

    def __init__(self, scheme: str, host: str, driver: Any) -> None:
        self.url = f"{scheme}://{host}"
        self._scheme = scheme
        self._driver = driver
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    def entries(self, path: str) -> list[Entry]:
        full = self._full(path)
        with self._translated(path, missing=True), self.system() as system:
            system.invalidate_cache()
            found = []
            for info in system.ls(full, detail=True):
                folder, _, name = str(info["name"]).rstrip("/").rpartition("/")
                # Some drivers list a file, or the marker object of a folder, as its own content.
                if folder.strip("/") == full.strip("/") and name not in ("", CLAIM):
                    is_folder = info["type"] == "directory"
                    found.append(Entry(name, is_folder, 0 if is_folder else int(info["size"] or 0)))
            return sorted(found)
        return []

    def size(self, path: str) -> int:
        with self._translated(path), self.system() as system:
            system.invalidate_cache()
            info = system.info(self._full(path))
            if info["type"] != "file":
                raise FileNotFoundError(errno.ENOENT, "not a file")
            if info["size"] is None:
                raise StoreError(f"{self._where(path)}: the server does not say how long it is, so it cannot be read")
            return int(info["size"])

    def read_into(self, path: str, offset: int, out: memoryview) -> int:
        view = out.cast("B")
        size = self.size(path)  # drivers differ in what they do at the end of a file
        due = max(0, min(len(view), size - offset))
        if due:
            with self._translated(path), self.system() as system:
                data = system.cat_file(self._full(path), start=offset, end=offset + due)
            if len(data) != due:
                raise StoreUnavailable(f"{self._where(path)}: {len(data)} bytes at {offset}, where {due} were due")
            view[:due] = data
        return due

    def put_new(self, path: str, data: bytes) -> None:
        exclusive = self.exclusive("pipe_file", path)
        with self._translated(path), self.system() as system:
            system.pipe_file(self._full(path), bytes(data), **exclusive)

    def claim_folder(self, path: str) -> None:
        self.exclusive("pipe_file", path)
        with self._translated(path, missing=True), self.system() as system:
            system.invalidate_cache()
            if system.ls(self._full(path), detail=False):
                raise StoreExists(f"{self._where(path)}: it is there already")
        self.put_new(f"{path}/{CLAIM}", secrets.token_hex(16).encode())

    def part_bytes(self, nbytes: int) -> int:
        return PART_BYTES

    def upload(self, path: str, nbytes: int) -> RemoteUpload:
        return RemoteUpload(self, self._full(path), self._where(path), nbytes, self.exclusive("put_file", path))

    def remove_file(self, path: str) -> None:
        self.exclusive("pipe_file", path)
        with self._translated(path, missing=True), self.system() as system:
            system.rm_file(self._full(path))

    def remove_folder(self, path: str, first: str) -> None:
        if not path:
            return
        full = self._full(path)
        self.remove_file(f"{path}/{first}")
        with self._translated(path, missing=True), self.system() as system:
            system.invalidate_cache()
            found = system.find(full, withdirs=True, detail=True)
            claim = f"{full}/{CLAIM}"  # last: as long as anything is left, the name is taken
            for name in sorted(found, key=lambda name: name == claim):
                if found[name]["type"] == "file":
                    with contextlib.suppress(FileNotFoundError):
                        system.rm_file(name)
            folders = [name for name in found if found[name]["type"] == "directory"]
            for name in [*sorted(folders, key=len, reverse=True), full]:
                with contextlib.suppress(Exception):  # object stores have no folders to remove
                    system.rmdir(name)

    def sweep(self, path: str, spare: Callable[[str], bool] | None = None) -> int:
        """Nothing of ours can be left there: a file is handed to the driver as a whole."""
        checked_path(self.url, path)
        return 0

    @contextlib.contextmanager
    def system(self) -> Iterator[Any]:
        """The fsspec file system, one a process: its event loop and sockets do not survive a fork."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                options = self._driver._get_kwargs_from_urls(self.url)
                self._made = (
                    os.getpid(),
                    self._driver(use_listings_cache=False, skip_instance_cache=True, **options),
                )
            system = self._made[1]
        with _memory_lock if self._scheme == "memory" else contextlib.nullcontext():
            yield system

    def exclusive(self, method: str, path: str) -> dict[str, Any]:
        """What makes a driver's method refuse to overwrite; raises StoreDenied where it cannot."""
        if self._scheme in _EXCLUSIVE:
            function = getattr(self._driver, f"_{method}", None) or getattr(self._driver, method)
            names = inspect.signature(function).parameters
            if "mode" in names:
                return {"mode": "create"}
            if "overwrite" in names:
                return {"overwrite": False}
        why = f"what reaches {self._scheme}:// cannot write exclusively, so nothing can be committed safely"
        raise StoreDenied(f"{self._where(path)}: {why}; it can only be read. Use a folder, s3://, gs:// or abfs://")

    @contextlib.contextmanager
    def _translated(self, path: str, *, missing: bool = False) -> Iterator[None]:
        try:
            with _translated(self._where(path)):
                yield
        except StoreNotFound:
            if not missing:
                raise

    def _full(self, path: str) -> str:
        return str(self._driver._strip_protocol(self._where(checked_path(self.url, path))))

    def _where(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url


class RemoteUpload:
    """A file gathered on this machine and handed to the driver at `finish`. Implements `Upload`."""

    def __init__(self, store: RemoteStore, full: str, where: str, nbytes: int, exclusive: dict[str, Any]) -> None:
        self._store = store
        self._full = full
        self._where = where
        self._nbytes = nbytes
        self._exclusive = exclusive
        self._written = 0
        self._writing = 0
        self._put = False
        self._changed = threading.Condition()
        with _translated(f"{where} (gathered in {tempfile.gettempdir()}, see TMPDIR)"):
            self._spool: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed by finish and abort
            try:
                if nbytes:
                    os.posix_fallocate(self._spool.fileno(), 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    self._spool.close()
                    raise

    def write(self, offset: int, data: memoryview | bytes) -> None:
        view = memoryview(data).cast("B")
        check_part(offset, len(view), PART_BYTES, self._nbytes)
        with self._changed:
            if self._spool.closed:
                raise StoreError(f"{self._where}: a part came after the end of its upload")
            self._writing += 1
        done = 0
        try:
            with _translated(self._where):
                while done < len(view):
                    done += os.pwrite(self._spool.fileno(), view[done:], offset + done)
        finally:
            with self._changed:
                self._writing -= 1
                self._written += done
                self._changed.notify_all()

    def finish(self) -> None:
        check_complete(self._where, self._written, self._nbytes)
        with _translated(self._where), self._store.system() as system:
            self._put = True
            try:
                system.put_file(f"/proc/self/fd/{self._spool.fileno()}", self._full, **self._exclusive)
            except FileExistsError:
                self._put = False  # what is there is not ours
                raise
        self._close()

    def abort(self) -> None:
        self._close()
        if self._put:  # a `finish` that failed may have come through all the same
            with contextlib.suppress(StoreError), _translated(self._where), self._store.system() as system:
                system.rm_file(self._full)

    def _close(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._writing == 0)
            self._spool.close()


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    """Whatever a driver raises as StoreError."""
    try:
        yield
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreNotFound(f"{where}: there is no such file") from error
    except FileExistsError as error:
        raise StoreExists(f"{where}: it is there already") from error
    except Exception as error:
        kind, advice = _kind_of(error)
        reason = f"{type(error).__name__}: {_without_secrets(str(error))}".rstrip(": .")
        raise kind(f"{where}: {reason}" + (f"; {advice}" if advice else "")) from error


def _kind_of(error: Exception) -> tuple[type[StoreError], str]:
    """By errno, by HTTP status, and by where the exception's class is from; every driver has its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull, "free some room"
    if isinstance(error, PermissionError) or type(error).__module__.startswith("google.auth"):
        return _STATUS[403]
    for name in ("status", "code", "status_code"):
        status = getattr(error, name, None)
        with contextlib.suppress(TypeError, ValueError):
            if status is not None and int(status) in _STATUS:
                return _STATUS[int(status)]
    return StoreUnavailable, ""


def _without_secrets(text: str) -> str:
    """Drivers' messages contain URLs, and URLs tokens."""
    return re.sub(r"\?[^\s'\"]*", "?…", re.sub(r"://[^/\s'\"]*@", "://…@", text))

"""What everstep asks of a place that keeps files: the port `Store`, and `Folder`, a place in it.

Implementations: `local.py` (POSIX), `s3.py` (boto3), `remote.py` (any other fsspec file system); all pass
tests/contract/test_stores.py. Paths are relative to the store's root, '/'-separated, without a leading '/'; "" is the
root. Every method may be called from any thread, raises StoreError and nothing else, and takes nothing from a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """A direct child of a folder; `bytes` is 0 for a folder."""

    name: str
    is_folder: bool
    bytes: int


class Upload(Protocol):
    """A new file that is being written in parts; visible and durable after `finish`, and gone after `abort`."""

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write a part at a multiple of the store's `part_bytes`; every part but the last is that long.

        Parts come in any order and from several threads at once; each once.
        """
        ...

    def finish(self) -> None:
        """All parts were written. Returns once the file would survive a power cut."""
        ...

    def abort(self) -> None:
        """Remove what was written; after an error in `write` or `finish`, or instead of it. Does not raise."""
        ...


class Store(Protocol):
    """A tree of files. `url` is its root's, without secrets and without a trailing '/'."""

    url: str

    def entries(self, path: str) -> list[Entry]:
        """Direct children sorted by name; empty where there is no such folder. Links are not followed."""
        ...

    def size(self, path: str) -> int:
        """Bytes of a file; raises StoreNotFound (also for a folder or a link)."""
        ...

    def read_into(self, path: str, offset: int, out: memoryview) -> int:
        """Fill `out` from byte `offset`; returns how many bytes there were. Raises StoreNotFound."""
        ...

    def put_new(self, path: str, data: bytes) -> None:
        """Write a small file, all or nothing and durable; of several writers one wins, the others get StoreExists."""
        ...

    def claim_folder(self, path: str) -> None:
        """Make a folder, and its parents; of several callers one wins, the others get StoreExists."""
        ...

    def part_bytes(self, nbytes: int) -> int:
        """How long the parts of an upload of `nbytes` have to be."""
        ...

    def upload(self, path: str, nbytes: int) -> Upload:
        """Begin a new file of `nbytes`; raises StoreExists where it is there (here, or at `finish`)."""
        ...

    def remove_file(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""
        ...

    def remove_folder(self, path: str, first: str) -> None:
        """Remove a folder with all that is in it; its file `first` is out of sight before anything else goes."""
        ...

    def sweep(self, path: str, spare: Callable[[str], bool] | None = None) -> int:
        """Remove what killed writers and removers left under `path` that listings do not show (unfinished multi-part
        uploads, renamed folders, temporary files); returns how many.

        `spare(name)` is asked for each first component below `path` (a renamed folder's by its former name) right
        before anything of it goes: True where somebody may be writing. Without it the caller knows that nobody is.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A folder of a store. Get one from `everstep.storage.stores.opening.folder_at(url)`."""

    store: Store
    path: str

    @property
    def name(self) -> str:
        """The last component of the path, "" for the store's root."""
        return self.path.rpartition("/")[2]

    @property
    def url(self) -> str:
        """What `folder_at` takes to come here again; for a local folder a plain path."""
        return f"{self.store.url}/{self.path}" if self.path else self.store.url

    def child(self, name: str) -> Folder:
        """The folder, or the place of the file, called `name` in this one."""
        return Folder(self.store, f"{self.path}/{name}" if self.path else name)

    def __str__(self) -> str:
        return self.url

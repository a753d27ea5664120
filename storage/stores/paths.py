"""What all stores have in common: the paths and parts that they refuse, and that equal URLs are equal stores.

Owns no state; any thread may call.
"""

from __future__ import annotations

from everstep.storage.errors import StoreDenied, StoreError


class SamePlace:
    """Two stores of one kind and URL are equal, and so are folders of equal stores."""

    url: str

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, SamePlace) and self.url == other.url

    def __hash__(self) -> int:
        return hash((type(self), self.url))


def checked_path(url: str, path: str) -> str:
    """The path, when every store can keep something there; raises StoreDenied. `url`: the store's, for messages."""
    if not path:
        return path
    for part in path.split("/"):
        if part in ("", ".", ".."):
            what = f"a folder called {part!r}" if part else "an empty folder name ('//', or a '/' at an end)"
            raise StoreDenied(f"{url}/{path}: the path has {what}; leave it out")
    if "\0" in path:
        raise StoreDenied(f"{url}/{path!r}: the path has a NUL character; leave it out")
    return path


def check_part(offset: int, length: int, part_bytes: int, nbytes: int) -> None:
    """An upload's part as the port `Upload` says: an own invariant."""
    assert offset % part_bytes == 0, f"a part at byte {offset}, which is no multiple of {part_bytes}"
    due = min(part_bytes, nbytes - offset)
    assert length == due, f"a part of {length} bytes at {offset}, where {due} of {nbytes} are due"


def check_complete(what: str, written: int, nbytes: int) -> None:
    """Raises StoreError when an upload that is to be finished lacks bytes."""
    if written != nbytes:
        raise StoreError(f"{what}: {written} of {nbytes} bytes were written; it is not kept")

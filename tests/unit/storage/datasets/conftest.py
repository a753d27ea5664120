"""A store in memory that counts what it is asked, fails when told to, and is reached as fake://…"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from everstep.storage.errors import StoreDenied, StoreNotFound, StoreUnavailable
from everstep.storage.stores import opening
from everstep.storage.stores.port import Entry, Folder


@dataclass
class FakeStore:
    """The reading half of the port `Store`."""

    url: str = "fake:/"
    files: dict[str, bytes] = field(default_factory=dict)
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    failures: int = 0  # so many of the next requests are not answered
    denied: bool = False

    def entries(self, path: str) -> list[Entry]:
        self._asked()
        prefix = f"{path}/" if path else ""
        below = [name[len(prefix) :] for name in self.files if name.startswith(prefix)]
        files = {Entry(name, False, len(self.files[prefix + name])) for name in below if "/" not in name}
        folders = {Entry(name.partition("/")[0], True, 0) for name in below if "/" in name}
        return sorted(files | folders)

    def size(self, path: str) -> int:
        self._asked()
        return len(self._file(path))

    def read_into(self, path: str, offset: int, out: memoryview) -> int:
        self._asked()
        self.reads.append((path, offset, len(out)))
        data = self._file(path)[offset : offset + len(out)]
        out[: len(data)] = data
        return len(data)

    def _file(self, path: str) -> bytes:
        if path not in self.files:
            raise StoreNotFound(f"fake://{path}: there is no such file")
        return self.files[path]

    def _asked(self) -> None:
        if self.denied:
            raise StoreDenied("fake://: access denied")
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("fake://: connection reset")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """fake://PATH is a file of this store; waits between tries are not slept, and are in `waits`."""
    fake = FakeStore()
    real: Callable[..., Folder] = opening.folder_at

    def folder_at(url: str) -> Folder:
        if not url.startswith("fake:"):
            return real(url)
        return Folder(fake, url.partition("://")[2].strip("/"))

    monkeypatch.setattr(opening, "folder_at", folder_at)
    return fake


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between tries; nothing sleeps."""
    waited: list[float] = []
    monkeypatch.setattr("everstep.storage.datasets.source.time.sleep", waited.append)
    return waited

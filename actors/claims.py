"""Who may lead a run: epochs, each taken once, by compare-and-swap.

A run with checkpoints claims its epochs beside them, so that two clusters cannot both run it; one without claims them
where its host keeps names (everstep.actors.ray_claims). Methods may be called from any thread and may block.
"""

from __future__ import annotations

from typing import Protocol

from everstep.storage.errors import StoreExists
from everstep.storage.manifest import names
from everstep.storage.stores.port import Folder

_FOLDER = "epochs"


class Claims(Protocol):
    """Epochs of one run. Whatever the store raises when it is out of reach goes to the caller."""

    def take(self, epoch: int) -> bool:
        """True for the one that takes it, False for all others."""

    def newest(self) -> int:
        """The highest epoch that was taken."""


class FolderClaims:
    """Claims as files beside a run's checkpoints. Raises StoreError."""

    def __init__(self, root: Folder) -> None:
        self._root = root
        self._claims = root.child(_FOLDER)

    def take(self, epoch: int) -> bool:
        try:
            self._root.store.put_new(self._claims.child(str(epoch)).path, b"claimed\n")
        except StoreExists:
            return False
        return True

    def newest(self) -> int:
        return max(self._taken(), default=0)

    def next(self) -> int:
        """Takes the first epoch that no execution of this run ever had; forgets all but the one before it."""
        taken = self._taken()
        epoch = max([*taken, *(name.epoch for name in names(self._root))], default=0) + 1
        while not self.take(epoch):
            epoch += 1  # another driver was faster
        for old in taken[:-1]:
            self._root.store.remove_file(self._claims.child(str(old)).path)
        return epoch

    def _taken(self) -> list[int]:
        entries = self._root.store.entries(self._claims.path)
        return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())

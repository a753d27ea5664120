"""What the controller keeps beyond its own death, and why there is only one controller.

The state is written as numbered files that are never changed: a write takes the next number, and of several writers
one gets it. Whoever finds a number that is not its own has been replaced, and stops.

[Note: one controller] Old numbers are removed, so a controller that slept may find its next number free again. So a
write counts only when it is the newest afterwards, and nothing is told to anybody before that.

Any thread, one at a time.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from everstep.actors.run_folder import start_time
from everstep.collectives.addresses import boot_id
from everstep.platform.cluster.controller_messages import Kept, Owner, decode_kept, encode
from everstep.storage.errors import StoreError, StoreExists, StoreNotFound
from everstep.storage.stores.port import Folder

CONNECT_S: Final = 2.0  # to see whether a controller on another machine lives


class AnotherController(RuntimeError):
    """Another controller has, or took over, this place."""


class StateUnavailable(ConnectionError):
    """The place cannot be read or written now; says why."""


class StateStore(Protocol):
    """Numbered records. Methods raise StateUnavailable."""

    place: str
    """For people: where it is."""

    def newest(self) -> tuple[int, bytes] | None:
        """The highest number and its record."""
        ...

    def put_new(self, number: int, data: bytes) -> bool:
        """All or nothing; False where that number is there."""
        ...

    def remove(self, below: int) -> None:
        """Removes all records with lower numbers."""
        ...


class FolderState:
    """In a folder of a store. Implements `StateStore`."""

    def __init__(self, folder: Folder) -> None:
        self.place = folder.url
        self._folder = folder

    def newest(self) -> tuple[int, bytes] | None:
        store = self._folder.store
        try:
            while numbers := self._numbers():
                path = self._folder.child(str(numbers[-1])).path
                try:
                    out = bytearray(store.size(path))
                    store.read_into(path, 0, memoryview(out))
                except StoreNotFound:  # a newer one was written meanwhile, and this one removed
                    continue
                return numbers[-1], bytes(out)
        except StoreError as error:
            raise StateUnavailable(str(error)) from error
        return None

    def put_new(self, number: int, data: bytes) -> bool:
        try:
            self._folder.store.put_new(self._folder.child(str(number)).path, data)
        except StoreExists:
            return False
        except StoreError as error:
            raise StateUnavailable(str(error)) from error
        return True

    def remove(self, below: int) -> None:
        try:
            for number in self._numbers():
                if number < below:
                    self._folder.store.remove_file(self._folder.child(str(number)).path)
        except StoreError as error:
            raise StateUnavailable(str(error)) from error

    def _numbers(self) -> list[int]:
        entries = self._folder.store.entries(self._folder.path)
        return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())


class StateBook:
    """One controller's hold on a store."""

    def __init__(self, store: StateStore, owner: Owner, alive: Callable[[Owner], bool] | None = None) -> None:
        self._store = store
        self._owner = owner
        self._alive = alive or is_alive
        self._number = 0

    @property
    def place(self) -> str:
        return self._store.place

    def open(self) -> Kept | None:
        """What was kept last. Raises AnotherController where whoever wrote it lives."""
        found = self._store.newest()
        if found is None:
            return None
        self._number, data = found
        try:
            kept = decode_kept(data)
        except msgspec.ValidationError as error:
            raise StateUnavailable(
                f"{self.place}/{self._number} is no controller's state ({error}); move it away, or use another place"
            ) from error
        if kept.owner is not None and self._alive(kept.owner):
            raise AnotherController(
                f"{kept.owner} has its state at {self.place}: two controllers on one place are impossible; give this "
                "cluster's another one ($EVERSTEP_CONTROLLER_STATE), or end that one"
            )
        return kept

    def write(self, kept: Kept) -> None:
        """Raises AnotherController if this is no longer the only one; then nothing may be done any more."""
        data = encode(kept)
        while not self._store.put_new(self._number + 1, data):
            found = self._store.newest()
            if found is None or found[0] != self._number + 1 or not self._is_ours(found[1]):
                raise self._replaced(found)
            self._number += 1  # a write of ours whose answer was lost on the way
        self._number += 1
        self.check()
        self._store.remove(self._number)

    def check(self) -> None:
        """Raises AnotherController if another one has written since."""
        found = self._store.newest()
        if found is None or found[0] != self._number:
            raise self._replaced(found)

    def _is_ours(self, data: bytes) -> bool:
        try:
            owner = decode_kept(data).owner
        except msgspec.ValidationError:
            return False
        return owner is not None and owner.id == self._owner.id

    def _replaced(self, found: tuple[int, bytes] | None) -> AnotherController:
        other: object = "nobody"
        if found is not None:
            try:
                other = decode_kept(found[1]).owner
            except msgspec.ValidationError:
                other = "something unknown"
        return AnotherController(f"{other} has taken over the state at {self.place}; this one ({self._owner}) stops")


def this_process(id: str, address: str) -> Owner:
    pid = os.getpid()
    return Owner(id, socket.gethostname(), _machine(), pid, start_time(pid) or 0, address)


def is_alive(owner: Owner) -> bool:
    """On this machine by its process, elsewhere by whether its port answers."""
    if owner.machine == _machine():
        return start_time(owner.pid) == owner.started
    host, _, port = owner.address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _machine() -> str:
    return f"{boot_id()}/{os.readlink('/proc/self/ns/pid')}"

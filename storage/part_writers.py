"""The parts of an upload on their way from one producer to a store: some buffers, some threads.

Owns the buffers and the threads, from `__enter__` to `__exit__`. The producer is one thread; `write` of the upload is
called by the writers.
"""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from everstep.storage.stores.port import Upload

# Buffers besides the one that is filled and those that are written: a writer never waits for the producer to notice
# that it is done. More of them only leave the cache.
_SPARE_BUFFERS: Final = 1


class PartWriters:
    """Hands the parts of a file of `nbytes` to `upload`, by `threads` threads and at most `memory_bytes` of buffers.

    The producer asks for `room` at a position, fills from its start, and says with `filled` how far it has come. All
    parts have been written when the block ends; an error of a writer is raised by `room` or there. `on_bytes(n)` is
    called by the writers, one at a time.
    """

    def __init__(
        self,
        upload: Upload,
        nbytes: int,
        part_bytes: int,
        threads: int,
        memory_bytes: int,
        on_bytes: Callable[[int], None] | None,
    ) -> None:
        self._upload = upload
        self._nbytes = nbytes
        self._part_bytes = part_bytes
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        parts = -(-nbytes // part_bytes)
        # At least one buffer, however long the store's parts are. A file of one part needs no thread.
        buffers = max(1, min(memory_bytes // part_bytes, threads + 1 + _SPARE_BUFFERS, parts))
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put(bytearray(min(part_bytes, nbytes)))
        self._work: queue.SimpleQueue[tuple[bytearray, int] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name="part-writer", daemon=True)
            for _ in range(min(threads, parts) if parts > 1 else 0)
        ]
        self._buffer: bytearray | None = None

    def room(self, position: int) -> memoryview:
        """What is left of the part that byte `position` of the file is in."""
        first = position // self._part_bytes * self._part_bytes
        if self._buffer is None:
            self._buffer = self._free.get()
            if self._error is not None:
                raise self._error
        length = min(self._part_bytes, self._nbytes - first)
        return memoryview(self._buffer)[position - first : length]

    def filled(self, position: int) -> None:
        """All before byte `position` has been filled."""
        if self._buffer is None or (position % self._part_bytes and position < self._nbytes):
            return
        first = (position - 1) // self._part_bytes * self._part_bytes
        buffer, self._buffer = self._buffer, None
        if self._threads:
            self._work.put((buffer, first))
        else:
            self._write(buffer, first)
            self._free.put(buffer)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._error is None:
            self._error = error  # what is queued still is not written
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self._error is None:
                    self._write(*work)
            except BaseException as error:  # handed to the producer, whose it is
                self._error = error
            self._free.put(work[0])

    def _write(self, buffer: bytearray, first: int) -> None:
        length = min(self._part_bytes, self._nbytes - first)
        self._upload.write(first, memoryview(buffer)[:length])
        if self._on_bytes is not None:
            with self._lock:
                self._on_bytes(length)

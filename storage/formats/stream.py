"""Tensors of an index as one stream of bytes, read ahead of whoever takes them, and files that are written in order.

Owns `ReadAhead`, its buffers and its thread, and `Sink`, an upload; both from `__enter__` to `__exit__`. One thread
takes and writes; while it does, the next lot is read into another buffer, and full parts go to the store.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

import numpy as np

from everstep.storage.checkpoint import planned
from everstep.storage.index import Fragment, StateIndex, TensorKey, TensorMeta
from everstep.storage.part_writers import PartWriters
from everstep.storage.planner import Copy, Want
from everstep.storage.stores.port import Folder

Targets = list[tuple[Copy, memoryview]]
# Two are enough: one is read into, one is taken from. Less than that many bytes, and requests get small.
_BUFFERS: Final = 2
_LEAST_BYTES: Final = 1 << 20
_PIECE_BYTES: Final = 512 << 10  # what is filled is looked at again while it is in a core's cache


class _Span(NamedTuple):
    meta: TensorMeta
    start: int
    stop: int
    at: int  # byte of the buffer


class _Lot(NamedTuple):
    spans: tuple[_Span, ...]
    nbytes: int


class ReadAhead:
    """The whole tensors `metas`, one after the other, as `take` asks for their bytes.

    `index` says where the bytes are, `read` fills the targets of planned copies (in a thread of its own), `inline`
    has the bytes of tensors that are in no file. At most `memory_bytes` of buffers are held.
    """

    def __init__(
        self,
        index: StateIndex,
        metas: Sequence[TensorMeta],
        read: Callable[[Targets], None],
        *,
        inline: Mapping[TensorKey, bytes] | None = None,
        memory_bytes: int,
    ) -> None:
        self._step = index.step
        self._fragments: dict[TensorKey, list[Fragment]] = {}
        for f in index.fragments:
            self._fragments.setdefault(f.key, []).append(f)
        self._read = read
        self._inline = inline or {}
        size = max(_LEAST_BYTES, memory_bytes // _BUFFERS)
        self._lots = _lots(metas, size)
        size = min(size, max(_LEAST_BYTES, sum(meta.nbytes for meta in metas)))
        self._free: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(bytearray(size))
        self._full: queue.SimpleQueue[tuple[bytearray, int] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._buffer: bytearray | None = None
        self._at = self._end = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free.put(None)
        self._thread.join()

    def take(self, out: memoryview) -> None:
        """Fill `out` with what comes next; raises what reading raised."""
        done = 0
        while done < len(out):
            if self._at == self._end:
                self._next()
            count = min(len(out) - done, self._end - self._at)
            assert self._buffer is not None
            # numpy's copy lets other threads run meanwhile.
            np.copyto(
                np.frombuffer(out, np.uint8, count, done), np.frombuffer(self._buffer, np.uint8, count, self._at)
            )
            done += count
            self._at += count

    def _next(self) -> None:
        if self._buffer is not None:
            self._free.put(self._buffer)
            self._buffer = None
        got = self._full.get()
        if isinstance(got, BaseException):
            self._full.put(got)  # whoever asks again hears it again
            raise got
        (self._buffer, self._end), self._at = got, 0

    def _run(self) -> None:
        try:
            for lot in self._lots:
                buffer = self._free.get()
                if buffer is None:
                    return
                self._fill(lot, memoryview(buffer))
                self._full.put((buffer, lot.nbytes))
            self._full.put(EOFError("more bytes were taken than there are"))
        except BaseException as error:  # raised where it is waited for
            self._full.put(error)

    def _fill(self, lot: _Lot, memory: memoryview) -> None:
        wants: list[tuple[Want, memoryview]] = []
        for meta, start, stop, at in lot.spans:
            part = memory[at : at + (stop - start) * meta.itemsize]
            data = self._inline.get(meta.key)
            if data is not None:
                part[:] = data[start * meta.itemsize : stop * meta.itemsize]
            else:
                wants.append((Want(meta.name, meta.kind, start, stop, ""), part))
        metas = {span.meta.key: span.meta for span in lot.spans}
        fragments = [f for key in metas for f in self._fragments.get(key, ())]
        self._read(planned(StateIndex(self._step, tuple(metas.values()), tuple(fragments)), wants))


class Sink:
    """The new file `name` of `folder`, of `nbytes` that are written one after the other.

    It is there, and durable, when the block ends without an error; else nothing is left. Raises StoreError.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        nbytes: int,
        *,
        threads: int,
        memory_bytes: int,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.position = 0
        self._nbytes = nbytes
        self._upload = folder.store.upload(folder.child(name).path, nbytes)
        try:
            part_bytes = folder.store.part_bytes(nbytes)
            self._writers = PartWriters(self._upload, nbytes, part_bytes, threads, memory_bytes, on_bytes)
        except BaseException:
            self._upload.abort()
            raise

    def __enter__(self) -> Self:
        self._writers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writers.__exit__(kind, error, trace)
            if error is None:
                assert self.position == self._nbytes
                self._upload.finish()
        except BaseException:
            self._upload.abort()
            raise
        if error is not None:
            self._upload.abort()

    def fill(self, count: int, take: Callable[[memoryview], None]) -> None:
        """The next `count` bytes, from calls of `take` with the memory that they go into."""
        while count:
            room = self._writers.room(self.position)[: min(count, _PIECE_BYTES)]
            take(room)
            self.position += len(room)
            count -= len(room)
            self._writers.filled(self.position)

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        rest = memoryview(data)

        def take(out: memoryview) -> None:
            nonlocal rest
            out[:] = rest[: len(out)]
            rest = rest[len(out) :]

        self.fill(len(rest), take)


def _lots(metas: Sequence[TensorMeta], size: int) -> Iterator[_Lot]:
    """The tensors cut into lots of at most `size` bytes, at the ends of rows where there are short enough ones."""
    spans: list[_Span] = []
    used = 0
    for meta in metas:
        row = meta.numel // meta.shape[0] if meta.shape and meta.shape[0] else 1
        start = 0
        while start < meta.numel:
            room = (size - used) // meta.itemsize
            stop = min(meta.numel, start + room)
            if stop < meta.numel and row <= room:
                stop = max(stop // row * row, start + row) if start % row == 0 else stop
            if stop > start:
                spans.append(_Span(meta, start, stop, used))
                used += (stop - start) * meta.itemsize
                start = stop
            if start < meta.numel:
                yield _Lot(tuple(spans), used)
                spans, used = [], 0
    if spans:
        yield _Lot(tuple(spans), used)

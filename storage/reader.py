"""The reader: bytes of a checkpoint's files, in parallel, in bounded memory, checked before anybody sees them.

Owns the requests, the buffers and the threads of one `read_copies` or `verify_blocks`; keeps no state between calls,
safe in any thread. What is decided (which bytes, in which requests, into which memory) is `read_plan.py`.

[Note: verified before it is handed on]
A file with `Blocks` is read in whole blocks, each once, and a block's checksum is compared before its bytes go
anywhere but into a buffer of ours or into a target whose reader has not returned yet. Who calls must not use a target
before `read_copies` has returned: when it raises, targets may hold anything.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import xxhash

from everstep.storage.blocks import BLOCK_BYTES, Blocks
from everstep.storage.errors import StoreNotFound
from everstep.storage.planner import Copy
from everstep.storage.read_plan import Request, plan_requests, whole_file
from everstep.storage.stores.port import Folder

# One request to the store. On a bucket a request costs some 30 ms however short it is, and a stream gives some
# 100 MB/s: at 16 MiB the waiting is a sixth, and four threads of them are 64 MiB of memory.
REQUEST_BYTES: Final = 16 << 20
# A local file is read in pieces, each hashed while it is in a core's own cache: 45 GB/s there, 25 outside. Of files
# that nobody hashes whole blocks are read.
_LOCAL_REQUEST_BYTES: Final = BLOCK_BYTES
_LOCAL_PIECE_BYTES: Final = 1 << 20

Damaged = Callable[[str, int, int], Exception]


class OpenFile(Protocol):
    """A file that was opened once: what `open_file(path)` of a store gives that has it. One thread.

    On this machine opening takes as long as reading 100 KB, and a file is read in pieces.
    """

    def read_into(self, offset: int, out: memoryview) -> int:
        """As `Store.read_into`."""
        ...

    def close(self) -> None:
        """Give it back; does not raise."""
        ...


def read_copies(
    folder: Folder,
    files: Mapping[str, Blocks | None],
    targets: Sequence[tuple[Copy, memoryview]],
    *,
    threads: int = 4,
    memory_bytes: int = 64 << 20,
    on_bytes: Callable[[int], None] | None = None,
    damaged: Damaged,
) -> None:
    """Fill the targets of planned copies out of files of `folder` (a copy's source names the file).

    For a flat copy the memory is exactly the copy's bytes, for a region copy the whole memory of its want; it must be
    writable and contiguous. A file with `Blocks` is verified, one with None is taken as it is. At most `memory_bytes`
    are held besides (but a block at least), by at most `threads` threads; `on_bytes(n)` hears of n more bytes read,
    from any of them, one at a time.

    Raises what `damaged(file, first byte, end byte)` makes of a block that is missing, cut off or does not match its
    checksum; StoreError when storage cannot be asked. See [Note: verified before it is handed on].
    """
    request_bytes, threads = _limits(folder, threads, memory_bytes)
    requests = plan_requests(files, targets, request_bytes, local=_is_local(folder))
    _run(folder, files, requests, threads, on_bytes, damaged)


def verify_blocks(
    folder: Folder,
    files: Mapping[str, Blocks],
    *,
    threads: int = 4,
    memory_bytes: int = 64 << 20,
    on_bytes: Callable[[int], None] | None = None,
    damaged: Damaged,
) -> None:
    """Read every block of `files` and compare it with its checksum; raises as `read_copies` does."""
    request_bytes, threads = _limits(folder, threads, memory_bytes)
    requests = itertools.chain.from_iterable(
        whole_file(name, blocks, request_bytes) for name, blocks in sorted(files.items())
    )
    _run(folder, files, requests, threads, on_bytes, damaged)


def _is_local(folder: Folder) -> bool:
    return folder.store.url == ""


def _limits(folder: Folder, threads: int, memory_bytes: int) -> tuple[int, int]:
    """Bytes of a request, whole blocks, and threads."""
    most = _LOCAL_REQUEST_BYTES if _is_local(folder) else REQUEST_BYTES
    threads = max(1, min(threads, memory_bytes // BLOCK_BYTES))
    return min(most, max(1, memory_bytes // threads // BLOCK_BYTES) * BLOCK_BYTES), threads


def _run(
    folder: Folder,
    files: Mapping[str, Blocks | None],
    requests: Iterable[Request],
    threads: int,
    on_bytes: Callable[[int], None] | None,
    damaged: Damaged,
) -> None:
    work = _Work(folder, files, requests, on_bytes, damaged)
    others = [threading.Thread(target=work.loop, name="checkpoint-reader", daemon=True) for _ in range(threads - 1)]
    started = []
    try:
        for thread in others:
            if not work.has_next():
                break
            thread.start()
            started.append(thread)
        work.loop()
    except BaseException as error:  # of the calling thread alone: an interrupt
        work.stop(error)
        raise
    finally:
        for thread in started:
            thread.join()
    if work.error is not None:
        raise work.error


class _Work:
    """The requests that are left, shared by the threads."""

    def __init__(
        self,
        folder: Folder,
        files: Mapping[str, Blocks | None],
        requests: Iterable[Request],
        on_bytes: Callable[[int], None] | None,
        damaged: Damaged,
    ) -> None:
        self.error: BaseException | None = None
        self._folder = folder
        self._files = files
        self._requests = iter(requests)
        self._ahead: list[Request] = []
        self._piece_bytes = _LOCAL_PIECE_BYTES if _is_local(folder) else REQUEST_BYTES
        self._on_bytes = on_bytes
        self._damaged = damaged
        self._lock = threading.Lock()
        self._telling = threading.Lock()

    def stop(self, error: BaseException) -> None:
        """No further request is begun; the first error is kept."""
        with self._lock:
            self.error = self.error or error

    def has_next(self) -> bool:
        with self._lock:
            if not self._ahead:
                self._ahead.extend(itertools.islice(self._requests, 1))
            return bool(self._ahead)

    def loop(self) -> None:
        """Requests, one after the other, until there are none or one has failed."""
        scratch = bytearray()
        files = _Files(self._folder)
        try:
            while (request := self._next()) is not None:
                if len(scratch) < request.buffer_bytes:
                    scratch = bytearray(request.buffer_bytes)
                filled = self._read(request, memoryview(scratch), files)
                for part, data in zip(request.parts, filled, strict=True):
                    for delivery in request.deliveries:
                        if delivery is not part.flat and delivery.first < part.end and delivery.end > part.first:
                            delivery.deliver(part.first, data)
                if self._on_bytes is not None:
                    with self._telling:
                        self._on_bytes(request.end - request.first)
        except Exception as error:
            self.stop(error)
        finally:
            files.close()

    def _next(self) -> Request | None:
        with self._lock:
            if self.error is not None:
                return None
            return self._ahead.pop() if self._ahead else next(self._requests, None)

    def _read(self, request: Request, scratch: memoryview, files: "_Files") -> list[memoryview]:
        """The memory of each part, filled, and verified where the file's blocks are known."""
        blocks = self._files[request.file]
        own = xxhash.xxh3_64()
        filled = []
        for part in request.parts:
            data = part.into
            if data is None:
                data, scratch = scratch[: part.end - part.first], scratch[part.end - part.first :]
            filled.append(data)
            step = len(data) if blocks is None else self._piece_bytes
            for start in range(0, len(data), step):
                piece = data[start : start + step]
                self._fill(files, request.file, part.first + start, piece)
                if blocks is not None:
                    self._check(request, blocks, own, part.first + start, piece)
        return filled

    def _check(self, request: Request, blocks: Blocks, own: xxhash.xxh3_64, first: int, piece: memoryview) -> None:
        """Go on hashing with what is at byte `first`; compare where a block ends."""
        while len(piece):
            part = piece[: BLOCK_BYTES - first % BLOCK_BYTES]
            own.update(part)
            first, piece = first + len(part), piece[len(part) :]
            if first % BLOCK_BYTES == 0 or first == request.end:
                number = (first - 1) // BLOCK_BYTES
                if own.intdigest() != blocks.checksums[number]:
                    raise self._damaged(request.file, number * BLOCK_BYTES, first)
                own.reset()

    def _fill(self, files: "_Files", file: str, first: int, into: memoryview) -> None:
        try:
            got = files.read_into(file, first, into)
        except StoreNotFound as error:
            raise self._damaged(file, first, first + len(into)) from error
        if got < len(into):
            raise self._damaged(file, first + got, first + len(into))


class _Files:
    """The files of one thread: the one that was read last stays open, where the store opens files."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._opens: Callable[[str], OpenFile] | None = getattr(folder.store, "open_file", None)
        self._name = ""
        self._open: OpenFile | None = None

    def read_into(self, name: str, first: int, into: memoryview) -> int:
        """As `Store.read_into`."""
        if self._opens is None:
            return self._folder.store.read_into(self._folder.child(name).path, first, into)
        if self._open is None or self._name != name:
            self.close()
            self._open, self._name = self._opens(self._folder.child(name).path), name
        return self._open.read_into(first, into)

    def close(self) -> None:
        """Nothing stays open."""
        if self._open is not None:
            self._open.close()
            self._open = None

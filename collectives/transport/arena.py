"""Shared memory between the members on one host: each writes its own arena, the others read it.

[Note: one writer] An arena is a memfd: it has no name, so nothing is left behind however its owner dies. Only
its owner can write it (sealed: others cannot map it for writing), so a member that wakes up after it was declared
dead disturbs nobody. Its slots are used again in later views; a reader checks the slot's generation after it has
read, so a member that slept through the end of its view cannot take later bytes for earlier ones.

Thread-safety: slots are taken and come back under a lock, since the engines of two views may overlap; a slot that
is taken belongs to the engine that took it. A `Window` is only read.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import math
import mmap
import os
import socket
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence

import torch

from everstep.collectives.transport.frames import ProtocolError

# A frame costs what 100 KiB of copying cost, so pieces are large (64 MiB, registered: 1 MiB 3.6 GB/s with 2 ranks,
# 4 MiB 4.4). A slot takes memory from its first use on. Without a free one data goes through the socket, so no
# reduction ever waits for one.
SLOT_BYTES = 4 << 20
SLOTS = 64
_HEAD_BYTES = 4096  # generations, one uint64 a slot; then the newest view that is over, as one uint64
_HEAP = _HEAD_BYTES + SLOTS * SLOT_BYTES  # where registered tensors begin
_MAX_SIZE = 1 << 42
_PAGE = 4096
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SHRINK = 0x0002
_SEALS = _SEAL_SHRINK | 0x0004 | 0x0010  # shrink, grow, future write


def _tensor_over(memory: mmap.mmap) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only mapping: we only read it
        return torch.frombuffer(memory, dtype=torch.uint8)


def _slots_of(memory: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(memory[_HEAD_BYTES:_HEAP], SLOT_BYTES))


class Arena:
    """The slots that this member writes, and the heap of its registered tensors.

    `take` gives the slot used last, which is warm in its core's cache.
    """

    def __init__(self) -> None:
        self.id = os.urandom(16)
        self._pid = os.getpid()
        self.fd = os.memfd_create("everstep-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # The heap is as large as the machine's memory, and takes none of it before it is used.
            self._heap = Heap(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
            os.ftruncate(self.fd, _HEAP + self._heap.size)
            self._memory = mmap.mmap(self.fd, _HEAP + self._heap.size, flags=mmap.MAP_SHARED)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise
        self._bytes = _tensor_over(self._memory)
        self._base = self._bytes.data_ptr() + _HEAP
        self._generations = memoryview(self._memory)[: (SLOTS + 1) * 8].cast("Q")
        self._slots = _slots_of(self._bytes)
        self._free = list(range(SLOTS - 1, -1, -1))
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """A free slot under a new generation, or None."""
        with self._lock:
            if not self._free:
                return None
            slot = self._free.pop()
        self._generations[slot] += 1
        return slot

    @property
    def free(self) -> int:
        return len(self._free)

    def bytes_of(self, slot: int) -> torch.Tensor:
        return self._slots[slot]

    def generation(self, slot: int) -> int:
        return self._generations[slot] & 0xFFFFFFFF

    def give(self, slots: Iterable[int]) -> None:
        """Nobody reads them any more, or nobody whose word counts."""
        with self._lock:
            self._free.extend(slots)

    def end_view(self, view: tuple[int, int]) -> None:
        """What is read in this view or an older one no longer counts."""
        self._generations[SLOTS] = max(self._generations[SLOTS], _ordinal(view))

    # ---- registered tensors -----------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that members on this host read where it is. Its memory comes back when nobody refers to it."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            start = self._heap.take(nbytes)
        raw = torch.frombuffer(
            memoryview(self._memory)[_HEAP + start : _HEAP + start + max(nbytes, 1)], dtype=torch.uint8
        )
        weakref.finalize(raw.untyped_storage(), self._give_back, start)
        return raw[:nbytes].view(dtype).view(*shape)

    def offset_of(self, data: torch.Tensor) -> int | None:
        """Where in the heap a tensor lies; None for one that is elsewhere."""
        offset = data.data_ptr() - self._base
        return offset if 0 <= offset < self._heap.size else None

    def _give_back(self, start: int) -> None:
        with self._lock:
            length = self._heap.give(start)
        if self.fd >= 0 and os.getpid() == self._pid:  # a forked child's copy is not its to give back
            _punch_hole(self.fd, _HEAP + start, length)

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1
        self._slots.clear()
        self._generations.release()
        del self._bytes  # the mapping goes with its last tensor


class Window:
    """Another member's arena, mapped for reading."""

    def __init__(self, fd: int) -> None:
        """Takes over `fd`. Raises ProtocolError where it is not an arena."""
        try:
            size = os.fstat(fd).st_size
            if not _HEAP <= size <= _MAX_SIZE:
                raise ProtocolError(f"an arena of {size} bytes; {_HEAP} to {_MAX_SIZE} are allowed")
            if not fcntl.fcntl(fd, _F_GET_SEALS) & _SEAL_SHRINK:  # reading what was cut off would kill this process
                raise ProtocolError("an arena that could shrink")
            memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise ProtocolError(f"an arena that cannot be mapped: {error}") from None
        finally:
            os.close(fd)
        memory_bytes = _tensor_over(memory)
        self._slots = _slots_of(memory_bytes)
        self._heap = memory_bytes[_HEAP:]
        self._generations = memoryview(memory)[: (SLOTS + 1) * 8].cast("Q")

    def read(self, slot: int, length: int) -> torch.Tensor:
        """The first `length` bytes of a slot, in place."""
        if not 0 <= slot < SLOTS or not 0 <= length <= SLOT_BYTES:
            raise ProtocolError(f"slot {slot} with {length} bytes")
        return self._slots[slot] if length == SLOT_BYTES else self._slots[slot][:length]

    def read_heap(self, offset: int, length: int) -> torch.Tensor:
        """Bytes of a registered tensor, in place."""
        if not 0 <= offset <= offset + length <= self._heap.numel():
            raise ProtocolError(f"{length} bytes at {offset} of a heap of {self._heap.numel()}")
        return self._heap[offset : offset + length]

    def is_over(self, view: tuple[int, int]) -> bool:
        """Whether its owner has left this view: what was read of its heap no longer counts."""
        return self._generations[SLOTS] >= _ordinal(view)

    def still(self, slot: int, generation: int) -> bool:
        """Whether what was read from the slot was of this generation."""
        return bool(self._generations[slot] & 0xFFFFFFFF == generation)


class Heap:
    """Which parts of a range are in use: first fit, by whole pages."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [(0, size)]  # start, length; by start, never adjacent
        self._used: dict[int, int] = {}

    def take(self, nbytes: int) -> int:
        """Raises MemoryError."""
        length = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
        for i, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(start + length, room - length)] if room > length else []
                self._used[start] = length
                return start
        raise MemoryError(f"no room for a registered tensor of {nbytes} bytes; the heap has {self.size}")

    def give(self, start: int) -> int:
        """The length that is free again."""
        length = self._used.pop(start)
        merged: list[tuple[int, int]] = []
        for a, n in sorted([*self._free, (start, length)]):
            if merged and merged[-1][0] + merged[-1][1] == a:
                merged[-1] = (merged[-1][0], merged[-1][1] + n)
            else:
                merged.append((a, n))
        self._free = merged
        return length


def _ordinal(view: tuple[int, int]) -> int:
    return view[0] << 32 | view[1]


def _punch_hole(fd: int, start: int, length: int) -> None:
    """Gives the pages back to the system."""
    _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(start), ctypes.c_int64(length))


def send_fd(connection: socket.socket, data: bytes, fd: int) -> None:
    connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def recv_with_fd(connection: socket.socket, length: int) -> tuple[bytes, int]:
    """Exactly `length` bytes that came with one descriptor. Raises ProtocolError; closes what it does not return."""
    data, fds, _, _ = socket.recv_fds(connection, length, 4, socket.MSG_CMSG_CLOEXEC)
    if len(fds) != 1 or len(data) != length:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"{len(fds)} descriptors with {len(data)} bytes; 1 with {length} was expected")
    return data, fds[0]

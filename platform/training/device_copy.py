"""Copies a rank's CUDA tensors into host memory (a mapped segment) while training goes on.

[Note: device copies] The state must not change between `begin` and the next optimizer step. So that this is no
wait, `begin` first copies it inside device memory, on a side stream (8.5 GB: a few ms, beside the next forward),
and the slow way to the host starts from there. `release` makes the training stream wait for the first copy only.
    staging    the sources are released when                               chosen when
    whole      they are copied inside device memory                        it fits beside `margin_bytes`
    a ring     the last bucket has entered it: the others have left it     two buckets fit
    none       all is in host memory                                       not even those fit
The host memory is registered with CUDA, so the device writes into the segment itself. Where that is refused, each
bucket passes through pinned memory, and who waits for its arrival (`done`) copies it from there.

Owns the registration, the staging memory and the side stream. Threads: the training thread constructs, begins,
releases and closes; `done`, `arrived` and `timings` may be called in any others, several at once.
Imports torch, and of this project only `device_port.py` and `device_staging.py`.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from everstep.platform.training.device_port import CudaPort, Mark, Port
from everstep.platform.training.device_staging import ALIGN, Bucket, Layout, Slice, Staging, words_of

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

log = logging.getLogger(__name__)

# The queue between host and device is short: with 8.5 GB in buckets of 64 MiB, `begin` stood still until nearly all
# was copied (150 ms on an H200), with 512 MiB it takes some ms. A bucket takes 10 ms of PCIe 5.
BUCKET_BYTES: Final = 512 << 20
MARGIN_BYTES: Final = 2 << 30
_WORD: Final = 16  # alignment of a slice inside its bucket: whatever its dtype, its words are aligned
_BOUNCES: Final = 3  # one on its way from the device, one being copied out, one waiting


@dataclass(frozen=True)
class Timings:
    """Of one copy, in milliseconds of the device's clock: from its begin until the sources were staged, and until
    the last byte was in host memory (pinned memory, where that is used); and how long the training stream stood
    still in `release`. `nbytes`: of all device tensors, without paddings.
    """

    nbytes: int
    staged_ms: float
    arrived_ms: float
    held_ms: float


def plan_buckets(places: Sequence[tuple[int, int, int]], bucket_bytes: int) -> list[Bucket]:
    """Cuts items into buckets of at most `bucket_bytes` (a multiple of 64). Pure.

    `places[i]`: (target, offset, bytes) of item i. Items that follow each other in host memory as the fragments
    of a segment do, with gaps below 64 bytes, share buckets. Cuts are at multiples of 64 bytes inside an item.
    Items complete in the order of their numbers.
    """
    if bucket_bytes < ALIGN or bucket_bytes % ALIGN:
        raise ValueError(f"buckets of {bucket_bytes} bytes; a multiple of {ALIGN} is needed")
    buckets: list[Bucket] = []
    slices: list[Slice] = []
    target, base, length = -1, 0, 0

    def close() -> None:
        if slices:
            buckets.append(Bucket(target, base, length, tuple(slices)))
            slices.clear()

    for item, (into, offset, nbytes) in enumerate(places):
        start = 0
        while start < nbytes:
            at = offset + start - base
            room = (bucket_bytes - at) // ALIGN * ALIGN
            if not slices or into != target or not 0 <= at - length < ALIGN or at % _WORD or room <= 0:
                close()
                target, base, at, room = into, offset + start, 0, bucket_bytes
            stop = min(nbytes, start + room)
            slices.append(Slice(item, start, stop, at))
            length = at + stop - start
            start = stop
    close()
    return buckets


@dataclass
class _Job:
    """One copy."""

    layout: Layout
    sources: list[list[torch.Tensor]]  # by bucket: the slices, as words; kept alive until `release`
    nbytes: int
    start: Mark
    staged: Mark
    sent: int = 0  # buckets queued
    arrived: int = 0  # buckets in the segment, where they pass through pinned memory
    held: tuple[Mark, Mark] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class DeviceCopy:
    """Copies tensors of one device into `targets`, mapped host memory of any length (whole segments). A context
    manager.

    `margin_bytes`: device memory that staging leaves free. `close` it before the targets are unmapped.
    """

    def __init__(
        self,
        targets: Sequence[Buffer],
        device: torch.device | str,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        margin_bytes: int = MARGIN_BYTES,
        port: Port | None = None,
    ) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._port = port or CudaPort(self._device)
        self._bucket_bytes = bucket_bytes
        self._memory = [torch.frombuffer(target, dtype=torch.uint8) for target in targets]
        self._spans = [(memory.data_ptr(), memory.numel()) for memory in self._memory]
        self._staging = Staging(self._port, bucket_bytes, margin_bytes)
        self._job: _Job | None = None
        self._bounces: list[torch.Tensor] = []
        self._registered: list[torch.Tensor] = []
        for memory in self._memory:
            if why := self._port.register(memory):
                self._unregister()
                log.warning(
                    "%d bytes of host memory could not be registered with the device (%s): "
                    "snapshots pass through pinned memory, which takes about twice as long",
                    memory.numel(),
                    why,
                )
                self._bounces = [self._port.pinned_buffer(bucket_bytes) for _ in range(_BOUNCES)]
                break
            self._registered.append(memory)

    @property
    def direct(self) -> bool:
        """Whether the device writes into the targets itself."""
        return not self._bounces

    def begin(self, items: Sequence[tuple[torch.Tensor, memoryview]]) -> None:
        """Starts copying each tensor into its memory. Training thread, right after the optimizer step.

        Each tensor is contiguous, allocated on the current stream, on the device or on the CPU (optimizer scalars:
        those are copied here and now, and best come last: between others they cut buckets); each memory lies in one
        of the targets and has just its bytes. None of the sources may be written before `release`. Raises ValueError
        for items that are not so, and RuntimeError while the copy before has not arrived or was not released.
        """
        former = self._job
        if former is not None and (former.held is None or not self._all_arrived(former)):
            raise RuntimeError("the copy before is still under way: release it and wait for its arrival first")
        places = [self._place(i, tensor, memory) for i, (tensor, memory) in enumerate(items)]
        key = tuple((*place, tensor.element_size()) for (tensor, _), place in zip(items, places, strict=True))
        layout = self._staging.known(key)
        if layout is None:
            buckets = plan_buckets(places, self._bucket_bytes)
            layout = self._staging.lay_out(key, buckets, [size for *_, size in key])
        sources = self._sources(layout, [tensor for tensor, _ in items])
        nbytes = sum(nbytes for _, _, nbytes in places)
        job = self._job = _Job(layout, sources, nbytes, self._port.mark(), self._port.mark())
        for i, (tensor, memory) in enumerate(items):
            if layout.last[i] < 0 and tensor.numel():
                torch.frombuffer(memory, dtype=torch.uint8).copy_(words_of(tensor.detach()).view(torch.uint8))
        first: list[Callable[[], None]] = [job.start.record]
        if layout.slots:
            first.append(partial(self._stage, job, range(min(layout.slots, len(layout.buckets)))))
        if not layout.needed:
            first.append(job.staged.record)
            # Alone the copy inside the device takes 5 ms (8.5 GB, H200); beside the next step's kernels 20 ms, and it
            # slows them by as much.
            while first:
                first.pop(0)()
        more = self._sending(job, len(layout.buckets)) if self.direct else ()
        self._port.run([*first, *more], behind_current=True)

    def release(self) -> float:
        """The current stream waits until the sources may be written again. Training thread, just before the next
        optimizer step. Returns the seconds for which this thread had to wait itself: 0 unless buckets pass
        through pinned memory and staging does not hold everything.
        """
        job = self._job
        if job is None or job.held is not None:
            return 0.0
        waited_s = 0.0
        if job.sent < job.layout.needed:
            began = time.perf_counter()
            with job.lock:
                while job.sent < job.layout.needed:
                    self._advance(job)
            waited_s = time.perf_counter() - began
        job.held = self._port.hold(job.staged)
        # Freed memory is reused on the current stream, which waits now.
        job.sources = []
        return waited_s

    def done(self, i: int) -> None:
        """Returns when the bytes of item `i` of the newest copy are in its memory. Raises what failed (RuntimeError
        of CUDA). Any thread.
        """
        job = self._job
        if job is None:
            raise RuntimeError("nothing was begun")
        bucket = job.layout.last[i]
        if bucket < 0:
            return
        if self.direct:
            job.layout.marks[bucket].synchronize()
            return
        while job.arrived <= bucket:
            with job.lock:
                if job.arrived <= bucket:
                    self._advance(job)

    def arrived(self) -> Iterator[int]:
        """The items of the newest copy, in their order, each when its bytes are in its memory. Raises as `done`."""
        job = self._job
        for i in range(len(job.layout.last) if job is not None else 0):
            self.done(i)
            yield i

    def timings(self) -> Timings:
        """Of the newest copy, which has arrived and is released; waits until the stream is past the release."""
        job = self._job
        if job is None or job.held is None or not self._all_arrived(job):
            raise RuntimeError("no copy that has arrived and is released")
        before, after = job.held
        after.synchronize()
        last = job.layout.marks[-1] if job.layout.marks else job.staged
        staged_ms, arrived_ms = job.start.elapsed_time(job.staged), job.start.elapsed_time(last)
        return Timings(job.nbytes, staged_ms, arrived_ms, before.elapsed_time(after))

    def close(self) -> None:
        """Waits for what is under way, and gives memory and registration back; idempotent. Training thread."""
        self._job = None
        try:
            if self._memory:
                end = self._port.mark()
                self._port.run([end.record], behind_current=False)
                end.synchronize()
        finally:
            self._staging.clear()
            self._bounces = []
            self._unregister()
            self._memory = []

    def __enter__(self) -> DeviceCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- planning ---------------------------------------------------------------------------------------

    def _place(self, i: int, tensor: torch.Tensor, memory: memoryview) -> tuple[int, int, int]:
        """(target, offset, bytes) of an item; no bytes where nothing is left to the device."""
        nbytes, device = tensor.nbytes, tensor.device
        if memory.nbytes != nbytes or memory.readonly or not tensor.is_contiguous():
            form = "contiguous" if tensor.is_contiguous() else "not contiguous"
            kind = "read-only" if memory.readonly else "writable"
            raise ValueError(
                f"item {i}: a tensor of {nbytes} bytes, {form}, for {memory.nbytes} bytes of memory, {kind}; "
                "a contiguous tensor and writable memory of the same length are needed"
            )
        if device != self._device:
            if device.type != "cpu":
                raise ValueError(f"item {i} is on {device}; this copies from {self._device} (and the CPU)")
            return (-1, 0, 0)
        if not nbytes:
            return (-1, 0, 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for target, (start, length) in enumerate(self._spans):
            if start <= address and address + nbytes <= start + length:
                return (target, address - start, nbytes)
        raise ValueError(f"item {i}: its memory lies in none of the {len(self._spans)} targets")

    @staticmethod
    @torch.no_grad()
    def _sources(layout: Layout, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        sources, item, words = [], -1, torch.empty(0)
        for bucket in layout.buckets:
            slices = []
            for part in bucket.slices:
                if part.item != item:
                    item, words = part.item, words_of(tensors[part.item])
                size = words.element_size()
                first, last = part.start // size, part.stop // size
                slices.append(words if last - first == words.numel() else words[first:last])
            sources.append(slices)
        return sources

    # ---- on the side stream -----------------------------------------------------------------------------

    def _sending(self, job: _Job, upto: int) -> Iterator[Callable[[], None]]:
        """The operations that send all buckets below `upto`, and stage those that take their slots."""
        layout = job.layout
        for b in range(job.sent, upto):
            yield partial(self._send, job, b)
            yield layout.marks[b].record
            ahead = b + layout.slots
            if layout.slots and ahead < len(layout.buckets):
                yield partial(self._stage, job, range(ahead, ahead + 1))
            job.sent = b + 1
            if job.sent == layout.needed:
                yield job.staged.record

    @staticmethod
    def _stage(job: _Job, buckets: range) -> None:
        batches: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for b in buckets:
            for view, source in zip(job.layout.views[b], job.sources[b], strict=True):
                into, from_ = batches.setdefault(view.dtype, ([], []))
                into.append(view)
                from_.append(source)
        for into, from_ in batches.values():
            torch._foreach_copy_(into, from_, non_blocking=True)

    def _send(self, job: _Job, b: int) -> None:
        bucket = job.layout.buckets[b]
        into = self._bounces[b % _BOUNCES][: bucket.nbytes] if self._bounces else self._host(bucket)
        if job.layout.slots:
            into.copy_(job.layout.rooms[b], non_blocking=True)
            return
        for part, source in zip(bucket.slices, job.sources[b], strict=True):
            into[part.at : part.at + source.nbytes].copy_(source.view(torch.uint8), non_blocking=True)

    def _advance(self, job: _Job) -> None:
        """Takes one bucket out of pinned memory, and keeps the others filled. Holds the job's lock."""
        b = job.arrived
        upto = min(len(job.layout.buckets), b + _BOUNCES)
        if job.sent < upto:
            self._port.run(self._sending(job, upto), behind_current=False)
        job.layout.marks[b].synchronize()
        bucket = job.layout.buckets[b]
        # numpy copies without the interpreter lock and in this thread alone; torch would start more threads.
        self._host(bucket).numpy()[:] = self._bounces[b % _BOUNCES][: bucket.nbytes].numpy()
        job.arrived = b + 1

    def _host(self, bucket: Bucket) -> torch.Tensor:
        return self._memory[bucket.target][bucket.offset : bucket.offset + bucket.nbytes]

    def _all_arrived(self, job: _Job) -> bool:
        marks = job.layout.marks
        return (not marks or marks[-1].query()) if self.direct else job.arrived == len(marks)

    def _unregister(self) -> None:
        while self._registered:
            self._port.unregister(self._registered.pop())

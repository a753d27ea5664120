"""Copies from a device that does every queued operation as late, or as early, as a GPU may. With a real one:
`test_device_copy.py`.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from everstep.platform.training.device_copy import DeviceCopy
from everstep.platform.training.device_port import Mark

KIB = 1 << 10
CPU = torch.device("cpu")


class LazyMark:
    """Reached when its device comes to it; its time is the number of operations done by then."""

    def __init__(self, device: LazyDevice) -> None:
        self.device = device
        self.time: int | None = None

    def record(self) -> None:
        self.time = self.device.count

    def query(self) -> bool:
        return self.time is not None

    def synchronize(self) -> None:
        with self.device.lock:
            while self.time is None:
                self.device.one()

    def elapsed_time(self, end_event: LazyMark) -> float:
        assert self.time is not None
        assert end_event.time is not None
        return float(end_event.time - self.time)


class LazyDevice:
    """Device memory is host memory; an operation is done when somebody waits for a mark behind it, not before; with
    `eager` at once."""

    def __init__(self, free_bytes: int = 1 << 30, refuse: str = "", eager: bool = False) -> None:
        self.eager = eager
        self.free = free_bytes
        self.refuse = refuse
        self.queue: list[Callable[[], None]] = []
        self.count = 0
        self.registered: set[int] = set()
        self.buffers: list[int] = []
        self.lock = threading.RLock()

    def register(self, memory: torch.Tensor) -> str:
        if not self.refuse:
            self.registered.add(memory.data_ptr())
        return self.refuse

    def unregister(self, memory: torch.Tensor) -> None:
        self.registered.remove(memory.data_ptr())

    def free_bytes(self) -> int:
        return self.free

    def device_buffer(self, nbytes: int) -> torch.Tensor | None:
        self.buffers.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pinned_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> LazyMark:
        return LazyMark(self)

    def run(self, operations: Iterable[Callable[[], None]], behind_current: bool) -> None:
        with self.lock:
            for operation in operations:
                if isinstance(mark := getattr(operation, "__self__", None), LazyMark):
                    mark.time = None  # as with CUDA: recorded again means not reached yet
                self.queue.append(operation)
            while self.eager and self.queue:
                self.one()

    def hold(self, mark: Mark) -> tuple[Mark, Mark]:
        before, after = self.mark(), self.mark()
        before.record()
        mark.synchronize()
        after.record()
        return before, after

    def one(self) -> None:
        with self.lock:
            assert self.queue, "waits for a mark that nobody records"
            self.queue.pop(0)()
            self.count += 1


def tensors() -> list[torch.Tensor]:
    """Of every width, of awkward lengths, with NaNs whose bits tell them apart, and an empty one."""
    generator = torch.Generator().manual_seed(0)

    def random(nbytes: int) -> torch.Tensor:
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)

    return [
        random(40 * KIB).view(torch.float32).view(80, 128),
        random(7),
        torch.tensor([0x7FA1, -0x5F, 0x7F81], dtype=torch.int16).view(torch.bfloat16),
        torch.empty(0, 5),
        random(3 * 24).view(torch.complex64),
        random(13).view(torch.bool).bitwise_and(True),
        random(9 * 8).view(torch.int64),
        random(5).view(torch.float8_e4m3fn),
        random(100 * KIB).view(torch.float64),
        random(4).view(torch.float32).view(()),
        random(32).view(torch.complex128),
    ]


def places_in(memory: memoryview, sources: list[torch.Tensor], first: int = 4096) -> list[memoryview]:
    """Memory for each, at 64-byte boundaries as in a segment."""
    rooms = []
    for tensor in sources:
        rooms.append(memory[first : first + tensor.nbytes])
        first = -(-(first + tensor.nbytes) // 64) * 64
    return rooms


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def scribble(sources: list[torch.Tensor]) -> None:
    """The next optimizer step."""
    for tensor in sources:
        tensor.view(-1).view(torch.uint8).fill_(0xEE)


@pytest.fixture
def segment() -> Iterator[memoryview]:
    with mmap.mmap(-1, 256 * KIB) as mapped:
        memory = memoryview(mapped)
        yield memory
        memory.release()


WHOLE, RING, NONE = 1 << 30, 2 * 4 * KIB, 0


@pytest.mark.parametrize("refuse", ["", "no locked memory left"], ids=["registered", "bounced"])
@pytest.mark.parametrize("free", [WHOLE, RING, NONE], ids=["whole", "ring", "none"])
class TestLazyDevice:
    @pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
    def test_sources_may_be_written_after_release(
        self, segment: memoryview, free: int, refuse: str, eager: bool
    ) -> None:
        sources = tensors()
        rooms = places_in(segment, sources)
        device = LazyDevice(free, refuse, eager)
        with DeviceCopy([segment], CPU, bucket_bytes=4 * KIB, margin_bytes=0, port=device) as copy:
            for _ in range(3):
                before = [raw(tensor) for tensor in sources]
                copy.begin(list(zip(sources, rooms, strict=True)))
                waited_s = copy.release()
                assert (waited_s > 0) == (bool(refuse) and free != WHOLE)
                scribble(sources)
                order = []
                for i in copy.arrived():
                    order.append(i)
                    assert bytes(rooms[i]) == before[i], i
                assert order == list(range(len(sources)))
                assert copy.timings().nbytes == sum(tensor.nbytes for tensor in sources)
                sources[0].view(-1).copy_(torch.arange(10240.0))
        assert device.buffers == ([] if free == NONE else [device.buffers[0]])
        assert not device.registered
        assert not device.queue

    def test_what_is_released_when(self, segment: memoryview, free: int, refuse: str) -> None:
        sources = [torch.arange(20 * KIB, dtype=torch.uint8)]  # five buckets
        device = LazyDevice(free, refuse)
        with DeviceCopy([segment], CPU, bucket_bytes=4 * KIB, margin_bytes=0, port=device) as copy:
            copy.begin([(sources[0], segment[: 20 * KIB])])
            copy.release()
            sent = sum(bool(segment[4 * KIB * b + 1]) for b in range(5))
            if not refuse:
                assert sent == {WHOLE: 0, RING: 3, NONE: 5}[free]
            for _ in copy.arrived():
                pass
            timings = copy.timings()
            assert (timings.staged_ms < timings.arrived_ms) == (free != NONE)

    def test_several_threads_wait(self, segment: memoryview, free: int, refuse: str) -> None:
        sources = tensors()
        rooms = places_in(segment, sources)
        before = [raw(tensor) for tensor in sources]
        device = LazyDevice(free, refuse)
        wrong: list[int] = []
        with DeviceCopy([segment], CPU, bucket_bytes=4 * KIB, margin_bytes=0, port=device) as copy:
            copy.begin(list(zip(sources, rooms, strict=True)))

            def take(items: range) -> None:
                for i in items:
                    copy.done(i)
                    if bytes(rooms[i]) != before[i]:
                        wrong.append(i)

            takers = [threading.Thread(target=take, args=(range(n, len(sources), 3),)) for n in range(3)]
            for taker in takers:
                taker.start()
            copy.release()
            scribble(sources)
            for taker in takers:
                taker.join(60)
        assert wrong == []

    def test_closed_in_the_middle(self, segment: memoryview, free: int, refuse: str) -> None:
        sources = tensors()
        device = LazyDevice(free, refuse)
        copy = DeviceCopy([segment], CPU, bucket_bytes=4 * KIB, margin_bytes=0, port=device)
        copy.begin(list(zip(sources, places_in(segment, sources), strict=True)))
        copy.close()
        assert not device.queue
        assert not device.registered
        copy.close()
        with pytest.raises(RuntimeError, match="nothing was begun"):
            copy.done(0)


class TestDeviceCopy:
    def make(self, segment: memoryview, device: LazyDevice, **options: Any) -> DeviceCopy:
        return DeviceCopy([segment], CPU, bucket_bytes=4 * KIB, margin_bytes=options.pop("margin", 0), port=device)

    def test_staging_is_allocated_once_for_two_segments(self, segment: memoryview) -> None:
        device = LazyDevice()
        source = torch.arange(10 * KIB, dtype=torch.uint8)
        with DeviceCopy([segment[:100_000], segment[100_000:]], CPU, margin_bytes=0, port=device) as copy:
            for start in (0, 100_000, 0):
                room = segment[start : start + source.nbytes]
                copy.begin([(source, room)])
                copy.release()
                copy.done(0)
                assert bytes(room) == raw(source)
        assert device.buffers == [10 * KIB]

    def test_staging_grows_with_the_state(self, segment: memoryview) -> None:
        device = LazyDevice()
        with self.make(segment, device) as copy:
            for size in (KIB, 20 * KIB, 2 * KIB):
                source = torch.full((size,), size // KIB, dtype=torch.uint8)
                copy.begin([(source, segment[:size])])
                copy.release()
                copy.done(0)
                assert bytes(segment[:size]) == raw(source)
        assert device.buffers == [KIB, 20 * KIB]

    def test_the_margin_stays_free(self, segment: memoryview, caplog: pytest.LogCaptureFixture) -> None:
        device = LazyDevice(free_bytes=30 * KIB)
        with self.make(segment, device, margin=18 * KIB) as copy, caplog.at_level(logging.WARNING):
            for start in (0, 64):
                copy.begin([(torch.zeros(20 * KIB, dtype=torch.uint8), segment[start : start + 20 * KIB])])
                copy.release()
                copy.done(0)
        assert device.buffers == [12 * KIB]
        (record,) = caplog.records
        assert "ring of 3 buckets" in record.message

    def test_memory_that_was_not_there_after_all(self, segment: memoryview) -> None:
        device = LazyDevice()
        device.device_buffer = lambda nbytes: None  # type: ignore[method-assign]
        source = torch.arange(10 * KIB, dtype=torch.uint8)
        with self.make(segment, device) as copy:
            copy.begin([(source, segment[: 10 * KIB])])
            copy.release()
            copy.done(0)
            assert bytes(segment[: 10 * KIB]) == raw(source)

    def test_a_refused_registration_is_told_once(self, segment: memoryview, caplog: pytest.LogCaptureFixture) -> None:
        class Second(LazyDevice):
            def register(self, memory: torch.Tensor) -> str:
                return super().register(memory) if not self.registered else "too much locked"

        device = Second()
        with (
            caplog.at_level(logging.WARNING),
            DeviceCopy([segment[:KIB], segment[KIB:]], CPU, bucket_bytes=KIB, port=device) as copy,
        ):
            assert not copy.direct
            assert not device.registered
        (record,) = caplog.records
        assert "too much locked" in record.message

    def test_what_is_on_the_cpu_is_copied_at_once(self, segment: memoryview) -> None:
        sources = tensors()
        rooms = places_in(segment, sources)
        with DeviceCopy([segment], "meta", port=LazyDevice()) as copy:
            copy.begin(list(zip(sources, rooms, strict=True)))
            assert [bytes(room) for room in rooms] == [raw(tensor) for tensor in sources]
            copy.release()
            assert list(copy.arrived()) == list(range(len(sources)))
            assert copy.timings().nbytes == 0

    def test_one_copy_at_a_time(self, segment: memoryview) -> None:
        item = (torch.zeros(8), segment[:32])
        with self.make(segment, LazyDevice()) as copy:
            assert copy.release() == 0.0
            copy.begin([item])
            with pytest.raises(RuntimeError, match="still under way"):
                copy.begin([item])
            copy.release()
            with pytest.raises(RuntimeError, match="still under way"):
                copy.begin([item])
            with pytest.raises(RuntimeError, match="arrived"):
                copy.timings()
            copy.done(0)
            copy.begin([item])

    @pytest.mark.parametrize(
        ("tensor", "start", "stop", "message"),
        [
            (torch.zeros(8), 0, 28, "32 bytes, contiguous, for 28 bytes"),
            (torch.zeros(8, 2)[:, 0], 0, 32, "not contiguous"),
            (torch.zeros(8, device="meta"), 0, 32, "is on meta"),
            (torch.zeros(8), 1024 - 16, 1024 + 16, "none of the 1 targets"),
        ],
    )
    def test_bad_items(self, segment: memoryview, tensor: torch.Tensor, start: int, stop: int, message: str) -> None:
        with (
            DeviceCopy([segment[:1024]], CPU, port=LazyDevice()) as copy,
            pytest.raises(ValueError, match=rf"item 1.*{message}"),
        ):
            copy.begin([(torch.zeros(1), segment[:4]), (tensor, segment[start:stop])])

    def test_read_only_memory(self, segment: memoryview) -> None:
        with self.make(segment, LazyDevice()) as copy, pytest.raises(ValueError, match="read-only"):
            copy.begin([(torch.zeros(8), segment[:32].toreadonly())])

    @pytest.mark.parametrize("refuse", ["", "refused"])
    def test_errors_reach_who_waits(self, segment: memoryview, refuse: str) -> None:
        class Broken(LazyDevice):
            def one(self) -> None:
                raise RuntimeError("the device is gone")

        device = Broken(refuse=refuse)
        copy = self.make(segment, device)
        copy.begin([(torch.zeros(8), segment[:32])])
        with pytest.raises(RuntimeError, match="gone"):
            copy.done(0)
        with pytest.raises(RuntimeError, match="gone"):
            list(copy.arrived())
        with pytest.raises(RuntimeError, match="gone"):
            copy.close()
        assert not device.registered

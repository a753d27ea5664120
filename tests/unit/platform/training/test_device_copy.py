"""Copies from a real GPU; most of this needs one. Without: `test_device_staging.py`."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from everstep.platform.training.device_copy import DeviceCopy
from everstep.platform.training.device_port import CudaPort

MIB = 1 << 20
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_imports_nothing_but_torch() -> None:
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import everstep.platform.training.device_copy\n"
        "print(*sorted({name for name in set(sys.modules) - before if not name.startswith('everstep')}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('everstep.')))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    ).stdout.splitlines()
    names = ["", ".training", ".training.device_copy", ".training.device_port", ".training.device_staging"]
    assert shown[1].split() == [f"everstep.platform{name}" for name in names]
    assert set(shown[0].split()) <= {"mmap", "ctypes", "_ctypes"}


def places_in(memory: memoryview, sources: list[torch.Tensor], first: int = 4096) -> list[memoryview]:
    """Memory for each, at 64-byte boundaries as in a segment."""
    rooms = []
    for tensor in sources:
        rooms.append(memory[first : first + tensor.nbytes])
        first = -(-(first + tensor.nbytes) // 64) * 64
    return rooms


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def state() -> list[torch.Tensor]:
    """200 MiB in three large tensors and a hundred small ones of every width, and one on the CPU."""
    torch.manual_seed(0)
    large = [(120 * MIB, torch.float32), (60 * MIB + 4, torch.float32), (8 * MIB, torch.complex128)]
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn]
    small = [(1024 * n + 8, kinds[n % len(kinds)]) for n in range(100)]
    shapes = [*large, *small]
    return [
        *(torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda").view(kind) for n, kind in shapes),
        torch.ones(1),
    ]


class LimitedPort(CudaPort):
    """The GPU, with as much free memory as a test says, and as much patience with host memory."""

    def __init__(self, free: int, refuse: bool) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device()))
        self.free, self.refuse = free, refuse

    def register(self, memory: torch.Tensor) -> str:
        return "refused by the test" if self.refuse else super().register(memory)

    def free_bytes(self) -> int:
        return self.free


@pytest.fixture
def segment() -> Iterator[memoryview]:
    with mmap.mmap(-1, 300 * MIB) as mapped:
        memory = memoryview(mapped)
        yield memory
        memory.release()


@needs_gpu
@pytest.mark.parametrize("refuse", [False, True], ids=["registered", "bounced"])
@pytest.mark.parametrize("free", [1 << 30, 40 * MIB, 0], ids=["whole", "ring", "none"])
def test_training_goes_on(segment: memoryview, free: int, refuse: bool) -> None:
    sources = state()
    rooms = places_in(segment, sources)
    busy = torch.randn(4096, 4096, device="cuda")
    port = LimitedPort(free, refuse)
    with DeviceCopy([segment], "cuda", bucket_bytes=8 * MIB, margin_bytes=0, port=port) as copy:
        assert copy.direct is not refuse
        for _ in range(4):
            for tensor in sources:  # the optimizer step, still running when the copy begins
                tensor.view(torch.uint8).add_(1)
            expected = [tensor.clone() for tensor in sources]
            copy.begin(list(zip(sources, rooms, strict=True)))
            for _ in range(5):  # forward and backward
                busy = busy @ busy
                busy /= busy.norm()
            waited_s = copy.release()
            assert (waited_s > 0) == (refuse and free < 1 << 30)
            for tensor in sources:  # the next optimizer step
                tensor.view(torch.uint8).fill_(0xEE)
            for i in copy.arrived():
                assert bytes(rooms[i]) == raw(expected[i]), i
            for tensor, value in zip(sources, expected, strict=True):
                tensor.copy_(value)
            timings = copy.timings()
            assert timings.nbytes == sum(tensor.nbytes for tensor in sources if tensor.is_cuda)
            assert timings.staged_ms > 0
            assert (timings.staged_ms < timings.arrived_ms) == (free > 0)


@needs_gpu
def test_registration_is_undone(segment: memoryview) -> None:
    for _ in range(2):
        with DeviceCopy([segment], "cuda") as copy:
            assert copy.direct


@needs_gpu
def test_memory_registered_twice_is_refused_and_training_does_not_notice(segment: memoryview) -> None:
    source = torch.randn(5 * MIB, device="cuda")
    room = segment[: source.nbytes]
    with DeviceCopy([segment], "cuda"), DeviceCopy([segment], "cuda", bucket_bytes=8 * MIB) as second:
        assert not second.direct
        assert float(torch.ones(3, device="cuda").sum()) == 3  # no error of ours is left for the next launch
        second.begin([(source, room)])
        second.release()
        second.done(0)
        assert bytes(room) == raw(source)

"""What a copy of device memory into host memory needs of a device, and that of CUDA. See `device_copy.py`.

Owns the side stream of one device; `Port` is the seam where tests put a device without a GPU. Threads: everything
may be called in any thread, `hold` and `run(behind_current=True)` in that whose current stream is meant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in a stream; `torch.cuda.Event` is one."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Port(Protocol):
    """What `DeviceCopy` needs of a device: its memory, a side stream, and the current stream."""

    def register(self, memory: torch.Tensor) -> str:
        """Lets the device write into host memory; returns why it cannot, else ""."""

    def unregister(self, memory: torch.Tensor) -> None: ...

    def free_bytes(self) -> int: ...

    def device_buffer(self, nbytes: int) -> torch.Tensor | None:
        """Zeroed uint8 memory on the device; None when there is not so much."""

    def pinned_buffer(self, nbytes: int) -> torch.Tensor: ...

    def mark(self) -> Mark: ...

    def run(self, operations: Iterable[Callable[[], None]], behind_current: bool) -> None:
        """Queues operations on the side stream, at first behind all that the current stream has now."""

    def hold(self, mark: Mark) -> tuple[Mark, Mark]:
        """The current stream waits for `mark`; the points on it before and after the wait."""


class CudaPort:
    """One CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def register(self, memory: torch.Tensor) -> str:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            error = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            if int(error) == 0:
                return ""
            # CUDA would report the refusal again at the next launch, which is not to blame: it is ours.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device).add_(1)
            return str(runtime.cudaGetErrorString(error))

    def unregister(self, memory: torch.Tensor) -> None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = runtime.cudaHostUnregister(memory.data_ptr())
        if int(error):
            raise RuntimeError(f"cudaHostUnregister: {runtime.cudaGetErrorString(error)}")

    def free_bytes(self) -> int:
        # What torch's allocator keeps for reuse does not count: the next forward wants it back.
        return int(torch.cuda.mem_get_info(self._device)[0])

    def device_buffer(self, nbytes: int) -> torch.Tensor | None:
        try:
            return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None

    def pinned_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        # Blocking: who waits for it shall not spin.
        return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def run(self, operations: Iterable[Callable[[], None]], behind_current: bool) -> None:
        if behind_current:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            for operation in operations:
                operation()

    def hold(self, mark: Mark) -> tuple[Mark, Mark]:
        before, after = self.mark(), self.mark()
        with torch.cuda.device(self._device):
            before.record()
            torch.cuda.current_stream(self._device).wait_event(mark)  # type: ignore[arg-type]
            after.record()
        return before, after

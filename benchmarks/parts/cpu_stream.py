"""A side stream without a GPU: what is queued is done in order by one thread. For dry runs of snapshot_gpu.py."""

import queue
import threading
import time
from collections.abc import Callable, Iterable

import torch


class Mark:
    """A point in the stream, and when it was reached."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._at_s = 0.0

    def record(self) -> None:
        self._at_s = time.perf_counter()
        self._reached.set()

    def forget(self) -> None:
        self._reached.clear()

    def query(self) -> bool:
        return self._reached.is_set()

    def synchronize(self) -> None:
        self._reached.wait()

    def elapsed_time(self, end_event: "Mark") -> float:
        return (end_event._at_s - self._at_s) * 1000


class CpuStream:
    """The `Port` of `everstep.platform.training.device_port` for tensors in host memory. `close` ends its thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="cpu-stream", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (operation := self._queue.get()) is not None:
            operation()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def register(self, memory: torch.Tensor) -> str:
        return ""

    def unregister(self, memory: torch.Tensor) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40

    def device_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pinned_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return Mark()

    def run(self, operations: Iterable[Callable[[], None]], behind_current: bool) -> None:
        for operation in operations:
            if isinstance(mark := getattr(operation, "__self__", None), Mark):
                mark.forget()
            self._queue.put(operation)

    def hold(self, mark: Mark) -> tuple[Mark, Mark]:
        mark.synchronize()
        now = Mark()  # it is the thread that stood still, and no stream
        now.record()
        return now, now

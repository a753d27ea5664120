"""What a rank waits for its copy when the next `apply` begins at once: a capture at its worst, without processes.

One thread copies, as in a rank; beside it the same copier is asked for one plain copy of the same bytes.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from everstep.platform.training.capture import Capture
from everstep.platform.training.layout import Run
from everstep.platform.training.shard import Place, RankState
from everstep.storage.index import TensorMeta
from everstep.storage.segment import SegmentMap, create_segment, required_bytes

_TENSORS = 24  # as many as eight layers' parameters and their two optimizer tensors


class _State:
    """As much of a `RankState` as a capture asks for."""

    def __init__(self, nbytes: int) -> None:
        numel = nbytes // 4 // _TENSORS
        kinds = ("param", "exp_avg", "exp_avg_sq")
        self._places = [
            Place(TensorMeta(f"layers.{i // 3}", kinds[i % 3], "float32", (numel,)), 0, numel, torch.rand(numel))
            for i in range(_TENSORS)
        ]
        self.stamp = 1

    def metas(self) -> tuple[TensorMeta, ...]:
        return tuple(place.meta for place in self._places)

    def places(self, runs: Sequence[Run] | None = None) -> Iterator[Place]:
        yield from self._places

    def footprint(self) -> list[tuple[TensorMeta, int, int]]:
        return [(place.meta, place.start, place.stop) for place in self._places]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [place.tensor for place in self._places]


@dataclass(frozen=True)
class CaptureWait:
    """Medians, in seconds. `copy_s`: a plain copy of all tensors (torch, one thread) into warm ordinary memory;
    `segment_copy_s`: the same into the warm segment; `wait_s`: Capture made, started and released at once;
    `sealed_s`: until its checksums are made, too."""

    nbytes: int
    repetitions: int
    copy_s: float
    segment_copy_s: float
    wait_s: float
    sealed_s: float
    ratios: tuple[float, ...]  # of each round

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def measure_capture(nbytes: int, repetitions: int) -> CaptureWait:
    """Takes turns, so that a noisy moment of the machine falls on all alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = _State(nbytes)
    tensors = state.tensors
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    times: dict[str, list[float]] = {"copy": [], "segment": [], "wait": [], "sealed": []}
    with (
        tempfile.TemporaryDirectory(prefix="everstep-bench-", dir="/dev/shm") as folder,
        ThreadPoolExecutor(1) as copier,
    ):
        path = Path(folder) / "segment"
        create_segment(path, required_bytes(state.footprint()))
        with SegmentMap(path, writable=True) as segment:
            rooms = _rooms(segment, tensors)
            for _ in range(repetitions + 1):  # the first is the warm-up
                times["copy"].append(_timed(lambda: _copy(tensors, copies)))
                times["segment"].append(_timed(lambda: _copy(tensors, rooms)))
                wait_s, sealed_s = _capture(segment, state, copier)
                times["wait"].append(wait_s)
                times["sealed"].append(sealed_s)
            rooms.clear()
    torch.set_num_threads(threads)
    kept = {name: values[1:] for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in kept.items()}
    ratios = tuple(wait / copy for wait, copy in zip(kept["wait"], kept["copy"], strict=True))
    return CaptureWait(
        nbytes, repetitions, median["copy"], median["segment"], median["wait"], median["sealed"], ratios
    )


def _rooms(segment: SegmentMap, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    rooms, at = [], 4096
    for tensor in tensors:
        room = segment.memory[at : at + tensor.nbytes]
        rooms.append(torch.frombuffer(room, dtype=torch.float32))
        at += tensor.nbytes
    return rooms


def _capture(segment: SegmentMap, state: _State, copier: ThreadPoolExecutor) -> tuple[float, float]:
    began = time.perf_counter()
    capture = Capture(segment, cast("RankState", state), (1, 1))
    copier.submit(capture.run)
    capture.release()
    released = time.perf_counter()
    capture.wait()
    return released - began, time.perf_counter() - began


def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

"""Ways to take snapshots in a training loop, for snapshot_gpu.py: none, ours, and torch.distributed.checkpoint.

Every one is called by the training thread: `before_update` just before the optimizer changes the state, `snapshot`
right after it has. Both return for how long they held the thread up, in seconds.
"""

import itertools
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from parts.cpu_stream import CpuStream
from parts.gpt_half import HalfRank
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from everstep.platform.training.device_copy import DeviceCopy, Timings
from everstep.storage.index import Source
from everstep.storage.segment import (
    SegmentMap,
    Writer,
    create_segment,
    payload,
    read_index,
    read_seal,
    required_bytes,
    verify,
)


@dataclass
class Cost:
    """Of one snapshot, in seconds. `waited_s`: for the snapshot before; `sealed_s`: from its start to its end."""

    waited_s: float = 0.0
    call_s: float = 0.0
    before_update_s: float = 0.0
    sealed_s: float = 0.0
    timings: Timings | None = None

    @property
    def stall_s(self) -> float:
        """For how long thread or GPU stood still."""
        held_s = 0.0 if self.timings is None else self.timings.held_ms / 1000
        return self.waited_s + self.call_s + self.before_update_s + held_s


class Mode(Protocol):
    name: str
    costs: list[Cost]

    def snapshot(self, step: int) -> None: ...
    def before_update(self) -> None: ...
    def finish(self) -> None: ...


@dataclass
class Nothing:
    name: str = "none"
    costs: list[Cost] = field(default_factory=list)

    def snapshot(self, step: int) -> None:
        pass

    def before_update(self) -> None:
        pass

    def finish(self) -> None:
        pass


class Everstep:
    """Two segments in turns. Background threads hash what has arrived; the last of them seals."""

    name = "everstep"

    def __init__(self, rank: HalfRank, device: torch.device, folder: Path, threads: int, margin_bytes: int) -> None:
        self._rank = rank
        state = rank.state()
        size = required_bytes((meta, start, stop) for meta, start, stop, _ in state)
        self.paths = [folder / f"slot-{i}" for i in range(2)]
        self._segments: list[SegmentMap] = []
        for path in self.paths:
            create_segment(path, size)
            self._segments.append(SegmentMap(path, writable=True))
        self._stream = CpuStream() if device.type == "cpu" else None
        memory = [segment.memory for segment in self._segments]
        self._copy = DeviceCopy(memory, device, margin_bytes=margin_bytes, port=self._stream)
        self.direct = self._copy.direct
        self._hashers = ThreadPoolExecutor(threads, "hasher")
        self._threads = threads
        self._ends: list[Future[None]] = []
        self._turn = 0
        self.costs: list[Cost] = []

    def snapshot(self, step: int) -> None:
        began = time.perf_counter()
        self.finish()
        cost = Cost(waited_s=time.perf_counter() - began)
        began = time.perf_counter()
        writer = Writer(self._segments[self._turn])
        self._turn = 1 - self._turn
        writer.begin()
        # What is in host memory already comes last: between others it would cut their buckets into hundreds.
        state = sorted(self._rank.state(), key=lambda item: item[3].device.type == "cpu")
        items = [(tensor, writer.place(meta, start, stop)) for meta, start, stop, tensor in state]
        self._copy.begin(items)
        numbers, left = itertools.count(), itertools.count(1)
        memory = [room for _, room in items]

        def hash_all() -> None:
            while (i := next(numbers)) < len(memory):
                self._copy.done(i)
                writer.checked(i, xxhash.xxh3_64_intdigest(memory[i]))
            if next(left) == self._threads:
                writer.seal(1, 0, step)
                cost.sealed_s = time.perf_counter() - began

        self._ends = [self._hashers.submit(hash_all) for _ in range(self._threads)]
        self.costs.append(cost)
        cost.call_s = time.perf_counter() - began

    def before_update(self) -> None:
        began = time.perf_counter()
        self._copy.release()
        if self._ends:
            self.costs[-1].before_update_s += time.perf_counter() - began

    def finish(self) -> None:
        """Waits until the newest snapshot is sealed."""
        for end in self._ends:
            end.result()
        if self._ends:
            self._copy.release()
            self.costs[-1].timings = self._copy.timings()
        self._ends = []

    def newest(self) -> Path:
        return self.paths[1 - self._turn]

    def close(self) -> None:
        self._hashers.shutdown()
        self._copy.close()
        if self._stream is not None:
            self._stream.close()
        for segment, path in zip(self._segments, self.paths, strict=True):
            segment.close()
            path.unlink()


def differences(path: Path, step: int, state: list[tuple[Any, int, int, torch.Tensor]]) -> list[str]:
    """What a sealed segment holds, compared bit by bit with `state`; empty if it is the same."""
    with SegmentMap(path, writable=False) as segment:
        verify(segment)
        seal = read_seal(segment)
        if seal is None or seal.step != step:
            return [f"sealed is step {None if seal is None else seal.step}, not {step}"]
        index = read_index(segment, seal, Source("segment", "", str(path)))
        found = {(f.name, f.kind, f.start, f.stop): f.offset for f in index.fragments}
        wanted = {(meta.name, meta.kind, start, stop): tensor for meta, start, stop, tensor in state}
        wrong = [f"{key} is in one of them only" for key in found.keys() ^ wanted.keys()]
        for key in found.keys() & wanted.keys():
            expected = wanted[key].cpu().view(-1).view(torch.uint8).numpy()
            room = payload(segment, found[key], expected.nbytes)
            if not np.array_equal(np.frombuffer(room, np.uint8), expected):
                wrong.append(f"{key} differs")
            del room
    return wrong


class Dcp:
    """`async_save` as its documentation says, with the default stager or with pinned memory and staging in the
    background. Keeps the newest checkpoint.
    """

    def __init__(self, rank: HalfRank, folder: Path, pinned: bool) -> None:
        self.name = "DCP, pinned" if pinned else "DCP"
        self._folder = folder / ("pinned" if pinned else "default")
        self._rank = rank
        self._stager = DefaultStager(StagingOptions(use_shared_memory=False)) if pinned else None
        self._path: Path | None = None
        self._saved: Future[Any] | None = None
        self._staged: Future[Any] | None = None
        self.costs: list[Cost] = []

    def snapshot(self, step: int) -> None:
        began = time.perf_counter()
        self.finish()
        cost = Cost(waited_s=time.perf_counter() - began)
        began = time.perf_counter()
        state = {f"{meta.name}.{meta.kind}": tensor for meta, _, _, tensor in self._rank.state()}
        former, self._path = self._path, self._folder / f"step-{step}"
        answer = dcp.async_save(state, checkpoint_id=str(self._path), async_stager=self._stager)
        cost.call_s = time.perf_counter() - began
        if isinstance(answer, Future):
            self._saved, self._staged = answer, None
        else:
            self._saved, self._staged = answer.upload_completion, answer.staging_completion

        def ended(_: Future[Any]) -> None:
            cost.sealed_s = time.perf_counter() - began
            if former is not None:
                shutil.rmtree(former)

        self._saved.add_done_callback(ended)
        self.costs.append(cost)

    def before_update(self) -> None:
        if self._staged is not None:
            began = time.perf_counter()
            self._staged.result()
            self._staged = None
            self.costs[-1].before_update_s = time.perf_counter() - began

    def finish(self) -> None:
        if self._saved is not None:
            self._saved.result()
            self._saved = None

    def close(self) -> None:
        self.finish()
        if self._stager is not None:
            self._stager.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # what is older may be on its way out


def join_alone() -> None:
    """A process group of one: `async_save` asks for a CPU backend."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

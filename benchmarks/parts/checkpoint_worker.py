"""One of the processes of benchmarks/checkpoint.py: its part of the state, saved and loaded in every way.

Reads a line of JSON a task on standard input ({"do": NAME, "folder": FOLDER}), answers with one ({"seconds": …}), so
that all processes start each task at the same moment. The state lies in a segment in shared memory, as a snapshot
does, and the peers get views of the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.index import TensorMeta
from everstep.storage.planner import Want
from everstep.storage.rank_file import write_rank_file
from everstep.storage.segment import (
    SegmentMap,
    Writer,
    create_segment,
    payload,
    read_index,
    read_seal,
    required_bytes,
)
from everstep.storage.stores.opening import folder_at

_PIECE_BYTES = 4 << 20
_TENSORS = 24


class Worker:
    def __init__(self, rank: int, ranks: int, nbytes: int, shm: Path, threads: int) -> None:
        self.rank, self.ranks, self.threads = rank, ranks, threads
        rows = max(nbytes // _TENSORS // 4 // 1024, 1)
        metas = [TensorMeta(f"layers.{rank}.{i}.weight", "param", "float32", (rows, 1024)) for i in range(_TENSORS)]
        self.path = shm / f"segment-{rank}"
        create_segment(self.path, required_bytes([(m, 0, m.numel) for m in metas]))
        self.segment = SegmentMap(self.path, writable=True)
        writer = Writer(self.segment)
        writer.begin()
        generator = torch.Generator().manual_seed(rank)
        for meta in metas:
            values = torch.randn(meta.shape, generator=generator)
            writer.put(meta, 0, meta.numel, memoryview(values.numpy()).cast("B"))
        writer.seal(1, 1, 1)
        seal = read_seal(self.segment)
        assert seal is not None
        self.seal, self.metas = seal, metas
        index = read_index(self.segment, seal, None)  # type: ignore[arg-type]
        self.views = {f.name: payload(self.segment, f.offset, (f.stop - f.start) * 4) for f in index.fragments}
        self.nbytes = sum(m.nbytes for m in metas)
        self.state = {m.name: torch.frombuffer(self.views[m.name], dtype=torch.float32).view(m.shape) for m in metas}
        self.loaded: dict[str, torch.Tensor] = {}

    # ---- the floor --------------------------------------------------------------------------------------

    def plain_write(self, folder: str) -> None:
        """The same bytes by pwrite from `threads` threads into a preallocated file, and fsync."""
        fd = os.open(f"{folder}/plain-{self.rank}", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        os.posix_fallocate(fd, 0, self.nbytes)
        jobs, at = [], 0
        for view in self.views.values():
            for first in range(0, len(view), _PIECE_BYTES):
                jobs.append((view[first : first + _PIECE_BYTES], at + first))
            at += len(view)
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda job: os.pwrite(fd, *job), jobs))
        os.fsync(fd)
        os.close(fd)

    def plain_read(self, folder: str) -> None:
        """The same bytes by preadv into fresh memory of each tensor, `threads` threads."""
        fd = os.open(f"{folder}/plain-{self.rank}", os.O_RDONLY)
        jobs, at, kept = [], 0, []
        for view in self.views.values():
            data = memoryview(
                torch.empty(len(view), dtype=torch.uint8).numpy()
            )  # not written to before, as zeros are
            kept.append(data)
            for first in range(0, len(view), _PIECE_BYTES):
                jobs.append(([data[first : first + _PIECE_BYTES]], at + first))
            at += len(view)
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda job: os.preadv(fd, *job), jobs))
        os.close(fd)

    # ---- everstep ---------------------------------------------------------------------------------------

    def everstep_save(self, folder: str) -> None:
        record = write_rank_file(self.segment, self.seal, folder_at(folder), f"rank-{self.rank}.safetensors")
        Path(folder, f"record-{self.rank}").write_bytes(msgspec.msgpack.encode(record))

    def everstep_load(self, folder: str) -> None:
        checkpoint = Checkpoint.open(folder)
        wants = [Want(m.name, m.kind, 0, m.numel, "me") for m in self.metas]
        self.loaded = {m.name: torch.empty(m.shape) for m in self.metas}
        buffers = [memoryview(value.view(-1).view(torch.uint8).numpy()) for value in self.loaded.values()]
        checkpoint.load(list(zip(wants, buffers, strict=True)), threads=self.threads)

    # ---- peers ------------------------------------------------------------------------------------------

    def dcp_save(self, folder: str) -> None:
        writer = dcp.FileSystemWriter(folder, thread_count=self.threads)
        dcp.save(self.state, storage_writer=writer)

    def dcp_load(self, folder: str) -> None:
        self.loaded = {name: torch.empty_like(value) for name, value in self.state.items()}
        dcp.load(self.loaded, storage_reader=dcp.FileSystemReader(folder))

    def torch_save(self, folder: str) -> None:
        with open(f"{folder}/state-{self.rank}.pt", "xb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())

    def torch_load(self, folder: str) -> None:
        self.loaded = torch.load(f"{folder}/state-{self.rank}.pt", weights_only=True)

    def check(self, _folder: str) -> None:
        """What was loaded last is what was saved."""
        assert set(self.loaded) == set(self.state)
        for name, value in self.loaded.items():
            assert torch.equal(value, self.state[name]), name
        self.loaded = {}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("rank", "ranks", "bytes", "port", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--shm", type=Path, required=True)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{given.port}"
    dist.init_process_group("gloo", init_method=store, rank=given.rank, world_size=given.ranks)
    worker = Worker(given.rank, given.ranks, given.bytes, given.shm, given.threads)
    print(json.dumps({"ready": worker.nbytes}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        method: Callable[[str], None] = getattr(worker, task["do"])
        began = time.perf_counter()
        method(task["folder"])
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

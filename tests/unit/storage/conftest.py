"""A small state, cut over ranks, as segments and as checkpoints."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.storage.index import TensorMeta
from everstep.storage.manifest import CheckpointName, commit, new_folder
from everstep.storage.rank_file import FileRecord, write_rank_file
from everstep.storage.segment import SegmentMap, Writer, create_segment, read_seal, required_bytes
from everstep.storage.stores.opening import folder_at

METAS = (
    TensorMeta("embed.weight", "param", "float32", (50, 7)),
    TensorMeta("embed.weight", "exp_avg", "float32", (50, 7)),
    TensorMeta("embed.weight", "step", "float32", (), python=True),
    TensorMeta("a|odd name", "param", "float32", (33,)),
    TensorMeta("norm.count", "buffer", "int64", ()),
    TensorMeta("norm.mask", "buffer", "bool", (5,)),
    TensorMeta("nothing", "buffer", "float32", (0, 3)),
)


def content(meta: TensorMeta, step: int) -> bytes:
    """Any bytes, the same for the same tensor and step."""
    bytes_ = random.Random(f"{meta.key} {step}").randbytes(meta.nbytes)
    return bytes(byte & 1 for byte in bytes_) if meta.dtype == "bool" else bytes_


class State:
    """Writes states of `METAS` cut over ranks into segments and checkpoints below one folder."""

    metas = METAS
    content = staticmethod(content)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "checkpoints" / "job" / "run"
        self.run = folder_at(self.root)
        self._segments = 0

    def pieces(self, rank: int, ranks: int) -> list[tuple[TensorMeta, int, int]]:
        """Buffers on every rank, what cannot be cut on rank 0, the rest in equal parts."""
        cut = []
        for meta in self.metas:
            if meta.kind == "buffer" or (meta.numel < ranks and rank == 0):
                cut.append((meta, 0, meta.numel))
            elif meta.numel >= ranks:
                cut.append((meta, meta.numel * rank // ranks, meta.numel * (rank + 1) // ranks))
        return cut

    def segment(self, step: int, rank: int, ranks: int) -> Path:
        path = self.folder / f"segment-{os.getpid()}-{self._segments}"
        self._segments += 1
        pieces = self.pieces(rank, ranks)
        create_segment(path, required_bytes(pieces))
        with SegmentMap(path, writable=True) as mapped:
            writer = Writer(mapped)
            writer.begin()
            for meta, start, stop in pieces:
                data = self.content(meta, step)[start * meta.itemsize : stop * meta.itemsize]
                writer.put(meta, start, stop, data)
            writer.seal(epoch=1, number=2, step=step)
        return path

    def write(self, folder: Path, step: int, ranks: int) -> list[FileRecord]:
        records = []
        for rank in range(ranks):
            path = self.segment(step, rank, ranks)
            with SegmentMap(path, writable=False) as mapped:
                seal = read_seal(mapped)
                assert seal is not None
                records.append(write_rank_file(mapped, seal, folder_at(folder), f"rank-{rank}.safetensors"))
            path.unlink()
        return records

    def half_written(
        self, step: int, epoch: int = 1, ranks: int = 3
    ) -> tuple[Path, CheckpointName, list[FileRecord]]:
        folder, name = new_folder(self.run, step, epoch)
        return Path(folder.url), name, self.write(Path(folder.url), step, ranks)

    def checkpoint(self, step: int, epoch: int = 1, ranks: int = 3) -> Path:
        folder, name, records = self.half_written(step, epoch, ranks)
        commit(
            folder_at(folder), records, job="job", run="run", name=name,
            spec={"name": "job", "steps": 9}, progress={"losses": [1.5]},
            versions={"everstep": "0"}, created=1.0,
        )  # fmt: skip
        return folder


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path)


@pytest.fixture
def damage() -> Callable[[Path, int], None]:
    def flip(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    return flip

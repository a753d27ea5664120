"""SIGKILLs of a process that saves checkpoints, and what must hold after each. Not a test module.

The writer is a real process: segments in memory, two rank files, manifest, collection, again and again, each life
with the next epoch and as actors/checkpoints.py does it (a folder is there when its first file is). What is left
behind is looked for from outside, with nothing of ours.

    the newest visible checkpoint verifies, holds what its step says, and is no older than the last one acknowledged
    what is newer than it has no manifest
    after the next complete save there is nothing but the checkpoints that are kept
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from everstep.storage.checkpoint import Checkpoint, find_newest
from everstep.storage.index import TensorMeta
from everstep.storage.manifest import CheckpointName, commit
from everstep.storage.rank_file import FileRecord, write_rank_file
from everstep.storage.retention import collect
from everstep.storage.segment import SegmentMap, Writer, create_segment, read_seal, required_bytes
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Folder

KEEP = 2
RANKS = 2
FILES = tuple(f"rank-{rank}.safetensors" for rank in range(RANKS))
PATIENCE_S = 60.0


def metas(numel: int) -> tuple[TensorMeta, ...]:
    return (TensorMeta("w", "param", "int64", (numel,)), TensorMeta("w", "step", "int64", ()))


def content(meta: TensorMeta, step: int) -> np.ndarray:
    """The whole tensor after `step`."""
    return np.arange(meta.numel, dtype=np.int64) * 0x1E3779B9 + step


class SaveKills:
    """`strike` kills once and checks; `close` saves once more and checks that nothing is left. One thread.

    `files()` lists every file below `url`, and what is not to be seen there, by its path. `numel`: elements of the
    state, 8 bytes each.
    """

    def __init__(
        self, url: str, folder: Path, seed: int, numel: int, files: Callable[[], list[str]], env: Mapping[str, str]
    ) -> None:
        self._url = url
        self._folder = folder
        self._random = random.Random(seed)
        self._numel = numel
        self._files = files
        self._env = dict(os.environ, **env, PYTHONPATH=os.pathsep.join(sys.path))
        self._epoch = 0
        self._acknowledged = 0
        self._step = 0  # of the newest, seen from here
        self._root = folder_at(url)
        self.kills = 0
        self.torn = 0  # kills that left something behind
        self.unheard = 0  # kills between the commit and its acknowledgement

    def strike(self) -> None:
        with self._writer() as writer:
            took_s = self._one_save(writer)
            self._say(writer, "go")
            time.sleep(self._random.uniform(0.0, 1.5 * took_s))
            writer.kill()
            assert writer.stdout is not None
            # The pipe's last line may be torn, like everything that a killed process writes.
            lines = writer.stdout.read().split("\n")[:-1]
        assert writer.returncode == -signal.SIGKILL, "the writer ended by itself"
        self._acknowledged = max([self._acknowledged, *map(int, lines)])
        self.kills += 1
        self.torn += self._unexpected() != []
        self._check_newest()

    def close(self) -> None:
        with self._writer() as writer:
            self._one_save(writer)
            self._say(writer, "end")
        assert writer.returncode == 0
        self._check_newest()

    def told(self) -> str:
        """What was done, for who reads the test's output."""
        return (
            f"{self.kills} kills, {self.torn} of which left something to clear away, {self.unheard} of which hit a "
            f"commit before it was acknowledged; {self._acknowledged} saves"
        )

    def _writer(self) -> subprocess.Popen[str]:
        self._epoch += 1
        command = [sys.executable, "-m", "integration.save_kills", self._url, str(self._folder), str(self._epoch)]
        command += [str(self._step), str(self._numel)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._env)

    def _one_save(self, writer: subprocess.Popen[str]) -> float:
        """The next complete save; then nothing is left of what was killed. How long it took, in seconds."""
        assert writer.stdout is not None
        line = writer.stdout.readline().split()
        assert line, "the writer ended"
        self._acknowledged = int(line[0])
        assert self._unexpected() == []
        assert f"step-{self._acknowledged}.epoch-{self._epoch}.attempt-0/manifest.json" in self._files()
        return float(line[1])

    @staticmethod
    def _say(writer: subprocess.Popen[str], word: str) -> None:
        assert writer.stdin is not None
        writer.stdin.write(f"{word}\n")
        writer.stdin.flush()

    def _unexpected(self) -> list[str]:
        """Files that belong to no checkpoint that is kept."""
        there = self._files()
        whole = [path.rpartition("/")[0] for path in there if path.endswith("/manifest.json") and path[0] != "."]
        kept = sorted(whole, key=lambda name: int(name.split(".")[0].removeprefix("step-")))[-KEEP:]
        wanted = {f"{name}/{file}" for name in kept for file in (*FILES, "manifest.json")}
        assert wanted <= set(there), f"of a checkpoint only {sorted(wanted & set(there))} is there"
        return sorted(set(there) - wanted)

    def _check_newest(self) -> None:
        newest = find_newest(self._root)
        assert newest.manifest is not None
        assert newest.folder is not None
        assert newest.manifest.step >= self._acknowledged
        self._step = newest.manifest.step
        self.unheard += newest.manifest.step > self._acknowledged
        assert all("no manifest.json" in reason for _, reason in newest.rejected), newest.rejected
        checkpoint = Checkpoint(newest.folder, newest.manifest)
        for meta in metas(self._numel):
            data = checkpoint.read_bytes(meta.name, meta.kind)[1]
            assert data == content(meta, newest.manifest.step).tobytes()


def main() -> None:
    """The writer: URL, a folder for segments, its epoch, the step to go on from, elements of the state."""
    url, folder, epoch, step, numel = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    root = folder_at(url)
    trusted: set[str] = set()
    began = time.monotonic()
    _save(root, folder, epoch, step := step + 1, numel, trusted)
    print(step, time.monotonic() - began, flush=True)
    if sys.stdin.readline() != "go\n":
        return
    while True:
        _save(root, folder, epoch, step := step + 1, numel, trusted)
        print(step, flush=True)


def _save(root: Folder, folder: Path, epoch: int, step: int, numel: int, trusted: set[str]) -> None:
    name = CheckpointName(step, epoch, 0)
    place = root.child(str(name))
    records = [_rank_file(place, folder, rank, step, numel) for rank in range(RANKS)]
    commit(place, records, job="job", run="run", name=name, spec={})
    trusted.add(str(name))
    done = collect(root, KEEP, epoch, trusted=trusted)
    trusted.update(done.verified)
    assert not done.left, done.left


def _rank_file(place: Folder, folder: Path, rank: int, step: int, numel: int) -> FileRecord:
    wide, count = metas(numel)
    cut = numel - 1000  # one file of several parts, and one of a single part
    pieces = [[(wide, 0, cut), (count, 0, 1)], [(wide, cut, numel)]][rank]
    path = folder / f"segment-{rank}"
    path.unlink(missing_ok=True)
    create_segment(path, required_bytes(pieces))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        for meta, start, stop in pieces:
            writer.put(meta, start, stop, content(meta, step)[start:stop].tobytes())
        seal = writer.seal(epoch=1, number=1, step=step)
        assert read_seal(segment) == seal
        return write_rank_file(segment, seal, place, FILES[rank])


if __name__ == "__main__":
    main()

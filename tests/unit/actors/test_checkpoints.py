"""The desk that makes checkpoints of rank files: complete, failed, abandoned, and the old ones collected."""

from __future__ import annotations

import queue
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from everstep.actors import checkpoints as module
from everstep.actors.checkpoints import CheckpointDesk
from everstep.actors.claims import FolderClaims
from everstep.actors.config import Saved
from everstep.actors.journal import Journal
from everstep.platform.job.spec import JobSpec
from everstep.storage.checkpoint import Checkpoint, find_newest
from everstep.storage.errors import StorageError
from everstep.storage.index import TensorMeta
from everstep.storage.manifest import CheckpointName, names
from everstep.storage.rank_file import write_rank_file
from everstep.storage.segment import SegmentMap, Writer, create_segment, read_seal, required_bytes
from everstep.storage.stores.opening import folder_at

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
W = TensorMeta("w", "param", "float32", (100,))
RANKS = 2
VIEW = (1, 1)
WAIT_S = 10.0
PROGRESS = {"nonfinite_in_a_row": 1}


class Office:
    """A desk, the news it gave, and managers that write files for it."""

    def __init__(self, folder: Path, epoch: int = 1, keep: int = 2, eval_every: int = 0, **rules: Any) -> None:
        self.folder = folder
        plain = {"name": "job", "task": "t.py:T", "steps": 100, "checkpoint": {"to": "runs", "keep": keep} | rules}
        spec = JobSpec.parse(plain | {"eval": {"every": eval_every}})
        self.done: queue.Queue[tuple[str, int, str]] = queue.Queue()
        self.desk = CheckpointDesk(spec, str(folder / "runs"), epoch, lambda *news: self.done.put(news), "1a2b-dirty")

    def begin(self, step: int, **metrics: float) -> str:
        return self.desk.begin(VIEW, step, RANKS, {**PROGRESS, "metrics": metrics})

    def saved(self, saved: Saved) -> None:
        self.desk.saved(saved, f"slot-{saved.file}")

    def write(self, folder: str, step: int, rank: int) -> Saved:
        """What a manager says after it has written a rank's file."""
        start, stop = 100 * rank // RANKS, 100 * (rank + 1) // RANKS
        path = self.folder / f"segment-{step}-{rank}-{random.random()}"
        create_segment(path, required_bytes([(W, start, stop)]))
        with SegmentMap(path, writable=True) as segment:
            writer = Writer(segment)
            writer.begin()
            writer.put(W, start, stop, content(step)[4 * start : 4 * stop])
            writer.seal(1, 1, step)
            seal = read_seal(segment)
            assert seal is not None
            file = f"rank-{rank:05d}.safetensors"
            record = write_rank_file(segment, seal, folder_at(folder), file)
        path.unlink()
        return Saved(folder, step, file, msgspec.msgpack.encode(record))

    def checkpoint(self, step: int, **metrics: float) -> str:
        folder = self.begin(step, **metrics)
        for rank in range(RANKS):
            self.saved(self.write(folder, step, rank))
        assert self.news() == (folder, step, "")
        return folder

    def news(self) -> tuple[str, int, str]:
        """Booked, as the supervisor's loop does."""
        folder, step, error = self.done.get(timeout=WAIT_S)
        assert self.desk.busy, "nobody may take the run for finished before its news are booked"
        self.desk.note(Journal(None), folder, step, error, "")
        return folder, step, error

    def steps(self) -> list[int]:
        return [name.step for name in names(self.desk.root)]


def content(step: int) -> bytes:
    return random.Random(step).randbytes(W.nbytes)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    office = Office(tmp_path)
    yield office
    office.desk.close()


def test_a_checkpoint_is_there_when_the_last_rank_has_written_its_file(office: Office) -> None:
    folder = office.begin(5)
    assert Path(folder).is_relative_to(office.folder / "runs" / "job" / "job")
    office.saved(office.write(folder, 5, 1))
    assert office.desk.busy
    assert office.done.empty()
    assert find_newest(office.desk.root).manifest is None
    office.saved(office.write(folder, 5, 0))
    assert office.news() == (folder, 5, "")
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    assert checkpoint.read_bytes("w")[1] == content(5)
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.epoch, manifest.job) == (5, 1, "job")
    assert manifest.progress == {**PROGRESS, "metrics": {}}
    assert manifest.spec["steps"] == 100
    assert {"everstep", "torch", "python"} <= set(manifest.versions)
    assert manifest.versions["commit"] == "1a2b-dirty"
    assert office.desk.newest is not None
    assert (office.desk.newest.folder, office.desk.newest.step) == (folder, 5)
    assert office.desk.newest.nonfinite_in_a_row == 1
    office.desk.close()
    assert not office.desk.busy


def test_the_newest_is_the_last_whichever_was_whole_first(office: Office) -> None:
    early = office.begin(5)
    late = office.checkpoint(7)
    for rank in range(RANKS):
        office.saved(office.write(early, 5, rank))
    office.news()
    assert office.desk.urls == [early, late]
    assert office.desk.newest is not None
    assert office.desk.newest.step == 7


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_could_not_be_written_fails_its_checkpoint_only(office: Office, first: bool) -> None:
    folder = office.begin(5)
    reports = [Saved(folder, 5, "rank-00001.safetensors", error="no space left"), office.write(folder, 5, 0)]
    for report in reports if first else reversed(reports):
        office.saved(report)
    assert office.news() == (folder, 5, "no space left")
    assert find_newest(office.desk.root).manifest is None
    assert not Path(folder, "manifest.json").exists()
    office.checkpoint(6)


def test_a_file_that_is_not_what_was_reported_makes_no_checkpoint(office: Office) -> None:
    folder = office.begin(5)
    reports = [office.write(folder, 5, rank) for rank in range(RANKS)]
    with open(Path(folder, "rank-00001.safetensors"), "ab") as file:
        file.write(b"x")
    for report in reports:
        office.saved(report)
    at, step, error = office.news()
    assert (at, step) == (folder, 5)
    assert "rank-00001.safetensors" in error
    assert find_newest(office.desk.root).manifest is None


def test_an_unexpected_error_is_told_too(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would wait for its last checkpoint, and nobody would know why there is none."""

    def fail(name: str) -> str:
        raise LookupError(f"{name} is not installed")

    monkeypatch.setattr(module, "version", fail)
    folder = office.begin(5)
    for rank in range(RANKS):
        office.saved(office.write(folder, 5, rank))
    assert office.news() == (folder, 5, "everstep is not installed")
    office.desk.close()
    assert not office.desk.busy


def test_what_a_view_that_ended_had_not_sealed_is_abandoned(office: Office) -> None:
    sealed, unsealed = office.begin(5), office.begin(6)
    office.saved(office.write(unsealed, 6, 0))
    slots = {f"slot-rank-{rank:05d}.safetensors" for rank in range(RANKS)}
    assert office.desk.abandon(5, {(VIEW, 5): slots, (VIEW, 6): slots}) == {6}
    office.saved(office.write(unsealed, 6, 1))  # it comes too late
    for rank in range(RANKS):
        office.saved(office.write(sealed, 5, rank))
    assert office.news() == (sealed, 5, ""), "sealed everywhere, so its managers still write it"
    again = office.checkpoint(6)
    assert again != unsealed, "a name is used once"
    office.desk.abandon(0, {})
    assert office.done.empty(), "what is finished is finished"


def test_a_file_that_nobody_will_write_is_not_waited_for(office: Office) -> None:
    """The base step is the checkpoint's, and a rank that is lost had not sealed it: its shadow has what it owned."""
    written, lost = "slot-rank-00000.safetensors", "slot-rank-00001.safetensors"
    folder = office.begin(5)
    office.saved(office.write(folder, 5, 0))
    assert office.desk.abandon(5, {(VIEW, 5): {lost}}) == set(), "one is written, the other will be"
    assert office.desk.abandon(5, {(VIEW, 5): {written}, ((1, 2), 5): {lost}, (VIEW, 4): {lost}}) == {5}
    assert not office.desk.busy


def test_only_the_newest_are_kept_and_half_written_ones_go(office: Office) -> None:
    office.saved(Saved("/somewhere/else", 1, "file"))
    for step in (1, 2):
        office.checkpoint(step)
    in_progress = office.begin(3)
    office.write(in_progress, 3, 0)
    abandoned = CheckpointName(1, 1, 7)  # of a supervisor that was killed
    office.write(office.desk.root.child(str(abandoned)).url, 1, 0)
    office.checkpoint(4)
    office.desk.close()
    assert office.steps() == [2, 3, 4]
    assert Path(in_progress).is_dir()


def test_multiples_and_the_best_are_kept_besides(tmp_path: Path) -> None:
    office = Office(tmp_path, keep=1, keep_every=4, best={"metric": "right", "mode": "max"})
    for step, right in [(1, 0.1), (2, 0.9), (3, 0.5), (4, 0.3), (5, 0.9), (6, 0.2)]:
        office.checkpoint(step, right=right)
    office.desk.close()
    assert office.steps() == [4, 5, 6], "of two that are as good the newer one"
    again = Office(tmp_path, epoch=2, keep=1, best={"metric": "right", "mode": "max"})
    again.checkpoint(7, right=float("nan"))
    again.desk.close()
    assert again.steps() == [5, 7], "what another execution wrote is judged by its manifest"


def test_the_manifest_waits_for_the_evaluation_of_its_step(tmp_path: Path) -> None:
    office = Office(tmp_path, eval_every=2)
    folder = office.begin(4, loss=2.0)
    for rank in range(RANKS):
        office.saved(office.write(folder, 4, rank))
    assert office.desk.busy
    assert office.done.empty()
    office.desk.scored(2, {"eval.loss": 9.0})
    office.desk.scored(4, {"eval.loss": 1.5})
    assert office.news() == (folder, 4, "")
    assert Checkpoint.open(folder).manifest.progress["metrics"] == {"loss": 2.0, "eval.loss": 1.5}
    office.checkpoint(5)
    office.desk.close()


def test_a_folder_that_is_begun_or_being_finished_while_others_are_collected_stays(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collection runs in the worker, and the loop goes on: after its list of folders was read, too."""
    begun: list[str] = []
    first: list[Saved] = []
    collect = module.collect

    def slowly(*args, **kwargs):
        if not begun:
            begun.append(office.begin(2))
            begun.append(office.begin(3))
            first.append(office.write(begun[1], 3, 0))
            for rank in range(RANKS):
                office.saved(office.write(begun[0], 2, rank))
        return collect(*args, **kwargs)

    monkeypatch.setattr(module, "collect", slowly)
    office.checkpoint(1)
    assert office.news() == (begun[0], 2, "")
    assert Path(begun[1]).is_dir()
    office.saved(first[0])
    office.saved(office.write(begun[1], 3, 1))
    assert office.news() == (begun[1], 3, "")


def test_an_abandoned_folder_is_collected_with_the_next_checkpoint(office: Office) -> None:
    office.write(office.begin(7), 7, 0)
    assert office.steps() == [7]
    assert office.desk.abandon(0, {}) == {7}
    office.checkpoint(8)
    office.desk.close()
    assert office.steps() == [8]


def test_checkpoints_of_another_execution_count_and_those_of_a_newer_one_are_left_alone(tmp_path: Path) -> None:
    for epoch, step in [(1, 1), (3, 1)]:
        office = Office(tmp_path, epoch)
        office.checkpoint(step)
        office.desk.close()
    office = Office(tmp_path, epoch=2, keep=1)
    office.checkpoint(5)
    office.desk.close()
    assert [(n.epoch, n.step) for n in names(office.desk.root)] == [(3, 1), (2, 5)]


def test_a_storage_that_refuses_is_told_by_who_writes_and_by_who_commits(office: Office) -> None:
    root = Path(office.desk.root.url)
    root.parent.mkdir(parents=True)
    root.write_text("a file is in the way")
    folder = office.begin(5)
    with pytest.raises(StorageError, match="Not a directory"):
        office.write(folder, 5, 0)
    root.unlink()
    reports = [office.write(folder, 5, rank) for rank in range(RANKS)]
    shutil.rmtree(folder)
    Path(folder).write_text("a file is in the way")
    for report in reports:
        office.saved(report)
    assert office.news()[:2] == (folder, 5)


def test_no_two_executions_have_one_epoch(tmp_path: Path) -> None:
    assert FolderClaims(folder_at(tmp_path / "run")).next() == 1
    office = Office(tmp_path, epoch=6)
    office.checkpoint(1)
    office.desk.close()
    assert FolderClaims(office.desk.root).next() == 7
    assert FolderClaims(office.desk.root).next() == 8
    assert [FolderClaims(folder_at(tmp_path / "run")).next() for _ in range(3)] == [2, 3, 4]

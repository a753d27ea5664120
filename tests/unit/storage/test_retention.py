import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from everstep.storage.checkpoint import find_newest
from everstep.storage.errors import StoreUnavailable
from everstep.storage.manifest import MANIFEST
from everstep.storage.retention import collect
from everstep.storage.stores.port import Folder

Done = namedtuple("Done", "kept removed left verified")


def collected(state, *args, **kwargs):
    """What `collect` did, as paths."""
    done = collect(state.run, *args, **kwargs)
    return Done(
        tuple(Path(folder.url) for folder in done.kept),
        tuple(Path(folder.url) for folder in done.removed),
        tuple((Path(folder.url), reason) for folder, reason in done.left),
        done.verified,
    )


def left(state):
    return sorted(path.name for path in state.root.iterdir())


def test_the_newest_are_kept(state):
    folders = [state.checkpoint(step) for step in (9, 10, 11, 100)]
    done = collected(state, keep=2, epoch=1)
    assert done.kept == (folders[3], folders[2])
    assert done.removed == (folders[1], folders[0])
    assert done.left == ()
    assert left(state) == ["step-100.epoch-1.attempt-0", "step-11.epoch-1.attempt-0"]
    assert collected(state, keep=2, epoch=1).removed == ()


def test_only_what_verifies_counts(state, damage):
    folders = [state.checkpoint(step) for step in (1, 2, 3, 4)]
    damage(folders[3] / "rank-0.safetensors", -1)
    damage(folders[1] / "rank-0.safetensors", -1)
    done = collected(state, keep=2, epoch=1)
    # Step 2 is damaged and between the two that are kept: both stay, for someone to look at.
    assert done.kept == (folders[2], folders[0])
    assert done.removed == ()
    assert [path for path, _ in done.left] == [folders[3], folders[1]]
    done = collected(state, keep=1, epoch=1)
    assert done.kept == (folders[2],)
    assert done.removed == (folders[1], folders[0])
    assert [path for path, _ in done.left] == [folders[3]]


def test_higher_epochs_are_never_touched_and_do_not_count(state):
    mine = [state.checkpoint(step, epoch=2) for step in (1, 2)]
    theirs = state.checkpoint(3, epoch=3)
    half, _, _ = state.half_written(4, epoch=3)
    done = collected(state, keep=1, epoch=2)
    assert done[:3] == ((mine[1],), (mine[0],), ())
    assert theirs.exists()
    assert half.exists()


def test_half_written_folders_go_unless_they_are_in_progress(state):
    kept = state.checkpoint(1)
    older_epoch, _, _ = state.half_written(2, epoch=0)
    mine, _, _ = state.half_written(2)
    busy, name, _ = state.half_written(3)
    done = collected(state, keep=3, epoch=1, in_progress={str(name)})
    assert done.kept == (kept,)
    assert set(done.removed) == {older_epoch, mine}
    assert busy.exists()


def test_a_checkpoint_that_is_being_read_stays(state):
    folders = [state.checkpoint(step) for step in (1, 2)]
    assert collected(state, keep=1, epoch=1, in_progress=[folders[0].name]).removed == ()


def test_an_unknown_schema_is_never_removed(state):
    newer = state.checkpoint(1)
    state.checkpoint(2)
    (newer / MANIFEST).write_text('{"schema": 9}')
    done = collected(state, keep=1, epoch=1)
    assert [path for path, _ in done.left] == [newer]
    assert "schema 9" in done.left[0][1]


def test_trusted_ones_are_not_read_again_but_must_be_there(state, damage):
    folders = [state.checkpoint(step) for step in (1, 2, 3)]
    trusted = [folder.name for folder in folders]
    damage(folders[2] / "rank-0.safetensors", -1)
    (folders[1] / "rank-2.safetensors").unlink()
    done = collected(state, keep=2, epoch=1, trusted=trusted)
    assert done.kept == (folders[2], folders[0])
    assert [path for path, _ in done.left] == [folders[1]]


def test_what_is_not_ours_is_not_touched(state):
    folder = state.checkpoint(5)
    outside = state.folder / "outside"
    shutil.copytree(folder, outside)
    (state.root / "step-1.epoch-1.attempt-0").symlink_to(outside)
    (state.root / "step-02.epoch-1.attempt-0").mkdir()
    (state.root / "step-2.epoch-1.attempt-0").write_text("a file")
    (state.root / "best").mkdir()
    before = left(state)
    assert collected(state, keep=1, epoch=1).removed == ()
    assert left(state) == before
    assert (outside / MANIFEST).exists()


def test_a_collection_that_was_killed_is_finished_by_the_next(state):
    kept = state.checkpoint(5)
    gone, theirs = state.checkpoint(4), state.checkpoint(3, epoch=2)
    gone.rename(state.root / f".trash-{gone.name}")
    theirs.rename(state.root / f".trash-{theirs.name}")
    newer = state.checkpoint(6, epoch=2)
    assert find_newest(state.run).folder.url == str(newer)
    # A coordinator of a higher epoch may be writing and removing.
    collected(state, keep=1, epoch=1)
    assert left(state) == [f".trash-{theirs.name}", kept.name, newer.name]
    collected(state, keep=1, epoch=2, in_progress=[theirs.name])
    assert left(state) == [f".trash-{theirs.name}", newer.name]
    collected(state, keep=1, epoch=2)
    assert left(state) == [newer.name]


def test_what_somebody_is_writing_stays_while_others_are_swept(state):
    """Their uploads are not whole yet, so that no listing shows them."""
    state.checkpoint(5)
    writing = {name: state.root / name / ".partial-0123456789abcdef" for name in (
        "step-6.epoch-1.attempt-0", "step-2.epoch-1.attempt-3", "step-6.epoch-2.attempt-0", "epochs",
    )}  # fmt: skip
    for file in writing.values():
        file.parent.mkdir()
        file.write_bytes(b"half")
    collected(state, keep=1, epoch=1, in_progress=["step-6.epoch-1.attempt-0"])
    assert [name for name, file in writing.items() if file.exists()] == [
        "step-6.epoch-1.attempt-0", "step-6.epoch-2.attempt-0", "epochs",
    ]  # fmt: skip


def test_of_each_so_many_steps_the_first_is_kept_where_it_is_late(state):
    steps = [4, 10, 23, 25, 31, 39, 40]
    folders = {step: state.checkpoint(step) for step in steps}
    (folders[31] / "manifest.json").unlink()
    done = collected(state, keep=1, epoch=1, keep_every=10)
    assert done.kept == tuple(folders[step] for step in (40, 39, 23, 10))


def test_at_least_one_is_kept(state):
    with pytest.raises(ValueError, match="keep=0"):
        collected(state, keep=0, epoch=1)
    assert collected(state, keep=1, epoch=1)[:3] == ((), (), ())


def test_multiples_and_the_best_are_kept_besides(state):
    steps = [10, 15, 20, 25, 30, 35]
    folders = {step: state.checkpoint(step) for step in steps}
    done = collected(state, keep=2, epoch=1, keep_every=10, keep_best=[folders[15].name])
    assert done.kept == tuple(folders[step] for step in (35, 30, 20, 15, 10))
    assert done.removed == (folders[25],)
    # Only what was read is called verified: the older ones need not be.
    assert done.verified == (folders[35].name, folders[30].name)
    done = collected(state, keep=1, epoch=1, keep_every=15, trusted=done.verified)
    assert done.kept == tuple(folders[step] for step in (35, 30, 15))
    assert done.verified == ()


def test_a_damaged_multiple_does_not_count_and_is_not_removed(state, damage):
    folders = {step: state.checkpoint(step) for step in (9, 10, 11, 20)}
    damage(folders[20] / "rank-0.safetensors", -1)
    damage(folders[10] / MANIFEST, 30)
    done = collected(state, keep=1, epoch=1, keep_every=10)
    assert done.kept == (folders[11],)
    assert done.removed == (folders[9],)
    assert [folder for folder, _ in done.left] == [folders[20], folders[10]]
    state.half_written(30)
    assert [folder.name for folder in collected(state, keep=1, epoch=1, keep_every=10).removed] == [
        "step-30.epoch-1.attempt-0"
    ]


def test_what_comes_into_progress_meanwhile_is_not_touched(state):
    kept = state.checkpoint(5)
    half, name, _ = state.half_written(6)

    class Later(list):
        """Has the name from the second time that it is asked on."""

        def __contains__(self, asked):
            self.asked = getattr(self, "asked", 0) + (asked == str(name))
            return asked == str(name) and self.asked > 1

    done = collected(state, keep=1, epoch=1, in_progress=Later())
    assert done.removed == ()
    assert half.exists()
    assert kept.exists()


def test_storage_that_cannot_be_asked_removes_nothing_that_counts(state):
    folders = [state.checkpoint(step) for step in (1, 2, 3)]
    asked = []

    class Flaky(type(state.run.store)):
        def size(self, path):
            asked.append(path)
            if folders[2].name in path:
                raise StoreUnavailable(f"/{path}: the network is down")
            return super().size(path)

    done = collect(Folder(Flaky(), state.run.path), keep=1, epoch=1)
    assert asked
    assert [folder.name for folder in done.kept] == [folders[1].name]
    assert [(folder.name, "network is down" in reason) for folder, reason in done.left] == [(folders[2].name, True)]
    assert folders[2].exists()

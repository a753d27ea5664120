import shutil

import pytest

from everstep.storage.checkpoint import find_newest
from everstep.storage.manifest import MANIFEST
from everstep.storage.retention import collect


def left(state):
    return sorted(path.name for path in state.root.iterdir())


def test_the_newest_are_kept(state):
    folders = [state.checkpoint(step) for step in (9, 10, 11, 100)]
    done = collect(state.root, keep=2, epoch=1)
    assert done.kept == (folders[3], folders[2])
    assert done.removed == (folders[1], folders[0])
    assert done.left == ()
    assert left(state) == ["step-100.epoch-1.attempt-0", "step-11.epoch-1.attempt-0"]
    assert collect(state.root, keep=2, epoch=1).removed == ()


def test_only_what_verifies_counts(state, damage):
    folders = [state.checkpoint(step) for step in (1, 2, 3, 4)]
    damage(folders[3] / "rank-0.safetensors", -1)
    damage(folders[1] / "rank-0.safetensors", -1)
    done = collect(state.root, keep=2, epoch=1)
    # Step 2 is damaged and between the two that are kept: both stay, for someone to look at.
    assert done.kept == (folders[2], folders[0])
    assert done.removed == ()
    assert [path for path, _ in done.left] == [folders[3], folders[1]]
    done = collect(state.root, keep=1, epoch=1)
    assert done.kept == (folders[2],)
    assert done.removed == (folders[1], folders[0])
    assert [path for path, _ in done.left] == [folders[3]]


def test_higher_epochs_are_never_touched_and_do_not_count(state):
    mine = [state.checkpoint(step, epoch=2) for step in (1, 2)]
    theirs = state.checkpoint(3, epoch=3)
    half, _, _ = state.half_written(4, epoch=3)
    done = collect(state.root, keep=1, epoch=2)
    assert done == ((mine[1],), (mine[0],), ())
    assert theirs.exists()
    assert half.exists()


def test_half_written_folders_go_unless_they_are_in_progress(state):
    kept = state.checkpoint(1)
    older_epoch, _, _ = state.half_written(2, epoch=0)
    mine, _, _ = state.half_written(2)
    busy, name, _ = state.half_written(3)
    done = collect(state.root, keep=3, epoch=1, in_progress={str(name)})
    assert done.kept == (kept,)
    assert set(done.removed) == {older_epoch, mine}
    assert busy.exists()


def test_a_checkpoint_that_is_being_read_stays(state):
    folders = [state.checkpoint(step) for step in (1, 2)]
    assert collect(state.root, keep=1, epoch=1, in_progress=[folders[0].name]).removed == ()


def test_an_unknown_schema_is_never_removed(state):
    newer = state.checkpoint(1)
    state.checkpoint(2)
    (newer / MANIFEST).write_text('{"schema": 9}')
    done = collect(state.root, keep=1, epoch=1)
    assert [path for path, _ in done.left] == [newer]
    assert "schema 9" in done.left[0].reason


def test_trusted_ones_are_not_read_again_but_must_be_there(state, damage):
    folders = [state.checkpoint(step) for step in (1, 2, 3)]
    trusted = [folder.name for folder in folders]
    damage(folders[2] / "rank-0.safetensors", -1)
    (folders[1] / "rank-2.safetensors").unlink()
    done = collect(state.root, keep=2, epoch=1, trusted=trusted)
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
    assert collect(state.root, keep=1, epoch=1).removed == ()
    assert left(state) == before
    assert (outside / MANIFEST).exists()


def test_a_collection_that_was_killed_is_finished_by_the_next(state):
    kept = state.checkpoint(5)
    gone, theirs = state.checkpoint(4), state.checkpoint(3, epoch=2)
    gone.rename(state.root / f".trash-{gone.name}")
    theirs.rename(state.root / f".trash-{theirs.name}")
    assert find_newest(state.root).folder == kept
    collect(state.root, keep=1, epoch=1)
    assert left(state) == [f".trash-{theirs.name}", kept.name]


def test_at_least_one_is_kept(state):
    with pytest.raises(ValueError, match="keep=0"):
        collect(state.root, keep=0, epoch=1)
    assert collect(state.root, keep=1, epoch=1) == ((), (), ())

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors import safe_open

from everstep.storage import Checkpoint, CheckpointCorrupt, rank_file
from everstep.storage.checkpoint import find_newest
from everstep.storage.errors import (
    CheckpointError,
    CheckpointExists,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsupported,
    IndexInvalid,
    SegmentChanged,
    SegmentDamaged,
)
from everstep.storage.manifest import (
    MANIFEST,
    CheckpointName,
    commit,
    encode,
    new_folder,
    read_manifest,
    run_folder,
)
from everstep.storage.planner import Want, plan
from everstep.storage.rank_file import write_rank_file
from everstep.storage.segment import SEAL_BYTES, SegmentMap, Writer, read_seal

DETAILS = {"job": "job", "run": "run", "spec": {}}


def test_every_tensor_is_read_back_whatever_it_was_cut_over(state):
    for ranks in (1, 2, 4):
        checkpoint = Checkpoint.open(state.checkpoint(step=3, ranks=ranks))
        checkpoint.verify()
        for meta in state.metas:
            told, data = checkpoint.read_bytes(meta.name, meta.kind)
            assert told == meta
            assert data == state.content(meta, 3)
            tensor = checkpoint.read(meta.name, kind=meta.kind)
            assert tensor.shape == meta.shape
            assert str(tensor.dtype) == f"torch.{meta.dtype}"
            assert tensor.flatten().view(torch.uint8).numpy().tobytes() == data
    assert checkpoint.read("embed.weight").shape == (50, 7)


def test_the_manifest_says_everything_but_the_bytes(state):
    folder = state.checkpoint(step=3)
    manifest = Checkpoint.open(folder).manifest
    assert folder.name == "step-3.epoch-1.attempt-0"
    assert manifest.name == CheckpointName(3, 1, 0)
    assert (manifest.job, manifest.run, manifest.created) == ("job", "run", 1.0)
    assert manifest.spec == {"name": "job", "steps": 9}
    assert manifest.progress == {"losses": [1.5]}
    assert manifest.versions == {"everstep": "0"}
    assert {f.source.locator for f in manifest.index.fragments} == {f"rank-{r}.safetensors" for r in range(3)}
    raw = json.loads((folder / MANIFEST).read_bytes())
    assert raw["schema"] == 1
    assert next(iter(raw)) == "schema"
    assert list(raw)[-1] == "xxh3"


def test_paths_and_file_urls_open_other_urls_do_not(state, tmp_path):
    folder = state.checkpoint(step=3)
    assert Checkpoint.open(str(folder)).manifest == Checkpoint.open(folder.as_uri()).manifest
    assert Checkpoint.open(state.root).folder == folder
    for url in ("s3://bucket/x", "file://elsewhere/x"):
        with pytest.raises(CheckpointUnsupported, match="local folders"):
            Checkpoint.open(url)
    for nothing in (tmp_path / "nothing", tmp_path, folder / MANIFEST):
        with pytest.raises(CheckpointNotFound):
            Checkpoint.open(nothing)
    assert run_folder(tmp_path.as_uri(), "job", "run") == tmp_path / "job" / "run"
    with pytest.raises(CheckpointError, match="no name"):
        run_folder(tmp_path, "../job", "run")


def test_rank_files_are_safetensors(state):
    folder = state.checkpoint(step=3, ranks=2)
    seen = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["step"] == "3"
            for key in file.keys():  # noqa: SIM118  # it is no dict
                name, kind, span = key.rsplit("|", 2)
                start, stop = map(int, span.split(":"))
                tensor = file.get_tensor(key)
                assert tensor.shape == (stop - start,)
                seen.setdefault((name, kind), {})[start] = tensor
    for meta in state.metas:
        parts = [tensor for _, tensor in sorted(seen[meta.key].items())]
        assert torch.cat(parts).view(torch.uint8).numpy().tobytes() == state.content(meta, 3)
        assert str(parts[0].dtype) == f"torch.{meta.dtype}"
    for f in Checkpoint.open(folder).index.fragments:
        assert f.offset % next(meta.itemsize for meta in state.metas if meta.key == f.key) == 0


def test_planned_copies_are_read_and_checked(state, damage):
    folder = state.checkpoint(step=3, ranks=4)
    checkpoint = Checkpoint.open(folder)
    meta = state.metas[0]
    for start, stop in ((0, 350), (17, 200), (5, 6)):
        copies = plan(checkpoint.index, [Want(*meta.key, start, stop, "me")], lambda s, w: 0)
        data = b"".join(checkpoint.read_range(copy) for copy in copies)
        assert data == state.content(meta, 3)[start * 4 : stop * 4]
    (copy,) = plan(checkpoint.index, [Want(*meta.key, 1, 3, "me")], lambda s, w: 0)
    # Element 40 is in the same fragment: the part asked for is not damaged, but nothing vouches for it.
    damage(folder / copy.source.locator, copy.offset + 40 * 4)
    again = Checkpoint.open(folder)
    with pytest.raises(CheckpointCorrupt, match=r"embed.weight.*0:87"):
        again.read_range(copy)
    assert again.read_range(copy, verify=False) == state.content(meta, 3)[4:12]


def test_copies_from_elsewhere_are_refused(state):
    checkpoint = Checkpoint.open(state.checkpoint(step=3, ranks=1))
    (copy,) = plan(checkpoint.index, [Want("embed.weight", "param", 0, 350, "me")], lambda s, w: 0)
    for wrong in (
        replace(copy, source=replace(copy.source, locator="../rank-0.safetensors")),
        replace(copy, source=replace(copy.source, kind="segment")),
        replace(copy, offset=-1),
        replace(copy, offset=2**40),
        replace(copy, nbytes=2**50),
        replace(copy, nbytes=-4),
    ):
        with pytest.raises(IndexInvalid):
            checkpoint.read_range(wrong)


def test_an_unknown_tensor_is_a_key_error_that_helps(state):
    checkpoint = Checkpoint.open(state.checkpoint(step=3))
    with pytest.raises(KeyError, match="exp_avg, param, step"):
        checkpoint.read("embed.weight", kind="master")
    with pytest.raises(KeyError, match="7 tensors"):
        checkpoint.read("embed")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_anywhere_is_found_and_named(state, data):
    folder = next(state.root.glob("*"), None) or state.checkpoint(step=3)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    honest = path.read_bytes()
    at = data.draw(st.integers(0, len(honest) - 1))
    damaged = bytearray(honest)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    manifest = read_manifest(folder)
    path.write_bytes(damaged)
    try:
        with pytest.raises((CheckpointCorrupt, CheckpointUnsupported)) as caught:
            Checkpoint.open(folder).verify()
        assert path.name in str(caught.value)
        if path.name == MANIFEST:
            return
        metas = manifest.index.metas()
        own = [f for f in manifest.index.fragments if f.source.locator == path.name]
        hit = [f for f in own if 0 <= at - f.offset < (f.stop - f.start) * metas[f.key].itemsize]
        told = caught.value
        expected = [(f.name, f.kind, f.start, f.stop) for f in hit] or [("", "", 0, 0)]
        assert (told.tensor, told.kind, told.start, told.stop) == expected[0]
        assert str(pickle.loads(pickle.dumps(told))) == str(told)
    finally:
        path.write_bytes(honest)


def test_truncated_missing_swapped_and_grown_files_are_found(state):
    folder = state.checkpoint(step=3)
    one, two = folder / "rank-1.safetensors", folder / "rank-2.safetensors"
    honest = one.read_bytes()

    one.write_bytes(honest[:-1])
    with pytest.raises(CheckpointCorrupt, match=r"rank-1.safetensors, tensor .* bytes instead of"):
        Checkpoint.open(folder).verify()
    first = next(
        f
        for f in Checkpoint.open(folder).index.fragments
        if f.source.locator == one.name and f.key == state.metas[0].key
    )
    one.write_bytes(honest[: first.offset + 8])
    with pytest.raises(CheckpointCorrupt, match=r"rank-1.*embed.weight.* 116:233: cut off"):
        Checkpoint.open(folder).read("embed.weight")
    one.write_bytes(honest + b"\0")
    with pytest.raises(CheckpointCorrupt, match="rank-1"):
        Checkpoint.open(folder).verify()

    one.unlink()
    with pytest.raises(CheckpointCorrupt, match=r"rank-1.*No such file"):
        Checkpoint.open(folder).verify()

    two.rename(one)
    two.write_bytes(honest)
    with pytest.raises(CheckpointCorrupt, match="rank-"):
        Checkpoint.open(folder).verify()

    one.write_bytes(honest)
    two.unlink()
    two.symlink_to(one)
    with pytest.raises(CheckpointCorrupt, match="rank-2"):
        Checkpoint.open(folder).verify()


def test_a_file_of_another_step_is_found(state):
    older, newer = state.checkpoint(step=3), state.checkpoint(step=4)
    shutil.copy(older / "rank-0.safetensors", newer / "rank-0.safetensors")
    with pytest.raises(CheckpointCorrupt, match=r"rank-0.safetensors, tensor"):
        Checkpoint.open(newer).verify()


def test_a_manifest_of_another_checkpoint_is_found(state):
    older, newer = state.checkpoint(step=3), state.checkpoint(step=4)
    shutil.copy(older / MANIFEST, newer / MANIFEST)
    with pytest.raises(CheckpointCorrupt, match="that of step-3"):
        Checkpoint.open(newer)
    assert find_newest(state.root).folder == older
    # A checkpoint that a user copied under a name of their own opens.
    Checkpoint.open(shutil.copytree(older, state.folder / "mine")).verify()


def test_no_manifest_no_checkpoint(state):
    folder = state.checkpoint(step=3)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointNotFound, match=r"no manifest.json"):
        Checkpoint.open(folder)
    assert find_newest(state.root).manifest is None


def test_a_future_manifest_is_refused_by_version(state):
    folder = state.checkpoint(step=3)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"schema":1', '"schema":2', 1))
    with pytest.raises(CheckpointUnsupported, match="schema 2"):
        Checkpoint.open(folder)
    (folder / MANIFEST).write_text('{"schema": 2, "whatever": []}')
    with pytest.raises(CheckpointUnsupported, match="schema 2"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"schema":"1"}', b'{"schema":1}', b'{"schema":1,"xxh3":"\xff"}']
)
def test_what_is_no_manifest_is_corrupt(state, text):
    folder = state.checkpoint(step=3)
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointCorrupt, match=r"manifest.json"):
        Checkpoint.open(folder)


def test_a_manifest_with_a_right_checksum_that_says_what_cannot_be_is_corrupt(state):
    folder = state.checkpoint(step=3)
    honest = read_manifest(folder)
    index, first = honest.index, honest.index.fragments[0]
    rest = index.fragments[1:]
    for wrong in (
        replace(honest, index=replace(index, fragments=rest)),
        replace(honest, index=replace(index, fragments=(replace(first, stop=10**6), *rest))),
        replace(honest, index=replace(index, fragments=(replace(first, offset=2**40), *rest))),
        replace(honest, index=replace(index, fragments=(replace(first, offset=rest[0].offset), *rest))),
        replace(honest, index=replace(index, fragments=(replace(first, start=-1), *rest))),
        replace(honest, files=tuple(replace(f, bytes=0) for f in honest.files)),
        replace(honest, files=(*honest.files, honest.files[0])),
        replace(honest, files=(*honest.files, replace(honest.files[0], name="../../etc/passwd"))),
    ):
        (folder / MANIFEST).write_bytes(encode(wrong))
        with pytest.raises(CheckpointCorrupt, match=r"manifest.json"):
            Checkpoint.open(folder)
    (folder / MANIFEST).write_bytes(encode(honest))
    Checkpoint.open(folder).verify()


def test_the_newest_that_verifies_is_found_and_the_others_are_explained(state, damage):
    oldest = state.checkpoint(step=8)
    good = state.checkpoint(step=9, epoch=2)
    state.checkpoint(step=9, epoch=1)
    corrupt = state.checkpoint(step=10)
    damage(corrupt / "rank-1.safetensors", -1)
    half, _, _ = state.half_written(step=11)
    (state.root / "notes").mkdir()
    (state.root / "step-99.epoch-1.attempt-0").write_text("a file")
    newest = find_newest(state.root)
    assert newest.folder == good
    assert newest.manifest == Checkpoint.open(good).manifest
    assert [path for path, _ in newest.rejected] == [half, corrupt]
    assert "no manifest.json" in newest.rejected[0].reason
    assert "do not match their checksum" in newest.rejected[1].reason
    shutil.rmtree(good)
    shutil.rmtree(oldest)
    shutil.rmtree(state.root / "step-9.epoch-1.attempt-0")
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint verifies: step-11.*step-10"):
        Checkpoint.open(state.root)
    assert find_newest(state.folder / "nothing") == (None, None, ())


def test_names_are_never_reused(state):
    folder = state.checkpoint(step=3)
    _, name, records = state.half_written(step=3)
    assert name == CheckpointName(3, 1, 1)
    assert new_folder(state.root, 3, 1, attempt=7)[1] == CheckpointName(3, 1, 7)
    assert new_folder(state.root, 3, 1)[1] == CheckpointName(3, 1, 8)
    with pytest.raises(CheckpointExists, match="rank-0"):
        state.write(folder, 3, 3)
    with pytest.raises(CheckpointExists, match=r"manifest\.json"):
        commit(folder, records, name=CheckpointName(3, 1, 0), **DETAILS)
    Checkpoint.open(folder).verify()


def test_only_a_whole_state_is_committed(state):
    folder, name, records = state.half_written(step=3)
    for some in ([], records[1:], records[:2]):
        with pytest.raises(CheckpointIncomplete, match=r"no file"):
            commit(folder, some, name=name, **DETAILS)
    with (folder / "rank-1.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointIncomplete, match=r"rank-1.safetensors: .* were reported"):
        commit(folder, records, name=name, **DETAILS)
    (folder / "rank-1.safetensors").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"rank-1.safetensors: No such file"):
        commit(folder, records, name=name, **DETAILS)
    assert not (folder / MANIFEST).exists()


def test_a_segment_that_is_not_what_it_was_is_not_written(state, tmp_path):
    path = state.segment(step=3, rank=0, ranks=1)
    with SegmentMap(path, writable=True) as segment:
        seal = read_seal(segment)
        segment.memory[SEAL_BYTES + 8] ^= 1
        with pytest.raises(SegmentDamaged, match=r"embed.weight"):
            write_rank_file(segment, seal, tmp_path, "rank-0.safetensors")
        segment.memory[SEAL_BYTES + 8] ^= 1
        Writer(segment).begin()
        with pytest.raises(SegmentChanged):
            write_rank_file(segment, seal, tmp_path, "rank-0.safetensors")
    assert not list(tmp_path.glob("rank*"))


def test_a_segment_that_is_rewritten_meanwhile_is_not_written(state, tmp_path, monkeypatch):
    path = state.segment(step=3, rank=0, ranks=1)
    with SegmentMap(path, writable=True) as segment:
        seal = read_seal(segment)
        honest = rank_file.payload

        def overtaken(*args):
            Writer(segment).begin()
            return honest(*args)

        monkeypatch.setattr(rank_file, "payload", overtaken)
        with pytest.raises(SegmentChanged, match="while a checkpoint was written"):
            write_rank_file(segment, seal, tmp_path, "rank-0.safetensors")
    assert not list(tmp_path.glob("rank*"))


def test_a_storage_that_refuses_is_a_checkpoint_error(state, tmp_path):
    path = state.segment(step=3, rank=0, ranks=1)
    with SegmentMap(path, writable=False) as segment:
        seal = read_seal(segment)
        with pytest.raises(CheckpointError, match="No such file"):
            write_rank_file(segment, seal, tmp_path / "nothing", "rank-0.safetensors")
        for name in ("../x", "", ".hidden", "a/b", "a\0b", "x" * 256):
            with pytest.raises(CheckpointError, match="no name"):
                write_rank_file(segment, seal, tmp_path, name)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot create"):
        new_folder(tmp_path / "file" / "run", 1, 1)


def test_a_full_storage_is_a_checkpoint_error_that_leaves_no_file(state, tmp_path, monkeypatch):
    path = state.segment(step=3, rank=0, ranks=1)
    honest = os.write

    def full(fd, data):
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return honest(fd, data)

    with SegmentMap(path, writable=False) as segment:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match="No space left"):
            write_rank_file(segment, read_seal(segment), tmp_path, "rank-0.safetensors")
    assert not list(tmp_path.glob("rank*"))


def test_reading_costs_no_torch_until_a_tensor_is_asked_for(state):
    folder = state.checkpoint(step=3)
    code = (
        "import sys\n"
        "from everstep.storage import Checkpoint\n"
        f"ck = Checkpoint.open({str(folder)!r}); ck.verify(); ck.read_bytes('embed.weight')\n"
        "import everstep.storage.retention, everstep.storage.versions\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'ray' not in sys.modules, 'ray'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors import safe_open

from everstep.storage import Checkpoint, CheckpointCorrupt, part_writers, rank_file
from everstep.storage import checkpoint as checkpoint_module
from everstep.storage.blocks import BLOCK_BYTES
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
    StoreDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
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
from everstep.storage.rank_file import write_file, write_rank_file
from everstep.storage.segment import SEAL_BYTES, SegmentMap, Writer, read_seal
from everstep.storage.state_hash import combine, tensor_line
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Folder
from unit.storage.conftest import METAS, State

DETAILS = {"job": "job", "run": "run", "spec": {}}


# 40 MiB in two tensors, so that parts, blocks and fragments begin and end in each other's middle.
FILLED = (TensorMeta("wide", "param", "int64", (5 << 20,)), TensorMeta("thin", "param", "int8", (3,)))
BIG = StateIndex(
    0, FILLED, tuple(Fragment(*meta.key, 0, meta.numel, Source("here", "", ""), 0) for meta in FILLED)
)  # fmt: skip


def pattern(fragment, first, out):
    """Byte i of every fragment is i * 7 / 4096, so that blocks differ."""
    out[:] = ((np.arange(first, first + len(out)) * 7) >> 12).astype(np.uint8).data


def leftovers(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith("segment-")]


def read_range(checkpoint, copy):
    data = bytearray(copy.nbytes)
    checkpoint.read_into(copy, memoryview(data))
    return bytes(data)


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
    assert raw["schema"] == 2
    assert next(iter(raw)) == "schema"
    assert list(raw)[-1] == "xxh3"


def test_paths_and_file_urls_open_other_urls_do_not(state, tmp_path):
    folder = state.checkpoint(step=3)
    assert Checkpoint.open(str(folder)).manifest == Checkpoint.open(folder.as_uri()).manifest
    opened = Checkpoint.open(state.root)
    assert opened.url == opened.folder.url == str(folder)
    with pytest.raises(CheckpointUnsupported, match="names no host"):
        Checkpoint.open("file://elsewhere/x")
    for nothing in (tmp_path / "nothing", tmp_path, folder / MANIFEST):
        with pytest.raises(CheckpointNotFound):
            Checkpoint.open(nothing)
    assert run_folder(tmp_path.as_uri(), "job", "run").url == str(tmp_path / "job" / "run")
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
        data = b"".join(read_range(checkpoint, copy) for copy in copies)
        assert data == state.content(meta, 3)[start * 4 : stop * 4]
    (copy,) = plan(checkpoint.index, [Want(*meta.key, 1, 3, "me")], lambda s, w: 0)
    # Element 40 is in the same fragment: the part asked for is not damaged, but nothing vouches for it.
    damage(folder / copy.source.locator, copy.offset + 40 * 4)
    again = Checkpoint.open(folder)
    with pytest.raises(CheckpointCorrupt, match=r"embed.weight.*0:87"):
        read_range(again, copy)


def test_copies_from_elsewhere_are_refused(state):
    checkpoint = Checkpoint.open(state.checkpoint(step=3, ranks=1))
    (copy,) = plan(checkpoint.index, [Want("embed.weight", "param", 0, 350, "me")], lambda s, w: 0)
    memory = memoryview(bytearray(copy.nbytes))
    for wrong in (
        replace(copy, source=replace(copy.source, locator="../rank-0.safetensors")),
        replace(copy, source=replace(copy.source, kind="segment")),
        replace(copy, offset=-1),
        replace(copy, offset=2**40),
        replace(copy, nbytes=2**50),
        replace(copy, nbytes=-4),
    ):
        with pytest.raises(IndexInvalid):
            checkpoint.read_into(wrong, memory)
    with pytest.raises(IndexInvalid):
        checkpoint.read_into(copy, memory[1:])
    with pytest.raises(IndexInvalid, match="cannot be written"):
        checkpoint.read_into(copy, memory.toreadonly())


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
    manifest = read_manifest(folder_at(folder))
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
    with pytest.raises(CheckpointCorrupt, match=r"rank-1.*embed.weight.* 116:233: \d+ bytes instead of"):
        Checkpoint.open(folder).read("embed.weight")
    one.write_bytes(honest + b"\0")
    with pytest.raises(CheckpointCorrupt, match="rank-1"):
        Checkpoint.open(folder).verify()

    one.unlink()
    with pytest.raises(CheckpointCorrupt, match=r"rank-1.*no such file"):
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
    assert find_newest(state.root).folder.url == str(older)
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
    (folder / MANIFEST).write_text(text.replace('"schema":2', '"schema":3', 1))
    with pytest.raises(CheckpointUnsupported, match=r"schema 3, by a newer everstep.*update"):
        Checkpoint.open(folder)
    (folder / MANIFEST).write_text('{"schema": 3, "whatever": []}')
    with pytest.raises(CheckpointUnsupported, match="schema 3"):
        Checkpoint.open(folder)
    (folder / MANIFEST).write_text('{"schema": 1, "files": [], "xxh3": "0000000000000000"}')
    with pytest.raises(CheckpointUnsupported, match=r"schema 1, by an older everstep.*version that wrote it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"schema":"1"}', b'{"schema":2}', b'{"schema":2,"xxh3":"\xff"}']
)
def test_what_is_no_manifest_is_corrupt(state, text):
    folder = state.checkpoint(step=3)
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointCorrupt, match=r"manifest.json"):
        Checkpoint.open(folder)


def test_a_manifest_with_a_right_checksum_that_says_what_cannot_be_is_corrupt(state):
    folder = state.checkpoint(step=3)
    honest = read_manifest(folder_at(folder))
    index, first = honest.index, honest.index.fragments[0]
    rest = index.fragments[1:]
    for wrong in (
        replace(honest, index=replace(index, fragments=rest)),
        replace(honest, index=replace(index, fragments=(replace(first, stop=10**6), *rest))),
        replace(honest, index=replace(index, fragments=(replace(first, offset=2**40), *rest))),
        replace(honest, index=replace(index, fragments=(replace(first, offset=rest[0].offset), *rest))),
        replace(honest, index=replace(index, fragments=(replace(first, start=-1), *rest))),
        replace(honest, files=tuple(replace(f, bytes=0) for f in honest.files)),
        replace(honest, files=tuple(replace(f, bytes=0, blocks=()) for f in honest.files)),
        replace(honest, files=tuple(replace(f, bytes=2**60) for f in honest.files)),
        replace(honest, files=tuple(replace(f, blocks=f.blocks * 2) for f in honest.files)),
        replace(honest, index=replace(index, fragments=(replace(first, box=((0, 99), (0, 7))), *rest))),
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
    assert newest.folder.url == str(good)
    assert newest.manifest == Checkpoint.open(good).manifest
    assert [folder.url for folder, _ in newest.rejected] == [str(half), str(corrupt)]
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
    assert new_folder(state.run, 3, 1, attempt=7)[1] == CheckpointName(3, 1, 7)
    assert new_folder(state.run, 3, 1)[1] == CheckpointName(3, 1, 8)
    with pytest.raises(CheckpointExists, match="rank-0"):
        state.write(folder, 3, 3)
    with pytest.raises(CheckpointExists, match=r"manifest\.json"):
        commit(folder_at(folder), records, name=CheckpointName(3, 1, 0), **DETAILS)
    Checkpoint.open(folder).verify()


def test_only_a_whole_state_is_committed(state):
    folder, name, records = state.half_written(step=3)
    for some in ([], records[1:], records[:2]):
        with pytest.raises(CheckpointIncomplete, match=r"no file"):
            commit(folder_at(folder), some, name=name, **DETAILS)
    with (folder / "rank-1.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointIncomplete, match=r"rank-1.safetensors: .* were reported"):
        commit(folder_at(folder), records, name=name, **DETAILS)
    (folder / "rank-1.safetensors").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"rank-1.safetensors: there is no such file"):
        commit(folder_at(folder), records, name=name, **DETAILS)
    assert not (folder / MANIFEST).exists()


def test_a_segment_that_is_not_what_it_was_is_not_written(state, tmp_path):
    path = state.segment(step=3, rank=0, ranks=1)
    with SegmentMap(path, writable=True) as segment:
        seal = read_seal(segment)
        segment.memory[SEAL_BYTES + 8] ^= 1
        with pytest.raises(SegmentDamaged, match=r"embed.weight"):
            write_rank_file(segment, seal, folder_at(tmp_path), "rank-0.safetensors")
        segment.memory[SEAL_BYTES + 8] ^= 1
        Writer(segment).begin()
        with pytest.raises(SegmentChanged):
            write_rank_file(segment, seal, folder_at(tmp_path), "rank-0.safetensors")
    assert leftovers(tmp_path) == []


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
            write_rank_file(segment, seal, folder_at(tmp_path), "rank-0.safetensors")
    assert leftovers(tmp_path) == []


def test_a_storage_that_refuses_says_so(state, tmp_path):
    path = state.segment(step=3, rank=0, ranks=1)
    (tmp_path / "file").write_text("")
    with SegmentMap(path, writable=False) as segment:
        seal = read_seal(segment)
        with pytest.raises(StoreDenied, match=r"a file stands where a folder is needed"):
            write_rank_file(segment, seal, folder_at(tmp_path / "file"), "rank-0.safetensors")
        for name in ("../x", "", ".hidden", "a/b", "a\0b", "x" * 256):
            with pytest.raises(CheckpointError, match="no name"):
                write_rank_file(segment, seal, folder_at(tmp_path), name)
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        new_folder(folder_at(tmp_path / "file" / "run"), 1, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_storage_leaves_no_file(state, tmp_path, monkeypatch, threads):
    honest, calls, filled = os.pwrite, [], []

    def counted(fragment, first, out):
        filled.append(len(out))
        pattern(fragment, first, out)

    def full(fd, data, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return honest(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreFull, match="No space left"):
        write_file(folder_at(tmp_path), "big.safetensors", BIG, counted, threads=threads)
    assert leftovers(tmp_path) == []
    # It is noticed on the way, not at the end: two parts were written, some more were filled already.
    assert sum(filled) <= (2 + threads + 3) * BLOCK_BYTES
    assert len(calls) < 8


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


@pytest.mark.parametrize(("threads", "memory_bytes"), [(1, 1), (2, 64 << 20), (5, 12 << 20)])
def test_a_file_of_many_parts_is_what_was_filled_in(tmp_path, threads, memory_bytes):
    told = []
    record = write_file(
        folder_at(tmp_path), "big.safetensors", BIG, pattern, threads=threads, memory_bytes=memory_bytes,
        metadata={"who": "me"}, on_bytes=told.append,
    )  # fmt: skip
    data = (tmp_path / "big.safetensors").read_bytes()
    assert leftovers(tmp_path) == ["big.safetensors"]
    assert sum(told) == record.bytes == len(data)
    assert record.blocks == tuple(
        xxhash.xxh3_64_intdigest(data[first : first + BLOCK_BYTES]) for first in range(0, len(data), BLOCK_BYTES)
    )
    for f, meta in zip(record.fragments, FILLED, strict=True):
        own = bytearray(meta.nbytes)
        pattern(f, 0, memoryview(own))
        assert data[f.offset : f.offset + meta.nbytes] == own
        assert f.checksum == xxhash.xxh3_64_intdigest(own)
    with safe_open(tmp_path / "big.safetensors", framework="pt") as file:
        assert file.metadata()["who"] == "me"
        assert file.get_tensor("thin|param|0:3").tolist() == [0, 0, 0]


def test_buffers_are_bounded_whatever_the_file(tmp_path, monkeypatch):
    taken = []
    honest = bytearray

    def counted(size=b""):
        taken.append(size)
        return honest(size)

    monkeypatch.setattr(part_writers, "bytearray", counted, raising=False)
    write_file(folder_at(tmp_path), "big.safetensors", BIG, pattern, threads=4, memory_bytes=9 << 20)
    assert taken == [4 << 20] * 2


def test_what_does_not_match_a_known_checksum_is_not_written(tmp_path):
    wide, thin = BIG.fragments
    thin = replace(thin, checksum=xxhash.xxh3_64_intdigest(b"\0\0\1"))
    with pytest.raises(SegmentDamaged, match=r"0:3 of 'thin' \(param\) do not match"):
        write_file(folder_at(tmp_path), "big.safetensors", replace(BIG, fragments=(wide, thin)), pattern)
    assert leftovers(tmp_path) == []
    with pytest.raises(IndexInvalid, match="twice"):
        write_file(folder_at(tmp_path), "big.safetensors", replace(BIG, fragments=(thin, thin)), pattern)


def test_a_filler_that_fails_leaves_nothing(tmp_path):
    def fails(fragment, first, out):
        if first > 20 << 20:
            raise ZeroDivisionError
        pattern(fragment, first, out)

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        write_file(folder_at(tmp_path), "big.safetensors", BIG, fails)
    assert leftovers(tmp_path) == []
    assert threading.active_count() == before


def boxed(state, step=3):
    """A checkpoint of one matrix, cut into four boxes, one of them over two files."""
    meta = TensorMeta("m", "param", "int32", (6, 5))
    whole = np.arange(30, dtype=np.int32).reshape(6, 5)
    cuts = {
        "a": [(((0, 2), (0, 5)), 0, 10), (((2, 4), (0, 3)), 0, 7)],
        "b": [(((2, 4), (0, 3)), 7, 12), (((2, 4), (3, 2)), 0, 8)],
    }
    folder, name = new_folder(state.run, step, 1)
    records = []
    for file, pieces in cuts.items():
        fragments = [Fragment(*meta.key, a, b, Source("x", "", ""), 0, 0, box) for box, a, b in pieces]

        def fill(f, first, out):
            (r, rows), (c, columns) = f.box
            part = whole[r : r + rows, c : c + columns].flatten()[f.start : f.stop].tobytes()
            out[:] = part[first : first + len(out)]

        index = StateIndex(0, (meta,), tuple(fragments))
        records.append(write_file(folder, f"{file}.safetensors", index, fill))
    return folder, commit(folder, records, name=name, **DETAILS), whole


def test_boxes_are_written_named_and_read_back(state):
    folder, manifest, whole = boxed(state)
    again = Checkpoint.open(folder.url)
    assert set(again.index.fragments) == set(manifest.index.fragments)
    assert again.manifest.files == manifest.files
    raw = json.loads(Path(folder.url, MANIFEST).read_bytes())
    assert len(raw["boxes"]) == 3  # the one that is in both files once
    again.verify()
    assert again.read("m").tolist() == whole.tolist()
    out = memoryview(bytearray(6 * 4))
    again.load([(Want("m", "param", 2, 8, "me", ((1, 3), (1, 3))), out)])
    assert np.frombuffer(out, np.int32).tolist() == whole[1:4, 1:4].flatten()[2:8].tolist()
    with safe_open(Path(folder.url, "b.safetensors"), framework="pt") as file:
        assert sorted(file.keys()) == ["m|param|2+4,0+3|7:12", "m|param|2+4,3+2|0:8"]


def test_damage_in_a_box_is_named_with_it(state, damage):
    folder, manifest, _ = boxed(state)
    f = next(f for f in manifest.index.fragments if f.start == 7)
    damage(Path(folder.url, f.source.locator), f.offset + 19)
    with pytest.raises(CheckpointCorrupt, match=r"b.safetensors, tensor 'm' \(param\) elements 7:12: .*2\+4x0\+3"):
        Checkpoint.open(folder.url).read("m")


def test_a_box_that_nobody_holds_is_no_whole_state(state):
    folder, manifest, _ = boxed(state)
    for left_out in range(4):
        rest = tuple(f for i, f in enumerate(manifest.index.fragments) if i != left_out)
        Path(folder.url, MANIFEST).write_bytes(
            encode(replace(manifest, index=replace(manifest.index, fragments=rest)))
        )
        with pytest.raises(CheckpointCorrupt, match=r"manifest.json, tensor 'm' .*no file holds"):
            Checkpoint.open(folder.url)


class Losing:
    """A store that does what it is asked, and then says that it could not: the answer was lost."""

    def __init__(self, store, times=1):
        self._store, self._times = store, times

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put_new(self, path, data):
        self._store.put_new(path, data)
        if self._times:
            self._times -= 1
            raise StoreUnavailable("the connection was closed")


def test_a_commit_whose_answer_was_lost_is_a_commit(state):
    folder, name, records = state.half_written(step=3)
    here = Folder(Losing(state.run.store), folder_at(folder).path)
    done = commit(here, records, name=name, created=5.0, **DETAILS)
    assert Checkpoint.open(folder).manifest == done
    # Tried again by a caller who has not heard of it: the first one stands.
    assert commit(here, records, name=name, created=6.0, **DETAILS).created == 5.0
    for other in ({"progress": {"step": 1}}, {"origin": {"format": "dcp"}}, {"versions": {"commit": "abc"}}):
        with pytest.raises(CheckpointExists):
            commit(here, records, name=name, **DETAILS, **other)


def test_a_commit_that_did_not_happen_is_not_one(state):
    folder, name, records = state.half_written(step=3)

    class Down(Losing):
        def put_new(self, path, data):
            raise StoreUnavailable("no route")

    with pytest.raises(StoreUnavailable, match="no route"):
        commit(Folder(Down(state.run.store), folder_at(folder).path), records, name=name, **DETAILS)
    assert find_newest(state.run).manifest is None


@pytest.mark.parametrize("error", [StoreUnavailable, StoreDenied])
def test_storage_that_cannot_be_asked_is_not_corruption(state, error):
    state.checkpoint(step=3)
    state.checkpoint(step=4)

    class Silent(type(state.run.store)):
        open_file = None

        def read_into(self, path, offset, out):
            if "rank-" in path and "step-4" in path:
                raise error("no answer")
            return super().read_into(path, offset, out)

    root = Folder(Silent(), state.run.path)
    with pytest.raises(error, match="no answer"):
        find_newest(root)
    with pytest.raises(error, match="no answer"):
        Checkpoint.of(root.child("step-4.epoch-1.attempt-0")).read("embed.weight")


def test_a_block_that_is_right_when_read_again_is_told_as_that(state):
    folder = folder_at(state.checkpoint(step=3))

    class Once(type(state.run.store)):
        open_file = None

        def read_into(self, path, offset, out):
            got = super().read_into(path, offset, out)
            if "rank-1" in path and not hasattr(self, "done"):
                self.done = True
                out[-1] ^= 1
            return got

    with pytest.raises(CheckpointCorrupt, match=r"rank-1.*matched when they were read again|rank-1.*the header"):
        Checkpoint.of(Folder(Once(), folder.path)).verify(threads=1)


def test_every_thousandth_byte_of_every_file(tmp_path_factory):
    """One flipped bit in each of them, before a load: found, and file, tensor and range are named."""
    state = State(tmp_path_factory.mktemp("flips"))
    state.metas = (*METAS, TensorMeta("wide", "param", "bfloat16", (11, 2001)))
    good = state.checkpoint(step=3, ranks=2)
    folder = state.checkpoint(step=4, ranks=2)
    manifest = read_manifest(folder_at(folder))
    metas = manifest.index.metas()
    flips = 0
    for path in sorted(folder.iterdir()):
        honest = path.read_bytes()
        for at in range(0, len(honest), 1000):
            damaged = bytearray(honest)
            damaged[at] ^= 1 << (at // 1000 % 8)
            path.write_bytes(damaged)
            hit = [
                (f.name, f.kind, f.start, f.stop)
                for f in manifest.index.fragments
                if f.source.locator == path.name and 0 <= at - f.offset < (f.stop - f.start) * metas[f.key].itemsize
            ]
            targets = [(Want(*m.key, 0, m.numel, ""), memoryview(bytearray(m.nbytes))) for m in state.metas]
            with pytest.raises((CheckpointCorrupt, CheckpointUnsupported)) as caught:
                Checkpoint.open(folder).load(targets)
            assert path.name in str(caught.value)
            if path.name != MANIFEST:
                told = caught.value
                assert (told.tensor, told.kind, told.start, told.stop) == (hit or [("", "", 0, 0)])[0]
            newest = find_newest(state.run)
            assert newest.folder.url == str(good)
            assert [one.folder.url for one in newest.rejected] == [str(folder)]
            flips += 1
        path.write_bytes(honest)
    assert flips > 30
    assert find_newest(state.run).folder.url == str(folder)


@pytest.mark.parametrize("how", ["cut", "longer", "missing", "swapped", "older", "link", "future"])
def test_files_that_are_not_the_ones_that_were_written(state, how):
    state.metas = (TensorMeta("w", "param", "float32", (8, 5)), TensorMeta("w", "exp_avg", "float32", (8, 5)))
    older = state.checkpoint(step=3, ranks=4)
    folder = state.checkpoint(step=4, ranks=4)
    one, two = folder / "rank-1.safetensors", folder / "rank-2.safetensors"
    named = r"rank-1.safetensors, tensor '"
    if how == "cut":
        one.write_bytes(one.read_bytes()[:-1])
    elif how == "longer":
        one.write_bytes(one.read_bytes() + b"\0")
        named = "rank-1.safetensors: .* bytes instead of"
    elif how == "missing":
        one.unlink()
    elif how == "swapped":
        first, second = one.read_bytes(), two.read_bytes()
        assert len(first) == len(second)
        one.write_bytes(second)
        two.write_bytes(first)
        named = r"rank-[12].safetensors, tensor '"
    elif how == "older":
        assert one.stat().st_size == (older / one.name).stat().st_size
        shutil.copy(older / one.name, one)
    elif how == "link":
        one.rename(folder / "moved")
        one.symlink_to(folder / "moved")
    else:
        text = (folder / MANIFEST).read_text()
        (folder / MANIFEST).write_text(text.replace('"schema":2', '"schema":7', 1))
        named = r"manifest.json: manifest of schema 7"
    with pytest.raises((CheckpointCorrupt, CheckpointUnsupported), match=named):
        Checkpoint.open(folder).verify()
    newest = find_newest(state.run)
    assert newest.folder.url == str(older)
    assert re.search(named, newest.rejected[0].reason)
    if how != "longer":  # which is of no matter to who reads what he wants
        with pytest.raises((CheckpointCorrupt, CheckpointUnsupported), match=named):
            Checkpoint.open(folder).state_sha256()


def test_the_hash_of_the_state_does_not_depend_on_how_it_was_cut(state, monkeypatch):
    whole = Checkpoint.open(state.checkpoint(step=3, ranks=1)).state_sha256()
    monkeypatch.setattr(checkpoint_module, "_LOT_BYTES", 100)
    assert Checkpoint.open(state.checkpoint(step=3, ranks=4)).state_sha256() == whole
    assert whole == combine(
        [tensor_line(m, hashlib.sha256(state.content(m, 3)).hexdigest()) for m in state.metas], 3
    )  # fmt: skip

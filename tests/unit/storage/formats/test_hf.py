"""Safetensors: every layout is found, and what does not fit together is named."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from everstep.storage.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound, CheckpointUnsupported
from everstep.storage.formats import hf
from everstep.storage.formats.foreign import Foreign
from everstep.storage.stores.opening import folder_at

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.int64)


def read(path: Path, **options: Any) -> Foreign:
    return hf.read(folder_at(path), **options)


def bytes_at(folder: Path, foreign: Foreign) -> dict[str, bytes]:
    metas = foreign.index.metas()
    return {
        f.name: (folder / f.source.locator).read_bytes()[f.offset :][: metas[f.key].nbytes]
        for f in foreign.index.fragments
    }


def index_of(folder: Path, weight_map: dict[str, str], name: str = "model") -> None:
    (folder / f"{name}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


def test_a_folder_without_an_index_is_all_its_files(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors")
    save_file({"b": B, "norm.running_var": A}, tmp_path / "y.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")

    foreign = read(tmp_path)

    assert {m.key: (m.dtype, m.shape) for m in foreign.index.tensors} == {
        ("a", "param"): ("float32", (2, 3)),
        ("b", "buffer"): ("int64", (4,)),
        ("norm.running_var", "buffer"): ("float32", (2, 3)),
    }
    assert bytes_at(tmp_path, foreign) == {
        "a": A.numpy().tobytes(), "b": B.numpy().tobytes(), "norm.running_var": A.numpy().tobytes(),
    }  # fmt: skip
    assert foreign.index.step == 0
    assert read(tmp_path, step=5).index.step == 5


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"a": A}, tmp_path / "sub" / "one.safetensors")
    save_file({"b": B, "extra": A}, tmp_path / "two.safetensors")
    save_file({"a": B}, tmp_path / "consolidated.safetensors")
    index_of(tmp_path, {"a": "sub/one.safetensors", "b": "two.safetensors"})

    foreign = read(tmp_path)

    assert {f.name: f.source.locator for f in foreign.index.fragments} == {
        "a": "sub/one.safetensors",
        "b": "two.safetensors",
    }
    assert foreign.ignored == ("extra (in two.safetensors, not in model.safetensors.index.json)",)


def test_one_file_of_several_can_be_taken(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"a": B}, tmp_path / "two.safetensors")

    with pytest.raises(CheckpointUnsupported, match=r"'a' is in 'one\.safetensors' and in 'two\.safetensors'"):
        read(tmp_path)
    assert read(tmp_path, file="two.safetensors").index.tensors[0].shape == (4,)
    assert hf.single_file(folder_at(tmp_path / "two.safetensors")) == (folder_at(tmp_path), "two.safetensors")
    assert hf.single_file(folder_at(tmp_path)) is None


def test_an_index_that_does_not_fit_its_files_is_named(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    index_of(tmp_path, {"a": "one.safetensors", "b": "gone.safetensors"})
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors\.index\.json: .*'gone\.safetensors'.* missing"):
        read(tmp_path)
    index_of(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointCorrupt, match=r"'a' is in 'two\.safetensors'; it is in 'one\.safetensors'"):
        read(tmp_path)
    index_of(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointCorrupt, match=r"'c' is in 'two\.safetensors'; it is not there"):
        read(tmp_path)
    index_of(tmp_path, {"a": "../one.safetensors"})
    with pytest.raises(CheckpointCorrupt, match="no file of the folder"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointCorrupt, match="not an index"):
        read(tmp_path)


def test_several_indices_are_ambiguous_but_for_the_models(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    index_of(tmp_path, {"a": "one.safetensors"}, "ema")
    assert len(read(tmp_path).index.tensors) == 1
    index_of(tmp_path, {"a": "gone.safetensors"}, "other")
    with pytest.raises(CheckpointUnsupported, match="several indices"):
        read(tmp_path)
    index_of(tmp_path, {"a": "one.safetensors"})
    assert len(read(tmp_path).index.tensors) == 1


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"no .*safetensors files"):
        read(tmp_path)


def made(folder: Path, header: Any, nbytes: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * nbytes
    (folder / "x.safetensors").write_bytes(data)
    return folder


def entry(first: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - first] if shape is None else shape, "data_offsets": [first, end]}


@pytest.mark.parametrize(
    ("header", "nbytes", "error"),
    [
        pytest.param({"a": entry(0, 4), "b": entry(2, 6)}, 6, "overlaps", id="overlap"),
        pytest.param({"a": entry(0, 4), "b": entry(5, 6)}, 6, "gap", id="gap"),
        pytest.param({"a": entry(0, 4)}, 3, "ends behind the file", id="truncated"),
        pytest.param({"a": entry(0, 4)}, 5, "its last tensor ends", id="longer"),
        pytest.param({"a": entry(0, 4, shape=[5])}, 4, "5 are needed", id="shape"),
        pytest.param({"a": entry(0, 4, "F32", [2])}, 4, "8 are needed", id="dtype"),
        pytest.param({"a": entry(0, 4, shape=[-4])}, 4, "negative", id="negative"),
        pytest.param({"a": entry(-4, 0)}, 4, "overlaps|gap", id="before the start"),
        pytest.param({"a": entry(0, 2**62, shape=[2**62])}, 4, "behind the file", id="huge"),
        pytest.param({"a": {"dtype": "U8"}}, 4, "not that of a safetensors file", id="incomplete"),
        pytest.param(b"{", 4, "not that of a safetensors file", id="not json"),
        pytest.param(b'{"\xff":1}', 4, "not that of a safetensors file", id="not utf-8"),
        pytest.param(b"[" * 100_000, 4, "not that of a safetensors file", id="deep"),
    ],
)
def test_a_header_that_cannot_be_is_corrupt(tmp_path: Path, header: Any, nbytes: int, error: str) -> None:
    with pytest.raises(CheckpointCorrupt, match=error):
        read(made(tmp_path, header, nbytes))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200_000_000, 500])
def test_the_headers_length_is_checked_before_memory_is_taken(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointCorrupt, match=f"a header of {length}"):
        read(made(tmp_path, {"a": entry(0, 4)}, 0, length=length))


def test_a_type_that_is_not_known_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnsupported, match="'a' is of type F4; known: BF16"):
        read(made(tmp_path, {"a": entry(0, 4, "F4", [8])}, 4))


def test_a_wrong_bit_in_a_header_is_an_error_or_another_header(tmp_path: Path) -> None:
    save_file({"a": A, "b.running_mean": A.clone(), "c": B}, tmp_path / "x.safetensors")
    good = (tmp_path / "x.safetensors").read_bytes()
    seed = random.randrange(2**32)
    source = random.Random(seed)
    refused = 0
    for at in range(len(good) - 80):
        bad = bytearray(good)
        bad[at] ^= 1 << source.randrange(8)
        (tmp_path / "x.safetensors").write_bytes(bad)
        try:
            read(tmp_path).index.validate()
        except CheckpointError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"bit of byte {at}, seed {seed}: {error!r}") from error
    assert refused > 100


def test_names_can_be_changed_and_name_bar_kind_is_taken_apart(tmp_path: Path) -> None:
    save_file({"old.a": A, "old.a|exp_avg": A.clone()}, tmp_path / "x.safetensors")

    foreign = read(tmp_path, names=[(r"^old\.", "")])

    assert {m.key for m in foreign.index.tensors} == {("a", "param"), ("a", "exp_avg")}
    with pytest.raises(CheckpointUnsupported, match="both 'same'"):
        read(tmp_path, names=[("^.*$", "same")])

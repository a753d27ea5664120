"""Imports and exports end to end: bits, memory, refusals, and stock torch as the other side."""

import io
import json
import math
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointExists,
    CheckpointUnsupported,
)
from everstep.storage.formats import convert
from everstep.storage.formats.archive import archive
from everstep.storage.formats.convert import export_checkpoint, import_checkpoint
from everstep.storage.index import ITEMSIZE_BYTES

DATA = Path(__file__).parents[3] / "data" / "dcp"
TENSORS = {
    "embed.weight": torch.randn(50, 7),
    "head.weight": torch.randn(9, 50, dtype=torch.float64),
    "norm.running_mean": torch.randn(7),
    "norm.num_batches_tracked": torch.tensor(12),
    "half.weight": torch.randn(3, 5).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
    "mask": torch.tensor([True, False, True]),
}
STATES = {"embed.weight|exp_avg": torch.randn(50, 7), "embed.weight|step": torch.tensor(4.0)}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def run_url(folder: Path) -> str:
    return str(folder / "to" / "job" / "run")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    save_file(TENSORS | STATES, path / "model.safetensors")
    return path


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Checkpoint:
    return import_checkpoint("safetensors", str(source), run_url(tmp_path), step=4)


@pytest.fixture
def trained(tmp_path: Path) -> Checkpoint:
    return import_checkpoint("dcp", str(DATA / "checkpoint"), run_url(tmp_path))


# --- import


def test_an_import_is_a_checkpoint_like_any_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert Path(checkpoint.url) == Path(run_url(tmp_path)) / "step-4.epoch-0.attempt-0"
    opened = Checkpoint.open(run_url(tmp_path))
    opened.verify()
    for key, tensor in (TENSORS | STATES).items():
        name, _, kind = key.partition("|")
        kind = kind or ("buffer" if "running" in name or name.endswith(("tracked", "mask")) else "param")
        assert equal(opened.read(name, kind), tensor), key
    assert opened.manifest.origin["files"] == {
        "model.safetensors": (tmp_path / "source/model.safetensors").stat().st_size
    }
    assert opened.manifest.spec == {}


def test_each_import_into_a_run_is_a_new_attempt(source: Path, tmp_path: Path) -> None:
    first, second = (import_checkpoint("safetensors", str(source), run_url(tmp_path), step=4) for _ in range(2))

    assert [first.folder.name, second.folder.name] == ["step-4.epoch-0.attempt-0", "step-4.epoch-0.attempt-1"]


def test_a_checkpoints_own_name_is_used_as_it_is(source: Path, tmp_path: Path) -> None:
    url = f"{run_url(tmp_path)}/step-4.epoch-2.attempt-1"
    made = import_checkpoint("safetensors", str(source), url)

    assert made.manifest.name == made.manifest.name.parse("step-4.epoch-2.attempt-1")
    assert (made.manifest.job, made.manifest.run) == ("job", "run")
    before = sorted(path.read_bytes() for path in Path(url).iterdir())
    with pytest.raises(CheckpointExists, match="names are never used twice"):
        import_checkpoint("safetensors", str(source), url)
    assert sorted(path.read_bytes() for path in Path(url).iterdir()) == before
    with pytest.raises(CheckpointUnsupported, match="is for step 5, the source stands at step 3"):
        import_checkpoint("dcp", str(DATA / "checkpoint"), f"{run_url(tmp_path)}/step-5.epoch-0.attempt-0")


def test_job_and_run_can_be_given(source: Path, tmp_path: Path) -> None:
    made = import_checkpoint("safetensors", str(source), str(tmp_path / "to"), step=1, job="j", run="r")

    assert (made.manifest.job, made.manifest.run) == ("j", "r")


def test_a_single_file_is_a_source_too(source: Path, tmp_path: Path) -> None:
    save_file({"other": torch.ones(2)}, source / "second.safetensors")

    made = import_checkpoint("safetensors", str(source / "second.safetensors"), run_url(tmp_path))

    assert [meta.name for meta in made.index.tensors] == ["other"]


def test_links_are_followed_as_a_hugging_face_cache_needs_it(source: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(source / "model.safetensors")

    assert len(import_checkpoint("safetensors", str(linked), run_url(tmp_path)).index.tensors) == 10


def test_files_and_fragments_are_cut_to_size(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_FRAGMENT_BYTES", 300)

    made = import_checkpoint("safetensors", str(source), run_url(tmp_path), file_bytes=3000)

    made.verify()
    assert len(made.manifest.files) == 3
    metas = made.index.metas()
    assert max((f.stop - f.start) * metas[f.key].itemsize for f in made.index.fragments) <= 300
    assert {f.source.locator for f in made.index.fragments if f.name == "head.weight"} == {"import-00001.safetensors"}
    for meta in made.index.tensors:
        key = meta.name if f"{meta.name}|{meta.kind}" not in STATES else f"{meta.name}|{meta.kind}"
        assert equal(made.read(*meta.key), (TENSORS | STATES)[key])


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.mkdir()
    big = {"a": torch.randn(1500, 4097), "b": torch.randn(3, 2_000_001), "c": torch.randn(1000)}
    save_file(big, path / "model.safetensors")
    told: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        made = import_checkpoint(
            "safetensors", str(path), run_url(tmp_path), memory_bytes=16 << 20,
            progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 20 << 20
    assert told == sorted(told)
    assert told[-1] == (48_586_012, 48_586_012) == (sum(t.nbytes for t in big.values()),) * 2
    for name, tensor in big.items():
        assert equal(made.read(name), tensor)


def test_a_source_that_changes_meanwhile_is_an_error_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def grow(done: int, total: int) -> None:
        with open(source / "model.safetensors", "ab") as file:
            file.write(b"more")

    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: changed while it was read"):
        import_checkpoint("safetensors", str(source), run_url(tmp_path), progress=grow)
    assert not list(Path(run_url(tmp_path)).iterdir())


def test_a_source_that_is_cut_off_meanwhile_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.mkdir()
    save_file({f"t{n}": torch.zeros(4 << 20, dtype=torch.uint8) for n in range(8)}, path / "model.safetensors")

    def cut(done: int, total: int) -> None:
        with open(path / "model.safetensors", "r+b") as file:
            file.truncate(12 << 20)

    with pytest.raises(CheckpointCorrupt, match="changed while it was read"):
        import_checkpoint(
            "safetensors", str(path), run_url(tmp_path), memory_bytes=4 << 20, file_bytes=4 << 20, progress=cut
        )
    assert not list(Path(run_url(tmp_path)).iterdir())


def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint("safetensors", str(source), run_url(tmp_path), progress=interrupt)
    assert not list(Path(run_url(tmp_path)).iterdir())


def test_options_that_a_format_does_not_have_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnsupported, match="no option patterns; it has file, names"):
        import_checkpoint("safetensors", str(source), run_url(tmp_path), patterns={})
    with pytest.raises(
        CheckpointUnsupported, match="'gguf' cannot be read; dcp, deepspeed, megatron, safetensors can"
    ):
        import_checkpoint("gguf", str(source), run_url(tmp_path))
    with pytest.raises(CheckpointUnsupported, match="step -1 is negative"):
        import_checkpoint("safetensors", str(source), run_url(tmp_path), step=-1)
    assert not (tmp_path / "to").exists()


def test_an_import_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from everstep.storage.formats.convert import import_checkpoint as run;"
        f"run('dcp', {str(DATA / 'checkpoint')!r}, {run_url(tmp_path)!r}).verify(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- export: safetensors


def test_an_exported_model_is_what_the_library_reads(checkpoint: Checkpoint, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    checkpoint.export("safetensors", str(tmp_path / "out"), progress=lambda *now: told.append(now))

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == TENSORS.keys()
    assert all(equal(got[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_shards_have_an_index_that_says_where_everything_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.export("safetensors", str(tmp_path / "out"), shard_bytes=2000)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, file in index["weight_map"].items():  # as transformers loads it
        assert equal(load_file(tmp_path / "out" / file)[name], TENSORS[name])


def test_everything_survives_out_and_in_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kinds = ("param", "buffer", "exp_avg", "step")
    checkpoint.export("safetensors", str(tmp_path / "out"), shard_bytes=500, kinds=kinds)

    again = import_checkpoint("safetensors", str(tmp_path / "out"), run_url(tmp_path), step=4)

    assert again.state_sha256() == checkpoint.state_sha256()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cast_is_torchs(checkpoint: Checkpoint, tmp_path: Path, dtype: str) -> None:
    checkpoint.export("safetensors", str(tmp_path / "out"), dtype=dtype)

    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in TENSORS.items():
        assert equal(got[name], tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)


def test_a_value_that_a_cast_would_lose_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"fine": torch.tensor([float("inf")]), "large": torch.tensor([1.0, 70000.0])}, source / "a.safetensors")
    made = import_checkpoint("safetensors", str(source), run_url(tmp_path))

    with pytest.raises(
        CheckpointUnsupported, match=r"'large' \(param\) has values up to 70000, too large for float16"
    ):
        made.export("safetensors", str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()
    made.export("safetensors", str(tmp_path / "out"), dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"kinds": ("momentum_buffer",)}, "it has buffer, exp_avg, param, step"),
        ({"shard_bytes": 0}, "at least 1"),
        ({"shards": 3}, "has no option shards; it has dtype, kinds"),
    ],
)
def test_wrong_options_are_named(checkpoint: Checkpoint, tmp_path: Path, options: dict[str, Any], error: str) -> None:
    with pytest.raises(CheckpointUnsupported, match=error):
        export_checkpoint(checkpoint, "safetensors", str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["safetensors", "dcp"])
def test_nothing_is_overwritten(checkpoint: Checkpoint, tmp_path: Path, format: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")

    with pytest.raises(CheckpointExists, match="is not empty"):
        checkpoint.export(format, str(tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("format", ["safetensors", "dcp"])
def test_a_damaged_checkpoint_is_not_exported(checkpoint: Checkpoint, tmp_path: Path, format: str) -> None:
    path = Path(checkpoint.url) / checkpoint.manifest.files[0].name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointCorrupt, match=path.name):
        checkpoint.export(format, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- export: DCP


@pytest.mark.parametrize("shape", [(), (0,), (70,), (5, 6), (2, 1, 40_000)])
@pytest.mark.parametrize("dtype", ITEMSIZE_BYTES)
def test_an_archive_is_what_torch_and_zip_read(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).to(getattr(torch, dtype)).reshape(shape)
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    made = archive(dtype, shape)

    data = made.head + raw + made.tail(zlib.crc32(raw))

    assert len(data) == made.total
    assert len(made.head) % 64 == 0
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert equal(torch.load(io.BytesIO(data), weights_only=True), tensor)


def truth() -> dict[str, torch.Tensor]:
    return load_file(DATA / "truth.safetensors")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_torch_loads_an_export_into_a_plain_model(trained: Checkpoint, tmp_path: Path) -> None:
    trained.export("dcp", str(tmp_path / "out"))
    expected = {name: tensor for name, tensor in truth().items() if "|" not in name}
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}

    torch_dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)

    assert all(equal(state["model"][name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_type_and_form_is_read_by_stock_torch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.export("dcp", str(tmp_path / "out"), model_prefix="", chunk_bytes=128, file_bytes=1500)
    state = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}

    torch_dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)

    assert all(equal(state[name], tensor) for name, tensor in TENSORS.items())
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 3


def test_stock_torch_resumes_an_export_under_fsdp2_on_two_ranks(trained: Checkpoint, tmp_path: Path) -> None:
    names = [meta.name for meta in trained.index.tensors if meta.kind == "param"]
    group = {
        "lr": 0.25, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False,
        "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
        "params": names,
    }  # fmt: skip
    trained.export("dcp", str(tmp_path / "with"), param_groups=[group])
    trained.export("dcp", str(tmp_path / "without"))
    both = [str(tmp_path / name) for name in ("with", "with.out", "without", "without.out")]

    done = subprocess.run(
        [sys.executable, str(DATA / "load.py"), "2", *both], capture_output=True, text=True, timeout=150, check=False
    )

    assert done.returncode == 0, done.stderr
    expected = truth()
    for name in ("with.out", "without.out"):
        got = load_file(tmp_path / name)
        assert got.keys() == expected.keys()
        assert all(equal(got[name], tensor) for name, tensor in expected.items())


def test_an_export_to_dcp_comes_back_unchanged(trained: Checkpoint, tmp_path: Path) -> None:
    trained.export("dcp", str(tmp_path / "out"), chunk_bytes=777, file_bytes=9000, param_groups=[{"lr": 0.1}])

    again = import_checkpoint("dcp", str(tmp_path / "out"), run_url(tmp_path))

    assert again.state_sha256() == trained.state_sha256()
    assert len(again.manifest.origin["ignored"]) == 2  # lr, and the params that were added


def test_python_numbers_stay_python_numbers(tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(3)}, "optim": {"state": {"a": {"step": 5, "mu": 0.5, "on": True}}}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        torch_dcp.save(state, checkpoint_id=tmp_path / "first", no_dist=True)
    made = import_checkpoint("dcp", str(tmp_path / "first"), run_url(tmp_path))
    made.export("dcp", str(tmp_path / "second"))

    other: dict[str, Any] = {
        "model": {"a": torch.zeros(3)},
        "optim": {"state": {"a": {"step": 0, "mu": 0.0, "on": None}}},
    }
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        torch_dcp.load(other, checkpoint_id=tmp_path / "second", no_dist=True)

    assert other["optim"] == state["optim"]
    assert type(other["optim"]["state"]["a"]["step"]) is int


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"chunk_bytes": 0}, "chunk_bytes 0"),
        ({"param_groups": [{"lr": torch.ones(1)}]}, "is no plain value"),
        ({"param_groups": [{}, {}]}, "each needs its params"),
        ({"kinds": ("x",)}, "no tensors of kind x"),
        ({"model_prefix": "optim.state.", "optim_prefix": "optim."}, None),
    ],
)
def test_wrong_options_of_dcp_are_named(
    trained: Checkpoint, tmp_path: Path, options: dict[str, Any], error: str | None
) -> None:
    if error is None:
        trained.export("dcp", str(tmp_path / "out"), **options)
        return
    with pytest.raises(CheckpointError, match=error):
        trained.export("dcp", str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()

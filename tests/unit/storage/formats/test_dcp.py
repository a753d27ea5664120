"""DCP checkpoints: what stock torch wrote is read bit for bit, and what is not right is named."""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsupported,
)
from everstep.storage.formats import dcp
from everstep.storage.formats.foreign import Foreign
from everstep.storage.stores.opening import folder_at

STORED = Path(__file__).parents[3] / "data" / "dcp"
Chunks = Sequence[tuple[tuple[int, ...], torch.Tensor]]


class Written:
    """A DCP folder, of chunks as some layout would cut them, in torch's own classes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = Metadata({}, {}, {})
        self.files: dict[str, bytes] = {}

    def add(self, key: str, shape: Sequence[int], chunks: Chunks, *, old: bool = False, **info: Any) -> None:
        cut = [ChunkStorageMetadata(torch.Size(at), tensor.shape) for at, tensor in chunks]
        properties = (OldProperties if old else TensorProperties)(dtype=chunks[0][1].dtype)
        self.metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, torch.Size(shape), cut)
        for number, (at, tensor) in enumerate(chunks):
            self._put(MetadataIndex(key, torch.Size(at), number), tensor, f"__{number}_0.distcp", **info)

    def value(self, key: str, value: Any) -> None:
        self.metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self._put(MetadataIndex(key), value, "__0_0.distcp")

    def whole(self, **tensors: torch.Tensor) -> None:
        for key, tensor in tensors.items():
            self.add(key.replace("__", "."), tensor.shape, [((0,) * tensor.dim(), tensor)])

    def _put(self, index: MetadataIndex, value: Any, file: str, **info: Any) -> None:
        data = io.BytesIO()
        torch.save(value, data)
        before = self.files.get(file, b"")
        place = _StorageInfo(file, len(before), len(data.getvalue()), **info)
        self.metadata.storage_data[index] = place
        self.files[file] = before + data.getvalue()

    def finish(self) -> Path:
        self.path.mkdir(exist_ok=True)
        for name, data in self.files.items():
            (self.path / name).write_bytes(data)
        (self.path / ".metadata").write_bytes(pickle.dumps(self.metadata))
        return self.path

    def read(self, **options: Any) -> Foreign:
        return dcp.read(folder_at(self.finish()), **options)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path / "dcp")


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., Checkpoint]:
    def run(src: Path, **options: Any) -> Checkpoint:
        return Checkpoint.import_from("dcp", str(src), str(tmp_path / "to" / "job" / "run"), **options)

    return run


def assert_equal(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """`tensors`: NAME or NAME|KIND, and nothing else."""
    keys = {key.partition("|")[::2] for key in tensors}
    assert {(name, kind or "param") for name, kind in keys} == set(checkpoint.index.metas())
    for key, tensor in tensors.items():
        name, _, kind = key.partition("|")
        got = checkpoint.read(name, kind or "param")
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def test_what_stock_torch_wrote_under_fsdp2_on_two_ranks_is_imported_bit_for_bit(
    imported: Callable[..., Checkpoint],
) -> None:
    checkpoint = imported(STORED / "checkpoint")

    checkpoint.verify()
    assert checkpoint.manifest.step == 3
    assert (checkpoint.manifest.job, checkpoint.manifest.run) == ("job", "run")
    assert_equal(checkpoint, load_file(STORED / "truth.safetensors"))
    origin = checkpoint.manifest.origin
    assert origin["format"] == "dcp"
    assert set(origin["files"]) == {"__0_0.distcp", "__1_0.distcp"}
    assert all("param_groups" in name for name in origin["ignored"])
    assert len(origin["ignored"]) == 12


def test_the_stored_checkpoint_is_cut_over_both_ranks() -> None:
    foreign = dcp.read(folder_at(STORED / "checkpoint"))

    files = {f.source.locator for f in foreign.index.fragments if (f.name, f.kind) == ("0.weight", "exp_avg")}
    assert files == {"__0_0.distcp", "__1_0.distcp"}


def test_chunks_may_be_any_boxes(written: Written, imported: Callable[..., Checkpoint]) -> None:
    grid = torch.randn(6, 7)
    cuts = [((r, c), grid[r : r + h, c : c + w]) for r, h in ((0, 4), (4, 2)) for c, w in ((0, 3), (3, 4))]
    cube = torch.randn(3, 4, 5)
    written.add("grid", grid.shape, [(at, part.clone()) for at, part in cuts])
    written.add("cube", cube.shape, [((0, 0, 0), cube[:, :2].contiguous()), ((0, 2, 0), cube[:, 2:].contiguous())])
    written.add("turned", (7, 6), [((0, 0), grid.t())])  # saved with its strides
    written.add("old", (5,), [((0,), grid.flatten()[:2].clone()), ((2,), grid.flatten()[2:5].clone())], old=True)
    written.add("empty", (0, 3), [((0, 0), torch.zeros(0, 3))])
    written.add("half", (2, 2), [((0, 0), torch.tensor([[1.5, 2], [3, 4]], dtype=torch.bfloat16))])

    checkpoint = imported(written.finish())

    assert_equal(
        checkpoint,
        {
            "grid": grid, "cube": cube, "turned": grid.t().contiguous(), "old": grid.flatten()[:5],
            "empty": torch.zeros(0, 3), "half": torch.tensor([[1.5, 2], [3, 4]], dtype=torch.bfloat16),
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.layer.weight", ("layer.weight", "param")),
        ("module.layer.weight", ("layer.weight", "param")),
        ("app.model.module.layer.weight", ("layer.weight", "param")),
        ("layer.weight", ("layer.weight", "param")),
        ("model._orig_mod.layer._checkpoint_wrapped_module.weight", ("layer.weight", "param")),
        ("model.norm.running_mean", ("norm.running_mean", "buffer")),
        ("model.remodel.weight", ("remodel.weight", "param")),
    ],
)
def test_prefixes_and_wrappers_are_no_part_of_a_name(written: Written, key: str, expected: tuple[str, str]) -> None:
    written.add(key, (2,), [((0,), torch.ones(2))])

    assert [meta.key for meta in written.read().index.tensors] == [expected]


@pytest.mark.parametrize(
    "key",
    [
        "optim.state.a.b.exp_avg",
        "optimizer.state.a.b.exp_avg",
        "optimizer.0.state.module.a.b.exp_avg",
        "app.optim.state.a.b.exp_avg",
        "optim.a.b.exp_avg",
    ],
)
def test_the_optimizers_state_belongs_to_its_parameter(written: Written, key: str) -> None:
    written.whole(model__a__b=torch.ones(2))
    written.add(key, (2,), [((0,), torch.ones(2))])

    assert {meta.key for meta in written.read().index.tensors} == {("a.b", "param"), ("a.b", "exp_avg")}


def test_state_of_no_parameter_is_ignored_and_listed(written: Written) -> None:
    written.whole(model__a=torch.ones(2), optim__state__0__exp_avg=torch.ones(2))
    written.value("optim.param_groups.0.lr", 0.1)
    written.value("epoch", 3)

    foreign = written.read()

    assert [meta.key for meta in foreign.index.tensors] == [("a", "param")]
    assert [text.partition(" (")[0] for text in foreign.ignored] == [
        "optim.state.0.exp_avg", "optim.param_groups.0.lr", "epoch",
    ]  # fmt: skip
    assert "give step=" in foreign.notes[0]


def test_rules_rename_and_say_the_kind(written: Written) -> None:
    written.whole(model__a=torch.ones(2), optim__state__0__exp_avg=torch.ones(2), ema__a=torch.ones(2))

    foreign = written.read(names=[(r"optim\.state\.0\.", "optim.state.a."), (r"^ema\.(.*)$", r"\1|ema")])

    assert {meta.key for meta in foreign.index.tensors} == {("a", "param"), ("a", "exp_avg"), ("a", "ema")}
    with pytest.raises(CheckpointUnsupported, match="'nothing' fit no name"):
        written.read(names=[("nothing", "")])
    with pytest.raises(CheckpointUnsupported, match="is no rule"):
        written.read(names=[("(", "")])
    with pytest.raises(CheckpointUnsupported, match=r"'model\.a' and 'ema\.a' are both 'a'"):
        written.read(names=[(r"^ema\.", "model.")])


def test_a_python_step_is_kept_as_a_number(written: Written, imported: Callable[..., Checkpoint]) -> None:
    written.whole(model__a=torch.ones(2))
    written.value("optim.state.a.step", 7)
    written.value("optim.state.a.mu", 0.25)
    written.value("optim.state.a.note", "text")

    checkpoint = imported(written.finish())

    assert checkpoint.manifest.step == 7
    assert checkpoint.index.metas()["a", "step"].python
    assert_equal(checkpoint, {"a": torch.ones(2), "a|step": torch.tensor(7), "a|mu": torch.tensor(0.25).double()})
    assert checkpoint.manifest.origin["ignored"] == ["optim.state.a.note (a str, no tensor)"]


def test_the_training_step_is_the_optimizers(written: Written) -> None:
    written.whole(model__a=torch.ones(2), model__b=torch.ones(2), optim__state__a__step=torch.tensor(5.0))
    assert written.read().index.step == 5
    assert written.read(step=9).index.step == 9
    written.whole(optim__state__b__step=torch.tensor(4.0))

    foreign = written.read()

    assert foreign.index.step == 5
    assert "(4, 5)" in foreign.notes[0]


def test_what_is_missing_is_named(written: Written, imported: Callable[..., Checkpoint]) -> None:
    path = written.path
    with pytest.raises(CheckpointNotFound, match="there is nothing"):
        imported(path)
    path.mkdir()
    with pytest.raises(CheckpointNotFound, match=r"no \.metadata"):
        dcp.read(folder_at(path))
    (path / "__0.metadata").write_bytes(b"")
    with pytest.raises(CheckpointUnsupported, match="use_collectives=True"):
        dcp.read(folder_at(path))
    written.add("a", (6,), [((0,), torch.ones(2)), ((3,), torch.ones(3))])
    with pytest.raises(CheckpointIncomplete, match=r"elements 2:3 of 'a'"):
        imported(written.finish())
    (path / "__1_0.distcp").write_bytes(written.files["__1_0.distcp"][:-1])
    with pytest.raises(CheckpointCorrupt, match=r"__1_0\.distcp: .* 'a' ends at byte"):
        imported(path)
    (path / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"__1_0\.distcp: missing; it has 'a'"):
        imported(path)
    assert not list(path.parent.glob("to/job/run/*"))


def test_a_chunk_that_is_not_what_the_metadata_says_is_corrupt(written: Written) -> None:
    written.whole(a=torch.ones(4), b=torch.ones(4))
    places = written.metadata.storage_data
    first, second = (MetadataIndex(key, torch.Size([0])) for key in "ab")
    written.metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([3])
    with pytest.raises(CheckpointCorrupt, match=r"float32\[4\] of 'a' instead of float32\[3\]"):
        written.read()
    written.metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([4])
    places[first].offset += 1
    with pytest.raises(CheckpointCorrupt):
        written.read()
    places[first].offset -= 1
    del places[second]
    with pytest.raises(CheckpointCorrupt, match="does not say where the chunk of 'b'"):
        written.read()


def test_a_path_out_of_the_folder_is_refused(written: Written, tmp_path: Path) -> None:
    written.whole(a=torch.ones(4))
    place = written.metadata.storage_data[MetadataIndex("a", torch.Size([0]))]
    (tmp_path / "elsewhere").write_bytes(written.files["__0_0.distcp"])
    for path in ("../elsewhere", str(tmp_path / "elsewhere"), "x/../../elsewhere"):
        place.relative_path = path
        with pytest.raises(CheckpointCorrupt, match="no file of the folder"):
            written.read()


def test_a_tensor_whose_elements_share_memory_is_refused(
    written: Written, imported: Callable[..., Checkpoint]
) -> None:
    written.add("one", (1, 4), [((0, 0), torch.arange(8.0)[::2].expand(1, 4))])
    assert_equal(imported(written.finish()), {"one": torch.tensor([[0.0, 2, 4, 6]])})
    written.add("wide", (3, 4), [((0, 0), torch.ones(4).expand(3, 4))])
    with pytest.raises(CheckpointUnsupported, match=r"'wide' \(param\) was expanded"):
        written.read()


def test_extensions_are_refused(written: Written) -> None:
    written.add("a", (2,), [((0,), torch.ones(2))], transform_descriptors=["zstd"])

    with pytest.raises(CheckpointUnsupported, match="compression"):
        written.read()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_the_metadata_or_in_a_value_is_run(written: Written, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    written.whole(model__a=torch.ones(2))
    written.value("optim.state.a.step", _Evil(ran))
    assert any("step (holds what is not read)" in text for text in written.read().ignored)
    written.metadata.planner_data = _Evil(ran)
    with pytest.raises(CheckpointUnsupported, match="refuses to build"):
        written.read()
    assert not ran.exists()


@pytest.mark.parametrize("value", [[1], {"storage_data": 1}, None, "text"])
def test_a_metadata_of_another_shape_is_corrupt(written: Written, value: Any) -> None:
    written.finish()
    (written.path / ".metadata").write_bytes(pickle.dumps(value))

    with pytest.raises(CheckpointCorrupt, match=r"\.metadata: its entries"):
        dcp.read(folder_at(written.path))

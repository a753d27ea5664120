"""DeepSpeed's checkpoints, as it wrote them (tests/data/deepspeed/make.py): every tensor bit by bit, and mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointUnsupported,
)
from everstep.storage.formats import deepspeed
from everstep.storage.formats.convert import import_checkpoint
from everstep.storage.formats.deepspeed_flat import cut_groups, even_groups, split
from everstep.storage.formats.foreign import Foreign
from everstep.storage.formats.saved import StoredTensor
from everstep.storage.planner import Want, plan
from everstep.storage.reader import read_copies
from everstep.storage.stores.opening import folder_at

DATA = Path(__file__).parents[3] / "data" / "deepspeed"
VARIANTS = sorted(folder.name for folder in DATA.iterdir() if (folder / "truth.safetensors").exists())


def damaged(file: str, first: int, end: int) -> Exception:
    return AssertionError(f"{file} {first}:{end}")


def contents(src: Path, foreign: Foreign) -> dict[str, bytes]:
    """Every tensor's bytes by NAME|KIND, through the planner and the reader."""
    wants = [Want(m.name, m.kind, 0, m.numel, "me") for m in foreign.index.tensors if m.key not in foreign.inline]
    metas = foreign.index.metas()
    memory = {(w.name, w.kind): bytearray(metas[w.name, w.kind].nbytes) for w in wants}
    targets = []
    for copy in plan(foreign.index, wants, lambda source, want: 0):
        whole = memoryview(memory[copy.name, copy.kind])
        first = copy.start * copy.itemsize
        targets.append((copy, whole[first : first + copy.nbytes] if copy.region is None else whole))
    files = {fragment.source.locator: None for fragment in foreign.index.fragments}
    read_copies(folder_at(src), files, targets, damaged=damaged)
    found = {**memory, **foreign.inline}
    return {f"{name}|{kind}": bytes(data) for (name, kind), data in found.items()}


def truth(folder: Path) -> dict[str, bytes]:
    raw = (folder / "truth.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:end])
    return {name: raw[end + e["data_offsets"][0] : end + e["data_offsets"][1]] for name, e in entries.items()}


def copied(tmp_path: Path, variant: str) -> tuple[Path, Path]:
    """A run's folder that a test may spoil, and its checkpoint's."""
    shutil.copytree(DATA / variant, tmp_path / variant)
    tag = next(path for path in (tmp_path / variant).iterdir() if path.is_dir())
    return tmp_path / variant, tag


def edited(path: Path, change) -> None:
    """Load with torch, change, save: classes of DeepSpeed are taken out, since it is not installed here."""
    from everstep.storage.formats.saved import read_saved
    from everstep.storage.formats.unpickle import StandIn

    tree = read_saved(folder_at(path.parent), path.name, allow={"deepspeed.*": True})
    raw = path.read_bytes()

    def plain(value):
        if isinstance(value, StoredTensor):
            data = bytearray(raw[value.offset : value.offset + value.nbytes])
            dtype = getattr(torch, value.dtype)
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return flat.reshape(value.shape)
        if isinstance(value, StandIn):
            return value.args[0] if value.args else None
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    tree = plain(tree)
    change(tree)
    torch.save(tree, path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_what_deepspeed_gathers(variant):
    foreign = deepspeed.read(folder_at(DATA / variant))
    assert contents(DATA / variant, foreign) == truth(DATA / variant)
    assert foreign.index.step == 3
    assert foreign.tied == {"head.weight": "embed.weight"}
    kinds = {meta.kind for meta in foreign.index.tensors if meta.name == "up.weight"}
    assert kinds == ({"param", "momentum_buffer"} if "sgd" in variant else {"param", "exp_avg", "exp_avg_sq", "step"})
    assert {m.name for m in foreign.index.tensors if m.kind == "buffer"} == {"scale", "seen"}
    assert any("weight_decay" in note for note in foreign.notes)


def test_nothing_is_copied_and_flat_ranges_point_into_the_files():
    foreign = deepspeed.read(folder_at(DATA / "zero2"))
    assert all(not f.box and not f.strides for f in foreign.index.fragments)
    assert foreign.index.missing() == [] or {m[1] for m in foreign.index.missing()} == {"step"}


def test_a_tag_may_be_named_and_so_may_its_own_folder(tmp_path):
    run, tag = copied(tmp_path, "zero2")
    expected = truth(run)
    tag = tag.rename(run / "best")
    with pytest.raises(CheckpointNotFound, match="global_step3"):
        deepspeed.read(folder_at(run))
    assert contents(run, deepspeed.read(folder_at(run), tag="best")) == expected
    assert contents(tag, deepspeed.read(folder_at(tag))) == expected
    assert deepspeed.read(folder_at(tag), step=7).index.step == 7
    (run / "latest").unlink()
    with pytest.raises(CheckpointNotFound, match=r"tag.*best"):
        deepspeed.read(folder_at(run))
    for bad in ("..", "best/..", "", "none"):
        with pytest.raises(CheckpointNotFound, match="tag"):
            deepspeed.read(folder_at(run), tag=bad)


@pytest.mark.parametrize("variant", ["zero2", "zero3"])
def test_missing_and_surplus_ranks_are_named(tmp_path, variant):
    run, tag = copied(tmp_path, variant)
    optim = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    surplus = tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    shutil.copy(optim, surplus)
    with pytest.raises(CheckpointIncomplete, match=r"another save: zero_pp_rank_2_mp_rank_00_optim_states\.pt"):
        deepspeed.read(folder_at(run))
    surplus.unlink()
    optim.unlink()
    with pytest.raises(CheckpointIncomplete, match=r"missing: zero_pp_rank_1_mp_rank_00_optim_states\.pt"):
        deepspeed.read(folder_at(run))


def test_a_missing_model_file_of_stage_3_is_named(tmp_path):
    run, tag = copied(tmp_path, "zero3")
    (tag / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"missing: zero_pp_rank_1_mp_rank_00_model_states\.pt"):
        deepspeed.read(folder_at(run))


@pytest.mark.parametrize("variant", ["zero1", "zero3"])
def test_files_of_different_steps_are_refused(tmp_path, variant):
    run, tag = copied(tmp_path, variant)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def later(tree):
        held = tree["optimizer_state_dict"]
        held["optimizer_state_dict" if variant == "zero3" else "base_optimizer_state"]["state"][1]["step"] += 1

    edited(tag / name, later)
    with pytest.raises(CheckpointCorrupt, match=r"step of group 1.*different saves") as caught:
        deepspeed.read(folder_at(run))
    assert caught.value.file.endswith(name)


def test_models_of_different_steps_are_refused(tmp_path):
    run, tag = copied(tmp_path, "zero3")
    edited(tag / "zero_pp_rank_1_mp_rank_00_model_states.pt", lambda tree: tree.update(global_steps=4))
    with pytest.raises(CheckpointCorrupt, match=r"global_steps is 4.*zero_pp_rank_0.*3"):
        deepspeed.read(folder_at(run))


@pytest.mark.parametrize("variant", ["zero2-sgd", "zero1-bf16"])
def test_weights_of_another_save_are_seen_without_a_step(tmp_path, variant):
    run, tag = copied(tmp_path, variant)
    name = next(tag.glob("*rank_1_mp_rank_00_optim_states.pt"))

    def later(tree):
        for flat in tree["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
            flat += 0.1

    edited(name, later)
    with pytest.raises(CheckpointCorrupt, match="different saves") as caught:
        deepspeed.read(folder_at(run))
    assert caught.value.file.endswith(name.name)
    assert caught.value.tensor
    deepspeed.read(folder_at(run), compare_weights=False)


def test_lengths_that_do_not_fit_the_shapes_are_refused(tmp_path):
    run, tag = copied(tmp_path, "zero2")

    def shorter(tree):
        groups = tree["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        groups[0] = groups[0][:-1].clone()

    edited(tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt", shorter)
    with pytest.raises(CheckpointCorrupt, match="partition"):
        deepspeed.read(folder_at(run))

    def told_as_padding(tree):
        tree["optimizer_state_dict"]["group_paddings"][0] = 1

    edited(tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt", told_as_padding)
    with pytest.raises(CheckpointCorrupt, match="flat group 0 has 123 elements"):
        deepspeed.read(folder_at(run))


def test_state_that_is_not_element_wise_is_left_out_by_name(tmp_path):
    run, tag = copied(tmp_path, "zero2")
    for name in sorted(tag.glob("*optim_states.pt")):

        def factored(tree):
            for state in tree["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
                state["row_means"] = torch.zeros(3)
                state["decay"] = 0.5

        edited(name, factored)
    foreign = deepspeed.read(folder_at(run))
    assert any("row_means of optimizer group 1" in text for text in foreign.ignored)
    metas = foreign.index.metas()
    assert metas["up.weight", "decay"].python
    assert np.frombuffer(foreign.inline["up.weight", "decay"], np.float64) == 0.5
    assert ("up.weight", "row_means") not in metas


def test_what_else_the_files_hold_is_ignored_by_name_or_refused(tmp_path):
    run, tag = copied(tmp_path, "zero2")
    edited(tag / "mp_rank_00_model_states.pt", lambda tree: tree.update(epoch=3, lr_scheduler={"last": 1}))
    assert {"epoch (no tensor of the state)", "lr_scheduler (no tensor of the state)"} <= set(
        deepspeed.read(folder_at(run)).ignored
    )
    edited(tag / "mp_rank_00_model_states.pt", lambda tree: tree.update(mine=Path("x")))
    with pytest.raises(CheckpointUnsupported, match="pathlib"):
        deepspeed.read(folder_at(run))
    deepspeed.read(folder_at(run), opaque=("pathlib.*",))


def test_names_can_be_changed():
    foreign = deepspeed.read(folder_at(DATA / "zero3"), names=[("^up", "mlp.up")])
    assert ("mlp.up.weight", "exp_avg") in foreign.index.metas()
    foreign = deepspeed.read(folder_at(DATA / "universal"), names=[("^embed", "tokens")])
    assert foreign.tied == {"head.weight": "tokens.weight"}


def test_a_universal_folder_lacking_a_parameter_is_refused(tmp_path):
    run, tag = copied(tmp_path, "universal")
    shutil.rmtree(tag / "zero" / "up.weight")
    with pytest.raises(CheckpointIncomplete, match=r"up\.weight"):
        deepspeed.read(folder_at(run))


def test_a_universal_folder_without_weights_of_a_parameter_is_refused(tmp_path):
    run, tag = copied(tmp_path, "universal")
    (tag / "zero" / "up.weight" / "fp32.pt").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"up\.weight has no fp32\.pt"):
        deepspeed.read(folder_at(run))


def test_flat_universal_tensors_of_stage_3_get_their_shapes(tmp_path):
    run, tag = copied(tmp_path, "universal")
    edited(tag / "zero" / "up.weight" / "exp_avg.pt", lambda tree: tree.update(param=tree["param"].flatten()))
    foreign = deepspeed.read(folder_at(run))
    assert foreign.index.metas()["up.weight", "exp_avg"].shape == (11, 7)
    assert contents(run, foreign) == truth(run)
    edited(tag / "zero" / "up.weight" / "exp_avg.pt", lambda tree: tree.update(param=torch.zeros(76)))
    with pytest.raises(CheckpointCorrupt, match=r"up\.weight"):
        deepspeed.read(folder_at(run))


def test_a_kind_of_any_name_is_taken_from_a_universal_folder(tmp_path):
    run, tag = copied(tmp_path, "universal")
    torch.save({"param": torch.full((11, 7), 2.0)}, tag / "zero" / "up.weight" / "slow_average.pt")
    foreign = deepspeed.read(folder_at(run))
    assert contents(run, foreign)["up.weight|slow_average"] == np.full(77, 2, np.float32).tobytes()


def test_model_parallel_ranks_are_joined_by_patterns(tmp_path):
    """Two tensor-parallel ranks of two partitions each, in the files' own form, from one state cut by numpy."""
    generator = np.random.default_rng(3)
    full = {
        "qkv.weight": generator.standard_normal((14, 6), np.float32),  # q 8, k 3, v 3
        "down.weight": generator.standard_normal((5, 7), np.float32),
        "norm.weight": generator.standard_normal(5, np.float32),
    }
    tag = tmp_path / "global_step9"
    tag.mkdir()
    for rank in range(2):
        shards = {name: torch.from_numpy(array) for name, array in _cut(full, rank).items()}
        flat = torch.cat([tensor.reshape(-1) for tensor in shards.values()])
        size = -(-len(flat) // 4) * 2
        model = {
            "module": shards, "buffer_names": [], "shared_params": {}, "global_steps": 9, "mp_world_size": 2,
            "param_shapes": [{name: tensor.shape for name, tensor in shards.items()}],
        }  # fmt: skip
        torch.save(model, tag / f"mp_rank_{rank:02d}_model_states.pt")
        for data in range(2):
            part = flat[data * size : (data + 1) * size].clone()
            optimizer = {
                "zero_stage": 2, "partition_count": [2], "group_paddings": [size - len(part)],
                "single_partition_of_fp32_groups": [part],
                "base_optimizer_state": {"state": {0: {"exp_avg": part * 2, "step": torch.tensor(9.0)}}},
            }  # fmt: skip
            name = f"zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": optimizer}, tag / name)
    with pytest.raises(CheckpointUnsupported, match="patterns"):
        deepspeed.read(folder_at(tag))
    patterns = {
        "default": "error",
        "rules": [
            {"match": "qkv.*", "as": "parts", "widths": {"q": 8, "k": 3, "v": 3}},
            {"match": "down.*", "as": "cat", "dim": 1},
            {"match": "norm.*", "as": "replicated"},
        ],
    }
    found = contents(tag, deepspeed.read(folder_at(tag), patterns=patterns))
    for name, array in full.items():
        assert found[f"{name}|param"] == array.tobytes()
        assert found[f"{name}|exp_avg"] == (array * 2).tobytes()
        assert found[f"{name}|step"] == np.float32(9).tobytes()


def _cut(full, rank):
    q, k, v = np.split(full["qkv.weight"], [8, 11])
    own = [np.array_split(part, 2)[rank] for part in (q, k, v)]
    down = np.array_split(full["down.weight"], 2, axis=1)[rank]
    return {
        "qkv.weight": np.concatenate(own),
        "down.weight": np.ascontiguousarray(down),
        "norm.weight": full["norm.weight"],
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("lean", [True, False])
def test_even_partitions_of_any_number_of_ranks(ranks, lean):
    """Against a flat array cut by numpy; with more ranks than elements, and padding between parameters."""
    shapes = {"a": (3, 5), "none": (0, 4), "b": (7,), "c": (2, 2, 3)}
    paddings = [1, 0, 2, 0]
    total = sum(int(np.prod(s)) + p for s, p in zip(shapes.values(), paddings, strict=True))
    size = -(-total // (2 * ranks)) * 2
    held = [max(0, min(size, total - r * size)) if lean else size for r in range(ranks)]
    spare = [size - n for n in held] if lean else [0] * ranks
    tensors = [StoredTensor("float32", (n,), (1,), f"file{r}", 1000 * r) for r, n in enumerate(held)]
    group = even_groups(shapes, paddings, tensors, spare)
    position = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        covered = []
        for piece in group.pieces(name, tensors):
            rank = int(piece.file[4:])
            flat = rank * size + (piece.offset - 1000 * rank) // 4
            covered += [(flat - position + n, piece.start + n) for n in range(piece.stop - piece.start)]
        assert covered == [(n, n) for n in range(int(np.prod(shape)))]
        position += int(np.prod(shape)) + padding


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_stage_3_parts_of_any_number_of_ranks(ranks):
    shapes = {"a": (3, 5), "none": (0,), "b": (7,), "one": ()}
    group = cut_groups(shapes, ranks)
    length = group.held(0)[0]
    tensors = [StoredTensor("float32", (length,), (1,), f"file{r}", 0) for r in range(ranks)]
    for name, shape in shapes.items():
        numel = int(np.prod(shape))
        pieces = group.pieces(name, tensors)
        assert [n for p in pieces for n in range(p.start, p.stop)] == list(range(numel))
        part = -(-numel // ranks)
        assert all(p.file == f"file{p.start // part}" and p.offset == group.at[name] * 4 for p in pieces)


def test_stage_3_groups_in_several_flat_tensors():
    """Older versions list an optimizer group's parameters; its flat tensors may be several."""
    shapes = [{"a": (4,), "b": (3,), "c": (8,)}, {"d": (5,)}]
    groups = split(shapes, [2 + 2, 4, 3], 2)
    assert [list(group.shapes) for group in groups] == [["a", "b"], ["c"], ["d"]]
    assert [list(group.shapes) for group in split(shapes, [8, 3], 2)] == [["a", "b", "c"], ["d"]]
    with pytest.raises(CheckpointCorrupt):
        split(shapes, [3, 5, 3], 2)
    with pytest.raises(CheckpointCorrupt, match="'d'"):
        split(shapes, [8], 2)


def test_settings_of_the_optimizer_that_differ_tell_of_different_saves(tmp_path):
    run, tag = copied(tmp_path, "zero3-bf16-sgd")

    def later(tree):
        tree["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"][0]["lr"] /= 2

    edited(tag / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", later)
    with pytest.raises(CheckpointCorrupt, match="settings of the optimizer"):
        deepspeed.read(folder_at(run))


def test_a_lost_part_of_a_frozen_parameter_is_refused(tmp_path):
    run, tag = copied(tmp_path, "zero3")
    edited(
        tag / "zero_pp_rank_1_mp_rank_00_model_states.pt",
        lambda tree: tree["frozen_param_fragments"].pop("frozen.weight"),
    )
    with pytest.raises(CheckpointCorrupt, match=r"frozen\.weight"):
        deepspeed.read(folder_at(run))


def test_a_checkpoint_becomes_ours(tmp_path):
    """Through files of our own, verified."""
    for variant in ("zero3-subgroups", "universal"):
        made = import_checkpoint("deepspeed", str(DATA / variant), str(tmp_path / "to" / "job" / variant))
        made.verify()
        for name, data in truth(DATA / variant).items():
            assert made.read(*name.split("|")).numpy().tobytes() == data, (variant, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(param_shapes=[{"up.weight": None}]),
        lambda tree: tree.update(shared_params=[1]),
        lambda tree: tree.update(frozen_param_shapes=3),
        lambda tree: tree.update(buffer_names=7),
        lambda tree: tree.update(module=[]),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, change):
    run, tag = copied(tmp_path, "zero3")
    for rank in range(2):
        edited(tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", change)
    with pytest.raises(CheckpointError):
        deepspeed.read(folder_at(run))

"""Megatron-style shards: real torch.save files, cut by numpy here, joined by patterns there."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from everstep.storage.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointNotFound, CheckpointUnsupported
from everstep.storage.formats import megatron
from everstep.storage.formats.convert import import_checkpoint
from everstep.storage.planner import Want, plan
from everstep.storage.reader import read_copies
from everstep.storage.stores.opening import folder_at

LAYERS, ROWS, PADDED, WIDTH = 4, 13, 16, 6
PATTERNS = {
    "default": "error",
    "layers": {"match": r"language\.layers\.(?P<layer>\d+)\..*"},
    "rules": [
        {"match": r"language\.embedding", "as": "vocabulary", "rows": ROWS},
        {"match": r"language\.head", "as": "tied", "to": "embedding"},
        {
            "match": r"language\.(layers\.\d+\.qkv)",
            "as": "parts",
            "rename": r"\1",
            "widths": {"q": 8, "k": 3, "v": 3},
        },
        {"match": r"language\.(layers\.\d+\.out)", "as": "cat", "dim": 1, "rename": r"\1"},
        {"match": r"language\.(layers\.\d+\.up)", "as": "cat", "rename": r"\1"},
        {"match": r"language\.(layers\.\d+\.norm)", "as": "replicated", "rename": r"\1"},
        {"match": r"language\.layers\.\d+\.experts\.(?P<expert>\d+)\.w", "as": "experts"},
        {"match": r"language\.(layers\.\d+\.gate)", "as": "average", "rename": r"\1"},
        {"match": r".*_extra_state", "as": "ignore"},
    ],
}
PATTERNS["rules"][0]["rename"] = "embedding"


@pytest.fixture(scope="module")
def full():
    """The whole model, under the names that it has after the import."""
    draw = np.random.default_rng(11)

    def random(*shape):
        return draw.standard_normal(shape, np.float32)

    model = {"embedding": random(ROWS, WIDTH)}
    for n in range(LAYERS):
        model |= {
            f"layers.{n}.qkv": random(14, WIDTH),
            f"layers.{n}.out": random(WIDTH, 7),
            f"layers.{n}.up": random(9, WIDTH),
            f"layers.{n}.norm": random(WIDTH),
            f"layers.{n}.gate": random(3),
        }
        model |= {f"language.layers.{n}.experts.{e}.w": random(2, 3) for e in range(4)}
    return model


def shard(full, tp, pp, ranks, stages):
    """What one rank holds: an independent cutter, slices only."""
    own = {}
    padded = np.concatenate([full["embedding"], np.full((PADDED - ROWS, WIDTH), 99, np.float32)])
    rows = PADDED // ranks
    if pp == 0:
        own["embedding"] = padded[tp * rows : (tp + 1) * rows]
    if pp == stages - 1:
        own["head"] = padded[tp * rows : (tp + 1) * rows]
    per_stage = LAYERS // stages
    layers = {}
    for local in range(per_stage):
        n = pp * per_stage + local
        qkv, up = full[f"layers.{n}.qkv"], full[f"layers.{n}.up"]
        widths = {1: [(8, 3, 3)], 2: [(4, 2, 2), (4, 1, 1)]}[ranks]
        starts = [sum(w[part] for w in widths[:tp]) for part in range(3)]
        bases = (0, 8, 11)
        pieces = [qkv[bases[p] + starts[p] : bases[p] + starts[p] + widths[tp][p]] for p in range(3)]
        layers[str(local)] = {
            "qkv": np.concatenate(pieces),
            "out": full[f"layers.{n}.out"][:, 4 * tp : (4 * tp + 4 if ranks == 2 else 7)],
            "up": up[5 * tp : (5 * tp + 5 if ranks == 2 else 9)],
            "norm": full[f"layers.{n}.norm"],
            "gate": full[f"layers.{n}.gate"] + (0 if ranks == 1 else (0.5, -0.5)[tp]),
            "experts": {
                str(e): {"w": full[f"language.layers.{n}.experts.{tp * (4 // ranks) + e}.w"]}
                for e in range(4 // ranks)
            },
            "_extra_state": np.zeros(5, np.uint8),
        }
    return {"language": {**own, "layers": layers}}


def tensors(tree):
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    return torch.tensor(tree) if isinstance(tree, np.ndarray) else tree


def write(folder: Path, full, ranks, stages, change=None):
    root = folder / "iter_0000040"
    for tp in range(ranks):
        for pp in range(stages):
            rank = f"mp_rank_{tp:02d}" if stages == 1 else f"mp_rank_{tp:02d}_{pp:03d}"
            path = root / rank / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            model = shard(full, tp, pp, ranks, stages)
            state = {"model": tensors(model), "iteration": 40, "args": Namespace(rank=tp), "checkpoint_version": 3.0}
            state["states"] = {"first": tensors(model), "step": 40}
            if change:
                change(tp, pp, state)
            torch.save(state, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("40")
    return folder


def contents(src: Path, foreign):
    wants = [Want(m.name, m.kind, 0, m.numel, "me") for m in foreign.index.tensors if m.key not in foreign.inline]
    metas = foreign.index.metas()
    memory = {(w.name, w.kind): bytearray(metas[w.name, w.kind].nbytes) for w in wants}
    targets = []
    for copy in plan(foreign.index, wants, lambda source, want: 0):
        whole = memoryview(memory[copy.name, copy.kind])
        first = copy.start * copy.itemsize
        targets.append((copy, whole[first : first + copy.nbytes] if copy.region is None else whole))
    files = {fragment.source.locator: None for fragment in foreign.index.fragments}
    read_copies(folder_at(src), files, targets, damaged=lambda *where: AssertionError(where))
    found = {**memory, **foreign.inline}
    return {key: np.frombuffer(data, np.float32).reshape(metas[key].shape) for key, data in found.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stages", [1, 2])
def test_every_tensor_of_every_layout(tmp_path, full, ranks, stages):
    src = write(tmp_path, full, ranks, stages)
    foreign = megatron.read(folder_at(src), patterns=PATTERNS)
    found = contents(src, foreign)
    assert set(found) == {(name, "param") for name in full}
    for name, array in full.items():
        if name.endswith("gate"):
            np.testing.assert_allclose(found[name, "param"], array, rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(found[name, "param"], array, name)
    assert foreign.tied == {"language.head": "embedding"}
    assert foreign.index.step == 40
    assert "args (no tensor of the state)" in foreign.ignored


def test_other_kinds_are_cut_as_their_parameter(tmp_path, full):
    src = write(tmp_path, full, 2, 2)
    trees = {"param": "model", "exp_avg": "states.first"}
    foreign = megatron.read(folder_at(src), patterns=PATTERNS, trees=trees)
    found = contents(src, foreign)
    assert set(found) == {(name, kind) for name in full for kind in trees}
    for name, array in full.items():
        if not name.endswith("gate"):
            np.testing.assert_array_equal(found[name, "exp_avg"], array, name)


def test_safetensors_shards_by_a_template(tmp_path, full):
    for tp in range(2):
        flat = {}
        for key, value in shard(full, tp, 0, 2, 1)["language"]["layers"]["0"].items():
            if key in ("qkv", "out", "up", "norm"):
                flat[f"layers.{key}"] = np.ascontiguousarray(value)
        save_file(flat, tmp_path / f"rank{tp}-of-2.safetensors")
    patterns = {
        "default": "cat",
        "rules": [
            {"match": ".*norm", "as": "replicated"},
            {"match": ".*out", "as": "cat", "dim": 1},
            {"match": ".*qkv", "as": "parts", "widths": [[4, 4], [2, 1], [2, 1]]},
        ],
    }
    foreign = megatron.read(folder_at(tmp_path), patterns=patterns, files="rank{tp}-of-2.safetensors", step=3)
    found = contents(tmp_path, foreign)
    assert foreign.index.step == 3
    for key in ("qkv", "out", "up", "norm"):
        np.testing.assert_array_equal(found[f"layers.{key}", "param"], full[f"layers.0.{key}"])


def test_a_replica_that_differs_is_refused(tmp_path, full):
    def change(tp, pp, state):
        if (tp, pp) == (1, 1):
            state["model"]["language"]["layers"]["1"]["norm"][2] += 1e-6

    src = write(tmp_path, full, 2, 2, change)
    with pytest.raises(CheckpointCorrupt, match=r"layers\.3\.norm") as caught:
        megatron.read(folder_at(src), patterns=PATTERNS)
    assert "mp_rank_01_001" in caught.value.file
    assert "mp_rank_00_001" in caught.value.reason


def test_a_tied_tensor_that_differs_is_refused(tmp_path, full):
    def change(tp, pp, state):
        if (tp, pp) == (1, 1):
            state["model"]["language"]["head"][0, 0] += 1

    src = write(tmp_path, full, 2, 2, change)
    with pytest.raises(CheckpointCorrupt, match=r"language\.head"):
        megatron.read(folder_at(src), patterns=PATTERNS)


def test_files_of_different_iterations_are_refused(tmp_path, full):
    src = write(tmp_path, full, 2, 1, lambda tp, pp, state: state.update(iteration=40 + tp))
    with pytest.raises(CheckpointCorrupt, match=r"step 41.*step 40"):
        megatron.read(folder_at(src), patterns=PATTERNS)


def test_missing_and_surplus_shards_are_named(tmp_path, full):
    src = write(tmp_path, full, 2, 2)
    with pytest.raises(CheckpointIncomplete, match=r"mp_rank_00_001.*besides 2 tensor-parallel ranks and 1 stages"):
        megatron.read(folder_at(src), patterns=PATTERNS, pipeline=1)
    (src / "iter_0000040" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"missing: .*mp_rank_01_000/model_optim_rng\.pt"):
        megatron.read(folder_at(src), patterns=PATTERNS, tensor=2)
    (src / "iter_0000040" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"missing: .*mp_rank_01_000/model_optim_rng\.pt"):
        megatron.read(folder_at(src), patterns=PATTERNS, tensor=2)


def test_stages_that_number_their_layers_alike_need_to_be_told(tmp_path, full):
    src = write(tmp_path, full, 1, 2)
    with pytest.raises(CheckpointCorrupt, match="several stages"):
        megatron.read(folder_at(src), patterns={key: PATTERNS[key] for key in ("default", "rules")})
    with pytest.raises(CheckpointUnsupported, match=r"per_stage \[3, 1\]"):
        megatron.read(folder_at(src), patterns={**PATTERNS, "layers": {**PATTERNS["layers"], "per_stage": [3, 1]}})


def test_classes_that_are_not_known_are_refused_unless_allowed(tmp_path, full):
    src = write(tmp_path, full, 1, 1, lambda tp, pp, state: state.update(own=Path("x")))
    with pytest.raises(CheckpointUnsupported, match="pathlib"):
        megatron.read(folder_at(src), patterns=PATTERNS)
    megatron.read(folder_at(src), patterns=PATTERNS, opaque=("pathlib.*",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "../{tp}.pt"}, "files is"),
        ({"files": "{tp}/{rank}.pt"}, "files is"),
        ({"files": "{tp.real}.pt"}, "files is"),
        ({"files": "{tp:z}.pt"}, "files is"),
        ({"tensor": 0}, "tensor is 0"),
        ({"trees": {"param": "weights"}}, "weights.*it has: model"),
        ({"patterns": None}, "patterns"),
    ],
)
def test_mistakes_in_options(tmp_path, full, options, message):
    src = write(tmp_path, full, 1, 1)
    with pytest.raises(CheckpointUnsupported, match=message):
        megatron.read(folder_at(src), **{"patterns": PATTERNS, **options})


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(CheckpointNotFound, match="mp_rank_"):
        megatron.read(folder_at(tmp_path), patterns=PATTERNS)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointNotFound, match="iter_0000007"):
        megatron.read(folder_at(tmp_path), patterns=PATTERNS)


def test_a_checkpoint_becomes_ours(tmp_path, full):
    src = write(tmp_path / "src", full, 2, 2)
    made = import_checkpoint("megatron", str(src), str(tmp_path / "to" / "job" / "run"), patterns=PATTERNS)
    made.verify()
    for name, array in full.items():
        if not name.endswith("gate"):
            assert made.read(name, "param").numpy().tobytes() == array.tobytes()

"""Save under every layout, load under every other: segments, rank files, manifest and reader are the real ones."""

import itertools
import random

import pytest

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.index import TensorMeta
from everstep.storage.layouts import Layout, Rules, Split, Stage, once, pieces
from everstep.storage.manifest import commit, new_folder, run_folder
from everstep.storage.planner import Want
from everstep.storage.rank_file import write_rank_file
from everstep.storage.segment import SegmentMap, Writer, create_segment, required_bytes

LAYOUTS = [
    Layout(ranks, zero, tensor, pipeline)
    for ranks, zero, tensor, pipeline in itertools.product((1, 2, 3, 4), (0, 1, 2, 3), (1, 2), (1, 2))
    if ranks % (tensor * pipeline) == 0
]
PARAMS = {
    "embed.weight": ("float32", (13, 4)),  # a vocabulary that no two ranks divide; the head is tied to it
    "layers.0.qkv.weight": ("float32", (11, 6)),  # query 6, key 3, value 2: one odd, one smaller than four ranks
    "layers.0.out.weight": ("bfloat16", (6, 5)),
    "layers.0.norm.weight": ("float32", (7,)),
    "layers.1.qkv.weight": ("float32", (11, 6)),
    "layers.1.experts.up": ("bfloat16", (3, 2, 5)),  # three experts, stacked
    "layers.1.experts.mix": ("float32", (2, 2, 3, 3)),
    "scale": ("float32", ()),
}
METAS = [TensorMeta(name, "param", dtype, shape) for name, (dtype, shape) in PARAMS.items()]
METAS += [TensorMeta(m.name, kind, "float32", m.shape) for m in METAS[:8] for kind in ("exp_avg", "exp_avg_sq")]
METAS += [TensorMeta(m.name, "step", "float32", (), python=n % 2 == 0) for n, m in enumerate(METAS[:8])]
METAS += [
    TensorMeta("layers.0.mask", "buffer", "bool", (5,)),
    TensorMeta("layers.0.count", "buffer", "int64", ()),
    TensorMeta("layers.1.table", "buffer", "int32", (3, 3)),
    TensorMeta("layers.1.empty", "buffer", "float32", (0, 3)),
]
RULES = Rules(
    tensor=(
        Split(r"embed\.weight"),
        Split(r".*\.qkv\.weight", 0, (6, 3, 2)),
        Split(r".*\.out\.weight", 1),
        Split(r".*\.experts\.up", 2),
        Split(r".*\.experts\.mix", 0),
    ),
    pipeline=(Stage(r"layers\.(\d+)\..*", of=2), Stage(r"scale", last=True)),
)


def content(meta):
    data = random.Random(f"{meta.key}").randbytes(meta.nbytes)
    return bytes(byte & 1 for byte in data) if meta.dtype == "bool" else data


TRUTH = {meta.key: content(meta) for meta in METAS}


def bytes_of(meta, start, stop, box):
    """By element and coordinate: nothing here is shared with what is tested."""
    data, size = TRUTH[meta.key], meta.itemsize
    elements = [data[i : i + size] for i in range(0, len(data), size)]
    if box:
        strides = [1] * len(meta.shape)
        for d in reversed(range(len(strides) - 1)):
            strides[d] = strides[d + 1] * meta.shape[d + 1]
        places = itertools.product(*(range(first, first + extent) for first, extent in box))
        elements = [elements[sum(x * s for x, s in zip(place, strides, strict=True))] for place in places]
    return b"".join(elements[start:stop])


@pytest.fixture(scope="module")
def wanted():
    """What every rank of every layout holds, and the bytes that are right there."""
    return {
        layout: [(piece, bytes_of(*piece)) for mine in pieces(layout, METAS, RULES) for piece in mine]
        for layout in LAYOUTS
    }


def save(folder, root, layout):
    """One file a rank, without replicas but in every second layout."""
    place, name = new_folder(root, 1, 1)
    held = pieces(layout, METAS, RULES)
    records = []
    for rank, mine in enumerate(held if layout.zero % 2 else once(held)):
        path = folder / f"segment-{rank}"
        create_segment(path, required_bytes(mine))
        with SegmentMap(path, writable=True) as segment:
            writer = Writer(segment)
            writer.begin()
            for meta, start, stop, box in mine:
                writer.put(meta, start, stop, bytes_of(meta, start, stop, box), box=box)
            seal = writer.seal(1, 1, 1)
            records.append(write_rank_file(segment, seal, place, f"rank-{rank}.safetensors"))
        path.unlink()
    commit(place, records, job="job", run="run", name=name, spec={})
    return place.url


def test_all_layouts_are_there():
    assert len(LAYOUTS) == 36


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda y: f"{y.ranks}-zero{y.zero}-t{y.tensor}-p{y.pipeline}")
def test_what_is_saved_under_one_layout_is_loaded_under_every_other(tmp_path, layout, wanted):
    url = save(tmp_path, run_folder(tmp_path, "job", "run"), layout)
    checkpoint = Checkpoint.open(url)
    assert sorted(meta.key for meta in checkpoint.index.tensors) == sorted(TRUTH)
    assert set(checkpoint.index.tensors) == set(METAS)
    for other in LAYOUTS:
        targets = [
            (Want(*meta.key, start, stop, "rank", box), memoryview(bytearray(len(right))))
            for (meta, start, stop, box), right in wanted[other]
        ]
        checkpoint.load(targets, threads=1)
        wrong = [w for (w, got), (_, right) in zip(targets, wanted[other], strict=True) if got != right]
        assert wrong == [], f"{layout} -> {other}"

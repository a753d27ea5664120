import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage.errors import IndexInvalid
from everstep.storage.index import TensorMeta
from everstep.storage.layouts import Layout, Rules, Split, Stage, from_placements, once, pieces

W = TensorMeta("layers.0.mlp.weight", "param", "float32", (5, 4))
M = TensorMeta("layers.0.mlp.weight", "exp_avg", "float32", (5, 4))
QKV = TensorMeta("layers.1.qkv.weight", "param", "float32", (10, 2))
STEP = TensorMeta("layers.0.mlp.weight", "step", "float32", (), python=True)
NONE = TensorMeta("nothing", "buffer", "float32", (0, 3))
METAS = (W, M, QKV, STEP, NONE)
RULES = Rules(
    tensor=(Split(r".*\.mlp\.weight", 1), Split(r".*qkv.weight", 0, (5, 3, 2))),
    pipeline=(Stage(r"layers\.(\d+)\..*", of=2),),
)


def named(mine):
    return [(meta.name.split(".")[-2] if "." in meta.name else meta.name, meta.kind, *rest) for meta, *rest in mine]


def test_one_rank_holds_everything():
    for zero in range(4):
        assert pieces(Layout(1, zero), METAS, RULES) == [[(meta, 0, meta.numel, ()) for meta in METAS]]


def test_tensor_parallel_ranks_hold_boxes_and_parts_of_a_fused_one_are_cut_by_themselves():
    first, second = (named(mine) for mine in pieces(Layout(2, tensor=2), METAS, RULES))
    assert first == [
        ("mlp", "param", 0, 10, ((0, 5), (0, 2))),
        ("mlp", "exp_avg", 0, 10, ((0, 5), (0, 2))),
        ("qkv", "param", 0, 4, ((0, 2), (0, 2))),
        ("qkv", "param", 0, 2, ((5, 1), (0, 2))),
        ("qkv", "param", 0, 2, ((8, 1), (0, 2))),
        ("mlp", "step", 0, 1, ()),
        ("nothing", "buffer", 0, 0, ()),
    ]
    assert [piece[4] for piece in second if piece[0] == "qkv"] == [
        ((2, 3), (0, 2)),
        ((6, 2), (0, 2)),
        ((9, 1), (0, 2)),
    ]


def test_pipeline_stages_hold_their_layers():
    first, second = (named(mine) for mine in pieces(Layout(2, pipeline=2), METAS, RULES))
    assert {piece[0] for piece in first} == {"mlp", "nothing"}
    assert {piece[0] for piece in second} == {"qkv", "nothing"}
    layers = [TensorMeta(f"layers.{n}", "param", "float32", (2,)) for n in range(5)]
    held = pieces(Layout(2, pipeline=2), layers, Rules(pipeline=(Stage(r"layers\.(\d)", of=5),)))
    assert [[piece[0].name[-1] for piece in mine] for mine in held] == [["0", "1", "2"], ["3", "4"]]
    rules = Rules(pipeline=(Stage(".*mlp.*", last=True), Stage(".*qkv.*")))
    first, second = (named(mine) for mine in pieces(Layout(2, pipeline=2), METAS, rules))
    assert {piece[0] for piece in first} == {"qkv", "nothing"}
    assert {piece[0] for piece in second} == {"mlp", "nothing"}


def test_zero_cuts_optimizer_state_first_and_then_everything():
    for zero in (1, 2):
        held = [named(mine) for mine in pieces(Layout(3, zero), METAS, RULES)]
        assert [[piece for piece in mine if piece[1] == "exp_avg"] for mine in held] == [
            [("mlp", "exp_avg", 0, 7, ())],
            [("mlp", "exp_avg", 7, 14, ())],
            [("mlp", "exp_avg", 14, 20, ())],
        ]
        assert all(("mlp", "param", 0, 20, ()) in mine for mine in held)
        assert [("mlp", "step", 0, 1, ()) in mine for mine in held] == [True, False, False]
    held = [named(mine) for mine in pieces(Layout(3, 3), METAS, RULES)]
    # 40 elements of parameters in three shares of 14: one holds parts of two tensors, the last one padding.
    assert [[piece for piece in mine if piece[1] == "param"] for mine in held] == [
        [("mlp", "param", 0, 14, ())],
        [("mlp", "param", 14, 20, ()), ("qkv", "param", 0, 8, ())],
        [("qkv", "param", 8, 20, ())],
    ]


def test_zero_cuts_the_boxes_of_a_tensor_parallel_cell():
    held = pieces(Layout(4, 3, tensor=2), (W,), Rules(tensor=RULES.tensor[:1]))
    assert [mine[0][1:] for mine in held] == [
        (0, 5, ((0, 5), (0, 2))),
        (0, 5, ((0, 5), (2, 2))),
        (5, 10, ((0, 5), (0, 2))),
        (5, 10, ((0, 5), (2, 2))),
    ]


def test_replicas_are_dropped_and_what_is_left_is_spread():
    held = pieces(Layout(2), METAS, RULES)
    kept = once(held)
    assert sorted(p[0].key for mine in kept for p in mine) == sorted(meta.key for meta in METAS)
    assert [sum(p[0].nbytes for p in mine) for mine in kept] == [160, 84]


@pytest.mark.parametrize(
    ("layout", "rules", "message"),
    [
        (Layout(2, tensor=2), Rules(tensor=(Split("nobody"),)), "'nobody' matches no tensor"),
        (Layout(2, tensor=2), Rules(tensor=(Split(".*mlp.*"), Split(".*weight"))), r"'\.\*mlp\.\*' and '\.\*weight'"),
        (Layout(2, tensor=2), Rules(tensor=(Split(".*mlp.*", 2),)), "dimension 2 of 'layers.0.mlp.weight'"),
        (Layout(2, tensor=2), Rules(tensor=(Split(".*qkv.*", 0, (4, 4)),)), r"widths \(4, 4\) of dimension 0"),
        (Layout(2, pipeline=2), Rules(pipeline=(Stage(r"layers\.(\d+)\..*", of=1),)), "layer 1 of 1"),
        (
            Layout(2, pipeline=2),
            Rules(pipeline=(Stage(r"layers\..*", of=2),)),
            "first group must be a layer's number",
        ),
        (Layout(2), Rules(pipeline=(Stage("("),)), r"pattern '\('"),
    ],
)
def test_rules_that_do_not_fit_are_refused(layout, rules, message):
    with pytest.raises(IndexInvalid, match=message):
        pieces(layout, METAS, rules)


@pytest.mark.parametrize("fields", [(0,), (3, 0, 2), (4, 4), (4, -1), (4, 0, 4, 2), (2, 0, 0)])
def test_layouts_that_cannot_be_are_refused(fields):
    with pytest.raises(IndexInvalid):
        Layout(*fields)


@settings(deadline=None)
@given(st.data())
def test_placements_cut_as_torch_chunks_do(data):
    import torch

    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))
    mesh = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    placements = [data.draw(st.none() | st.integers(-len(shape), len(shape) - 1)) for _ in mesh]
    coordinate = [data.draw(st.integers(0, ranks - 1)) for ranks in mesh]
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    local = numbers
    for ranks, dimension, at in zip(mesh, placements, coordinate, strict=True):
        if dimension is not None:
            chunks = local.chunk(ranks, dimension) if local.shape[dimension] else ()
            local = chunks[at] if at < len(chunks) else local.narrow(dimension, 0, 0)
    box = from_placements(shape, mesh, placements, coordinate)
    got = numbers.numpy()[tuple(slice(first, first + extent) for first, extent in box)]
    assert tuple(extent for _, extent in box) == tuple(local.shape)
    np.testing.assert_array_equal(got, local.numpy())


def test_ranks_that_are_too_many_hold_nothing():
    held = [from_placements((5,), (4,), (0,), (at,)) for at in range(4)]
    assert held == [((0, 2),), ((2, 2),), ((4, 1),), ((5, 0),)]


def test_placements_that_do_not_fit_are_refused():
    for mesh, placements, coordinate in [((2,), (0, 1), (0,)), ((2,), (0,), (2,)), ((2,), (3,), (0,))]:
        with pytest.raises(IndexInvalid):
            from_placements((4, 4), mesh, placements, coordinate)

"""Two checkpoints beside each other: which tensors differ, in how many elements, and by how much."""

import struct

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.compare import compare
from everstep.storage.index import TensorMeta

FLOATS = TensorMeta("w", "param", "float32", (4,))


def rows(a, b):
    return {(row.name, row.kind): row for row in compare(Checkpoint.open(a), Checkpoint.open(b))}


def test_the_same_state_is_equal_however_it_is_cut(state):
    found = rows(state.checkpoint(3, ranks=1), state.checkpoint(3, ranks=3, epoch=2))
    assert {row.verdict for row in found.values()} == {"equal"}
    assert len(found) == len(state.metas)


def test_elements_that_differ_are_counted_and_measured(state):
    state.metas = (FLOATS, TensorMeta("v", "param", "bfloat16", (3,)))
    values = {3: (1.0, -2.0, 4.0, 0.5), 4: (1.0, -2.5, 4.0, 0.25)}

    def content(meta, step):
        return struct.pack("<4f", *values[step]) if meta.name == "w" else b"\x80\x3f" * 3

    state.content = content
    found = rows(state.checkpoint(3), state.checkpoint(4))
    row = found["w", "param"]
    assert (row.verdict, row.elements, row.differing, row.largest, row.relative) == ("differs", 4, 2, 0.5, 0.125)
    assert found["v", "param"].verdict == "equal"


def test_what_one_has_alone_or_in_another_form_is_said(state):
    state.metas = (FLOATS, TensorMeta("old", "param", "float32", (2,)), TensorMeta("x", "buffer", "int64", (2,)))
    first = state.checkpoint(3)
    state.metas = (FLOATS, TensorMeta("new", "param", "float32", (2,)), TensorMeta("x", "buffer", "int64", (3,)))
    found = rows(first, state.checkpoint(3, epoch=2))
    assert {name: row.verdict for (name, _), row in found.items()} == {
        "new": "second only",
        "old": "first only",
        "w": "equal",
        "x": "other form",
    }
    assert found["x", "buffer"].detail == "int64[2] and int64[3]"

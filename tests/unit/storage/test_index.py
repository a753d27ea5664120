import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage.errors import IndexInvalid, IndexMismatch
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta, merge

W = TensorMeta("w", "param", "float32", (4, 5))
A = Source("segment", "domain-0", "seg-0")
B = Source("live", "rank-1.1", "")


def piece(start: int, stop: int, source: Source = A, offset: int = 0, checksum: int = 7) -> Fragment:
    return Fragment("w", "param", start, stop, source, offset, checksum)


def test_sizes_of_a_tensor():
    assert (W.numel, W.itemsize, W.nbytes, W.key) == (20, 4, 80, ("w", "param"))
    assert TensorMeta("s", "step", "int64", ()).nbytes == 8
    assert TensorMeta("e", "buffer", "bool", (0, 3)).nbytes == 0


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float31", (1,)), ("object", ()), ("float32", (-1, 2)), ("int8", (2**40, 2**40))]
)
def test_a_tensor_that_cannot_be_is_refused(dtype, shape):
    with pytest.raises(IndexInvalid, match="w"):
        TensorMeta("w", "param", dtype, shape)


def test_missing_names_the_gaps():
    other = TensorMeta("z", "buffer", "int64", ())
    index = StateIndex(1, (W, other), (piece(12, 15), piece(3, 6), piece(5, 9)))
    assert index.missing() == [
        ("w", "param", 0, 3),
        ("w", "param", 9, 12),
        ("w", "param", 15, 20),
        ("z", "buffer", 0, 1),
    ]
    assert StateIndex(1, (W,), (piece(0, 20),)).missing() == []
    assert StateIndex(1, (TensorMeta("e", "buffer", "bool", (0,)),), ()).missing() == []


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), max_size=8))
def test_missing_is_what_no_fragment_covers(spans):
    index = StateIndex(1, (W,), tuple(piece(start, stop) for start, stop in spans))
    covered = {i for start, stop in spans for i in range(start, stop)}
    told = [i for _, _, start, stop in index.missing() for i in range(start, stop)]
    assert told == sorted(set(range(20)) - covered)


def test_merge_knows_everything_once_in_any_order():
    one = StateIndex(4, (W,), (piece(0, 10), piece(10, 20)))
    two = StateIndex(4, (TensorMeta("b", "buffer", "int64", ()), W), (piece(0, 10), piece(0, 10, B)))
    merged = merge(one, two)
    assert merged == merge(two, one)
    assert [meta.name for meta in merged.tensors] == ["b", "w"]
    assert len(merged.fragments) == 3


def test_merge_refuses_what_is_not_one_state():
    one = StateIndex(4, (W,), ())
    with pytest.raises(IndexMismatch, match="4, 5"):
        merge(one, StateIndex(5, (W,), ()))
    with pytest.raises(IndexMismatch, match=r"'w' \(param\) is float32\[4, 5\] .* float32\[5, 4\]"):
        merge(one, StateIndex(4, (TensorMeta("w", "param", "float32", (5, 4)),), ()))
    with pytest.raises(IndexMismatch):
        merge()


def test_bytes_and_back():
    index = StateIndex(4, (W,), (piece(0, 10, checksum=2**64 - 1), piece(10, 20, B, offset=40)))
    assert StateIndex.from_bytes(index.to_bytes()) == index


@pytest.mark.parametrize(
    "fragment",
    [
        piece(0, 21),
        piece(-1, 3),
        piece(5, 4),
        piece(0, 3, offset=-1),
        piece(0, 3, offset=2**63 - 1),
        piece(0, 3, checksum=-1),
    ],
)
def test_ranges_outside_are_refused(fragment):
    with pytest.raises(IndexInvalid):
        StateIndex.from_bytes(StateIndex(1, (W,), (fragment,)).to_bytes())


def test_an_unlisted_or_doubly_listed_tensor_is_refused():
    with pytest.raises(IndexInvalid, match="not a listed tensor"):
        StateIndex(1, (), (piece(0, 3),)).to_bytes()
    with pytest.raises(IndexInvalid, match="twice"):
        StateIndex(1, (W, W), ()).validate()
    with pytest.raises(IndexInvalid, match="negative"):
        StateIndex(-1, (W,), ()).validate()


LEFT, RIGHT = ((0, 4), (0, 2)), ((0, 4), (2, 3))


def boxed(start, stop, box, strides=(), offset=0, checksum=0):
    return Fragment("w", "param", start, stop, A, offset, checksum, box, strides)


def test_boxes_and_strides_come_back_in_order():
    pieces = (
        boxed(0, 8, LEFT), piece(0, 3), boxed(0, 12, RIGHT, (1, 4)), boxed(2, 8, LEFT), boxed(0, 20, (), (1, 4)),
        boxed(0, 8, LEFT, (2, 1)),
    )  # fmt: skip
    index = StateIndex(4, (W,), pieces)
    assert StateIndex.from_bytes(index.to_bytes()) == index
    assert merge(index) == merge(StateIndex(4, (W,), pieces[::-1]))
    assert set(merge(index).fragments) == set(pieces)


def test_a_box_is_listed_once_however_many_fragments_have_it():
    def length(count):
        return len(StateIndex(4, (W,), tuple(boxed(0, 8, LEFT, offset=64 + i) for i in range(count))).to_bytes())

    flat = len(StateIndex(4, (W,), tuple(piece(0, 8, offset=64 + i, checksum=0) for i in range(30))).to_bytes())
    assert length(30) - flat < length(1) + 30 * 3 - flat / 30


@pytest.mark.parametrize(
    "fragment",
    [
        boxed(0, 9, LEFT),
        boxed(-1, 8, LEFT),
        boxed(0, 1, ((0, 4),)),
        boxed(0, 1, ((0, 5), (0, 2))),
        boxed(0, 1, ((1, 4), (0, 2))),
        boxed(0, 1, ((-1, 2), (0, 2))),
        boxed(0, 0, ((0, -1), (0, 2))),
        boxed(0, 8, LEFT, (2,)),
        boxed(0, 8, LEFT, (2, -1)),
        boxed(0, 7, LEFT, (2, 1)),
        boxed(1, 8, LEFT, (2, 1)),
        boxed(0, 8, LEFT, (2, 1), checksum=7),
        boxed(0, 8, LEFT, offset=2**63 - 32),
        boxed(0, 8, LEFT, (2**60, 1)),
        boxed(0, 8, LEFT, (2**40, 1), offset=2**63 - 2**42),
    ],
)
def test_boxes_and_strides_that_cannot_be_are_refused(fragment):
    with pytest.raises(IndexInvalid, match="'w'"):
        StateIndex.from_bytes(StateIndex(1, (W,), (fragment,)).to_bytes())


def test_a_box_of_a_0_dim_tensor_is_the_whole():
    scalar = TensorMeta("s", "step", "int64", ())
    index = StateIndex(1, (scalar,), (Fragment("s", "step", 0, 1, A, 0),))
    assert index.missing() == []
    with pytest.raises(IndexInvalid, match="'s'"):
        StateIndex(1, (scalar,), (Fragment("s", "step", 0, 1, A, 0, 0, ((0, 1),)),)).validate()


def test_missing_counts_boxes_and_flat_ranges_together():
    assert StateIndex(1, (W,), (boxed(0, 8, LEFT), boxed(0, 12, RIGHT))).missing() == []
    assert StateIndex(1, (W,), (boxed(0, 8, LEFT), boxed(3, 12, RIGHT), piece(0, 6))).missing() == []
    assert StateIndex(1, (W,), (boxed(0, 8, LEFT), boxed(3, 12, RIGHT))).missing() == [("w", "param", 2, 5)]
    # Strides say where the elements are in the source, not which.
    assert StateIndex(1, (W,), (boxed(0, 20, (), (1, 4)),)).missing() == []
    other = TensorMeta("v", "param", "float32", (4, 5))
    index = StateIndex(1, (other, W), (boxed(0, 8, LEFT), boxed(0, 12, RIGHT)))
    assert index.missing() == [("v", "param", 0, 20)]


def test_what_is_one_run_of_its_tensor_is_a_flat_range():
    def run(*fragment):
        flat = boxed(*fragment).as_run((4, 5))
        return flat and (flat.start, flat.stop, flat.box, flat.strides)

    assert run(3, 9, ((1, 2), (0, 5))) == (8, 14, (), ())
    assert run(0, 10, ((1, 2), (0, 5)), (5, 1)) == (5, 15, (), ())
    assert run(2, 5, RIGHT) is None
    assert run(3, 5, RIGHT) == (7, 9, (), ())
    assert run(0, 10, ((1, 2), (0, 5)), (1, 2)) is None
    assert run(3, 3, RIGHT) == (0, 0, (), ())
    deep = Fragment("w", "param", 12, 19, A, 7, 9, ((0, 3), (1, 2), (0, 5)))
    assert deep.as_run((3, 4, 5)) == Fragment("w", "param", 27, 34, A, 7, 9)


def test_too_many_dimensions_are_refused():
    with pytest.raises(IndexInvalid, match="65 dimensions"):
        TensorMeta("w", "param", "int8", (1,) * 65)
    assert TensorMeta("w", "param", "int8", (1,) * 64).numel == 1


def test_another_wire_version_is_refused():
    raw = msgspec.msgpack.decode(StateIndex(1, (W,), ()).to_bytes())
    raw[0] += 1
    with pytest.raises(IndexInvalid, match="version 3; this everstep reads version 2"):
        StateIndex.from_bytes(msgspec.msgpack.encode(raw))
    with pytest.raises(IndexInvalid, match="version 1; this everstep reads version 2"):
        StateIndex.from_bytes(msgspec.msgpack.encode([1, *raw[1:5]]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_an_error_or_an_index_that_can_be(data):
    pieces = (piece(0, 10), boxed(0, 8, LEFT), piece(10, 20, B), boxed(0, 12, RIGHT, (1, 4)))
    encoded = bytearray(StateIndex(4, (W,), pieces).to_bytes())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    try:
        index = StateIndex.from_bytes(bytes(encoded))
    except IndexInvalid:
        return
    index.validate()


@given(st.binary(max_size=64))
def test_any_bytes_are_an_error(junk):
    with pytest.raises(IndexInvalid):
        StateIndex.from_bytes(junk)

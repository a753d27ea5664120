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


def test_another_wire_version_is_refused():
    raw = msgspec.msgpack.decode(StateIndex(1, (W,), ()).to_bytes())
    raw[0] += 1
    with pytest.raises(IndexInvalid, match="version"):
        StateIndex.from_bytes(msgspec.msgpack.encode(raw))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_an_error_or_an_index_that_can_be(data):
    encoded = bytearray(StateIndex(4, (W,), (piece(0, 10), piece(10, 20, B))).to_bytes())
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

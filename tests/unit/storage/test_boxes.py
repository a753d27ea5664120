import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage import boxes

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def elements(box, shape):
    """The flat positions of the box's elements in a tensor, in the box's order."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    return numbers[(*(slice(first, first + extent) for first, extent in box), ...)].reshape(-1).tolist()


@st.composite
def shape_and_boxes(draw, count):
    shape = draw(shapes)
    found = []
    for _ in range(count):
        ends = [sorted((draw(st.integers(0, extent)), draw(st.integers(0, extent)))) for extent in shape]
        found.append(tuple((first, stop - first) for first, stop in ends))
    return shape, found


@settings(deadline=None)
@given(shape_and_boxes(2))
def test_what_two_boxes_share(case):
    shape, (a, b) = case
    common = sorted(set(elements(a, shape)) & set(elements(b, shape)))
    found = boxes.intersection(a, b)
    assert (elements(found, shape) if found is not None else []) == common
    assert boxes.numel(a) == len(elements(a, shape))
    assert boxes.inside(a, shape)
    if elements(b, shape):
        assert boxes.contains(a, b) == (common == elements(b, shape))


@settings(max_examples=300, deadline=None)
@given(shape_and_boxes(1), st.data())
def test_a_range_of_a_box_is_few_boxes_in_order(case, data):
    shape, (box,) = case
    size = boxes.numel(box)
    start, stop = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
    parts = boxes.parts(box, start, stop)
    assert list(itertools.chain(*(elements(p, shape) for p in parts))) == elements(box, shape)[start:stop]
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    assert all(boxes.contains(box, part) and boxes.numel(part) for part in parts)


@settings(deadline=None)
@given(shape_and_boxes(1))
def test_runs(case):
    shape, (box,) = case
    held = elements(box, shape)
    run = boxes.one_run(box, shape)
    assert (run is not None) == (not held or held == list(range(held[0], held[-1] + 1)))
    if held:
        assert run in (None, (held[0], held[-1] + 1))
        start, stop = boxes.first_run(box, shape)
        assert start == held[0]
        assert set(range(start, stop)) <= set(held)
        assert stop not in held or stop % shape[-1] == 0


@settings(deadline=None)
@given(shape_and_boxes(1))
def test_strides_of_memory(case):
    shape, (box,) = case
    extents = boxes.extents(box)
    dense = boxes.row_major(extents)
    array = np.zeros(extents, np.int8)
    if array.size:
        assert dense == tuple(array.strides)
        assert boxes.span(box, dense) == array.size
    assert boxes.without_gaps(box, dense)
    first = boxes.position(box, boxes.row_major(shape))
    assert elements(box, shape)[:1] in ([], [first])
    wider = tuple(2 * stride for stride in dense)
    assert boxes.without_gaps(box, wider) == (array.size < 2)
    if array.size:
        assert boxes.span(box, wider) == 2 * (array.size - 1) + 1


@settings(max_examples=300, deadline=None)
@given(shape_and_boxes(6))
def test_what_is_not_covered_is_found(case):
    shape, (box, *others) = case
    open_ = set(elements(box, shape)) - {e for other in others for e in elements(other, shape)}
    found = boxes.uncovered(box, others)
    assert (found is not None) == bool(open_)
    if found is not None:
        assert boxes.numel(found)
        assert set(elements(found, shape)) <= open_


def test_a_cut_leaves_as_little_as_can_be_on_both_sides():
    # Two columns of many rows that do not end together: a cut through rows would halve boxes of the other column.
    left = [((3 * i, 3), (0, 4)) for i in range(8)]
    right = [((0, 2), (4, 4)), *(((4 * i + 2, 4), (4, 4)) for i in range(5)), ((22, 2), (4, 4))]
    box = ((0, 24), (0, 8))
    assert boxes.best_cut(box, left + right) == (1, 4)
    assert boxes.best_cut(box, right + left) == (1, 4)
    assert boxes.best_cut(((0, 24), (0, 4)), left) == (0, 12)
    assert boxes.cut(box, 1, 3) == (((0, 24), (0, 3)), ((0, 24), (3, 5)))


@pytest.mark.parametrize("box", [((0, 3),), ((0, 3), (0, 3)), ((-1, 2), (0, 2)), ((0, 2), (1, -1)), ((1, 2), (0, 2))])
def test_what_is_no_box_of_a_tensor(box):
    assert not boxes.inside(box, (2, 3))


def test_a_box_is_told_as_it_would_be_written():
    assert boxes.spell(((0, 4), (3, 2))) == "[0:4, 3:5]"
    assert boxes.spell(()) == ""

"""When another attempt at a failing task is of no use."""

from __future__ import annotations

from everstep.platform.cluster.repeats import Repeats, hopeless, seen


def after(*errors: tuple[str, int, int]) -> Repeats:
    state = Repeats()
    for message, step, lane in errors:
        state = seen(state, message, step, lane)
    return state


def test_the_same_error_is_tried_again_twice_and_no_more():
    error = ("hole", 4, 5)
    assert not hopeless(after(error))
    assert not hopeless(after(error, error))
    assert hopeless(after(error, error, error))


def test_another_message_step_or_lane_begins_to_count_again():
    error = ("hole", 4, 5)
    for other in (("dent", 4, 5), ("hole", 5, 5), ("hole", 4, 6)):
        assert not hopeless(after(error, error, other))
        assert not hopeless(after(error, error, other, error, error))

"""What of a node others use."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from everstep.actors.ray_capacity_books import others


def test_what_is_neither_free_nor_ours_is_used_by_others():
    total = {"a": {"CPU": 8.0, "GPU": 1.0}, "b": {"CPU": 4.0}}
    free = {"a": {"CPU": 1.0, "GPU": 1.0}, "b": {}}
    assert others(total, free, {"a": {"CPU": 4.0}}, []) == {"a": {"CPU": 3.0, "GPU": 0.0}, "b": {"CPU": 4.0}}


def test_ours_may_be_in_the_books_before_it_is_in_use():
    assert others({"a": {"CPU": 8.0}}, {"a": {"CPU": 8.0}}, {"a": {"CPU": 4.0}}, []) == {"a": {"CPU": 0.0}}


def test_what_one_of_ours_that_is_just_starting_may_be_is_not_counted():
    total, free = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}, {"a": {"CPU": 2.0}, "b": {"CPU": 0.5}}
    assert others(total, free, {}, [{"CPU": 1.0}]) == {"a": {"CPU": 0.0}, "b": {"CPU": 0.5}}
    assert others(total, free, {}, [{"CPU": 1.0}, {"CPU": 1.0}])["b"] == {"CPU": 0.5}

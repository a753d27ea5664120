"""A map whose versions share what they have in common, checked against plain dicts."""

from __future__ import annotations

import pickle
from copy import deepcopy

from hypothesis import given
from hypothesis import strategies as st

from everstep.collectives.growing import Growing, grown


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5), st.integers(0, 3))))
def test_every_version_stays_what_it_was_whichever_is_added_to(adds: list[tuple[int, int, int]]) -> None:
    versions: list[tuple[Growing[int, int], dict[int, int]]] = [(Growing(), {})]
    for of, key, value in adds:
        version, plain = versions[-1 - of % len(versions)]
        versions.append((version.plus(key, value), {**plain, key: value}))
    for version, plain in versions:
        assert version == plain
        assert list(version) == list(plain)
        assert len(version) == len(plain)
        assert [key for key in range(8) if key in version] == [key for key in range(8) if key in plain]
        assert all(version.get(key, -1) == plain.get(key, -1) for key in range(8))


def test_adding_to_the_newest_version_copies_nothing() -> None:
    version: Growing[int, int] = Growing()
    for key in range(1000):
        version = version.plus(key, key)
    assert version.copies == 0
    assert version.plus(3, 3) is version, "nothing new"
    assert version.plus(3, 4).copies == 1000


def test_adding_to_an_older_version_copies_it_and_harms_no_other() -> None:
    older = Growing({"a": 1}).plus("b", 2)
    newer = older.plus("c", 3)
    other = older.plus("c", 4)
    assert (older, newer, other) == ({"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 4})
    assert other.copies > older.copies


def test_a_plain_map_is_copied_once() -> None:
    plain = {"a": 1}
    version = grown(plain, "b", 2)
    assert (version, plain) == ({"a": 1, "b": 2}, {"a": 1})
    assert grown(version, "c", 3).copies == version.copies


def test_it_can_be_pickled_and_copied() -> None:
    version = Growing({"a": 1}).plus("b", 2)
    version.plus("c", 3)
    assert pickle.loads(pickle.dumps(version)) == deepcopy(version) == {"a": 1, "b": 2}

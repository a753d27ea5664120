"""Smallest covers of complaints, against brute force."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from everstep.collectives.links import first_hand, smallest_cover, undirected

RANKS = {name: rank for rank, name in enumerate("abcdefgh")}


@pytest.mark.parametrize(
    ("edges", "cover"),
    [
        ([("a", "b")], ("b",)),
        ([("b", "a")], ("b",)),
        ([("a", "b"), ("a", "c")], ("a",)),
        ([("b", "a"), ("c", "a"), ("d", "a")], ("a",)),
        ([("a", "b"), ("c", "d")], ("b", "d")),
        ([("a", "b"), ("b", "c"), ("c", "a")], ("b", "c")),
        ([("a", "b"), ("b", "c"), ("c", "d")], ("b", "d")),
        ([("a", "x"), ("a", "a")], ()),
        ([], ()),
    ],
)
def test_it_is_the_smallest_and_of_the_highest_ranks(edges, cover) -> None:
    assert smallest_cover(edges, RANKS) == cover


def test_against_brute_force() -> None:
    rng = random.Random(5)
    for _ in range(300):
        edges = [tuple(rng.sample("abcdefgh", 2)) for _ in range(rng.randint(1, 10))]
        cover = smallest_cover(edges, RANKS)
        assert all(a in cover or b in cover for a, b in edges)
        assert len(cover) < len({name for edge in edges for name in edge}), "never everybody"
        smaller = combinations(RANKS, len(cover) - 1)
        assert not any(all(a in few or b in few for a, b in edges) for few in smaller)


def test_many_complaints_are_covered_soon_though_not_always_by_the_smallest_set() -> None:
    ranks = {f"p{i}": i for i in range(60)}
    edges = [(f"p{i}", f"p{(7 * i) % 60}") for i in range(60)]
    cover = smallest_cover(edges, ranks)
    assert all(a in cover or b in cover for a, b in undirected(edges))
    assert 0 < len(cover) < 45


CUT, CLOSED = "no acknowledgement for 1.0 s: the path is cut", "closed by the other side"


@pytest.mark.parametrize(
    ("complaints", "edges"),
    [
        # The link a-b, cut in both directions; c and d only see that a gives up.
        ([("ab", CUT), ("ba", CUT), ("ca", CLOSED), ("da", CLOSED)], ["ab", "ba"]),
        # Whoever says it first: streams keep no order among each other.
        ([("ca", "[Errno 104] Connection reset by peer"), ("ab", "connecting to 10.0.0.2:1: timed out")], ["ab"]),
        # Nobody says why b closed its connections, so the link may be to blame.
        ([("ab", CLOSED), ("cb", "[Errno 32] Broken pipe")], ["ab", "cb"]),
        ([("ab", CLOSED), ("ba", CLOSED)], ["ab", "ba"]),
    ],
)
def test_members_that_see_a_complainer_hang_up_say_nothing_of_their_own_links(complaints, edges) -> None:
    found = first_hand(((edge[0], edge[1]), error) for edge, error in complaints)
    assert found == {(edge[0], edge[1]) for edge in edges}

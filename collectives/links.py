"""Which members to evict when links between living members fail. Pure.

A complaint names an edge: (who complains, about whom). Either end may be at fault, so what is evicted is a smallest
set of members that touches every edge complained about (a smallest vertex cover); among those of one size the one
with the highest ranks, so that the choice is the same for the same complaints. A cover never takes everybody: an edge
needs only one of its ends.

A member that finds a link cut gives up its view and with it all its connections, so the members at their other ends
complain about it in turn. Such echoes are no evidence of other links (without this a cut in both directions cost both
its ends, and a cut in one direction the wrong one).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from itertools import combinations

Edge = tuple[str, str]
_CLOSED = ("closed by the other side", os.strerror(errno.ECONNRESET), os.strerror(errno.EPIPE))
_EXACT_UP_TO = 16  # members with complaints; 65,536 sets at most. Above that: whoever touches most edges, first.


def undirected(edges: Iterable[Edge]) -> frozenset[Edge]:
    """Each link once, whoever complained about it."""
    return frozenset((min(a, b), max(a, b)) for a, b in edges if a != b)


def first_hand(complaints: Iterable[tuple[Edge, str]]) -> frozenset[Edge]:
    """Of one view's (edge, error): without those who saw a connection closed by a member that had reason to."""
    complaints = tuple(complaints)
    with_reason = {edge[0] for edge, error in complaints if not _is_closed(error)}
    return frozenset(edge for edge, error in complaints if not _is_closed(error) or edge[1] not in with_reason)


def _is_closed(error: str) -> bool:
    return any(text in error for text in _CLOSED)


def smallest_cover(edges: Iterable[Edge], rank_of: Mapping[str, int]) -> tuple[str, ...]:
    """The members to evict, by rank. Edges with an end that has no rank are explained already, and not covered."""
    links = {edge for edge in undirected(edges) if edge[0] in rank_of and edge[1] in rank_of}
    touched = sorted({name for edge in links for name in edge}, key=lambda name: -rank_of[name])
    if len(touched) > _EXACT_UP_TO:
        return _greedy_cover(links, rank_of)
    for size in range(len(touched)):
        for chosen in combinations(touched, size):  # the highest ranks come first
            if all(a in chosen or b in chosen for a, b in links):
                return tuple(sorted(chosen, key=lambda name: rank_of[name]))
    return ()


def _greedy_cover(links: set[Edge], rank_of: Mapping[str, int]) -> tuple[str, ...]:
    left, chosen = set(links), []
    while left:
        degree: dict[str, int] = {}
        for edge in left:
            for name in edge:
                degree[name] = degree.get(name, 0) + 1
        worst = max(degree, key=lambda name: (degree[name], rank_of[name]))
        chosen.append(worst)
        left = {edge for edge in left if worst not in edge}
    return tuple(sorted(chosen, key=lambda name: rank_of[name]))

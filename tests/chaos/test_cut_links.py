"""Links that fail in one direction while their ends live: who is evicted, and how long it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts.churn_run import warm_up

from integration.cut_links import CutGroup, namespaces, why_not

RESOLVED_S = 5.0


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    if reason := why_not():
        pytest.skip(reason)
    warm_up()


# Edges by rank: (from, to).
@pytest.mark.parametrize(
    ("size", "edges", "out"),
    [
        (3, [(0, 1)], {1}),
        (3, [(2, 0)], {2}),
        (4, [(3, 2)], {3}),
        (5, [(0, 1), (1, 2), (3, 1)], {1}),  # one member touches all of them
        (5, [(0, 3), (2, 1)], {2, 3}),  # two links without a common end
        (4, [(1, 2), (2, 1)], {2}),  # both directions
    ],
)
def test_a_smallest_set_that_explains_the_cuts_is_evicted(
    size: int, edges: list[tuple[int, int]], out: set[int], tmp_path: Path
) -> None:
    with namespaces(size) as network, CutGroup(tmp_path, network) as group:
        ranks = group.ranks()
        names = {ranks[rank] for rank in out}
        at = group.cut(*((ranks[a], ranks[b]) for a, b in edges))
        took_s = group.resolved_s(at, names, 3 * RESOLVED_S)
        found = group.findings(at, names)
        log = (tmp_path / "coordinator.log").read_text()
        told = group.told()
    print(f"resolved after {took_s:.2f} s")
    assert not found.violations, found.violations
    assert "evicted for its links" in log
    assert took_s <= RESOLVED_S, f"{took_s:.2f} s\n{told}"


def test_two_links_that_fail_one_after_the_other_cost_two_evictions(tmp_path: Path) -> None:
    with namespaces(4) as network, CutGroup(tmp_path, network) as group:
        first, second, third, fourth = group.ranks()
        for edge, out in (((fourth, first), {fourth}), ((second, third), {third, fourth})):
            at = group.cut(edge)
            assert group.resolved_s(at, out, 3 * RESOLVED_S) <= RESOLVED_S, group.told()
        assert group.ranks() == [first, second]
        assert not group.findings(at, {third, fourth}).violations

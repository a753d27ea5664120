"""A link that fails in one direction while both its ends live. More of it: tests/chaos/test_cut_links.py."""

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


def test_a_link_cut_in_one_direction_is_resolved_by_an_eviction_that_is_explained(tmp_path: Path) -> None:
    with namespaces(3) as network, CutGroup(tmp_path, network) as group:
        _, second, third = group.ranks()
        at = group.cut((second, third))
        took_s = group.resolved_s(at, {third}, 3 * RESOLVED_S)
        found = group.findings(at, {third})
        log = (tmp_path / "coordinator.log").read_text()
    print(f"resolved after {took_s:.2f} s")
    assert not found.violations, found.violations
    reason = next(line for line in log.splitlines() if "evicted for its links" in line)
    for part in (second, third, "new connections were tried", "smallest set"):
        assert part in reason
    assert took_s <= RESOLVED_S, group.told()

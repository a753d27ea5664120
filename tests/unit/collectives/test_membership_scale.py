"""A vote, an inventory, a join cost the same however many members there are: what is copied and made is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from everstep.collectives import membership as m
from everstep.collectives.growing import Growing
from everstep.collectives.messages import Member

SMALL, LARGE = 40, 400


def calls_of(act: Callable[[], Any]) -> int:
    """Function calls, generator steps and C calls that `act` makes: a loop over members that calls is seen."""
    count = 0

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


class Coordinator:
    """Feeds events and counts what the last one cost."""

    def __init__(self, members: int) -> None:
        self.members = [Member(f"rank-{i}.1", i, f"slot-{i}", f"h:{i}") for i in range(members)]
        self.state = m.initial(1, 1, members, 0.0)
        self.dearest: dict[str, int] = {}

    def feed(self, events: Iterable[m.Event]) -> None:
        for event in events:
            before = self.state
            commands: list[m.Command] = []

            def decide(event: m.Event = event, state: m.State = before, out: list[m.Command] = commands) -> None:
                self.state, found, _ = m.decide(state, event, 0.0)
                out.extend(found)

            calls = calls_of(decide)
            if not commands:  # the last vote of all may look at all of them
                kind = type(event).__name__
                self.dearest[kind] = max(self.dearest.get(kind, 0), calls)

    def run(self) -> None:
        """Two steps of the first view."""
        names = [member.name for member in self.members]
        self.feed(m.WatcherUp(member.domain) for member in self.members)
        self.feed(m.Joined(member) for member in self.members)
        assert isinstance(self.state.phase, m.Gathering)
        id = self.state.phase.id
        self.feed(m.Inventoried(name, id, b"held") for name in names)
        self.feed(m.Stocked(member.domain, id, (), b"sealed") for member in self.members)
        self.feed([m.Chosen(id, 0, b"plan")])
        self.feed(m.Levelled(name, id) for name in names)
        for step in (1, 2):
            self.feed(m.Voted(name, id, step, b"vote") for name in names)
            votes = self.state.phase.votes  # type: ignore[union-attr]
            assert len(votes) == len(names)
            self.feed([m.Judged(id, step, b"verdict")])


@pytest.fixture(scope="module")
def costs() -> tuple[dict[str, int], dict[str, int]]:
    found = []
    for members in (SMALL, LARGE):
        coordinator = Coordinator(members)
        coordinator.run()
        found.append(coordinator.dearest)
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["Joined", "WatcherUp", "Inventoried", "Stocked", "Levelled", "Voted"])
def test_what_a_member_says_costs_as_many_calls_with_ten_times_the_members(
    kind: str, costs: tuple[dict[str, int], dict[str, int]]
) -> None:
    small, large = costs
    assert large[kind] <= small[kind] + 5


def test_what_members_add_to_is_never_copied() -> None:
    """A copy is one call, which the other test does not see."""
    coordinator = Coordinator(LARGE)
    seen: dict[str, int] = {}
    decide = coordinator.feed

    def feed(events: Iterable[m.Event]) -> None:
        for event in events:
            decide([event])
            phase = coordinator.state.phase
            maps = {"ready": coordinator.state.ready}
            for name in ("inventories", "stocks", "level", "votes"):
                maps[name] = getattr(phase, name, {})
            for name, found in maps.items():
                if len(found):
                    assert isinstance(found, Growing), f"{name} is a plain map, copied for each member"
                    seen[name] = max(seen.get(name, 0), found.copies)

    coordinator.feed = feed  # type: ignore[method-assign]
    coordinator.run()
    assert seen == {"ready": 0, "inventories": 0, "stocks": 0, "level": 0, "votes": 0}

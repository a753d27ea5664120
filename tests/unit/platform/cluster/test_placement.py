"""Which node a slot goes to, which nodes are left alone, and how many slots a node holds."""

from __future__ import annotations

import math

import pytest

from everstep.platform.cluster.placement import (
    CORDON_LOSSES,
    CORDON_S,
    CORDON_WINDOW_S,
    INCIDENT_S,
    Node,
    Record,
    Seat,
    charge,
    choose,
    matches,
    slots_in,
)

A, B, C = Node("a", 2, 2), Node("b", 2, 2), Node("c", 2, 2)


def test_slots_are_spread_and_a_full_node_takes_no_more() -> None:
    seats: list[Seat] = []
    for _ in range(6):
        node = choose((A, B, C), seats)
        assert node is not None
        seats.append(Seat(node, settled=False))
    assert [seat.node for seat in seats] == ["a", "b", "c", "a", "b", "c"]
    assert choose((A, B, C), seats) is None


def test_what_others_use_is_not_taken_and_what_has_begun_is_counted_once() -> None:
    used = Node("a", capacity=4, room=1)
    assert choose((used,), [Seat("a", settled=True), Seat("a", settled=True)]) == "a"
    assert choose((used,), [Seat("a", settled=False)]) is None, "it may be what the room is for"
    assert choose((Node("a", capacity=4, room=0),), []) is None


@pytest.mark.parametrize("bad", [Node("a", 2, 2, alive=False), Node("a", 2, 2, draining_until=math.inf)])
def test_a_lost_or_draining_node_is_never_taken(bad: Node) -> None:
    assert choose((bad, B), [Seat("b", settled=True)]) == "b"
    assert choose((bad,), []) is None
    assert choose((bad, B), [], home="a") == "b"


def test_a_doubted_node_is_not_taken_even_where_it_is_the_only_one() -> None:
    assert choose((A,), [], home="a", avoid=["a"]) is None


def test_a_slot_stays_where_its_memory_is_for_its_place_is_held() -> None:
    full = Node("a", capacity=1, room=0)
    assert choose((full, B), [], home="a") == "a"
    assert choose((full, B), [], home="a", cordoned=["a"]) == "b"


def test_a_cordoned_node_is_taken_where_no_other_has_room() -> None:
    assert choose((A, B), [Seat("b", settled=False)], cordoned=["a"]) == "b"
    assert choose((A, B), [Seat("b", settled=False)] * 2, cordoned=["a"]) == "a"
    assert choose((Node("a", 1, 0),), [], home="a", cordoned=["a"]) == "a"


def test_a_node_is_cordoned_for_losses_that_come_again_and_again() -> None:
    record, now = Record(), 0.0
    for _ in range(CORDON_LOSSES - 1):
        record, cordoned = charge(record, now)
        assert not cordoned
        record, cordoned = charge(record, now + INCIDENT_S / 2)
        assert not cordoned, "two ranks of one node, at once"
        now += 10
    record, cordoned = charge(record, now)
    assert cordoned
    assert record.until == now + CORDON_S


def test_losses_of_long_ago_are_forgotten() -> None:
    record = Record()
    for number in range(10):
        record, cordoned = charge(record, number * CORDON_WINDOW_S / (CORDON_LOSSES - 1))
        assert not cordoned


def test_how_many_slots_fit() -> None:
    assert slots_in({"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0}) == 4
    assert slots_in({"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.25}) == 4
    assert slots_in({"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}) == 0
    assert slots_in({"CPU": 0.9999999}, {"CPU": 1.0}) == 1, "Ray's amounts are sums of fractions"
    assert slots_in({}, {}) > 1000


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        ("x", True),
        ("y", False),
        ("!x", False),
        ("!y", True),
        ("in(x, z)", True),
        ("in(y,z)", False),
        ("!in(x)", False),
    ],
)
def test_rays_label_selectors(wanted: str, holds: bool) -> None:
    assert matches({"zone": "x"}, {"zone": wanted}) is holds
    assert matches({}, {"zone": wanted}) is wanted.startswith("!")

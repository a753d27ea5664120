"""The lane tree: equal float32 bits whoever holds which lane, and in whatever order the parts come."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch

from everstep.platform.training.lanes import (
    LaneTree,
    Node,
    cover,
    depth,
    f32,
    lanes_of,
    lanes_under,
    sum_lanes,
)

LANES = range(1, 17)


def reference(leaves: list[np.float32], level: int, index: int) -> np.float32 | None:
    """[Note: lane tree], literally: top down, absent leaves skipped."""
    if level == 0:
        return leaves[index] if index < len(leaves) else None
    left = reference(leaves, level - 1, 2 * index)
    right = reference(leaves, level - 1, 2 * index + 1)
    if left is None or right is None:
        return left if right is None else right
    return np.float32(left + right)


def adversarial(rng: random.Random, count: int) -> list[np.float32]:
    """Magnitudes whose sum depends on the order of the additions, subnormals and cancellation included."""
    kinds: list[Callable[[], float]] = [
        lambda: rng.uniform(-1, 1) * 2.0 ** rng.randint(-149, 120),
        lambda: rng.choice([1.0, -1.0]) * 2.0**24,
        lambda: rng.uniform(-1, 1),
        lambda: rng.choice([0.0, -0.0, 1e-45]),
    ]
    return [np.float32(rng.choice(kinds)()) for _ in range(count)]


def bits(value: np.float32 | float) -> bytes:
    return struct.pack("<f", value)


def finish(holdings: list[list[int]], leaves: list[np.float32], rng: random.Random, add: Callable) -> np.float32:
    """Each holder merges its own lanes in its own order; the owner gets the subtrees in any order."""
    parts: list[tuple[Node, np.float32]] = []
    for held in holdings:
        local: LaneTree[np.float32] = LaneTree(len(leaves), add)
        for lane in rng.sample(held, len(held)):
            local.add((0, lane), leaves[lane])
        assert sorted(local.nodes) == cover(held, len(leaves))
        parts += local.nodes.items()
    rng.shuffle(parts)
    owner: LaneTree[np.float32] = LaneTree(len(leaves), add)
    for node, value in parts:
        assert not owner.complete
        owner.add(node, value)
    return owner.root()


def add32(left: np.float32, right: np.float32) -> np.float32:
    return np.float32(left + right)


@pytest.mark.parametrize("lanes", LANES)
def test_every_way_of_holding_the_lanes_gives_the_reference_bits(lanes: int) -> None:
    rng = random.Random(lanes)
    different = 0
    for ranks in range(1, lanes + 1):
        for _ in range(4):
            leaves = adversarial(rng, lanes)
            expected = bits(reference(leaves, depth(lanes), 0))
            owner = [rng.randrange(ranks) for _ in range(lanes)]
            for holdings in (
                [lanes_of(r, ranks, lanes, waves=False) for r in range(ranks)],
                [lanes_of(r, ranks, lanes, waves=True) for r in range(ranks)],
                [[lane for lane in range(lanes) if owner[lane] == r] for r in range(ranks)],
            ):
                assert bits(finish(holdings, leaves, rng, add32)) == expected
            in_order = np.float32(0)
            for leaf in leaves:
                in_order = np.float32(in_order + leaf)
            different += bits(in_order) != expected
    if lanes >= 4:
        assert different, "the values do not tell orders apart: this test could not fail"


def test_tensors_are_summed_as_numbers_are() -> None:
    rng = random.Random(3)
    leaves = [adversarial(rng, 64) for _ in range(11)]
    tree: LaneTree[torch.Tensor] = LaneTree(11, lambda left, right: left.add_(right))
    for lane in rng.sample(range(11), 11):
        tree.add((0, lane), torch.tensor(np.array(leaves[lane])))
    expected = [reference([leaf[i] for leaf in leaves], depth(11), 0) for i in range(64)]
    assert tree.root().numpy().tobytes() == np.array(expected, dtype=np.float32).tobytes()


@pytest.mark.parametrize("lanes", LANES)
def test_lanes_are_dealt_once_each_and_evenly(lanes: int) -> None:
    for ranks in range(1, lanes + 1):
        for waves in (False, True):
            dealt = [lanes_of(r, ranks, lanes, waves) for r in range(ranks)]
            assert sorted(lane for held in dealt for lane in held) == list(range(lanes))
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
            for rank, held in enumerate(dealt):
                step = ranks if waves else 1
                assert held == list(range(rank if waves else held[0], held[-1] + 1, step))


@pytest.mark.parametrize("lanes", LANES)
def test_a_cover_is_those_lanes_in_the_fewest_subtrees(lanes: int) -> None:
    rng = random.Random(lanes)
    for _ in range(20):
        held = sorted(rng.sample(range(lanes), rng.randint(0, lanes)))
        nodes = cover(held, lanes)
        under = [lanes_under(node, lanes) for node in nodes]
        assert sorted(lane for lanes_ in under for lane in lanes_) == held
        for level, index in nodes:  # no node whose whole parent is held
            parent = (level + 1, index >> 1)
            assert level == depth(lanes) or not set(lanes_under(parent, lanes)) <= set(held)
    assert cover(list(range(lanes)), lanes) == [(depth(lanes), 0)]


def test_a_lane_without_a_sibling_rises_unchanged() -> None:
    sums: list[tuple[int, int]] = []

    def add(left: int, right: int) -> int:
        sums.append((left, right))
        return left + right

    tree: LaneTree[int] = LaneTree(5, add)
    for lane in range(5):
        tree.add((0, lane), 10**lane)
    assert sums == [(1, 10), (100, 1000), (11, 1100), (1111, 10000)]
    assert tree.root() == 11111
    assert [depth(lanes) for lanes in (1, 2, 3, 4, 5, 8, 9, 16)] == [0, 1, 2, 2, 3, 3, 4, 4]


def test_left_is_added_to_right_whoever_came_first() -> None:
    """Addition commutes, other merges may not: a cover of names shows who stood where."""
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        tree: LaneTree[str] = LaneTree(4, lambda left, right: f"({left}{right})")
        for lane in order:
            tree.add((0, lane), str(lane))
        assert tree.root() == "((01)(23))"


@pytest.mark.parametrize("node", [(0, 5), (-1, 0), (4, 0), (0, -1), (1, 3), (3, 1)])
def test_a_node_outside_the_tree_is_refused(node: Node) -> None:
    with pytest.raises(ValueError, match="not in a tree of 5 lanes"):
        LaneTree(5, lambda left, right: left + right).add(node, 1)


@pytest.mark.parametrize("again", [(0, 0), (0, 1), (1, 0), (0, 4)])
def test_a_node_that_is_there_already_is_refused_also_inside_a_larger_one(again: Node) -> None:
    tree: LaneTree[int] = LaneTree(5, lambda left, right: left + right)
    for lane in (0, 1, 4):
        tree.add((0, lane), 1)
    with pytest.raises(ValueError, match="came twice"):
        tree.add(again, 1)
    assert tree.nodes == {(1, 0): 2, (2, 1): 1}


def test_no_root_while_lanes_are_missing() -> None:
    tree: LaneTree[int] = LaneTree(3, lambda left, right: left + right)
    tree.add((0, 0), 1)
    tree.add((0, 2), 1)
    assert not tree.complete
    with pytest.raises(ValueError, match="lanes are missing"):
        tree.root()


@pytest.mark.parametrize("lanes", LANES)
def test_scalars_go_through_the_same_tree_in_float32(lanes: int) -> None:
    rng = random.Random(lanes)
    for _ in range(50):
        leaves = adversarial(rng, lanes)
        values = {lane: float(leaf) for lane, leaf in enumerate(leaves)}
        shuffled = dict(rng.sample(sorted(values.items()), lanes))
        assert bits(sum_lanes(shuffled, lanes)) == bits(reference(leaves, depth(lanes), 0))


def test_scalars_are_rounded_to_float32_before_and_after_each_addition() -> None:
    assert sum_lanes({0: 2.0**24, 1: 1.0, 2: 1.0}, 3) == 2.0**24
    assert sum_lanes({0: 0.1}, 1) == float(np.float32(0.1))
    assert f32(1e39) == float("inf")
    assert f32(-1e39) == float("-inf")
    assert f32(float("nan")) != f32(float("nan"))


def test_a_lane_that_nobody_voted_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="lanes are missing"):
        sum_lanes({0: 1.0, 2: 1.0}, 3)


@pytest.mark.parametrize("special", [1.0, 3.4e38, -3.4e38, float("inf"), float("nan"), -0.0])
@pytest.mark.parametrize("lanes", [1, 2, 7, 64, 1000, 1001])
def test_many_lanes_are_summed_level_by_level_as_the_tree_sums_them(lanes: int, special: float) -> None:
    rng = random.Random(lanes)
    values = {lane: rng.choice([special, rng.uniform(-1e3, 1e3), 1e-40]) for lane in range(lanes)}
    tree: LaneTree[float] = LaneTree(lanes, lambda left, right: f32(left + right))
    for lane, value in values.items():
        tree.add((0, lane), f32(value))
    assert struct.pack("<d", sum_lanes(values, lanes)) == struct.pack("<d", tree.root())

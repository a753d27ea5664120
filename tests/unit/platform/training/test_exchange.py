"""Gradients to their owners and parameters back, between threads: the bits of one rank that holds all lanes."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from everstep.platform.training import exchange
from everstep.platform.training.exchange import Reduction, buckets_of, gather, share_gradients
from everstep.platform.training.lanes import lanes_of
from everstep.platform.training.layout import MIN_BLOCK, FlatLayout, Run, merge_runs
from everstep.platform.training.shard import ShardStore

LAYOUT = FlatLayout.of(
    [("a", (33,), False), ("cut", (2 * MIN_BLOCK + 7,), False), ("s", (), False), ("whole", (5, 50), True)],
    [("running_mean", (9,)), ("running_var", (17,))],
)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BUCKET_ELEMENTS", 64)
    assert len(buckets_of(LAYOUT)) >= 3


def dealt(ranks: int, rng: random.Random) -> list[tuple[Run, ...]]:
    """Contiguous, or every unit to anybody; a rank may own nothing."""
    units = LAYOUT.units
    if rng.random() < 0.3:
        cuts = [len(units) * r // ranks for r in range(ranks + 1)]
        return [merge_runs(units[a:b]) for a, b in itertools.pairwise(cuts)]
    hands: list[list[Run]] = [[] for _ in range(ranks)]
    for unit in units:
        rng.choice(hands).append(unit)
    return [merge_runs(hand) for hand in hands]


def gradients(lanes: int, seed: int) -> list[torch.Tensor]:
    """Sums of these depend on the order of the additions in every element; the padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(LAYOUT.total)
    for tensor in LAYOUT.tensors:
        inside[tensor.start : tensor.stop] = 1
    scale = torch.randint(-12, 13, (lanes, LAYOUT.total), generator=generator)
    return list(torch.randn(lanes, LAYOUT.total, generator=generator) * 2.0**scale * inside)


def reduce_as(rank: int, owned: list[tuple[Run, ...]], zero: int, wire, lanes: list[torch.Tensor]) -> ShardStore:
    waves = zero >= 2
    buckets = buckets_of(LAYOUT)
    reduction = Reduction(LAYOUT, buckets, owned, len(lanes), waves, wire, 30.0)
    for lane in lanes_of(rank, len(owned), len(lanes), waves):
        for bucket in reversed(buckets):  # as backward fills them
            reduction.add(bucket, lane, lanes[lane][bucket.start : bucket.stop].clone())
    store = ShardStore([(0, LAYOUT.total)] if zero == 0 else owned[rank])
    reduction.finish(store)
    if zero == 0:
        share_gradients(store, owned, wire, 30.0)
    return store


def alone(lanes: list[torch.Tensor]) -> torch.Tensor:
    return reduce_as(0, [((0, LAYOUT.total),)], 1, None, lanes).view(0, LAYOUT.total)


def test_one_rank_gives_the_sum_of_the_lane_tree() -> None:
    lanes = gradients(5, 1)
    expected = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + lanes[4]
    assert torch.equal(alone(lanes), expected)
    in_order = lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4]
    assert not torch.equal(in_order, expected), "the values do not tell orders apart"


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_bits_of_one(zero: int, ranks: int, wires, threads) -> None:
    rng = random.Random(f"{zero} {ranks}")
    for lanes_count in range(ranks, 9):
        lanes = gradients(lanes_count, lanes_count)
        expected = alone(lanes)
        owned = dealt(ranks, rng)
        group = wires(ranks)

        def work(rank: int, owned=owned, group=group, lanes=lanes) -> ShardStore:
            return reduce_as(rank, owned, zero, group[rank] if ranks > 1 else None, lanes)

        stores = threads([lambda rank=rank: work(rank) for rank in range(ranks)])
        for rank, store in enumerate(stores):
            runs = [(0, LAYOUT.total)] if zero == 0 else owned[rank]
            assert store.runs == merge_runs(runs)
            for start, stop in runs:
                assert store.view(start, stop).numpy().tobytes() == expected[start:stop].numpy().tobytes()


def test_steps_follow_each_other_on_one_wire(wires, threads) -> None:
    """Tags are used again; memory may be, as soon as a step is over."""
    owned = dealt(3, random.Random(4))
    steps = [gradients(6, seed) for seed in range(4)]
    group = wires(3)

    def work(rank: int) -> list[bytes]:
        found = []
        for lanes in steps:
            store = reduce_as(rank, owned, 2, group[rank], lanes)
            found.append(b"".join(store.view(a, b).numpy().tobytes() for a, b in owned[rank]))
            state = SimpleNamespace(master=store, compute=torch.full((LAYOUT.total,), -1.0))
            gather(state, owned, group[rank], 30.0)  # nobody begins the next step before all have this one
            store.data.fill_(-7.0)
            found.append(state.compute.numpy().tobytes())
        return found

    results = threads([lambda rank=rank: work(rank) for rank in range(3)])
    for rank, found in enumerate(results):
        for number, lanes in enumerate(steps):
            expected = alone(lanes)
            assert found[2 * number] == b"".join(expected[a:b].numpy().tobytes() for a, b in owned[rank])
            assert found[2 * number + 1] == expected.numpy().tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gather_makes_every_ranks_parameters_whole(ranks: int, wires, threads) -> None:
    owned = dealt(ranks, random.Random(ranks))
    values = torch.randn(LAYOUT.total, generator=torch.Generator().manual_seed(1))
    group = wires(ranks)

    def work(rank: int) -> torch.Tensor:
        master = ShardStore(owned[rank])
        for start, stop in owned[rank]:
            master.view(start, stop).copy_(values[start:stop])
        state = SimpleNamespace(master=master, compute=torch.full((LAYOUT.total,), float("nan")))
        gather(state, owned, group[rank] if ranks > 1 else None, 30.0)
        return state.compute

    for compute in threads([lambda rank=rank: work(rank) for rank in range(ranks)]):
        assert torch.equal(compute, values)


def test_zero_2_ships_a_lane_when_its_bucket_is_full_and_keeps_only_its_own_part(wires) -> None:
    group = wires(2)
    owned = [((0, LAYOUT.total),), ()]
    buckets = buckets_of(LAYOUT)
    reduction = Reduction(LAYOUT, buckets, owned, 4, True, group[1], 30.0)
    reduction.add(buckets[-1], 1, torch.ones(buckets[-1].stop - buckets[-1].start))
    ((source, target, _),) = group[1].post.frames
    assert (source, target) == (1, 0)


def test_zero_1_sums_a_ranks_own_lanes_before_it_sends(wires) -> None:
    """Lanes 2, 3 of 4 leave as one subtree; with 3 lanes, rank 1's lanes 1, 2 are no subtree and leave as two."""
    for lanes_count, frames in [(4, 1), (3, 2)]:
        group = wires(2)
        buckets = buckets_of(LAYOUT)[:1]
        owned = [((0, LAYOUT.total),), ()]
        reduction = Reduction(LAYOUT, buckets, owned, lanes_count, False, group[1], 30.0)
        for lane in lanes_of(1, 2, lanes_count, waves=False):
            reduction.add(buckets[0], lane, torch.ones(buckets[0].stop))
        assert not group[1].post.frames
        reduction.finish(ShardStore(()))
        assert len(group[1].post.frames) == frames


def test_buckets_cover_the_flat_space_once_and_are_cut_at_tensors() -> None:
    buckets = buckets_of(LAYOUT)
    assert [b.index for b in buckets] == list(range(len(buckets)))
    assert (buckets[0].start, buckets[-1].stop) == (0, LAYOUT.total)
    assert all(a.stop == b.start for a, b in itertools.pairwise(buckets))
    assert [i for b in buckets for i in b.params] == list(range(len(LAYOUT.tensors)))
    for bucket in buckets:
        assert all(bucket.start <= LAYOUT.tensors[i].start < bucket.stop for i in bucket.params)
    assert buckets_of(FlatLayout.of([])) == []

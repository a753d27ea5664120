"""Gradients to their owners and parameters back, between threads: the bits of one rank that holds all lanes."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from everstep.platform.training import exchange
from everstep.platform.training.exchange import (
    GradientPool,
    Reduction,
    buckets_of,
    gather,
    mirror_gradients,
    share_gradients,
)
from everstep.platform.training.lanes import lanes_of
from everstep.platform.training.layout import MIN_BLOCK, FlatLayout, Run, merge_runs
from everstep.platform.training.ownership import shadows
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


def reduce_as(
    rank: int,
    owned: list[tuple[Run, ...]],
    zero: int,
    group,
    lanes: list[torch.Tensor],
    pool: GradientPool | None = None,
) -> ShardStore:
    waves = zero >= 2
    pool = pool or GradientPool(torch.empty)
    buckets = buckets_of(LAYOUT)
    reduction = Reduction(buckets, owned, len(lanes), waves, group, 30.0, pool)
    for lane in lanes_of(rank, len(owned), len(lanes), waves):
        for bucket in reversed(buckets):  # as backward fills them
            reduction.add(bucket, lane, pool.take(bucket).copy_(lanes[lane][bucket.start : bucket.stop]))
    store = ShardStore([(0, LAYOUT.total)] if zero == 0 else owned[rank])
    reduction.finish(store)
    if zero == 0:
        share_gradients(store, owned, group, 30.0)
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
def test_any_number_of_ranks_gives_the_bits_of_one(zero: int, ranks: int, groups, threads) -> None:
    rng = random.Random(f"{zero} {ranks}")
    for lanes_count in range(ranks, 9):
        lanes = gradients(lanes_count, lanes_count)
        expected = alone(lanes)
        owned = dealt(ranks, rng)
        group = groups(ranks)

        def work(rank: int, owned=owned, group=group, lanes=lanes) -> ShardStore:
            return reduce_as(rank, owned, zero, group[rank] if ranks > 1 else None, lanes)

        stores = threads([lambda rank=rank: work(rank) for rank in range(ranks)])
        for rank, store in enumerate(stores):
            runs = [(0, LAYOUT.total)] if zero == 0 else owned[rank]
            assert store.runs == merge_runs(runs)
            for start, stop in runs:
                assert store.view(start, stop).numpy().tobytes() == expected[start:stop].numpy().tobytes()


def test_steps_follow_each_other_in_one_group(groups, threads) -> None:
    """Tags are used again; so is memory, a gradient's as soon as it has arrived, the rest when a step is over."""
    owned = dealt(3, random.Random(4))
    steps = [gradients(6, seed) for seed in range(4)]
    group = groups(3)

    def work(rank: int) -> list[bytes]:
        found = []
        pool = GradientPool(torch.empty)
        for number, lanes in enumerate(steps):
            store = reduce_as(rank, owned, number % 2 + 1, group[rank], lanes, pool)
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
def test_gather_makes_every_ranks_parameters_whole(ranks: int, groups, threads) -> None:
    owned = dealt(ranks, random.Random(ranks))
    values = torch.randn(LAYOUT.total, generator=torch.Generator().manual_seed(1))
    group = groups(ranks)

    def work(rank: int) -> torch.Tensor:
        master = ShardStore(owned[rank])
        for start, stop in owned[rank]:
            master.view(start, stop).copy_(values[start:stop])
        state = SimpleNamespace(master=master, compute=torch.full((LAYOUT.total,), float("nan")))
        gather(state, owned, group[rank] if ranks > 1 else None, 30.0)
        return state.compute

    for compute in threads([lambda rank=rank: work(rank) for rank in range(ranks)]):
        assert torch.equal(compute, values)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_shadow_gets_the_reduced_gradients_of_the_rank_before_it(ranks: int, groups, threads) -> None:
    """Bit by bit, into what it holds beside its own; a rank without shadow sends and gets nothing."""
    owned = dealt(ranks, random.Random(ranks))
    shadowed = shadows(owned)
    sums = gradients(1, ranks)[0]
    group = groups(ranks)

    def work(rank: int) -> ShardStore:
        store = ShardStore([*owned[rank], *shadowed[rank]])
        store.data.fill_(float("nan"))
        for start, stop in owned[rank]:
            store.view(start, stop).copy_(sums[start:stop])
        mirror_gradients(store, owned, shadowed, group[rank] if ranks > 1 else None, 30.0)
        return store

    for rank, store in enumerate(threads([lambda rank=rank: work(rank) for rank in range(ranks)])):
        for start, stop in [*owned[rank], *shadowed[rank]]:
            assert store.view(start, stop).numpy().tobytes() == sums[start:stop].numpy().tobytes()
    sent = group[0].post.sent
    assert sorted(sent) == sorted((r, (r + 1) % ranks, len(owned[r])) for r in range(ranks) if ranks > 1 and owned[r])
    threads(
        [lambda rank=rank: mirror_gradients(ShardStore(()), owned, (), group[rank], 30.0) for rank in range(ranks)]
    )
    assert group[0].post.sent == sent


def test_zero_2_ships_a_lane_when_its_bucket_is_full_and_keeps_only_its_own_part(groups) -> None:
    group = groups(2)
    owned = [((0, LAYOUT.total),), ()]
    buckets = buckets_of(LAYOUT)
    reduction = Reduction(buckets, owned, 4, True, group[1], 30.0, GradientPool(torch.empty))
    reduction.add(buckets[-1], 1, torch.ones(buckets[-1].stop - buckets[-1].start))
    assert group[1].post.sent == [(1, 0, 1)]


def test_zero_1_sums_a_ranks_own_lanes_before_it_sends(groups) -> None:
    """Lanes 2, 3 of 4 leave as one subtree; with 3 lanes, rank 1's lanes 1, 2 are no subtree and leave as two, in
    one move."""
    for lanes_count, nodes in [(4, 1), (3, 2)]:
        group = groups(2)
        buckets = buckets_of(LAYOUT)[:1]
        owned = [((0, LAYOUT.total),), ()]
        Reduction(buckets, owned, lanes_count, False, group[0], 30.0, GradientPool(torch.empty))  # receives
        reduction = Reduction(buckets, owned, lanes_count, False, group[1], 30.0, GradientPool(torch.empty))
        for lane in lanes_of(1, 2, lanes_count, waves=False):
            reduction.add(buckets[0], lane, torch.ones(buckets[0].stop))
        assert not group[1].post.sent
        reduction.finish(ShardStore(()))
        assert group[1].post.sent == [(1, 0, nodes)]


def test_buckets_cover_the_flat_space_once_and_are_cut_at_tensors() -> None:
    buckets = buckets_of(LAYOUT)
    assert [b.index for b in buckets] == list(range(len(buckets)))
    assert (buckets[0].start, buckets[-1].stop) == (0, LAYOUT.total)
    assert all(a.stop == b.start for a, b in itertools.pairwise(buckets))
    assert [i for b in buckets for i in b.params] == list(range(len(LAYOUT.tensors)))
    for bucket in buckets:
        assert all(bucket.start <= LAYOUT.tensors[i].start < bucket.stop for i in bucket.params)
    assert buckets_of(FlatLayout.of([])) == []


def test_a_gradients_memory_is_used_again_when_it_has_arrived_and_not_before(groups) -> None:
    group = groups(2)
    owned = [((0, LAYOUT.total),), ()]
    bucket = buckets_of(LAYOUT)[0]
    pool = GradientPool(torch.empty)
    receiver = Reduction([bucket], owned, 4, True, group[0], 30.0, pool)
    sender = Reduction([bucket], owned, 4, True, group[1], 30.0, pool)
    first, second = pool.take(bucket).fill_(1.0), pool.take(bucket).fill_(2.0)
    group[1].post.hold = True
    sender.add(bucket, 1, first)
    sender.add(bucket, 3, second)
    assert pool.take(bucket).data_ptr() not in {first.data_ptr(), second.data_ptr()}
    group[1].post.hold = False
    receiver.add(bucket, 0, torch.zeros(bucket.stop - bucket.start))
    receiver.add(bucket, 2, torch.zeros(bucket.stop - bucket.start))
    store = ShardStore(((bucket.start, bucket.stop),))
    receiver.finish(store)
    assert torch.equal(store.data, torch.full_like(store.data, 3.0))
    sender.finish(ShardStore(()))
    again = {pool.take(bucket).data_ptr() for _ in range(4)}
    assert {first.data_ptr(), second.data_ptr()} <= again

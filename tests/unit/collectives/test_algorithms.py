"""Each algorithm by itself: the same bits as the rank tree where it promises them, whatever the sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.unit.collectives.members import Members, Peer, members

from everstep.collectives.algorithms import choose
from everstep.collectives.algorithms.by_host import HostReduce
from everstep.collectives.algorithms.halving import HalvingReduce
from everstep.collectives.algorithms.reduction import Reducer
from everstep.collectives.algorithms.ring import RingReduce
from everstep.collectives.algorithms.spread import Spread
from everstep.collectives.errors import Mismatch
from everstep.collectives.flow import Algorithm, Flow
from everstep.collectives.operations import Operation

SIZES = [1, 2, 3, 5, 8, 13, 9_001, 131_073]
LARGE = [2_100_003]  # of several pieces
Make = Callable[[Flow, str, torch.Tensor], Algorithm]


@pytest.fixture(autouse=True, scope="module")
def one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_host(*hosts: list[int]) -> Make:
    return lambda flow, op, tensor: HostReduce(flow, op, tensor, hosts)


def check(group: Members, make: Make, op: str, dtype: torch.dtype, sizes: list[int], exact: bool = True) -> None:
    n = len(group.peers)
    for size in sizes:
        parts = [(torch.randn(size, generator=torch.Generator().manual_seed(r)) * 100).to(dtype) for r in range(n)]
        wanted = parts[0].clone()
        Reducer(op, n, dtype).into(wanted, parts, -1)

        def part(peer: Peer, parts: list[torch.Tensor] = parts, wanted: torch.Tensor = wanted) -> None:
            tensor = parts[peer.rank].clone()
            operation = Operation("all_reduce", (op,), 0, lambda flow: make(flow, op, tensor), (tensor,))
            peer.mesh.submit(operation).wait()
            if exact:
                assert torch.equal(tensor, wanted)
            else:
                torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-3)

        group.run(part)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_halving_has_the_bits_of_the_rank_tree(n: int, transport: str) -> None:
    with members(n, transport) as group:
        check(group, HalvingReduce, "sum", torch.float32, SIZES + (LARGE if n == 2 else []))
        check(group, HalvingReduce, "avg", torch.float64, [7, 70_000])
        check(group, HalvingReduce, "max", torch.int32, [7, 70_000])


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_ring(n: int, transport: str) -> None:
    with members(n, transport) as group:
        check(group, RingReduce, "avg", torch.float32, SIZES + (LARGE if n == 2 else []), exact=False)
        check(group, RingReduce, "sum", torch.int64, [7, 70_000])


def on_hosts(hosts: list[list[int]]) -> Callable[[int, str], str]:
    host = {rank: f"host{i}" for i, ranks in enumerate(hosts) for rank in ranks}
    return lambda rank, name: f"{host[rank]}/{name.partition('/')[2]}"


@pytest.mark.parametrize(
    "hosts", [[[0, 1], [2, 3]], [[0, 1], [2, 3], [4, 5]], [[0, 1, 2, 3], [4, 5, 6, 7]]], ids=["2x2", "3x2", "2x4"]
)
def test_aligned_hosts_have_the_bits_of_the_rank_tree(hosts: list[list[int]]) -> None:
    with members(sum(map(len, hosts)), local=on_hosts(hosts)) as group:
        check(group, by_host(*hosts), "sum", torch.float32, SIZES + (LARGE if len(hosts) == 3 else []))
        check(group, by_host(*hosts), "avg", torch.float64, [7, 70_000])
        check(group, by_host(*hosts), "min", torch.uint8, [7, 70_000])


def test_other_hosts_sum_in_an_order_of_their_own() -> None:
    hosts = [[0, 3], [1, 4], [2, 5]]
    with members(6, local=on_hosts(hosts)) as group:
        check(group, by_host(*hosts), "avg", torch.float32, SIZES, exact=False)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize(("n", "root"), [(2, 0), (3, 1), (5, 4)])
def test_spread(transport: str, n: int, root: int) -> None:
    with members(n, transport) as group:
        for size in [*SIZES, *(LARGE if n == 3 else [])]:

            def part(peer: Peer, size: int = size) -> None:
                tensor = torch.arange(float(size)) if peer.rank == root else torch.zeros(size)
                operation = Operation("broadcast", (), 0, lambda flow: Spread(flow, tensor, root), (tensor,))
                peer.mesh.submit(operation).wait()
                assert torch.equal(tensor, torch.arange(float(size)))

            group.run(part)


# ---- choosing -------------------------------------------------------------------------------------------

MIB = 1 << 20
APART, PAIRS, MIXED, UNEVEN = "abcd", "aabb", "abab", "aab"


@pytest.mark.parametrize(
    ("hosts", "nbytes", "deterministic", "name"),
    [
        ("aaaa", 64 * MIB, False, "direct"),
        ("ab", 64 * MIB, False, "direct"),
        (APART, MIB, True, "halving"),
        (APART, 64 * MIB, True, "direct"),
        (APART, 64 * MIB, False, "ring"),
        ("abc", 4 * MIB, False, "direct"),
        (PAIRS, MIB // 2, True, "halving"),
        (PAIRS, MIB, True, "by host"),
        (MIXED, 64 * MIB, True, "direct"),
        (MIXED, 64 * MIB, False, "by host"),
        ("aabbcc", MIB // 2, True, "by host"),
        ("aaabbb", 64 * MIB, True, "direct"),
        ("aaabbb", 64 * MIB, False, "by host"),
        (UNEVEN, 64 * MIB, True, "direct"),
    ],
)
def test_what_is_chosen(hosts: str, nbytes: int, deterministic: bool, name: str) -> None:
    assert choose.choose_reduce(nbytes, hosts, deterministic, widens=False) == name
    assert choose.choose_reduce(nbytes, hosts, deterministic, widens=True) == "direct"


def test_which_broadcast_is_chosen() -> None:
    assert choose.choose_broadcast(MIB, "abc") == "spread"
    assert [choose.choose_broadcast(MIB, hosts) for hosts in ("aaa", "ab", "aab")] == ["moves"] * 3
    assert choose.choose_broadcast(MIB - 1, "abc") == "moves"


def test_members_that_chose_differently_are_told() -> None:
    with members(4, "tcp") as group:

        def part(peer: Peer) -> None:
            tensor = torch.ones(3 * MIB)
            work = peer.all_reduce(tensor, deterministic=peer.rank != 1)
            with pytest.raises(Mismatch, match=r"different algorithms: .*rank 1 \(m1\) brought all_reduce.*"):
                work.wait()
            assert torch.equal(tensor, torch.ones(3 * MIB))
            peer.all_reduce(tensor, deterministic=False).wait()
            assert torch.equal(tensor, torch.full((3 * MIB,), 4.0))

        group.run(part)

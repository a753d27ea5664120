"""Every operation against plain torch, bit by bit, over both transports."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tests.unit.collectives.members import Members, Peer, members

from everstep.collectives.transport.arena import SLOT_BYTES, SLOTS
from everstep.collectives.transport.frames import EAGER_BYTES

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
OPS = ("sum", "avg", "max", "min")


@pytest.fixture(scope="module")
def groups() -> Iterator[Callable[[int, str], Members]]:
    """Members are made once: what one test leaves behind would break the next."""
    made: dict[tuple[int, str], Members] = {}

    def get(n: int, transport: str) -> Members:
        if (n, transport) not in made:
            made[(n, transport)] = Members(n, transport, lambda rank, name: name)
        return made[(n, transport)]

    yield get
    for each in made.values():
        each.close()


@pytest.fixture(params=["auto", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="module")
def one_thread_each() -> Iterator[None]:
    """The members compute side by side already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def data(rank: int, shape: int | tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Must not be changed: others look at it, too."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    shape = (shape,) if isinstance(shape, int) else shape
    if dtype in FLOATS:
        values = torch.randn(shape, generator=generator)
        # Magnitudes apart, so that the order of a sum is seen in its bits; zeros of both signs for max and min.
        values = values * 10.0 ** torch.randint(-3, 3, shape, generator=generator)
        zeros = torch.randint(0, 4, shape, generator=generator)
        return values.where(zeros > 0, torch.copysign(torch.zeros(()), values)).to(dtype)
    low, high = (0, 2) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(dtype)


def combined(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The rank tree, written down once more: halves are split at the largest power of two below their length."""
    wide = torch.float32 if parts[0].dtype in (torch.float16, torch.bfloat16) else parts[0].dtype

    def tree(low: int, high: int) -> torch.Tensor:
        if high - low == 1:
            return parts[low].to(wide)
        half = 1
        while 2 * half < high - low:
            half *= 2
        left, right = tree(low, low + half), tree(low + half, high)
        if op in ("sum", "avg"):
            return left + right
        return torch.maximum(left, right) if op == "max" else torch.minimum(left, right)

    total = tree(0, len(parts))
    if op == "avg":
        total = total / len(parts)
    if op in ("max", "min") and wide.is_floating_point:
        total = torch.where(total == 0, 0.0, total).to(wide)
    return total.to(parts[0].dtype)


def same(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert given.shape == wanted.shape
    assert given.dtype == wanted.dtype
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (given, wanted)]
    return torch.equal(*raw)


def around(edge_bytes: int, dtype: torch.dtype) -> list[int]:
    edge = edge_bytes // dtype.itemsize
    return [edge - 1, edge, edge + 1]


SIZES = [
    0,
    1,
    7,
    333,
    *around(EAGER_BYTES, torch.float32),
    *around(2 * EAGER_BYTES, torch.float32),
    100_003,
    *around(SLOT_BYTES, torch.float32),
    1_000_003,
]
LARGE = [*around(3 * SLOT_BYTES, torch.float32), (SLOTS + 5) * SLOT_BYTES // 4 + 17]  # more than the slots hold


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_all_reduce_gives_the_rank_tree(groups: Callable[[int, str], Members], transport: str, n: int) -> None:
    sizes = SIZES + (LARGE if n == 3 else [])
    wanted = {size: combined([data(rank, size, torch.float32) for rank in range(n)], "sum") for size in sizes}

    def part(peer: Peer) -> None:
        for size in sizes:
            tensor = data(peer.rank, size, torch.float32).clone()
            peer.all_reduce(tensor).wait()
            assert same(tensor, wanted[size]), size

    groups(n, transport).run(part)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_type_and_op(groups: Callable[[int, str], Members], transport: str, dtype: torch.dtype) -> None:
    ops = OPS if dtype in FLOATS else ("sum", "max", "min")

    def part(peer: Peer) -> None:
        n = peer.size
        for op, size in itertools.product(ops, (0, 31, 30_001 * n, 100_002 * n)):
            each = [data(rank, size // n * n, dtype) for rank in range(n)]
            wanted = combined(each, op)
            tensor, output = each[peer.rank].clone(), torch.empty(size // n, dtype=dtype)
            reduced = peer.all_reduce(tensor, op, tag=1)
            scattered = peer.reduce_scatter(output, each[peer.rank], op, tag=2)
            reduced.wait()
            scattered.wait()
            assert same(tensor, wanted), (op, size)
            assert same(output, wanted.chunk(n)[peer.rank] if size else output), (op, size)

    groups(3, transport).run(part)
    groups(2, transport).run(part)  # which has a way of its own


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_moves_and_reduce_scatter(groups: Callable[[int, str], Members], transport: str, n: int) -> None:
    def part(peer: Peer) -> None:
        for size, dtype in itertools.product(SIZES, (torch.float32, torch.bool)):
            me = peer.rank
            each = [data(rank, size, dtype, seed=1) for rank in range(n)]
            output = torch.empty(n * size, dtype=dtype)
            peer.all_gather(output, each[me]).wait()
            assert same(output, torch.cat(each)), ("all_gather", size)
            for root in {0, n - 1}:
                tensor = each[me].clone()
                peer.broadcast(tensor, root).wait()
                assert same(tensor, each[root]), ("broadcast", size)
            width = size // n
            each = [tensor[: n * width] for tensor in each]
            output = torch.empty(n * width, dtype=dtype)
            peer.all_to_all(output, each[me]).wait()
            assert same(output, torch.cat([given[me * width : (me + 1) * width] for given in each])), size
            if dtype is torch.float32:
                output = torch.empty(width)
                peer.reduce_scatter(output, each[me]).wait()
                assert same(output, combined([tensor[me * width : (me + 1) * width] for tensor in each], "sum"))
            peer.barrier().wait()

    groups(n, transport).run(part)


def test_send_and_recv(groups: Callable[[int, str], Members], transport: str) -> None:
    """Every pair, both ways at once."""

    def part(peer: Peer) -> None:
        for size in SIZES:
            others = [rank for rank in range(peer.size) if rank != peer.rank]
            sent = {rank: data(10 * peer.rank + rank, size, torch.float16) for rank in others}
            got = {rank: torch.empty(size, dtype=torch.float16) for rank in others}
            works = [peer.send(sent[rank], rank, tag=7) for rank in others]
            works += [peer.recv(got[rank], rank, tag=7) for rank in reversed(others)]
            for work in works:
                work.wait()
            for rank in others:
                assert same(got[rank], data(10 * rank + peer.rank, size, torch.float16))

    groups(3, transport).run(part)


@pytest.mark.parametrize("side", [13, 300])
def test_tensors_that_are_not_contiguous(groups: Callable[[int, str], Members], transport: str, side: int) -> None:
    def layouts(rank: int) -> list[torch.Tensor]:
        square = data(rank, (side, side), torch.float32)
        strided = data(rank, (side, 3 * side), torch.float32)[:, 1::3]
        return [square.t(), strided, data(rank, (side, 2, side), torch.float32).permute(2, 0, 1)]

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        """With strides that are not those of a contiguous one."""
        larger = torch.zeros(*tensor.shape, 2)[..., 0]
        return larger.copy_(tensor)

    def part(peer: Peer) -> None:
        n, me = peer.size, peer.rank
        for i in range(3):
            each = [layouts(rank)[i] for rank in range(n)]
            tensor = copy(layouts(me)[i])
            assert not tensor.is_contiguous()
            peer.all_reduce(tensor).wait()
            assert same(tensor, combined(each, "sum"))
            output = torch.zeros(tensor.shape[1], n * tensor.shape[0], *tensor.shape[2:]).transpose(0, 1)
            peer.all_gather(output, each[me]).wait()
            assert same(output, torch.cat(each))
            tensor = copy(layouts(me)[i])
            peer.broadcast(tensor, 1).wait()
            assert same(tensor, each[1])
        given, tensor = data(0, side, torch.float32).expand(side, side), torch.empty(side, side).t()
        if me < 2:
            (peer.send(given, 1) if me == 0 else peer.recv(tensor, 0)).wait()
        if me == 1:
            assert same(tensor, given.contiguous())

    groups(3, transport).run(part)


@pytest.mark.parametrize("width", [100, 100_000])
def test_in_place_and_overlapping(groups: Callable[[int, str], Members], transport: str, width: int) -> None:
    def part(peer: Peer) -> None:
        n, me = peer.size, peer.rank
        each = [data(rank, n * width, torch.float32) for rank in range(n)]
        own = slice(me * width, (me + 1) * width)
        other = slice((me + 1) % n * width, ((me + 1) % n + 1) * width)
        for where in (own, other):
            memory = each[me].clone()
            peer.reduce_scatter(memory[where], memory).wait()
            assert same(memory[where], combined(each, "sum")[own])
            memory = each[me].clone()
            shift = 0 if where == own else 1
            given = [each[r][(r + shift) % n * width :][:width] for r in range(n)]
            peer.all_gather(memory, memory[where]).wait()
            assert same(memory, torch.cat(given))
        memory = each[me].clone()
        peer.all_to_all(memory, memory).wait()
        assert same(memory, torch.cat([tensor[own] for tensor in each]))

    groups(3, transport).run(part)


@pytest.mark.parametrize("size", [5, 20_000, 400_000])
def test_tags_begun_in_different_orders(groups: Callable[[int, str], Members], transport: str, size: int) -> None:
    tags = 6

    def part(peer: Peer) -> None:
        tensors = {tag: data(peer.rank, size, torch.float32, seed=tag).clone() for tag in range(tags)}
        order = [(tag * 5 + peer.rank) % tags for tag in range(tags)]
        works = {tag: peer.all_reduce(tensors[tag], tag=tag) for tag in order}
        for tag in reversed(order):
            works[tag].wait()
        for tag in range(tags):
            wanted = combined([data(rank, size, torch.float32, seed=tag) for rank in range(peer.size)], "sum")
            assert same(tensors[tag], wanted)

    groups(4, transport).run(part)


@pytest.mark.parametrize(("count", "size"), [(1000, 4), (60, 50_000)])
def test_many_that_nobody_waits_for(
    groups: Callable[[int, str], Members], transport: str, count: int, size: int
) -> None:
    def part(peer: Peer) -> None:
        tensors = [torch.full((size,), float(i + peer.rank)) for i in range(count)]
        works = [peer.all_reduce(tensor) for tensor in tensors]
        peer.barrier().wait()
        works[-1].wait()
        for i, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
            work.wait()
            assert torch.equal(tensor, torch.full((size,), 3.0 * i + 3))

    groups(3, transport).run(part)


def test_an_operation_may_mix_with_all_others(groups: Callable[[int, str], Members], transport: str) -> None:
    """One tag, all kinds in flight at once, in the same order on each member."""

    def part(peer: Peer) -> None:
        n, me, size = peer.size, peer.rank, 40_000
        each = [data(rank, n * size, torch.float32) for rank in range(n)]
        reduced, root = each[me].clone(), each[me].clone()
        scattered, gathered, swapped = torch.empty(size), torch.empty(n * n * size), torch.empty(n * size)
        works = [
            peer.all_reduce(reduced),
            peer.barrier(),
            peer.reduce_scatter(scattered, each[me]),
            peer.all_gather(gathered, each[me]),
            peer.broadcast(root, 2),
            peer.all_to_all(swapped, each[me]),
        ]
        for work in works:
            work.wait()
        own = slice(me * size, (me + 1) * size)
        assert same(reduced, combined(each, "sum"))
        assert same(scattered, reduced[own])
        assert same(gathered, torch.cat(each))
        assert same(root, each[2])
        assert same(swapped, torch.cat([tensor[own] for tensor in each]))

    groups(3, transport).run(part)


def test_members_on_two_hosts_give_the_same_bits() -> None:
    """Ranks 0 and 2 share memory, 1 and 3 do: slots and frames in one operation."""
    with members(4, local=lambda rank, name: f"host{rank % 2}/{name.split('/', 1)[1]}") as group:

        def part(peer: Peer) -> None:
            for size in (10, 20_000, 700_001):
                each = [data(rank, size, torch.bfloat16) for rank in range(4)]
                tensor, output = each[peer.rank].clone(), torch.empty(4 * size, dtype=torch.bfloat16)
                peer.all_reduce(tensor, "avg").wait()
                assert same(tensor, combined(each, "avg"))
                peer.all_gather(output, each[peer.rank]).wait()
                assert same(output, torch.cat(each))

        group.run(part)

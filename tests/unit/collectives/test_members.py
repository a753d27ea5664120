"""Moves of several tensors of any sizes: over shared memory, over TCP, from registered tensors and from others."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tests.unit.collectives.members import LIMIT_S, Peer, members

from everstep.collectives.errors import CollectiveTimeout, Mismatch, PeerLost
from everstep.collectives.members import Members
from everstep.collectives.transport.arena import SLOT_BYTES

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
MANY = SLOT_BYTES // 4 * 3 + 5  # elements: more than three slots
SIZES = ((3,), (0,), (), (8000, 1, 300), (MANY, 7), (1,) * 40)


def values(rank: int, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.arange(size, dtype=torch.float32) + 1000 * rank + at for at, size in enumerate(sizes)]


def blank(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.full((size,), -1.0) for size in sizes]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("sizes", SIZES)
def test_parts_arrive_in_their_places_both_ways_at_once(transport: str, sizes: tuple[int, ...]):
    def work(peer: Peer) -> bool:
        mine = Members(peer.mesh)
        others = [rank for rank in range(3) if rank != peer.rank]
        places = {rank: blank(sizes) for rank in others}
        works = [mine.recv_parts(places[rank], rank, 5) for rank in others]
        works += [mine.send_parts(values(peer.rank, sizes), rank, 5) for rank in others]
        for each in works:
            each.wait(LIMIT_S)
        return all(same(places[rank], values(rank, sizes)) for rank in others)

    with members(3, transport) as group:
        assert group.run(work) == [True] * 3


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("registered", [False, True])
def test_everybodys_parts_are_shared_in_place(transport: str, registered: bool):
    sizes = ((MANY, 3), (), (17,))

    def work(peer: Peer, arena) -> bool:
        flat = arena.empty((sum(map(sum, sizes)),), torch.float32) if registered else torch.empty(MANY + 20)
        flat.fill_(-1.0)
        cuts = iter(torch.split(flat, [size for each in sizes for size in each]))
        parts = [[next(cuts) for _ in each] for each in sizes]
        for place, value in zip(parts[peer.rank], values(peer.rank, sizes[peer.rank]), strict=True):
            place.copy_(value)
        Members(peer.mesh).share_parts(parts, 1).wait(LIMIT_S)
        return all(same(parts[rank], values(rank, sizes[rank])) for rank in range(3))

    with members(3, transport) as group:
        assert group.run(lambda peer: work(peer, group.listeners[peer.rank].arena)) == [True] * 3


def test_on_one_host_nobody_but_those_who_ask_for_the_data_moves_it():
    """A thread of the mesh would take the core from one that computes."""

    def work(peer: Peer) -> bool:
        place = torch.zeros(MANY)
        mine = Members(peer.mesh)
        each = mine.send_parts([torch.ones(MANY)], 1) if peer.rank == 0 else mine.recv_parts([place], 0)
        until = time.monotonic() + LIMIT_S
        while not each.done() and time.monotonic() < until:
            pass
        return peer.rank == 0 or bool((place == 1).all())

    with members(2) as group:
        assert group.run(work) == [True, True]
        assert {thread.name for thread in threading.enumerate()}.isdisjoint({"mesh-0", "mesh-1"})


def test_other_sizes_than_the_senders_are_a_mismatch_and_change_nothing():
    place = torch.zeros(MANY)

    def work(peer: Peer) -> str:
        mine = Members(peer.mesh)
        each = mine.send_parts([torch.ones(MANY - 1)], 1) if peer.rank == 0 else mine.recv_parts([place], 0)
        with pytest.raises(Mismatch) as caught:
            each.wait(LIMIT_S)
        return str(caught.value)

    with members(2) as group:
        for said in group.run(work):
            assert "rank 0 (m0)" in said
            assert "rank 1 (m1)" in said
    assert not bool(place.any())


def test_a_timeout_names_who_is_waited_for_and_an_abort_ends_it():
    with members(3) as group:
        mine = Members(group.peers[1].mesh)
        work = mine.recv_parts([torch.zeros(MANY)], 2)
        with pytest.raises(CollectiveTimeout, match=r"rank 2 \(m2\)") as caught:
            work.wait(0.05)
        assert caught.value.about == ("m2",)
        group.peers[1].mesh.abort(PeerLost("the view is over"))
        with pytest.raises(PeerLost, match="the view is over"):
            work.wait(LIMIT_S)

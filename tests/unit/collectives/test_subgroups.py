"""Operations among some members, and grids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.unit.collectives.members import Members, Peer, members

from everstep.collectives.errors import CollectiveTimeout, Mismatch, PeerLost


@pytest.fixture(scope="module", params=["auto", "tcp"])
def four(request: pytest.FixtureRequest) -> Iterator[Members]:
    with members(4, request.param) as group:
        yield group


@pytest.mark.parametrize("size", [9, 100_001])
def test_every_operation_counts_in_ranks_of_the_subgroup(four: Members, size: int) -> None:
    """[3, 1, 2]: the order is the one that is given. Rank 0 of the group has no part in it."""
    ranks = [3, 1, 2]

    def part(peer: Peer) -> None:
        if peer.rank == 0:
            return
        sub = peer.subgroup(ranks)
        me = sub.rank
        assert (sub.size, ranks[me]) == (3, peer.rank)
        tensor = torch.full((size,), float(me + 1))
        sub.all_reduce(tensor).wait()
        assert torch.equal(tensor, torch.full((size,), 6.0))
        output = torch.empty(3 * size)
        sub.all_gather(output, torch.full((size,), float(me))).wait()
        assert torch.equal(output, torch.arange(3.0).repeat_interleave(size))
        tensor = torch.full((size,), float(me))
        sub.broadcast(tensor, root=2).wait()
        assert torch.equal(tensor, torch.full((size,), 2.0))
        given = torch.arange(3.0).repeat_interleave(size) + 10 * me
        sub.all_to_all(output, given).wait()
        assert torch.equal(output, (10 * torch.arange(3.0)).repeat_interleave(size) + me)
        sub.reduce_scatter(tensor, given, "max").wait()
        assert torch.equal(tensor, torch.full((size,), 20.0 + me))
        if me == 0:
            sub.send(given, to=2).wait()
        if me == 2:
            sub.recv(output, source=0).wait()
            assert torch.equal(output, torch.arange(3.0).repeat_interleave(size))
        sub.barrier().wait()

    four.run(part)


def test_subgroups_and_the_group_go_on_side_by_side(four: Members) -> None:
    """With one tag, begun in another order on each member."""

    def part(peer: Peer) -> None:
        pair, other = [0, 1] if peer.rank < 2 else [2, 3], [0, 2] if peer.rank % 2 == 0 else [1, 3]
        inner = peer.subgroup(pair).subgroup([1, 0])
        parts = [peer, peer.subgroup(pair), peer.subgroup(other), peer.subgroup(pair, name="again"), inner]
        wanted = [6.0, float(sum(pair)), float(sum(other)), float(sum(pair)), float(sum(pair))]
        tensors = [torch.full((50_000,), float(peer.rank)) for _ in parts]
        turn = peer.rank
        works = [parts[i].all_reduce(tensors[i]) for i in [*range(turn, 5), *range(turn)]]
        for work in works:
            work.wait()
        assert [float(tensor[-1]) for tensor in tensors] == wanted
        assert inner.rank == 1 - parts[1].rank

    four.run(part)


def test_a_mismatch_concerns_the_subgroup_alone(four: Members) -> None:
    def part(peer: Peer) -> None:
        sub = peer.subgroup([0, 1] if peer.rank < 2 else [2, 3], "half")
        work = sub.all_reduce(torch.ones(4 + (peer.rank == 3)))
        if peer.rank < 2:
            work.wait()
        else:
            with pytest.raises(Mismatch, match=r"rank 2 \(m2\) brought .* rank 3 \(m3\) brought"):
                work.wait()

    four.run(part)


def test_a_timeout_names_the_subgroup(four: Members) -> None:
    work = four.peers[1].subgroup([1, 2], "half").barrier(tag=77)
    with pytest.raises(CollectiveTimeout, match=r"barrier\(\), tag 77 of half: .* rank 2 \(m2\)"):
        work.wait(timeout_s=0.01)
    four.peers[2].subgroup([1, 2], "half").barrier(tag=77).wait()
    work.wait()


def test_a_grid(four: Members) -> None:
    def part(peer: Peer) -> tuple[tuple[int, ...], ...]:
        grid = peer.grid(data=2, tensor=2)
        tensor = torch.tensor([float(peer.rank)])
        grid.tensor.all_reduce(tensor).wait()
        grid.data.all_reduce(tensor, "max").wait()
        grid.pipeline.barrier().wait()
        assert tensor == 5
        return grid.pipeline.ranks, grid.data.ranks, grid.tensor.ranks

    assert four.run(part) == [
        ((0,), (0, 2), (0, 1)),
        ((1,), (1, 3), (0, 1)),
        ((2,), (0, 2), (2, 3)),
        ((3,), (1, 3), (2, 3)),
    ]
    grids = four.run(lambda peer: peer.grid(pipeline=2, data=2))
    assert [grid.data.ranks for grid in grids] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [grid.pipeline.rank for grid in grids] == [0, 0, 1, 1]


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("subgroup", {"ranks": [0, 4]}, ValueError, r"ranks are \[0, 4\]; different ones of 0 to 3"),
    ("subgroup", {"ranks": [0, 0]}, ValueError, r"ranks are \[0, 0\]; different ones"),
    ("subgroup", {"ranks": [1, 2]}, ValueError, r"ranks are \[1, 2\]; this member, rank 0, must be among them"),
    ("subgroup", {"ranks": []}, ValueError, r"ranks are \[\]; this member"),
    ("subgroup", {"ranks": ["a"]}, TypeError, r"ranks are \['a'\]; integers"),
    ("grid", {"data": 3}, ValueError, r"3 \* 1 \* 1 = 3; it must be 4, the number of members"),
    ("grid", {"data": 4, "tensor": 0}, ValueError, r"tensor is 0; it must be at least 1"),
    ("grid", {"data": 2.0, "tensor": 2}, TypeError, r"data is 2.0; a number of members"),
]


@pytest.mark.parametrize(("method", "given", "kind", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments_are_refused(
    four: Members, method: str, given: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        getattr(four.peers[0], method)(**given)


def test_a_subgroup_ends_with_its_view(four: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    sub = four.peers[0].subgroup([0, 1])
    monkeypatch.setattr(four.peers[0], "_view_in_use", lambda: "1.2")
    with pytest.raises(PeerLost, match=r"is over; make it again in view 1\.2"):
        sub.barrier()

"""What operations say when they cannot be done, and what they leave as it was."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.unit.collectives.members import LIMIT_S, Members, Peer, members

from everstep.collectives import ErrorFeedback
from everstep.collectives.errors import CollectiveError, CollectiveTimeout, Mismatch, PeerLost
from everstep.collectives.transport.channel import Channel
from everstep.collectives.work import Work

SMALL, LARGE = 10, 500_000


@pytest.fixture(params=["auto", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def three(transport: str) -> Iterator[Members]:
    with members(3, transport) as group:
        yield group


@pytest.fixture(scope="module")
def pair() -> Iterator[Members]:
    """For what nothing is sent of."""
    with members(2) as group:
        yield group


def error_of(work: Work) -> CollectiveError:
    with pytest.raises(CollectiveError) as raised:
        work.wait()
    return raised.value


def check_usable(group: Members) -> None:
    def part(peer: Peer) -> None:
        for size in (SMALL, LARGE):
            tensor = torch.full((size,), peer.rank + 1.0)
            peer.all_reduce(tensor).wait()
            assert torch.equal(tensor, torch.full((size,), 6.0))

    group.run(part)


# ---- time limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_timeout_names_everything_and_the_operation_goes_on(three: Members, size: int) -> None:
    tensors = [torch.full((size,), float(rank)) for rank in range(3)]
    works = [three.peers[rank].all_reduce(tensors[rank], tag=5) for rank in (0, 1)]
    with pytest.raises(CollectiveTimeout) as raised:
        works[0].wait(timeout_s=0.1)
    text = str(raised.value)
    assert re.search(r"rank 0 \(m0\).*all_reduce.*tag 5.*not done after 0\.\d s \(limit 0\.1 s, timeout_s\)", text)
    assert "rank 2 (m2), which has not begun it" in text
    assert "m1" not in text
    assert not works[0].done()
    works.append(three.peers[2].all_reduce(tensors[2], tag=5))
    for work in works:
        work.wait()
    assert all(torch.equal(tensor, torch.full((size,), 3.0)) for tensor in tensors)


def test_a_timeout_names_what_the_missing_member_does_instead(three: Members) -> None:
    work = three.peers[0].barrier(tag=1)
    other = three.peers[1].barrier(tag=2)
    with pytest.raises(CollectiveTimeout, match=r"rank 1 \(m1\), .* \(it began barrier\(\)"):
        work.wait(timeout_s=0.05)
    with pytest.raises(CollectiveTimeout):
        other.wait(timeout_s=0)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_done_alone_moves_an_operation_on(three: Members, size: int) -> None:
    def part(peer: Peer) -> None:
        work = peer.all_reduce(torch.ones(size))
        deadline = time.monotonic() + 10
        while not work.done():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        work.wait(timeout_s=0)

    three.run(part)


def test_several_threads_may_wait(three: Members) -> None:
    """For one operation and for different ones."""

    def part(peer: Peer) -> None:
        tensors = [torch.ones(size) for size in (SMALL, LARGE) for _ in range(3)]
        works = [peer.all_reduce(tensor, tag=i) for i, tensor in enumerate(tensors)]
        failed: list[BaseException] = []

        def wait(order: list[Work]) -> None:
            try:
                for work in order:
                    work.wait()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=wait, args=(works[i:] + works[:i],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert all(torch.equal(tensor, torch.full_like(tensor, 3.0)) for tensor in tensors)

    three.run(part)


# ---- mismatches -----------------------------------------------------------------------------------------

Begin = Callable[[Peer, torch.Tensor], Work]
ODD: dict[str, tuple[Begin, Begin, str]] = {
    "shape": (
        lambda peer, tensor: peer.all_reduce(tensor),
        lambda peer, tensor: peer.all_reduce(tensor[:-1]),
        r"all_reduce\(sum, float32, \[(11|1499999)\]",
    ),
    "dtype": (
        lambda peer, tensor: peer.all_reduce(tensor),
        lambda peer, tensor: peer.all_reduce(tensor.view(torch.int32)),
        r"all_reduce\(sum, int32",
    ),
    "op": (
        lambda peer, tensor: peer.all_reduce(tensor),
        lambda peer, tensor: peer.all_reduce(tensor, "max"),
        r"all_reduce\(max, float32",
    ),
    "kind": (
        lambda peer, tensor: peer.all_gather(torch.empty(3 * tensor.numel()), tensor),
        lambda peer, tensor: peer.all_to_all(tensor, tensor.clone()),
        "all_to_all",
    ),
    "nothing": (
        lambda peer, tensor: peer.broadcast(tensor, 1),
        lambda peer, tensor: peer.barrier(),
        r"barrier\(\)",
    ),
    "root": (
        lambda peer, tensor: peer.broadcast(tensor, 1),
        lambda peer, tensor: peer.broadcast(tensor, 0),
        r"broadcast\(float32, \[\d+\], 0",
    ),
}


@pytest.mark.parametrize("size", [12, 3 * LARGE])
@pytest.mark.parametrize("odd", list(ODD))
def test_a_mismatch_is_one_on_every_rank_and_changes_nothing(three: Members, odd: str, size: int) -> None:
    usual, other, words = ODD[odd]

    def part(peer: Peer) -> str:
        tensor = torch.full((size,), 1.0 + peer.rank)
        before = tensor.clone()
        error = error_of((other if peer.rank == 1 else usual)(peer, tensor))
        assert isinstance(error, Mismatch)
        assert torch.equal(tensor, before)
        return str(error)

    for rank, text in enumerate(three.run(part)):
        assert re.search(rf"rank 1 \(m1\) brought {words}", text), text
        assert f"rank {rank} (m{rank}) brought" in text
        assert "tag 0" in text
        assert all(f"m{each}" in text for each in range(3))
    assert three.lost == []
    check_usable(three)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_operations_in_another_order_are_mismatches(three: Members, size: int) -> None:
    def part(peer: Peer) -> None:
        a, b = torch.ones(size), torch.ones(size)
        kinds = [lambda: peer.all_reduce(a), lambda: peer.broadcast(b)]
        works = [begin() for begin in (reversed(kinds) if peer.rank == 2 else kinds)]
        for work in works:
            assert "members brought different operations" in str(error_of(work))
        assert torch.equal(a, torch.ones(size))

    three.run(part)
    check_usable(three)


def test_outputs_are_as_they_were_after_a_mismatch(three: Members) -> None:
    def part(peer: Peer) -> None:
        for size in (6, 60_000):
            output, width = torch.zeros(3 * size), size + 3 * (peer.rank == 0)
            works = [
                peer.all_gather(torch.zeros(3 * width), torch.ones(width)),
                peer.all_gather(output, torch.ones(size)),
            ]
            assert isinstance(error_of(works[0]), Mismatch)
            works[1].wait()
            given, output = torch.ones(size + 3 * (peer.rank == 0)), torch.zeros(size + 3 * (peer.rank == 0))
            for work in (peer.all_to_all(output, given), peer.all_gather(torch.zeros(3), torch.ones(1))):
                if work.what.startswith("all_to_all"):
                    assert isinstance(error_of(work), Mismatch)
                    assert not output.any()
                else:
                    work.wait()

    three.run(part)


def test_a_pair_that_does_not_fit(three: Members) -> None:
    def part(peer: Peer) -> None:
        tensor = torch.zeros(LARGE)
        if peer.rank < 2:
            work = peer.send(torch.ones(LARGE - 1), 1) if peer.rank == 0 else peer.recv(tensor, 0)
            assert re.search(r"rank 0 \(m0\) brought send/recv\(float32, \[499999\]\).*; rank 1", str(error_of(work)))
        assert not tensor.any()

    three.run(part)
    check_usable(three)


# ---- the end of a view ----------------------------------------------------------------------------------


def test_an_abort_ends_all_that_is_pending_at_once(three: Members) -> None:
    peer = three.peers[0]
    works = [peer.all_reduce(torch.ones(size), tag=tag) for tag, size in enumerate((SMALL, LARGE) * 3)]
    errors: list[CollectiveError] = []
    threads = [threading.Thread(target=lambda work=work: errors.append(error_of(work))) for work in works]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    cause = PeerLost("rank 2 is dead")
    peer.mesh.abort(cause)
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 1.0
    assert errors == [cause] * len(works)
    assert error_of(peer.barrier()) is cause


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_member_that_goes_when_its_part_is_done_breaks_nothing(three: Members, size: int) -> None:
    """Ranks 0 and 1 look for the data only when rank 2 is away."""
    gone = threading.Event()

    def part(peer: Peer) -> None:
        given = torch.full((size,), float(peer.rank))
        if peer.rank == 2:
            peer.send(given, 0).wait()
            peer.mesh.close()
            gone.set()
        if peer.rank == 0:
            tensor = torch.empty(size)
            work = peer.recv(tensor, 2)
            assert gone.wait(10)
            work.wait()
            assert torch.equal(tensor, torch.full((size,), 2.0))
        gone.wait(10)
        if peer.rank < 2:  # what does not need rank 2 goes on
            tensor = torch.empty(size)
            (peer.send(given, 1, tag=1) if peer.rank == 0 else peer.recv(tensor, 0, tag=1)).wait()

    three.run(part)
    assert three.lost == []
    assert isinstance(error_of(three.peers[0].barrier()), PeerLost)
    assert [lost[:2] for lost in three.lost] == [(0, 2)]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_member_that_is_gone_before_the_others_begin(three: Members, size: int) -> None:
    """Its OPEN has come, its connections have ended, then the last OPEN resumes an operation that sends to it."""
    three.peers[2].all_reduce(torch.ones(size))
    three.peers[2].mesh.close()
    tensors = [torch.ones(size) for _ in range(2)]
    errors = three.run(lambda peer: _error_or_none(peer.all_reduce(tensors[peer.rank])), [0, 1])
    # A small one may be done: rank 2 has given all. Whoever sees it first hangs up on the other.
    assert all(isinstance(error, PeerLost) or (error is None and size == SMALL) for error in errors)


def _error_or_none(work: Work) -> CollectiveError | None:
    try:
        work.wait()
    except CollectiveError as error:
        return error
    return None


# ---- arguments ------------------------------------------------------------------------------------------

ONE = torch.ones(4)
WRONG: list[tuple[Callable[[Peer], Work], type[Exception], str]] = [
    (lambda p: p.all_reduce([1.0]), TypeError, r"all_reduce: tensor is a list; a torch.Tensor"),
    (lambda p: p.all_reduce(ONE, "mean"), ValueError, r"op is 'mean'; allowed are sum, avg, max, min"),
    (lambda p: p.all_reduce(ONE, ["sum"]), ValueError, r"op is \['sum'\]; allowed are sum"),
    (lambda p: p.all_reduce(ONE.int(), "avg"), ValueError, r"tensor is of int32; allowed with op 'avg' are float32"),
    (lambda p: p.all_reduce(ONE.bool()), ValueError, r"tensor is of bool; allowed with op 'sum' are float32"),
    (lambda p: p.all_reduce(ONE.to(torch.complex64)), ValueError, r"tensor is of complex64; allowed are float32"),
    (lambda p: p.all_reduce(ONE.to_sparse()), ValueError, r"torch.sparse_coo\); dense CPU tensors are allowed"),
    (lambda p: p.all_reduce(ONE.to("meta")), ValueError, r"on meta .*; dense CPU tensors are allowed"),
    (lambda p: p.all_reduce(ONE[:1].expand(4)), ValueError, r"tensor is expanded \(strides \(0,\)\) and is written"),
    (lambda p: p.all_reduce(ONE, tag="a"), TypeError, r"tag is 'a'; an integer is needed"),
    (lambda p: p.all_reduce(ONE, tag=1 << 63), ValueError, r"tag is 9223372036854775808; it must fit in 64 bits"),
    (
        lambda p: p.all_reduce(ONE, quantize="int8"),
        ValueError,
        r"quantize is 'int8'; allowed are None, minmax8",
    ),
    (lambda p: p.all_reduce(ONE, quantize=8), ValueError, r"quantize is 8; allowed are None, minmax8, zeropoint8"),
    (
        lambda p: p.all_reduce(ONE, op="max", quantize="minmax8"),
        ValueError,
        r"op is 'max' with quantize 'minmax8'; allowed are sum, avg; others with None",
    ),
    (
        lambda p: p.all_reduce(ONE.long(), quantize="zeropoint8"),
        ValueError,
        r"tensor is of int64 with quantize 'zeropoint8'; allowed are float32, bfloat16, float16; convert it first",
    ),
    (lambda p: p.all_reduce(ONE, feedback=ErrorFeedback()), ValueError, r"quantize is None; leave feedback out"),
    (lambda p: p.all_reduce(ONE, quantize="minmax8", feedback=1), TypeError, r"feedback is a int; an ErrorFeedback"),
    (lambda p: p.reduce_scatter(ONE, ONE), ValueError, r"output has 4 elements; it must have 2, one of 2 parts"),
    (lambda p: p.reduce_scatter(ONE, torch.ones(7)), ValueError, r"tensor has 7 elements; 2 equal parts are needed"),
    (lambda p: p.reduce_scatter(ONE.int(), torch.ones(8)), ValueError, r"output is of int32 and tensor of float32"),
    (lambda p: p.all_gather(ONE, ONE), ValueError, r"output has 4 elements; it must have 8, 2 times those of tensor"),
    (lambda p: p.all_gather(ONE[:1].expand(8), ONE), ValueError, r"output is expanded"),
    (lambda p: p.all_to_all(ONE, torch.ones(5)), ValueError, r"tensor has 5 elements; 2 equal parts are needed"),
    (lambda p: p.all_to_all(ONE, torch.ones(6)), ValueError, r"output has 4 elements; it must have 6, as tensor"),
    (lambda p: p.broadcast(ONE, 2), ValueError, r"broadcast: root is 2; ranks are 0 to 1"),
    (lambda p: p.broadcast(ONE, 0.5), TypeError, r"broadcast: root is 0.5; a rank, 0 to 1, is needed"),
    (lambda p: p.send(ONE, p.rank), ValueError, r"send: to is 0, this rank itself; another rank is allowed"),
    (lambda p: p.send(ONE, -1), ValueError, r"send: to is -1; ranks are 0 to 1"),
    (lambda p: p.recv(ONE, True), TypeError, r"recv: source is True; a rank"),
    (lambda p: p.recv(ONE[:1].expand(4), 1), ValueError, r"recv: tensor is expanded"),
]


@pytest.mark.parametrize(("call", "kind", "text"), WRONG, ids=[text for _, _, text in WRONG])
def test_wrong_arguments_are_refused(pair: Members, call: Callable[[Peer], Work], kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        call(pair.peers[0])


# ---- paths ----------------------------------------------------------------------------------------------


def test_a_path_that_is_cut_is_found_by_a_member_whose_operations_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel took may be lost on its way; only its sender, who waits for nothing here, can tell."""
    with members(2, "tcp") as group:
        check = torch.zeros(SMALL)
        group.run(lambda peer: peer.all_reduce(check.clone()).wait())
        monkeypatch.setattr(Channel, "unacknowledged_s", lambda channel, now: 2.0)  # what a cut path's kernel says
        deadline = time.monotonic() + LIMIT_S
        while len(group.lost) < 2:
            assert time.monotonic() < deadline, f"only {group.lost}"
            time.sleep(0.01)
    assert sorted((me, about) for me, about, _ in group.lost) == [(0, 1), (1, 0)]
    assert any("the path is cut" in error for _, _, error in group.lost)

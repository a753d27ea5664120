"""The quantised all-reduce: its codec, its bound, the same bits everywhere, and what a lost error is made good by."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.collectives.members import Members, members
from tests.unit.collectives.test_operations import same

from everstep.collectives import ErrorFeedback, Mismatch
from everstep.collectives.quantisation import BLOCK, CODECS, TILE, error_bound
from integration.quantised_reference import expected, sample, through

SCHEMES = tuple(CODECS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIGHEST = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True, scope="module")
def one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lost_at_most(values: torch.Tensor, scheme: str) -> torch.Tensor:
    """By one encoding, an element."""
    bounds = []
    for block in values.double().split(BLOCK):
        low, high = float(block.min()), float(block.max())
        if scheme == "zeropoint8":
            low, high = min(low, 0.0), max(high, 0.0)
        bound = 0.501 * (high - low) / 255 + 2.0**-22 * float(block.abs().max()) + 2.0**-126
        bounds.append(torch.full((len(block),), bound, dtype=torch.float64))
    return torch.cat(bounds)


# ---- the codec --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    numel=st.integers(1, 2 * TILE + 5),
    power=st.sampled_from([1e-43, 1e-38, 1e-20, 1.0, 1e30, 1e35]),
)
def test_one_encoding_loses_no_more_than_documented(scheme: str, seed: int, numel: int, power: float) -> None:
    values = sample(seed, numel, power=power)
    error = (through(CODECS[scheme](), values).double() - values.double()).abs()
    assert bool((error <= lost_at_most(values, scheme)).all())


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_any_finite_floats(scheme: str, values: list[float]) -> None:
    """Found: least and largest float32 in one block, ranges of one denormal, largest ones alone."""
    row = torch.tensor(values, dtype=torch.float32)
    found = through(CODECS[scheme](), row)
    assert bool(found.isfinite().all())
    assert bool(((found.double() - row.double()).abs() <= lost_at_most(row, scheme)).all()), (row, found)


@pytest.mark.parametrize(
    "values",
    [
        [-HIGHEST, HIGHEST, 0.0, 1e38],
        [HIGHEST, HIGHEST * 0.9],
        [-HIGHEST, 0.0],
        [HIGHEST],
        [1e-45, 0.0],
        [2e-38, 0.0],
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_extreme_ranges(scheme: str, values: list[float]) -> None:
    row = torch.tensor(values)
    found = through(CODECS[scheme](), row)
    assert bool(((found.double() - row.double()).abs() <= lost_at_most(row, scheme)).all()), (row, found)


def test_constants_are_exact_with_minmax_and_zeros_with_both() -> None:
    for value in (0.0, -0.0, 3.14159, -1e30, 1e-44):
        row = torch.full((BLOCK + 3,), value)
        assert torch.equal(through(CODECS["minmax8"](), row), row)
    values = sample(3, 4 * BLOCK).where(torch.arange(4 * BLOCK) % 3 > 0, torch.zeros(()))
    found = through(CODECS["zeropoint8"](), values)
    assert bool((found[values == 0] == 0).all())
    for scheme in SCHEMES:
        assert not through(CODECS[scheme](), torch.zeros(5)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_that_is_not_finite_is_all_one_nan_and_its_neighbours_are_well(scheme: str, bad: float) -> None:
    values = sample(4, 3 * BLOCK + 7)
    values[BLOCK + 5] = bad
    found = through(CODECS[scheme](), values)
    assert same(found[BLOCK : 2 * BLOCK], torch.full((BLOCK,), math.nan))
    well = torch.cat([torch.arange(BLOCK), torch.arange(2 * BLOCK, 3 * BLOCK + 7)])
    assert bool(found[well].isfinite().all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_bytes_decode_to_something(scheme: str) -> None:
    """A peer may send what it likes."""
    codec = CODECS[scheme]()
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        data = torch.randint(0, 256, (codec.size(3000),), generator=generator, dtype=torch.uint8)
        first, second = torch.empty(3000), torch.empty(3000)
        codec.decode(data, first, 0, 3000)
        codec.decode(data.clone(), second, 0, 3000)
        assert same(first, second)


def test_parameters_that_overflow_decode_to_the_highest_and_any_nan_to_one() -> None:
    codec, row, out = CODECS["minmax8"](), torch.linspace(0.0, 1.0, 9), torch.empty(9)
    data = torch.empty(codec.size(9), dtype=torch.uint8)
    codec.encode(row, data, 0, 9)
    parameters = data[:8].view(torch.float32)  # low, step
    parameters.copy_(torch.tensor([HIGHEST, 1e32]))
    codec.decode(data, out, 0, 9)
    assert torch.equal(out, torch.full((9,), HIGHEST))
    for scheme in SCHEMES:
        codec = CODECS[scheme]()
        data = torch.empty(codec.size(9), dtype=torch.uint8)
        codec.encode(row, data, 0, 9)
        data[: 4 * codec.parameters].view(torch.int32).fill_(-0x3FFFFF)  # 0xFFC00001
        codec.decode(data, out, 0, 9)
        assert same(out, torch.full((9,), math.nan))


# ---- the operation ------------------------------------------------------------------------------------------

SIZES = [0, 1, 1000, BLOCK + 1, 32_000, 33_000, 2 * 64 * BLOCK + 5, 1_300_003]


@pytest.mark.parametrize(("n", "transport"), [(1, "auto"), (2, "tcp"), (3, "auto"), (5, "auto"), (4, "tcp")])
def test_all_members_get_the_bits_of_the_documented_function_within_the_bound(n: int, transport: str) -> None:
    with members(n, transport) as group:
        for i, numel in enumerate(SIZES):
            scheme, dtype, op = SCHEMES[i % 2], DTYPES[i % 3], ("sum", "avg")[i // 2 % 2]
            parts = [sample(100 * i + rank, numel, dtype) for rank in range(n)]
            tensors = [part.clone() for part in parts]
            group.run(lambda p, t=tensors, op=op, s=scheme: p.all_reduce(t[p.rank], op, quantize=s).wait())
            wanted = expected(parts, op, scheme)
            assert all(same(tensor, wanted) for tensor in tensors), (numel, scheme, dtype, op)
            if numel:
                exact = torch.stack([part.double() for part in parts]).sum(0) / (n if op == "avg" else 1)
                error = (tensors[0].double() - exact).abs()
                assert bool((error <= error_bound(parts, scheme, op)).all()), float(error.max())


def test_the_bound_is_no_formality() -> None:
    """Not a hundred times what is lost."""
    parts = [sample(rank, 9 * BLOCK) for rank in range(3)]
    error = (expected(parts, "sum", "minmax8").double() - torch.stack(parts).double().sum(0)).abs()
    assert float((error / error_bound(parts, "minmax8")).max()) > 0.3


def test_not_contiguous_a_subgroup_and_several_at_once() -> None:
    parts = [sample(rank, 3 * 70_000).view(3, 70_000) for rank in range(3)]
    with members(3) as group:

        def reduce(peer: object) -> list[torch.Tensor]:
            views = [parts[peer.rank].t().clone().t(), parts[peer.rank].clone()]
            works = [peer.all_reduce(views[0], quantize="minmax8", tag=1)]
            if peer.rank > 0:
                works.append(peer.subgroup([1, 2]).all_reduce(views[1], quantize="zeropoint8"))
            for work in works:
                work.wait()
            return views

        found = group.run(reduce)
    assert all(same(views[0], expected(parts, "sum", "minmax8")) for views in found)
    assert all(same(views[1], expected(parts[1:], "sum", "zeropoint8")) for views in found[1:])


def test_nan_on_one_member_is_nan_on_all_alike() -> None:
    for dtype in DTYPES:
        parts = [sample(rank, 150_000, dtype) for rank in range(3)]
        parts[1][100_000] = math.inf
        tensors = [part.clone() for part in parts]
        with members(3) as group:
            group.run(lambda p, t=tensors: p.all_reduce(t[p.rank], quantize="minmax8").wait())
        assert same(tensors[0], tensors[1])
        assert same(tensors[0], tensors[2])
        block = 100_000 // BLOCK
        bad = tensors[0].isnan()
        assert int(bad.sum()) == BLOCK
        assert bool(bad[block * BLOCK : (block + 1) * BLOCK].all())


@pytest.mark.parametrize("others", [None, "zeropoint8"])
@pytest.mark.parametrize("numel", [10, 100_000])
def test_members_that_disagree_are_told_what_each_brought(others: str | None, numel: int) -> None:
    tensors = [torch.ones(numel), torch.ones(numel)]
    with members(2) as group:

        def reduce(peer: object) -> str:
            with pytest.raises(Mismatch) as found:
                peer.all_reduce(tensors[peer.rank], quantize=("minmax8", others)[peer.rank]).wait()
            return str(found.value)

        for text in group.run(reduce):
            assert f"rank 0 (m0) brought all_reduce(sum, float32, [{numel}], quantize=minmax8)" in text
            ending = f", quantize={others}" if others else ""
            assert f"rank 1 (m1) brought all_reduce(sum, float32, [{numel}]{ending})" in text
    assert all(bool((tensor == 1).all()) for tensor in tensors)


# ---- error feedback -----------------------------------------------------------------------------------------


def drift(group: Members, numel: int, op: str, calls: int, with_feedback: bool) -> tuple[float, list[ErrorFeedback]]:
    """The largest error of the sum of many results, in units of what one result may be off."""
    feedbacks = [ErrorFeedback() for _ in group.peers]
    parts = [sample(rank, numel) for rank in range(len(group.peers))]
    exact = torch.stack(parts).double().sum(0) / (len(parts) if op == "avg" else 1)
    total = torch.zeros(numel, dtype=torch.float64)
    for _ in range(calls):
        tensors = [part.clone() for part in parts]
        group.run(
            lambda p, t=tensors: p.all_reduce(
                t[p.rank], op, quantize="minmax8", feedback=feedbacks[p.rank] if with_feedback else None
            ).wait()
        )
        total += tensors[0]
    off = ((total - calls * exact).abs() / error_bound(parts, "minmax8", op)).max()
    return float(off), feedbacks


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("numel", [2000, 150_000])
def test_with_feedback_many_results_are_as_far_off_as_one(numel: int, op: str) -> None:
    with members(3) as group:
        with_it, feedbacks = drift(group, numel, op, 20, True)
        without, _ = drift(group, numel, op, 20, False)
    assert with_it < 2.0
    assert without > 5.0
    assert all(each.residual is not None and bool(each.residual.isfinite().all()) for each in feedbacks)


def test_feedback_is_of_one_tensor_and_stays_as_it_was_where_the_operation_fails() -> None:
    feedback = ErrorFeedback()
    with members(2) as group:
        first, other = group.peers
        feedback.residual = torch.full((7,), 0.25)
        with pytest.raises(ValueError, match="feedback is of a tensor of 7 elements and tensor has 9"):
            first.all_reduce(torch.ones(9), quantize="minmax8", feedback=feedback)
        works = [
            first.all_reduce(torch.rand(7), quantize="minmax8", feedback=feedback),
            other.all_reduce(torch.rand(7), quantize="zeropoint8"),
        ]
        for work in works:
            with pytest.raises(Mismatch):
                work.wait()
    assert feedback.residual is not None
    assert bool((feedback.residual == 0.25).all())


def test_a_nan_does_not_stay_in_the_residual() -> None:
    feedbacks = [ErrorFeedback(), ErrorFeedback()]
    with members(2) as group:
        for bad in (math.nan, 1.0):
            tensors = [sample(rank, 3000) for rank in range(2)]
            tensors[0][5] *= bad
            group.run(
                lambda p, t=tensors: p.all_reduce(t[p.rank], quantize="minmax8", feedback=feedbacks[p.rank]).wait()
            )
            assert bool(tensors[0].isnan().any()) == math.isnan(bad)
    for each in feedbacks:
        assert each.residual is not None
        assert bool(each.residual.isfinite().all())

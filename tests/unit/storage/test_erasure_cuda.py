"""Erasure codes of CUDA tensors: the bytes that the CPU makes. Needs torch, numpy and pytest only."""

import random
from itertools import combinations

import pytest
import torch

from everstep.storage.erasure import ErasureCode
from everstep.storage.erasure_torch import combine_words, plain_words
from everstep.storage.gf256 import parity_row

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noise(length: int, seed: int, dtype: torch.dtype = torch.uint8, skip: int = 0) -> torch.Tensor:
    plain = random.Random(f"{seed} {length}").randbytes(length * dtype.itemsize + skip)
    return torch.tensor(list(plain), dtype=torch.uint8).cuda()[skip:].view(dtype)


@pytest.mark.parametrize(("data", "parity"), [(1, 2), (4, 1), (4, 2), (8, 2), (9, 3), (23, 9)])
@pytest.mark.parametrize(
    "lengths", [(4096,), (1, 0, 3), (4093, 8, 4096, 77, 4095)], ids=["equal", "tiny", "of all lengths"]
)
def test_the_bytes_of_the_cpu(data: int, parity: int, lengths: tuple[int, ...]) -> None:
    sizes = [lengths[at % len(lengths)] for at in range(data)]
    shards = [noise(size, at) for at, size in enumerate(sizes)]
    code = ErasureCode(data, parity)
    rows = code.encode(shards)
    wanted = code.encode([shard.cpu() for shard in shards])
    assert all(row.is_cuda for row in rows)
    assert [bytes(row.cpu()) for row in rows] == [bytes(row) for row in wanted]
    have = random.Random(data).sample(range(data + parity), data)
    found = code.decode({index: [*shards, *rows][index] for index in have}, sizes)
    assert all(torch.equal(a, b) for a, b in zip(found, shards, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_dtypes_views_and_odd_addresses(dtype: torch.dtype) -> None:
    shards = [noise(5000, 1, torch.uint8) > 99 for _ in range(3)] if dtype is torch.bool else [
        noise(1000, 1, dtype).reshape(20, 50).T,
        noise(1000, 2, dtype, skip=dtype.itemsize).reshape(50, 20),
        noise(2000, 3, dtype)[::2].reshape(50, 20),
    ]  # fmt: skip
    code = ErasureCode(3, 2)
    every = dict(enumerate([*shards, *code.encode(shards)]))
    for lost in combinations(range(3), 2):
        found = code.decode({index: shard for index, shard in every.items() if index not in lost})
        for index in lost:
            assert found[index].dtype == dtype
            assert found[index].shape == shards[index].shape
            assert torch.equal(found[index].view(torch.uint8), shards[index].contiguous().view(torch.uint8))


def test_with_and_without_a_compiled_kernel() -> None:
    sources = [noise(3 << 20, at).view(torch.int64) for at in range(6)]
    rows = tuple(parity_row(row, 6) for row in range(5))
    plain = plain_words(rows, sources, tile_words=1 << 16)
    assert all(torch.equal(a, b) for a, b in zip(combine_words(rows, sources), plain, strict=True))


def test_on_another_stream() -> None:
    shards = [torch.zeros(1 << 24, dtype=torch.int64, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for at, shard in enumerate(shards):
            shard += at + 1  # queued on that stream, so parity has to be too
        parity = ErasureCode(4, 1).encode(shards)[0]
    stream.synchronize()
    assert torch.equal(parity.view(torch.int64), torch.full_like(shards[0], 1 ^ 2 ^ 3 ^ 4))

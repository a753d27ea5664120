"""Erasure codes: what is lost comes back, from every kernel, for every kind of shard."""

import hashlib
import mmap
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage import ErasureCode, isal, kernels
from everstep.storage.erasure_torch import combine_tensors, fused_body, fused_words, plain_words
from everstep.storage.gf256 import inverse, multiply, parity_row, rebuild_rows

KERNELS = {"isa-l": isal.load_isal(), "numpy": kernels.NumpyKernel()}
SMALL = [(data, parity) for parity in range(1, 4) for data in range(1, 9 - parity)]


def code(data: int, parity: int, kernel: str = "isa-l") -> ErasureCode:
    if KERNELS[kernel] is None:
        pytest.skip("no ISA-L on this machine")
    return ErasureCode(data, parity, kernel=KERNELS[kernel])


def noise(lengths: list[int], seed: int = 0) -> list[bytes]:
    return [random.Random(f"{seed} {at}").randbytes(length) for at, length in enumerate(lengths)]


def padded(shards: list[bytes]) -> list[bytes]:
    return [shard.ljust(max(map(len, shards)), b"\0") for shard in shards]


# ---- arithmetic of our own, by the book, to compare with -----------------------------------------------------


@cache
def products() -> np.ndarray[Any, Any]:
    """By shift and add, reduced by the polynomial: no logarithms."""
    table = np.zeros((256, 256), dtype=np.uint8)
    for a in range(256):
        for b in range(256):
            total, shifted = 0, a
            for bit in range(8):
                total ^= shifted * (b >> bit & 1)
                shifted = shifted << 1 ^ (0x11D if shifted & 0x80 else 0)
            table[a, b] = total
    return table


def power(exponent: int) -> int:
    value = 1
    for _ in range(exponent % 255):
        value = int(products()[value, 2])
    return value


def factor(row: int, index: int) -> int:
    """[Note: parity matrix], by its formula."""
    if row < 2:
        return power(index) if row else 1
    wanted = power(row - 1) ^ power(-index)
    return int(np.flatnonzero(products()[wanted] == 1)[0])


def by_the_book(data: list[bytes], parity: int) -> list[bytes]:
    rows = []
    for row in range(parity):
        total = np.zeros(max(map(len, data)), dtype=np.uint8)
        for index, shard in enumerate(data):
            total[: len(shard)] ^= products()[factor(row, index)][np.frombuffer(shard, dtype=np.uint8)]
        rows.append(total.tobytes())
    return rows


def determinant(matrix: list[list[int]]) -> int:
    total = 0
    for columns in permutations(range(len(matrix))):
        term = 1
        for row, column in zip(matrix, columns, strict=True):
            term = int(products()[term, row[column]])
        total ^= term
    return total


# ---- the matrix ----------------------------------------------------------------------------------------------


def test_field() -> None:
    assert all(multiply(a, b) == products()[a, b] for a in range(256) for b in range(256))
    assert all(products()[a, inverse(a)] == 1 for a in range(1, 256))


def test_first_row_is_xor_and_the_second_doubles() -> None:
    assert parity_row(0, 12) == bytes([1] * 12)
    assert parity_row(1, 4) == bytes([1, 2, 4, 8])


def test_every_square_submatrix_can_be_inverted() -> None:
    matrix = [[factor(row, index) for index in range(12)] for row in range(4)]
    assert [list(parity_row(row, 12)) for row in range(4)] == matrix
    for size in range(1, 5):
        for rows in combinations(range(4), size):
            for columns in combinations(range(12), size):
                assert determinant([[matrix[row][column] for column in columns] for row in rows])


@pytest.mark.parametrize(("data", "parity"), [(254, 1), (253, 2), (200, 55), (128, 127), (1, 254)])
def test_the_largest_codes(data: int, parity: int) -> None:
    chooser = random.Random(data)
    shards = noise([9] * data)
    whole = code(data, parity)
    every = dict(enumerate([*shards, *whole.encode(shards)]))
    for _ in range(3):
        have = chooser.sample(range(data + parity), data)
        assert whole.decode({index: every[index] for index in have}) == shards


def test_the_stored_format_does_not_change() -> None:
    parity = code(9, 7).encode(noise([1000] * 9))
    assert hashlib.sha256(b"".join(parity)).hexdigest() == (
        "9701ab9efb71006980b843eaeb93b98f3edcad0c7cb44f2f43bd1db486abd5ff"
    )


def test_fewer_shards_or_parities_are_the_same_code() -> None:
    shards = noise([30] * 4)
    assert code(4, 3).encode(shards)[:2] == code(4, 2).encode(shards)
    assert code(6, 2).encode([*shards, b"", b""]) == code(4, 2).encode(shards)


# ---- losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("data", "parity"), SMALL)
def test_every_loss(data: int, parity: int, kernel: str) -> None:
    lengths = [100 - 13 * at for at in range(data)]
    shards = noise(lengths, seed=parity)
    this = code(data, parity, kernel)
    rows = this.encode(shards)
    assert rows == by_the_book(shards, parity)
    every = dict(enumerate([*shards, *rows]))
    for losses in range(parity + 1):
        for lost in combinations(range(data + parity), losses):
            have = {index: shard for index, shard in every.items() if index not in lost}
            assert this.decode(have, lengths) == shards
            assert [bytes(shard).ljust(100, b"\0") for shard in this.decode(have)] == padded(shards)
            for index in lost:
                into = bytearray(b"\xff" * 100)
                this.rebuild(index, have, into)
                assert into == bytes(every[index]).ljust(100, b"\0")
            room = {index: bytearray(b"\xff" * 100) for index in reversed(lost)}
            this.rebuild_into(have, room)
            assert room == {index: bytes(every[index]).ljust(100, b"\0") for index in lost}


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 9), st.integers(0, 600)), min_size=1, max_size=9),
    parity=st.integers(0, 5),
    offset=st.integers(0, 9),
    chooser=st.randoms(use_true_random=False),
)
def test_any_lengths_from_any_address(lengths: list[int], parity: int, offset: int, chooser: random.Random) -> None:
    data = len(lengths)
    shards = [memoryview(bytes(offset) + shard)[offset:] for shard in noise(lengths, chooser.getrandbits(30))]
    wanted = by_the_book([bytes(shard) for shard in shards], parity)
    for kernel in KERNELS:
        this = code(data, parity, kernel)
        rows = this.encode(shards)
        assert rows == wanted
        have = chooser.sample(range(data + parity), data)
        every = dict(enumerate([*shards, *rows]))
        assert this.decode({index: every[index] for index in have}, lengths) == shards
    flats = [torch.tensor([0] * offset + list(shard), dtype=torch.uint8)[offset:] for shard in shards]
    found = combine_tensors(tuple(parity_row(row, data) for row in range(parity)), flats, max(lengths))
    assert [row.numpy().tobytes() for row in found] == wanted


@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_beyond_every_tile(kernel: str) -> None:
    lengths = [200_003, 131_072, 65_537, 0, 200_000]
    shards = noise(lengths)
    this = code(5, 5, kernel)
    rows = this.encode(shards)
    assert rows == by_the_book(shards, 5)
    assert this.decode({at + 5: row for at, row in enumerate(rows)}, lengths) == shards


# ---- into the caller's memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_short_and_absent_shards_count_as_zeros_and_nothing_else_is_written(kernel: str) -> None:
    shards = [*noise([70, 33, 0]), None]
    this = code(4, 3, kernel)
    wanted = by_the_book([shard or b"" for shard in shards] + [bytes(90)], 3)
    room = [bytearray(b"\xee" * 100) for _ in range(3)]
    this.encode_into(shards, [memoryview(row)[5:95] for row in room])
    assert [row[5:95] for row in room] == wanted
    assert {bytes(row[:5] + row[95:]) for row in room} == {b"\xee" * 10}
    one = bytearray(b"\xee" * 100)
    this.parity_of(2, shards, memoryview(one)[5:95])
    assert one == room[2]
    have = {0: shards[0], 3: None, 4: memoryview(room[0])[5:95], 6: memoryview(room[2])[5:95]}
    for index, was in ((1, shards[1]), (2, b""), (5, bytes(room[1][5:95]))):
        this.rebuild(index, have, view := memoryview(one)[5:95])
        assert view == was.ljust(90, b"\0")
        assert one[:5] + one[95:] == b"\xee" * 10
    this.parity_of(0, [None] * 4, one)
    assert one == bytes(100)


@pytest.mark.parametrize("kernel", KERNELS)
def test_accumulated_shards_make_the_parity(kernel: str) -> None:
    shards = noise([65, 0, 70_000, 31])
    this = code(4, 3, kernel)
    for row, wanted in enumerate(this.encode(shards)):
        total = bytearray(70_000)
        for index in (2, 0, 3, 1):
            this.accumulate(row, index, shards[index], total)
        assert total == wanted


def test_kinds_of_memory() -> None:
    shards = noise([64] * 4)
    with mmap.mmap(-1, 4096) as mapped:
        mapped[:64] = shards[3]
        kinds = [shards[0], bytearray(shards[1]), np.frombuffer(shards[2]).reshape(2, 4), memoryview(mapped)[:64]]
        parity = code(4, 2).encode(kinds)
        kinds.pop().release()
    assert all(type(row) is bytearray for row in parity)
    assert parity == by_the_book(shards, 2)


def test_calls_of_limited_length() -> None:
    if (whole := isal.load_isal()) is None:
        pytest.skip("no ISA-L on this machine")
    this = ErasureCode(3, 2, kernel=isal.IsaL(whole.library, call_bytes=100))
    shards = noise([1001, 777, 5])
    wanted = by_the_book(shards, 2)
    assert this.encode(shards) == wanted
    total = bytearray(1001)
    for index, shard in enumerate(shards):
        this.accumulate(1, index, shard, total)
    assert total == wanted[1]


@pytest.mark.parametrize("nbytes", [0, 1, 31, 127, 128, 129, 4096, 5003])
def test_xor_of_aligned_memory(nbytes: int) -> None:
    if (whole := isal.load_isal()) is None:
        pytest.skip("no ISA-L on this machine")
    shards = noise([nbytes] * 3)
    with mmap.mmap(-1, 4 * 8192) as mapped:
        room = [memoryview(mapped)[at * 8192 : (at + 1) * 8192] for at in range(4)]
        for view, shard in zip(room, shards, strict=False):
            view[:nbytes] = shard
        for kernel in (whole, isal.IsaL(whole.library, call_bytes=128)):
            room[3][:] = b"\xee" * 8192
            ErasureCode(3, 1, kernel=kernel).encode_into([view[:nbytes] for view in room[:3]], [room[3][:nbytes]])
            assert bytes(room[3]) == by_the_book(shards, 1)[0] + b"\xee" * (8192 - nbytes)
        for view in room:
            view.release()


def test_threads_share_a_code() -> None:
    this = code(5, 3)
    jobs = [(seed, lost) for seed in range(6) for lost in combinations(range(8), 3)]

    def round_trip(job: tuple[int, tuple[int, ...]]) -> bool:
        seed, lost = job
        shards = noise([3000 + seed] * 5, seed)
        every = enumerate([*shards, *this.encode(shards)])
        return this.decode({index: shard for index, shard in every if index not in lost}) == shards

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(round_trip, jobs))


# ---- arrays and tensors --------------------------------------------------------------------------------------

TENSORS = {
    "float32": torch.arange(40, dtype=torch.float32).reshape(5, 8) / 7,
    "bfloat16": torch.arange(33, dtype=torch.float32).to(torch.bfloat16),
    "bool": torch.arange(13) % 3 == 0,
    "int64": torch.arange(4).reshape(2, 2),
    "complex": torch.full((3,), 1 + 2j).conj(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "strided": torch.arange(60, dtype=torch.int16).reshape(6, 10)[::2, 1::3],
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "offset": torch.arange(50, dtype=torch.uint8)[3:],
    "gradient": torch.ones(3, 3, requires_grad=True),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str) -> None:
    first = TENSORS[name]
    shards = [first, (first.detach() == 0).to(first.dtype), first.detach().clone()]
    this = code(3, 2)
    parity = this.encode(shards)
    plain = [bytes(shard.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)) for shard in shards]
    assert [bytes(row) for row in parity] == by_the_book(plain, 2)
    assert {row.dtype for row in parity} == {torch.uint8}
    for lost in combinations(range(3), 2):
        every = dict(enumerate([*shards, *parity]))
        found = this.decode({index: shard for index, shard in every.items() if index not in lost})
        for index, shard in enumerate(shards):
            if index in lost:
                assert found[index].dtype == first.dtype
                assert found[index].shape == first.shape
                assert torch.equal(found[index], shard.detach())
            else:
                assert found[index] is shard
    assert all(shard.dtype == torch.uint8 for shard in code(2, 2).decode(dict(zip((2, 3), parity, strict=True))))


def test_tensors_of_several_dtypes_and_lengths_come_back_as_bytes() -> None:
    shards = [torch.arange(5), torch.arange(7.0), torch.arange(9, dtype=torch.uint8)]
    parity = code(3, 1).encode(shards)
    found = code(3, 1).decode({0: shards[0], 1: shards[1], 3: parity[0]}, lengths=[40, 28, 9])
    assert torch.equal(found[2], shards[2])
    found = code(3, 1).decode({0: shards[0], 1: shards[1], 3: parity[0]}, lengths=[16, 8, 9])
    assert torch.equal(found[0], torch.arange(2))
    assert torch.equal(found[1], torch.arange(2.0))


def test_arrays() -> None:
    shards = [np.arange(12, dtype=np.float64).reshape(3, 4) * at for at in (1, 2, 3)]
    shards[2] = np.asfortranarray(shards[2])
    parity = code(3, 1).encode(shards)
    assert parity[0].dtype == np.uint8
    assert bytes(parity[0]) == by_the_book([shard.tobytes() for shard in shards], 1)[0]
    found = code(3, 1).decode({0: shards[0], 1: shards[1], 3: parity[0]})
    assert found[2].dtype == np.float64
    assert np.array_equal(found[2], shards[2])
    assert found[0] is shards[0]


# ---- the arithmetic of GPUs, on the CPU ----------------------------------------------------------------------


def interpreted(rows: tuple[bytes, ...], begun: bool) -> Any:
    """What the GPU's compiler makes of the statements, made by Python: they are valid in both."""

    def run(*inputs: torch.Tensor) -> Any:
        assert len(inputs) <= 8
        names = [*(f"p{at}" for at in range(len(rows) * begun)), *(f"s{at}" for at in range(len(rows[0])))]
        values: dict[str, Any] = dict(zip(names, inputs, strict=True))
        exec("\n".join(fused_body(rows, begun)), {}, values)
        made = tuple(values[f"d{at}"] for at in range(len(rows)))
        return made if len(made) > 1 else made[0]

    return run


@pytest.mark.parametrize("how", ["plain", "tiles", "fused"])
@pytest.mark.parametrize(("data", "parity"), [(1, 1), (4, 1), (4, 2), (8, 2), (9, 3), (23, 9)])
def test_arithmetic_on_words(data: int, parity: int, how: str) -> None:
    shards = noise([8 * 37] * data)
    every = [*shards, *by_the_book(shards, parity)]
    have = tuple(random.Random(data).sample(range(data + parity), data))
    wanted = tuple(range(data + parity))
    rows = (*rebuild_rows(data, wanted, have), bytes(data))  # the last has no factors at all
    sources = [torch.frombuffer(bytearray(every[index]), dtype=torch.int64) for index in have]
    if how == "fused":
        found = fused_words(rows, sources, interpreted)
    else:
        found = plain_words(rows, sources, 5 if how == "tiles" else 1000)
    assert [shard.numpy().tobytes() for shard in found] == [*every, bytes(8 * 37)]


def test_torch_is_not_imported_for_bytes() -> None:
    script = (
        "import sys; from everstep.storage import ErasureCode; code = ErasureCode(2, 2); "
        "assert code.decode(dict(zip((2, 3), code.encode([b'ab', b'cd'])))) == [b'ab', b'cd']; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

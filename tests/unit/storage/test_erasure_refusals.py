"""Erasure codes: wrong input says what is wrong, and nothing is written."""

from typing import Any

import numpy as np
import pytest
import torch

from everstep.storage import ErasureCode

TWO = ErasureCode(2, 2)
ROOM = bytearray(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ErasureCode(0, 1), r"data is 0; allowed are whole numbers from 1 on"),
        (lambda: ErasureCode(True, 1), r"data is True"),
        (lambda: ErasureCode(2, -1), r"parity is -1; allowed are whole numbers from 0 on"),
        (lambda: ErasureCode(2.0, 1), r"data is 2\.0"),
        (lambda: ErasureCode(250, 6), r"are 256; at most 255 are allowed: split"),
        (lambda: TWO.encode([b"a"]), r"1 shards are given; this code takes exactly 2"),
        (lambda: TWO.encode([b"a", None]), r"a shard is a NoneType; allowed are bytes-like objects"),
        (lambda: TWO.encode([b"a", torch.ones(1)]), r"1 of 2 shards are tensors; give tensors only, or none"),
        (lambda: TWO.encode([torch.ones(1), torch.ones(1, device="meta")]), r"on cpu, meta; all must be on one"),
        (lambda: TWO.encode([torch.ones(1, device="meta")] * 2), r"on meta; allowed are dense tensors"),
        (lambda: TWO.encode([torch.ones(2).to_sparse()] * 2), r"torch\.sparse_coo.*allowed are dense"),
        (lambda: TWO.encode([np.array([b"a", None])] * 2), r"dtype object"),
        (lambda: TWO.encode([memoryview(b"abcd")[::2], b"ab"]), r"a shard is not contiguous; copy it first"),
        (lambda: TWO.decode({0: b"a"}), r"1 shards are given \(0\); decoding takes any 2 of the 4"),
        (lambda: TWO.decode({}), r"0 shards are given \(none\)"),
        (lambda: TWO.decode({0: b"a", 4: b"a"}), r"shard 4 does not exist; allowed are 0 to 3 \(2 data, 2 parity\)"),
        (lambda: TWO.decode({0: b"a", "1": b"a"}), r"shard '1' does not exist"),
        (lambda: TWO.decode({2: b"a", 3: b"ab"}), r"one length; these have: shard 2 1 bytes, shard 3 2 bytes"),
        (lambda: TWO.decode({0: b"abc", 2: b"ab"}), r"data shard 0 has 3 bytes and parity 2; no data shard is"),
        (lambda: TWO.decode({0: b"ab", 2: b"ab"}, [2]), r"1 lengths are given; there is one for each of the 2"),
        (lambda: TWO.decode({0: b"ab", 2: b"ab"}, [2, 3]), r"lengths\[1\] is 3; allowed for data shard 1 are 0 to 2"),
        (lambda: TWO.decode({0: b"a", 2: b"ab"}, [2, 2]), r"lengths\[0\] is 2; allowed for data shard 0 are 0 to 1"),
        (lambda: TWO.encode_into([b"ab"], [ROOM, ROOM]), r"takes exactly 2 \(None stands for zeros\)"),
        (lambda: TWO.encode_into([b"ab", b"a"], [ROOM]), r"1 parity buffers are given; this code makes 2"),
        (lambda: TWO.encode_into([b"a", b"a"], [ROOM, bytearray(3)]), r"have 4, 3 bytes; all of them must have one"),
        (lambda: TWO.encode_into([b"a", b"a"], [ROOM, ROOM]), r"overlaps another buffer"),
        (lambda: TWO.encode_into([b"a", b"a"], [ROOM, bytes(4)]), r"buffer 1 for results is read-only"),
        (lambda: TWO.encode_into([b"12345", b"a"], [ROOM, bytearray(4)]), r"a shard has 5 bytes and the result 4"),
        (lambda: TWO.parity_of(2, [b"a", b"a"], ROOM), r"parity row 2 does not exist; allowed are 0 to 1"),
        (lambda: ErasureCode(2, 0).parity_of(0, [b"a", b"a"], ROOM), r"allowed are none: this code has no parity"),
        (lambda: TWO.parity_of(0, [memoryview(ROOM)[2:], b"a"], ROOM), r"overlaps another buffer"),
        (lambda: TWO.rebuild(1, {0: b"a", 1: b"a"}, ROOM), r"shard 1 is to be rebuilt, but given too"),
        (lambda: TWO.rebuild(1, {0: b"a"}, ROOM), r"\(0\); rebuilding takes any 2 of the others"),
        (lambda: TWO.rebuild(9, {0: b"a", 2: b"a"}, ROOM), r"shard 9 does not exist"),
        (lambda: TWO.rebuild(1, {0: b"a", 2: torch.ones(1)}, ROOM), r"shard 2 is a Tensor; allowed are bytes-like"),
        (lambda: TWO.accumulate(0, 2, b"a", ROOM), r"data shard 2 does not exist; allowed are 0 to 1"),
        (lambda: TWO.accumulate(0, 1, b"12345", ROOM), r"a shard has 5 bytes and the result 4"),
        (lambda: TWO.accumulate(0, 1, ROOM, ROOM), r"overlaps another buffer"),
    ],
)  # fmt: skip
def test_wrong_input_says_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert not any(ROOM)


def test_no_parity() -> None:
    assert ErasureCode(2, 0).encode([b"ab", b"c"]) == []
    assert ErasureCode(2, 0).decode({0: b"ab", 1: b"c"}) == [b"ab", b"c"]
    ErasureCode(2, 0).encode_into([b"ab", b"c"], [])

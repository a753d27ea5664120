"""Windows of token ids: exact windows of every type, shards, headers, remote blocks and bounds, and refusals."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.storage.datasets.errors import DatasetChanged, DatasetDamaged, DatasetError
from everstep.storage.datasets.tokens import Tokens


def _bin(path: Path, values: object, dtype: str) -> Path:
    np.asarray(values, dtype=dtype).tofile(path)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_windows_tile_a_raw_file_and_overlap_by_one(dtype: str, tmp_path: Path):
    top = int(np.iinfo(dtype).max)
    values = [*range(9), top]
    data = Tokens(_bin(tmp_path / "a.bin", values, dtype), 3, dtype)
    assert len(data) == 3
    assert [data[i].tolist() for i in range(3)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, top]]
    assert data[0].dtype == torch.int64
    assert data.tokens == 10
    assert [window.tolist() for window in data] == [data[i].tolist() for i in range(3)]
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"window {index} is outside a data set of 3 windows"):
            data[index]


@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">u2", "<u4", ">i4", "<i8"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_files_say_their_type_and_byte_order(dtype: str, version: tuple[int, int], tmp_path: Path):
    values = np.arange(200, dtype=dtype)
    with open(tmp_path / "a.npy", "wb") as out:
        np.lib.format.write_array(out, values, version=version)
    data = Tokens(tmp_path / "a.npy", 9)
    assert len(data) == 22
    assert data[21].tolist() == list(range(189, 199))


def test_no_window_crosses_from_one_shard_into_the_next(tmp_path: Path):
    _bin(tmp_path / "0.bin", range(0, 8), "uint16")  # two windows of 3 + 1, one token left over
    _bin(tmp_path / "1.bin", [], "uint16")
    _bin(tmp_path / "2.bin", range(100, 103), "uint16")  # too short for one
    np.save(tmp_path / "3.npy", np.arange(200, 204, dtype=np.uint32))
    with pytest.raises(DatasetError, match=r"3\.npy: holds uint32, and dtype= says uint16; leave dtype out"):
        Tokens(tmp_path, 3, "uint16")
    (tmp_path / "3.npy").unlink()
    _bin(tmp_path / "3.bin", range(200, 204), "uint16")
    data = Tokens(tmp_path, 3, "uint16")
    assert [data[i].tolist() for i in range(len(data))] == [[0, 1, 2, 3], [3, 4, 5, 6], [200, 201, 202, 203]]


def test_remote_windows_are_the_local_ones_through_a_bounded_cache(tmp_path: Path, store):
    path = _bin(tmp_path / "a.bin", np.random.default_rng(3).integers(0, 60000, 5000), "uint16")
    store.files = {"d/a.bin": path.read_bytes()}
    near = Tokens(path, 7, "uint16")
    far = Tokens("fake://d/a.bin", 7, "uint16", cache_bytes=4 * 256, block_bytes=256)
    order = np.random.default_rng(4).permutation(len(near)).tolist()
    assert len(far) == len(near) == 714
    assert all(torch.equal(near[i], far[i]) for i in order)
    assert far.cache_counts().peak_bytes <= 4 * 256
    assert all(offset % 256 == 0 and nbytes <= 256 for _, offset, nbytes in store.reads[1:])


def test_remote_windows_one_after_the_other_read_every_block_once(store):
    store.files = {"d/a.bin": np.arange(5000, dtype=np.uint16).tobytes()}
    data = Tokens("fake://d/a.bin", 7, "uint16", cache_bytes=1024, block_bytes=256)
    store.reads.clear()
    assert [window.tolist()[0] for window in data] == list(range(0, 4998, 7))
    assert len(store.reads) == -(-10_000 // 256)


def test_a_window_larger_than_blocks_and_cache_is_whole(store):
    store.files = {"d/a.bin": np.arange(5000, dtype=np.uint16).tobytes()}
    data = Tokens("fake://d/a.bin", 2000, "uint16", cache_bytes=0, block_bytes=100)
    assert data[1].tolist() == list(range(2000, 4001))


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    path = tmp_path / "a.bin"
    with open(path, "wb") as out:
        out.truncate(40 << 30)  # a hole
    tracemalloc.start()
    data = Tokens(path, 1024, "uint16")
    assert len(data) == ((20 << 30) - 1) // 1024
    for index in np.random.default_rng(0).integers(0, len(data), 300).tolist():
        assert data[index].sum() == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_pickled_data_set_is_small_and_reads_the_same(tmp_path: Path):
    data = Tokens(_bin(tmp_path / "a.bin", range(1000), "uint16"), 10, "uint16")
    assert data[5].tolist()[0] == 50
    packed = pickle.dumps(data)
    assert len(packed) < 2000
    assert torch.equal(pickle.loads(packed)[5], data[5])
    data.close()
    assert data[6].tolist()[0] == 60


def test_a_file_cut_off_while_it_is_in_use_is_an_error_and_not_a_signal(tmp_path: Path):
    path = _bin(tmp_path / "a.bin", range(100_000), "uint32")
    data = Tokens(path, 10, "uint32")
    assert data[9000].tolist()[0] == 90_000
    with open(path, "r+b") as out:
        out.truncate(4096)
    with pytest.raises(DatasetChanged, match=r"a\.bin: changed while it was in use: it ends at byte"):
        data[9000]


def _npy(header: bytes, body: bytes = b"", version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    ("content", "dtype", "says"),
    [
        (b"12345678", None, r"a raw file does not say the type of its tokens; give dtype= one of uint8, uint16"),
        (b"1234567", "uint16", r"7 bytes are no whole number of uint16 \(2 bytes each\): the file is cut off, or of"),
        (
            b"1234",
            "uint16",
            r"the longest file has 2 tokens, less than one window of 4 \+ 1; name more data, or short",
        ),
        (b"", "uint16", r"the longest file has 0 tokens, less than one window"),
        (
            b"\x93NUMPY\x01\x00\xff\xff{}",
            None,
            r"begins like a \.npy file, but its header is not one; write it again",
        ),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", None, r"begins like a \.npy file, but its header is not one"),
        (b"\x93NUMPY", None, r"begins like a \.npy file, but its header is not one"),
        (_npy(b"__import__('os')"), None, r"the header of this \.npy file cannot be read: malformed node"),
        (_npy(b"{'descr': '<u2'}"), None, r"the header of this \.npy file cannot be read: 'shape'"),
        (
            _npy(b"{'descr': '<u2', 'shape': (9,)}", bytes(8)),
            None,
            r"should hold 9 uint16, but ends after 4: .* cut off",
        ),
        (
            _npy(b"{'descr': '<f4', 'shape': (2,)}", bytes(8)),
            None,
            r"holds float32\[2\]; token ids must be one dimension",
        ),
        (_npy(b"{'descr': '|O', 'shape': (1,)}", bytes(8)), None, r"holds object\[1\]; token ids must be"),
        (_npy(b"{'descr': '<u2', 'shape': (2, 2)}", bytes(8)), None, r"holds uint16\[2, 2\]; token ids must be"),
        (_npy(b"{'descr': '<u2', 'shape': (-2,)}", bytes(8)), None, r"holds uint16\[-2\]; token ids must be"),
    ],
)
def test_what_is_no_tokens_is_named(content: bytes, dtype: str | None, says: str, tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DatasetError, match=r"/a\.bin: " + says):
        Tokens(tmp_path / "a.bin", 4, dtype)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path):
    path = _bin(tmp_path / "a.bin", range(10), "uint16")
    with pytest.raises(DatasetError, match=r"length: a window of 0 tokens cannot be; give at least 1"):
        Tokens(path, 0, "uint16")
    with pytest.raises(DatasetError, match=r"dtype: 'float32' is no type of token ids; allowed: uint8, uint16, "):
        Tokens(path, 3, "float32")
    with pytest.raises(DatasetError, match=r"block_bytes: 0 cannot be read"):
        Tokens(path, 3, "uint16", block_bytes=0)
    assert issubclass(DatasetDamaged, DatasetError)

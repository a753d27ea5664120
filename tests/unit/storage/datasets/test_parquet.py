"""Parquet: rows by number over files and row groups, decoded once and within bounds, schemas and damage named."""

from __future__ import annotations

import datetime
import os
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from everstep.storage.datasets.errors import DatasetChanged, DatasetDamaged, DatasetError, DatasetNotFound
from everstep.storage.datasets.order import order_of
from everstep.storage.datasets.parquet import Parquet


def _table(rows: int) -> pa.Table:
    numbers = range(rows)
    return pa.table({
        "id": pa.array(numbers, pa.int64()),
        "text": [None if i % 7 == 3 else f"text {i} " * (i % 5) for i in numbers],
        "ids": pa.array([list(range(i % 4)) for i in numbers], pa.list_(pa.int32())),
        "meta": [{"a": i, "b": {"c": [i / 2]}} for i in numbers],
        "when": [datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=i) for i in numbers],
        "kind": pa.array(["even" if i % 2 == 0 else "odd" for i in numbers]).dictionary_encode(),
    })  # fmt: skip


def _files(root: Path, **settings: object) -> list[dict[str, object]]:
    """Three files of 100, 0 and 57 rows in row groups of 10; returns all rows."""
    rows = []
    for number, (first, count) in enumerate(((0, 100), (100, 0), (100, 57))):
        pq.write_table(_table(200).slice(first, count), root / f"{number}.parquet", row_group_size=10, **settings)
        rows += _table(200).slice(first, count).to_pylist()
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "version": "1.0"},
        {"data_page_version": "2.0", "write_page_index": True},
    ],
)
def test_any_row_at_once_over_files_and_row_groups(settings: dict, tmp_path: Path):
    rows = _files(tmp_path, **settings)
    data = Parquet(tmp_path)
    assert len(data) == 157
    assert data.row_groups == 17 or data.row_groups == 16
    order = random.Random(0).sample(range(157), 157)
    assert [data[i] for i in order] == [rows[i] for i in order]
    assert list(data) == rows
    for index in (157, -1):
        with pytest.raises(IndexError, match=f"row {index} is outside a data set of 157 rows"):
            data[index]


def test_a_bucket_gives_the_same_and_only_the_chosen_columns_are_read(tmp_path: Path, store):
    column = [random.Random(i).randbytes(80_000) for i in range(100)]
    wide = pa.table({name: column for name in ("c0", "c1", "c2")})
    pq.write_table(wide, tmp_path / "a.parquet", row_group_size=50, compression="none", use_dictionary=False)
    store.files = {"d/a.parquet": (tmp_path / "a.parquet").read_bytes()}
    data = Parquet("fake://d/a.parquet", ["c2", "c0"])
    assert sum(nbytes for _, _, nbytes in store.reads) <= 64 << 10  # footers only
    store.reads.clear()
    row = data[60]
    assert list(row) == ["c2", "c0"]
    assert row == {name: wide.column(name)[60].as_py() for name in ("c2", "c0")}
    read = [nbytes for _, offset, nbytes in store.reads if nbytes > 64 << 10]
    assert len(read) == 2  # c1 lies between them
    assert sum(read) < 2 * 4_100_000
    assert data.schema.names == ["c2", "c0"]


def test_many_small_columns_in_a_bucket_are_one_request(tmp_path: Path, store):
    pq.write_table(pa.table({f"c{i}": range(100) for i in range(50)}), tmp_path / "a.parquet", row_group_size=50)
    store.files = {"d/a.parquet": (tmp_path / "a.parquet").read_bytes()}
    data = Parquet("fake://d/a.parquet")
    store.reads.clear()
    assert data[70] == {f"c{i}": 70 for i in range(50)}
    assert len(store.reads) == 1


def test_nested_columns_are_chosen_whole(tmp_path: Path):
    rows = _files(tmp_path)
    data = Parquet(f"{tmp_path}/*.parquet", ["meta", "ids"])
    assert [data[i] for i in range(157)] == [{"meta": row["meta"], "ids": row["ids"]} for row in rows]


def test_its_order_decodes_each_row_group_once_an_epoch_within_the_cache(tmp_path: Path):
    table = pa.table({"id": range(5000), "text": ["x" * 400] * 5000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, use_dictionary=False)
    limit = 5 * 100 * 500
    data = Parquet(tmp_path / "a.parquet", cache_bytes=limit, together=4)
    order = order_of(data, 7)
    drawn = [data[order.at(draw)]["id"] for draw in range(5000)]
    assert sorted(drawn) == list(range(5000))
    assert data.cache_counts().loads == 50
    assert data.cache_counts().peak_bytes <= limit
    again = Parquet(tmp_path / "a.parquet", cache_bytes=100 * 500, together=1)
    assert {again[order_of(again, 7).at(draw)]["id"] for draw in range(100)} == set(
        again[i]["id"] for i in range(*_span(again))
    )


def _span(data: Parquet) -> tuple[int, int]:
    first = order_of(data, 7).at(0) // 100 * 100
    return first, first + 100


def test_a_row_group_larger_than_the_cache_is_not_decoded_for_every_row(tmp_path: Path):
    pq.write_table(pa.table({"id": range(1000)}), tmp_path / "a.parquet", row_group_size=100)
    data = Parquet(tmp_path / "a.parquet", cache_bytes=0)
    assert [row["id"] for row in data] == list(range(1000))
    assert data.cache_counts().loads == 10
    assert data.cache_counts().peak_bytes < 900  # of 8 bytes a row


def test_opening_reads_a_long_footer_whole(tmp_path: Path, store):
    table = pa.table({f"a column with a long name {i}" * 20: [i] for i in range(200)})
    pq.write_table(table, tmp_path / "a.parquet")
    store.files = {"d/a.parquet": (tmp_path / "a.parquet").read_bytes()}
    assert Parquet("fake://d/a.parquet")[0] == table.to_pylist()[0]


def test_a_file_without_rows_may_have_any_schema(tmp_path: Path):
    pq.write_table(pa.table({"text": pa.array([], pa.null())}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), tmp_path / "1.parquet")
    assert list(Parquet(tmp_path)) == [{"id": 1, "text": "a"}]


def test_a_value_that_python_has_not_is_named(tmp_path: Path):
    far = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"id": [1, 2], "when": far}), tmp_path / "a.parquet")
    data = Parquet(tmp_path / "a.parquet")
    assert data[0]["id"] == 1
    with pytest.raises(
        DatasetDamaged, match=r"a\.parquet: row 1 of row group 0, column 'when' \(timestamp\[us\]\): date val"
    ):
        data[1]
    assert Parquet(tmp_path / "a.parquet", ["id"])[1] == {"id": 2}


def test_a_pickled_data_set_reads_the_same(tmp_path: Path):
    rows = _files(tmp_path)
    data = Parquet(tmp_path)
    assert data[33] == rows[33]
    assert pickle.loads(pickle.dumps(data))[150] == rows[150]
    data.close()
    assert data[33] == rows[33]


def test_a_forked_child_reads(tmp_path: Path):
    rows = _files(tmp_path)
    data = Parquet(tmp_path)
    assert data[0] == rows[0]
    pid = os.fork()
    if not pid:
        os._exit(0 if data[120] == rows[120] and data[0] == rows[0] else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_files_of_other_schemas_are_named_with_their_columns(tmp_path: Path):
    pq.write_table(pa.table({"id": [1], "text": ["a"], "x": [1]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": ["a"], "id": ["1"], "y": [1]}), tmp_path / "1.parquet")
    with pytest.raises(
        DatasetError,
        match=r"/1\.parquet: its schema is not that of .*/0\.parquet: id is string \(there int64\); x is missing"
        r" \(there int64\); y is int64 \(there missing\); make them equal, choose columns= that are, or make two",
    ):
        Parquet(tmp_path)
    with pytest.raises(DatasetError, match=r"id is string \(there int64\); make"):
        Parquet(tmp_path, ["id", "text"])
    data = Parquet(tmp_path, ["text"])  # in another place in each file
    assert list(data) == [{"text": "a"}, {"text": "a"}]


def test_columns_that_are_not_there_are_named(tmp_path: Path):
    _files(tmp_path)
    with pytest.raises(
        DatasetError, match=r"columns: 'txt' is no column of .*0\.parquet; it has: id, text, ids, meta, "
    ):
        Parquet(tmp_path, ["id", "txt"])
    with pytest.raises(DatasetError, match=r"columns: 'text' is one text; give a list: \['text'\]"):
        Parquet(tmp_path, "text")
    with pytest.raises(DatasetError, match=r"columns: \['id', 'id'\] names a column twice"):
        Parquet(tmp_path, ["id", "id"])
    with pytest.raises(DatasetError, match=r"columns: \[\] names none"):
        Parquet(tmp_path, [])
    with pytest.raises(DatasetError, match=r"together \(0\) and threads \(4\): give at least 1"):
        Parquet(tmp_path, together=0)


def test_a_file_that_changes_or_goes_is_named(tmp_path: Path):
    _files(tmp_path)
    data = Parquet(tmp_path, cache_bytes=0)
    assert data[0]["id"] == 0
    content = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(content)
    os.utime(tmp_path / "0.parquet", ns=(0, 5))
    with pytest.raises(DatasetChanged, match=r"/0\.parquet: changed while it was in use"):
        data[50]
    (tmp_path / "2.parquet").unlink()
    with pytest.raises(DatasetNotFound, match=r"/2\.parquet: there is no such file; put it there"):
        data[150]


def test_a_remote_file_of_another_length_is_named(tmp_path: Path, store):
    _files(tmp_path)
    store.files = {"d/a.parquet": (tmp_path / "0.parquet").read_bytes()}
    data = Parquet("fake://d/a.parquet")
    store.files["d/a.parquet"] = (tmp_path / "2.parquet").read_bytes()
    with pytest.raises(DatasetChanged, match=r"fake://d/a\.parquet: changed while it was in use"):
        data[0]


def _footer(content: bytes) -> int:
    return int.from_bytes(content[-8:-4], "little")


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (
            lambda b: b[:-1],
            r"does not end as a Parquet file does \(its last bytes are b'.*', not b'PAR1'\): it is cut off",
        ),
        (lambda b: b"", r"does not end as a Parquet file does"),
        (lambda b: b[:-4] + b"PARE", r"is encrypted"),
        (
            lambda b: b[:-8] + b"\xff\xff\xff\x7fPAR1",
            r"says that its footer has 2,147,483,647 bytes, of [\d,]+ in all",
        ),
        (lambda b: b[: -8 - _footer(b)] + b"\xff" * _footer(b) + b[-8:], r"its footer cannot be read"),
        (lambda b: b'{"a": 1}\n' * 10, r"does not end as a Parquet file does"),
    ],
)
def test_what_is_no_parquet_file_is_named(cut, says: str, tmp_path: Path):
    _files(tmp_path)
    path = tmp_path / "0.parquet"
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(DatasetDamaged, match=r"/0\.parquet: " + says):
        Parquet(path)


def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path: Path):
    pq.write_table(pa.table({"id": range(1000)}), tmp_path / "a.parquet", row_group_size=100, compression="zstd")
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(3).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(content)
    data = Parquet(tmp_path / "a.parquet")
    assert data[299]["id"] == 299
    assert data[400]["id"] == 400
    with pytest.raises(
        DatasetDamaged, match=r"/a\.parquet: row group 3 of 10 cannot be decoded: .*; write the file again"
    ):
        data[350]


def test_page_checksums_are_verified_where_a_file_has_them(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pa.table({"id": pa.array(range(1000), pa.int64())})
    pq.write_table(table, path, use_dictionary=False, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index((500).to_bytes(8, "little"))] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DatasetDamaged, match=r"/a\.parquet: row group 0 of 1 cannot be decoded: .*; write the file again"
    ):
        Parquet(path)[3]


def test_every_flipped_byte_is_an_error_of_ours_or_harmless(tmp_path: Path):
    """Parquet has few checksums; but nothing other than DatasetError ever comes out, and nothing hangs or dies."""
    pq.write_table(_table(40), tmp_path / "a.parquet", row_group_size=10, compression="none")
    good = (tmp_path / "a.parquet").read_bytes()
    errors = 0
    for at in range(0, len(good), 11):
        path = tmp_path / "b.parquet"
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            list(Parquet(path))
        except DatasetError:
            errors += 1
    assert errors > 50


def test_no_rows_is_an_error(tmp_path: Path):
    pq.write_table(_table(9).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=r"a\.parquet: no file has a row; name data with samples"):
        Parquet(tmp_path)

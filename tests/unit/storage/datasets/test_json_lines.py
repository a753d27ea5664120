"""JSON Lines: every line found whatever the chunks cut through, the index kept and checked, bad lines named."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import random
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from everstep.storage.datasets import lines
from everstep.storage.datasets.errors import DatasetChanged, DatasetDamaged, DatasetError
from everstep.storage.datasets.json_lines import JsonLines
from everstep.storage.datasets.source import open_files


def _file(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _rows(path: Path, count: int, seed: int = 0) -> list[dict[str, object]]:
    choice = random.Random(seed)
    rows: list[dict[str, object]] = [{"id": i, "text": "é" * choice.randrange(200)} for i in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def test_any_line_at_once_over_several_files(tmp_path: Path):
    rows = [*_rows(tmp_path / "a.jsonl", 700), *_rows(tmp_path / "b.jsonl", 300, seed=1)]
    _file(tmp_path / "c.ndjson", "")
    data = JsonLines(tmp_path, span_bytes=512)
    assert len(data) == 1000
    order = random.Random(2).sample(range(1000), 1000)
    assert [data[i] for i in order] == [rows[i] for i in order]
    for index in (1000, -1):
        with pytest.raises(IndexError, match=f"sample {index} is outside a data set of 1000 lines"):
            data[index]


PIECES = st.sampled_from([b"\n", b"\r\n", b" ", b"\t", b"\r", b"1", b"[2, 3]", b'"a b"', b"  4", b"\n\n"])


@given(st.lists(PIECES, max_size=60), st.integers(1, 9), st.integers(1, 40), st.integers(1, 3))
@example([b"1", b"\r\n", b"1"], 2, 1, 1)  # a chunk ends between \r and \n
@example([b" "] * 30 + [b"1"], 4, 8, 1)  # blank for several chunks, and then not
@settings(max_examples=150, deadline=None)
def test_lines_are_found_whatever_the_chunks_and_spans(pieces: list[bytes], chunk: int, span: int, threads: int):
    content = b"".join(pieces)
    expected = [(number, line) for number, line in enumerate(content.split(b"\n")) if line.strip(b" \t\r")]
    with tempfile.TemporaryDirectory() as folder:
        path = _file(Path(folder) / "a.jsonl", content)
        (file,) = open_files(path, (".jsonl",))
        index = lines.scan(file, span_bytes=span, chunk_bytes=chunk, most_line_bytes=1 << 20, threads=threads)
        assert index.lines == len(expected)
        for sample, (number, line) in enumerate(expected):
            mark, first, nbytes, skip = index.place(sample, file.bytes)
            stretch = content[first : first + nbytes].split(b"\n")
            found = [(i, text) for i, text in enumerate(stretch) if text.strip(b" \t\r")][skip]
            assert found[1] == line
            assert int(index.numbers[mark]) + found[0] == number
            assert nbytes <= span + max(map(len, content.split(b"\n"))) + 1 + _blanks(content)
        file.close()


def _blanks(content: bytes) -> int:
    return sum(len(line) + 1 for line in content.split(b"\n") if not line.strip(b" \t\r"))


def test_other_systems_line_ends_blank_lines_and_no_last_newline(tmp_path: Path):
    path = _file(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\n\n\t\n  {"a": 3}  ')
    data = JsonLines(path)
    assert [data[i]["a"] for i in range(len(data))] == [1, 2, 3]


def test_values_are_those_of_pythons_own_reader(tmp_path: Path):
    written = [
        '{"a": NaN, "b": Infinity}',
        "1e999",
        '"\\ud800"',
        "123456789012345678901234567890",
        "[]",
        "null",
        "0.1",
    ]
    data = JsonLines(_file(tmp_path / "a.jsonl", "\n".join(written)))
    read = [data[i] for i in range(len(data))]
    assert math.isnan(read[0]["a"])
    assert read[1:] == [json.loads(line) for line in written[1:]]
    assert read[0]["b"] == math.inf


BAD = b'{"a": 1}\n\n{"a": 2}\n{"a": \n{"a": 4}\n\xff\xfe\n' + b"[" * 100_000 + b"\n"


@pytest.mark.parametrize("span", [1, 12, 1 << 20])
def test_a_bad_line_is_named_as_an_editor_counts_and_the_others_are_read(span: int, tmp_path: Path):
    data = JsonLines(_file(tmp_path / "a.jsonl", BAD), span_bytes=span)
    assert [data[i]["a"] for i in (0, 1, 3)] == [1, 2, 4]
    with pytest.raises(
        DatasetDamaged,
        match=r"/a\.jsonl: line 4 is not JSON \(Expecting value at character 6 of the line\): '\{\"a\": '; correct",
    ):
        data[2]
    with pytest.raises(DatasetDamaged, match=r"line 6 is not UTF-8 \(invalid start byte at byte 0 of the line\): "):
        data[4]
    with pytest.raises(DatasetDamaged, match=r"line 7 is not JSON \(.*\): '\[{60}…'; correct or remove"):
        data[5]


def test_json_over_many_lines_is_recognised(tmp_path: Path):
    data = JsonLines(_file(tmp_path / "a.jsonl", json.dumps([{"a": 1}], indent=1)))
    with pytest.raises(DatasetDamaged, match=r"line 1 .*one JSON value over many lines: write one value a line \(jq"):
        data[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b"{}\n"), r"is compressed by gzip, not JSON Lines; unpack it \(gzip -d\)"),
        (b"\x28\xb5\x2f\xfd1234", r"is compressed by zstd, .*unpack it \(zstd -d\)"),
        (b"BZh91234", r"is compressed by bzip2, .*unpack it \(bzip2 -d\)"),
        (b"\xfd7zXZ\x0012", r"is compressed by xz, .*unpack it \(xz -d\)"),
        (b"PK\x03\x04", r"is a zip archive, .*unpack it"),
        (b"PAR1....PAR1", r"is a Parquet file, not JSON Lines; use Parquet"),
        ("{}\n".encode("utf-16"), r"is UTF-16 text, not JSON Lines; convert it to UTF-8"),
        (b" \n\n", r"no line with anything in it; name data with samples"),
        (b"", r"no line with anything in it"),
    ],
)
def test_what_is_no_json_lines_is_named(content: bytes, says: str, tmp_path: Path):
    with pytest.raises(DatasetError, match=r"/a\.jsonl: " + says):
        JsonLines(_file(tmp_path / "a.jsonl", content))


def test_a_line_longer_than_the_limit_is_named(tmp_path: Path):
    path = _file(tmp_path / "a.jsonl", b"1\n2\n" + b" " * 3000 + b"3\n4\n")
    with pytest.raises(
        DatasetError, match=r"a\.jsonl: line 3 \(from byte 4\) is longer than max_line_bytes = 1,000;"
    ):
        JsonLines(path, max_line_bytes=1000)
    assert JsonLines(path, max_line_bytes=4000)[2] == 3


def _marks(data: JsonLines) -> list[object]:
    return [data[i] for i in range(len(data))]


def test_a_kept_index_saves_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [*_rows(tmp_path / "a.jsonl", 500), *_rows(tmp_path / "b.jsonl", 100, seed=1)]
    kept = tmp_path / "lines.index"
    assert _marks(JsonLines(tmp_path, index=kept, span_bytes=256)) == rows
    monkeypatch.setattr(lines, "scan", lambda *_, **__: pytest.fail("the index was not used"))
    data = JsonLines(tmp_path, index=kept, span_bytes=256)
    assert _marks(data) == rows
    assert _marks(pickle.loads(pickle.dumps(data))) == rows


def test_an_index_of_a_file_that_was_written_since_is_made_again(tmp_path: Path):
    path, kept = tmp_path / "a.jsonl", tmp_path / "lines.index"
    _rows(path, 50)
    assert len(JsonLines(path, index=kept)) == 50
    size = path.stat().st_size
    content = b"1\n" * (size // 2) + b"\n" * (size % 2)  # as long as before
    path.write_bytes(content)
    os.utime(path, ns=(0, 1))
    for _ in range(2):
        assert len(JsonLines(path, index=kept)) == size // 2
    _rows(tmp_path / "b.jsonl", 5)
    assert len(JsonLines([path, tmp_path / "b.jsonl"], index=kept)) == size // 2 + 5


def test_an_index_with_any_byte_changed_is_made_again(tmp_path: Path):
    path, kept = tmp_path / "a.jsonl", tmp_path / "lines.index"
    rows = _rows(path, 60)
    JsonLines(path, index=kept, span_bytes=512)
    good = kept.read_bytes()
    for at in range(0, len(good), 7):
        kept.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        assert _marks(JsonLines(path, index=kept, span_bytes=512)) == rows
    for length in (0, 5, 20, 40, len(good) - 1):
        kept.write_bytes(good[:length])
        assert _marks(JsonLines(path, index=kept, span_bytes=512)) == rows
    assert kept.read_bytes() == good
    assert set(os.listdir(tmp_path)) == {"a.jsonl", "lines.index"}  # nothing half written is left


def test_an_index_that_cannot_be_kept_is_said(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    _rows(path, 5)
    with pytest.raises(
        DatasetError, match=r"index: .*/none/x\.index cannot be written \(No such file .*leave index out"
    ):
        JsonLines(path, index=tmp_path / "none" / "x.index")
    with pytest.raises(DatasetError, match=r"index: .*/a\.jsonl is one of the data files; give another path"):
        JsonLines(path, index=path)
    with pytest.raises(DatasetError, match=r"index: 's3://b/x' is not on this machine; give a path"):
        JsonLines(path, index="s3://b/x")


def test_a_bucket_gives_the_same_and_reads_no_more_than_a_stretch(tmp_path: Path, store):
    rows = _rows(tmp_path / "a.jsonl", 500)
    store.files = {"d/a.jsonl": (tmp_path / "a.jsonl").read_bytes()}
    data = JsonLines("fake://d/*.jsonl", span_bytes=512, cache_bytes=0)
    store.reads.clear()
    order = random.Random(1).sample(range(500), 100)
    assert [data[i] for i in order] == [rows[i] for i in order]
    assert len(store.reads) <= 100
    assert max(nbytes for _, _, nbytes in store.reads) < 512 + 450


def test_lines_one_after_the_other_read_every_byte_once(store):
    store.files = {"d/a.jsonl": b"".join(b'{"a": %d}\n' % i for i in range(2000))}
    data = JsonLines("fake://d/a.jsonl", span_bytes=512, cache_bytes=6000)
    store.reads.clear()
    assert [row["a"] for row in data] == list(range(2000))
    assert sum(nbytes for _, _, nbytes in store.reads) == len(store.files["d/a.jsonl"])
    assert 3000 < data.cache_counts().peak_bytes <= 6000


def test_a_file_that_changes_between_the_scan_and_the_read_is_said(store):
    store.files = {"d/a.jsonl": b"1\n2\n3\n"}
    data = JsonLines("fake://d/a.jsonl")
    store.files["d/a.jsonl"] = b"1    \n"
    with pytest.raises(DatasetChanged, match=r"a\.jsonl: changed while it was in use: sample 2 is not where it was"):
        data[2]


def test_memory_of_scan_and_index_is_bounded(tmp_path: Path):
    """A million lines: 24 bytes for each span of the file, and while scanning a few chunks."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"number": 1234567, "text": "some words that make a line"}\n' * 1_000_000)
    (file,) = open_files(path, (".jsonl",))
    tracemalloc.start()
    index = lines.scan(file, chunk_bytes=1 << 20, most_line_bytes=1 << 20, threads=2)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.lines == 1_000_000
    marks = -(-file.bytes // lines.SPAN_BYTES)
    assert len(index.offsets) == marks
    assert held < 24 * marks + 50_000
    assert peak < 12 << 20


def test_nothing_but_newlines_is_scanned_in_bounded_memory(tmp_path: Path):
    path = _file(tmp_path / "a.jsonl", b"\n" * (8 << 20) + b"1\n")
    (file,) = open_files(path, (".jsonl",))
    tracemalloc.start()
    index = lines.scan(file, chunk_bytes=256 << 10, most_line_bytes=1 << 20, threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.lines == 1
    assert peak < 40 << 20
    assert np.all(index.samples[:-1] == 0)
    assert JsonLines(path)[0] == 1


def test_settings_that_make_no_sense_are_refused(tmp_path: Path):
    path = _file(tmp_path / "a.jsonl", "1\n")
    with pytest.raises(DatasetError, match="span_bytes, max_line_bytes and threads: give at least 1"):
        JsonLines(path, threads=0)

"""The data sets over a real S3 server, a real web server, and memory://: the same samples as from the disk."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from everstep.storage.datasets.errors import DatasetChanged, DatasetError
from everstep.storage.datasets.json_lines import JsonLines
from everstep.storage.datasets.mixture import Mixture
from everstep.storage.datasets.parquet import Parquet
from everstep.storage.datasets.text import CorpusError, TextBytes
from everstep.storage.datasets.tokens import Tokens
from s3_server import Server, s3_server

ROWS = [{"id": i, "text": f"row {i} " * (i % 9)} for i in range(300)]
NAMES = ("data/a.bin", "data/b.npy", "data/more/c.jsonl", "data/d.parquet", "data/e.txt")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each format."""
    root = tmp_path_factory.mktemp("files")
    (root / "data" / "more").mkdir(parents=True)
    tokens = np.random.default_rng(1).integers(0, 60000, 20_000, dtype=np.uint16)
    tokens.tofile(root / "data/a.bin")
    np.save(root / "data/b.npy", tokens[:5000])
    (root / "data/more/c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), root / "data/d.parquet", row_group_size=40)
    (root / "data/e.txt").write_text("some text " * 100)
    return root


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Server]:
    with s3_server("bucket") as running:
        client = running.client()
        for name in NAMES:
            client.put_object(Bucket="bucket", Key=name, Body=(files / name).read_bytes())
        yield running


class _Web(BaseHTTPRequestHandler):
    """Files with byte ranges, as web servers have them; no listings."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        status, extra = 200, {}
        if (asked := self.headers.get("Range")) is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last or len(content) - 1), len(content) - 1)
            status, extra = 206, {"Content-Range": f"bytes {first}-{stop}/{len(content)}"}
            content = content[int(first) : stop + 1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(files: Path) -> Iterator[str]:
    handler = type("Handler", (_Web,), {"root": files})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(params=["s3", "memory", "http", "file"])
def base(request: pytest.FixtureRequest, files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL below which the files lie, without a trailing '/'."""
    if request.param == "s3":
        for name, value in request.getfixturevalue("server").env.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket"
    elif request.param == "memory":
        system = fsspec.filesystem("memory")
        for name in NAMES:
            system.pipe_file(f"/root/{name}", (files / name).read_bytes())
        yield "memory://root"
        system.rm("/root", recursive=True)
    elif request.param == "http":
        yield request.getfixturevalue("web")
    else:
        yield f"file://{files}"


def test_every_format_reads_as_from_the_disk(base: str, files: Path):
    near, far = (
        Tokens(files / "data/a.bin", 31, "uint16"),
        Tokens(f"{base}/data/a.bin", 31, "uint16", block_bytes=4096),
    )
    assert len(near) == len(far)
    assert all(near[i].equal(far[i]) for i in range(0, len(near), 17))
    assert Tokens(f"{base}/data/b.npy", 99)[3].tolist() == Tokens(files / "data/b.npy", 99)[3].tolist()
    lines = JsonLines(f"{base}/data/more/c.jsonl", span_bytes=1000)
    rows = Parquet(f"{base}/data/d.parquet", ["text", "id"])
    for i in (299, 0, 150, 7):
        assert lines[i] == rows[i] == ROWS[i]
    assert TextBytes(f"{base}/data/e.txt", 10)[2].tolist() == [*b"some text s"]
    mixed = Mixture({"lines": (lines, 1), "rows": (rows, 2)}, seed=3)
    drawn = [mixed[i] for i in range(900)]
    assert all(drawn.count(row) == 3 for row in ROWS)  # once from the lines, twice from the rows
    mixed.close()
    near.close()
    far.close()


def test_folders_and_globs_in_a_bucket(base: str):
    if base.startswith("http"):
        pytest.skip("a web server has no listings")
    assert len(JsonLines(f"{base}/data")) == 300
    assert len(JsonLines(f"{base}/**/*.jsonl")) == 300
    assert len(Parquet(f"{base}/data/*.parquet")) == 300
    assert TextBytes(f"{base}/data/*.txt", 10).bytes == 1000
    with pytest.raises(DatasetError, match=r"the folder has no file that ends in \.parquet or \.pq"):
        Parquet(f"{base}/data/more")


def test_what_is_not_there_is_named(base: str):
    with pytest.raises(DatasetError, match=r"/data/none\.bin: there is no such file"):
        Tokens(f"{base}/data/none.bin", 3, "uint16")
    with pytest.raises(CorpusError, match=r"args\.data: .*/data/none\.txt: there is no such file"):
        TextBytes(f"{base}/data/none.txt", 3)


def test_an_index_of_a_remote_file_is_kept_and_checked(base: str, tmp_path: Path):
    kept = tmp_path / "lines.index"
    url = f"{base}/data/more/c.jsonl"
    assert JsonLines(url, index=kept)[299] == ROWS[299]
    written = kept.stat().st_mtime_ns
    assert JsonLines(url, index=kept)[150] == ROWS[150]
    assert kept.stat().st_mtime_ns == written


def test_a_data_set_goes_on_in_a_forked_child_and_in_one_that_unpickled_it(base: str):
    data = Parquet(f"{base}/data/d.parquet")
    lines = JsonLines(f"{base}/data/more/c.jsonl", cache_bytes=0)
    assert data[0] == lines[0] == ROWS[0]
    packed = pickle.dumps((data, lines))
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            again, more = pickle.loads(packed)
            ok = data[250] == lines[250] == ROWS[250] and again[120] == more[120] == ROWS[120]
            os.write(write, b"ok" if ok else b"differs")
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 1000)
    os.close(read)
    os.waitpid(pid, 0)
    assert said == b"ok"


def test_a_bucket_that_refuses_is_said_at_once(server: Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    data = Tokens("s3://bucket/data/a.bin", 31, "uint16", cache_bytes=0)
    server.deny(True)
    try:
        with pytest.raises(DatasetError, match=r"s3://bucket/data/a\.bin: cannot be read: .*"):
            data[5]
    finally:
        server.deny(False)
    assert data[5].shape == (32,)


def test_an_object_that_was_replaced_by_a_shorter_one_is_said(server: Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    client = server.client()
    client.put_object(Bucket="bucket", Key="changes.bin", Body=bytes(10_000))
    data = Tokens("s3://bucket/changes.bin", 9, "uint8", cache_bytes=0, block_bytes=1000)
    assert data[500].sum() == 0
    client.put_object(Bucket="bucket", Key="changes.bin", Body=bytes(5_000))
    with pytest.raises(DatasetChanged, match=r"s3://bucket/changes\.bin: changed while it was in use"):
        data[1000]

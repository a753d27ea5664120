"""What the port `Store` promises, on every store: a folder of this machine, S3 (a real server process), fsspec.

Faults are real: a proxy between boto3 and the server that swallows an answer, a writer that is killed, a port that
nobody listens on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from everstep.storage.errors import (
    CheckpointUnsupported,
    StoreDenied,
    StoreError,
    StoreExists,
    StoreFull,
    StoreNotFound,
    StoreUnavailable,
)
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Entry, Folder, Store
from s3_server import Server, s3_server

MIB = 1 << 20
SRC = str(Path(__file__).resolve().parents[2] / "src")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, in this process's environment."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)
    return server


@pytest.fixture(params=["local", "s3", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nobody else writes."""
    if request.param == "local":
        return str(tmp_path)
    if request.param == "s3":
        request.getfixturevalue("s3")
    host = "bucket" if request.param == "s3" else "host"
    return f"{request.param}://{host}/{tmp_path.name}-{secrets.token_hex(4)}"


@pytest.fixture
def folder(url: str) -> Folder:
    return folder_at(url)


def read(folder: Folder, name: str, offset: int = 0, length: int = 100) -> bytes:
    out = memoryview(bytearray(length))
    return bytes(out[: folder.store.read_into(folder.child(name).path, offset, out)])


def names(folder: Folder) -> list[str]:
    return [entry.name for entry in folder.store.entries(folder.path)]


def pattern(nbytes: int) -> bytes:
    """Bytes that differ from block to block."""
    return b"".join(i.to_bytes(8, "little") for i in range(-(-nbytes // 8)))[:nbytes]


def all_at_once(count: int, do: Callable[[int], object]) -> list[object]:
    """Results, or StoreErrors, of calls that start together."""
    barrier = threading.Barrier(count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # memory:// races inside this process only

    def one(i: int) -> object:
        barrier.wait()
        try:
            return do(i)
        except StoreError as error:
            return error

    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))
    finally:
        sys.setswitchinterval(interval)


def put(folder: Folder, name: str, data: bytes, order: Callable[[list[int]], object] = list.reverse) -> None:
    """A file through an upload, its parts in any order from three threads."""
    store, path = folder.store, folder.child(name).path
    part = store.part_bytes(len(data))
    starts = list(range(0, len(data), part))
    order(starts)
    upload = store.upload(path, len(data))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda at: upload.write(at, memoryview(data)[at : at + part]), starts))
    upload.finish()


# What every store does


def test_a_url_leads_back_to_its_folder(folder: Folder, url: str) -> None:
    assert folder.url == url
    folder.store.put_new(folder.child("a b/c").path, b"x")
    again = folder_at(folder.child("a b").url)
    assert names(again) == ["c"]
    assert again == folder.child("a b") != folder
    assert len({again, folder.child("a b")}) == 1


@pytest.mark.parametrize("name", ["plain", "with space", "ünï-日本", "per%20cent+plus", "#q?x=[1]*{a}&;'\""])
def test_names(folder: Folder, name: str) -> None:
    data = b"content of " + name.encode()
    folder.store.put_new(folder.child(name).path, data)
    put(folder.child(name + "-folder"), name, data)
    assert folder.store.entries(folder.path) == [
        Entry(name, False, len(data)),
        Entry(name + "-folder", True, 0),
    ]
    assert read(folder, name) == read(folder.child(name + "-folder"), name) == data
    folder.store.remove_file(folder.child(name).path)
    folder.store.remove_folder(folder.child(name + "-folder").path, name)
    assert names(folder) == []


@pytest.mark.parametrize("path", ["a//b", "a/../b", "./a", "a/", "/a", "a\0b"])
def test_paths_that_no_store_has_are_refused(folder: Folder, path: str) -> None:
    store = folder.store
    calls: list[Callable[[], object]] = [
        lambda: store.entries(path), lambda: store.size(path), lambda: store.read_into(path, 0, memoryview(b"")),
        lambda: store.put_new(path, b""), lambda: store.claim_folder(path), lambda: store.upload(path, 1),
        lambda: store.remove_file(path), lambda: store.remove_folder(path, "x"), lambda: store.sweep(path),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StoreDenied, match="the path has"):
            call()


def test_what_is_not_there(folder: Folder) -> None:
    store = folder.store
    store.put_new(folder.child("folder/file").path, b"x")
    assert store.entries(folder.child("nothing").path) == []
    assert store.entries(folder.child("folder/file").path) == []
    for name in ("nothing", "folder", "folder/file/below"):
        with pytest.raises(StoreNotFound, match=name):
            store.size(folder.child(name).path)
        with pytest.raises(StoreNotFound, match=name):
            read(folder, name)
        with pytest.raises(StoreNotFound, match=name):
            read(folder, name, length=0)
    store.remove_file(folder.child("nothing").path)
    store.remove_folder(folder.child("nothing").path, "x")
    assert store.sweep(folder.child("nothing").path) == 0
    assert names(folder) == ["folder"]


def test_reads(folder: Folder) -> None:
    data = pattern(1000)
    folder.store.put_new(folder.child("x").path, data)
    folder.store.put_new(folder.child("empty").path, b"")
    assert folder.store.size(folder.child("x").path) == 1000
    assert read(folder, "x", 0, 1000) == data
    assert read(folder, "x", 100, 50) == data[100:150]
    assert read(folder, "x", 990, 50) == data[990:]
    assert read(folder, "x", 1000, 50) == b""
    assert read(folder, "x", 5000, 50) == b""
    assert read(folder, "x", 10, 0) == b""
    assert read(folder, "empty", 0, 50) == b""


def test_reads_from_many_threads(folder: Folder) -> None:
    data = pattern(1 * MIB)
    folder.store.put_new(folder.child("x").path, data)
    spans = [(at * 997, 3000) for at in range(200)]
    got = all_at_once(8, lambda i: [read(folder, "x", *span) for span in spans[i::8]])
    assert got == [[data[at : at + length] for at, length in spans[i::8]] for i in range(8)]


def test_of_eight_writers_of_a_file_one_wins(folder: Folder) -> None:
    path = folder.child("manifest").path
    for round_ in range(5):
        contents = [secrets.token_bytes(10_000) for _ in range(8)]
        results = all_at_once(8, lambda i, c=contents: folder.store.put_new(path, c[i]))
        (winner,) = [i for i, result in enumerate(results) if result is None]
        assert sum(isinstance(result, StoreExists) for result in results) == 7, round_
        assert read(folder, "manifest", 0, 20_000) == contents[winner]
        assert names(folder) == ["manifest"]
        folder.store.remove_file(path)


def test_of_eight_claims_of_a_folder_one_wins(folder: Folder) -> None:
    for i in range(5):
        path = folder.child(f"deep/er/step-{i}").path
        results = all_at_once(8, lambda _, p=path: folder.store.claim_folder(p))
        assert sum(result is None for result in results) == 1
        assert sum(isinstance(result, StoreExists) for result in results) == 7
        assert folder.store.entries(path) == []
    assert names(folder.child("deep/er")) == [f"step-{i}" for i in range(5)]


def test_a_folder_with_something_in_it_cannot_be_claimed(folder: Folder) -> None:
    folder.store.put_new(folder.child("a/b").path, b"")
    with pytest.raises(StoreExists):
        folder.store.claim_folder(folder.child("a").path)


def test_a_claimed_folder_is_free_again_when_it_was_removed(folder: Folder) -> None:
    for _ in range(2):
        folder.store.claim_folder(folder.child("a").path)
        folder.store.put_new(folder.child("a/b").path, b"")
        folder.store.remove_folder(folder.child("a").path, "b")


@pytest.mark.parametrize("nbytes", [0, 1, 4 * MIB, 4 * MIB + 1, 16 * MIB, 16 * MIB + 1, 37 * MIB + 5])
def test_uploads(folder: Folder, nbytes: int) -> None:
    data = pattern(nbytes)
    part = folder.store.part_bytes(nbytes)
    assert part % (4 * MIB) == 0
    upload = folder.store.upload(folder.child("x").path, nbytes)
    for at in range(0, max(nbytes, 1), part):
        buffer = bytearray(data[at : at + part])
        upload.write(at, memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # the caller's memory is the caller's again
        assert names(folder) == []
    upload.finish()
    assert folder.store.entries(folder.path) == [Entry("x", False, nbytes)]
    assert read(folder, "x", 0, nbytes + 10) == data
    assert folder.store.sweep(folder.path) == 0


def test_parts_in_any_order_from_several_threads(folder: Folder) -> None:
    data = pattern(100 * MIB + 12_345)
    put(folder, "x", data)
    assert read(folder, "x", 0, len(data)) == data


def test_an_upload_is_exclusive_too(folder: Folder) -> None:
    for nbytes in (10, 20 * MIB):
        path = folder.child(f"x{nbytes}").path

        def write(i: int, path: str = path, nbytes: int = nbytes) -> None:
            upload = folder.store.upload(path, nbytes)
            part = folder.store.part_bytes(nbytes)
            try:
                for at in range(0, nbytes, part):
                    upload.write(at, bytes([i]) * min(part, nbytes - at))
                upload.finish()
            except BaseException:
                upload.abort()
                raise

        results = all_at_once(4, write)
        (winner,) = [i for i, result in enumerate(results) if result is None]
        assert sum(isinstance(result, StoreExists) for result in results) == 3
        assert read(folder, f"x{nbytes}", nbytes - 10, 10) == bytes([winner]) * 10
        with pytest.raises(StoreExists):
            write(9)
        assert read(folder, f"x{nbytes}", 0, 10) == bytes([winner]) * 10
    assert folder.store.sweep(folder.path) == 0


@pytest.mark.parametrize("nbytes", [10, 20 * MIB])
def test_an_aborted_upload_leaves_nothing(folder: Folder, nbytes: int) -> None:
    part = folder.store.part_bytes(nbytes)
    upload = folder.store.upload(folder.child("x").path, nbytes)
    upload.write(0, bytes(min(part, nbytes)))
    upload.abort()
    upload.abort()
    assert names(folder) == []
    with pytest.raises(StoreError):
        upload.write(0, bytes(min(part, nbytes)))
    assert folder.store.sweep(folder.path) == 0


def test_an_upload_that_lacks_bytes_is_not_finished(folder: Folder) -> None:
    upload = folder.store.upload(folder.child("x").path, 40 * MIB)
    part = folder.store.part_bytes(40 * MIB)
    upload.write(part, bytes(min(part, 40 * MIB - part)))
    with pytest.raises(StoreError, match=f"of {40 * MIB} bytes were written"):
        upload.finish()
    upload.abort()
    assert names(folder) == []
    assert folder.store.sweep(folder.path) == 0


def test_listings_see_what_others_write_and_remove(folder: Folder, url: str) -> None:
    assert names(folder) == []
    other = folder_at(url)
    assert other.store is not folder.store
    other.store.put_new(other.child("x").path, b"1")
    assert names(folder) == ["x"]
    other.store.put_new(other.child("y/z").path, b"22")
    assert folder.store.entries(folder.path) == [Entry("x", False, 1), Entry("y", True, 0)]
    other.store.remove_file(other.child("x").path)
    other.store.put_new(other.child("x").path, b"333")
    assert folder.store.entries(folder.path) == [Entry("x", False, 3), Entry("y", True, 0)]
    assert folder.store.size(folder.child("x").path) == 3
    other.store.remove_folder(other.child("y").path, "z")
    assert names(folder) == ["x"]


def test_removal_takes_the_folder_and_nothing_beside_it(folder: Folder) -> None:
    for name in ("step-1/manifest.json", "step-1/deep/er/file", "step-1/a", "step-10/manifest.json", "step-1.x"):
        folder.store.put_new(folder.child(name).path, b"x")
    folder.store.remove_folder(folder.child("step-1").path, "manifest.json")
    assert names(folder) == ["step-1.x", "step-10"]
    assert names(folder.child("step-10")) == ["manifest.json"]
    assert folder.store.sweep(folder.path) == 0


def test_more_files_than_a_page(folder: Folder) -> None:
    """S3 lists and deletes 1,000 at a time."""
    expected = sorted(f"f{i}" for i in range(1500))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: folder.store.put_new(folder.child(f"many/{name}").path, b""), expected))
    assert names(folder.child("many")) == expected
    folder.store.remove_folder(folder.child("many").path, "f7")
    assert names(folder) == []


def test_a_forked_child_can_go_on(folder: Folder, url: str) -> None:
    """Sockets and event loops of the parent must not be the child's."""
    if url.startswith("memory"):
        pytest.skip("its content is the process's own")
    folder.store.put_new(folder.child("x").path, b"parent")
    script = (
        "import os, sys\n"
        "from everstep.storage.stores.opening import folder_at\n"
        "folder = folder_at(sys.argv[1])\n"
        "assert [e.name for e in folder.store.entries(folder.path)] == ['x']\n"
        "if os.fork() == 0:\n"
        "    folder.store.put_new(folder.child('y').path, b'child')\n"
        "    os._exit(0)\n"
        "assert os.wait()[1] == 0\n"
        "assert [e.name for e in folder.store.entries(folder.path)] == ['x', 'y']\n"
    )
    subprocess.run([sys.executable, "-c", script, url], env=python_env(), check=True, timeout=60)


# Killed writers


_UPLOADER = """
import sys
from everstep.storage.stores.opening import folder_at
folder = folder_at(sys.argv[1])
upload = folder.store.upload(folder.child("half").path, 64 << 20)
part = folder.store.part_bytes(64 << 20)
upload.write(part, bytes(part))
print("half", flush=True)
sys.stdin.read()
"""


def python_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SRC}


def kill_an_uploader(url: str) -> None:
    command = [sys.executable, "-c", _UPLOADER, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=python_env()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_sweep_removes_what_a_killed_uploader_left(folder: Folder, url: str, request: pytest.FixtureRequest) -> None:
    if url.startswith("memory"):
        pytest.skip("its content is the process's own")

    def hidden(name: str) -> int:
        if url.startswith("s3"):
            return len(request.getfixturevalue("s3").uploads("bucket", folder.child(name).path + "/"))
        return len(list(Path(url, name).iterdir()))

    kill_an_uploader(folder.child("step-1").url)
    kill_an_uploader(folder.child("step-10").url)
    assert hidden("step-1") == hidden("step-10") == 1
    assert names(folder.child("step-1")) == []
    assert folder.store.sweep(folder.child("step-1").path) == 1
    assert (hidden("step-1"), hidden("step-10")) == (0, 1)
    assert folder.store.sweep(folder.path) == 1
    assert hidden("step-10") == 0
    assert folder.store.sweep(folder.path) == 0


def test_sweep_spares_what_somebody_else_is_writing(folder: Folder, url: str) -> None:
    if url.startswith("memory"):
        pytest.skip("its content is the process's own")
    mine = folder.child("step-2/deep").store.upload(folder.child("step-2/deep/x").path, 20 * MIB)
    mine.write(0, bytes(min(20 * MIB, folder.store.part_bytes(20 * MIB))))
    kill_an_uploader(folder.child("step-1").url)
    asked: list[str] = []
    assert folder.store.sweep(folder.path, lambda name: asked.append(name) is None and name == "step-2") == 1
    assert set(asked) == {"step-1", "step-2"}
    part = folder.store.part_bytes(20 * MIB)
    for first in range(part, 20 * MIB, part):
        mine.write(first, bytes(min(part, 20 * MIB - first)))
    mine.finish()
    assert folder.store.size(folder.child("step-2/deep/x").path) == 20 * MIB


def test_removal_takes_what_a_killed_uploader_left(folder: Folder, url: str) -> None:
    if url.startswith("memory"):
        pytest.skip("its content is the process's own")
    folder.store.put_new(folder.child("step-1/a").path, b"")
    kill_an_uploader(folder.child("step-1").url)
    folder.store.remove_folder(folder.child("step-1").path, "manifest.json")
    assert names(folder) == []
    assert folder.store.sweep(folder.path) == 0


# Bad input: URLs


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ("", CheckpointUnsupported, "is no URL"),
        ("s3://", CheckpointUnsupported, "cannot be a bucket"),
        ("s3:///prefix", CheckpointUnsupported, "cannot be a bucket"),
        ("s3://a bucket/x", CheckpointUnsupported, "cannot be a bucket"),
        ("s3a://bucket/x", CheckpointUnsupported, "give s3://bucket/x"),
        ("s3://bucket/a//b", StoreDenied, "an empty folder name"),
        ("s3://bucket/../b", StoreDenied, r"a folder called '\.\.'"),
        ("file://host/x", CheckpointUnsupported, "file:///PATH"),
        ("nonsense://x/y", CheckpointUnsupported, "nobody knows nonsense://"),
        ("simplecache::s3://bucket/x", CheckpointUnsupported, "chained"),
        ("s3://KEY:s3cret@bucket/x", StoreDenied, "password"),
        ("s3://KEY:s3/cret@bucket/x", StoreDenied, "password"),
        ("s3://s3cret@bucket/x", StoreDenied, "password"),
        ("sftp://user:s3cret@host/x", StoreDenied, "password"),
        ("https://host/x?sig=s3cret", StoreDenied, "query"),
        ("gs://bucket/x", StoreDenied, "gcsfs"),
    ],
)
def test_urls_that_are_refused(bad: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        folder_at(bad)
    assert "cret" not in str(raised.value)


def test_paths_and_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_at(tmp_path).url == str(tmp_path)
    assert folder_at("a/../b c/").url == f"{tmp_path}/b c"
    assert folder_at(f"file://{tmp_path}/b%20c").url == f"{tmp_path}/b c"
    assert folder_at("/").child("x").url == "/x"


def test_drivers_that_cannot_write_exclusively_are_read_only() -> None:
    folder = folder_at("https://127.0.0.1/x") if has_aiohttp() else None
    if folder is None:
        pytest.skip("needs aiohttp")
    for call in (folder.store.claim_folder, lambda path: folder.store.put_new(path, b"")):
        with pytest.raises(StoreDenied, match="cannot write exclusively"):
            call(folder.path)


def has_aiohttp() -> bool:
    import importlib.util

    return importlib.util.find_spec("aiohttp") is not None


# Bad input: this machine


def test_links_are_not_seen_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    folder = folder_at(tmp_path)
    assert names(folder) == ["real"]
    for name in ("link", "loop", "pipe"):
        with pytest.raises(StoreNotFound):
            read(folder, name)
        with pytest.raises(StoreNotFound):
            folder.store.size(folder.child(name).path)
        with pytest.raises(StoreExists):
            folder.store.put_new(folder.child(name).path, b"y")
    following = folder_at(tmp_path, links=True)
    assert following.store.entries(following.path) == [Entry("link", False, 1), Entry("real", False, 1)]
    assert read(following, "link") == b"x"


def test_removal_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    folder = folder_at(tmp_path)
    folder.store.claim_folder(folder.child("a").path)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    folder.store.remove_folder(folder.child("a").path, "x")
    folder.store.remove_folder(folder.child("b").path, "precious")
    assert sorted(os.listdir(tmp_path)) == ["b", "elsewhere"]
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_sweep_removes_a_half_removed_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / ".trash-step-1" / "deep").mkdir(parents=True)
    (tmp_path / "run" / ".trash-step-1" / "deep" / "file").touch()
    (tmp_path / "run" / ".trash-step-2").mkdir()
    folder = folder_at(tmp_path / "run")
    assert names(folder) == []
    assert folder.store.sweep(folder.child("step-2").path) == 1  # the trash of the folder itself
    assert folder.store.sweep(folder.path) == 1
    assert os.listdir(tmp_path / "run") == []


def test_a_removed_folder_goes_out_of_sight_at_once(tmp_path: Path) -> None:
    """Removal that is stopped half-way leaves nothing that a listing shows."""
    folder = folder_at(tmp_path)
    folder.store.put_new(folder.child("step-1/manifest.json").path, b"")
    script = (
        "import os, sys\n"
        "from everstep.storage.stores.opening import folder_at\n"
        "def audit(event, args):\n"
        "    if event in ('os.remove', 'os.rmdir'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(audit)\n"
        "folder = folder_at(sys.argv[1])\n"
        "folder.store.remove_folder(folder.child('step-1').path, 'manifest.json')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=python_env(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert names(folder) == []
    assert os.listdir(tmp_path) == [".trash-step-1"]
    folder.store.claim_folder(folder.child("step-1").path)  # the name can be used again …
    folder.store.put_new(folder.child("step-1/x").path, b"")
    folder.store.remove_folder(folder.child("step-1").path, "x")  # … and removed again
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT has no hard links; its exclusive rename is used."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    folder = folder_at(tmp_path)
    results = all_at_once(8, lambda i: folder.store.put_new(folder.child("x").path, bytes([i])))
    (winner,) = [i for i, result in enumerate(results) if result is None]
    assert sum(isinstance(result, StoreExists) for result in results) == 7
    assert read(folder, "x") == bytes([winner])
    assert os.listdir(tmp_path) == ["x"]


def test_wrong_places(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    (tmp_path / "file").touch()
    for call in (folder.store.claim_folder, lambda path: folder.store.put_new(path, b"")):
        with pytest.raises(StoreDenied, match="a file stands where a folder is needed"):
            call(folder.child("file/x").path)
        with pytest.raises(StoreDenied, match="shorter name"):
            call(folder.child("n" * 300).path)
    with pytest.raises(StoreError, match="/proc/self/mem"):
        folder.store.read_into("proc/self/mem", 0, memoryview(bytearray(10)))


def test_no_rights(tmp_path: Path) -> None:
    """As a user who is not root and does not own the folder."""
    folder_at(tmp_path).store.put_new(folder_at(tmp_path).child("there").path, b"x")
    script = (
        "import os, sys\n"
        "from everstep.storage.errors import StoreDenied\n"
        "from everstep.storage.stores.opening import folder_at\n"
        "folder = folder_at(sys.argv[1])\n"
        "store, there, new = folder.store, folder.child('there').path, folder.child('new').path\n"
        "os.chmod(folder.url, 0)\n"
        "if os.geteuid() == 0:\n"
        "    os.seteuid(65534)\n"
        "for act in (\n"
        "    lambda: store.entries(folder.path), lambda: store.size(there), lambda: store.put_new(new, b''),\n"
        "    lambda: store.read_into(there, 0, memoryview(bytearray(1))), lambda: store.upload(new, 8 << 20),\n"
        "    lambda: store.claim_folder(new), lambda: store.remove_file(there),\n"
        "):\n"
        "    try:\n"
        "        act()\n"
        "    except StoreDenied as error:\n"
        "        assert folder.url in str(error) and 'right' in str(error)\n"
        "    else:\n"
        "        sys.exit('not refused')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=python_env(), check=True, timeout=60)
    tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == ["there"]


def test_a_full_disk_shows_before_anything_is_written(tmp_path: Path) -> None:
    """A real limit of the process on a file's size; what a full disk answers goes the same way."""
    script = (
        "import os, resource, signal, sys\n"
        "from everstep.storage.errors import StoreFull\n"
        "from everstep.storage.stores.opening import folder_at\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "folder = folder_at(sys.argv[1])\n"
        "for act in (lambda p: folder.store.upload(p, 8 << 20), lambda p: folder.store.put_new(p, bytes(2 << 20))):\n"
        "    try:\n"
        "        act(folder.child('x').path)\n"
        "    except StoreFull as error:\n"
        "        assert folder.url in str(error)\n"
        "    else:\n"
        "        sys.exit('not refused')\n"
        "assert os.listdir(sys.argv[1]) == []\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=python_env(), check=True, timeout=60)


def test_no_room_left_in_shared_memory() -> None:
    """Nobody has 1 EiB; the file system itself says so."""
    folder = folder_at(f"/dev/shm/everstep-test-{secrets.token_hex(8)}")
    try:
        with pytest.raises(StoreFull, match="free some room"):
            folder.store.upload(folder.child("x").path, 1 << 50)
        assert os.listdir(folder.url) == []
    finally:
        os.rmdir(folder.url)


# Bad input: S3


@contextlib.contextmanager
def no_endpoint() -> Iterator[str]:
    """A port that nobody listens on: bound, so that nobody else takes it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def every_call(store: Store, path: str) -> list[Callable[[], object]]:
    return [
        lambda: store.entries(path), lambda: store.size(path),
        lambda: store.read_into(path, 0, memoryview(bytearray(4))), lambda: store.put_new(path, b"x"),
        lambda: store.claim_folder(path), lambda: store.upload(path, 100 * MIB), lambda: store.remove_file(path),
        lambda: store.remove_folder(path, "x"), lambda: store.sweep(path),
    ]  # fmt: skip


def test_endpoint_down(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_endpoint() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        folder = folder_at("s3://bucket/x")
        upload = folder.store.upload(folder.path, 10)
        upload.write(0, b"0123456789")
        with ThreadPoolExecutor(10) as pool:
            calls = [*every_call(folder.store, folder.path), upload.finish]
            errors = [pool.submit(call).exception(timeout=60) for call in calls]
        assert [type(error) for error in errors] == [StoreUnavailable] * 10
        assert all("s3://bucket/x" in str(error) for error in errors)
        upload.abort()


def test_endpoint_goes_down_in_mid_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        folder = folder_at("s3://bucket/x")
        upload = folder.store.upload(folder.path, 20 * MIB)
        upload.write(0, bytes(16 * MIB))
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(StoreUnavailable):
            upload.write(16 * MIB, bytes(4 * MIB))
        upload.abort()


def test_a_wrong_bucket_is_said_so(s3: Server) -> None:
    folder = folder_at("s3://wrong-bucket/x")
    calls = every_call(folder.store, folder.path)
    for call in calls:
        with pytest.raises(StoreDenied, match="wrong-bucket"):
            call()


def test_denied(s3: Server) -> None:
    folder = folder_at("s3://bucket/denied")
    s3.deny(True)
    try:
        for call in every_call(folder.store, folder.path):
            with pytest.raises(StoreDenied, match="check the credentials"):
                call()
    finally:
        s3.deny(False)
    folder.store.put_new(folder.path, b"x")
    folder.store.remove_file(folder.path)


def test_no_credentials(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    folder = folder_at("s3://bucket/x")
    with pytest.raises(StoreDenied, match="AWS_PROFILE"):
        folder.store.entries(folder.path)


@pytest.mark.parametrize("endpoint", ["http://user:s3cret@127.0.0.1:1", "nonsense", "http://"])
def test_a_wrong_endpoint_is_said_so_without_its_password(
    s3: Server, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    folder = folder_at("s3://bucket/x")
    with pytest.raises(StoreDenied, match="AWS_ENDPOINT_URL_S3") as raised:
        folder.store.entries(folder.path)
    assert "s3cret" not in whole_text(raised.value)


def whole_text(error: BaseException | None) -> str:
    """What a traceback would show of an error and its causes."""
    text = ""
    while error is not None:
        text += f"{error!r} {error}\n"
        error = error.__cause__ or error.__context__
    return text


def test_no_secret_in_any_message(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = s3.env["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-" + secret)
    texts = [repr(folder_at("s3://bucket/x")), str(folder_at("s3://bucket/x"))]

    def collect(url: str) -> None:
        folder = folder_at(url)
        with ThreadPoolExecutor(9) as pool:
            calls = every_call(folder.store, folder.path)
            texts.extend(whole_text(pool.submit(call).exception(timeout=60)) for call in calls)

    s3.deny(True)
    try:
        collect("s3://bucket/x")
    finally:
        s3.deny(False)
    collect("s3://wrong-bucket/x")
    with no_endpoint() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        collect("s3://bucket/x")
    assert all(texts)
    assert not [text for text in texts if secret in text]


# Lost answers


@dataclass
class Proxy:
    """Between boto3 and the server; each `fault(head)` that says true for a request's head is done once and gone."""

    url: str
    server: tuple[str, int]
    lose: list[Callable[[bytes], bool]] = field(default_factory=list)  # the answer never comes
    cut: list[Callable[[bytes], bool]] = field(default_factory=list)  # the answer ends half-way
    flip: list[Callable[[bytes], bool]] = field(default_factory=list)  # a bit of the request's body is flipped
    rename: dict[bytes, bytes] = field(default_factory=dict)  # headers that a store does not know
    done: list[str] = field(default_factory=list)

    def serve(self, client: socket.socket) -> None:
        with client:
            head, body = self._request(client)
            if not head:
                return
            for old, new in self.rename.items():
                head = head.replace(old, new)
            if self._due(self.flip, head) and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            with socket.create_connection(self.server, timeout=30) as upstream:
                upstream.sendall(head + body)
                answer = b"".join(iter(lambda: upstream.recv(65536), b""))
            if self._due(self.lose, head):
                self.done.append(head.split(b"\r\n")[0].decode())
                return
            if self._due(self.cut, head):
                self.done.append(head.split(b"\r\n")[0].decode())
                answer = answer[: (len(answer) + answer.index(b"\r\n\r\n")) // 2]
            client.sendall(answer)

    def _request(self, client: socket.socket) -> tuple[bytes, bytes]:
        """A request's head, asking for one at a time, and its body."""
        data = b""
        while b"\r\n\r\n" not in data:
            if not (got := client.recv(65536)):
                return b"", b""
            data += got
        head, _, body = data.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        fields = {line.partition(b":")[0].lower(): line.partition(b":")[2].strip() for line in lines[1:]}
        if fields.get(b"expect") == b"100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            lines = [line for line in lines if not line.lower().startswith(b"expect:")]
        while len(body) < int(fields.get(b"content-length", b"0")):
            body += client.recv(1 << 20)
        return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n", body

    def _due(self, faults: list[Callable[[bytes], bool]], head: bytes) -> bool:
        for fault in faults:
            if fault(head):
                faults.remove(fault)
                return True
        return False


@pytest.fixture
def proxy(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    host, port = s3.url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(f"http://127.0.0.1:{listener.getsockname()[1]}", (host, int(port)))

    def accept() -> None:
        with ThreadPoolExecutor(16) as pool:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                pool.submit(proxy.serve, client)

    thread = threading.Thread(target=accept)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    yield proxy
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30)


@pytest.fixture
def lossy(proxy: Proxy, tmp_path: Path) -> Folder:
    """A folder on S3 behind the proxy."""
    return folder_at(f"s3://bucket/lossy-{secrets.token_hex(4)}")


def is_put(head: bytes) -> bool:
    return head.startswith(b"PUT ") and b"uploadId" not in head


def is_complete(head: bytes) -> bool:
    return head.startswith(b"POST ") and b"uploadId" in head


def test_a_write_whose_answer_is_lost_is_ours(lossy: Folder, proxy: Proxy) -> None:
    proxy.lose.append(is_put)
    lossy.store.put_new(lossy.child("manifest").path, b"x")
    assert len(proxy.done) == 1
    with pytest.raises(StoreExists):
        lossy.store.put_new(lossy.child("manifest").path, b"x")
    proxy.lose.append(is_put)
    with pytest.raises(StoreExists):
        lossy.store.put_new(lossy.child("manifest").path, b"x")
    assert len(proxy.done) == 2


def test_a_claim_whose_answer_is_lost_is_ours(lossy: Folder, proxy: Proxy) -> None:
    proxy.lose.append(is_put)
    lossy.store.claim_folder(lossy.child("a").path)
    assert len(proxy.done) == 1
    with pytest.raises(StoreExists):
        lossy.store.claim_folder(lossy.child("a").path)


def test_a_write_whose_every_answer_is_lost_is_ours(lossy: Folder, proxy: Proxy) -> None:
    proxy.lose.extend([is_put] * 3)
    lossy.store.put_new(lossy.child("manifest").path, b"x")
    assert len(proxy.done) == 3


@pytest.mark.parametrize("nbytes", [100, 20 * MIB])
@pytest.mark.parametrize("times", [1, 3])
def test_an_upload_whose_last_answer_is_lost_is_ours(lossy: Folder, proxy: Proxy, nbytes: int, times: int) -> None:
    proxy.lose.extend([is_complete if nbytes > 16 * MIB else is_put] * times)
    put(lossy, "x", pattern(nbytes))
    assert len(proxy.done) == times
    assert read(lossy, "x", 0, nbytes + 1) == pattern(nbytes)
    assert lossy.store.sweep(lossy.path) == 0


def test_parts_whose_answers_are_lost_are_sent_again(lossy: Folder, proxy: Proxy) -> None:
    proxy.lose.extend([lambda head: b"partNumber=" in head] * 2)
    data = pattern(40 * MIB)
    put(lossy, "x", data)
    assert len(proxy.done) == 2
    assert read(lossy, "x", 0, len(data)) == data


def test_a_finish_that_came_through_and_failed_is_taken_back_by_abort(lossy: Folder, proxy: Proxy) -> None:
    upload = lossy.store.upload(lossy.child("x").path, 20 * MIB)
    upload.write(0, bytes(16 * MIB))
    upload.write(16 * MIB, bytes(4 * MIB))
    proxy.lose.extend([is_complete] * 3 + [lambda head: head.startswith(b"HEAD ")] * 3)
    with pytest.raises(StoreUnavailable):
        upload.finish()
    assert names(lossy) == ["x"]
    upload.abort()
    assert names(lossy) == []


def test_a_body_damaged_on_its_way_is_sent_again(lossy: Folder, proxy: Proxy) -> None:
    proxy.flip.extend([is_put, lambda head: b"partNumber=" in head])
    lossy.store.put_new(lossy.child("small").path, b"content")
    data = pattern(20 * MIB)
    put(lossy, "large", data)
    assert proxy.flip == []
    assert read(lossy, "small") == b"content"
    assert read(lossy, "large", 0, len(data)) == data


def test_a_body_damaged_each_time_is_refused(lossy: Folder, proxy: Proxy) -> None:
    proxy.flip.extend([is_put] * 3)
    with pytest.raises(StoreUnavailable, match="what arrived is not what was sent"):
        lossy.store.put_new(lossy.child("small").path, b"content")
    assert names(lossy) == []


def test_a_read_that_breaks_off_is_repeated(lossy: Folder, proxy: Proxy) -> None:
    data = pattern(100_000)
    lossy.store.put_new(lossy.child("x").path, data)
    proxy.cut.append(lambda head: head.startswith(b"GET "))
    assert read(lossy, "x", 0, 100_000) == data
    assert len(proxy.done) == 1
    proxy.cut.extend([lambda head: head.startswith(b"GET ")] * 3)
    with pytest.raises(StoreUnavailable, match="lossy"):
        read(lossy, "x", 0, 100_000)


def test_a_store_that_ignores_conditions_is_refused(lossy: Folder, proxy: Proxy) -> None:
    proxy.rename[b"If-None-Match"] = b"If-None-Gnu"
    with pytest.raises(StoreDenied, match="ignores If-None-Match"):
        lossy.store.claim_folder(lossy.child("a").path)


def test_an_endpoint_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, s3: Server) -> None:
    from everstep.storage.stores.s3 import S3Store

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = S3Store("bucket", connect_s=1, read_s=0.2, attempts=2)
        with pytest.raises(StoreUnavailable, match="s3://bucket/x"):
            store.entries("x")


def test_files_too_large_for_16_mib_parts(s3: Server) -> None:
    store = folder_at("s3://bucket/x").store
    for nbytes in (10_000 * 16 * MIB, 10_000 * 16 * MIB + 1, 5 << 40):
        part = store.part_bytes(nbytes)
        assert part % (4 * MIB) == 0
        assert -(-nbytes // part) <= 10_000
    assert store.part_bytes(10_000 * 16 * MIB) == 16 * MIB


def test_the_server_ends_with_its_parent() -> None:
    """A test run that is killed leaves no server behind."""
    script = (
        "import os, sys, time\n"
        "from s3_server import s3_server\n"
        "with s3_server() as server:\n"
        "    print(server.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, timeout=60)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{int(done.stdout)}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{int(done.stdout)}")

"""Which files a path stands for, and reading ranges of them: changed, gone, refused, forked, pickled."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from pathlib import Path

import pytest

from everstep.storage.datasets.cache import Cache
from everstep.storage.datasets.errors import (
    DatasetChanged,
    DatasetError,
    DatasetNotFound,
    DatasetUnavailable,
)
from everstep.storage.datasets.source import RETRY_WAITS_S, DataFile, expanded, open_files
from everstep.storage.errors import StorageError


def _write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def _names(root: Path | str, urls: list[str]) -> list[str]:
    return [url.removeprefix(f"{root}/") for url in urls]


NAMES = ("b.bin", "a/z.bin", "a/y.txt", "a.bin", ".hidden.bin", "_SUCCESS.bin", ".git/x.bin", "a/b/deep.bin")


def test_a_folder_gives_its_files_of_the_format_by_path(tmp_path: Path):
    root = _write(tmp_path, *NAMES)
    assert _names(root, expanded(str(root), (".bin",))) == ["a.bin", "a/b/deep.bin", "a/z.bin", "b.bin"]


def test_a_remote_folder_gives_the_same(store):
    store.files = {f"data/{name}": b"x" for name in NAMES}
    assert _names("fake://data", expanded("fake://data", (".bin",))) == ["a.bin", "a/b/deep.bin", "a/z.bin", "b.bin"]
    assert expanded("fake://data/", (".bin",)) == expanded("fake://data", (".bin",))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.bin", ["_SUCCESS.bin", "a.bin", "b.bin"]),
        ("?.bin", ["a.bin", "b.bin"]),
        ("[b-z].bin", ["b.bin"]),
        ("*/*.bin", ["a/z.bin"]),
        ("**/z.bin", ["a/z.bin"]),
        ("a/**/*.bin", ["a/b/deep.bin", "a/z.bin"]),
        ("**/*.txt", ["a/y.txt"]),
        (".*.bin", [".hidden.bin"]),
    ],
)
def test_a_glob_means_the_same_here_and_in_a_bucket(pattern: str, found: list[str], tmp_path: Path, store):
    root = _write(tmp_path, *NAMES)
    assert _names(root, expanded(f"{root}/{pattern}", (".bin",))) == found
    store.files = {f"data/{name}": b"x" for name in NAMES}
    assert _names("fake://data", expanded(f"fake://data/{pattern}", (".bin",))) == found


def test_a_list_keeps_its_order_and_a_file_is_named_once(tmp_path: Path, store):
    root = _write(tmp_path, "b.bin", "a.bin")
    store.files = {"far/c.bin": b"c"}
    listed = [root / "b.bin", "fake://far/c.bin", f"file://{root}/a.bin"]
    assert [file.url for file in open_files(listed, (".bin",))] == [
        f"{root}/b.bin",
        "fake://far/c.bin",
        f"{root}/a.bin",
    ]
    with pytest.raises(DatasetError, match=r"b\.bin: named twice; name each file once, or .* weight in a Mixture"):
        open_files([root / "b.bin", f"{root}/*.bin"], (".bin",))


def test_names_that_look_like_globs_or_need_quoting_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = _write(tmp_path, "[a].bin", "a b.bin")
    assert _names(root, expanded(f"{root}/[a].bin", ())) == ["[a].bin"]
    assert _names(root, expanded(f"file://{root}/a%20b.bin", ())) == ["a b.bin"]
    monkeypatch.setenv("HOME", str(root))
    assert _names(root, expanded("~/a b.bin", ())) == ["a b.bin"]
    monkeypatch.chdir(root)
    assert _names(root, expanded("a b.bin", ())) == ["a b.bin"]


def test_a_link_to_a_file_is_a_file(tmp_path: Path):
    root = _write(tmp_path, "blob")
    (root / "link.bin").symlink_to(root / "blob")
    (file,) = open_files(root / "link.bin", (".bin",))
    assert file.read(1, 2) == b"lo"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{root}/none.bin", r"{root}/none\.bin: there is no such file or folder \(looked at .*none\.bin\)"),
        ("{root}/none*.bin", r"none\*\.bin: it matches no file; name a file, a folder or a glob"),
        ("{root}/hollow", r"hollow: the folder has no file that ends in \.bin or \.npy; name"),
        ("{root}/dangling", r"dangling: neither a file nor a folder, or a link to nowhere"),
        ("file://host/x.bin", r"file://host/x\.bin: a file URL names no host; give file:///PATH"),
        ("fake://far/none.bin", r"fake://far/none\.bin: there is no such file or folder"),
        ("fake://data/none*.bin", r"fake://data/none\*\.bin: it matches no file"),
        ("fake://data", r"fake://data: the folder has no file that ends in \.bin or \.npy"),
    ],
)
def test_what_names_no_file_is_said(spec: str, says: str, tmp_path: Path, store):
    _write(tmp_path, "hollow/a.txt")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    store.files = {"data/a.txt": b"x"}
    with pytest.raises(DatasetError, match=says.replace("{root}", str(tmp_path))):
        open_files(spec.replace("{root}", str(tmp_path)), (".bin", ".npy"))


def test_no_file_at_all_and_what_is_no_file(tmp_path: Path):
    with pytest.raises(DatasetNotFound, match="no file was named: the list is empty"):
        open_files([], (".bin",))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetNotFound, match="neither a file nor a folder"):
        open_files(tmp_path / "pipe", (".bin",))


def test_errors_are_value_errors_and_storage_errors_and_pickle():
    for kind in (DatasetError, DatasetNotFound, DatasetChanged, DatasetUnavailable):
        assert issubclass(kind, ValueError)
        assert issubclass(kind, StorageError)
        assert str(pickle.loads(pickle.dumps(kind("what")))) == "what"


def test_a_file_that_gets_shorter_while_it_is_open_is_said(tmp_path: Path):
    path = _write(tmp_path, "a.bin") / "a.bin"
    (file,) = open_files(path, (".bin",))
    assert file.read(0, 5) == b"a.bin"
    os.truncate(path, 3)
    with pytest.raises(DatasetChanged, match=r"a\.bin: changed while .* ends at byte 3, and had 5 bytes when it was"):
        file.read(0, 5)
    with pytest.raises(DatasetChanged, match="it has 3 bytes, written"):
        file.check()


def test_a_file_that_was_written_again_is_not_opened_again(tmp_path: Path):
    path = _write(tmp_path, "a.bin") / "a.bin"
    (file,) = open_files(path, (".bin",))
    path.write_bytes(b"other")  # as long as before
    os.utime(path, ns=(0, 12345))
    with pytest.raises(DatasetChanged, match=r"a\.bin: changed while it was in use"):
        file.read(0, 5)
    path.unlink()
    with pytest.raises(DatasetNotFound, match=r"a\.bin: there is no such file; put it there"):
        file.read(0, 5)


def test_a_remote_file_that_changed_is_said(store):
    store.files = {"d/a.bin": b"0123456789"}
    (file,) = open_files("fake://d/a.bin", (".bin",))
    version = file.version
    file.check()
    store.files["d/a.bin"] = b"012"
    with pytest.raises(DatasetChanged, match="it ends at byte 3, and had 10 bytes"):
        file.read(0, 10)
    with pytest.raises(DatasetChanged, match="it has 3 bytes, and had 10 bytes"):
        file.check()
    store.files["d/a.bin"] = b"x123456789"
    (again,) = open_files("fake://d/a.bin", (".bin",))
    assert again.version != version


def test_a_store_that_is_away_is_asked_again_and_not_for_ever(store, waits: list[float]):
    store.files = {"d/a.bin": b"0123456789"}
    (file,) = open_files("fake://d/a.bin", (".bin",))
    store.failures = len(RETRY_WAITS_S)
    assert file.read(2, 3) == b"234"
    assert waits == list(RETRY_WAITS_S)
    store.failures = 100
    with pytest.raises(DatasetUnavailable, match=r"fake://d/a\.bin: no answer in 5 tries over 7\.2 s: .*reset"):
        file.read(2, 3)
    assert store.failures == 100 - 5


def test_a_store_that_refuses_is_not_asked_again(store, waits: list[float]):
    store.files = {"d/a.bin": b"0123456789"}
    (file,) = open_files("fake://d/a.bin", (".bin",))
    store.denied = True
    with pytest.raises(DatasetError, match=r"fake://d/a\.bin: cannot be read: .*access denied"):
        file.read(2, 3)
    assert waits == []


def test_at_most_128_files_are_open_however_many_there_are(tmp_path: Path):
    root = _write(tmp_path, *(f"{number:04}.bin" for number in range(400)))
    before = len(os.listdir("/proc/self/fd"))
    files = open_files(root, (".bin",))
    for _ in range(2):
        assert [file.read(0, 4) for file in files] == [f"{number:04}".encode() for number in range(400)]
    assert len(os.listdir("/proc/self/fd")) - before == 128
    files[0].close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert files[7].read(0, 4) == b"0007"  # opened again


def test_a_pickled_file_is_checked_where_it_is_opened(tmp_path: Path):
    path = _write(tmp_path, "a.bin") / "a.bin"
    (file,) = open_files(path, (".bin",))
    file.read(0, 1)
    packed = pickle.dumps(file)
    assert pickle.loads(packed).read(0, 5) == b"a.bin"
    path.write_bytes(b"longer than before")
    with pytest.raises(DatasetChanged):
        pickle.loads(packed).read(0, 5)


def test_a_forked_child_reads_although_a_thread_of_its_parent_held_the_lock(tmp_path: Path):
    """The child has the lock but not the thread that would release it."""
    path = _write(tmp_path, "a.bin") / "a.bin"
    cache: Cache[bytes] = Cache(100)
    file = DataFile(str(path), cache)
    entered, leave = threading.Event(), threading.Event()

    def load() -> tuple[bytes, int]:
        entered.set()
        leave.wait()
        return b"", 0

    thread = threading.Thread(target=cache.get, args=("key", load))
    thread.start()
    entered.wait()
    held = cache._held.lock  # the lock itself cannot be held at a chosen instant through the public surface
    with held:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # a child that waits for ever ends, and the test with it
            ok = file.read(0, 5) == b"a.bin" and cache.get("key", lambda: (b"mine", 4)) == b"mine"
            os._exit(0 if ok else 1)
    _, status = os.waitpid(pid, 0)
    leave.set()
    thread.join()
    assert status == 0

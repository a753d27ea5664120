"""Any text as windows of bytes: which files count, in which order, and what is refused how."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from everstep.storage.datasets.text import CorpusError, TextBytes, corpus_files


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _text(corpus: TextBytes) -> str:
    windows = [corpus[i] for i in range(len(corpus))]
    return bytes(torch.cat([windows[0][:1], *(window[1:] for window in windows)]).tolist()).decode()


def test_windows_tile_the_corpus_and_overlap_by_the_one_byte_to_predict(tmp_path: Path):
    corpus = TextBytes(str(_write(tmp_path, {"a.txt": "abcdefghij"}) / "a.txt"), length=3)
    assert len(corpus) == 3
    assert [bytes(corpus[i].tolist()) for i in range(3)] == [b"abcd", b"defg", b"ghij"]
    assert corpus[0].dtype == torch.int64
    assert corpus[0].shape == (4,)
    for index in (3, -1):
        with pytest.raises(IndexError):
            corpus[index]


def test_a_folder_gives_its_text_files_in_the_order_of_their_paths(tmp_path: Path):
    files = {"b.md": "bb", "a/z.py": "zz", "a.txt": "aa", "picture.png": "no", ".git/x.txt": "no"}
    root = _write(tmp_path, files | {"test/t.py": "no", "a/__pycache__/c.py": "no", "empty.txt": ""})
    assert _text(TextBytes(str(root), length=1)) == "aa\nzz\nbb"


def test_the_same_files_give_the_same_corpus_wherever_they_lie(tmp_path: Path):
    files = {"x/b.py": "1", "x/a.py": "2", "x-y.py": "3", "x.py": "4"}
    one, two = (_write(tmp_path / name, files) for name in ("one", "two"))
    assert _text(TextBytes(str(one), 1)) == _text(TextBytes(str(two), 1))


def test_a_glob_takes_what_matches_whatever_its_suffix(tmp_path: Path):
    root = _write(tmp_path, {"a.dat": "one", "deep/b.dat": "two", "deep/c.txt": "no"})
    assert _text(TextBytes(f"{root}/**/*.dat", 1)) == "one\ntwo"


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path):
    path = _write(tmp_path, {"[draft].txt": "text"}) / "[draft].txt"
    assert _text(TextBytes(str(path), 1)) == "text"


def test_a_relative_path_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _write(tmp_path, {"a.txt": "text"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _text(TextBytes("a.txt", 1)) == _text(TextBytes("~/a.txt", 1)) == "text"


def test_the_corpus_ends_at_max_bytes(tmp_path: Path):
    root = _write(tmp_path, {"a.txt": "abcdef", "b.txt": "ghijkl"})
    assert _text(TextBytes(str(root), 1, max_bytes=9)) == "abcdef\ngh"
    assert TextBytes(str(root), 1, max_bytes=100).bytes == 13


def test_by_default_it_is_the_standard_library():
    files = corpus_files(None)
    assert Path(os.__file__).resolve() in [path.resolve() for path in files]
    assert len(files) > 300
    assert all(path.suffix == ".py" for path in files)
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "idlelib"}
    root = Path(os.__file__).parent
    assert not any(left_out & set(path.relative_to(root).parts) for path in files)
    corpus = TextBytes(None, 128, max_bytes=1_000_000)
    assert len(corpus) == 999_999 // 128
    assert int(corpus[len(corpus) - 1].max()) < 256


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere", r"args\.data: 'nowhere' does not exist .*/nowhere\); name a folder, a glob or a file"),
        ("hollow", r"args\.data: 'hollow' has no text file \(of \.c .*name a folder, a glob or a file"),
        ("*.nothing", r"args\.data: '\*\.nothing' matches no file below"),
        (
            "blank.txt",
            r"args\.data: 'blank\.txt' holds 0 bytes of text, less than one window of 4 \+ 1 bytes",
        ),
        ("short.txt", r"args\.data: 'short\.txt' holds 4 bytes .*; name more text, or shorten the context"),
    ],
)
def test_an_unusable_corpus_is_named(spec: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _write(tmp_path, {"blank.txt": "", "short.txt": "abcd", "hollow/picture.png": "no"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=says):
        TextBytes(spec, length=4)
    assert issubclass(CorpusError, ValueError)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _write(tmp_path, {"secret.txt": "text"}) / "secret.txt"

    def refused(self: Path) -> bytes:  # root may read everything, so the file's mode does not do it
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(CorpusError, match=r"secret\.txt cannot be read \(Permission denied\); make it readable"):
        TextBytes(str(path), 1)


def test_sizes_that_make_no_sense_are_refused(tmp_path: Path):
    with pytest.raises(CorpusError, match="at least one byte long, not 0"):
        TextBytes(None, 0)
    with pytest.raises(CorpusError, match=r"args\.max_bytes: 5 does not hold one window of 5 \+ 1 bytes"):
        TextBytes(None, 5, max_bytes=5)

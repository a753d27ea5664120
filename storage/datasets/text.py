"""Any text as a corpus of bytes: the interpreter's own library, a folder, a glob, one file, or a URL.

Purpose: training data that every machine has, without a download and without a tokenizer. Owns one buffer
with the whole corpus, which never changes; for text that does not fit into memory there is
`Tokens(..., dtype="uint8")`. Thread-safety: safe after construction.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from everstep.storage.datasets.errors import DatasetError
from everstep.storage.datasets.source import is_remote, open_files

# What a folder contributes. A single file or a glob is taken at its word, whatever its suffix.
TEXT_SUFFIXES = frozenset({
    ".c", ".cc", ".cfg", ".conf", ".cpp", ".css", ".csv", ".go", ".h", ".hpp", ".html", ".ini", ".java",
    ".js", ".json", ".log", ".md", ".py", ".pyi", ".rs", ".rst", ".sh", ".sql", ".tex", ".toml", ".ts",
    ".txt", ".xml", ".yaml", ".yml",
})  # fmt: skip
# Tests of the interpreter are as large as its library and full of generated tables; some systems do not
# install them at all, nor idlelib. Leaving them out makes the default corpus the same everywhere.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests", "idlelib"}
)


class CorpusError(DatasetError):
    """A corpus that cannot be used; names the field `args.data`, its value and what to do."""


class TextBytes:
    """The bytes of some text in windows: sample i is int64[length + 1], bytes i x length and the next ones.

    The last byte of a window is the first of the next, so that inputs [:-1] cover the corpus without overlap
    and targets [1:] are the inputs one byte on. Files are joined by a newline in the order of their relative
    paths, so the same files give the same corpus wherever they lie.

    `root_spec`: None for the running interpreter's standard library (*.py), else a folder (its text files;
    hidden folders and those named test, site-packages and the like are left out), a glob (`**` crosses
    folders) or a file; relative to the current directory; or a URL of any of the three. `length`: bytes a
    window. `max_bytes`: where the corpus ends at the latest.
    Raises CorpusError when there is nothing to read, or less than one window.
    """

    def __init__(self, root_spec: str | None, length: int, max_bytes: int | None = None) -> None:
        if length < 1:
            raise CorpusError(f"a window of text must be at least one byte long, not {length}")
        if max_bytes is not None and max_bytes <= length:
            raise CorpusError(f"args.max_bytes: {max_bytes} does not hold one window of {length} + 1 bytes")
        self.length = length
        if root_spec is not None and is_remote(root_spec):
            corpus = _read_remote(root_spec, max_bytes)
        else:
            corpus = _read(corpus_files(root_spec), root_spec, max_bytes)
        if len(corpus) <= length:
            raise CorpusError(
                f"args.data: {_shown(root_spec)} holds {len(corpus)} bytes of text, less than one window of"
                f" {length} + 1 bytes; name more text, or shorten the context"
            )
        self._corpus = torch.from_numpy(np.frombuffer(corpus, dtype=np.uint8))

    @property
    def bytes(self) -> int:
        """Size of the whole corpus."""
        return self._corpus.numel()

    def __len__(self) -> int:
        return (self.bytes - 1) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside a corpus of {len(self)} windows")
        start = index * self.length
        return self._corpus[start : start + self.length + 1].to(torch.int64)


def corpus_files(root_spec: str | None) -> list[Path]:
    """The files that `root_spec` stands for, in corpus order. Raises CorpusError when there are none."""
    if root_spec is None:
        root = Path(sysconfig.get_path("stdlib"))
        return _not_empty(_below(root, frozenset({".py"})), root_spec, "has no *.py file")
    path = Path(root_spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _not_empty(
            _below(path, TEXT_SUFFIXES), root_spec, f"has no text file (of {' '.join(sorted(TEXT_SUFFIXES))})"
        )
    if not glob.has_magic(root_spec):
        raise CorpusError(
            f"args.data: {_shown(root_spec)} does not exist (looked at {path.absolute()}); name a folder,"
            " a glob or a file, or leave it out to train on Python's standard library"
        )
    matches = (Path(match) for match in glob.glob(str(path), recursive=True))
    return _not_empty(
        sorted((match for match in matches if match.is_file()), key=Path.as_posix),
        root_spec,
        f"matches no file below {Path.cwd()}",
    )


def _below(root: Path, suffixes: frozenset[str]) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        found += [Path(folder, name) for name in names if Path(name).suffix in suffixes]
    return sorted((path for path in found if path.is_file()), key=lambda p: p.relative_to(root).as_posix())


def _read(files: Iterable[Path], root_spec: str | None, max_bytes: int | None) -> bytearray:
    corpus = bytearray()
    for path in files:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CorpusError(
                f"args.data: {_shown(root_spec)}: {path} cannot be read ({error.strerror});"
                " make it readable, or name other text"
            ) from error
        if corpus and text:
            corpus += b"\n"
        corpus += text
        if max_bytes is not None and len(corpus) >= max_bytes:
            return corpus[:max_bytes]
    return corpus


def _read_remote(url: str, max_bytes: int | None) -> bytearray:
    """The same corpus from a URL; of a file no more than is used is read."""
    corpus = bytearray()
    try:
        for file in open_files(url, tuple(sorted(TEXT_SUFFIXES))):
            if corpus and file.bytes:
                corpus += b"\n"
            room = file.bytes if max_bytes is None else max(0, min(file.bytes, max_bytes - len(corpus)))
            corpus += file.read(0, room)
            if max_bytes is not None and len(corpus) >= max_bytes:
                return corpus[:max_bytes]
    except DatasetError as error:
        raise CorpusError(f"args.data: {error}") from error
    return corpus


def _not_empty(files: list[Path], root_spec: str | None, lack: str) -> list[Path]:
    if not files:
        raise CorpusError(f"args.data: {_shown(root_spec)} {lack}; name a folder, a glob or a file with text")
    return files


def _shown(root_spec: str | None) -> str:
    if root_spec is None:
        return f"null (Python's standard library, {sysconfig.get_path('stdlib')})"
    return repr(root_spec)

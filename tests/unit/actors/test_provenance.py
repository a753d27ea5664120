"""Which commit a run was started from."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from everstep.actors.provenance import commit_of


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_named_and_a_change_on_top_of_it_too(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "task.py").write_text("a = 1\n")
    git(tmp_path, "add", "task.py")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert commit_of(tmp_path) == head
    (tmp_path / "result.json").write_text("{}")
    assert commit_of(tmp_path) == head, "what git does not know changes nothing"
    (tmp_path / "task.py").write_text("a = 2\n")
    assert commit_of(tmp_path) == f"{head}-dirty"


def test_a_folder_outside_of_any_repository_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) == "", "no git at all"

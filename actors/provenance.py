"""Which version of the task's code a run was started from, as far as git knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

_LIMIT_S = 5.0  # a work tree on a slow network drive must not hold up a start


def commit_of(folder: Path) -> str:
    """The commit that `folder` is at, with "-dirty" where files differ from it; "" without git or a repository."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        if head.returncode:
            return ""
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("-dirty" if changed.stdout else "")


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)

"""SIGKILLs of a process that saves checkpoints; tests/chaos has many times as many."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.save_kills import SaveKills
from s3_server import s3_server

KILLS = 12
# On this machine a part is 4 MiB, so the larger file has three of them; on a bucket 16 MiB, two of them.
NUMEL = {"local": 5 << 18, "s3": 17 << 17}


@contextmanager
def save_kills(where: str, folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[SaveKills]:
    """Ready to strike, on a folder or on the bucket of a server of its own."""
    if where == "local":
        root = folder / "runs"
        root.mkdir()

        def below() -> list[str]:
            paths = [path for path in root.rglob("*") if not path.is_dir() or not any(path.iterdir())]
            return [str(path.relative_to(root)) for path in paths]

        yield SaveKills(str(root), folder, seed, NUMEL[where], below, {})
        return
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)

        def in_bucket() -> list[str]:
            found = server.keys("bucket", "runs/") + [f"{key} (unfinished)" for key in server.uploads("bucket")]
            return [key.removeprefix("runs/") for key in found]

        yield SaveKills("s3://bucket/runs", folder, seed, NUMEL[where], in_bucket, server.env)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_save_that_is_killed_at_any_instant_leaves_the_newest_checkpoint_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(os.environ.get("EVERSTEP_SEED", secrets.randbelow(1 << 16)))
    print(f"seed {seed}")
    with save_kills(where, tmp_path, seed, monkeypatch) as kills:
        for _ in range(KILLS):
            kills.strike()
        kills.close()
        print(kills.told())

"""Hundreds of SIGKILLs of a process that saves checkpoints; tests/integration has a dozen."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from integration.test_save_kills import save_kills

KILLS = int(os.environ.get("EVERSTEP_KILLS", "200"))


@pytest.mark.slow
@pytest.mark.timeout(60 + 4 * KILLS)  # one takes about a second on two cores, on a bucket two
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_save_that_is_killed_at_hundreds_of_instants_leaves_the_newest_checkpoint_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EVERSTEP_SEED repeats the delays before the kills, as far as the machine's timing lets it."""
    seed = int(os.environ.get("EVERSTEP_SEED", secrets.randbelow(1 << 16)))
    print(f"seed {seed}")
    share = KILLS // 2
    with save_kills(where, tmp_path, seed, monkeypatch) as kills:
        for _ in range(share):
            kills.strike()
        kills.close()
        print(kills.told())
    assert kills.torn > share / 4, "the kills came when nothing was being written"

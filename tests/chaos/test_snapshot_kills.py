"""Hundreds of SIGKILLs of trainers and managers in the middle of snapshots; tests/integration has fifty."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
import torch

from integration.snapshot_kills import SnapshotKills

KILLS = int(os.environ.get("EVERSTEP_KILLS", "500"))


@pytest.mark.slow
@pytest.mark.timeout(KILLS)  # one takes a quarter of a second on two cores
def test_what_is_protected_survives_hundreds_of_sigkills(tmp_path: Path) -> None:
    """EVERSTEP_SEED repeats the order of the kills, as far as the machine's timing lets it."""
    seed = int(os.environ.get("EVERSTEP_SEED", secrets.randbelow(1 << 16)))
    print(f"seed {seed}")
    torch.set_num_threads(1)
    kills = SnapshotKills(tmp_path, seed)
    try:
        for _ in range(KILLS):
            kills.strike()
    finally:
        kills.close()
    print(kills.told())
    assert min(kills.kills.values()) > KILLS / 4
    assert kills.rebuilt >= KILLS
    assert not kills.folder.path.exists()

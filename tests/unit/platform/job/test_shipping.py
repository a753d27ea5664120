"""Ray's temporary folder is not shipped with a job that lies above it."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.platform.job.shipping import rays_own


def test_rays_own_folders_are_left_out_where_they_are_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "scratch"))
    assert rays_own(tmp_path) == ["/scratch/ray"]
    assert rays_own(tmp_path / "jobs") == []
    assert "/ray" in rays_own(Path("/tmp"))

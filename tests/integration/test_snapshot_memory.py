"""What a run takes of /dev/shm, in blocks of its files, is what [Note: shared memory] says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everstep.platform.job.check import copies_of_state, copies_of_view
from everstep.platform.job.inspect_task import inspect_task
from integration.harness import HERE, Gates, job, live, ranks, run_folders
from integration.snapshot_checks import allocated_bytes

BEFORE, AFTER = 2, 6


@pytest.mark.parametrize(("count", "changes"), [
    (4, {"layout": {"zero": 2}, "snapshot": {"parity": 2, "every": 1}, "checkpoint": {"every": 2}}),
    (3, {"layout": {"zero": 1}, "snapshot": {"parity": 1, "every": 1}}),
    (3, {"layout": {"zero": 1}, "snapshot": {"redundancy": "shadow"}}),
    (2, {"layout": {"zero": 0}, "snapshot": {"every": 1}}),
])  # fmt: skip
def test_a_run_takes_what_the_formula_says(count: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Before a loss, and after it, when the new view is protected: what older layouts took has come back."""
    if "checkpoint" in changes:
        changes = {**changes, "checkpoint": {"to": str(tmp_path / "runs"), **changes["checkpoint"]}}
    gates = Gates(tmp_path / "gates")
    gates.shut(BEFORE)
    gates.shut(AFTER)
    args = {"width": 1024, "gates": str(gates.folder)}
    kill = [{"at_step": BEFORE + 1, "rank": 1, "do": "kill", "phase": "vote"}]
    spec = job("Gated", args=args, steps=AFTER + 1, lanes=4, ranks=ranks(count), faults=kill, **changes)
    state_bytes = inspect_task(spec, HERE).state_bytes
    assert state_bytes > 12 << 20, "headers and indices would matter"
    with live(spec) as run:
        (folder,) = run_folders(spec.name)

        def compare(step: int) -> int:
            run.until(lambda: run.step() == step, f"step {step}")
            now = run.events("view")[-1].data["ranks"]
            expected = copies_of_view(spec, now) * state_bytes
            run.until(
                lambda: allocated_bytes(folder) < 1.05 * expected, f"{expected:.0f} of {allocated_bytes(folder)}"
            )
            assert allocated_bytes(folder) == pytest.approx(expected, rel=0.05)
            return now

        assert compare(BEFORE) == count
        peak = 0

        def watch() -> bool:
            nonlocal peak
            peak = max(peak, allocated_bytes(folder))
            return run.step() == AFTER

        gates.open(BEFORE)
        run.until(watch, f"step {AFTER}")
        assert compare(AFTER) >= count - 1
        assert peak <= 1.1 * copies_of_state(spec) * state_bytes
        gates.open(AFTER)
        assert run.result().ok
    assert not folder.exists()

"""The supervisor of a run dies, or freezes: its standby goes on, training resumes by itself, the bits stay."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.platform.job.spec import JobSpec
from integration.harness import Gates, Live, assert_same_bits, job_dict, live

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _leader(run: Live) -> dict[str, Any]:
    return next(m for m in run.handle.status().members if m["name"] == "supervisor")


def _standby(run: Live) -> dict[str, Any] | None:
    return next((m for m in run.handle.status().members if m["state"] == "stands by"), None)


def _spec(tmp_path: Path, **changes: Any) -> tuple[JobSpec, Gates]:
    gates = Gates(tmp_path / "gates")
    args = {"gates": str(gates.folder)}
    return JobSpec.parse(job_dict("Gated", args=args, ranks={"min": 2, "max": 3, "spares": 0}, **changes)), gates


@pytest.fixture(params=["kill", "freeze"])
def strike(request: pytest.FixtureRequest) -> Iterator[int]:
    return signal.SIGKILL if request.param == "kill" else signal.SIGSTOP


def test_a_standby_takes_over_and_the_bits_stay(tmp_path: Path, strike: int):
    spec, gates = _spec(tmp_path)
    gates.shut(5)
    with live(spec, "ray") as run:
        run.until(lambda: _standby(run), "a standby")
        run.until(lambda: run.step() == 5, "step 5")
        first = _leader(run)["pid"]
        os.kill(first, strike)
        gates.open(5)
        gates.shut(9)
        run.until(lambda: run.step() == 9, "step 9, under a successor")
        assert _leader(run)["pid"] != first
        assert _leader(run)["state"] == "leads epoch 2"
        if strike == signal.SIGSTOP:  # the old one wakes, and changes nothing
            os.kill(first, signal.SIGCONT)
            run.until(lambda: not Path(f"/proc/{first}").exists(), "the old one to stand down")
        run.until(lambda: _standby(run), "another standby")
        gates.open(9)
        result = run.result()
        kinds = [event.kind for event in run.handle.events(0)]
    assert_same_bits(result, spec)
    assert kinds.count("takeover") == 1
    assert kinds.count("view") == 2  # the first, and the successor's: nothing else was disturbed
    [recovery] = result.recoveries
    assert recovery.cause.startswith("the supervisor")
    assert recovery.steps_lost == 0

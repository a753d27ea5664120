"""Shadow shards: a rank that is lost, also with all of its memory, costs no step, and no snapshot had to be taken."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from everstep.platform.job.result import RunResult
from everstep.storage import Checkpoint
from everstep.storage.segment import SegmentMap, read_seal
from integration.harness import Gates, assert_same_bits, finish, job, live, ranks, run_folders, run_processes

SHADOW = {"redundancy": "shadow"}
# Where a recovery goes on when a rank dies in this phase of step N: at N plus this.
BASE = {"gradient": -1, "reduce": -1, "vote": -1, "verdict": 0, "apply": 0, "gather": 0}


def recovered(result: RunResult) -> list[tuple[int, list[int]]]:
    """(base step, ranks) of each recovery; none lost a step."""
    assert [r.steps_lost for r in result.recoveries] == [0] * len(result.recoveries)
    return [(r.step, r.ranks) for r in result.recoveries]


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("kills", [
    [(5, "gradient"), (8, "verdict"), (11, "reduce")],
    [(5, "vote"), (10, "gather"), (14, "apply")],
])  # fmt: skip
def test_a_kill_in_any_phase_costs_no_step(kills: list[tuple[int, str]], zero: int, tmp_path: Path):
    """Five ranks, then four, three, two. A checkpoint that is due at the step is written by those who are left."""
    faults = [{"at_step": step, "rank": 1, "do": "kill", "phase": phase} for step, phase in kills]
    checkpoint = {"to": str(tmp_path / "runs"), "every": 4}
    spec = job("Norm", ranks=ranks(5), layout={"zero": zero}, snapshot=SHADOW, checkpoint=checkpoint, faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert len(done.kinds("fault")) == len(kills)
    bases = [step + BASE[phase] for step, phase in kills]
    assert recovered(done.result) == [(base, [1]) for base in bases if base < spec.steps]  # a commit ends a recovery
    assert {event.data["step"] for event in done.kinds("view")} >= {0, *bases}
    assert [Path(url).name.split(".")[0] for url in done.result.checkpoints] == [f"step-{n}" for n in (4, 8, 12, 14)]
    newest = Checkpoint.open(done.result.checkpoints[-1])
    newest.verify()
    for meta in newest.index.tensors:
        if meta.dtype == "float32" and meta.shape:
            spans = [(f.start, f.stop) for f in newest.index.fragments if (f.name, f.kind) == meta.key]
            assert sum(stop - start for start, stop in spans) == meta.numel, f"{meta} is in {spans}"


def segments(name: str) -> dict[str, list[Path]]:
    """The segments of a run by domain."""
    (folder,) = run_folders(name)
    found: dict[str, list[Path]] = {}
    for path in folder.glob("*/*.seg"):
        found.setdefault(path.parent.name, []).append(path)
    return found


def sealed_step(path: Path) -> int:
    with SegmentMap(path, writable=False) as segment:
        seal = read_seal(segment)
        return -1 if seal is None else seal.step


def test_a_domain_that_is_lost_with_all_its_memory_costs_no_step(tmp_path: Path):
    """Trainer, manager and segments of slot 1; nothing was written since the view began."""
    gates = Gates(tmp_path / "gates")
    gates.shut(6)
    spec = job("Gated", args={"gates": str(gates.folder)}, ranks=ranks(3), snapshot=SHADOW)
    with live(spec) as run:
        run.until(lambda: run.step() == 6, "the gate is reached")
        there = segments(spec.name)
        assert {max(map(sealed_step, paths)) for paths in there.values()} == {0}
        for path in there["slot-1"]:
            path.unlink()
        os.kill(run_processes(spec.name)["manager-1.1"], signal.SIGKILL)
        run.until(lambda: run.events("lost"), "the loss is told")
        gates.open(6)
        result = run.result()
    assert_same_bits(result, spec)
    assert recovered(result) == [(6, [1])]

"""The promise: `state_sha256` and every committed loss do not depend on what happened to a run.

Each run is compared with a Session that holds all lanes in this process (harness.reference).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from everstep.platform.job.spec import JobSpec
from integration.harness import (
    Finished,
    Gates,
    Live,
    assert_same_bits,
    finish,
    job,
    live,
    ranks,
    reference,
    same,
    until,
)

TASKS = ("Mlp", "Norm", "Tokens")
# Its host, its manager and its stream all notice a death; who is first gives it its name.
KILLED = {"signal 9", "exited", "hung up"}
FROZEN = "frozen (stopped by a signal)"


def assert_every_verdict_is_the_references(done: Finished, spec: JobSpec) -> None:
    """Also those of steps that were rolled back: they were shown to somebody."""
    expected = reference(spec).losses
    assert done.committed
    assert [step for step, loss in done.committed if not same(loss, expected[step - 1])] == []


def recoveries(done: Finished) -> list[tuple[int, str, list[int]]]:
    """(base step, cause, ranks) of each; none lost more than one step."""
    assert all(r.steps_lost <= 1 for r in done.result.recoveries)
    return [(r.step, r.cause, r.ranks) for r in done.result.recoveries]


@pytest.mark.parametrize(("task", "count", "zero"), [
    ("Mlp", 1, 2), ("Mlp", 2, 0), ("Mlp", 2, 1), ("Mlp", 3, 2), ("Mlp", 4, 0), ("Mlp", 4, 1), ("Mlp", 4, 2),
    ("Norm", 2, 1), ("Norm", 3, 0), ("Norm", 4, 2),
    ("Tokens", 2, 0), ("Tokens", 3, 1), ("Tokens", 4, 2),
])  # fmt: skip
def test_the_number_of_ranks_and_the_zero_stage_do_not_matter(task: str, count: int, zero: int):
    spec = job(task, ranks=ranks(count), layout={"zero": zero}, steps=8)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert done.result.ranks_final == count
    assert done.result.recoveries == []


@pytest.mark.parametrize("task", TASKS)
def test_a_kill_and_a_freeze_do_not_matter(task: str):
    faults = [{"at_step": 4, "rank": 1, "do": "kill"}, {"at_step": 9, "rank": 0, "do": "freeze"}]
    spec = job(task, ranks=ranks(3, spares=1), faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert_every_verdict_is_the_references(done, spec)
    (killed, frozen) = recoveries(done)
    assert killed[1] in KILLED
    assert (killed[0], killed[2]) == (3, [1])
    assert frozen == (8, FROZEN, [0])


def test_a_tasks_own_loop_has_the_bits_of_the_engines():
    faults = [{"at_step": 4, "rank": 1, "do": "kill"}, {"at_step": 9, "rank": 0, "do": "kill", "phase": "apply"}]
    spec = job("OwnLoop", ranks=ranks(3, spares=1), faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert len(recoveries(done)) == 2


# Before the verdict the step is not committed; after it only what a dead rank had sealed is left of it.
PHASES = {"gradient": 6, "reduce": 6, "vote": 6, "verdict": 6, "apply": 6, "snapshot": 6, "gather": 7}


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_does_not_matter(phase: str, zero: int):
    spec = job(layout={"zero": zero}, faults=[{"at_step": 7, "rank": 1, "do": "kill", "phase": phase}])
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert_every_verdict_is_the_references(done, spec)
    ((step, cause, who),) = recoveries(done)
    assert cause in KILLED
    assert who == [1]
    assert step == PHASES[phase] or zero == 0
    assert [event.data["index"] for event in done.kinds("fault")] == [0]


def test_a_second_kill_while_the_first_is_recovered_from_does_not_matter():
    faults = [
        {"at_step": 7, "rank": 1, "do": "kill"},
        {"at_step": 7, "rank": 2, "do": "kill", "phase": "recovery"},
    ]
    spec = job(ranks=ranks(4), faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert_every_verdict_is_the_references(done, spec)
    assert [event.data["index"] for event in done.kinds("fault")] == [0, 1]
    ((step, _, who),) = recoveries(done)
    assert (step, who) == (6, [1, 2])


@pytest.mark.parametrize("zero", [0, 2])
def test_killing_everybody_does_not_matter(zero: int):
    """Their memory is sealed, and outlives them with their managers."""
    faults = [{"at_step": 7, "rank": rank, "do": "kill", "phase": "vote"} for rank in (0, 1)]
    spec = job(ranks=ranks(2), layout={"zero": zero}, faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert_every_verdict_is_the_references(done, spec)
    assert len(done.kinds("fault")) == 2
    assert sum(len(who) for _, _, who in recoveries(done)) == 2


def test_a_zombie_that_wakes_up_changes_nothing(tmp_path: Path):
    """Rank 2 is frozen, declared dead, woken half a second before it is killed, and works on."""
    trace = tmp_path / "trace"
    faults = [{"at_step": 7, "rank": 2, "do": "freeze", "wake_s": 0.5}]
    spec = job("Gated", args={"trace": str(trace)}, ranks=ranks(3, spares=1), faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert_every_verdict_is_the_references(done, spec)
    assert recoveries(done) == [(6, FROZEN, [2])]
    computed = [line.split() for line in trace.read_text().splitlines()]
    last_of = {pid: int(step) for pid, step, _ in computed}
    assert sorted(last_of.values())[0] == 6, "the zombie never worked on the step that it was frozen in front of"


def see_it_scaled(run: Live, gates: Gates, gate: int) -> None:
    """Lets the run go on once the third rank is there, so that the step boundary can take it in."""
    run.until(lambda: run.step() == gate, "the gate is reached")
    assert run.handle.status().ranks == 2
    run.until(lambda: [m for m in run.handle.status().members if m["state"] == "spare"], "a third rank is ready")
    gates.open(gate)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_scaling_from_4_to_2_to_3_in_mid_run_does_not_matter(tmp_path: Path, zero: int):
    gates = Gates(tmp_path / "gates")
    gates.shut(7)
    faults = [{"at_step": 3, "do": "scale", "to": 2}, {"at_step": 6, "do": "scale", "to": 3}]
    args = {"gates": str(gates.folder)}
    spec = job("Gated", args=args, ranks=ranks(4), layout={"zero": zero}, faults=faults, steps=10)
    with live(spec) as run:
        see_it_scaled(run, gates, 7)
        result = run.result()
    assert_same_bits(result, spec)
    assert [(r.step, r.from_, r.to) for r in result.rescales] == [(3, 4, 2), (8, 2, 3)]
    assert result.recoveries == []


# ---- stop and resume ------------------------------------------------------------------------------------

RESUMED_AT = 6


@dataclass(frozen=True)
class Stopped:
    """`runs` holds the checkpoints of steps 4 and RESUMED_AT."""

    spec: JobSpec
    runs: Path
    gates: Gates


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """A run of 4 ranks, ZeRO 2, that was asked to stop while it worked on step RESUMED_AT."""
    folder = tmp_path_factory.mktemp("stopped")
    gates = Gates(folder / "gates")
    gates.shut(RESUMED_AT - 1)
    checkpoint = {"to": str(folder / "runs"), "every": 4}
    spec = job("Gated", args={"gates": str(gates.folder)}, ranks=ranks(4), checkpoint=checkpoint)
    with live(spec) as run:
        run.until(lambda: run.step() == RESUMED_AT - 1, "the gate is reached")
        run.handle.stop("the test says so")
        run.until(lambda: run.events("stop"), "it is told")
        gates.open(RESUMED_AT - 1)
        result = run.result()
    assert result.stopped
    assert (result.ok, result.error, result.steps) == (False, None, RESUMED_AT)
    assert list(result.losses) == list(reference(spec).losses[:RESUMED_AT])
    assert [Path(url).name.split(".")[0] for url in result.checkpoints] == ["step-4", f"step-{RESUMED_AT}"]
    return Stopped(spec, folder / "runs", gates)


def resumed_spec(stopped: Stopped, folder: Path, **changes: object) -> JobSpec:
    """The stopped job with its checkpoints in a folder of its own."""
    shutil.copytree(stopped.runs, folder / "runs")
    checkpoint = {"to": str(folder / "runs"), "every": 100}
    return JobSpec.parse({**stopped.spec.to_dict(), "checkpoint": checkpoint, **changes})


@pytest.mark.parametrize(("count", "zero"), [(1, 0), (3, 1), (2, 2)])
def test_resuming_with_other_ranks_and_another_zero_stage_does_not_matter(
    stopped: Stopped, tmp_path: Path, count: int, zero: int
):
    spec = resumed_spec(stopped, tmp_path, ranks=ranks(count), layout={"zero": zero})
    done = finish(spec)
    assert_same_bits(done.result, spec, start=RESUMED_AT)
    assert done.result.ranks_final == count
    assert [event.data["step"] for event in done.kinds("resume")] == [RESUMED_AT]


def test_a_kill_right_after_resuming_does_not_matter(stopped: Stopped, tmp_path: Path):
    """Nothing is sealed in memory yet but what the first view seals."""
    faults = [{"at_step": RESUMED_AT + 1, "rank": 0, "do": "kill"}]
    spec = resumed_spec(stopped, tmp_path, ranks=ranks(2), faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec, start=RESUMED_AT)
    assert len(recoveries(done)) == 1


# ---- on Ray ---------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_the_same_on_ray():
    """Norm, a kill, a freeze with a woken zombie, and a kill in a gather, at ZeRO 1."""
    faults = [
        {"at_step": 4, "rank": 1, "do": "kill"},
        {"at_step": 7, "rank": 0, "do": "freeze", "wake_s": 0.3},
        {"at_step": 10, "rank": 0, "do": "kill", "phase": "gather"},
    ]
    spec = job("Norm", ranks=ranks(3, spares=1), layout={"zero": 1}, faults=faults)
    before = set(psutil.Process().children(recursive=True))  # multiprocessing keeps helpers of other tests
    done = finish(spec, host="ray")
    until(lambda: not set(psutil.Process().children(recursive=True)) - before, "the end of Ray's own processes")
    assert_same_bits(done.result, spec)
    assert_every_verdict_is_the_references(done, spec)
    assert [event.data["index"] for event in done.kinds("fault")] == [0, 1, 2]
    assert [cause if cause == FROZEN else cause in KILLED for _, cause, _ in recoveries(done)] == [True, FROZEN, True]


@pytest.mark.ray
def test_a_run_of_processes_resumes_and_scales_on_ray(stopped: Stopped, tmp_path: Path):
    stopped.gates.shut(10)
    faults = [{"at_step": 8, "do": "scale", "to": 2}, {"at_step": 9, "do": "scale", "to": 3}]
    spec = resumed_spec(stopped, tmp_path, ranks=ranks(4), layout={"zero": 0}, faults=faults)
    with live(spec, host="ray") as run:
        see_it_scaled(run, stopped.gates, 10)
        result = run.result()
    assert_same_bits(result, spec, start=RESUMED_AT)
    assert [(r.step, r.from_, r.to) for r in result.rescales] == [(8, 4, 2), (11, 2, 3)]

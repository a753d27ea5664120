"""Watching and steering a live run, and what must not count as a failure or must be survived beside ranks."""

from __future__ import annotations

import json
import os
import signal
import statistics
from pathlib import Path

import pytest

from everstep.platform.job.spec import JobSpec
from integration.harness import (
    Gates,
    Live,
    ask,
    assert_same_bits,
    cli,
    finish,
    job,
    job_dict,
    live,
    ranks,
    reference,
    run_processes,
)


def test_a_live_run_is_watched_scaled_and_stopped(tmp_path: Path):
    gates = Gates(tmp_path / "gates")
    gates.shut(3)
    spec = job_dict(
        "Gated",
        args={"gates": str(gates.folder)},
        ranks=ranks(3),
        checkpoint={"to": "runs", "every": 100},
    )
    with cli(tmp_path, spec) as run:
        run.at_step(3)
        status = run.status()
        assert (status["job"], status["phase"], status["step"], status["steps"]) == (run.name, "training", 3, 14)
        assert (status["ranks"], status["ranks_target"], status["live"]) == (3, 3, True)
        assert status["loss"] == reference(JobSpec.parse(spec)).losses[2]
        assert sorted(m["rank"] for m in status["members"] if m["rank"] is not None) == [0, 1, 2]
        shown = {member["name"]: member["pid"] for member in status["members"]}
        assert shown.pop("supervisor") == run.process.pid, "on this host it is in the command itself"
        really = run_processes(run.name)
        assert len(really) >= 6
        assert shown.items() <= really.items()

        (row,) = [row for row in json.loads(ask("jobs", "--json").stdout) if row["job"] == run.name]
        assert (row["state"], row["live"], row["pid"], row["host"]) == ("running", True, run.process.pid, "processes")

        refused = ask("run", str(run.file), "--host", "processes", check=False)
        assert refused.returncode == 2
        assert f"a run named '{run.name}' is live (process {run.process.pid})" in refused.stderr

        refused = ask("scale", run.name, "--ranks", "4", check=False)
        assert refused.returncode == 1
        assert "allowed are 1 to 3" in refused.stderr
        ask("scale", run.name, "--ranks", "1")
        gates.shut(5)
        gates.open(3)
        run.at_step(5)
        assert run.status()["ranks"] == 1

        ask("stop", run.name)
        run.until(lambda: "stop: " in run.out, "it is told to stop")
        gates.open(5)
        assert run.wait() == 130
        result = run.result()
        assert (result.stopped, result.steps, result.ranks_final) == (True, 6, 1)
        assert result.losses == list(reference(JobSpec.parse(spec)).losses[:6])
        assert [(r.step, r.from_, r.to) for r in result.rescales] == [(4, 3, 1)]
        assert result.recoveries == []

        ended = json.loads(ask("status", run.name, "--json").stdout)
        assert (ended["state"], ended["live"], ended["step"]) == ("stopped", False, 6)
        lines = [json.loads(line) for line in ask("logs", run.name, "--rank", "1", "--json").stdout.splitlines()]
        assert {line["process"] for line in lines} <= {"rank-1.1"}
        everything = [json.loads(line) for line in ask("logs", run.name, "--json").stdout.splitlines()]
        assert any(line["process"].startswith("rank-") for line in everything)


def test_a_rank_that_holds_the_interpreter_lock_is_left_alone():
    faults = [{"at_step": 5, "rank": 1, "do": "busy", "seconds": 4}]
    spec = job(faults=faults, timeouts={"frozen_s": 1})
    with live(spec) as run:
        result = run.result()
        took = {line["step"]: line["step_s"] for line in run.lines()}
    assert_same_bits(result, spec)
    assert result.recoveries == []
    assert took[5] > 1.5, "it held nothing up for long enough to be noticed"


def test_a_slow_rank_is_slow_and_nothing_else():
    faults = [{"at_step": 5, "rank": 0, "do": "slow", "factor": 40, "steps": 3}]
    spec = job(faults=faults)
    with live(spec) as run:
        result = run.result()
        took = {line["step"]: line["compute_s"] for line in run.lines()}
    assert_same_bits(result, spec)
    assert result.recoveries == []
    slow = [took.pop(step) for step in (5, 6, 7)]
    assert statistics.median(slow) > 4 * statistics.median(took.values())


def held(tmp_path: Path, **changes: object) -> tuple[JobSpec, Gates]:
    gates = Gates(tmp_path / "gates")
    gates.shut(5)
    return job("Gated", args={"gates": str(gates.folder)}, **changes), gates


def pid_of(run: Live, name: str) -> int:
    (pid,) = [member["pid"] for member in run.handle.status().members if member["name"] == name]
    assert isinstance(pid, int)
    return pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_outlives_a_manager(tmp_path: Path, number: signal.Signals):
    """With its manager a domain's trainer is lost, and what it had sealed is adopted by the next manager."""
    spec, gates = held(tmp_path, timeouts={"frozen_s": 1})
    with live(spec) as run:
        run.until(lambda: run.step() == 5, "the gate is reached")
        os.kill(pid_of(run, "manager-1.1"), number)
        run.until(lambda: [e for e in run.events("lost") if e.data.get("name") == "rank-1.1"], "the loss")
        gates.open(5)
        result = run.result()
        lost = [event.text for event in run.events("lost")]
    assert_same_bits(result, spec)
    assert any("manager" in text for text in lost)
    (recovery,) = result.recoveries
    assert recovery.ranks == [1]
    # The last verdict may have been on its way to the rank through its manager.
    assert (recovery.step, recovery.steps_lost) in ((5, 0), (4, 1))


def test_a_run_outlives_all_its_processes_but_the_driver(tmp_path: Path):
    """The zygote dies, and with it every manager and rank: their sealed memory is adopted."""
    spec, gates = held(tmp_path)
    with live(spec) as run:
        run.until(lambda: run.step() == 5, "the gate is reached")
        names = run_processes(spec.name)
        mine = {name: pid for name, pid in names.items() if not name.startswith(("rank-", "manager-"))}
        (zygote,) = mine.values()
        os.kill(zygote, signal.SIGKILL)
        gates.open(5)
        result = run.result()
    assert_same_bits(result, spec)
    assert sum(len(recovery.ranks) for recovery in result.recoveries) >= 3
    assert all(recovery.steps_lost <= 1 for recovery in result.recoveries)


def test_a_lost_rank_is_replaced_up_to_the_target(tmp_path: Path):
    gates = Gates(tmp_path / "gates")
    gates.shut(8)
    faults = [{"at_step": 5, "rank": 1, "do": "kill"}]
    spec = job("Gated", args={"gates": str(gates.folder)}, ranks=ranks(3), faults=faults)
    with live(spec) as run:
        run.until(lambda: run.step() == 8, "the gate is reached")
        run.until(
            lambda: [e for e in run.events("ready") if e.data["name"] == "rank-1.2"], "the replacement is ready"
        )
        gates.open(8)
        result = run.result()
    assert_same_bits(result, spec)
    assert result.ranks_final == 3


def test_a_run_below_its_least_number_of_ranks_waits_for_a_replacement():
    faults = [{"at_step": 5, "rank": 1, "do": "kill"}]
    spec = job(ranks={"min": 3, "max": 3, "spares": 0}, faults=faults)
    result = finish(spec).result
    assert_same_bits(result, spec)
    (recovery,) = result.recoveries
    assert (recovery.step, recovery.ranks) == (4, [1])
    assert (result.ranks_final, result.rescales) == (3, [])


def test_too_many_losses_end_the_run():
    faults = [{"at_step": step, "rank": 0, "do": "kill"} for step in (3, 5)]
    spec = job(faults=faults, limits={"infrastructure": 1})
    result = finish(spec).result
    assert not result.ok
    assert result.error is not None
    assert result.error.kind == "infrastructure"
    assert "limits.infrastructure: 1" in result.error.message


@pytest.mark.parametrize("how", ["drain", "SIGTERM"])
def test_a_rank_that_is_to_leave_is_replaced_and_no_step_is_lost(tmp_path: Path, how: str) -> None:
    gates = Gates(tmp_path / "gates")
    gates.shut(4)
    with live(job("Gated", args={"gates": str(gates.folder)}, ranks=ranks(2))) as run:
        run.until(lambda: run.step() == 4, "step 4")
        (name,) = [m["name"] for m in run.handle.status().members if m["rank"] == 1]
        if how == "drain":
            assert "nothing on rank 2" in run.handle.drain("", 2)
            assert run.handle.drain("", 1) == ""
        else:
            os.kill(run_processes(run.spec.name)[name], signal.SIGTERM)
        run.until(lambda: any(m["state"] == "spare" for m in run.handle.status().members), "a successor")
        gates.open(4)
        result = run.result()
    assert_same_bits(result, run.spec)
    assert result.recoveries == []
    cause = "drain" if how == "drain" else "preemption"
    assert [(r.step, r.from_, r.to, r.cause) for r in result.rescales] == [(5, 2, 2, cause)]

"""How runs end: in success, by the task's own fault, by a signal, by the death of the driver; and that nothing
of ours is left afterwards."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from everstep.platform.job.registry import Registry
from everstep.platform.job.spec import JobSpec
from everstep.storage.checkpoint import Checkpoint
from integration.harness import (
    Cli,
    Gates,
    assert_same_bits,
    cli,
    finish,
    job,
    job_dict,
    marked,
    ports_of,
    ranks,
    reference,
    run_folders,
)

COLLECTED_S = 15.0
HOSTS = ["processes", pytest.param("ray", marks=pytest.mark.ray)]


@dataclass(frozen=True)
class Traces:
    """What a live run has in the system, to be looked for when it has ended."""

    run: Cli
    pids: frozenset[int] = frozenset()
    ports: frozenset[int] = frozenset()
    folders: tuple[Path, ...] = ()

    @staticmethod
    def of(run: Cli) -> Traces:
        shared = run_folders(run.name)
        ray = [Path(file.read_text()) for folder in shared for file in folder.glob("folders/*")]
        processes = marked(run.mark)
        pids = frozenset(process.pid for process in processes)
        return Traces(run, pids, frozenset(ports_of(processes)), (*shared, *ray))

    def left(self) -> list[str]:
        """What there still is of it."""
        found = [f"process {process.pid} {' '.join(_command(process))}" for process in marked(self.run.mark)]
        names = [str(folder) for folder in self.folders]
        for process in psutil.process_iter():  # a reaper has no environment of ours
            if any(name in word for word in _command(process) for name in names):
                found.append(f"process {process.pid} {' '.join(_command(process))}")
        found += [f"folder {folder}" for folder in (*self.folders, *run_folders(self.run.name)) if folder.exists()]
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr.port in self.ports and c.pid in (None, *self.pids):
                found.append(f"port {c.laddr.port}")
        return found

    def are_collected(self, since: float) -> None:
        """Fails if anything is left COLLECTED_S after `since`."""
        while left := self.left():
            assert time.monotonic() < since + COLLECTED_S, f"left after {COLLECTED_S:g} s: {left}"
            time.sleep(0.05)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# ---- the task's own fault -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_an_exception_in_the_task_ends_the_run_with_traceback_rank_and_lane(tmp_path: Path, host: str):
    with cli(tmp_path, job_dict("Failing"), host=host) as run:
        run.until(lambda: run_folders(run.name), "the run's folder")
        traces = Traces.of(run)
        assert run.wait() == 1
        ended = time.monotonic()
        error = run.result().error
        assert error is not None
        assert (error.kind, error.step, error.lane, error.rank) == ("task", 5, 5, 2)  # wave 1 of 3 ranks
        assert "hole in the road" in error.message
        for words in ("in stumble", "hole in the road", "rank 2", "lane 5"):
            assert words in run.err
        traces.are_collected(ended)


def test_an_exception_while_the_task_is_built_ends_the_run(tmp_path: Path):
    """One that the check before the run did not meet."""
    armed = tmp_path / "armed"
    armed.touch()
    done = finish(job("Failing", args={"how": "build", "armed": str(armed)}))
    result = done.result
    assert result.error is not None
    assert (result.ok, result.error.kind, result.steps) == (False, "task", 0)
    assert "the blueprint is gone" in result.error.message
    assert "in model" in result.error.traceback
    assert [event.text for event in done.kinds("failed")] == [result.error.message]


def test_a_budget_for_the_users_errors_is_kept(tmp_path: Path):
    armed = tmp_path / "armed"
    armed.touch()
    spec = job("Failing", args={"how": "raise-once", "armed": str(armed)}, limits={"user": 1})
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert not armed.exists()
    assert len(done.result.recoveries) == 1


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    spec = job("Failing", args={"how": "nan"})
    result = finish(spec).result
    assert_same_bits(result, spec)
    assert result.skipped == 1
    assert [i for i, loss in enumerate(result.losses) if loss is None] == [4]
    kept = Registry().find(spec.name).result()
    assert kept is not None, "the result file cannot be read back"
    assert (kept.state_sha256, kept.losses) == (result.state_sha256, result.losses)


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run_with_its_last_checkpoint(tmp_path: Path):
    checkpoint = {"to": str(tmp_path / "runs"), "every": 2}
    spec = job("Failing", args={"how": "nans"}, checkpoint=checkpoint, limits={"nonfinite": 3})
    result = finish(spec).result
    assert result.error is not None
    assert (result.ok, result.error.kind, result.error.step) == (False, "nonfinite", 7)
    assert "limits.nonfinite: 3" in result.error.message
    last = Checkpoint.open(result.checkpoints[-1])
    last.verify()
    assert last.index.step == 6
    # It goes on counting where it stopped, so that a restart is no way around the limit.
    again = finish(spec).result
    assert again.error is not None
    assert (again.error.kind, again.error.step) == ("nonfinite", 7)


# ---- signals --------------------------------------------------------------------------------------------


def gated(tmp_path: Path, gate: int, **changes: object) -> tuple[dict[str, object], Gates]:
    gates = Gates(tmp_path / "gates")
    gates.shut(gate)
    return job_dict("Gated", args={"gates": str(gates.folder)}, **changes), gates


def test_ctrl_c_stops_after_the_step_and_the_same_command_resumes(tmp_path: Path):
    spec, gates = gated(tmp_path, 5, checkpoint={"to": "runs", "every": 100})
    with cli(tmp_path, spec) as run:
        run.at_step(5)
        traces = Traces.of(run)
        assert traces.ports
        assert len(traces.folders) == 1
        run.process.send_signal(signal.SIGINT)
        run.until(lambda: "stopping after this step" in run.out, "it says that it stops")
        gates.open(5)
        assert run.wait() == 130
        ended = time.monotonic()
        assert f"resume with: everstep run {run.file} --host processes" in run.out
        first = run.result()
        assert (first.stopped, first.steps) == (True, 6)
        traces.are_collected(ended)
    with cli(tmp_path, spec) as again:
        assert again.wait() == 0, again.err
        ended = time.monotonic()
        parsed = JobSpec.parse(spec)
        assert_same_bits(again.result(), parsed, start=6)
        assert first.losses == list(reference(parsed).losses[:6])
        Traces(again).are_collected(ended)


@pytest.mark.parametrize("host", HOSTS)
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, host: str):
    spec, _ = gated(tmp_path, 3, ranks=ranks(2))
    with cli(tmp_path, spec, host=host) as run:
        run.at_step(3)
        traces = Traces.of(run)
        run.process.send_signal(signal.SIGINT)
        run.until(lambda: "stopping after this step" in run.out, "it says that it stops")
        run.process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        assert run.wait() == 130
        assert "ending at once" in run.err
        assert "it can only start over" in run.out
        traces.are_collected(asked)


@pytest.mark.parametrize(("host", "frozen"), [
    ("processes", False), ("processes", True), pytest.param("ray", True, marks=pytest.mark.ray),
])  # fmt: skip
def test_sigkill_of_the_driver_leaves_nothing(tmp_path: Path, host: str, frozen: bool):
    """`frozen`: a rank and a manager are stopped by a signal at that moment, and cannot see what happened."""
    spec, _ = gated(tmp_path, 2, ranks=ranks(2))
    with cli(tmp_path, spec, host=host) as run:
        run.at_step(2)
        traces = Traces.of(run)
        members = {member["name"]: member["pid"] for member in run.status()["members"]}
        assert {"rank-0.1", "rank-1.1", "manager-0.1", "manager-1.1"} <= members.keys()
        assert set(members.values()) <= traces.pids
        assert traces.ports
        assert len(traces.folders) == (1 if host == "processes" else 2)
        if frozen:
            os.kill(members["manager-0.1"], signal.SIGSTOP)
            os.kill(members["rank-0.1"], signal.SIGSTOP)
        killed = time.monotonic()
        run.kill()
        traces.are_collected(killed)
        assert Registry().find(run.name).state == "died"


def test_a_driver_killed_while_it_starts_leaves_nothing(tmp_path: Path):
    with cli(tmp_path, job_dict()) as run:
        run.until(lambda: run_folders(run.name), "the run's folder")
        traces = Traces.of(run)
        killed = time.monotonic()
        run.kill()
        traces.are_collected(killed)

"""Runs that are submitted to a real head through its job server: code, logs, stop, versions, loss of the cluster."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import everstep
from everstep.actors.ray_jobs import JobServer
from everstep.platform.job.registry import Registry
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec
from integration.harness import ask, assert_same_bits, command, job_dict, until
from integration.ray_head import TASK, Head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TWO_RANKS = {"min": 1, "max": 2, "spares": 0}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        started = Head(folder, token)
        try:
            yield started
        finally:
            started.kill()


def _job(folder: Path, task: str = "Mlp", **changes: Any) -> Path:
    plain = job_dict(task, **{"ranks": TWO_RANKS, **changes})
    file = folder / "job.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(plain))
    return file


def _submit(file: Path, head: Head, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = command("submit", str(file), "--address", head.url, *options)
    env = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=env)


def _gated(folder: Path, **changes: Any) -> tuple[Path, Path, JobSpec]:
    """A job of which 5 steps commit and no more until gates/5 is removed, with checkpoints."""
    gates = folder / "gates"
    gates.mkdir(parents=True)
    (gates / "5").touch()
    checkpoint = {"to": str(folder / "checkpoints"), "every": 100}
    file = _job(folder, "Gated", args={"gates": str(gates)}, checkpoint=checkpoint, **changes)
    return file, gates / "5", JobSpec.load(file)


def _steps(name: str) -> int:
    metrics = Registry().root / "runs" / name / name / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_two_jobs_with_modules_of_one_name_run_their_own_code_and_log_for_themselves(head: Head, tmp_path: Path):
    """One by `ray job submit`, one by `everstep submit`, side by side."""
    plain = {"task": "task.py:Own", "steps": 6, "lanes": 2, "lane_batch": 4, "ranks": TWO_RANKS}
    for name, factor in (("left", 1.0), ("right", 100.0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "task.py").write_text(f"FACTOR = {factor}\n" + TASK.replace("WORD", name))
        (folder / "job.yaml").write_text(yaml.safe_dump({"name": name, **plain}))
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.url, "--no-wait"]
    ray += ["--submission-id", "by-ray", "--working-dir", str(tmp_path / "left"), "--", "everstep", "run", "job.yaml"]
    asked = subprocess.run(ray, capture_output=True, text=True, timeout=60, check=False)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    right = everstep.submit(tmp_path / "right" / "job.yaml", head.url, id="by-everstep")
    server = JobServer(head.url)
    ended = server.wait("by-ray", 90)
    assert ended is not None
    assert ended.status == "SUCCEEDED", server.logs("by-ray")
    result = right.result(90)
    assert right.status() == "SUCCEEDED"
    logs = {"left": server.logs("by-ray"), "right": right.logs()}
    ids = {"left": ended.ray_job_id, "right": server.state("by-everstep").ray_job_id}
    assert ids["left"] != ids["right"]
    for name, other in (("left", "right"), ("right", "left")):
        said = [line.split(" | ")[1].split() for line in logs[name].splitlines() if line.startswith("rank-")]
        assert {step for _, step, _ in said} >= {"1", "2", "3", "4", "5"}, logs[name]
        assert {(word, job) for word, _, job in said} == {(name, ids[name])}
        assert f"| {other} " not in logs[name]
    losses = {name: Registry().find(name).result() for name in ("left", "right")}
    assert losses["right"] is not None
    assert losses["left"] is not None
    assert losses["right"].loss.first == pytest.approx(100 * (losses["left"].loss.first or 0), rel=1e-5)
    assert result.losses == losses["right"].losses
    assert server.metadata("by-everstep")["everstep"] == everstep.__version__


def test_submit_follows_the_run_and_brings_its_result_and_exit_code(head: Head, tmp_path: Path):
    file = _job(tmp_path / "good")
    done = _submit(
        file, head, "--set", "faults=[{at_step: 6, rank: 1, do: kill}]", "--result", str(tmp_path / "r.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everstep-result" not in done.stdout
    assert "state_sha256" in done.stdout
    result = RunResult.from_json((tmp_path / "r.json").read_bytes())
    assert_same_bits(result, JobSpec.load(file))
    assert len(result.recoveries) == 1


def test_a_task_that_always_fails_ends_with_its_error_whatever_limits_user_says(head: Head, tmp_path: Path):
    file = _job(tmp_path / "bad", "Failing", limits={"user": -1})
    done = _submit(file, head, "--json", "--result", str(tmp_path / "r.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["kind"] == "submitted"
    result = RunResult.from_json((tmp_path / "r.json").read_bytes())
    assert result.error is not None
    assert result.error.kind == "task"
    assert "hole in the road" in result.error.message


def test_ray_job_stop_leaves_in_time_and_the_same_submit_resumes(head: Head, tmp_path: Path):
    file, gate, spec = _gated(tmp_path / "stopped")
    job = everstep.submit(file, head.url, look=False)
    until(lambda: _steps(spec.name) >= 5, "step 5", 60)
    job.kill()  # what `ray job stop` does; the run stands in its sixth step for longer than Ray waits
    server = JobServer(head.url)
    state = server.wait(job.id, 10)
    assert state is not None
    assert state.status == "STOPPED"
    assert "the run finishes its step and its checkpoint by itself" in job.logs()
    assert Registry().find(spec.name).live, "the supervisor keeps the name"
    assert json.loads(ask("status", spec.name, "--json").stdout)["phase"] == "training"
    gate.unlink()
    again = everstep.submit(file, head.url, look=False)  # at once: it waits for the end of the first
    result = again.result(90)
    assert "resuming from step 6" in again.logs()
    assert_same_bits(result, spec, start=6)


def test_a_run_whose_driver_is_killed_is_seen_steered_and_booked(head: Head, tmp_path: Path):
    file, gate, spec = _gated(tmp_path / "orphan")
    job = everstep.submit(file, head.url, look=False)
    until(lambda: _steps(spec.name) >= 5, "step 5", 60)
    driver = Registry().find(spec.name).record.pid
    os.kill(driver, signal.SIGKILL)
    until(lambda: job.status() == "FAILED", "Ray to notice", 20)
    entry = until(lambda: _kept(spec.name, driver), "the supervisor to keep the name", 20)
    assert entry.live
    job.scale(1)
    gate.unlink()
    done = until(lambda: Registry().find(spec.name).result(), "the result", 60)
    assert_same_bits(done, spec)
    until(lambda: not Registry().find(spec.name).live, "the end of the supervisor", 20)
    assert Registry().find(spec.name).state == "ended"


def _kept(name: str, driver: int) -> Any:
    entry = Registry().find(name)
    return entry if entry.record.pid != driver else None


def test_ctrl_c_asks_the_run_to_stop_with_a_checkpoint(head: Head, tmp_path: Path):
    file, gate, spec = _gated(tmp_path / "asked")
    words = command("submit", str(file), "--address", head.url)
    follower = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: _steps(spec.name) >= 5, "step 5", 60)
    follower.send_signal(signal.SIGINT)
    log = Registry().find(spec.name)
    until(lambda: "everstep stop" in _events(log.name), "the run to be asked", 30)
    gate.unlink()
    out, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, out
    assert "asking the run to stop" in out
    assert "step-6." in out


def _events(name: str) -> str:
    done = ask("status", name, check=False)
    return done.stdout


def test_the_loss_of_the_whole_cluster_costs_no_bits(head: Head, tmp_path: Path):
    """Another cluster, other ranks, the same submit."""
    file, gate, spec = _gated(tmp_path / "lost")
    job = everstep.submit(file, head.url, look=False, overrides=("checkpoint.every=2",))
    newest = f"{tmp_path}/lost/checkpoints/{spec.name}/{spec.name}"
    until(lambda: list(Path(newest).glob("step-4.*/manifest.json")), "a checkpoint of step 4", 60)
    head.replace()
    gate.unlink()
    again = everstep.submit(file, head.url, look=False, overrides=("ranks.max=3", "checkpoint.every=2"))
    result = again.result(120)
    assert again.id != job.id
    assert "resuming from step" in again.logs()
    start = spec.steps - len(result.losses)
    assert start >= 4
    assert_same_bits(result, spec, start=start)
    assert result.ranks_final == 3


def test_a_job_that_can_never_fit_says_so_at_once_with_what_there_is(head: Head, tmp_path: Path):
    file = _job(tmp_path / "large")
    for change, field, there_is in (
        ("resources.cpus=9", "resources.cpus = 9", "at most 8 CPU"),
        ("resources.custom={tpu: 1}", "resources.custom.tpu = 1", "no node has any tpu"),
        ("resources.labels={zone: mars}", 'resources.labels = {"zone": "mars"}', "zone: on no node"),
    ):
        done = ask("run", str(file), "--address", head.address, "--set", change, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert field in done.stderr
        assert there_is in done.stderr
        assert "can never fit" in done.stderr


def test_addresses_and_tokens_that_do_not_work_are_told_apart(head: Head, tmp_path: Path):
    file = _job(tmp_path / "nowhere")
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    for address, token, said in (
        ("http://127.0.0.1:9", head.token, "nobody answers"),
        ("ray://127.0.0.1:10001", head.token, "want the job server's: http://127.0.0.1:8265"),
        (f"http://{head.address}", head.token, "no job server answers"),
        (head.url, wrong, "refuses the token"),
        (head.url, tmp_path / "absent", "there is none here"),
    ):
        words = command("submit", str(file), "--address", address, "--no-check")
        env = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(tmp_path)}
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == 1, done.stdout + done.stderr
        assert said in done.stderr


def test_other_versions_are_refused_with_both_named(head: Head, tmp_path: Path):
    """A second everstep, which differs in its version alone: the submitter's, the supervisor's, and on one node.

    Last: the node stays, and nothing else can run beside it.
    """
    other = tmp_path / "other"
    _other_version(other, "7.8.9")
    file = _job(tmp_path / "versions")
    theirs = _submit(file, head, "--no-check", PYTHONPATH=f"{other}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert theirs.returncode == 2, theirs.stdout + theirs.stderr
    assert f"submitted with everstep 7.8.9, but the cluster has everstep {everstep.__version__}" in theirs.stdout
    words = ["run", str(file), "--address", head.address]
    supervisor = ask(*words, "--set", f"runtime_env.env_vars.PYTHONPATH={other}", check=False)
    assert supervisor.returncode == 2, supervisor.stdout
    assert f"has everstep 7.8.9, but this run was started with everstep {everstep.__version__}" in supervisor.stderr
    head.add_node("elsewhere", other)
    until(
        lambda: "nodes            2 nodes" in ask("doctor", "--address", head.address, check=False).stdout,
        "a node",
        30,
    )
    looked = ask("doctor", "--address", head.url, check=False)
    assert looked.returncode == 1
    assert f"everstep 7.8.9, here {everstep.__version__}" in looked.stdout
    ranks = ask(*words, "--set", "resources.custom={elsewhere: 1}", check=False)
    assert ranks.returncode in (1, 2), ranks.stdout  # 2 where the supervisor was on that node
    assert f"has everstep 7.8.9, but this run was started with everstep {everstep.__version__}" in ranks.stderr


def _other_version(folder: Path, version: str) -> None:
    package = folder / "everstep"
    package.mkdir(parents=True)
    for path in (ROOT / "src" / "everstep").iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            (package / path.name).symlink_to(path)
    text = (ROOT / "src" / "everstep" / "__init__.py").read_text()
    assert f'__version__ = "{everstep.__version__}"' in text
    (package / "__init__.py").write_text(text.replace(f'"{everstep.__version__}"', f'"{version}"'))

"""The registry: one live run a name, whatever way its owner went."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from everstep.platform.job.errors import AlreadyRunning, UnknownJob
from everstep.platform.job.registry import Registry, state_folder
from everstep.platform.job.result import RunResult

OWNER = """
import sys, time
from pathlib import Path
from everstep.platform.job.registry import Registry
held = Registry(Path(sys.argv[1])).register("gpt", "gpt")
held.update(state="running")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "state")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_run_is_registered_found_and_ended(registry):
    held = registry.register("gpt", "gpt", host="processes", steps=9, clock=lambda: 123.0)
    held.update(supervisor="127.0.0.1:4000", state="running")
    entry = registry.find("gpt")
    assert entry.live
    assert entry.state == "running"
    assert entry.record.supervisor == "127.0.0.1:4000"
    assert entry.record.started == 123.0
    assert entry.record.pid == os.getpid()
    assert entry.token() == held.token
    held.finish(RunResult(job="gpt", run="gpt", ok=True, steps=9, state_sha256="aa"), 0)
    held.close()
    held.close()
    entry = registry.find("gpt")
    assert (entry.live, entry.state, entry.record.exit) == (False, "ended", 0)
    assert entry.result().steps == 9
    assert registry.live_runs() == []


def test_folders_and_token_are_the_users_alone(registry):
    held = registry.register("gpt", "gpt")
    assert mode(held.path) == 0o700
    assert mode(registry.root) == 0o700
    assert mode(held.path / "token") == 0o600
    assert mode(held.path / "run.json") == 0o600
    assert held.token not in (held.path / "run.json").read_text()
    assert held.logs.is_dir()
    held.close()


def test_a_second_live_run_of_a_name_is_refused(registry):
    held = registry.register("gpt", "gpt")
    with pytest.raises(AlreadyRunning, match=f"'gpt' is live .process {os.getpid()}.*run=OTHER"):
        registry.register("gpt", "gpt", sleep=lambda seconds: None)
    other = registry.register("gpt", "second")
    other.close()
    held.close()
    registry.register("gpt", "gpt").close()


def test_a_resumed_run_keeps_its_folder_and_gets_a_new_token(registry):
    first = registry.register("gpt", "gpt")
    first.metrics.write_text("1\n")
    first.finish(RunResult(job="gpt", run="gpt", ok=False, steps=1, state_sha256="", stopped=True), 130)
    first.close()
    assert registry.find("gpt").state == "stopped"
    second = registry.register("gpt", "gpt")
    assert second.metrics.read_text() == "1\n"
    assert second.token != first.token
    assert registry.find("gpt").result() is None
    second.close()


def test_a_killed_owner_leaves_no_live_run(registry):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(registry.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        assert registry.find("gpt", live=True).live
        with pytest.raises(AlreadyRunning, match=str(owner.pid)):
            registry.register("gpt", "gpt", sleep=lambda seconds: None)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
        owner.stdout.close()
    entry = registry.find("gpt")
    assert (entry.live, entry.state) == (False, "died")
    registry.register("gpt", "gpt").close()


def test_looking_does_not_disturb_an_owner(registry):
    held = registry.register("gpt", "gpt")
    assert [e.live for _ in range(20) for e in registry.runs()] == [True] * 20
    held.close()


def test_unknown_names_list_what_there_is(registry):
    with pytest.raises(UnknownJob, match="no run named 'x'; there are no known runs"):
        registry.find("x")
    held = registry.register("gpt", "gpt")
    other = registry.register("gpt", "b")
    with pytest.raises(UnknownJob, match=r"no run named 'x'; known runs: .*gpt"):
        registry.find("x")
    with pytest.raises(UnknownJob, match=r"more than one live run.*gpt/b"):
        registry.find("gpt")
    assert registry.find("gpt/b").record.run == "b"
    other.finish(None, 1)
    other.close()
    with pytest.raises(UnknownJob, match=r"'gpt/b' is not live \(it failed\); live runs: gpt$"):
        registry.find("gpt/b", live=True)
    held.close()


def test_damaged_records_are_passed_over(registry):
    held = registry.register("gpt", "gpt")
    held.close()
    (held.path / "run.json").write_text("{")
    assert registry.runs() == []


def test_the_state_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    monkeypatch.setenv("EVERSTEP_STATE", "/mine")
    assert str(state_folder()) == "/mine"
    monkeypatch.delenv("EVERSTEP_STATE")
    assert str(state_folder()) == "/xdg/everstep"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local" / "state" / "everstep"

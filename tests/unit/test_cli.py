"""The command line against a fake run: what it prints, asks for and exits with."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import types

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from everstep import display, running
from everstep.cli import app
from everstep.platform.job.errors import Problem, SpecError
from everstep.platform.job.facts import TaskFacts
from everstep.platform.job.registry import Registry
from everstep.platform.job.result import (
    Failure,
    Finding,
    Goodput,
    Loss,
    Recovery,
    Rescale,
    RunResult,
    Snapshots,
)
from everstep.platform.job.status import Event, Status

# Names that outside programs and fingers rely on.
GOLDEN = {
    "checkpoint diff": ["--all", "--json"],
    "checkpoint export": ["--dtype", "--json"],
    "checkpoint import": ["--json", "--name", "--patterns", "--step"],
    "checkpoint ls": ["--json"],
    "checkpoint now": ["--json", "--wait"],
    "checkpoint show": ["--json", "--tensors"],
    "checkpoint verify": ["--json"],
    "coordinator": ["--bind", "--json", "--min-peers", "--state", "--timeout", "--token-file"],
    "doctor": ["--address", "--json", "--survey"],
    "findings": ["--json"],
    "jobs": ["--address", "--json"],
    "logs": ["--follow", "--json", "--rank"],
    "run": ["--address", "--host", "--json", "--result", "--set"],
    "scale": ["--json", "--ranks"],
    "drain": ["--json", "--node", "--rank"],
    "status": ["--json"],
    "stop": ["--json"],
    "submit": ["--address", "--check", "--detach", "--id", "--json", "--result", "--set"],
}
FACTS = TaskFacts(
    parameters=1_846_656,
    state_bytes=22_160_016,
    samples=88_709,
    tensors=36,
    optimizer="AdamW",
    notes=("mind it",),
)
DONE = RunResult(
    job="gpt",
    run="gpt",
    ok=True,
    steps=10,
    state_sha256="ab" * 32,
    loss=Loss(first=5.5, last=2.25),
    losses=[5.5, 2.25],
    wall_s=12.0,
    ranks_final=4,
    recoveries=[
        Recovery(step=3, cause="signal 9", ranks=[1], detect_ms=12.4, resume_ms=345.6, steps_lost=1),
        Recovery(step=6, cause="frozen", ranks=[2], detect_ms=2100, resume_ms=2500, steps_lost=0),
    ],
    rescales=[Rescale(step=7, from_=4, to=2, pause_ms=33)],
    snapshots=Snapshots(count=10, stall_ms_median=1.5, stall_share=0.02, parity=0),
    checkpoints=["/ck/step-10"],
    goodput=Goodput(productive_s=9, startup_s=1, snapshot_s=0.5, recovery_s=0.5, lost_work_s=0.5, waiting_s=0.5),
    metrics={"bits_per_byte": 3.246},
)
FAILED = RunResult(
    job="gpt",
    run="gpt",
    ok=False,
    steps=4,
    state_sha256="",
    checkpoints=["/ck/step-4"],
    error=Failure(
        kind="task",
        message="RuntimeError: boom",
        step=5,
        rank=1,
        lane=3,
        traceback='  File "task.py", line 7, in loss\nRuntimeError: boom\n',
    ),
)
STOPPED = RunResult(
    job="gpt", run="gpt", ok=False, steps=5, state_sha256="cd", stopped=True, checkpoints=["/ck/step-5"]
)


class FakeRun:
    """A run that commits one step a look. Stops when asked; `signals` are sent at given steps."""

    def __init__(self, result=DONE, steps=10, signals=None, deaf=False):
        self.final = result
        self.steps = steps
        self.signals = signals or {}
        self.deaf = deaf
        self.step = 0
        self.stopped = []
        self.scaled = []
        self.closed = 0

    def status(self):
        self.step = min(self.step + 1, self.steps)
        if self.step in self.signals:
            os.kill(os.getpid(), self.signals.pop(self.step))
        return Status(
            job="gpt",
            run="gpt",
            phase="training",
            step=self.step,
            steps=self.steps,
            loss=5.0 / self.step,
            tokens_per_s=12_345.0,
            step_s=0.25,
            ranks=4,
            ranks_target=4,
            last_event="rank 1 lost",
            members=[{"name": "rank-0.1", "rank": 0, "slot": 0, "domain": "0", "pid": 7, "state": "ready"}],
        )

    def events(self, after):
        events = [
            Event(id=1, at_s=0.0, kind="view", text="4 ranks"),
            Event(id=2, at_s=1.0, kind="lost", text="rank 1", data={"rank": 1}),
            Event(id=3, at_s=2.0, kind="finding", text="crash", data={"ranks": [1], "first_step": 3}),
        ]
        return [e for e in events if e.id > after][:1]

    def scale(self, ranks):
        self.scaled.append(ranks)
        return "" if ranks <= 4 else "ranks.max is 4"

    def stop(self, reason):
        self.stopped.append(reason)

    def result(self):
        if self.stopped and not self.deaf:
            return STOPPED
        return self.final if self.step >= self.steps else None

    def close(self):
        self.closed += 1


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSTEP_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(running, "POLL_S", 0.001)
    return Registry(tmp_path / "state")


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: gpt\ntask: t.py:T\nsteps: 10\ncheckpoint: {to: ck}\n")
    return path


@pytest.fixture
def launched(state, monkeypatch):
    """Puts a fake launcher and a fake check in place; call it with the run to launch."""
    calls = []

    def place(run, error=None):
        def launch(spec, **how):
            calls.append((spec, how))
            if error is not None:
                raise error
            how["registration"].update(supervisor="fake:1")
            return run

        module = types.ModuleType("everstep.actors.launch")
        module.launch = launch
        monkeypatch.setitem(sys.modules, "everstep.actors.launch", module)
        monkeypatch.setattr(running, "check", lambda spec, spec_dir, source: FACTS)
        return calls

    return place


@pytest.fixture
def live(state, monkeypatch):
    """A registered live run that `connect` reaches."""
    run = FakeRun()
    seen = []

    def connect(address, token):
        seen.append((address, token))
        if address == "gone:1":
            raise ConnectionError("refused")
        return run

    module = types.ModuleType("everstep.actors.client")
    module.connect = connect
    monkeypatch.setitem(sys.modules, "everstep.actors.client", module)
    held = state.register("gpt", "gpt", host="processes", steps=10)
    held.update(supervisor="fake:1", state="running")
    run.registration, run.connections = held, seen
    yield run
    held.close()


def everstep(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_commands_and_options_are_frozen():
    def options(group, before=""):
        for name, command in sorted(group.commands.items()):
            if hasattr(command, "commands"):
                yield from options(command, f"{name} ")
            else:
                yield before + name, sorted(o for p in command.params for o in p.opts if o.startswith("--"))

    assert dict(options(typer.main.get_command(app))) == GOLDEN


@pytest.mark.parametrize("command", sorted(GOLDEN))
def test_every_command_teaches_with_an_example(command):
    shown = everstep(*command.split(), "--help")
    assert shown.exit_code == 0
    assert f"  everstep {command}" in shown.stdout


def test_the_command_line_loads_neither_torch_nor_ray():
    code = "import everstep.cli, everstep.running, sys; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_run_says_what_it_starts_and_what_came_out(launched, job, state):
    run = FakeRun()
    calls = launched(run)
    done = everstep("run", job, "--host", "processes")
    assert done.exit_code == 0, done.output
    text = done.stdout
    for words in (
        "global batch  32 = 8 lanes x 4 samples",
        "ranks         2 to 4, 1 spare",
        "1,846,656 parameters in 36 tensors, AdamW, 21.1 MiB of state",
        "mind it",
        f"every 100 steps to {job.parent / 'ck'}",
        "step 1/10 | loss 5.0000 | 12.3k tokens/s | 250 ms/step | ranks 4 | training | rank 1 lost",
        "lost: rank 1",
        "final loss    2.2500 (first 5.5000), 3.246 bits per byte",
        "ab" * 32,
        "/ck/step-10",
    ):
        assert words in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "signal 9 1 3 12 ms 346 ms 1" in rows
    assert "frozen 2 6 2100 ms 2500 ms 0" in rows
    assert "7 4 2 33 ms" in rows
    assert "productive 9.00 75.0" in rows
    assert "lost work 0.50 4.2" in rows
    spec, how = calls[0]
    assert (spec.name, how["host"], how["address"], how["facts"]) == ("gpt", "processes", None, FACTS)
    assert how["spec_dir"] == job.parent
    assert run.closed >= 1
    entry = state.find("gpt")
    assert (entry.live, entry.state, entry.record.exit) == (False, "ended", 0)
    assert entry.result() == DONE


def test_a_run_passes_overrides_and_ray_address_on(launched, job, monkeypatch):
    calls = launched(FakeRun())
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    assert everstep("run", job, "--set", "steps=20", "--set", "ranks={max: 2}").exit_code == 0
    assert everstep("run", job, "--address", "other:1").exit_code == 0
    assert everstep("run", job, "--host", "processes").exit_code == 0
    assert calls[0][0].steps == 20
    assert calls[0][0].ranks.max == 2
    assert [(how["host"], how["address"]) for _, how in calls] == [
        ("ray", "ray-head:6379"),
        ("ray", "other:1"),
        ("processes", None),
    ]


def test_json_gives_one_object_a_line_and_the_result_last(launched, job):
    launched(FakeRun())
    done = everstep("run", job, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["kind"] == "start"
    assert lines[0]["data"]["global_batch"] == 32
    assert lines[0]["data"]["facts"]["samples"] == 88_709
    assert [line["id"] for line in lines if "id" in line] == [1, 2, 3]
    assert lines[-1] == DONE.to_dict()


def test_the_result_file_gets_the_result(launched, job, tmp_path):
    launched(FakeRun())
    assert everstep("run", job, "--result", tmp_path / "out" / "r.json").exit_code == 0
    assert RunResult.from_json((tmp_path / "out" / "r.json").read_bytes()) == DONE
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["r.json"]


def test_a_failed_run_shows_the_tasks_traceback_with_rank_and_lane(launched, job, tmp_path, state):
    launched(FakeRun(result=FAILED))
    done = everstep("run", job, "--result", tmp_path / "r.json")
    assert done.exit_code == 1
    assert "run failed (task; step 5, rank 1, lane 3): RuntimeError: boom" in done.stderr
    assert 'File "task.py", line 7, in loss' in done.stderr
    assert "last checkpoint: /ck/step-4" in done.stderr
    assert RunResult.from_json((tmp_path / "r.json").read_bytes()).error.lane == 3
    assert state.find("gpt").state == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_run_and_says_how_to_resume(launched, job, state, number):
    run = FakeRun(signals={2: number})
    launched(run)
    before = signal.getsignal(number)
    done = everstep("run", job, "--set", "args.text=a b", "--host", "processes")
    assert done.exit_code == 130
    assert run.stopped == [number.name]
    assert f"resume with: everstep run {job} --set 'args.text=a b' --host processes" in done.stdout
    assert "stopped: step 5" in done.stdout
    assert run.closed >= 1
    assert state.find("gpt").state == "stopped"
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once(launched, job, state):
    run = FakeRun(signals={2: signal.SIGINT, 4: signal.SIGINT}, deaf=True)
    launched(run)
    done = everstep("run", job)
    assert done.exit_code == 130
    assert run.step == 4
    assert run.closed >= 1
    assert "ending at once" in done.stderr
    assert "resume with: everstep run" in done.stdout
    assert not state.find("gpt").live


def test_a_signal_after_the_last_step_changes_nothing(launched, job):
    run = FakeRun(signals={10: signal.SIGINT}, deaf=True)
    launched(run)
    assert everstep("run", job).exit_code == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [("checkpoint=null", "can only start over"), ("checkpoint.resume=never", "--set checkpoint.resume=auto")],
)
def test_resuming_is_only_promised_where_it_works(launched, job, override, words):
    launched(FakeRun(signals={2: signal.SIGINT}))
    assert words in everstep("run", job, "--set", override).stdout


def test_a_wrong_job_is_refused_before_anything_starts(launched, job, state):
    calls = launched(FakeRun())
    done = everstep("run", job, "--set", "ranks.max=9", "--set", "layout.zero=3")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "2 problems" in done.stderr
    assert "ranks.max = 9" in done.stderr
    assert "layout.zero = 3: not supported yet" in done.stderr
    assert "Traceback" not in done.stderr
    assert calls == []
    assert state.runs() == []


def test_what_the_check_refuses_is_refused(launched, job, monkeypatch):
    calls = launched(FakeRun())

    def refuse(spec, spec_dir, source):
        raise SpecError([Problem("args.data", "x", "data", "give some", "empty")], source)

    monkeypatch.setattr(running, "check", refuse)
    done = everstep("run", job)
    assert done.exit_code == 2
    assert f"{job} cannot run: 1 problem" in done.stderr
    assert calls == []


def test_a_missing_file_and_a_bad_result_path_are_refused(launched, job, tmp_path):
    launched(FakeRun())
    assert everstep("run", tmp_path / "none.yaml").exit_code == 2
    done = everstep("run", job, "--result", tmp_path)
    assert done.exit_code == 2
    assert "this is a folder" in done.stderr
    done = everstep("run", job, "--result", job / "r.json")
    assert done.exit_code == 2
    assert "--result" in done.stderr


def test_processes_have_no_address(launched, job):
    launched(FakeRun())
    done = everstep("run", job, "--host", "processes", "--address", "x:1")
    assert done.exit_code == 2
    assert "--address is for --host ray" in done.stderr


def test_a_second_live_run_of_a_name_is_refused(launched, job, live):
    launched(FakeRun())
    done = everstep("run", job)
    assert done.exit_code == 2
    assert "'gpt' is live" in done.stderr
    assert everstep("run", job, "--set", "run=second").exit_code == 0


def test_a_cluster_that_cannot_be_reached_is_a_failure_without_traceback(launched, job, state):
    launched(None, error=ConnectionError("no Ray at x:1"))
    done = everstep("run", job, "--address", "x:1")
    assert done.exit_code == 1
    assert "no Ray at x:1" in done.stderr
    assert state.find("gpt").state == "failed"


def test_jobs_are_listed(live, state):
    done = everstep("jobs")
    assert "gpt" in done.stdout
    assert "running" in done.stdout
    (row,) = json.loads(everstep("jobs", "--json").stdout)
    assert (row["job"], row["live"], row["state"]) == ("gpt", True, "running")
    assert live.registration.token not in everstep("jobs", "--json").stdout


def test_no_jobs_says_how_to_start_one(state):
    assert "everstep run" in everstep("jobs").stdout
    assert json.loads(everstep("jobs", "--json").stdout) == []


def test_status_of_a_live_run(live):
    text = everstep("status", "gpt").stdout
    assert "gpt: running" in text
    assert "step 1/10" in text
    assert "rank-0.1: rank 0, ready, pid 7" in text
    plain = json.loads(everstep("status", "gpt", "--json").stdout)
    assert (plain["step"], plain["live"], plain["phase"]) == (2, True, "training")
    assert live.connections[0] == ("fake:1", live.registration.token)


def test_status_of_an_ended_run(live):
    live.registration.finish(FAILED, 1)
    live.registration.close()
    text = everstep("status", "gpt").stdout
    assert "gpt: failed" in text
    assert "error: RuntimeError: boom" in text
    plain = json.loads(everstep("status", "gpt", "--json").stdout)
    assert (plain["phase"], plain["step"], plain["steps"], plain["live"]) == ("ended", 4, 10, False)


def test_status_of_a_run_whose_owner_died(live):
    live.registration.close()
    assert "gpt: died" in everstep("status", "gpt").stdout


def test_scale_and_stop_reach_the_run(live):
    assert "scaling to 2 ranks" in everstep("scale", "gpt", "--ranks", 2).stdout
    done = everstep("scale", "gpt", "--ranks", 9)
    assert done.exit_code == 1
    assert "ranks.max is 4" in done.stderr
    assert everstep("scale", "gpt", "--ranks", 0).exit_code == 2
    assert live.scaled == [2, 9]
    assert json.loads(everstep("stop", "gpt", "--json").stdout) == {"job": "gpt", "stopping": True}
    assert live.stopped == ["everstep stop"]


@pytest.mark.parametrize("words", [("status",), ("logs",), ("findings",), ("stop",), ("scale", "--ranks", "2")])
def test_an_unknown_job_lists_the_known_ones(live, words):
    done = everstep(words[0], "nope", *words[1:])
    assert done.exit_code == 1
    assert "no run named 'nope'; known runs: gpt" in done.stderr


def test_an_ended_run_cannot_be_steered(live):
    live.registration.finish(DONE, 0)
    live.registration.close()
    done = everstep("stop", "gpt")
    assert done.exit_code == 1
    assert "not live (it ended well)" in done.stderr


def test_a_run_that_cannot_be_reached_is_said_so(live):
    live.registration.update(supervisor="gone:1")
    done = everstep("status", "gpt")
    assert done.exit_code == 1
    assert "cannot be reached at gone:1: refused" in done.stderr
    live.registration.update(supervisor="")
    assert "still starting" in everstep("status", "gpt").stderr


def test_findings_of_live_and_ended_runs(live):
    assert "no findings" in everstep("findings", "gpt").stdout
    live.events = lambda after: [
        Event(id=3, at_s=2.0, kind="finding", text="crash", data={"ranks": [1], "first_step": 3})
    ]
    assert "crash: rank 1, since step 3" in everstep("findings", "gpt").stdout
    ended = RunResult(
        job="gpt",
        run="gpt",
        ok=True,
        steps=1,
        state_sha256="",
        findings=[Finding(syndrome="slow link", links=[(0, 1)], detected_after_ms=5)],
    )
    live.registration.finish(ended, 0)
    live.registration.close()
    assert "slow link: rank -, link 0-1" in everstep("findings", "gpt").stdout
    assert json.loads(everstep("findings", "gpt", "--json").stdout)[0]["links"] == [[0, 1]]


def test_logs_are_told_apart_by_process_and_rank(live):
    logs = live.registration.logs
    (logs / "rank-1.1.log").write_text("one\ntwo")
    (logs / "rank-1.2.log").write_text("three\n")
    (logs / "rank-11.1.log").write_text("other\n")
    (logs / "manager-1.log").write_text("m\n")
    text = everstep("logs", "gpt", "--rank", 1).stdout
    assert text.splitlines() == ["rank-1.1 | one", "rank-1.1 | two", "rank-1.2 | three"]
    assert "manager-1 | m" in everstep("logs", "gpt").stdout
    assert json.loads(everstep("logs", "gpt", "--rank", 11, "--json").stdout) == {
        "process": "rank-11.1",
        "line": "other",
    }
    done = everstep("logs", "gpt", "--rank", 7)
    assert "no logs of rank 7" in done.stderr


def test_following_logs_goes_on_to_the_end_and_never_halves_a_line(live, monkeypatch):
    file = live.registration.logs / "rank-0.1.log"
    file.write_text("one\nhal")
    script = iter([lambda: file.write_text("one\nhalf\n"), lambda: end(live, file)])

    def end(run, path):
        path.write_text("one\nhalf\nlast")
        run.registration.close()

    monkeypatch.setattr("everstep.cli.time.sleep", lambda seconds: next(script)())
    done = everstep("logs", "gpt", "--follow")
    assert done.stdout.splitlines() == ["rank-0.1 | one", "rank-0.1 | half", "rank-0.1 | last"]


def test_doctor_says_what_to_fix(state, monkeypatch):
    done = everstep("doctor")
    assert "loopback" in done.stdout
    looks = {look["name"]: look for look in json.loads(everstep("doctor", "--json").stdout)}
    assert set(looks) >= {"python", "torch", "ray", "shared memory", "cores", "loopback", "state folder"}
    state.root.parent.mkdir(exist_ok=True)
    (state.root.parent / "file").write_text("")
    monkeypatch.setenv("EVERSTEP_STATE", str(state.root.parent / "file" / "x"))
    done = everstep("doctor")
    assert done.exit_code == 1
    assert "fix: correct its rights, or set EVERSTEP_STATE" in done.stdout


def test_a_terminal_shows_progress_and_keeps_events():
    out = io.StringIO()
    shell = display.Terminal(Console(file=out, force_terminal=True, width=120, highlight=False))
    shell.status(Status(job="a", run="a", phase="training", step=5, steps=10, ranks=3, ranks_target=4))
    shell.event(Event(id=1, at_s=0.0, kind="lost", text="rank [1] gone"))
    shell.result(DONE)
    shell.close()
    text = out.getvalue()
    assert "step 5/10 | ranks 3 of 4 | training" in text
    assert "lost: rank [1] gone" in text
    assert "bits per byte" in text


def test_plain_progress_is_sparse():
    out, now = io.StringIO(), [0.0]
    shell = display.Plain(out, clock=lambda: now[0])
    for step in range(100):
        now[0] = step * 0.1
        phase = "training" if step < 99 else "finishing"
        shell.status(Status(job="a", run="a", phase=phase, step=step, steps=100))
    lines = out.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 0/100", "step 50/100", "step 99/100"]


def test_goodput_parts_add_up():
    rows = display.goodput_rows(DONE.goodput)
    assert sum(percent for _, _, percent in rows) == pytest.approx(100)
    assert display.goodput_rows(Goodput())[0] == ("productive", 0.0, 0.0)


# ---- everstep coordinator ---------------------------------------------------------------------------------


def test_a_coordinator_says_where_it_is_and_ends_when_it_is_asked_to(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    command = [sys.executable, "-m", "everstep", "coordinator", "--json"]
    environment = {**os.environ, "EVERSTEP_TOKEN_FILE": str(token)}
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["address"].startswith("127.0.0.1:")
        assert line["pid"] == process.pid
        process.send_signal(number)
        assert process.wait(10) == 0
        process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "EVERSTEP_TOKEN_FILE"),
        (["--token-file", "/nowhere"], "No such file"),
        (["--token-file", "TOKEN", "--bind", "here"], "HOST:PORT"),
    ],
)
def test_a_coordinator_that_cannot_start_says_why(arguments, text, tmp_path, monkeypatch):
    monkeypatch.delenv("EVERSTEP_TOKEN_FILE", raising=False)
    token = tmp_path / "token"
    token.write_text("secret")
    given = [str(token) if argument == "TOKEN" else argument for argument in arguments]
    done = CliRunner().invoke(app, ["coordinator", *given])
    assert done.exit_code == 2
    assert text in done.stderr

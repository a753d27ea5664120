"""Checkpoints of real runs: on a bucket, with storage that fails, asked for, the best, and weights to begin with."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from everstep.platform.job.errors import SpecError
from everstep.platform.job.spec import JobSpec
from everstep.storage.checkpoint import Checkpoint, find_newest
from everstep.storage.manifest import names, run_folder
from everstep.storage.stores.opening import folder_at
from everstep.storage.stores.port import Folder
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
)
from s3_server import Server, s3_server
from tcp_gate import tcp_gate


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server("bucket") as started:
        yield started


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


def left_over(root: Folder) -> list[str]:
    """What lies in a run's folder and belongs to no whole checkpoint, but for the epochs' claims."""
    found = []
    for entry in root.store.entries(root.path):
        if entry.name == "epochs":
            continue
        files = {e.name for e in root.store.entries(root.child(entry.name).path)}
        if "manifest.json" not in files:
            found.append(entry.name)
            continue
        listed = {file.name for file in Checkpoint.open(root.child(entry.name).url).manifest.files}
        found += [f"{entry.name}/{name}" for name in files - listed - {"manifest.json", "claim"}]
    return found


def steps_in(root: Folder) -> list[int]:
    return [name.step for name in names(root)]


# ---- on a bucket ----------------------------------------------------------------------------------------


def test_a_run_on_a_bucket_resumes_with_other_ranks_and_another_stage(bucket: Server) -> None:
    fault = {"at_step": 6, "rank": 1, "do": "kill"}
    first = job(steps=9, checkpoint={"to": "s3://bucket/a", "every": 4, "keep": 2}, faults=[fault], ranks=ranks(3))
    done = finish(first)
    assert_same_bits(done.result, first)
    root = run_folder("s3://bucket/a", first.name, first.run_name)
    assert len(steps_in(root)) == 2  # where that of step 4 took long, that of step 8 is late
    assert steps_in(root)[-1] == 9
    assert left_over(root) == []
    assert bucket.uploads("bucket") == []
    changes = {"steps": 14, "faults": [], "ranks": ranks(2), "layout": {"zero": 1}}
    again = JobSpec.parse(first.to_dict() | changes)
    more = finish(again)
    assert more.kinds("resume")[0].data["step"] == 9
    # The schedule reads the job's length, so the first nine steps of the longer job are others: what counts is that
    # state and losses go on from what was saved.
    assert more.result.steps == 14
    assert Checkpoint.open(more.result.checkpoints[-1]).state_sha256() == more.result.state_sha256


def test_a_stopped_run_on_a_bucket_ends_with_the_same_bits_on_three_ranks(bucket: Server, tmp_path: Path) -> None:
    gates = Gates(tmp_path / "gates")
    gates.shut(7)
    args = {"gates": str(gates.folder)}
    spec = job("Gated", args=args, ranks=ranks(2), checkpoint={"to": "s3://bucket/b", "every": 5})
    with live(spec) as run:
        run.until(lambda: run.step() == 7, "step 7")
        run.handle.stop("enough")
        run.until(lambda: run.events("stop"), "the stop")
        gates.open(7)
        stopped = run.result()
        assert (stopped.stopped, stopped.steps) == (True, 8)
    more = JobSpec.parse(spec.to_dict() | {"ranks": ranks(3), "layout": {"zero": 0}})
    assert_same_bits(finish(more).result, more, start=8)


# ---- storage that fails ---------------------------------------------------------------------------------


@dataclass
class Trouble:
    """Storage that can be made to fail, and what people are told then."""

    url: str
    begin: Callable[[], None]
    end: Callable[[], None]
    words: str


@pytest.fixture(params=["endpoint down", "no rights", "disk full"])
def trouble(
    request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Trouble]:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    port = urlsplit(server.url).port
    assert port is not None
    if request.param == "endpoint down":
        with tcp_gate(port) as gate:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{gate.port}")
            yield Trouble("s3://bucket/down", gate.close, gate.open, "Connection refused|could not connect|Could not")
    elif request.param == "no rights":
        try:
            yield Trouble("s3://bucket/denied", lambda: server.deny(True), lambda: server.deny(False), "AccessDenied")
        finally:
            server.deny(False)
    else:
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], check=False).returncode:
            pytest.skip("needs root, to make a small disk")
        filler = disk / "filler"

        def fill() -> None:
            free = os.statvfs(disk)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)

        try:
            yield Trouble(str(disk / "runs"), fill, filler.unlink, "No space left|no room left")
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_run_goes_on_while_storage_fails_and_saves_again_when_it_is_back(trouble: Trouble, tmp_path: Path) -> None:
    gates = Gates(tmp_path / "gates")
    for step in (3, 7):
        gates.shut(step)
    rules = {"to": trouble.url, "every": 2, "keep": 2}
    spec = job("Gated", args={"gates": str(gates.folder)}, checkpoint=rules)
    with live(spec) as run:
        run.until(lambda: run.events("checkpoint"), "the first checkpoint")
        trouble.begin()
        gates.open(3)
        told = run.until(lambda: checkpoint_findings(run), "the failure is told")[0]
        assert told.data["syndrome"] == "checkpoint"
        assert any(words in told.text for words in trouble.words.split("|")), told.text
        assert "the newest good one is of step 2, " in told.text
        assert told.text.endswith("tried again in 5 s")
        run.until(lambda: run.step() == 7, "training goes on")
        assert run.handle.result() is None
        trouble.end()
        assert run.handle.save() == "", "who asks does not wait for the pause"
        gates.open(7)
        result = run.result()
        assert_same_bits(result, spec)
        assert len(result.checkpoints) >= 3
    root = run_folder(trouble.url, spec.name, spec.run_name)
    newest = find_newest(root)
    assert newest.manifest is not None
    assert (newest.manifest.step, newest.rejected) == (14, ())
    assert len(steps_in(root)) == 2
    assert left_over(root) == []
    assert root.store.sweep(root.path) == 0, "nothing is left behind that listings do not show"


def checkpoint_findings(run: Live):
    """Of checkpoints that failed; that old ones could not be collected is told apart."""
    return [event for event in run.events("finding") if event.text.startswith("the checkpoint of step")]


def test_a_wrong_bucket_is_refused_before_anything_starts(bucket: Server, tmp_path: Path) -> None:
    done = ask("run", str(written(tmp_path, job_dict(checkpoint={"to": "s3://nobody"}))), check=False)
    assert done.returncode == 2
    assert "checkpoint.to" in done.stderr
    assert "no bucket 'nobody'" in done.stderr


def test_a_bucket_that_cannot_be_asked_what_is_there_starts_nothing(bucket: Server) -> None:
    spec = job(checkpoint={"to": "s3://bucket/c"})
    bucket.deny(True)
    try:
        with pytest.raises(SpecError, match=r"checkpoint\.to"):
            Live(spec)
    finally:
        bucket.deny(False)


def written(folder: Path, spec: dict) -> Path:
    import yaml

    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    return file


# ---- damage ---------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_passed_over_and_said_so(tmp_path: Path) -> None:
    spec = job(steps=6, ranks=ranks(2), checkpoint={"to": str(tmp_path), "every": 2})
    finish(spec)
    root = run_folder(str(tmp_path), spec.name, spec.run_name)
    newest = find_newest(root).folder
    assert newest is not None
    file = Path(newest.url, "rank-00001.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    again = finish(spec)
    start = again.kinds("resume")[0].data["step"]
    assert 2 <= start < 6
    assert_same_bits(again.result, spec, start=start)
    told = again.kinds("finding")[0].text
    assert "a checkpoint is passed over: step-6." in told
    assert "rank-00001.safetensors" in told
    assert "tensor '" in told


# ---- asked for, evaluated, kept -------------------------------------------------------------------------


def test_a_checkpoint_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    gates = Gates(tmp_path / "gates")
    gates.shut(3)
    spec = job_dict("Gated", args={"gates": str(gates.folder)}, checkpoint={"to": "runs", "every": 100})
    with cli(tmp_path, spec) as run:
        run.at_step(3)
        asked = ask("checkpoint", "now", run.name, "--wait", "0", "--json")
        assert '"asked": true' in asked.stdout
        gates.shut(6)
        gates.open(3)
        run.at_step(6)
        root = run_folder(str(tmp_path / "runs"), run.name, run.name)
        run.until(lambda: find_newest(root).manifest, "the checkpoint")
        assert steps_in(root) == [4]
        gates.open(6)
        assert run.wait() == 0
        refused = ask("checkpoint", "now", run.name, check=False)
        assert refused.returncode == 1
        shown = ask("checkpoint", "ls", str(tmp_path / "runs"), "--json").stdout
        assert '"step": 4' in shown
        assert '"step": 14' in shown
        verified = ask("checkpoint", "verify", root.url)
        assert verified.stdout.count(": whole, ") == 2
        same = ask("checkpoint", "diff", root.url, root.url)
        assert "every bit is equal" in same.stdout
        other = ask("checkpoint", "diff", root.child("step-4.epoch-1.attempt-0").url, root.url, check=False)
        assert other.returncode == 1
        assert "differs" in other.stdout


def test_evaluation_is_the_same_through_a_kill_and_the_best_is_kept(tmp_path: Path) -> None:
    rules = {"to": str(tmp_path), "every": 3, "keep": 1, "best": {"metric": "eval.right", "mode": "max"}}
    calm = job("Evaluated", steps=12, ranks=ranks(1), eval={"every": 3}, checkpoint=rules | {"keep": 9})
    quiet = finish(calm)
    scores = [event.data for event in quiet.kinds("evaluation")]
    assert [score["step"] for score in scores] == [3, 6, 9, 12]
    assert len({score["eval.right"] for score in scores}) > 1, "else nothing is chosen"
    best = max(scores, key=lambda score: (score["eval.right"], score["step"]))["step"]
    faults = [{"at_step": 7, "rank": 1, "do": "kill"}, {"at_step": 10, "rank": 0, "do": "kill"}]
    spec = job("Evaluated", steps=12, ranks=ranks(3), eval={"every": 3}, checkpoint=rules, faults=faults)
    hit = finish(spec)
    assert hit.result.state_sha256 == quiet.result.state_sha256
    told = [{tuple(event.data.items()) for event in run.kinds("evaluation")} for run in (hit, quiet)]
    assert told[0] == told[1]
    assert hit.result.metrics["eval.right"] == scores[-1]["eval.right"]
    assert set(steps_in(run_folder(str(tmp_path), spec.name, spec.run_name))) == {best, 12}
    without = job("Evaluated", steps=12, ranks=ranks(2))
    assert finish(without).result.state_sha256 == quiet.result.state_sha256, "evaluation changes no bit"


# ---- weights to begin with ------------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    spec = job(steps=6, checkpoint={"to": str(tmp_path), "every": 6}, ranks=ranks(2))
    first = finish(spec)
    source = first.result.checkpoints[-1]
    begin = {"to": str(tmp_path), "every": 100, "init_from": source}
    faults = [{"at_step": 3, "rank": 1, "do": "kill"}]
    more = [job(steps=5, seed=9, checkpoint=begin, ranks=ranks(n), faults=faults * (n > 1)) for n in (1, 3)]
    results = [finish(each).result for each in more]
    assert results[0].ok
    assert results[0].state_sha256 == results[1].state_sha256
    assert results[0].losses == results[1].losses
    cold = reference(job(steps=5, seed=9))
    assert results[0].losses[0] != cold.losses[0]
    wrong = {"to": str(tmp_path), "init_from": {"url": source, "names": {"^none": "x"}}}
    refused = ask("run", str(written(tmp_path, job_dict(checkpoint=wrong))), check=False)
    assert refused.returncode == 2
    assert "checkpoint.init_from" in refused.stderr
    assert "match no tensor" in refused.stderr
    assert folder_at(source).name.startswith("step-6.")

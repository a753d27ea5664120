"""What is refused before anything starts, through the command line, where tests/unit does not go that far."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from everstep.platform.job.spec import JobSpec
from everstep.storage.manifest import run_folder
from integration.harness import Finished, ask, assert_same_bits, cli, finish, job_dict, ranks, run_folders


def refusal(folder: Path, spec: dict[str, object], *options: str) -> str:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    done = ask("run", str(file), "--host", "processes", *options, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ready:" not in done.stdout
    assert run_folders(str(spec["name"])) == []
    return done.stderr


def test_shared_memory_and_checkpoint_folder_are_refused_in_one_message(tmp_path: Path):
    (tmp_path / "file").touch()
    message = refusal(tmp_path, job_dict(args={"width": 200_000}, checkpoint={"to": str(tmp_path / "file" / "runs")}))
    assert "2 problems" in message
    for words in (
        "/dev/shm",
        "too small for this job's snapshots",
        "--shm-size=",
        "checkpoint.to",
        "Not a directory",
    ):
        assert words in message


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path, Finished]:
    """A finished run with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("written")
    spec = job_dict(steps=8, checkpoint={"to": str(folder / "runs"), "every": 4}, ranks=ranks(2))
    return spec, folder, finish(JobSpec.parse(spec))


def test_a_changed_job_is_not_resumed_and_every_change_is_named(
    written: tuple[dict[str, object], Path, Finished], tmp_path: Path
):
    spec, _, _ = written
    args = {"samples": 511, "width": 160}
    message = refusal(tmp_path, {**spec, "lanes": 9, "seed": 4, "args": args, "steps": 20, "ranks": ranks(1)})
    assert "3 problems" in message
    for words in (
        "lanes = 9",
        "seed = 4",
        'args = {"samples": 511',
        "as in the checkpoint of step 8",
        "resume=never",
    ):
        assert words in message


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    written: tuple[dict[str, object], Path, Finished], tmp_path: Path
):
    spec, folder, done = written
    assert [Path(url).name.split(".")[0] for url in done.result.checkpoints] == ["step-4", "step-8"]
    newest = Path(done.result.checkpoints[-1])
    assert str(newest.parent) == run_folder(str(folder / "runs"), str(spec["name"]), str(spec["name"])).url
    data = newest / "rank-00000.safetensors"
    damaged = bytearray(data.read_bytes())
    damaged[-1] ^= 1
    data.write_bytes(damaged)
    with cli(tmp_path, spec) as run:
        assert run.wait() == 0, run.err
        assert f"a checkpoint is passed over: {newest.name}: " in run.out
        assert "rank-00000.safetensors" in str(run.result().findings[0].evidence)
        assert "resuming from step 4" in run.out
        assert_same_bits(run.result(), JobSpec.parse(spec), start=4)

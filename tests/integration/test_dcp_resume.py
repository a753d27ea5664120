"""A checkpoint that stock torch wrote under FSDP2 on two ranks goes on here on three, and ours goes on there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from everstep.platform.job.spec import JobSpec
from everstep.storage.checkpoint import Checkpoint
from integration.harness import ask, finish, ranks

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "tests" / "data" / "dcp"


def tiny(to: Path, run: str, count: int) -> JobSpec:
    task = f"task={ROOT / 'examples' / 'tiny.py'}:Mlp"
    changes = [f"checkpoint={{to: {to}, every: 100}}", f"run={run}", "faults=[]", task]
    spec = JobSpec.load(ROOT / "examples" / "tiny.yaml", changes)
    return spec.model_copy(update={"ranks": JobSpec.parse(spec.to_dict() | {"ranks": ranks(count)}).ranks})


@pytest.mark.slow
def test_a_dcp_checkpoint_of_two_ranks_resumes_on_three_and_goes_back(tmp_path: Path) -> None:
    results = {}
    for run, count in (("one", 1), ("three", 3)):
        url = tmp_path / "tiny" / run
        told = ask("checkpoint", "import", "dcp", str(STORED / "checkpoint"), str(url))
        assert "step-3.epoch-0.attempt-0" in told.stdout
        truth = load_file(STORED / "truth.safetensors")
        imported = Checkpoint.open(url)
        for key, value in truth.items():
            name, _, kind = key.partition("|")
            assert torch.equal(imported.read(name, kind or "param"), value), key
        done = finish(tiny(tmp_path, run, count))
        assert done.result.error is None
        assert done.kinds("resume")[0].data["step"] == 3
        assert (done.result.ok, done.result.steps, len(done.result.losses)) == (True, 40, 37)
        results[run] = done.result
    assert results["one"].state_sha256 == results["three"].state_sha256
    assert results["three"].losses[-1] < results["three"].losses[0] < 1.8, "it went on from what was trained"

    back, out = tmp_path / "back", tmp_path / "out.safetensors"
    ask("checkpoint", "export", results["three"].checkpoints[-1], "dcp", str(back))
    command = [sys.executable, str(STORED / "load.py"), "2", str(back), str(out)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    ours, there = Checkpoint.open(results["three"].checkpoints[-1]), load_file(out)
    assert len(there) == len(ours.index.tensors) == 24
    for key, value in there.items():
        name, _, kind = key.partition("|")
        assert torch.equal(ours.read(name, kind or "param"), value), key

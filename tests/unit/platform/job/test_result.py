"""The result file: names are frozen, writing is atomic."""

from __future__ import annotations

import json

import pytest

from everstep.platform.job.result import Failure, Finding, Goodput, Loss, Recovery, Rescale, RunResult

FULL = RunResult(
    job="gpt",
    run="gpt",
    ok=True,
    steps=3,
    state_sha256="ab" * 32,
    loss=Loss(first=5.0, last=1.25),
    losses=[5.0, 2.5, 1.25],
    recoveries=[Recovery(step=1, cause="killed", ranks=[1], detect_ms=12.5, resume_ms=300.0, steps_lost=1)],
    rescales=[Rescale(step=2, from_=4, to=2, pause_ms=20.0)],
    findings=[Finding(syndrome="crash", ranks=[1], links=[(0, 1)], evidence={"signal": 9})],
    error=Failure(kind="task", message="boom", rank=1, lane=2),
)


def test_the_names_of_a_result_are_frozen():
    plain = json.loads(FULL.to_json())
    assert set(plain) >= {
        "job",
        "run",
        "ok",
        "steps",
        "state_sha256",
        "loss",
        "losses",
        "wall_s",
        "ranks_final",
        "recoveries",
        "rescales",
        "snapshots",
        "checkpoints",
        "findings",
        "goodput",
    }
    assert set(plain["loss"]) == {"first", "last"}
    assert set(plain["recoveries"][0]) >= {"step", "cause", "ranks", "detect_ms", "resume_ms", "steps_lost"}
    assert set(plain["rescales"][0]) == {"step", "from", "to", "pause_ms", "cause"}
    assert set(plain["snapshots"]) >= {"count", "stall_ms_median", "stall_share"}
    assert set(plain["findings"][0]) == {
        "syndrome",
        "ranks",
        "links",
        "first_step",
        "detected_after_steps",
        "detected_after_ms",
        "evidence",
    }
    assert list(plain["goodput"]) == [
        "productive_s",
        "startup_s",
        "snapshot_s",
        "recovery_s",
        "lost_work_s",
        "waiting_s",
    ]


def test_a_result_survives_its_file(tmp_path):
    FULL.write(tmp_path / "deep" / "result.json")
    again = RunResult.from_json((tmp_path / "deep" / "result.json").read_bytes())
    assert again == FULL
    assert again.rescales[0].from_ == 4
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["result.json"]


def test_one_line_for_programs():
    assert "\n" not in FULL.to_json(indent=0)
    assert FULL.to_dict()["rescales"] == [{"step": 2, "from": 4, "to": 2, "pause_ms": 20.0, "cause": "scale"}]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        FULL.write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_defaults_are_not_shared():
    one = RunResult(job="a", run="a", ok=False, steps=0, state_sha256="")
    one.losses.append(1.0)
    assert RunResult(job="b", run="b", ok=False, steps=0, state_sha256="").losses == []
    assert one.goodput == Goodput()


def test_a_skipped_step_has_no_loss_and_survives_its_file():
    one = RunResult(job="a", run="a", ok=True, steps=2, state_sha256="ab", losses=[1.0, None], metrics={"x": None})
    assert RunResult.from_json(one.to_json()) == one

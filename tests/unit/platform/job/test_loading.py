"""YAML and overrides: read as a user means them, refused where that is unclear."""

from __future__ import annotations

import pytest

from everstep.platform.job.errors import SpecError
from everstep.platform.job.spec import JobSpec

TEXT = """
name: tiny
task: task.py:Tiny
steps: 10
train: {optimizer: {lr: 3e-4}}
args: {since: 2020-01-01}
checkpoint: {to: runs}
faults:
  - {at_step: 2, rank: 1, do: kill}
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(TEXT)
    return path


def test_numbers_without_a_dot_and_dates_are_what_they_look_like(job):
    spec = JobSpec.load(job)
    assert spec.train.optimizer.lr == 3e-4
    assert spec.args["since"] == "2020-01-01"


def test_overrides_are_yaml_and_reach_everywhere(job):
    spec = JobSpec.load(
        job,
        [
            "steps=20",
            "train.optimizer.lr=1e-2",
            "ranks={min: 1, max: 2}",
            "ranks.max=3",
            "args.new.deep=[1, x]",
            "faults.0.rank=2",
            "checkpoint=null",
            "checkpoint.to=elsewhere",
            "run=second",
        ],
    )
    assert spec.steps == 20
    assert spec.train.optimizer.lr == 0.01
    assert (spec.ranks.min, spec.ranks.max) == (1, 3)
    assert spec.args["new"] == {"deep": [1, "x"]}
    assert spec.faults[0].rank == 2
    assert spec.checkpoint.to == "elsewhere"
    assert spec.run_name == "second"
    assert JobSpec.load(job, ["faults=[]", "checkpoint=null"]).faults == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "allowed: FIELD=VALUE"),
        ("=3", "allowed: FIELD=VALUE"),
        ("a..b=3", "allowed: FIELD=VALUE"),
        ("args={", "not YAML"),
        ("steps.more=3", "steps is 10, which has no fields"),
        ("faults.4.rank=1", "faults is a list of 1"),
        ("faults.first.rank=1", "'first' is none of its places"),
        ("stepz=3", "did you mean `steps`?"),
    ],
)
def test_a_bad_override_is_refused_and_shown(job, override, words):
    with pytest.raises(SpecError) as caught:
        JobSpec.load(job, [override])
    assert words in str(caught.value)
    assert str(job) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not YAML"),
        ("- 1", "holds list, no map"),
        ("", "holds NoneType, no map"),
        ("name: a\nname: b\n", "the key 'name' stands here twice"),
        ("ranks: {min: 1, min: 2}", "the key 'min' stands here twice"),
        ("name: !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path, text, words):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        JobSpec.load(path)
    assert words in str(caught.value)


def test_anchors_and_merge_keys_work(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: t\ntask: a.py:A\nsteps: 9\nargs:\n  base: &b {x: 1, y: 2}\n  more: {<<: *b, y: 3}\n")
    assert JobSpec.load(path).args["more"] == {"x": 1, "y": 3}


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        JobSpec.load(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        JobSpec.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        JobSpec.load(tmp_path / "binary")


def test_a_key_that_is_no_text_inside_args_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: t\ntask: a.py:A\nsteps: 9\nargs: {a: {3: 4}}\n")
    with pytest.raises(SpecError, match=r"args\.a\.3 = "):
        JobSpec.load(path)

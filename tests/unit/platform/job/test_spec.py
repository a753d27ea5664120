"""The job file: its fields and defaults are frozen, and every wrong one is refused in one message."""

from __future__ import annotations

import pickle

import pytest

from everstep.platform.job.errors import SpecError
from everstep.platform.job.spec import Fault, JobSpec

GOOD = {"name": "tiny", "task": "task.py:Tiny", "steps": 10}

# Design §13. Outside programs rely on these names and defaults: a change here changes the public surface.
GOLDEN = {
    "name": "tiny",
    "run": None,
    "task": "task.py:Tiny",
    "args": {},
    "steps": 10,
    "seed": 0,
    "exact": True,
    "lanes": 8,
    "lane_batch": 4,
    "ranks": {"min": 2, "max": 4, "spares": 1},
    "priority": 0,
    "layout": {"zero": 2, "tensor": 1, "pipeline": 1},
    "resources": {"cpus": 1.0, "gpus": 0.0, "threads": 1, "memory": None, "custom": {}, "labels": {}},
    "runtime_env": {},
    "train": {
        "precision": "float32",
        "compile": False,
        "clip_norm": 1.0,
        "optimizer": {"lr": 3.0e-4, "weight_decay": 0.1},
        "warmup": 20,
    },
    "data": {"workers": 0, "prefetch": 2},
    "eval": {"every": 0},
    "snapshot": {"every": "auto", "share": 0.01, "parity": 1, "domain": "auto", "redundancy": "parity"},
    "checkpoint": {
        "to": "runs",
        "every": 100,
        "keep": 3,
        "keep_every": 0,
        "best": None,
        "resume": "auto",
        "init_from": None,
    },
    "limits": {"wall": None, "user": 0, "infrastructure": 100, "preemption": -1, "nonfinite": 10},
    "timeouts": {"frozen_s": 2.0, "stall_s": 60.0},
    "log": ["jsonl"],
    "faults": [],
}


def spec(**changes):
    return JobSpec.parse({**GOOD, **changes})


def refusals(**changes):
    """The problems of a wrong job, by field."""
    with pytest.raises(SpecError) as caught:
        spec(**changes)
    return {problem.field: problem for problem in caught.value.problems}


def test_the_fields_and_defaults_of_a_job_are_frozen():
    assert spec(checkpoint={"to": "runs"}).to_dict() == GOLDEN
    assert spec().checkpoint is None


def test_the_fields_of_a_fault_are_frozen():
    assert list(Fault.model_fields) == [
        "at_step",
        "rank",
        "do",
        "phase",
        "factor",
        "steps",
        "wake_s",
        "seconds",
        "to",
    ]


def test_a_job_survives_yaml(tmp_path):
    first = spec(
        args={"deep": {"list": [1, 2.5, "x", None, True]}},
        checkpoint={"to": "runs"},
        faults=[{"at_step": 3, "rank": 1, "do": "slow", "factor": 3, "steps": 2}],
    )
    (tmp_path / "job.yaml").write_text(first.to_yaml())
    assert JobSpec.load(tmp_path / "job.yaml") == first


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"max": 1}, (1, 1)), ({"max": 8}, (2, 8)), ({"min": 1}, (1, 4)), ({"min": 6}, (6, 6)), ({}, (2, 4))],
)
def test_one_end_of_ranks_moves_the_other(given, expected):
    ranks = spec(ranks=given).ranks
    assert (ranks.min, ranks.max) == expected


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("lane", {"lane": 8}),
        ("ranks.spare", {"ranks": {"spare": 1}}),
        ("train.optimizer.beta", {"train": {"optimizer": {"beta": 1}}}),
        ("checkpoint.path", {"checkpoint": {"to": "x", "path": "y"}}),
        ("faults.0.when", {"faults": [{"at_step": 1, "rank": 0, "do": "kill", "when": 3}]}),
        ("name", {"name": "a/b"}),
        ("name", {"name": ".."}),
        ("name", {"name": ""}),
        ("name", {"name": 7}),
        ("run", {"run": "x" * 64}),
        ("task", {"task": "task.py"}),
        ("task", {"task": "task.py:not a name"}),
        ("args", {"args": [1]}),
        ("steps", {"steps": "200"}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": True}),
        ("steps", {"steps": 2.5}),
        ("steps", {"steps": None}),
        ("seed", {"seed": -1}),
        ("exact", {"exact": 1}),
        ("lanes", {"lanes": 0}),
        ("lane_batch", {"lane_batch": "4"}),
        ("ranks", {"ranks": 4}),
        ("ranks.min", {"ranks": {"min": 0}}),
        ("ranks.max", {"ranks": {"max": 3.5}}),
        ("ranks.spares", {"ranks": {"spares": -1}}),
        ("layout.zero", {"layout": {"zero": 4}}),
        ("resources.threads", {"resources": {"threads": 0}}),
        ("train.clip_norm", {"train": {"clip_norm": 0}}),
        ("train.clip_norm", {"train": {"clip_norm": float("nan")}}),
        ("train.precision", {"train": {"precision": "float8"}}),
        ("train.optimizer.lr", {"train": {"optimizer": {"lr": "fast"}}}),
        ("data.workers", {"data": {"workers": -1}}),
        ("snapshot.every", {"snapshot": {"every": "never"}}),
        ("snapshot.every", {"snapshot": {"every": 0}}),
        ("checkpoint.every", {"checkpoint": {"to": "x", "every": 0}}),
        ("checkpoint.resume", {"checkpoint": {"to": "x", "resume": "maybe"}}),
        ("limits.wall", {"limits": {"wall": 0}}),
        ("limits.nonfinite", {"limits": {"nonfinite": 0}}),
        ("timeouts.frozen_s", {"timeouts": {"frozen_s": 0}}),
        ("log", {"log": "jsonl"}),
        ("faults.0.do", {"faults": [{"at_step": 1, "rank": 0, "do": "explode"}]}),
        ("faults.0.phase", {"faults": [{"at_step": 1, "rank": 0, "do": "kill", "phase": "lunch"}]}),
        ("faults.1", {"faults": [{"at_step": 1, "rank": 0, "do": "kill"}, "kill"]}),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(field, changes):
    problem = refusals(**changes)[field]
    assert problem.allowed
    assert problem.fix
    value = changes
    for part in field.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    assert problem.value == value or value != value  # NaN


@pytest.mark.parametrize(
    ("field", "changes", "allowed"),
    [
        ("ranks.min", {"ranks": {"min": 4, "max": 2}}, "at most ranks.max, which is 2"),
        ("ranks.max", {"lanes": 3, "ranks": {"max": 4}}, "at most lanes, which is 3"),
        ("layout.zero", {"layout": {"zero": 3}}, "0, 1 or 2"),
        ("layout.tensor", {"layout": {"tensor": 2}}, "1"),
        ("layout.pipeline", {"layout": {"pipeline": 2}}, "1"),
        ("resources.gpus", {"resources": {"gpus": 1}}, "0"),
        ("train.precision", {"train": {"precision": "bfloat16"}}, "float32"),
        ("train.compile", {"train": {"compile": True}}, "false"),
        (
            "checkpoint.best.metric",
            {"checkpoint": {"to": "x", "best": {"metric": "eval.loss"}}},
            "a metric of training",
        ),
        ("snapshot.parity", {"snapshot": {"parity": 4}, "ranks": {"max": 4}}, "0 to 3 (4 failure domains"),
        ("snapshot.domain", {"snapshot": {"domain": "rack"}}, "auto, rank or node"),
        (
            "snapshot.redundancy",
            {"snapshot": {"redundancy": "shadow"}, "layout": {"zero": 0}},
            "parity, with layout.zero: 0",
        ),
        (
            "snapshot.parity",
            {"snapshot": {"redundancy": "shadow", "parity": 0}},
            "1, with snapshot.redundancy: shadow",
        ),
        (
            "snapshot.parity",
            {"snapshot": {"redundancy": "shadow", "parity": 2}},
            "1, with snapshot.redundancy: shadow",
        ),
        ("snapshot.share", {"snapshot": {"share": 0}}, "a number above 0, at most 1"),
        ("snapshot.share", {"snapshot": {"share": 1.01}}, "a number above 0, at most 1"),
        ("snapshot.redundancy", {"snapshot": {"redundancy": "twins"}}, "parity (of snapshots) or shadow"),
        ("log.1", {"log": ["jsonl", "wandb"]}, "jsonl"),
        (
            "timeouts.stall_s",
            {"timeouts": {"frozen_s": 5, "stall_s": 4}},
            "at least timeouts.frozen_s, which is 5",
        ),
        ("faults.0.at_step", {"faults": [{"at_step": 11, "rank": 0, "do": "kill"}]}, "0 to 10 (steps)"),
        ("faults.0.rank", {"faults": [{"at_step": 1, "rank": 4, "do": "kill"}]}, "0 to 3"),
        ("faults.0.rank", {"faults": [{"at_step": 1, "do": "kill"}]}, "a value, with do: kill"),
        ("faults.0.rank", {"faults": [{"at_step": 1, "rank": 1, "do": "scale", "to": 2}]}, "with do: kill"),
        ("faults.0.factor", {"faults": [{"at_step": 1, "rank": 1, "do": "slow"}]}, "a value"),
        (
            "faults.0.wake_s",
            {"faults": [{"at_step": 1, "rank": 1, "do": "kill", "wake_s": 1}]},
            "with do: freeze",
        ),
        ("faults.0.seconds", {"faults": [{"at_step": 1, "rank": 1, "do": "busy"}]}, "a value"),
        ("faults.0.to", {"faults": [{"at_step": 1, "do": "scale", "to": 5}]}, "2 to 4"),
    ],
)
def test_rules_across_fields_and_what_is_not_built_yet_are_refused(field, changes, allowed):
    problem = refusals(**changes)[field]
    assert problem.allowed.startswith(allowed)
    assert problem.fix


@pytest.mark.parametrize("zero", [1, 2])
def test_shadows_are_accepted_also_where_one_rank_may_be_left(zero):
    found = spec(snapshot={"redundancy": "shadow"}, layout={"zero": zero}, ranks={"min": 1})
    assert found.snapshot.redundancy == "shadow"


@pytest.mark.parametrize(
    "fault",
    [
        {"at_step": 10, "rank": 3, "do": "kill", "phase": "apply"},
        {"at_step": 1, "rank": 0, "do": "freeze", "wake_s": 0.5},
        {"at_step": 1, "rank": 0, "do": "slow", "factor": 3, "steps": 20},
        {"at_step": 1, "rank": 0, "do": "busy", "seconds": 5},
        {"at_step": 1, "do": "scale", "to": 2},
    ],
)
def test_every_kind_of_fault_is_accepted(fault):
    assert spec(faults=[fault]).faults[0].do == fault["do"]


def test_everything_wrong_comes_in_one_message():
    with pytest.raises(SpecError) as caught:
        JobSpec.parse({"nam": "x", "task": "t.py:T", "steps": "many", "ranks": {"min": "two"}}, "job.yaml")
    text = str(caught.value)
    assert text.startswith("job.yaml cannot run: 4 problems\n")
    assert "name is missing" in text
    assert 'nam = "x": no such field' in text
    assert "did you mean `name`?" in text
    assert 'steps = "many": this is text' in text
    assert "allowed: a whole number of 1 or more" in text
    assert "fix: for example `--set steps=200`" in text
    assert 'ranks.min = "two"' in text


def test_a_union_gives_one_problem_not_one_a_branch():
    with pytest.raises(SpecError) as caught:
        spec(snapshot={"every": "never"}, train={"clip_norm": "x"})
    assert [p.field for p in caught.value.problems] == ["train.clip_norm", "snapshot.every"]


def test_a_spec_error_is_a_value_error_and_pickles():
    with pytest.raises(ValueError, match="cannot run") as caught:
        spec(steps=0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.problems == caught.value.problems


def test_a_job_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        spec().steps = 3


def test_a_checkpoint_folder_is_relative_to_the_job_file(tmp_path):
    assert spec(checkpoint={"to": "runs"}).checkpoint_url(tmp_path) == str(tmp_path / "runs")
    assert spec(checkpoint={"to": "file:///a/b"}).checkpoint_url(tmp_path) == "/a/b"
    assert spec(checkpoint={"to": "s3://bucket/runs"}).checkpoint_url(tmp_path) == "s3://bucket/runs"
    assert spec().checkpoint_url(tmp_path) is None


def test_weights_to_begin_with_have_a_short_and_a_long_form():
    assert spec(checkpoint={"to": "x"}).checkpoint.init_from is None
    short = spec(checkpoint={"to": "x", "init_from": "y"}).checkpoint.init_from
    assert (short.url, short.names, short.missing) == ("y", {}, "error")
    long = spec(checkpoint={"to": "x", "init_from": {"url": "y", "names": {"a": "b"}, "missing": "keep"}})
    assert long.checkpoint.init_from.names == {"a": "b"}
    with pytest.raises(SpecError, match="init_from"):
        spec(checkpoint={"to": "x", "init_from": {"urls": "y"}})

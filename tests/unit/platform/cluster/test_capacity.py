"""Which jobs a cluster can never run, and what they are told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from everstep.platform.cluster.capacity import NodeFacts, NodeGroup, demand_of, matches, never_fits, ranks_on
from everstep.platform.job.spec import JobSpec

SMALL = NodeFacts("small", {"CPU": 4.0, "memory": 8.0 * 2**30, "node:10.0.0.1": 1.0})
LARGE = NodeFacts("large", {"CPU": 16.0, "GPU": 2.0, "memory": 64.0 * 2**30}, {"zone": "a"})


def job(least: int = 2, **resources: Any) -> JobSpec:
    return JobSpec.parse(
        {
            "name": "j",
            "task": "t.py:T",
            "steps": 1,
            "lanes": 64,
            "ranks": {"min": least, "max": max(least, 4)},
            "resources": resources,
        }
    )


@pytest.mark.parametrize(
    ("spec", "nodes"),
    [
        (job(2), [SMALL]),
        (job(20), [SMALL, LARGE]),
        (job(4, custom={}), [SMALL]),
        (job(1, cpus=16), [SMALL, LARGE]),
        (job(2, labels={"zone": "a"}), [SMALL, LARGE]),
        (job(10, cpus=0.4), [SMALL]),
        (job(1, memory=8 * 2**30), [SMALL]),
    ],
)
def test_what_fits_on_the_empty_cluster_is_not_refused(spec: JobSpec, nodes: list[NodeFacts]):
    assert never_fits(spec, nodes) == []


@pytest.mark.parametrize(
    ("spec", "nodes", "field", "said"),
    [
        (job(5), [SMALL], "ranks.min", "at most 4"),
        (job(2, cpus=3), [SMALL], "ranks.min", "at most 1"),
        (job(21), [SMALL, LARGE], "ranks.min", "at most 20"),
        (job(1, cpus=17), [SMALL, LARGE], "resources.cpus", "at most 16 CPU"),
        (job(1, custom={"tpu": 1}), [SMALL], "resources.custom.tpu", "no node has any tpu"),
        (job(1, memory=65 * 2**30), [SMALL, LARGE], "resources.memory", "at most 64.0 GiB"),
        (job(1, labels={"zone": "b"}), [SMALL, LARGE], "resources.labels", "zone: a"),
        (job(17, labels={"zone": "a"}), [SMALL, LARGE], "ranks.min", "at most 16"),
    ],
)
def test_what_never_fits_is_refused_with_what_there_is(spec: JobSpec, nodes: list[NodeFacts], field: str, said: str):
    (problem,) = never_fits(spec, nodes)
    assert problem.field == field
    assert said in problem.allowed
    assert "can never fit" in problem.why
    if field != "resources.labels":
        assert "1 node with 4 CPU + 8.0 GiB memory" in problem.why


def test_what_the_autoscaler_may_start_counts():
    group = NodeGroup("workers", {"CPU": 8.0}, 2)
    assert never_fits(job(20), [SMALL], [group]) == []
    (problem,) = never_fits(job(21), [SMALL], [group])
    assert "at most 20" in problem.allowed
    assert "up to 2 of workers with 8 CPU" in problem.why
    assert never_fits(job(64), [SMALL], [NodeGroup("workers", {"CPU": 8.0}, -1)]) == []
    assert never_fits(job(5), [SMALL], [NodeGroup("workers", {"CPU": 8.0}, 0)])
    labelled = job(1, labels={"zone": "b"})
    assert never_fits(labelled, [SMALL], [group]) == [], "its labels are not known"
    assert never_fits(labelled, [SMALL], [NodeGroup("workers", {"CPU": 8.0}, 2, {"zone": "a"})])


def test_amounts_are_counted_as_ray_counts_them():
    assert ranks_on({"CPU": 0.3}, {"CPU": 0.9}) == 3
    assert ranks_on({}, {"CPU": 1.0}) == math.inf
    assert ranks_on({"CPU": 1, "GPU": 1}, {"CPU": 8.0, "GPU": 3.0}) == 3
    assert demand_of(job(1, cpus=0, memory=5, custom={"a": 2, "b": 0})) == {"memory": 5, "a": 2}


@pytest.mark.parametrize(
    ("wanted", "found", "fits"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", None, True),
        ("!a", "a", False),
        ("in(a, b)", "b", True),
        ("in(a, b)", "c", False),
        ("!in(a, b)", "c", True),
        ("!in(a, b)", "a", False),
    ],
)
def test_label_selectors_mean_what_they_mean_to_ray(wanted: str, found: str | None, fits: bool):
    assert matches({"zone": wanted}, {} if found is None else {"zone": found}) is fits

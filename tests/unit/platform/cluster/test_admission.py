"""Who may take part: ranks whose fingerprint is that of the first."""

from __future__ import annotations

from everstep.platform.cluster.admission import Admission

FIRST = {"torch": "2.13", "threads": "1", "gradient": "abc"}


def test_the_first_sets_the_measure_and_its_equals_are_welcome() -> None:
    admission = Admission({})
    assert admission.objection("rank-0.1", FIRST) == ""
    assert admission.objection("rank-1.1", dict(reversed(FIRST.items()))) == ""


def test_every_difference_is_named_with_both_values_and_both_ranks() -> None:
    admission = Admission({})
    admission.objection("rank-0.1", FIRST)
    said = admission.objection("rank-1.1", {"torch": "2.14", "gradient": "abc", "cpu": "AVX512"})
    for part in ("rank-1.1", "rank-0.1", "torch '2.14' instead of '2.13'", "threads None instead of '1'"):
        assert part in said
    assert "cpu 'AVX512' instead of None" in said
    assert "gradient" not in said


def test_who_was_refused_does_not_set_the_measure() -> None:
    admission = Admission({})
    admission.objection("rank-0.1", FIRST)
    assert admission.objection("rank-1.1", {}) != ""
    assert admission.objection("rank-2.1", FIRST) == ""


def test_a_checkpoints_fingerprint_binds_the_first_rank_too() -> None:
    admission = Admission(FIRST)
    said = admission.objection("rank-0.1", {**FIRST, "threads": "2"})
    assert "than the checkpoint: threads '2' instead of '1'" in said
    assert admission.objection("rank-1.1", FIRST) == ""
    assert admission.fingerprint == FIRST


def test_the_runs_fingerprint_is_that_of_its_first_rank() -> None:
    admission = Admission({})
    assert admission.fingerprint == {}
    admission.objection("rank-0.1", FIRST)
    admission.objection("rank-1.1", {"torch": "other"})
    assert admission.fingerprint == FIRST

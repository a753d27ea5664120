"""The one verdict of a step: loss, norm, clip, skip, and what was touched."""

from __future__ import annotations

import array
import itertools
import math
import random

import pytest

from everstep.platform.training.messages import LaneLoss, Vote
from everstep.platform.training.verdict import Progress, Rules, judge_step

INF, NAN = math.inf, math.nan


def doubles(*values: float) -> bytes:
    return array.array("d", values).tobytes()


def vote(*losses: LaneLoss, blocks: tuple[float, ...] = (1.0,), **fields) -> Vote:
    return Vote("step", losses=losses, norm_blocks=doubles(*blocks), **fields)


def judge(*votes: Vote, clip_norm: float | None = None, limit: int = 3, row: int = 0):
    lanes = sum(len(v.losses) for v in votes)
    named = {f"rank-{i}": v for i, v in enumerate(votes)}
    return judge_step(7, named, Rules(lanes, clip_norm, limit), Progress(row))


def test_the_loss_is_the_sum_over_lanes_divided_once_by_the_weight() -> None:
    verdict, progress = judge(vote(LaneLoss(0, 3.0, 2.0), LaneLoss(2, 1.0, 1.0)), vote(LaneLoss(1, 2.0, 5.0)))
    assert (verdict.outcome, verdict.loss, verdict.weight) == ("commit", 6.0 / 8.0, 8.0)
    assert progress == Progress(0)


def test_loss_sums_go_through_the_lane_tree_in_float32() -> None:
    """((2^24 + 1) + (1 + 1)) in float32 loses the first 1 and keeps the pair."""
    big = 2.0**24
    votes = [vote(LaneLoss(lane, value, 0.25)) for lane, value in enumerate([big, 1.0, 1.0, 1.0])]
    assert judge(*votes)[0].loss == big + 2


def test_who_voted_first_and_who_held_which_lane_does_not_matter() -> None:
    rng = random.Random(5)
    losses = [LaneLoss(lane, rng.uniform(-1, 1) * 10 ** rng.randint(-6, 6), rng.uniform(0, 9)) for lane in range(6)]
    blocks = [rng.uniform(0, 1) * 10.0 ** rng.randint(-12, 12) for _ in range(40)]
    expected, _ = judge(vote(*losses, blocks=tuple(blocks)), clip_norm=0.1)
    for _ in range(50):
        rng.shuffle(losses)
        rng.shuffle(blocks)
        cut, cut_blocks = rng.randint(0, 6), rng.randint(0, 40)
        votes = [
            vote(*losses[:cut], blocks=tuple(blocks[:cut_blocks])),
            vote(*losses[cut:], blocks=tuple(blocks[cut_blocks:])),
        ]
        assert judge(*votes, clip_norm=0.1)[0] == expected


def test_the_norm_is_that_of_the_mean_gradient() -> None:
    verdict, _ = judge(vote(LaneLoss(0, 1.0, 4.0), blocks=(9.0, 16.0)))
    assert verdict.grad_norm == 5.0 / 4.0


@pytest.mark.parametrize(("clip_norm", "factor"), [(None, 1.0), (5.0, 1.0), (2.0, 2.0 / (5.0 + 1e-6))])
def test_only_a_norm_above_the_limit_is_clipped(clip_norm: float | None, factor: float) -> None:
    verdict, _ = judge(vote(LaneLoss(0, 1.0, 1.0), blocks=(25.0,)), clip_norm=clip_norm)
    assert (verdict.grad_norm, verdict.clip_factor) == (5.0, factor)


@pytest.mark.parametrize(
    "bad",
    [
        vote(LaneLoss(0, NAN, 1.0)),
        vote(LaneLoss(0, INF, 1.0)),
        vote(LaneLoss(0, 1e39, 1.0)),  # beyond float32
        vote(LaneLoss(0, 1.0, 0.0)),  # no weight at all
        vote(LaneLoss(0, 1.0, 1.0), blocks=(INF,)),
        vote(LaneLoss(0, 1.0, 1.0), blocks=(NAN, 1.0)),
        vote(LaneLoss(0, 1.0, 1.0), blocks=(1.7e308, 1.7e308)),  # fsum overflows
        vote(LaneLoss(0, 1.0, 1.0), finite=False),
    ],
)
def test_a_step_that_is_not_finite_is_skipped(bad: Vote) -> None:
    good = vote(LaneLoss(1, 1.0, 0.0))
    for votes in itertools.permutations([bad, good]):
        verdict, progress = judge(*votes, row=1)
        assert (verdict.outcome, verdict.error, progress) == ("skip", "", Progress(2))


def test_a_commit_ends_a_row_of_skips_and_the_limit_ends_the_run() -> None:
    bad = vote(LaneLoss(0, NAN, 1.0))
    assert judge(bad, row=1)[0].outcome == "skip"
    assert judge(vote(LaneLoss(0, 1.0, 1.0)), row=2)[1] == Progress(0)
    failed, _ = judge(bad, row=2)
    assert failed.outcome == "failed"
    for part in ("3 steps in a row", "limits.nonfinite: 3", "step 7"):
        assert part in failed.error


def test_a_parameter_is_untouched_only_if_no_lane_touched_it() -> None:
    verdict, _ = judge(
        vote(LaneLoss(0, 1.0, 1.0), untouched=(1, 4, 7)),
        vote(LaneLoss(1, 1.0, 1.0), untouched=(4, 7, 9)),
        vote(LaneLoss(2, 1.0, 1.0), untouched=(2, 4, 7)),
    )
    assert verdict.untouched == (4, 7)


def test_a_buffer_is_changed_if_any_lane_changed_it() -> None:
    verdict, _ = judge(vote(LaneLoss(0, 1.0, 1.0), changed=(3, 1)), vote(LaneLoss(1, 1.0, 1.0), changed=(1, 0)))
    assert verdict.changed == (0, 1, 3)


def test_integer_buffers_that_differ_end_the_run() -> None:
    equal = [vote(LaneLoss(lane, 1.0, 1.0), integers="a") for lane in (0, 1)]
    assert judge(*equal)[0].outcome == "commit"
    own = vote(LaneLoss(0, 1.0, 1.0), integers="a", integers_agree=False)
    for votes in ([equal[0], vote(LaneLoss(1, 1.0, 1.0), integers="b")], [own, equal[1]], [own]):
        verdict, progress = judge(*votes, row=2)
        assert (verdict.outcome, progress) == ("failed", Progress(2))
        assert "integer buffers differ" in verdict.error


def test_metrics_are_averages_by_weight_over_the_lanes_that_have_them() -> None:
    verdict, _ = judge(
        vote(LaneLoss(0, 1.0, 1.0, {"acc": 1.0, "only": 5.0}), LaneLoss(1, 1.0, 3.0, {"acc": 0.0})),
        vote(LaneLoss(2, 1.0, 0.0, {"idle": 9.0})),
    )
    assert verdict.metrics["acc"] == 0.25
    assert verdict.metrics["only"] == 5.0
    assert math.isnan(verdict.metrics["idle"])


def test_a_step_is_protected_when_every_rank_has_sealed_it() -> None:
    for bad in (1.0, NAN):
        verdict, _ = judge(
            vote(LaneLoss(0, bad, 1.0), sealed_step=6), vote(LaneLoss(1, 1.0, 1.0), sealed_step=5, integers="")
        )
        assert verdict.protected_step == 5


def test_a_lane_that_was_voted_on_twice_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="lane 0"):
        judge(vote(LaneLoss(0, 1.0, 1.0)), vote(LaneLoss(0, 1.0, 1.0)))

"""From all votes to the one verdict of a step. Pure, no torch.

Norm blocks are summed with math.fsum, which rounds once, so their order and their owners do not matter.
Loss sums and weights go through the lane tree ([Note: lane tree]). The division by the weight happens once, at apply.
"""

from __future__ import annotations

import array
import math
from collections.abc import Mapping
from dataclasses import dataclass

from everstep.platform.training.lanes import sum_lanes
from everstep.platform.training.messages import LaneLoss, Verdict, Vote


@dataclass(frozen=True)
class Rules:
    """What the job says about verdicts. `clip_norm` None: no clipping."""

    lanes: int
    clip_norm: float | None
    nonfinite_limit: int


@dataclass(frozen=True)
class Progress:
    """What is carried from verdict to verdict."""

    nonfinite_in_a_row: int = 0


def judge_step(step: int, votes: Mapping[str, Vote], rules: Rules, progress: Progress) -> tuple[Verdict, Progress]:
    """`step` is the update that was voted on, from 1. A non-finite loss or gradient skips the step."""
    losses: dict[int, LaneLoss] = {}
    for name in sorted(votes):
        for lane_loss in votes[name].losses:
            assert lane_loss.lane not in losses, f"lane {lane_loss.lane} was voted on twice"
            losses[lane_loss.lane] = lane_loss
    integers = {vote.integers for vote in votes.values()}
    protected = min(vote.sealed_step for vote in votes.values())
    if len(integers) > 1 or not all(vote.integers_agree for vote in votes.values()):
        error = "integer buffers differ between lanes after the forward pass: they must not depend on the data"
        return Verdict("failed", protected_step=protected, error=error), progress
    loss_sum = sum_lanes({lane: item.sum for lane, item in losses.items()}, rules.lanes)
    weight = sum_lanes({lane: item.weight for lane, item in losses.items()}, rules.lanes)
    loss = loss_sum / weight if weight > 0 else math.nan
    blocks = array.array("d")
    for name in sorted(votes):
        blocks.frombytes(votes[name].norm_blocks)
    norm = _norm(blocks, weight)
    finite = all(vote.finite for vote in votes.values()) and math.isfinite(loss) and math.isfinite(norm)
    if not finite:
        row = progress.nonfinite_in_a_row + 1
        error = ""
        if row >= rules.nonfinite_limit:
            error = (
                f"loss or gradients were not finite {row} steps in a row (limits.nonfinite: "
                f"{rules.nonfinite_limit}), last at step {step}: lower train.optimizer.lr, set train.clip_norm, "
                "or look at the data of this step"
            )
        verdict = Verdict(
            "failed" if error else "skip",
            loss,
            weight=weight,
            grad_norm=norm,
            protected_step=protected,
            error=error,
        )
        return verdict, Progress(row)
    clip = 1.0
    if rules.clip_norm is not None and norm > rules.clip_norm:
        clip = rules.clip_norm / (norm + 1e-6)
    untouched = set.intersection(*(set(vote.untouched) for vote in votes.values()))
    changed = set().union(*(vote.changed for vote in votes.values()))
    verdict = Verdict(
        "commit",
        loss,
        metrics=_metrics(losses),
        weight=weight,
        grad_norm=norm,
        clip_factor=clip,
        untouched=tuple(sorted(untouched)),
        changed=tuple(sorted(changed)),
        protected_step=protected,
    )
    return verdict, Progress(0)


def average(votes: Mapping[str, Vote], lanes: int) -> dict[str, float]:
    """Of an evaluation: `eval.loss` and `eval.NAME` of the task's metrics; empty where the votes carry none."""
    found = {item.lane: item for name in sorted(votes) for item in votes[name].evaluation}
    if len(found) < lanes:
        return {}
    weight = sum_lanes({lane: item.weight for lane, item in found.items()}, lanes)
    total = sum_lanes({lane: item.sum for lane, item in found.items()}, lanes)
    metrics = {f"eval.{name}": value for name, value in _metrics(found).items()}
    return {"eval.loss": total / weight if weight > 0 else math.nan, **metrics}


def _norm(blocks: array.array[float], weight: float) -> float:
    try:
        return math.sqrt(math.fsum(blocks)) / weight if weight > 0 else math.nan
    except (OverflowError, ValueError):  # fsum of inf and -inf, or beyond the largest float
        return math.inf


def _metrics(losses: Mapping[int, LaneLoss]) -> dict[str, float]:
    """Averages over lanes by weight; only shown, never part of the state."""
    names = sorted({name for item in losses.values() for name in item.metrics})
    averages = {}
    for name in names:
        having = [losses[lane] for lane in sorted(losses) if name in losses[lane].metrics]
        weight = math.fsum(item.weight for item in having)
        averages[name] = (
            math.fsum(item.metrics[name] * item.weight for item in having) / weight if weight else math.nan
        )
    return averages

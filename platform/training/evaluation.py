"""Evaluation of the committed state, cut over lanes: the same number whatever ranks there are.

Lane l takes the batches l, l + V, l + 2V, … of the evaluation data, in order; a last batch that is not whole is left
out. Nothing of the training state changes: no gradients, modules in evaluation mode, buffers put back, randomness
keyed apart from training's. Belongs to the training thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from everstep.platform.training.conductor import ViewOver
from everstep.platform.training.messages import LaneLoss
from everstep.platform.training.randomness import KeyedRandomness
from everstep.platform.training.settings import Settings
from everstep.platform.training.shard import RankState
from everstep.platform.training.task import Dataset, LaneContext, Loss, Task, TaskRaised


def evaluate(
    settings: Settings,
    task: Task | None,
    state: RankState,
    lanes: Sequence[int],
    random: KeyedRandomness,
    over: Callable[[], bool],
) -> tuple[LaneLoss, ...]:
    """Sums and weights of these lanes at the state's stamp, where that step is due; a view's base step may be.

    `over` says that the view is, which ends it. Raises ViewOver, TaskRaised.
    """
    every, step = settings.eval_every, state.stamp
    data = task.eval_data if task is not None and every and step and step % every == 0 else None
    if task is None or data is None:
        return ()
    found = []
    with _evaluating(state.model), torch.no_grad():
        for lane in lanes:
            random.begin(step, settings.lanes + lane)  # no lane of training has this number
            try:
                found.append(_lane(settings, task, state.model, data, step, lane, over))
            except ViewOver:
                raise
            except Exception as error:
                what = (
                    f"the task raised in the evaluation of step {step}, lane {lane}: {type(error).__name__}: {error}"
                )
                raise TaskRaised(what, step, lane) from error
    state.begin_lane()
    return tuple(found)


def _lane(
    settings: Settings,
    task: Task,
    model: torch.nn.Module,
    data: Dataset,
    step: int,
    lane: int,
    over: Callable[[], bool],
) -> LaneLoss:
    size = settings.lane_batch
    total = weight = 0.0
    sums: dict[str, float] = {}
    ctx = LaneContext.keyed(settings.seed, step, settings.lanes + lane)
    for batch in range(lane, len(data) // size, settings.lanes):
        if over():
            raise ViewOver
        samples = [data[index] for index in range(batch * size, (batch + 1) * size)]
        value = Loss.of(task.evaluate(model, task.collate(samples), ctx), size)
        heavy = float(value.weight)
        total += float(value.sum)
        weight += heavy
        for name, metric in value.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(metric) * heavy
    return LaneLoss(lane, total, weight, {name: metric / weight for name, metric in sums.items()} if weight else {})


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Each module's own mode is put back: a task may keep some of them in evaluation mode for good."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Every example job is valid, its task can be built, and a few steps of plain PyTorch lower its loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import everstep as es
from everstep.platform.training.task import TaskContext, TrainSettings
from everstep.platform.training.task_loader import load_task

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL_GPT = {"layers": 1, "width": 32, "heads": 2, "context": 32, "max_bytes": 200_000}


def _train(task: es.Task, steps: int) -> list[float]:
    """A loop as plain as can be: the loss of each step over all lanes."""
    torch.manual_seed(task.seed)
    model, losses = task.model(), []
    optimizer = task.optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    for step in range(steps):
        lanes = []
        for lane in range(task.lanes):
            batch = task.collate([task.data[i] for i in task.sample(step, lane)])
            value = task.loss(model, batch, es.LaneContext.keyed(task.seed, step, lane))
            lanes.append(es.Loss.of(value, task.lane_batch))
        mean = torch.stack([loss.sum for loss in lanes]).sum() / sum(float(loss.weight) for loss in lanes)
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        losses.append(mean.item())
    return losses


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_job_file_is_valid_and_names_a_task_that_exists(path: Path):
    spec = es.JobSpec.load(path)
    task = load_task(spec.task, path.parent, spec.args, TaskContext.of(spec))
    assert len(task.data) > task.lanes * task.lane_batch
    assert task.model().training


def test_the_main_job_is_of_the_size_it_says():
    spec = es.JobSpec.load(EXAMPLES / "gpt.yaml")
    task = load_task(spec.task, EXAMPLES, spec.args, TaskContext.of(spec))
    assert sum(p.numel() for p in task.model().parameters()) == pytest.approx(1.85e6, rel=0.01)
    assert {fault.do for fault in spec.faults} == {"kill", "freeze"}


@pytest.mark.parametrize(
    ("task", "args", "steps", "gain"),
    [
        ("tiny.py:Mlp", {}, 60, 0.3),
        ("tiny.py:Norm", {}, 30, 0.3),
        ("tiny.py:Tokens", {}, 40, 0.3),
        ("gpt.py:GPT", SMALL_GPT, 40, 0.3),
    ],
)
def test_a_task_learns(task: str, args: dict[str, object], steps: int, gain: float):
    train = TrainSettings({"lr": 5e-3, "weight_decay": 0.1})
    context = TaskContext(seed=1, steps=steps, lanes=4, lane_batch=8, train=train)
    built = load_task(task, EXAMPLES, args, context)
    losses = _train(built, steps)
    assert sum(losses[-5:]) / 5 < losses[0] * (1 - gain)


def test_the_lanes_of_tokens_are_very_uneven_and_some_are_empty():
    task = load_task("tiny.py:Tokens", EXAMPLES, {}, TaskContext(lanes=8, lane_batch=1))
    model = task.model()
    weights = [
        float(task.loss(model, task.collate([task.data[i] for i in task.sample(step, lane)]), None).weight)
        for step in range(8)
        for lane in range(8)
    ]
    assert min(weights) == 0.0
    assert max(weights) > 4 * sum(weights) / len(weights)


def test_a_head_count_that_does_not_fit_is_refused():
    task = load_task("gpt.py:GPT", EXAMPLES, {"heads": 5}, TaskContext())
    with pytest.raises(ValueError, match=r"args\.heads: 5 does not divide args\.width \(192\)"):
        task.model()

"""Evaluation over lanes: one number whoever holds them, and nothing of the training state is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import everstep as es
from everstep.platform.training.conductor import ViewOver
from everstep.platform.training.evaluation import evaluate
from everstep.platform.training.randomness import KeyedRandomness
from everstep.platform.training.session import Session
from everstep.platform.training.settings import Settings
from everstep.platform.training.task import TaskContext, TaskRaised

LANES = 4
SETTINGS = Settings(steps=4, lanes=LANES, lane_batch=2, eval_every=2)


class Task(es.Task):
    def model(self) -> torch.nn.Module:
        layers = (torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 1))
        return torch.nn.Sequential(*layers)

    def dataset(self) -> Any:
        return torch.randn(64, 3, generator=torch.Generator().manual_seed(1))

    def eval_dataset(self) -> Any:
        return torch.randn(23, 3, generator=torch.Generator().manual_seed(2))

    def loss(self, model: torch.nn.Module, batch: Any, ctx: es.LaneContext) -> Any:
        return model(batch).square().mean()

    def evaluate(self, model: torch.nn.Module, batch: Any, ctx: es.LaneContext) -> es.Loss:
        assert not torch.is_grad_enabled()
        value = model(batch).square()
        return es.Loss(value.sum(), len(batch), {"half": 0.5, "noise": float(torch.rand(1, generator=ctx.generator))})


def session(task: Task) -> Session:
    torch.manual_seed(0)
    model = task.model()
    return Session(model, torch.optim.AdamW(model.parameters()), settings=SETTINGS, task=task)


def run(made: Session, task: Task, lanes, over=lambda: False, step: int = 2):
    made.state.stamp = step
    random = KeyedRandomness(made.model, 0)
    try:
        return evaluate(SETTINGS, task, made.state, lanes, random, over)
    finally:
        random.remove()


def test_the_lanes_give_the_same_numbers_whoever_computes_them() -> None:
    task = Task({}, TaskContext(lanes=LANES, lane_batch=2))
    with session(task) as made:
        whole = run(made, task, range(LANES))
        parts = [part for lanes in ([2, 0], [3], [1]) for part in run(made, task, lanes)]
        assert sorted(parts, key=lambda part: part.lane) == list(whole)
        assert sum(part.weight for part in whole) == 22, "the last batch is not whole"
        assert {part.metrics["half"] for part in whole} == {0.5}


def test_the_state_and_the_modes_of_the_modules_stay() -> None:
    task = Task({}, TaskContext(lanes=LANES, lane_batch=2))
    with session(task) as made:
        made.model[2].eval()
        before = {name: value.clone() for name, value in made.model.state_dict().items()}
        modes = [module.training for module in made.model.modules()]
        run(made, task, range(LANES))
        assert [module.training for module in made.model.modules()] == modes == [True, True, True, False, True]
        assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_it_is_done_where_it_is_due_and_nowhere_else() -> None:
    task = Task({}, TaskContext(lanes=LANES, lane_batch=2))
    with session(task) as made:
        assert [bool(run(made, task, [0], step=step)) for step in range(5)] == [False, False, True, False, True]
        assert evaluate(Settings(steps=4, lanes=LANES), task, made.state, [0], made._random, lambda: False) == ()


def test_a_view_that_is_over_ends_it_and_an_error_of_the_task_is_told_as_its_own() -> None:
    task = Task({}, TaskContext(lanes=LANES, lane_batch=2))
    with session(task) as made:
        asked = iter([False, False, True])
        with pytest.raises(ViewOver):
            run(made, task, [0], over=lambda: next(asked))
        task.collate = lambda samples: 1 / 0
        with pytest.raises(TaskRaised, match="evaluation of step 2, lane 3: ZeroDivisionError"):
            run(made, task, [3])
        assert made.model.training


def test_a_session_by_itself_trains_to_the_same_bits_with_and_without_it() -> None:
    hashes = []
    for every in (0, 2):
        task = Task({}, TaskContext(lanes=LANES, lane_batch=2))
        torch.manual_seed(0)
        model = task.model()
        settings = Settings(steps=4, lanes=LANES, lane_batch=2, eval_every=every)
        with Session(model, torch.optim.AdamW(model.parameters()), settings=settings, task=task) as made:
            for _ in made.steps():
                for lane in made.lanes():
                    made.backward(lane, task.loss(model, made.batch(lane), made.context(lane)))
                made.commit()
            hashes.append(made.state_lines)
    assert hashes[0] == hashes[1]

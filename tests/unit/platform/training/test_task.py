"""The Task API's own part: arguments, sampling, schedule, optimizer, losses and keyed randomness."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch

import everstep as es
from everstep.platform.job.spec import JobSpec
from everstep.platform.training.task import (
    TaskArgumentError,
    TaskContext,
    TrainSettings,
    keyed_seed,
)


class Counted(es.Task):
    """A task that counts how often its data is made."""

    defaults: ClassVar = {"size": 10, "rate": 0.5, "name": None, "deep": False}
    made = 0

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 1)

    def dataset(self) -> es.Dataset:
        self.made += 1
        return list(range(self.args.size))

    def loss(self, model: torch.nn.Module, batch: Any, ctx: es.LaneContext) -> torch.Tensor:
        return model(batch).mean()


def _task(args: dict[str, Any] | None = None, **context: Any) -> Counted:
    return Counted(args, TaskContext(**context))


def test_arguments_are_read_as_attributes_and_as_a_dictionary():
    task = _task({"size": 3, "rate": 1})
    assert (task.args.size, task.args["rate"], task.args.get("name"), task.args.deep) == (3, 1, None, False)
    assert pickle.loads(pickle.dumps(task.args)).size == 3
    with pytest.raises(AttributeError, match=r"no args\.width \(it has: deep, name, rate, size\)"):
        _ = task.args.width


def test_without_defaults_every_argument_is_taken():
    class Free(Counted):
        defaults: ClassVar = {}

    assert Free({"anything": [1]}).args.anything == [1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"sise": 3}, r"args\.sise: 3 is no argument of Counted; allowed: deep, name, rate, size"),
        ({"size": "3"}, r"args\.size: '3' must be of the type of its default 10 \(int\)"),
        ({"size": True}, r"args\.size: True must be"),
        ({"size": 2.5}, r"args\.size: 2\.5 must be"),
        ({"rate": "high"}, r"args\.rate: 'high' must be .* 0\.5 \(float\)"),
        ({"deep": 1}, r"args\.deep: 1 must be"),
    ],
)
def test_a_wrong_argument_is_named(args: dict[str, Any], says: str):
    with pytest.raises(TaskArgumentError, match=says):
        _task(args)


def test_the_context_comes_from_the_job():
    spec = JobSpec.parse(
        {
            "name": "t",
            "task": "t.py:T",
            "steps": 9,
            "seed": 4,
            "lanes": 6,
            "lane_batch": 2,
            "train": {"optimizer": {"lr": 0.5, "weight_decay": 0.0}, "warmup": 3, "clip_norm": None},
        }
    )
    task = Counted({}, TaskContext.of(spec))
    assert (task.seed, task.steps, task.lanes, task.lane_batch) == (4, 9, 6, 2)
    assert (task.train.optimizer["lr"], task.train.warmup, task.train.clip_norm) == (0.5, 3, None)


def test_sampling_covers_every_sample_once_an_epoch_over_all_lanes():
    task = _task({"size": 24}, seed=3, lanes=4, lane_batch=2)
    epochs = [
        [index for step in range(start, start + 3) for lane in range(4) for index in task.sample(step, lane)]
        for start in (0, 3)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
    assert task.sample(1, 2) == _task({"size": 24}, seed=3, lanes=4, lane_batch=2).sample(1, 2)
    assert task.made == 1


def test_batches_run_over_the_end_of_an_epoch():
    task = _task({"size": 5}, lanes=1, lane_batch=3)
    drawn = [index for step in range(5) for index in task.sample(step, 0)]
    assert sorted(drawn[0:5]) == sorted(drawn[5:10]) == sorted(drawn[10:15]) == list(range(5))


def test_the_default_batch_stacks_tensors_tuples_and_dictionaries():
    samples = [({"x": torch.tensor([i, i])}, i) for i in range(3)]
    batch, numbers = _task().collate(samples)
    assert batch["x"].shape == (3, 2)
    assert numbers.tolist() == [0, 1, 2]


def test_the_schedule_warms_up_and_falls_to_a_tenth():
    task = _task(steps=110, train=TrainSettings(warmup=10))
    factors = [task.schedule(step) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1.0
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))
    assert task.schedule(60) == pytest.approx(0.55)
    assert task.schedule(110) == pytest.approx(0.1)
    assert task.schedule(500) == pytest.approx(0.1)  # a run that goes on longer than planned
    assert _task(steps=1, train=TrainSettings(warmup=0)).schedule(0) == 1.0
    assert _task(steps=5, train=TrainSettings(warmup=5)).schedule(5) == 1.0


def test_the_default_optimizer_is_adamw_with_the_jobs_settings():
    task = _task(train=TrainSettings({"lr": 0.25, "weight_decay": 0.5, "betas": [0.8, 0.9]}))
    optimizer = task.optimizer(task.model().parameters())
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.25, 0.5, (0.8, 0.9))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"momentum": 0.9}, r"train\.optimizer\.momentum: 0\.9 is no setting of AdamW; allowed: .*lr"),
        ({"lr": -1.0}, r"train\.optimizer: \{'lr': -1\.0\} is refused by AdamW: Invalid learning rate"),
    ],
)
def test_a_wrong_optimizer_setting_is_named(settings: dict[str, Any], says: str):
    task = _task(train=TrainSettings(settings))
    with pytest.raises(TaskArgumentError, match=says):
        task.optimizer(task.model().parameters())


def test_a_plain_loss_is_the_mean_over_the_lane():
    loss = es.Loss.of(torch.tensor(2.5), samples=4)
    assert (float(loss.sum), loss.weight, dict(loss.metrics)) == (10.0, 4.0, {})
    same = es.Loss(torch.tensor(3.0), 7, {"bits": 1.0})
    assert es.Loss.of(same, samples=4) is same


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match=r"must return a torch\.Tensor or an es\.Loss, not float"):
        es.Loss.of(1.0, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must return a scalar.* shape \(3,\)"):
        es.Loss.of(torch.zeros(3), 4)
    with pytest.raises(ValueError, match=r"Loss\.sum must hold one number.*\(2,\)"):
        es.Loss(torch.zeros(2), 1)
    with pytest.raises(ValueError, match=r"Loss\.weight must hold one number.*\(2,\)"):
        es.Loss(torch.zeros(()), torch.zeros(2))


def test_evaluation_uses_the_training_loss_unless_a_task_says_otherwise():
    task = _task(lane_batch=3)
    loss = task.evaluate(task.model(), torch.zeros(3, 2), es.LaneContext.keyed(0, 0, 0))
    assert loss.weight == 3.0
    assert task.eval_dataset() is None


def test_a_lanes_randomness_depends_on_seed_step_and_lane_only():
    def draw(seed: int, step: int, lane: int) -> list[float]:
        return torch.rand(4, generator=es.LaneContext.keyed(seed, step, lane).generator).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in [(1, 2, 3), (2, 1, 3), (1, 3, 2), (12, 3, 0), (1, 23, 0)]}) == 5


def test_keyed_seeds_are_frozen():
    """They decide every run's dropout; a change has to be meant, and said in the change log."""
    assert keyed_seed(0, "lane", 1, 2) == 955039979782319274
    assert 0 <= keyed_seed(2**63 - 1, "x") < 2**63

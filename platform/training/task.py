"""What a user writes to have a model trained: the public Task API.

Purpose: `Task` (three functions and some with defaults), `Loss`, `LaneContext`, `Dataset`, `CommitEvent`, and
the values a task is built with (`TaskContext`). Owns no state beyond one task's arguments and its data set.
Thread-safety: a task belongs to one rank process; the engine calls it from the training thread only.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch.utils.data import default_collate

from everstep.storage.datasets.order import Order, order_of

if TYPE_CHECKING:
    from everstep.platform.job.spec import JobSpec


class TaskError(ValueError):
    """A task or its arguments are wrong; the base of every such error.

    TaskError
      TaskArgumentError    a field of `args:` or of `train.optimizer:` that the task cannot take
      TaskImportError      the task cannot be found or imported (everstep.platform.training.task_loader)
    """


class TaskRaised(Exception):
    """The task's own code raised; `__cause__` is what it raised. `lane` is -1 outside of a lane."""

    def __init__(self, what: str, step: int, lane: int) -> None:
        super().__init__(what)
        self.step = step
        self.lane = lane


class TaskArgumentError(TaskError):
    """A field of the job file that this task cannot take; names field, value and what is allowed."""


@runtime_checkable
class Dataset(Protocol):
    """Samples by number: random access, so that a loader has no state to save or to restore."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class TrainSettings:
    """The part of the job's `train:` section that a task may read; the defaults are the job file's."""

    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"lr": 3.0e-4, "weight_decay": 0.1})
    warmup: int = 20
    clip_norm: float | None = 1.0


@dataclass(frozen=True)
class TaskContext:
    """What the job tells its task: fixed for the run's life, equal on every rank."""

    seed: int = 0
    steps: int = 1
    lanes: int = 1
    lane_batch: int = 1
    train: TrainSettings = field(default_factory=TrainSettings)

    @staticmethod
    def of(spec: JobSpec) -> TaskContext:
        """The context of a job's task."""
        train = TrainSettings(spec.train.optimizer.model_dump(), spec.train.warmup, spec.train.clip_norm)
        return TaskContext(spec.seed, spec.steps, spec.lanes, spec.lane_batch, train)


@dataclass(frozen=True)
class Loss:
    """One lane's loss as a sum and its weight, for losses that are not a mean over equal samples.

    `sum`: scalar tensor with gradient, the sum over the lane's batch. `weight`: how many it is a sum of
    (tokens, samples); a number or a scalar tensor without gradient; zero is allowed (a lane of padding). Sums
    and weights of all lanes go through the lane tree and are divided once. `metrics`: this lane's averages by
    name, shown as averages over lanes, each lane counting by its weight; they never influence training.
    """

    sum: torch.Tensor
    weight: torch.Tensor | float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sum.numel() != 1:
            raise ValueError(f"Loss.sum must hold one number, not a tensor of shape {tuple(self.sum.shape)}")
        if isinstance(self.weight, torch.Tensor) and self.weight.numel() != 1:
            raise ValueError(f"Loss.weight must hold one number, not shape {tuple(self.weight.shape)}")

    @staticmethod
    def of(value: torch.Tensor | Loss, samples: int) -> Loss:
        """What `Task.loss` returned, as a Loss; a plain tensor is the mean over the lane's `samples`.

        Raises TypeError for anything that is neither, ValueError for a tensor of more than one number.
        """
        if isinstance(value, Loss):
            return value
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"Task.loss must return a torch.Tensor or an es.Loss, not {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(
                "Task.loss must return a scalar, the mean over the lane's batch,"
                f" not a tensor of shape {tuple(value.shape)}"
            )
        return Loss(sum=value * samples, weight=float(samples))


@dataclass(frozen=True)
class LaneContext:
    """Which lane of which step is computed. `generator`: CPU randomness keyed by (seed, step, lane)."""

    step: int
    lane: int
    generator: torch.Generator

    @staticmethod
    def keyed(seed: int, step: int, lane: int) -> LaneContext:
        """The context of one lane; the same numbers give a generator of the same state."""
        generator = torch.Generator()
        generator.manual_seed(keyed_seed(seed, "lane", step, lane))
        return LaneContext(step=step, lane=lane, generator=generator)


@dataclass(frozen=True)
class CommitEvent:
    """A step that is committed. `loss`: over all lanes, from the verdict; NaN or infinite when `skipped`."""

    step: int
    loss: float
    skipped: bool = False
    grad_norm: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Args(dict[str, Any]):
    """The job's `args:` as a dictionary that can also be read as attributes: `args.layers`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle and copy probe for these
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            known = ", ".join(sorted(self)) or "none"
            raise AttributeError(f"the job has no args.{name} (it has: {known})") from None


class Task(ABC):
    """A training task: model, data and loss, and how they are sampled, optimised and scheduled.

    A subclass names its arguments and their defaults in `defaults`; then an unknown or wrongly typed field of
    `args:` is refused. Without `defaults`, all arguments are taken as they are.

    The engine builds it as `cls(args, context)` in every rank, sets torch's random state from the seed before
    it calls `model()`, and never calls two methods at once.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, args: Mapping[str, Any] | None = None, context: TaskContext | None = None) -> None:
        """Raises TaskArgumentError for an argument that `defaults` does not allow."""
        self.context = context or TaskContext()
        self.args = _merged(type(self).__name__, self.defaults, args or {})

    @property
    def seed(self) -> int:
        return self.context.seed

    @property
    def steps(self) -> int:
        return self.context.steps

    @property
    def lanes(self) -> int:
        return self.context.lanes

    @property
    def lane_batch(self) -> int:
        return self.context.lane_batch

    @property
    def train(self) -> TrainSettings:
        return self.context.train

    @cached_property
    def data(self) -> Dataset:
        """The result of `dataset()`, made once; the engine and `sample` read this."""
        return self.dataset()

    @cached_property
    def eval_data(self) -> Dataset | None:
        """The result of `eval_dataset()`, made once."""
        return self.eval_dataset()

    @cached_property
    def _order(self) -> Order:
        return order_of(self.data, self.seed)

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """A new model on the CPU, initialised from torch's global random state only."""

    @abstractmethod
    def dataset(self) -> Dataset:
        """The training data. Called once; the same on every rank. Raises ValueError for unusable data."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Any, ctx: LaneContext) -> torch.Tensor | Loss:
        """The loss of one lane: a scalar tensor (mean over the lane's batch) or a Loss (sum and weight)."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """One batch of `lane_batch` samples; by default numbers and tensors are stacked along dimension 0."""
        return default_collate(list(samples))

    def sample(self, step: int, lane: int) -> list[int]:
        """The `lane_batch` sample indices of a lane: by default a shuffle, every sample once an epoch.

        Depends on seed, step and lane only. Epochs follow each other without a gap, so that the last batch of
        one may end in the next.
        """
        first = (step * self.lanes + lane) * self.lane_batch
        return [self._order.at(first + i) for i in range(self.lane_batch)]

    def optimizer(self, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
        """One optimizer, or several, over the model's parameters, which come in registration order.

        By default AdamW with `train.optimizer`. Raises TaskArgumentError for a setting AdamW does not have.
        """
        return adamw(params, self.train.optimizer)

    def schedule(self, step: int) -> float:
        """Factor on every learning rate at `step` (from 0): by default a linear warm-up over `train.warmup`
        steps, then a cosine from 1 to 0.1 at the job's last step."""
        warmup = self.train.warmup
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))

    def eval_dataset(self) -> Dataset | None:
        """Data to evaluate on every `eval.every` steps, or None for no evaluation; at least one batch."""
        return None

    def evaluate(self, model: torch.nn.Module, batch: Any, ctx: LaneContext) -> Loss:
        """The loss of one evaluation batch, by default that of training; called without gradients, with the model in
        evaluation mode. Its average is the metric `eval.loss`, those of its `metrics` are `eval.NAME`.
        """
        return Loss.of(self.loss(model, batch, ctx), self.lane_batch)

    def loop(self) -> None:
        """Your own training loop instead of the engine's: override it and use `es.Session(model, optimizer)`.

        It runs once in every rank process, with torch's random state set from the seed; the session in it takes
        steps, lanes and everything else from the job.
        """
        raise AssertionError("the engine calls this only where a task overrides it")

    def on_commit(self, event: CommitEvent) -> None:  # noqa: B027  # a hook: doing nothing is fine
        """Called after a step is committed, and never for an attempt that was aborted."""


def adamw(
    params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], settings: Mapping[str, Any]
) -> torch.optim.AdamW:
    """AdamW over parameters or groups, with the job's `train.optimizer` settings.

    Raises TaskArgumentError naming the setting that AdamW refuses.
    """
    allowed = {"lr", "betas", "eps", "weight_decay", "amsgrad"}
    for name, value in settings.items():
        if name not in allowed:
            raise TaskArgumentError(
                f"train.optimizer.{name}: {value!r} is no setting of AdamW; allowed: {', '.join(sorted(allowed))}"
            )
    values = dict(settings)
    try:
        if "betas" in values:
            values["betas"] = tuple(values["betas"])
        return torch.optim.AdamW(params, **values)
    except (TypeError, ValueError) as error:
        raise TaskArgumentError(f"train.optimizer: {dict(settings)!r} is refused by AdamW: {error}") from error


def keyed_seed(seed: int, *key: int | str) -> int:
    """63 bits that depend on seed and key only; the one way to derive randomness from a job's seed."""
    text = " ".join(str(part) for part in ("everstep key 1", seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _merged(task: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Args:
    if not defaults:
        return Args(given)
    for name, value in given.items():
        if name not in defaults:
            raise TaskArgumentError(
                f"args.{name}: {value!r} is no argument of {task}; allowed: {', '.join(sorted(defaults))}"
            )
        if not _fits(value, defaults[name]):
            raise TaskArgumentError(
                f"args.{name}: {value!r} must be of the type of its default {defaults[name]!r}"
                f" ({type(defaults[name]).__name__})"
            )
    return Args({**defaults, **given})


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has its default's kind; a default of None allows anything, an integer is a number."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))

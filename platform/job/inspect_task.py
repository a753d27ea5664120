"""Looks at a task in a process of its own, before any actor starts: the torch side of `check.py`.

Reads {"spec": …, "spec_dir": …} as JSON on stdin; writes {"facts": …} or {"problems": […]} on stdout.
Whatever the task itself prints goes to stderr. The model is built on the meta device, so its size costs no
memory; a model that cannot be is built on the CPU, with a note.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from everstep.platform.job import optimizer_check
from everstep.platform.job.errors import Problem, SpecError
from everstep.platform.job.facts import TaskFacts
from everstep.platform.job.rules import absolute
from everstep.platform.job.spec import JobSpec
from everstep.platform.training.task import Task, TaskContext, TaskError
from everstep.platform.training.task_loader import load_task
from everstep.platform.training.warm_start import WarmStartRefused, match, some, tensors_of
from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import StorageError

T = TypeVar("T")

# Errors of tasks start with the field they blame: "args.data: …".
_BLAMED = re.compile(r"^((?:args|train|task)(?:\.\w+)*): ")


class _Refused(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.render())
        self.problem = problem


def inspect_task(spec: JobSpec, spec_dir: Path) -> TaskFacts:
    """Builds everything that a rank would build, but no memory for it; raises SpecError.

    Data and model are both looked at before it gives up, so that one message names both.
    """
    try:
        look = _Looker(spec)
        task = look.during(
            "is imported and built", lambda: load_task(spec.task, spec_dir, spec.args, TaskContext.of(spec))
        )
    except _Refused as refused:
        raise SpecError([refused.problem]) from refused
    problems: list[Problem] = []
    samples = 0
    try:
        samples = look.data(task)
    except _Refused as refused:
        problems.append(refused.problem)
    try:
        model = look.model(task)
        params = look.parameters(model)
        kept, name = look.optimizer(task, params)
        look.initial_weights(model, spec_dir, own_loop=type(task).loop is not Task.loop)
    except _Refused as refused:
        raise SpecError([*problems, refused.problem]) from refused
    if problems:
        raise SpecError(problems)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return TaskFacts(
        parameters=sum(p.numel() for p in params.values()),
        state_bytes=_nbytes(params.values()) + kept + _nbytes(frozen) + _nbytes(model.buffers()),
        samples=samples,
        tensors=len(params),
        optimizer=name,
        notes=tuple(look.notes),
    )


class _Looker:
    """The looks, one a method; each raises _Refused. Collects notes."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.notes: list[str] = []
        self.values: dict[str, Any] = spec.to_dict()

    def refuse(self, field: str, allowed: str, fix: str, why: str) -> _Refused:
        value: Any = self.values
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return _Refused(Problem(field, value, allowed, fix, why))

    def during(self, what: str, call: Callable[[], T]) -> T:
        """Runs the task's own code; an exception in it becomes a problem with its traceback."""
        try:
            return call()
        except TaskError as error:
            raise self._blame(str(error), "") from error
        except ValueError as error:
            raise self._blame(str(error), _traceback(error)) from error
        except Exception as error:
            why = f"{type(error).__name__} while the task {what}: {error}\n{_traceback(error)}"
            raise self.refuse("task", "a task that can be built", "correct the task's code", why) from error

    def _blame(self, text: str, trace: str) -> _Refused:
        """Sorts an error text that names its field to that field, any other to `task`."""
        match = _BLAMED.match(text)
        if match:
            field = match.group(1)
            fix = "correct the name or the file" if field == "task" else f"set `{field}` in the job file"
            return self.refuse(field, "", fix, text[match.end() :])
        return self.refuse("task", "a task that can be built", "correct `args` or the task", f"{text}\n{trace}")

    def data(self, task: Task) -> int:
        """Makes the data set and one lane's batch of it; returns the number of samples."""
        self.values["args"] = dict(task.args)  # with the task's defaults, which errors may be about
        field = "args.data" if "data" in task.args else "task"
        try:
            data = task.data
            count = len(data)
        except (OSError, ValueError) as error:
            match = _BLAMED.match(str(error))
            why = str(error)[match.end() :] if match else f"{type(error).__name__}: {error}"
            raise self.refuse(
                match.group(1) if match else field,
                "data that exists and holds at least one sample",
                "give a folder, glob or file that exists and is not empty",
                why,
            ) from error
        except Exception as error:
            why = f"{type(error).__name__} in dataset(): {error}\n{_traceback(error)}"
            raise self.refuse(field, "a data set that can be made", "correct dataset()", why) from error
        if count < 1:
            raise self.refuse(field, "at least one sample", "give data that is not empty", "the data set is empty")
        if self.spec.eval.every:
            self.evaluation(task)
        self.during(
            "makes the first lane's batch",
            lambda: task.collate([task.data[index] for index in task.sample(0, 0)]),
        )
        factor = self.during("is asked for schedule(0)", lambda: float(task.schedule(0)))
        if not math.isfinite(factor):
            raise self.refuse(
                "task",
                "a finite number from schedule(step)",
                "correct schedule()",
                f"schedule(0) is {factor}",
            )
        return count

    def evaluation(self, task: Task) -> None:
        """Looks whether there is data to evaluate on, and makes the first batch of it."""
        data = self.during("makes its eval_dataset", lambda: task.eval_data)
        size = task.lane_batch
        if data is None or len(data) < size:
            raise self.refuse(
                "eval.every",
                "0, for a task without eval_dataset() or with less than a batch of it",
                "`--set eval.every=0`, or write eval_dataset()",
                "eval_dataset() gives None" if data is None else f"it has {len(data)} samples, a batch has {size}",
            )
        self.during("makes the first batch to evaluate", lambda: task.collate([data[i] for i in range(size)]))

    def model(self, task: Task) -> torch.nn.Module:
        """Builds the model on the meta device, or, when its code cannot, on the CPU."""
        torch.manual_seed(self.spec.seed)
        try:
            with torch.device("meta"):
                model = task.model()
        except (NotImplementedError, RuntimeError) as error:
            model = self.during("builds its model", task.model)
            first = (str(error).splitlines() or [""])[0]
            self.notes.append(f"model() cannot be built on the meta device ({first}); checked on the CPU")
        except Exception:
            model = self.during("builds its model", task.model)
        if not isinstance(model, torch.nn.Module):
            why = f"model() returned {type(model).__name__}"
            raise self.refuse("task", "a torch.nn.Module from model()", "return the module", why)
        return model

    def parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """Returns the trainable parameters, tied ones once."""
        named = dict(model.named_parameters())
        lazy = [n for n, p in named.items() if isinstance(p, torch.nn.parameter.UninitializedParameter)]
        if lazy:
            raise self.refuse(
                "task", "parameters of known shape", "use modules that are not lazy", f"lazy: {some(lazy)}"
            )
        params = {n: p for n, p in named.items() if p.requires_grad}
        if not params:
            why = "the model has no trainable parameter"
            raise self.refuse("task", "at least one parameter with requires_grad", "correct model()", why)
        other = [f"{n} ({p.dtype})" for n, p in params.items() if p.dtype != torch.float32]
        if other:
            raise self.refuse(
                "task",
                "float32 parameters",
                "build the model in float32: precision is the job's, not the model's",
                f"of another type: {some(other)}",
            )
        if len(params) < len(named):
            self.notes.append(f"{len(named) - len(params)} tensors are frozen (requires_grad is false)")
        return params

    def initial_weights(self, model: torch.nn.Module, spec_dir: Path, own_loop: bool) -> None:
        """Looks whether the checkpoint of `init_from` fits the model; notes what it gives and what it does not."""
        rule = self.spec.checkpoint.init_from if self.spec.checkpoint is not None else None
        if rule is None:
            return
        field, url = "checkpoint.init_from", absolute(rule.url, spec_dir)
        try:
            if own_loop:
                raise WarmStartRefused("a task with its own loop builds its model itself: load the weights there")
            self.notes.append(match(tensors_of(model), Checkpoint.open(url).index, rule).text(url))
        except (WarmStartRefused, StorageError) as error:
            raise self.refuse(
                field, "a checkpoint whose weights fit the model", "correct `url`, `names` or `missing`", str(error)
            ) from error

    def optimizer(self, task: Task, params: dict[str, torch.nn.Parameter]) -> tuple[int, str]:
        """Returns the bytes that the optimizers keep, and their names."""
        made = self.during("makes its optimizer", lambda: task.optimizer(list(params.values())))
        every = made if isinstance(made, list) else [made]
        wrong = [type(o).__name__ for o in every if not isinstance(o, torch.optim.Optimizer)]
        if wrong or not every:
            raise self.refuse(
                "task",
                "a torch.optim.Optimizer, or a list of them, from optimizer(params)",
                "return the optimizer",
                f"optimizer() returned {some(wrong) or 'an empty list'}",
            )
        self._covered(every, params)
        for each in every:
            why = optimizer_check.refusal(each)
            if why:
                raise self.refuse(
                    "task",
                    f"an optimizer that can be cut over ranks: {optimizer_check.CUTTABLE}",
                    "return another optimizer from optimizer(params)",
                    f"optimizer {type(each).__name__} cannot be cut: {why}",
                )
            if optimizer_check.cut_of(each) == "tensors":
                self.notes.append(
                    f"{type(each).__name__} is cut by whole tensors: ranks are only as even as tensors are"
                )
        name = " + ".join(dict.fromkeys(type(o).__name__ for o in every))
        return sum(optimizer_check.state_bytes(o) for o in every), name

    def _covered(self, every: list[torch.optim.Optimizer], params: dict[str, torch.nn.Parameter]) -> None:
        held = [p for o in every for group in o.param_groups for p in group["params"]]
        counts: dict[int, int] = {}
        for param in held:
            counts[id(param)] = counts.get(id(param), 0) + 1
        missing = [n for n, p in params.items() if id(p) not in counts]
        twice = [n for n, p in params.items() if counts.get(id(p), 0) > 1]
        known = {id(p) for p in params.values()}
        foreign = sum(1 for p in held if id(p) not in known)
        why = ""
        if missing:
            why = f"in no optimizer: {some(missing)}"
        elif twice:
            why = f"in two optimizers or groups: {some(twice)}"
        elif foreign:
            why = f"{foreign} of the optimizer's parameters are not the model's trainable ones"
        if why:
            raise self.refuse(
                "task",
                "every trainable parameter in exactly one optimizer group",
                "correct optimizer(params), or freeze those parameters with requires_grad_(False)",
                why,
            )


def _nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _traceback(error: BaseException) -> str:
    """Returns the frames of the task's own code (ours, on the way in, left out)."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return "".join(traceback.format_list(frames)).rstrip()


def main() -> None:
    """Answers one request; the answer is the only thing on stdout."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.read())
    try:
        facts = inspect_task(JobSpec.parse(request["spec"]), Path(request["spec_dir"]))
        answer: dict[str, Any] = {"facts": msgspec.to_builtins(facts)}
    except SpecError as error:
        answer = {"problems": [p.to_dict() for p in error.problems]}
    with os.fdopen(answer_fd, "w", encoding="utf-8") as out:
        json.dump(answer, out)

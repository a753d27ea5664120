"""Trains a task: the loop of a Session, with the task's own model, data, loss and optimizers.

The engine holds nothing that a user's own loop could not hold; see session.py. Belongs to the training thread.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from everstep.platform.job.spec import JobSpec
from everstep.platform.training.conductor import Conductor
from everstep.platform.training.session import Session
from everstep.platform.training.settings import JobContext, Settings, current_job
from everstep.platform.training.task import Loss, Task, TaskContext, TaskRaised, keyed_seed
from everstep.platform.training.task_loader import load_task
from everstep.platform.training.warm_start import load_weights


@dataclass(frozen=True)
class Built:
    task: Task
    session: Session


def settings_of(spec: JobSpec) -> Settings:
    return Settings(
        steps=spec.steps,
        lanes=spec.lanes,
        lane_batch=spec.lane_batch,
        seed=spec.seed,
        zero=spec.layout.zero,
        clip_norm=spec.train.clip_norm,
        nonfinite_limit=spec.limits.nonfinite,
        stall_s=spec.timeouts.stall_s,
        eval_every=spec.eval.every,
    )


def load(spec: JobSpec, spec_dir: Path) -> Task:
    """The job's task. Raises TaskRaised."""
    try:
        return load_task(spec.task, spec_dir, spec.args, TaskContext.of(spec))
    except Exception as error:
        raise TaskRaised(f"loading the task failed: {type(error).__name__}: {error}", 0, -1) from error


def build(task: Task, spec: JobSpec, conductor: Conductor | None) -> Built:
    """Model, optimizers and session, all from the seed, or with the weights of `init_from`.

    Raises TaskRaised for errors of the task, WarmStartRefused and StorageError for those of the weights.
    """
    try:
        torch.manual_seed(keyed_seed(spec.seed, "model"))
        model = task.model()
        optimizers = task.optimizer(model.parameters())
        _ = task.data
    except Exception as error:
        raise TaskRaised(f"building the task failed: {type(error).__name__}: {error}", 0, -1) from error
    initial = spec.checkpoint.init_from if spec.checkpoint is not None else None
    if initial is not None:
        load_weights(model, initial)
    return Built(task, Session(model, optimizers, settings=settings_of(spec), task=task, conductor=conductor))


def probe(built: Built) -> str:
    """One dry lane, discarded: warms the process up; the hash of its gradient tells ranks that would differ."""
    session, task = built.session, built.task
    try:
        session.open_probe()
        value = task.loss(session.model, session.batch(0), session.context(0))
        digest = session.close_probe(Loss.of(value, session.settings.lane_batch))
    except Exception as error:
        raise TaskRaised(f"the dry lane failed: {type(error).__name__}: {error}", 1, 0) from error
    return hashlib.sha256(digest).hexdigest()


def has_own_loop(task: Task) -> bool:
    return type(task).loop is not Task.loop


def run_own_loop(task: Task, spec: JobSpec, conductor: Conductor) -> None:
    """Runs a task that writes its own loop. Raises TaskRaised."""
    torch.manual_seed(keyed_seed(spec.seed, "model"))
    token = current_job.set(JobContext(settings_of(spec), task, conductor))
    try:
        task.loop()
    except Exception as error:
        raise TaskRaised(f"the task's own loop raised: {type(error).__name__}: {error}", 0, -1) from error
    finally:
        current_job.reset(token)


def train(built: Built) -> None:
    """Runs to the end of the run. Raises TaskRaised for errors of the task's loss, its backward, or its data."""
    task, session = built.task, built.session
    with session:
        for step in session.steps():
            for lane in session.lanes():
                try:
                    loss = task.loss(session.model, session.batch(lane), session.context(lane))
                    session.backward(lane, Loss.of(loss, session.settings.lane_batch))
                except Exception as error:
                    what = f"the task raised in step {step + 1}, lane {lane}: {type(error).__name__}: {error}"
                    raise TaskRaised(what, step + 1, lane) from error
            session.commit()

"""Tasks that a test can hold at a step, and tasks that fail in a chosen way.

Every one is a small model on synthetic data. The `args` that only steer a test (gates, trace, fail) have no
influence on bits.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

import everstep as es
from everstep.platform.training.task_loader import find_task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Mlp = find_task("tiny.py:Mlp", EXAMPLES)
Norm = find_task("tiny.py:Norm", EXAMPLES)
Tokens = find_task("tiny.py:Tokens", EXAMPLES)

GATE_PATIENCE_S = 120.0  # a gate that nobody opens fails its test here at the latest
LOOK_S = 0.005


class Gated(Mlp):
    """Mlp that waits in front of step N as long as there is a file `gates/N`, and writes down who computes.

    `trace`: a file that gets one line "pid step lane" a computed lane.
    """

    defaults: ClassVar = {**Mlp.defaults, "gates": "", "trace": ""}

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], ctx: es.LaneContext) -> torch.Tensor:
        if self.args.trace:
            with open(self.args.trace, "a") as file:
                file.write(f"{os.getpid()} {ctx.step} {ctx.lane}\n")
        if self.args.gates:
            pass_gate(Path(self.args.gates, str(ctx.step)))
        value: torch.Tensor = super().loss(model, batch, ctx)
        return value


def pass_gate(gate: Path) -> None:
    deadline = time.monotonic() + GATE_PATIENCE_S
    while gate.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(LOOK_S)


class Evaluated(Mlp):
    """Mlp that is evaluated on samples that it is not trained on, by its loss and by how often it is right."""

    def eval_dataset(self) -> es.Dataset:
        return Mlp({**self.args, "samples": 203}, replace(self.context, seed=99)).dataset()

    def evaluate(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], ctx: es.LaneContext) -> es.Loss:
        inputs, labels = batch
        loss = self.loss(model, batch, ctx)
        right = (model(inputs).argmax(1) == labels).float().mean()
        return es.Loss(loss * len(labels), len(labels), {"right": float(right)})


class Failing(Mlp):
    """Mlp that goes wrong at one step and lane.

    `how`: raise; raise-once, for as long as there is a file `armed`, which it removes; build, in model(), where
    there is a file `armed`; nan, that step's loss only; nans, from then on; never.
    """

    defaults: ClassVar = {**Mlp.defaults, "how": "raise", "at_step": 4, "lane": 5, "armed": ""}

    def model(self) -> nn.Module:
        if self.args.how == "build" and Path(self.args.armed).exists():
            raise RuntimeError("the blueprint is gone")
        model: nn.Module = super().model()
        return model

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], ctx: es.LaneContext) -> torch.Tensor:
        value: torch.Tensor = super().loss(model, batch, ctx)
        args = self.args
        reached = ctx.step == args.at_step or (args.how == "nans" and ctx.step > args.at_step)
        if not reached or ctx.lane != args.lane:
            return value
        if args.how == "raise" or (args.how == "raise-once" and Path(args.armed).exists()):
            stumble(args.armed)
        return value * float("nan") if args.how in ("nan", "nans") else value


def stumble(armed: str) -> None:
    if armed:
        Path(armed).unlink()
    raise ZeroDivisionError("there is a hole in the road")


class OwnLoop(Mlp):
    """Mlp, trained by its own loop instead of the engine's."""

    def loop(self) -> None:
        model = self.model()
        with es.Session(model, self.optimizer(model.parameters())) as s:
            for _ in s.steps():
                for lane in s.lanes():
                    s.backward(lane, self.loss(model, s.batch(lane), s.context(lane)))
                s.commit()

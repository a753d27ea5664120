"""A task with much state and a step of seconds: an MLP of a few wide layers on noise. For snapshot.py."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import everstep as es


@dataclass(frozen=True)
class _Noise:
    """[i] -> float32 of `width`; made when it is asked for, the same each time."""

    samples: int
    width: int

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int, /) -> torch.Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(index))


class BigMlp(es.Task):
    """12 bytes of training state (AdamW) for each of its layers x width^2 parameters."""

    defaults: ClassVar = {"layers": 10, "width": 4096, "samples": 1024}

    def model(self) -> nn.Module:
        return stack(self.args.layers, self.args.width)

    def dataset(self) -> es.Dataset:
        return _Noise(self.args.samples, self.args.width)

    def loss(self, model: nn.Module, batch: torch.Tensor, ctx: es.LaneContext) -> torch.Tensor:
        return objective(model, batch)


def stack(layers: int, width: int) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width, bias=False), nn.ReLU()]
    return nn.Sequential(*parts)


def objective(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """batch: (B, width) -> scalar: how far the model is from giving its input back."""
    found: torch.Tensor = (model(batch) - batch).square().mean()
    return found

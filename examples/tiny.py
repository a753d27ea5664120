"""Small tasks that step in milliseconds, each with one thing that is easy to get wrong.

Purpose: fast tests, and short examples of the Task API. All data is synthetic and follows from the seed.
Thread-safety: as every task, one thread.

    Mlp      dropout: randomness that must not depend on which rank computes a lane
    Norm     BatchNorm: buffers that every lane changes, one of them an integer
    Tokens   a token-weighted loss over lanes of very uneven weight, some of it zero, and a head that most
             batches leave without a gradient
    OwnLoop  Mlp once more, with a training loop of its own instead of the engine's; it ends with the same bits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

import everstep as es
from everstep.platform.training.task import keyed_seed

# Shapes: N samples, B of a lane, F features, C classes, S side of an image, T tokens, V vocabulary.
Pair = tuple[torch.Tensor, torch.Tensor]


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(keyed_seed(seed, name))


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets that were made in advance: [i] -> (input, target)."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Pair:
        return self.inputs[index], self.targets[index]


class Mlp(es.Task):
    """Learns the classes that a fixed random matrix gives to random vectors."""

    defaults: ClassVar = {"samples": 2048, "features": 24, "width": 48, "classes": 6, "dropout": 0.2}

    def model(self) -> nn.Module:
        args = self.args
        return nn.Sequential(
            nn.Linear(args.features, args.width),
            nn.GELU(),
            nn.Dropout(args.dropout),
            nn.Linear(args.width, args.width),
            nn.GELU(),
            nn.Dropout(args.dropout),
            nn.Linear(args.width, args.classes),
        )

    def dataset(self) -> es.Dataset:
        args, generator = self.args, _generator(self.seed, "mlp")
        teacher_fc = torch.randn(args.features, args.classes, generator=generator)
        inputs_nf = torch.randn(args.samples, args.features, generator=generator)
        return Pairs(inputs_nf, (inputs_nf @ teacher_fc).argmax(1))

    def loss(self, model: nn.Module, batch: Pair, ctx: es.LaneContext) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])


class OwnLoop(Mlp):
    """What the engine does, written out: this is all there is to it."""

    def loop(self) -> None:
        model = self.model()
        with es.Session(model, self.optimizer(model.parameters())) as s:
            for _ in s.steps():  # an aborted step comes again
                for lane in s.lanes():
                    s.backward(lane, self.loss(model, s.batch(lane), s.context(lane)))
                s.commit()


class Norm(es.Task):
    """Learns which quarter of a noisy image is brighter, through a convolution and two BatchNorms."""

    defaults: ClassVar = {"samples": 1024, "side": 8, "channels": 6}

    def model(self) -> nn.Module:
        channels = self.args.channels
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * channels, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Linear(16, 4),
        )

    def dataset(self) -> es.Dataset:
        args, generator = self.args, _generator(self.seed, "norm")
        side, half = args.side, args.side // 2
        images = torch.randn(args.samples, 1, side, side, generator=generator)
        quarters = torch.randint(4, (args.samples,), generator=generator)
        for image, quarter in zip(images, quarters.tolist(), strict=True):
            row, column = divmod(quarter, 2)
            image[0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1.0
        return Pairs(images, quarters)

    def loss(self, model: nn.Module, batch: Pair, ctx: es.LaneContext) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])


class Sentences:
    """[i] -> int64[0..longest]: a walk `next = 5 x token + 3 (mod V)` in which every sixth token is noise."""

    def __init__(self, samples: int, vocabulary: int, longest: int, seed: int) -> None:
        generator = _generator(seed, "tokens")
        # The fourth power makes most sentences short and a few long: lanes differ tenfold and more.
        share = torch.rand(samples, generator=generator) ** 4
        self._lengths = (share * (longest + 1)).long().tolist()
        tokens_nt = torch.randint(vocabulary, (samples, longest), generator=generator)
        noise_nt = torch.rand(samples, longest, generator=generator) < 1 / 6
        for t in range(1, longest):
            follows = (5 * tokens_nt[:, t - 1] + 3) % vocabulary
            tokens_nt[:, t] = torch.where(noise_nt[:, t], tokens_nt[:, t], follows)
        self._tokens_nt = tokens_nt

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._tokens_nt[index, : self._lengths[index]]


class NextToken(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; batches longer than `long` pass one more layer."""

    def __init__(self, vocabulary: int, width: int, long: int) -> None:
        super().__init__()
        self.long = long
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, width)
        self.far = nn.Linear(width, width)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        x_btd = torch.tanh(self.hidden(self.embed(tokens_bt)))
        if tokens_bt.shape[1] > self.long:
            x_btd = x_btd + self.far(x_btd)
        logits_btv: torch.Tensor = self.out(x_btd)
        return logits_btv


class Tokens(es.Task):
    """Predicts the next token; every token counts alike, so a lane weighs what it holds, maybe nothing."""

    defaults: ClassVar = {"samples": 1024, "vocabulary": 31, "width": 24, "longest": 40, "long": 25}

    def model(self) -> nn.Module:
        return NextToken(self.args.vocabulary, self.args.width, self.args.long)

    def dataset(self) -> es.Dataset:
        return Sentences(self.args.samples, self.args.vocabulary, self.args.longest, self.seed)

    def collate(self, samples: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, T] with -1 where a sentence has ended; T is at least 2, so that there is a pair to look at."""
        longest = max(2, *(len(sample) for sample in samples))
        batch = torch.full((len(samples), longest), -1)
        for row, sample in zip(batch, samples, strict=True):
            row[: len(sample)] = sample
        return batch

    def loss(self, model: nn.Module, batch: torch.Tensor, ctx: es.LaneContext) -> es.Loss:
        logits_btv: Any = model(batch[:, :-1].clamp(min=0))
        targets_bt = batch[:, 1:]
        nats = functional.cross_entropy(
            logits_btv.flatten(0, 1), targets_bt.flatten(), ignore_index=-1, reduction="sum"
        )
        return es.Loss(nats, (targets_bt >= 0).sum())

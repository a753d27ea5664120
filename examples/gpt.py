"""A byte-level GPT of about two million parameters, trained on whatever text there is.

Purpose: the example job (gpt.yaml), and a model small enough to learn on two cores while ranks die. Without
`args.data` it reads the source of Python's standard library. Thread-safety: as every task, one thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

import everstep as es
from everstep.platform.training.task import adamw
from everstep.storage.datasets.text import TextBytes

# Shapes: B sequences of a lane, T bytes of context, D width, H heads, V = 256 byte values.
BYTES = 256


class Block(nn.Module):
    """One pre-norm transformer block: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        b, t, d = x_btd.shape
        qkv = self.qkv(self.attention_norm(x_btd)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        mixed = self.project(mixed.transpose(1, 2).reshape(b, t, d))
        x_btd = x_btd + functional.dropout(mixed, self.dropout, self.training)
        grown = self.contract(functional.gelu(self.expand(self.mlp_norm(x_btd)), approximate="tanh"))
        return x_btd + functional.dropout(grown, self.dropout, self.training)


class Transformer(nn.Module):
    """Bytes [B, T] -> logits of the next byte [B, T, V]; input and output share one embedding."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            # GPT-2 (Radford et al. 2019, section 2.3): what is added to the residual stream starts smaller.
            residual = name.endswith(("project.weight", "contract.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, text_bt: torch.Tensor) -> torch.Tensor:
        x_btd = self.bytes(text_bt) + self.positions.weight[: text_bt.shape[1]]
        x_btd = functional.dropout(x_btd, self.dropout, self.training)
        for block in self.blocks:
            x_btd = block(x_btd)
        return functional.linear(self.norm(x_btd), self.bytes.weight)


class GPT(es.Task):
    """Predicts the next byte of text; the loss counts every byte alike."""

    defaults: ClassVar = {
        "layers": 4,
        "width": 192,
        "heads": 6,
        "context": 128,
        "dropout": 0.1,
        "data": None,  # folder, glob or file; None: Python's standard library
        "max_bytes": 32_000_000,
    }

    def model(self) -> nn.Module:
        args = self.args
        if args.width % args.heads:
            raise ValueError(f"args.heads: {args.heads} does not divide args.width ({args.width})")
        return Transformer(args.layers, args.width, args.heads, args.context, args.dropout)

    def dataset(self) -> es.Dataset:
        return TextBytes(self.args.data, self.args.context, self.args.max_bytes)

    def loss(self, model: nn.Module, batch: torch.Tensor, ctx: es.LaneContext) -> es.Loss:
        text_bt, next_bt = batch[:, :-1], batch[:, 1:]
        logits_btv = model(text_bt)
        nats = functional.cross_entropy(logits_btv.flatten(0, 1), next_bt.flatten(), reduction="sum")
        count = next_bt.numel()
        return es.Loss(nats, count, {"bits_per_byte": float(nats.detach()) / count / math.log(2)})

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Weight decay for matrices only: on norms and biases it does harm (GPT-3, appendix B, and since)."""
        every = list(params)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in every if p.dim() >= 2]},
            {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
        ]
        return adamw(groups, self.train.optimizer)

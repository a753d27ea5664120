"""One rank of two that train a GPT: bfloat16 compute parameters of the whole model, and float32 master parameters and
AdamW moments of its half, as in ZeRO 1. The other rank's half stays as it is.

Shapes: B sequences of T tokens, width D, H heads, vocabulary V.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from everstep.storage.index import TensorMeta


@dataclass(frozen=True)
class Size:
    """Of the model and of one batch."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    tokens: int
    sequences: int


BIG = Size(layers=24, width=2048, heads=16, vocabulary=50304, tokens=1024, sequences=8)
SMALL = Size(layers=4, width=256, heads=4, vocabulary=2048, tokens=64, sequences=2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x: BTD
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # BHT-
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.tokens, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # both BT
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class HalfRank:
    """Model, optimizer and random batches; `state()` is what a snapshot covers."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        with device:
            self.model = GPT(size).bfloat16()
            pool = torch.randint(0, size.vocabulary, (8, size.sequences, size.tokens + 1))
        self._batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in pool]
        self._next = 0
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self._cut: list[tuple[str, nn.Parameter, int, int]] = []
        left = self.parameters // 2
        for name, parameter in self.model.named_parameters():
            if stop := min(left, parameter.numel()):
                self._cut.append((name, parameter, 0, stop))
            left -= stop
        self._compute = [p.detach().view(-1)[a:b] for _, p, a, b in self._cut]
        self.masters = [nn.Parameter(c.float()) for c in self._compute]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, weight_decay=0.1, foreach=True)

    def forward_backward(self) -> float:
        """The loss; read on the CPU, as the vote of a step has to be."""
        self._next = (self._next + 1) % len(self._batches)
        loss = self.model(*self._batches[self._next])
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def update(self) -> None:
        """Gradients of our half to float32, AdamW, and the new parameters back to bfloat16."""
        gradients = [p.grad.view(-1)[a:b] for _, p, a, b in self._cut if p.grad is not None]
        torch._foreach_copy_([m.grad for m in self.masters], gradients)
        self.optimizer.step()
        torch._foreach_copy_(self._compute, self.masters)
        for parameter in self.model.parameters():
            parameter.grad = None

    def state(self) -> list[tuple[TensorMeta, int, int, torch.Tensor]]:
        """(tensor, start, stop, elements of it) of all that the optimizer keeps, after the first step."""
        found = []
        for (name, parameter, start, stop), master in zip(self._cut, self.masters, strict=True):
            shape = tuple(parameter.shape)
            found.append((TensorMeta(name, "param", "float32", shape), start, stop, master.detach()))
            for kind, value in self.optimizer.state[master].items():
                dtype = str(value.dtype).removeprefix("torch.")
                if value.dim():
                    found.append((TensorMeta(name, kind, dtype, shape), start, stop, value))
                else:
                    found.append((TensorMeta(name, kind, dtype, ()), 0, 1, value))
        return found

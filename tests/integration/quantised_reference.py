"""The quantised all-reduce in one process, written down once more, and inputs for it."""

from __future__ import annotations

import math

import torch

from everstep.collectives.quantisation import BLOCK, CODECS, TILE, Codec


def through(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    """Encoded and decoded, in tiles."""
    numel, out = values.numel(), torch.empty_like(values)
    data = torch.full((codec.size(numel),), 0xA5, dtype=torch.uint8)
    for at in range(0, numel, TILE):
        codec.encode(values[at : at + TILE], data, at, numel)
    for at in range(0, numel, TILE):
        codec.decode(data, out[at : at + TILE], at, numel)
    return out


def sample(seed: int, numel: int, dtype: torch.dtype = torch.float32, power: float = 1.0) -> torch.Tensor:
    """Blocks of different magnitudes and offsets, zeros among the elements."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    blocks = -(-numel // BLOCK)
    scales = 10.0 ** (torch.rand(blocks, generator=generator) * 4 - 2) * power
    shifts = torch.randn(blocks, generator=generator) * 3 * scales
    values = values * scales.repeat_interleave(BLOCK)[:numel] + shifts.repeat_interleave(BLOCK)[:numel]
    return values.where(torch.rand(numel, generator=generator) > 0.1, torch.zeros(())).to(dtype)


def expected(parts: list[torch.Tensor], op: str, scheme: str) -> torch.Tensor:
    """[Note: quantised sum], written down once more."""
    codec = CODECS[scheme]()
    coded = [through(codec, part.reshape(-1).float()) for part in parts]

    def tree(low: int, high: int) -> torch.Tensor:
        if high - low == 1:
            return coded[low]
        half = 1
        while 2 * half < high - low:
            half *= 2
        return tree(low, low + half) + tree(low + half, high)

    total = tree(0, len(parts))
    if op == "avg":
        total = total / len(parts)
    result = through(codec, total)
    return result.to(parts[0].dtype).masked_fill_(result.isnan(), math.nan).view(parts[0].shape)

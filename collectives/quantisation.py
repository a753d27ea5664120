"""Floats as 8 bit codes, by blocks: what a quantised all-reduce sends, and what it may lose.

[Note: codes] A row of elements is cut into blocks of BLOCK, counted from the tensor's beginning; the last one may be
shorter. Each block has parameters of its own, and each element one code of 0 to 255:

    minmax8      low, step:   element = low + code * step              low and step float32
    zeropoint8   step, zero:  element = (code - zero) * step           step float32, zero 0 to 255

    step = range / 255, at least 2^-126, and 0 where the range is 0; range = largest - least element of the block, for
    zeropoint8 with 0 among them.

    block                                 minmax8                 zeropoint8
    all elements alike                    exact                   as any other
    zeros                                 exact                   exact, also beside other elements (-0.0 becomes 0.0)
    any range, also one above float32's   error_bound             error_bound
    range under 2^-118 (denormals)        error under 2^-126      error under 2^-126
    a NaN or an infinity in it            all NaN                 all NaN

What decodes a block multiplies, adds and rounds in separate float32 operations, so that every machine gets the same
bits; only its sender chooses codes. (`torch.set_flush_denormal` would change them: on all members or on none.) A
block that is not finite becomes one NaN, bit by bit the same everywhere. It can only come out as NaN, not as an
error: members would have to hear of it before they may go on, which costs one more trip in every operation.

Encoded: the parameters of all blocks, then the codes. Pure functions on CPU tensors; a Codec has scratch memory and
belongs to one thread at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

BLOCK = 1024  # elements; 0.8 % for parameters. Twice as many are no faster, see docs/measurements.md
TILE = 128 * BLOCK  # coded at once: 512 KiB of float32, and as much scratch, stay in a core's cache
_LEAST_STEP = 2.0**-126  # 1 / step must be a finite float32
_HIGHEST = torch.finfo(torch.float32).max
_NEAR_HIGHEST = 3e38  # from here on a rounding may overflow
_NAN = float("nan")


class Codec(ABC):
    """`parameters` of float32 a block, and `extra` bytes."""

    name: str
    parameters: int
    extra = 0

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def size(self, numel: int) -> int:
        """Bytes of so many elements."""
        return -(-numel // BLOCK) * (4 * self.parameters + self.extra) + numel

    def encode(self, values: torch.Tensor, into: torch.Tensor, start: int, numel: int) -> None:
        """`values` (float32, up to TILE elements) are elements `start`... of a row of `numel` that `into` encodes."""
        for rows, first in _rows(values, start):
            heads, extra, codes = self._parts(into, numel, first, rows)
            self._encode(rows, heads, extra, codes)

    def decode(self, data: torch.Tensor, out: torch.Tensor, start: int, numel: int) -> None:
        """Elements `start`... of the row of `numel` that `data` encodes, into `out` (float32, up to TILE)."""
        for rows, first in _rows(out, start):
            heads, extra, codes = self._parts(data, numel, first, rows)
            self._decode(rows, heads, extra, codes)

    def _parts(
        self, data: torch.Tensor, numel: int, first: int, rows: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """The parameters and codes of the blocks in `rows`, which begin at element `first`."""
        blocks, at, count = -(-numel // BLOCK), first // BLOCK, len(rows)
        floats = data[: 4 * self.parameters * blocks].view(torch.float32).view(self.parameters, blocks)
        head = floats.nbytes
        extra = data[head : head + self.extra * blocks]
        begin = head + self.extra * blocks + first
        codes = data[begin : begin + rows.numel()].view(rows.shape)
        return list(floats[:, at : at + count]), extra[at : at + count], codes

    def _spare(self, rows: torch.Tensor) -> torch.Tensor:
        if self._scratch.numel() < rows.numel():
            self._scratch = torch.empty(rows.numel())
        return self._scratch[: rows.numel()].view(rows.shape)

    @abstractmethod
    def _encode(
        self, rows: torch.Tensor, heads: list[torch.Tensor], extra: torch.Tensor, codes: torch.Tensor
    ) -> None: ...

    @abstractmethod
    def _decode(
        self, rows: torch.Tensor, heads: list[torch.Tensor], extra: torch.Tensor, codes: torch.Tensor
    ) -> None: ...


class MinMax(Codec):
    name = "minmax8"
    parameters = 2

    def _encode(
        self, rows: torch.Tensor, heads: list[torch.Tensor], extra: torch.Tensor, codes: torch.Tensor
    ) -> None:
        lows, steps = heads
        low = torch.amin(rows, 1)
        step = _step(low, torch.amax(rows, 1))
        lows.copy_(low)
        steps.copy_(step)
        inverse = _inverse(step)
        scaled = self._spare(rows)
        torch.sub(rows, low[:, None], out=scaled).mul_(inverse[:, None])
        for i in _where(~(step < _NEAR_HIGHEST / 512)):  # the difference may be infinite
            torch.mul(rows[i], inverse[i], out=scaled[i]).sub_(low[i] * inverse[i])
        codes.copy_(scaled.add_(0.5).clamp_(0.0, 255.0))

    def _decode(
        self, rows: torch.Tensor, heads: list[torch.Tensor], extra: torch.Tensor, codes: torch.Tensor
    ) -> None:
        lows, steps = heads
        rows.copy_(codes).mul_(steps[:, None]).add_(lows[:, None])
        near = (steps * 255.0).add_(lows) < _NEAR_HIGHEST
        for i in _where(~(near & (steps < _NEAR_HIGHEST / 512))):
            half = codes[i].to(torch.float32).mul_(0.5).mul_(steps[i])
            torch.add(half, lows[i], out=rows[i]).add_(half).clamp_(-_HIGHEST, _HIGHEST)
            _settle(rows[i], steps[i])


class ZeroPoint(Codec):
    name = "zeropoint8"
    parameters = 1
    extra = 1

    def _encode(
        self, rows: torch.Tensor, heads: list[torch.Tensor], extra: torch.Tensor, codes: torch.Tensor
    ) -> None:
        low = torch.amin(rows, 1).clamp_(max=0.0)
        step = _step(low, torch.amax(rows, 1).clamp_(min=0.0))
        inverse = _inverse(step)
        zero = (low * inverse).neg_().add_(0.5).floor_().clamp_(0.0, 255.0)
        heads[0].copy_(step)
        extra.copy_(zero)
        scaled = torch.mul(rows, inverse[:, None], out=self._spare(rows))
        codes.copy_(scaled.add_((zero + 0.5)[:, None]).clamp_(0.0, 255.0))

    def _decode(
        self, rows: torch.Tensor, heads: list[torch.Tensor], extra: torch.Tensor, codes: torch.Tensor
    ) -> None:
        (steps,) = heads
        rows.copy_(codes).sub_(extra.to(torch.float32)[:, None]).mul_(steps[:, None])
        for i in _where(~(steps < _NEAR_HIGHEST / 512)):
            _settle(rows[i].clamp_(-_HIGHEST, _HIGHEST), steps[i])


CODECS: dict[str, type[Codec]] = {each.name: each for each in (MinMax, ZeroPoint)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def error_bound(parts: Sequence[torch.Tensor], quantize: str, op: str = "sum") -> torch.Tensor:
    """How far a quantised all_reduce of the members' finite `parts` can be from the exact result, element by element.

    R_r: range of member r's block (for zeropoint8 with 0 in it), M_r: its largest magnitude, S: the exact sum.

        D     = sum over r of 0.501 R_r / 255 + 2^-22 M_r + 2^-126       what the members' codes lose
        bound = (D + 0.501 (range of S + 2 D) / 255 + 2^-20 sum of M_r) / (1, or the number of members for "avg")
                + 2^-126, and for the rounding to 16 bits 2^-8 (bfloat16) or 2^-11 (float16) of the result

    float64. It does not hold where the sum, or the result in its 16-bit type, overflows.
    """
    blocks = [_blocks(part.to(torch.float64)) for part in parts]
    exact = torch.stack(blocks).sum(0)
    magnitude = torch.stack([_magnitude(each) for each in blocks]).sum(0)
    lost = torch.stack([_half_step(each, quantize) for each in blocks]).sum(0)
    lost = lost + 2.0**-22 * magnitude + len(parts) * _LEAST_STEP
    bound = lost + _half_step(exact, quantize) + 0.501 * 2 * lost / 255 + 2.0**-20 * magnitude
    scale = len(parts) if op == "avg" else 1
    each = (bound / scale + _LEAST_STEP).expand_as(exact)
    dtype = parts[0].dtype
    if dtype != torch.float32:
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        each = each + unit * (exact.abs() / scale + each) + torch.finfo(dtype).smallest_normal * unit
    return each.reshape(-1)[: parts[0].numel()].view(parts[0].shape)


def _rows(values: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Blocks as rows: the whole ones, and a last shorter one."""
    whole = values.numel() // BLOCK * BLOCK
    if whole:
        yield values[:whole].view(-1, BLOCK), start
    if whole < values.numel():
        yield values[whole:].view(1, -1), start + whole


def _step(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """float64 in between: the range of finite float32 may be none. NaN where one of the two is not finite."""
    span = high.to(torch.float64).sub_(low)
    step = (span / 255.0).clamp_(min=_LEAST_STEP).masked_fill_(span == 0.0, 0.0)
    return step.masked_fill_(~span.isfinite(), _NAN).to(torch.float32)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    return step.reciprocal().masked_fill_(step == 0.0, 0.0)


def _where(unusual: torch.Tensor) -> list[int]:
    """Rows; nearly always none."""
    return unusual.nonzero().flatten().tolist() if bool(unusual.any()) else []


def _settle(row: torch.Tensor, step: torch.Tensor) -> None:
    """One NaN everywhere: which one arithmetic gives depends on the processor."""
    if bool(step.isnan()):
        row.fill_(_NAN)


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """[blocks, BLOCK]; the last one is filled with its own last element, which changes no range."""
    flat = values.reshape(-1)
    lacking = -flat.numel() % BLOCK
    return (torch.cat([flat, flat[-1:].expand(lacking)]) if lacking else flat).view(-1, BLOCK)


def _magnitude(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(1, keepdim=True)


def _half_step(blocks: torch.Tensor, quantize: str) -> torch.Tensor:
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    if quantize == ZeroPoint.name:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    return 0.501 * (high - low) / 255.0

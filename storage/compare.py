"""Two checkpoints beside each other, tensor by tensor. Pure but for reading; torch is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from everstep.storage.checkpoint import Checkpoint
    from everstep.storage.index import TensorMeta


@dataclass(frozen=True)
class Row:
    """What became of one tensor. `differing`: elements with other bits; `largest`: absolute difference;
    `relative`: that over the largest absolute value in the first.
    """

    name: str
    kind: str
    verdict: Literal["equal", "differs", "first only", "second only", "other form"]
    nbytes: int
    elements: int = 0
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0
    detail: str = ""


def compare(first: Checkpoint, second: Checkpoint) -> Iterator[Row]:
    """One row a tensor of either, by (name, kind); holds two tensors at a time.

    Raises CheckpointCorrupt, StoreError.
    """
    a, b = first.index.metas(), second.index.metas()
    for key in sorted(set(a) | set(b)):
        name, kind = key
        if key not in b:
            yield Row(name, kind, "first only", a[key].nbytes)
        elif key not in a:
            yield Row(name, kind, "second only", 0)
        elif (a[key].dtype, a[key].shape) != (b[key].dtype, b[key].shape):
            detail = f"{_form(a[key])} and {_form(b[key])}"
            yield Row(name, kind, "other form", a[key].nbytes, detail=detail)
        else:
            yield _compared(first, second, a[key])


def _compared(first: Checkpoint, second: Checkpoint, meta: TensorMeta) -> Row:
    import torch

    x, y = first.read_bytes(*meta.key)[1], second.read_bytes(*meta.key)[1]
    if x == y:
        return Row(meta.name, meta.kind, "equal", meta.nbytes, meta.numel)
    dtype = getattr(torch, meta.dtype)
    left, right = torch.frombuffer(x, dtype=dtype), torch.frombuffer(y, dtype=dtype)
    bits = torch.frombuffer(x, dtype=torch.uint8) != torch.frombuffer(y, dtype=torch.uint8)
    differing = int(bits.view(-1, meta.itemsize).any(dim=1).sum())
    wide = torch.complex128 if left.is_complex() else torch.float64
    gap = (left.to(wide) - right.to(wide)).abs()
    largest, scale = float(gap.max()), float(left.to(wide).abs().max())
    relative = largest / scale if scale else float(largest > 0)
    return Row(meta.name, meta.kind, "differs", meta.nbytes, meta.numel, differing, largest, relative)


def _form(meta: TensorMeta) -> str:
    return f"{meta.dtype}{list(meta.shape)}"

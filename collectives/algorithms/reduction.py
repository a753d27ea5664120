"""Combining the members' parts of one piece, always in the same order.

[Note: rank tree] Parts are combined along one binary tree over the ranks: halves are split at the largest power of
two below their length, as in the lane tree. The order depends on the number of members and on nothing else, not
on the algorithm, the transport or who combines. 16-bit floats are combined in float32 and rounded once. Of 0.0 and
-0.0 the CPU's max and min take one or the other depending on where an element lies in a vector, so a zero that they
give is 0.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Combine = Callable[..., torch.Tensor]
COMBINE: dict[str, Combine] = {"sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum}
HALVES = (torch.float16, torch.bfloat16)


def split(count: int) -> int:
    """Where a subtree of `count` leaves is cut."""
    return 1 << ((count - 1).bit_length() - 1)


class Reducer:
    """Combines pieces of up to `numel` elements; owns the scratch that this takes."""

    def __init__(self, op: str, size: int, dtype: torch.dtype) -> None:
        self.op = op
        self.size = size
        self._wide = torch.float32 if dtype in HALVES else dtype
        self._combine = COMBINE[op]
        self._picks = op in ("max", "min") and dtype.is_floating_point
        self._plain_pair = size == 2 and op != "avg"
        self._scratch: list[torch.Tensor] = []

    def into(self, out: torch.Tensor, parts: Sequence[torch.Tensor], mine: int) -> None:
        """`out` becomes the combination; it may be the memory of `parts[mine]`, and of no other part."""
        if self._plain_pair and out.dtype == self._wide:
            self._combine(parts[0], parts[1], out=out)
            self._settle(out)
            return
        if self._wide != out.dtype:
            wide = [part.to(self._wide) for part in parts]
            total = self._tree(wide, 0, self.size, wide[mine], mine, 0)
            out.copy_(total.div_(self.size) if self.op == "avg" else total)
            self._settle(out)
            return
        self.subtree(out, parts, mine)
        self.finish(out, self.size)

    def subtree(self, out: torch.Tensor, parts: Sequence[torch.Tensor], mine: int) -> None:
        """The same for some of the members, of types that need no widening; `finish` is due when all are in."""
        total = self._tree(parts, 0, len(parts), out, mine, 0)
        if total is not out and total.data_ptr() != out.data_ptr():
            out.copy_(total)

    def finish(self, out: torch.Tensor, members: int) -> None:
        if self.op == "avg":
            out.div_(members)
        self._settle(out)

    def _settle(self, out: torch.Tensor) -> None:
        if self._picks:
            out.add_(0.0)

    def _tree(
        self, parts: Sequence[torch.Tensor], low: int, high: int, out: torch.Tensor, mine: int, depth: int
    ) -> torch.Tensor:
        """Leaves the subtree that `mine` is in for last: `out` may be its memory."""
        if high - low == 1:
            return parts[low]
        middle = low + split(high - low)
        if mine < middle:
            right = self._tree(parts, middle, high, self._temporary(depth, out), -1, depth + 1)
            left = self._tree(parts, low, middle, out, mine, depth + 1)
        else:
            left = self._tree(parts, low, middle, self._temporary(depth, out), high, depth + 1)
            right = self._tree(parts, middle, high, out, mine, depth + 1)
        return self._combine(left, right, out=out)

    def _temporary(self, depth: int, like: torch.Tensor) -> torch.Tensor:
        while len(self._scratch) <= depth:
            self._scratch.append(torch.empty_like(like))
        if self._scratch[depth].numel() < like.numel():
            self._scratch[depth] = torch.empty_like(like)
        return self._scratch[depth][: like.numel()]

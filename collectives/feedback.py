"""`ErrorFeedback`: what 8 bit codes lose now is added the next time, so that sums over many calls do not drift."""

from __future__ import annotations

import torch


class ErrorFeedback:
    """Of one tensor that is reduced again and again: `group.all_reduce(t, quantize="minmax8", feedback=feedback)`.

    It holds a float32 residual of the tensor's size: what this member's codes have lost and, for the parts of the
    tensor of which this member made the result, what the result's codes have lost (for "avg": times the number of
    members). Both are added to the tensor before it is encoded the next time. So the sum of the results over many
    calls is about as far from the exact one as one single result may be, not that many times as far, as long as the
    view stays. A member that goes takes along what its residual owed; it is less than one call's error.

    The residual changes when an operation has ended well, and goes back with the tensors where its transaction is
    not committed. One operation under way at a time may use it.
    """

    def __init__(self) -> None:
        self._residual: torch.Tensor | None = None

    @property
    def residual(self) -> torch.Tensor | None:
        """What is owed, flat; None before the first use. Keep it with a checkpoint, or lose one call's error."""
        return self._residual

    @residual.setter
    def residual(self, residual: torch.Tensor | None) -> None:
        if residual is not None and (residual.dtype != torch.float32 or residual.dim() != 1):
            raise ValueError(
                f"feedback: residual is of {residual.dtype}, {residual.dim()} dimensions; float32 with 1 is allowed"
            )
        self._residual = None if residual is None else residual.clone()

    def of(self, numel: int) -> torch.Tensor:
        """The residual of so many elements. Raises ValueError where it is of another tensor."""
        if self._residual is None:
            self._residual = torch.zeros(numel)
        if self._residual.numel() != numel:
            raise ValueError(
                f"all_reduce: feedback is of a tensor of {self._residual.numel()} elements and tensor has {numel}; "
                "each tensor needs an ErrorFeedback of its own (residual = None empties it)"
            )
        return self._residual

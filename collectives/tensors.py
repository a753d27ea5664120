"""What several folders need of tensors."""

from __future__ import annotations

from typing import Any

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a flat, contiguous CPU tensor, without a copy."""
    array: Any = tensor.detach().view(torch.uint8).numpy()
    return memoryview(array)

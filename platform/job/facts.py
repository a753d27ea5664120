"""What is known of a job before it starts, besides its own text.

Plain data, made by `check.py`, read by launchers and displays. Never imports torch. Immutable.
"""

from __future__ import annotations

import msgspec


class TaskFacts(msgspec.Struct, frozen=True, kw_only=True):
    """parameters: trainable elements (tied ones once). state_bytes: parameters, optimizer tensors, buffers.
    samples: len(dataset). tensors: trainable tensors. optimizer: its class name, several joined by " + ".
    notes: things a user should know, one line each."""

    parameters: int
    state_bytes: int
    samples: int
    tensors: int
    optimizer: str
    notes: tuple[str, ...] = ()

"""Epochs of a run without checkpoints, in the key-value store of Ray's head.

They stay there, some bytes a run, as files do: a supervisor that was frozen may wake long after the run has ended.
"""

from __future__ import annotations

from typing import Any

from ray.experimental import internal_kv as kv

from everstep.actors import ray_head

_kv: Any = kv  # untyped
_NAMESPACE = b"everstep"


def _present() -> None:
    """Raises ConnectionError where Ray's head is away: the call itself would wait for it, and end this process."""
    if not ray_head.answers():
        raise ConnectionError("Ray's head is away")


class RayClaims:
    """Implements `Claims`; `run_id` is of one execution. Methods raise ConnectionError while Ray's head is away."""

    def __init__(self, run_id: str) -> None:
        self._prefix = f"epochs/{run_id}/".encode()

    def take(self, epoch: int) -> bool:
        _present()
        there: bool = _kv._internal_kv_put(self._prefix + str(epoch).encode(), b"", False, namespace=_NAMESPACE)
        return not there

    def newest(self) -> int:
        _present()
        keys: list[bytes] = _kv._internal_kv_list(self._prefix, namespace=_NAMESPACE)
        return max((int(key.rpartition(b"/")[2]) for key in keys), default=0)

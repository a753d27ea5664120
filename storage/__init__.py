"""State index, planner, segments, erasure codes, checkpoints, datasets. Usable alone, without Ray.

Owns the folder's public names. They are imported when they are first used: nothing here imports torch before
a tensor is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep.storage.checkpoint import Checkpoint as Checkpoint
    from everstep.storage.erasure import ErasureCode as ErasureCode
    from everstep.storage.errors import CheckpointCorrupt as CheckpointCorrupt

_HOME = {
    "Checkpoint": "everstep.storage.checkpoint",
    "CheckpointCorrupt": "everstep.storage.errors",
    "ErasureCode": "everstep.storage.erasure",
}

__all__ = ["Checkpoint", "CheckpointCorrupt", "ErasureCode"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)

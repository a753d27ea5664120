"""Fault-tolerant groups: membership, coordinator, transports. Usable alone, without Ray.

Every name is imported when it is first used: torch costs 1.7 s, which a coordinator must not pay, and gRPC 0.1 s.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep.collectives.coordinator import Coordinator as Coordinator
    from everstep.collectives.errors import CollectiveError as CollectiveError
    from everstep.collectives.errors import CollectiveTimeout as CollectiveTimeout
    from everstep.collectives.errors import CoordinatorLost as CoordinatorLost
    from everstep.collectives.errors import Evicted as Evicted
    from everstep.collectives.errors import HandshakeRefused as HandshakeRefused
    from everstep.collectives.errors import Mismatch as Mismatch
    from everstep.collectives.errors import PeerLost as PeerLost
    from everstep.collectives.errors import TransactionAborted as TransactionAborted
    from everstep.collectives.feedback import ErrorFeedback as ErrorFeedback
    from everstep.collectives.group import Group as Group
    from everstep.collectives.group import GroupView as GroupView
    from everstep.collectives.work import Work as Work

_ERRORS = "everstep.collectives.errors"
_HOME = {
    "CollectiveError": _ERRORS,
    "CollectiveTimeout": _ERRORS,
    "Coordinator": "everstep.collectives.coordinator",
    "CoordinatorLost": _ERRORS,
    "ErrorFeedback": "everstep.collectives.feedback",
    "Evicted": _ERRORS,
    "Group": "everstep.collectives.group",
    "GroupView": "everstep.collectives.group",
    "HandshakeRefused": _ERRORS,
    "Mismatch": _ERRORS,
    "PeerLost": _ERRORS,
    "TransactionAborted": _ERRORS,
    "Work": "everstep.collectives.work",
}

__all__ = [
    "CollectiveError",
    "CollectiveTimeout",
    "Coordinator",
    "CoordinatorLost",
    "ErrorFeedback",
    "Evicted",
    "Group",
    "GroupView",
    "HandshakeRefused",
    "Mismatch",
    "PeerLost",
    "TransactionAborted",
    "Work",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'everstep.collectives' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

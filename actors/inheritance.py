"""What a standby hands on to the supervisor that it becomes."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.platform.cluster.chronicle import Chronicle


@dataclass(frozen=True)
class Inheritance:
    """`cause`: why the supervisor before is taken for lost, `silent_s` after it was last heard of."""

    known: Chronicle
    cause: str
    silent_s: float

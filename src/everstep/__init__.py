"""everstep: trains sharded PyTorch models on Ray; no failure stops a run, and no failure changes its result.

Purpose: the public API. Owns nothing: every name is imported when it is first used (PEP 562), because torch
costs 1.7 s and 217 MB, which the CLI and the supervisor must not pay. Thread-safety: safe, as imports are.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep.actors.launch import run as run
    from everstep.platform.job.result import RunResult as RunResult
    from everstep.platform.job.spec import JobSpec as JobSpec
    from everstep.platform.training.session import Session as Session
    from everstep.platform.training.settings import Settings as Settings
    from everstep.platform.training.task import CommitEvent as CommitEvent
    from everstep.platform.training.task import Dataset as Dataset
    from everstep.platform.training.task import LaneContext as LaneContext
    from everstep.platform.training.task import Loss as Loss
    from everstep.platform.training.task import Task as Task
    from everstep.storage.datasets.json_lines import JsonLines as JsonLines
    from everstep.storage.datasets.mixture import Mixture as Mixture
    from everstep.storage.datasets.parquet import Parquet as Parquet
    from everstep.storage.datasets.text import TextBytes as TextBytes
    from everstep.storage.datasets.tokens import Tokens as Tokens
    from everstep.submitting import Job as Job
    from everstep.submitting import submit as submit

__version__ = "0.1.0"

_HOME = {
    "CommitEvent": "everstep.platform.training.task",
    "Dataset": "everstep.platform.training.task",
    "Job": "everstep.submitting",
    "JobSpec": "everstep.platform.job.spec",
    "JsonLines": "everstep.storage.datasets.json_lines",
    "LaneContext": "everstep.platform.training.task",
    "Loss": "everstep.platform.training.task",
    "Mixture": "everstep.storage.datasets.mixture",
    "Parquet": "everstep.storage.datasets.parquet",
    "RunResult": "everstep.platform.job.result",
    "Session": "everstep.platform.training.session",
    "Settings": "everstep.platform.training.settings",
    "Task": "everstep.platform.training.task",
    "TextBytes": "everstep.storage.datasets.text",
    "Tokens": "everstep.storage.datasets.tokens",
    "run": "everstep.actors.launch",
    "submit": "everstep.submitting",
}

__all__ = [  # noqa: RUF022  # the order of the README: what a task needs, then what runs it
    "Task",
    "Loss",
    "Dataset",
    "TextBytes",
    "JsonLines",
    "Parquet",
    "Tokens",
    "Mixture",
    "LaneContext",
    "CommitEvent",
    "Session",
    "Settings",
    "JobSpec",
    "RunResult",
    "run",
    "submit",
    "Job",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'everstep' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""Everything that a supervisor needs to know of its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from everstep.platform.cluster.desk import Resume
from everstep.platform.job.spec import JobSpec


@dataclass(frozen=True)
class RunConfig:
    """Everything a supervisor needs. `host_name` is shown; `bind` is the interface to listen on."""

    spec: JobSpec
    spec_dir: Path
    run_id: str
    run_folder: Path
    token: str
    epoch: int
    resume: Resume
    metrics: Path | None
    host_name: str
    bind: str = "127.0.0.1"
    commit_id: str = ""  # of the task's repository
    embedded: bool = True  # everything ends with the driver; else managers keep the run's memory alive

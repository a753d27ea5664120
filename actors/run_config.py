"""Everything that a supervisor needs to know of its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from everstep.actors.inheritance import Inheritance
from everstep.actors.succession import Plan
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.spec import JobSpec

ORPHAN_S = 60.0


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
    plan: Plan | None = None  # of the succession; None: the run ends with its supervisor
    inheritance: Inheritance | None = None  # of a supervisor that was lost
    embedded: bool = True  # everything ends with the driver; else managers keep the run's memory alive

    @property
    def orphan_s(self) -> float:
        """How long managers wait for a successor: one that is started anew takes as long as this one took."""
        return max(ORPHAN_S, self.spec.timeouts.stall_s) if self.plan is not None else 0.0

"""Entry point of a supervisor inside a Ray actor: starts the run, returns the address of its endpoint."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import msgspec

from everstep.actors.host import OnExit
from everstep.actors.ray_host import RankResources, RayHost
from everstep.actors.run_config import RunConfig
from everstep.actors.run_folder import RunFolder
from everstep.actors.supervisor import Supervisor
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.spec import JobSpec
from everstep.storage.checkpoint import Checkpoint

log = logging.getLogger(__name__)

# How long a supervisor on a cluster keeps its result for a driver that may have died.
_LINGER_S = 60.0


class SupervisorConfig(msgspec.Struct, frozen=True):
    """`embedded`: the driver ends this actor; else it ends itself `_LINGER_S` after the run."""

    spec: dict[str, Any]
    spec_dir: str
    run_id: str
    actors: str  # what Ray's names of the run's actors begin with
    run_folder: str
    token: str
    epoch: int
    checkpoint: str  # folder to resume from, or ""
    nonfinite_in_a_row: int
    fingerprint: dict[str, str]
    passed_over: tuple[str, ...]
    metrics: str
    log_dir: str
    bind: str
    embedded: bool
    runtime_env: dict[str, Any]
    commit_id: str = ""


def main(config: bytes) -> str:
    """Starts the supervisor's threads in this process and returns host:port."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    c = msgspec.msgpack.decode(config, type=SupervisorConfig)
    spec = JobSpec.parse(c.spec)
    folder = RunFolder.at(Path(c.run_folder))
    if not c.embedded:  # it may live on another machine than the driver, and longer
        folder.create()
        folder.hold()
        folder.ensure_reaper()
    index = Checkpoint.open(c.checkpoint).index if c.checkpoint else None
    run_config = RunConfig(
        spec,
        Path(c.spec_dir),
        c.run_id,
        folder.path,
        c.token,
        c.epoch,
        Resume(c.checkpoint, index, c.nonfinite_in_a_row, c.fingerprint, c.passed_over),
        Path(c.metrics) if c.metrics else None,
        "ray",
        c.bind,
        c.commit_id,
        c.embedded,
    )
    wanted = RankResources(spec.resources.cpus) if c.embedded else _demands(spec)

    def make_host(on_exit: OnExit) -> RayHost:
        return RayHost(
            on_exit,
            run=c.actors,
            log_dir=Path(c.log_dir),
            resources=wanted,
            runtime_env=c.runtime_env or None,
            run_folder=folder,
        )

    supervisor = Supervisor(run_config, make_host)
    supervisor.start()
    if not c.embedded:
        threading.Thread(target=_leave_after, args=(supervisor,), name="linger", daemon=True).start()
    return supervisor.address


def _demands(spec: JobSpec) -> RankResources:
    """What a rank asks of a cluster. On an embedded Ray, one machine, custom resources and labels mean nothing."""
    r = spec.resources
    return RankResources(r.cpus, r.gpus, r.memory, dict(r.custom), dict(r.labels))


def _leave_after(supervisor: Supervisor) -> None:
    supervisor.wait()
    supervisor.end_processes()
    threading.Event().wait(_LINGER_S)
    os._exit(0)

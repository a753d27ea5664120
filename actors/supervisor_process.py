"""Entry point of a supervisor inside a Ray actor: starts the run, returns the address of its endpoint."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from everstep.actors.claims import Claims, FolderClaims
from everstep.actors.grants import Grants
from everstep.actors.host import OnExit
from everstep.actors.inheritance import Inheritance
from everstep.actors.name_keeper import NameKeeper
from everstep.actors.ray_claims import RayClaims
from everstep.actors.ray_controller import find_controller
from everstep.actors.ray_head import own_address
from everstep.actors.ray_host import RankResources, RayHost
from everstep.actors.ray_supervisor import start_standby
from everstep.actors.run_config import RunConfig
from everstep.actors.run_folder import RunFolder
from everstep.actors.succession import Plan
from everstep.actors.supervisor import Supervisor
from everstep.platform.cluster import controller_messages as cm
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.registry import readdress
from everstep.platform.job.spec import JobSpec
from everstep.storage.checkpoint import Checkpoint
from everstep.storage.manifest import run_folder

log = logging.getLogger(__name__)

# How long a supervisor on a cluster keeps its result for a driver that may have died.
_LINGER_S = 60.0


class SupervisorConfig(msgspec.Struct, frozen=True):
    """`bind`: "" for the address of its own node. `embedded`: the driver ends this actor; else it ends itself
    `_LINGER_S` after the run.
    """

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
    checkpoints: str = ""  # where epochs are claimed: the job's `checkpoint.to`, absolute; "": with Ray's head
    registry: str = ""  # the run's folder there, on the driver's machine


class StandbyConfig(msgspec.Struct, frozen=True):
    """The `number`th standby of the run's, for the supervisor at `address`."""

    supervisor: SupervisorConfig
    number: int
    address: str


C = TypeVar("C", SupervisorConfig, StandbyConfig)


ENDED = threading.Event()
"""The run of this process is over and its processes have ended; only its result is still here."""


def main(config: bytes) -> str:
    """Starts the supervisor's threads in this process and returns host:port."""
    c = prepare(config, SupervisorConfig)
    hold_folder(c)
    claims = claims_of(c)
    if not c.checkpoints:  # else the driver has claimed it
        claims.take(c.epoch)
    return supervise(c, claims, None).address


def prepare(config: bytes, kind: type[C]) -> C:
    """What every process of a supervisor begins with."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    return msgspec.msgpack.decode(config, type=kind)


def hold_folder(c: SupervisorConfig) -> None:
    """Keeps the run's memory on this node: a supervisor may live on another machine than the driver, and longer."""
    if not c.embedded:
        folder = RunFolder.at(Path(c.run_folder))
        folder.create()
        folder.hold()
        folder.ensure_reaper()


def claims_of(c: SupervisorConfig) -> Claims:
    if not c.checkpoints:
        return RayClaims(c.run_id)
    spec = JobSpec.parse(c.spec)
    return FolderClaims(run_folder(c.checkpoints, spec.name, spec.run_name))


def supervise(c: SupervisorConfig, claims: Claims, inheritance: Inheritance | None) -> Supervisor:
    """Starts the run's supervisor, or goes on as the one of the epoch after that of the books."""
    spec = JobSpec.parse(c.spec)
    folder = RunFolder.at(Path(c.run_folder))
    index = Checkpoint.open(c.checkpoint).index if c.checkpoint else None

    def start_next(number: int, address: str) -> None:
        standby = StandbyConfig(c, number, address)
        start_standby(
            c.actors, number, msgspec.msgpack.encode(standby), log_dir=Path(c.log_dir),
            runtime_env=c.runtime_env or None, run_folder=folder,
        )  # fmt: skip

    run_config = RunConfig(
        spec,
        Path(c.spec_dir),
        c.run_id,
        folder.path,
        c.token,
        c.epoch if inheritance is None else inheritance.known.epoch + 1,
        Resume(c.checkpoint, index, c.nonfinite_in_a_row, c.fingerprint, c.passed_over),
        Path(c.metrics) if c.metrics and Path(c.metrics).parent.is_dir() else None,
        "ray",
        c.bind or own_address(),
        c.commit_id,
        Plan(claims, start_next),
        inheritance,
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
            colocate=not c.embedded,
        )

    def make_granter(on_grant: Callable[[int, str, int], None], on_refused: Callable[[str], None]) -> Grants:
        r = spec.ranks
        enrolment = cm.Enrol(
            cm.VERSION, spec.name, spec.run_name, spec.priority, r.min, r.max, r.spares, wanted.bundle()
        )
        return Grants(find_controller, enrolment, on_grant, on_refused)

    supervisor = Supervisor(run_config, make_host, None if c.embedded else make_granter)
    if inheritance is not None:
        readdress(Path(c.registry), supervisor.address)  # the driver may be gone
    supervisor.start()
    keeper = None if c.embedded else NameKeeper(Path(c.registry), c.token)
    threading.Thread(target=_leave_after, args=(supervisor, keeper), name="linger", daemon=True).start()
    return supervisor


def _demands(spec: JobSpec) -> RankResources:
    """What a rank asks of a cluster. On an embedded Ray, one machine, custom resources and labels mean nothing."""
    r = spec.resources
    return RankResources(r.cpus, r.gpus, r.memory, dict(r.custom), dict(r.labels))


def _leave_after(supervisor: Supervisor, keeper: NameKeeper | None) -> None:
    supervisor.wait()
    if supervisor.superseded:
        os._exit(0)  # everything of the run is another one's
    if keeper is None:
        return  # the driver ends this actor
    supervisor.end_processes()
    ENDED.set()
    if keeper.taken.wait(_LINGER_S):  # there is no driver that will ask for the result any more
        keeper.finish(supervisor.result())
    os._exit(0)

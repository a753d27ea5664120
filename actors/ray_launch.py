"""Starts a run on Ray: an embedded one that ends with this process, or a cluster that outlives it.

Call it on the main thread: Ray ties an embedded cluster's daemons to the thread that started them.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import ray

from everstep.actors import ray_head
from everstep.actors.client import SupervisorClient
from everstep.actors.provenance import commit_of
from everstep.actors.ray_capacity import check_fits
from everstep.actors.ray_cluster import ConnectedRay, EmbeddedRay, connect
from everstep.actors.ray_controller import ensure_controller
from everstep.actors.ray_driver import beside_the_jobs, job_runtime_env
from everstep.actors.ray_supervisor import (
    RunExists,
    SupervisorFailed,
    SupervisorRef,
    collect,
    find_supervisor,
    start_supervisor,
)
from everstep.actors.run_folder import RunFolder
from everstep.actors.supervisor_process import SupervisorConfig
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.check import check_nodes
from everstep.platform.job.client import RunHandle
from everstep.platform.job.errors import SpecError
from everstep.platform.job.registry import Registration
from everstep.platform.job.result import RunResult
from everstep.platform.job.shipping import rays_own
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event, Status

log = logging.getLogger(__name__)
_context: Any = ray.get_runtime_context
T = TypeVar("T")

SUCCESSION_S = 60.0  # a supervisor that is lost has a successor within seconds; its store may be slow
_END_S = 10.0
_LOOK_S = 1.0


def launch_ray(
    spec: JobSpec, spec_dir: Path, address: str | None, resume: Resume, epoch: int, registration: Registration
) -> RunHandle:
    """Starts the run; `address` (else RAY_ADDRESS) names a cluster, without one a Ray is embedded.

    Raises SpecError for what only the cluster can tell, ConnectionError when there is no such cluster or the
    supervisor cannot start there.
    """
    where = address or os.environ.get("RAY_ADDRESS")
    if not where:
        check_nodes(spec, 1)
    try:
        return _RayRun(spec, spec_dir, where, resume, epoch, registration)
    except SpecError:
        raise
    except (SupervisorFailed, RunExists, RuntimeError, ValueError) as error:
        place = f"the Ray cluster at {where}" if where else "an embedded local Ray"
        raise ConnectionError(f"the run could not be started on {place}: {error}") from error


def _nodes() -> int:
    nodes: Any = ray.nodes  # untyped
    return sum(node["Alive"] for node in nodes())


class _RayRun:
    """Implements `RunHandle`; the supervisor is a detached actor."""

    def __init__(
        self,
        spec: JobSpec,
        spec_dir: Path,
        address: str | None,
        resume: Resume,
        epoch: int,
        registration: Registration,
    ) -> None:
        self._folder = RunFolder(f"{spec.name}-{secrets.token_hex(4)}")
        self._folder.create()
        self._folder.hold()
        # On a cluster the name is what makes a second live run of this name impossible.
        self._actors = self._folder.runid if address is None else f"{spec.name}.{spec.run_name}"
        self._ray: EmbeddedRay | ConnectedRay | None = None
        self._reference: SupervisorRef | None = None
        self._client: SupervisorClient | None = None
        self._result: RunResult | None = None
        self._events: list[Event] = []
        self._status: Status | None = None
        self._closed = False
        try:
            self._folder.ensure_reaper()
            runtime_env: dict[str, Any] = dict(spec.runtime_env)
            actors_dir, bind = str(spec_dir), "127.0.0.1"
            if address is None:
                cpus = int((spec.ranks.max + spec.ranks.spares) * spec.resources.cpus) + 1
                self._ray = EmbeddedRay.start(cpus, path=[str(spec_dir)], run_folder=self._folder)
            else:
                runtime_env, actors_dir = _shipped(runtime_env, spec_dir)
                self._ray = connect(address, runtime_env or None)
                # With what Ray has uploaded named by its URI: only a driver may name local folders.
                runtime_env = dict(_context().runtime_env)
                bind = ""  # of the node that it comes to live on
                ensure_controller(address, spec.runtime_env)
            if address is not None:
                check_nodes(spec, _nodes())
                check_fits(spec)
            config = SupervisorConfig(
                spec=spec.to_dict(),
                spec_dir=actors_dir,
                run_id=self._folder.runid,
                actors=self._actors,
                run_folder=str(self._folder.path),
                token=registration.token,
                epoch=epoch,
                checkpoint=resume.folder,
                nonfinite_in_a_row=resume.nonfinite_in_a_row,
                fingerprint=dict(resume.fingerprint),
                passed_over=resume.passed_over,
                metrics=str(registration.metrics) if "jsonl" in spec.log else "",
                log_dir=str(registration.logs),
                bind=bind,
                embedded=address is None,
                runtime_env=runtime_env,
                commit_id=commit_of(spec_dir),
                checkpoints=spec.checkpoint_url(spec_dir) or "",
                registry=str(registration.path),
            )
            self._registration = registration
            self._reference = start_supervisor(
                self._actors, msgspec.msgpack.encode(config), log_dir=registration.logs,
                runtime_env=runtime_env or None, run_folder=self._folder,
            )  # fmt: skip
            self._client = SupervisorClient(self._reference.address, registration.token)
            registration.update(supervisor=self._reference.address, state="running")
        except BaseException:
            self.close()
            raise

    def status(self) -> Status:
        if self._client is not None:
            self._status = self._ask(lambda client: client.status())
        assert self._status is not None, "status before the supervisor was up"
        return self._status

    def events(self, after: int) -> list[Event]:
        if self._client is None:
            return [event for event in self._events if event.id > after]
        return self._ask(lambda client: client.events(after))

    def scale(self, ranks: int) -> str:
        return self._ask(lambda client: client.scale(ranks)) if self._client is not None else "the run has ended"

    def save(self) -> str:
        return self._ask(lambda client: client.save()) if self._client is not None else "the run has ended"

    def drain(self, node: str, rank: int | None) -> str:
        return self._client.drain(node, rank) if self._client is not None else "the run has ended"

    def stop(self, reason: str) -> None:
        if self._client is not None:
            self._ask(lambda client: client.stop(reason))

    def result(self) -> RunResult | None:
        if self._result is None and self._client is not None:
            self._result = self._ask(lambda client: client.result())
        return self._result

    def wait(self, timeout_s: float) -> bool:
        """True once there is a result."""
        if self._client is not None and self._result is None:
            self._ask(lambda client: client.wait(timeout_s))
        return self.result() is not None

    def leave(self) -> bool:
        if isinstance(self._ray, EmbeddedRay) or self._reference is None:
            return False
        self._closed = True
        self._folder.let_go()  # not released: the supervisor holds it
        return True

    def _ask(self, what: Callable[[SupervisorClient], T], patience_s: float = SUCCESSION_S) -> T:
        """Asks the supervisor, or the one that has taken its place meanwhile. Raises ConnectionError."""
        deadline = time.monotonic() + patience_s
        while True:
            assert self._client is not None
            try:
                return what(self._client)
            except ConnectionError:
                found = find_supervisor(self._actors, _LOOK_S)
                if found is None or found.address == self._client.address:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_LOOK_S / 4)
                    continue
            log.warning("the run's supervisor is at %s now", found.address)
            self._reference, self._client = found, SupervisorClient(found.address, self._registration.token)
            self._registration.update(supervisor=found.address)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._client is not None:
            try:
                # Its ranks and managers end, and it books what it has.
                self._ask(lambda client: client.close(), _END_S)
                self._result = self._client.result()
                self._status, self._events = self._client.status(), self._client.events(0)
            except ConnectionError as error:
                log.warning("the supervisor did not answer at the end: %s", error)
            self._client = None
        if self._reference is not None:
            self._reference.end()
            if ray_head.answers():
                collect(self._actors)
            else:
                log.warning("Ray's head is away: what is left of the run's actors and placement groups stays for now")
        if self._ray is not None:
            self._ray.close()
        self._folder.release()


def _shipped(runtime_env: dict[str, Any], spec_dir: Path) -> tuple[dict[str, Any], str]:
    """The runtime_env for a cluster, and the spec's folder as the actors see it (relative to their own).

    Under `ray job submit --working-dir` the job's folder is there already and this process runs in it.
    """
    job = job_runtime_env()
    runtime_env = beside_the_jobs(runtime_env, job)
    if "working_dir" in job or "working_dir" in runtime_env:
        return runtime_env, os.path.relpath(spec_dir)
    excludes = [*runtime_env.get("excludes", []), *rays_own(spec_dir)]
    return {**runtime_env, "working_dir": str(spec_dir), **({"excludes": excludes} if excludes else {})}, "."

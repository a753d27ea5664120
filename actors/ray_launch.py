"""Starts a run on Ray: an embedded one that ends with this process, or a cluster that outlives it.

Call it on the main thread: Ray ties an embedded cluster's daemons to the thread that started them.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

import msgspec
import ray

from everstep.actors.client import SupervisorClient
from everstep.actors.provenance import commit_of
from everstep.actors.ray_cluster import ConnectedRay, EmbeddedRay, connect
from everstep.actors.ray_supervisor import RunExists, SupervisorFailed, SupervisorRef, collect, start_supervisor
from everstep.actors.run_folder import RunFolder
from everstep.actors.supervisor_process import SupervisorConfig
from everstep.platform.cluster.desk import Resume
from everstep.platform.job.check import check_nodes
from everstep.platform.job.client import RunHandle
from everstep.platform.job.errors import SpecError
from everstep.platform.job.registry import Registration
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event, Status

log = logging.getLogger(__name__)
_util: Any = ray.util  # untyped
_context: Any = ray.get_runtime_context


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
                bind = str(_util.get_node_ip_address())
            if address is not None:
                check_nodes(spec, _nodes())
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
            )
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
            self._status = self._client.status()
        assert self._status is not None, "status before the supervisor was up"
        return self._status

    def events(self, after: int) -> list[Event]:
        if self._client is None:
            return [event for event in self._events if event.id > after]
        return self._client.events(after)

    def scale(self, ranks: int) -> str:
        return self._client.scale(ranks) if self._client is not None else "the run has ended"

    def save(self) -> str:
        return self._client.save() if self._client is not None else "the run has ended"

    def stop(self, reason: str) -> None:
        if self._client is not None:
            self._client.stop(reason)

    def result(self) -> RunResult | None:
        if self._result is None and self._client is not None:
            self._result = self._client.result()
        return self._result

    def wait(self, timeout_s: float) -> bool:
        """True once there is a result."""
        if self._client is not None and self._result is None:
            self._client.wait(timeout_s)
        return self.result() is not None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._client is not None:
            try:
                self._client.close()  # its ranks and managers end, and it books what it has
                self._result = self._client.result()
                self._status, self._events = self._client.status(), self._client.events(0)
            except ConnectionError as error:
                log.warning("the supervisor did not answer at the end: %s", error)
            self._client = None
        if self._reference is not None:
            self._reference.end()
            collect(self._actors)
        if self._ray is not None:
            self._ray.close()
        self._folder.release()


def _shipped(runtime_env: dict[str, Any], spec_dir: Path) -> tuple[dict[str, Any], str]:
    """The runtime_env for a cluster, and the spec's folder as the actors see it (relative to their own).

    Under `ray job submit` the job's working_dir is there already and this process runs in it.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "working_dir" in runtime_env:
        return runtime_env, os.path.relpath(spec_dir)
    return {**runtime_env, "working_dir": str(spec_dir)}, "."

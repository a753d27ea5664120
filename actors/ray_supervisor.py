"""A run's supervisor as a detached Ray actor (everstep/RUN/supervisor), created by the job's own driver.

The actor is a shell: it imports an entry point, calls it with the config, and keeps the address that the
entry returns. The entry starts the run's threads and its gRPC endpoint and returns; everything else goes
through that endpoint, not through Ray. Created by the driver, and so with the driver's runtime_env: an actor
that another job's actor creates would import that job's code and print into its logs.

Functions may be called from any thread of a process that is connected to a Ray.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util import list_named_actors
from ray.util.placement_group import (
    get_placement_group,
    placement_group_table,
    remove_placement_group,
)

from everstep.actors.ray_actors import Home, Shell, Whereabouts, machine_id
from everstep.actors.ray_cluster import NAMESPACE
from everstep.actors.run_folder import RunFolder

DEFAULT_ENTRY = "everstep.actors.supervisor_process:main"
"""main(config: bytes) -> str: starts the supervisor in this process, returns the address of its endpoint."""

START_S = 60.0
"""For a worker process to start and the supervisor to be up; a cluster may have to install a runtime_env
first.
"""


class RunExists(RuntimeError):
    """There is a live run of this name."""


class SupervisorFailed(RuntimeError):
    """The supervisor's process or its entry point failed before there was an address; says why."""


class Supervisor(Shell):
    """The actor."""

    def __init__(self, name: str, home: Home) -> None:
        super().__init__(name, home)
        self._address = ""

    def serve(self, entry: str, config: bytes) -> str:
        """Calls the entry point, once; returns the address."""
        module, _, function = entry.partition(":")
        main = cast("Callable[[bytes], str]", getattr(importlib.import_module(module), function))
        self._address = main(config)
        return self._address

    def address(self) -> str:
        """The address, for those who look for the run later; "" before `serve` is done."""
        return self._address


@dataclass(frozen=True)
class SupervisorRef:
    """A supervisor that runs."""

    handle: Any
    address: str
    pid: int
    node_id: str

    def alive(self, timeout_s: float = 5.0) -> bool:
        """False if the actor is known to be dead or does not answer in time."""
        try:
            ray.get(self.handle.address.remote(), timeout=timeout_s)
        except (RayActorError, GetTimeoutError):
            return False
        return True

    def end(self, timeout_s: float = 5.0) -> None:
        """Ends the process and returns when Ray has confirmed it, or after `timeout_s`. Idempotent."""
        try:
            ray.get(self.handle.leave.remote(), timeout=timeout_s)
        except RayActorError:
            return
        except GetTimeoutError:
            ray.kill(self.handle, no_restart=True)


def start_supervisor(
    run: str,
    config: bytes,
    *,
    log_dir: Path,
    entry: str = DEFAULT_ENTRY,
    runtime_env: Mapping[str, Any] | None = None,
    run_folder: RunFolder | None = None,
    timeout_s: float = START_S,
) -> SupervisorRef:
    """Starts a run's supervisor and waits for its address.

    It takes no CPU in Ray's books. Raises RunExists, or SupervisorFailed (an exception in the entry, a
    process that died, or no answer within `timeout_s`); nothing is left of a supervisor that failed.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    home = Home(machine_id(), str(log_dir.absolute()), str(run_folder.path) if run_folder else None)
    options: dict[str, Any] = {
        "name": _name(run, "supervisor"),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": 0,
    }
    if runtime_env:
        options["runtime_env"] = dict(runtime_env)
    try:
        actor_class: Any = ray.remote(Supervisor)
        handle: Any = actor_class.options(**options).remote("supervisor", home)
    except ValueError as error:
        if find_supervisor(run) is None:
            raise SupervisorFailed(f"Ray refuses the supervisor of run {run!r}: {error}") from error
        raise RunExists(f"run {run!r} has a live supervisor on this cluster; stop it or name this run") from error
    try:
        where, address = ray.get([handle.whereabouts.remote(), handle.serve.remote(entry, config)], timeout=timeout_s)
    except RayTaskError as error:
        ray.kill(handle, no_restart=True)
        raise SupervisorFailed(f"the supervisor of run {run!r} failed to start:\n{error}") from error
    except RayActorError as error:
        raise SupervisorFailed(f"the supervisor of run {run!r} died while it started: {error}") from error
    except GetTimeoutError as error:
        ray.kill(handle, no_restart=True)
        raise SupervisorFailed(f"the supervisor of run {run!r} was not up within {timeout_s} s") from error
    return _ref(handle, where, address)


def find_supervisor(run: str, timeout_s: float = 5.0) -> SupervisorRef | None:
    """The supervisor of a run that lives on this cluster; None if there is none, or it does not answer."""
    try:
        handle: Any = ray.get_actor(_name(run, "supervisor"), namespace=NAMESPACE)
        asked: Any = [handle.whereabouts.remote(), handle.address.remote()]
        where, address = ray.get(asked, timeout=timeout_s)
    except (ValueError, RayActorError, GetTimeoutError):
        return None
    return _ref(handle, where, address) if address else None


def collect(run: str) -> list[str]:
    """Ends every actor and placement group of a run that has no owner any more; returns the actors' names."""
    prefix = _name(run, "")
    found = []
    for entry in list_named_actors(all_namespaces=True):
        if entry["namespace"] != NAMESPACE or not entry["name"].startswith(prefix):
            continue
        try:
            ray.kill(ray.get_actor(entry["name"], namespace=NAMESPACE), no_restart=True)
        except ValueError:
            continue  # died meanwhile
        found.append(entry["name"].removeprefix(prefix))
    for group in placement_group_table().values():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))
    return sorted(found)


def _name(run: str, part: str) -> str:
    return f"everstep/{run}/{part}"


def _ref(handle: Any, where: Whereabouts, address: str) -> SupervisorRef:
    return SupervisorRef(handle, address, where.pid, where.node_id)

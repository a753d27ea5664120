"""A run's supervisor as a detached Ray actor (everstep/RUN/supervisor), created by the job's own driver.

The actor is a shell: it imports an entry point, calls it with the config, and keeps the address that the
entry returns. The entry starts the run's threads and its gRPC endpoint and returns; everything else goes
through that endpoint, not through Ray. Created by the driver, and so with the driver's runtime_env: an actor
that another job's actor creates would import that job's code and print into its logs.

Functions may be called from any thread of a process that is connected to a Ray.
"""

import importlib
import os
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
from everstep.actors.ray_head import off_head, off_this_node
from everstep.actors.run_folder import RunFolder
from everstep.collectives.addresses import NODE_VARIABLE
from everstep.platform.job.errors import VersionMismatch
from everstep.platform.job.versions import told_by

DEFAULT_ENTRY = "everstep.actors.supervisor_process:main"
"""main(config: bytes) -> str: starts the supervisor in this process, returns the address of its endpoint."""

STANDBY_ENTRY = "everstep.actors.standby_process:main"
"""main(config: bytes) -> () -> str: starts a standby in this process; its address is "" until it has taken over."""

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
        self._address: str | Callable[[], str] = ""

    def serve(self, entry: str, config: bytes) -> str:
        """Calls the entry point, once; returns the address."""
        os.environ[NODE_VARIABLE] = ray.get_runtime_context().get_node_id()
        module, _, function = entry.partition(":")
        main = cast("Callable[[bytes], str | Callable[[], str]]", getattr(importlib.import_module(module), function))
        self._address = main(config)
        return self.address()

    def ended(self) -> bool:
        """Whether its run is over, and only the result is kept."""
        return bool(importlib.import_module("everstep.actors.supervisor_process").ENDED.is_set())

    def address(self) -> str:
        """The address, for those who look for the run later; "" before `serve` is done, and of a standby."""
        return self._address if isinstance(self._address, str) else self._address()


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

    It takes no CPU in Ray's books, and lives off the head's node where there is another. Raises RunExists, or
    SupervisorFailed (an exception in the entry, a process that died, or no answer within `timeout_s`); nothing
    is left of a supervisor that failed.
    """
    if (former := find_supervisor(run)) is not None:
        if not ray.get(former.handle.ended.remote(), timeout=timeout_s):
            raise _exists(run)
        former.end()
        collect(run)
    try:
        place = {"label_selector": selector} if (selector := off_head()) else {}
        handle: Any = _actor(run, "supervisor", log_dir, runtime_env, run_folder, place)
    except ValueError as error:
        if not _supervisors(run):
            raise SupervisorFailed(f"Ray refuses the supervisor of run {run!r}: {error}") from error
        raise _exists(run) from error
    try:
        where, address = ray.get([handle.whereabouts.remote(), handle.serve.remote(entry, config)], timeout=timeout_s)
    except RayTaskError as error:
        ray.kill(handle, no_restart=True)
        raise SupervisorFailed(f"the supervisor of run {run!r} failed to start:\n{error}") from error
    except RayActorError as error:
        if why := told_by(str(error).strip()):
            raise VersionMismatch(why) from error
        raise SupervisorFailed(f"the supervisor of run {run!r} died while it started: {error}") from error
    except GetTimeoutError as error:
        ray.kill(handle, no_restart=True)
        raise SupervisorFailed(f"the supervisor of run {run!r} was not up within {timeout_s} s") from error
    except BaseException:  # a signal: nobody would end it any more
        ray.kill(handle, no_restart=True)
        collect(run)
        raise
    return _ref(handle, where, address)


def _exists(run: str) -> RunExists:
    return RunExists(
        f"run {run!r} has a live supervisor on this cluster, whose driver may be gone: it goes on by itself;"
        " everstep status and everstep stop reach it on the head, or give this run a name: --set run=OTHER"
    )


def start_standby(
    run: str,
    number: int,
    config: bytes,
    *,
    log_dir: Path,
    runtime_env: Mapping[str, Any] | None = None,
    run_folder: RunFolder | None = None,
) -> None:
    """Starts a run's `number`th standby, on another node than this process's where there is one; does not wait."""
    place = {"label_selector": selector} if (selector := off_this_node()) else {}
    handle = _actor(run, f"standby-{number}", log_dir, runtime_env, run_folder, place)
    handle.serve.remote(STANDBY_ENTRY, config)


def find_supervisor(run: str, timeout_s: float = 5.0) -> SupervisorRef | None:
    """The supervisor of a run that lives on this cluster, the newest where it was succeeded; None if there is none,
    or none answers."""
    asked: dict[Any, tuple[int, Any]] = {}
    for number, handle in _supervisors(run).items():
        asked[handle.address.remote()] = (number, handle)
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
    leading: tuple[int, Any, str] = (-1, None, "")
    for ref in answered:
        try:
            address: Any = ray.get(ref)
        except RayActorError:
            continue
        number, handle = asked[ref]
        if address and number > leading[0]:
            leading = (number, handle, address)
    number, handle, address = leading
    if handle is None:
        return None
    try:
        where: Any = ray.get(handle.whereabouts.remote(), timeout=timeout_s)
    except (RayActorError, GetTimeoutError):
        return None
    return _ref(handle, where, address)


def _supervisors(run: str) -> dict[int, Any]:
    """Handles of the supervisor (0) and of standbys, by number; some may be dead."""
    found: dict[int, Any] = {}
    for entry in list_named_actors(all_namespaces=True):
        part = entry["name"].removeprefix(_name(run, "")) if entry["namespace"] == NAMESPACE else ""
        kind, _, number = part.partition("-")
        if part == "supervisor" or (kind == "standby" and number.isdecimal()):
            try:
                found[int(number or 0)] = ray.get_actor(entry["name"], namespace=NAMESPACE)
            except ValueError:
                continue  # died meanwhile
    return found


def _actor(
    run: str,
    name: str,
    log_dir: Path,
    runtime_env: Mapping[str, Any] | None,
    run_folder: RunFolder | None,
    place: Mapping[str, Any],
) -> Any:
    """`place`: options that say where. Raises ValueError where the name is taken."""
    log_dir.mkdir(parents=True, exist_ok=True)
    home = Home(machine_id(), str(log_dir.absolute()), str(run_folder.path) if run_folder else None)
    options: dict[str, Any] = {
        "name": _name(run, name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": 0,
        **place,
    }
    if runtime_env:
        options["runtime_env"] = dict(runtime_env)
    actor_class: Any = ray.remote(Supervisor)
    return actor_class.options(**options).remote(name, home)


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

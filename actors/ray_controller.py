"""The cluster's controller as a detached Ray actor, everstep/controller: made by the first driver that needs it.

It belongs to no job: it is created by a short-lived process without the job's working_dir, so that no job's code is
in it. Ray restarts it when it dies; its state is read again by actors.controller. It also ends what dead runs left:
actors and placement groups of runs that have neither supervisor nor standby.

    $EVERSTEP_CONTROLLER_STATE    a path or URL for its state, else Ray's key-value store   } of the driver that
    $EVERSTEP_CONTROLLER_GRACE_S  how long runs may take to enrol again (30)                } creates it
    $EVERSTEP_COLLECT_AFTER_S     how long a run without owners is left alone (60)          }
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table

from everstep.actors.controller import Controller
from everstep.actors.controller_state import FolderState
from everstep.actors.orphans import Orphans, by_run
from everstep.actors.ray_capacity_books import RayCapacity
from everstep.actors.ray_cluster import NAMESPACE, connect
from everstep.actors.ray_controller_state import RayKvState
from everstep.actors.ray_supervisor import collect
from everstep.collectives.control import call
from everstep.collectives.errors import CollectiveError
from everstep.platform.cluster.allocation import GRACE_S
from everstep.platform.cluster.controller_messages import Table
from everstep.storage.stores.opening import folder_at

log = logging.getLogger(__name__)

NAME = "everstep/controller"
STATE_VARIABLE = "EVERSTEP_CONTROLLER_STATE"
GRACE_VARIABLE = "EVERSTEP_CONTROLLER_GRACE_S"
COLLECT_VARIABLE = "EVERSTEP_COLLECT_AFTER_S"
COLLECT_AFTER_S = 60.0
_COLLECT_EVERY_S = 5.0
_START_S = 60.0
# Of a job's runtime_env, what everstep itself may be installed by.
_INSTALLS = ("pip", "uv", "conda", "py_modules", "image_uri", "container", "nsight", "config")


class ControllerActor:
    """The actor. What keeps the controller from serving is raised by the constructor: Ray then does not try again."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        util: Any = ray.util
        url = settings.get(STATE_VARIABLE)
        self._controller = Controller(
            FolderState(folder_at(url)) if url else RayKvState(),
            RayCapacity(),
            bind=str(util.get_node_ip_address()),
            on_end=_exit,
            grace_s=float(settings.get(GRACE_VARIABLE, GRACE_S)),
        )
        after_s = float(settings.get(COLLECT_VARIABLE, COLLECT_AFTER_S))
        threading.Thread(target=_collect, args=(after_s,), name="collect", daemon=True).start()

    def endpoint(self) -> tuple[str, str]:
        """(address, token) for supervisors and for those who look."""
        return self._controller.address, self._controller.token


def _exit(reason: str) -> None:
    print(f"everstep: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _collect(after_s: float) -> None:
    """A thread of the actor."""
    orphans = Orphans(after_s)
    while True:
        time.sleep(_COLLECT_EVERY_S)
        try:
            for run in orphans.look(by_run(_names()), time.monotonic()):
                log.warning("run %s has had no supervisor for %g s; ended: %s", run, after_s, ", ".join(collect(run)))
        except (RayError, RuntimeError) as error:  # the head is away
            log.warning("nothing can be collected now: %s", error)


def _names() -> list[str]:
    actors: Any = list_named_actors(all_namespaces=True)
    table: Any = placement_group_table
    groups = [group["name"] for group in table().values() if group["state"] != "REMOVED"]
    return [entry["name"] for entry in actors if entry["namespace"] == NAMESPACE] + groups


# ---- for drivers and supervisors ------------------------------------------------------------------------


def find_controller(timeout_s: float = 5.0) -> tuple[str, str] | None:
    """(address, token), None where there is no controller or it does not answer now. Any thread."""
    try:
        handle: Any = ray.get_actor(NAME, namespace=NAMESPACE)
        address, token = ray.get(handle.endpoint.remote(), timeout=timeout_s)
    except (ValueError, RayActorError, GetTimeoutError):
        return None
    return address, token


def ensure_controller(address: str, runtime_env: Mapping[str, Any]) -> tuple[str, str]:
    """The controller of the cluster that this process is connected to, made if need be. Raises ConnectionError."""
    found = find_controller()
    if found is not None:
        return found
    installs = {name: value for name, value in runtime_env.items() if name in _INSTALLS}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    code = "import sys; from everstep.actors.ray_controller import create; create(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, address, json.dumps(installs)],
        env=environment, capture_output=True, text=True, timeout=2 * _START_S, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return _endpoint()
    raise ConnectionError(f"the cluster's controller does not start: {_reason(done.stderr)}")


def create(address: str, installs: str) -> None:
    """The process that `ensure_controller` starts; get_if_exists, as another driver may be doing the same."""
    cluster = connect(address, json.loads(installs) or None)
    names = (STATE_VARIABLE, GRACE_VARIABLE, COLLECT_VARIABLE)
    settings = {name: os.environ[name] for name in names if os.environ.get(name)}
    actor_class: Any = ray.remote(ControllerActor)
    handle: Any = actor_class.options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, max_task_retries=-1, num_cpus=0,
        get_if_exists=True,
    ).remote(settings)  # fmt: skip
    try:
        ray.get(handle.endpoint.remote(), timeout=_START_S)
    except (RayError, GetTimeoutError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    cluster.close()


def read_table(address: str) -> Table | None:
    """The table of the controller of the cluster at `address`; None where it has none. Raises ConnectionError.

    Connects this process to that cluster, and disconnects it.
    """
    try:
        cluster = connect(address)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(str(error)) from error
    try:
        found = find_controller()
        if found is None:
            return None
        reply = call(*found, msgspec.msgpack.encode({"do": "table"}))
    except CollectiveError as error:
        raise ConnectionError(str(error)) from error
    finally:
        cluster.close()
    return msgspec.json.decode(reply, type=Table)


def _endpoint() -> tuple[str, str]:
    handle: Any = ray.get_actor(NAME, namespace=NAMESPACE)
    try:
        address, token = ray.get(handle.endpoint.remote(), timeout=_START_S)
    except (RayActorError, RayTaskError, GetTimeoutError) as error:
        raise ConnectionError(f"the cluster's controller does not answer: {error}") from error
    return address, token


def _reason(text: str) -> str:
    """The line that says why, out of Ray's long message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "AnotherController" in line or "StateUnavailable" in line]
    return (telling or lines or ["it says nothing"])[-1].rpartition("controller_state.")[2]

"""Where actors live: a Ray of our own on this machine, or a cluster that exists.

`EmbeddedRay` starts a fresh local Ray whatever RAY_ADDRESS says and whatever else runs on the machine, on the
loopback interface, with a token and a temporary folder of its own, and ends exactly the processes it started.
`connect` joins a cluster. Either one is the process's one connection to Ray.

Measured on 2 cores (Ray 2.60, 8 logical CPUs), from `ray.init` to its return, and for `ray.shutdown`:

    ray.init(address="local", include_dashboard=False)      5.9 s   1.4 s
    dashboard head and agent in their minimal form          3.9 s   1.4 s
    no autoscaler monitor and no log monitor either         2.7 s   0.3 s    (what we do, see `_lean`)

The first actor answers 1 s later, six after 1.6 s: Ray prestarts workers for the first driver.

Owns: Ray's processes and folder. Start and close on the main thread: Ray asks the kernel to end its daemons
with the thread that started them.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray._private.node
import ray._private.ray_constants
import ray._private.utils
import ray._private.worker
import ray._raylet
from ray.exceptions import AuthenticationError

from everstep.actors.ray_driver import Prints, under_job
from everstep.actors.run_folder import RunFolder, kill_processes, marked_processes, start_time

logger = logging.getLogger(__name__)
_raylet: Any = ray._raylet  # compiled, without types

NAMESPACE = "everstep"

OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's least is 75 MiB. We send nothing through it; shared memory belongs to the segments."""

LONGEST_FOLDER = 40
"""Ray puts sockets into session_DATE_TIME_PID/sockets/ below its folder; their paths have at most 107 B."""

END_WAIT_S = 3.0
REACH_S = 5.0  # for a cluster's head to accept a connection
"""For what is left after `ray.shutdown`, which ends the daemons itself, to go once it is killed."""


class EmbeddedRay:
    """A local Ray that belongs to this process."""

    def __init__(
        self, folder: Path, address: str, daemons: list[tuple[int, int]], former: dict[str, str | None]
    ) -> None:
        """Not for callers: use `start`. `daemons`: (pid, start time); `former`: environment to put back."""
        self.folder = folder
        self.address = address
        self._daemons = daemons
        self._former = former
        self._closed = False

    @classmethod
    def start(
        cls,
        cpus: int,
        *,
        gpus: int | None = None,
        path: Sequence[str] = (),
        run_folder: RunFolder | None = None,
    ) -> Self:
        """Starts it and connects this process; takes 2-3 s.

        cpus: logical CPUs, enough for ranks and spares; they need not exist. gpus: None counts the machine's.
        path: import path for the actors, before this process's PYTHONPATH; everstep itself is always on it.
        run_folder: its reaper ends what outlives a SIGKILL of this process, and removes the temporary folder.
        Raises RuntimeError where this process is connected to a Ray already.
        """
        if ray.is_initialized():
            raise RuntimeError("this process is already connected to a Ray; close that connection first")
        folder = _make_folder()
        if run_folder is not None:
            run_folder.register_folder(folder)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        source = str(Path(__file__).absolute().parents[2])
        python_path = [*path, source, *filter(None, [os.environ.get("PYTHONPATH")])]
        former = _set_environment(
            {
                # Ray's own default writes a world-readable ~/.ray/auth_token. Kept until `close`.
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                "RAY_AUTH_TOKEN": None,
            }
        )
        for_daemons = _set_environment(
            {
                "PYTHONPATH": os.pathsep.join(python_path),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for "my address is 127.0.0.1"
                "RAY_ADDRESS": None,
                **dict([_mark(folder).split("=", 1)]),
            }
        )
        _reload_authentication()
        _redirect_errors()
        try:
            with _lean(), _our_signals():
                context: Any = ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    namespace=NAMESPACE,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder / "ray"),  # Ray opens it to everybody; `folder` stays ours alone
                )
        except BaseException:
            cls(folder, "", _daemons(folder), former).close()
            raise
        finally:
            _set_environment(for_daemons)
        embedded = cls(folder, str(context.address_info["gcs_address"]), _daemons(folder), former)
        if run_folder is not None:
            # The agents would notice the raylet's death after a minute, a worker that is just starting never.
            run_folder.register_mark(_mark(folder))
            for pid, _ in embedded.processes():
                run_folder.register_pid(pid)
        return embedded

    def processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of every living process of this Ray: daemons, agents, workers and what they
        started.
        """
        daemons = [(pid, started) for pid, started in self._daemons if start_time(pid) == started]
        # By descent, for those that paint their title over their environment; by mark, for orphans.
        return sorted({*daemons, *_descendants([pid for pid, _ in daemons]), *marked_processes(_mark(self.folder))})

    def close(self) -> None:
        """Ends Ray, frozen actors included, and removes its folder; about 0.5 s; idempotent."""
        if self._closed:
            return
        self._closed = True
        known = self.processes()
        ray.shutdown()
        kill_processes(known, END_WAIT_S)
        kill_processes(self.processes(), END_WAIT_S)  # what the raylet started while we looked
        shutil.rmtree(self.folder, ignore_errors=True)
        _set_environment(self._former)
        _reload_authentication()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ConnectedRay:
    """A connection to a cluster that is not ours."""

    def __init__(self, address: str, prints: Prints | None = None) -> None:
        """Not for callers: use `connect`."""
        self.address = address
        self._prints = prints

    def close(self) -> None:
        """Disconnects; detached actors stay. Under a Ray job the last prints of ranks come first. Idempotent."""
        if self._prints is not None and ray.is_initialized():
            self._prints.settle()
        ray.shutdown()


def connect(address: str, runtime_env: Mapping[str, Any] | None = None) -> ConnectedRay:
    """Connects this process to the cluster at HOST:PORT, or "auto" for the one on this machine.

    Ray looks for a token by itself only for "auto"; for an address it wants RAY_AUTH_MODE=token, which a
    driver under `ray job submit` has. Elsewhere we set it where a token is (RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token): a cluster without authentication does not mind one.
    Under a Ray job what ranks print comes into this process's output, which is the job's log.
    Raises ValueError for ray:// (a thin client sees neither actors' deaths nor nodes as we need them),
    RuntimeError where this process is connected already, ConnectionError where there is no cluster.
    """
    if address.startswith("ray://"):
        raise ValueError(f"address {address!r}: want HOST:PORT of the cluster's head, not Ray Client's ray://")
    if ray.is_initialized():
        raise RuntimeError("this process is already connected to a Ray; close that connection first")
    use_token()
    prints = Prints() if under_job() else None
    _redirect_errors(prints)
    if address != "auto":
        _reachable(address)
    try:
        with _our_signals():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                runtime_env=dict(runtime_env) if runtime_env else None,
                log_to_driver=prints is not None,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, AuthenticationError) as error:
        where = "RAY_AUTH_TOKEN_PATH (a file), RAY_AUTH_TOKEN, or ~/.ray/auth_token"
        raise ConnectionError(
            f"the cluster at {address} lets nobody in: {error}; most often it wants another token ({where})"
        ) from error
    return ConnectedRay(address, prints)


def use_token() -> bool:
    """Has Ray's library send the token that this user has, if there is one; says whether there is."""
    try:
        if not _raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            return False
    except AuthenticationError:  # RAY_AUTH_TOKEN_PATH names a file that is not there
        return False
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    _reload_authentication()
    return True


def _reachable(address: str) -> None:
    """Raises ConnectionError at once where nobody listens, or a web server: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), REACH_S) as asked:
            asked.sendall(b"GET / HTTP/1.0\r\n\r\n")  # a cluster's own port speaks HTTP/2, which is not text
            web = asked.recv(5) == b"HTTP/"
    except TimeoutError:
        web = False  # it accepted; whatever it is, Ray will say
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"nobody answers at {address} (want HOST:PORT of the cluster's head): {error}"
        ) from error
    if web:
        raise ConnectionError(
            f"a web server answers at {address}: want the cluster's own port ({host}:6379 by default), or, to submit"
            f" through this one, everstep submit --address http://{address}"
        )


def _redirect_errors(prints: Prints | None = None) -> None:
    """Ray prints every unexpected death to the driver's stdout, whatever `log_to_driver` says; log it
    instead.
    """

    def log(data: dict[str, Any], *_: Any, **__: Any) -> None:
        for line in data["lines"]:
            logger.info("%s: %s", data["pid"], line)

    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = prints or log


@contextmanager
def _our_signals() -> Iterator[None]:
    """`ray.init` puts its own handler on SIGTERM, which ends the driver with a stack dump: ours stays."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, so Ray sets none here
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, ours)


@contextmanager
def _lean() -> Iterator[None]:
    """Keeps `ray.init` from starting what a run on one machine has no use for; numbers at the top of this
    file.

    Ray has no setting for it: a missing dashboard dependency is what makes it start the dashboard's head and
    agent in their minimal form, and the monitors are started without being asked for. Where a later Ray has
    none of these names any more, it starts them, and we start more slowly. ENABLE_RAY_CLUSTER is an
    environment variable that was read when Ray was imported; without it Ray listens on all interfaces.
    """
    node = ray._private.node.Node
    spared: list[tuple[Any, str, Any]] = [
        (ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False),
        (ray._private.utils, "get_dashboard_dependency_error", lambda: ImportError("spared")),
        (node, "start_monitor", lambda self: None),  # the autoscaler's
        (node, "start_log_monitor", lambda self: None),  # sends actors' prints to the driver
    ]
    former = [(owner, name, getattr(owner, name)) for owner, name, _ in spared if hasattr(owner, name)]
    for owner, name, instead in spared:
        if hasattr(owner, name):
            setattr(owner, name, instead)
    try:
        yield
    finally:
        for owner, name, original in former:
            setattr(owner, name, original)


def _reload_authentication() -> None:
    """Makes Ray's library look at RAY_AUTH_MODE and the token again; it did so once, when it was imported."""
    _raylet.Config.initialize("")
    _raylet.AuthenticationTokenLoader.instance().reset_cache()


def _make_folder() -> Path:
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="everstep-ray-", dir=parent if len(parent) < 16 else "/tmp"))
    assert len(str(folder / "ray")) <= LONGEST_FOLDER
    return folder


def _set_environment(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Sets or (None) deletes variables; returns what undoes it."""
    former = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return former


def _mark(folder: Path) -> str:
    """An entry in the environment of everything that this Ray starts."""
    return f"EVERSTEP_EMBEDDED_RAY={folder}"


def _daemons(folder: Path) -> list[tuple[int, int]]:
    """Our children that this Ray's start left: GCS, raylet, dashboard head; as (pid, start time)."""
    marked = set(marked_processes(_mark(folder)))
    return [process for process in _children(os.getpid()) if process in marked]


def _descendants(pids: list[int]) -> list[tuple[int, int]]:
    children = [child for pid in pids for child in _children(pid)]
    return children + (_descendants([pid for pid, _ in children]) if children else [])


def _children(pid: int) -> list[tuple[int, int]]:
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                if (started := start_time(child)) is not None:
                    found.append((child, started))
    except (FileNotFoundError, ProcessLookupError):
        pass  # ended while we looked
    return found

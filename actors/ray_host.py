"""A host of Ray actors: one detached, named actor per process (everstep/RUN/NAME, namespace "everstep").

Detached, so that the death of whoever made them kills nothing; `max_restarts=0`, because the run decides what
is started. A process is watched through the pending result of its `run` method: Ray tells of a death in 12-40
ms. A SIGSTOPped actor it never notices, and ray.kill on one takes 5 s; on our own machine we kill through a
pidfd.

On a cluster a slot's manager and ranks share a placement group of one bundle on the node that was chosen for them. It
is given back when the slot moves, so that nothing waits for Ray to notice that a node is gone.

Owns: the actors it started, their placement groups, one watcher thread (all of Ray's news comes as events to
its queue), one thread that asks Ray's head to make things, which takes long while the head is away, one that looks at
the nodes, pidfds of local actors, and a short-lived thread for each ray.kill. Any thread may call.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from everstep.actors import ray_head
from everstep.actors.host import DEFAULT_ENTRIES, Entries, HostClosed, OnExit, OnNodes, entry_of
from everstep.actors.ray_actors import Home, SnapshotManager, TrainerRank, Whereabouts, machine_id
from everstep.actors.ray_cluster import NAMESPACE
from everstep.actors.ray_nodes import NodeWatch
from everstep.actors.run_folder import RunFolder, open_process, wait_gone

logger = logging.getLogger(__name__)

CONFIRM_S = 15.0
"""How long `close` waits for Ray to confirm the deaths; a killed node is noticed in 13-15 s."""

_CLASSES = {"manager": SnapshotManager, "rank": TrainerRank}


@dataclass(frozen=True)
class RankResources:
    """What one rank asks of the cluster; managers ask for nothing and stay with their slot's rank."""

    cpus: float = 1
    gpus: float = 0
    memory_bytes: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """As options of an actor."""
        wanted: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        wanted["resources"] = dict(self.custom)
        if self.memory_bytes is not None:
            wanted["memory"] = self.memory_bytes
        if self.labels:
            wanted["label_selector"] = dict(self.labels)
        return wanted

    def bundle(self) -> dict[str, float]:
        """As a bundle of a placement group."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes or 0, **self.custom}
        return {name: amount for name, amount in named.items() if amount}


@dataclass
class _Actor:
    """One started name."""

    handle: Any = None  # while it is being registered
    whereabouts: Whereabouts | None = None
    pidfd: int | None = None
    killed: bool = False
    code: int | None = None  # the entry's, once it has returned


@dataclass(frozen=True)
class _Event:
    """News of one of an actor's calls."""

    kind: Literal["where", "done", "gone", "failed"]
    name: str
    result: "Future[Any]"


class RayHost:
    """Implements `everstep.actors.host.Host`; this process must be connected to a Ray."""

    def __init__(
        self,
        on_exit: OnExit,
        *,
        run: str,
        log_dir: Path,
        entries: Entries = DEFAULT_ENTRIES,
        resources: RankResources | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        run_folder: RunFolder | None = None,
        colocate: bool | None = None,
    ) -> None:
        """Starts nothing but a thread.

        Prints are in Ray's logs and, of actors on this machine, in `log_dir`/NAME.log. Local actors register
        themselves in `run_folder`. runtime_env: the driver's own, for actors that another actor starts.
        colocate: one placement group per slot, so that a slot's manager and ranks share a node, which may be
        chosen; None: where there is more than one node.
        """
        self._on_exit = on_exit
        self._run = run
        self._entries = entries
        self._resources = resources or RankResources()
        self._runtime_env = dict(runtime_env) if runtime_env else None
        log_dir.mkdir(parents=True, exist_ok=True)
        self._home = Home(machine_id(), str(log_dir.absolute()), str(run_folder.path) if run_folder else None)
        nodes: Any = ray.nodes  # untyped
        several = sum(node["Alive"] for node in nodes()) > 1
        self._colocate = several if colocate is None else colocate
        self._groups: dict[int, tuple[str, PlacementGroup]] = {}  # slot -> node, group; of the maker's thread
        self._maker = ThreadPoolExecutor(1, "everstep-ray-maker")
        self._nodes: NodeWatch | None = None
        self._actors: dict[str, _Actor] = {}
        self._names: set[str] = set()
        self._deadline: float | None = None  # set by close
        self._lock = threading.Lock()
        self._killers: list[threading.Thread] = []
        self._events: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="everstep-ray-host", daemon=True)
        self._watcher.start()

    def start(self, role: str, name: str, slot: int, config: bytes, node: str = "") -> None:
        """See Host."""
        entry = entry_of(self._entries, role)
        with self._lock:
            if self._deadline is not None:
                raise HostClosed(f"cannot start {name}: the host is closed")
            if name in self._names:
                raise ValueError(f"a process named {name!r} was started before; names are used once")
            self._names.add(name)
            self._actors[name] = _Actor()
            self._maker.submit(self._make, role, name, slot, entry, config, node)

    def _make(self, role: str, name: str, slot: int, entry: str, config: bytes, node: str) -> None:
        """Ray registers a named actor before it returns: a few ms. Without the lock: a kill must not wait for it.
        Begun only when the head answers: Ray gives up such a call after a minute, half-way."""
        here = ray_head.wait_for(self._closing.wait)
        with self._lock:
            actor = self._actors.get(name)
            if actor is None:  # `close` did not wait any longer
                return
            killed = actor.killed
        try:
            if killed or not here:
                raise ChildProcessError("killed before it was started")
            actor_class: Any = ray.remote(_CLASSES.get(role, TrainerRank))
            handle: Any = actor_class.options(**self._options(role, name, slot, node)).remote(name, self._home)
        except Exception as error:  # its name is taken by an actor of another execution, or Ray is out of reach
            self._fail(name, error)
            return
        self._hold(actor, handle)
        self._follow("where", name, handle.whereabouts.remote())
        self._follow("done", name, handle.run.remote(entry, config))

    def kill(self, name: str) -> None:
        """See Host."""
        with self._lock:
            if name in self._actors:
                self._kill(self._actors[name])

    def pid(self, name: str) -> int | None:
        """See Host."""
        with self._lock:
            actor = self._actors.get(name)
            return actor.whereabouts.pid if actor and actor.whereabouts else None

    def located(self, name: str) -> bytes:
        """See Host."""
        with self._lock:
            actor = self._actors.get(name)
            where = actor.whereabouts if actor is not None else None
        return b"" if where is None else msgspec.msgpack.encode(where)

    def adopt(self, role: str, name: str, slot: int, where: bytes) -> None:
        """See Host. What the actor's `run` returns is for the one that called it; but a `leave` that waits behind it
        ends the process then, and tells of its death before."""
        with self._lock:
            self._names.add(name)
            actor = self._actors[name] = _Actor()
        if where:
            self._locate(actor, msgspec.msgpack.decode(where, type=Whereabouts))
        self._maker.submit(self._adopt, name, slot)

    def _adopt(self, name: str, slot: int) -> None:
        here = ray_head.wait_for(self._closing.wait)
        with self._lock:
            actor = self._actors.get(name)
        if actor is None or not here:
            return
        try:
            if self._colocate and slot not in self._groups:
                self._adopt_group(slot)
            handle: Any = ray.get_actor(f"everstep/{self._run}/{name}", namespace=NAMESPACE)
        except Exception as error:  # there is none, or Ray is out of reach
            self._fail(name, error)
            return
        self._hold(actor, handle)
        self._follow("gone", name, handle.leave.remote())

    def _fail(self, name: str, error: Exception) -> None:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        self._events.put(_Event("failed", name, failed))

    def _hold(self, actor: _Actor, handle: Any) -> None:
        with self._lock:
            actor.handle = handle
            if actor.killed:
                self._kill(actor)

    def node(self, name: str) -> str | None:
        """The id of the Ray node that `name` runs on, where known."""
        with self._lock:
            actor = self._actors.get(name)
            return actor.whereabouts.node_id if actor and actor.whereabouts else None

    def watch_nodes(self, on_nodes: OnNodes) -> bool:
        """See Host."""
        if self._colocate and self._nodes is None:
            self._nodes = NodeWatch(on_nodes, self._resources.bundle(), self._resources.labels)
        return self._colocate

    def free(self, slot: int) -> None:
        """See Host."""
        with self._lock:
            if self._deadline is None:
                self._maker.submit(self._leave, slot)

    def close(self) -> None:
        """See Host. Gives up on Ray's confirmation after CONFIRM_S, and says so in the cause."""
        with self._lock:
            if self._deadline is None:
                self._deadline = time.monotonic() + (CONFIRM_S if ray.is_initialized() else 0.0)
            for actor in self._actors.values():
                self._kill(actor)
        if self._nodes is not None:
            self._nodes.close()
        self._closing.set()
        self._events.put(None)
        if self._watcher is threading.current_thread():
            return  # called from on_exit; the watcher ends by itself
        self._watcher.join()
        for killer in self._killers:
            killer.join(CONFIRM_S)
        self._maker.shutdown()
        if self._groups and not ray_head.answers():
            logger.warning("Ray's head is away: the placement groups of %s stay for now", self._run)
            self._groups.clear()
        for slot in list(self._groups):
            self._leave(slot)

    def _options(self, role: str, name: str, slot: int, node: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "name": f"everstep/{self._run}/{name}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_task_retries": 0,
            **(self._resources.options() if role == "rank" else {"num_cpus": 0}),
        }
        if self._runtime_env is not None:
            options["runtime_env"] = self._runtime_env
        if self._colocate:
            options.pop("label_selector", None)  # the bundle has it
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group(slot, node), 0)
        return options

    def _group(self, slot: int, node: str) -> PlacementGroup:
        if slot in self._groups and self._groups[slot][0] != node:
            self._leave(slot)
        if slot not in self._groups:
            labels = {**self._resources.labels, **({NODE_ID_LABEL_KEY: node} if node else {})}
            group = placement_group(
                [self._resources.bundle()],
                name=self._group_name(slot),
                lifetime="detached",
                bundle_label_selector=[labels] if labels else None,
            )
            self._groups[slot] = (node, group)
        return self._groups[slot][1]

    def _group_name(self, slot: int) -> str:
        return f"everstep/{self._run}/slot-{slot}"

    def _adopt_group(self, slot: int) -> None:
        """The group that another host object made for a slot: its name is taken while it stands."""
        try:
            group = get_placement_group(self._group_name(slot))
        except ValueError:  # there is none
            return
        nodes = placement_group_table(group)["bundles_to_node_id"]
        self._groups[slot] = (str(nodes.get(0) or ""), group)

    def _leave(self, slot: int) -> None:
        """Gives a slot's group back; Ray ends what is still in it."""
        if slot in self._groups:
            try:
                remove_placement_group(self._groups.pop(slot)[1])
            except Exception as error:  # no Ray any more, or out of reach: the run's collector removes it
                logger.warning("the place of slot %d is not given back: %s", slot, error)

    def _follow(self, kind: Literal["where", "done", "gone"], name: str, ref: Any) -> None:
        """Turns the result of a call into an event. Ray calls back on a thread of its own, which must not
        wait.
        """
        ref.future().add_done_callback(lambda result: self._events.put(_Event(kind, name, result)))

    def _kill(self, actor: _Actor) -> None:
        """The lock is held."""
        actor.killed = True
        if actor.pidfd is not None:
            _signal(actor.pidfd)
        elif actor.handle is not None:
            killer = threading.Thread(target=_ray_kill, args=(actor.handle,), daemon=True)
            self._killers = [other for other in self._killers if other.is_alive()] + [killer]
            killer.start()

    def _watch(self) -> None:
        """The watcher thread; ends when the host is closed and every name is reported."""
        while True:
            with self._lock:
                deadline, left = self._deadline, list(self._actors)
            if deadline is not None and not left:
                return
            patience_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                event = self._events.get(timeout=patience_s)
            except queue.Empty:
                for name in left:
                    self._report(name, f"died: killed, but not confirmed by Ray within {CONFIRM_S} s")
                return
            if event is not None:
                self._handle(event)

    def _handle(self, event: _Event) -> None:
        with self._lock:
            actor = self._actors.get(event.name)
        if actor is None:
            return
        error = event.result.exception()
        if event.kind == "where":
            if error is None:
                self._locate(actor, event.result.result())
        elif event.kind == "done" and error is None:
            actor.code = event.result.result()
            self._follow("gone", event.name, actor.handle.leave.remote())
        else:
            self._bury(event.name, actor, error)

    def _locate(self, actor: _Actor, where: Whereabouts) -> None:
        with self._lock:
            actor.whereabouts = where
            if where.machine == self._home.machine:
                actor.pidfd = open_process(where.pid, where.started)
                if actor.killed and actor.pidfd is not None:
                    _signal(actor.pidfd)

    def _bury(self, name: str, actor: _Actor, error: BaseException | None) -> None:
        """Ray says the actor is dead: makes sure of it where we can, and reports."""
        if actor.pidfd is not None:
            _signal(actor.pidfd)
            wait_gone([actor.pidfd], CONFIRM_S)
        if actor.code is not None:
            self._report(name, f"exit {actor.code}")
        elif actor.killed and isinstance(error, RayActorError | ChildProcessError):
            self._report(name, f"signal {signal.SIGKILL.value}")
        else:
            self._report(name, f"died: {_reason(error)}")

    def _report(self, name: str, cause: str) -> None:
        with self._lock:
            actor = self._actors.pop(name)
            if actor.pidfd is not None:
                os.close(actor.pidfd)
                actor.pidfd = None
        try:
            self._on_exit(name, cause)
        except Exception:  # the news of the next process must still be told
            logger.exception("on_exit(%r, %r) raised", name, cause)


def _reason(error: BaseException | None) -> str:
    """What happened, out of Ray's long message: its last line, without the general advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1].partition(" Some common causes")[0].rpartition("Worker exit detail: ")[2]


def _ray_kill(handle: Any) -> None:
    try:
        ray.kill(handle, no_restart=True)
    except Exception as error:  # dead already, or no Ray any more: the watcher tells which
        logger.debug("ray.kill: %s", error)


def _signal(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass

"""The controller of a cluster: one loop that asks platform.cluster.allocation and tells supervisors what they get.

What it must remember is kept by controller_state before anybody is told of it. It holds no process of a run: while it
is away, runs go on with what they were granted last, and enrol again when it is back. Never imports ray or torch.

Threads: `controller` (the loop), `capacity` (asks what the cluster has, and carries wishes to it), gRPC's. `table`
may be called from any.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from everstep.actors.controller_state import AnotherController, StateBook, StateStore, StateUnavailable, this_process
from everstep.collectives.control import ControlServer, Peer
from everstep.platform.cluster import allocation as al
from everstep.platform.cluster import controller_messages as cm
from everstep.platform.cluster.room import plain, units

log = logging.getLogger(__name__)

_TICK_S = 0.25
_CHECK_S = 5.0  # how soon one that was replaced notices though it has nothing to write
_RETRY_S = 1.0  # a state that could not be written
KEPT_RESULTS = 100


class Cluster(Protocol):
    """What there is; called from the thread `capacity` only, and may take long."""

    def capacity(self, runs: frozenset[str]) -> al.Capacity:
        """`runs`: those (JOB.RUN) whose processes are not others'. Raises ConnectionError."""
        ...

    def want(self, bundles: Sequence[dict[str, float]]) -> None:
        """Asks for a cluster that has room for all of these. Raises ConnectionError."""
        ...


class Controller:
    """Serves from the constructor on. Raises AnotherController, or StateUnavailable, before it does."""

    def __init__(
        self,
        store: StateStore,
        cluster: Cluster,
        *,
        bind: str = "127.0.0.1",
        on_end: Callable[[str], None] = lambda reason: None,
        grace_s: float = al.GRACE_S,
        sample_s: float = 1.0,
    ) -> None:
        """`on_end(reason)`: it was replaced and has stopped; from its own thread."""
        self.token = secrets.token_hex(32)
        self._queue: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._cluster = cluster
        self._on_end = on_end
        self._sample_s = sample_s
        self._streams: dict[str, Peer] = {}  # job -> whoever enrolled last
        self._names: dict[str, tuple[str, str]] = {}  # job -> name, run
        self._outbox: list[tuple[str, bytes]] = []
        self._wishes: queue.SimpleQueue[list[dict[str, float]]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._server = ControlServer(
            f"{bind}:0", self.token, self._enqueue("message"), self._enqueue("closed"), self._answer, max_peers=1024
        )
        self._owner = this_process(secrets.token_hex(8), self._server.address)
        self._book = StateBook(store, self._owner)
        try:
            kept = self._book.open()
            self._state, self._results = _restored(kept, grace_s, time.monotonic())
            self._names = {key: (job.job, job.run) for key, job in kept.jobs.items()} if kept else {}
            self._written = self._kept()
            self._book.write(self._written)
        except BaseException:
            self._server.stop()
            raise
        self._next_check = self._not_before = 0.0
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._sampler = threading.Thread(target=self._sample, name="capacity", daemon=True)
        self._thread.start()
        self._sampler.start()

    @property
    def address(self) -> str:
        return self._server.address

    def table(self) -> cm.Table:
        state, streams = self._state, self._streams
        rows = []
        for key, job in sorted(state.jobs.items(), key=lambda item: (-item[1].priority, item[1].arrival)):
            name, run = self._names[key]
            what = "absent" if key not in streams else "running" if job.granted else "queued"
            rows.append(
                cm.JobRow(
                    name, run, job.priority, what, job.granted, job.held, job.min, job.max, job.spares, job.reason
                )
            )
        owner = self._owner
        return cm.Table(self.address, owner.host, owner.pid, self._book.place, rows, list(self._results))

    def close(self) -> None:
        """Ends in order: the place is free for another one. Idempotent."""
        self._queue.put(("close",))
        self._thread.join()
        self._sampler.join()

    # ---- threads ----------------------------------------------------------------------------------------

    def _enqueue(self, kind: str) -> Callable[..., None]:
        return lambda *arguments: self._queue.put((kind, *arguments))

    def _answer(self, data: bytes) -> bytes:
        request = msgspec.msgpack.decode(data, type=dict[str, Any])
        if request.get("do") != "table":
            raise ValueError(f"unknown call {request.get('do')!r}")
        return msgspec.json.encode(self.table())

    def _sample(self) -> None:
        while not self._ended.is_set():
            try:
                while not self._wishes.empty():
                    self._cluster.want(self._wishes.get())
                self._queue.put(("capacity", self._cluster.capacity(frozenset(self._state.jobs))))
            except ConnectionError as error:  # the head is away: what was granted stays granted
                log.warning("the cluster does not say what it has: %s", error)
            self._ended.wait(self._sample_s)

    def _run(self) -> None:
        reason = ""
        while not reason:
            try:
                item = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                item = ("tick",)
            if item[0] == "close":
                break
            try:
                self._handle(item)
                self._decide(al.Tick())
                self._flush(time.monotonic())
            except AnotherController as error:
                reason = str(error)
        self._ended.set()
        if not reason:
            try:
                self._book.write(msgspec.structs.replace(self._kept(), owner=None))
            except (AnotherController, StateUnavailable) as error:
                log.warning("not signed off: %s", error)
        self._server.stop()
        if reason:
            log.error("%s", reason)
            self._on_end(reason)

    # ---- the loop ---------------------------------------------------------------------------------------

    def _handle(self, item: tuple[Any, ...]) -> None:
        match item:
            case ("message", peer, data):
                try:
                    self._on_message(peer, cm.decode_to_controller(data))
                except msgspec.ValidationError as error:
                    log.warning("a supervisor spoke nonsense: %s", error)
                    peer.close()
            case ("closed", peer):
                key = self._key_of(peer)
                if key is not None:
                    self._streams = {k: p for k, p in self._streams.items() if k != key}
                    self._decide(al.Absent(key))
            case ("capacity", capacity):
                self._decide(capacity)

    def _on_message(self, peer: Peer, message: cm.Enrol | cm.Held | cm.Done) -> None:
        if isinstance(message, cm.Enrol):
            self._enrol(peer, message)
            return
        key = self._key_of(peer)
        if key is None:
            return
        if isinstance(message, cm.Held):
            self._decide(al.Reported(key, message.held, message.number))
            return
        self._results = (*self._results, {**message.result, "ended_at": time.time()})[-KEPT_RESULTS:]
        self._streams = {k: p for k, p in self._streams.items() if k != key}
        self._decide(al.Left(key))
        peer.close()

    def _enrol(self, peer: Peer, said: cm.Enrol) -> None:
        if said.version != cm.VERSION:
            reason = f"this cluster's controller speaks version {cm.VERSION}, the run version {said.version}"
            peer.send(cm.encode(cm.Refused(reason)))
            return
        before = self._streams.get(said.key)
        self._streams = {**self._streams, said.key: peer}  # a supervisor that took over comes on a stream of its own
        self._names = {**self._names, said.key: (said.job, said.run)}
        if before is not None:
            before.close()
        self._decide(
            al.Enrolled(
                said.key, said.priority, said.min, said.max, said.spares, said.demand, said.granted, said.held
            )
        )

    def _key_of(self, peer: Peer) -> str | None:
        return next((key for key, other in self._streams.items() if other is peer), None)

    def _decide(self, event: al.Event) -> None:
        self._state, commands, reason = al.decide(self._state, event, time.monotonic())
        if commands or not isinstance(event, al.Tick | al.Capacity):
            log.info("%s", reason)
        for command in commands:
            match command:
                case al.Grant(key, processes, why, number):
                    log.info("%s: %d processes: %s", key, processes, why)
                    self._outbox.append((key, cm.encode(cm.Granted(processes, why, number))))
                case al.Refuse(key, why):
                    self._outbox.append((key, cm.encode(cm.Refused(why))))
                case al.Want():
                    self._wishes.put(al.bundles(command))

    def _flush(self, now: float) -> None:
        """Writes what has changed, then tells those whom it concerns. [Note: one controller]"""
        if now < self._not_before:
            return
        try:
            kept = self._kept()
            if kept != self._written:
                self._book.write(kept)
                self._written, self._next_check = kept, now + _CHECK_S
            elif now >= self._next_check:
                self._book.check()
                self._next_check = now + _CHECK_S
        except StateUnavailable as error:
            log.warning("the state cannot be kept now, nothing is granted until it is: %s", error)
            self._not_before = now + _RETRY_S
            return
        outbox, self._outbox = self._outbox, []
        for key, data in outbox:
            if key in self._streams:
                self._streams[key].send(data)

    def _kept(self) -> cm.Kept:
        jobs = {}
        for key, job in self._state.jobs.items():
            name, run = self._names[key]
            demand = plain(job.demand)
            jobs[key] = cm.KeptJob(
                name, run, job.priority, job.min, job.max, job.spares, demand, job.arrival, job.granted, job.reason,
                job.proven,
            )  # fmt: skip
        state = self._state
        return cm.Kept(cm.STATE_VERSION, self._owner, jobs, state.arrivals, state.grants, list(self._results))


def _restored(kept: cm.Kept | None, grace_s: float, now: float) -> tuple[al.State, tuple[dict[str, Any], ...]]:
    """Every job is absent until it enrols; it is taken to hold what it was granted."""
    if kept is None:
        return al.initial(grace_s=grace_s), ()
    jobs = {
        key: al.Job(
            job.priority, job.min, job.max, job.spares, units(job.demand), job.arrival, job.granted, job.granted,
            job.reason, may=job.granted, absent_since=now, proven=job.proven,
        )
        for key, job in kept.jobs.items()
    }  # fmt: skip
    return al.initial(jobs, kept.arrivals, kept.grants, grace_s), tuple(kept.results)

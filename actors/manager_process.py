"""The snapshot manager of one failure domain: it outlives the trainers and keeps their sealed memory.

It relays between its trainers and the coordinator, judges their liveness ([Note: liveness]), fences the dead before
it tells its stock ([Note: two rounds]), owns the segments and serves them, and writes checkpoint files from them.
Never imports torch.

Threads: one reader for the coordinator's stream, one for each trainer's, the judge's, one a checkpoint file;
`_lock` guards the maps, and no message is sent while it is held by two of them in different order.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path

import msgspec

from everstep.actors.config import (
    Follow,
    Followed,
    Heard,
    ManagerConfig,
    Saved,
    SaveSegment,
    Secured,
    SegmentSealed,
    SlotsGiven,
    SlotsWanted,
    Wake,
)
from everstep.actors.fetch import FetchServer
from everstep.actors.parity_keeper import ParityKeeper
from everstep.actors.run_folder import RunFolder
from everstep.actors.shelf import DomainShelf
from everstep.collectives import messages as m
from everstep.collectives.addresses import interface_towards, node_name
from everstep.collectives.control import ControlClient, ControlServer, Peer
from everstep.collectives.errors import CollectiveError
from everstep.collectives.liveness import Judge
from everstep.storage.errors import StorageError
from everstep.storage.rank_file import write_rank_file
from everstep.storage.segment import SegmentMap, read_seal
from everstep.storage.stores.opening import folder_at

log = logging.getLogger(__name__)

_HANG_UP_GRACE_S = 0.5
_CONNECT_S = 20.0
_KEPT_VERDICTS = 64  # so many steps a standby may be behind when its supervisor dies


class _Trainer(msgspec.Struct):
    peer: Peer
    pid: int
    join: bytes = b""  # its own word, for a coordinator that comes later


class Manager:
    """One manager. `run` blocks until the coordinator ends it or is lost."""

    def __init__(self, config: ManagerConfig) -> None:
        self._config = config
        self._lock = threading.RLock()
        self._trainers: dict[str, _Trainer] = {}
        self._names: dict[int, str] = {}  # control peer -> trainer
        self._dead: set[str] = set()
        self._prepare: m.Prepare | None = None
        self._wakes: dict[str, float] = {}
        self._saving: set[threading.Thread] = set()
        self._done = threading.Event()
        # [Note: following] Held while a coordinator's message is carried out: one that is not followed any more
        # changes nothing, and what a new one is told is what all before it have left.
        self._following = threading.RLock()
        self._epoch = config.epoch
        self._orphan_since: float | None = None
        self._verdicts: deque[m.Verdict] = deque(maxlen=_KEPT_VERDICTS)
        self._shelf = DomainShelf(Path(config.run_folder) / config.domain, config.domain, config.stall_s)
        self._parity = ParityKeeper(self._shelf, config.token, config.stall_s)
        host = interface_towards(config.coordinator)
        self._judge = Judge(self._on_dead)
        self._fetch = FetchServer(host, config.token, self._shelf)
        self._server = ControlServer(
            f"{host}:0", config.token, self._on_trainer, self._on_trainer_gone, self._on_call, max_peers=64
        )
        self._up = self._connect(config.epoch, config.coordinator, _CONNECT_S)
        self._introduce()

    def _connect(self, epoch: int, address: str, timeout_s: float) -> ControlClient:
        heard, lost = partial(self._on_coordinator, epoch), partial(self._on_coordinator_lost, epoch)
        return ControlClient(address, self._config.token, heard, lost, timeout_s)

    def _introduce(self) -> None:
        config = self._config
        self._tell(m.Watching(config.domain, config.slot, self._fetch.address, os.getpid(), node_name()))
        note = msgspec.msgpack.encode({"control": self._server.address})
        self._tell(m.WatcherNote("listening", note))

    def run(self) -> None:
        beat_s = max(self._config.frozen_s / 4, 0.05)
        while not self._done.wait(beat_s):
            self._tell(m.Beat(self._config.domain))
            since = self._orphan_since
            if since is not None and time.monotonic() - since > self._config.orphan_s:
                log.warning("no supervisor came within %g s", self._config.orphan_s)
                self._end_trainers()
                self._done.set()
        for thread in list(self._saving):
            thread.join()
        self._up.close()
        self._server.stop()
        self._judge.close()
        self._shelf.close()
        self._parity.close()
        self._fetch.close()

    def _tell(self, message: m.WatcherMessage) -> None:
        self._up.send(m.encode(message))

    # ---- coordinator ------------------------------------------------------------------------------------

    def _on_coordinator(self, epoch: int, data: bytes) -> None:
        envelope = m.decode_envelope(data)
        message = envelope.message
        with self._following:
            if epoch != self._epoch:
                return
            if isinstance(message, m.Prepare):
                self._on_prepare(message)
            elif envelope.names:
                if isinstance(message, m.Verdict):
                    self._verdicts.append(message)
                self._to_trainers(envelope.names, message)
            elif isinstance(message, m.Order):
                self._on_order(message)

    def _on_coordinator_lost(self, epoch: int, reason: str) -> None:
        with self._following:
            if epoch != self._epoch:
                return
            log.warning("the coordinator of epoch %d is lost: %s", epoch, reason)
            if self._config.orphan_s > 0:  # training goes on up to the next verdict
                self._orphan_since = time.monotonic()
                return
        self._end_trainers()
        self._done.set()

    def _on_call(self, data: bytes) -> bytes:
        return msgspec.msgpack.encode(self._follow(msgspec.msgpack.decode(data, type=Follow)))

    def _follow(self, follow: Follow) -> Followed:
        """A successor asks: from here on only its word counts ([Note: following])."""
        with self._following:
            if follow.epoch <= self._epoch:
                return Followed(f"epoch {self._epoch} is followed already")
            try:
                up = self._connect(follow.epoch, follow.address, self._config.frozen_s)  # it waits no longer
            except CollectiveError as error:
                return Followed(str(error))
            former, self._up = self._up, up
            self._epoch, self._orphan_since = follow.epoch, None
            former.send(m.encode(m.WatcherNote("superseded", msgspec.msgpack.encode(follow.epoch))))
            self._introduce()
            with self._lock:
                joined = [(name, t.join) for name, t in self._trainers.items() if t.join and name not in self._dead]
            for name, join in joined:
                self._tell(m.FromMember(name, join))
            newest = max((verdict.id for verdict in self._verdicts), default=None)
            verdicts = tuple(v for v in self._verdicts if v.id == newest and v.step > follow.known_step)
            self._tell(m.WatcherNote("heard", msgspec.msgpack.encode(Heard(verdicts))))
        threading.Thread(target=former.close, name="former", daemon=True).start()
        log.info("following epoch %d at %s", follow.epoch, follow.address)
        return Followed()

    def _on_order(self, order: m.Order) -> None:
        if order.kind == "release":
            self._shelf.release(msgspec.msgpack.decode(order.payload, type=m.ViewId))
        elif order.kind == "wake":
            wake = msgspec.msgpack.decode(order.payload, type=Wake)
            self._wakes[wake.name] = wake.wake_s
        elif order.kind == "end":
            self._done.set()

    def _to_trainers(self, names: tuple[str, ...], message: m.CoordinatorMessage) -> None:
        data = m.encode(message)
        with self._lock:
            peers = [self._trainers[name].peer for name in names if name in self._trainers and name not in self._dead]
        for peer in peers:
            peer.send(data)

    def _on_prepare(self, prepare: m.Prepare) -> None:
        """Passes it on, fences the local dead, and answers with the stock once nothing here can change."""
        with self._lock:
            self._prepare = prepare
            local = [name for name in prepare.asked if name in self._trainers and name not in self._dead]
        self._to_trainers(tuple(local), prepare)
        fenced = tuple(name for name in prepare.fence if self._fence(name))
        if not local:
            self._send_stock(prepare, fenced)

    def _fence(self, name: str) -> bool:
        """True when `name` is known to be gone; only its own domain's manager can say so."""
        with self._lock:
            if name not in self._trainers and name not in self._dead:
                return False
            self._dead.add(name)
        return self._judge.fence(name, wake_s=self._wakes.pop(name, -1.0))

    def _send_stock(self, prepare: m.Prepare, fenced: tuple[str, ...] | None = None) -> None:
        if fenced is None:
            fenced = tuple(name for name in prepare.fence if self._fence(name))
        stock = msgspec.msgpack.encode(self._shelf.stock())
        self._tell(m.Stock(prepare.id, self._config.domain, fenced, stock))

    # ---- trainers ---------------------------------------------------------------------------------------

    def _on_trainer(self, peer: Peer, data: bytes) -> None:
        name = self._names.get(peer.ident)
        message = m.decode_member(data)
        if name is None:
            if not isinstance(message, m.Note) or message.kind != "hello":
                peer.close()
                return
            name = message.payload.decode()
            with self._lock:
                self._names[peer.ident] = name
                self._trainers[name] = _Trainer(peer, 0)
            return
        if name in self._dead:
            return  # a zombie changes nothing
        if isinstance(message, m.Join):
            self._trainers[name].pid = message.member.pid
            self._trainers[name].join = data
            self._tell(m.FromMember(name, data))  # before the judge may speak of it
            if not self._judge.watch(name, message.member.pid):
                self._on_dead(name, "exited", 0.0)
        elif isinstance(message, m.Note) and message.kind == "slots":
            self._give_slots(peer, msgspec.msgpack.decode(message.payload, type=SlotsWanted), name)
        elif isinstance(message, m.Note) and message.kind == "sealed":
            self._sealed(peer, msgspec.msgpack.decode(message.payload, type=SegmentSealed))
        elif isinstance(message, m.Note) and message.kind == "lose":
            self._lose()
        elif isinstance(message, m.Note) and message.kind == "save":
            self._save(msgspec.msgpack.decode(message.payload, type=SaveSegment), peer)
        else:
            self._tell(m.FromMember(name, data))
            if isinstance(message, m.Inventory):
                with self._lock:
                    prepare = self._prepare
                if prepare is not None and prepare.id == message.id:
                    self._send_stock(prepare)

    def _on_trainer_gone(self, peer: Peer) -> None:
        """The stream broke: the judge sees the process end within milliseconds, or it hung up and lives."""
        name = self._names.pop(peer.ident, None)
        if name is None or self._done.wait(_HANG_UP_GRACE_S):
            return
        if self._judge.alive(name):
            self._on_dead(name, "hung up", _HANG_UP_GRACE_S * 1000)

    def _on_dead(self, name: str, cause: str, detected_ms: float) -> None:
        with self._lock:
            if name in self._dead:
                return
            self._dead.add(name)
            prepare = self._prepare
        self._tell(m.Died(name, cause, detected_ms))
        if prepare is not None and name in prepare.asked:
            log.info("%s died while view %s was formed", name, prepare.id)

    def _lose(self) -> None:
        """Scripted: the loss of this failure domain, with all of its memory."""
        self._shelf.destroy()
        self._end_trainers()
        os.kill(os.getpid(), signal.SIGKILL)

    def _end_trainers(self) -> None:
        with self._lock:
            pids = [t.pid for name, t in self._trainers.items() if self._judge.alive(name)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    # ---- segments ---------------------------------------------------------------------------------------

    def _give_slots(self, peer: Peer, wanted: SlotsWanted, name: str) -> None:
        try:
            slots, rows = self._shelf.make(name, wanted)
            if not wanted.first:
                self._parity.form(wanted.label, wanted.group, rows)
            given = SlotsGiven(wanted.label, slots)
        except StorageError as error:
            given = SlotsGiven(wanted.label, (), str(error))
        peer.send(m.encode(m.Order("slots", msgspec.msgpack.encode(given))))

    def _sealed(self, peer: Peer, sealed: SegmentSealed) -> None:
        version = (*sealed.label, sealed.step)
        self._shelf.sealed(version, sealed.path)
        if sealed.protect:

            def told(step: int, cpu_s: float, error: str) -> None:
                secured = Secured(sealed.label, step, cpu_s, error)
                peer.send(m.encode(m.Order("secured", msgspec.msgpack.encode(secured))))

            self._parity.protect(version, told)

    # ---- checkpoints ------------------------------------------------------------------------------------

    def _save(self, order: SaveSegment, peer: Peer) -> None:
        self._shelf.begin_writing(order.path)
        thread = threading.Thread(target=self._write, args=(order, peer), name=f"save-{order.step}", daemon=True)
        self._saving.add(thread)
        thread.start()

    def _write(self, order: SaveSegment, peer: Peer) -> None:
        try:
            with SegmentMap(order.path, writable=False) as segment:
                seal = read_seal(segment)
                if seal is None or seal.step != order.step:
                    raise StorageError(f"{order.path} does not hold step {order.step}")
                record = write_rank_file(segment, seal, folder_at(order.folder), order.file)
            saved = Saved(order.folder, order.step, order.file, msgspec.msgpack.encode(record))
        except StorageError as error:
            saved = Saved(order.folder, order.step, order.file, error=str(error))
        self._tell(m.WatcherNote("saved", msgspec.msgpack.encode(saved)))
        peer.send(m.encode(m.Order("saved", msgspec.msgpack.encode(order.path))))
        self._shelf.end_writing(order.path)
        self._saving.discard(threading.current_thread())


def main(config: bytes) -> None:
    """Entry point of a manager process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    decoded = msgspec.msgpack.decode(config, type=ManagerConfig)
    folder = RunFolder.at(Path(decoded.run_folder))
    if not decoded.embedded:  # on a cluster's other nodes nobody else makes the folder, or keeps it
        folder.create()
        folder.hold()
        folder.ensure_reaper()
    folder.register_pid()
    Manager(decoded).run()
    folder.let_go()

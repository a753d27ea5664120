"""The coordinator of a group: one loop that feeds what it hears to group_membership.decide and does what it says.

Everything that arrives is queued by gRPC's threads and handled by the loop's one thread, so the decider needs no
lock. Every view is on disk, if there is a `state` file, before any member hears of it. Never imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from pathlib import Path

import msgspec

from everstep.collectives import group_membership as gm
from everstep.collectives.control import ControlServer, Peer
from everstep.collectives.exits import close_at_exit
from everstep.collectives.group_messages import (
    Anew,
    Ballot,
    Decided,
    Enter,
    Formed,
    FromCoordinator,
    FromPeer,
    Joiners,
    Leave,
    Over,
    Settled,
    decode_from_peer,
    key_of,
)
from everstep.collectives.group_state import (
    AskedAnew,
    Command,
    Entered,
    Event,
    HungUp,
    Left,
    Limits,
    LinkBroke,
    MemberDied,
    Refuse,
    SendDecided,
    SendJoiners,
    SendOver,
    SendView,
    State,
    Tick,
    Voted,
    WatcherHeard,
    WatcherLost,
)
from everstep.collectives.messages import Beat, Complaint, Died, Excluded, View, Watching, encode

log = logging.getLogger(__name__)

_TICK_S = 0.05  # of limits only: whatever arrives is handled at once
_MAX_HEARD = 4096  # messages that wait for the loop; who sends more waits, too
_MAX_MESSAGE_BYTES = 4 << 20  # the view of ten thousand members
_FILE_VERSION = 1


class _Undecidable(Exception):
    """The decider failed on an event."""


class _OnDisk(msgspec.Struct, frozen=True):
    version: int
    epoch: int
    view: View | None = None
    settled: Settled | None = None


class Coordinator:
    """Serves one group. `start` returns when `address` can be joined; `stop` ends it and leaves members running.

    `bind` is host:port, port 0 for any. `min_peers`: no view has fewer members. `timeout_s`: limits follow from it,
    a silent host is dead after a fifth of it. `state`: a file that lets a successor go on where this one was killed;
    without it a successor on the same port asks the members.
    """

    def __init__(
        self,
        bind: str = "127.0.0.1:0",
        token: str = "",
        min_peers: int = 2,
        *,
        timeout_s: float = 10.0,
        state: str | os.PathLike[str] | None = None,
        max_peers: int = 1024,
    ) -> None:
        if not token:
            raise ValueError("token is empty; coordinator and members need the same secret text")
        if min_peers < 1:
            raise ValueError(f"min_peers is {min_peers}; it must be at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s:g}; it must be above 0")
        if not bind.rpartition(":")[2].isdecimal() or not bind.rpartition(":")[0]:
            raise ValueError(f"bind is {bind!r}; it must be HOST:PORT (port 0 for any)")
        self._bind, self._token, self._min_peers = bind, token, min_peers
        self._limits = Limits.of(timeout_s)
        self._file = Path(state) if state is not None else None
        self._max_peers = max_peers
        self._queue: queue.Queue[tuple[str, Peer | None, bytes]] = queue.Queue(_MAX_HEARD)
        self._members: dict[str, Peer] = {}  # by key of the incarnation
        self._watchers: dict[str, Peer] = {}  # by domain
        self._who: dict[int, tuple[str, str]] = {}  # control peer -> (key, name); of a watcher ("", domain)
        self._said = ""
        self._server: ControlServer | None = None
        self._state: State
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)

    # ---- for whoever runs it; any thread ----------------------------------------------------------------

    @property
    def address(self) -> str:
        """host:port to join at; after `start`."""
        if self._server is None:
            raise ValueError("the coordinator has no address before start()")
        return self._server.address

    def start(self) -> None:
        """Raises ValueError for a state file that is none, RuntimeError where `bind` cannot be listened on."""
        known = self._load()
        # With port 0 nobody can know the address from before, and nobody's report has to be waited for.
        settle = not self._bind.endswith(":0")
        epoch = known.epoch + 1
        now = time.monotonic()
        self._state = gm.initial(epoch, self._min_peers, self._limits, now, known.view, known.settled, settle)
        self._save(known.view)
        self._server = ControlServer(
            self._bind,
            self._token,
            lambda peer, data: self._hear("message", peer, data),
            lambda peer: self._hear("closed", peer, b""),
            max_peers=self._max_peers,
            max_message_bytes=_MAX_MESSAGE_BYTES,
        )
        self._thread.start()
        close_at_exit(self.stop)
        log.info("coordinator at %s, epoch %d, min_peers %d", self.address, epoch, self._min_peers)

    def stop(self) -> None:
        """Idempotent. Members see a coordinator that is away: their data operations go on, their votes wait."""
        if self._server is None:
            return
        self._hear("stop", None, b"")
        self._thread.join()
        self._server.stop()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once it has ended: stopped, or by an error that was logged."""
        return self._ended.wait(timeout_s)

    def _hear(self, kind: str, peer: Peer | None, data: bytes) -> None:
        while not self._ended.is_set():
            try:
                return self._queue.put((kind, peer, data), timeout=1.0)
            except queue.Full:
                pass  # the loop is busy, or has ended
        return None

    # ---- the loop ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:  # a full disk, a bug of ours: members see that it is away, and a successor may go on
            log.exception("the coordinator failed")
        finally:
            self._ended.set()

    def _loop(self) -> None:
        next_tick = time.monotonic() + _TICK_S
        while True:
            try:
                kind, peer, data = self._queue.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                kind, peer, data = "tick", None, b""
            if kind == "stop":
                return
            try:
                if kind == "message" and peer is not None:
                    self._on_message(peer, decode_from_peer(data))
                elif kind == "closed" and peer is not None:
                    self._on_closed(peer)
            except msgspec.MsgspecError as error:
                log.warning("stream %s spoke nonsense: %s", self._who.get(peer.ident if peer else 0), error)
                if peer is not None:
                    peer.close()
            except _Undecidable:
                if peer is None:
                    raise
                log.exception("stream %s is given up", self._who.get(peer.ident))
                peer.close()
            if time.monotonic() >= next_tick:
                self._feed(Tick())
                next_tick = time.monotonic() + _TICK_S

    def _feed(self, event: Event) -> None:
        try:
            self._state, commands, reason = gm.decide(self._state, event, time.monotonic())
        except Exception as error:  # the state is what it was; who said it is to blame, if it was anybody
            raise _Undecidable(f"{event!r:.400}") from error
        if (reason != self._said and not isinstance(event, Tick | WatcherHeard)) or commands:
            quiet = isinstance(event, Voted) and all(isinstance(c, SendDecided) for c in commands)
            log.log(logging.DEBUG if quiet else logging.INFO, "%s", reason)
            self._said = reason
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case SendView(to, view, cause, reason, lost, joiners):
                self._save(view)
                self._tell(to, Formed(view, cause, reason, lost, joiners))
            case SendOver(to, id, reason, lost):
                self._tell(to, Over(id, reason, lost))
            case SendDecided(to, settled):
                self._tell(to, Decided(settled))
            case SendJoiners(to, names):
                self._tell(to, Joiners(names))
            case Refuse(key, reason):
                peer = self._members.pop(key, None)
                if peer is not None:
                    peer.send(encode(Excluded(reason)))
                    peer.close()

    def _tell(self, names: tuple[str, ...], message: FromCoordinator) -> None:
        data = encode(message)
        for name in names:
            member = self._state.ready.get(name)
            peer = self._members.get(key_of(member.name, member.incarnation)) if member is not None else None
            if peer is not None:  # else its stream is broken: it is told when it enters again
                peer.send(data)

    def _on_message(self, peer: Peer, message: FromPeer) -> None:
        if isinstance(message, Enter):
            key = key_of(message.member.name, message.member.incarnation)
            self._is_still(peer, (key, message.member.name))
            self._who[peer.ident] = (key, message.member.name)
            self._members[key] = peer
            return self._feed(Entered(message.member, message.report))
        if isinstance(message, Watching):
            self._is_still(peer, ("", message.domain))
            self._who[peer.ident] = ("", message.domain)
            self._watchers[message.domain] = peer
            return self._feed(WatcherHeard(message.domain))
        key, name = self._who.get(peer.ident, ("", ""))
        if not name or (self._members.get(key) if key else self._watchers.get(name)) is not peer:
            return None  # whoever was refused or replaced changes nothing any more
        match message:
            case Died(dead, cause, detected_ms) if not key:
                self._feed(MemberDied(dead, cause, detected_ms))
            case Beat() if not key:
                self._feed(WatcherHeard(name))
            case Ballot() if key:
                self._feed(Voted(name, message))
            case Complaint(id, about, error) if key:
                self._feed(LinkBroke(name, id, about, error))
            case Anew(id, reason) if key:
                self._feed(AskedAnew(name, id, reason))
            case Leave() if key:
                self._feed(Left(key))
        return None

    def _is_still(self, peer: Peer, who: tuple[str, str]) -> None:
        """One stream is one member or watcher. Raises msgspec.ValidationError."""
        if self._who.get(peer.ident, who) != who:
            raise msgspec.ValidationError(f"it called itself {self._who[peer.ident]}, and now {who}")

    def _on_closed(self, peer: Peer) -> None:
        key, name = self._who.pop(peer.ident, ("", ""))
        if key and self._members.get(key) is peer:
            del self._members[key]
            self._feed(HungUp(key))
        elif name and not key and self._watchers.get(name) is peer:
            del self._watchers[name]
            self._feed(WatcherLost(name))

    # ---- the state file ---------------------------------------------------------------------------------

    def _load(self) -> _OnDisk:
        if self._file is None or not self._file.exists():
            return _OnDisk(_FILE_VERSION, 0)
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=_OnDisk)
        except msgspec.MsgspecError as error:
            raise ValueError(
                f"{self._file} is no coordinator's state ({error}); remove it or name another one"
            ) from None
        if found.version != _FILE_VERSION:
            raise ValueError(f"{self._file} has version {found.version}; this everstep reads {_FILE_VERSION}")
        return found

    def _save(self, view: View | None) -> None:
        """Whole or not at all: a new file takes the old one's place when it is on disk."""
        if self._file is None:
            return
        record = _OnDisk(_FILE_VERSION, self._state.epoch, view, self._state.settled)
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(msgspec.json.encode(record))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._file)
            folder = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

"""The connections of one member to all others of a view, and the threads that drive the engine over them.

Thread-safety: any thread may submit, wait and abort. One thread at a time leads: it polls, reads and writes the
connections and resumes operations ([Note: steps]). A thread that waits leads by itself, so a small operation costs
no thread switch; a thread of the mesh leads while nobody waits and something large is under way.

When `Work.wait` has raised, nothing here touches its tensors any more.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from everstep.collectives.engine import Engine
from everstep.collectives.errors import CollectiveError, CollectiveTimeout, HandshakeRefused, PeerLost
from everstep.collectives.messages import View
from everstep.collectives.transport.arena import Window
from everstep.collectives.transport.channel import Channel
from everstep.collectives.transport.frames import ProtocolError
from everstep.collectives.transport.greeting import Hello
from everstep.collectives.transport.links import TCP_CONNECTIONS, Link, dial, shares_memory, tune
from everstep.collectives.transport.listener import Listener
from everstep.collectives.transport.sockets import hang_up
from everstep.collectives.work import Work

if TYPE_CHECKING:
    from everstep.collectives.operations import Operation

_LOOK_S = 0.25  # how often the paths are looked at while something is under way
CUT_S = 1.0  # without any acknowledgement a path counts as cut; TCP itself would try for minutes
_NAP_S = 0.005  # how long an operation that nobody waits for may stand still; looking oftener disturbs those who wait
_DOZE_S = 1.0  # without any operation the mesh's thread sleeps until it is called
# An idle core takes 50 us to wake up (1 KiB, 2 ranks: 113 us without this, 56 with it). Only where every member on
# this host has a core of its own; a member that waits for longer than this sleeps.
_LINGER_S = 100e-6


class Mesh:
    """Rank r of a view dials every lower rank. `on_broken(rank, error)` is called once, from the thread that leads
    or connects, when a connection breaks while the mesh is in use. `transport` "tcp" never shares memory;
    `setting` is what users call `timeout_s`."""

    def __init__(
        self,
        view: View,
        rank: int,
        listener: Listener,
        on_broken: Callable[[int, str], None],
        timeout_s: float,
        transport: str = "auto",
        setting: str = "timeout_s",
    ) -> None:
        if transport not in ("auto", "tcp"):
            raise ValueError(f"transport is {transport!r}; allowed are 'auto' and 'tcp'")
        self.view = view
        self.rank = rank
        self.size = len(view.members)
        self.timeout_s = timeout_s
        self._setting = setting
        self._listener = listener
        self._share = transport == "auto"
        self._on_broken = on_broken
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # something ended, or nobody leads any more
        self._idle = threading.Condition(self._lock)  # for the mesh's own thread
        self._engine = Engine(view, rank, listener.arena, self._break, self._changed.notify_all)
        self._dialing: socket.socket | None = None
        self._error: CollectiveError | None = None
        self._lost: tuple[int, str] | None = None  # to be told to `on_broken`
        self._closed = False
        self._leading = False
        self._own_leads = False
        self._waiters = 0
        self._thread: threading.Thread | None = None
        self._asleep = False
        self._helped = 0.0  # when the mesh's thread was last called
        self._looked = 0.0  # when the paths were looked at
        self._poll = select.poll()
        self._polls: dict[int, select.poll] = {}  # for one peer each
        self._by_fd: dict[int, Channel] = {}
        self._writing: set[int] = set()  # descriptors that are polled for room
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._wake_r, select.POLLIN)
        here = sum(shares_memory(listener.local, member) for member in view.members)
        self._linger_s = _LINGER_S if here <= len(os.sched_getaffinity(0)) else 0.0

    # ---- connecting -------------------------------------------------------------------------------------

    def connect(self, timeout_s: float) -> None:
        """Dials the lower ranks and waits for the higher ones. Raises PeerLost or CollectiveTimeout."""
        deadline = time.monotonic() + timeout_s
        self._listener.expect(self)
        for peer in range(self.rank):
            self._dial(peer, deadline)
        links = self._engine.outbox.links
        with self._changed:
            while len(links) < self.size - 1 or not all(link.complete() for link in links.values()):
                self._check()
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    there = {peer for peer, link in links.items() if link.complete()}
                    name = self._engine.name
                    absent = [p for p in range(self.size) if p != self.rank and p not in there]
                    raise CollectiveTimeout(
                        f"{name(self.rank)}: connecting view {self.view.id}: {', '.join(map(name, absent))} did not "
                        f"come within {timeout_s:g} s ({self._setting})",
                        tuple(self.view.members[p].name for p in absent),
                    )
            self._check()

    def _dial(self, peer: int, deadline: float) -> None:
        member = self.view.members[peer]
        local = self._share and shares_memory(self._listener.local, member)
        try:
            for lane in range(1 if local else TCP_CONNECTIONS):
                hello = Hello(self.view.id, self.rank, peer, lane)
                connection, window = dial(member, hello, self._listener, local, deadline, self._watch)
                self.adopt(peer, lane, connection, window)
        except (OSError, HandshakeRefused, ProtocolError) as error:
            with self._lock:
                self._check()
                target = member.local if local else member.address
                self._break(peer, f"connecting to {target}: {str(error) or type(error).__name__}")
            self._tell()
            self._check()
        finally:
            self._dialing = None

    def _watch(self, connection: socket.socket) -> None:
        with self._lock:
            self._dialing = connection
            if self._error is not None:
                connection.close()
                raise self._error

    def adopt(self, peer: int, lane: int, connection: socket.socket, window: Window | None) -> None:
        """A connection that was accepted, by this side or the other."""
        with self._changed:
            stranger = peer == self.rank or not 0 <= peer < self.size or not 0 <= lane < TCP_CONNECTIONS
            links = self._engine.outbox.links
            link = links.get(peer) or Link(peer)
            if self._error is not None or stranger or link.complete() or link.has(lane):
                connection.close()
                return
            tune(connection)
            channel = Channel(connection, peer, (self.view.id.epoch, self.view.id.number), self._engine)
            link.add(lane, channel, window)
            links[peer] = link
            if window is not None:
                self._polls[peer] = select.poll()
                self._polls[peer].register(connection, select.POLLIN)
                self._polls[peer].register(self._wake_r, select.POLLIN)
            self._by_fd[connection.fileno()] = channel
            if channel.tcp:
                self._start_own()
            self._poll.register(connection, select.POLLIN)
            self._changed.notify_all()

    # ---- operations -------------------------------------------------------------------------------------

    def submit(self, operation: Operation) -> Work:
        """Begins an operation; its tensors belong to it until it is done. Never waits for a member."""
        work = Work(self, operation.what)
        with self._lock:
            if self._error is not None:
                work.error, work.finished = self._error, True
                return work
            self._engine.begin(operation, work)
            self._flush()
            self._engine.look_for_gone()  # the flush may have found that somebody is
            if not work.finished and (not operation.eager or self._writing):
                self._help()
        self._tell()
        return work

    def is_near(self, rank: int) -> bool:
        """Whether that member is on this host and shares memory with this one."""
        return self._engine.outbox.is_near(rank)

    def wait(self, work: Work, timeout_s: float | None) -> None:
        """For `Work`: leads, or waits for whoever does. Raises CollectiveTimeout; other errors are the work's."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        if limit <= 0:
            self.look(work)
        began = time.monotonic()
        while True:
            with self._changed:
                if work.finished:
                    return
                elapsed = time.monotonic() - began
                if elapsed >= limit:
                    raise CollectiveTimeout(
                        f"{self._engine.name(self.rank)}: {work.what}: not done after {elapsed:.1f} s (limit "
                        f"{limit:g} s, {self._setting}); waiting for {self._engine.overdue(work)}",
                        self._engine.awaited(work),
                    )
                if self._leading:
                    self._waiters += 1
                    if self._own_leads:
                        self._kick()
                    self._changed.wait(limit - elapsed)
                    self._waiters -= 1
                    continue
                self._leading = True
            self._lead(lambda: work.finished, began + limit, own=False)

    def look(self, work: Work) -> None:
        """For `Work.done`: takes what has come, where nobody leads. Nothing else moves a small operation on."""
        with self._lock:
            if not (work.finished or self._leading or self._closed):
                self._handle(self._poll.poll(0))
        self._tell()

    # ---- leading ----------------------------------------------------------------------------------------

    def _lead(self, until: Callable[[], bool], deadline: float, own: bool) -> None:
        """Moves everything on until `until` (called under the lock) or the deadline. The caller set `_leading`."""
        events: list[tuple[int, int]] = []
        try:
            while True:
                with self._lock:
                    if events:
                        self._handle(events)
                    now = time.monotonic()
                    poll = self._poll_for()
                    if self._look(now):
                        poll = self._poll
                    if until() or now >= deadline:
                        return
                events = self._wait_for_events(poll, min(deadline - now, _LOOK_S) * 1000 + 1)
        finally:
            with self._lock:
                self._leading = False
                self._own_leads = False
                self._changed.notify_all()
                if not own and self._engine.busy():
                    self._help()
            self._tell()

    def _poll_for(self) -> select.poll:
        """What to wait for: of one operation that needs pieces from several, only the first sender wakes us."""
        if len(self._engine.flows) != 1 or self._writing:
            return self._poll
        (flow,) = self._engine.flows.values()
        rank = flow.first_awaited()
        return self._poll if rank < 0 else self._polls.get(rank, self._poll)

    def _wait_for_events(self, poll: select.poll, timeout_ms: float) -> list[tuple[int, int]]:
        if self._linger_s:
            until = time.perf_counter() + self._linger_s
            while time.perf_counter() < until:
                if events := poll.poll(0):
                    return events
        return poll.poll(timeout_ms)

    def _handle(self, events: list[tuple[int, int]]) -> None:
        for fd, _ in events:
            if fd == self._wake_r:
                os.read(self._wake_r, 4096)
                continue
            channel = self._by_fd.get(fd)
            if channel is None or self._error is not None:
                continue
            try:
                channel.receive()
                if channel.pending:
                    self._engine.outbox.dirty.add(channel)
            except ProtocolError as error:
                self._break(channel.peer if error.peer is None else error.peer, str(error))
            except OSError as error:
                self._hung_up(channel, error)
        self._flush()
        self._engine.look_for_gone()

    def _flush(self) -> None:
        """Writes what the kernel takes of what is queued, and has the rest polled for."""
        dirty = self._engine.outbox.dirty
        while dirty and self._error is None:
            channel = dirty.pop()
            fd = channel.socket.fileno()
            if fd not in self._by_fd:
                continue
            try:
                channel.flush()
            except OSError as error:
                self._hung_up(channel, error)
                continue
            if channel.pending != (fd in self._writing):
                self._poll.modify(fd, select.POLLIN | (select.POLLOUT if channel.pending else 0))
                self._writing.symmetric_difference_update((fd,))
                if channel.pending and self._leading:
                    self._kick()  # whoever polls does not know yet

    def _hung_up(self, channel: Channel, error: OSError) -> None:
        fd = channel.socket.fileno()
        self._poll.unregister(fd)
        self._polls.pop(channel.peer, None)
        self._writing.discard(fd)
        del self._by_fd[fd]
        channel.close()
        self._engine.outbox.hung_up(channel.peer, str(error) or type(error).__name__)

    def _look(self, now: float) -> bool:
        """True where it was time to look at the paths."""
        if now - self._looked < _LOOK_S:
            return False
        self._looked = now
        for channel in list(self._by_fd.values()):
            if self._error is not None:  # a path before was cut, so all are closed
                break
            silent_s = channel.unacknowledged_s(now)
            if silent_s > CUT_S:
                self._break(channel.peer, f"no acknowledgement for {silent_s:.1f} s: the path is cut")
        return True

    def _help(self) -> None:
        """Has the mesh's own thread lead while nobody waits. Waking it at once would cost those who wait."""
        self._helped = time.monotonic()
        self._start_own()
        if self._asleep:
            self._asleep = False
            self._idle.notify()

    def _start_own(self) -> None:
        if self._thread is None and self.size > 1:
            self._thread = threading.Thread(target=self._run, name=f"mesh-{self.rank}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                self._look(time.monotonic())
                due = not self._leading and not self._waiters and self._work_for_own()
                if due:
                    self._leading = self._own_leads = True
                elif self._lost is None:
                    self._asleep = time.monotonic() - self._helped > _DOZE_S
                    self._idle.wait(self._nap_s())
            self._tell()
            if due:
                self._lead(
                    lambda: bool(self._waiters) or self._closed or not self._work_for_own(), float("inf"), own=True
                )

    def _nap_s(self) -> float | None:
        """What the kernel took may be under way when its operations are long done here, and others wait for it: so
        paths are looked at for as long as there are any."""
        if not self._asleep:
            return _NAP_S
        return _LOOK_S if any(channel.tcp for channel in self._by_fd.values()) else None

    def _work_for_own(self) -> bool:
        return self._error is None and (bool(self._writing) or self._engine.busy())

    def _kick(self) -> None:
        try:
            os.write(self._wake_w, b"\0")
        except BlockingIOError:
            pass  # there are enough kicks in the pipe

    # ---- ending -----------------------------------------------------------------------------------------

    def abort(self, error: CollectiveError) -> None:
        """Ends every pending and later operation with `error`; idempotent, any thread."""
        with self._lock:
            if not self._closed:
                self._abort(error)

    def close(self) -> None:
        """Ends the mesh and its thread. What was sent has left only where the operations were done."""
        with self._lock:
            if self._closed:
                return
            self._abort(PeerLost(f"view {self.view.id} is over"))
            self._closed = True
            self._idle.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            while self._leading:
                self._changed.wait()
            for fd in (self._wake_r, self._wake_w):
                os.close(fd)

    def _abort(self, error: CollectiveError) -> None:
        if self._error is not None:
            return
        self._error = error
        self._engine.abort(error)
        for fd, channel in self._by_fd.items():
            self._poll.unregister(fd)
            channel.close()
        self._by_fd.clear()
        self._polls.clear()
        self._writing.clear()
        if self._dialing is not None:
            hang_up(self._dialing)
        self._changed.notify_all()
        self._kick()

    def _break(self, peer: int, error: str) -> None:
        if self._error is None:
            me, name = self._engine.name(self.rank), self._engine.name(peer)
            self._lost = (peer, error)
            self._abort(PeerLost(f"{me} lost its connection to {name} in view {self.view.id}: {error}"))

    def _tell(self) -> None:
        """Passes the news on, with no lock held."""
        if self._lost is None:
            return
        with self._lock:
            lost, self._lost = self._lost, None
        if lost is not None:
            self._on_broken(*lost)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

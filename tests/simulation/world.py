"""Virtual time: an event queue, processes that freeze and die, and connections with TCP's promises.

`World` owns the clock, the only source of randomness, the log and the network. A `Process` handles one event
at a time; while it is frozen (SIGSTOP) its mailbox fills, and is emptied in order when it wakes up. A
`Connection` delivers in order or not at all: messages get lost only when one of its ends closes or dies.
Everything runs in one thread.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

Action = Callable[[], None]
_KEPT_LINES = 400  # of the log, shown when a seed fails


class World:
    """`now` is in virtual seconds."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.lines: deque[tuple[float, str, tuple[Any, ...]]] = deque(maxlen=_KEPT_LINES)
        self._queue: list[tuple[float, int, Action]] = []
        self._count = 0
        self._cuts: set[frozenset[str]] = set()
        self._connections: set[Connection] = set()

    def after(self, delay_s: float, action: Action) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._count, action))

    def run(self, until_s: float, stop: Callable[[], bool]) -> None:
        """Handles events in order of time until `stop()` or `until_s`."""
        while self._queue and not stop():
            at, _, action = heapq.heappop(self._queue)
            if at > until_s:
                return
            self.now = at
            self.events += 1
            action()

    def log(self, text: str, *args: object) -> None:
        """`text % args`, formatted only if the log is shown."""
        self.lines.append((self.now, text, args))

    def log_text(self) -> str:
        return "\n".join(f"{at:9.3f}  {text % args if args else text}" for at, text, args in self.lines)

    # ---- network ----------------------------------------------------------------------------------------

    def is_cut(self, a: str, b: str) -> bool:
        return bool(self._cuts) and frozenset((a, b)) in self._cuts

    def cut(self, a: str, b: str) -> None:
        """From now on nothing passes between two hosts; what is sent waits (TCP sends it again)."""
        self._cuts.add(frozenset((a, b)))

    def heal(self, a: str, b: str) -> None:
        self._cuts.discard(frozenset((a, b)))
        for connection in sorted(self._connections, key=lambda c: c.number):
            connection.flush()

    def connect(self, a: Process, b: Process | None) -> Connection | None:
        """None where nobody listens, or the way is cut. A frozen process is connected to all the same."""
        if b is None or b.dead or self.is_cut(a.host, b.host):
            return None
        connection = Connection(self, a, b)
        self._connections.add(connection)
        return connection

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)


class Process:
    """One operating system process. Subclasses handle `on_message` and `on_closed`."""

    def __init__(self, world: World, name: str, host: str) -> None:
        self.world = world
        self.name = name
        self.host = host
        self.dead = False
        self.frozen = False
        self.cause = ""
        self.connections: list[Connection] = []
        self._mailbox: deque[Action] = deque()

    def on_message(self, connection: Connection, message: Any) -> None:
        raise NotImplementedError

    def on_closed(self, connection: Connection) -> None:
        raise NotImplementedError

    def deliver(self, action: Action) -> None:
        if self.dead:
            return
        if self.frozen or self._mailbox:
            self._mailbox.append(action)
        else:
            action()

    def after(self, delay_s: float, action: Action) -> None:
        """A timer of this process: it goes off late when the process is frozen."""
        self.world.after(delay_s, lambda: self.deliver(action))

    def freeze(self) -> None:
        if not self.dead:
            self.world.log("%s is frozen", self.name)
            self.frozen = True

    def wake(self) -> None:
        if self.dead or not self.frozen:
            return
        self.world.log("%s wakes up, %d in its mailbox", self.name, len(self._mailbox))
        self.frozen = False
        while self._mailbox and not self.frozen and not self.dead:
            self._mailbox[0]()
            if self._mailbox:
                self._mailbox.popleft()

    def die(self, cause: str, silently: bool = False) -> None:
        """`silently`: with its host, so that nobody gets an end of stream."""
        if self.dead:
            return
        self.world.log("%s dies: %s", self.name, cause)
        self.dead = True
        self.cause = cause
        self._mailbox.clear()
        for connection in list(self.connections):
            connection.close(self, silently=silently)


class Connection:
    """A stream between two processes: in order, nothing twice, and lost only with the stream's end."""

    def __init__(self, world: World, a: Process, b: Process) -> None:
        self.world = world
        self.number = world._count  # creation order, for a fixed order of flushing
        world._count += 1
        self.a = a
        self.b = b
        self.closed = False
        self._deaf: set[Process] = set()  # ends that closed: what arrives there is dropped
        self._ready_s = {a: 0.0, b: 0.0}  # by receiver: no message overtakes another one
        self._held: dict[Process, list[Callable[[Process], None]]] = {a: [], b: []}
        a.connections.append(self)
        b.connections.append(self)

    def other(self, end: Process) -> Process:
        return self.b if end is self.a else self.a

    def send(self, sender: Process, message: Any) -> None:
        """What is sent after the end of the stream is lost, as is what the sender sends when dead."""
        if not self.closed and not sender.dead:
            self._transmit(self.other(sender), lambda receiver: receiver.on_message(self, message))

    def close(self, by: Process, silently: bool = False) -> None:
        if self.closed:
            return
        self.closed = True
        self._deaf.add(by)
        other = self.other(by)
        if silently:
            self._drop_ends()
            self._deaf.add(other)  # it never hears of it; its owner finds out by silence
            return
        if self.world.rng.random() < 0.3:  # a reset: what is on its way to the other end is lost
            self._ready_s[other] = self.world.now
            self._held[other].clear()
            self._deaf.add(other)
        self._transmit(other, self._end, last=True)

    def flush(self) -> None:
        """The way is whole again: what was held goes out, in order."""
        for receiver, held in self._held.items():
            waiting, held[:] = list(held), []
            for action in waiting:
                self._transmit(receiver, action, last=action == self._end)

    def _end(self, receiver: Process) -> None:
        self._drop_ends()
        receiver.on_closed(self)

    def _drop_ends(self) -> None:
        for end in (self.a, self.b):
            if self in end.connections:
                end.connections.remove(self)
        self.world.forget(self)

    def _transmit(self, receiver: Process, action: Callable[[Process], None], last: bool = False) -> None:
        if self.world.is_cut(self.a.host, self.b.host) or self._held[receiver]:
            self._held[receiver].append(action)
            return
        latency = self.world.rng.uniform(0.0002, 0.002) if self.a.host != self.b.host else 0.0001
        if self.world.rng.random() < 0.02:
            latency += self.world.rng.uniform(0.0, 0.2)  # lost and sent again
        at = max(self._ready_s[receiver], self.world.now + latency)
        self._ready_s[receiver] = at

        def arrive() -> None:
            if last or receiver not in self._deaf:
                action(receiver)

        self.world.after(at - self.world.now, lambda: receiver.deliver(arrive))

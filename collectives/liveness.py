"""Judges local processes by what the kernel says of them, so that a busy interpreter is never taken for dead.

[Note: liveness] A process that is gone, a zombie, or stopped is dead at once: its pidfd or /proc/PID/stat says
so. One that holds the interpreter lock is running, with growing CPU time, and is left alone; how long it may
take is the operation's deadline (`timeouts.stall_s`), not this judge's.

Owns one thread. `on_dead(name, cause, detected_ms)` is called from it, once a name.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_PERIOD_S = 0.02
# One look may hit a process that a debugger's SIGSTOP touches for an instant; two looks 20 ms apart do not.
_LOOKS = 2


@dataclass
class _Watched:
    pidfd: int
    stat: int  # /proc/PID/stat, open: it stays this process's, and reading it is four times as cheap as opening it
    seen_alive: float
    stopped_looks: int = 0
    dead: bool = False
    # Held while its descriptors are used or closed: their numbers soon stand for another process.
    fencing: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        os.close(self.pidfd)
        os.close(self.stat)


class Judge:
    """Watches processes of this host by pid."""

    def __init__(self, on_dead: Callable[[str, str, float], None]) -> None:
        self._on_dead = on_dead
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def watch(self, name: str, pid: int) -> bool:
        """False if there is no such process any more."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(pidfd)
            return False
        with self._lock:
            self._watched[name] = _Watched(pidfd, stat, time.monotonic())
        return True

    def alive(self, name: str) -> bool:
        with self._lock:
            watched = self._watched.get(name)
        return watched is not None and not watched.dead

    def fence(self, name: str, timeout_s: float = 10.0, wake_s: float = -1.0) -> bool:
        """Kills the process through its pidfd and waits until its memory is gone; True when it is.

        `wake_s` (scripted): it is sent SIGCONT first and may run that long although it was declared dead.
        Any thread may call it, several at once for one name: each returns when the process is gone.
        """
        with self._lock:
            watched = self._watched.get(name)
        if watched is None:
            return True
        with watched.fencing:
            if not self._knows(name, watched):
                return True
            try:
                if wake_s >= 0:
                    signal.pidfd_send_signal(watched.pidfd, signal.SIGCONT)
                    self._stop.wait(wake_s)
                signal.pidfd_send_signal(watched.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            poll = select.poll()
            poll.register(watched.pidfd, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                return False
            with self._lock:
                del self._watched[name]
                watched.forget()
        return True

    def forget(self, name: str) -> None:
        """Judges it no more; it is not harmed."""
        with self._lock:
            watched = self._watched.get(name)
        if watched is None:
            return
        with watched.fencing, self._lock:
            if self._watched.get(name) is watched:
                del self._watched[name]
                watched.forget()

    def _knows(self, name: str, watched: _Watched) -> bool:
        with self._lock:
            return self._watched.get(name) is watched

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2)
        with self._lock:
            left = list(self._watched.items())
        for name, watched in left:
            with watched.fencing, self._lock:
                if self._watched.pop(name, None) is not None:
                    watched.forget()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()

    def _look(self) -> None:
        with self._lock:
            living = {name: w for name, w in self._watched.items() if not w.dead}
        poll = select.poll()
        for watched in living.values():
            poll.register(watched.pidfd, select.POLLIN)
        try:
            ended = {fd for fd, _ in poll.poll(_PERIOD_S * 1000)}
        except OSError:
            ended = set()
        if not living:
            self._stop.wait(_PERIOD_S)
        now = time.monotonic()
        found = []
        with self._lock:  # `fence` closes descriptors, and their numbers are used again
            for name, watched in living.items():
                if self._watched.get(name) is not watched:
                    continue
                cause = "exited" if watched.pidfd in ended else self._stopped(watched, now)
                if cause:
                    watched.dead = True
                    found.append((name, cause, (now - watched.seen_alive) * 1000))
        for name, cause, detected_ms in found:
            self._on_dead(name, cause, detected_ms)

    def _stopped(self, watched: _Watched, now: float) -> str:
        state = _state_of(watched.stat)
        if state in ("", "Z", "X"):
            return "exited"
        if state == "T":
            watched.stopped_looks += 1
            return "frozen (stopped by a signal)" if watched.stopped_looks >= _LOOKS else ""
        watched.stopped_looks = 0
        watched.seen_alive = now
        return ""


def _state_of(stat: int) -> str:
    """One letter of an open /proc/PID/stat, "" when the process is gone."""
    try:
        text = os.pread(stat, 4096, 0)
    except OSError:
        return ""
    return chr(text[text.rindex(b")") + 2])

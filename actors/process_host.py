"""A host of plain local processes, forked by a zygote (zygote.py); needs no Ray.

Owns: the zygote, a socket to it, a reader thread, and a pidfd for every living child. The host kills
through pidfds, so it never hits a process that took over a number. Any thread may call; `on_exit` comes
from the reader thread. A zygote that dies takes its children with it ([Note: no orphans]); the next
`start` makes another one.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from everstep.actors.host import DEFAULT_ENTRIES, Entries, HostClosed, OnExit, OnNodes, entry_of
from everstep.actors.run_folder import RunFolder, wait_gone
from everstep.actors.zygote import PACKET_BYTES, Exited, Setup, Start, Started

logger = logging.getLogger(__name__)

DEFAULT_PRELOAD = ("torch", "everstep.actors.rank_process", "everstep.actors.manager_process")

ORDERLY_S = 5.0
"""How long `close` lets the zygote kill and reap by itself: milliseconds when it is idle, up to the rest of
its imports (2-3 s) when a run ends while it starts. Then it is killed, and its children with it."""

_Message = Started | Exited


class ProcessHost:
    """Implements `everstep.actors.host.Host`."""

    def __init__(
        self,
        on_exit: OnExit,
        *,
        log_dir: Path,
        entries: Entries = DEFAULT_ENTRIES,
        preload: Sequence[str] = DEFAULT_PRELOAD,
        run_folder: RunFolder | None = None,
    ) -> None:
        """Returns at once; the zygote imports `preload` meanwhile.

        Output of a process goes to `log_dir`/NAME.log, the zygote's own to zygote.log. Processes register
        themselves in `run_folder`, so that its reaper ends them if all else fails.
        """
        self._on_exit = on_exit
        self._log_dir = log_dir.absolute()
        self._entries = entries
        folder = str(run_folder.path) if run_folder else None
        path = [str(Path(entry).absolute()) for entry in sys.path]
        self._setup = Setup(path, list(preload), str(self._log_dir), folder)
        self._names: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._zygote = _ZygoteLink(self._setup, self._report)

    def start(self, role: str, name: str, slot: int, config: bytes, node: str = "") -> None:
        """See Host. `slot` makes no difference here: there is one machine."""
        entry = entry_of(self._entries, role)
        with self._lock:
            if self._closed:
                raise HostClosed(f"cannot start {name}: the host is closed")
            if name in self._names:
                raise ValueError(f"a process named {name!r} was started before; names are used once")
            self._names.add(name)
            while not self._zygote.start(name, entry, config):
                self._zygote = _ZygoteLink(self._setup, self._report)

    def kill(self, name: str) -> None:
        """See Host."""
        self._zygote.kill(name)  # children of an earlier zygote died with it

    def pid(self, name: str) -> int | None:
        """See Host."""
        return self._zygote.pid(name)

    @property
    def zygote_pid(self) -> int:
        """For those who watch or drill the host itself."""
        return self._zygote.process.pid

    def adopt(self, role: str, name: str, slot: int, where: bytes) -> None:
        """See Host. Processes end with the one that started them: there never is anything to adopt."""
        self._on_exit(name, "died: with the process that had started it")

    def located(self, name: str) -> bytes:
        """See Host."""
        return b""

    def watch_nodes(self, on_nodes: OnNodes) -> bool:
        return False

    def free(self, slot: int) -> None:
        pass  # a process holds no place

    def close(self) -> None:
        """See Host."""
        with self._lock:
            self._closed = True
        self._zygote.close()

    def _report(self, name: str, cause: str) -> None:
        try:
            self._on_exit(name, cause)
        except Exception:  # the news of the next process must still be told
            logger.exception("on_exit(%r, %r) raised", name, cause)


class _ZygoteLink:
    """One life of a zygote, seen from the host."""

    def __init__(self, setup: Setup, report: OnExit) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._pending: set[str] = set()  # asked for, neither Started nor Exited yet
        self._doomed: set[str] = set()  # killed while pending
        self._living: dict[str, tuple[int, int]] = {}  # name -> (pid, pidfd)
        self._closing = False
        self._lost = False
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = _spawn(theirs.fileno(), Path(setup.log_dir))
        if setup.run_folder is not None:
            RunFolder.at(Path(setup.run_folder)).register_pid(self.process.pid)  # should it be frozen
        packet = msgspec.msgpack.encode(setup)
        assert len(packet) <= PACKET_BYTES, "sys.path and preload are too long for one packet"
        self._channel.sendall(packet)
        self._reader = threading.Thread(target=self._read, name="everstep-process-host", daemon=True)
        self._reader.start()

    def start(self, name: str, entry: str, config: bytes) -> bool:
        """Asks for a child; False if the zygote is known to be lost, and then nothing was done."""
        memory = os.memfd_create("everstep-config", os.MFD_CLOEXEC)
        with open(memory, "wb", buffering=0) as file, self._lock:
            view = memoryview(config)
            while view:
                view = view[file.write(view) :]
            if self._lost:
                return False
            self._pending.add(name)
            try:
                socket.send_fds(self._channel, [msgspec.msgpack.encode(Start(name, entry))], [memory])
            except OSError:
                pass  # the zygote has just died: the reader will report the name with the others
        return True

    def kill(self, name: str) -> None:
        with self._lock:
            if name in self._pending:
                self._doomed.add(name)
            elif name in self._living:
                _kill(self._living[name][1])

    def pid(self, name: str) -> int | None:
        with self._lock:
            return self._living[name][0] if name in self._living else None

    def close(self) -> None:
        with self._lock:
            if not self._closing:
                self._closing = True
                try:
                    self._channel.shutdown(socket.SHUT_WR)  # the zygote kills and reaps all its children
                except OSError:
                    pass
            for _, pidfd in self._living.values():
                _kill(pidfd)
            idle = not self._living and not self._pending
        if idle:
            self.process.kill()  # perhaps amidst its imports
        if self._reader is threading.current_thread():
            return  # called from on_exit; the reader ends by itself
        self._reader.join(ORDERLY_S)
        if self._reader.is_alive():
            self.process.kill()
            self._reader.join()

    def _read(self) -> None:
        """The reader thread, up to the zygote's end."""
        while True:
            try:
                packet, fds, _, _ = socket.recv_fds(self._channel, PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionError:
                packet, fds = b"", []
            if not packet:
                break
            message = msgspec.msgpack.decode(packet, type=_Message)
            if isinstance(message, Started):
                self._on_started(message, fds[0])
            else:
                self._forget(message.name)
                self._report(message.name, message.cause)
        self._on_lost()

    def _on_started(self, message: Started, pidfd: int) -> None:
        with self._lock:
            self._pending.discard(message.name)
            self._living[message.name] = (message.pid, pidfd)
            if message.name in self._doomed or self._closing:
                _kill(pidfd)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._pending.discard(name)
            self._doomed.discard(name)
            if name in self._living:
                os.close(self._living.pop(name)[1])

    def _on_lost(self) -> None:
        """The zygote is gone or closed its end: nobody is left behind, everybody is reported."""
        self.process.kill()  # nothing happens if it ended by itself
        status = self.process.wait()
        with self._lock:
            self._lost = True
            left = {name: pidfd for name, (_, pidfd) in self._living.items()}
            unborn = self._pending - left.keys()
            self._pending.clear()
            self._channel.close()
            for pidfd in left.values():
                _kill(pidfd)  # the kernel did it already, see [Note: no orphans]
            why = "signal 9" if self._closing else f"died: its zygote ended ({_cause(status)})"
        wait_gone(list(left.values()), ORDERLY_S)
        for name in left:
            self._forget(name)
        for name in [*left, *sorted(unborn)]:
            self._report(name, why)


def _spawn(channel: int, log_dir: Path) -> "subprocess.Popen[bytes]":
    source = str(Path(__file__).absolute().parents[2])  # where `everstep` is; Setup has the rest of the path
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log_dir / "zygote.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "everstep.actors.zygote", str(channel)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[channel],
            start_new_session=True,
        )


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _cause(code: int) -> str:
    return f"exit {code}" if code >= 0 else f"signal {-code}"

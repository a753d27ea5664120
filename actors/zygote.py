"""The process that forks the local processes of a run: it has imported torch, so a start costs a fork.

Measured on 2 cores: 5 ms from `start` to the entry point, where a fresh interpreter takes 2-3 s with torch.

    host --> zygote    Setup once, then a Start per process, each with a memfd that holds its config
    zygote --> host    Started with a pidfd, Exited with a cause
    end of file        from the host: SIGKILL to all children, frozen or not, reap them, leave

Packets travel over an inherited SOCK_SEQPACKET pair; nothing is on the command line or in the environment.

[Note: no orphans] Children ask the kernel to kill them when the zygote dies (PR_SET_PDEATHSIG, which follows
the thread that forked: the main thread, the only one). The zygote leads its own session, so that a terminal's
Ctrl-C reaches only the driver; each child leads its own process group, so that what it forked itself (data
workers) is killed with it, exactly, while its zombie still keeps the group's number.

One thread. The zygote imports and forks; it runs no torch operation, for a child would inherit half a pool.
"""

import atexit
import ctypes
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import msgspec

from everstep.actors.host import run_entry
from everstep.actors.run_folder import RunFolder

PACKET_BYTES = 128 * 1024  # well under the default socket buffer of 208 KiB; a Setup is the largest
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


class Setup(msgspec.Struct, frozen=True, tag=True):
    """What all children share. `path`: the host's sys.path."""

    path: list[str]
    preload: list[str]
    log_dir: str
    run_folder: str | None


class Start(msgspec.Struct, frozen=True, tag=True):
    """Fork a child; its config is in the memfd that comes with this packet."""

    name: str
    entry: str


class Started(msgspec.Struct, frozen=True, tag=True):
    """The child lives; its pidfd comes with this packet."""

    name: str
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """The child is gone and reaped."""

    name: str
    cause: str


@dataclass(frozen=True)
class _Child:
    name: str
    pid: int


@dataclass(frozen=True)
class _Task:
    """What a freshly forked child has to do."""

    start: Start
    config: int  # the memfd
    setup: Setup


class _HostGone(Exception):
    pass


class Zygote:
    """Serves one host until that closes its end of the channel."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._children: dict[int, _Child] = {}  # pidfd -> child
        self._libc = ctypes.CDLL(None, use_errno=True)

    def serve(self) -> _Task | None:
        """Returns None in the zygote when the host is gone, and a task in every forked child."""
        try:
            setup = self._setup()
            while True:
                for fd, _ in self._poll.poll():
                    if fd in self._children:
                        self._reap(fd)
                        continue
                    task = self._start(setup)
                    if task is not None:
                        return task
        except _HostGone:
            self._kill_all()
            return None

    def _setup(self) -> Setup:
        packet, _ = self._receive()
        setup = msgspec.msgpack.decode(packet, type=Setup)
        sys.path[:] = setup.path
        for module in setup.preload:
            try:
                importlib.import_module(module)
            except Exception:  # a child that needs it fails by itself, with this traceback in its own log
                traceback.print_exc()
        gc.collect()
        gc.freeze()  # children do not touch, and so do not copy, the pages of what was imported
        return setup

    def _start(self, setup: Setup) -> _Task | None:
        """Forks; returns a task in the child, None in the zygote."""
        packet, fds = self._receive()
        start = msgspec.msgpack.decode(packet, type=Start)
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(fds[0])
            self._send(Exited(start.name, f"died: cannot fork: {error}"))
            return None
        if pid == 0:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # see [Note: no orphans]
            self._libc.prctl(_PR_SET_NAME, start.name.encode()[:15])
            if os.getppid() != zygote:
                os._exit(1)
            os.setpgid(0, 0)
            self._channel.close()
            for fd in self._children:
                os.close(fd)
            return _Task(start, fds[0], setup)
        os.close(fds[0])
        try:
            os.setpgid(pid, pid)  # the child does so too; whoever is first
        except (PermissionError, ProcessLookupError):
            pass
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = _Child(start.name, pid)
        self._poll.register(pidfd, select.POLLIN)
        self._send(Started(start.name, pid), pidfd)
        return None

    def _reap(self, pidfd: int) -> None:
        child = self._forget(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        self._send(Exited(child.name, f"exit {code}" if code >= 0 else f"signal {-code}"))

    def _forget(self, pidfd: int) -> _Child:
        child = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        try:
            os.killpg(child.pid, signal.SIGKILL)  # what it forked; see [Note: no orphans]
        except (ProcessLookupError, PermissionError):
            pass
        return child

    def _kill_all(self) -> None:
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in list(self._children):
            child = self._children[pidfd]
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            try:
                self._reap(pidfd)
            except _HostGone:
                pass

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            packet, fds, _, _ = socket.recv_fds(self._channel, PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            packet = b""
        if not packet:
            raise _HostGone
        return packet, fds

    def _send(self, message: Started | Exited, *fds: int) -> None:
        try:
            socket.send_fds(self._channel, [msgspec.msgpack.encode(message)], fds)
        except ConnectionError as error:
            raise _HostGone from error


def _become(task: _Task) -> int:
    """Turns the forked process into its own: log file, registration, entry point. Returns the exit code."""
    log = Path(task.setup.log_dir, f"{task.start.name}.log")
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        # A killed process flushes nothing.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    if task.setup.run_folder is not None:
        RunFolder.at(Path(task.setup.run_folder)).register_pid()
    with open(task.config, "rb") as memory:
        memory.seek(0)
        config = memory.read()
    return run_entry(task.start.entry, config)


def main(channel_fd: int) -> None:
    """The zygote's main; in the forked children it goes on as theirs and does not return."""
    with socket.socket(fileno=channel_fd) as channel:
        task = Zygote(channel).serve()
    if task is None:
        return
    # As multiprocessing does: no interpreter shutdown in a forked process, where daemon threads of gRPC and
    # torch may abort it and turn "exit 0" into "signal 6".
    code = 1
    try:
        code = _become(task)
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code & 0xFF)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""A run's folder in shared memory, and the promise that it does not outlive the run.

`/dev/shm/everstep-RUNID/` holds the run's segments. Beside them:

    lock         owners hold it shared (flock) while they live; the kernel lets go of it when they die
    reaper.lock  held by the one reaper of this folder
    pids/PID     start time of a process that must not outlive the run
    marks/N      an environment entry NAME=VALUE; whatever carries it must not outlive the run either
    folders/N    a further folder to remove with this one (the temporary folder of an embedded Ray)
    released     written by an orderly end

Who holds `lock`: whoever may bring the run back. On a cluster that is the supervisor and the managers. With
the process host or an embedded Ray everything ends with the driver, so there the driver alone holds it; a
frozen manager must not keep a dead run's memory.

Owns: the folder. Standard library only, for the reaper imports it. Methods may be called from any thread.
"""

import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SHM = Path("/dev/shm")


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names a process for good.

    None if there is no such process or it is a zombie.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the command may contain spaces and brackets
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def open_process(pid: int, started: int) -> int | None:
    """A pidfd of exactly the process that had this pid and start time, or None if it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_time(pid) == started:
        return fd
    os.close(fd)
    return None


class RunFolder:
    """One run's folder on this node. Any number of processes may have it open."""

    def __init__(self, runid: str, root: Path = SHM) -> None:
        """Names the folder; creates nothing. Raises ValueError for an id that is not one plain path
        component.
        """
        if not runid or "/" in runid or runid.startswith("."):
            raise ValueError(f"run id {runid!r} cannot name a folder")
        self.runid = runid
        self.path = root / f"everstep-{runid}"
        self._lock: int | None = None

    @classmethod
    def at(cls, path: Path) -> "RunFolder":
        """The run folder at a path, for processes that were told the path only."""
        return cls(path.name.removeprefix("everstep-"), path.parent)

    def create(self) -> None:
        """Makes the folder, for this user only. Does nothing where it exists."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        for name in ("pids", "marks", "folders"):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)

    def hold(self) -> None:
        """Keeps the folder alive until `release`, `let_go` or the death of this process.

        Raises FileNotFoundError where the folder does not exist or the reaper was faster.
        """
        if self._lock is not None:
            return
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits only for a reaper that is removing the folder right now
        if os.fstat(lock).st_nlink == 0:
            os.close(lock)
            raise FileNotFoundError(f"{self.path} was removed by its reaper")
        self._lock = lock

    def let_go(self) -> None:
        """Gives up this process's hold; if it was the last one, the reaper acts after its grace."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def register_pid(self, pid: int | None = None) -> None:
        """Has the reaper kill a process (default: this one) at the run's end. One that is gone is ignored."""
        pid = os.getpid() if pid is None else pid
        started = start_time(pid)
        if started is not None:
            _write(self.path / "pids" / str(pid), str(started))

    def register_mark(self, mark: str) -> None:
        """Has the reaper kill every process that was started with NAME=VALUE in its environment.

        For processes that are not known yet; VALUE must be nobody else's, ever.
        """
        _write(self.path / "marks" / f"{os.getpid()}-{time.monotonic_ns()}", mark)

    def register_folder(self, folder: Path) -> None:
        """Has the reaper remove a further folder (an absolute path) at the run's end."""
        _write(self.path / "folders" / f"{os.getpid()}-{time.monotonic_ns()}", str(folder.absolute()))

    def ensure_reaper(self, grace_s: float = 5.0) -> None:
        """Starts the reaper of this folder unless it has one. Call it after `hold`.

        `grace_s`: how long the folder waits for an adopter once its last owner has died.
        """
        # One that finds reaper.lock taken leaves; the lock is taken before this returns.
        # By file and with -I -S: no site-packages, no user code, about 15 ms and 9 MB. It forks away from us,
        # so that neither Ray nor a host that ends its process tree or group ends it too.
        reaper = Path(__file__).absolute().with_name("reaper.py")
        arguments = [sys.executable, "-I", "-S", str(reaper), str(self.path), repr(grace_s)]
        subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={key: value for key, value in os.environ.items() if key == "LD_LIBRARY_PATH"},
            start_new_session=True,
            check=True,
            timeout=30,
        )

    def release(self) -> None:
        """The orderly end: removes the folder; the reaper sees that and leaves. Idempotent.

        The caller has ended the run's processes before: none is killed here.
        """
        for folder in self.folders():
            shutil.rmtree(folder, ignore_errors=True)
        if self.path.exists():
            _write(self.path / "released", "")
        shutil.rmtree(self.path, ignore_errors=True)
        self.let_go()

    def processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of every registered process."""
        found = []
        for file in _files(self.path / "pids"):
            try:
                found.append((int(file.name), int(file.read_text())))
            except (ValueError, FileNotFoundError):
                continue
        return found

    def marks(self) -> list[str]:
        """The marks of processes to kill."""
        return [file.read_text() for file in _files(self.path / "marks")]

    def folders(self) -> list[Path]:
        """The further folders to remove."""
        named = [file.read_text() for file in _files(self.path / "folders")]
        return [Path(text) for text in named if text.startswith("/")]


def kill_processes(processes: list[tuple[int, int]], wait_s: float) -> None:
    """SIGKILLs (pid, start time) pairs through pidfds and waits until they are gone."""
    descriptors = [fd for pid, started in processes if (fd := open_process(pid, started)) is not None]
    for fd in descriptors:
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            pass
    wait_gone(descriptors, wait_s)
    for fd in descriptors:
        os.close(fd)


def marked_processes(mark: str) -> list[tuple[int, int]]:
    """(pid, start time) of every living process of ours that was started with this NAME=VALUE."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            entries = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if mark.encode() in entries and (started := start_time(int(name))) is not None:
            found.append((int(name), started))
    return found


def wait_gone(descriptors: list[int], wait_s: float) -> bool:
    """Waits until every process behind these pidfds has ended (zombies have); False after `wait_s`."""
    poll = select.poll()
    for fd in descriptors:
        poll.register(fd, select.POLLIN)
    left = set(descriptors)
    deadline = time.monotonic() + wait_s
    while left and (remaining := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(remaining * 1000):
            poll.unregister(fd)
            left.discard(fd)
    return not left


def _files(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if not file.name.startswith(".")]
    except FileNotFoundError:
        return []


def _write(path: Path, text: str) -> None:
    """Writes a small file in one move, for readers that look while we write."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)

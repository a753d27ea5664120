"""The last process of a run on a node: removes the run's shared memory when nobody owns it any more.

    1. take reaper.lock, or leave: this folder has a reaper
    2. wait for `lock`, exclusively: every owner is gone (the kernel frees the lock of the dead)
    3. an orderly end has removed the folder: leave
    4. let go and give an adopter `grace_s` to take the lock; taken: back to 2
    5. keep `lock`, SIGKILL what pids/ and marks/ name, remove the folders; a late adopter finds nothing

Started by `RunFolder.ensure_reaper` as a file under `python -I -S`, so it imports the standard library and
run_folder.py beside it, nothing else. One thread; owns nothing but its two locks.
"""

import fcntl
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

POLL_S = 0.25
KILL_WAIT_S = 3.0
SWEEPS = 2  # the first may meet a process while it forks


def take(path: Path) -> int | None:
    """The folder's reaper.lock, or None if it has a reaper already or is gone. Survives our forks."""
    try:
        own = os.open(path / "reaper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(own)
        return None
    return own


def reap(path: Path, grace_s: float) -> str:
    """Steps 2 to 5 for one folder; returns why it stopped: "released" or "reaped"."""
    try:
        lock = os.open(path / "lock", os.O_RDWR)  # an owner made it; made anew, it would keep a folder that is going
    except FileNotFoundError:
        return "released"
    while True:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _same(lock, path / "lock"):
            return "released"  # and whatever has that name by now is another execution's
        if (path / "released").exists():
            shutil.rmtree(path, ignore_errors=True)  # an orderly end that was killed half-way
            return "released"
        fcntl.flock(lock, fcntl.LOCK_UN)
        if not _adopted(lock, grace_s):
            break
    if not _same(lock, path / "lock"):
        return "released"
    run_folder = _sibling("run_folder")
    folder = run_folder.RunFolder.at(path)
    run_folder.kill_processes(folder.processes(), KILL_WAIT_S)
    for mark in folder.marks():
        for _ in range(SWEEPS):
            run_folder.kill_processes(run_folder.marked_processes(mark), KILL_WAIT_S)
    for extra in folder.folders():
        shutil.rmtree(extra, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
    return "reaped"


def _same(lock: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False


def _adopted(lock: int, grace_s: float) -> bool:
    """Waits for somebody to hold the lock. If nobody does within `grace_s`, we hold it: no gap for an
    adopter.
    """
    deadline = time.monotonic() + grace_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        fcntl.flock(lock, fcntl.LOCK_UN)
        time.sleep(min(POLL_S, remaining))


def _sibling(name: str) -> ModuleType:
    """A module beside this file: importing `everstep` would need site-packages and its dependencies."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> None:
    """Takes the lock, forks away from the caller's process tree, which ends its wait, and reaps."""
    path, grace_s = Path(arguments[0]), float(arguments[1])
    if take(path) is None:
        return
    if os.fork() > 0:
        os._exit(0)
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
    reap(path, grace_s)


if __name__ == "__main__":
    main(sys.argv[1:])

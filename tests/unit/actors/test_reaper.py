"""The reaper and the run folder, with real processes and locks, in a folder that is not /dev/shm."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.actors import reaper
from everstep.actors.run_folder import RunFolder, kill_processes, marked_processes, open_process, start_time

SOURCE = str(Path(__file__).parents[3] / "src")
GRACE_S = 0.3

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder("run", tmp_path)
    folder.create()
    yield folder
    folder.release()
    wait_until(lambda: reaper_pids(folder) == [])


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a Python with a script; kills it in the end."""
    processes: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, "PYTHONPATH": SOURCE, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


OWNER = """
import sys, time
from pathlib import Path
from everstep.actors.run_folder import RunFolder
folder = RunFolder.at(Path(sys.argv[1]))
folder.hold()
folder.register_pid()
folder.ensure_reaper(float(sys.argv[2]))
print("ready", flush=True)
time.sleep(600)
"""
SLEEPER = "import time; print('ready', flush=True); time.sleep(600)"


def test_a_folder_outlives_its_owner_by_the_grace_only(folder: RunFolder, spawn: Spawn) -> None:
    owner = spawn(OWNER, str(folder.path), str(GRACE_S))
    (folder.path / "segment").write_bytes(b"x" * 100)
    time.sleep(2 * GRACE_S)
    assert (folder.path / "segment").exists()
    owner.kill()
    before = time.monotonic()
    wait_until(lambda: not folder.path.exists())
    assert time.monotonic() - before >= GRACE_S * 0.9
    wait_until(lambda: reaper_pids(folder) == [])


def test_registered_processes_die_even_frozen_and_others_do_not(folder: RunFolder, spawn: Spawn) -> None:
    owner = spawn(OWNER, str(folder.path), str(GRACE_S))
    frozen, bystander = spawn(SLEEPER), spawn(SLEEPER)
    folder.register_pid(frozen.pid)
    started = start_time(bystander.pid)
    assert started is not None
    (folder.path / "pids" / str(bystander.pid)).write_text(str(started - 1))  # the number was someone else's
    frozen.send_signal(signal.SIGSTOP)
    owner.kill()
    wait_until(lambda: not folder.path.exists())
    assert frozen.wait(5) == -signal.SIGKILL
    assert bystander.poll() is None


def test_marked_processes_die_and_others_do_not(folder: RunFolder, spawn: Spawn) -> None:
    mark = f"EVERSTEP_TEST={folder.path}"
    folder.register_mark(mark)
    owner = spawn(OWNER, str(folder.path), str(GRACE_S))
    marked = spawn(SLEEPER, EVERSTEP_TEST=str(folder.path))
    bystander = spawn(SLEEPER, EVERSTEP_TEST=f"{folder.path}2")
    assert [pid for pid, _ in marked_processes(mark)] == [marked.pid]
    owner.kill()
    assert marked.wait(5) == -signal.SIGKILL
    wait_until(lambda: not folder.path.exists())
    assert bystander.poll() is None


def test_further_folders_go_too(folder: RunFolder, spawn: Spawn, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    (extra / "deep").mkdir(parents=True)
    folder.register_folder(extra)
    spawn(OWNER, str(folder.path), str(GRACE_S)).kill()
    wait_until(lambda: not folder.path.exists())
    assert not extra.exists()


def test_it_waits_for_the_last_owner(folder: RunFolder, spawn: Spawn) -> None:
    first = spawn(OWNER, str(folder.path), str(GRACE_S))
    second = spawn(OWNER, str(folder.path), str(GRACE_S))
    first.kill()
    time.sleep(3 * GRACE_S)
    assert folder.path.exists()
    assert second.poll() is None
    second.kill()
    wait_until(lambda: not folder.path.exists())


def test_an_adopter_within_the_grace_keeps_everything(folder: RunFolder, spawn: Spawn) -> None:
    worker = spawn(SLEEPER)
    folder.register_pid(worker.pid)
    owner = spawn(OWNER, str(folder.path), "1.0")
    owner.kill()
    owner.wait()
    time.sleep(0.3)  # less than the grace
    folder.hold()
    time.sleep(1.2)  # more than the grace
    assert worker.poll() is None
    assert folder.path.exists()
    folder.let_go()
    wait_until(lambda: not folder.path.exists())
    assert worker.wait(5) == -signal.SIGKILL


def test_an_adopter_that_comes_too_late_is_told(folder: RunFolder, spawn: Spawn) -> None:
    spawn(OWNER, str(folder.path), "0").kill()
    wait_until(lambda: not folder.path.exists())
    with pytest.raises(FileNotFoundError):
        folder.hold()


def test_a_lock_taken_before_and_got_after_the_removal_is_refused(folder: RunFolder) -> None:
    """The race: the adopter opened the lock's file, then the reaper removed it under the exclusive lock."""
    import fcntl

    (folder.path / "lock").touch()
    with open(folder.path / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        errors: list[BaseException] = []

        def adopt() -> None:
            try:
                folder.hold()
            except FileNotFoundError as error:
                errors.append(error)

        adopter = threading.Thread(target=adopt)
        adopter.start()
        time.sleep(0.1)
        (folder.path / "lock").unlink()
    adopter.join(5)
    assert len(errors) == 1


def test_an_orderly_end_ends_the_reaper_at_once(folder: RunFolder) -> None:
    folder.hold()
    folder.ensure_reaper(grace_s=600)
    assert len(reaper_pids(folder)) == 1
    folder.release()
    assert not folder.path.exists()
    wait_until(lambda: reaper_pids(folder) == [], limit_s=2)
    folder.release()


def test_an_old_reaper_leaves_a_new_folder_of_the_same_name_alone(folder: RunFolder, spawn: Spawn) -> None:
    manager = spawn(OWNER, str(folder.path), "0")  # holds the old lock a little longer
    folder.hold()
    folder.release()
    again = RunFolder("run", folder.path.parent)
    again.create()
    again.hold()
    again.ensure_reaper(grace_s=600)
    assert len(reaper_pids(folder)) == 2
    manager.kill()
    wait_until(lambda: len(reaper_pids(folder)) == 1)
    assert again.path.exists()
    again.release()


def test_an_orderly_end_that_was_killed_half_way_is_finished_without_grace(folder: RunFolder) -> None:
    folder.hold()
    folder.ensure_reaper(grace_s=600)
    (folder.path / "released").touch()
    folder.let_go()
    wait_until(lambda: not folder.path.exists(), limit_s=2)


def test_there_is_one_reaper(folder: RunFolder) -> None:
    folder.hold()
    threads = [threading.Thread(target=folder.ensure_reaper, args=(600.0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(reaper_pids(folder)) == 1)
    assert reaper.take(folder.path) is None


def test_the_reaper_is_in_nobodys_tree_or_group_and_light(folder: RunFolder) -> None:
    folder.hold()
    folder.ensure_reaper(grace_s=600)
    (pid,) = reaper_pids(folder)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    parent, group, session = map(int, fields[1:4])
    assert parent != os.getpid()
    assert os.getpgid(0) != group
    assert os.getsid(0) != session
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(status["VmRSS"].split()[0]) < 30_000  # kB; torch alone is 217 MB
    assert sorted(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)) == ["/dev/null"] * 3


def test_the_folder_is_private(folder: RunFolder) -> None:
    assert folder.path.stat().st_mode & 0o077 == 0
    assert RunFolder.at(folder.path).path == folder.path


@pytest.mark.parametrize("runid", ["", "a/b", "..", ".hidden"])
def test_a_run_id_is_one_plain_name(runid: str) -> None:
    with pytest.raises(ValueError, match="cannot name a folder"):
        RunFolder(runid)


def test_a_process_is_named_by_pid_and_start_time(spawn: Spawn) -> None:
    sleeper = spawn(SLEEPER)
    started = start_time(sleeper.pid)
    assert started is not None
    assert open_process(sleeper.pid, started + 1) is None
    kill_processes([(sleeper.pid, started + 1)], wait_s=0.1)
    assert sleeper.poll() is None
    kill_processes([(sleeper.pid, started)], wait_s=5)
    assert sleeper.wait(5) == -signal.SIGKILL
    assert start_time(sleeper.pid) is None


def reaper_pids(folder: RunFolder) -> list[int]:
    """Living reapers of a folder, by their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder.path).encode() in command and any(part.endswith(b"/reaper.py") for part in command):
            found.append(int(process.name))
    return found


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.01)

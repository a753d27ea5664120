"""The contract of `everstep.actors.host.Host`, for both hosts.

Every test leaves no process behind: the fixture closes the host, and checks by pid.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.actors.host import Entries, Host, HostClosed
from everstep.actors.process_host import ProcessHost

HERE = str(Path(__file__).parent)
SOURCE = str(Path(__file__).parents[2] / "src")
ENTRIES: Entries = {
    "manager": "host_entries:sleep",
    "rank": "host_entries:act",
    "length": "host_entries:length",
}
PATIENCE_S = 30.0

MakeHost = Callable[..., Host]
Exits = dict[str, str]


Drive = Callable[..., tuple[subprocess.Popen[bytes], list[int]]]


class Watch:
    """Collects what a host reports."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.all: list[tuple[str, str]] = []

    def __call__(self, name: str, cause: str) -> None:
        self._queue.put((name, cause))

    def wait(self, count: int = 1) -> Exits:
        """The next `count` reports."""
        got = [self._queue.get(timeout=PATIENCE_S) for _ in range(count)]
        self.all += got
        return dict(got)

    def drain(self) -> Exits:
        """What was reported and not waited for, without waiting."""
        got: Exits = {}
        while not self._queue.empty():
            got.update(self.wait())
        return got


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.ray)])
def make_host(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeHost:
    """A function (on_exit) -> Host of either kind."""
    if request.param == "ray":
        embedded: Any = request.getfixturevalue("embedded_ray")
        ray_host = pytest.importorskip("everstep.actors.ray_host")

        def make_ray(on_exit: Watch) -> Host:
            run = f"contract-{time.monotonic_ns()}"
            host: Host = ray_host.RayHost(on_exit, run=run, log_dir=tmp_path / "logs", entries=ENTRIES)
            return host

        assert embedded is not None
        return make_ray
    monkeypatch.syspath_prepend(HERE)
    return lambda on_exit: ProcessHost(on_exit, log_dir=tmp_path / "logs", entries=ENTRIES, preload=["host_entries"])


@pytest.fixture(scope="module")
def embedded_ray() -> Iterator[object]:
    """One embedded Ray for this module."""
    ray_cluster = pytest.importorskip("everstep.actors.ray_cluster")
    with ray_cluster.EmbeddedRay.start(cpus=16, path=[HERE, SOURCE]) as ray:
        yield ray


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def host(make_host: MakeHost, watch: Watch) -> Iterator[Host]:
    host = make_host(watch)
    yield host
    host.close()


def test_an_entry_that_returns_exits_with_0(host: Host, watch: Watch) -> None:
    host.start("rank", "rank-0.1", 0, b"return")
    assert watch.wait() == {"rank-0.1": "exit 0"}


def test_an_exception_and_sys_exit_are_told_apart(host: Host, watch: Watch) -> None:
    host.start("rank", "rank-0.1", 0, b"raise")
    host.start("rank", "rank-0.2", 0, b"exit 7")
    assert watch.wait(2) == {"rank-0.1": "exit 1", "rank-0.2": "exit 7"}


def test_output_and_traceback_are_in_the_log(host: Host, watch: Watch, tmp_path: Path) -> None:
    host.start("rank", "rank-0.1", 0, b"raise")
    watch.wait()
    log = (tmp_path / "logs" / "rank-0.1.log").read_text()
    assert "said to stdout" in log
    assert "said to stderr" in log
    assert "ValueError: raised on purpose" in log


def test_a_death_that_nobody_ordered_is_reported(host: Host, watch: Watch) -> None:
    host.start("rank", "rank-0.1", 0, b"die")
    cause = watch.wait()["rank-0.1"]
    assert cause.startswith(("signal 9", "died: "))


def test_a_large_config_arrives_whole(host: Host, watch: Watch) -> None:
    host.start("length", "big", 0, bytes(3_000_005))
    assert watch.wait() == {"big": f"exit {3_000_005 & 0x7F}"}


def test_kill_ends_a_process(host: Host, watch: Watch, tmp_path: Path) -> None:
    pid = started(host, "manager-0", tmp_path)
    host.kill("manager-0")
    assert watch.wait() == {"manager-0": "signal 9"}
    assert gone(pid)
    assert host.pid("manager-0") is None
    host.kill("manager-0")
    host.kill("never-started")


def test_kill_ends_a_frozen_process_at_once(host: Host, watch: Watch, tmp_path: Path) -> None:
    pid = started(host, "manager-0", tmp_path)
    os.kill(pid, signal.SIGSTOP)
    before = time.monotonic()
    host.kill("manager-0")
    assert watch.wait() == {"manager-0": "signal 9"}
    assert gone(pid)
    assert time.monotonic() - before < 2.0  # ray.kill alone takes 5 s


def test_kill_right_after_start(host: Host, watch: Watch) -> None:
    host.start("manager", "manager-0", 0, b"")
    host.kill("manager-0")
    assert watch.wait() == {"manager-0": "signal 9"}


@pytest.mark.ray
def test_another_host_adopts_what_is_left_and_hears_of_its_end(embedded_ray: object, watch: Watch, tmp_path: Path):
    """As a supervisor's successor does, in another process."""
    ray_host = pytest.importorskip("everstep.actors.ray_host")
    run = f"contract-{time.monotonic_ns()}"
    former = ray_host.RayHost(Watch(), run=run, log_dir=tmp_path / "logs", entries=ENTRIES)
    later = ray_host.RayHost(watch, run=run, log_dir=tmp_path / "logs", entries=ENTRIES)
    try:
        pids = [started(former, f"manager-{i}", tmp_path) for i in range(2)]
        for i in range(2):
            later.adopt("manager", f"manager-{i}", i, former.located(f"manager-{i}"))
        later.adopt("manager", "manager-7", 7, b"")
        assert list(watch.wait()) == ["manager-7"], "there is none"
        assert later.pid("manager-0") == pids[0]
        os.kill(pids[0], signal.SIGKILL)
        assert list(watch.wait()) == ["manager-0"]
        later.kill("manager-1")
        assert watch.wait() == {"manager-1": "signal 9"}
    finally:
        later.close()
        former.close()


def test_names_are_used_once_and_roles_are_known(host: Host, watch: Watch) -> None:
    host.start("rank", "rank-0.1", 0, b"return")
    watch.wait()
    with pytest.raises(ValueError, match="used once"):
        host.start("rank", "rank-0.1", 0, b"return")
    with pytest.raises(ValueError, match="no entry point"):
        host.start("cook", "cook-0", 0, b"")


def test_many_at_once_are_each_reported_once(host: Host, watch: Watch) -> None:
    names = [f"rank-{i}.1" for i in range(6)]
    for i, name in enumerate(names):
        host.start("rank", name, i, f"exit {i}".encode())
    assert watch.wait(6) == {name: f"exit {i}" for i, name in enumerate(names)}
    host.close()
    assert watch.drain() == {}


def test_on_exit_may_start_the_next(make_host: MakeHost, watch: Watch) -> None:
    def replace(name: str, cause: str) -> None:
        if name == "rank-0.1":
            host.start("rank", "rank-0.2", 0, b"exit 3")
        watch(name, cause)

    host = make_host(replace)
    host.start("rank", "rank-0.1", 0, b"return")
    assert watch.wait(2) == {"rank-0.1": "exit 0", "rank-0.2": "exit 3"}
    host.close()


def test_close_ends_everything_and_leaves_nothing(make_host: MakeHost, watch: Watch, tmp_path: Path) -> None:
    make_host(Watch()).close()  # what a process needs once (imports, Ray's own threads) is not a leak
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    host = make_host(watch)
    pids = [started(host, f"manager-{i}", tmp_path) for i in range(2)]
    os.kill(pids[0], signal.SIGSTOP)
    host.start("manager", "manager-2", 2, b"")  # perhaps not even forked when the host closes
    host.close()
    assert watch.drain() == {f"manager-{i}": "signal 9" for i in range(3)}
    assert all(gone(pid) for pid in pids)
    host.close()
    with pytest.raises(HostClosed):
        host.start("rank", "rank-0.1", 0, b"return")
    assert set(threading.enumerate()) <= threads
    assert open_descriptors() <= descriptors


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    """Starts a driver (host_driver.py) with two children that sleep: (kind, grace_s) -> driver, pids."""
    drivers = []

    def start(kind: str, grace_s: float) -> tuple[subprocess.Popen[bytes], list[int]]:
        # The shell gives the driver its own pid as run id and mark.
        line = 'export EVERSTEP_TEST=everstep-test-$$; exec "$@" test-$$ ' + str(grace_s)
        command = [
            "sh",
            "-c",
            line,
            "sh",
            sys.executable,
            str(Path(HERE) / "host_driver.py"),
            kind,
            str(tmp_path),
        ]
        driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": f"{SOURCE}:{HERE}"})
        drivers.append(driver)
        pids = [int(wait_for(tmp_path / f"pid-{i}")) for i in range(2)]
        assert {driver.pid, *pids} < set(marked(driver.pid))
        assert Path((tmp_path / "folder").read_text()).exists()
        return driver, pids

    yield start
    for driver in drivers:
        driver.kill()
        driver.wait()
    wait_until(lambda: not any(marked(driver.pid) for driver in drivers), 10.0)


def test_sigkill_of_the_driver_leaves_nothing(drive: Drive, tmp_path: Path) -> None:
    driver, pids = drive("processes", grace_s=4.0)
    os.kill(pids[0], signal.SIGSTOP)
    driver.kill()
    wait_until(lambda: all(map(gone, pids)), 3.5)  # by the zygote, before the reaper acts
    wait_until(lambda: not marked(driver.pid), 8.0)  # nor is there a zygote or a reaper
    assert not Path((tmp_path / "folder").read_text()).exists()


def test_children_die_with_their_zygote_while_the_driver_is_frozen(drive: Drive) -> None:
    driver, pids = drive("processes", grace_s=1.0)
    zygote = parent(pids[0])
    os.kill(pids[0], signal.SIGSTOP)
    driver.send_signal(signal.SIGSTOP)
    os.kill(zygote, signal.SIGKILL)
    wait_until(lambda: all(map(gone, pids)), 5.0)


@pytest.mark.ray
def test_sigkill_of_the_driver_of_an_embedded_ray_leaves_nothing(drive: Drive, tmp_path: Path) -> None:
    driver, pids = drive("ray", grace_s=1.0)
    pids += map(int, (tmp_path / "ray_processes").read_text().split())
    assert len(pids) >= 2 + 5
    os.kill(pids[0], signal.SIGSTOP)
    driver.kill()
    wait_until(lambda: all(map(gone, pids)) and not marked(driver.pid), 10.0)
    assert not Path((tmp_path / "folder").read_text()).exists()
    assert not Path((tmp_path / "ray_folder").read_text()).exists()


# What is particular to the process host.


@pytest.fixture
def process_host(watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessHost]:
    monkeypatch.syspath_prepend(HERE)
    host = ProcessHost(watch, log_dir=tmp_path / "logs", entries=ENTRIES, preload=["host_entries"])
    yield host
    host.close()


def test_children_die_with_their_zygote_and_another_takes_over(
    process_host: ProcessHost, watch: Watch, tmp_path: Path
) -> None:
    pids = [started(process_host, f"manager-{i}", tmp_path) for i in range(2)]
    os.kill(pids[0], signal.SIGSTOP)
    os.kill(process_host.zygote_pid, signal.SIGKILL)
    causes = watch.wait(2)
    assert set(causes.values()) == {"died: its zygote ended (signal 9)"}
    assert all(gone(pid) for pid in pids)
    process_host.start("rank", "rank-0.2", 0, b"return")
    assert watch.wait() == {"rank-0.2": "exit 0"}


def test_close_ends_children_of_a_frozen_zygote(
    process_host: ProcessHost, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everstep.actors.process_host.ORDERLY_S", 0.2)
    pid = started(process_host, "manager-0", tmp_path)
    os.kill(process_host.zygote_pid, signal.SIGSTOP)
    process_host.close()
    assert gone(pid)
    assert watch.drain() == {"manager-0": "signal 9"}


def test_a_terminals_interrupt_reaches_no_child(process_host: ProcessHost, watch: Watch, tmp_path: Path) -> None:
    file = tmp_path / "facts"
    process_host.start("rank", "rank-0.1", 0, f"write {file}".encode())
    watch.wait()
    pid, group, session, stdin = file.read_text().split()
    assert group == pid
    assert session == str(process_host.zygote_pid) != str(os.getsid(0))
    assert stdin == "/dev/null"


def test_what_a_child_spawned_dies_with_it(process_host: ProcessHost, watch: Watch, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    process_host.start("rank", "rank-0.1", 0, f"spawn {file}".encode())
    spawned = int(wait_for(file))
    process_host.kill("rank-0.1")
    watch.wait()
    wait_until(lambda: gone(spawned))


def test_a_config_is_in_no_command_line_or_environment(process_host: ProcessHost, tmp_path: Path) -> None:
    secret = str(tmp_path / "secret-token")
    process_host.start("manager", "manager-0", 0, secret.encode())
    pid = int(wait_for(Path(secret)))
    for process in (pid, process_host.zygote_pid):
        for file in ("cmdline", "environ"):
            assert b"secret-token" not in Path(f"/proc/{process}/{file}").read_bytes()


# Helpers


def started(host: Host, name: str, tmp_path: Path) -> int:
    """Starts a process that sleeps; its pid, as it says itself and as the host knows it."""
    file = tmp_path / f"{name}.pid"
    host.start("manager", name, 0, str(file).encode())
    pid = int(wait_for(file))
    wait_until(lambda: host.pid(name) == pid)
    return pid


def wait_for(file: Path) -> str:
    wait_until(lambda: file.exists() and file.read_text() != "")
    return file.read_text()


def wait_until(condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """No such process, or a zombie that is not ours to reap."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat[stat.rindex(")") + 2] == "Z" and int(stat[stat.rindex(")") + 2 :].split()[1]) != os.getpid()


def open_descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            pass  # the listing's own
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def marked(driver: int) -> list[int]:
    """Living processes of a driver, reaper included: by the mark in their environment or command line."""
    mark = f"everstep-test-{driver}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return [pid for pid in found if not gone(pid)]

"""What the Ray side promises beyond the contract of hosts: own cluster, its end, supervisors, placement."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from everstep.actors.ray_cluster import EmbeddedRay, connect  # noqa: E402
from everstep.actors.ray_host import RankResources, RayHost  # noqa: E402
from everstep.actors.ray_supervisor import (  # noqa: E402
    RunExists,
    SupervisorFailed,
    collect,
    find_supervisor,
    start_supervisor,
)
from everstep.actors.run_folder import start_time  # noqa: E402

HERE = str(Path(__file__).parent)
SOURCE = str(Path(__file__).parents[2] / "src")

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def embedded() -> Iterator[EmbeddedRay]:
    before = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "PYTHONPATH")}
    os.environ["RAY_ADDRESS"] = "127.0.0.1:1"  # must not matter
    try:
        with EmbeddedRay.start(cpus=8, path=[HERE, SOURCE]) as embedded:
            yield embedded
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def run() -> str:
    return f"cluster-{time.monotonic_ns()}"


def test_it_listens_on_the_loopback_interface_only(embedded: EmbeddedRay) -> None:
    assert embedded.address.startswith("127.0.0.1:")
    inodes = set()
    for pid, _ in embedded.processes():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(fd))
            except OSError:
                continue
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.append(fields[1].partition(":")[0])
    assert listening
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_its_token_is_private_and_its_own(embedded: EmbeddedRay) -> None:
    token = embedded.folder / "token"
    assert token.stat().st_mode & 0o077 == 0
    assert embedded.folder.stat().st_mode & 0o077 == 0
    probe = "import ray,sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    stranger = subprocess.Popen(
        [sys.executable, "-c", probe, embedded.address],
        env={"PATH": os.environ["PATH"], **wrong},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert stranger.stderr is not None
    try:
        deadline = time.monotonic() + 30
        said = b""
        while b"InvalidAuthToken" not in said and time.monotonic() < deadline:
            line = stranger.stderr.readline()
            assert line, f"the stranger ended with {stranger.wait()}: {said.decode()}"
            said += line
        assert b"InvalidAuthToken" in said
    finally:
        stranger.kill()
        stranger.communicate()


def test_a_second_connection_is_refused(embedded: EmbeddedRay) -> None:
    with pytest.raises(RuntimeError, match="already connected"):
        EmbeddedRay.start(cpus=1)


def test_another_process_connects_with_the_token(embedded: EmbeddedRay) -> None:
    script = """
import sys, ray
from everstep.actors.ray_cluster import connect
connection = connect(sys.argv[1])
print(len(ray.nodes()), ray.get_runtime_context().namespace)
connection.close()
connection.close()
"""
    environment = {**os.environ, "PYTHONPATH": SOURCE, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    del environment["RAY_AUTH_MODE"]  # `connect` sets it where it sees a token
    command = [sys.executable, "-c", script, embedded.address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1 everstep\n", "")


def test_a_thin_client_is_refused() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        connect("ray://127.0.0.1:10001")


def test_a_supervisor_answers_and_outlives_nobody_but_itself(embedded: EmbeddedRay, tmp_path: Path, run: str) -> None:
    file = tmp_path / "manager.pid"
    config = f"{run} {tmp_path} {file}".encode()
    supervisor = start_supervisor(run, config, log_dir=tmp_path, entry="host_entries:supervise")
    assert supervisor.address == "127.0.0.1:1"
    with pytest.raises(RunExists, match=run):
        start_supervisor(run, config, log_dir=tmp_path, entry="host_entries:supervise")
    found = find_supervisor(run)
    assert found is not None
    assert (found.address, found.pid) == (supervisor.address, supervisor.pid)
    manager = wait_for_pid(file)
    os.kill(supervisor.pid, signal.SIGKILL)
    wait_until_gone(supervisor.pid)
    assert not supervisor.alive()
    assert find_supervisor(run) is None
    assert start_time(manager) is not None  # detached: its parent's death kills nothing
    assert collect(run) == ["manager-0"]
    wait_until_gone(manager)


def test_a_supervisor_ends_on_request(embedded: EmbeddedRay, tmp_path: Path, run: str) -> None:
    config = f"{run} {tmp_path} {tmp_path / 'pid'}".encode()
    supervisor = start_supervisor(run, config, log_dir=tmp_path, entry="host_entries:supervise")
    supervisor.end()
    assert start_time(supervisor.pid) is None
    supervisor.end()
    collect(run)


def test_a_supervisor_that_fails_says_why_and_leaves_nothing(embedded: EmbeddedRay, tmp_path: Path, run: str) -> None:
    with pytest.raises(SupervisorFailed, match="no such corpus"):
        start_supervisor(run, b"", log_dir=tmp_path, entry="host_entries:refuse")
    assert collect(run) == []


def test_a_slots_processes_share_a_placement_group(embedded: EmbeddedRay, tmp_path: Path, run: str) -> None:
    reports: list[tuple[str, str]] = []
    host = RayHost(
        lambda name, cause: reports.append((name, cause)),
        run=run,
        log_dir=tmp_path,
        entries={"manager": "host_entries:sleep", "rank": "host_entries:sleep"},
        resources=RankResources(cpus=2),
        colocate=True,
    )
    try:
        host.start("manager", "manager-0", 0, str(tmp_path / "manager").encode())
        host.start("rank", "rank-0.1", 0, str(tmp_path / "rank").encode())
        wait_for_pid(tmp_path / "manager")
        wait_for_pid(tmp_path / "rank")
        assert host.node("manager-0") == host.node("rank-0.1") is not None
        group = ray.util.get_placement_group(f"everstep/{run}/slot-0")
        assert group.bundle_specs == [{"CPU": 2.0}]
        host.kill("rank-0.1")  # the replacement gets the slot's bundle
        host.start("rank", "rank-0.2", 0, str(tmp_path / "replacement").encode())
        wait_for_pid(tmp_path / "replacement")
    finally:
        host.close()
    assert dict(reports) == dict.fromkeys(["manager-0", "rank-0.1", "rank-0.2"], "signal 9")
    with pytest.raises(ValueError, match="everstep"):
        ray.util.get_placement_group(f"everstep/{run}/slot-0")


def test_a_name_taken_by_another_execution_is_reported(embedded: EmbeddedRay, tmp_path: Path, run: str) -> None:
    reports: list[tuple[str, str]] = []
    entries = {"manager": "host_entries:sleep"}
    first = RayHost(lambda *report: None, run=run, log_dir=tmp_path, entries=entries)
    second = RayHost(lambda *report: reports.append(report), run=run, log_dir=tmp_path, entries=entries)
    first.start("manager", "manager-0", 0, str(tmp_path / "pid").encode())
    wait_for_pid(tmp_path / "pid")
    second.start("manager", "manager-0", 0, b"")
    wait_until(lambda: bool(reports))
    second.close()
    first.close()
    assert [name for name, _ in reports] == ["manager-0"]
    assert reports[0][1].startswith("died: ")
    assert "taken" in reports[0][1]


def test_close_ends_every_process_and_removes_the_folder(tmp_path: Path) -> None:
    """In a process of its own, for a process has one Ray. The frozen actor is what `ray.shutdown` leaves."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os, signal, time
from pathlib import Path
from everstep.actors.ray_cluster import EmbeddedRay
from everstep.actors.ray_host import RayHost
from everstep.actors.run_folder import start_time
before = dict(os.environ)
ray = EmbeddedRay.start(cpus=2, path=[{HERE!r}])
entries = {{"manager": "host_entries:sleep"}}
host = RayHost(print, run="close", log_dir=Path({str(tmp_path)!r}), entries=entries)
host.start("manager", "manager-0", 0, b"")
while not (pid := host.pid("manager-0")):
    time.sleep(0.01)
os.kill(pid, signal.SIGSTOP)
processes = ray.processes()
assert pid in dict(processes) and len(processes) >= 5, processes
ray.close()
ray.close()
assert not [pid for pid, started in processes if start_time(pid) == started]
assert not ray.folder.exists()
host.close()
assert dict(os.environ) == before
print("all gone")
"""
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("all gone\n"), done.stdout + done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


def wait_for_pid(file: Path) -> int:
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} was not written"
        time.sleep(0.01)
    return int(file.read_text())


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: start_time(pid) is None)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

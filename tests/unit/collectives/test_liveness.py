"""The judge, on real processes: the kernel's word counts, silence does not."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from everstep.collectives.liveness import Judge

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
WAIT_S = 10.0
SLEEPING = "import time; print(flush=True); time.sleep(600)"
# One call that never gives the interpreter lock back: no other thread of it runs.
BUSY = "print(flush=True); sum(range(10**13))"

Spawn = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    started: list[subprocess.Popen[bytes]] = []

    def spawn(script: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        return process

    yield spawn
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


class Watch:
    """A judge and its verdicts."""

    def __init__(self) -> None:
        self.verdicts: queue.Queue[tuple[str, str, float]] = queue.Queue()
        self.judge = Judge(lambda *verdict: self.verdicts.put(verdict))

    def next(self) -> tuple[str, str, float]:
        return self.verdicts.get(timeout=WAIT_S)

    def silent_for(self, seconds: float) -> bool:
        try:
            return not self.verdicts.get(timeout=seconds)
        except queue.Empty:
            return True


@pytest.fixture
def watch() -> Iterator[Watch]:
    before = len(os.listdir("/proc/self/fd"))
    watch = Watch()
    yield watch
    watch.judge.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "descriptors are left"  # a test's own pipes


def test_a_killed_process_is_dead_at_once_though_nobody_has_reaped_it(watch: Watch, spawn: Spawn) -> None:
    process = spawn(SLEEPING)
    assert watch.judge.watch("a", process.pid)
    assert watch.judge.alive("a")
    began = time.monotonic()
    process.kill()
    name, cause, detected_ms = watch.next()
    assert (name, cause) == ("a", "exited")
    assert time.monotonic() - began < 0.5
    assert 0 <= detected_ms < 500
    assert process.returncode is None, "it is a zombie still"
    assert not watch.judge.alive("a")
    assert watch.silent_for(0.15), "said once"


def test_a_stopped_process_is_frozen_and_stays_dead_when_it_goes_on(watch: Watch, spawn: Spawn) -> None:
    process = spawn(SLEEPING)
    watch.judge.watch("a", process.pid)
    time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(signal.SIGSTOP)
    name, cause, detected_ms = watch.next()
    assert (name, cause) == ("a", "frozen (stopped by a signal)")
    assert time.monotonic() - began < 0.5
    assert detected_ms < 500
    process.send_signal(signal.SIGCONT)
    assert watch.silent_for(0.15)
    assert not watch.judge.alive("a")


def test_a_process_that_holds_the_interpreter_lock_is_alive(watch: Watch, spawn: Spawn) -> None:
    watch.judge.watch("busy", spawn(BUSY).pid)
    watch.judge.watch("idle", spawn(SLEEPING).pid)
    assert watch.silent_for(0.5)
    assert watch.judge.alive("busy")
    assert watch.judge.alive("idle")


def test_who_is_gone_before_it_is_watched_is_not_watched(watch: Watch, spawn: Spawn) -> None:
    process = spawn(SLEEPING)
    process.kill()
    process.wait()
    assert not watch.judge.watch("a", process.pid)
    assert not watch.judge.alive("a")
    assert not watch.judge.alive("never heard of")
    assert watch.silent_for(0.1)


def test_of_many_processes_each_gets_its_own_verdict(watch: Watch, spawn: Spawn) -> None:
    processes = {f"p{i}": spawn(SLEEPING) for i in range(6)}
    for name, process in processes.items():
        assert watch.judge.watch(name, process.pid)
    for name in ("p1", "p4"):
        processes[name].kill()
    processes["p2"].send_signal(signal.SIGSTOP)
    verdicts = {name: cause for name, cause, _ in (watch.next() for _ in range(3))}
    assert verdicts == {"p1": "exited", "p4": "exited", "p2": "frozen (stopped by a signal)"}
    assert [name for name in processes if watch.judge.alive(name)] == ["p0", "p3", "p5"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_fence_returns_when_the_process_is_gone(watch: Watch, spawn: Spawn, stopped: bool) -> None:
    process = spawn(SLEEPING)
    watch.judge.watch("a", process.pid)
    if stopped:
        process.send_signal(signal.SIGSTOP)
        watch.next()
    assert watch.judge.fence("a")
    assert process.wait(0.5) == -signal.SIGKILL
    assert watch.judge.fence("a"), "and again, when there is nobody any more"
    assert watch.judge.fence("never heard of")
    assert not watch.judge.alive("a")


def test_a_zombie_needs_no_fence(watch: Watch, spawn: Spawn) -> None:
    process = spawn(SLEEPING)
    watch.judge.watch("a", process.pid)
    process.kill()
    watch.next()
    assert watch.judge.fence("a", timeout_s=1.0)


def test_a_scripted_wake_lets_it_run_on_before_it_is_killed(watch: Watch, spawn: Spawn) -> None:
    process = spawn("import time\nprint(flush=True)\nwhile True: time.sleep(0.01); print(1, flush=True)")
    watch.judge.watch("a", process.pid)
    process.send_signal(signal.SIGSTOP)
    watch.next()
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    process.stdout.read()
    began = time.monotonic()
    assert watch.judge.fence("a", wake_s=0.3)
    assert 0.3 <= time.monotonic() - began < 2
    assert process.wait(1) == -signal.SIGKILL
    said = process.stdout.read()
    assert said, "it was awake"


def test_a_fence_that_is_told_to_hurry_says_that_it_did_not_see_the_end(
    watch: Watch, spawn: Spawn, monkeypatch
) -> None:
    process = spawn(SLEEPING)
    watch.judge.watch("a", process.pid)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *args: None)  # a process that SIGKILL does not end yet
    assert not watch.judge.fence("a", timeout_s=0.1)
    monkeypatch.undo()
    assert watch.judge.fence("a")


def test_fences_of_one_process_by_several_threads_all_return_when_it_is_gone(watch: Watch, spawn: Spawn) -> None:
    """A prepare and a trainer's inventory ask for it at once. The loser must not use what the winner closed: the
    number may already stand for a successor's descriptor."""
    for _ in range(5):
        process, bystander = spawn(SLEEPING), spawn(SLEEPING)
        watch.judge.watch("a", process.pid)
        results: list[object] = []

        def fence(wake_s: float, process: subprocess.Popen[bytes] = process, results: list = results) -> None:
            try:
                results.append((watch.judge.fence("a", wake_s=wake_s), state_of(process.pid)))
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=fence, args=(wake_s,)) for wake_s in (0.05, -1.0, 0.0, 0.02)]
        for thread in threads:
            thread.start()
        watch.judge.watch("b", bystander.pid)
        for thread in threads:
            thread.join(WAIT_S)
        assert results == [(True, "Z")] * 4
        assert bystander.poll() is None
        watch.judge.fence("b")


def test_close_while_a_wake_is_waited_for_ends_soon(watch: Watch, spawn: Spawn) -> None:
    process = spawn(SLEEPING)
    watch.judge.watch("a", process.pid)
    fencing = threading.Thread(target=watch.judge.fence, args=("a",), kwargs={"wake_s": 60.0})
    fencing.start()
    time.sleep(0.05)
    began = time.monotonic()
    watch.judge.close()
    fencing.join(WAIT_S)
    assert time.monotonic() - began < 2
    assert process.wait(1) == -signal.SIGKILL

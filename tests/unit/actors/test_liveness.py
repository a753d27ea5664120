"""The judge of local processes, with real ones: gone, stopped, busy, fenced."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from everstep.actors.liveness import Judge

LIMIT_S = 10.0
News = queue.SimpleQueue[tuple[str, str]]


@pytest.fixture
def news() -> News:
    return queue.SimpleQueue()


@pytest.fixture
def judge(news: News) -> Iterator[Judge]:
    before = len(os.listdir("/proc/self/fd"))
    judge = Judge(lambda name, cause, detected_ms: news.put((name, cause)))
    yield judge
    judge.close()
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


def test_a_process_that_ends_is_dead_and_told_once(
    judge: Judge, news: News, process: subprocess.Popen[bytes]
) -> None:
    assert judge.watch("a", process.pid)
    process.kill()
    assert news.get(timeout=LIMIT_S) == ("a", "exited")
    assert not judge.alive("a")
    with pytest.raises(queue.Empty):
        news.get(timeout=0.2)


def test_a_stopped_process_is_dead_and_a_busy_one_is_not(
    judge: Judge, news: News, process: subprocess.Popen[bytes]
) -> None:
    assert judge.watch("a", process.pid)
    with pytest.raises(queue.Empty):
        news.get(timeout=0.3)
    process.send_signal(signal.SIGSTOP)
    assert news.get(timeout=LIMIT_S)[1].startswith("frozen")


def test_a_fence_kills_what_is_frozen_and_lets_go_of_it(judge: Judge, process: subprocess.Popen[bytes]) -> None:
    judge.watch("a", process.pid)
    process.send_signal(signal.SIGSTOP)
    assert judge.fence("a")
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    assert not judge.alive("a")
    assert judge.fence("a"), "a second fence finds nothing to do"


def test_a_process_that_is_gone_is_not_watched(judge: Judge) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not judge.watch("a", process.pid)

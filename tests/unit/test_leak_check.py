"""The leak check finds what it is there for (its patience shortened, or each finding would cost 20 s)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAKS = {
    "an orphan": (
        # The child's child outlives it and belongs to init then: only its mark says whose it is.
        "subprocess.run(['sh', '-c', 'sleep 60 & echo $!'], stdout=open('orphan', 'w'), check=True)",
        "sleep 60",
    ),
    "a child": ("keep.append(subprocess.Popen(['sleep', '61']))", "sleep 61"),
    "a thread": ("threading.Thread(target=done.wait, name='forgotten').start()", "thread forgotten"),
    "a port": ("keep.append(socket.create_server(('127.0.0.1', 0)))", "listening on port"),
    "a segment": ("SEGMENT.mkdir()", "everstep-leak-check"),
}

TEST = """
import os, pathlib, signal, socket, subprocess, threading
import pytest
SEGMENT = pathlib.Path("/dev/shm/everstep-leak-check-PID")
keep, done = [], threading.Event()

@pytest.fixture(scope="module", autouse=True)
def cleaned():
    yield
    done.set()
    for thing in keep:
        getattr(thing, "kill", thing.close if hasattr(thing, "close") else None)()
        if hasattr(thing, "wait"):
            thing.wait()
    if SEGMENT.exists():
        SEGMENT.rmdir()
    orphan = pathlib.Path("orphan")
    if orphan.exists():
        os.kill(int(orphan.read_text()), signal.SIGKILL)

def test_it(leaves_nothing_behind):
    LEAK

def test_what_was_there_before_is_no_leak(leaves_nothing_behind):
    pass
"""


def _run(pytester: pytest.Pytester, leak: str) -> pytest.RunResult:
    conftest = (Path(__file__).parents[1] / "conftest.py").read_text()
    pytester.makeconftest(conftest.replace("_PATIENCE_S = 20.0", "_PATIENCE_S = 0.3"))
    pytester.makepyfile(TEST.replace("LEAK", leak).replace("PID", str(id(pytester))))
    return pytester.runpytest_subprocess("-p", "no:cacheprovider")


@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_fails_the_test_and_is_named(pytester: pytest.Pytester, kind: str):
    leak, named = LEAKS[kind]
    result = _run(pytester, leak)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*left behind*", f"*{named}*"])


def test_a_clean_test_passes(pytester: pytest.Pytester):
    _run(pytester, "subprocess.run(['true'], check=True)").assert_outcomes(passed=2)

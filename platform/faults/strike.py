"""Scripted faults, struck by a rank on itself: real signals, a really held interpreter lock."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from itertools import repeat
from typing import Protocol


class Fault(Protocol):
    @property
    def do(self) -> str: ...
    @property
    def seconds(self) -> float: ...


def strike(fault: Fault) -> None:
    """kill: SIGKILL; freeze: SIGSTOP (a live judge kills it later); busy: holds the interpreter lock."""
    if fault.do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # the signal is on its way
    elif fault.do == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.do == "busy":
        hold_interpreter_lock(fault.seconds)


def hold_interpreter_lock(seconds: float) -> None:
    """One C loop that never lets another thread run, for `seconds` of CPU time: longer where the CPU is shared."""
    trial = 2_000_000
    began = time.thread_time()
    deque(repeat(None, trial), maxlen=0)
    rate = trial / max(time.thread_time() - began, 1e-6)
    deque(repeat(None, int(rate * seconds)), maxlen=0)

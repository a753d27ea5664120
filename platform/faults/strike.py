"""Scripted faults, struck by a rank on itself: real signals, a really held interpreter lock."""

from __future__ import annotations

import math
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


_TRIAL, _TRIALS = 4_000_000, 10  # a fifth of a second in all


def hold_interpreter_lock(seconds: float) -> None:
    """One C loop that never lets another thread run, for `seconds` at full speed: longer on a CPU that is shared.

    The fastest of some trials counts: one that a neighbour slowed down would make the loop too short.
    """
    fastest = math.inf
    for _ in range(_TRIALS):
        began = time.thread_time()
        deque(repeat(None, _TRIAL), maxlen=0)
        fastest = min(fastest, time.thread_time() - began)
    deque(repeat(None, int(_TRIAL * seconds / max(fastest, 1e-6))), maxlen=0)

"""A signal to a rank and the wait for the next step, for the peers of recovery.py. Times are wall seconds.

What a peer's ranks write into their folder, one file a rank: progress-RANK.jsonl with {step, life, ranks, at_s} a
step. `life` grows whenever the peer has formed its ranks anew, so that a step of a later life is one after recovery.
"""

import itertools
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from parts.live_run import BenchmarkFailed

SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
_SETTLE_STEPS = 5
_LOOK_S = 0.01


@dataclass(frozen=True)
class Strike:
    """One signal and what followed, in seconds since the signal; None: it was not seen within the limit."""

    rank: int
    detected_s: float | None
    resumed_s: float | None
    steps_lost: int | None


@dataclass
class Side:
    """What was measured of one system. `missing`: why there is nothing, or less than asked for."""

    name: str
    what: str
    ordinary_step_s: float = 0.0
    cases: dict[str, list[Strike]] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Step:
    at_s: float
    step: int
    life: int
    ranks: int


class Peer(Protocol):
    """A system under measurement."""

    @property
    def folder(self) -> Path: ...
    def pids(self) -> list[int]:
        """Of the present ranks, in rank order."""

    def mend(self) -> None:
        """Brings back what the system itself leaves to others to restart; kills the frozen."""

    def dead(self) -> str:
        """Why it can never go on; "" while it can."""


def steps_of(folder: Path) -> list[Step]:
    """All ranks' steps, by time; a line that is being written is left for later."""
    found = []
    for file in folder.glob("progress-*.jsonl"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                found.append(Step(**json.loads(line)))
    return sorted(found, key=lambda step: step.at_s)


def measure_peer(
    side: Side,
    peer: Peer,
    ranks: int,
    counts: dict[str, int],
    seed: int,
    start_s: float,
    wait_s: float,
    limit_s: float,
) -> None:
    """Strikes as often as asked, until `limit_s` is over; `wait_s`: how long a recovery is waited for."""
    chance, deadline = random.Random(seed), time.monotonic() + limit_s
    ordinary: list[float] = []
    # Kills first: a system that never notices a freeze has nothing to show after it.
    for case in (case for case, count in counts.items() for _ in range(count)):
        side.cases.setdefault(case, [])
        if time.monotonic() > deadline:
            side.missing = side.missing or "--limit-s was reached: fewer repetitions than asked for"
            return
        if side.cases[case] and side.cases[case][-1].resumed_s is None:
            continue  # it will not do better the next time, and waiting is long
        ordinary += _settle(peer, ranks, start_s)
        side.ordinary_step_s = statistics.median(ordinary)
        side.cases[case].append(_strike(peer, SIGNALS[case], chance, side.ordinary_step_s, wait_s))
        peer.mend()


def _settle(peer: Peer, ranks: int, limit_s: float) -> list[float]:
    """Waits for some steps by all ranks; returns their times."""
    since = time.time()

    def settled() -> list[Step]:
        steps = [step for step in steps_of(peer.folder) if step.at_s > since]
        lives = [step for step in steps if step.life == steps[-1].life and step.ranks == ranks]
        unique = [next(group) for _, group in itertools.groupby(lives, key=lambda step: step.step)]
        return unique if len(unique) > _SETTLE_STEPS and len(peer.pids()) == ranks else []

    steps = _until(settled, peer, limit_s)
    if not steps:
        raise BenchmarkFailed(f"no ordinary steps of {ranks} ranks within {limit_s:g} s")
    return [b.at_s - a.at_s for a, b in itertools.pairwise(steps)]


def _strike(peer: Peer, number: signal.Signals, chance: random.Random, step_s: float, limit_s: float) -> Strike:
    pids = peer.pids()
    rank = chance.randrange(len(pids))
    time.sleep(chance.uniform(0, step_s))
    life = steps_of(peer.folder)[-1].life
    struck_s = time.time()
    os.kill(pids[rank], number)

    def after() -> list[Step]:
        return [step for step in steps_of(peer.folder) if step.life > life and step.at_s > struck_s]

    found = _until(after, peer, limit_s)
    if not found:
        with suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGKILL)
        return Strike(rank, None, None, None)
    before = [step.step for step in steps_of(peer.folder) if step.life == life and step.at_s < found[0].at_s]
    return Strike(rank, None, found[0].at_s - struck_s, max(0, max(before) - (found[0].step - 1)))


def _until(look: Callable[[], list[Step]], peer: Peer, limit_s: float) -> list[Step]:
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        if why := peer.dead():
            raise BenchmarkFailed(why)
        if time.monotonic() > deadline:
            return []
        time.sleep(_LOOK_S)
    return found

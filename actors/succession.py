"""A supervisor's side of its succession: a standby that knows what it knows, and the proof that it still leads.

The standby is another process, on another node where there is one. It opens a control stream to the supervisor, gets
the books whole and then every change; when that stream breaks, or is silent for `timeouts.frozen_s`, it takes the
next epoch by compare-and-swap and goes on (everstep.actors.standby). Belongs to the supervisor's loop.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everstep.actors.claims import Claims
from everstep.collectives import messages as m
from everstep.collectives.control import Peer
from everstep.platform.cluster import chronicle as ch

log = logging.getLogger(__name__)

_COMES_WITHIN_S = 60.0  # a process is started, and may have to wait for a runtime_env
_AGAIN_S = 2.0  # after a standby was lost


@dataclass(frozen=True)
class Plan:
    """How a run is succeeded. `start(number, address)` starts a standby of the supervisor at `address`; it may block,
    and is called from a thread of its own."""

    claims: Claims
    start: Callable[[int, str], None]


class Succession:
    def __init__(self, plan: Plan | None, epoch: int, address: str, frozen_s: float, started: int = 0) -> None:
        """`plan` None: nobody follows, the run ends with its supervisor. `started`: standbys before."""
        self._plan = plan
        self._epoch = epoch
        self._address = address
        self._beat_s = frozen_s / 4
        self._peer: Peer | None = None
        self._next_start_s: float | None = None  # None: not wanted yet
        self._last_sent_s = 0.0
        self.started = started
        self.name = ""  # of the standby that is there
        self._pid = 0

    def begin(self, now: float) -> None:
        """From now on there is something to go on with."""
        if self._plan is not None and self._next_start_s is None:
            self._next_start_s = now

    def superseded(self) -> int:
        """The epoch of a successor, 0 without one. A store that cannot be asked says nothing: then the managers
        know whom they follow."""
        if self._plan is None:
            return 0
        try:
            newest = self._plan.claims.newest()
        except Exception as error:  # whatever the store raises
            log.warning("whether epoch %d still leads cannot be asked: %s", self._epoch, error)
            return 0
        return newest if newest > self._epoch else 0

    def came(self, peer: Peer, standby: m.StandsBy, known: ch.Chronicle) -> str:
        """A standby has opened its stream; what to tell people."""
        if self._peer is not None:
            self._peer.close()  # one that is given up
        self._peer, self.name, self._pid = peer, standby.name, standby.pid
        peer.send(ch.encode(ch.Base(known)))
        where = f" on node {standby.node}" if standby.node else ""
        return f"{standby.name} stands by (process {standby.pid}{where})"

    def gone(self, peer: Peer, now: float) -> str:
        """What to tell people where that stream was the standby's: another one is started then."""
        if self._peer is not peer:
            return ""
        name, self._peer, self.name = self.name, None, ""
        self._next_start_s = now + _AGAIN_S
        return f"{name} is lost: another one is started"

    def shown(self) -> list[dict[str, Any]]:
        """The supervisor and its standby, for a status; any thread."""
        place = {"rank": None, "slot": None, "domain": None}
        leads = {"name": "supervisor", "pid": os.getpid(), "state": f"leads epoch {self._epoch}", **place}
        stands_by = {"name": self.name, "pid": self._pid, "state": "stands by", **place}
        return [leads, stands_by] if self.name else [leads]

    def tell(self, record: ch.Record, now: float) -> None:
        if self._peer is not None:
            self._peer.send(ch.encode(record))
            self._last_sent_s = now

    def tick(self, now: float) -> None:
        if self._peer is not None:
            if now - self._last_sent_s > self._beat_s:
                self.tell(ch.Beat(), now)
            return
        if self._plan is None or self._next_start_s is None or now < self._next_start_s:
            return
        self.started += 1
        self._next_start_s = now + _COMES_WITHIN_S
        arguments = (self._plan, self.started, self._address)
        threading.Thread(target=_start, args=arguments, name="start-standby", daemon=True).start()

    def end(self, now: float) -> None:
        """The run has ended: nobody has to take over."""
        self.tell(ch.Over(), now)
        self._plan = self._peer = None


def _start(plan: Plan, number: int, address: str) -> None:
    try:
        plan.start(number, address)
    except Exception as error:  # tried again after _COMES_WITHIN_S
        log.warning("standby %d could not be started: %s", number, error)

"""A run's standby: keeps the supervisor's books, and takes its place when it is lost.

    standing by --- the stream breaks, or is silent for `timeouts.frozen_s` ---> claim epoch + 1
    claim taken ---> goes on as supervisor        somebody else has it ---> ends
    Over        ---> ends                         lost before the books came ---> ends

Threads: the stream's reader files records; `run` is the caller's. Never imports torch.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from everstep.actors.claims import Claims
from everstep.collectives import messages as m
from everstep.collectives.addresses import node_name
from everstep.collectives.control import ControlClient
from everstep.platform.cluster import chronicle as ch

log = logging.getLogger(__name__)

_LOOK_S = 0.1
_STORE_AGAIN_S = 0.2


class Standby:
    """Stands by for the supervisor at `address`. `run` returns what there is to go on with, and how it was lost."""

    def __init__(self, name: str, address: str, token: str, frozen_s: float, claims: Claims) -> None:
        """Raises CoordinatorLost or HandshakeRefused."""
        self._claims = claims
        self._frozen_s = frozen_s
        self._changed = threading.Condition()
        self._known: ch.Chronicle | None = None
        self._lost = ""
        self._over = False
        self._heard_s = time.monotonic()
        self._client = ControlClient(address, token, self._on_record, self._on_lost, keepalive_s=frozen_s / 2)
        self._client.send(m.encode(m.StandsBy(name, os.getpid(), node_name())))

    def run(self) -> tuple[ch.Chronicle, str, float] | None:
        """(the books, why the supervisor is taken for lost, seconds since it was last heard of), with the epoch after
        the books' taken; None when there is nothing to take over."""
        lost = self._wait()
        silent_s = time.monotonic() - self._heard_s
        self._client.close()
        if not lost or self._known is None:
            return None
        log.warning("the supervisor of epoch %d is lost: %s", self._known.epoch, lost)
        if not self._claim(self._known.epoch + 1):
            log.warning("epoch %d is somebody else's", self._known.epoch + 1)
            return None
        return self._known, lost, silent_s

    def _wait(self) -> str:
        looked_s = time.monotonic()
        with self._changed:
            while not self._over and not self._lost:
                self._changed.wait(_LOOK_S)
                now = time.monotonic()
                if now - looked_s > self._frozen_s / 2:
                    self._heard_s = now  # I was held up myself: nobody is late for that
                looked_s = now
                if now - self._heard_s > self._frozen_s:
                    return f"silent for {now - self._heard_s:.1f} s (timeouts.frozen_s)"
            return "" if self._over else self._lost

    def _claim(self, epoch: int) -> bool:
        while True:
            try:
                return self._claims.take(epoch)
            except Exception as error:  # the store is away: without it nobody may lead, so there is no hurry lost
                log.warning("epoch %d cannot be claimed: %s", epoch, error)
                time.sleep(_STORE_AGAIN_S)

    def _on_record(self, data: bytes) -> None:
        record = ch.decode(data)
        with self._changed:
            self._heard_s = time.monotonic()
            if isinstance(record, ch.Base):
                self._known = record.chronicle
            elif isinstance(record, ch.Over):
                self._over = True
                self._changed.notify_all()
            elif self._known is not None:
                self._known.add(record)

    def _on_lost(self, reason: str) -> None:
        with self._changed:
            self._lost = f"its stream broke: {reason}"
            self._changed.notify_all()

"""Entry point of a standby inside a Ray actor: stands by, and goes on as the run's supervisor when that is lost."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from everstep.actors.inheritance import Inheritance
from everstep.actors.standby import Standby
from everstep.actors.supervisor_process import StandbyConfig, claims_of, hold_folder, prepare, supervise
from everstep.collectives.errors import CollectiveError

log = logging.getLogger(__name__)


class _Address:
    """Of the supervisor that this process has become; "" before."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self) -> str:
        return self.text


def main(config: bytes) -> Callable[[], str]:
    """Starts the standby's thread and returns how to ask for its address."""
    c = prepare(config, StandbyConfig)
    address = _Address()
    threading.Thread(target=_stand_by, args=(c, address), name="standby", daemon=True).start()
    return address


def _stand_by(c: StandbyConfig, address: _Address) -> None:
    try:
        hold_folder(c.supervisor)
        claims = claims_of(c.supervisor)
        frozen_s = c.supervisor.spec["timeouts"]["frozen_s"]
        standby = Standby(f"standby-{c.number}", c.address, c.supervisor.token, frozen_s, claims)
        found = standby.run()
    except (CollectiveError, OSError):
        log.exception("this standby is of no use")
        found = None
    if found is None:
        os._exit(0)
    address.text = supervise(c.supervisor, claims, Inheritance(*found)).address

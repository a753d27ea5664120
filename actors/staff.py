"""The run's processes: carries out what platform.cluster.staffing decides, through a host.

Belongs to the supervisor's loop; `state` may be read from any thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from everstep.actors.config import ManagerConfig, RankConfig
from everstep.actors.host import Host
from everstep.actors.reports import domain_of
from everstep.platform.cluster import staffing as st
from everstep.platform.job.spec import JobSpec

log = logging.getLogger(__name__)


class Staff:
    """`coordinator` is the supervisor's address; `stop_rank` and `give_up` carry out what is not the host's."""

    def __init__(
        self,
        spec: JobSpec,
        common: dict[str, Any],
        spec_dir: Path,
        host: Host,
        coordinator: str,
        stop_rank: Callable[[str], None],
        give_up: Callable[[str, str], None],
    ) -> None:
        slots = spec.ranks.max + spec.ranks.spares
        self.state = st.initial(slots, spec.ranks.max, spec.ranks.spares, spec.limits.infrastructure)
        self.host = host
        self._spec = spec
        self._plain_spec = spec.to_dict()
        self._common = common  # run_id, run_folder, token, embedded
        self._spec_dir = str(spec_dir)
        self._coordinator = coordinator
        self._stop_rank = stop_rank
        self._give_up = give_up

    def handle(self, event: st.Event) -> None:
        self.state, commands, reason = st.decide(self.state, event, time.monotonic())
        if isinstance(event, st.ProcessExit):
            log.info("%s", reason)
        for command in commands:
            match command:
                case st.StartManager(slot, name):
                    self.host.start("manager", name, slot, msgspec.msgpack.encode(self._manager(slot, name)))
                case st.StartRank(slot, name):
                    self.host.start("rank", name, slot, msgspec.msgpack.encode(self._rank(slot, name)))
                case st.StopRank(name):
                    self._stop_rank(name)
                case st.GiveUp(kind, message):
                    self._give_up(kind, message)

    def manager_of(self, slot: int) -> str:
        return self.state.slots[slot].manager

    def _manager(self, slot: int, name: str) -> ManagerConfig:
        return ManagerConfig(
            **self._common,
            name=name,
            slot=slot,
            domain=domain_of(slot),
            coordinator=self._coordinator,
            frozen_s=self._spec.timeouts.frozen_s,
            stall_s=self._spec.timeouts.stall_s,
        )

    def _rank(self, slot: int, name: str) -> RankConfig:
        at = self.state.slots[slot]
        return RankConfig(
            **{key: value for key, value in self._common.items() if key != "embedded"},
            name=name,
            slot=slot,
            domain=domain_of(slot),
            manager=at.control,
            fetch=at.fetch,
            spec=self._plain_spec,
            spec_dir=self._spec_dir,
        )

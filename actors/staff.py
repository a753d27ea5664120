"""The run's processes: carries out what platform.cluster.staffing decides, through a host.

Belongs to the supervisor's loop; `state` may be read from any thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from everstep.actors.config import ManagerConfig, RankConfig
from everstep.actors.host import Host
from everstep.actors.reports import domain_of
from everstep.actors.run_config import RunConfig
from everstep.collectives.messages import Member
from everstep.platform.cluster import staffing as st

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deeds:
    """What is not the host's to do."""

    stop_rank: Callable[[str], None]
    end_manager: Callable[[int], None]  # of a slot
    unwanted: Callable[[st.Unwanted], None]
    leaving: Callable[[Iterable[str], str], None]  # who, and why: for the books
    tell: Callable[[str, str, dict[str, Any]], None]
    give_up: Callable[[str, str], None]
    intends: Callable[[], None]  # before anything is carried out


class Staff:
    """`coordinator` is the supervisor's address. `watch_nodes` before the first event."""

    def __init__(
        self,
        config: RunConfig,
        host: Host,
        coordinator: str,
        deeds: Deeds,
    ) -> None:
        spec = config.spec
        self.state = st.initial(
            spec.ranks.max + spec.ranks.spares,
            spec.ranks.max,
            spec.ranks.spares,
            spec.limits.infrastructure,
            user_limit=spec.limits.user,
            preemption_limit=spec.limits.preemption,
        )
        if config.inheritance is not None:
            self.state = st.inherited(config.inheritance.known.standing.staffing)
        self.host = host
        self._spec = spec
        self._plain_spec = spec.to_dict()
        self._config = config
        self._coordinator = coordinator
        self._deeds = deeds

    def watch_nodes(self, news: Callable[[st.Event], None]) -> None:
        placed = self.host.watch_nodes(lambda nodes: news(st.NodesAre(nodes)))
        self.state = replace(self.state, placed=placed)

    def handle(self, event: st.Event) -> None:
        self.state, commands, reason = st.decide(self.state, event, time.monotonic())
        if isinstance(event, st.ProcessExit):
            log.info("%s", reason)
        if commands:
            self._deeds.intends()
        for command in commands:
            match command:
                case st.StartManager(slot, name, node):
                    self.host.start("manager", name, slot, msgspec.msgpack.encode(self._manager(slot, name)), node)
                case st.StartRank(slot, name, node):
                    self.host.start("rank", name, slot, msgspec.msgpack.encode(self._rank(slot, name)), node)
                case st.StopRank(name):
                    self._deeds.stop_rank(name)
                case st.Kill(name):
                    self.host.kill(name)
                case st.EndManager(slot, _):
                    self._deeds.end_manager(slot)
                case st.Free(slot):
                    self.host.free(slot)
                case st.Want(slots):
                    self._tell_room(slots)
                case st.Unwanted():
                    self._deeds.unwanted(command)
                case st.Tell(kind, text, data, names):
                    self._deeds.tell(kind, text, dict(data))
                    self._deeds.leaving(names, kind)
                case st.GiveUp(kind, message):
                    self._deeds.give_up(kind, message)

    def _tell_room(self, slots: int) -> None:
        """The controller asks the autoscaler for what jobs lack; people are told here."""
        text = f"no node has room for all of {slots} slots" if slots else "every slot has found room"
        self._deeds.tell("room", text, {"slots": slots})

    def vacate(self, node: str, rank: int | None, members: Sequence[Member]) -> tuple[st.Vacate, str]:
        """What `everstep drain` asks for: a node, or a rank of the view of `members`; or why not. Any thread."""
        what = f"node {node}" if rank is None else f"rank {rank}"
        if rank is None:
            slots = self._slots_on(node)
        else:
            slots = frozenset({members[rank].slot} if 0 <= rank < len(members) else ())
        refused = "the run has ended" if self.state.closed else "" if slots else f"the run has nothing on {what}"
        return st.Vacate(slots, f"{what} is drained", planned=True), refused

    def forgives(self, name: str) -> str:
        """The task raised in `name`: how often it has so far, "" where that is more than limits.user."""
        self.handle(st.UserError(name))
        limit = self.state.user_limit
        return f"{self.state.user_errors} of limits.user: {limit}" if st.forgiven(self.state) else ""

    def _slots_on(self, node: str) -> frozenset[int]:
        """The slots on the one node whose id begins so; none where that is no node, or several."""
        slots = enumerate(self.state.slots)
        found = {slot.node: set[int]() for _, slot in slots if node and slot.node.startswith(node)}
        for index, slot in enumerate(self.state.slots):
            if slot.node in found and slot.active:
                found[slot.node].add(index)
        return frozenset(next(iter(found.values()))) if len(found) == 1 else frozenset()

    def adopt(self, located: Mapping[str, bytes]) -> None:
        """Watches over the processes of the supervisor before; `located`: where its host said they are."""
        for slot, at in enumerate(self.state.slots):
            for role, name in (("manager", at.manager), ("rank", at.trainer)):
                if name:
                    self.host.adopt(role, name, slot, located.get(name, b""))

    def located(self) -> dict[str, bytes]:
        names = [name for at in self.state.slots for name in (at.manager, at.trainer) if name]
        return {name: where for name in names if (where := self.host.located(name))}

    def manager_of(self, slot: int) -> str:
        return self.state.slots[slot].manager

    def _manager(self, slot: int, name: str) -> ManagerConfig:
        config = self._config
        return ManagerConfig(
            run_id=config.run_id,
            run_folder=str(config.run_folder),
            token=config.token,
            embedded=config.embedded,
            name=name,
            slot=slot,
            domain=domain_of(slot),
            coordinator=self._coordinator,
            frozen_s=self._spec.timeouts.frozen_s,
            stall_s=self._spec.timeouts.stall_s,
            epoch=config.epoch,
            orphan_s=config.orphan_s,
        )

    def _rank(self, slot: int, name: str) -> RankConfig:
        at = self.state.slots[slot]
        return RankConfig(
            run_id=self._config.run_id,
            run_folder=str(self._config.run_folder),
            token=self._config.token,
            name=name,
            slot=slot,
            domain=domain_of(slot),
            manager=at.control,
            fetch=at.fetch,
            spec=self._plain_spec,
            spec_dir=str(self._config.spec_dir),
        )

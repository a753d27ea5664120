"""A successor's first moments: it calls the managers that its predecessor had, and hears what they hold.

A verdict that reached some members and not others is completed first: it was decided, so it is committed. Then
one more view is formed. Managers that do not answer are lost, and so are trainers that nobody speaks for. Nothing
is decided before all have answered, or `timeouts.frozen_s` is over. Belongs to the supervisor's loop; the calls are
made from threads of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from everstep.actors.config import Follow, Followed, Heard
from everstep.actors.inheritance import Inheritance
from everstep.actors.reports import Books, domain_of
from everstep.actors.run_config import RunConfig
from everstep.actors.staff import Staff
from everstep.actors.watchers import Watchers
from everstep.collectives import membership as mb
from everstep.collectives import messages as m
from everstep.collectives.control import call
from everstep.collectives.errors import CollectiveError
from everstep.platform.cluster import staffing as st
from everstep.platform.training.messages import Verdict

log = logging.getLogger(__name__)

_CALLS_AT_ONCE = 16
_START_S = 120.0  # a rank may import and build this long before the run goes on without it


def membership_of(config: RunConfig, now: float) -> mb.State:
    """Where a supervisor's membership begins."""
    ranks, inheritance = config.spec.ranks, config.inheritance
    if inheritance is None:
        return mb.initial(config.epoch, ranks.min, ranks.max, now, patience_s=_START_S)
    standing = inheritance.known.standing
    domains = frozenset(domain_of(slot) for slot, at in enumerate(standing.staffing.slots) if at.manager)
    floor = inheritance.known.floor
    return mb.initial(config.epoch, ranks.min, standing.target, now, _START_S, missing=domains, floor=floor)


@dataclass
class Takeover:
    """`on_answer(manager, refused)` tells of each call; `refused` is "" where the manager follows."""

    inheritance: Inheritance
    frozen_s: float
    now: float
    on_answer: Callable[[str, str], None]
    heard: dict[str, Heard] = field(default_factory=dict)  # by manager
    refused: dict[str, str] = field(default_factory=dict)  # manager -> why
    joined: set[str] = field(default_factory=set)  # trainers
    deferred: list[mb.Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        slots = self.inheritance.known.standing.staffing.slots
        self._expected = {slot.manager: slot.control for slot in slots if slot.manager and slot.manager_up}
        # One that was still starting looks for the supervisor that is lost.
        self._unborn = {
            slot.manager: "it was being started" for slot in slots if slot.manager and not slot.manager_up
        }

    def start(self, epoch: int, address: str, token: str) -> None:
        """Calls them all."""
        request = msgspec.msgpack.encode(Follow(epoch, address, self.inheritance.known.account.step))
        pool = ThreadPoolExecutor(_CALLS_AT_ONCE, thread_name_prefix="follow")
        for name, control in self._expected.items():
            pool.submit(self._call, name, control, token, request)
        pool.shutdown(wait=False)

    def _call(self, name: str, control: str, token: str, request: bytes) -> None:
        try:
            reply = call(control, token, request, self.frozen_s)
            refused = msgspec.msgpack.decode(reply, type=Followed).refused
        except (CollectiveError, msgspec.MsgspecError) as error:
            refused = str(error)
        self.on_answer(name, refused)

    def complete(self, now: float) -> bool:
        """Whether nobody is waited for any more."""
        return self._expected.keys() <= self.heard.keys() | self.refused.keys() or now - self.now > self.frozen_s

    def silent(self) -> dict[str, str]:
        """Managers that do not follow, and why."""
        late = f"no answer within {self.frozen_s:g} s (timeouts.frozen_s)"
        silent = {name: self.refused.get(name, late) for name in self._expected if name not in self.heard}
        return {**self._unborn, **silent}

    def in_doubt(self) -> list[m.Verdict]:
        """Verdicts of the newest view that the books do not know, oldest first."""
        verdicts = {(v.id, v.step): v for heard in self.heard.values() for v in heard.verdicts}
        newest = max((id for id, _ in verdicts), default=None)
        return [verdicts[key] for key in sorted(verdicts) if key[0] == newest]

    def lacks(self, manager: str, verdict: m.Verdict) -> bool:
        heard = self.heard.get(manager)
        return heard is not None and (verdict.id, verdict.step) not in {(v.id, v.step) for v in heard.verdicts}

    def orphans(self, staffing: st.State) -> list[str]:
        """Trainers that were ready and that no manager speaks for."""
        return [
            slot.trainer for slot in staffing.slots if slot.trainer and slot.ready and slot.trainer not in self.joined
        ]


def mourn(inheritance: Inheritance, epoch: int, books: Books, now: float) -> None:
    """Books the loss of the supervisor before."""
    cause, silent_ms = inheritance.cause, inheritance.silent_s * 1000
    text = f"epoch {epoch} goes on: the supervisor is lost: {cause}"
    books.journal.add("takeover", text, {"epoch": epoch, "detect_ms": silent_ms})
    books.ledger.lost(m.Lost("the supervisor", f"the supervisor: {cause}", -1, silent_ms), now)


def settle(takeover: Takeover, staff: Staff, watchers: Watchers, books: Books, now: float) -> list[mb.Event]:
    """Completes what was in doubt and gives up whoever is lost; what the membership has to hear then, in order."""
    for verdict in takeover.in_doubt():
        decided = msgspec.msgpack.decode(verdict.payload, type=Verdict)
        if decided.outcome in ("commit", "skip"):
            books.desk.heard(verdict.step, decided)
            books.journal.metrics(verdict.step, decided, books.ledger.committed(verdict.step, decided, (), now), {})
        for slot, at in enumerate(staff.state.slots):
            if at.manager and takeover.lacks(at.manager, verdict):
                watchers.tell_slot(slot, verdict)
    gone: list[mb.Event] = []
    for manager, why in takeover.silent().items():
        index = st.slot_of(staff.state, manager)
        if index is None:
            continue
        domain = domain_of(index)
        gone.append(mb.WatcherLost(domain))
        books.journal.add("lost", f"{manager} does not follow: {why}", {"domain": domain})
        staff.host.kill(manager)
        staff.handle(st.ProcessExit(manager, why))
    for name in takeover.orphans(staff.state):
        staff.host.kill(name)
        gone.append(mb.MemberDied(name, "it died while there was no supervisor"))
        staff.handle(st.ProcessExit(name, "died while there was no supervisor"))
    return [*takeover.deferred, *gone, mb.Roused()]

"""What ranks say, as the supervisor takes it: that they are ready, what they hold, how they vote, what went wrong.

Belongs to the supervisor's loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from everstep.actors.config import FaultReached, TaskFailed
from everstep.actors.reports import Books
from everstep.actors.scripted import Script
from everstep.actors.staff import Staff
from everstep.actors.watchers import Watcher, Watchers
from everstep.collectives import membership as mb
from everstep.collectives import messages as m
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.admission import Admission
from everstep.platform.cluster.repeats import Repeats, hopeless, seen
from everstep.platform.job.result import Failure


class RankNews:
    """`member` tells the membership, `end` ends the run, `membership()` is who is in the view now."""

    def __init__(
        self,
        books: Books,
        staff: Staff,
        watchers: Watchers,
        script: Script,
        admission: Admission,
        member: Callable[[mb.Event], None],
        end: Callable[[Failure | None], None],
        membership: Callable[[], mb.State],
    ) -> None:
        self._books = books
        self._staff = staff
        self._watchers = watchers
        self._script = script
        self._admission = admission
        self._member = member
        self._end = end
        self._membership = membership
        self._repeats = Repeats()
        self.objection = ""  # why the last rank was refused

    def heard(self, name: str, watcher: Watcher, message: m.MemberMessage) -> bool:
        """True where `name` has joined."""
        match message:
            case m.Join(member, fingerprint):
                return self._joined(name, member, fingerprint)
            case m.Inventory(id, payload):
                self._member(mb.Inventoried(name, id, payload))
            case m.Level(id):
                self._member(mb.Levelled(name, id))
            case m.Vote(id, step, payload):
                self._member(mb.Voted(name, id, step, payload))
            case m.Complaint(id, about, error):
                self._member(mb.Complained(name, id, about, error))
            case m.Note("fault", payload):
                self._fault(name, watcher, msgspec.msgpack.decode(payload, type=FaultReached))
            case m.Note("notice", payload):
                why = f"{name} was sent {payload.decode()}"
                self._staff.handle(st.Vacate(frozenset({watcher.slot}), why, st.NOTICE_S))
            case m.Note("failed", payload):
                self._failed(name, msgspec.msgpack.decode(payload, type=TaskFailed))
        return False

    def _note(self, kind: str, text: str, **data: Any) -> None:
        self._books.journal.add(kind, text, data)

    def _joined(self, name: str, member: m.Member, fingerprint: dict[str, str]) -> bool:
        if st.slot_of(self._staff.state, name) is None:  # of a supervisor that was lost before it told of it
            self._watchers.tell_members((name,), m.Excluded("this run does not know of it"))
            return False
        if self._refuses(name, fingerprint):
            return False
        self._staff.handle(st.RankReady(name))
        self._note("ready", f"{name} is ready", name=name)
        self._member(mb.Joined(member))
        return True

    def _refuses(self, name: str, fingerprint: dict[str, str]) -> bool:
        """Ranks that would compute other bits are not let in under `exact`."""
        objection, exact = self._admission.objection(name, fingerprint), self._books.spec.exact
        if not objection:
            return False
        self._note("finding", objection, syndrome="mismatch", name=name)
        if exact:
            self.objection = f"{objection} (exact: true)"
            self._watchers.tell_members((name,), m.Excluded(self.objection))
        return exact

    def _fault(self, name: str, watcher: Watcher, reached: FaultReached) -> None:
        self._books.desk.fired.add(reached.index)
        self._books.ledger.fault_reached(time.monotonic())
        text = self._script.reached(name, watcher.domain, reached)
        self._note("fault", text, index=reached.index, name=name)

    def _failed(self, name: str, failed: TaskFailed) -> None:
        names = [member.name for member in mb.current_members(self._membership())]
        failure = Failure(
            kind=failed.kind,
            message=failed.message,
            step=failed.step,
            rank=names.index(name) if name in names else None,
            lane=failed.lane if failed.lane >= 0 else None,
            traceback=failed.traceback,
        )
        self._repeats = seen(self._repeats, failed.message, failed.step, failed.lane)
        hope = failed.kind == "task" and not hopeless(self._repeats)
        if hope and (count := self._staff.forgives(name)):
            # The rank's process ends by itself; another one tries again.
            self._note("user error", f"{failed.message} ({count})", name=name)
            return
        self._end(failure)

"""Keeps the standby's books level with the supervisor's: looks after each turn of the loop, and tells what is new.

Belongs to the supervisor's loop.
"""

from __future__ import annotations

from collections.abc import Callable

from everstep.actors.quota import Quota
from everstep.actors.reports import Books
from everstep.actors.scripted import Script
from everstep.actors.staff import Staff
from everstep.actors.succession import Succession
from everstep.collectives import membership as mb
from everstep.platform.cluster import chronicle as ch
from everstep.platform.cluster.admission import Admission
from everstep.platform.job.status import Event

_LOCATE_S = 1.0  # where processes are is known a moment after they are started


class Chronicler:
    """`membership()`: as it is now."""

    def __init__(
        self,
        books: Books,
        staff: Staff,
        admission: Admission,
        quota: Quota,
        succession: Succession,
        script: Script,
        membership: Callable[[], mb.State],
    ) -> None:
        self._books = books
        self._staff = staff
        self._admission = admission
        self._quota = quota
        self._succession = succession
        self._script = script
        self._membership = membership
        self._located: dict[str, bytes] = {}
        self._next_locate_s = 0.0
        self._told: ch.Standing | None = None
        self._commits = self._recoveries = self._rescales = 0

    def base(self, epoch: int, now: float) -> ch.Chronicle:
        """Everything, for a standby that has just come."""
        books, ledger = self._books, self._books.ledger
        self._located = self._staff.located()
        self._told = self._standing()
        self._mark()
        return ch.Chronicle(
            epoch=epoch,
            started_at=books.started_at,
            standing=self._told,
            account=ledger.account(now),
            floor=self._membership().floor,
            losses=ledger.losses,
            rows=books.desk.rows(),
            events=books.journal.after(0),
            findings=books.journal.findings,
            recoveries=ledger.recoveries,
            rescales=ledger.rescales,
        )

    def look(self, now: float, at_all: bool) -> None:
        """Tells what has changed since the last look: steps that were committed, and `at_all` the rest."""
        if not self._succession.name:
            return
        if at_all and now >= self._next_locate_s:
            self._next_locate_s = now + _LOCATE_S
            self._located = self._staff.located()
        if at_all:
            self.intend(now)
        ledger = self._books.ledger
        if ledger.commits != self._commits:  # one a turn at most
            step = ledger.step
            row, floor = self._books.desk.row(step), self._membership().floor
            account = ledger.account(now)
            self._tell(ch.Committed(step, ledger.losses[step], row, -1 if floor is None else floor, account), now)
        for recovery in ledger.recoveries[self._recoveries :]:
            self._tell(ch.Recovered(recovery), now)
        for rescale in ledger.rescales[self._rescales :]:
            self._tell(ch.Rescaled(rescale), now)
        self._mark()

    def intend(self, now: float) -> None:
        """Tells the staff as it is to be, before that is carried out: no name is used twice."""
        if self._succession.name and (standing := self._standing()) != self._told:
            self._told = standing
            self._tell(standing, now)

    def said(self, event: Event, now: float) -> None:
        self._tell(ch.Said(event), now)

    def _mark(self) -> None:
        ledger = self._books.ledger
        self._commits, self._recoveries, self._rescales = (
            ledger.commits,
            len(ledger.recoveries),
            len(ledger.rescales),
        )

    def _tell(self, record: ch.Record, now: float) -> None:
        self._succession.tell(record, now)

    def _standing(self) -> ch.Standing:
        desk = self._books.desk
        wish, granted, number = self._quota.known
        return ch.Standing(
            staffing=self._staff.state,
            target=self._membership().target,
            wish=wish,
            granted=granted,
            grant_number=number,
            located=self._located,
            fired=tuple(sorted(desk.fired)),
            scaled=self._script.scaled(),
            stop_reason=desk.stop_reason,
            fingerprint=self._admission.fingerprint,
            saving=desk.saving,
            checkpoints=self._books.finished(),
            last_step=desk.last_step,
            standbys=self._succession.started,
        )

"""Carries out what the membership decides: prepares, views, verdicts, and the books that go with them.

Between collectives.membership (who, when) and platform.cluster.desk (from where, to what). Belongs to the
supervisor's loop; `phase` may be read from any thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from everstep.actors.checkpoints import CheckpointDesk
from everstep.actors.reports import Books
from everstep.actors.scripted import Script
from everstep.actors.watchers import Watchers
from everstep.collectives import membership as mb
from everstep.collectives import messages as m
from everstep.platform.cluster import saving as sv
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.desk import Judgement
from everstep.platform.job.result import Failure
from everstep.platform.job.status import Phase
from everstep.platform.training.protection import effective_parity, failure_domains, parity_plan
from everstep.platform.training.recovery import Lost

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outlets:
    """Where news goes: back to the membership, to the staffing, to the end of the run, to a new target."""

    member: Callable[[mb.Event], None]
    staff: Callable[[st.Event], None]
    end: Callable[[Failure | None], None]
    scale: Callable[[int], None]


class Transactions:
    def __init__(
        self, books: Books, watchers: Watchers, checkpoints: CheckpointDesk | None, script: Script, outlets: Outlets
    ) -> None:
        self._desk = books.desk
        self._ledger = books.ledger
        self._journal = books.journal
        self._watchers = watchers
        self._checkpoints = checkpoints
        self._script = script
        self._out = outlets
        self._released: m.ViewId | None = None
        self._told_damage: set[tuple[str, str]] = set()
        self._told_protection: tuple[int, int] | None = None
        self.phase: Phase = "starting"

    def lost(self, lost: m.Lost, now: float) -> None:
        """A member of the view was declared dead."""
        self._ledger.lost(lost, now)
        self.phase = "recovering"
        data = {"rank": lost.rank, "name": lost.name, "cause": lost.cause, "detect_ms": lost.detected_ms}
        self._journal.add("lost", f"rank {lost.rank} ({lost.name}) is lost: {lost.cause}", data)

    def do(self, command: mb.Command, now: float) -> None:
        match command:
            case mb.SendPrepare(prepare, domain):
                self._tell_released()  # once more: a manager that died before it heard of it has a successor now
                self._watchers.prepare(prepare, domain)
            case mb.Choose(id, members, inventories, stocks):
                self._choose(id, members, inventories, stocks)
            case mb.SendView(view):
                self._watchers.tell_members((member.name for member in view.members), m.NewView(view))
            case mb.SendGo(view):
                self._acts(view, now)
            case mb.Judge(view, step, votes):
                self._judge(view, step, votes, now)
            case mb.SendVerdict(view, step, payload, reform):
                if reform:
                    self._ledger.pause(now)
                verdict = m.Verdict(view.id, step, payload, reform)
                self._watchers.tell_members((member.name for member in view.members), verdict)
            case mb.Refuse(name, reason):
                self._watchers.tell_members((name,), m.Excluded(reason))
            case mb.Fail(reason):
                self._out.end(Failure(kind="infrastructure", message=reason))

    def _choose(
        self,
        id: m.ViewId,
        members: tuple[m.Member, ...],
        inventories: Mapping[str, bytes],
        stocks: Mapping[str, bytes],
    ) -> None:
        if self._checkpoints is not None and self._checkpoints.newest is not None:
            self._desk.stored = self._checkpoints.newest
        try:
            choice = self._desk.choose(members, inventories, stocks)
        except Lost as error:
            self._tell_damage()
            self._out.member(mb.Unchoosable(id, str(error)))
            return
        self._tell_damage()
        again = False  # where the step that a checkpoint is due at is not done again, the new view writes it
        if self._checkpoints is not None:
            abandoned = self._checkpoints.abandon(choice.base_step, self._desk.sealed)
            again = choice.base_step in abandoned
            self._tell_abandoned(abandoned)
        plan = self._desk.plan(choice, self._watchers.fetch_addresses(), self._failure_domains(members), again)
        payload = msgspec.msgpack.encode(plan)
        log.info("view %s: %s", id, choice.reason)
        if choice.rebuilds:
            domains = [rebuild.domain for rebuild in choice.rebuilds]
            text = f"step {choice.base_step} of {', '.join(domains)} is rebuilt from parity"
            self._journal.add("rebuilt", text, {"step": choice.base_step, "domains": domains})
        self._out.member(mb.Chosen(id, choice.base_step, payload))

    def _tell_abandoned(self, steps: Iterable[int]) -> None:
        for step in sorted(steps):
            self._desk.note_saving(sv.Abandoned(step), 0.0)
            text = f"the checkpoint of step {step} is given up: its view ended before every rank had sealed it"
            self._journal.add("checkpoint given up", text, {"step": step})

    def _failure_domains(self, members: Sequence[m.Member]) -> tuple[str, ...]:
        setting = self._desk.spec.snapshot.domain
        return failure_domains(setting, [member.domain for member in members], self._watchers.nodes())

    def _tell_damage(self) -> None:
        for domain, locator in sorted(self._desk.damaged - self._told_damage):
            text = f"{domain}: segment {locator} does not match its checksums: it is not used"
            data = {"syndrome": "silent corruption", "ranks": [], "domain": domain, "segment": locator}
            self._journal.add("finding", text, data)
        self._told_damage |= self._desk.damaged

    def _acts(self, view: m.View, now: float) -> None:
        names = [member.name for member in view.members]
        self._ledger.acts(view.base_step, len(names), now, names)
        self.phase = "training"
        text = f"view {view.id} acts from step {view.base_step} with {len(names)} ranks: {', '.join(names)}"
        data = {"view": str(view.id), "step": view.base_step, "ranks": len(names), "members": names}
        self._journal.add("view", text, data)
        self._watchers.tell_members(names, m.Go(view.id))
        self._tell_protection(view)
        self._out.staff(st.ViewActs(frozenset(names)))

    def _tell_protection(self, view: m.View) -> None:
        """A finding while fewer domains may be lost together than the job asks for."""
        domains, wanted = self._failure_domains(view.members), self._desk.parity
        have = effective_parity(parity_plan(domains, wanted), len(domains))
        if self._desk.shadow:  # a view of one rank has none
            have, wanted = int(len(view.members) > 1), 1
        self._ledger.parity = have
        if (have, wanted) == self._told_protection or (have >= wanted and self._told_protection is None):
            return
        self._told_protection = (have, wanted)
        if have < wanted:
            count = len(set(domains))
            who = "1 failure domain carries" if count == 1 else f"{count} failure domains carry"
            text = f"{who} parity {have} of {wanted}: {_exposed(have)}"
            data = {"syndrome": "unprotected", "ranks": [], "parity": have, "wanted": wanted, "domains": count}
            self._journal.add("finding", text, data)
        else:
            self._journal.add("protected", f"parity {have} is carried again", {"parity": have})

    def _judge(self, view: m.View, step: int, votes: Mapping[str, bytes], now: float) -> None:
        judgement = self._desk.judge(step, votes, self._ledger.since_last(now), now)
        verdict = judgement.verdict
        if verdict.outcome == "failed":
            kind = "nonfinite" if "finite" in verdict.error else "task"
            self._out.end(Failure(kind=kind, message=verdict.error, step=step))
            return
        if judgement.evaluation:
            self._evaluated(step - 1, judgement.evaluation)
        if verdict.outcome in ("commit", "skip"):
            self._committed(step, judgement, now)
        if verdict.protected_step >= view.base_step and self._released != view.id:
            self._released = view.id  # the new layout is protected: segments of older ones may go
            self._tell_released()
            self._out.staff(st.Protected())
        payload = msgspec.msgpack.encode(verdict)
        self._out.member(mb.Judged(view.id, step, payload, judgement.finished, verdict.protected_step))
        if judgement.finished:
            self._out.end(None)

    def _evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        text = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._journal.add("evaluation", f"evaluation of step {step}: {text}", {"step": step, **metrics})
        self._ledger.evaluated(metrics)
        if self._checkpoints is not None:
            self._checkpoints.scored(step, metrics)

    def _tell_released(self) -> None:
        if self._released is not None:
            self._watchers.tell_all(m.Order("release", msgspec.msgpack.encode(self._released)))

    def _committed(self, step: int, judgement: Judgement, now: float) -> None:
        verdict = judgement.verdict
        stalls = [vote.stall_s for vote in judgement.votes.values()]
        known = len(self._ledger.recoveries)
        spent = self._ledger.committed(step, verdict, stalls, now)
        self._journal.metrics(step, verdict, spent, judgement.votes)
        for recovery in self._ledger.recoveries[known:]:
            self._journal.recovered(recovery)
        if judgement.reason:
            self._journal.add("snapshots", judgement.reason, {"step": step, "interval": self._desk.interval})
        if judgement.saving:
            self._journal.add("checkpoint late", judgement.saving, {"step": step})
        if verdict.outcome == "skip":
            self._journal.add("skip", f"step {step} is skipped: loss or gradients are not finite", {"step": step})
        if verdict.last:
            self.phase = "finishing"
        if (ranks := self._script.scales.pop(step, None)) is not None:
            self._out.scale(ranks)


def _exposed(parity: int) -> str:
    return (
        "the loss of one costs the steps since the newest checkpoint" if not parity else "no more may be lost at once"
    )

"""The supervisor of a run: one loop that feeds events to the pure deciders and carries out what they say.

Deciders: collectives.membership (who is in the view, when a step is decided), platform.cluster.staffing (which
processes there are), platform.cluster.desk (base steps, verdicts). Everything that arrives (control streams,
process exits, user requests) is queued and handled by the loop's one thread, so no decider needs a lock.
Never imports torch or ray.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from everstep.actors.books import open_books, tell_resumed
from everstep.actors.checkpoints import checkpoint_desk
from everstep.actors.chronicler import Chronicler
from everstep.actors.config import Heard, Saved
from everstep.actors.endpoint import answer
from everstep.actors.host import Host
from everstep.actors.inheritance import Inheritance
from everstep.actors.quota import MakeGranter, Quota
from everstep.actors.rank_news import RankNews
from everstep.actors.reports import digest_of, domain_of, result_of, status_of
from everstep.actors.run_config import RunConfig
from everstep.actors.saves import Saves
from everstep.actors.scripted import Script
from everstep.actors.staff import Deeds, Staff
from everstep.actors.stalls import StallJudge
from everstep.actors.succession import Succession
from everstep.actors.takeover import Takeover, membership_of, mourn, settle
from everstep.actors.transactions import Outlets, Transactions
from everstep.actors.watchers import Watchers
from everstep.collectives import membership as mb
from everstep.collectives import messages as m
from everstep.collectives.control import ControlServer, Peer
from everstep.platform.cluster import saving as sv
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.admission import Admission
from everstep.platform.job.result import Failure, RunResult
from everstep.platform.job.status import Event, Status
from everstep.platform.job.versions import told_by

log = logging.getLogger(__name__)

_TICK_S = 0.1
_CHECKPOINT_GRACE_S = 60.0  # for the last checkpoint after the last step


class Supervisor:
    """One run. `start` returns at once; `wait` until there is a result; `close` ends everything."""

    def __init__(
        self,
        config: RunConfig,
        make_host: Callable[[Callable[[str, str], None]], Host],
        make_granter: MakeGranter | None = None,
    ) -> None:
        self._config = config
        self._spec = spec = config.spec
        now = time.monotonic()
        known = config.inheritance.known.standing if config.inheritance is not None else None
        self._membership = membership_of(config, now)
        self._queue: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._checkpoints = checkpoint_desk(config, self._enqueue("checkpoint"))
        self._books = open_books(
            config, self._checkpoints, lambda step: self._saves.new_folder(step), lambda event: self._said(event), now
        )
        self._desk, self._ledger, self._journal = self._books.desk, self._books.ledger, self._books.journal
        self._watchers = Watchers()
        self._stalls = StallJudge(spec.timeouts.stall_s)
        self._script = Script(spec.faults, self._watchers, known.scaled if known is not None else ())
        self._admission = Admission(known.fingerprint if known is not None else config.resume.fingerprint)
        if self._checkpoints is not None:
            self._saves = Saves(self._checkpoints, self._books, self._admission, self._now_members)
        granter = make_granter(self._enqueue("grant"), self._enqueue("refused")) if make_granter is not None else None
        self._quota = Quota(spec.ranks, granter, self._note, self._resize)
        outlets = Outlets(self._member, lambda event: self._staff.handle(event), self._end, self._scale)
        self._transactions = Transactions(self._books, self._watchers, self._checkpoints, self._script, outlets)
        self._result: RunResult | None = None
        self._failure: Failure | None = None
        self._ended_at: float | None = None
        self._last_turn = self._last_tick = now
        self._done = threading.Event()
        self._server = ControlServer(
            f"{config.bind}:0", config.token, self._enqueue("message"), self._enqueue("closed"),
            lambda data: answer(self, data), max_peers=4 * (spec.ranks.max + spec.ranks.spares) + 8,
        )  # fmt: skip
        deeds = Deeds(
            self._stop_rank,
            self._end_manager,
            lambda who: self._member(mb.Unwanted(who.soft, who.hard)),
            self._ledger.leave,
            self._journal.add,
            lambda kind, message: self._end(Failure(kind=kind, message=self._news.objection or message)),
            lambda: self._chronicler.intend(time.monotonic()),
        )
        self._staff = Staff(config, make_host(self._enqueue("exit")), self._server.address, deeds)
        frozen_s, started = spec.timeouts.frozen_s, known.standbys if known is not None else 0
        self._succession = Succession(config.plan, config.epoch, self._server.address, frozen_s, started)
        self._chronicler = Chronicler(
            self._books, self._staff, self._admission, self._quota, self._succession, self._script, self._now_members
        )
        self._news = RankNews(
            self._books, self._staff, self._watchers, self._script, self._admission, self._member, self._end,
            self._now_members,
        )  # fmt: skip
        self._takeover: Takeover | None = None
        self.superseded = 0  # the epoch that has taken over from this one: nothing may be done any more
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    # ---- for whoever runs it; any thread ----------------------------------------------------------------

    @property
    def address(self) -> str:
        return self._server.address

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once there is a result."""
        return self._done.wait(timeout_s)

    def scale(self, ranks: int) -> str:
        """Asks for a number of ranks; "" or why it cannot be."""
        low, high = self._spec.ranks.min, self._spec.ranks.max
        if not low <= ranks <= high:
            return f"{ranks} ranks: allowed are {low} to {high} (ranks.min, ranks.max)"
        if self._ended_at is not None:
            return "the run has ended"
        self._queue.put(("scale", ranks))
        return ""

    def save(self) -> str:
        """Asks for a checkpoint of the next step; "" or why there cannot be one."""
        if self._checkpoints is None:
            return "this job writes no checkpoints: set checkpoint.to"
        if self._ended_at is not None:
            return "the run has ended"
        self._queue.put(("save",))
        return ""

    def drain(self, node: str, rank: int | None) -> str:
        """Asks a node's ranks, or one rank, to leave in order; "" or why they cannot."""
        vacate, refused = self._staff.vacate(node, rank, mb.current_members(self._membership))
        if not refused:
            self._queue.put(("staff", vacate))
        return refused

    def stop(self, reason: str) -> None:
        self._queue.put(("stop", reason))

    def result(self) -> RunResult | None:
        return self._result

    def events(self, after: int) -> list[Event]:
        return self._journal.after(after)

    def status(self) -> Status:
        staff, phase = self._staff, self._transactions.phase
        leaders = self._succession.shown()
        return status_of(self._books, phase, self._membership, staff.state, self._failure, staff.host.pid, leaders)

    def end_processes(self) -> None:
        """Ends the loop and every process of the run, now if it still goes on; the endpoint stays. Idempotent."""
        self._queue.put(("close",))
        if self._thread.ident is not None:
            self._thread.join()
        if self.superseded:
            return  # they are another supervisor's
        self._staff.host.close()
        if self._result is not None:
            self._quota.leave(digest_of(self._result))
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._journal.close()

    def close(self) -> None:
        """Ends everything that the run has; idempotent."""
        self.end_processes()
        self._server.stop()

    # ---- the loop ---------------------------------------------------------------------------------------

    def _enqueue(self, kind: str) -> Callable[..., None]:
        return lambda *arguments: self._queue.put((kind, *arguments))

    def _run(self) -> None:
        if self._config.inheritance is not None:
            self._succeed(self._config.inheritance)
        else:
            tell_resumed(self._config.resume, self._journal)
            self._staff.watch_nodes(self._enqueue("staff"))
            self._quota.start()
            self._staff.handle(st.Begin())
        while not self.superseded:
            try:
                item = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                item = ("tick",)
            if item[0] == "close":
                break
            try:
                self._turn(item)
            except Exception as error:  # a bug of ours must end the run with its trace, not hang it
                log.exception("the supervisor failed")
                self._end(Failure(kind="internal", message=f"{type(error).__name__}: {error}"))
            if self._result is not None:
                self._done.set()
        if self.superseded:
            log.warning("epoch %d has taken over from epoch %d", self.superseded, self._config.epoch)
        else:
            self._finish_up("it was ended at once")
        self._done.set()

    def _turn(self, item: tuple[Any, ...]) -> None:
        now = time.monotonic()
        if now - self._last_turn > self._spec.timeouts.frozen_s / 2:  # held up: I may have been succeeded
            self.superseded = self._succession.superseded()  # before anything that waits in the queue; may take long
            now = time.monotonic()
            self._watchers.forgive(now)  # a judge that was held up believes nobody late
        self._last_turn = now
        if not self.superseded:
            self._handle(item)
        if self.superseded:
            return
        # Not after each of a step's 10,000 votes: a tick looks at every slot.
        due = item == ("tick",) or self._ended_at is not None or self._takeover is not None
        if due := due or now - self._last_tick > _TICK_S:
            self._last_tick = now
            self._tick()
            self._quota.report(st.held(self._staff.state))
        self._chronicler.look(time.monotonic(), due)

    def _succeed(self, inheritance: Inheritance) -> None:
        """This was the standby of a supervisor that is lost."""
        now, standing = time.monotonic(), inheritance.known.standing
        mourn(inheritance, self._config.epoch, self._books, now)
        self._transactions.phase = "recovering"
        self._takeover = Takeover(inheritance, self._spec.timeouts.frozen_s, now, self._enqueue("followed"))
        self._staff.watch_nodes(self._enqueue("staff"))
        self._staff.adopt(standing.located)
        self._quota.go_on(standing.wish, standing.granted, standing.grant_number, st.held(self._staff.state))
        self._takeover.start(self._config.epoch, self.address, self._config.token)

    def _handle(self, item: tuple[Any, ...]) -> None:
        match item:
            case ("message", peer, data):
                self._on_message(peer, m.decode_watcher(data))
            case ("closed", peer):
                watcher = self._watchers.of(peer)
                if lost := self._succession.gone(peer, time.monotonic()):
                    self._note("standby", lost)
                elif watcher is not None and self._ended_at is None:
                    self._watcher_lost(watcher.domain, "its stream broke")
            case ("exit", name, cause):
                if self._ended_at is None and name.startswith("rank-"):
                    self._ledger.explain(name, cause)
                    self._member_died(name, cause, 0.0)
                if mismatch := told_by(cause):
                    self._on_version(mismatch)
                self._staff.handle(st.ProcessExit(name, cause))
            case ("scale", ranks):
                self._scale(ranks)
            case ("grant", processes, reason, number):
                self._quota.granted(processes, reason, number)
            case ("refused", reason):
                self._end(Failure(kind="ranks", message=reason))
            case ("staff", event):
                self._staff.handle(event)
            case ("stop", reason):
                self._stop(reason)
            case ("save",):
                self._desk.note_saving(sv.Asked(), time.monotonic())
                self._note("save", "a checkpoint was asked for")
            case ("checkpoint", folder, step, error):
                self._saves.on_done(folder, step, error)
            case ("followed", manager, refused):
                if refused and self._takeover is not None:
                    self._takeover.refused[manager] = refused

    def _tick(self) -> None:
        now, frozen_s = time.monotonic(), self._spec.timeouts.frozen_s
        if self._transactions.phase == "training" or not self._config.embedded:
            self._succession.begin(now)  # on one machine a start has no core to spare for it
        self._succession.tick(now)
        if self._takeover is not None and self._takeover.complete(now):
            takeover, self._takeover = self._takeover, None
            for event in settle(takeover, self._staff, self._watchers, self._books, now):
                self._member(event)
        if self._ended_at is not None:
            if self._checkpoints is None or not self._checkpoints.busy:
                self._finish_up("")
            elif now - self._ended_at > _CHECKPOINT_GRACE_S:
                self._finish_up(f"the last checkpoint did not finish within {_CHECKPOINT_GRACE_S:g} s")
            return
        for watcher in self._watchers.late(now, frozen_s):
            self._staff.host.kill(self._staff.manager_of(watcher.slot))
            self._watcher_lost(watcher.domain, f"silent for {now - watcher.last_beat:.1f} s (timeouts.frozen_s)")
        if (wall := self._spec.limits.wall) is not None and self._ledger.wall_s(now) > wall:
            self._stop(f"limits.wall of {wall:g} s is reached")
        for name, cause in self._stalls.look(self._membership, now):
            self._member_died(name, cause, self._spec.timeouts.stall_s * 1000)
        if self._takeover is None:
            self._member(mb.Tick())
        self._staff.handle(st.Tick())

    def _now_members(self) -> mb.State:
        return self._membership

    def _said(self, event: Event) -> None:
        self._chronicler.said(event, time.monotonic())

    def _note(self, kind: str, text: str, **data: Any) -> None:
        self._journal.add(kind, text, data)

    # ---- messages ---------------------------------------------------------------------------------------

    def _on_message(self, peer: Peer, message: m.WatcherMessage) -> None:
        if isinstance(message, m.Watching):
            self._watchers.add(peer, message, time.monotonic())
            self._member(mb.WatcherUp(message.domain))
            return
        if isinstance(message, m.StandsBy):
            now = time.monotonic()
            known = self._chronicler.base(self._config.epoch, now)
            self._note("standby", self._succession.came(peer, message, known))
            return
        watcher = self._watchers.of(peer)
        if watcher is None:
            return
        watcher.last_beat = time.monotonic()
        match message:
            case m.FromMember(name, data):
                watcher.members.add(name)
                if self._news.heard(name, watcher, m.decode_member(data)) and self._takeover is not None:
                    self._takeover.joined.add(name)
            case m.Died(name, cause, detected_ms):
                self._member_died(name, cause, detected_ms)
            case m.Stock(id, domain, fenced, payload):
                self._member(mb.Stocked(domain, id, fenced, payload))
            case m.WatcherNote("listening", payload):
                control = msgspec.msgpack.decode(payload, type=dict[str, str])["control"]
                name = self._staff.manager_of(watcher.slot)
                self._staff.handle(st.ManagerUp(watcher.slot, name, control, watcher.fetch))
            case m.WatcherNote("saved", payload) if self._checkpoints is not None:
                self._saves.on_saved(msgspec.msgpack.decode(payload, type=Saved), watcher.domain)
            case m.WatcherNote("heard", payload) if self._takeover is not None:
                heard = msgspec.msgpack.decode(payload, type=Heard)
                self._takeover.heard[self._staff.manager_of(watcher.slot)] = heard
            case m.WatcherNote("superseded", payload):
                self.superseded = msgspec.msgpack.decode(payload, type=int)

    def _on_version(self, mismatch: str) -> None:
        """A node has another everstep. A run that trains goes on without it; one that starts is refused."""
        self._note("finding", mismatch, syndrome="version")
        if self._transactions.phase == "starting":
            self._end(Failure(kind="version", message=mismatch))

    def _stop_rank(self, name: str) -> None:
        """It leaves in order, and from now on no view may count on it."""
        self._watchers.tell_members((name,), m.Order("end", b"not needed any more"))
        self._member(mb.MemberDied(name, "not needed any more"))

    def _end_manager(self, slot: int) -> None:
        """It holds nothing that is needed: its end is no loss, and nobody waits for what it holds."""
        if (watcher := self._watchers.leave(domain_of(slot))) is not None:
            self._member(mb.WatcherLost(watcher.domain, planned=True))

    # ---- deaths -----------------------------------------------------------------------------------------

    def _member_died(self, name: str, cause: str, detected_ms: float) -> None:
        if name in self._membership.ready or self._takeover is not None:
            self._member(mb.MemberDied(name, cause, detected_ms))
            if not self._script.is_woken(name):
                self._staff.host.kill(name)

    def _watcher_lost(self, domain: str, why: str) -> None:
        watcher = self._watchers.drop(domain)
        if watcher is None:
            return
        self._note("lost", f"the manager of {domain} is lost: {why}", domain=domain)
        self._staff.handle(st.SlotLost(watcher.slot, why))
        self._member(mb.WatcherLost(domain))
        for name in sorted(watcher.members):
            self._member_died(name, f"its manager was lost ({why})", 0.0)

    def _member(self, event: mb.Event) -> None:
        if self._takeover is not None and not isinstance(event, mb.Finish):
            self._takeover.deferred.append(event)
            return
        known, now = self._membership.lost, time.monotonic()
        self._membership, commands, reason = mb.decide(self._membership, event, now)
        if self._membership.lost is not known:
            for lost in [item for item in self._membership.lost if item not in known]:
                self._transactions.lost(lost, now)
        if not isinstance(event, mb.Tick | mb.Voted | mb.Judged):
            log.info("%s", reason)
        for command in commands:
            self._transactions.do(command, now)

    # ---- requests ---------------------------------------------------------------------------------------

    def _scale(self, ranks: int) -> None:
        self._note("scale", f"asked for {ranks} ranks", ranks=ranks)
        self._quota.wished(ranks)

    def _resize(self, ranks: int, spares: int | None) -> None:
        self._staff.handle(st.Scale(ranks, spares))
        if ranks:
            self._member(mb.Retarget(ranks))

    def _stop(self, reason: str) -> None:
        if self._desk.stop_reason or self._ended_at is not None:
            return
        self._desk.stop_reason = reason
        self._note("stop", f"stopping after the step in flight: {reason}")
        if isinstance(self._membership.phase, mb.Waiting):
            self._end(None)

    # ---- the end ----------------------------------------------------------------------------------------

    def _end(self, failure: Failure | None) -> None:
        """No more steps; the result follows once checkpoints in flight are done."""
        if self._ended_at is not None:
            return
        self._failure = failure
        self._ended_at = time.monotonic()
        self._transactions.phase = "finishing"
        self._staff.handle(st.Close())
        if failure is not None:
            self._journal.add("failed", failure.message, msgspec.to_builtins(failure))
            self._member(mb.Finish(failure.message))

    def _finish_up(self, problem: str) -> None:
        if self._result is not None:
            return
        self._result = result_of(self._books, self._failure, problem, time.monotonic())
        self._ended_at = self._ended_at or time.monotonic()
        self._transactions.phase = "ended"
        self._note("ended", "the run has ended", ok=self._result.ok)
        self._succession.end(time.monotonic())
        self._watchers.end()

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

from everstep.actors.checkpoints import CheckpointDesk
from everstep.actors.config import FaultReached, Saved, TaskFailed
from everstep.actors.endpoint import answer
from everstep.actors.host import Host
from everstep.actors.journal import Journal
from everstep.actors.reports import Books, result_of, status_of
from everstep.actors.run_config import RunConfig
from everstep.actors.scripted import Script
from everstep.actors.staff import Staff
from everstep.actors.stalls import StallJudge
from everstep.actors.transactions import Outlets, Transactions
from everstep.actors.watchers import Watcher, Watchers
from everstep.collectives import membership as mb
from everstep.collectives import messages as m
from everstep.collectives.control import ControlServer, Peer
from everstep.platform.cluster import saving as sv
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.admission import Admission
from everstep.platform.cluster.desk import Desk
from everstep.platform.cluster.ledger import Ledger
from everstep.platform.job.result import Failure, RunResult
from everstep.platform.job.status import Event, Status

log = logging.getLogger(__name__)

_TICK_S = 0.1
_CHECKPOINT_GRACE_S = 60.0  # for the last checkpoint after the last step
_START_S = 120.0  # a rank may import and build this long before the run goes on without it


class Supervisor:
    """One run. `start` returns at once; `wait` until there is a result; `close` ends everything."""

    def __init__(self, config: RunConfig, make_host: Callable[[Callable[[str, str], None]], Host]) -> None:
        self._config = config
        self._spec = spec = config.spec
        now = time.monotonic()
        self._membership = mb.initial(config.epoch, spec.ranks.min, spec.ranks.max, now, patience_s=_START_S)
        self._queue: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._checkpoints: CheckpointDesk | None = None
        if spec.checkpoint is not None:
            url, done = spec.checkpoint_url(config.spec_dir), self._enqueue("checkpoint")
            assert url is not None
            self._checkpoints = CheckpointDesk(spec, url, config.epoch, done, config.commit_id)
        self._desk = Desk(spec, config.resume, self._new_folder)
        self._ledger = Ledger(config.resume.step, now)
        self._journal = Journal(config.metrics)
        urls = self._checkpoints.urls if self._checkpoints is not None else []
        self._books = Books(spec, config.host_name, time.time(), self._desk, self._ledger, self._journal, urls)
        self._watchers = Watchers()
        self._stalls = StallJudge(spec.timeouts.stall_s)
        self._script = Script(spec.faults, self._watchers)
        self._admission = Admission(config.resume.fingerprint)
        self._user_errors = 0
        self._objection = ""  # why the last rank was refused
        outlets = Outlets(self._member, lambda event: self._staff.handle(event), self._end, self._scale)
        self._transactions = Transactions(self._books, self._watchers, self._checkpoints, self._script, outlets)
        self._result: RunResult | None = None
        self._failure: Failure | None = None
        self._ended_at: float | None = None
        self._last_tick = now
        self._done = threading.Event()
        self._server = ControlServer(
            f"{config.bind}:0",
            config.token,
            self._enqueue("message"),
            self._enqueue("closed"),
            lambda data: answer(self, data),
            max_peers=2 * (spec.ranks.max + spec.ranks.spares) + 8,
        )
        common = {
            "run_id": config.run_id,
            "run_folder": str(config.run_folder),
            "token": config.token,
            "embedded": config.embedded,
        }
        self._staff = Staff(
            spec,
            common,
            config.spec_dir,
            make_host(self._enqueue("exit")),
            self._server.address,
            self._stop_rank,
            lambda kind, message: self._end(Failure(kind=kind, message=self._objection or message)),
        )
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

    def stop(self, reason: str) -> None:
        self._queue.put(("stop", reason))

    def result(self) -> RunResult | None:
        return self._result

    def events(self, after: int) -> list[Event]:
        return self._journal.after(after)

    def status(self) -> Status:
        staff, phase = self._staff, self._transactions.phase
        return status_of(self._books, phase, self._membership, staff.state, self._failure, staff.host.pid)

    def end_processes(self) -> None:
        """Ends the loop and every process of the run, now if it still goes on; the endpoint stays. Idempotent."""
        self._queue.put(("close",))
        if self._thread.ident is not None:
            self._thread.join()
        self._staff.host.close()
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
        resume = self._config.resume
        for reason in resume.passed_over:
            self._note("finding", f"a checkpoint is passed over: {reason}", syndrome="checkpoint")
        if resume.folder:
            self._note("resume", f"resuming from step {resume.step}: {resume.folder}", step=resume.step)
        self._staff.handle(st.Begin())
        while True:
            try:
                item = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                item = ("tick",)
            if item[0] == "close":
                break
            try:
                self._handle(item)
                self._tick()
            except Exception as error:  # a bug of ours must end the run with its trace, not hang it
                log.exception("the supervisor failed")
                self._end(Failure(kind="internal", message=f"{type(error).__name__}: {error}"))
            if self._result is not None:
                self._done.set()
        self._finish_up("it was ended at once")
        self._done.set()

    def _handle(self, item: tuple[Any, ...]) -> None:
        match item:
            case ("message", peer, data):
                self._on_message(peer, m.decode_watcher(data))
            case ("closed", peer):
                watcher = self._watchers.of(peer)
                if watcher is not None and self._ended_at is None:
                    self._watcher_lost(watcher.domain, "its stream broke")
            case ("exit", name, cause):
                if self._ended_at is None and name.startswith("rank-"):
                    self._ledger.explain(name, cause)
                    self._member_died(name, cause, 0.0)
                self._staff.handle(st.ProcessExit(name, cause))
            case ("scale", ranks):
                self._scale(ranks)
            case ("stop", reason):
                self._stop(reason)
            case ("save",):
                self._desk.note_saving(sv.Asked(), time.monotonic())
                self._note("save", "a checkpoint was asked for")
            case ("checkpoint", folder, step, error):
                self._on_checkpoint(folder, step, error)

    def _tick(self) -> None:
        now = time.monotonic()
        frozen_s = self._spec.timeouts.frozen_s
        overslept, self._last_tick = now - self._last_tick > frozen_s / 2, now
        if self._ended_at is not None:
            if self._checkpoints is None or not self._checkpoints.busy:
                self._finish_up("")
            elif now - self._ended_at > _CHECKPOINT_GRACE_S:
                self._finish_up(f"the last checkpoint did not finish within {_CHECKPOINT_GRACE_S:g} s")
            return
        if overslept:  # a judge that was held up itself believes nobody late
            self._watchers.forgive(now)
        for watcher in self._watchers.late(now, frozen_s):
            self._staff.host.kill(self._staff.manager_of(watcher.slot))
            self._watcher_lost(watcher.domain, f"silent for {now - watcher.last_beat:.1f} s (timeouts.frozen_s)")
        wall = self._spec.limits.wall
        if wall is not None and self._ledger.wall_s(now) > wall:
            self._stop(f"limits.wall of {wall:g} s is reached")
        for name, cause in self._stalls.look(self._membership, now):
            self._member_died(name, cause, self._spec.timeouts.stall_s * 1000)
        self._member(mb.Tick())
        self._staff.handle(st.Tick())

    def _note(self, kind: str, text: str, **data: Any) -> None:
        self._journal.add(kind, text, data)

    # ---- messages ---------------------------------------------------------------------------------------

    def _on_message(self, peer: Peer, message: m.WatcherMessage) -> None:
        if isinstance(message, m.Watching):
            self._watchers.add(peer, message, time.monotonic())
            self._member(mb.WatcherUp(message.domain))
            return
        watcher = self._watchers.of(peer)
        if watcher is None:
            return
        watcher.last_beat = time.monotonic()
        match message:
            case m.FromMember(name, data):
                watcher.members.add(name)
                self._on_member(name, watcher, m.decode_member(data))
            case m.Died(name, cause, detected_ms):
                self._member_died(name, cause, detected_ms)
            case m.Stock(id, domain, fenced, payload):
                self._member(mb.Stocked(domain, id, fenced, payload))
            case m.WatcherNote("listening", payload):
                control = msgspec.msgpack.decode(payload, type=dict[str, str])["control"]
                name = self._staff.manager_of(watcher.slot)
                self._staff.handle(st.ManagerUp(watcher.slot, name, control, watcher.fetch))
            case m.WatcherNote("saved", payload):
                self._on_saved(msgspec.msgpack.decode(payload, type=Saved), watcher.domain)

    def _on_member(self, name: str, watcher: Watcher, message: m.MemberMessage) -> None:
        match message:
            case m.Join(member, fingerprint):
                if not self._refuses(name, fingerprint):
                    self._staff.handle(st.RankReady(name))
                    self._note("ready", f"{name} is ready", name=name)
                    self._member(mb.Joined(member))
            case m.Inventory(id, payload):
                self._member(mb.Inventoried(name, id, payload))
            case m.Level(id):
                self._member(mb.Levelled(name, id))
            case m.Vote(id, step, payload):
                self._member(mb.Voted(name, id, step, payload))
            case m.Complaint(id, about, error):
                self._member(mb.Complained(name, id, about, error))
            case m.Note("fault", payload):
                self._on_fault(name, watcher, msgspec.msgpack.decode(payload, type=FaultReached))
            case m.Note("failed", payload):
                self._on_failed(name, msgspec.msgpack.decode(payload, type=TaskFailed))

    def _refuses(self, name: str, fingerprint: dict[str, str]) -> bool:
        """Ranks that would compute other bits are not let in under `exact`."""
        objection = self._admission.objection(name, fingerprint)
        if not objection:
            return False
        self._note("finding", objection, syndrome="mismatch", name=name)
        if self._spec.exact:
            self._objection = f"{objection} (exact: true)"
            self._watchers.tell_members((name,), m.Excluded(self._objection))
        return self._spec.exact

    def _on_fault(self, name: str, watcher: Watcher, reached: FaultReached) -> None:
        self._desk.fired.add(reached.index)
        self._ledger.fault_reached(time.monotonic())
        text = self._script.reached(name, watcher.domain, reached)
        self._note("fault", text, index=reached.index, name=name)

    def _on_failed(self, name: str, failed: TaskFailed) -> None:
        names = [member.name for member in mb.current_members(self._membership)]
        failure = Failure(
            kind=failed.kind,
            message=failed.message,
            step=failed.step,
            rank=names.index(name) if name in names else None,
            lane=failed.lane if failed.lane >= 0 else None,
            traceback=failed.traceback,
        )
        self._user_errors += failed.kind == "task"
        if failed.kind == "task" and (limit := self._spec.limits.user) and (limit < 0 or self._user_errors <= limit):
            # The rank's process ends by itself; another one tries again, as if the machine had failed.
            self._note("user error", f"{failed.message} ({self._user_errors} of limits.user: {limit})", name=name)
            return
        self._end(failure)

    def _stop_rank(self, name: str) -> None:
        """It leaves in order, and from now on no view may count on it."""
        self._watchers.tell_members((name,), m.Order("end", b"not needed any more"))
        self._member(mb.MemberDied(name, "not needed any more"))

    # ---- deaths -----------------------------------------------------------------------------------------

    def _member_died(self, name: str, cause: str, detected_ms: float) -> None:
        if name in self._membership.ready:
            self._member(mb.MemberDied(name, cause, detected_ms))
            if not self._script.is_woken(name):
                self._staff.host.kill(name)

    def _watcher_lost(self, domain: str, why: str) -> None:
        watcher = self._watchers.drop(domain)
        if watcher is None:
            return
        self._note("lost", f"the manager of {domain} is lost: {why}", domain=domain)
        self._member(mb.WatcherLost(domain))
        for name in sorted(watcher.members):
            self._member_died(name, f"its manager was lost ({why})", 0.0)

    # ---- deciders and their commands --------------------------------------------------------------------

    def _member(self, event: mb.Event) -> None:
        known, now = self._membership.lost, time.monotonic()
        self._membership, commands, reason = mb.decide(self._membership, event, now)
        for lost in [item for item in self._membership.lost if item not in known]:
            self._transactions.lost(lost, now)
        if not isinstance(event, mb.Tick | mb.Voted | mb.Judged):
            log.info("%s", reason)
        for command in commands:
            self._transactions.do(command, now)

    # ---- requests ---------------------------------------------------------------------------------------

    def _scale(self, ranks: int) -> None:
        self._note("scale", f"asked for {ranks} ranks", ranks=ranks)
        self._staff.handle(st.Scale(ranks))
        self._member(mb.Retarget(ranks))

    def _stop(self, reason: str) -> None:
        if self._desk.stop_reason or self._ended_at is not None:
            return
        self._desk.stop_reason = reason
        self._note("stop", f"stopping after the step in flight: {reason}")
        if isinstance(self._membership.phase, mb.Waiting):
            self._end(None)

    # ---- checkpoints ------------------------------------------------------------------------------------

    def _new_folder(self, step: int) -> str:
        assert self._checkpoints is not None
        phase = self._membership.phase
        assert isinstance(phase, mb.Gathering | mb.Active)
        id = phase.id if isinstance(phase, mb.Gathering) else phase.view.id
        files = len(mb.current_members(self._membership))
        progress = {
            "nonfinite_in_a_row": self._desk.progress.nonfinite_in_a_row,
            "fingerprint": self._admission.fingerprint,
            "metrics": self._desk.metrics(step),
        }
        return self._checkpoints.begin((id.epoch, id.number), step, files, progress)

    def _on_saved(self, saved: Saved, domain: str) -> None:
        if self._checkpoints is not None and self._checkpoints.saved(saved, domain):
            self._desk.note_saving(sv.Written(saved.step), time.monotonic())

    def _on_checkpoint(self, folder: str, step: int, error: str) -> None:
        """`folder` is "" where the checkpoint itself is whole and only the old ones could not be collected."""
        assert self._checkpoints is not None
        now, what = time.monotonic(), ""
        if not error:
            self._desk.note_saving(sv.Finished(step), now)
        elif folder:
            retry = self._desk.note_saving(sv.Failed(step), now)
            what = f"{sv.at_risk(self._desk.saving, self._ledger.step, now)}; {retry}"
        self._checkpoints.note(self._journal, folder, step, error, what)

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
        self._watchers.end()

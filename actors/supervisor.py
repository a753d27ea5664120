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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from everstep.actors.checkpoints import CheckpointDesk
from everstep.actors.config import FaultReached, ManagerConfig, RankConfig, Saved, TaskFailed, Wake
from everstep.actors.host import Host
from everstep.actors.journal import Journal
from everstep.collectives import membership as mb
from everstep.collectives import messages as m
from everstep.collectives.control import ControlServer, Peer
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.desk import Desk, Resume
from everstep.platform.cluster.ledger import Ledger
from everstep.platform.job.result import Failure, Loss, RunResult
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event, Status
from everstep.platform.training.recovery import Lost

log = logging.getLogger(__name__)

_TICK_S = 0.1
_END_GRACE_S = 5.0  # ranks end in milliseconds after the last verdict
_CHECKPOINT_GRACE_S = 60.0
_START_S = 120.0  # a rank may import and build this long before the run goes on without it


@dataclass(frozen=True)
class RunConfig:
    """Everything a supervisor needs. `host_name` is shown; `bind` is the interface to listen on."""

    spec: JobSpec
    spec_dir: Path
    run_id: str
    run_folder: Path
    token: str
    epoch: int
    resume: Resume
    metrics: Path | None
    host_name: str
    bind: str = "127.0.0.1"
    embedded: bool = True  # everything ends with the driver; else managers keep the run's memory alive


@dataclass
class _Watcher:
    peer: Peer
    slot: int
    fetch: str
    pid: int
    last_beat: float
    members: set[str] = field(default_factory=set)


class Supervisor:
    """One run. `start` returns at once; `wait` until there is a result; `close` ends everything."""

    def __init__(self, config: RunConfig, make_host: Callable[[Callable[[str, str], None]], Host]) -> None:
        spec = config.spec
        self._config = config
        self._spec = spec
        now = time.monotonic()
        slots = spec.ranks.max + spec.ranks.spares
        self._membership = mb.initial(config.epoch, spec.ranks.min, spec.ranks.max, now, patience_s=_START_S)
        self._staffing = st.initial(slots, spec.ranks.max, spec.ranks.spares, spec.limits.infrastructure)
        self._checkpoints = (
            CheckpointDesk(spec, config.spec_dir, config.epoch, self._on_checkpoint) if spec.checkpoint is not None else None
        )
        self._desk = Desk(spec, config.resume, self._new_folder)
        self._ledger = Ledger(config.resume.step, now)
        self._journal = Journal(config.metrics)
        self._queue: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._watchers: dict[str, _Watcher] = {}
        self._peer_domain: dict[int, str] = {}
        self._fingerprint: tuple[str, dict[str, str]] | None = None
        self._released: m.ViewId | None = None
        self._phase = "starting"
        self._result: RunResult | None = None
        self._failure: Failure | None = None
        self._ended_at: float | None = None
        self._last_tick = now
        self._urls: list[str] = []
        self._scales = {f.at_step: f.to for f in spec.faults if f.do == "scale" and f.to is not None}
        self._done = threading.Event()
        self._first_vote_at: float | None = None
        self._gather_since: tuple[m.ViewId, float] | None = None
        self._started_wall = time.time()
        self._server = ControlServer(
            f"{config.bind}:0", config.token, lambda peer, data: self._queue.put(("message", peer, data)),
            lambda peer: self._queue.put(("closed", peer)), self._on_call, max_peers=2 * slots + 8,
        )  # fmt: skip
        self._host = make_host(lambda name, cause: self._queue.put(("exit", name, cause)))
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
        if self._result is not None or self._ended_at is not None:
            return "the run has ended"
        self._queue.put(("scale", ranks))
        return ""

    def stop(self, reason: str) -> None:
        self._queue.put(("stop", reason))

    def result(self) -> RunResult | None:
        return self._result

    def events(self, after: int) -> list[Event]:
        return self._journal.after(after)

    def end_processes(self) -> None:
        """Ends the loop and every process of the run, now if it still goes on; the endpoint stays. Idempotent."""
        self._queue.put(("close",))
        if self._thread.ident is not None:
            self._thread.join()
        self._host.close()
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._journal.close()

    def close(self) -> None:
        """Ends everything that the run has; idempotent."""
        self.end_processes()
        self._server.stop()

    def status(self) -> Status:
        members = mb.current_members(self._membership)
        ranks = {member.name: rank for rank, member in enumerate(members)}
        shown: list[dict[str, Any]] = []
        for index, slot in enumerate(self._staffing.slots):
            if slot.trainer:
                rank = ranks.get(slot.trainer)
                state = "in view" if rank is not None else "spare" if slot.ready else "starting"
                shown.append({"name": slot.trainer, "rank": rank, "slot": index, "domain": _domain(index),
                              "pid": self._host.pid(slot.trainer), "state": state})  # fmt: skip
        step_s = self._ledger.step_s
        per_step = self._spec.lanes * self._spec.lane_batch
        samples = per_step / step_s if step_s else None
        bytes_per_sample = self._ledger.metrics.get("tokens_per_sample")
        losses = self._ledger.losses
        return Status(
            job=self._spec.name, run=self._spec.run_name, phase=self._phase, step=self._ledger.step, steps=self._spec.steps,  # type: ignore[arg-type]
            loss=losses.get(self._ledger.step), samples_per_s=samples,
            tokens_per_s=samples * bytes_per_sample if samples and bytes_per_sample else None,
            step_s=step_s, ranks=len(members), ranks_target=self._membership.target, members=shown,
            last_event=self._journal.last_text, recoveries=len(self._ledger.recoveries),
            checkpoint=self._urls[-1] if self._urls else None, started_at=self._started_wall,
            error=self._failure.message if self._failure else None, host=self._config.host_name,
        )  # fmt: skip

    def _on_call(self, data: bytes) -> bytes:
        """Unary calls of clients, from gRPC threads."""
        request = msgspec.msgpack.decode(data, type=dict[str, Any])
        match request.get("do"):
            case "status":
                answer: Any = self.status()
            case "events":
                answer = self.events(int(request["after"]))
            case "scale":
                answer = self.scale(int(request["ranks"]))
            case "stop":
                answer = self.stop(str(request["reason"]))
            case "result":
                answer = self._result
            case "wait":
                answer = self.wait(min(float(request["timeout_s"]), 30.0))
            case "close":
                answer = self.end_processes()
            case other:
                raise ValueError(f"unknown call {other!r}")
        return msgspec.json.encode(answer)

    # ---- the loop ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        resume = self._config.resume
        if resume.folder:
            self._journal.add("resume", f"resuming from step {resume.step}: {resume.folder}", {"step": resume.step, "checkpoint": resume.folder})
        self._staff(st.Begin())
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
        self._finish_up("closed")
        self._done.set()

    def _handle(self, item: tuple[Any, ...]) -> None:
        match item:
            case ("message", peer, data):
                self._on_message(peer, m.decode_watcher(data))
            case ("closed", peer):
                domain = self._peer_domain.pop(peer.ident, None)
                if domain is not None and self._ended_at is None:
                    self._watcher_lost(domain, "its stream broke")
            case ("exit", name, cause):
                if self._ended_at is None and name.startswith("rank-"):
                    self._member_died(name, cause, 0.0)
                self._staff(st.ProcessExit(name, cause))
            case ("scale", ranks):
                self._scale(ranks)
            case ("stop", reason):
                self._stop(reason)
            case ("checkpoint", folder, step, error):
                self._checkpoint_done(folder, step, error)

    def _tick(self) -> None:
        now = time.monotonic()
        overslept = now - self._last_tick > self._spec.timeouts.frozen_s / 2
        self._last_tick = now
        if self._ended_at is not None:
            if self._result is None and not (self._checkpoints is not None and self._checkpoints.busy):
                self._finish_up("")
            elif self._result is None and now - self._ended_at > _CHECKPOINT_GRACE_S:
                self._finish_up("the last checkpoint did not finish")
            return
        if overslept:  # a judge that was held up itself believes nobody late
            for watcher in self._watchers.values():
                watcher.last_beat = now
        for domain, watcher in list(self._watchers.items()):
            if now - watcher.last_beat > self._spec.timeouts.frozen_s:
                slot = self._staffing.slots[watcher.slot]
                self._host.kill(slot.manager)
                self._watcher_lost(domain, f"silent for {now - watcher.last_beat:.1f} s (timeouts.frozen_s)")
        wall = self._spec.limits.wall
        if wall is not None and self._ledger.wall_s(now) > wall and not self._desk.stop_reason:
            self._stop(f"limits.wall of {wall:g} s is reached")
        self._watch_stalls(now)
        self._member(mb.Tick())
        self._staff(st.Tick())

    def _watch_stalls(self, now: float) -> None:
        """Members that keep a view from forming or a step from being decided for stall_s are evicted."""
        limit = self._spec.timeouts.stall_s
        phase = self._membership.phase
        if isinstance(phase, mb.Gathering):
            if self._gather_since is None or self._gather_since[0] != phase.id:
                self._gather_since = (phase.id, now)
            elif now - self._gather_since[1] > limit:
                for name in sorted(phase.asked - set(phase.inventories)):
                    self._member_died(name, f"no answer for {limit:g} s (timeouts.stall_s)", limit * 1000)
        elif isinstance(phase, mb.Active) and phase.votes:
            self._first_vote_at = self._first_vote_at or now
            if now - self._first_vote_at > limit:
                missing = {member.name for member in phase.view.members} - set(phase.votes)
                for name in sorted(missing):
                    self._member_died(name, f"no vote for {limit:g} s (timeouts.stall_s)", limit * 1000)
                self._first_vote_at = None
        else:
            self._first_vote_at = None

    # ---- messages ---------------------------------------------------------------------------------------

    def _on_message(self, peer: Peer, message: m.WatcherMessage) -> None:
        domain = self._peer_domain.get(peer.ident)
        if isinstance(message, m.Watching):
            self._peer_domain[peer.ident] = message.domain
            self._watchers[message.domain] = _Watcher(peer, message.slot, message.fetch, message.pid, time.monotonic())
            self._member(mb.WatcherUp(message.domain))
            return
        if domain is None or domain not in self._watchers:
            return
        watcher = self._watchers[domain]
        watcher.last_beat = time.monotonic()
        match message:
            case m.FromMember(name, data):
                watcher.members.add(name)
                self._on_member(name, domain, m.decode_member(data))
            case m.Died(name, cause, detected_ms):
                self._member_died(name, cause, detected_ms)
            case m.Stock(id, stock_domain, fenced, payload):
                self._member(mb.Stocked(stock_domain, id, fenced, payload))
            case m.WatcherNote("listening", payload):
                note = msgspec.msgpack.decode(payload, type=dict[str, str])
                name = self._staffing.slots[watcher.slot].manager
                self._staff(st.ManagerUp(watcher.slot, name, note["control"], watcher.fetch))
            case m.WatcherNote("saved", payload):
                if self._checkpoints is not None:
                    self._checkpoints.saved(msgspec.msgpack.decode(payload, type=Saved))

    def _on_member(self, name: str, domain: str, message: m.MemberMessage) -> None:
        match message:
            case m.Join(member, fingerprint):
                if self._refuses(name, fingerprint):
                    return
                self._staff(st.RankReady(name))
                self._journal.add("ready", f"{name} is ready", {"name": name})
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
                self._on_fault(name, domain, msgspec.msgpack.decode(payload, type=FaultReached))
            case m.Note("failed", payload):
                self._on_task_failed(name, msgspec.msgpack.decode(payload, type=TaskFailed))

    def _refuses(self, name: str, fingerprint: dict[str, str]) -> bool:
        """Ranks that would compute other bits are not let in under `exact`."""
        if self._fingerprint is None:
            self._fingerprint = (name, fingerprint)
            return False
        first, reference = self._fingerprint
        differs = {k: (v, fingerprint.get(k)) for k, v in reference.items() if fingerprint.get(k) != v}
        if not differs:
            return False
        text = f"{name} would compute other bits than {first}: " + ", ".join(f"{k} {b!r} instead of {a!r}" for k, (a, b) in sorted(differs.items()))
        self._journal.add("finding", text, {"syndrome": "mismatch", "name": name})
        if not self._spec.exact:
            return False
        self._send_to((name,), m.Excluded(text + " (exact: true)"))
        return True

    def _on_fault(self, name: str, domain: str, reached: FaultReached) -> None:
        fault = self._spec.faults[reached.index]
        self._desk.fired.add(reached.index)
        self._ledger.fault_reached(time.monotonic())
        self._journal.add("fault", f"scripted: {fault.do} rank {fault.rank} ({name}) at step {reached.step}, phase {fault.phase}", {"index": reached.index, "name": name})
        if fault.wake_s is not None:
            order = m.Order("wake", msgspec.msgpack.encode(Wake(name, fault.wake_s)))
            self._watchers[domain].peer.send(m.encode(m.ToMembers((), order)))
        self._send_to((name,), m.Order("fault", msgspec.msgpack.encode(reached.index)))

    def _on_task_failed(self, name: str, failed: TaskFailed) -> None:
        rank = next((i for i, member in enumerate(mb.current_members(self._membership)) if member.name == name), None)
        self._end(
            Failure(kind=failed.kind, message=failed.message, step=failed.step, rank=rank,
                    lane=failed.lane if failed.lane >= 0 else None, traceback=failed.traceback)
        )  # fmt: skip

    # ---- deaths -----------------------------------------------------------------------------------------

    def _member_died(self, name: str, cause: str, detected_ms: float) -> None:
        if name not in self._membership.ready:
            return
        self._member(mb.MemberDied(name, cause, detected_ms))
        self._host.kill(name)

    def _watcher_lost(self, domain: str, why: str) -> None:
        watcher = self._watchers.pop(domain, None)
        if watcher is None:
            return
        self._peer_domain.pop(watcher.peer.ident, None)
        watcher.peer.close()
        self._journal.add("lost", f"the manager of {domain} is lost: {why}", {"domain": domain})
        self._member(mb.WatcherLost(domain))
        for name in sorted(watcher.members):
            self._member_died(name, f"its manager was lost ({why})", 0.0)

    # ---- deciders and their commands --------------------------------------------------------------------

    def _member(self, event: mb.Event) -> None:
        before = self._membership
        now = time.monotonic()
        self._membership, commands, reason = mb.decide(self._membership, event, now)
        for lost in self._membership.lost[len(before.lost) :] if len(self._membership.lost) > len(before.lost) else ():
            self._ledger.lost(lost, now)
            self._phase = "recovering"
            self._journal.add("lost", f"rank {lost.rank} ({lost.name}) is lost: {lost.cause}", {"rank": lost.rank, "name": lost.name, "cause": lost.cause, "detect_ms": lost.detected_ms})
        if not isinstance(event, mb.Tick | mb.Voted):
            log.info("%s", reason)
        for command in commands:
            self._do(command, now)

    def _do(self, command: mb.Command, now: float) -> None:
        match command:
            case mb.SendPrepare(prepare):
                for watcher in self._watchers.values():
                    watcher.peer.send(m.encode(m.ToMembers((), prepare)))
            case mb.Choose(id, members, inventories, stocks):
                self._choose(id, members, inventories, stocks)
            case mb.SendView(view):
                self._send_to(tuple(member.name for member in view.members), m.NewView(view))
            case mb.SendGo(view, lost):
                self._acts(view, lost, now)
            case mb.Judge(view, step, votes):
                self._judge(view, step, votes, now)
            case mb.SendVerdict(view, step, payload, reform):
                if reform:
                    self._ledger.pause(now)
                self._send_to(tuple(member.name for member in view.members), m.Verdict(view.id, step, payload, reform))
            case mb.Refuse(name, reason):
                self._send_to((name,), m.Excluded(reason))
            case mb.Fail(reason):
                self._end(Failure(kind="infrastructure", message=reason))

    def _choose(self, id: m.ViewId, members: tuple[m.Member, ...], inventories: Any, stocks: Any) -> None:
        try:
            choice = self._desk.choose(members, inventories, stocks)
        except Lost as error:
            self._member(mb.Unchoosable(id, str(error)))
            return
        if self._checkpoints is not None:
            self._checkpoints.abandon(choice.base_step)
        fetch = {domain: watcher.fetch for domain, watcher in self._watchers.items()}
        payload = msgspec.msgpack.encode(self._desk.plan(choice, fetch))
        log.info("view %s: %s", id, choice.reason)
        self._member(mb.Chosen(id, choice.base_step, payload))

    def _acts(self, view: m.View, lost: tuple[m.Lost, ...], now: float) -> None:
        self._ledger.acts(view.base_step, len(view.members), now)
        names = tuple(member.name for member in view.members)
        self._phase = "training"
        self._journal.add("view", f"view {view.id} acts from step {view.base_step} with {len(names)} ranks: {', '.join(names)}", {"view": str(view.id), "step": view.base_step, "ranks": len(names), "members": list(names)})
        self._send_to(names, m.Go(view.id))
        self._staff(st.ViewActs(frozenset(names)))

    def _judge(self, view: m.View, step: int, votes: Any, now: float) -> None:
        self._first_vote_at = None
        judgement = self._desk.judge(step, votes)
        verdict = judgement.verdict
        if verdict.outcome == "failed":
            kind = "nonfinite" if "finite" in verdict.error else "task"
            self._end(Failure(kind=kind, message=verdict.error, step=step))
            return
        if verdict.outcome in ("commit", "skip"):
            self._committed(step, judgement, now)
        if verdict.protected_step >= view.base_step and self._released != view.id:
            self._released = view.id  # the new layout is protected: segments of older ones may go
            order = m.Order("release", msgspec.msgpack.encode(view.id.number))
            for watcher in self._watchers.values():
                watcher.peer.send(m.encode(m.ToMembers((), order)))
        self._member(mb.Judged(view.id, step, msgspec.msgpack.encode(verdict), judgement.finished))
        if judgement.finished:
            self._end(None)

    def _committed(self, step: int, judgement: Any, now: float) -> None:
        verdict = judgement.verdict
        stalls = [vote.stall_s for vote in judgement.votes.values()]
        recoveries = len(self._ledger.recoveries)
        spent = self._ledger.committed(step, verdict.loss, verdict.metrics, stalls, verdict.outcome == "skip", now)
        self._journal.metrics(step, verdict, spent, judgement.votes)
        for recovery in self._ledger.recoveries[recoveries:]:
            self._journal.add("recovered", f"recovered from {recovery.cause}: detected after {recovery.detect_ms:.0f} ms, next step committed after {recovery.resume_ms:.0f} ms, {recovery.steps_lost} steps lost", msgspec.to_builtins(recovery))
        if verdict.outcome == "skip":
            self._journal.add("skip", f"step {step} is skipped: loss or gradients are not finite", {"step": step})
        if verdict.last:
            self._phase = "finishing"
        if step in self._scales:
            self._scale(self._scales.pop(step))

    def _staff(self, event: st.Event) -> None:
        self._staffing, commands, reason = st.decide(self._staffing, event, time.monotonic())
        if isinstance(event, st.ProcessExit) and self._ended_at is None:
            log.info("%s", reason)
        for command in commands:
            match command:
                case st.StartManager(slot, name):
                    self._host.start("manager", name, slot, msgspec.msgpack.encode(self._manager_config(slot, name)))
                case st.StartRank(slot, name):
                    self._host.start("rank", name, slot, msgspec.msgpack.encode(self._rank_config(slot, name)))
                case st.StopRank(name):
                    self._send_to((name,), m.Order("end", b"not needed any more"))
                case st.GiveUp(kind, message):
                    self._end(Failure(kind=kind, message=message))

    def _manager_config(self, slot: int, name: str) -> ManagerConfig:
        c = self._config
        return ManagerConfig(c.run_id, str(c.run_folder), name, slot, _domain(slot), c.token, self.address, self._spec.timeouts.frozen_s, c.embedded)

    def _rank_config(self, slot: int, name: str) -> RankConfig:
        c, place = self._config, self._staffing.slots[slot]
        return RankConfig(
            c.run_id, str(c.run_folder), name, slot, _domain(slot), c.token, place.control, place.fetch,
            self._spec.to_dict(), str(c.spec_dir),
        )  # fmt: skip

    def _send_to(self, names: tuple[str, ...], message: m.CoordinatorMessage) -> None:
        for watcher in self._watchers.values():
            local = tuple(name for name in names if name in watcher.members)
            if local:
                watcher.peer.send(m.encode(m.ToMembers(local, message)))

    # ---- requests ---------------------------------------------------------------------------------------

    def _scale(self, ranks: int) -> None:
        self._journal.add("scale", f"asked for {ranks} ranks", {"ranks": ranks})
        self._staff(st.Scale(ranks))
        self._member(mb.Retarget(ranks))

    def _stop(self, reason: str) -> None:
        if self._desk.stop_reason or self._ended_at is not None:
            return
        self._desk.stop_reason = reason
        self._journal.add("stop", f"stopping after the step in flight: {reason}", {})
        if isinstance(self._membership.phase, mb.Waiting):
            self._end(None)

    # ---- checkpoints ------------------------------------------------------------------------------------

    def _new_folder(self, step: int) -> str:
        assert self._checkpoints is not None
        files = len(mb.current_members(self._membership))
        return self._checkpoints.begin(step, files, {"nonfinite_in_a_row": self._desk.progress.nonfinite_in_a_row})

    def _on_checkpoint(self, folder: str, step: int, error: str) -> None:
        self._queue.put(("checkpoint", folder, step, error))

    def _checkpoint_done(self, folder: str, step: int, error: str) -> None:
        if error:
            self._journal.add("finding", f"the checkpoint of step {step} failed: {error}", {"syndrome": "checkpoint", "step": step, "error": error})
        else:
            self._urls.append(folder)
            self._journal.add("checkpoint", f"checkpoint of step {step}: {folder}", {"step": step, "checkpoint": folder})

    # ---- the end ----------------------------------------------------------------------------------------

    def _end(self, failure: Failure | None) -> None:
        """No more steps; the result follows once checkpoints in flight are done."""
        if self._ended_at is not None:
            return
        self._failure = failure
        self._ended_at = time.monotonic()
        self._phase = "finishing"
        self._staff(st.Close())
        if failure is not None:
            self._journal.add("failed", failure.message, msgspec.to_builtins(failure))
            self._member(mb.Finish(failure.message))

    def _finish_up(self, problem: str) -> None:
        if self._result is not None:
            return
        now = time.monotonic()
        ledger, desk = self._ledger, self._desk
        losses = ledger.committed_losses()
        complete = bool(desk.state_sha256) and self._failure is None
        stopped = bool(desk.stop_reason) and ledger.step < self._spec.steps
        failure = self._failure
        if failure is None and not complete and not stopped:
            failure = Failure(kind="internal", message=problem or "the run was ended before its last step")
        goodput = ledger.goodput(now)
        self._result = RunResult(
            job=self._spec.name, run=self._spec.run_name, ok=complete and not stopped, steps=ledger.step, state_sha256=desk.state_sha256,
            loss=Loss(first=losses[0] if losses else None, last=losses[-1] if losses else None), losses=losses,
            wall_s=ledger.wall_s(now), ranks_final=ledger.ranks,
            recoveries=ledger.recoveries, rescales=ledger.rescales, snapshots=ledger.snapshots(), checkpoints=self._urls,
            findings=self._journal.findings, goodput=goodput, host=self._config.host_name, skipped=ledger.skipped,
            stopped=stopped, metrics=ledger.metrics, error=failure,
        )  # fmt: skip
        self._phase = "ended"
        self._journal.add("ended", "the run has ended", {"ok": self._result.ok})
        for watcher in self._watchers.values():
            self._send_end(watcher)

    def _send_end(self, watcher: _Watcher) -> None:
        if watcher.members:
            watcher.peer.send(m.encode(m.ToMembers(tuple(watcher.members), m.Order("end", b"the run has ended"))))
        watcher.peer.send(m.encode(m.ToMembers((), m.Order("end", b""))))


def _domain(slot: int) -> str:
    """In the embedded mode a failure domain is a rank's slot."""
    return f"slot-{slot}"

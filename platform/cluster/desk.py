"""What a supervisor decides about training: base steps, verdicts, checkpoints due, the end of the run.

Pure but for what its caller hands in (a folder for a due checkpoint). No torch, no Ray, no clock.
Belongs to the supervisor's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from everstep.collectives.messages import Member
from everstep.platform.cluster import chronicle as ch
from everstep.platform.cluster import interval as iv
from everstep.platform.cluster import saving as sv
from everstep.platform.job.spec import Fault, JobSpec
from everstep.platform.training.messages import Inventory, LiveFault, StockReader, Verdict, ViewPlan, Vote
from everstep.platform.training.protection import parity_plan
from everstep.platform.training.recovery import Choice, choose
from everstep.platform.training.verdict import Progress, Rules, average, judge_step
from everstep.storage.index import StateIndex
from everstep.storage.state_hash import combine


@dataclass(frozen=True)
class Resume:
    """Where the run starts: a checkpoint's folder and index, or nothing."""

    folder: str = ""
    index: StateIndex | None = None
    nonfinite_in_a_row: int = 0
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()  # newer checkpoints that do not verify, and why

    @property
    def step(self) -> int:
        return self.index.step if self.index is not None else 0


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    votes: Mapping[str, Vote]
    finished: bool = False
    reason: str = ""  # of a new interval between snapshots
    evaluation: Mapping[str, float] = field(default_factory=dict)  # of the step before, by metric
    saving: str = ""  # why a checkpoint that is due does not begin, if that is news


@dataclass
class Desk:
    """`new_folder(step)` names the folder of a checkpoint that is to be written now."""

    spec: JobSpec
    resume: Resume
    new_folder: Callable[[int], str]
    progress: Progress = field(default_factory=Progress)
    fired: set[int] = field(default_factory=set)
    stop_reason: str = ""
    last_step: int | None = None  # the step after which sealing and hashing follow
    state_sha256: str = ""
    failure: str = ""
    sealed: dict[tuple[tuple[int, int], int], set[str]] = field(default_factory=dict)  # (view, step) -> domains, then
    damaged: frozenset[tuple[str, str]] = frozenset()  # (domain, segment) that the members of the newest view found

    def __post_init__(self) -> None:
        self.progress = Progress(self.resume.nonfinite_in_a_row)
        self.stored = self.resume  # the newest checkpoint, for when memory cannot serve
        clip = self.spec.train.clip_norm
        self._rules = Rules(self.spec.lanes, clip, self.spec.limits.nonfinite)
        self.shadow = self.spec.snapshot.redundancy == "shadow"
        self._pace = iv.Pace(self.spec.snapshot.share)
        self.interval = 0  # steps between snapshots; 0 where none are taken
        every = self.spec.checkpoint.every if self.spec.checkpoint is not None else 0
        self.saving = sv.Saving(every, good_step=self.resume.step if self.resume.folder else -1)
        self._metrics: tuple[int, dict[str, float]] = (-1, {})  # of the newest step
        self._progress_at = {self.resume.step: self.progress}
        self._snapshot_step = self.resume.step  # of the newest one that was begun
        if self.resume.step >= self.spec.steps:
            self.last_step = self.resume.step

    def go_on(self, known: ch.Chronicle) -> None:
        """What the supervisor before this one had decided and was asked."""
        standing = known.standing
        self.fired, self.stop_reason, self.last_step = set(standing.fired), standing.stop_reason, standing.last_step
        self._progress_at |= {step: Progress(row) for step, row in known.rows.items()}
        self.progress = self._progress_at.get(known.account.step, self.progress)
        # Whatever was being written is nobody's any more, and pauses were by another clock.
        saving = standing.saving
        lost = bool(saving.writing or saving.written)
        self.saving = msgspec.structs.replace(
            saving, writing=(), written=(), due=saving.due or lost, not_before_s=0.0, good_at_s=0.0
        )

    def heard(self, step: int, verdict: Verdict) -> None:
        """A verdict of the supervisor before this one, which its books do not have."""
        skipped = verdict.outcome == "skip"
        self.progress = Progress(self.progress.nonfinite_in_a_row + 1 if skipped else 0)
        self._progress_at[step] = self.progress
        if verdict.last:
            self.last_step = step

    def row(self, step: int) -> int:
        """Steps in a row up to `step` that were not finite."""
        return self._progress_at.get(step, self.progress).nonfinite_in_a_row

    def rows(self) -> dict[int, int]:
        return {step: progress.nonfinite_in_a_row for step, progress in self._progress_at.items()}

    def choose(
        self, members: tuple[Member, ...], inventories: Mapping[str, bytes], stocks: Mapping[str, bytes]
    ) -> Choice:
        """Raises recovery.Lost."""
        decoded = {name: msgspec.msgpack.decode(data, type=Inventory) for name, data in inventories.items()}
        read = StockReader().read
        held = {domain: read(data) for domain, data in stocks.items()}
        names = [m.name for m in members]
        self.sealed = {}
        for domain, stock in held.items():
            for version in stock.versions:
                self.sealed.setdefault((version.view, version.index.step), set()).add(domain)
        self.damaged = frozenset(item for inventory in decoded.values() for item in inventory.damaged)
        choice = choose(names, decoded, held, self.stored.index, self.resume.step, self.shadow)
        self.progress = self._progress_at.get(choice.base_step, self.progress)
        return choice

    def metrics(self, step: int) -> dict[str, float]:
        """Loss, gradient norm and the task's metrics of the newest step, if that is `step`."""
        return dict(self._metrics[1]) if self._metrics[0] == step else {}

    def note_saving(self, event: sv.Event, now: float) -> str:
        """What has become of a checkpoint, or that somebody asks for one; what follows, for people."""
        self.saving, _, reason = sv.decide(self.saving, event, now)
        return reason

    def plan(self, choice: Choice, fetch: dict[str, str], domains: Sequence[str], save: bool = False) -> ViewPlan:
        """`fetch`: domain -> where its manager serves segments; `domains`: what each rank dies with.

        `save`: the checkpoint of the base step was not finished, and nobody comes to that step again.
        """
        faults = tuple(f for f in live_faults(self.spec.faults) if f.index not in self.fired)
        final = self.last_step is not None and choice.base_step >= self.last_step
        folder = self.stored.folder if choice.from_checkpoint else ""
        self._snapshot_step = choice.base_step
        self._pace = iv.acts(self._pace)
        if save:
            self.note_saving(sv.Begun(choice.base_step), 0.0)
        return ViewPlan(
            choice.owned,
            choice.have,
            folder,
            faults,
            self.progress.nonfinite_in_a_row,
            final,
            fetch,
            choice.shadowed,
            parity_plan(domains, self.parity),
            choice.rebuilds,
            self.new_folder(choice.base_step) if save else "",
        )

    def judge(self, step: int, votes: Mapping[str, bytes], step_s: float = 0.0, now: float = 0.0) -> Judgement:
        """The one verdict over all votes on `step`, which took `step_s`; `now` is for pauses between checkpoints."""
        decoded = {name: msgspec.msgpack.decode(data, type=Vote) for name, data in votes.items()}
        kinds = {vote.kind for vote in decoded.values()}
        assert len(kinds) == 1, f"votes of different kinds on step {step}: {sorted(kinds)}"
        kind = kinds.pop()
        evaluation = average(decoded, self.spec.lanes)
        protected = min(vote.sealed_step for vote in decoded.values())
        if kind == "seal":
            return Judgement(Verdict("sealed", protected_step=protected), decoded, evaluation=evaluation)
        if kind == "hash":
            lines = [line for name in sorted(decoded) for line in decoded[name].hash_lines]
            self.state_sha256 = combine(lines, step - 2)
            return Judgement(Verdict("finished", protected_step=protected), decoded, finished=True)
        verdict, self.progress = judge_step(step, decoded, self._rules, self.progress)
        self._progress_at[step] = self.progress
        if verdict.outcome == "failed":
            self.failure = verdict.error
            return Judgement(verdict, decoded)
        # [Note: one at a time] Ranks wait before a step that a snapshot may follow; a stop they cannot foresee.
        ready = protected >= self._snapshot_step
        last = step >= self.spec.steps or (bool(self.stop_reason) and ready)
        if last:
            self.last_step = step
        self._metrics = (step, {"loss": verdict.loss, "grad_norm": verdict.grad_norm, **verdict.metrics})
        self.saving, due, saving = sv.decide(self.saving, sv.Committed(step, ready, last), now)
        # A shadow stands in for snapshots; a view of one rank has none.
        shadowed = self.shadow and len(decoded) > 1 and self.spec.snapshot.every == "auto"
        interval, gap, reason = self.spec.steps, self.spec.steps, ""
        if not shadowed:
            interval, gap, reason = self._paced(step_s, decoded, ready)
        self.interval = 0 if shadowed else interval
        snapshot = last or due or (ready and step - self._snapshot_step >= gap)
        if snapshot:
            self._snapshot_step = step
            self._pace = iv.begun(self._pace)
        verdict = msgspec.structs.replace(
            verdict,
            last=last,
            snapshot=snapshot,
            interval=0 if self.stop_reason else interval,
            checkpoint=self.new_folder(step) if due else "",
        )
        return Judgement(verdict, decoded, reason=reason, evaluation=evaluation, saving=saving)

    def _paced(self, step_s: float, votes: Mapping[str, Vote], protected: bool) -> tuple[int, int, str]:
        """(interval, steps from the newest snapshot to the next, why if that is news)"""
        every = self.spec.snapshot.every
        if every != "auto":
            return int(every), int(every), ""
        stall_s = max(vote.stall_s for vote in votes.values())
        cpu_s = sum(vote.background_s for vote in votes.values())
        self._pace, reason = iv.decide(self._pace, iv.Step(step_s, stall_s, cpu_s, protected))
        return self._pace.interval, self._pace.gap, reason

    @property
    def parity(self) -> int:
        """How many domains' parity is kept: none where every rank holds everything, or another one's mirror."""
        return 0 if self.shadow or self.spec.layout.zero == 0 else self.spec.snapshot.parity


def live_faults(faults: tuple[Fault, ...]) -> list[LiveFault]:
    """The job's faults that a rank strikes on itself, with their place in the list."""
    found = []
    for index, fault in enumerate(faults):
        if fault.do != "scale" and fault.rank is not None:
            wake = -1.0 if fault.wake_s is None else fault.wake_s
            found.append(
                LiveFault(
                    index,
                    fault.at_step,
                    fault.rank,
                    fault.do,
                    fault.phase or "gradient",
                    fault.seconds or 0.0,
                    wake,
                    fault.factor or 1.0,
                    fault.steps or 1,
                )
            )
    return found

"""What a supervisor decides about training: verdicts, due snapshots and checkpoints, faults, the end, resume."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from everstep.collectives.messages import Member
from everstep.platform.cluster.desk import Desk, Judgement, Resume, live_faults
from everstep.platform.cluster.saving import Finished
from everstep.platform.job.spec import JobSpec
from everstep.platform.training.layout import rows_of
from everstep.platform.training.messages import Inventory, LaneLoss, SealedVersion, Stock, ViewPlan, Vote
from everstep.platform.training.recovery import Lost
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
from everstep.storage.state_hash import combine, tensor_line

NAMES = ("rank-0.1", "rank-1.1")
MEMBERS = tuple(Member(name, i, f"slot-{i}", f"h:{i}") for i, name in enumerate(NAMES))
W = TensorMeta("w", "param", "float32", (8,))
UNITS = ((0, 8), (8, 16))
encode = msgspec.msgpack.encode


def spec(**changes: Any) -> JobSpec:
    plain = {"name": "job", "task": "t.py:T", "steps": 10, "lanes": 2, "ranks": {"min": 1, "max": 2, "spares": 0}}
    return JobSpec.parse({**plain, "train": {"clip_norm": None}, **changes})


def desk(resume: Resume | None = None, new_folder: Callable[[int], str] | None = None, **changes: Any) -> Desk:
    return Desk(spec(**changes), resume or Resume(), new_folder or (lambda step: f"step-{step}"))


def vote(lane: int, loss: float = 1.0, sealed: int = -1) -> Vote:
    blocks = array.array("d", [1.0]).tobytes()
    return Vote("step", losses=(LaneLoss(lane, loss, 1.0),), norm_blocks=blocks, sealed_step=sealed)


def judged(made: Desk, step: int, *votes: Vote) -> Judgement:
    given = votes or (vote(0, sealed=step - 1), vote(1, sealed=step - 1))
    return made.judge(step, {name: encode(v) for name, v in zip(NAMES, given, strict=False)})


def written(made: Desk, step: int) -> Judgement:
    """A step whose checkpoint, if there is one, is whole before the next."""
    judgement = judged(made, step)
    if judgement.verdict.checkpoint:
        made.note_saving(Finished(step), 0.0)
    return judgement


def index(step: int, kind: str = "segment") -> StateIndex:
    source = Source(kind, "slot-0" if kind == "segment" else "", f"{kind}-{step}")
    return StateIndex(step, (W,), (Fragment("w", "param", 0, 8, source, 0),))


def sealed(index: StateIndex, view: tuple[int, int] = (1, 1)) -> SealedVersion:
    return SealedVersion(view, f"segment-{index.step}", index)


def chosen(made: Desk, *versions: StateIndex, held: int = 2) -> ViewPlan:
    inventories = {
        name: encode(Inventory(-1, (UNITS[i],), None, rows_of(UNITS))) for i, name in enumerate(NAMES[:held])
    }
    stocks = {"slot-0": encode(Stock(tuple(map(sealed, versions))))}
    choice = made.choose(MEMBERS[:held], inventories, stocks)
    return made.plan(choice, {"slot-0": "h:9"}, [f"slot-{rank}" for rank in range(len(choice.owned))])


# ---- verdicts -------------------------------------------------------------------------------------------


def test_a_step_gets_one_verdict_over_all_votes() -> None:
    made = desk()
    found = judged(made, 1, vote(0, 2.0, sealed=0), vote(1, 4.0, sealed=-1))
    assert (found.verdict.outcome, found.verdict.loss, found.verdict.protected_step) == ("commit", 3.0, -1)
    assert (found.verdict.last, found.verdict.checkpoint, found.finished) == (False, "", False)
    assert set(found.votes) == set(NAMES)


def test_after_the_last_step_come_the_seal_and_the_hash() -> None:
    made = desk(steps=3)
    assert not judged(made, 2).verdict.last
    last = judged(made, 3).verdict
    assert (last.last, last.snapshot, made.last_step) == (True, True, 3)
    sealed = judged(made, 4, Vote("seal", sealed_step=3), Vote("seal", sealed_step=2))
    assert (sealed.verdict.outcome, sealed.verdict.protected_step, sealed.finished) == ("sealed", 2, False)
    digest = hashlib.sha256(b"").hexdigest()
    lines = [tensor_line(TensorMeta(name, "param", "float32", (0,)), digest) for name in "abc"]
    votes = Vote("hash", hash_lines=(lines[2], lines[0])), Vote("hash", hash_lines=(lines[1],))
    finished = judged(made, 5, *votes)
    assert (finished.verdict.outcome, finished.finished) == ("finished", True)
    assert made.state_sha256 == combine(lines, 3)


def test_votes_of_different_kinds_on_one_step_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="different kinds"):
        judged(desk(), 4, vote(0), Vote("seal"))


def test_too_many_steps_that_are_not_finite_end_the_run() -> None:
    made = desk(limits={"nonfinite": 2})
    nan = float("nan")
    assert judged(made, 1, vote(0, nan), vote(1)).verdict.outcome == "skip"
    assert judged(made, 2).verdict.outcome == "commit"
    assert judged(made, 3, vote(0, nan), vote(1)).verdict.outcome == "skip"
    failed = judged(made, 4, vote(0, nan), vote(1)).verdict
    assert failed.outcome == "failed"
    assert made.failure == failed.error != ""
    assert made.last_step is None


def test_a_row_of_skips_is_that_of_the_base_step_after_a_rollback() -> None:
    """What was skipped and is skipped again counts once."""
    made = desk(limits={"nonfinite": 3})
    bad = (vote(0, float("nan")), vote(1))
    for step in (1, 2):
        assert judged(made, step, *bad).verdict.outcome == "skip"
    plan = chosen(made, index(1))
    assert plan.nonfinite_in_a_row == 1
    assert judged(made, 2, *bad).verdict.outcome == "skip"
    assert judged(made, 3, *bad).verdict.outcome == "failed"


# ---- snapshots and checkpoints --------------------------------------------------------------------------


def test_checkpoints_are_due_every_so_often_and_at_the_end() -> None:
    asked: list[int] = []

    def new_folder(step: int) -> str:
        asked.append(step)
        return f"folder-{step}"

    made = desk(new_folder=new_folder, steps=7, checkpoint={"to": "runs", "every": 3}, snapshot={"every": 5})
    verdicts = {step: written(made, step).verdict for step in range(1, 8)}
    assert asked == [3, 6, 7]
    assert {step: v.checkpoint for step, v in verdicts.items() if v.checkpoint} == {s: f"folder-{s}" for s in asked}
    assert [step for step, v in verdicts.items() if v.snapshot] == [3, 6, 7], "a checkpoint is made of a snapshot"


def test_snapshots_come_every_so_many_steps_after_the_one_before() -> None:
    made = desk(steps=9, checkpoint=None, snapshot={"every": 3})
    assert [step for step in range(1, 10) if judged(made, step).verdict.snapshot] == [3, 6, 9]
    assert judged(desk(steps=9, snapshot={"every": 3}), 1).verdict.interval == 3


def test_no_snapshot_is_begun_before_the_newest_is_protected() -> None:
    made = desk(steps=9, checkpoint=None, snapshot={"every": 2})
    late = (vote(0, sealed=0), vote(1, sealed=2))
    assert judged(made, 2, vote(0, sealed=0), vote(1, sealed=0)).verdict.snapshot
    assert not judged(made, 4, *late).verdict.snapshot
    made.stop_reason = "enough"
    waiting = judged(made, 5, *late).verdict
    assert (waiting.last, waiting.interval) == (False, 0), "the ranks wait before they vote again"
    assert judged(made, 6, vote(0, sealed=2), vote(1, sealed=2)).verdict.last


def test_without_checkpoints_none_is_ever_begun() -> None:
    made = desk(new_folder=lambda step: pytest.fail("no checkpoint was asked for"), steps=2, checkpoint=None)
    assert [judged(made, step).verdict.snapshot for step in (1, 2)] == [True, True]


def test_a_checkpoint_waits_for_the_one_before_and_the_run_goes_on() -> None:
    made = desk(steps=4, checkpoint={"to": "runs", "every": 1})
    assert [judged(made, step).verdict.checkpoint for step in (1, 2)] == ["step-1", ""]
    late = judged(made, 3)
    assert (late.verdict.outcome, late.verdict.checkpoint) == ("commit", "")
    assert late.saving == "the checkpoint due at step 3 waits for that of step 1"
    assert judged(made, 4).verdict.checkpoint == "step-4", "the last one does not wait"


def test_metrics_are_those_of_the_step_that_was_judged() -> None:
    made = desk(checkpoint={"to": "runs", "every": 1})
    judged(made, 1, vote(0, 2.0), vote(1, 4.0))
    assert made.metrics(1)["loss"] == 3.0
    assert made.metrics(2) == {}


def test_an_evaluation_is_averaged_over_all_lanes_and_told_with_the_next_step() -> None:
    made = desk()
    parts = [(LaneLoss(0, 3.0, 1.0, {"right": 1.0}),), (LaneLoss(1, 5.0, 3.0, {"right": 0.0}),)]
    votes = [msgspec.structs.replace(vote(lane), evaluation=parts[lane]) for lane in (0, 1)]
    assert judged(made, 5, *votes).evaluation == {"eval.loss": 2.0, "eval.right": 0.25}
    assert judged(made, 6).evaluation == {}
    seals = [Vote("seal", evaluation=part) for part in parts]
    assert judged(made, 7, *seals).evaluation["eval.loss"] == 2.0
    assert judged(made, 8, votes[0], vote(1)).evaluation == {}, "a lane is missing"


def test_a_stop_makes_the_step_in_flight_the_last() -> None:
    made = desk(checkpoint={"to": "runs", "every": 100})
    judged(made, 1)
    made.stop_reason = "enough"
    verdict = judged(made, 2).verdict
    assert (verdict.last, verdict.snapshot, verdict.checkpoint, made.last_step) == (True, True, "step-2", 2)
    assert chosen(made, index(2)).final, "a recovery after it only seals and hashes"
    assert not chosen(made, index(1)).final, "one from before it has a step to do again"


def test_shadows_stand_in_for_snapshots_but_for_checkpoints_and_the_end() -> None:
    shadow = {"redundancy": "shadow"}
    made = desk(steps=7, checkpoint={"to": "runs", "every": 3}, snapshot=shadow)
    verdicts = [written(made, step).verdict for step in range(1, 8)]
    assert [v.snapshot for v in verdicts] == [False, False, True, False, False, True, True]
    assert {v.interval for v in verdicts} == {7}, "nobody waits for one that does not come"
    assert made.parity == 0


def test_without_a_shadow_snapshots_are_taken_all_the_same() -> None:
    """In a view of one rank, and where the job says how often."""
    made = desk(steps=7, snapshot={"redundancy": "shadow"})
    alone = [made.judge(step, {"rank-0.1": encode(both(step))}).verdict for step in (1, 2)]
    assert [(v.snapshot, v.interval) for v in alone] == [(True, 1), (True, 1)]
    every = desk(steps=7, snapshot={"redundancy": "shadow", "every": 2})
    assert [judged(every, step).verdict.snapshot for step in range(1, 5)] == [False, True, False, True]


def both(step: int) -> Vote:
    """The vote of a rank that has both lanes."""
    return msgspec.structs.replace(vote(0, sealed=step - 1), losses=vote(0).losses + vote(1).losses)


# ---- views ----------------------------------------------------------------------------------------------


def test_a_checkpoint_that_the_former_view_could_not_finish_is_written_by_the_new_one() -> None:
    """The base step is that of the checkpoint, so no verdict will ask for it again."""
    made = desk(steps=7, checkpoint={"to": "runs", "every": 3})
    inventories = {name: encode(Inventory(-1, (UNITS[i],), None, rows_of(UNITS))) for i, name in enumerate(NAMES)}
    stocks = {"slot-0": encode(Stock((sealed(index(3), (1, 2)), sealed(index(2), (1, 1)))))}
    choice = made.choose(MEMBERS, inventories, stocks)
    assert made.sealed == {((1, 2), 3): {"slot-0"}, ((1, 1), 2): {"slot-0"}}
    domains = ["slot-0", "slot-1"]
    assert made.plan(choice, {}, domains).save == ""
    assert made.plan(choice, {}, domains, save=True).save == "step-3"


def test_shadows_are_in_the_plan() -> None:
    assert chosen(desk(), index(4)).shadowed == ()
    plan = chosen(desk(snapshot={"redundancy": "shadow"}), index(4))
    assert plan.shadowed == (plan.owned[1], plan.owned[0])


def test_a_plan_says_who_owns_what_and_where_the_bytes_are() -> None:
    plan = chosen(desk(), index(4), index(3))
    assert plan.owned == (((0, 8),), ((8, 16),))
    assert plan.have is not None
    assert plan.have.step == 4
    assert (plan.checkpoint, plan.final, plan.fetch) == ("", False, {"slot-0": "h:9"})


def test_a_new_run_starts_from_the_seed() -> None:
    plan = chosen(desk())
    assert (plan.have, plan.nonfinite_in_a_row) == (None, 0)


def test_a_resumed_run_starts_from_its_checkpoint_until_memory_is_newer() -> None:
    resume = Resume("/runs/step-5", index(5, "file"), nonfinite_in_a_row=1)
    assert (resume.step, Resume().step) == (5, 0)
    made = desk(resume, limits={"nonfinite": 3})
    plan = chosen(made)
    assert plan.have is not None
    assert (plan.have.step, plan.checkpoint, plan.nonfinite_in_a_row) == (5, "/runs/step-5", 1)
    judged(made, 6)
    later = chosen(made, index(6))
    assert later.have is not None
    assert (later.have.step, later.checkpoint, later.nonfinite_in_a_row) == (6, "", 0)
    back = chosen(made)
    assert back.have is not None
    assert (back.have.step, back.checkpoint, back.nonfinite_in_a_row) == (5, "/runs/step-5", 1)


def test_a_checkpoint_that_this_run_wrote_serves_where_memory_cannot() -> None:
    made = desk()
    judged(made, 1)
    made.stored = Resume("/runs/step-1", index(1, "file"))
    plan = chosen(made)
    assert plan.have is not None
    assert (plan.have.step, plan.checkpoint) == (1, "/runs/step-1")


def test_a_run_that_had_ended_is_only_sealed_and_hashed_again() -> None:
    made = desk(Resume("/runs/step-10", index(10, "file")), steps=10)
    assert made.last_step == 10
    assert chosen(made).final


def test_where_nothing_is_covered_a_resumed_run_says_so() -> None:
    made = desk(Resume("/runs/step-5", StateIndex(5, (W,), ())))
    with pytest.raises(Lost):
        chosen(made)


# ---- faults ---------------------------------------------------------------------------------------------

FAULTS = [
    {"at_step": 2, "rank": 1, "do": "kill", "phase": "vote"},
    {"at_step": 3, "do": "scale", "to": 1},
    {"at_step": 4, "rank": 0, "do": "freeze", "wake_s": 0.5},
    {"at_step": 5, "rank": 0, "do": "slow", "factor": 3.0, "steps": 2},
    {"at_step": 6, "rank": 0, "do": "busy", "seconds": 1.5},
]


def test_faults_keep_their_place_in_the_jobs_list() -> None:
    kill, freeze, slow, busy = live_faults(spec(faults=FAULTS).faults)
    assert [f.index for f in (kill, freeze, slow, busy)] == [0, 2, 3, 4]
    assert (kill.do, kill.at_step, kill.rank, kill.phase, kill.wake_s) == ("kill", 2, 1, "vote", -1.0)
    assert (freeze.phase, freeze.wake_s) == ("gradient", 0.5)
    assert (slow.factor, slow.steps, busy.seconds) == (3.0, 2, 1.5)


def test_a_fault_that_has_struck_is_in_no_later_plan() -> None:
    made = desk(faults=FAULTS)
    assert [f.index for f in chosen(made).faults] == [0, 2, 3, 4]
    made.fired |= {0, 3}
    assert [f.index for f in chosen(made).faults] == [2, 4]

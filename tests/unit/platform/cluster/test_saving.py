"""When checkpoints are begun: due, late, failed, asked for."""

from __future__ import annotations

from everstep.platform.cluster.saving import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Abandoned,
    Asked,
    Begun,
    Committed,
    Failed,
    Finished,
    Saving,
    Written,
    at_risk,
    decide,
)


class Story:
    """Events one after the other; what was begun."""

    def __init__(self, every: int = 10) -> None:
        self.state = Saving(every)
        self.begun: list[int] = []
        self.reasons: list[str] = []

    def tell(self, event, now: float = 0.0) -> None:
        self.state, begin, reason = decide(self.state, event, now)
        if begin:
            self.begun.append(event.step)
        if reason:
            self.reasons.append(reason)

    def steps(self, first: int, last: int, now: float = 0.0, *, ready: bool = True, end: bool = False) -> None:
        for step in range(first, last + 1):
            self.tell(Committed(step, ready, end and step == last), now)


def test_one_is_begun_every_so_many_steps_and_after_the_last() -> None:
    story = Story()
    for step in range(1, 26):
        story.tell(Committed(step, ready=True, last=step == 25))
        if story.begun[-1:] == [step]:
            story.tell(Finished(step))
    assert story.begun == [10, 20, 25]


def test_without_checkpoints_nothing_is_begun_whatever_is_asked() -> None:
    story = Story(every=0)
    story.tell(Asked())
    story.steps(1, 5, end=True)
    assert story.begun == []


def test_there_are_never_two_beside_each_other_but_for_the_last() -> None:
    """Else a slow store would hold one more segment each time, until training waits for it."""
    story = Story()
    story.steps(1, 27)
    assert story.begun == [10]
    assert story.reasons == ["the checkpoint due at step 20 waits for that of step 10"]
    story.tell(Finished(10))
    story.steps(28, 29)
    assert story.begun == [10, 28], "the late one follows at once, and only once"
    story.steps(30, 35, end=True)
    assert story.begun == [10, 28, 35]


def test_the_next_may_begin_once_the_ranks_files_are_written_but_manifests_do_not_pile_up() -> None:
    story = Story(every=2)
    story.steps(1, 2)
    story.tell(Written(2))
    story.steps(3, 4)
    story.tell(Written(4))
    story.steps(5, 6)
    assert story.begun == [2, 4]
    assert story.reasons == ["the checkpoint due at step 6 waits for that of step 2, 4"]
    story.tell(Finished(2))
    story.steps(7, 7)
    assert story.begun == [2, 4, 7]
    assert (story.state.writing, story.state.written) == ((7,), (4,))
    story.tell(Failed(4))
    story.tell(Abandoned(7))
    assert (story.state.writing, story.state.written) == ((), ())


def test_one_that_is_due_waits_until_a_snapshot_may_be_taken() -> None:
    story = Story()
    story.steps(1, 12, ready=False)
    story.steps(13, 14)
    assert story.begun == [13]


def test_after_a_failure_it_is_tried_again_after_pauses_that_double() -> None:
    story = Story()
    story.steps(1, 10)
    now, step, pauses = 0.0, 10, []
    for _ in range(9):
        story.tell(Failed(step), now)
        failed_at = now
        while story.begun[-1] == step:
            now += 1.0
            story.tell(Committed(now_step := step + int(now - failed_at), ready=True, last=False), now)
        pauses.append(now - failed_at)
        step = now_step
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert story.reasons[0] == "tried again in 5 s"
    story.tell(Finished(step), now)
    assert (story.state.failures, story.state.not_before_s) == (0, 0.0)


def test_the_last_one_does_not_wait_for_a_pause() -> None:
    story = Story()
    story.steps(1, 10)
    story.tell(Failed(10), 100.0)
    story.steps(11, 12, 100.0, end=True)
    assert story.begun == [10, 12]


def test_who_asks_gets_the_next_step_also_within_a_pause() -> None:
    story = Story()
    story.steps(1, 3)
    story.tell(Asked())
    story.steps(4, 6)
    assert story.begun == [4]
    story.tell(Failed(4), 50.0)
    story.tell(Asked(), 51.0)
    story.steps(7, 7, 51.0)
    assert story.begun == [4, 7]


def test_one_whose_view_ended_is_made_up_for_without_a_pause() -> None:
    story = Story()
    story.steps(1, 10)
    story.tell(Abandoned(10))
    story.steps(11, 11)
    assert story.begun == [10, 11]
    story.tell(Abandoned(11))
    story.tell(Begun(11))
    story.steps(12, 12)
    assert story.begun == [10, 11, 11], "the new view writes it; nothing else is due"


def test_what_is_at_risk_is_told_in_steps_and_seconds() -> None:
    story = Story()
    assert at_risk(story.state, 5, 9.0) == "this run has no whole checkpoint yet"
    story.steps(1, 10)
    story.tell(Finished(10), 20.0)
    story.tell(Finished(8), 30.0)
    assert at_risk(story.state, 17, 45.0) == "the newest good one is of step 10, 7 steps and 25 s ago"

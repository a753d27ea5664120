"""The one deadline for members that live and do not answer, in virtual time."""

from __future__ import annotations

from dataclasses import replace

from everstep.actors.stalls import StallJudge
from everstep.collectives.membership import Active, Gathering, Leveling, State, Waiting
from everstep.collectives.messages import Member, View, ViewId

MEMBERS = tuple(Member(f"rank-{i}.1", i, f"slot-{i}", f"h:{i}") for i in range(3))
NAMES = frozenset(member.name for member in MEMBERS)


def forming(number: int, *answered: int) -> State:
    given = {MEMBERS[i].name: b"" for i in answered}
    phase = Gathering(ViewId(1, number), MEMBERS, NAMES, frozenset(), 0.0, inventories=given)
    return State(1, 1, 3, phase)


def voting(step: int, *voted: int, number: int = 1) -> State:
    view = View(ViewId(1, number), MEMBERS, 0)
    return State(1, 1, 3, Active(view, step, {MEMBERS[i].name: b"" for i in voted}))


def names(found: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in found]


def test_those_without_an_answer_are_overdue_after_the_limit_and_not_before() -> None:
    judge = StallJudge(10.0)
    assert judge.look(forming(1, 0), 100.0) == []
    assert judge.look(forming(1, 0, 1), 110.0) == []
    found = judge.look(forming(1, 0, 1), 110.1)
    assert found == [("rank-2.1", "no answer for 10 s (timeouts.stall_s: 10)")]


def test_those_without_a_vote_are_overdue_once_somebody_has_voted() -> None:
    judge = StallJudge(10.0)
    judge.look(voting(4, 1), 0.0)
    assert judge.look(voting(4, 1), 10.0) == []
    found = judge.look(voting(4, 1), 10.1)
    assert names(found) == ["rank-0.1", "rank-2.1"]
    assert "no vote on step 4" in found[0][1]


def test_where_nobody_votes_everybody_gets_longer() -> None:
    judge = StallJudge(10.0)
    judge.look(voting(4), 0.0)
    assert judge.look(voting(4), 29.0) == []
    assert names(judge.look(voting(4), 30.1)) == sorted(NAMES)


def test_the_first_vote_starts_the_clock_of_the_others() -> None:
    judge = StallJudge(10.0)
    judge.look(voting(4), 0.0)
    assert judge.look(voting(4, 0), 25.0) == []
    assert judge.look(voting(4, 0, 2), 35.0) == []
    assert names(judge.look(voting(4, 0, 2), 35.1)) == ["rank-1.1"]


def test_a_new_step_and_a_new_view_start_it_anew() -> None:
    judge = StallJudge(10.0)
    judge.look(voting(4, 0), 0.0)
    assert judge.look(voting(5, 0), 10.1) == []
    assert judge.look(voting(5, 0, number=2), 20.2) == []
    assert judge.look(forming(3), 30.3) == []
    assert judge.look(forming(4), 40.4) == []
    assert names(judge.look(forming(4), 50.5)) == sorted(NAMES)


def test_other_phases_have_no_deadline_here_and_stop_the_clock() -> None:
    judge = StallJudge(10.0)
    judge.look(forming(1), 0.0)
    waiting = replace(forming(1), phase=Waiting(0.0))
    leveling = replace(forming(1), phase=Leveling(View(ViewId(1, 1), MEMBERS, 0), NAMES))
    for phase in (waiting, leveling):
        assert judge.look(phase, 1000.0) == []
        assert judge.look(forming(1), 1000.0) == []


def test_it_is_said_once_a_limit() -> None:
    judge = StallJudge(10.0)
    judge.look(forming(1), 0.0)
    assert judge.look(forming(1), 10.1) != []
    assert judge.look(forming(1), 10.2) == []
    assert judge.look(forming(1), 20.0) == []
    assert judge.look(forming(1), 20.4) != []

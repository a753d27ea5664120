"""What a member makes of what the coordinator says."""

from __future__ import annotations

import pytest

from everstep.collectives.errors import Evicted, Mismatch, PeerLost, TransactionAborted
from everstep.collectives.group_messages import Ballot, Cause, Decided, Enter, Formed, Joiners, Over, Report, Settled
from everstep.collectives.messages import Complaint, Excluded, Member, View, ViewId
from everstep.collectives.standing import Standing

ME = Member("a", 0, "host", "a:1", incarnation="1")
B = Member("b", 0, "host", "b:1", incarnation="1")


def formed(number: int, cause: Cause = "lost", base: int = 0) -> Formed:
    return Formed(View(ViewId(1, number), (ME, B), base), cause, f"reason {number}")


@pytest.fixture
def seated() -> Standing:
    standing = Standing(ME)
    first = formed(1, "first")
    assert standing.hear(first)
    standing.adopt(first.view)
    return standing


def vote(standing: Standing, kind: str = "ok") -> Ballot:
    ballot = Ballot(standing.ballot().id, standing.ballot().txn, kind, 1)
    standing.doubt = ballot
    return ballot


def test_a_vote_is_in_doubt_until_something_is_heard(seated: Standing) -> None:
    ballot = vote(seated)
    assert seated.outcome(ballot) == ""
    seated.hear(Decided(Settled(1, "commit")))
    assert seated.outcome(ballot) == "commit"
    assert seated.ballot().txn == 2


def test_a_verdict_that_came_before_another_view_counts(seated: Standing) -> None:
    ballot = vote(seated)
    seated.hear(Decided(Settled(1, "commit")))
    seated.hear(formed(2, base=1))
    assert seated.outcome(ballot) == "commit"


@pytest.mark.parametrize("message", [formed(2), Over(ViewId(1, 1), "too few")])
def test_another_view_or_none_without_a_verdict_is_an_abort(seated: Standing, message) -> None:
    ballot = vote(seated)
    seated.hear(Decided(Settled(7, "commit")))  # another transaction's
    assert seated.hear(message)
    assert seated.outcome(ballot) == "superseded"


def test_a_broken_link_or_a_silent_coordinator_decides_nothing(seated: Standing) -> None:
    ballot = vote(seated)
    seated.link_broke(seated.used, 1, "reset")
    assert isinstance(seated.error(), PeerLost)
    assert seated.outcome(ballot) == ""


def test_who_is_excluded_cannot_know(seated: Standing) -> None:
    ballot = vote(seated)
    seated.hear(Excluded("frozen"))
    with pytest.raises(Evicted, match=r"frozen \(this member is a\)"):
        seated.outcome(ballot)
    assert seated.greeting() == [], "nothing more to say"


@pytest.mark.parametrize(
    ("causes", "error"),
    [
        (["aborted"], TransactionAborted),
        (["mismatch", "aborted"], Mismatch),
        (["aborted", "lost"], PeerLost),
        (["lost", "aborted"], PeerLost),
        (["retry"], PeerLost),
        (["missed"], PeerLost),
    ],
)
def test_why_a_view_is_over(seated: Standing, causes: list[Cause], error: type[Exception]) -> None:
    assert seated.error() is None
    for number, cause in enumerate(causes, 2):
        seated.hear(formed(number, cause))
    assert type(seated.error()) is error
    assert "reason 2" in str(seated.error())
    seated.adopt(seated.newest.view)
    assert seated.error() is None


def test_only_admissions_count_as_admitted(seated: Standing) -> None:
    assert not seated.admitted()
    seated.hear(formed(2, "admitted"))
    assert seated.admitted()
    seated.hear(formed(3, "lost"))
    assert not seated.admitted()


def test_a_view_is_adopted_when_it_is_connected_newest_and_whole(seated: Standing) -> None:
    second, third = formed(2), formed(3)
    seated.hear(second)
    assert seated.can_adopt(second.view)
    seated.hear(third)
    assert not seated.can_adopt(second.view)
    seated.link_broke(third.view, 1, "reset")
    assert not seated.can_adopt(third.view)


def test_older_views_are_refused(seated: Standing) -> None:
    seated.hear(formed(3))
    assert not seated.hear(formed(2))
    assert not seated.hear(Over(ViewId(1, 2), "late"))
    assert seated.newest.view.id == ViewId(1, 3)


def test_a_new_stream_begins_with_what_the_coordinator_has_to_know(seated: Standing) -> None:
    ballot = vote(seated)
    complaint = Complaint(seated.used.id, "b", "reset")
    assert seated.say_of(complaint)
    assert seated.greeting() == [Enter(ME, Report(seated.used, False, None, ballot)), complaint]
    seated.hear(formed(2))
    assert seated.greeting() == [Enter(ME, Report(seated.newest.view))], "doubt and complaint ended with their view"
    assert not seated.say_of(complaint)


def test_joiners_are_what_was_said_last(seated: Standing) -> None:
    assert not seated.hear(Joiners(("x",)))
    assert seated.joiners == ("x",)
    seated.hear(formed(2))
    assert seated.joiners == ()

"""Every row of a group's transition table, and the races around it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest

from everstep.collectives import group_membership as gm
from everstep.collectives.group_messages import Ballot, Report, Settled
from everstep.collectives.group_state import (
    Active,
    AskedAnew,
    Command,
    Entered,
    Event,
    HungUp,
    Left,
    Limits,
    LinkBroke,
    MemberDied,
    Recovering,
    Refuse,
    SendDecided,
    SendJoiners,
    SendOver,
    SendView,
    State,
    Tick,
    Voted,
    Waiting,
    WatcherHeard,
    WatcherLost,
)
from everstep.collectives.messages import Member, View, ViewId

C = TypeVar("C")
LIMITS = Limits()


def member(name: str, incarnation: str = "1", domain: str = "host") -> Member:
    return Member(name, 0, domain, f"{name}:1", incarnation=incarnation)


class Run:
    """A coordinator without sockets. `heard` keeps what each member was sent."""

    def __init__(self, minimum: int = 2, epoch: int = 1, view: View | None = None, settled: Settled | None = None):
        self.now = 100.0
        self.state: State = gm.initial(epoch, minimum, LIMITS, self.now, view, settled, settle=False)
        self.commands: tuple[Command, ...] = ()
        self.reason = ""

    def feed(self, *events: Event) -> Run:
        for event in events:
            self.state, self.commands, self.reason = gm.decide(self.state, event, self.now)
        return self

    def only(self, kind: type[C]) -> C:
        found = [command for command in self.commands if isinstance(command, kind)]
        assert len(found) == 1, self.commands
        return found[0]

    def enter(self, *names: str) -> Run:
        self.feed(WatcherHeard("host"))
        return self.feed(*(Entered(member(name)) for name in names))

    def wait(self, seconds: float) -> Run:
        """Time passes in small ticks, with a watcher that beats."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.1
            if "host" in self.state.watchers:
                self.feed(WatcherHeard("host"))
            self.feed(Tick())
            if self.commands:
                break
        return self

    @property
    def view(self) -> View:
        assert isinstance(self.state.phase, Active | Recovering)
        return self.state.phase.view

    @property
    def names(self) -> tuple[str, ...]:
        return gm.names_of(self.state)

    def vote(self, *names: str, kind: str = "ok", operations: int = 1, **more) -> Run:
        for name in names:
            ballot = Ballot(self.view.id, self.state.txn + 1, kind, operations, **more)
            self.feed(Voted(name, ballot))
        return self

    def report(self, name: str, doubt: Ballot | None = None, settled: Settled | None = None) -> Report:
        return Report(self.view, False, settled if settled is not None else self.state.settled, doubt)


@pytest.fixture
def abc() -> Run:
    run = Run(3).enter("a", "b", "c")
    run.state = replace(run.state, minimum=2)
    return run


# ---- joining, leaving, dying ------------------------------------------------------------------------------


def test_the_first_view_begins_with_the_minimum() -> None:
    run = Run(2).enter("a")
    assert isinstance(run.state.phase, Waiting)
    assert "1 of 2 members (min_peers)" in run.reason
    sent = run.enter("b").only(SendView)
    assert (sent.view.id, sent.to, sent.cause, sent.view.base_step) == (ViewId(1, 1), ("a", "b"), "first", 0)


def test_without_a_record_the_first_view_waits_for_reports_of_an_earlier_epoch() -> None:
    run = Run(2)
    run.state = gm.initial(1, 2, LIMITS, run.now)
    run.enter("a", "b")
    assert isinstance(run.state.phase, Waiting)
    run.wait(2 * LIMITS.settle_s)
    assert run.names == ("a", "b")
    assert run.now - 100 == pytest.approx(LIMITS.settle_s, abs=0.2)


def test_a_joiner_waits_and_the_members_hear_of_it(abc: Run) -> None:
    sent = abc.enter("d").only(SendJoiners)
    assert (sent.to, sent.names) == (("a", "b", "c"), ("d",))
    abc.vote("a", "b", "c")
    assert abc.names == ("a", "b", "c"), "a commit lets nobody in"


def test_all_members_together_let_joiners_in(abc: Run) -> None:
    abc.enter("d", "e").vote("a", "c", kind="admit")
    assert not abc.commands
    sent = abc.vote("b", kind="admit").only(SendView)
    assert sent.to == ("a", "b", "c", "d", "e")
    assert (sent.cause, sent.joiners, sent.view.base_step) == ("admitted", (), 1)


def test_admit_without_joiners_changes_nothing(abc: Run) -> None:
    sent = abc.vote("a", "b", "c", kind="admit").only(SendDecided)
    assert sent.settled == Settled(1, "nobody")
    assert abc.view.id == ViewId(1, 1)


def test_admit_against_a_transaction_is_a_mismatch(abc: Run) -> None:
    abc.vote("a", kind="admit")
    sent = abc.vote("b", operations=2).only(SendView)
    assert sent.cause == "mismatch"
    assert sent.reason.startswith("transaction 1: a called admit, b brought 2 operations")


@pytest.mark.parametrize("event", [MemberDied("b/1", "exited", 7.0), Left("b/1")])
def test_survivors_go_on_in_the_next_view_in_their_order(abc: Run, event: Event) -> None:
    abc.vote("a")
    abc.feed(event)
    sent = abc.only(SendView)
    assert (sent.to, sent.cause, sent.view.id) == (("a", "c"), "lost", ViewId(1, 2))
    assert [(lost.name, lost.rank) for lost in sent.lost] == [("b", 1)]
    assert sent.view.base_step == 1, "the number of the transaction that was under way is not used again"
    assert abc.only(Refuse).key == "b/1", "one that wakes up is told"


def test_below_the_minimum_survivors_wait_and_joiners_are_taken_in_at_once(abc: Run) -> None:
    abc.feed(MemberDied("a/1", "exited"), MemberDied("c/1", "exited"))
    over = abc.only(SendOver)
    assert over.to == ("b",)
    assert "1 of 2 members are left (min_peers)" in over.reason
    sent = abc.enter("d").only(SendView)
    assert (sent.to, sent.cause) == (("b", "d"), "lost")


def test_joiners_that_wait_replace_the_dead_where_the_minimum_needs_them(abc: Run) -> None:
    abc.enter("d").feed(MemberDied("a/1", "exited"))
    assert abc.names == ("b", "c"), "above the minimum nobody comes in unasked"
    abc.feed(MemberDied("b/1", "exited"))
    assert abc.names == ("c", "d")


def test_when_all_have_left_the_next_group_begins_anew(abc: Run) -> None:
    abc.feed(Left("a/1"), Left("b/1"), Left("c/1"))
    assert abc.names == ()
    assert abc.enter("x", "y").only(SendView).view.id == ViewId(1, 3)


def test_the_death_of_an_outsider_changes_no_view(abc: Run) -> None:
    abc.enter("d").feed(MemberDied("d/1", "exited"))
    assert abc.only(SendJoiners).names == ()
    assert abc.view.id == ViewId(1, 1)
    assert not abc.feed(MemberDied("d/1", "exited"), MemberDied("nobody/1", "exited")).commands


def test_a_name_is_taken_while_its_owner_lives_and_free_afterwards(abc: Run) -> None:
    refused = abc.feed(Entered(member("b", "2"))).only(Refuse)
    assert refused.key == "b/2"
    assert "choose another name=" in refused.reason
    abc.feed(MemberDied("b/1", "exited"))
    assert abc.feed(Entered(member("b", "2"))).only(SendJoiners).names == ("b",)


def test_a_successor_under_the_same_name_ends_one_whose_stream_is_broken(abc: Run) -> None:
    abc.feed(HungUp("b/1"), Entered(member("b", "2")))
    assert abc.names == ("a", "c")
    assert gm.joiners_of(abc.state) == ("b",)


def test_one_that_was_declared_dead_stays_out_and_hears_why(abc: Run) -> None:
    report = abc.report("b")
    abc.feed(MemberDied("b/1", "frozen (stopped by a signal)"), Entered(member("b"), report))
    assert "frozen" in abc.only(Refuse).reason
    assert abc.names == ("a", "c")


def test_a_report_of_a_view_that_is_over_is_refused_though_nobody_remembers_why(abc: Run) -> None:
    report = abc.report("b")
    abc.feed(MemberDied("b/1", "exited"))
    abc.state = replace(abc.state, excluded={})
    assert "view 1.1 is over" in abc.feed(Entered(member("b"), report)).only(Refuse).reason


# ---- transactions -----------------------------------------------------------------------------------------


def test_a_transaction_is_settled_by_all_votes(abc: Run) -> None:
    assert not abc.vote("a", "b").commands
    sent = abc.vote("c").only(SendDecided)
    assert (sent.to, sent.settled) == (("a", "b", "c"), Settled(1, "commit"))
    assert abc.vote("a", "b", "c").only(SendDecided).settled == Settled(2, "commit")


def test_a_vote_counts_once_and_only_for_its_view_and_number(abc: Run) -> None:
    first = Ballot(abc.view.id, 1, "ok", 1)
    abc.feed(Voted("a", first), Voted("a", first), Voted("b", first))
    assert not abc.commands
    abc.feed(Voted("c", first))
    assert not abc.feed(Voted("c", first), Voted("c", Ballot(ViewId(1, 9), 2, "ok", 1)), Voted("x", first)).commands
    assert isinstance(abc.state.phase, Active)
    assert abc.state.phase.votes == {}


def test_a_vote_on_a_number_that_is_still_to_come_is_a_protocol_error(abc: Run) -> None:
    abc.feed(Voted("b", Ballot(abc.view.id, 5, "ok", 1)))
    assert abc.names == ("a", "c")
    assert "protocol error" in abc.only(Refuse).reason


def test_an_error_of_a_member_ends_the_transaction_for_all_and_keeps_the_members(abc: Run) -> None:
    abc.vote("a")
    sent = abc.vote("b", kind="abort", reason="ValueError: no").only(SendView)
    assert (sent.to, sent.cause, sent.view.base_step) == (("a", "b", "c"), "aborted", 1)
    assert sent.reason.startswith("transaction 1: b: ValueError: no")
    assert not abc.feed(Voted("c", Ballot(ViewId(1, 1), 1, "ok", 1))).commands, "late, and of the view before"


def test_different_numbers_of_operations_are_told_before_all_have_voted(abc: Run) -> None:
    abc.vote("a", kind="closing", operations=3)
    sent = abc.vote("c", kind="closing", operations=4).only(SendView)
    assert sent.cause == "mismatch"
    assert "a brought 3 operations, c brought 4 operations" in sent.reason


def test_a_view_that_cannot_be_used_is_formed_anew(abc: Run) -> None:
    sent = abc.feed(AskedAnew("b", abc.view.id, "c did not come")).only(SendView)
    assert (sent.to, sent.cause) == (("a", "b", "c"), "anew")
    assert not abc.feed(AskedAnew("a", ViewId(1, 1), "c did not come")).commands, "once"


# ---- streams that break -----------------------------------------------------------------------------------


def test_a_member_that_comes_back_hears_what_it_missed(abc: Run) -> None:
    doubt = Ballot(abc.view.id, 1, "ok", 1)
    report = Report(abc.view, False, None, doubt)
    abc.vote("a", "b", "c").feed(HungUp("b/1"), MemberDied("c/1", "exited"))
    abc.feed(Entered(member("b"), report))
    decided, view = abc.commands
    assert decided == SendDecided(("b",), Settled(1, "commit")), "first, or it would take it for aborted"
    assert isinstance(view, SendView)
    assert (view.to, view.view.id, view.cause) == (("b",), ViewId(1, 2), "missed")


def test_a_vote_that_was_lost_with_its_stream_counts_when_it_is_reported(abc: Run) -> None:
    abc.vote("a", "c").feed(HungUp("b/1"))
    abc.feed(Entered(member("b"), Report(abc.view, False, None, Ballot(abc.view.id, 1, "ok", 1))))
    assert abc.only(SendDecided).settled == Settled(1, "commit")


def test_a_stream_that_stays_away_is_a_death(abc: Run) -> None:
    abc.feed(HungUp("b/1")).wait(LIMITS.frozen_s + 1)
    assert abc.names == ("a", "c")
    assert "hung up" in abc.only(SendView).reason
    assert abc.now - 100 == pytest.approx(LIMITS.frozen_s, abs=0.3)


def test_a_member_that_comes_back_while_too_few_are_left_hears_that_its_view_is_over(abc: Run) -> None:
    report = abc.report("b")
    abc.feed(HungUp("b/1"), MemberDied("a/1", "exited"), MemberDied("c/1", "exited"))
    assert abc.feed(Entered(member("b"), report)).only(SendOver).id == ViewId(1, 2)


def test_a_joiner_that_comes_back_is_still_one(abc: Run) -> None:
    abc.enter("d").feed(HungUp("d/1"))
    assert gm.joiners_of(abc.state) == ()
    assert abc.enter("d").only(SendJoiners).names == ("d",)


# ---- watchers ---------------------------------------------------------------------------------------------


def test_a_silent_watcher_takes_its_hosts_members_with_it(abc: Run) -> None:
    abc.feed(WatcherHeard("far"), Entered(member("d", domain="far")))
    abc.vote("a", "b", "c", kind="admit")
    abc.wait(LIMITS.frozen_s + 1)  # only "host" beats
    assert abc.names == ("a", "b", "c")
    assert "the watcher of its host far is silent" in abc.reason


def test_a_watcher_that_is_replaced_in_time_costs_nothing(abc: Run) -> None:
    abc.feed(WatcherLost("host")).wait(LIMITS.blind_s - 0.5)
    abc.feed(WatcherHeard("host")).wait(LIMITS.blind_s + 1)
    assert abc.names == ("a", "b", "c")


def test_a_host_without_a_watcher_is_not_trusted_for_ever(abc: Run) -> None:
    abc.feed(WatcherLost("host")).wait(LIMITS.blind_s + 1)
    assert abc.names == ()
    assert "no watcher on its host" in abc.reason


def test_a_coordinator_that_overslept_believes_nobody_late(abc: Run) -> None:
    abc.feed(Tick(), HungUp("b/1"))
    abc.now += 60
    abc.feed(Tick())
    assert abc.names == ("a", "b", "c")
    assert "held up for 60.0 s" in abc.reason
    abc.wait(LIMITS.frozen_s + 1)
    assert abc.names == ("a", "c")


# ---- links ------------------------------------------------------------------------------------------------


def broke(run: Run, name: str, about: str) -> LinkBroke:
    return LinkBroke(name, run.view.id, about, "reset")


def test_a_complaint_that_a_death_explains_has_no_consequence(abc: Run) -> None:
    abc.feed(broke(abc, "a", "b"), broke(abc, "c", "b"), MemberDied("b/1", "exited"))
    assert abc.view.id == ViewId(1, 2)
    abc.wait(5)
    assert abc.view.id == ViewId(1, 2)


def test_a_broken_link_is_tried_once_more_with_the_same_members(abc: Run) -> None:
    abc.feed(broke(abc, "a", "b")).wait(2)
    sent = abc.only(SendView)
    assert (sent.to, sent.cause) == (("a", "b", "c"), "retry")
    assert "a about b (reset); both ends live" in sent.reason
    assert abc.now - 100 == pytest.approx(gm.COMPLAINT_GRACE_S, abs=0.2)


def test_a_link_that_fails_again_ends_in_the_eviction_of_the_higher_rank(abc: Run) -> None:
    abc.feed(broke(abc, "a", "b")).wait(2)
    abc.feed(broke(abc, "b", "a")).wait(2)  # the other end complains; it is the same link
    assert abc.only(SendView).to == ("a", "c")
    refused = abc.only(Refuse)
    assert refused.key == "b/1"
    assert "b about a (reset), after new connections were tried for a about b (reset)" in refused.reason


def test_who_fails_with_all_others_is_the_one_to_go() -> None:
    run = Run(4).enter("a", "b", "c", "d")
    run.state = replace(run.state, minimum=2)
    for _ in range(2):
        run.feed(broke(run, "b", "a"), broke(run, "c", "a"), broke(run, "d", "a")).wait(2)
    assert run.only(SendView).to == ("b", "c", "d")


def test_a_retry_that_worked_is_forgotten(abc: Run) -> None:
    abc.feed(broke(abc, "a", "b")).wait(2)
    abc.vote("a", "b", "c").feed(broke(abc, "a", "b")).wait(2)
    assert abc.only(SendView).cause == "retry"


def test_another_death_does_not_forget_which_link_is_cut() -> None:
    run = Run(4).enter("a", "b", "c", "d")
    run.state = replace(run.state, minimum=2)
    run.feed(broke(run, "a", "b")).wait(2)
    run.feed(MemberDied("d/1", "exited"))
    run.feed(broke(run, "a", "b")).wait(2)
    assert run.only(SendView).to == ("a", "c")


def test_complaints_of_strangers_and_of_older_views_are_ignored(abc: Run) -> None:
    abc.feed(LinkBroke("a", ViewId(1, 0), "b", "x"), broke(abc, "x", "a"), broke(abc, "a", "x"), broke(abc, "a", "a"))
    abc.wait(3)
    assert abc.view.id == ViewId(1, 1)


# ---- the coordinator's own restart ------------------------------------------------------------------------

OLD = View(ViewId(3, 7), (member("a"), member("b"), member("c")), 40)


def vote_in_old(txn: int) -> Ballot:
    return Ballot(OLD.id, txn, "ok", 1)


def old_report(doubt: int = 0, settled: int = 0, view: View = OLD) -> Report:
    return Report(view, False, Settled(settled, "commit") if settled else None, vote_in_old(doubt) if doubt else None)


def restarted(known: bool = True) -> Run:
    return Run(2, 4 if known else 1, OLD if known else None).feed(WatcherHeard("host"))


def test_when_all_come_back_the_view_goes_on_and_nobody_is_told_anything() -> None:
    run = restarted().feed(*(Entered(member(name), old_report(settled=44)) for name in "abc"))
    assert run.view == OLD
    assert not run.commands
    assert run.vote("a", "b", "c").only(SendDecided).settled == Settled(45, "commit")
    assert run.feed(MemberDied("c/1", "exited")).only(SendView).view.id == ViewId(4, 1)


def test_without_a_record_the_epoch_goes_above_the_reported_one() -> None:
    run = restarted(known=False).feed(*(Entered(member(name), old_report()) for name in "abc"))
    assert run.feed(MemberDied("c/1", "exited")).only(SendView).view.id == ViewId(4, 1)


def test_a_transaction_in_doubt_is_committed_if_any_member_saw_it_committed() -> None:
    run = restarted().feed(Entered(member("a"), old_report(doubt=45)), Entered(member("b"), old_report(doubt=45)))
    assert not run.commands
    run.feed(Entered(member("c"), old_report(settled=45)))
    sent = run.only(SendDecided)
    assert (sent.to, sent.settled) == (("a", "b"), Settled(45, "commit"))


def test_a_transaction_in_doubt_goes_on_where_nobody_is_missing() -> None:
    run = restarted()
    run.feed(Entered(member("a"), old_report(doubt=45, settled=44)), Entered(member("b"), old_report(settled=44)))
    run.feed(Entered(member("c"), old_report(doubt=45, settled=44)))
    assert not run.commands
    assert run.vote("b").only(SendDecided).settled == Settled(45, "commit")


def test_votes_that_were_all_cast_settle_it_at_once() -> None:
    run = restarted().feed(*(Entered(member(name), old_report(doubt=41)) for name in "abc"))
    assert run.only(SendDecided) == SendDecided(("a", "b", "c"), Settled(41, "commit"))


def test_a_member_whose_watcher_lives_and_does_not_say_that_it_is_dead_gets_more_time() -> None:
    run = restarted().feed(*(Entered(member(name), old_report()) for name in "ab"))
    run.wait(LIMITS.blind_s - 0.5)
    assert isinstance(run.state.phase, Recovering)
    assert run.wait(1).only(SendView).to == ("a", "b")


def test_it_is_aborted_only_when_the_missing_are_fenced() -> None:
    run = Run(2, 4, OLD).feed(*(Entered(member(name), old_report(doubt=45, settled=44)) for name in "ab"))
    run.wait(LIMITS.recover_s - 0.2)
    assert not run.commands
    run.wait(1)
    sent = run.only(SendView)
    assert (sent.to, sent.view.id, sent.view.base_step) == (("a", "b"), ViewId(4, 1), 45)
    assert not [c for c in run.commands if isinstance(c, SendDecided)]
    assert "did not report within 1." in run.feed(Entered(member("c"), old_report(settled=45))).only(Refuse).reason


def test_it_is_committed_where_a_survivor_saw_it_though_another_is_dead() -> None:
    run = restarted().feed(Entered(member("a"), old_report(doubt=45)), Entered(member("b"), old_report(settled=45)))
    run.feed(MemberDied("c/1", "exited"))
    assert [type(command) for command in run.commands] == [Refuse, SendDecided, SendView]
    assert run.only(SendDecided).to == ("a",)
    assert run.only(SendView).to == ("a", "b")


def test_the_record_knows_what_was_settled_before_the_last_view() -> None:
    run = Run(2, 4, OLD, Settled(40, "commit"))
    before = View(ViewId(3, 6), (*OLD.members, member("d")), 30)
    for name in "ab":
        run.feed(Entered(member(name), Report(OLD)))
    run.feed(Entered(member("c"), Report(before, False, None, Ballot(before.id, 40, "ok", 1))))
    assert run.only(SendDecided) == SendDecided(("c",), Settled(40, "commit"))
    assert run.only(SendView).to == ("a", "b", "c"), "c never heard of the last view: all need new connections"


def test_old_members_come_first_and_joiners_wait() -> None:
    run = restarted().feed(Entered(member("x")), Entered(member("y")))
    assert isinstance(run.state.phase, Recovering)
    run.feed(*(Entered(member(name), old_report()) for name in "abc"))
    assert run.only(SendJoiners) == SendJoiners(("a", "b", "c"), ("x", "y"))


def test_if_none_of_the_old_members_is_left_joiners_begin_anew() -> None:
    run = Run(2, 4, OLD).feed(Entered(member("x")), Entered(member("y")))
    run.wait(3)
    assert run.only(SendView).to == ("x", "y")
    assert run.view.id == ViewId(4, 1)


def test_a_complaint_that_is_made_before_all_have_reported_is_not_lost() -> None:
    run = restarted().feed(Entered(member("a"), old_report()), LinkBroke("a", OLD.id, "b", "reset"))
    run.feed(*(Entered(member(name), old_report()) for name in "bc"))
    assert run.view == OLD
    assert run.wait(2).only(SendView).cause == "retry"


def test_a_view_that_had_ended_for_somebody_does_not_go_on() -> None:
    run = restarted()
    reports = [replace_over(old_report(), name == "b") for name in "abc"]
    run.feed(*(Entered(member(name), report) for name, report in zip("abc", reports, strict=True)))
    assert run.only(SendView).to == ("a", "b", "c")


def replace_over(report: Report, over: bool) -> Report:
    return Report(report.view, over, report.settled, report.doubt)


def test_a_member_of_a_view_before_the_last_one_does_not_bring_it_back() -> None:
    run = restarted().feed(*(MemberDied(f"{name}/1", "exited") for name in "abc"))
    assert isinstance(run.state.phase, Waiting)
    older = View(ViewId(3, 6), (member("z"),), 39)
    assert "view 3.6 is over" in run.feed(Entered(member("z"), Report(older))).only(Refuse).reason


def test_a_death_that_is_told_before_any_report_is_not_waited_for() -> None:
    run = restarted(known=False).feed(MemberDied("c/1", "exited"))
    run.feed(*(Entered(member(name), old_report()) for name in "ab"))
    assert run.only(SendView).to == ("a", "b")
    assert "c (rank 2): it was declared dead: exited" in run.reason


def test_who_is_declared_dead_before_it_enters_does_not_come_in() -> None:
    run = restarted().feed(MemberDied("x/1", "frozen"), Entered(member("x")))
    assert "frozen" in run.only(Refuse).reason


def test_the_newest_view_that_anybody_reports_counts() -> None:
    newer = View(ViewId(3, 8), (member("a"), member("b")), 42)
    run = restarted().feed(Entered(member("c"), old_report()))
    assert run.feed(Entered(member("a"), Report(newer))).only(Refuse).key == "c/1", "it was left behind"
    assert "waiting for b" in run.reason
    run.feed(Entered(member("b"), Report(newer)))
    assert run.view == newer
    assert "view 3.7 is over" in run.feed(Entered(member("c"), old_report())).only(Refuse).reason

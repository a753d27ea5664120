"""Every row of membership's transition table, and the races around it."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import TypeVar

import pytest

from everstep.collectives import membership as m
from everstep.collectives.errors import InvalidTransition
from everstep.collectives.messages import Member, ViewId

C = TypeVar("C")


class Run:
    """A coordinator without sockets: feeds events and keeps the last commands."""

    def __init__(
        self, minimum: int = 2, target: int = 3, epoch: int = 1, missing: frozenset[str] = frozenset()
    ) -> None:
        self.now = 0.0
        self.state = m.initial(epoch, minimum, target, self.now, patience_s=10.0, missing=missing)
        self.commands: tuple[m.Command, ...] = ()
        self.reason = ""

    def feed(self, *events: m.Event) -> Run:
        for event in events:
            self.state, self.commands, self.reason = m.decide(self.state, event, self.now)
        return self

    def only(self, kind: type[C]) -> C:
        found = [command for command in self.commands if isinstance(command, kind)]
        assert len(found) == 1, self.commands
        return found[0]

    def join(self, *slots: int) -> Run:
        for slot in slots:
            self.feed(m.WatcherUp(f"d{slot}"), m.Joined(member(slot)))
        return self

    @property
    def id(self) -> ViewId:
        phase = self.state.phase
        assert isinstance(phase, m.Gathering | m.Leveling | m.Active)
        return phase.id if isinstance(phase, m.Gathering) else phase.view.id

    def answer(self) -> Run:
        """All that the gathering waits for comes in."""
        phase = self.state.phase
        assert isinstance(phase, m.Gathering)
        for name in sorted(phase.asked):
            self.feed(m.Inventoried(name, phase.id, name.encode()))
        for domain in sorted(phase.watchers):
            self.feed(m.Stocked(domain, phase.id, self.state.unfenced, domain.encode()))
        return self

    def choose(self, base_step: int) -> Run:
        return self.feed(m.Chosen(self.id, base_step, b"plan"))

    def level(self) -> Run:
        for mb in m.current_members(self.state):
            self.feed(m.Levelled(mb.name, self.id))
        return self

    def act(self, base_step: int = 0) -> Run:
        return self.answer().choose(base_step).level()

    def vote(self, step: int) -> Run:
        for mb in m.current_members(self.state):
            self.feed(m.Voted(mb.name, self.id, step, mb.name.encode()))
        return self

    def judge(self, step: int, protected_step: int = -1, finished: bool = False) -> Run:
        return self.feed(m.Judged(self.id, step, b"verdict", finished, protected_step))


def member(slot: int, incarnation: int = 1) -> Member:
    return Member(f"r{slot}.{incarnation}", slot, f"d{slot}", f"host:{slot}")


def names(members: tuple[Member, ...]) -> list[str]:
    return [mb.name for mb in members]


def acting(ranks: int = 3, minimum: int = 2, base_step: int = 0) -> Run:
    return Run(minimum, ranks).join(*range(ranks)).act(base_step)


# ---- Waiting ----------------------------------------------------------------------------------------------


def test_the_run_starts_when_the_target_is_ready() -> None:
    run = Run(2, 3).join(0, 1)
    assert isinstance(run.state.phase, m.Waiting)
    assert run.commands == ()
    run.join(2)
    prepare = run.only(m.SendPrepare).prepare
    assert (prepare.id, prepare.asked) == (ViewId(1, 1), ("r0.1", "r1.1", "r2.1"))


def test_the_minimum_is_enough_after_patience() -> None:
    run = Run(2, 3).join(0)
    run.now = 100.0
    assert isinstance(run.feed(m.Tick()).state.phase, m.Waiting), "one rank is too few, however long it waits"
    run.join(1)
    run.now = 109.9
    assert isinstance(run.feed(m.Tick()).state.phase, m.Waiting)
    run.now = 110.1
    assert names(m.current_members(run.feed(m.Tick()).state)) == ["r0.1", "r1.1"]


def test_patience_starts_again_when_the_minimum_is_lost_meanwhile() -> None:
    run = Run(2, 3).join(0, 1).feed(m.MemberDied("r1.1", "signal 9"))
    run.now = 9.0
    run.feed(m.Joined(member(1, 2)))
    run.now = 11.0
    assert isinstance(run.feed(m.Tick()).state.phase, m.Waiting)


def test_more_ranks_than_the_target_stay_out() -> None:
    run = Run(1, 1).join(0, 1)
    assert names(m.current_members(run.state)) == ["r0.1"]


def test_a_lower_target_starts_a_run_that_waited_for_more() -> None:
    run = Run(2, 3).join(0, 1).feed(m.Retarget(2))
    assert isinstance(run.state.phase, m.Gathering)


# ---- Gathering --------------------------------------------------------------------------------------------


def test_the_choice_comes_when_all_inventories_and_all_stocks_are_there() -> None:
    run = Run(2, 2).join(0, 1)
    for event in (
        m.Inventoried("r0.1", run.id, b"a"),
        m.Stocked("d0", run.id, (), b"s0"),
        m.Inventoried("r1.1", run.id, b"b"),
    ):
        assert run.feed(event).commands == ()
    choose = run.feed(m.Stocked("d1", run.id, (), b"s1")).only(m.Choose)
    assert choose.inventories == {"r0.1": b"a", "r1.1": b"b"}
    assert choose.stocks == {"d0": b"s0", "d1": b"s1"}
    assert names(choose.members) == ["r0.1", "r1.1"]


def test_domains_without_a_member_are_asked_for_their_stock_too() -> None:
    run = Run(1, 1).join(0)
    run.act().feed(m.WatcherUp("d7"), m.MemberDied("r0.1", "signal 9")).join(1)
    phase = run.state.phase
    assert isinstance(phase, m.Gathering)
    assert phase.watchers == {"d0", "d1", "d7"}


@pytest.mark.parametrize("stale", [ViewId(1, 0), ViewId(0, 9), ViewId(1, 2)])
def test_answers_for_another_view_are_dropped(stale: ViewId) -> None:
    run = Run(2, 2).join(0, 1)
    before = run.state.phase
    run.feed(
        m.Inventoried("r0.1", stale, b""),
        m.Stocked("d0", stale, (), b""),
        m.Chosen(stale, 3, b""),
        m.Unchoosable(stale, "no"),
    )
    assert run.state.phase == before


def test_an_inventory_that_nobody_asked_for_is_dropped() -> None:
    run = Run(2, 2).join(0, 1, 2)
    run.feed(m.Inventoried("r2.1", run.id, b""))
    phase = run.state.phase
    assert isinstance(phase, m.Gathering)
    assert phase.inventories == {}


def test_a_choice_becomes_a_view_with_its_base_step() -> None:
    view = Run(2, 2).join(0, 1).answer().choose(7).only(m.SendView).view
    assert (view.id, view.base_step, view.payload, names(view.members)) == (
        ViewId(1, 1),
        7,
        b"plan",
        ["r0.1", "r1.1"],
    )
    assert view.rank_of("r1.1") == 1


def test_a_member_that_dies_while_gathering_starts_it_anew() -> None:
    run = Run(2, 3).join(0, 1, 2)
    run.feed(m.Inventoried("r0.1", run.id, b""), m.MemberDied("r2.1", "signal 9"))
    prepare = run.only(m.SendPrepare).prepare
    assert (prepare.id.number, prepare.asked, prepare.fence) == (2, ("r0.1", "r1.1"), ("r2.1",))
    phase = run.state.phase
    assert isinstance(phase, m.Gathering)
    assert phase.inventories == {}, "a member may have written since"


def test_a_gathering_that_starts_anew_still_asks_who_was_to_leave() -> None:
    run = acting(4, minimum=1).feed(m.Retarget(2)).vote(1).judge(1)
    assert run.only(m.SendPrepare).prepare.asked == ("r0.1", "r1.1", "r2.1", "r3.1")
    run.feed(m.MemberDied("r3.1", "signal 9"))
    assert run.only(m.SendPrepare).prepare.asked == ("r0.1", "r1.1", "r2.1"), "r2 holds state"
    assert names(m.current_members(run.state)) == ["r0.1", "r1.1"]


def test_a_watcher_lost_while_gathering_is_not_waited_for() -> None:
    run = Run(1, 1).join(0).feed(m.WatcherUp("d1"))
    run.feed(m.Inventoried("r0.1", run.id, b""), m.Stocked("d0", run.id, (), b""))
    assert run.commands == ()
    assert set(run.feed(m.WatcherLost("d1")).only(m.Choose).stocks) == {"d0"}


def test_a_watcher_that_comes_while_gathering_is_asked_and_its_predecessors_stock_forgotten() -> None:
    run = Run(1, 1).join(0)
    run.feed(m.Stocked("d0", run.id, (), b"old"), m.WatcherUp("d0"))
    assert run.only(m.SendPrepare).prepare.id == run.id
    assert run.feed(m.Inventoried("r0.1", run.id, b"")).commands == ()
    assert run.feed(m.Stocked("d0", run.id, (), b"new")).only(m.Choose).stocks == {"d0": b"new"}


def test_unchoosable_ends_the_run_where_nobody_can_bring_more() -> None:
    run = Run(1, 1).join(0).answer().feed(m.Unchoosable(ViewId(1, 1), "step 3 lacks w"))
    assert run.only(m.Fail).reason == "step 3 lacks w"
    assert run.state.phase == m.Ended("step 3 lacks w", ok=False)


def test_unchoosable_waits_for_missing_watchers_and_then_ends() -> None:
    run = Run(1, 1).join(0).feed(m.WatcherUp("d1"), m.WatcherLost("d1")).answer()
    run.feed(m.Unchoosable(run.id, "no"))
    assert isinstance(run.state.phase, m.Gathering)
    run.now = 10.1
    assert run.feed(m.Tick()).only(m.Fail).reason == "no"


def test_unchoosable_is_chosen_again_when_the_watcher_is_back() -> None:
    run = Run(1, 1).join(0).feed(m.WatcherUp("d1"), m.WatcherLost("d1")).answer()
    run.feed(m.Unchoosable(run.id, "no"), m.WatcherUp("d1"))
    run.now = 100.0
    assert isinstance(run.feed(m.Tick()).state.phase, m.Gathering), "it has until it answers"
    run.feed(m.Stocked("d1", run.id, (), b""))
    assert isinstance(run.commands[0], m.Choose)


# ---- the floor: what was protected is not given up before the missing had time to come back ---------------


def behind_the_floor() -> Run:
    run = acting(2, minimum=1, base_step=4).vote(5).judge(5, protected_step=4).vote(6).judge(6, protected_step=5)
    return run.feed(m.WatcherLost("d1"), m.MemberDied("r1.1", "its watcher is lost")).answer()


def test_a_choice_behind_the_floor_is_held_back_while_watchers_are_missing() -> None:
    run = behind_the_floor().choose(0)
    assert run.commands == ()
    assert "5 was protected; waiting for the watchers of d1" in run.reason
    run.feed(m.WatcherUp("d1"), m.Stocked("d1", run.id, (), b""))
    assert isinstance(run.commands[0], m.Choose)
    assert run.choose(5).only(m.SendView).view.base_step == 5


def test_a_choice_behind_the_floor_is_taken_when_nobody_came_back() -> None:
    run = behind_the_floor().choose(0)
    run.now = 10.1
    assert run.feed(m.Tick()).only(m.SendView).view.base_step == 0
    run.level().feed(m.MemberDied("r0.1", "signal 9")).feed(m.Joined(member(0, 2))).answer().choose(0)
    assert run.only(m.SendView).view.base_step == 0, "the missing have been given up, it waits for them once"


def test_a_choice_behind_the_floor_is_taken_at_once_when_nobody_is_missing() -> None:
    run = behind_the_floor()
    run.feed(m.WatcherUp("d1"), m.Stocked("d1", run.id, (), b"")).choose(0)
    assert run.only(m.SendView).view.base_step == 0, "its memory was lost with its host"


def test_a_commit_that_is_not_protected_is_rolled_back_without_waiting() -> None:
    assert behind_the_floor().choose(5).only(m.SendView).view.base_step == 5


def test_a_new_epoch_waits_for_all_domains_before_its_first_choice() -> None:
    run = Run(1, 1, epoch=2, missing=frozenset({"d0", "d1"})).join(0).answer().choose(9)
    assert run.commands == (), "d1 may hold a newer step"
    run.feed(m.WatcherUp("d1"), m.Stocked("d1", run.id, (), b"")).choose(12)
    assert run.only(m.SendView).view.id == ViewId(2, 1)


# ---- Leveling ---------------------------------------------------------------------------------------------


def test_the_view_acts_when_all_are_level() -> None:
    run = Run(2, 2).join(0, 1).answer().choose(7)
    run.feed(m.Levelled("r0.1", run.id), m.Levelled("r0.1", run.id))
    assert isinstance(run.state.phase, m.Leveling), "twice the same is not all"
    go = run.feed(m.Levelled("r1.1", run.id)).only(m.SendGo)
    assert (go.view.id, go.lost) == (ViewId(1, 1), ())
    phase = run.state.phase
    assert isinstance(phase, m.Active)
    assert phase.step == 8


def test_go_tells_who_was_lost_on_the_way() -> None:
    run = acting(3).feed(m.MemberDied("r1.1", "frozen", 120.0)).answer().choose(0)
    run.feed(m.Levelled("r0.1", run.id), m.Levelled("r2.1", run.id))
    lost = run.only(m.SendGo).lost
    assert [(x.name, x.cause, x.rank, x.detected_ms) for x in lost] == [("r1.1", "frozen", 1, 120.0)]
    assert run.state.lost == ()


def test_a_stale_level_does_not_count() -> None:
    run = acting(3).feed(m.MemberDied("r1.1", "signal 9")).answer().choose(0)
    run.feed(m.Levelled("r0.1", ViewId(1, 1)), m.Levelled("r2.1", ViewId(1, 1)))
    assert isinstance(run.state.phase, m.Leveling)


def test_a_death_while_leveling_is_one_more_view() -> None:
    run = Run(2, 3).join(0, 1, 2).answer().choose(0).feed(m.MemberDied("r2.1", "signal 9"))
    assert run.only(m.SendPrepare).prepare.id == ViewId(1, 2)


# ---- Active -----------------------------------------------------------------------------------------------


def test_the_verdict_needs_every_vote_and_goes_to_all() -> None:
    run = acting(2)
    run.feed(m.Voted("r0.1", run.id, 1, b"a"), m.Voted("r0.1", run.id, 1, b"a"))
    assert run.commands == (), "twice the same is not all"
    judge = run.feed(m.Voted("r1.1", run.id, 1, b"b")).only(m.Judge)
    assert (judge.step, judge.votes) == (1, {"r0.1": b"a", "r1.1": b"b"})
    verdict = run.judge(1).only(m.SendVerdict)
    assert (verdict.step, verdict.payload, verdict.reform) == (1, b"verdict", False)
    phase = run.state.phase
    assert isinstance(phase, m.Active)
    assert (phase.step, phase.votes) == (2, {})


def test_a_vote_of_another_view_is_dropped_but_one_on_another_step_is_a_bug() -> None:
    run = acting(2)
    before = run.state.phase
    assert run.feed(m.Voted("r0.1", ViewId(1, 0), 1, b"")).state.phase == before
    with pytest.raises(InvalidTransition, match="voted on step 2, the view is at 1"):
        run.feed(m.Voted("r0.1", run.id, 2, b""))


@pytest.mark.parametrize(("id", "step"), [(ViewId(1, 0), 1), (ViewId(1, 1), 2)])
def test_a_verdict_on_anything_but_the_current_step_is_dropped(id: ViewId, step: int) -> None:
    run = acting(2).vote(1)
    assert run.feed(m.Judged(id, step, b"")).commands == ()


def test_a_death_aborts_the_step_even_when_all_have_voted() -> None:
    run = acting(3).vote(1).feed(m.MemberDied("r0.1", "signal 9"))
    prepare = run.only(m.SendPrepare).prepare
    assert (prepare.asked, prepare.fence) == (("r1.1", "r2.1"), ("r0.1",))
    assert run.feed(m.Judged(ViewId(1, 1), 1, b"")).commands == (), "too late"


def test_below_the_minimum_the_run_waits_and_goes_on_with_the_next_join() -> None:
    run = acting(2).feed(m.MemberDied("r1.1", "signal 9"))
    assert isinstance(run.state.phase, m.Waiting)
    prepare = run.only(m.SendPrepare).prepare
    assert (prepare.id, prepare.asked, prepare.fence) == (ViewId(1, 2), (), ("r1.1",))
    run.feed(m.Joined(member(1, 2)))
    assert run.only(m.SendPrepare).prepare.id == ViewId(1, 3)
    assert names(m.current_members(run.state)) == ["r0.1", "r1.2"]


def test_a_spare_takes_part_at_once_where_the_survivors_are_too_few() -> None:
    run = acting(2).join(2).feed(m.MemberDied("r1.1", "signal 9"))
    assert names(m.current_members(run.state)) == ["r0.1", "r2.1"]


def test_survivors_go_on_without_the_spare_and_take_it_in_at_the_next_boundary() -> None:
    run = acting(3).join(3).feed(m.MemberDied("r1.1", "signal 9"))
    assert names(m.current_members(run.state)) == ["r0.1", "r2.1"]
    run.act(0).vote(1).judge(1)
    assert run.only(m.SendVerdict).reform
    assert names(m.current_members(run.state)) == ["r0.1", "r2.1", "r3.1"]


def test_the_death_of_an_outsider_changes_nothing() -> None:
    run = acting(2).join(2)
    before = run.state.phase
    assert run.feed(m.MemberDied("r2.1", "signal 9")).commands == ()
    assert run.state.phase == before
    assert "r2.1" not in run.state.ready
    assert run.feed(m.MemberDied("nobody", "signal 9")).commands == ()


def test_a_joiner_waits_for_the_boundary() -> None:
    run = Run(1, 3).join(0, 1).feed(m.Retarget(2)).act().feed(m.Retarget(3)).join(2)
    assert run.commands == ()
    run.vote(1).judge(1)
    prepare = run.only(m.SendPrepare).prepare
    assert prepare.asked == ("r0.1", "r1.1", "r2.1")
    assert isinstance(run.commands[0], m.SendVerdict), "the step is decided first"


@pytest.mark.parametrize(("target", "members"), [(2, ["r0.1", "r1.1"]), (3, ["r0.1", "r1.1", "r2.1"])])
def test_a_scale_down_takes_effect_at_the_boundary_and_asks_those_who_leave(target: int, members: list[str]) -> None:
    run = acting(4).feed(m.Retarget(target))
    assert run.commands == ()
    run.vote(1).judge(1)
    assert names(m.current_members(run.state)) == members
    assert run.only(m.SendPrepare).prepare.asked == ("r0.1", "r1.1", "r2.1", "r3.1")


def test_a_target_below_the_minimum_changes_no_view() -> None:
    run = acting(2).feed(m.Retarget(1)).vote(1).judge(1)
    assert not run.only(m.SendVerdict).reform


def test_the_last_verdict_ends_the_run() -> None:
    run = acting(2).vote(1).judge(1, finished=True)
    assert not run.only(m.SendVerdict).reform
    assert run.state.phase == m.Ended("finished", ok=True)


def test_finish_ends_any_phase_and_nothing_happens_afterwards() -> None:
    for run in (Run(), Run(2, 2).join(0, 1), acting(2)):
        run.feed(m.Finish("stopped", ok=True))
        assert run.state.phase == m.Ended("stopped", ok=True)
        run.feed(m.Joined(member(5)), m.MemberDied("r0.1", "signal 9"), m.Tick())
        assert run.commands == ()
        assert run.state.phase == m.Ended("stopped", ok=True)


# ---- the dead stay dead -----------------------------------------------------------------------------------


def test_a_member_that_was_declared_dead_is_refused_until_it_is_gone_and_forgotten() -> None:
    run = acting(3).feed(m.MemberDied("r1.1", "frozen"), m.Joined(member(1)))
    assert run.only(m.Refuse).name == "r1.1"
    assert "r1.1" not in run.state.ready
    run.feed(m.Joined(member(1, 2)))
    assert run.commands == (), "its successor has another name"


def test_fences_are_asked_for_until_the_domain_says_that_they_hold() -> None:
    run = acting(3).feed(m.MemberDied("r1.1", "frozen"))
    assert run.only(m.SendPrepare).prepare.fence == ("r1.1",)
    run.feed(m.MemberDied("r2.1", "signal 9")).feed(m.Joined(member(3)))
    assert run.only(m.SendPrepare).prepare.fence == ("r1.1", "r2.1")
    run.feed(m.Stocked("d1", run.id, ("r1.1",), b""), m.MemberDied("r3.1", "signal 9"))
    assert run.only(m.SendPrepare).prepare.fence == ("r2.1", "r3.1")


# ---- complaints -------------------------------------------------------------------------------------------


def test_a_complaint_forms_the_same_view_anew_after_a_grace() -> None:
    run = acting(2)
    run.feed(m.Complained("r0.1", run.id, "r1.1", "reset"), m.Tick())
    assert run.commands == (), "a death may explain it"
    run.now = m.COMPLAINT_GRACE_S + 0.1
    prepare = run.feed(m.Tick()).only(m.SendPrepare).prepare
    assert (prepare.id, prepare.asked) == (ViewId(1, 2), ("r0.1", "r1.1"))
    run.now = 10.0
    assert run.feed(m.Tick()).commands == (), "once"


def test_a_complaint_that_a_death_explains_starts_nothing_more() -> None:
    run = acting(3)
    run.feed(m.Complained("r0.1", run.id, "r1.1", "reset"), m.MemberDied("r1.1", "signal 9")).act(0)
    run.now = 10.0
    assert run.feed(m.Tick()).commands == ()


def test_a_complaint_about_another_view_or_by_a_stranger_is_dropped() -> None:
    run = acting(2)
    run.feed(m.Complained("r0.1", ViewId(1, 0), "r1.1", "reset"), m.Complained("r9.1", run.id, "r1.1", "reset"))
    run.now = 10.0
    assert run.feed(m.Tick()).commands == ()


# ---- as a whole -------------------------------------------------------------------------------------------


def test_view_ids_only_grow_and_carry_the_epoch() -> None:
    run = Run(1, 2, epoch=4).join(0, 1)
    ids = [run.id]
    for slot in (0, 1):
        run.act(0).feed(m.MemberDied(f"r{slot}.1", "signal 9"), m.Joined(member(slot, 2)))
        ids.append(run.id)
    assert ids == sorted(set(ids))
    assert {id.epoch for id in ids} == {4}


def test_what_the_table_forbids_raises_with_the_recent_events_and_pickles() -> None:
    run = acting(2)
    with pytest.raises(InvalidTransition) as caught:
        run.feed(m.Voted("r0.1", run.id, 5, b""))
    again = pickle.loads(pickle.dumps(caught.value))
    assert "Active <- Voted" in str(again)
    assert str(again) == str(caught.value)


def test_an_unknown_event_is_a_bug() -> None:
    with pytest.raises(InvalidTransition, match="unknown event"):
        m.decide(Run().state, "boo", 0.0)  # type: ignore[arg-type]


def test_a_decision_leaves_the_state_before_it_as_it_was() -> None:
    run = acting(2)
    kept = deepcopy(run.state)
    m.decide(run.state, m.MemberDied("r0.1", "signal 9"), 1.0)
    m.decide(run.state, m.Voted("r0.1", run.id, 1, b""), 1.0)
    assert run.state == kept

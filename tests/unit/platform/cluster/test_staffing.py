"""Which processes a run has: every row of staffing's table."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from everstep.platform.cluster.staffing import (
    MAX_FAILED_STARTS,
    RESTART_DELAY_S,
    Begin,
    Close,
    Event,
    GiveUp,
    ManagerUp,
    ProcessExit,
    RankReady,
    Scale,
    StartManager,
    StartRank,
    StopRank,
    Tick,
    ViewActs,
    decide,
    initial,
    slot_of,
)


class Staff:
    """A state, and what was decided about each event."""

    def __init__(self, slots: int = 4, target: int = 2, spares: int = 1, limit: int = -1) -> None:
        self.state = initial(slots, target, spares, limit)
        self.now = 0.0

    def on(self, event: Event) -> list:
        self.state, commands, reason = decide(self.state, event, self.now)
        assert reason
        return list(commands)

    def up(self, slot: int, incarnation: int = 1) -> list:
        return self.on(ManagerUp(slot, f"manager-{slot}.{incarnation}", f"c{slot}", f"f{slot}"))

    def staffed(self) -> Staff:
        """Managers up and trainers ready on the first target + spares slots."""
        self.on(Begin())
        for slot in range(min(self.state.target + self.state.spares, len(self.state.slots))):
            self.up(slot)
            self.on(RankReady(f"rank-{slot}.1"))
        return self


def test_begin_starts_managers_for_target_and_spares_and_each_gets_a_trainer_when_it_is_up() -> None:
    staff = Staff()
    assert staff.on(Begin()) == [StartManager(i, f"manager-{i}.1") for i in range(3)]
    assert staff.on(Tick()) == [], "asked for once"
    assert staff.up(1) == [StartRank(1, "rank-1.1")]
    assert staff.up(0) == [StartRank(0, "rank-0.1")]
    assert staff.up(2) == [StartRank(2, "rank-2.1")]
    assert staff.on(Tick()) == []
    assert [(s.control, s.fetch) for s in staff.state.slots[:3]] == [(f"c{i}", f"f{i}") for i in range(3)]


def test_there_are_never_more_than_the_slots() -> None:
    staff = Staff(slots=2, target=5, spares=3)
    assert len(staff.on(Begin())) == 2


def test_a_manager_that_is_not_the_slots_any_more_is_passed_over() -> None:
    staff = Staff()
    staff.on(Begin())
    staff.on(ProcessExit("manager-0.1", "signal 9"))
    assert staff.up(0, incarnation=1) == []
    assert not staff.state.slots[0].manager_up
    assert staff.up(0, incarnation=2) == [StartRank(0, "rank-0.1")]


def test_a_manager_gets_a_successor_and_its_trainer_stays() -> None:
    staff = Staff().staffed()
    assert staff.on(ProcessExit("manager-1.1", "signal 9")) == [StartManager(1, "manager-1.2")]
    assert staff.state.slots[1].trainer == "rank-1.1"
    assert staff.state.losses == 0, "managers are not on the ranks' budget"
    assert staff.up(1, incarnation=2) == [], "its trainer is still there"


def test_a_trainer_gets_a_successor_on_the_lowest_slot_that_is_free() -> None:
    staff = Staff().staffed()
    assert staff.on(ProcessExit("rank-1.1", "signal 9")) == [StartRank(1, "rank-1.2")]
    assert staff.state.losses == 1
    staff.on(ProcessExit("manager-0.1", "x"))
    assert staff.on(ProcessExit("rank-0.1", "signal 9")) == [], "its slot has no manager to be watched by"
    assert staff.up(0, incarnation=2) == [StartRank(0, "rank-0.2")]


def test_who_ended_and_is_not_known_any_more_changes_nothing() -> None:
    staff = Staff().staffed()
    before = staff.state
    for name in ("rank-1.0", "manager-9.1", "", "somebody"):
        assert staff.on(ProcessExit(name, "exit 1")) == []
    assert staff.on(RankReady("rank-7.7")) == []
    assert staff.state == before
    assert slot_of(staff.state, "") is None


def test_a_failed_start_is_tried_again_after_a_pause_and_is_no_loss() -> None:
    staff = Staff(target=1, spares=0)
    staff.on(Begin())
    staff.up(0)
    assert staff.on(ProcessExit("rank-0.1", "exit 1")) == []
    staff.now = RESTART_DELAY_S * 0.9
    assert staff.on(Tick()) == []
    staff.now = RESTART_DELAY_S
    assert staff.on(Tick()) == [StartRank(0, "rank-0.2")]
    assert staff.state.losses == 0


def test_a_slot_whose_trainers_cannot_start_ends_the_run() -> None:
    staff = Staff(target=1, spares=0)
    staff.on(Begin())
    staff.up(0)
    for attempt in range(1, MAX_FAILED_STARTS):
        assert staff.on(ProcessExit(f"rank-0.{attempt}", "exit 1")) == []
        staff.now += RESTART_DELAY_S
        assert staff.on(Tick()) == [StartRank(0, f"rank-0.{attempt + 1}")]
    (gave_up,) = staff.on(ProcessExit(f"rank-0.{MAX_FAILED_STARTS}", "exit 1"))
    assert isinstance(gave_up, GiveUp)
    assert gave_up.kind == "start"
    for part in (f"rank-0.{MAX_FAILED_STARTS}", "exit 1", f"{MAX_FAILED_STARTS} times in a row on slot 0"):
        assert part in gave_up.message


def test_failed_starts_are_forgotten_once_a_trainer_was_ready() -> None:
    staff = Staff(target=1, spares=0)
    staff.on(Begin())
    staff.up(0)
    incarnation = 1
    for _ in range(3):
        for _ in range(MAX_FAILED_STARTS - 1):
            assert staff.on(ProcessExit(f"rank-0.{incarnation}", "exit 1")) == []
            staff.now += RESTART_DELAY_S
            incarnation += 1
            assert staff.on(Tick()) == [StartRank(0, f"rank-0.{incarnation}")]
        staff.on(RankReady(f"rank-0.{incarnation}"))
        incarnation += 1
        assert staff.on(ProcessExit(f"rank-0.{incarnation - 1}", "x")) == [StartRank(0, f"rank-0.{incarnation}")]


@pytest.mark.parametrize(("limit", "survives"), [(0, 0), (2, 2), (-1, 50)])
def test_losses_are_charged_to_the_infrastructures_budget(limit: int, survives: int) -> None:
    staff = Staff(target=1, spares=0, limit=limit)
    staff.on(Begin())
    staff.up(0)
    for incarnation in range(1, survives + 1):
        staff.on(RankReady(f"rank-0.{incarnation}"))
        assert staff.on(ProcessExit(f"rank-0.{incarnation}", "x")) == [StartRank(0, f"rank-0.{incarnation + 1}")]
    if limit >= 0:
        staff.on(RankReady(f"rank-0.{survives + 1}"))
        (gave_up,) = staff.on(ProcessExit(f"rank-0.{survives + 1}", "signal 9"))
        assert isinstance(gave_up, GiveUp)
        assert gave_up.kind == "infrastructure"
        assert f"limits.infrastructure: {limit}" in gave_up.message
        assert "signal 9" in gave_up.message


def test_scale_starts_what_is_missing() -> None:
    staff = Staff().staffed()
    assert staff.on(Scale(3)) == [StartManager(3, "manager-3.1")]
    assert staff.up(3) == [StartRank(3, "rank-3.1")]
    assert staff.on(Scale(1)) == [], "who goes is seen when a smaller view acts"


def test_trainers_outside_a_view_beyond_the_spares_are_stopped() -> None:
    staff = Staff().staffed()
    assert staff.on(ViewActs(frozenset({"rank-0.1", "rank-1.1"}))) == [], "one spare is wanted"
    staff.on(Scale(1))
    assert staff.on(ViewActs(frozenset({"rank-0.1"}))) == [StopRank("rank-2.1")]
    assert staff.on(ViewActs(frozenset({"rank-0.1"}))) == [], "told once"
    assert staff.on(ProcessExit("rank-2.1", "exit 0")) == []
    assert (staff.state.stopping, staff.state.losses) == (frozenset(), 0)
    assert staff.state.slots[2].trainer == ""


def test_a_view_that_is_still_too_small_keeps_everybody() -> None:
    """With fewer than the target in it, those outside are on their way into the next."""
    staff = Staff(slots=4, target=3, spares=0)
    staff.staffed()
    assert staff.on(ViewActs(frozenset({"rank-0.1"}))) == []


def test_one_that_is_being_stopped_is_not_counted_when_more_are_wanted_again() -> None:
    staff = Staff(slots=3, target=2, spares=0).staffed()
    staff.on(Scale(1))
    assert staff.on(ViewActs(frozenset({"rank-0.1"}))) == [StopRank("rank-1.1")]
    assert staff.on(Scale(2)) == [], "its own slot is still taken, and no other has a manager"
    assert staff.on(ProcessExit("rank-1.1", "exit 0")) == [StartRank(1, "rank-1.2")]


def test_after_close_nothing_is_started() -> None:
    staff = Staff().staffed()
    assert staff.on(Close()) == []
    for event in (ProcessExit("rank-0.1", "x"), ProcessExit("manager-0.1", "x"), Tick(), Scale(4), Begin()):
        assert staff.on(event) == []


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_names_are_new_and_the_target_is_reached_again(seed: int) -> None:
    rng = random.Random(seed)
    staff = Staff(slots=5, target=3, spares=1)
    living: dict[str, str] = {}  # name -> kind
    started: list[str] = []

    def carry_out(commands: list) -> None:
        for command in commands:
            assert not isinstance(command, GiveUp)
            if isinstance(command, StopRank):
                continue
            assert command.name not in started, "a name is used once"
            started.append(command.name)
            living[command.name] = "manager" if isinstance(command, StartManager) else "rank"

    def settle() -> None:
        for _ in range(60):
            staff.now += 1.0
            for name, kind in list(living.items()):
                slot, incarnation = (int(part) for part in name.split("-")[1].split("."))
                carry_out(staff.up(slot, incarnation) if kind == "manager" else staff.on(RankReady(name)))
            carry_out(staff.on(Tick()))

    carry_out(staff.on(Begin()))
    for _ in range(40):
        staff.now += rng.uniform(0, 1)
        if living and rng.random() < 0.5:
            name = rng.choice(sorted(living))
            if living[name] == "rank":
                staff.on(RankReady(name))
            del living[name]
            carry_out(staff.on(ProcessExit(name, "x")))
        elif rng.random() < 0.2:
            carry_out(staff.on(Scale(rng.randint(1, 4))))
        else:
            settle()
    carry_out(staff.on(Scale(3)))
    settle()
    trainers = {slot.trainer for slot in staff.state.slots if slot.trainer}
    assert trainers == {name for name, kind in living.items() if kind == "rank"}
    assert len(trainers) >= 4
    assert all(slot.ready and slot.manager_up for slot in staff.state.slots if slot.trainer)


def test_the_state_is_a_value() -> None:
    first = Staff().staffed().state
    assert first == Staff().staffed().state
    assert replace(first, target=9) != first


def test_fewer_spares_are_stopped_though_the_view_stays() -> None:
    staff = Staff(slots=4, target=2, spares=2).staffed()
    staff.on(ViewActs(frozenset({"rank-0.1", "rank-1.1"})))
    assert staff.on(Scale(2, 1)) == [StopRank("rank-3.1")]
    assert staff.on(Scale(2, 0)) == [StopRank("rank-2.1")]


def test_members_of_the_view_are_not_stopped_before_a_smaller_one_acts() -> None:
    staff = Staff(slots=3, target=3, spares=0).staffed()
    staff.on(ViewActs(frozenset({"rank-0.1", "rank-1.1", "rank-2.1"})))
    assert staff.on(Scale(1, 0)) == []
    assert staff.on(ViewActs(frozenset({"rank-0.1"}))) == [StopRank("rank-1.1"), StopRank("rank-2.1")]


def test_without_a_grant_nothing_is_started() -> None:
    staff = Staff(slots=3, target=2, spares=1)
    assert staff.on(Scale(0, 0)) == []
    assert staff.on(Begin()) == []
    assert staff.on(Scale(2, 0)) == [StartManager(0, "manager-0.1"), StartManager(1, "manager-1.1")]

import pickle
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from everstep.storage.errors import InvalidTransition
from everstep.storage.versions import Slots, Version


def snapshot(slots: Slots, step: int, view=(0, 0), protect: bool = True) -> Slots:
    slots, index, reason = slots.reserve(step, view)
    assert index is not None, reason
    slots = slots.sealed(index, step)
    return slots.protected(step, view) if protect else slots


def test_snapshots_alternate_between_two_slots():
    slots = Slots.empty(2)
    used = []
    for step in range(1, 6):
        slots, index, _ = slots.reserve(step)
        used.append(index)
        slots = slots.sealed(index, step).protected(step)
        assert slots.newest_protected == step
    assert used == [0, 1, 0, 1, 0]


def test_the_newest_protected_is_kept_until_a_newer_one_is_protected():
    slots = snapshot(Slots.empty(2), 1)
    slots = snapshot(slots, 2, protect=False)
    slots, index, reason = slots.reserve(3)
    assert index is None
    assert "slot 0 protected with step 1 of view (0, 0), the newest protected" in reason
    assert "slot 1 sealed with step 2" in reason
    slots = slots.protected(2)
    _, index, reason = slots.reserve(3)
    assert index == 0
    assert "step 1" in reason


def test_a_pinned_step_is_kept_until_it_is_unpinned_as_often():
    slots = snapshot(Slots.empty(3), 1).pin(1).pin(1)
    slots = snapshot(snapshot(slots, 2), 3)
    slots, index, _ = slots.reserve(4)
    assert index == 1
    slots = slots.sealed(1, 4).protected(4)
    slots = slots.unpin(1)
    assert slots.reserve(5)[1] == 2
    assert slots.unpin(1).reserve(5)[1] == 0


def test_one_step_can_be_cut_again_for_a_newer_view():
    slots = snapshot(snapshot(Slots.empty(3), 4, view=(1, 1)), 5, view=(1, 1), protect=False)
    slots = slots.rolled_back(4)
    assert slots.index_of(5) is None
    slots, index, _ = slots.reserve(4, view=(1, 2))
    assert index == 1
    assert slots.index_of(4) == 0
    slots = slots.sealed(1, 4)
    assert slots.newest_protected == 4
    assert slots.index_of(4) == 1
    assert slots.index_of(4, view=(1, 1)) == 0
    # A late message about the old layout does not protect the new one: slot 0 is still the one to restore.
    late = slots.protected(4, view=(1, 1))
    assert late.reserve(5, view=(1, 2))[1] == 2
    assert late.protected(4, view=(1, 2)).reserve(5, view=(1, 2))[1] in (0, 2)


def test_adopted_slots_are_not_overwritten_before_it_is_known_what_is_protected():
    slots = Slots.adopt([Version(7, (2, 1)), Version(8, (2, 1))])
    assert slots.reserve(9, (3, 1))[1] is None
    assert slots.protected(8).reserve(9, (3, 1))[1] == 0
    assert Slots.adopt([None, Version(8)]).reserve(9)[1] == 0


def test_a_dead_writers_slot_is_free_again():
    slots, index, _ = Slots.empty(2).reserve(1)
    slots = slots.abandoned(index)
    assert slots.reserve(1)[1] == index


def test_rolling_back_keeps_what_a_checkpoint_reads():
    slots = snapshot(snapshot(Slots.empty(3), 1), 2, protect=False).pin(2).rolled_back(1)
    assert slots.index_of(2) == 1


WRITING = Slots.empty(2).reserve(1)[0]
DONE = snapshot(Slots.empty(2), 5)


@pytest.mark.parametrize(
    "act",
    [
        lambda: WRITING.reserve(1),
        lambda: WRITING.sealed(0, 2),
        lambda: WRITING.sealed(1, 1),
        lambda: WRITING.sealed(2, 1),
        lambda: WRITING.sealed(-1, 1),
        lambda: WRITING.protected(1),
        lambda: WRITING.pin(1),
        lambda: DONE.reserve(4),
        lambda: DONE.reserve(5),
        lambda: DONE.sealed(0, 5),
        lambda: DONE.abandoned(0),
        lambda: DONE.rolled_back(4),
        lambda: DONE.protected(5, (1, 0)),
        lambda: DONE.unpin(5),
    ],
)
def test_anything_else_is_invalid(act):
    with pytest.raises(InvalidTransition):
        act()


def test_the_error_tells_the_recent_events_and_travels():
    with pytest.raises(InvalidTransition) as caught:
        DONE.pin(9)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.recent == ("reserve(5, (0, 0)) = 0", "sealed(0, 5)", "protected(5, (0, 0))")
    assert str(error).startswith("pin(9): no slot has it")
    assert "sealed(0, 5)" in str(error)


def test_events_are_remembered_up_to_a_bound():
    slots = Slots.empty(2)
    for step in range(50):
        slots = snapshot(slots, step)
    assert len(slots.recent) <= 16


class AnySequence(RuleBasedStateMachine):
    """Random snapshots, deaths, recoveries and checkpoints, against a model of what must not be lost."""

    COUNT: ClassVar[int] = 3

    def __init__(self):
        super().__init__()
        self.slots = Slots.empty(self.COUNT)
        self.step = 0
        self.newest: Version | None = None
        self.writing: int | None = None
        self.kept: dict[int, int] = {}  # pinned step: times

    @precondition(lambda self: self.writing is None)
    @rule()
    def reserve(self):
        before = self.slots
        slots, index, reason = self.slots.reserve(self.step + 1)
        assert reason
        if index is not None:
            overwritten = before.slots[index].version
            assert overwritten is None or (self.newest is not None and overwritten < self.newest)
            assert overwritten is None or overwritten.step not in self.kept
            self.step += 1
            self.writing = index
        else:
            # It waits only when it must: every slot is needed.
            assert all(
                slot.version in (None, self.newest) or slot.version.step in self.kept or slot.version > self.newest
                if self.newest
                else slot.state == "sealed"
                for slot in before.slots
            )
            assert slots == before
        self.slots = slots

    @precondition(lambda self: self.writing is not None)
    @rule(dies=st.booleans())
    def end_of_writing(self, dies):
        if dies:
            self.slots = self.slots.abandoned(self.writing)
            self.step -= 1
        else:
            self.slots = self.slots.sealed(self.writing, self.step)
        self.writing = None

    @rule(pick=st.integers(0, 2))
    def protect(self, pick):
        slot = self.slots.slots[pick]
        if slot.state in ("sealed", "protected"):
            self.slots = self.slots.protected(slot.version.step)
            self.newest = max(filter(None, (self.newest, slot.version)))

    @precondition(lambda self: self.writing is None and self.newest is not None)
    @rule()
    def recover(self):
        self.slots = self.slots.rolled_back(self.newest.step)
        self.step = max([self.newest.step, *self.kept])

    @rule(pick=st.integers(0, 2))
    def pin(self, pick):
        slot = self.slots.slots[pick]
        if slot.state == "protected":
            self.slots = self.slots.pin(slot.version.step)
            self.kept[slot.version.step] = self.kept.get(slot.version.step, 0) + 1

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def unpin(self, data):
        step = data.draw(st.sampled_from(sorted(self.kept)))
        self.slots = self.slots.unpin(step)
        self.kept[step] -= 1
        if not self.kept[step]:
            del self.kept[step]

    @invariant()
    def what_matters_is_there(self):
        assert self.slots.newest_protected == (self.newest.step if self.newest else None)
        if self.newest:
            assert self.slots.index_of(self.newest.step) is not None
        for step in self.kept:
            assert self.slots.index_of(step) is not None
        held = [slot.version for slot in self.slots.slots if slot.version is not None]
        assert len(held) == len(set(held))


AnySequence.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnySequence = AnySequence.TestCase

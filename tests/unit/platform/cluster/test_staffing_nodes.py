"""Staffing with nodes to choose from: loss, drain, cordon, room, and who is charged for what."""

from __future__ import annotations

from dataclasses import replace

from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.placement import CORDON_LOSSES, DOUBT_S, Node

NODES = tuple(Node(name, 2, 2) for name in "abc")


class Staff:
    def __init__(self, target: int = 4, spares: int = 0, slots: int | None = None, **limits: int) -> None:
        placed = limits.pop("placed", True)
        infrastructure = limits.pop("infrastructure", -1)
        self.state = st.initial(
            slots or target + spares, target, spares, infrastructure, placed=bool(placed), **limits
        )
        self.now = 0.0
        self.nodes = {node.id: node for node in NODES}

    def on(self, event: st.Event) -> list:
        self.state, commands, reason = st.decide(self.state, event, self.now)
        assert reason
        return list(commands)

    def see(self, **changed: Node | None) -> list:
        for id, node in changed.items():
            self.nodes.pop(id, None)
            if node is not None:
                self.nodes[id] = node
        return self.on(st.NodesAre(tuple(self.nodes[id] for id in sorted(self.nodes))))

    def carry_out(self, commands: list) -> list:
        """Whatever is started comes up; returns the rest."""
        rest = []
        while commands:
            command = commands.pop(0)
            if isinstance(command, st.StartManager):
                commands += self.on(st.ManagerUp(command.slot, command.name, "c", "f"))
            elif isinstance(command, st.StartRank):
                commands += self.on(st.RankReady(command.name))
            else:
                rest.append(command)
        return rest

    def staffed(self) -> Staff:
        self.on(st.Begin())
        assert self.carry_out(self.see()) == []
        names = sorted(slot.trainer for slot in self.state.slots if slot.trainer)[: self.state.target]
        self.on(st.ViewActs(frozenset(names)))
        self.on(st.Protected())
        return self

    def where(self) -> dict[str, str]:
        return {slot.trainer: slot.node for slot in self.state.slots if slot.trainer}


def drained(id: str, until: float) -> Node:
    return Node(id, 2, 0, draining_until=until)


def test_nothing_is_started_before_the_nodes_are_known() -> None:
    staff = Staff()
    assert staff.on(st.Begin()) == []
    assert staff.on(st.Tick()) == []
    assert [c.node for c in staff.see()] == ["a", "b", "c", "a"]


def test_slots_without_room_wait_and_the_autoscaler_is_asked_and_told_when_it_is_over() -> None:
    staff = Staff(target=4)
    staff.nodes = {"a": Node("a", 2, 2)}
    staff.on(st.Begin())
    assert len([c for c in staff.see() if isinstance(c, st.StartManager)]) == 2
    staff.now = st.ASK_AFTER_S
    assert staff.on(st.Tick()) == [st.Want(4)]
    assert staff.on(st.Tick()) == [], "asked once"
    comes = staff.see(b=Node("b", 2, 2))
    assert comes == [st.StartManager(2, "manager-2.1", "b"), st.StartManager(3, "manager-3.1", "b"), st.Want(0)]


def test_a_slot_whose_end_nobody_confirms_moves_to_another_node_without_waiting_for_ray() -> None:
    staff = Staff(target=3).staffed()
    assert staff.on(st.SlotLost(1, "its stream broke")) == []
    staff.now = st.GIVE_UP_S
    assert staff.on(st.Tick()) == [
        st.Kill("manager-1.1"), st.Kill("rank-1.1"), st.StartManager(1, "manager-1.2", "a")
    ]  # fmt: skip
    assert staff.state.losses == 1
    assert staff.on(st.ProcessExit("rank-1.1", "died: its node died")) == [], "late news"
    assert staff.state.losses == 1
    staff.now += DOUBT_S - 1
    staff.on(st.ManagerUp(1, "manager-1.2", "c", "f"))
    staff.see(a=None)
    assert "b" not in {slot.node for slot in staff.state.slots}, "it is still doubted"


def test_a_manager_whose_end_is_confirmed_comes_back_to_the_node_that_has_its_memory() -> None:
    staff = Staff(target=3).staffed()
    staff.on(st.SlotLost(1, "its stream broke"))
    assert staff.on(st.ProcessExit("manager-1.1", "signal 9")) == [st.StartManager(1, "manager-1.2", "b")]
    staff.now = 10.0
    assert staff.on(st.Tick()) == []


def test_what_ray_says_is_gone_is_gone() -> None:
    staff = Staff(target=3).staffed()
    commands = staff.see(b=None)
    assert st.Kill("rank-1.1") in commands
    assert st.StartManager(1, "manager-1.2", "a") in commands


def test_a_drain_is_left_in_order() -> None:
    """[Note: leaving in order]"""
    staff = Staff(target=3).staffed()
    commands = staff.see(b=drained("b", 60.0))
    told = [c for c in commands if isinstance(c, st.Tell)]
    assert [(t.kind, t.names) for t in told] == [("preemption", ("rank-1.1",))]
    assert st.StartManager(3, "manager-3.1", "a") in commands, "a successor, elsewhere"
    assert st.Unwanted(frozenset({"rank-1.1"})) in commands
    assert not [c for c in commands if isinstance(c, st.StopRank | st.Kill | st.EndManager)], "it still serves"
    staff.carry_out(commands)
    assert staff.where()["rank-3.1"] == "a"

    acts = staff.on(st.ViewActs(frozenset({"rank-0.1", "rank-2.1", "rank-3.1"})))
    assert acts == [st.StopRank("rank-1.1"), st.Unwanted()]
    assert staff.on(st.ProcessExit("rank-1.1", "exit 0")) == [], "its manager's memory is the copy"
    assert staff.on(st.Protected()) == [st.EndManager(1, "manager-1.1")]
    assert staff.on(st.ProcessExit("manager-1.1", "exit 0")) == [st.Free(1)]
    assert staff.state.slots[1].node == ""
    assert (staff.state.losses, staff.state.preemptions) == (0, 1)


def test_a_death_on_a_draining_node_is_a_preemption_and_charged_once() -> None:
    staff = Staff(target=3, infrastructure=0).staffed()
    staff.carry_out(staff.see(b=drained("b", 60.0)))
    assert not [c for c in staff.on(st.ProcessExit("rank-1.1", "signal 9")) if isinstance(c, st.GiveUp)]
    staff.see(b=None)
    assert (staff.state.losses, staff.state.preemptions) == (0, 1)


def test_preemptions_have_a_budget_of_their_own() -> None:
    staff = Staff(target=3, preemption_limit=0).staffed()
    (gave_up,) = [c for c in staff.see(b=drained("b", 60.0)) if isinstance(c, st.GiveUp)]
    assert gave_up.kind == "preemption"
    assert "limits.preemption: 0" in gave_up.message


def test_without_room_a_drain_ends_in_a_smaller_view_before_the_deadline() -> None:
    staff = Staff(target=4)
    staff.nodes = {id: Node(id, 2, 2) for id in "ab"}
    staff.staffed()
    assert st.Unwanted(frozenset({"rank-1.1", "rank-3.1"})) in staff.see(b=drained("b", 20.0))
    staff.now = 9.9
    assert [c for c in staff.on(st.Tick()) if isinstance(c, st.Unwanted)] == []
    staff.now = 10.0
    assert st.Unwanted(hard=frozenset({"rank-1.1", "rank-3.1"})) in staff.on(st.Tick())
    stops = staff.on(st.ViewActs(frozenset({"rank-0.1", "rank-2.1"})))
    assert stops[:2] == [st.StopRank("rank-1.1"), st.StopRank("rank-3.1")]


def test_a_spare_on_a_draining_node_goes_at_once_and_one_that_starts_is_killed() -> None:
    staff = Staff(target=2, spares=1).staffed()
    staff.see(c=drained("c", 60.0))
    assert st.StopRank("rank-2.1") in staff.on(st.Tick())
    starting = Staff(target=3)
    starting.on(st.Begin())
    for command in starting.see():
        starting.on(st.ManagerUp(command.slot, command.name, "c", "f"))
    assert st.Kill("rank-1.1") in starting.see(b=drained("b", 60.0))


def test_a_rank_that_is_drained_by_hand_is_on_no_budget_with_nodes_or_without() -> None:
    for placed in (0, 1):
        staff = Staff(target=2, placed=placed, infrastructure=0)
        staff.on(st.Begin())
        staff.carry_out(staff.see() if placed else [st.StartManager(i, f"manager-{i}.1") for i in range(2)])
        staff.on(st.ViewActs(frozenset({"rank-0.1", "rank-1.1"})))
        commands = staff.on(st.Vacate(frozenset({1}), "asked for", planned=True))
        assert [c.kind for c in commands if isinstance(c, st.Tell)] == ["drain"]
        staff.carry_out(commands)
        assert staff.state.slots[2].trainer == "rank-2.1"
        staff.on(st.ViewActs(frozenset({"rank-0.1", "rank-2.1"})))
        staff.on(st.ProcessExit("rank-1.1", "exit 0"))
        assert st.EndManager(1, "manager-1.1") in staff.on(st.Protected())
        assert (staff.state.losses, staff.state.preemptions) == (0, 0)


def test_a_node_whose_ranks_fail_again_and_again_is_cordoned_with_a_finding() -> None:
    staff = Staff(target=2).staffed()
    for number in range(1, CORDON_LOSSES + 1):
        staff.now += 10.0
        commands = staff.on(st.ProcessExit(f"rank-1.{number}", "signal 9"))
        found = [c for c in commands if isinstance(c, st.Tell)]
        assert bool(found) is (number == CORDON_LOSSES)
        if number < CORDON_LOSSES:
            staff.carry_out(commands)
    assert (found[0].kind, found[0].data["syndrome"], found[0].data["node"]) == ("finding", "cordoned", "b")
    assert st.StartManager(1, "manager-1.2", "c") in staff.on(st.ProcessExit("manager-1.1", "signal 9"))


def test_errors_of_the_user_are_not_the_infrastructures() -> None:
    staff = Staff(target=2, infrastructure=0, user_limit=1).staffed()
    staff.on(st.UserError("rank-1.1"))
    assert st.forgiven(staff.state)
    assert staff.on(st.ProcessExit("rank-1.1", "exit 1")) == [st.StartRank(1, "rank-1.2", "b")]
    staff.on(st.RankReady("rank-1.2"))
    staff.on(st.UserError("rank-1.2"))
    assert not st.forgiven(staff.state)
    assert staff.state.losses == 0
    assert not st.forgiven(replace(staff.state, user_errors=1, user_limit=0))


def test_a_smaller_target_gives_places_back() -> None:
    staff = Staff(target=3).staffed()
    staff.on(st.Scale(2))
    (stop,) = staff.on(st.ViewActs(frozenset({"rank-0.1", "rank-1.1"})))
    assert stop == st.StopRank("rank-2.1")
    staff.on(st.ProcessExit("rank-2.1", "exit 0"))
    assert staff.on(st.Protected()) == [st.EndManager(2, "manager-2.1")]
    assert staff.on(st.ProcessExit("manager-2.1", "exit 0")) == [st.Free(2)]
    assert [c.slot for c in staff.on(st.Scale(3)) if isinstance(c, st.StartManager)] == [2]

"""How many processes each job may have: the rules one by one, and what holds whatever happens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as hs

from everstep.platform.cluster.allocation import (
    Absent,
    Capacity,
    Enrolled,
    Event,
    Grant,
    Left,
    Refuse,
    Reported,
    Tick,
    Want,
    bundles,
    decide,
    initial,
)
from everstep.platform.cluster.room import Room, units

CPU = {"CPU": 1.0}


@dataclass
class Cluster:
    """A state, what it commanded, and jobs that do what they are told when `obey` is called."""

    state: object = field(default_factory=initial)
    now: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    wanted: list = field(default_factory=list)
    inbox: dict[str, deque] = field(default_factory=dict)
    acts_on: dict[str, Grant] = field(default_factory=dict)

    def on(self, event: Event) -> None:
        self.state, commands, reason = decide(self.state, event, self.now)
        assert reason
        for command in commands:
            match command:
                case Grant(job):
                    self.inbox.setdefault(job, deque()).append(command)
                case Refuse(job, why):
                    self.refused[job] = why
                case Want():
                    self.wanted.append(bundles(command))

    def nodes(self, *cpus: float) -> None:
        self.on(Capacity({f"n{i}": {"CPU": c} for i, c in enumerate(cpus)}))

    def enrol(self, job: str, low: int, high: int, priority: int = 0, spares: int = 0, demand=None, **runs) -> None:
        self.on(Enrolled(job, priority, low, high, spares, demand or CPU, **runs))

    def obey(self, job: str) -> None:
        """The job carries out the oldest grant that it has not seen, and says so."""
        grant = self.inbox[job].popleft()
        self.acts_on[job] = grant
        self.on(Reported(job, grant.processes, grant.number))

    def settle(self) -> None:
        for _ in range(10_000):
            waiting = [job for job, grants in self.inbox.items() if grants and job in self.state.jobs]
            if not waiting:
                return
            self.obey(waiting[0])
        raise AssertionError("it never comes to rest")

    def granted(self) -> dict[str, int]:
        return {name: job.granted for name, job in self.state.jobs.items()}

    def reason(self, job: str) -> str:
        return self.state.jobs[job].reason


def test_a_job_gets_all_that_it_wants_where_there_is_room():
    c = Cluster()
    c.nodes(4, 4)
    c.enrol("a", 2, 4, spares=1)
    assert c.granted() == {"a": 5}


def test_what_is_known_of_the_cluster_comes_first():
    c = Cluster()
    c.enrol("a", 2, 4)
    assert c.granted() == {"a": 0}
    c.nodes(8)
    assert c.granted() == {"a": 4}


def test_a_job_of_higher_priority_shrinks_a_lower_one_and_gets_only_what_it_let_go_of():
    c = Cluster()
    c.nodes(4)
    c.enrol("low", 1, 4)
    c.settle()
    c.enrol("high", 2, 3, priority=5)
    assert c.granted() == {"low": 1, "high": 0}
    assert "waiting for low to let go" in c.reason("high")
    number = c.state.jobs["low"].number
    c.on(Reported("low", 3, number))
    assert c.granted() == {"low": 1, "high": 0}  # one is free, its min is two: all or nothing
    c.on(Reported("low", 2, number))
    assert c.granted() == {"low": 1, "high": 2}
    c.on(Reported("low", 1, number))
    assert c.granted() == {"low": 1, "high": 3}
    c.on(Left("high"))
    assert c.granted() == {"low": 4}


def test_a_report_from_before_the_order_to_shrink_frees_nothing():
    c = Cluster()
    c.nodes(4)
    c.enrol("low", 1, 4)
    c.enrol("high", 2, 3, priority=5)  # low was told 4, holds nothing yet, and is told 1
    first, second = c.inbox["low"]
    c.on(Reported("low", 0, first.number))
    assert c.granted()["high"] == 0  # it may be about to start four
    c.on(Reported("low", 1, second.number))
    assert c.granted() == {"low": 1, "high": 3}


def test_a_running_job_keeps_its_min_whatever_comes():
    c = Cluster()
    c.nodes(4)
    c.enrol("low", 3, 4)
    c.settle()
    c.enrol("high", 2, 4, priority=9)
    c.settle()
    assert c.granted() == {"low": 4, "high": 0}  # nobody is helped by less, so it keeps what it has
    assert "beside low" in c.reason("high")


def test_equals_share_round_robin_after_the_mins_in_order_of_arrival():
    c = Cluster()
    c.nodes(7)
    for name, low, high in (("a", 1, 8), ("b", 2, 8), ("c", 1, 8)):
        c.enrol(name, low, high)
        c.settle()
    assert c.granted() == {"a": 2, "b": 3, "c": 2}


def test_who_cannot_be_let_in_yet_is_not_overtaken_but_others_may_use_the_room():
    c = Cluster()
    c.nodes(4)
    c.enrol("runs", 2, 4)
    c.settle()
    c.enrol("big", 3, 4, priority=1)
    c.enrol("small", 1, 1)
    c.settle()
    assert c.granted() == {"runs": 4, "big": 0, "small": 0}
    c.on(Left("runs"))
    assert c.granted()["big"] >= 3


def test_a_queued_lower_job_gets_only_what_the_higher_ones_leave():
    c = Cluster()
    c.nodes(4)
    c.enrol("high", 1, 4, priority=1)
    c.settle()
    c.enrol("low", 1, 4)
    c.settle()
    assert c.granted() == {"high": 4, "low": 0}
    c.nodes(4, 1)
    assert c.granted() == {"high": 4, "low": 1}


def test_fit_is_counted_node_by_node():
    c = Cluster()
    c.nodes(3, 3, 3)
    c.enrol("a", 1, 8, demand={"CPU": 2.0})
    assert c.granted() == {"a": 3}  # not four


def test_all_resources_count():
    c = Cluster()
    c.on(Capacity({"n0": {"CPU": 8, "GPU": 2}, "n1": {"CPU": 8}}))
    c.enrol("a", 1, 8, demand={"CPU": 1.0, "GPU": 1.0})
    assert c.granted() == {"a": 2}


def test_a_job_that_can_never_fit_is_refused_at_once_with_what_there_is():
    c = Cluster()
    c.nodes(2, 2)
    c.enrol("a", 5, 8)
    assert "ranks.min is 5" in c.refused["a"]
    assert "holds 4 of them (nodes: 2 with 2 CPU) and cannot grow" in c.refused["a"]
    c.enrol("b", 1, 1, demand={"GPU": 1.0})
    assert "holds 0" in c.refused["b"]
    assert not c.state.jobs


def test_a_job_that_came_before_the_cluster_was_known_is_refused_then_and_never_later():
    c = Cluster()
    c.enrol("a", 5, 8)
    c.enrol("b", 2, 2)
    c.nodes(4)
    assert set(c.refused) == {"a"}
    c.on(Left("b"))
    c.enrol("waits", 3, 4)
    c.on(Capacity({}))  # the nodes are away; they may come back
    assert "waits" not in c.refused


def test_what_others_use_is_a_reason_to_wait_and_not_to_refuse():
    c = Cluster()
    c.on(Capacity({"n": {"CPU": 1}}, {"n": {"CPU": 8}}))
    c.enrol("a", 4, 4)
    assert not c.refused
    assert c.granted() == {"a": 0}
    c.on(Capacity({"n": {"CPU": 8}}, {"n": {"CPU": 8}}))
    assert c.granted() == {"a": 4}


def test_a_cluster_that_can_grow_is_asked_to_and_the_wish_is_taken_back():
    c = Cluster()
    grow = (({"CPU": 2.0}, 3),)
    c.on(Capacity({"n": {"CPU": 1}}, {"n": {"CPU": 2}}, grow))
    c.enrol("a", 4, 4)
    assert c.granted() == {"a": 0}
    assert c.wanted == [[{"CPU": 1.0}] * 5]  # its four, and what others use
    c.enrol("b", 7, 8)
    assert "can grow to hold 6" in c.refused["b"]
    c.on(Left("a"))
    assert c.wanted[-1] == []


def test_who_waits_for_more_nodes_keeps_nobody_waiting():
    c = Cluster()
    c.on(Capacity({"n": {"CPU": 2}}, None, (({"CPU": 4.0}, 3),)))
    c.enrol("a", 4, 4, priority=1)
    c.enrol("b", 2, 2)
    assert c.granted() == {"a": 0, "b": 2}


def test_a_running_job_that_comes_back_keeps_what_it_has():
    c = Cluster()
    c.nodes(4)
    c.enrol("a", 1, 4, granted=3, held=3)
    assert c.granted() == {"a": 4}
    c.enrol("a", 1, 4, granted=4, held=4)
    assert c.granted() == {"a": 4}
    c.enrol("a", 1, 4)  # another execution
    assert c.granted() == {"a": 4}


def test_a_known_job_that_does_not_come_back_is_forgotten_after_the_grace():
    c = Cluster()
    c.nodes(4)
    c.enrol("a", 2, 4)
    c.enrol("b", 2, 4)
    c.settle()
    assert c.granted() == {"a": 2, "b": 2}
    c.on(Absent("a"))
    c.now = 29.0
    c.on(Tick())
    assert set(c.granted()) == {"a", "b"}
    c.now = 31.0
    c.on(Tick())
    assert c.granted() == {"b": 4}


def test_a_lost_node_shrinks_to_what_is_there_but_not_below_min():
    c = Cluster()
    c.nodes(4, 4)
    c.enrol("a", 3, 8)
    c.settle()
    c.nodes(4)
    assert c.granted() == {"a": 4}
    c.nodes(2)
    assert c.granted() == {"a": 3}


# ---- whatever happens -----------------------------------------------------------------------------------

_JOBS = [f"job-{i}" for i in range(5)]
_demands = hs.sampled_from([{"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5}])
_steps = hs.one_of(
    hs.tuples(
        hs.just("enrol"), hs.sampled_from(_JOBS), hs.integers(0, 2), hs.integers(1, 3), hs.integers(0, 3), _demands
    ),
    hs.tuples(hs.just("leave"), hs.sampled_from(_JOBS)),
    hs.tuples(hs.just("obey"), hs.sampled_from(_JOBS)),
    hs.tuples(hs.just("obey"), hs.sampled_from(_JOBS)),
    hs.tuples(hs.just("half"), hs.sampled_from(_JOBS)),
)
_nodes = hs.lists(hs.tuples(hs.integers(0, 6), hs.integers(0, 2)), min_size=1, max_size=4)


def _fits(c: Cluster, amounts: dict[str, int]) -> bool:
    """By total resources: the packing is the product's own business."""
    used: dict[str, float] = {}
    for name, count in amounts.items():
        for resource, parts in c.state.jobs[name].demand:
            used[resource] = used.get(resource, 0) + parts * count
    have: dict[str, float] = {}
    for node in c.state.nodes.values():
        for resource, parts in node.free:
            have[resource] = have.get(resource, 0) + parts
    return all(amount <= have.get(resource, 0) for resource, amount in used.items())


@given(_nodes, hs.lists(_steps, max_size=60))
@settings(max_examples=400, deadline=None)
def test_never_over_capacity_never_below_min_and_it_comes_to_rest(nodes, steps):
    c = Cluster()
    c.on(Capacity({f"n{i}": {"CPU": cpu, "GPU": gpu} for i, (cpu, gpu) in enumerate(nodes)}))
    held: dict[str, int] = {}
    for step in steps:
        name = step[1]
        runs = name in c.state.jobs
        before = c.granted()
        if step[0] == "enrol" and not runs:
            _, _, priority, low, more, demand = step
            c.inbox.pop(name, None)
            c.enrol(name, low, low + more, priority, 0, demand)
            held[name] = 0
        elif step[0] == "leave" and runs:
            c.on(Left(name))
            held[name] = 0
        elif step[0] == "obey" and runs and c.inbox.get(name):
            held[name] = c.inbox[name][0].processes
            c.obey(name)
        elif step[0] == "half" and runs and c.inbox.get(name):  # it has begun to do what it was told
            grant = c.inbox[name][0]
            if held[name] > grant.processes:
                held[name] -= 1
                c.inbox[name].popleft()
                c.on(Reported(name, held[name], grant.number))
                c.inbox[name].appendleft(grant)
        for job, count in c.granted().items():
            assert count == 0 or c.state.jobs[job].min <= count <= c.state.jobs[job].wanted
            assert not (before.get(job) and count == 0), "a running job was put back into the queue"
        assert _fits(c, {job: max(held[job], count) for job, count in c.granted().items()})
    c.settle()
    _check_rest(c)


def _check_rest(c: Cluster) -> None:
    """At rest priorities are respected and nothing that somebody could use lies idle."""
    jobs = c.state.jobs
    nodes = {name: node.free for name, node in c.state.nodes.items()}
    for name, job in jobs.items():
        if job.granted and job.granted < job.wanted:
            for other, its in jobs.items():  # whoever is lower gives up all that it can before a higher one lacks
                if its.priority < job.priority and its.demand == job.demand:
                    assert its.granted <= its.min, f"{other} has more than its min while {name} lacks some"
    if len({job.demand for job in jobs.values()}) == 1:
        (demand,) = {job.demand for job in jobs.values()}
        room = Room(nodes)
        room.take(demand, sum(job.granted for job in jobs.values()))
        if room.count(demand, 1):
            lacking = [name for name, job in jobs.items() if job.granted and job.granted < job.wanted]
            assert not lacking, f"room is left, and {lacking} lack some"
            blocked = [name for name, job in jobs.items() if not job.granted and room.fits(demand, job.min)]
            first = min(
                (job for job in jobs.values() if not job.granted and Room(nodes).fits(demand, job.min)),
                key=lambda job: (-job.priority, job.arrival),
                default=None,
            )
            assert first is None or not room.fits(demand, first.min), f"{blocked} starve"


@given(_nodes, hs.lists(hs.tuples(hs.sampled_from([1.0, 2.0]), hs.integers(0, 7)), min_size=1, max_size=6))
def test_sharing_in_bulk_is_the_same_as_one_by_one(nodes, wishes):
    free = {f"n{i}": units({"CPU": cpu}) for i, (cpu, _) in enumerate(nodes)}
    same = [(units({"CPU": 1.0}), wish) for _, wish in wishes]
    apart = [(units({"CPU": 1.0}), wish) for _, wish in wishes] + [(units({"GPU": 1.0}), 1)]
    assert Room(free).share(same) == Room(free).share(apart)[:-1]

"""One run in virtual time: everstep's own deciders, and around them a world that answers after a while.

Nothing is decided here. `World` has the clock and the events; `Run` carries out what the deciders say as simply as
can be (everybody answers, some later than others) and strikes. What is timed is a decider's call, nothing around it.
"""

import heapq
import itertools
import random
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from parts.scale_state import Memory, Model, vote

from everstep.actors.stalls import StallJudge
from everstep.collectives import membership as mb
from everstep.collectives.messages import Member, ViewId
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.desk import Desk, Resume
from everstep.platform.cluster.ledger import Ledger
from everstep.platform.job.spec import JobSpec
from everstep.platform.training.messages import ViewPlan
from everstep.platform.training.protection import failure_domains
from everstep.platform.training.recovery import Lost

NODE = 8  # ranks
_STEP_S = 1.0
_TICK_S = 0.1


class Allocator(Protocol):
    """Who shares the cluster among jobs: the seam for platform/cluster/allocation.py.

    Each call returns {job: ranks} of the jobs whose ranks change.
    """

    def enrolled(self, job: int, least: int, most: int, now: float) -> dict[int, int]: ...

    def reported(self, job: int, ranks: int, now: float) -> dict[int, int]: ...

    def left(self, job: int, now: float) -> dict[int, int]: ...

    def capacity(self, ranks: int, now: float) -> dict[int, int]: ...


class Meter:
    """Seconds of every decision, by kind of event."""

    def __init__(self) -> None:
        self.seconds: dict[str, array[float]] = defaultdict(lambda: array("d"))

    def time(self, kind: str, call: Callable[[], Any]) -> Any:
        begun = time.thread_time()  # nothing in a decision waits, so on a free core this is its latency
        found = call()
        self.seconds[kind].append(time.thread_time() - begun)
        return found

    def all(self) -> list[float]:
        return sorted(itertools.chain.from_iterable(self.seconds.values()))


class World:
    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._count), action))

    def run(self, done: Callable[[], bool], until_s: float) -> None:
        while self._queue and not done():
            at, _, action = heapq.heappop(self._queue)
            if at > until_s:
                raise RuntimeError(f"the runs have not ended after {until_s:g} virtual seconds")
            self.now = at
            action()


@dataclass
class Plan:
    ranks: int
    steps: int
    tensors: int
    faults: dict[str, int] = field(default_factory=dict)  # how many of each kind, spread over the run


class Run:
    """`done` when the last step is decided."""

    def __init__(self, number: int, world: World, meter: Meter, plan: Plan) -> None:
        self.number, self.world, self.meter, self.plan = number, world, meter, plan
        self.done = False
        self.committed = 0
        self.seen: dict[str, int] = defaultdict(int)
        self.view_bytes = 0
        ranks = plan.ranks
        spares = NODE
        self.least = least = max(1, ranks - 10 * NODE)
        self.spec = JobSpec.parse(
            {
                "name": f"job-{number}", "task": "t.py:T", "steps": 10**9, "lanes": ranks, "limits": {
                    "infrastructure": -1}, "ranks": {"min": least, "max": ranks, "spares": spares},
                "snapshot": {"every": 1, "parity": 1, "domain": "node"},
            }
        )  # fmt: skip
        self.model = Model(plan.tensors)
        self.memory = Memory(self.model)
        self.state = mb.initial(1, least, ranks, world.now, 120.0)
        self.staff = st.initial(ranks + spares, ranks, spares, -1)
        self.desk = Desk(self.spec, Resume(), lambda step: "")
        self.ledger = Ledger(0, world.now)
        self.stalls = StallJudge(60.0)
        self.managers: dict[str, str] = {}  # domain -> its living manager
        self.trainers: dict[str, Member] = {}  # living and joined
        self._plan: ViewPlan | None = None
        self._stocks: tuple[ViewId | None, dict[str, bytes]] = (None, {})
        self._inventories: dict[str, bytes] = {}
        self._due: list[tuple[int, str]] = sorted(
            (1 + world.rng.randrange(1, max(2, plan.steps - 1)), kind)
            for kind, n in plan.faults.items()
            for _ in range(n)
        )
        self._staffed(st.Begin())
        self._tick()

    # ---- deciders -----------------------------------------------------------------------------------------

    def _feed(self, event: mb.Event) -> None:
        kind = type(event).__name__
        self.state, commands, _ = self.meter.time(kind, lambda: mb.decide(self.state, event, self.world.now))
        for command in commands:
            self._perform(command)

    def _staffed(self, event: st.Event) -> None:
        name = f"staffing {type(event).__name__}"
        self.staff, commands, _ = self.meter.time(name, lambda: st.decide(self.staff, event, self.world.now))
        rng = self.world.rng
        for command in commands:
            match command:
                case st.StartManager(slot, name):
                    self.world.after(rng.uniform(0.2, 0.6), lambda s=slot, n=name: self._manager_up(s, n))
                case st.StartRank(slot, name):
                    self.world.after(rng.uniform(2.0, 8.0), lambda s=slot, n=name: self._joins(s, n))
                case st.StopRank(name):
                    self._gone(name, "not needed any more")

    def _tick(self) -> None:
        if self.done:
            return
        self.meter.time("stalls look", lambda: self.stalls.look(self.state, self.world.now))
        self._feed(mb.Tick())
        self._staffed(st.Tick())
        self.world.after(_TICK_S, self._tick)

    # ---- processes ----------------------------------------------------------------------------------------

    def _manager_up(self, slot: int, name: str) -> None:
        if self.done or self.staff.slots[slot].manager != name:
            return
        self.managers[_domain(slot)] = name
        self._feed(mb.WatcherUp(_domain(slot)))
        self._staffed(st.ManagerUp(slot, name, f"c:{slot}", f"f:{slot}"))

    def _joins(self, slot: int, name: str) -> None:
        if self.done or self.staff.slots[slot].trainer != name or _domain(slot) not in self.managers:
            return
        address = f"10.0.{slot // 250}.{slot % 250}:40000"
        self.trainers[name] = Member(name, slot, _domain(slot), address, address, 1000 + slot, f"{slot // NODE}/x")
        self._staffed(st.RankReady(name))
        self._feed(mb.Joined(self.trainers[name]))

    def _gone(self, name: str, cause: str, detected_ms: float = 20.0) -> None:
        """A trainer is dead: its judge says so, then whoever started it."""
        if self.trainers.pop(name, None) is not None:
            self._feed(mb.MemberDied(name, cause, detected_ms))
        self._staffed(st.ProcessExit(name, cause))

    def _manager_gone(self, domain: str, cause: str) -> None:
        manager = self.managers.pop(domain, None)
        if manager is None:
            return
        self._feed(mb.WatcherLost(domain))
        if name := self.staff.slots[_slot(domain)].trainer:
            self._gone(name, f"its manager was lost ({cause})")
        self._staffed(st.ProcessExit(manager, cause))

    # ---- commands -----------------------------------------------------------------------------------------

    def _perform(self, command: mb.Command) -> None:
        match command:
            case mb.SendPrepare(prepare, domain):
                self._prepared(prepare, domain)
            case mb.Choose():
                self._choose(command)
            case mb.SendView(view):
                for member in view.members:
                    self._later(0.3, mb.Levelled(member.name, view.id))
            case mb.SendGo(view):
                assert self._plan is not None
                members = [(member.name, member.domain) for member in view.members]
                self.memory.take((view.id.epoch, view.id.number), view.base_step, members, self._plan)
                now = self.world.now
                self.meter.time("ledger acts", lambda: self.ledger.acts(view.base_step, len(members), now))
                self._staffed(st.ViewActs(frozenset(name for name, _ in members)))
                self._vote(view, view.base_step + 1)
            case mb.Judge(view, step, votes):
                self._judge(view, step, votes)
            case mb.SendVerdict(view, step, _, reform):
                self._decided(view, step, reform)
            case mb.Fail(reason):
                raise RuntimeError(reason)

    def _later(self, most_s: float, event: mb.Event) -> None:
        self.world.after(self.world.rng.uniform(0.001, most_s), lambda: None if self.done else self._feed(event))

    def _prepared(self, prepare: Any, domain: str) -> None:
        """Nobody answers twice; who is not there does not answer. Stocks come after inventories."""
        id = prepare.id
        if self._stocks[0] != id:
            self._stocks = (id, self.memory.stocks())
            self._inventories = {}
        stocks = self._stocks[1]
        if not domain:
            for name in prepare.asked:
                if name in self.trainers:
                    if name not in self._inventories:
                        self._inventories[name] = self.memory.inventory(name)
                    self._answer(0.0, mb.Inventoried(name, id, self._inventories[name]))
        nothing = msgspec.msgpack.encode({})
        for d in (domain,) if domain else self.managers:
            slot = _slot(d)
            fenced = tuple(name for name in prepare.fence if _slot(name) == slot)
            self._answer(0.2, mb.Stocked(d, id, fenced, stocks.get(d, nothing)))

    def _answer(self, least_s: float, answer: mb.Inventoried | mb.Stocked) -> None:
        """Who has been asked again by then does not answer what it was asked before."""

        def say() -> None:
            if self._stocks[0] == answer.id and not self.done:
                self._feed(answer)

        self.world.after(least_s + self.world.rng.uniform(0.001, 0.2), say)

    def _choose(self, command: mb.Choose) -> None:
        members = command.members
        try:
            choice = self.meter.time(
                "desk choose", lambda: self.desk.choose(members, command.inventories, command.stocks)
            )
        except Lost as lost:
            self._feed(mb.Unchoosable(command.id, str(lost)))
            return
        nodes = {_domain(slot): f"node-{slot // NODE}" for slot in range(len(self.staff.slots))}
        domains = failure_domains("node", [member.domain for member in members], nodes)
        fetch = {d: f"f:{d}" for d in self.managers}
        self._plan = self.meter.time("desk plan", lambda: self.desk.plan(choice, fetch, domains))
        payload = self.meter.time("view encode", lambda: msgspec.msgpack.encode(self._plan))
        self.view_bytes = len(payload)
        self.committed = choice.base_step
        self._feed(mb.Chosen(command.id, choice.base_step, payload))

    def _vote(self, view: Any, step: int) -> None:
        assert self._plan is not None
        ranks, block = len(view.members), self.model.layout.block
        for rank, member in enumerate(view.members):
            blocks = sum((stop - start) // block for start, stop in self._plan.owned[rank])
            payload = vote(rank, ranks, self.spec.lanes, step, blocks)
            self._later(_STEP_S, mb.Voted(member.name, view.id, step, payload))
        if self._due and self._due[0][0] <= step:
            _, kind = self._due.pop(0)
            self.world.after(self.world.rng.uniform(0, _STEP_S), lambda: self._strike(kind))

    def _judge(self, view: Any, step: int, votes: Any) -> None:
        judged = self.meter.time("desk judge", lambda: self.desk.judge(step, votes, _STEP_S, self.world.now))
        stalls = [v.stall_s for v in judged.votes.values()]
        self.meter.time(
            "ledger committed", lambda: self.ledger.committed(step, judged.verdict, stalls, self.world.now)
        )
        payload = msgspec.msgpack.encode(judged.verdict)
        self._feed(mb.Judged(view.id, step, payload, False, judged.verdict.protected_step))

    def _decided(self, view: Any, step: int, reform: bool) -> None:
        self.memory.sealed(step)
        self.committed = step
        self.seen["steps"] += 1
        if step >= self.plan.steps and not self._due:
            self.done = True
        elif not reform:
            self._vote(view, step + 1)

    # ---- faults -------------------------------------------------------------------------------------------

    def _strike(self, kind: str) -> None:
        if self.done:
            return
        self.seen[kind] += 1
        rng = self.world.rng
        name = rng.choice(sorted(self.trainers)) if self.trainers else ""
        match kind:
            case "kill" if name:
                self._gone(name, "signal 9")
            case "freeze" if name:
                self._gone(name, "frozen (stopped by a signal)", 40.0)
            case "node" if name:
                node = self.trainers[name].slot // NODE
                domains = [_domain(slot) for slot in range(node * NODE, node * NODE + NODE)]
                self.memory.lost |= set(domains)
                rng.shuffle(domains)
                for domain in domains:
                    self._manager_gone(domain, "its node is gone")
            case "drain":
                ranks = self.plan.ranks
                self.retarget(max(self.state.minimum, ranks - NODE))
                self.world.after(5 * _STEP_S, lambda: self.retarget(ranks))
            case "take-over":
                self._take_over()

    def retarget(self, ranks: int) -> None:
        if not self.done:
            self._staffed(st.Scale(ranks))
            self._feed(mb.Retarget(ranks))

    def _take_over(self) -> None:
        """A successor of a higher epoch: it knows which domains there are, and hears of all else anew."""
        old = self.state
        missing = frozenset(self.managers)
        self.state = mb.initial(old.epoch + 1, old.minimum, old.target, self.world.now, 120.0, missing)
        for domain in self.managers:
            self._later(0.5, mb.WatcherUp(domain))
        for member in self.trainers.values():
            self._later(1.0, mb.Joined(member))


def _domain(slot: int) -> str:
    return f"slot-{slot}"


def _slot(name: str) -> int:
    """Of a domain or a process."""
    return int(name.partition("-")[2].partition(".")[0])

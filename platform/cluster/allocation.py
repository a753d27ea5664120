"""How many processes each job of a cluster may have. Pure.

`decide(state, event, now) -> (state, commands, reason)`; actors.controller is the shell, platform.cluster.room counts
what fits on the nodes.

    event      effect
    ---------  -------------------------------------------------------------------------------------------------
    Enrolled   a new job is queued, or refused where not even the empty cluster, grown as far as it can, has room for
               its min; a known one, or one that runs (`granted`), keeps what it has. It is told what it has
    Reported   what the job holds now: what it let go of may be granted to others
    Absent     its supervisor is not heard of: after `grace_s` the job is forgotten
    Left       the job is forgotten, the others grow
    Capacity   the nodes: what each has in all, and what of it others than the jobs leave
    Tick       the absent are forgotten after their grace

A job runs while it is granted anything, which then is at least its min; else it is queued. Who gets what:

    1. a running job's min, whatever the priorities are
    2. tiers by priority, high ones first; in a tier the mins of the queued in order of arrival, all or nothing, then
       what is left round-robin, up to max + spares
    3. who cannot be let in yet, though the nodes could hold it, lets nobody in that comes after it (or it would wait
       for ever); meanwhile the running ones use that room. Who waits for more nodes keeps nobody waiting

That is the plan. Shrinking to it is told at once; growth is granted only out of room that nobody holds any more: what
a shrinking job holds counts until it reported that it let it go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from everstep.platform.cluster.room import Room, Units, pack, plain, shown, units

GRACE_S = 30.0
"""A standby supervisor takes over within seconds, a restarted one within its start (10 s with an installed
environment); who is away for longer is not coming back."""


@dataclass(frozen=True)
class Job:
    priority: int
    min: int
    max: int
    spares: int
    demand: Units  # of one process
    arrival: int
    granted: int = 0  # 0: queued
    held: int = 0
    reason: str = ""
    number: int = 0  # of the grant that it was told last
    may: int = 0  # the most of what it was told since it answered
    absent_since: float | None = None
    proven: bool = False  # it was seen to fit the cluster

    @property
    def wanted(self) -> int:
        return self.max + self.spares

    @property
    def bound(self) -> int:
        """What it takes of the cluster: what it holds, or may be about to start."""
        return max(self.held, self.may)


@dataclass(frozen=True)
class Node:
    """What a node has, and what of it is there for the jobs (the rest is used by others)."""

    total: Units
    free: Units


@dataclass(frozen=True)
class State:
    jobs: Mapping[str, Job]
    nodes: Mapping[str, Node] | None = None  # not known yet
    addable: tuple[tuple[Units, int], ...] = ()
    arrivals: int = 0
    grants: int = 0
    grace_s: float = GRACE_S
    asked: tuple[tuple[Units, int], ...] = ()  # of the autoscaler
    settled: bool = False  # all is granted as planned, and the plan does not ask what is held


@dataclass(frozen=True)
class Enrolled:
    """`granted`: what a job that runs already was granted last; `held`: the processes that it has."""

    job: str
    priority: int
    min: int
    max: int
    spares: int
    demand: Mapping[str, float]
    granted: int = 0
    held: int = 0


@dataclass(frozen=True)
class Reported:
    """`number`: of the newest grant that it has heard of when it held that."""

    job: str
    held: int
    number: int


@dataclass(frozen=True)
class Absent:
    job: str


@dataclass(frozen=True)
class Left:
    job: str


@dataclass(frozen=True)
class Capacity:
    """nodes: id -> what the node has less what others than the jobs use. `total`: id -> all that it has, where others
    use any. `addable`: what a cluster that can grow may add: (a node's resources, at most so many)."""

    nodes: Mapping[str, Mapping[str, float]]
    total: Mapping[str, Mapping[str, float]] | None = None
    addable: tuple[tuple[Mapping[str, float], int], ...] = ()


@dataclass(frozen=True)
class Tick:
    pass


Event = Enrolled | Reported | Absent | Left | Capacity | Tick


@dataclass(frozen=True)
class Grant:
    """0 processes: it is queued, and why."""

    job: str
    processes: int
    reason: str
    number: int


@dataclass(frozen=True)
class Refuse:
    job: str
    reason: str


@dataclass(frozen=True)
class Want:
    """What the cluster should have in all: (resources, how often). Empty: nothing in particular."""

    bundles: tuple[tuple[Units, int], ...]


Command = Grant | Refuse | Want
Decision = tuple[State, tuple[Command, ...], str]


def initial(
    jobs: Mapping[str, Job] | None = None, arrivals: int = 0, grants: int = 0, grace_s: float = GRACE_S
) -> State:
    """`jobs`: what an earlier controller knew; each is to say within the grace that it lives."""
    return State(dict(jobs or {}), arrivals=arrivals, grants=grants, grace_s=grace_s)


def decide(state: State, event: Event, now: float) -> Decision:
    match event:
        case Enrolled():
            return _enrolled(state, event)
        case Reported(name, held, number):
            job = state.jobs.get(name)
            may = job.granted if job is not None and job.number == number else job.may if job is not None else 0
            if job is None or (job.held, job.may) == (held, may):
                return state, (), f"{name} holds {held}"
            why = f"{name} let go of {job.held - held}" if held < job.held else f"{name} holds {held}"
            reported = _with(state, name, held=held, may=may)
            return (reported, (), why) if state.settled else _allocated(reported, why)
        case Absent(name):
            if name not in state.jobs:
                return state, (), f"{name} is not known"
            return _with(state, name, absent_since=now), (), f"{name} is not heard of any more"
        case Left(name):
            if name not in state.jobs:
                return state, (), f"{name} is not known"
            return _allocated(_without(state, {name}), f"{name} ended")
        case Capacity():
            return _changed(state, event)
        case Tick():
            limit = now - state.grace_s
            gone = {n for n, j in state.jobs.items() if j.absent_since is not None and j.absent_since < limit}
            if not gone:
                return state, (), "tick"
            why = f"{', '.join(sorted(gone))} not heard of for {state.grace_s:g} s"
            return _allocated(_without(state, gone), why)


# ---- events ---------------------------------------------------------------------------------------------


def _enrolled(state: State, event: Enrolled) -> Decision:
    known, demand = state.jobs.get(event.job), units(event.demand)
    granted = 0
    reason = ""
    if event.granted:  # it runs: the table may be newer than what it was told, or not know it
        granted = (
            known.granted if known is not None and known.granted else min(event.granted, event.max + event.spares)
        )
        granted = max(granted, event.min)
        reason = known.reason if known is not None else ""
    arrival = state.arrivals if known is None else known.arrival
    may = max(granted, event.granted)
    job = Job(
        event.priority, event.min, event.max, event.spares, demand, arrival, granted, event.held, reason,
        may=may, proven=granted > 0,
    )  # fmt: skip
    state = replace(state, arrivals=state.arrivals + (known is None), jobs={**state.jobs, event.job: job})
    if state.nodes is not None:
        objection = _objection(state, job)
        if objection:
            state, commands, _ = _allocated(_without(state, {event.job}), f"{event.job} is refused")
            return state, (Refuse(event.job, objection), *commands), f"{event.job} is refused: {objection}"
        state = _with(state, event.job, proven=True)
    why = f"{event.job} (priority {event.priority}) came"
    state, commands, reason = _allocated(state, why)
    if not any(isinstance(command, Grant) and command.job == event.job for command in commands):
        job = state.jobs[event.job]
        state, told = _told(state, event.job, job.granted, job.reason or "as before")
        commands = (*commands, told)
    return state, commands, reason


def _changed(state: State, event: Capacity) -> Decision:
    total = event.total or event.nodes
    nodes = {name: Node(units(total[name]), units(free)) for name, free in event.nodes.items()}
    addable = tuple((units(resources), most) for resources, most in event.addable)
    if nodes == state.nodes and addable == state.addable:
        return state, (), "the cluster is as before"
    state = replace(state, nodes=nodes, addable=addable)
    refused: list[Command] = []
    for name, job in state.jobs.items():
        if not job.proven and (objection := _objection(state, job)):
            refused.append(Refuse(name, objection))
    state = _without(state, {command.job for command in refused if isinstance(command, Refuse)})
    state = replace(state, jobs={name: replace(job, proven=True) for name, job in state.jobs.items()})
    state, commands, reason = _allocated(state, "the cluster has changed")
    return state, (*refused, *commands), reason


def _objection(state: State, job: Job) -> str:
    """Why a job that does not run yet can never run here; "" where it can."""
    assert state.nodes is not None
    if job.granted:
        return ""
    there = Room({name: node.total for name, node in state.nodes.items()}).count(job.demand, job.min)
    grown = sum(Room({"": vector}).count(job.demand, job.min) * most for vector, most in state.addable)
    if max(there, grown) >= job.min:
        return ""
    have: dict[Units, int] = {}
    for node in state.nodes.values():
        have[node.total] = have.get(node.total, 0) + 1
    nodes = "; ".join(f"{count} with {shown(vector)}" for vector, count in sorted(have.items())) or "none"
    grow = "cannot grow" if not state.addable else f"can grow to hold {grown}"
    return (
        f"it can never run here: ranks.min is {job.min}, each with {shown(job.demand)}, and the empty cluster holds "
        f"{there} of them (nodes: {nodes}) and {grow}; ask for fewer or smaller ranks, or add nodes"
    )


# ---- who gets what --------------------------------------------------------------------------------------


def _allocated(state: State, why: str) -> Decision:
    if state.nodes is None:
        return state, (), f"{why}; the cluster is not known yet"
    free = {name: node.free for name, node in state.nodes.items()}
    target = _plan(state.jobs, free)
    given = _reachable(state.jobs, free, target)
    told = []
    for name, job in state.jobs.items():
        count = given[name]
        if count == 0:
            reason = _queued(state.jobs, name, target)
        else:
            reason = job.reason if count == job.granted else f"{count} of {job.wanted} processes: {why}"
        if count != job.granted or reason != job.reason:
            told.append((name, count, reason))
    commands: list[Command] = []
    for name, count, reason in told:
        state, grant = _told(state, name, count, reason)
        commands.append(grant)
    state = replace(state, settled=given == target)
    want = _want(state)
    if want != state.asked:
        state = replace(state, asked=want)
        commands.append(Want(want))
    return state, tuple(commands), why


def _told(state: State, name: str, count: int, reason: str) -> tuple[State, Grant]:
    number, job = state.grants + 1, state.jobs[name]
    state = _with(state, name, granted=count, reason=reason, number=number, may=max(job.may, count))
    return replace(state, grants=number), Grant(name, count, reason, number)


def _plan(jobs: Mapping[str, Job], free: Mapping[str, Units]) -> dict[str, int]:
    """Rules 1 to 3 of the top."""
    room, target, blocked = Room(free), dict.fromkeys(jobs, 0), False
    for tier in _tiers(jobs):
        for name in tier:
            if jobs[name].granted:
                target[name] = jobs[name].min
                room.take(jobs[name].demand, jobs[name].min)
    for tier in _tiers(jobs):
        for name in tier:
            job = jobs[name]
            if job.granted or blocked:
                continue
            if room.fits(job.demand, job.min):
                target[name] = room.take(job.demand, job.min)
            else:
                blocked = Room(free).fits(job.demand, job.min)
        _share(room, jobs, [name for name in tier if target[name]], target, {n: jobs[n].wanted for n in tier})
    return target


def _reachable(jobs: Mapping[str, Job], free: Mapping[str, Units], target: Mapping[str, int]) -> dict[str, int]:
    """What of the plan can be granted now."""
    if all(job.bound <= target[name] for name, job in jobs.items()):
        return dict(target)  # nobody has anything to let go of
    given = {name: min(job.bound, target[name]) if job.granted else 0 for name, job in jobs.items()}
    order = [name for tier in _tiers(jobs) for name in tier]
    room = pack(free, ((jobs[name].demand, jobs[name].bound) for name in order))
    for tier in _tiers(jobs):
        for name in tier:
            job = jobs[name]
            if not given[name] and target[name] and room.fits(job.demand, job.min):
                given[name] = room.take(job.demand, job.min)
        _share(room, jobs, [name for name in tier if given[name]], given, target)
    return given


def _share(
    room: Room, jobs: Mapping[str, Job], names: list[str], given: dict[str, int], upto: Mapping[str, int]
) -> None:
    more = room.share([(jobs[name].demand, max(0, upto[name] - given[name])) for name in names])
    for name, count in zip(names, more, strict=True):
        given[name] += count


def _tiers(jobs: Mapping[str, Job]) -> Iterator[list[str]]:
    """Names by priority, high ones first, in order of arrival."""
    order = sorted(jobs, key=lambda name: (-jobs[name].priority, jobs[name].arrival))
    for _, tier in groupby(order, key=lambda name: jobs[name].priority):
        yield list(tier)


def _queued(jobs: Mapping[str, Job], name: str, target: Mapping[str, int]) -> str:
    job = jobs[name]
    need = f"queued: {job.min} processes of {shown(job.demand)} are needed"
    if target[name]:
        slow = [other for other, its in jobs.items() if its.bound > target[other]]
        return (
            f"{need}; waiting for {', '.join(sorted(slow))} to let go of {'its' if len(slow) == 1 else 'their'} ranks"
        )
    others = [other for other, its in jobs.items() if its.granted]
    beside = f" beside {', '.join(sorted(others)[:5])}{' and more' if len(others) > 5 else ''}" if others else ""
    return f"{need}, which is more than the cluster has room for{beside} now"


def _want(state: State) -> tuple[tuple[Units, int], ...]:
    """All that jobs and others could use, where the cluster can grow and somebody lacks something."""
    assert state.nodes is not None
    short = any(job.granted < job.wanted for job in state.jobs.values())
    if not state.addable or not state.jobs or not (short or state.asked):
        return ()
    wanted: dict[Units, int] = {}
    for job in state.jobs.values():
        wanted[job.demand] = wanted.get(job.demand, 0) + job.wanted
    for node in state.nodes.values():  # Ray would take what others use for room that we can have
        free = dict(node.free)
        used = tuple((name, parts - free.get(name, 0)) for name, parts in node.total if parts > free.get(name, 0))
        if used:
            wanted[used] = wanted.get(used, 0) + 1
    return tuple(sorted(wanted.items()))


def bundles(want: Want) -> list[dict[str, float]]:
    """As Ray's autoscaler takes them."""
    return [plain(vector) for vector, count in want.bundles for _ in range(count)]


def _with(state: State, name: str, **changes: object) -> State:
    return replace(state, jobs={**state.jobs, name: replace(state.jobs[name], **changes)})  # type: ignore[arg-type]


def _without(state: State, names: set[str]) -> State:
    return replace(state, jobs={name: job for name, job in state.jobs.items() if name not in names})

"""Who is in the view: the coordinator's decisions, pure.

`decide(state, event, now) -> (state, commands, reason)`. No clock, no socket, no randomness.

    phase      event                     next phase
    ---------  ------------------------  ----------------------------------------------------------------
    Waiting    Joined, Tick              Gathering, when the target (or, after patience, the minimum) is ready
    Gathering  Inventoried, Stocked      Leveling through Choose/Chosen, when all that was asked has answered
    Gathering  Chosen behind the floor   unchanged while watchers are missing, for `patience_s`; Leveling
    Gathering  Unchoosable               the same, then Ended; at once where no watcher is missing
    any        WatcherUp, WatcherLost    unchanged; a Gathering asks it too, or goes on without that stock
    Leveling   Levelled (all)            Active
    Active     Voted (all)               Active next step; Gathering where the wanted members differ; Ended
    any        Died of a member          Gathering of the survivors; Waiting below the minimum
    any        Died of an outsider       unchanged
    any        Complained                unchanged; Gathering of the same members if the view still stands after a
                                         grace: both ends of the link live, so new connections are made
    Waiting    Roused                    Gathering of those who are ready, the minimum or more, without patience
    any        Retarget                  unchanged; takes effect at the next step boundary
    any        Unwanted                  the same: members that are to leave give way in order
    any        Finish                    Ended

[Note: two rounds] A Gathering first quiesces its members (their Inventory comes after their last write), then
takes each watcher's Stock, which follows the fencing of the dead: so what the chooser sees cannot change.
"""

from __future__ import annotations

from dataclasses import replace

from everstep.collectives.errors import InvalidTransition
from everstep.collectives.growing import grown
from everstep.collectives.membership_state import (
    Active,
    Choose,
    Chosen,
    Command,
    Complained,
    Decision,
    Ended,
    Event,
    Fail,
    Finish,
    Gathering,
    Inventoried,
    Joined,
    Judge,
    Judged,
    Leveling,
    Levelled,
    MemberDied,
    Phase,
    Refuse,
    Retarget,
    Roused,
    SendGo,
    SendPrepare,
    SendVerdict,
    SendView,
    State,
    Stocked,
    Tick,
    Unchoosable,
    Unwanted,
    Voted,
    Waiting,
    WatcherLost,
    WatcherUp,
)
from everstep.collectives.messages import Lost, Member, Prepare, View, ViewId

__all__ = [
    "COMPLAINT_GRACE_S", "Active", "Choose", "Chosen", "Command", "Complained", "Decision", "Ended", "Event",
    "Fail", "Finish", "Gathering", "InvalidTransition", "Inventoried", "Joined", "Judge", "Judged", "Leveling",
    "Levelled", "MemberDied", "Phase", "Refuse", "Retarget", "Roused", "SendGo", "SendPrepare", "SendVerdict",
    "SendView", "State", "Stocked", "Tick", "Unchoosable", "Unwanted", "Voted", "Waiting", "WatcherLost", "WatcherUp",
    "current_members", "decide", "initial", "wanted_members",
]  # fmt: skip

_KEPT_EVENTS = 16
COMPLAINT_GRACE_S = 1.0  # a death is reported within milliseconds of the broken connections it causes


def initial(
    epoch: int,
    minimum: int,
    target: int,
    now: float,
    patience_s: float = 30.0,
    missing: frozenset[str] = frozenset(),
    floor: int | None = None,
) -> State:
    """`missing`: domains that may hold state of earlier epochs and have not reported to this one yet. `floor`: newest
    step that an earlier epoch is known to have protected."""
    return State(epoch, minimum, target, Waiting(now), missing=missing, floor=floor, patience_s=patience_s)


def decide(state: State, event: Event, now: float) -> Decision:
    """The next state, what to do, and why. Raises InvalidTransition for what the table forbids."""
    recent = (
        *state.recent[-_KEPT_EVENTS:],
        f"{now:.3f} {type(state.phase).__name__} <- {type(event).__name__}",
    )
    # What a step brings changes nobody's wish for other members, so it is not looked into again at each verdict.
    steady = state.steady and isinstance(event, Voted | Judged | Tick)
    state = replace(state, recent=recent, steady=steady)
    if isinstance(state.phase, Ended):
        return state, (), "the run has ended"
    match event:
        case Joined(member):
            return _joined(state, member, now)
        case MemberDied():
            return _died(state, event, now)
        case WatcherUp(domain):
            return _watcher_up(state, domain)
        case WatcherLost(domain, planned):
            return _watcher_lost(state, domain, planned)
        case Inventoried():
            return _inventoried(state, event)
        case Stocked():
            return _stocked(state, event)
        case Chosen():
            return _chosen(state, event, now)
        case Unchoosable():
            return _unchoosable(state, event)
        case Levelled():
            return _levelled(state, event)
        case Voted():
            return _voted(state, event)
        case Judged():
            return _judged(state, event, now)
        case Complained(name, id, about, error):
            return _complained(state, name, id, f"{name} lost its connection to {about}: {error}", now)
        case Retarget(ranks):
            return _start_if_enough(replace(state, target=ranks), now, f"target is {ranks} ranks")
        case Roused():
            # A view was there before: from now on nobody waits for the target.
            return _start_if_enough(
                replace(state, number=max(state.number, 1)), now, "those who are left have reported"
            )
        case Unwanted(unwanted, leaving):
            return replace(state, unwanted=unwanted, leaving=leaving), (), "who is to leave has changed"
        case Finish(reason, ok):
            return replace(state, phase=Ended(reason, ok)), (), reason
        case Tick():
            return _tick(state, now)
    raise InvalidTransition(f"unknown event {event!r}", state.recent)


def current_members(state: State) -> tuple[Member, ...]:
    """Of the view that acts or is being formed; empty while waiting."""
    match state.phase:
        case Gathering(members=members):
            return members
        case Leveling(view=view) | Active(view=view):
            return view.members
    return ()


def wanted_members(state: State) -> tuple[Member, ...]:
    """The view to have at the next boundary: present members first, then the ready ones, by slot; who is to leave
    comes after all others, and not at all where its time is up, unless the minimum needs it.
    """
    present, last = {member.name for member in current_members(state)}, state.unwanted | state.leaving
    order = sorted(
        state.ready.values(),
        key=lambda m: (m.name in state.leaving, m.name in last, m.name not in present, m.slot, m.name),
    )
    staying = sum(member.name not in state.leaving for member in order)
    count = min(state.target, max(staying, state.minimum))
    return tuple(sorted(order[:count], key=lambda m: (m.slot, m.name)))


def _active_id(state: State) -> ViewId | None:
    match state.phase:
        case Gathering(id=id):
            return id
        case Leveling(view=view) | Active(view=view):
            return view.id
    return None


# ---- joining and leaving --------------------------------------------------------------------------------


def _joined(state: State, member: Member, now: float) -> Decision:
    if member.name in state.unfenced or any(lost.name == member.name for lost in state.lost):
        return state, (Refuse(member.name, "it was declared dead"),), f"{member.name} was declared dead"
    state = replace(state, ready=grown(state.ready, member.name, member))
    return _start_if_enough(state, now, f"{member.name} is ready")


def _start_if_enough(state: State, now: float, reason: str) -> Decision:
    if not isinstance(state.phase, Waiting):
        return state, (), reason
    have = len(state.ready)
    if have < state.minimum:
        return (
            replace(state, phase=replace(state.phase, enough_since=None)),
            (),
            f"{reason}; {have} of {state.minimum} ranks",
        )
    since = state.phase.enough_since if state.phase.enough_since is not None else now
    first = state.number == 0
    if first and have < state.target and now - since < state.patience_s:
        return (
            replace(state, phase=replace(state.phase, enough_since=since)),
            (),
            f"{reason}; waiting for {state.target} ranks",
        )
    return _gather(state, wanted_members(state), now, reason)


def _tick(state: State, now: float) -> Decision:
    if isinstance(state.phase, Waiting) and len(state.ready) >= state.minimum:
        return _start_if_enough(state, now, "patience")
    if isinstance(state.phase, Gathering) and state.phase.unchoosable and now - state.phase.since > state.patience_s:
        return (
            replace(state, phase=Ended(state.phase.unchoosable, ok=False)),
            (Fail(state.phase.unchoosable),),
            "state is lost",
        )
    if isinstance(state.phase, Gathering) and state.phase.held_back and now - state.phase.since > state.patience_s:
        return _chosen(state, state.phase.held_back, now)
    if state.complained is not None:
        id, since, why = state.complained
        if id == _active_id(state) and now - since > COMPLAINT_GRACE_S:
            return _gather(replace(state, complained=None), current_members(state), now, f"{why}; both ends live")
    return state, (), "tick"


def _complained(state: State, name: str, id: ViewId, why: str, now: float) -> Decision:
    if id != _active_id(state) or not isinstance(state.phase, Leveling | Active) or name not in state.ready:
        return state, (), f"stale complaint: {why}"
    if state.complained is None or state.complained[0] != id:
        state = replace(state, complained=(id, now, why))
    return state, (), why


def _died(state: State, event: MemberDied, now: float) -> Decision:
    member = state.ready.get(event.name)
    if member is None:
        return state, (), f"{event.name} is not known"
    members = current_members(state)
    rank = next((i for i, m in enumerate(members) if m.name == event.name), -1)
    ready = {name: m for name, m in state.ready.items() if name != event.name}
    state = replace(state, ready=ready, unfenced=(*state.unfenced, event.name))
    asked = isinstance(state.phase, Gathering) and event.name in state.phase.asked
    if isinstance(state.phase, Waiting) and len(ready) < state.minimum:
        state = replace(state, phase=replace(state.phase, enough_since=None))
    if rank < 0 and not asked:
        return state, (), f"{event.name} died outside the view: {event.cause}"
    state = replace(state, lost=(*state.lost, Lost(event.name, event.cause, rank, event.detected_ms)))
    survivors = tuple(m for m in members if m.name != event.name)
    reason = f"{event.name} (rank {rank}) died: {event.cause}"
    if len(survivors) >= state.minimum:
        return _gather(state, survivors, now, reason)
    if len(ready) >= state.minimum:
        return _gather(state, wanted_members(replace(state, target=max(state.target, state.minimum))), now, reason)
    # Below the minimum: survivors stop and hold what they have until someone joins.
    number = state.number + 1
    stop = Prepare(ViewId(state.epoch, number), (), state.unfenced, state.lost)
    state = replace(state, number=number, phase=Waiting(now, None))
    return state, (SendPrepare(stop),), f"{reason}; {len(ready)} of {state.minimum} ranks left"


def _gather(state: State, members: tuple[Member, ...], now: float, reason: str) -> Decision:
    number = state.number + 1
    id = ViewId(state.epoch, number)
    # Whoever was to leave still holds state: it is asked again when a death starts the gathering anew.
    before = (
        state.phase.asked if isinstance(state.phase, Gathering) else frozenset(m.name for m in current_members(state))
    )
    leaving = before & set(state.ready)
    asked = frozenset(leaving | {m.name for m in members})
    phase = Gathering(id, members, asked, state.watchers, now)
    prepare = Prepare(id, tuple(sorted(asked)), state.unfenced, state.lost)
    state = replace(state, number=number, phase=phase)
    return state, (SendPrepare(prepare),), f"{reason}; forming view {id} of {len(members)}"


def _watcher_up(state: State, domain: str) -> Decision:
    state = replace(state, watchers=state.watchers | {domain}, missing=state.missing - {domain})
    phase = state.phase
    if not isinstance(phase, Gathering):
        return state, (), f"watcher of {domain} is up"
    stocks = {d: payload for d, payload in phase.stocks.items() if d != domain}  # of its predecessor
    watchers = phase.watchers | {domain}
    phase = replace(phase, watchers=watchers, stocks=stocks, unchoosable="", held_back=None)
    prepare = Prepare(phase.id, tuple(sorted(phase.asked)), state.unfenced, state.lost)
    return (
        replace(state, phase=phase),
        (SendPrepare(prepare, domain),),
        f"watcher of {domain} is back while gathering",
    )


def _watcher_lost(state: State, domain: str, planned: bool) -> Decision:
    missing = state.missing if planned else state.missing | {domain}
    state = replace(state, watchers=state.watchers - {domain}, missing=missing)
    phase = state.phase
    if isinstance(phase, Gathering) and domain in phase.watchers:
        stocks = {d: payload for d, payload in phase.stocks.items() if d != domain}
        state = replace(state, phase=replace(phase, watchers=phase.watchers - {domain}, stocks=stocks))
        return _choose_if_complete(state, f"watcher of {domain} lost")
    return state, (), f"watcher of {domain} lost"


# ---- forming a view -------------------------------------------------------------------------------------


def _inventoried(state: State, event: Inventoried) -> Decision:
    phase = state.phase
    if not isinstance(phase, Gathering) or event.id != phase.id or event.name not in phase.asked:
        return state, (), f"stale inventory of {event.name} for {event.id}"
    phase = replace(phase, inventories=grown(phase.inventories, event.name, event.payload))
    return _choose_if_complete(replace(state, phase=phase), f"inventory of {event.name}")


def _stocked(state: State, event: Stocked) -> Decision:
    unfenced = tuple(name for name in state.unfenced if name not in event.fenced)
    state = replace(state, unfenced=unfenced)
    phase = state.phase
    if not isinstance(phase, Gathering) or event.id != phase.id or event.domain not in phase.watchers:
        return state, (), f"stale stock of {event.domain} for {event.id}"
    phase = replace(phase, stocks=grown(phase.stocks, event.domain, event.payload))
    return _choose_if_complete(replace(state, phase=phase), f"stock of {event.domain}")


def _choose_if_complete(state: State, reason: str) -> Decision:
    phase = state.phase
    assert isinstance(phase, Gathering)
    # Only what was asked for is kept, so it is enough to count.
    if len(phase.inventories) == len(phase.asked) and len(phase.stocks) == len(phase.watchers):
        return (
            state,
            (Choose(phase.id, phase.members, phase.inventories, phase.stocks),),
            f"{reason}; all have answered",
        )
    return state, (), reason


def _chosen(state: State, event: Chosen, now: float) -> Decision:
    phase = state.phase
    if not isinstance(phase, Gathering) or event.id != phase.id:
        return state, (), f"stale choice for {event.id}"
    if state.missing and (state.floor is None or event.base_step < state.floor):
        if now - phase.since <= state.patience_s:
            known = "" if state.floor is None else f", {state.floor} was protected"
            absent = ", ".join(sorted(state.missing))
            waiting = f"step {event.base_step} is what there is{known}; waiting for the watchers of {absent}"
            return replace(state, phase=replace(phase, held_back=event)), (), waiting
        state = replace(state, missing=frozenset())  # given up: the next choice does not wait for them again
    # What an earlier epoch protected is not known; where that was less, a roll-back waits once in vain.
    floor = event.base_step if state.floor is None else min(state.floor, event.base_step)
    state = replace(state, floor=floor)
    view = View(event.id, phase.members, event.base_step, event.payload)
    return (
        replace(state, phase=Leveling(view, frozenset(m.name for m in view.members))),
        (SendView(view),),
        f"view {event.id} starts from step {event.base_step}",
    )


def _unchoosable(state: State, event: Unchoosable) -> Decision:
    phase = state.phase
    if not isinstance(phase, Gathering) or event.id != phase.id:
        return state, (), f"stale choice for {event.id}"
    if state.missing:
        waiting = f"{event.reason}; waiting for the watchers of {', '.join(sorted(state.missing))}"
        return replace(state, phase=replace(phase, unchoosable=event.reason)), (), waiting
    return replace(state, phase=Ended(event.reason, ok=False)), (Fail(event.reason),), event.reason


def _levelled(state: State, event: Levelled) -> Decision:
    phase = state.phase
    if not isinstance(phase, Leveling) or event.id != phase.view.id:
        return state, (), f"stale level of {event.name} for {event.id}"
    if event.name not in phase.awaited:
        return state, (), f"{event.name} is not in view {event.id}"
    level, view = grown(phase.level, event.name, None), phase.view
    if len(level) < len(view.members):
        return replace(state, phase=replace(phase, level=level)), (), f"{event.name} is level"
    lost, state = state.lost, replace(state, lost=(), phase=Active(view, view.base_step + 1))
    return state, (SendGo(view, lost),), f"view {view.id} acts, next step {view.base_step + 1}"


# ---- the step transaction -------------------------------------------------------------------------------


def _voted(state: State, event: Voted) -> Decision:
    phase = state.phase
    if not isinstance(phase, Active) or event.id != phase.view.id:
        return state, (), f"stale vote of {event.name} for {event.id}"
    if event.step != phase.step:
        raise InvalidTransition(f"{event.name} voted on step {event.step}, the view is at {phase.step}", state.recent)
    votes = grown(phase.votes, event.name, event.payload)
    state = replace(state, phase=replace(phase, votes=votes))
    if len(votes) == len(phase.view.members):
        return state, (Judge(phase.view, phase.step, votes),), f"all have voted on step {event.step}"
    return state, (), f"{event.name} voted on step {event.step}"


def _judged(state: State, event: Judged, now: float) -> Decision:
    phase = state.phase
    if not isinstance(phase, Active) or event.id != phase.view.id or event.step != phase.step:
        return state, (), f"stale verdict for {event.id} step {event.step}"
    state = replace(state, floor=max(-1 if state.floor is None else state.floor, event.protected_step))
    if event.finished:
        send = SendVerdict(phase.view, event.step, event.payload, reform=False)
        return replace(state, phase=Ended("finished", ok=True)), (send,), "finished"
    wanted = phase.view.members if state.steady else wanted_members(state)
    reform = len(wanted) >= state.minimum and {m.name for m in wanted} != {m.name for m in phase.view.members}
    send = SendVerdict(phase.view, event.step, event.payload, reform)
    state = replace(state, steady=not reform)
    if reform:
        next_state, commands, reason = _gather(
            state, wanted, now, f"step {event.step} is decided, membership changes"
        )
        return next_state, (send, *commands), reason
    return replace(state, phase=Active(phase.view, event.step + 1)), (send,), f"step {event.step} is decided"

"""Who is in a group's view, and what becomes of its transactions: the coordinator's decisions, pure.

`decide(state, event, now) -> (state, commands, reason)`. No clock, no socket, no randomness.

    phase       event                       next phase
    ----------  --------------------------  ------------------------------------------------------------------
    Waiting     Entered, Tick               Active, when the minimum is ready and the settling time is over
    Waiting     Entered with a view that    Recovering, of the newest view that anybody reports; this epoch is
                no one here knows           put above the reported one
    Recovering  Entered, MemberDied, Left,  unchanged until all of the view have reported or are gone, or time is up
                Tick                        (the rest is fenced); then, if none is missing, Active in the same view,
                                            votes in doubt included; else Active in a view of those who are there
    Active      Voted "ok" by all           unchanged, the transaction is settled: commit
    Active      Voted "admit" by all        Active with the joiners, if there are any
    Active      Voted "abort", or ballots   Active, a new view of the same members (what operations of the block are
                that do not fit together    under way is thereby off); the transaction is aborted
    Active      AskedAnew                   the same
    Active      MemberDied, Left, a limit   Active with the survivors; Waiting below the minimum
                of Tick
    Active      LinkBroke                   unchanged; if the view still stands after a grace, both ends live: Active
                                            with the same members, once; if the same link fails again, Active without
                                            a smallest set of members that covers all complaints (links.py)
    any         MemberDied of an outsider   unchanged

[Note: a machine of its own] Jobs have membership.py: there a Gathering asks watchers for stocks and members for
inventories before a view may begin, views follow a target, and the supervisor judges each step. A group keeps no
state for its members, so a view begins with one message, only its members let others in, and a verdict follows from
the votes alone. One machine for both would have every row twice; they share their words, ids and messages.

[Note: in doubt] A member in doubt has voted "ok" and heard nothing. A view ends every transaction that was not
settled in it, and messages to a member keep their order; so a member in doubt that is sent another view knows that
its transaction is aborted, unless a Decided came first. Nothing can be settled without its vote: so the last settled
transaction is the only one that it may have missed, and is all that has to be remembered, here and in reports. After
a coordinator's restart a transaction is settled if any member saw it settled; its votes go on to count where all of
the view are there; it is aborted only when every member has reported or is fenced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from everstep.collectives.group_messages import Report, Settled
from everstep.collectives.group_state import (
    NO_VIEW,
    Active,
    AskedAnew,
    Command,
    Complained,
    Decision,
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
from everstep.collectives.group_views import (
    RETRY_MEMORY_S,
    exclude,
    form,
    gone,
    ident_of,
    joiners_of,
    living,
    members_of,
    names_of,
    resolve_if_all,
    start_if_enough,
    voted,
)
from everstep.collectives.links import first_hand, smallest_cover, undirected
from everstep.collectives.messages import Member, View, ViewId

COMPLAINT_GRACE_S = 0.5  # a death is reported within milliseconds of the broken connections that it causes
COLLECT_S = 0.25  # after a second complaint about a link, for the others about the same member
_KEPT_EVENTS = 16


def initial(
    epoch: int,
    minimum: int,
    limits: Limits,
    now: float,
    view: View | None = None,
    settled: Settled | None = None,
    settle: bool = True,
) -> State:
    """`view`, `settled`: the last ones of the epoch before that are on disk. Without a view, `settle` waits for
    members of an earlier epoch to report before a first one is formed."""
    phase = Waiting(now) if view is None else Recovering(now, view)
    if not settle:
        limits = replace(limits, settle_s=0.0)
    txn, newest = (0, NO_VIEW) if view is None else (view.base_step, view.id)
    return State(epoch, minimum, limits, phase, now, newest, txn=txn, settled=settled)


def decide(state: State, event: Event, now: float) -> Decision:
    """The next state, what to do, and why."""
    recent = (*state.recent[-_KEPT_EVENTS:], f"{now:.3f} {type(state.phase).__name__} <- {event!r:.120}")
    before, state = state.phase, replace(state, recent=recent)
    if isinstance(before, Recovering) and isinstance(event, Voted | LinkBroke | AskedAnew):
        # Said once on every stream; nobody would say it again if it were lost here.
        return replace(state, phase=replace(before, later=(*before.later, event))), (), "kept until all have reported"
    state, commands, reason = _decide(state, event, now)
    if isinstance(before, Recovering) and isinstance(state.phase, Active):
        for kept in before.later:
            state, more, why = _decide(state, kept, now)
            commands, reason = (*commands, *more), f"{reason}; {why}"
    return state, commands, reason


def _decide(state: State, event: Event, now: float) -> Decision:
    match event:
        case Entered(member, report):
            return _entered(state, member, report, now)
        case HungUp(key):
            return _hung_up(state, key, now)
        case MemberDied(key, cause, detected_ms):
            if name := living(state, key):
                return gone(state, {name: cause}, now, detected_ms)
            # It may be on its way here: a watcher knows the dead of earlier epochs too.
            return exclude(state, {key: f"it was declared dead: {cause}"}), (), f"{key} is not known"
        case Left(key):
            name = living(state, key)
            return gone(state, {name: "left"}, now) if name else (state, (), f"{key} is not known")
        case WatcherHeard(domain):
            blind = {d: since for d, since in state.blind.items() if d != domain}
            state = replace(state, watchers={**state.watchers, domain: now}, blind=blind)
            return state, (), f"the watcher of {domain} is there"
        case WatcherLost(domain):
            watchers = {d: heard for d, heard in state.watchers.items() if d != domain}
            return replace(state, watchers=watchers), (), f"the watcher of {domain} is lost"
        case Voted(name, ballot):
            return voted(state, name, ballot, now)
        case LinkBroke():
            return _link_broke(state, event, now)
        case AskedAnew(name, id, reason):
            if not isinstance(state.phase, Active) or id != state.phase.view.id or name not in names_of(state):
                return state, (), f"stale request of {name} for {id}"
            return form(state, state.phase.view.members, now, "anew", f"{name} asked for a new view: {reason}")
        case Tick():
            return _tick(state, now)


# ---- entering and leaving -------------------------------------------------------------------------------


def _entered(state: State, member: Member, report: Report | None, now: float) -> Decision:
    ident, name = ident_of(member), member.name
    if ident in state.excluded:
        return state, (Refuse(ident, state.excluded[ident]),), f"{name} comes back: {state.excluded[ident]}"
    other = state.ready.get(name)
    if other is not None and other.incarnation != member.incarnation:
        if name not in state.hung:
            why = f"the name is taken by process {other.pid} on {other.domain}; choose another name="
            return state, (Refuse(ident, why),), f"a second {name} is refused"
        state, commands, _ = gone(state, {name: "another process took its name"}, now)
        state, more, reason = _entered(state, member, report, now)
        return state, (*commands, *more), reason
    phase = state.phase
    if report is not None and isinstance(phase, Waiting) and state.number == 0 and report.view.id > state.newest:
        # An earlier epoch of which there is no record here. Our epoch must be above all that it gave out.
        phase = Recovering(now, report.view)
        state = replace(state, phase=phase, txn=report.view.base_step, newest=report.view.id)
    if isinstance(phase, Recovering):
        return _reported(state, phase, member, report, now)
    inside = {m.name: m.incarnation for m in members_of(state)}
    if report is not None and inside.get(name) != member.incarnation:
        why = f"the group has gone on without it: view {report.view.id} is over"
        return exclude(state, {ident: why}), (Refuse(ident, why),), f"{name} comes too late"
    hung = {n: since for n, since in state.hung.items() if n != name}
    state = replace(state, ready={**state.ready, name: member}, hung=hung)
    state = _note_blind(state, member.domain, now)
    if name in inside:
        return _came_back(state, name, report, now)
    if isinstance(phase, Waiting):
        return start_if_enough(state, now, f"{name} is ready")
    joiners = joiners_of(state)
    return state, (SendJoiners(names_of(state), joiners),), f"{name} waits to be admitted"


def _came_back(state: State, name: str, report: Report | None, now: float) -> Decision:
    """Its stream was broken for a moment: what it missed is sent again, in the order in which it happened."""
    phase, commands = state.phase, list[Command]()
    doubt = report.doubt if report is not None else None
    if doubt is not None and state.settled is not None and doubt.txn == state.settled.txn:
        commands.append(SendDecided((name,), state.settled))
    if isinstance(phase, Waiting):
        commands.append(SendOver((name,), phase.over, phase.reason, ()))
        state, more, reason = start_if_enough(state, now, f"{name} is back")
        return state, (*commands, *more), reason
    assert isinstance(phase, Active)
    if report is None or report.view.id != phase.view.id:
        why = "views went by while its control stream was broken"
        commands.append(SendView((name,), phase.view, "missed", why, (), joiners_of(state)))
    else:
        commands.append(SendJoiners((name,), joiners_of(state)))
        if doubt is not None and doubt.txn == state.txn + 1:
            state, more, reason = voted(state, name, doubt, now)
            return state, (*commands, *more), f"{name} is back; {reason}"
    return state, tuple(commands), f"{name} is back"


def _hung_up(state: State, key: str, now: float) -> Decision:
    name = living(state, key)
    if not name or name not in state.ready:
        return state, (), f"{key} is not known"
    if name not in names_of(state):  # it has nothing to lose, and enters again if it lives
        state = replace(state, ready={n: m for n, m in state.ready.items() if n != name})
        tell = (SendJoiners(names_of(state), joiners_of(state)),) if isinstance(state.phase, Active) else ()
        return state, tell, f"{name} waits no more: its control stream broke"
    return replace(state, hung={**state.hung, name: now}), (), f"the control stream of {name} broke"


# ---- an earlier epoch's view ----------------------------------------------------------------------------


def _reported(state: State, phase: Recovering, member: Member, report: Report | None, now: float) -> Decision:
    name = member.name
    refusals: tuple[Command, ...] = ()
    if report is not None and report.view.id > phase.view.id:
        state, phase, refusals = _newer(state, phase, report.view)
    epoch = max(state.epoch, phase.view.id.epoch + 1)
    state = replace(state, epoch=epoch, phase=phase, newest=max(state.newest, phase.view.id))
    inside = {m.name: m.incarnation for m in phase.view.members}
    if report is not None and inside.get(name) != member.incarnation:
        why = f"the group has gone on without it: view {report.view.id} is over"
        return (
            exclude(state, {ident_of(member): why}),
            (Refuse(ident_of(member), why),),
            f"{name} is not in {phase.view.id}",
        )
    hung = {n: since for n, since in state.hung.items() if n != name}
    state = _note_blind(replace(state, ready={**state.ready, name: member}, hung=hung), member.domain, now)
    if name not in inside:
        return state, (), f"{name} waits behind the members of view {phase.view.id}"
    if report is None:  # it was admitted and never heard of it
        report = Report(View(ViewId(0, 0), (), 0))
    state, commands, reason = resolve_if_all(state, replace(phase, reports={**phase.reports, name: report}), now)
    return state, (*refusals, *commands), reason


def _newer(state: State, phase: Recovering, view: View) -> tuple[State, Recovering, tuple[Command, ...]]:
    """Somebody was in a newer view: who has reported and is not in it was left behind, and must hear so."""
    inside = {m.name for m in view.members}
    why = f"the group has gone on without it: view {phase.view.id} is over"
    behind = {ident_of(state.ready[name]): why for name in phase.reports if name not in inside}
    ready = {n: m for n, m in state.ready.items() if n in inside or n not in phase.reports}
    reports = {n: r for n, r in phase.reports.items() if n in inside}
    state = exclude(replace(state, ready=ready), behind)
    return state, replace(phase, view=view, reports=reports), tuple(Refuse(key, why) for key in behind)


# ---- time -----------------------------------------------------------------------------------------------


def _note_blind(state: State, domain: str, now: float) -> State:
    if domain in state.watchers or domain in state.blind:
        return state
    return replace(state, blind={**state.blind, domain: now})


def _tick(state: State, now: float) -> Decision:
    last, limits = state.last_tick, state.limits
    state = replace(state, last_tick=now)
    if last is not None and now - last > limits.frozen_s / 2:
        return _forgive(state, now), (), f"held up for {now - last:.1f} s: every limit counts from now"
    domains = {m.domain for m in state.ready.values()}
    blind = {d: state.blind.get(d, now) for d in domains if d not in state.watchers}
    state = replace(state, blind=blind)
    causes = {
        name: f"hung up: no control stream for {now - since:.1f} s"
        for name, since in state.hung.items()
        if now - since > limits.frozen_s
    }
    for name, member in state.ready.items():
        heard, since = state.watchers.get(member.domain, now), blind.get(member.domain, now)
        if now - heard > limits.frozen_s:
            causes[name] = f"the watcher of its host {member.domain} is silent for {now - heard:.1f} s"
        elif now - since > limits.blind_s:
            causes[name] = f"no watcher on its host {member.domain} for {now - since:.1f} s"
    if causes:
        return gone(state, causes, now, limits.frozen_s * 1000)
    match state.phase:
        case Waiting():
            return start_if_enough(state, now, "time has passed")
        case Recovering() as phase if now - phase.since > _patience_s(state, phase):
            return resolve_if_all(state, phase, now, anyway=True)
        case Active() as phase if phase.complaints:
            return _links(state, phase, now)
    return state, (), "tick"


def _patience_s(state: State, phase: Recovering) -> float:
    """Longer for members whose watcher is there and does not say that they are dead: their host is busy."""
    missing = [m for m in phase.view.members if m.name not in phase.reports and m.name not in phase.gone]
    living = any(member.domain in state.watchers for member in missing)
    return state.limits.blind_s if living else state.limits.recover_s


def _forgive(state: State, now: float) -> State:
    """A judge that was held up itself believes nobody late."""
    phase = state.phase
    if isinstance(phase, Recovering):
        phase = replace(phase, since=now)
    if isinstance(phase, Active):
        phase = replace(phase, complaints=tuple(replace(c, at=now) for c in phase.complaints))
    return replace(
        state,
        phase=phase,
        hung=dict.fromkeys(state.hung, now),
        watchers=dict.fromkeys(state.watchers, now),
        blind=dict.fromkeys(state.blind, now),
    )


# ---- links ----------------------------------------------------------------------------------------------


def _link_broke(state: State, event: LinkBroke, now: float) -> Decision:
    phase, why = state.phase, f"{event.name} lost its connection to {event.about}: {event.error}"
    names = names_of(state)
    known = event.name in names and event.about in names and event.name != event.about
    if not isinstance(phase, Active) or event.id != phase.view.id or not known:
        return state, (), f"stale complaint: {why}"
    edge = (event.name, event.about)
    if any(c.edge == edge for c in phase.complaints):
        return state, (), why
    complaints = (*phase.complaints, Complained(now, edge, event.error))
    return replace(state, phase=replace(phase, complaints=complaints)), (), why


def _again(phase: Active) -> list[Complained]:
    """Complaints about links that this view was to mend."""
    if not phase.retried:
        return []
    before = undirected(c.edge for c in phase.retried)
    young = [c for c in phase.complaints if c.at - phase.since <= RETRY_MEMORY_S]
    return [c for c in young if undirected([c.edge]) <= before]


def _links(state: State, phase: Active, now: float) -> Decision:
    """Complaints that no death has explained."""
    if again := _again(phase):
        if now - again[0].at < COLLECT_S:
            return state, (), "a link failed again"
        return _evict(state, phase, now)
    if now - phase.complaints[0].at < COMPLAINT_GRACE_S:
        return state, (), "a link failed"
    complaints = _first_hand(phase.complaints)
    reason = f"{_told(complaints)}; both ends live: the same members connect anew"
    return form(state, phase.view.members, now, "retry", reason, retried=(*phase.retried, *complaints))


def _evict(state: State, phase: Active, now: float) -> Decision:
    ranks = {name: rank for rank, name in enumerate(names_of(state))}
    complaints = _first_hand(phase.complaints)
    cover = smallest_cover([c.edge for c in (*phase.retried, *complaints)], ranks)
    what = (
        f"evicted for its links: {_told(complaints)}, after new connections were tried for"
        f" {_told(phase.retried)}; {', '.join(cover)} is a smallest set that covers them, of the highest ranks"
    )
    return gone(state, dict.fromkeys(cover, what), now)


def _first_hand(complaints: tuple[Complained, ...]) -> tuple[Complained, ...]:
    edges = first_hand((c.edge, c.error) for c in complaints)
    return tuple(c for c in complaints if c.edge in edges)


def _told(complaints: Iterable[Complained]) -> str:
    return ", ".join(f"{c.edge[0]} about {c.edge[1]} ({c.error})" for c in complaints)

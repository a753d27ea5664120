"""How a group's views begin and end, and how its transactions are settled: what the rules of group_membership.py use.

Pure, as they are. A Decision is (state, commands, reason).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from everstep.collectives.group_messages import Ballot, Cause, Settled, key_of
from everstep.collectives.group_state import (
    Active,
    Command,
    Complained,
    Decision,
    Recovering,
    Refuse,
    SendDecided,
    SendJoiners,
    SendOver,
    SendView,
    State,
    Waiting,
)
from everstep.collectives.messages import Lost, Member, View, ViewId

RETRY_MEMORY_S = 10.0  # a link that held that long after its retry gets another one
_KEPT_REASONS = 256


def members_of(state: State) -> tuple[Member, ...]:
    """Of the view that acts or is being recovered, by rank; of the last one while waiting."""
    match state.phase:
        case Waiting(stayed=stayed):
            return stayed
        case Recovering(view=view) | Active(view=view):
            return view.members


def names_of(state: State) -> tuple[str, ...]:
    return tuple(member.name for member in members_of(state))


def joiners_of(state: State) -> tuple[str, ...]:
    """Who waits to be admitted and can be reached."""
    inside = set(names_of(state))
    return tuple(name for name in state.ready if name not in inside and name not in state.hung)


def ident_of(member: Member) -> str:
    """Its incarnation."""
    return key_of(member.name, member.incarnation)


def living(state: State, key: str) -> str:
    """The name of this incarnation; also of one that has not reported to this epoch yet. "" if there is none."""
    known = {ident_of(member): name for name, member in state.ready.items()}
    if isinstance(state.phase, Recovering):
        known |= {ident_of(m): m.name for m in state.phase.view.members if m.name not in state.phase.gone}
    return known.get(key, "")


# ---- views ------------------------------------------------------------------------------------------------


def start_if_enough(state: State, now: float, reason: str) -> Decision:
    phase = state.phase
    assert isinstance(phase, Waiting)
    # A survivor without a stream is waited for: it comes back or a limit says that it is dead.
    can = [m for n, m in state.ready.items() if n not in state.hung or m in phase.stayed]
    if len(can) < state.minimum or any(m.name in state.hung for m in phase.stayed):
        return state, (), f"{reason}; {len(can)} of {state.minimum} members (min_peers)"
    if state.number == 0 and now - state.began < state.limits.settle_s:
        return state, (), f"{reason}; members of an earlier epoch may report first"
    stayed = {m.name for m in phase.stayed}
    members = (*phase.stayed, *(m for m in can if m.name not in stayed))
    return form(state, members, now, "lost" if stayed else "first", reason)


def gone(state: State, causes: Mapping[str, str], now: float, detected_ms: float = 0.0) -> Decision:
    """These members are in the group no more: dead, left, or evicted."""
    ranks = {name: rank for rank, name in enumerate(names_of(state))}
    lost = tuple(Lost(n, why, ranks.get(n, -1), detected_ms) for n, why in sorted(causes.items()))
    told = {n: f"{n} is in the group no more: {why}" for n, why in causes.items()}
    old = {m.name: m for m in (*members_of(state), *state.ready.values()) if m.name in causes}
    keys = {ident_of(m): told[m.name] for m in old.values()}
    refusals = tuple(Refuse(key, why) for key, why in keys.items())
    ready = {n: m for n, m in state.ready.items() if n not in causes}
    hung = {n: since for n, since in state.hung.items() if n not in causes}
    state = exclude(replace(state, ready=ready, hung=hung), keys)
    reason = "; ".join(f"{item.name} (rank {item.rank}): {item.cause}" for item in lost)
    phase = state.phase
    if isinstance(phase, Recovering):
        reports = {n: r for n, r in phase.reports.items() if n not in causes}
        dead = {**phase.gone, **{item.name: item for item in lost if item.rank >= 0}}
        state, commands, more = resolve_if_all(state, replace(phase, reports=reports, gone=dead), now)
        return state, (*refusals, *commands), f"{reason}; {more}"
    survivors = tuple(m for m in members_of(state) if m.name not in causes)
    if isinstance(phase, Waiting):
        state, commands, more = start_if_enough(replace(state, phase=replace(phase, stayed=survivors)), now, reason)
        return state, (*refusals, *commands), more
    if len(survivors) == len(phase.view.members):
        return state, (*refusals, SendJoiners(names_of(state), joiners_of(state))), reason
    state, commands, more = go_on(state, survivors, now, "lost", reason, lost)
    return state, (*refusals, *commands), more


def exclude(state: State, reasons: Mapping[str, str]) -> State:
    kept = {**state.excluded, **reasons}
    return replace(state, excluded=dict(list(kept.items())[-_KEPT_REASONS:]))


def go_on(
    state: State, members: tuple[Member, ...], now: float, cause: Cause, reason: str, lost: tuple[Lost, ...]
) -> Decision:
    """The view is over: the next one with these members, or below the minimum with everybody who waits."""
    if len(members) >= state.minimum:
        return form(state, members, now, cause, reason, lost)
    inside = {m.name for m in members}
    joiners = tuple(state.ready[name] for name in joiners_of(state) if name not in inside)
    if members and len(members) + len(joiners) >= state.minimum:
        return form(state, (*members, *joiners), now, cause, reason, lost)
    over = state.phase.view.id if isinstance(state.phase, Active | Recovering) else ViewId(state.epoch, state.number)
    names = tuple(m.name for m in members)
    why = f"{reason}; {len(members)} of {state.minimum} members are left (min_peers)"
    state = replace(state, txn=state.txn + 1, phase=Waiting(now, members, over, why))
    commands = (SendOver(names, over, why, lost),) if names else ()
    return state, commands, why


def form(
    state: State,
    members: tuple[Member, ...],
    now: float,
    cause: Cause,
    reason: str,
    lost: tuple[Lost, ...] = (),
    retried: tuple[Complained, ...] = (),
) -> Decision:
    number, txn = state.number + 1, state.txn + isinstance(state.phase, Active)
    view = View(ViewId(state.epoch, number), members, txn)
    if not retried and isinstance(state.phase, Active) and now - state.phase.since < RETRY_MEMORY_S:
        retried = state.phase.retried  # a cut that another death interrupted is still the same cut
    state = replace(state, number=number, txn=txn, phase=Active(view, now, retried=retried))
    names = names_of(state)
    send = SendView(names, view, cause, reason, lost, joiners_of(state))
    return state, (send,), f"{reason}; view {view.id}: {', '.join(names)}"


# ---- transactions ---------------------------------------------------------------------------------------


def voted(state: State, name: str, ballot: Ballot, now: float) -> Decision:
    phase = state.phase
    if not isinstance(phase, Active) or ballot.id != phase.view.id or name not in names_of(state):
        return state, (), f"stale vote of {name} for {ballot.id}"
    txn = state.txn + 1
    if ballot.txn < txn:
        return state, (), f"stale vote of {name} on transaction {ballot.txn}"
    if ballot.txn > txn:
        why = f"protocol error: it voted on transaction {ballot.txn}, the group is at {txn}"
        return gone(state, {name: why}, now)
    if ballot.kind == "abort":
        cause: Cause = "mismatch" if ballot.mismatch else "aborted"
        return form(state, phase.view.members, now, cause, f"transaction {txn}: {name}: {ballot.reason}")
    operations = {**phase.operations, name: -1 if ballot.kind == "admit" else ballot.operations}
    votes = phase.votes if ballot.kind == "closing" else {**phase.votes, name: ballot}
    if len(set(operations.values())) > 1:
        return form(state, phase.view.members, now, "mismatch", f"transaction {txn}: {_brought(state, operations)}")
    state = replace(state, phase=replace(phase, votes=votes, operations=operations))
    if len(votes) < len(phase.view.members):
        return state, (), f"{name} voted {ballot.kind} on transaction {txn}"
    return _settle(state, "admit" if ballot.kind == "admit" else "ok", now)


def _brought(state: State, operations: Mapping[str, int]) -> str:
    """Who brought what, by rank."""
    each = [(name, operations[name]) for name in names_of(state) if name in operations]
    return ", ".join(f"{name} {'called admit' if n < 0 else f'brought {n} operations'}" for name, n in each)


def _settle(state: State, kind: str, now: float) -> Decision:
    phase = state.phase
    assert isinstance(phase, Active)
    txn, names = state.txn + 1, names_of(state)
    if kind == "admit" and (joiners := joiners_of(state)):
        members = (*phase.view.members, *(state.ready[name] for name in joiners))
        return form(state, members, now, "admitted", f"{', '.join(joiners)} admitted by all members")
    settled = Settled(txn, "nobody" if kind == "admit" else "commit")
    # What went through all members shows that every link works: a later complaint starts from the beginning.
    retried = () if kind == "ok" else phase.retried
    phase = replace(phase, votes={}, operations={}, retried=retried)
    state = replace(state, txn=txn, settled=settled, phase=phase)
    return state, (SendDecided(names, settled),), f"transaction {txn}: {settled.outcome}"


# ---- an earlier epoch's view ----------------------------------------------------------------------------


def resolve_if_all(state: State, phase: Recovering, now: float, *, anyway: bool = False) -> Decision:
    known = {m.name: state.excluded.get(ident_of(m), "") for m in phase.view.members if m.name not in phase.reports}
    dead = {name: Lost(name, why, phase.view.rank_of(name)) for name, why in known.items() if why}
    phase = replace(phase, gone={**dead, **phase.gone})  # a watcher may have been faster than any report
    state = replace(state, phase=phase)
    missing = [m.name for m in phase.view.members if m.name not in phase.reports and m.name not in phase.gone]
    if missing and not anyway:
        return state, (), f"recovering view {phase.view.id}: waiting for {', '.join(missing)}"
    late = f"it did not report within {now - phase.since:.1f} s of the coordinator's restart"
    fenced = {m.name: m for m in phase.view.members if m.name in missing}
    refusals = {ident_of(m): f"{m.name} is in the group no more: {late}" for m in fenced.values()}
    lost = (*phase.gone.values(), *(Lost(n, late, phase.view.rank_of(n)) for n in missing))
    state = exclude(state, refusals)
    seen = [s for s in (state.settled, *(r.settled for r in phase.reports.values())) if s is not None]
    settled = max(seen, key=lambda s: s.txn, default=None)
    doubts = {name: r.doubt for name, r in phase.reports.items() if r.doubt is not None}
    used = max((phase.view.base_step, *(s.txn for s in seen)))
    commands: tuple[Command, ...] = tuple(Refuse(key, why) for key, why in refusals.items())
    told = tuple(name for name, doubt in doubts.items() if settled is not None and doubt.txn == settled.txn)
    if told and settled is not None:
        commands = (*commands, SendDecided(told, settled))
    same = not lost and all(r.view.id == phase.view.id and not r.over for r in phase.reports.values())
    state = replace(state, settled=settled, txn=used)
    if same and len(phase.view.members) >= state.minimum:
        return _continue(state, phase.view, doubts, commands, now)
    # Members may be in the middle of the next one, without a vote that would be reported: no number is used twice.
    top = max((used + 1, *(doubt.txn for doubt in doubts.values())))
    members = tuple(m for m in phase.view.members if m.name in phase.reports)
    reason = f"the coordinator restarted in epoch {state.epoch}"
    if lost:
        reason += ", " + "; ".join(f"{item.name} (rank {item.rank}): {item.cause}" for item in lost)
    state, more, reason = go_on(replace(state, txn=top), members, now, "lost", reason, lost)
    if not members and isinstance(state.phase, Waiting):  # nobody is left: whoever waits begins anew
        state, extra, reason = start_if_enough(state, now, reason)
        more = (*more, *extra)
    return state, (*commands, *more), reason


def _continue(
    state: State, view: View, doubts: Mapping[str, Ballot], commands: tuple[Command, ...], now: float
) -> Decision:
    """Nobody is missing: the view goes on under its old id, and so does the transaction that is voted on."""
    state = replace(state, phase=Active(view, now))
    reason = f"view {view.id} goes on in epoch {state.epoch}"
    if joiners := joiners_of(state):
        commands = (*commands, SendJoiners(names_of(state), joiners))
    for name, ballot in doubts.items():
        state, more, why = voted(state, name, ballot, now)
        commands, reason = (*commands, *more), f"{reason}; {why}"
    return state, commands, reason

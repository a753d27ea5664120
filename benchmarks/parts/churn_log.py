"""What the logs of a churn's peers say together: whether every promise was kept, and how long it took. Pure.

The promises: a transaction is committed by all members of its view or by none, with the exact sum over them; what
is not committed has its inputs back; who was frozen for longer than the limit is out when it wakes.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Line = dict[str, Any]
FENCED = "coordinator's restart"  # in the reason of such an eviction
AWAY_S = 3.0  # after its SIGKILL a coordinator may be away for that long, and verdicts wait
_OUT = ("evicted", "left", "refused")


@dataclass(frozen=True)
class Fault:
    """`at`: by the machine's clock. `kind`: join | kill | stop | wake | coordinator."""

    at: float
    kind: str
    victims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wait:
    """How long the slowest survivor stood still after a fault, in seconds. None: none was there to see it."""

    fault: Fault
    lost_s: float | None  # until its transaction raised; one that was between two may not be hit
    commit_s: float | None  # until its next committed transaction, without the victims


@dataclass
class Findings:
    commits: int = 0
    operations: int = 0  # committed, over all members
    aborts: int = 0  # on any member
    admissions: int = 0
    evicted: int = 0  # that know it: who woke up after it was declared dead
    sizes: tuple[int, int] = (0, 0)  # smallest and largest membership that committed
    waits: list[Wait] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)  # alive, but too slow to report to a restarted coordinator
    longest_s: float = 0.0  # between two commits of one member that lives
    violations: list[str] = field(default_factory=list)


def study(logs: Mapping[str, Sequence[Line]], faults: Sequence[Fault]) -> Findings:
    """`logs` by peer, in the order of writing."""
    found = Findings()
    struck = _struck(faults)
    commits = _commits(logs, found.violations)
    _check_atomic(logs, commits, found.violations)
    for name, lines in logs.items():
        for line in lines:
            if line["what"] == "undone":
                found.aborts += 1
                if not line["restored"]:
                    found.violations.append(f"{name}: inputs of {line['txn']} are not back after {line['error']}")
            elif line["what"] == "evicted" and name not in struck:
                if FENCED in line["text"]:
                    found.fenced.append(name)
                    continue
                found.violations.append(f"{name} is out and was never struck: {line['text']}")
            elif line["what"] == "broken":
                found.violations.append(f"{name}: {line['text']}")
    found.evicted = sum(line["what"] == "evicted" for lines in logs.values() for line in lines)
    found.commits = len(commits)
    found.operations = sum(
        line["operations"] for lines in logs.values() for line in lines if line["what"] == "commit"
    )
    found.admissions = len(
        {tuple(line["members"]) for lines in logs.values() for line in lines if line["what"] == "admitted"}
    )
    sizes = [len(line["members"]) for line in commits.values()]
    found.sizes = (min(sizes, default=0), max(sizes, default=0))
    whole = {n: [line for line in lines if line["at"] < struck.get(n, math.inf)] for n, lines in logs.items()}
    found.waits = [wait_of(fault, whole) for fault in faults if fault.kind in ("kill", "stop", "coordinator")]
    found.longest_s = max(map(_longest, whole.values()), default=0.0)
    return found


def _struck(faults: Sequence[Fault]) -> dict[str, float]:
    """When each victim was struck first."""
    found: dict[str, float] = {}
    for fault in faults:
        if fault.kind in ("kill", "stop"):
            for name in fault.victims:
                found.setdefault(name, fault.at)
    return found


def _commits(logs: Mapping[str, Sequence[Line]], violations: list[str]) -> dict[int, Line]:
    """By transaction; all who committed it must say the same."""
    found: dict[int, tuple[str, Line]] = {}
    for name, lines in logs.items():
        last = 0
        for line in lines:
            if line["what"] != "commit":
                continue
            txn = line["txn"]
            if txn <= last:
                violations.append(f"{name} committed {txn} after {last}")
            last = txn
            if not line["right"]:
                violations.append(f"{name}: {txn} is not the exact sum over {', '.join(line['members'])}")
            if name not in line["members"]:
                violations.append(f"{name} committed {txn} of a view that it is not in")
            other, known = found.setdefault(txn, (name, line))
            for what in ("view", "members", "digest"):
                if known[what] != line[what]:
                    violations.append(f"{txn}: {other} has {what} {known[what]}, {name} has {line[what]}")
    return {txn: line for txn, (_, line) in sorted(found.items())}


def _check_atomic(logs: Mapping[str, Sequence[Line]], commits: dict[int, Line], violations: list[str]) -> None:
    """Each member of a committed transaction committed it, or said nothing more of any later one."""
    for name, lines in logs.items():
        mine = {line["txn"] for line in lines if line["what"] == "commit"}
        last = max(mine, default=0)
        for txn, line in commits.items():
            if name in line["members"] and txn < last and txn not in mine:
                violations.append(f"{name} went on to {last} and has not committed {txn}, which others have")
        out = any(line["what"] == "evicted" for line in lines)
        for line in lines:
            undone = line["what"] == "undone" and line["error"] not in ("Evicted", "CoordinatorLost")
            known = commits.get(line["txn"]) if undone and line["txn"] else None
            # A number that was aborted is not used again, unless the abort and the commit are of one transaction.
            if known is not None and name in known["members"] and not out:
                violations.append(f"{name} undid {line['txn']} ({line['error']}), which others have committed")


def wait_of(fault: Fault, logs: Mapping[str, Sequence[Line]]) -> Wait:
    """Over the survivors: who was in a view with a victim (or in any, for a coordinator). `logs` end at a strike."""
    lost: list[float] = []
    commit: list[float] = []
    victims = set(fault.victims)
    for name, lines in logs.items():
        members = _members_at(lines, fault.at)
        if name in victims or not (victims & set(members) if victims else members):
            continue
        after = [line for line in lines if line["at"] > fault.at]
        first = next((x for x in after if x["what"] == "commit" and not victims & set(x["members"])), None)
        if first is None:  # it was struck, or told to stop, before that
            continue
        commit.append(first["at"] - fault.at)
        errors = [line["at"] for line in after if line["what"] == "undone" and line["at"] < first["at"]]
        lost += [min(errors) - fault.at] if errors else []
    return Wait(fault, max(lost, default=None), max(commit, default=None))


def _members_at(lines: Sequence[Line], at: float) -> list[str]:
    """Of the view that a peer was in; none before it joined and after it went."""
    found: list[str] = []
    for line in lines:
        if line["at"] > at:
            break
        if "members" in line:
            found = line["members"]
        if line["what"] in _OUT:
            found = []
    return found


def _longest(lines: Sequence[Line]) -> float:
    times = [line["at"] for line in lines if line["what"] in ("joined", "commit", "left")]
    return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def rows(waits: Sequence[Wait]) -> dict[str, list[Wait]]:
    """By kind of fault. Those that fell into a coordinator's absence are kept apart: they waited for it too."""
    restarts = [wait.fault.at for wait in waits if wait.fault.kind == "coordinator"]
    found: dict[str, list[Wait]] = {"kill": [], "stop": [], "kill or stop while it is away": [], "coordinator": []}
    for wait in waits:
        away = any(at - AWAY_S < wait.fault.at < at + AWAY_S and wait.fault.at != at for at in restarts)
        kind = wait.fault.kind
        found[kind if kind == "coordinator" or not away else "kill or stop while it is away"].append(wait)
    return {kind: waits for kind, waits in found.items() if waits}


def spread(times: Sequence[float | None]) -> tuple[float, float] | None:
    """Median and worst of those that there are."""
    seen = [value for value in times if value is not None]
    return (statistics.median(seen), max(seen)) if seen else None

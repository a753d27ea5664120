"""Some seconds of tests/chaos/test_churn.py in every test run, and whether its checks can notice anything."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parts.churn_log import Fault, Line, study
from parts.churn_run import Churn, Plan, warm_up


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Is started before the first test, for it stays."""
    warm_up()


def test_a_short_churn_with_a_coordinator_crash_breaks_no_promise(tmp_path: Path) -> None:
    plan = Plan(12.0, secrets.randbelow(1 << 16), coordinator_kills=1)
    print(f"seed {plan.seed}")
    outcome = Churn(plan, tmp_path, print).run()
    assert not outcome.violations, "\n\n".join(outcome.violations)
    assert outcome.count("coordinator") == 1
    assert outcome.count("kill") + outcome.count("stop") > 0
    assert outcome.findings.commits > 10


def line(what: str, at: float, txn: int = 0, members: tuple[str, ...] = (), **more: Any) -> Line:
    found: Line = {"what": what, "at": at, "txn": txn}
    if what == "commit":
        found |= {"view": "1.1", "members": list(members), "digest": "d", "right": True, "operations": 1}
    return found | more


def good() -> dict[str, list[Line]]:
    """a and b commit 1 with c, which is killed in the middle of 2, and go on without it."""
    return {
        name: [
            line("joined", 0.0, members=("a", "b", "c")) | {"members": ["a", "b", "c"]},
            line("commit", 1.0, 1, ("a", "b", "c")),
            *([] if name == "c" else [line("undone", 2.1, 2, error="PeerLost", restored=True)]),
            *([] if name == "c" else [line("commit", 2.3, 3, ("a", "b"), view="1.2")]),
        ]
        for name in "abc"
    }


KILL = Fault(2.0, "kill", ("c",))


def test_the_checks_accept_what_is_right_and_measure_it() -> None:
    found = study(good(), [KILL])
    assert not found.violations
    assert (found.commits, found.aborts, found.sizes) == (2, 2, (2, 3))
    (wait,) = found.waits
    assert (round(wait.lost_s or 0, 3), round(wait.commit_s or 0, 3)) == (0.1, 0.3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda logs: logs["b"][1].update(digest="other"), "1: a has digest d, b has other"),
        (lambda logs: logs["b"][1].update(members=["a", "b"]), "b has ['a', 'b']"),
        (lambda logs: logs["b"][1].update(right=False), "not the exact sum"),
        (lambda logs: logs["b"][2].update(restored=False), "not back"),
        (lambda logs: logs["b"].pop(1), "has not committed 1"),
        (lambda logs: logs["b"][2].update(txn=1), "b undid 1"),
        (lambda logs: logs["b"].append(line("commit", 3.0, 1, ("a", "b", "c"))), "committed 1 after 3"),
        (lambda logs: logs["b"].append(line("evicted", 3.0, text="why")), "never struck"),
    ],
)
def test_the_checks_notice_what_is_wrong(change: Callable[[dict[str, list[Line]]], object], text: str) -> None:
    logs = good()
    change(logs)
    violations = study(logs, [KILL]).violations
    assert any(text in violation for violation in violations), violations

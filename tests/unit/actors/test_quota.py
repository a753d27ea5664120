"""Ranks and spares of a run: the lesser of wish and grant."""

from __future__ import annotations

from typing import Any

from everstep.actors.quota import Quota
from everstep.platform.job.spec import Ranks


class Granter:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self) -> None:
        self.calls.append("start")

    def report(self, granted: int, held: int, number: int) -> None:
        self.calls.append((granted, held, number))

    def leave(self, result: dict[str, Any]) -> None:
        self.calls.append(result)


def quota(granter: Granter | None) -> tuple[Quota, list[Any], list[str]]:
    sizes: list[Any] = []
    notes: list[str] = []
    ranks = Ranks(min=1, max=4, spares=2)
    return Quota(ranks, granter, lambda kind, text: notes.append(kind), lambda *s: sizes.append(s)), sizes, notes


def test_without_a_controller_the_wish_counts_and_spares_stay():
    asked, sizes, notes = quota(None)
    asked.start()
    asked.report(3)
    asked.wished(2)
    asked.leave({})
    assert (sizes, notes) == ([(2, None)], [])


def test_a_grant_is_ranks_first_and_spares_from_the_rest():
    granter = Granter()
    asked, sizes, notes = quota(granter)
    asked.start()
    for number, processes in enumerate((0, 3, 5, 6), start=1):
        asked.granted(processes, "why", number)
    assert sizes == [(0, 0), (0, 0), (3, 0), (4, 1), (4, 2)]
    assert notes == ["queued", "queued", "grant", "grant", "grant"]
    asked.report(6)
    assert granter.calls == ["start", (6, 6, 4)]


def test_the_lesser_of_wish_and_grant():
    asked, sizes, _ = quota(Granter())
    asked.granted(5, "why", 1)
    asked.wished(2)
    asked.granted(1, "why", 2)
    asked.granted(6, "why", 3)
    asked.wished(4)
    assert sizes == [(4, 1), (2, 2), (1, 0), (2, 2), (4, 2)]

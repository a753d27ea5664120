"""How many ranks and spares a run may have: the lesser of what its user wishes and what the controller grants.

Belongs to the supervisor's loop. Without a controller the wish alone counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everstep.actors.grants import Granter
from everstep.platform.job.spec import Ranks

MakeGranter = Callable[[Callable[[int, str, int], None], Callable[[str], None]], Granter]
"""(on_grant, on_refused) -> a Granter that is not started."""


class Quota:
    """`note(kind, text)` tells of it; `resize(ranks, spares)` carries it out (spares None: as before)."""

    def __init__(
        self,
        ranks: Ranks,
        granter: Granter | None,
        note: Callable[[str, str], None],
        resize: Callable[[int, int | None], None],
    ) -> None:
        self._wish = ranks.max
        self._spares = ranks.spares
        self._granter = granter
        self._note = note
        self._resize = resize
        self._granted = 0
        self._number = 0

    def start(self) -> None:
        """Before there is any process: with a controller there is none before its first grant."""
        if self._granter is not None:
            self._note("queued", "queued: the cluster's controller is asked for ranks")
            self._resize(0, 0)
            self._granter.start()

    def go_on(self, wish: int, granted: int, number: int, held: int) -> None:
        """As the supervisor before this one: with its wish and its grant."""
        self._wish, self._granted, self._number = wish or self._wish, granted, number
        if self._granter is not None:
            self._granter.report(granted, held, number)
            self._granter.start()

    @property
    def known(self) -> tuple[int, int, int]:
        """(wish, processes granted, number of the grant), for a successor."""
        return self._wish, self._granted, self._number

    def wished(self, ranks: int) -> None:
        """By the user."""
        self._wish = ranks
        self._apply()

    def granted(self, processes: int, reason: str, number: int) -> None:
        """By the controller; 0: the run is queued."""
        self._granted, self._number = processes, number
        self._note("grant" if processes else "queued", reason)
        self._apply()

    def report(self, held: int) -> None:
        if self._granter is not None:
            self._granter.report(self._granted, held, self._number)

    def leave(self, result: dict[str, Any]) -> None:
        """Any thread, once the run's processes are gone."""
        if self._granter is not None:
            self._granter.leave(result)

    def _apply(self) -> None:
        if self._granter is None:
            self._resize(self._wish, None)
            return
        ranks = min(self._wish, self._granted)
        self._resize(ranks, min(self._spares, self._granted - ranks))

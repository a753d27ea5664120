"""Which runs nobody owns any more: neither a supervisor nor a standby of theirs has lived for longer than a grace.

No Ray in here; one thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

PREFIX: Final = "everstep/"  # everstep/RUN/PART are the names of a run's actors and placement groups
_OWNERS: Final = ("supervisor", "standby")


class Orphans:
    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._since: dict[str, float] = {}

    def look(self, parts: Mapping[str, Collection[str]], now: float) -> list[str]:
        """`parts`: run -> what of it is there now. Returns the runs to end."""
        alone = {run for run, names in parts.items() if not any(name.startswith(_OWNERS) for name in names)}
        self._since = {run: self._since.get(run, now) for run in alone}
        return sorted(run for run, since in self._since.items() if now - since >= self._grace_s)


def by_run(names: Collection[str]) -> dict[str, set[str]]:
    """everstep/RUN/PART names, sorted into runs; other names are passed over."""
    found: dict[str, set[str]] = {}
    for name in names:
        run, _, part = name.removeprefix(PREFIX).partition("/")
        if name.startswith(PREFIX) and part:
            found.setdefault(run, set()).add(part)
    return found

"""Which ranks may take part: those whose fingerprint says that they would compute the same bits. Pure."""

from __future__ import annotations

from collections.abc import Mapping


class Admission:
    """The first rank that comes sets the measure. Belongs to the supervisor's loop."""

    def __init__(self, stored: Mapping[str, str]) -> None:
        """`stored` is the fingerprint of the execution that wrote the checkpoint, empty without one."""
        self._reference: tuple[str, Mapping[str, str]] | None = ("the checkpoint", stored) if stored else None

    @property
    def fingerprint(self) -> dict[str, str]:
        """What every rank of this run has; empty before the first."""
        return dict(self._reference[1]) if self._reference is not None else {}

    def objection(self, name: str, fingerprint: Mapping[str, str]) -> str:
        """Why `name` would compute other bits than the first rank; "" when it would not."""
        if self._reference is None:
            self._reference = (name, fingerprint)
        first, reference = self._reference
        keys = sorted(set(reference) | set(fingerprint))
        differs = [key for key in keys if reference.get(key) != fingerprint.get(key)]
        if not differs:
            return ""
        what = ", ".join(f"{key} {fingerprint.get(key)!r} instead of {reference.get(key)!r}" for key in differs)
        return f"{name} would compute other bits than {first}: {what}"

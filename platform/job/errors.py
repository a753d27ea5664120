"""What can go wrong around a job before and beside its training: one tree.

    JobError
    ├── SpecError          the job file, or what it points to, is not acceptable (also a ValueError)
    ├── VersionMismatch    one run would be made of two versions of everstep
    ├── AlreadyRunning     a live run holds this name
    └── UnknownJob         no such run in the registry (also a LookupError)

Owns: `Problem`, the one form in which a refusal names field, value, what is allowed and how to fix it.
Thread-safety: everything here is immutable. All errors pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# A value longer than this is shown cut: a message must fit a screen even when someone passes a whole file.
_VALUE_CHARS = 120


class JobError(Exception):
    """Base of everything that this folder raises for users."""


@dataclass(frozen=True)
class Problem:
    """One refused field.

    field: dotted path in the job file (`ranks.max`), "" when no single field is to blame.
    value: what was found there; `MISSING` when the field is absent.
    allowed: what would be accepted. fix: what to type. why: what went wrong, when `allowed` does not say it.
    """

    field: str
    value: Any
    allowed: str
    fix: str
    why: str = ""

    def render(self) -> str:
        """Returns the problem in two to four lines."""
        head = self.field or "job"
        if not (isinstance(self.value, str) and self.value == MISSING):
            head += f" = {show(self.value)}"
        else:
            head += " is missing"
        first, *rest = self.why.strip().splitlines() or [""]
        lines = [f"{head}: {first}" if first else head]
        lines += [f"    {line}" for line in rest]
        if self.allowed:
            lines.append(f"    allowed: {self.allowed}")
        if self.fix:
            lines.append(f"    fix: {self.fix}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-able data (the value as text when JSON cannot hold it)."""
        try:
            json.dumps(self.value)
            value = self.value
        except (TypeError, ValueError):
            value = repr(self.value)
        return {
            "field": self.field,
            "value": value,
            "allowed": self.allowed,
            "fix": self.fix,
            "why": self.why,
        }


MISSING = "<missing>"


def show(value: Any) -> str:
    """Returns a value the way YAML users write it, cut to a screen line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _VALUE_CHARS else text[: _VALUE_CHARS - 1] + "…"


class SpecError(JobError, ValueError):
    """The job is refused before anything starts. `str()` is the one message that a user reads.

    source: the file (or "job") that the problems are about.
    """

    def __init__(self, problems: Iterable[Problem], source: str = "job") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.source} cannot run: {count} problem{'' if count == 1 else 's'}"
        return "\n".join([head, *("  " + p.render().replace("\n", "\n  ") for p in self.problems)])

    def __reduce__(self) -> tuple[Any, ...]:
        return SpecError, (self.problems, self.source)


class AlreadyRunning(JobError):
    """A live run holds this name: two at once would write the same checkpoints."""


class VersionMismatch(JobError):
    """Two parts of one run have different versions of everstep; the message names both."""


class UnknownJob(JobError, LookupError):
    """The registry knows no such run; the message lists those it knows."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "unknown job"

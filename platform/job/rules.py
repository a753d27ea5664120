"""Rules of a job file that cross fields, and values that are designed but not built yet.

| rule                                             | where           |
|--------------------------------------------------|-----------------|
| ranks.min <= ranks.max <= lanes                  | `_ranks`        |
| parity < ranks.max                               | `_parity`       |
| a fault's rank, step and extra fields make sense | `_fault`        |
| stall_s >= frozen_s                              | `_timeouts`     |
| shadows: zero 1 or 2, one a shard                | `_shadows`      |
| the best is kept by a metric that there is       | `_best`         |
| zero <= 2, tensor = pipeline = 1, float32, …     | `_unsupported`  |

What is not built is refused, never ignored. Pure: looks at the job and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everstep.platform.job.errors import MISSING, Problem

if TYPE_CHECKING:
    from everstep.platform.job.spec import Fault, JobSpec

LOG_SINKS = ("jsonl",)
DOMAINS = ("auto", "rank", "node")

# do -> (fields it needs, fields it may have); a field of another action would be ignored, so it is refused.
FAULT_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kill": (("rank",), ()),
    "lose": (("rank",), ()),
    "freeze": (("rank",), ("wake_s",)),
    "slow": (("rank", "factor"), ("steps",)),
    "busy": (("rank", "seconds"), ()),
    "scale": (("to",), ()),
}
_OPTIONAL_FAULT_FIELDS = ("rank", "factor", "steps", "wake_s", "seconds", "to")


def problems(spec: JobSpec) -> list[Problem]:
    """Returns every broken rule, in the order of the file."""
    found = [*_ranks(spec), *_parity(spec), *_unsupported(spec), *_shadows(spec), *_best(spec), *_timeouts(spec)]
    for index, fault in enumerate(spec.faults):
        found += _fault(spec, fault, f"faults.{index}")
    return found


def absolute(url: str, spec_dir: Path) -> str:
    """Returns a folder of this machine as an absolute path, relative ones from the job file's; other URLs as they
    are.
    """
    if "://" in url and not url.startswith("file:///"):
        return url
    return str((spec_dir / url.removeprefix("file://")).resolve())


def _ranks(spec: JobSpec) -> Iterator[Problem]:
    low, high, lanes = spec.ranks.min, spec.ranks.max, spec.lanes
    if low > high:
        yield Problem(
            "ranks.min",
            low,
            f"at most ranks.max, which is {high}",
            f"set ranks.min to {high} or less, or ranks.max to {low} or more",
            "the least number of ranks is more than the greatest",
        )
    if high > lanes:
        yield Problem(
            "ranks.max",
            high,
            f"at most lanes, which is {lanes}",
            f"set ranks.max to {lanes} or less, or lanes to {high} or more (that changes the global batch)",
            "a rank needs at least one lane to work on",
        )


def _parity(spec: JobSpec) -> Iterator[Problem]:
    domains, parity = spec.ranks.max, spec.snapshot.parity
    most = max(domains - 1, 1)  # the default of 1 is no mistake of who runs a single rank
    if parity > most:
        yield Problem(
            "snapshot.parity",
            parity,
            f"0 to {most} ({domains} failure domains: one a rank, ranks.max)",
            f"set snapshot.parity to {most} or less, or ranks.max to {parity + 1} or more",
            f"parity of {parity} domains is kept by more than {parity} domains",
        )


def _timeouts(spec: JobSpec) -> Iterator[Problem]:
    frozen, stall = spec.timeouts.frozen_s, spec.timeouts.stall_s
    if stall < frozen:
        yield Problem(
            "timeouts.stall_s",
            stall,
            f"at least timeouts.frozen_s, which is {frozen:g}",
            f"set timeouts.stall_s to {frozen:g} or more",
            "an operation would be given up before a silent rank is",
        )


def _unsupported(spec: JobSpec) -> Iterator[Problem]:
    def refuse(field: str, value: Any, allowed: str, use: str) -> Problem:
        return Problem(field, value, allowed, f"use `{field}: {use}`", "not supported yet")

    if spec.layout.zero > 2:
        yield refuse("layout.zero", spec.layout.zero, "0, 1 or 2", "2")
    if spec.layout.tensor != 1:
        yield refuse("layout.tensor", spec.layout.tensor, "1", "1")
    if spec.layout.pipeline != 1:
        yield refuse("layout.pipeline", spec.layout.pipeline, "1", "1")
    if spec.resources.gpus:
        yield refuse("resources.gpus", spec.resources.gpus, "0", "0")
    if spec.train.precision != "float32":
        yield refuse("train.precision", spec.train.precision, "float32", "float32")
    if spec.train.compile:
        yield refuse("train.compile", spec.train.compile, "false", "false")
    if spec.snapshot.domain not in DOMAINS:
        yield refuse(
            "snapshot.domain", spec.snapshot.domain, "auto, rank or node (labels are designed, not built yet)", "auto"
        )
    for index, sink in enumerate(spec.log):
        if sink not in LOG_SINKS:
            yield Problem(f"log.{index}", sink, ", ".join(LOG_SINKS), "use `log: [jsonl]`", "not supported yet")


def _best(spec: JobSpec) -> Iterator[Problem]:
    best = spec.checkpoint.best if spec.checkpoint is not None else None
    if best is not None and best.metric.startswith("eval.") and not spec.eval.every:
        yield Problem(
            "checkpoint.best.metric",
            best.metric,
            "a metric of training while eval.every is 0",
            "set eval.every to 1 or more, or use `metric: loss`",
            "nothing is evaluated",
        )


def _shadows(spec: JobSpec) -> Iterator[Problem]:
    if spec.snapshot.redundancy != "shadow":
        return
    if spec.layout.zero == 0:
        yield Problem(
            "snapshot.redundancy",
            "shadow",
            "parity, with layout.zero: 0",
            "use `snapshot.redundancy: parity`, or layout.zero: 1 or 2",
            "every rank holds the whole state already, so there is nothing to mirror",
        )
    if spec.snapshot.parity != 1:
        yield Problem(
            "snapshot.parity",
            spec.snapshot.parity,
            "1, with snapshot.redundancy: shadow",
            "use `snapshot.parity: 1`, or `snapshot.redundancy: parity`",
            "each shard has one shadow",
        )


def _fault(spec: JobSpec, fault: Fault, where: str) -> Iterator[Problem]:
    needed, optional = FAULT_FIELDS[fault.do]
    for name in needed:
        if getattr(fault, name) is None:
            yield Problem(f"{where}.{name}", MISSING, f"a value, with do: {fault.do}", f"add `{name}:` to this fault")
    for name in _OPTIONAL_FAULT_FIELDS:
        value = getattr(fault, name)
        if value is not None and name not in needed + optional:
            belongs = [do for do, (needs, may) in FAULT_FIELDS.items() if name in needs + may]
            yield Problem(
                f"{where}.{name}",
                value,
                f"with do: {' or '.join(belongs)}",
                f"remove `{name}` from this fault",
                f"means nothing with do: {fault.do}",
            )
    if fault.at_step > spec.steps:
        yield Problem(
            f"{where}.at_step",
            fault.at_step,
            f"0 to {spec.steps} (steps)",
            f"set it to {spec.steps} or less, or raise steps",
            "the run ends before this fault",
        )
    if fault.rank is not None and fault.rank >= spec.ranks.max:
        yield Problem(
            f"{where}.rank",
            fault.rank,
            f"0 to {spec.ranks.max - 1} (ranks.max is {spec.ranks.max})",
            f"set it to {spec.ranks.max - 1} or less, or raise ranks.max",
            "there is never such a rank",
        )
    if fault.to is not None and not spec.ranks.min <= fault.to <= spec.ranks.max:
        yield Problem(
            f"{where}.to",
            fault.to,
            f"{spec.ranks.min} to {spec.ranks.max} (ranks.min to ranks.max)",
            "set it into that range, or widen ranks",
        )

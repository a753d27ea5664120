"""The pure parts of soak.py: when what strikes, how many steps a run has, and what came of it.

No clock and no process in here; the random numbers follow from the seed.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.platform.job.result import RunResult

# How often a kind is drawn. Deaths and freezes are what machines do most; a scale is what people do.
WEIGHTS: Mapping[str, int] = {
    "kill": 4,  # SIGKILL of a trainer
    "freeze": 3,  # SIGSTOP of a trainer
    "manager": 1,  # SIGKILL of a snapshot manager
    "lose": 2,  # a failure domain: manager, trainer and their memory at once
    "scale": 2,  # another number of ranks, from ranks.min to ranks.max: joins and leaves
    "drain": 1,  # a rank is told to leave in order, as on a node that drains
    "supervisor": 1,  # SIGKILL of the supervisor, on Ray
}
LEAST_STEPS = 20
TARGET_GOODPUT = 0.9
TARGET_WALL = 1.2


@dataclass(frozen=True)
class Blow:
    """One fault to come: `wait_s` after the one before. `pick` in [0, 1) chooses among what there is by then."""

    wait_s: float
    kind: str
    pick: float


def blows(seed: int, mtbf_s: float, kinds: Sequence[str]) -> Iterator[Blow]:
    """Faults without end, their distances exponential with mean `mtbf_s`. Raises ValueError for an unknown kind."""
    if unknown := sorted(set(kinds) - WEIGHTS.keys()):
        raise ValueError(f"no such fault: {', '.join(unknown)}; known: {', '.join(WEIGHTS)}")
    chance = random.Random(seed)
    weights = [WEIGHTS[kind] for kind in kinds]
    while True:
        kind = chance.choices(kinds, weights)[0]
        yield Blow(chance.expovariate(1 / mtbf_s), kind, chance.random())


def one_of(candidates: Sequence[Any], pick: float) -> Any:
    """The candidate at the relative position `pick`; None of none."""
    return candidates[int(pick * len(candidates))] if candidates else None


def steps_for(minutes: float, step_s: float) -> int:
    """Steps that last `minutes` undisturbed: the number decides about the bits, so it is fixed before the run."""
    return max(LEAST_STEPS, round(minutes * 60 / step_s))


@dataclass
class Soak:
    """What was done and measured."""

    host: str
    seed: int
    steps: int
    step_s: float  # undisturbed, median
    faults: list[str] = field(default_factory=list)  # kinds, in order
    undisturbed: RunResult | None = None
    undisturbed_wall_s: float = 0.0  # measured, or extrapolated from the calibration
    result: RunResult | None = None
    left: list[int] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)  # that what is left still listens on
    memory: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def summary(soak: Soak) -> dict[str, Any]:
    """For programs, and for the table; times in seconds."""
    found: dict[str, Any] = {
        "host": soak.host,
        "seed": soak.seed,
        "steps": soak.steps,
        "undisturbed_step_s": soak.step_s,
        "undisturbed_wall_s": soak.undisturbed_wall_s,
        "undisturbed_measured": soak.undisturbed is not None,
        "faults": dict(Counter(soak.faults)),
        "left": {"processes": soak.left, "ports": soak.ports, "memory": soak.memory},
        "failed": soak.failed,
    }
    result = soak.result
    if result is None:
        return {**found, "ok": False}
    split = {name.removesuffix("_s"): value for name, value in _parts(result).items()}
    goodput = split["productive"] / result.wall_s if result.wall_s else 0.0
    ratio = result.wall_s / soak.undisturbed_wall_s if soak.undisturbed_wall_s else None
    same = None if soak.undisturbed is None else result.state_sha256 == soak.undisturbed.state_sha256
    resumes = sorted(recovery.resume_ms / 1000 for recovery in result.recoveries)
    checks = {
        "complete": result.ok and result.steps == soak.steps,
        "goodput": goodput >= TARGET_GOODPUT,
        "wall": ratio is not None and ratio <= TARGET_WALL,
        "same_bits": same is not False,
        "nothing_left": not (soak.left or soak.memory),
    }
    return {
        **found,
        "wall_s": result.wall_s,
        "wall_ratio": ratio,
        "goodput": goodput,
        "split_s": split,
        "undisturbed_split_s": _parts(soak.undisturbed) if soak.undisturbed else None,
        "recoveries": len(result.recoveries),
        "resume_median_s": resumes[len(resumes) // 2] if resumes else None,
        "resume_worst_s": resumes[-1] if resumes else None,
        "rescales": len(result.rescales),
        "steps_lost": sum(recovery.steps_lost for recovery in result.recoveries),
        "steps_lost_worst": max((recovery.steps_lost for recovery in result.recoveries), default=0),
        "state_sha256": result.state_sha256,
        "same_bits": same,
        "checks": checks,
        "ok": all(checks.values()) and not soak.failed,
    }


def _parts(result: RunResult) -> dict[str, float]:
    parts: dict[str, float] = result.to_dict()["goodput"]
    return parts

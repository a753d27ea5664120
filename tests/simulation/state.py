"""The simulated training state, and the memory of hosts that outlives processes.

The state is two tensors of a few elements; a unit is one element. Its value is (step, hash), where
hash(step) = H(hash(step - 1), step, unit): torn, stale or mixed state is seen at once. Every seventh step is
skipped (not finite), which changes the step but no hash.

`Segment` is a file in /dev/shm: it belongs to a host, and goes with it. Its seal is physical: whoever has it
mapped may write it, fenced or not.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from everstep.collectives.messages import ViewId
from everstep.platform.training.layout import Run, merge_runs
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
from everstep.storage.planner import Want
from everstep.storage.versions import Slots

Value = tuple[int, int]  # (step, hash)
Memory = dict[int, Value]  # by unit

# The second one goes to a single rank in most layouts: a domain that dies takes a whole tensor with it.
TENSORS = (TensorMeta("a", "param", "float32", (7,)), TensorMeta("b", "param", "float32", (2,)))
UNITS = tuple((i, i + 1) for i in range(sum(meta.numel for meta in TENSORS)))
ALL = tuple(range(len(UNITS)))
CHECKPOINT = Source("file", "", "state.safetensors")
_PLACES = tuple((meta.name, i) for meta in TENSORS for i in range(meta.numel))
_UNIT_AT = {place: unit for unit, place in enumerate(_PLACES)}


@cache
def reference(step: int, unit: int) -> Value:
    """What a unit must hold after `step`."""
    if step == 0:
        return (0, zlib.crc32(f"seed {unit}".encode()))
    return advance(reference(step - 1, unit), step, unit)


def advance(value: Value, step: int, unit: int) -> Value:
    assert value[0] == step - 1, f"step {step} on a unit at step {value[0]}"
    return (step, value[1] if step % 7 == 0 else zlib.crc32(f"{value[1]} {step} {unit}".encode()))


def units_of(runs: Iterable[Run]) -> list[int]:
    return [unit for start, stop in runs for unit in range(start, stop)]


def runs_of(units: Iterable[int]) -> tuple[Run, ...]:
    return merge_runs((unit, unit + 1) for unit in units)


def index_of(step: int, units: Iterable[int], source: Source) -> StateIndex:
    """Lists every tensor of the state, whether `units` touch it or not."""
    fragments = tuple(
        Fragment(_PLACES[u][0], "param", _PLACES[u][1], _PLACES[u][1] + 1, source, 4 * u) for u in units
    )
    return StateIndex(step, TENSORS, fragments)


def wants_of(units: Iterable[int], holder: str) -> list[Want]:
    return [Want(_PLACES[u][0], "param", _PLACES[u][1], _PLACES[u][1] + 1, holder) for u in units]


def units_between(name: str, start: int, stop: int) -> list[int]:
    return [_UNIT_AT[name, i] for i in range(start, stop)]


@dataclass(eq=False)
class Segment:
    """`seal` is written last and cleared first."""

    ident: str
    seal: tuple[int, ViewId] | None = None  # (step, view)
    values: Memory = field(default_factory=dict)


@dataclass(eq=False)
class Cut:
    """The segments of one view in one domain, with their slot machine."""

    view: ViewId
    owner: str  # the trainer that has them mapped
    segments: tuple[Segment, ...]
    slots: Slots


@dataclass(eq=False)
class Host:
    """`cuts` is its shared memory, oldest view first."""

    name: str
    slot: int
    alive: bool = True
    cuts: list[Cut] = field(default_factory=list)


def verified(values: Mapping[int, Value], step: int) -> list[str]:
    """What is wrong with `values` as the state after `step`."""
    return [
        f"unit {u} holds {v}, not {reference(step, u)}" for u, v in sorted(values.items()) if v != reference(step, u)
    ]

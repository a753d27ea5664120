"""A rank that trains nothing: the entry point of the writers of snapshot_kills.py. Not a test module.

Real are its control stream, its mesh, its slots, its captures in a thread beside, its restore from segments and
parity; its state is a pure function of the step, and what a view gives it to hold decides what of it it writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import msgspec
import torch

from everstep.actors.config import RankConfig
from everstep.actors.rank_conductor import RankConductor
from everstep.collectives.errors import CollectiveError
from everstep.platform.training.conductor import RunOver
from everstep.platform.training.layout import Run, intersect, rows_of
from everstep.platform.training.messages import Inventory, Vote
from everstep.platform.training.restore import restore
from everstep.platform.training.shard import TORN, Place, RankState
from everstep.storage.index import StateIndex, TensorMeta
from everstep.storage.planner import Want

NUMEL = 98_304  # int64: 768 KiB a tensor
METAS = tuple(TensorMeta(f"w{i}", "param", "int64", (NUMEL,)) for i in range(4))
TOTAL = NUMEL * len(METAS)  # of the flat space: tensor after tensor
UNIT = 1024
UNITS: tuple[Run, ...] = tuple((a, a + UNIT) for a in range(0, TOTAL, UNIT))


def content(step: int, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of the flat space after `step`; neighbours, steps and tensors all differ."""
    at = torch.arange(start, stop, dtype=torch.int64)
    return (at * 0x1E3779B97F4A7C15) ^ ((at + step) * 0x3F58476D1CE4E5B9) ^ step


def parts(runs: Sequence[Run]) -> Iterator[tuple[TensorMeta, int, int]]:
    """(tensor, start, stop) of what is in `runs`."""
    for number, meta in enumerate(METAS):
        base = number * NUMEL
        for a, b in intersect(((base, base + NUMEL),), runs):
            yield meta, a - base, b - base


class State:
    """What `Snapshots` and `restore` use of a RankState."""

    def __init__(self) -> None:
        self.stamp = TORN
        self.held: tuple[Run, ...] = ()
        self.own: tuple[Run, ...] = ()
        self.mirrored: tuple[Run, ...] = ()
        self._tensors: list[tuple[TensorMeta, int, int, torch.Tensor]] = []

    def hold(self, runs: Sequence[Run], mirrored: Sequence[Run] = ()) -> None:
        assert not mirrored
        self.stamp = TORN
        self.own = self.held = tuple(runs)
        self._tensors = [
            (meta, start, stop, torch.zeros(stop - start, dtype=torch.int64)) for meta, start, stop in parts(self.own)
        ]

    def reset(self) -> None:
        self.advance(0)

    def advance(self, step: int) -> None:
        """The state after `step`."""
        self.stamp = TORN
        for wanted, tensor in self._expected(step):
            tensor.copy_(wanted)
        self.stamp = step

    def wrong(self) -> list[str]:
        """What differs from the state at the stamp."""
        return [
            f"step {self.stamp}: {meta.name}[{start}:{stop}]"
            for (meta, start, stop, _), (wanted, tensor) in zip(
                self._tensors, self._expected(self.stamp), strict=True
            )
            if not torch.equal(wanted, tensor)
        ]

    def _expected(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for meta, start, stop, tensor in self._tensors:
            base = METAS.index(meta) * NUMEL
            yield content(step, base + start, base + stop), tensor

    def metas(self) -> tuple[TensorMeta, ...]:
        return METAS

    def places(self, runs: Sequence[Run] | None = None) -> Iterator[Place]:
        assert runs in (None, self.own)
        yield from (Place(*place) for place in self._tensors)

    def footprint(self, runs: Sequence[Run] | None = None) -> Iterator[tuple[TensorMeta, int, int]]:
        yield from parts(self.held if runs is None else runs)
        yield from ((meta, 0, 0) for meta in METAS)

    def live_index(self, member: str) -> StateIndex | None:
        return None  # so that every byte of a restore comes from segments and parity

    def wants(self, have: StateIndex, member: str) -> list[Want]:
        return [Want(meta.name, meta.kind, start, stop, member) for meta, start, stop, _ in self._tensors]

    def install(self, have: StateIndex, fill: Callable[[Want, torch.Tensor], None]) -> None:
        for meta, start, stop, tensor in self._tensors:
            fill(Want(meta.name, meta.kind, start, stop, ""), tensor)
        self.stamp = have.step


def main(config: bytes) -> None:
    """Runs one writer until its run is over or its manager is gone."""
    torch.set_num_threads(1)
    decoded = msgspec.msgpack.decode(config, type=RankConfig)
    conductor = RankConductor(decoded, 20.0, os.getpid(), {})
    state = State()
    while True:
        try:
            _take_part(conductor, state)
        except RunOver:
            break
        except CollectiveError as error:
            conductor.stand_up(error)
    conductor.close()


def _take_part(conductor: RankConductor, state: State) -> None:
    """One view, as a Session takes part in it."""
    rank_state = cast("RankState", state)

    def inventory() -> Inventory:
        if state.stamp != TORN and state.held:
            conductor.snapshot(rank_state, lambda: None, state.own, wait=True)
        return Inventory(state.stamp, state.held, None, rows_of(UNITS))

    seat = conductor.take_seat(inventory)
    restore(rank_state, list(seat.plan.owned[seat.rank]), seat, conductor)
    if wrong := state.wrong():
        conductor.note("wrong", msgspec.msgpack.encode(f"{conductor.name} restored {wrong}"))
    conductor.level(seat)
    conductor.snapshot(rank_state, lambda: None, state.own)
    while True:
        step = state.stamp + 1
        conductor.protect(step)
        verdict = conductor.vote(seat, step, Vote("step", sealed_step=conductor.sealed_step()))
        conductor.release()
        state.advance(step)
        if verdict.snapshot:
            conductor.snapshot(rank_state, lambda: None, state.own)

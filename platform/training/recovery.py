"""The one chooser: from which step a view starts, who owns what, and where the bytes are. Pure.

Newest step first. A step can serve when every byte of its state is in stamped memory of a member
([Note: stamps]), in a sealed version of a domain that lives, or in the checkpoint that the run was started from.
A commit that is not covered is rolled back: it is computed again, to equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everstep.platform.training.layout import Run
from everstep.platform.training.messages import Inventory, Stock
from everstep.platform.training.ownership import assign
from everstep.storage.index import StateIndex, merge


@dataclass(frozen=True)
class Choice:
    base_step: int
    have: StateIndex | None
    owned: tuple[tuple[Run, ...], ...]
    from_checkpoint: bool
    reason: str


class Lost(Exception):
    """No step of the run is covered by what is left."""


def choose(
    ranks: Sequence[str],
    inventories: Mapping[str, Inventory],
    stocks: Mapping[str, Stock],
    checkpoint: StateIndex | None,
    initial_step: int,
) -> Choice:
    """`ranks`: the coming view's members in rank order. Raises Lost with what is missing at each step."""
    by_step: dict[int, list[StateIndex]] = {}
    for name in sorted(inventories):
        live = inventories[name].live
        if live is not None:
            by_step.setdefault(live.step, []).append(live)
    for domain in sorted(stocks):
        for version in stocks[domain].versions:
            by_step.setdefault(version.step, []).append(version)
    if checkpoint is not None:
        by_step.setdefault(checkpoint.step, []).append(checkpoint)
    held = [inventories[name].held for name in ranks]
    units = next(inventories[name].units for name in ranks)
    owned = assign(units, len(ranks), held)
    holes = []
    for step in sorted(by_step, reverse=True):
        merged = merge(*by_step[step])
        missing = merged.missing()
        if not missing:
            from_checkpoint = checkpoint is not None and step == checkpoint.step
            reason = f"step {step} is the newest that is covered"
            return Choice(step, merged, owned, from_checkpoint, reason)
        name, kind, start, stop = missing[0]
        holes.append(f"step {step}: {len(missing)} ranges, first {name}/{kind}[{start}:{stop}]")
    if initial_step == 0:
        why = "no step is covered, the initial state is built from the seed" if holes else "the run starts"
        return Choice(0, None, owned, from_checkpoint=False, reason=why)
    raise Lost("no step is covered by the memory that is left: " + "; ".join(holes))

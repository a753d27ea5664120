"""The one chooser: from which step a view starts, who owns what, and where the bytes are. Pure.

Newest step first. A step can serve when every byte of its state is in stamped memory of a member
([Note: stamps]), in a sealed version of a domain that lives, in what parity can rebuild of those that do not
(storage/stripes.py), or in the checkpoint that the run was started from.
A commit that is not covered is rolled back: it is computed again, to equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everstep.platform.training.layout import Run, units_in
from everstep.platform.training.messages import Inventory, Rebuild, Stock
from everstep.platform.training.ownership import assign, assign_arcs, shadows
from everstep.platform.training.protection import rebuilds
from everstep.storage.index import StateIndex, merge


@dataclass(frozen=True)
class Choice:
    base_step: int
    have: StateIndex | None
    owned: tuple[tuple[Run, ...], ...]
    from_checkpoint: bool
    reason: str
    shadowed: tuple[tuple[Run, ...], ...] = ()  # by rank; () without shadows
    rebuilds: tuple[Rebuild, ...] = ()


class Lost(Exception):
    """No step of the run is covered by what is left."""


def choose(
    ranks: Sequence[str],
    inventories: Mapping[str, Inventory],
    stocks: Mapping[str, Stock],
    checkpoint: StateIndex | None,
    initial_step: int,
    shadow: bool = False,
) -> Choice:
    """`ranks`: the coming view's members in rank order; `shadow`: each mirrors the one before it.

    Raises Lost with what is missing at each step.
    """
    damaged = frozenset(item for inventory in inventories.values() for item in inventory.damaged)
    by_step: dict[int, list[StateIndex]] = {}
    for name in sorted(inventories):
        live = inventories[name].live
        if live is not None:
            by_step.setdefault(live.step, []).append(live)
    for domain in sorted(stocks):
        for version in stocks[domain].versions:
            if (domain, version.locator) not in damaged:
                by_step.setdefault(version.index.step, []).append(version.index)
        for parity in stocks[domain].parities:
            by_step.setdefault(parity.step, [])
    if checkpoint is not None:
        by_step.setdefault(checkpoint.step, []).append(checkpoint)
    held = [inventories[name].held for name in ranks]
    units = units_in(next(inventories[name].units for name in ranks))
    if shadow:
        owned = assign_arcs(units, held, [inventories[name].mirrored for name in ranks])
        shadowed = shadows(owned)
    else:
        owned, shadowed = assign(units, len(ranks), held), ()
    holes = []
    for step in sorted(by_step, reverse=True):
        decoded: tuple[Rebuild, ...] = ()
        merged = merge(*by_step[step]) if by_step[step] else None
        missing = merged.missing() if merged is not None else []
        if (missing or merged is None) and (lost := rebuilds(step, stocks, damaged)):
            merged = merge(*by_step[step], *(index for _, index in lost))
            missing = merged.missing()
            decoded = tuple(rebuild for rebuild, _ in lost)
        if merged is not None and not missing:
            from_checkpoint = checkpoint is not None and step == checkpoint.step
            reason = f"step {step} is the newest that is covered"
            if decoded:
                reason += f", with {', '.join(rebuild.domain for rebuild in decoded)} rebuilt from parity"
            return Choice(step, merged, owned, from_checkpoint, reason, shadowed, decoded)
        if not missing:
            continue  # parity alone, of data that is nowhere
        name, kind, start, stop = missing[0]
        holes.append(f"step {step}: {len(missing)} ranges, first {name}/{kind}[{start}:{stop}]")
    if initial_step == 0:
        why = "no step is covered, the initial state is built from the seed" if holes else "the run starts"
        return Choice(0, None, owned, from_checkpoint=False, reason=why, shadowed=shadowed)
    raise Lost("no step is covered by the memory that is left: " + "; ".join(holes))

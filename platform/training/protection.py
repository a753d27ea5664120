"""Which ranks keep parity of each other's snapshots, and what can be rebuilt from what is left. Pure.

A group has at most one rank of each failure domain, so the loss of a domain takes at most one element of a stripe.
Groups are small: parity costs parity / (members - parity) of the state in memory, which hardly falls beyond eight,
while the chance that a group loses more than its parity grows with its size. (Survival of 64 nodes, one in a thousand
lost an interval: XOR over 8 fails with 2.2e-4, Reed-Solomon 6 + 2 with 4.5e-7.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from everstep.platform.training.messages import ParityPlan, ParityVersion, Rebuild, Stock
from everstep.storage.errors import SegmentDamaged
from everstep.storage.index import Source, StateIndex
from everstep.storage.parity import can_rebuild
from everstep.storage.segment import decode_index

MAX_MEMBERS = 8


def parity_plan(domains: Sequence[str], parity: int) -> ParityPlan:
    """`domains[r]`: what rank r dies with. Groups of ranks of different domains, each with the parity it can carry.

    Ranks that stand in no group have none: where one domain has more than half of all ranks, or is alone.
    """
    by_domain: dict[str, list[int]] = {}
    for rank, domain in enumerate(domains):
        by_domain.setdefault(domain, []).append(rank)
    groups: list[tuple[int, ...]] = []
    for layer in range(max(map(len, by_domain.values()), default=0)):
        ranks = sorted(members[layer] for members in by_domain.values() if layer < len(members))
        count = -(-len(ranks) // MAX_MEMBERS)
        cuts = [len(ranks) * i // count for i in range(count + 1)]
        groups += [tuple(ranks[a:b]) for a, b in pairwise(cuts) if b - a > 1]
    if sum(map(len, groups)) < len(domains):  # layers are uneven, two ranks on one node and one on each other: deal
        largest = max(map(len, by_domain.values()))
        count = max(largest, -(-len(domains) // MAX_MEMBERS))
        order = [rank for members in sorted(by_domain.values(), key=len, reverse=True) for rank in members]
        dealt = [tuple(sorted(order[start::count])) for start in range(count)]
        groups = sorted(group for group in dealt if len(group) > 1)
    if not parity:
        return ParityPlan((), ())
    return ParityPlan(tuple(groups), tuple(min(parity, len(group) - 1) for group in groups))


def failure_domains(setting: str, members: Sequence[str], nodes: Mapping[str, str]) -> tuple[str, ...]:
    """What each rank dies with. `members`: the ranks' slots; `nodes`: slot -> machine; `setting`: snapshot.domain.

    "auto" is the machine where the ranks are on several, else the rank.
    """
    machines = tuple(nodes.get(slot) or slot for slot in members)
    by_machine = setting == "node" or (setting == "auto" and len(set(machines)) > 1)
    return machines if by_machine else tuple(members)


def effective_parity(plan: ParityPlan, ranks: int) -> int:
    """How many domains may be lost together, whichever they are."""
    return min((plan.group_of(rank)[1] for rank in range(ranks)), default=0)


def rebuilds(
    step: int, stocks: Mapping[str, Stock], damaged: frozenset[tuple[str, str]]
) -> list[tuple[Rebuild, StateIndex]]:
    """Every domain's payload of `step` that is lost and can be decoded, with the index of what it holds."""
    groups: dict[tuple[tuple[int, int], tuple[str, ...]], dict[int, tuple[str, ParityVersion]]] = {}
    for domain in sorted(stocks):
        for version in stocks[domain].parities:
            if version.step == step and (domain, version.locator) not in damaged:
                key = (version.view, version.index.members)
                groups.setdefault(key, {})[version.index.position] = (domain, version)
    found = []
    for (view, members), rows in sorted(groups.items(), key=lambda item: item[0]):
        index = next(version.index for _, (_, version) in sorted(rows.items()))
        data = [_data_of(stocks.get(domain), view, step, domain, damaged) for domain in members]
        kept = [(rows[p][0], rows[p][1].locator) if p in rows else ("", "") for p in range(len(members))]
        for position, domain in enumerate(members):
            if data[position] != ("", ""):
                continue
            have_data, have_rows = [item != ("", "") for item in data], [item != ("", "") for item in kept]
            if not can_rebuild(index.stripes, position, have_data, have_rows):
                continue
            locator = f"view-{view[0]}-{view[1]}.step-{step}"
            if (domain, locator) in damaged:
                continue
            source = Source("parity", domain, locator)
            try:
                lost = decode_index(index.indexes[position], step, index.payloads[position], source, locator)
            except SegmentDamaged:
                continue
            rebuild = Rebuild(domain, locator, position, index.parity, index.payloads, tuple(data), tuple(kept))
            found.append((rebuild, lost))
    return found


def _data_of(
    stock: Stock | None, view: tuple[int, int], step: int, domain: str, damaged: frozenset[tuple[str, str]]
) -> tuple[str, str]:
    for version in stock.versions if stock is not None else ():
        if version.view == view and version.index.step == step and (domain, version.locator) not in damaged:
            return domain, version.locator
    return "", ""

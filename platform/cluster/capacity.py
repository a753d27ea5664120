"""Whether a job's ranks can ever be placed on a cluster, whoever uses it now. Pure.

    a job can never fit   when fewer than `ranks.min` ranks would fit on all living nodes, each of them empty, and
                          on all nodes that the autoscaler may still add
    it fits for now       otherwise: on a busy cluster it waits

Nodes that the autoscaler has started are counted as nodes and as its own: a job may wait in vain, but none is
refused that could run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from everstep.platform.job.errors import Problem
from everstep.platform.job.spec import JobSpec


@dataclass(frozen=True)
class NodeFacts:
    """A living node: what it has when nothing runs on it. Memory in bytes, as Ray counts it."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeGroup:
    """A kind of node that the autoscaler may start; most < 0: any number."""

    name: str
    resources: Mapping[str, float]
    most: int
    labels: Mapping[str, str] | None = None  # None: not known, so whatever is asked for


def demand_of(spec: JobSpec) -> dict[str, float]:
    """What one rank asks for, under Ray's names."""
    r = spec.resources
    named: dict[str, float] = {"CPU": r.cpus, "GPU": r.gpus, "memory": r.memory or 0, **r.custom}
    return {name: amount for name, amount in named.items() if amount > 0}


def ranks_on(demand: Mapping[str, float], resources: Mapping[str, float]) -> float:
    """How many ranks fit on a node that is empty; inf for ranks that ask for nothing."""
    # Ray counts in ten-thousandths, so 0.3 of 0.9 is three times and not 2.9999.
    return min(
        (math.floor(resources.get(name, 0.0) / need + 1e-6) for name, need in demand.items()), default=math.inf
    )


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Ray's label selectors: VALUE, !VALUE, in(A, B), !in(A, B)."""
    return all(_matches(wanted, labels.get(name)) for name, wanted in selector.items())


def _matches(wanted: str, found: str | None) -> bool:
    negated, plain = wanted.startswith("!"), wanted.removeprefix("!").strip()
    listed = re.fullmatch(r"in\((.*)\)", plain)
    values = [value.strip() for value in listed[1].split(",")] if listed else [plain]
    return (found in values) is not negated


def never_fits(spec: JobSpec, nodes: Sequence[NodeFacts], groups: Sequence[NodeGroup] = ()) -> list[Problem]:
    """Why the job can never run there, with what there is; [] where it can."""
    demand, selector, least = demand_of(spec), dict(spec.resources.labels), spec.ranks.min
    fitting = [node for node in nodes if matches(selector, node.labels)]
    addable = [group for group in groups if group.labels is None or matches(selector, group.labels)]
    room = sum(ranks_on(demand, node.resources) for node in fitting)
    for group in addable:
        each = ranks_on(demand, group.resources)
        room += each * (group.most if group.most >= 0 else math.inf) if each and group.most else 0
    if room >= least:
        return []
    if selector and not fitting and not addable:
        return [_no_label(spec, nodes)]
    offers = [node.resources for node in fitting] + [group.resources for group in addable]
    short = [name for name, need in demand.items() if not any(offer.get(name, 0.0) >= need for offer in offers)]
    if short:
        return [_too_large(name, demand[name], offers, _there_is(nodes, groups)) for name in short]
    asked = " and ".join(f"{_amount(name, need)}" for name, need in demand.items())
    return [
        Problem(
            "ranks.min",
            least,
            f"at most {room:.0f}: so many ranks of {asked} fit on this cluster when it is empty",
            f"use `--set ranks.min={room:.0f}`, smaller resources, or more nodes"
            if room
            else "use smaller resources, or larger nodes",
            f"this job can never fit; there is: {_there_is(nodes, groups)}",
        )
    ]


def _too_large(name: str, need: float, offers: Sequence[Mapping[str, float]], there_is: str) -> Problem:
    known = {"CPU": "resources.cpus", "GPU": "resources.gpus", "memory": "resources.memory"}
    most = max((offer.get(name, 0.0) for offer in offers), default=0.0)
    allowed = f"at most {_amount(name, most)}, the most that one node has" if most else f"no node has any {name}"
    return Problem(
        known.get(name, f"resources.custom.{name}"),
        int(need) if float(need).is_integer() else need,
        allowed,
        "ask for less, or start nodes that have it (ray start --resources, --num-gpus, …)",
        f"this job can never fit; there is: {there_is}",
    )


def _no_label(spec: JobSpec, nodes: Sequence[NodeFacts]) -> Problem:
    wanted = dict(spec.resources.labels)
    found = {name: sorted({node.labels[name] for node in nodes if name in node.labels}) for name in wanted}
    there = "; ".join(f"{name}: {', '.join(values) or 'on no node'}" for name, values in found.items())
    return Problem(
        "resources.labels",
        wanted,
        f"labels that a node has ({there})",
        "correct the labels, or start nodes with them: ray start --labels",
        "this job can never fit: no node has these labels",
    )


def _there_is(nodes: Sequence[NodeFacts], groups: Sequence[NodeGroup]) -> str:
    alike: dict[str, int] = {}
    for node in nodes:
        text = _offer(node.resources)
        alike[text] = alike.get(text, 0) + 1
    parts = [f"{count} node{'s' * (count > 1)} with {text}" for text, count in alike.items()] or ["no node"]
    for group in groups:
        number = "any number" if group.most < 0 else f"up to {group.most}"
        parts.append(f"the autoscaler may start {number} of {group.name} with {_offer(group.resources)}")
    return ", ".join(parts)


def _offer(resources: Mapping[str, float]) -> str:
    shown = [
        name
        for name in sorted(resources)
        if not name.startswith(("node:", "bundle")) and name != "object_store_memory"
    ]
    return " + ".join(_amount(name, resources[name]) for name in shown) or "nothing"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB memory" if name == "memory" else f"{amount:g} {name}"

"""The facts about a cluster that everstep.platform.cluster.capacity judges a job by. Needs a connection to Ray."""

from __future__ import annotations

import json
import math
from typing import Any

import ray
import ray._private.state
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get

from everstep.platform.cluster.capacity import NodeFacts, NodeGroup, never_fits
from everstep.platform.job.errors import SpecError
from everstep.platform.job.spec import JobSpec


def check_fits(spec: JobSpec) -> None:
    """Raises SpecError where the job can never fit on the cluster that this process is connected to."""
    groups = startable_nodes()
    if groups is None:
        return
    problems = never_fits(spec, living_nodes(), groups)
    if problems:
        raise SpecError(problems)


def living_nodes() -> list[NodeFacts]:
    """What every living node has, used or not."""
    nodes: Any = ray.nodes  # untyped
    return [
        NodeFacts(node["NodeManagerHostname"], dict(node["Resources"]), dict(node.get("Labels") or {}))
        for node in nodes()
        if node["Alive"]
    ]


def startable_nodes() -> list[NodeGroup] | None:
    """What the autoscaler may start; [] where there is none, None where there is one that does not tell.

    Ray starts an autoscaler's monitor on every head; without a provider it only lists the nodes there are, each as a
    kind of its own, called node_ID.
    """
    state: Any = ray._private.state.state  # the state of this process's connection; untyped
    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            NodeGroup(group.name, {name: _amount(a) for name, a in group.resources.items()}, group.max_count)
            for group in config.node_group_configs
        ]
    report: Any = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    kinds = ((json.loads(report) if report else {}).get("autoscaler_report") or {}).get("active_nodes") or {}
    return [] if all(kind.startswith("node_") for kind in kinds) else None


def _amount(told: float) -> float:
    return math.inf if told < 0 else told

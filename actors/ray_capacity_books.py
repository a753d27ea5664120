"""What a Ray cluster has for jobs: what its nodes have, less what others than the jobs use. Implements `Cluster`.

Ray tells what is free of a node, not for whom the rest is; what is ours follows from the names of actors and
placement groups. Its two books are written at different moments, so only use by others that several looks in a row
agree on counts. The thread that calls must be one of a process that is connected to a Ray.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import ray
import ray._private.state
from ray.autoscaler.sdk import request_resources
from ray.core.generated import gcs_pb2
from ray.exceptions import RayError

from everstep.actors.orphans import PREFIX
from everstep.platform.cluster.allocation import Capacity

_state: Any = ray._private.state.state  # untyped, all of it
_books: Any = gcs_pb2
_LOOKS: Final = 3
_STARTING_S: Final = 60.0  # a pending actor may have its resources already, before Ray says on which node
_UNBOUNDED: Final = 10_000  # nodes of a kind, where the autoscaler has no limit

Amounts = dict[str, float]


class RayCapacity:
    """Keeps the last looks."""

    def __init__(self) -> None:
        self._others: deque[dict[str, Amounts]] = deque(maxlen=_LOOKS)
        self._pending: dict[bytes, float] = {}

    def capacity(self, runs: frozenset[str]) -> Capacity:
        try:
            nodes: Any = ray.nodes
            total = {node["NodeID"]: _named(node["Resources"]) for node in nodes() if node["Alive"]}
            ours, starting = self._ours(tuple(f"{PREFIX}{run}/" for run in runs))
            free: dict[str, Amounts] = _state.available_resources_per_node()
            addable = _addable(_state.get_cluster_config())
        except (RayError, RuntimeError) as error:
            raise ConnectionError(str(error)) from error
        self._others.append(others(total, free, ours, starting))
        left = {id: dict(amounts) for id, amounts in total.items()}
        for id, amounts in left.items():
            for name in amounts:
                amounts[name] -= min(look.get(id, {}).get(name, 0.0) for look in self._others)
        return Capacity(left, total, addable)

    def want(self, bundles: Sequence[dict[str, float]]) -> None:
        try:
            request_resources(bundles=list(bundles))
        except (RayError, RuntimeError) as error:
            raise ConnectionError(str(error)) from error

    def _ours(self, prefixes: tuple[str, ...]) -> tuple[dict[str, Amounts], list[Amounts]]:
        """What our actors and placement groups take: by node, and of those that Ray has not placed yet."""
        placed: dict[str, Amounts] = {}
        starting, pending, now = [], {}, time.monotonic()
        for data in _state._connect_and_get_accessor().get_actor_table(None, None):
            actor = _books.ActorTableData.FromString(data)
            if actor.state == _books.ActorTableData.DEAD or not actor.name.startswith(prefixes):
                continue
            if actor.placement_group_id.strip(b"\xff"):
                continue  # it uses what its group has reserved
            node = actor.node_id.hex() or actor.address.node_id.hex()
            if node.strip("f"):
                _add(placed.setdefault(node, {}), actor.required_resources)
                continue
            pending[actor.actor_id] = self._pending.get(actor.actor_id, now)
            if now - pending[actor.actor_id] < _STARTING_S:
                starting.append(dict(actor.required_resources))
        self._pending = pending
        for group in _state.placement_group_table().values():
            if group["state"] != "REMOVED" and group["name"].startswith(prefixes):
                for index, node in group["bundles_to_node_id"].items():
                    _add(placed.setdefault(node, {}), group["bundles"][index])
        return placed, starting


def others(
    total: Mapping[str, Amounts],
    free: Mapping[str, Amounts],
    ours: Mapping[str, Amounts],
    starting: Iterable[Amounts],
) -> dict[str, Amounts]:
    """node -> what others use of it. What `starting` may explain is not counted."""
    found = {}
    for id, amounts in total.items():
        there, mine = free.get(id, {}), ours.get(id, {})
        found[id] = {n: max(0.0, have - there.get(n, 0.0) - mine.get(n, 0.0)) for n, have in amounts.items()}
    for wanted in starting:
        for used in found.values():
            if all(used.get(name, 0.0) >= amount for name, amount in wanted.items()):
                for name, amount in wanted.items():
                    used[name] -= amount
                break
    return found


def _named(resources: Mapping[str, float]) -> Amounts:
    """Without what Ray adds for itself."""
    return {n: float(v) for n, v in resources.items() if not n.startswith("node:") and n != "object_store_memory"}


def _add(amounts: Amounts, more: Mapping[str, float]) -> None:
    for name, amount in more.items():
        amounts[name] = amounts.get(name, 0.0) + amount


def _addable(config: Any) -> tuple[tuple[dict[str, float], int], ...]:
    """The kinds of nodes that the autoscaler may start, if there is one."""
    if config is None:
        return ()
    return tuple(
        (_named(kind.resources), kind.max_count if kind.max_count >= 0 else _UNBOUNDED)
        for kind in config.node_group_configs
        if kind.max_count
    )

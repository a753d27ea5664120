"""What Ray knows of the cluster's nodes, for a run: which there are, which drain, how many slots fit on each.

A thread of its own asks Ray's head once in POLL_S, for the head may be away and then an answer takes long; what was
known stays so.

Owns: its thread. `close` may be called from any thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray._private import state as ray_state

from everstep.actors.host import OnNodes
from everstep.platform.cluster.placement import Node, matches, slots_in

logger = logging.getLogger(__name__)

POLL_S = 0.5  # a drain's notice is 30 s at least; the three answers take 2 ms of the head's time together


class NodeWatch:
    """Calls `on_nodes` with all nodes, at once and whenever they have changed."""

    def __init__(
        self, on_nodes: OnNodes, bundle: Mapping[str, float], labels: Mapping[str, str], poll_s: float = POLL_S
    ) -> None:
        self._on_nodes = on_nodes
        self._bundle = dict(bundle)
        self._labels = dict(labels)
        self._poll_s = poll_s
        self._known: tuple[Node, ...] | None = None
        self._deadlines: dict[str, float] = {}  # once told, a deadline does not shift with the clocks
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="everstep-ray-nodes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Does not wait: the thread may be waiting for a head that is away."""
        self._done.set()

    def _run(self) -> None:
        while True:
            try:
                nodes = self._look()
                if nodes != self._known:
                    self._known = nodes
                    self._on_nodes(nodes)
            except Exception as error:  # whatever Ray raises while its head is away; the next look tells
                logger.warning("Ray does not tell of its nodes: %s", error)
            if self._done.wait(self._poll_s):
                return

    def _look(self) -> tuple[Node, ...]:
        listed: Any = ray.nodes
        private: Any = ray_state
        left = private.available_resources_per_node()
        draining = private.state.get_draining_nodes()
        nodes = []
        for entry in listed():
            id = str(entry["NodeID"])
            total = entry["Resources"] if matches(entry.get("Labels", {}), self._labels) else {}
            capacity = slots_in(total, self._bundle) if total else 0
            room = slots_in(left.get(id, {}), self._bundle) if total else 0
            until = self._deadline(id, draining[id]) if id in draining else None
            nodes.append(Node(id, capacity, room, bool(entry["Alive"]), until))
        return tuple(sorted(nodes, key=lambda node: node.id))

    def _deadline(self, id: str, unix_ms: int) -> float:
        """In monotonic seconds; Ray says 0 where there is none."""
        if id not in self._deadlines:
            at = time.monotonic() + unix_ms / 1000 - time.time() if unix_ms else math.inf
            self._deadlines[id] = at
        return self._deadlines[id]

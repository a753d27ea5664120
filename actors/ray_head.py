"""A cluster's head may be away for a while: whether it answers, and what to keep off its node.

Ray's calls that need the head (to start or look up an actor, placement groups) wait for it, so they do not belong
into a thread that must go on. Everything here may be called from any thread of a process connected to a Ray.
"""

import socket
from collections.abc import Callable
from typing import Any

import ray

_HEAD = "node:__internal_head__"  # a resource that Ray gives to the head's node alone
_CONNECT_S = 2.0
_LOOK_S = 0.2

_context: Any = ray.get_runtime_context  # untyped
_nodes: Any = ray.nodes


def answers() -> bool:
    """True where the head accepts connections, which it does once it has read its stored state."""
    host, _, port = str(_context().gcs_address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError:
        return False
    return True


def wait_for(given_up: Callable[[float], bool]) -> bool:
    """Waits until the head answers; False once `given_up(seconds)`, which waits that long at most, says so."""
    while not answers():
        if given_up(_LOOK_S):
            return False
    return True


def off_head() -> dict[str, str]:
    """Label selector for an actor that is to outlive the head's node; empty where there is no other node.

    A selector and no soft affinity: that falls back to the head's node where the other has just joined.
    """
    living = [node for node in _nodes() if node["Alive"]]
    heads = [node["NodeID"] for node in living if _HEAD in node["Resources"]]
    return {"ray.io/node-id": f"!{heads[0]}"} if heads and len(living) > 1 else {}


def off_this_node() -> dict[str, str]:
    """Label selector for an actor that is to outlive this process's node, as `off_head`; off the head's node, too,
    where there is a third."""
    living = [node for node in _nodes() if node["Alive"]]
    mine = _context().get_node_id()
    others = [node for node in living if node["NodeID"] != mine]
    heads = [node["NodeID"] for node in others if _HEAD in node["Resources"]]
    if not others:
        return {}
    avoided = [mine, *heads] if len(heads) < len(others) else [mine]
    return {"ray.io/node-id": f"!in({','.join(avoided)})"}


def own_address() -> str:
    """The address under which the cluster knows this process's node."""
    mine = _context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in _nodes() if node["NodeID"] == mine)

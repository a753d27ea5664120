"""A Ray cluster of several nodes on this machine, kept by a process of its own: everstep's processes and Ray's do not
share one, and `ray.cluster_utils` wants the main thread. Not a test module.

    python ray_node_cluster.py FOLDER NODES CPUS

It prints a JSON line when the cluster is up, and one for every command that it reads, a line each:
"add", "kill ID", "drain ID SECONDS", "actors ID" (names of living actors of everstep there).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray prints news of nodes to stdout, which is for answers

MEMORY = 80 << 20  # of an object store; Ray's least is 75 MiB


def main(folder: str, nodes: int, cpus: int) -> None:
    import ray
    from ray._private import utils
    from ray.cluster_utils import Cluster
    from ray.util.state import list_actors  # noqa: F401

    utils.write_ray_address = lambda *_, **__: None  # to a file that every Ray of the machine shares
    options: dict[str, Any] = {"object_store_memory": MEMORY, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": f"{folder}/r", **options})
    ray.init(address=cluster.address, log_to_driver=False, namespace="node-cluster")
    known: dict[str, Any] = {}

    def add() -> str:
        node = cluster.add_node(num_cpus=cpus, **options)
        known[node.node_id] = node
        return str(node.node_id)

    def actors(id: str) -> list[str]:
        found = ray._private.state.actors().values()
        return [a["Name"] for a in found if a["State"] == "ALIVE" and a["Address"]["NodeID"] == id]

    say({"address": cluster.address, "nodes": [add() for _ in range(nodes)]})
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                say(add())
            case ["kill", id]:
                at, gone = kill(known.pop(id))
                say({"at": at, "killed": gone})
            case ["drain", id, seconds]:
                client = ray._private.worker.global_worker.gcs_client
                deadline = int((time.time() + float(seconds)) * 1000)
                say(client.drain_node(id, 2, "a spot instance is taken back", deadline)[0])
            case ["actors", id]:
                say(actors(id))
    ray.shutdown()
    cluster.shutdown()


def kill(node: Any) -> tuple[float, list[str]]:
    """Takes a node away at once: its raylet, its workers, and their memory."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    family = [raylet, *raylet.children(recursive=True)]
    raylet.suspend()  # so that it does not start others meanwhile
    family += [child for child in raylet.children(recursive=True) if child not in family]
    names, folders = [], set()
    for process in family:
        with contextlib.suppress(psutil.Error, OSError):
            names.append(process.name())
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                path = line.partition("/dev/shm/everstep-")[2]
                if path and "/slot-" in path and "Manager" in process.name():
                    folders.add("/dev/shm/everstep-" + "/".join(path.split("/")[:2]))
    for path in folders:  # what is mapped stays until its processes are gone, which is now
        shutil.rmtree(path, ignore_errors=True)
    at = time.time()
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    return at, [*names, *sorted(folders)]


def say(what: Any) -> None:
    print(json.dumps(what), file=_ANSWERS, flush=True)


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""What `everstep doctor --address` asks a cluster: each node tells of itself, through a task that Ray runs there.

Two ways in: HOST:PORT of the head (this machine must be in the cluster's network), or the job server's URL, through
which this very look is run on the head as a short Ray job.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
import ray
import ray._private.worker
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from everstep.actors.ray_cluster import connect
from everstep.actors.ray_jobs import JobServer
from everstep.platform.cluster.survey import ClusterFacts, NodeReport

ANSWER_S = 30.0  # for a worker to start on a node that is busy


def survey(address: str) -> ClusterFacts:
    """Looks at the cluster. Raises ConnectionError (nobody there, token, wrong scheme), ValueError."""
    if "://" in address:
        return _through_jobs(address)
    cluster = connect(address)
    try:
        return ClusterFacts(address=address, ray=ray.__version__, nodes=_nodes(), job_server=_job_server())
    finally:
        cluster.close()


def _through_jobs(url: str) -> ClusterFacts:
    server = JobServer(url)
    code, text = server.run(["doctor", "--survey"], {})
    line = next((line for line in reversed(text.splitlines()) if line.startswith("{")), "")
    if not line:
        return ClusterFacts(
            address=url, ray=server.ray_version, job_server=url, problem=f"exit {code}: {text.strip()}"
        )
    facts = msgspec.json.decode(line, type=ClusterFacts)
    return msgspec.structs.replace(facts, address=url, job_server=url)


def _nodes() -> list[NodeReport]:
    by_value: Any = cloudpickle.register_pickle_by_value  # untyped
    by_value(sys.modules[__name__])  # a node may have no everstep, or another one
    task: Any = ray.remote(_look_around)
    nodes: Any = ray.nodes
    living = [node for node in nodes() if node["Alive"]]
    asked = [
        task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], False)
        )
        for n in living
    ]
    answers = [remote.remote() for remote in asked]
    return [_report(node, answer) for node, answer in zip(living, answers, strict=True)]


def _report(node: dict[str, Any], answer: Any) -> NodeReport:
    have = node["Resources"]
    known: dict[str, Any] = {
        "name": f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
        "cpus": have.get("CPU", 0.0),
        "gpus": have.get("GPU", 0.0),
    }
    try:
        return NodeReport(**known, **json.loads(ray.get(answer, timeout=ANSWER_S)))
    except (RayError, GetTimeoutError) as error:
        return NodeReport(**known, problem=str(error).strip().splitlines()[-1])


def _job_server() -> str:
    node: Any = ray._private.worker.global_worker.node
    return f"http://{node.webui_url}" if node is not None and node.webui_url else ""


def _look_around() -> str:
    """Runs on a node; JSON, for the node may have other classes than we."""
    import json
    import os
    import shutil
    import sys
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    try:
        import everstep

        ours = everstep.__version__
    except ImportError:
        ours = ""
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    told = {"everstep": ours, "torch": version("torch"), "shm_free_bytes": shm}
    told["python"] = ".".join(str(part) for part in sys.version_info[:3])
    return json.dumps(told)

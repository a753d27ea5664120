"""What a look at a cluster found, and what to make of it. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from everstep.platform.job.check import gib

SHM_BYTES = 1 << 30


class NodeReport(msgspec.Struct, frozen=True):
    """A living node. "": it has none, or could not be asked (problem)."""

    name: str
    cpus: float = 0.0
    gpus: float = 0.0
    everstep: str = ""
    torch: str = ""
    python: str = ""
    shm_free_bytes: int = 0
    problem: str = ""


class ClusterFacts(msgspec.Struct, frozen=True):
    """job_server: its URL, "" where the cluster has none. problem: why its nodes could not be asked."""

    address: str
    ray: str
    nodes: list[NodeReport] = []
    job_server: str = ""
    problem: str = ""


class Judged(msgspec.Struct, frozen=True):
    name: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def judge(facts: ClusterFacts, version: str, ray: str) -> list[Judged]:
    """version, ray: of everstep and Ray here."""
    found = [Judged("cluster", "ok", f"{facts.address} answers, and takes the token or wants none")]
    if facts.ray == ray:
        found.append(Judged("cluster's ray", "ok", facts.ray))
    else:
        fix = f"pip install 'ray[default]=={facts.ray}' here, or {ray} on the cluster"
        found.append(Judged("cluster's ray", "warn", f"{facts.ray}, here {ray}", fix))
    if facts.problem:
        fix = f"install everstep {version} where the head's python finds it, and put that python first in PATH"
        return [*found, Judged("cluster's everstep", "fail", facts.problem, fix)]
    if facts.job_server:
        found.append(Judged("job server", "ok", f"{facts.job_server}: everstep submit"))
    else:
        fix = "ray start --head --include-dashboard=true, with pip install 'ray[default]'"
        found.append(Judged("job server", "warn", "none, so nothing can be submitted", fix))
    cpus, gpus = sum(node.cpus for node in facts.nodes), sum(node.gpus for node in facts.nodes)
    size = f"{len(facts.nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
    found.append(Judged("nodes", "ok" if cpus else "fail", size, "" if cpus else "ray start --num-cpus=N"))
    return found + [_node(node, version, facts.nodes[0].torch) for node in facts.nodes]


def _node(node: NodeReport, version: str, torch: str) -> Judged:
    name, has = f"node {node.name}", f"{node.cpus:g} CPUs, {node.gpus:g} GPUs, {gib(node.shm_free_bytes)} of /dev/shm"
    if node.problem:
        return Judged(name, "fail", f"does not answer: {node.problem}", "look at it: ray status, ray logs raylet.err")
    if not node.everstep:
        return Judged(name, "fail", f"has no everstep; {has}", f"pip install everstep=={version} there")
    if node.everstep != version:
        fix = f"install one version on both: pip install everstep=={version} there, or =={node.everstep} here"
        return Judged(name, "fail", f"everstep {node.everstep}, here {version}; {has}", fix)
    if node.torch != torch:
        fix = "install one version everywhere: other versions compute other bits, and their ranks are refused"
        return Judged(name, "fail", f"torch {node.torch or '(none)'}, another node {torch or '(none)'}; {has}", fix)
    if node.shm_free_bytes < SHM_BYTES:
        fix = "docker run --shm-size=2g …; Kubernetes: an emptyDir of medium Memory at /dev/shm"
        return Judged(name, "warn", f"everstep {node.everstep}, torch {node.torch}; {has}", fix)
    return Judged(name, "ok", f"everstep {node.everstep}, torch {node.torch}, python {node.python}; {has}")

"""A run on a Ray cluster that others own: started by `ray start`, joined by address, left as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep.actors.client import SupervisorClient, connect
from everstep.platform.job.registry import Registry, RunEntry
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec
from everstep.storage.checkpoint import find_newest
from everstep.storage.stores.opening import folder_at
from integration.harness import Gates, ask, assert_same_bits, job_dict, until
from integration.own_cluster import own_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ACTORS = """
import os, ray
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table
from everstep.actors.ray_cluster import connect
cluster = connect(os.environ["CLUSTER"])
groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
actors = [a for a in list_named_actors(all_namespaces=True) if a["name"] != "everstep/controller"]  # the cluster's
print("LEFT", actors, groups)
cluster.close()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster that this test starts, with a token, and ends by its own processes."""
    with own_cluster(tmp_path_factory.mktemp("cluster"), cpus=8) as address:
        yield address


def _nothing_left(address: str) -> bool:
    environment = {**os.environ, "CLUSTER": address}
    done = subprocess.run([sys.executable, "-c", ACTORS], env=environment, capture_output=True, text=True, timeout=60)
    return "LEFT [] []" in done.stdout


def test_a_cluster_runs_the_job_with_the_same_bits_and_is_left_as_it_was(cluster: str, tmp_path: Path):
    faults = [{"at_step": 6, "rank": 1, "do": "kill"}]
    plain = job_dict(name="on-cluster", ranks={"min": 1, "max": 2, "spares": 1}, faults=faults)
    spec_file, result_file = tmp_path / "job.yaml", tmp_path / "result.json"
    spec_file.write_text(yaml.safe_dump(plain))
    ask("run", str(spec_file), "--address", cluster, "--result", str(result_file))
    result = RunResult.from_json(result_file.read_bytes())
    assert_same_bits(result, JobSpec.load(spec_file))
    assert len(result.recoveries) == 1
    assert _nothing_left(cluster)


def test_a_run_on_a_cluster_outlives_its_driver(cluster: str, tmp_path: Path):
    plain = job_dict(name="orphan", ranks={"min": 1, "max": 2, "spares": 0}, steps=400)
    spec_file = tmp_path / "job.yaml"
    spec_file.write_text(yaml.safe_dump(plain))
    words = [sys.executable, "-m", "everstep", "run", str(spec_file), "--address", cluster]
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    entry = until(lambda: _registered("orphan"), "the supervisor's address", 60)
    client = connect(entry.record.supervisor, entry.token())
    until(lambda: client.status().step > 0, "a step", 60)
    driver.kill()
    driver.wait(10)
    assert client.status().phase != "ended"
    assert until(client.result, "the result", 90).state_sha256
    client.close()


def _registered(name: str) -> RunEntry | None:
    entries = [entry for entry in Registry().runs() if entry.record.job == name]
    return entries[0] if entries and entries[0].record.supervisor else None


def test_driver_supervisor_and_managers_die_one_after_the_other_and_two_at_once(cluster: str, tmp_path: Path):
    gates = Gates(tmp_path / "gates")
    checkpoint = {"to": str(tmp_path / "runs"), "every": 4}
    changes = {"ranks": {"min": 2, "max": 3, "spares": 0}, "steps": 16, "checkpoint": checkpoint}
    plain = job_dict("Gated", args={"gates": str(gates.folder)}, name="leaderless", **changes)
    for step in (3, 7, 11):
        gates.shut(step)
    spec_file = tmp_path / "job.yaml"
    spec_file.write_text(yaml.safe_dump(plain))
    words = [sys.executable, "-m", "everstep", "run", str(spec_file), "--address", cluster]
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = Watched("leaderless")
    until(lambda: run.step() == 3 and run.pid("standby-1"), "step 3, and a standby", 90)
    driver.kill()
    driver.wait(10)
    os.kill(run.pid("supervisor"), signal.SIGKILL)
    gates.open(3)
    until(lambda: run.step() == 7 and run.pid("standby-2"), "step 7 under a successor, and its standby", 90)
    os.kill(run.pid("manager-1.1"), signal.SIGKILL)
    gates.open(7)
    until(lambda: run.step() == 11, "step 11 without a manager", 90)
    until(lambda: run.state("rank-1.2") in ("spare", "in view"), "another rank for the manager's", 90)
    os.kill(run.pid("manager-0.1"), signal.SIGKILL)
    os.kill(run.pid("supervisor"), signal.SIGKILL)
    gates.open(11)
    result = until(run.result, "the result", 90)
    assert_same_bits(result, JobSpec.load(spec_file))
    assert sum("the supervisor" in recovery.cause for recovery in result.recoveries) == 2
    assert all(recovery.steps_lost <= 1 for recovery in result.recoveries)
    assert find_newest(folder_at(str(tmp_path / "runs" / "leaderless" / "leaderless"))).manifest.step == 16
    run.close()
    until(lambda: _nothing_left(cluster), "the actors to be gone", 90)


class Watched:
    """A run that is looked at through its record, whoever leads it now."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _ask(self, what: Callable[[SupervisorClient], Any], otherwise: Any) -> Any:
        entry = _registered(self._name)
        if entry is None:
            return otherwise
        try:
            return what(SupervisorClient(entry.record.supervisor, entry.token()))
        except ConnectionError:
            return otherwise

    def step(self) -> int:
        return self._ask(lambda client: client.status().step, 0)

    def _members(self) -> dict[str, Any]:
        return {m["name"]: m for m in self._ask(lambda client: client.status().members, [])}

    def pid(self, name: str) -> int:
        return self._members().get(name, {}).get("pid") or 0

    def state(self, name: str) -> str:
        return self._members().get(name, {}).get("state", "")

    def result(self) -> RunResult | None:
        return self._ask(lambda client: client.result(), None)

    def close(self) -> None:
        self._ask(lambda client: client.close(), None)

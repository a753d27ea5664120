"""The controller of a real Ray cluster: two jobs that share it, its death, one of it only, what dead runs left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from everstep.actors.client import SupervisorClient, connect
from everstep.actors.controller import Controller
from everstep.actors.controller_state import AnotherController, FolderState
from everstep.platform.cluster.allocation import Capacity
from everstep.platform.job.registry import Registry
from everstep.platform.job.spec import JobSpec
from everstep.storage.stores.opening import folder_at
from integration.harness import Cli, Gates, ask, assert_same_bits, cli, job_dict, until
from integration.own_cluster import own_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CPUS = 4
GHOSTS = """
import os, sys, time, ray
from ray.util import list_named_actors
from ray.util.placement_group import placement_group, placement_group_table
from everstep.actors.ray_cluster import connect
cluster = connect(os.environ["CLUSTER"])
@ray.remote(num_cpus=0, lifetime="detached")
class Ghost:
    def here(self): return True
for name in ("everstep/ghost.run/rank-0.1", "everstep/owned.run/rank-0.1", "everstep/owned.run/supervisor"):
    ray.get(Ghost.options(name=name).remote().here.remote())
for run in ("ghost.run", "owned.run"):
    ray.get(placement_group([{"CPU": 0.01}], name=f"everstep/{run}/slot-0", lifetime="detached").ready())
def names():
    groups = [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    return sorted([*(a["name"] for a in list_named_actors(all_namespaces=True)), *groups])
deadline = time.monotonic() + 40
while any("ghost.run" in name for name in names()) and time.monotonic() < deadline:
    time.sleep(0.2)
print("LEFT", names())
from everstep.actors.ray_supervisor import collect
collect("owned.run")
cluster.close()
"""


@dataclass(frozen=True)
class Shared:
    address: str
    state: Path  # of its controller

    def table(self) -> dict[str, Any]:
        return json.loads(ask("jobs", "--address", self.address, "--json").stdout)

    def row(self, job: str) -> dict[str, Any]:
        return next(row for row in self.table()["jobs"] if row["job"] == job)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("cluster")
    state = folder / "state"
    environment = {"EVERSTEP_CONTROLLER_STATE": str(state), "EVERSTEP_COLLECT_AFTER_S": "4"}
    with own_cluster(folder, CPUS, **environment) as address:
        yield Shared(address, state)


def client_of(job: str) -> SupervisorClient:
    def look() -> SupervisorClient | None:
        entries = [entry for entry in Registry().live_runs() if entry.record.job == job and entry.record.supervisor]
        return connect(entries[0].record.supervisor, entries[0].token()) if entries else None

    found: SupervisorClient = until(look, f"the supervisor of {job}")
    return found


def texts(client: SupervisorClient, kind: str) -> list[str]:
    return [event.text for event in client.events(0) if event.kind == kind]


def gated(folder: Path, name: str, *steps: int, **changes: Any) -> tuple[dict[str, Any], Gates]:
    gates = Gates(folder / f"gates-{name}")
    for step in steps:
        gates.shut(step)
    plain = job_dict("Gated", args={"gates": str(gates.folder)}, name=name, **changes)
    return plain | {"timeouts": {"frozen_s": 10, "stall_s": 150}}, gates


def ready(client: SupervisorClient) -> int:
    """Trainers that are in the view or could be."""
    members = client.status().members
    return sum(member["state"] in ("in view", "spare") for member in members if member["name"].startswith("rank-"))


def finished(run: Cli, spec: dict[str, Any]) -> None:
    assert run.wait() == 0, f"{run.out}\n{run.err}"
    assert_same_bits(run.result(), JobSpec.parse(spec))


def test_a_job_of_higher_priority_takes_ranks_of_a_lower_one_and_gives_them_back(shared: Shared, tmp_path: Path):
    low, gates = gated(tmp_path, "low", 5, 10, steps=16, ranks={"min": 1, "max": 4, "spares": 0})
    high, high_gates = gated(
        tmp_path, "high", 4, steps=8, ranks={"min": 2, "max": 3, "spares": 0}, priority=5, seed=11
    )
    on_cluster = ("--address", shared.address)
    with cli(tmp_path / "one", low, *on_cluster, host="ray") as first:
        lower = client_of("low")
        first.until(lambda: lower.status().step == 5 and lower.status().ranks == 4, "four ranks of the lower job")
        with cli(tmp_path / "two", high, *on_cluster, host="ray") as second:
            higher = client_of("high")
            second.until(lambda: "queued" in higher.status().last_event, "the higher one waits")
            assert higher.status().phase == "starting"
            first.until(lambda: lower.status().ranks_target == 1, "the lower one is to shrink")
            gates.open(5)
            second.until(lambda: higher.status().step == 4, "the higher one trains")
            assert higher.status().ranks == 3
            first.until(lambda: lower.status().step == 10, "the lower one trains beside it")
            assert lower.status().ranks == 1
            rows = {row["job"]: row for row in shared.table()["jobs"]}
            assert {name: (row["state"], row["granted"], row["held"]) for name, row in rows.items()} == {
                "high": ("running", 3, 3),
                "low": ("running", 1, 1),
            }
            high_gates.open(4)
            finished(second, high)
        first.until(lambda: ready(lower) == 4, "the lower one's new ranks")
        gates.open(10)
        finished(first, low)
    scales = [(rescale.from_, rescale.to) for rescale in first.result().rescales]
    assert scales == [(4, 1), (1, 4)]
    assert second.result().ranks_final == 3
    results = {result["job"]: result for result in shared.table()["results"]}
    assert {name: result["ok"] for name, result in results.items()} == {"low": True, "high": True}
    assert results["low"]["state_sha256"] == first.result().state_sha256


def test_a_killed_controller_comes_back_with_its_table_and_the_run_goes_on(shared: Shared, tmp_path: Path):
    spec, gates = gated(tmp_path, "goes-on", 4, 8, steps=12, ranks={"min": 1, "max": 2, "spares": 0}, priority=3)
    with cli(tmp_path, spec, "--address", shared.address, host="ray") as run:
        client = client_of("goes-on")
        run.until(lambda: client.status().step == 4, "step 4")
        before = shared.table()
        os.kill(before["pid"], signal.SIGKILL)
        gates.open(4)
        run.until(lambda: client.status().step == 8, "steps without a controller")
        after = until(lambda: _row_after(shared, before["pid"], "goes-on"), "the run enrolled again", 60)
        assert after == next(row for row in before["jobs"] if row["job"] == "goes-on")
        gates.open(8)
        finished(run, spec)
    assert not run.result().recoveries
    assert [result["job"] for result in shared.table()["results"]].count("goes-on") == 1


def _row_after(shared: Shared, pid: int, job: str) -> dict[str, Any] | None:
    table = shared.table()
    if table["pid"] == pid:
        return None
    return next((row for row in table["jobs"] if row["job"] == job and row["state"] == "running"), None)


def test_a_job_that_can_never_fit_is_refused_at_once_with_what_there_is(shared: Shared, tmp_path: Path):
    spec = job_dict(name="too-big", ranks={"min": 5, "max": 8, "spares": 0})
    with cli(tmp_path, spec, "--address", shared.address, host="ray") as run:
        assert run.wait() == 2
        assert "ranks.min" in run.err
        assert "4" in run.err


class _Nothing:
    def capacity(self, runs: frozenset[str]) -> Capacity:
        return Capacity({})

    def want(self, bundles: object) -> None:
        pass


def test_a_second_controller_on_the_same_url_is_refused_naming_the_first(shared: Shared, tmp_path: Path):
    spec = job_dict(name="short", ranks={"min": 1, "max": 1, "spares": 0}, steps=2)
    with cli(tmp_path, spec, "--address", shared.address, host="ray") as run:
        finished(run, spec)
    first = shared.table()
    with pytest.raises(AnotherController) as error:
        Controller(FolderState(folder_at(shared.state)), _Nothing())
    for part in (first["address"], f"pid {first['pid']}", str(shared.state)):
        assert part in str(error.value)


def test_what_runs_without_an_owner_left_is_collected_and_nothing_else(shared: Shared):
    assert shared.table() is not None, "an earlier test has made the controller"
    environment = {**os.environ, "CLUSTER": shared.address}
    done = subprocess.run(
        [sys.executable, "-c", GHOSTS], env=environment, capture_output=True, text=True, timeout=90, check=True
    )
    left = ["everstep/controller", "everstep/owned.run/rank-0.1", "everstep/owned.run/slot-0"]
    assert f"LEFT {[*left, 'everstep/owned.run/supervisor']}" in done.stdout

"""The head of a Ray cluster is killed with everything on its node while a run goes on, and started again.

Head and worker are two nodes on this machine. The head stores its state with RAY_gcs_storage=rocksdb, so the worker
node and the actors on it are known to the head that comes back (docs/operations.md, "When the head restarts").
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from everstep.actors.client import connect
from everstep.platform.job.registry import Registry, RunEntry
from everstep.platform.job.spec import JobSpec
from integration.harness import Gates, assert_same_bits, command, job_dict, ranks, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODES = """
import os, time, ray
from everstep.actors.ray_cluster import connect
cluster = connect(os.environ["CLUSTER"])
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.1)
cluster.close()
"""


class Cluster:
    """A head without CPUs, and a worker; both in sessions of their own, ended by pid."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Ray's sockets are below its folder and must have short names; pytest's own folder is too deep for them.
        self._short = Path("/tmp") / f"ever-{os.getpid()}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.head: list[psutil.Popen] = []
        self.worker: list[psutil.Popen] = []

    def start_head(self) -> None:
        # Ray's note of a head on this machine; it would take the worker's raylet, which names the same address,
        # for a head that lives. Where nodes are machines there is none.
        (self._short / "head" / "ray_current_cluster").unlink(missing_ok=True)
        port = self.address.rsplit(":", 1)[1]
        words = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        head = self._start("head", *words)
        until(lambda: self.listens() or not head.is_running(), "the head", 60)
        assert head.is_running(), (self._folder / "head.log").read_text()
        self.head = [head]

    def start_worker(self) -> None:
        self.worker = [
            self._start("worker", f"--address={self.address}", "--num-cpus=4", "--node-ip-address=127.0.0.2")
        ]
        environment = {**os.environ, "CLUSTER": self.address}
        subprocess.run([sys.executable, "-c", NODES], env=environment, timeout=60, check=True)

    def _start(self, name: str, *options: str) -> psutil.Popen:
        ray = Path(sys.executable).with_name("ray")
        # A folder of each node's own, as on machines: a head that comes back unpacks a job's folder for the standby
        # anew, and in a common one deletes it under the worker's processes.
        folder = self._short / name
        folder.mkdir(parents=True, exist_ok=True)
        always = [f"--temp-dir={folder}", "--disable-usage-stats", "--object-store-memory=100000000"]
        words = [str(ray), "start", "--block", *options, *always]
        with (self._folder / f"{name}.log").open("a") as log:
            return psutil.Popen(words, stdout=log, stderr=log, start_new_session=True)

    def listens(self) -> bool:
        host, port = self.address.rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            return False
        return True

    def kill(self, node: list[psutil.Popen]) -> None:
        """Every process of a node, at once."""
        family = [*node, *(child for process in node for child in process.children(recursive=True))]
        for process in family:
            process.kill()
        for process in node:
            process.wait(10)
        psutil.wait_procs(family, 10)
        node.clear()

    def close(self) -> None:
        self.kill(self.head)
        self.kill(self.worker)
        subprocess.run(["rm", "-rf", str(self._short)], check=True)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    stored = tmp_path / "gcs"
    stored.mkdir()
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(stored),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # after Ray's 60 s all its processes end
    }.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(tmp_path)
    try:
        cluster.start_head()
        cluster.start_worker()
        yield cluster
    finally:
        cluster.close()


def test_training_goes_on_while_the_head_is_away(cluster: Cluster, tmp_path: Path):
    jobs = tmp_path / "job"  # Ray ships its folder to the actors: not one with Ray's own files in it
    jobs.mkdir()
    gates = Gates(tmp_path / "gates")
    gates.shut(10)
    plain = job_dict(
        "Gated", args={"gates": str(gates.folder)}, name="headless", ranks={**ranks(2, spares=1), "min": 1}, steps=40
    )
    spec_file = jobs / "job.yaml"
    spec_file.write_text(yaml.safe_dump(plain))
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            command("run", str(spec_file), "--address", cluster.address), stdout=log, stderr=log
        )
    try:
        entry = until(lambda: _registered("headless"), "the supervisor's address", 60)
        client = connect(entry.record.supervisor, entry.token())

        def ready() -> list[str]:
            return [event.data["name"] for event in client.events(0) if event.kind == "ready"]

        until(lambda: client.status().step == 10 and len(ready()) == 3, "the gate, and a spare", 60)
        cluster.kill(cluster.head)
        assert not cluster.listens()

        gates.shut(20)
        gates.open(10)
        until(lambda: client.status().step == 20, "steps without a head", 30)

        (lost,) = [member for member in client.status().members if member["rank"] == 1]
        os.kill(lost["pid"], signal.SIGKILL)
        gates.shut(30)
        gates.open(20)
        # With the spare in its place; its successor has to be registered with the head.
        until(lambda: client.status().step == 30, "steps after a loss without a head", 30)
        assert client.status().ranks == 2
        assert len(ready()) == 3

        cluster.start_head()
        until(lambda: len(ready()) == 4, "the replacement, once the head is back", 60)
        gates.open(30)
        result = until(client.result, "the result", 60)
        assert driver.wait(30) == 0, (tmp_path / "driver.log").read_text()
    finally:
        driver.kill()
        driver.wait(10)
    assert_same_bits(result, JobSpec.load(spec_file))
    assert [recovery.ranks for recovery in result.recoveries] == [[1]]


def _registered(name: str) -> RunEntry | None:
    entries = [entry for entry in Registry().runs() if entry.record.job == name]
    return entries[0] if entries and entries[0].record.supervisor else None

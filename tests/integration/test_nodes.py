"""Nodes of a cluster that are killed, that drain and that appear, under a run that ends with the same bits."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from everstep.actors.client import SupervisorClient, connect
from everstep.platform.job.registry import Registry
from everstep.platform.job.result import RunResult
from everstep.platform.job.spec import JobSpec
from integration.harness import Gates, assert_same_bits, command, job_dict, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Nodes:
    """The cluster, in a process of its own (ray_node_cluster.py)."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        words = [
            sys.executable,
            str(Path(__file__).with_name("ray_node_cluster.py")),
            str(folder),
            str(nodes),
            str(cpus),
        ]
        self._log = folder / "cluster.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        said = self._hear()
        self.address: str = said["address"]
        self.ids: list[str] = said["nodes"]

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()
        return json.loads(line)

    def ask(self, words: str) -> Any:
        assert self.process.stdin is not None
        print(words, file=self.process.stdin, flush=True)
        return self._hear()

    def close(self) -> None:
        family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in family:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        until(lambda: not any(psutil.pid_exists(p.pid) for p in family[1:]), "the cluster's end", 20)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short name, for Ray's sockets, and a token in it."""
    folder = Path(tempfile.mkdtemp(prefix="ever-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Run:
    """`everstep run` on the cluster."""

    def __init__(self, folder: Path, address: str, plain: dict[str, Any]) -> None:
        self.spec = JobSpec.parse(plain)
        self._file, self._result = folder / "job.yaml", folder / "result.json"
        self._out = folder / "run.out"
        self._file.write_text(yaml.safe_dump(plain))
        words = command("run", str(self._file), "--address", address, "--result", str(self._result))
        with self._out.open("w") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=out)
        self.until(self._entry, "the supervisor")

    def _entry(self) -> Any:
        found = [entry for entry in Registry().runs() if entry.record.job == self.spec.name]
        return found[0] if found and found[0].record.supervisor else None

    def until(self, look: Any, what: str) -> Any:
        def see() -> Any:
            found = look()
            assert found or self.process.poll() is None, f"it ended before {what}:\n{self._out.read_text()}"
            return found

        return until(see, what)

    @property
    def client(self) -> SupervisorClient:
        """Of whoever leads the run now: its node may be the one that is lost."""

        def look() -> SupervisorClient | None:
            entry = self._entry()
            try:
                return connect(entry.record.supervisor, entry.token())
            except ConnectionError:
                return None

        client: SupervisorClient = until(look, "a supervisor that answers")
        return client

    def at_step(self, step: int) -> None:
        self.until(lambda: self.client.status().step >= step, f"step {step}")

    def in_view(self, count: int) -> bool:
        """So many act, and nothing is on its way."""
        status = self.client.status()
        return status.phase == "training" and status.ranks == count

    def ready(self, besides: list[str] | None = None) -> int:
        """How many trainers are in the view or could be, but for those actors."""
        gone = {name.rpartition("/")[2] for name in besides or []}
        members = self.client.status().members
        return sum(member["state"] in ("in view", "spare") and member["name"] not in gone for member in members)

    def stood_by(self) -> bool:
        return any(member["state"] == "stands by" for member in self.client.status().members)

    def events(self, kind: str) -> list[Any]:
        return [event for event in self.client.events(0) if event.kind == kind]

    def result(self) -> RunResult:
        assert self.process.wait(90) == 0, self._out.read_text()
        result = RunResult.from_json(self._result.read_bytes())
        assert_same_bits(result, self.spec)
        return result

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


def _trainers(actors: list[str]) -> list[str]:
    """Ranks and managers. A supervisor or standby goes with its node: the other one goes on."""
    return [name for name in actors if "/rank-" in name or "/manager-" in name]


def _ranks(names: list[str]) -> int:
    return sum("/rank-" in name for name in names)


def _supervised(names: list[str]) -> bool:
    """The supervisor is on this node: its standby has to go on."""
    return any(name.endswith("/supervisor") for name in names)


def _stood_by(names: list[str]) -> bool:
    return any("/standby-" in name for name in names)


def _plain(gates: Gates, **ranks: int) -> dict[str, Any]:
    return job_dict(
        "Gated",
        args={"gates": str(gates.folder)},
        steps=30,
        ranks={"min": 2, "max": 4, **ranks},
        layout={"zero": 1},
    )


def test_nodes_vanish_drain_and_appear(short: Path, tmp_path: Path) -> None:
    """One run after another thing: a node is killed, one comes, one drains. No step but the one in work is redone."""
    gates = Gates(tmp_path / "gates")
    for step in (4, 12, 20, 28):
        gates.shut(step)
    cluster = Nodes(short, nodes=3, cpus=2)
    try:
        run = Run(tmp_path, cluster.address, _plain(gates, spares=1))
        try:
            run.at_step(4)
            run.until(lambda: run.in_view(4) and run.ready() == 5, "four ranks and a spare")
            run.until(run.stood_by, "a standby")
            used = {id: cluster.ask(f"actors {id}") for id in cluster.ids}
            assert sorted(map(_ranks, used.values())) == [1, 2, 2], used
            assert not any(_supervised(names) and _stood_by(names) for names in used.values()), used

            # A node with two ranks is killed: the others and the spare go on.
            pairs = [id for id, names in used.items() if _ranks(names) == 2]
            victim = max(pairs, key=lambda id: _supervised(used[id]))  # the supervisor's, if it may be
            killed = cluster.ask(f"kill {victim}")
            assert any("/dev/shm" in name for name in killed["killed"]), killed
            gates.open(4)
            run.at_step(12)
            (recovered,) = run.events("recovered")
            print(f"a node's loss to the next step: {recovered.at_s - killed['at']:.2f} s")

            # A node appears: what found no room is started there, and the run is whole again.
            comes = cluster.ask("add")
            run.until(lambda: run.ready() == 5, "as many ranks as before")  # they join at a step's boundary
            assert cluster.ask(f"actors {comes}")
            gates.open(12)
            run.at_step(20)
            assert run.in_view(4)

            # A node drains.
            used = {id: cluster.ask(f"actors {id}") for id in [*cluster.ids, comes] if id != victim}
            goes = max((id for id in used if not _supervised(used[id])), key=lambda id: _ranks(used[id]))
            assert _ranks(used[goes]), used
            assert cluster.ask(f"drain {goes} 60") is True
            noticed = time.time()
            run.until(lambda: run.events("preemption"), "the notice")
            run.until(lambda: run.ready(besides=used[goes]) >= 4, "four ranks that can stay")
            gates.open(20)
            run.until(lambda: not _trainers(cluster.ask(f"actors {goes}")), "the node's end for us")
            print(f"drained in {time.time() - noticed:.2f} s of 60")
            assert run.process.poll() is None
            run.at_step(28)
            assert run.in_view(4)
            gates.open(28)
            result = run.result()
            print(result.recoveries, result.rescales, result.goodput)
            assert len(result.recoveries) == 1
            assert result.recoveries[0].steps_lost <= 1
            assert "preemption" in {rescale.cause for rescale in result.rescales}
        finally:
            run.close()
    finally:
        cluster.close()

"""A real Ray head with its job server and a token, for tests; ended by its own processes. Not a test module."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import requests

from integration.harness import until

# A task that says which Ray job it is in; the words WORD and FACTOR are for the test to fill in.
TASK = """
import ray
import torch

import everstep as es


class Own(es.Task):
    def model(self):
        return torch.nn.Linear(4, 1)

    def dataset(self):
        return [torch.full((4,), float(i)) for i in range(32)]

    def loss(self, model, batch, ctx):
        if ctx.lane == 0:
            print("WORD", ctx.step, ray.get_runtime_context().get_job_id(), flush=True)
        return (model(batch) ** 2).mean() * FACTOR
"""


class Head:
    """`ray start --head`, as a person would with everstep's environment activated."""

    def __init__(self, folder: Path, token: Path, cpus: int = 8) -> None:
        self.folder, self.token = folder, token
        self.port, self.dashboard = _free_port(), _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://127.0.0.1:{self.dashboard}"
        # Ray's sockets are below its folder and must have short names; pytest's own folder is too deep for them.
        self.short = Path(f"/tmp/ever-{os.getpid()}-{self.port}")
        self._started = [
            self._start(
                "head",
                f"--head --port={self.port} --num-cpus={cpus} --include-dashboard=true --dashboard-host=127.0.0.1"
                f" --dashboard-port={self.dashboard} --temp-dir={self.short} --disable-usage-stats"
                f" --dashboard-agent-listen-port={_free_port()}",  # the default is one for all heads of a machine
            )
        ]
        until(self._answers, "the head's job server", 60)

    def add_node(self, resource: str, python_path: Path) -> None:
        """A further node, whose processes find their modules in `python_path` first."""
        path = f"{python_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        words = f'--address={self.address} --num-cpus=1 --resources={{"{resource}":8}} --disable-usage-stats'
        self._started.append(self._start(resource, words, PYTHONPATH=path))

    def kill(self) -> None:
        """Every process of the cluster, at once."""
        family = []
        for process in self._started:
            try:
                family += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        for started in self._started:
            started.wait(10)
        until(lambda: not any(_lives(process) for process in family), "the cluster's end", 20)
        shutil.rmtree(self.short, ignore_errors=True)

    def replace(self) -> None:
        """Another cluster in place of this one, which is killed as a whole."""
        self.kill()
        self.__init__(self.folder, self.token)  # type: ignore[misc]

    def _start(self, name: str, words: str, **environment: str) -> subprocess.Popen[bytes]:
        ray = Path(sys.executable).with_name("ray")
        path = f"{ray.parent}{os.pathsep}{os.environ['PATH']}"
        with (self.folder / f"{name}-{self.port}.log").open("w") as log:
            return subprocess.Popen(
                [str(ray), "start", "--block", "--node-ip-address=127.0.0.1", *words.split()],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PATH": path, **environment},
            )

    def _answers(self) -> bool:
        assert self._started[0].poll() is None, (self.folder / f"head-{self.port}.log").read_text()
        headers = {"Authorization": f"Bearer {self.token.read_text()}"}
        try:
            return requests.get(f"{self.url}/api/version", headers=headers, timeout=2).ok
        except requests.RequestException:
            time.sleep(0.1)
            return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port

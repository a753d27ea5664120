"""torchft as a peer: each rank a replica group of its own, a lighthouse, and this process to restart who was killed.

Ends everything that it starts. One thread.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from parts.live_run import BenchmarkFailed, end_of

_SCRIPT = Path(__file__).resolve().parent / "torchft_replica.py"
_LIGHTHOUSE_S = 20.0


def missing_torchft() -> str:
    """Why it cannot be measured; "" if it can."""
    return "" if importlib.util.find_spec("torchft") else "not installed: pip install -e '.[bench]'"


class Replicas:
    """Implements `parts.strikes.Peer`."""

    def __init__(self, spec_path: Path, overrides: Sequence[str], ranks: int, folder: Path) -> None:
        self.folder = folder
        self._words = [str(spec_path), str(folder), *(f"--set={value}" for value in overrides)]
        self._address = ""
        self._lighthouse = self._start("lighthouse", ["--lighthouse"])
        address = folder / "lighthouse"
        deadline = time.monotonic() + _LIGHTHOUSE_S
        while not (address.exists() and address.read_text()):
            if self._lighthouse.poll() is not None or time.monotonic() > deadline:
                self._lighthouse.kill()
                raise BenchmarkFailed(f"torchft's lighthouse does not start: {end_of(folder / 'lighthouse.log')}")
            time.sleep(0.05)
        self._address = address.read_text()
        self._processes = [self._replica(number) for number in range(ranks)]

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.poll() is None]

    def mend(self) -> None:
        """What torchrun does for a torchft job: starts a new process for one that ended. A frozen one is ended."""
        for number, process in enumerate(self._processes):
            with suppress(OSError):
                if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    process.kill()
                    process.wait()
            if process.poll() is not None:
                self._processes[number] = self._replica(number)

    def dead(self) -> str:
        if any(process.poll() is None for process in self._processes):
            return ""
        return f"all replicas ended: {end_of(self.folder / 'replica-0.log')}"

    def close(self) -> None:
        for process in [*self._processes, self._lighthouse]:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()

    def _replica(self, number: int) -> "subprocess.Popen[bytes]":
        return self._start(f"replica-{number}", ["--replica", str(number)])

    def _start(self, name: str, words: list[str]) -> "subprocess.Popen[bytes]":
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "EVERSTEP_STATE": str(self.folder),
            "TORCHFT_LIGHTHOUSE": self._address,
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(_SCRIPT), *self._words, *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )  # fmt: skip


@contextmanager
def torchft(spec_path: Path, overrides: Sequence[str], ranks: int, folder: Path) -> Iterator[Replicas]:
    replicas = Replicas(spec_path, overrides, ranks, folder)
    try:
        yield replicas
    finally:
        replicas.close()

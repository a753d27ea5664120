"""Peers that restart all ranks after a loss and train by ddp.py: torchrun, and Ray Train v2. One thread.

Ends everything that it starts.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from parts.live_run import end_of

_HERE = Path(__file__).resolve().parent
_MAX_RESTARTS = 20


class Restarted:
    """Implements `parts.strikes.Peer` for one launcher process and the ranks that register as pid-LIFE-RANK."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.folder = folder
        self._process = process
        self._log = log

    def pids(self) -> list[int]:
        newest: dict[int, tuple[int, int]] = {}  # rank -> (life, pid)
        for file in self.folder.glob("pid-*-*"):
            life, rank = map(int, file.name.split("-")[1:])
            text = file.read_text()
            if text and (rank not in newest or life > newest[rank][0]):
                newest[rank] = (life, int(text))
        return [pid for _, (_, pid) in sorted(newest.items()) if Path(f"/proc/{pid}").exists()]

    def mend(self) -> None:
        """They restart all ranks themselves."""

    def dead(self) -> str:
        if self._process.poll() is None:
            return ""
        return f"it gave up (exit {self._process.returncode}): {end_of(self._log)}"


@contextmanager
def torchrun(spec_path: Path, overrides: Sequence[str], ranks: int, folder: Path) -> Iterator[Restarted]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={_MAX_RESTARTS}", str(_HERE / "ddp.py"), str(spec_path), str(folder)]
    command += [f"--set={value}" for value in overrides]
    # With torch 2.13's shared store, restarted ranks find the addresses of the dead ones in it and give up.
    with _launched(command, folder, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) as peer:
        yield peer


@contextmanager
def ray_train(spec_path: Path, overrides: Sequence[str], ranks: int, folder: Path) -> Iterator[Restarted]:
    command = [sys.executable, str(_HERE / "ray_train.py"), str(spec_path), str(folder), str(ranks)]
    command += [f"--set={value}" for value in overrides]
    with _launched(command, folder, {"RAY_TRAIN_V2_ENABLED": "1"}) as peer:
        yield peer


def missing_for_ray_train() -> str:
    """Why Ray Train cannot be measured; "" if it can."""
    lacking = [name for name in ("pandas", "pyarrow", "requests") if importlib.util.find_spec(name) is None]
    return f"not installed ({', '.join(lacking)}): pip install -e '.[bench]'" if lacking else ""


@contextmanager
def _launched(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[Restarted]:
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "EVERSTEP_STATE": str(folder), **environment}
    log = folder / "launcher.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=everything)
    peer = Restarted(folder, process, log)
    try:
        yield peer
    finally:
        frozen = peer.pids()
        process.terminate()  # it ends its ranks; those of a killed torchrun end by their death signal
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in frozen:  # a frozen one hears no SIGTERM
            _kill(pid, folder)


def _kill(pid: int, folder: Path) -> None:
    """If it is still the process that we know: it has our folder in its environment."""
    try:
        if f"EVERSTEP_STATE={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(pid, 9)
    except OSError:
        return

"""torchrun as a peer: ddp.py under torch.distributed.run, killed once from outside.

Ends everything that it starts. One thread.
"""

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parts.live_run import BenchmarkFailed, end_of

_SCRIPT = Path(__file__).resolve().parent / "ddp.py"
_LIMIT_S = 70.0


@contextmanager
def torchrun(
    spec_path: Path, overrides: Sequence[str], ranks: int, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=3", str(_SCRIPT), str(spec_path), str(folder)]
    command += [f"--set={value}" for value in overrides]
    # With torch 2.13's shared store, restarted ranks find the addresses of the dead ones in it and give up.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "EVERSTEP_STATE": str(folder),
    }
    with (folder / "torchrun.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.terminate()  # torchrun ends its workers; those of a killed torchrun end by their death signal
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure_peer(spec_path: Path, overrides: Sequence[str], ranks: int, seed: int, folder: Path) -> dict[str, Any]:
    chance = random.Random(seed)
    progress, log = folder / "progress.jsonl", folder / "torchrun.log"
    deadline = time.monotonic() + _LIMIT_S

    def lines(restart: int, count: int) -> list[dict[str, Any]]:
        while True:
            text = progress.read_text() if progress.exists() else ""
            found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            if len([line for line in found if line["restart"] >= restart]) >= count:
                return found
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkFailed(f"torchrun did not get there in {_LIMIT_S:g} s: {end_of(log)}")
            time.sleep(0.01)

    with torchrun(spec_path, overrides, ranks, folder) as process:
        first = lines(0, 10)[2:]
        step_s = statistics.median(b["at_s"] - a["at_s"] for a, b in itertools.pairwise(first))
        pid = int((folder / f"pid-0-{chance.randrange(ranks)}").read_text())
        time.sleep(chance.uniform(0, step_s))
        struck_s = time.time()
        os.kill(pid, signal.SIGKILL)
        after = lines(1, 1)
    before = [line for line in after if line["restart"] == 0]
    resumed = next(line for line in after if line["restart"] >= 1)
    return {
        "what": f"torchrun, {ranks} ranks, DDP over gloo, torch.save after every step, all ranks restarted",
        "ordinary_step_s": step_s,
        "resumed_s": resumed["at_s"] - struck_s,
        "steps_lost": max(0, before[-1]["step"] - (resumed["step"] - 1)),
    }

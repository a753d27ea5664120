"""DeepSpeed's converters as peers of our import: one ZeRO-2 checkpoint, written by DeepSpeed itself on two ranks.

Each side runs in a process of its own and times its conversion without its imports. `ds_to_universal` does what our
import does (weights and all optimizer state), `zero_to_fp32` weights only; what they write is flushed by nobody, ours
is. Bytes are those of weights and optimizer state that a side reads.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_LIMIT_S = 600.0
_MAKE = """
import sys, torch, deepspeed
out, numel = sys.argv[1], int(sys.argv[2])
deepspeed.init_distributed("gloo")
width = 1024
model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(max(1, numel // width**2))])
config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
          "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 2}}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for _ in range(2):
    engine.backward(engine(torch.randn(1, width)).square().mean())
    engine.step()
engine.save_checkpoint(out)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
_TO_FP32 = """
import sys, time
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2], max_shard_size=None)
print("SECONDS", time.perf_counter() - start)
"""
_TO_UNIVERSAL = """
import pathlib, sys, time
source = pathlib.Path(sys.argv[1])
source = source / (source / "latest").read_text().strip()
sys.argv = ["ds_to_universal", "--input_folder", str(source), "--output_folder", sys.argv[2],
            "--inject_missing_state", "--no_strict", "--num_extract_workers", "2", "--num_merge_workers", "2"]
from deepspeed.checkpoint import ds_to_universal
arguments = ds_to_universal.parse_arguments()
start = time.perf_counter()
ds_to_universal.main(arguments)
print("SECONDS", time.perf_counter() - start)
"""
_OURS = """
import sys, time
from everstep.storage.formats.convert import import_checkpoint
start = time.perf_counter()
import_checkpoint("deepspeed", sys.argv[1], sys.argv[2])
print("SECONDS", time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Converted:
    """Medians, in seconds; `nbytes`: of weights and optimizer state, of which `zero_to_fp32` reads a third."""

    zero: int
    ranks: int
    nbytes: int
    seconds: dict[str, float]


def measure_deepspeed(python: Path, folder: Path, nbytes: int = 500_000_000, rounds: int = 3) -> Converted:
    """`python` has DeepSpeed. Raises RuntimeError with the end of what a process said."""
    source = folder / "zero2"
    _make(python, source, nbytes // 12)
    total = sum(file.stat().st_size for file in source.glob("*/*_optim_states.pt"))
    sides = {
        "everstep import": (Path(sys.executable), _OURS),
        "ds_to_universal": (python, _TO_UNIVERSAL),
        "zero_to_fp32 (weights only)": (python, _TO_FP32),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (interpreter, code) in sides.items():
            target = folder / "converted"
            os.sync()
            seconds[name].append(_run(interpreter, code, str(source), str(target / "job" / "run")))
            shutil.rmtree(target)
    return Converted(2, 2, total, {name: statistics.median(times) for name, times in seconds.items()})


def _make(python: Path, out: Path, numel: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [str(python), "-c", _MAKE, str(out), str(numel)]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in processes:
            said = process.communicate(timeout=_LIMIT_S)[1]
            if process.returncode:
                raise RuntimeError(f"DeepSpeed could not make a checkpoint: {said[-2000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _run(python: Path, code: str, *arguments: str) -> float:
    done = subprocess.run(
        [str(python), "-c", code, *arguments], capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    told = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    if done.returncode or not told:
        raise RuntimeError(f"a converter failed: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    return float(told[0])

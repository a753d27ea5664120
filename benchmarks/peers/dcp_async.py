"""torch.distributed.checkpoint.async_save as a peer: a plain loop of two ranks over Gloo, saved every k steps.

Run as a script it is one rank; `measure_dcp` starts them and ends them. Files go to a folder in memory, the quickest
place there is for it, and each is removed when the steps that belong to its save are done.
"""

import argparse
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_LIMIT_S = 400.0
_QUIET_STEPS = 5


@dataclass(frozen=True)
class Shape:
    """What a rank trains: as parts/big_mlp.py, `lanes` batches a step of its own. `nbytes`: its state."""

    layers: int
    width: int
    batch: int
    lanes: int
    nbytes: int


def measure_dcp(ranks: int, shape: Shape, every: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Medians over the ranks' steps, in seconds. Raises RuntimeError with the end of a rank's log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(__file__).resolve()), "--every", str(every), "--seconds", str(seconds)]
    command += ["--folder", str(folder), "--ranks", str(ranks), "--shape", json.dumps(asdict(shape))]
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, path in enumerate(logs):
            with path.open("wb") as log:
                full = [*command, "--rank", str(rank)]
                processes.append(
                    subprocess.Popen(full, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)
                )
        deadline = time.monotonic() + _LIMIT_S + seconds
        for process, path in zip(processes, logs, strict=True):
            if process.wait(max(1.0, deadline - time.monotonic())) != 0:
                raise RuntimeError(path.read_text(errors="replace")[-2000:])
    except subprocess.TimeoutExpired as error:
        log_end = logs[0].read_text(errors="replace")[-2000:]
        raise RuntimeError(f"no end after {error.timeout:.0f} s: {log_end}") from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One rank of a loop that torch.distributed.checkpoint saves.")
    for name in ("rank", "ranks", "every"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    args = parser.parse_args(arguments)
    train(args.rank, args.ranks, args.every, args.seconds, args.folder, Shape(**args.shape))


def train(rank: int, ranks: int, every: int, seconds: float, folder: Path, shape: Shape) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint import async_save

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from parts.big_mlp import objective, stack

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    savers = dist.new_group(backend="gloo")  # its thread's collectives must not meet the loop's
    model = stack(shape.layers, shape.width)
    numel = shape.nbytes // 4 // 24
    state = {f"rank-{rank}.{i}": torch.rand(numel) for i in range(24)}
    gradient = torch.rand(numel)
    agree = torch.zeros(1)

    def step() -> float:
        began = time.perf_counter()
        for _ in range(shape.lanes):
            objective(model, torch.randn(shape.batch, shape.width)).backward()
            model.zero_grad(set_to_none=True)
        for i in range(0, 24, 3):  # AdamW, on as much state as a rank owns
            master, first, second = (state[f"rank-{rank}.{j}"] for j in (i, i + 1, i + 2))
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            master.addcdiv_(first, second.sqrt().add_(1e-8), value=-1e-3)
        dist.all_reduce(agree)  # ranks go in step, as ours do
        return time.perf_counter() - began

    quiet = [step() for _ in range(_QUIET_STEPS + 1)][1:]
    blocking: list[float] = []
    beside: list[float] = []
    whole: list[float] = []
    lasts: list[float] = []
    ended = time.perf_counter() + seconds
    for number in itertools.count():
        agree.fill_(float(time.perf_counter() < ended))
        dist.all_reduce(agree)
        if agree.item() < ranks:
            break
        began = time.perf_counter()
        saving = async_save(dict(state), checkpoint_id=folder / f"save-{number}", process_group=savers)
        blocking.append(time.perf_counter() - began)
        done_at: list[float] = []
        saving.add_done_callback(lambda _, to=done_at: to.append(time.perf_counter()))
        for _ in range(every):
            busy = not saving.done()
            spent = step()
            (beside if busy else quiet).append(spent)
        whole.append((time.perf_counter() - began) / every)
        saving.result()
        lasts.append(done_at[0] - began)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / f"save-{number}")
    median = {
        "saves": len(blocking),
        "every": every,
        "blocking_s": statistics.median(blocking[1:] or blocking),
        "save_s": statistics.median(lasts[1:] or lasts),
        "quiet_step_s": statistics.median(quiet),
        "beside_step_s": statistics.median(beside) if beside else None,
        "mean_step_s": statistics.mean(whole),
    }
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(median))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

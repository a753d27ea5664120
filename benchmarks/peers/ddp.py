"""The peer's training of recovery.py: the same model, data and optimizer in plain DDP, for others to restart.

Each rank computes its share of the global batch in one forward; rank 0 writes a checkpoint after every step
(torch.save, then rename) and a line of progress. Started by torchrun as a script, or called by Ray Train's workers
(ray_train.py); runs until it is ended.
"""

import argparse
import ctypes
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from everstep.platform.job.spec import JobSpec
from everstep.platform.training.task import LaneContext, Loss, TaskContext
from everstep.platform.training.task_loader import load_task

_PR_SET_PDEATHSIG = 1


def train(spec_path: Path, overrides: Sequence[str], folder: Path, rank: int, ranks: int) -> None:
    """Trains without end; the process group of torch.distributed exists."""
    life = len(list(folder.glob(f"pid-*-{rank}")))
    (folder / f"pid-{life}-{rank}").write_text(str(os.getpid()))
    spec = JobSpec.load(spec_path, overrides)
    torch.set_num_threads(spec.resources.threads)
    task = load_task(spec.task, spec_path.resolve().parent, spec.args, TaskContext.of(spec))
    torch.manual_seed(spec.seed)
    model = DistributedDataParallel(task.model())
    found = task.optimizer(model.parameters())
    optimizers = found if isinstance(found, list) else [found]
    step = 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step = saved["step"]
    lanes = range(rank * spec.lanes // ranks, (rank + 1) * spec.lanes // ranks)
    with (folder / f"progress-{rank}.jsonl").open("a") as progress:
        while True:
            batch = task.collate([task.data[i] for lane in lanes for i in task.sample(step, lane)])
            context = LaneContext.keyed(spec.seed, step, lanes[0])
            loss = Loss.of(task.loss(model, batch, context), len(lanes) * spec.lane_batch)
            (loss.sum / loss.weight).backward()  # type: ignore[no-untyped-call]
            if spec.train.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if rank == 0:
                states = [optimizer.state_dict() for optimizer in optimizers]
                written = checkpoint.with_suffix(".new")
                torch.save({"model": model.module.state_dict(), "optimizers": states, "step": step}, written)
                written.replace(checkpoint)
                line = {"step": step, "life": life, "ranks": ranks, "at_s": time.time()}
                progress.write(json.dumps(line) + "\n")
                progress.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("folder", type=Path, help="checkpoint, progress and pids go there")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    # torchrun gives its workers sessions of their own: without this a killed torchrun would leave them.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.distributed.init_process_group("gloo")
    train(options.spec, options.overrides, options.folder, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


if __name__ == "__main__":
    main()

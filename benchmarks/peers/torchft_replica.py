"""One replica of the torchft peer, or its lighthouse. The same model, data and optimizer; torchft averages gradients.

A script: SPEC FOLDER (--replica N | --lighthouse). Every replica writes its progress. Runs until it is ended.
The lighthouse has the values of torchft's README (tick 100 ms, join timeout 10 s) and its heartbeat default of 5 s.
"""

import argparse
import ctypes
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_OPERATION_S = 10.0  # torchft's own default is 60: a survivor waits that long for a frozen peer


def lighthouse(folder: Path) -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=10_000, quorum_tick_ms=100)
    # The address names the host, which need not resolve: everybody is here.
    port = server.address().rsplit(":", 1)[1]
    (folder / "lighthouse").write_text(f"http://localhost:{port}")
    signal.pause()


def replica(options: argparse.Namespace) -> None:
    import torch
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
    from torch.distributed import TCPStore
    from torchft import Manager, Optimizer, ProcessGroupGloo

    from everstep.platform.job.spec import JobSpec
    from everstep.platform.training.task import LaneContext, Loss, TaskContext
    from everstep.platform.training.task_loader import load_task

    spec = JobSpec.load(options.spec, options.overrides)
    torch.set_num_threads(spec.resources.threads)
    task = load_task(spec.task, options.spec.resolve().parent, spec.args, TaskContext.of(spec))
    torch.manual_seed(spec.seed)
    model = task.model()
    inner = task.optimizer(model.parameters())
    assert not isinstance(inner, list), "torchft wraps one optimizer"
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=_OPERATION_S)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        timeout=timedelta(seconds=_OPERATION_S),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        hostname="localhost",
        replica_id=f"replica-{options.replica}",
    )
    optimizer = Optimizer(manager, inner)
    with (options.folder / f"progress-{options.replica}.jsonl").open("a") as progress:
        while True:
            step = manager.current_step()
            optimizer.zero_grad()  # and asks for the quorum
            rank, ranks = manager.participating_rank() or 0, max(1, manager.num_participants())
            lanes = range(rank * spec.lanes // ranks, (rank + 1) * spec.lanes // ranks)
            batch = task.collate([task.data[i] for lane in lanes for i in task.sample(step, lane)])
            loss = Loss.of(
                task.loss(model, batch, LaneContext.keyed(spec.seed, step, lanes[0])), len(lanes) * spec.lane_batch
            )
            (loss.sum / loss.weight).backward()
            # One bucket, as a DDP of this size would have. Not by torchft's own DDP: in 0.2 its hook ends the
            # survivors of a killed replica with an AssertionError.
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            flat = _flatten_dense_tensors(grads)
            manager.allreduce(flat).wait()
            for grad, summed in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
                grad.copy_(summed)
            if spec.train.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.clip_norm)
            optimizer.step()
            if manager.current_step() > step:  # it was committed
                line = {
                    "step": manager.current_step(),
                    "life": manager._quorum_id,
                    "ranks": manager.num_participants(),
                    "at_s": time.time(),
                }
                progress.write(json.dumps(line) + "\n")
                progress.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--replica", type=int, default=0)
    parser.add_argument("--lighthouse", action="store_true")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        return  # its parent went before it asked to go with it
    if options.lighthouse:
        lighthouse(options.folder)
    else:
        replica(options)


if __name__ == "__main__":
    main()

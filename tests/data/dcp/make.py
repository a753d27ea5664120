"""Writes the DCP checkpoint beside it with stock torch: the task of examples/tiny.yaml, three steps under FSDP2.

    python tests/data/dcp/make.py       two gloo processes on this machine's CPU

checkpoint/           what torch.distributed.checkpoint.save wrote from the two ranks
truth.safetensors     every tensor gathered with full_tensor(): NAME for parameters, NAME|KIND for AdamW's states
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from everstep.platform.training.task import TaskContext, TrainSettings, adamw

HERE = Path(__file__).resolve().parent
RANKS, STEPS = 2, 3
SETTINGS = {"lr": 3.0e-3, "weight_decay": 0.01}  # of examples/tiny.yaml, as is what follows
CONTEXT = TaskContext(
    seed=0, steps=40, lanes=8, lane_batch=8, train=TrainSettings(optimizer=SETTINGS, warmup=4, clip_norm=1.0)
)


def work(rank: int, store: str, folder: Path) -> None:
    sys.path.insert(0, str(HERE.parents[2] / "examples"))
    from tiny import Mlp

    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    task = Mlp(context=CONTEXT)
    torch.manual_seed(CONTEXT.seed)
    model = task.model()
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = adamw(model.parameters(), SETTINGS)
    for step in range(STEPS):
        lanes = [task.sample(step, lane) for lane in range(CONTEXT.lanes)]
        samples = [task.data[i] for lane in lanes[rank::RANKS] for i in lane]
        loss = torch.nn.functional.cross_entropy(
            model(torch.stack([x for x, _ in samples])), torch.stack([y for _, y in samples])
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] * task.schedule(step)
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id="checkpoint")  # relative: the metadata keeps it
    named = {name: _full(tensor) for name, tensor in state["model"].items()}
    for name, kinds in state["optim"]["state"].items():
        named |= {f"{name}|{kind}": _full(tensor) for kind, tensor in kinds.items()}
    if rank == 0:
        save_file(named, folder / "truth.safetensors")
        (folder / "truth.safetensors").chmod(0o644)
    dist.barrier()
    os._exit(0)  # gloo's threads abort the process now and then when it is taken down in order


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()


def main() -> None:
    shutil.rmtree(HERE / "checkpoint", ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        torch.multiprocessing.spawn(work, (os.path.join(temporary, "store"), HERE), nprocs=RANKS)


if __name__ == "__main__":
    main()

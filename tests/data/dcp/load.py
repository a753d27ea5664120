"""Loads a DCP folder with stock torch, as a test's other side: under FSDP2 on some gloo processes.

    python load.py RANKS FOLDER OUT.safetensors [FOLDER OUT.safetensors]...

OUT gets every tensor gathered, named as in truth.safetensors. Where the folder has the optimizer's settings they are
loaded too (a learning rate of 0.25 is expected); else those of the optimizer (0.5) stay.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Linear, Sequential


def work(rank: int, store: str, ranks: int, pairs: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for folder, out in zip(pairs[::2], pairs[1::2], strict=True):
        load(rank, folder, out)
    dist.barrier()
    os._exit(0)  # gloo's threads abort the process now and then when it is taken down in order


def load(rank: int, folder: str, out: str) -> None:
    keys = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    partial = not any("param_groups" in key for key in keys)
    torch.manual_seed(99)  # what is loaded must not be there before
    layers = Linear(24, 48), torch.nn.GELU(), torch.nn.Dropout(), Linear(48, 48), torch.nn.GELU(), torch.nn.Dropout()
    model = Sequential(*layers, Linear(48, 6))
    for layer in model:
        if isinstance(layer, Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partial))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    assert optimizer.param_groups[0]["lr"] == (0.5 if partial else 0.25)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    named = {name: full(tensor) for name, tensor in state["model"].items()}
    for name, kinds in state["optim"]["state"].items():
        named |= {f"{name}|{kind}": full(tensor) for kind, tensor in kinds.items()}
    if rank == 0:
        save_file(named, out)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()


if __name__ == "__main__":
    ranks = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        args = (os.path.join(temporary, "store"), ranks, sys.argv[2:])
        torch.multiprocessing.spawn(work, args, nprocs=ranks)

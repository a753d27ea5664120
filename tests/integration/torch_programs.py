"""Small programs of torch.distributed, in the shape of its tutorials: the backend's name is an argument.

Each is called on every rank with the process group initialised, and returns what is to be compared.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

STEPS = 5

# Their names before torch 2.13.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 4))


def _train(model: nn.Module, share: int, steps: int = STEPS) -> list[float]:
    """`share`: which part of the data this rank sees. Losses are means over all ranks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.Generator().manual_seed(100 + share)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 12, generator=data)
        loss = (model(x) - x[:, :4].cos()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def ddp() -> list[float]:
    # Small buckets, so that several all-reduces are under way during backward.
    model = DistributedDataParallel(_model(), bucket_cap_mb=0.005)
    return _train(model, dist.get_rank())


def fsdp2() -> list[float]:
    model = _model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _train(model, dist.get_rank())


def mesh_2d() -> list[float]:
    """FSDP over one axis, tensor parallelism over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = _model()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return _train(model, mesh.get_local_rank("data"))


def dtensor() -> list[float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(5)
    a, b = torch.randn(8, 12), torch.randn(12, 8)
    product = distribute_tensor(a, mesh, [Shard(0)]) @ distribute_tensor(b, mesh, [Replicate()])
    columns = product.redistribute(mesh, [Shard(1)])  # an all-to-all
    total = DTensor.from_local(torch.ones(2, 2) * dist.get_rank(), mesh, run_check=False).to_local().sum()
    contracted = distribute_tensor(a, mesh, [Shard(1)]) @ distribute_tensor(b, mesh, [Shard(0)])  # partial sums
    return [
        *columns.full_tensor().flatten()[:4].tolist(),
        contracted.full_tensor().sum().item(),
        total.item(),
    ]


def point_to_point() -> list[float]:
    rank, n = dist.get_rank(), dist.get_world_size()
    token = torch.zeros(3)
    if rank == 0:
        dist.send(token + 1, 1)
        dist.recv(token, n - 1)
    else:
        dist.recv(token, rank - 1)
        dist.send(token + 1, (rank + 1) % n)
    right, left = (rank + 1) % n, (rank - 1) % n
    mine, theirs = torch.full((2,), float(rank)), torch.empty(2)
    for request in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, right, tag=7), dist.P2POp(dist.irecv, theirs, left, tag=7)]
    ):
        request.wait()
    return [*token.tolist(), *theirs.tolist()]


def every_call() -> list[float]:
    """Each operation once, of tensors contiguous and not; all that comes out in one row."""
    rank, n = dist.get_rank(), dist.get_world_size()
    out: list[torch.Tensor] = []
    grid = torch.arange(24.0).view(4, 6) + rank

    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
        out.append(x := grid.clone())
        dist.all_reduce(x, op=op)
    out.append(x := grid.clone().t())  # not contiguous
    dist.all_reduce(x.contiguous())
    out.append(x := grid.clone())
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    out.append(x := grid.clone())
    dist.broadcast(x, src=n - 1)
    x = grid.clone()
    dist.reduce(x, dst=1)
    if rank == 1:
        out.append(x)
    parts = [torch.empty(4, 6) for _ in range(n)]
    dist.all_gather(parts, grid)
    out += parts
    out.append(x := torch.empty(4 * n, 6))
    _all_gather_single(x, grid)
    out.append(x := torch.empty(2, 6))
    dist.reduce_scatter(x, [grid[:2] * (r + 1) for r in range(n)])
    out.append(x := torch.empty(4, 6))
    _reduce_scatter_single(x, torch.cat([grid * (r + 1) for r in range(n)]))
    out.append(x := torch.empty(2 * n, 3))
    dist.all_to_all_single(x, torch.arange(6.0 * n).view(2 * n, 3) + 100 * rank)
    # To rank r go r + 1 rows from everybody.
    out.append(x := torch.empty(n * (rank + 1), 2))
    rows = n * (n + 1) // 2
    dist.all_to_all_single(
        x,
        torch.arange(2.0 * rows).view(rows, 2) + 100 * rank,
        output_split_sizes=[rank + 1] * n,
        input_split_sizes=[r + 1 for r in range(n)],
    )
    gathered = [torch.empty(4, 6) for _ in range(n)] if rank == 0 else None
    dist.gather(grid, gathered, dst=0)
    out += gathered or []
    out.append(x := torch.empty(4, 6))
    dist.scatter(x, [grid * r for r in range(n)] if rank == 1 else None, src=1)
    everybody: list[object] = [None] * n
    dist.all_gather_object(everybody, {"rank": rank})
    assert everybody == [{"rank": r} for r in range(n)]
    said = [rank, "x" * rank] if rank == 0 else [None, None]
    dist.broadcast_object_list(said, src=0)
    assert said == [0, ""]
    pair = dist.new_group([0, 1])
    same = dist.new_group([0, 1])  # of the same ranks, and yet another one
    if rank < 2:
        for group in (pair, same):
            out.append(x := torch.tensor([float(rank + 1)]))
            dist.all_reduce(x, group=group)
    dist.barrier()
    return torch.cat([x.flatten() for x in out]).tolist()


PROGRAMS = {f.__name__: f for f in (ddp, fsdp2, mesh_2d, dtensor, point_to_point, every_call)}

"""Ranks of torch.distributed as real processes, each running one entry of this file with a backend's name."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

WAIT_S = 60.0
context = mp.get_context("forkserver")
context.set_forkserver_preload(["everstep.collectives.torch_backend", "integration.torch_programs"])


def launch(
    entry: str, n: int, backend: str, args: Sequence[Any] = (), env: dict[str, str] | None = None
) -> list[Any]:
    """What each rank returned; "killed" of one that died by a signal, the traceback of one that raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(env or {})}
    pipes, processes = [], []
    for rank in range(n):
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(theirs, entry, rank, n, backend, args, variables), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found: dict[Connection, Any] = {}
    deadline = time.monotonic() + WAIT_S
    try:
        while len(found) < n and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([p for p in pipes if p not in found], left):
                try:
                    found[pipe] = pipe.recv()
                except EOFError:
                    found[pipe] = "killed"
        for process in processes:  # a thread that is left would keep it
            process.join(max(0.0, min(10.0, deadline - time.monotonic())))
            assert process.exitcode is not None, f"{entry}: {process.name} does not end"
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
    return [found.get(pipe, "nothing in time") for pipe in pipes]


def _main(
    pipe: Connection, entry: str, rank: int, n: int, backend: str, args: Sequence[Any], env: dict[str, str]
) -> None:
    import torch
    import torch.distributed as dist

    import everstep.collectives.torch_backend  # noqa: F401  # registers the backend

    torch.set_num_threads(1)
    os.environ.update(env)
    dist.init_process_group(backend, rank=rank, world_size=n, timeout=timedelta(seconds=20))
    try:
        pipe.send(globals()[entry](*args))
    except BaseException:
        pipe.send(traceback.format_exc())
    if dist.is_initialized():
        dist.destroy_process_group()


def programs(names: Sequence[str]) -> dict[str, list[float]]:
    from integration.torch_programs import PROGRAMS

    return {name: PROGRAMS[name]() for name in names}


def twice() -> list[Any]:
    """Destroyed and made again in one process, on the same store; then nothing of it is left."""
    import torch.distributed as dist

    from everstep.collectives import torch_backend

    found: list[Any] = []
    rank, n = dist.get_rank(), dist.get_world_size()
    for _ in range(2):
        x = torch_backend.group().empty(1000).fill_(rank + 1)
        future = dist.all_reduce(x, async_op=True).get_future()
        future.wait()
        found.append(x[0].item())
        dist.destroy_process_group()
        if len(found) < 2:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
            dist.init_process_group("everstep", rank=rank, world_size=n, timeout=timedelta(seconds=20))
    left = [t.name for t in threading.enumerate() if t.name.startswith(("futures of", "mesh", "coordinator"))]
    return [found, left]


def refusals() -> list[str]:
    """What calls that are not supported say. Nothing is sent: all ranks refuse alike."""
    import torch
    import torch.distributed as dist

    x = torch.ones(4)
    calls = [
        lambda: dist.all_reduce(x, op=dist.ReduceOp.PRODUCT),
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.int32), op=dist.ReduceOp.BAND),
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.int64), op=dist.ReduceOp.AVG),
        lambda: dist.broadcast(torch.ones(4, device="meta"), src=0),
        lambda: dist.group.WORLD.broadcast([torch.ones(4, dtype=torch.complex64)], dist.BroadcastOptions()),
        lambda: dist.all_reduce(torch.eye(3).to_sparse()),
        lambda: dist.recv(x),
        lambda: dist.all_gather([torch.ones(4)], x),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except (ValueError, NotImplementedError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def older_hooks() -> list[float]:
    """The names by which releases before 2.13 call a process group."""
    import torch
    import torch.distributed as dist

    pg, rank, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert pg is not None
    out = torch.empty(2 * n), torch.empty(2), torch.empty(n), torch.empty(2 * n), torch.empty(2)
    pg._allgather_base(out[0], torch.full((2,), float(rank))).wait()
    pg._reduce_scatter_base(out[1], torch.ones(2 * n) * rank, dist.ReduceScatterOptions()).wait()
    pg.alltoall_base(out[2], torch.arange(float(n)) + 10 * rank, [], []).wait()
    pg.allgather_into_tensor_coalesced([out[3]], [torch.full((2,), float(rank))]).wait()
    pg.reduce_scatter_tensor_coalesced([out[4]], [torch.ones(2 * n)]).wait()
    return torch.cat(out).tolist()


def late() -> str:
    """Rank 0 does not come: the others' limit passes."""
    import torch
    import torch.distributed as dist

    error: Any = None
    if dist.get_rank() != 0:
        try:
            dist.all_reduce(torch.ones(1), async_op=True).wait(timedelta(seconds=0.3))
        except RuntimeError as caught:
            error = caught
        dist.barrier(async_op=True)
    else:
        time.sleep(0.6)
    return f"{type(error).__name__}: {error}"


def losing(victim: int, how: str) -> Any:
    """One rank is killed in mid all-reduce; the others re-form, agree on the state and train on."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from everstep.collectives import PeerLost, torch_backend

    rank = dist.get_rank()
    torch.manual_seed(1)
    model: Any = torch.nn.Linear(300, 300)
    wrapped = DistributedDataParallel(model)
    big, steps = torch.ones(4 << 20), 0
    caught: list[str] = []
    sizes = [dist.get_world_size()]
    ready = dist.new_group()  # a subgroup that ends with its view
    if rank == victim:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    began = time.monotonic()
    while steps < 3:
        try:
            if how == "ddp":
                wrapped(torch.ones(8, 300)).sum().backward()
            else:
                dist.all_reduce(big.fill_(1.0), group=ready)
        except RuntimeError as error:
            failed = time.monotonic()
            # What comes through DDP's C++ is a plain RuntimeError; lost() knows.
            lost = torch_backend.lost() if how == "ddp" else error
            caught.append(f"{isinstance(error, PeerLost)} {type(lost).__name__} {lost}")
            sizes.append(torch_backend.reform(10)[1])
            ready = dist.new_group()
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)
            wrapped = DistributedDataParallel(model)
            sizes.append(round(time.monotonic() - failed, 2))
        assert time.monotonic() - began < 20, "nobody was lost"
        if caught:
            x = torch.full((3,), float(dist.get_rank()))
            dist.all_reduce(x)
            wrapped(torch.ones(8, 300)).sum().backward()
            torch.distributed.barrier()
            steps += 1
    return {"caught": caught, "sizes": sizes, "rank": dist.get_rank(), "sum": x[0].item()}


def losing_the_coordinator() -> list[str]:
    """Rank 0 is killed, and with it the coordinator."""
    import torch
    import torch.distributed as dist

    from everstep.collectives import torch_backend

    x, said = torch.ones(1 << 20), []
    if dist.get_rank() == 0:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    began = time.monotonic()
    try:
        while time.monotonic() - began < 10:
            dist.all_reduce(x.fill_(1.0))
    except RuntimeError as error:
        said.append(type(error).__name__)
    try:
        torch_backend.reform(1.0)
    except RuntimeError as error:
        said.append(f"{type(error).__name__}: {error}")
    assert time.monotonic() - began < 8
    return [*said, str(dist.is_initialized())]

"""all_reduce through torch.distributed: the backend "everstep" beside Gloo, in the same processes.

Prints the median time of the slowest rank and the ratio: above 1 everstep is faster. Rounds of both alternate.

    python benchmarks/torch_backend.py [--ranks 2,4] [--sizes 65536,1048576] [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import everstep.collectives.torch_backend  # noqa: F401  # registers the backend

SIZES = [64 << 10, 1 << 20, 8 << 20, 32 << 20]
BATCH_BYTES = 4 << 20  # of small tensors, several all-reduces are one measurement


def run(rank: int, n: int, port: int, sizes: list[int], rounds: int, out: Queue) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("everstep", rank=rank, world_size=n)
    # One default group: Gloo is a group beside it, which torch runs in C++ as ever.
    groups = {"gloo": dist.new_group(backend="gloo"), "everstep": dist.group.WORLD}
    for size in sizes:
        tensor = torch.ones(size // 4)
        calls = max(1, BATCH_BYTES // size)
        times: dict[str, list[float]] = {name: [] for name in groups}
        for turn in range(rounds + 2):
            for name, group in groups.items():
                dist.barrier(group=group)
                began = time.perf_counter()
                for _ in range(calls):
                    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if turn < 2 else dist.ReduceOp.SUM, group=group)
                spent = torch.tensor([(time.perf_counter() - began) / calls])
                dist.all_reduce(spent, op=dist.ReduceOp.MAX, group=group)
                if turn >= 2:  # the first are to warm up
                    times[name].append(spent.item())
                tensor.fill_(1.0)
        if rank == 0:
            out.put((size, {name: statistics.median(found) for name, found in times.items()}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--port", type=int, default=29620)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    print(f"{'ranks':>5} {'size':>10} {'gloo ms':>9} {'everstep ms':>12} {'ratio':>6}")
    for at, n in enumerate(map(int, args.ranks.split(","))):
        out = mp.get_context("spawn").SimpleQueue()
        mp.spawn(run, (n, args.port + at, sizes, args.rounds, out), nprocs=n)
        for _ in sizes:
            size, found = out.get()
            gloo, ours = found["gloo"] * 1000, found["everstep"] * 1000
            print(f"{n:>5} {size // 1024:>6} KiB {gloo:>9.2f} {ours:>12.2f} {gloo / ours:>6.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Every reducing algorithm, and both broadcasts, beside the one that is used otherwise, in the same processes.

Prints the median time of each and its ratio to `direct` (or `moves`): above 1 the other one is faster.

    python benchmarks/algorithms.py [--members 2,4,8] [--hosts 0] [--mbit 0]

`--hosts h` says of the members that they are on h hosts: those of one share memory, the others use TCP over loopback.
The default, 0, lets every member have a host of its own. `--mbit` gives each host a network namespace of its own with
that much to send and as much to receive (needs root, ip and tc): what a network costs, which loopback does not show.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue

import torch
from parts.namespaces import enter

from everstep.collectives.algorithms.by_host import HostReduce
from everstep.collectives.algorithms.direct import DirectReduce
from everstep.collectives.algorithms.halving import HalvingReduce
from everstep.collectives.algorithms.moves import Moves
from everstep.collectives.algorithms.quantised import quantised
from everstep.collectives.algorithms.ring import RingReduce
from everstep.collectives.algorithms.spread import Spread
from everstep.collectives.members import Members
from everstep.collectives.mesh import Mesh
from everstep.collectives.messages import Member, View, ViewId
from everstep.collectives.operations import Operation
from everstep.collectives.transport.listener import Listener

SIZES = [64 << 10, 256 << 10, 1 << 20, 8 << 20, 32 << 20]


def makers(n: int, hosts: int):
    """name -> (flow, tensor) -> algorithm; the first one is what the others are compared with."""
    reduces = {"direct": lambda flow, tensor: DirectReduce(flow, "sum", tensor, None)}
    if n & (n - 1) == 0:
        reduces["halving"] = lambda flow, tensor: HalvingReduce(flow, "sum", tensor)
    reduces["ring"] = lambda flow, tensor: RingReduce(flow, "sum", tensor)
    if hosts:
        groups = [list(range(n))[i * n // hosts : (i + 1) * n // hosts] for i in range(hosts)]
        reduces["by host"] = lambda flow, tensor: HostReduce(flow, "sum", tensor, groups)
    reduces["minmax8"] = lambda flow, tensor: quantised("sum", tensor, "minmax8", None, None)(flow)
    broadcasts = {
        "moves": lambda flow, tensor: Moves(
            flow, [(flow.peers, (tensor,))] if flow.me == 0 else [], {} if flow.me == 0 else {0: (tensor,)}
        ),
        "spread": lambda flow, tensor: Spread(flow, tensor, 0),
    }
    return {"all_reduce": reduces, "broadcast": broadcasts}


@contextmanager
def network(hosts: int, mbit: int) -> Iterator[list[str]]:
    """Namespaces on one bridge; none where `mbit` is 0."""
    tag = f"bench{os.getpid() % 10000}"
    names = [f"{tag}-{i}" for i in range(hosts)] if mbit else []
    limit = f"tbf rate {mbit}mbit burst 256kb latency 20ms"

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True)

    try:
        for name in [tag, *names] if mbit else ():
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
        if mbit:
            run(f"ip -n {tag} link add br0 type bridge")
            run(f"ip -n {tag} link set br0 up")
        for i, name in enumerate(names):
            run(f"ip -n {tag} link add p{i} type veth peer name eth0 netns {name}")
            run(f"ip -n {tag} link set p{i} master br0 up")
            run(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev eth0")
            run(f"ip -n {name} link set eth0 up")
            run(f"tc -n {name} qdisc add dev eth0 root {limit}")
            run(f"tc -n {tag} qdisc add dev p{i} root {limit}")
        yield names
    finally:
        for name in [tag, *names] if mbit else ():
            subprocess.run(["ip", "netns", "del", name], check=False)


def member(rank: int, n: int, hosts: int, namespace: str, mine: Queue, out: Queue) -> None:
    torch.set_num_threads(1)
    if namespace:
        enter(f"/run/netns/{namespace}")
    listener = Listener(f"10.77.0.{int(namespace.split('-')[1]) + 1}" if namespace else "127.0.0.1", "token")
    out.put((rank, listener.address, listener.local))
    name = "host{}/".format
    view = View(
        ViewId(1, 1),
        tuple(
            Member(f"m{i}", i, "", address, local=name(i * hosts // n) + local.split("/")[1] if hosts else "")
            for i, address, local in mine.get()
        ),
        0,
    )
    if hosts:  # a listener of another host
        listener.local = view.members[rank].local
    mesh = Mesh(view, rank, listener, lambda *lost: print("lost", lost), 60.0)
    mesh.connect(30.0)
    everybody = Members(mesh)
    for kind, made in makers(n, hosts).items():
        for size in SIZES:
            if is_left_out(kind, n, size):
                continue
            tensor = torch.zeros(size // 4)
            times = {algorithm: [] for algorithm in made}
            for i in range(max(5, min(60, (256 << 20) // size // n)) + 2):
                for algorithm, make in made.items():
                    everybody.barrier().wait()
                    began = time.perf_counter()
                    work = Operation(kind, (algorithm,), 0, lambda flow, m=make, t=tensor: m(flow, t), (tensor,))
                    mesh.submit(work).wait()
                    if i >= 2:
                        times[algorithm].append(time.perf_counter() - began)
            out.put((rank, kind, size, {a: statistics.median(t) for a, t in times.items()}))
    everybody.barrier().wait()
    mesh.close()
    listener.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="2,4,8")
    parser.add_argument("--hosts", type=int, default=0)
    parser.add_argument("--mbit", type=int, default=0)
    given = parser.parse_args()
    for n in map(int, given.members.split(",")):
        with network(given.hosts or n, given.mbit) as names:
            compare(n, given.hosts, names)


def compare(n: int, hosts: int, names: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    out, queues = context.Queue(), [context.Queue() for _ in range(n)]
    where = [names[rank * len(names) // n] if names else "" for rank in range(n)]
    members = [
        context.Process(target=member, daemon=True, args=(rank, n, hosts, where[rank], queues[rank], out))
        for rank in range(n)
    ]
    for process in members:
        process.start()
    known = sorted(out.get() for _ in range(n))
    for queue in queues:
        queue.put(known)
    for kind in ("all_reduce", "broadcast"):
        for size in SIZES:
            if is_left_out(kind, n, size):
                continue
            results = [out.get() for _ in range(n)]
            slowest = {name: max(result[3][name] for result in results) for name in results[0][3]}
            base = next(iter(slowest.values()))
            line = "  ".join(f"{name} {t * 1e6:8.0f} us x{base / t:4.2f}" for name, t in slowest.items())
            print(f"{kind:10} n={n} hosts={hosts or n} {size >> 10:6} KiB  {line}", flush=True)
    for process in members:
        process.join()


def is_left_out(kind: str, n: int, size: int) -> bool:
    return kind == "broadcast" and (n == 2 or size < 64 << 10)


if __name__ == "__main__":
    main()

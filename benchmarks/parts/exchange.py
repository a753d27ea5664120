"""One rank of allreduce.py: joins our groups and Gloo's, and times the same all-reduces over each in turns.

Every call begins after a barrier of the same library, with the same contents, and its result is compared with the
exact sum; refill, barrier and comparison are not timed. The clock is the machine's, so ranks' times can be compared.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from everstep.collectives import Group

REGISTERED = "registered"
COPY = "copy"  # the floor: the tensor copied once, on all ranks at once
_PERIOD = 1021  # contents repeat with a prime, so a piece in a wrong place is seen
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Case:
    """`rounds` timed calls of each contestant; a call is `calls` all-reduces, one after the other."""

    size_bytes: int
    rounds: int
    calls: int = 1


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet: coordinators by transport, and the port of Gloo's store."""

    groups: dict[str, str]
    token: str
    store_port: int
    ranks: int
    registered: bool
    quantize: str | None = None  # ours; Gloo sums float32


def serve(rank: int, meeting: Meeting, cases: list[Case], pipe: Connection) -> None:
    """The rank's process: sends {contestant: [(began, ended), ...]} after each case."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", meeting.store_port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=meeting.ranks)
    groups: dict[str, Group] = {}
    try:
        for transport, address in meeting.groups.items():
            groups[transport] = Group.join(
                address, token=meeting.token, name=f"rank-{rank}", timeout_s=_TIMEOUT_S, transport=transport
            )
        contestants = dict(groups)
        if meeting.registered:
            contestants[REGISTERED] = groups["auto"]
        for case in cases:
            pipe.send(_measure(rank, meeting.ranks, case, contestants, meeting.quantize))
        dist.barrier()
    finally:
        for group in groups.values():
            group.leave()
        dist.destroy_process_group()
        pipe.close()


def _measure(
    rank: int, ranks: int, case: Case, groups: dict[str, Group], quantize: str | None
) -> dict[str, list[tuple[float, float]]]:
    elements = case.size_bytes // 4
    source = (torch.arange(elements, dtype=torch.int64) % _PERIOD).to(torch.float32).add_(float(rank))
    tensor, result = torch.empty(elements), torch.empty(elements)
    # Each further call of a burst multiplies the sum, now equal on all ranks, by their number; it stays exact.
    expected = (source - rank) * ranks + ranks * (ranks - 1) / 2
    expected *= float(ranks) ** (case.calls - 1)

    # 8 bits: two encodings a call, each off by at most half of 1/255 of the range of what it encodes.
    allowed = {name: 0.0 if quantize is None else 0.004 * case.calls * float(expected.max()) for name in groups}

    tensors = dict.fromkeys([*groups, "gloo", COPY], tensor)
    if REGISTERED in groups:  # the same group, on a tensor that its members read where it is
        tensors[REGISTERED] = groups[REGISTERED].empty(elements)

    def ours(name: str) -> Callable[[], Any]:
        def reduce() -> None:
            for _ in range(case.calls):
                groups[name].all_reduce(tensors[name], quantize=quantize).wait()

        return reduce

    def gloo() -> None:
        for _ in range(case.calls):
            dist.all_reduce(tensor)

    contestants: dict[str, Callable[[], Any]] = {name: ours(name) for name in groups}
    contestants = {**contestants, "gloo": gloo, COPY: lambda: result.copy_(tensor)}
    # Each meets in its own barrier: another's leaves its threads asleep (up to twice the time for 1 MiB, either way).
    meet: dict[str, Callable[[], Any]] = dict.fromkeys(contestants, dist.barrier)
    meet |= {name: lambda group=group: group.barrier().wait() for name, group in groups.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(case.rounds + 2):
        first = turn % len(names)  # so that nobody always runs behind the same one
        for name in names[first:] + names[:first]:
            tensors[name].copy_(source)
            meet[name]()
            began = time.perf_counter()
            contestants[name]()
            ended = time.perf_counter()
            wanted = expected if name != COPY else source
            if not torch.allclose(tensors[name], wanted, rtol=0.0, atol=allowed.get(name, 0.0)):
                raise ArithmeticError(f"rank {rank}: {name} gave a wrong sum of {case.size_bytes} bytes")
            if turn > 1:
                times[name].append((began, ended))
    return times

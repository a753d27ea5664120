"""The processes of kill.py: members of our group, and ranks of Gloo that help themselves after a death.

Each obeys its pipe: a name of a method and arguments, one answer each. Tensors hold whole numbers, so that the sum
over any membership is known exactly. All times are the machine's clock.
"""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from everstep.collectives import Group, PeerLost

_TIMEOUT_S = 30.0


def serve_ours(index: int, elements: int, address: str, token: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    _obey(_Ours(index, elements, address, token), pipe)


def serve_gloo(index: int, elements: int, store_port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    _obey(_Gloo(index, elements, store_port, pipe), pipe)


def _obey(member: Any, pipe: Connection) -> None:
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(member, what)(*arguments))
        if what == "leave":
            return


class _Tensor:
    """Member i brings i + 1 in every element; `is_sum` compares with the sum over `members`."""

    def __init__(self, index: int, elements: int) -> None:
        self.tensor = torch.empty(elements)
        self._value = index + 1.0

    def fill(self) -> None:
        self.tensor.fill_(self._value)

    def is_sum(self, members: list[int]) -> bool:
        return bool((self.tensor == sum(i + 1.0 for i in members)).all())


def _timed(data: _Tensor, meet: Callable[[], Any], reduce: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        data.fill()
        meet()
        began = time.monotonic()
        reduce()
        times.append(time.monotonic() - began)
    return times


class _Ours:
    def __init__(self, index: int, elements: int, address: str, token: str) -> None:
        self._data = _Tensor(index, elements)
        self._name, self._address, self._token = str(index), address, token
        self._group: Group

    def join(self) -> None:
        self._group = Group.join(self._address, token=self._token, name=self._name, timeout_s=_TIMEOUT_S)

    def admit(self) -> None:
        """Until somebody came in."""
        while not self._group.admit():
            pass

    def plain(self, count: int) -> list[float]:
        group, tensor = self._group, self._data.tensor
        return _timed(self._data, lambda: group.barrier().wait(), lambda: group.all_reduce(tensor).wait(), count)

    def safe(self, count: int) -> list[float]:
        """In transactions."""

        def transact() -> None:
            with self._group.transaction() as tx:
                tx.all_reduce(self._data.tensor)

        return _timed(self._data, lambda: self._group.barrier().wait(), transact, count)

    def outlive(self, size: int) -> tuple[float, float, bool]:
        """Transactions until one is committed by `size` members: (error at, committed at, whether it is exact)."""
        error_at, refill = 0.0, True
        while True:
            if refill:
                self._data.fill()
            try:
                with self._group.transaction() as tx:
                    tx.all_reduce(self._data.tensor)
            except PeerLost:
                error_at = time.monotonic()
                refill = False  # the input is back
                self._group.reform()
                continue
            refill = True
            if self._group.size == size:
                committed_at = time.monotonic()
                return error_at, committed_at, self._data.is_sum([int(name) for name in self._group.view.members])

    def leave(self) -> None:
        self._group.leave()


class _Gloo:
    """Gives Gloo what it lacks, at its best: a copy of the input, and at once the word on who is left."""

    def __init__(self, index: int, elements: int, store_port: int, pipe: Connection) -> None:
        self._index, self._pipe = index, pipe
        self._data = _Tensor(index, elements)
        self._backup = torch.empty(elements)
        self._store = dist.TCPStore("127.0.0.1", store_port, is_master=False)
        self._members: list[int] = []

    def join(self, generation: int, members: list[int]) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self._members = members
        store = dist.PrefixStore(f"generation-{generation}", self._store)
        dist.init_process_group("gloo", store=store, rank=members.index(self._index), world_size=len(members))

    def plain(self, count: int) -> list[float]:
        return _timed(self._data, dist.barrier, lambda: dist.all_reduce(self._data.tensor), count)

    def outlive(self, size: int) -> tuple[float, float, bool]:
        error_at = 0.0
        while True:
            if not error_at:
                self._data.fill()
                self._backup.copy_(self._data.tensor)
            lost = False
            try:
                dist.all_reduce(self._data.tensor)
            except RuntimeError:
                lost = True  # outside of this block nothing holds the group any more, so it can close its connections
            if lost:
                error_at = time.monotonic()
                _, (generation, members) = self._pipe.recv()  # sent right after the kill
                self._data.tensor.copy_(self._backup)
                self.join(generation, members)
                continue
            if len(self._members) == size:
                return error_at, time.monotonic(), self._data.is_sum(self._members)

    def leave(self) -> None:
        dist.destroy_process_group()

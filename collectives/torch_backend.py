"""The torch.distributed backend "everstep": importing this module registers it.

    import everstep.collectives.torch_backend
    dist.init_process_group("everstep")                # env://, tcp://, a store: as for Gloo
    try:
        train()
    except RuntimeError:                               # PeerLost is one, and so is what DDP's backward raises
        if torch_backend.lost() is None:
            raise
        rank, size = torch_backend.reform()            # the survivors, in this process; ranks are new

Rank 0 starts a coordinator and tells its address and a token, made for this once, to the others through the torch
store: **whoever can read the store can join**. EVERSTEP_COORDINATOR (host:port) and EVERSTEP_TOKEN_FILE name one that
runs already instead; then rank 0 may be lost as any other.

One default process group a process, as torch has it. Thread-safety: as torch.distributed: initialise, destroy and
re-form from one thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # typed here only

from everstep.collectives.addresses import interface_towards
from everstep.collectives.coordinator import Coordinator
from everstep.collectives.errors import CollectiveError, PeerLost
from everstep.collectives.exits import close_at_exit
from everstep.collectives.group import Group
from everstep.collectives.operations import Collectives
from everstep.collectives.torch_process_group import EverstepProcessGroup
from everstep.collectives.torch_work import TorchEvicted, TorchMismatch, TorchPeerLost, TorchTimeout, as_torch

COORDINATOR_VARIABLE: Final = "EVERSTEP_COORDINATOR"
TOKEN_FILE_VARIABLE: Final = "EVERSTEP_TOKEN_FILE"
_FAREWELL_S = 5.0  # how long destroy_process_group waits for ranks that do not come to it
_POLL_S = 0.005
_EXPLAIN_S = 1.0
_STORE_BYTES = 256  # of the address of a store, as it is broadcast


class _World:
    """What is underneath the default process group: this process' membership, and the coordinator on rank 0."""

    def __init__(self, group: Group, coordinator: Coordinator | None, host: str) -> None:
        self.group = group
        self.host = host  # that the others reach this process at
        self._coordinator = coordinator
        self._store: Store | None = None
        self._closed = False
        close_at_exit(self.close)  # asked before the group's and the coordinator's own

    def ranks(self) -> list[int]:
        """Ranks in the view by torch's rank. Torch's rank is that of the name: views are in order of arrival."""
        members = self.group.view.members
        return sorted(range(len(members)), key=members.__getitem__)

    def members(self, ranks: Sequence[int], name: str) -> Collectives:
        """These of torch's ranks, in this order. The whole group itself where that is it."""
        order = self.ranks()
        chosen = [order[rank] for rank in ranks]
        if not name and chosen == list(range(self.group.size)):
            return self.group
        return self.group.subgroup(chosen, name)

    def uses(self, store: Store) -> None:
        self._store = store

    def close(self, farewell: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        if farewell and self._store is not None:
            self._say_farewell(self._store)
        self.group.leave()
        if self._coordinator is not None:
            self._coordinator.stop()

    def _say_farewell(self, store: Store) -> None:
        """Nobody goes before all are done: what is under way on others would raise PeerLost."""
        until, size = time.monotonic() + _FAREWELL_S, self.group.size
        # A store that is away was rank 0's, who has seen all come.
        with contextlib.suppress(dist.DistError, RuntimeError):
            there = store.add("farewell", 1)
            while there < size and self.error() is None and time.monotonic() < until:
                time.sleep(_POLL_S)
                there = store.add("farewell", 0)

    def error(self) -> CollectiveError | None:
        return self.group._seat.error()

    def explain(self) -> CollectiveError | None:
        return self.error() or self.group._seat.explain(_EXPLAIN_S)


_world: _World | None = None
_reforming = False


def _create(options: Any, _: Any = None) -> EverstepProcessGroup:
    """What torch calls for the default process group and for each of its subgroups."""
    global _world
    store, rank, size = options.store, options.group_rank, options.group_size
    ranks, name, timeout = options.global_ranks_in_group, str(options.group_id), options.timeout
    if ranks:
        if _world is None:
            raise RuntimeError('everstep: new_group needs a default process group of backend "everstep"')
        return EverstepProcessGroup(_world.members(ranks, name), name, timeout, lambda farewell: None)
    if not _reforming:
        if _world is not None:
            raise RuntimeError("everstep: there is a default process group already; call destroy_process_group first")
        _world = _join(store, rank, size, timeout.total_seconds())
    world = _world
    assert world is not None
    world.uses(store)
    members = world.members(range(size), "")
    assert (members.rank, members.size) == (rank, size), f"rank {rank} of {size} has become {members.rank}"
    return EverstepProcessGroup(members, name, timeout, _end)


def _end(farewell: bool) -> None:
    global _world
    if _reforming or _world is None:
        return
    world, _world = _world, None
    world.close(farewell)


def _join(store: Store, rank: int, size: int, timeout_s: float) -> _World:
    deadline = time.monotonic() + timeout_s
    coordinator: Coordinator | None = None
    address, token = os.environ.get(COORDINATOR_VARIABLE, ""), ""
    if address:
        token = _token_of_file()
    elif rank == 0:
        token = secrets.token_hex(32)
        # One is enough for a view: it is complete before it is used, and shrinks when ranks are lost.
        coordinator = Coordinator(f"{_host_of(store)}:0", token, min_peers=1, max_peers=max(1024, 4 * size))
        coordinator.start()
        address = coordinator.address
        store.set("coordinator", f"{address} {token}")
    else:
        address, token = store.get("coordinator").decode().split()
    joined: Group | None = None
    try:
        joined = Group.join(address, token=token, name=_name(rank), timeout_s=timeout_s)
        _complete(joined, size, deadline)
    except BaseException:
        if joined is not None:
            joined.leave()
        if coordinator is not None:
            coordinator.stop()
        raise
    return _World(joined, coordinator, interface_towards(address))


def _complete(group: Group, size: int, deadline: float) -> None:
    """Lets in who comes until all are there. Every member of the view does the same."""
    while group.size < size:
        if time.monotonic() > deadline:
            there = ", ".join(group.view.members)
            raise TorchTimeout(
                f"init_process_group: {group.size} of {size} ranks have come ({there}); limit: timeout"
            )
        try:
            if not group.admit():
                time.sleep(_POLL_S)
        except CollectiveError as error:
            raise as_torch(error) from None
    if sorted(group.view.members) != [_name(rank) for rank in range(size)]:
        raise RuntimeError(
            f"init_process_group: the coordinator's group has members {', '.join(group.view.members)}; those of "
            f"ranks 0 to {size - 1} are expected: one coordinator serves one job"
        )


def _name(rank: int) -> str:
    return f"rank-{rank:06d}"  # sorted as text they are in order of rank


def _token_of_file() -> str:
    path = os.environ.get(TOKEN_FILE_VARIABLE, "")
    if not path:
        raise ValueError(
            f"{COORDINATOR_VARIABLE} is set and {TOKEN_FILE_VARIABLE} is not; it must name the token's file"
        )
    return Path(path).read_text().strip()


def _host_of(store: Store) -> str:
    """Where the others reach rank 0: at the store, which is on its host; a store in a file is on one host."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return "127.0.0.1"
    return interface_towards(f"{store.host}:{store.port}")


# ---- for whoever trains -----------------------------------------------------------------------------------


def lost() -> CollectiveError | None:
    """Why the default process group can be used no more; None while it can, or where there is none.

    Errors that come through C++ (DDP's backward) are plain RuntimeErrors: this tells whether a peer was lost. It
    waits up to a second for the coordinator's word: connections break before it comes.
    """
    error = _world.explain() if _world is not None else None
    return as_torch(error) if error is not None else None


def reform(timeout_s: float | None = None) -> tuple[int, int]:
    """After a lost peer: a new default process group of the survivors, in this process. Returns rank and size.

    Every survivor calls it. All process groups are destroyed, those of DeviceMesh too: build subgroups, meshes, DDP
    and FSDP modules again, and give all ranks the same state (a broadcast from one that is whole). Ranks keep their
    order.
    Raises TorchEvicted where the others go on without this rank, TorchTimeout (default: the process group's limit).
    With the coordinator on rank 0, the loss of rank 0 cannot be survived: see EVERSTEP_COORDINATOR.
    """
    global _reforming
    if _world is None:
        raise RuntimeError('reform: there is no default process group of backend "everstep"')
    world = _world
    try:
        _reforming = True
        limit_s = world.group._seat.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        dist.destroy_process_group()
        members, store = _survivors(world, deadline)
        rank, size = members.rank, members.size
        kept = timedelta(seconds=world.group._seat.timeout_s)
        dist.init_process_group("everstep", store=store, rank=rank, world_size=size, timeout=kept)
    except BaseException as error:
        _reforming = False
        _end(farewell=False)
        if isinstance(error, CollectiveError):
            raise as_torch(error) from None
        raise
    finally:
        _reforming = False
    return rank, size


def _survivors(world: _World, deadline: float) -> tuple[Collectives, Store]:
    """Further losses begin it anew: whoever had come further gets PeerLost from its first operation."""
    while True:
        world.explain()  # or reform would find nothing wrong yet
        world.group.reform(max(0.0, deadline - time.monotonic()))
        members = world.members(range(world.group.size), "")
        try:
            return members, _new_store(members, world.host, timedelta(seconds=max(1.0, deadline - time.monotonic())))
        except PeerLost:
            if time.monotonic() > deadline:
                raise


def _new_store(members: Collectives, host: str, timeout: timedelta) -> Store:
    """The old one may be gone with the rank that had it."""
    said = torch.zeros(_STORE_BYTES, dtype=torch.uint8)
    store: Store | None = None
    if members.rank == 0:
        master = TCPStore(host, 0, members.size, True, timeout, wait_for_workers=False)
        text = f"{host}:{master.port}".encode()
        said[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        store = master
    members.broadcast(said, 0).wait(timeout.total_seconds())
    if store is None:
        name, _, port = bytes(said.numpy()).rstrip(b"\0").decode().rpartition(":")
        store = TCPStore(name, int(port), members.size, False, timeout, wait_for_workers=False)
    return store


def group() -> Group:
    """The group underneath, for what torch has no call for: registered tensors (`empty`), transactions, subgroups.

    Its ranks are those of its view, in order of arrival; its members' names are in order of torch's ranks.
    """
    if _world is None:
        raise RuntimeError('group: there is no default process group of backend "everstep"')
    return _world.group


dist.Backend.register_backend("everstep", _create, extended_api=True, devices=["cpu"])

__all__ = [
    "COORDINATOR_VARIABLE",
    "TOKEN_FILE_VARIABLE",
    "EverstepProcessGroup",
    "TorchEvicted",
    "TorchMismatch",
    "TorchPeerLost",
    "TorchTimeout",
    "group",
    "lost",
    "reform",
]

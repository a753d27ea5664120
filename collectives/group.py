"""`Group`: fault-tolerant collectives over whoever is there.

    g = Group.join(address, token=token, name="peer-3", timeout_s=60)
    with g.transaction() as tx:                  # all or nothing
        tx.all_reduce(tensor)
    g.reform()                                   # after PeerLost: the next view, without who is gone
    g.admit()                                    # every member calls it: whoever waits comes in
    g.leave()

A view is what a group is at one time: members in rank order, and connections between them that end with it. Views
change at `reform` and `admit` only, never under an operation: what runs when a view ends raises PeerLost.

Thread-safety: operations may be begun and waited for from any thread; transactions, `reform`, `admit` and `leave`
belong to one thread at a time.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import msgspec
import torch

from everstep.collectives.addresses import interface_towards
from everstep.collectives.errors import (
    CollectiveError,
    CollectiveTimeout,
    Evicted,
    HandshakeRefused,
    Mismatch,
    TransactionAborted,
)
from everstep.collectives.exits import close_at_exit
from everstep.collectives.mesh import Mesh
from everstep.collectives.messages import Member, View, ViewId
from everstep.collectives.operations import Collectives, Operation
from everstep.collectives.seat import Seat
from everstep.collectives.transaction import Backups, Transaction
from everstep.collectives.transport.listener import Listener
from everstep.collectives.watching import Watch
from everstep.collectives.work import Work

_ENDS_A_BLOCK = (TransactionAborted, Mismatch)


@dataclass(frozen=True)
class GroupView:
    """`members`: names in rank order."""

    id: ViewId
    rank: int
    size: int
    members: tuple[str, ...]


class Group(Collectives):
    """One member of a group. Made by `join`."""

    def __init__(self, seat: Seat, listener: Listener, watch: Watch) -> None:
        self._seat = seat
        self._listener = listener
        self._watch = watch
        self._backups = Backups()
        self._transaction: Transaction | None = None
        self._lock = threading.Lock()
        self._view: View
        self._left = False
        close_at_exit(self.leave)

    @staticmethod
    def join(
        address: str,
        *,
        token: str,
        name: str,
        timeout_s: float = 60.0,
        transport: str = "auto",
        host: str = "",
        deterministic: bool = True,
    ) -> Group:
        """Returns when this member is in a view and connected to its members.

        That is when `min_peers` have joined, or the members call `admit`. `timeout_s` is the limit for this, and for
        every wait of the group that names none. `host` is the interface that peers reach this member at (default:
        the one that faces the coordinator); `transport` "tcp" never uses shared memory.
        `deterministic` False: sums may be of any order (see all_reduce); all members say the same.
        Raises HandshakeRefused (token, version, name), CoordinatorLost (nobody there), CollectiveTimeout.
        """
        _check(address, token, name, timeout_s)
        deadline = time.monotonic() + timeout_s
        listener = Listener(host or interface_towards(address), token)
        incarnation = secrets.token_hex(8)
        seat: Seat | None = None
        watch: Watch | None = None

        def make_mesh(view: View, rank: int, on_broken: Callable[[int, str], None]) -> Mesh:
            return Mesh(view, rank, listener, on_broken, timeout_s, transport)

        try:
            local = listener.local if transport == "auto" else ""  # all have to know: algorithms go by hosts
            me = Member(name, 0, "", listener.address, pid=os.getpid(), local=local, incarnation=incarnation)
            seat = Seat(me, make_mesh, timeout_s)
            seat.open(address, token, timeout_s)
            watch = Watch(address, token, name, incarnation, max(1.0, deadline - time.monotonic()))
            seat.enter(msgspec.structs.replace(me, domain=watch.domain))
            group = Group(seat, listener, watch)
            group.deterministic = deterministic
            group._adopt(deadline, f"{name}: joining the group at {address}, {timeout_s:g} s")
        except BaseException as error:
            if seat is not None:
                seat.close()
            if watch is not None:
                watch.close()
            listener.close()
            if isinstance(error, Evicted):
                raise HandshakeRefused(str(error)) from None
            raise
        return group

    # ---- the view ---------------------------------------------------------------------------------------

    @property
    def view(self) -> GroupView:
        """The view in use, also when it is over: it changes with `reform` and `admit`."""
        view, name = self._view, self._seat.name
        return GroupView(view.id, view.rank_of(name), len(view.members), tuple(m.name for m in view.members))

    @property
    def name(self) -> str:
        return self._seat.name

    @property
    def rank(self) -> int:
        return self._view.rank_of(self._seat.name)

    @property
    def size(self) -> int:
        return len(self._view.members)

    def reform(self, timeout_s: float | None = None) -> GroupView:
        """Waits for the view after the one that is over, and uses it; at once where nothing is wrong.

        Further deaths meanwhile are dealt with. Below `min_peers` it waits for joiners. Raises Evicted where the
        others go on without this member, CollectiveTimeout.
        """
        limit = self._seat.timeout_s if timeout_s is None else timeout_s
        if self._seat.error() is not None:
            self._adopt(time.monotonic() + limit, f"{self.name}: reform, {limit:g} s")
        return self.view

    def pending(self) -> tuple[str, ...]:
        """Names of those who wait to be admitted, as far as the coordinator has said; costs nothing."""
        return self._seat.joiners

    def admit(self) -> bool:
        """Lets in who waits. Every member has to call it, as if it were an operation.

        True: the view is a new one, connected. False: nobody waits. Raises PeerLost, Evicted, Mismatch.
        """
        self._raise_if_over()
        ballot = msgspec.structs.replace(self._seat.ballot(), kind="admit")
        outcome = self._seat.vote(ballot, self._seat.timeout_s)
        if outcome == "nobody":
            return False
        error = self._seat.error()
        if error is not None and not self._seat.admitted():
            self._go_on_after(error)
            raise error
        self._adopt(time.monotonic() + self._seat.timeout_s, f"{self.name}: admit, {self._seat.timeout_s:g} s")
        return True

    def leave(self) -> None:
        """Goes. Pending operations of the others raise PeerLost, naming this member as one that left. Idempotent."""
        with self._lock:
            if self._left:
                return
            self._left = True
        self._seat.close()
        self._watch.close()
        self._listener.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    # ---- operations -------------------------------------------------------------------------------------

    def transaction(self) -> Transaction:
        """A block whose operations count all or not at all: see Transaction. One at a time."""
        return Transaction(self, self._backups)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised registered tensor: members on this host read it where it is, which saves the copies into
        and out of shared memory (about a third of a large all_reduce's time). It stays registered over all views.

        Raises MemoryError.
        """
        return self._listener.arena.empty(shape, dtype)

    def _submit(self, operation: Operation) -> Work:
        return self._seat.mesh.submit(operation)

    def _view_in_use(self) -> object:
        return self._view.id

    def _begin(self, transaction: Transaction) -> None:
        self._raise_if_over()
        if self._transaction is not None:
            raise ValueError("a transaction of this group is open already; end it first")
        self._transaction = transaction

    def _end(self, transaction: Transaction) -> None:
        if self._transaction is transaction:
            self._transaction = None

    def _raise_if_over(self) -> None:
        error = self._seat.error()
        if error is not None:
            self._go_on_after(error)
            raise error

    def _go_on_after(self, error: BaseException) -> None:
        """Where only a transaction ended, the same members go on: nobody has to call `reform`."""
        known = self._seat.error()
        ends_a_view = isinstance(error, CollectiveError) and not isinstance(
            error, (CollectiveTimeout, *_ENDS_A_BLOCK)
        )
        if ends_a_view or (known is not None and not isinstance(known, _ENDS_A_BLOCK)):
            return
        self._adopt(time.monotonic() + self._seat.timeout_s, f"{self.name}: going on after {error}")

    def _adopt(self, deadline: float, what: str) -> None:
        self._view = self._seat.adopt(deadline, what)


def _check(address: str, token: str, name: str, timeout_s: float) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"address is {address!r}; it must be HOST:PORT, as the coordinator prints it")
    if not token:
        raise ValueError("token is empty; it must be the coordinator's")
    if not name or len(name.encode()) > 128 or not name.isprintable() or "/" in name:
        raise ValueError(f"name is {name!r}; it must be 1 to 128 printable bytes without '/'")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s:g}; it must be above 0")

"""A transaction: all operations of a block count on every member, or none does on any.

Inputs are copied before an operation may change them, into buffers that the group keeps, and copied back where the
transaction is not committed. A transaction belongs to one thread.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import torch

from everstep.collectives.errors import CollectiveError, CoordinatorLost, Evicted, Mismatch, PeerLost
from everstep.collectives.operations import Collectives, Operation
from everstep.collectives.work import Work

if TYPE_CHECKING:
    from everstep.collectives.group import Group

_EXPLAIN_S = 0.3  # a death is known within milliseconds of the connections that it breaks


class Backups:
    """Copies of tensors, bit by bit, in buffers that are used again by the next transaction."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []  # one a tensor, in the order in which blocks bring them
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor, copy)

    def keep(self, tensor: torch.Tensor) -> None:
        at, size = len(self._kept), tensor.numel() * tensor.element_size()
        if at == len(self._buffers):
            self._buffers.append(torch.empty(size, dtype=torch.uint8, device=tensor.device))
        buffer = self._buffers[at]
        if buffer.numel() < size or buffer.device != tensor.device:
            buffer = self._buffers[at] = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        copy = buffer[:size].view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor.detach())
        self._kept.append((tensor.detach(), copy))

    def restore(self) -> None:
        """The latest first, so that of two copies of the same memory the first one wins."""
        for tensor, copy in reversed(self._kept):
            tensor.copy_(copy)
        self._kept.clear()

    def drop(self) -> None:
        self._kept.clear()


class Transaction(Collectives):
    """`with group.transaction() as tx`. Raised out of the block, or out of its end:

    PeerLost            a member is gone: call reform()
    Evicted             this member is gone for the others
    TransactionAborted  another member left its block by an error of its own; the view goes on
    Mismatch            members brought different operations, or different numbers of them; the view goes on

    and whatever the block itself raises. In every case each tensor holds its input again, bit by bit.
    """

    def __init__(self, group: Group, backups: Backups) -> None:
        self._group = group
        self.deterministic = group.deterministic
        self._seat = group._seat
        self._backups = backups
        self._works: list[Work] = []
        self._of_all = 0  # operations that every member brings: not pairs, not subgroups
        self._open = False

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def number(self) -> int:
        """The same on all members, and never used again in the group's life."""
        return self._ballot.txn

    def __enter__(self) -> Transaction:
        self._group._begin(self)
        self._ballot = self._seat.ballot()
        self._mesh = self._seat.mesh
        self._open = True
        return self

    def _submit(self, operation: Operation) -> Work:
        if not self._open:
            raise ValueError("this transaction is over; begin another one")
        for tensor in operation.writes:
            self._backups.keep(tensor)
        work = self._mesh.submit(operation)
        self._works.append(work)
        self._of_all += operation.ranks is None
        return work

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        try:
            if error is None:
                self._commit()
            else:
                self._abort(error)
        finally:
            self._backups.drop()
            self._group._end(self)

    def _commit(self) -> None:
        ballot = msgspec.structs.replace(self._ballot, operations=self._of_all)
        try:
            if not all(work.done() for work in self._works):
                self._seat.say(ballot)
            for work in self._works:
                work.wait()
        except BaseException as error:
            known = self._abort(error)
            if isinstance(error, PeerLost) and known is not None:
                raise known from error
            raise
        try:
            outcome = self._seat.vote(msgspec.structs.replace(ballot, kind="ok"), self._seat.timeout_s)
        except (Evicted, CoordinatorLost):
            self._backups.restore()
            raise
        if outcome == "commit":
            return
        self._backups.restore()
        over = self._seat.error() or PeerLost("the view is over")
        self._group._go_on_after(over)
        raise over

    def _abort(self, error: BaseException) -> CollectiveError | None:
        """Puts the inputs back once nothing can write any more, and tells the others where they cannot know.

        Returns why the view is over, as far as that is known."""
        known = self._seat.explain(_EXPLAIN_S) if isinstance(error, PeerLost) else self._seat.error()
        stop = error if isinstance(error, CollectiveError) else PeerLost("this member left the transaction")
        self._mesh.abort(known or stop)
        self._backups.restore()
        if known is None:
            reason = f"{type(error).__name__}: {error}"[:1000]
            self._seat.say(
                msgspec.structs.replace(
                    self._ballot, kind="abort", reason=reason, mismatch=isinstance(error, Mismatch)
                )
            )
        if isinstance(error, Exception):  # not for a Ctrl-C: nothing is waited for
            self._group._go_on_after(known or error)
        return known

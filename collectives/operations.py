"""The operations that a group offers, and what each brings to the members' OPENs.

`Collectives` checks arguments and describes; how data moves is the algorithms' business. Tensors are CPU tensors of
any shape, contiguous or not; what is not contiguous is copied once each way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from everstep.collectives import arguments
from everstep.collectives.algorithms import build
from everstep.collectives.algorithms.build import Build, is_small
from everstep.collectives.algorithms.eager import Eager
from everstep.collectives.algorithms.quantised import is_small as fits
from everstep.collectives.algorithms.quantised import quantised
from everstep.collectives.arguments import Copies, apart, check_op, check_rank, check_tag, check_tensor, flat_of
from everstep.collectives.flow import Algorithm, Flow
from everstep.collectives.transport.frames import COLLECTIVE, MAX_DESCRIPTOR_BYTES, RECEIVER, SENDER
from everstep.collectives.work import Work

if TYPE_CHECKING:
    from everstep.collectives.feedback import ErrorFeedback
    from everstep.collectives.subgroups import Grid, Subgroup

_MAX_NAME = 32  # bytes of an algorithm's, which comes last
_MAX_WORDS = 400  # of a peer's part, in an error: 64 dimensions of four digits


class Operation:
    """One operation as one member brings it.

    `match` is what all members must bring alike. `writes` are the tensors that it changes.
    `ranks`: the members that take part, None for all; `scope` tells subgroups apart.
    """

    def __init__(
        self,
        kind: str,
        match: Sequence[object],
        tag: int,
        build: Build,
        writes: Sequence[torch.Tensor] = (),
        eager: bool = False,
        copies: Copies = (),
        role: int = COLLECTIVE,
        peer: int | None = None,
        ranks: tuple[int, ...] | None = None,
    ) -> None:
        self.kind = kind
        self.tag = tag
        self.role = role
        self.peer = peer
        self.scope = 0
        self.ranks = ranks
        self.writes = tuple(writes)
        self.eager = eager
        self._copies = copies
        self._build = build
        self._match = [kind, *match]
        self.descriptor = msgspec.msgpack.encode(self._match)
        if len(self.descriptor) + _MAX_NAME > MAX_DESCRIPTOR_BYTES:
            raise ValueError(f"{kind}: a shape of {len(self.descriptor)} bytes cannot be described")
        self.what = f"{_words([kind, *match])}, tag {tag}"

    def within(self, ranks: Sequence[int], scope: int, name: str) -> None:
        """Its ranks were a subgroup's; `ranks` says which of the larger group's they are."""
        self.ranks = tuple(ranks[rank] for rank in (self.ranks if self.ranks is not None else range(len(ranks))))
        self.peer = None if self.peer is None else ranks[self.peer]
        if not self.scope:  # that of the innermost subgroup, which has it from the outer ones
            self.scope = scope
        self.what += f" of {name}"

    def algorithm(self, flow: Flow) -> Algorithm:
        made = self._build(flow)
        self.descriptor = msgspec.msgpack.encode([*self._match, made.name])
        return made

    def mismatch(self, flow: Flow, peer: int, descriptor: bytes, data_bytes: int) -> str:
        """Why the peer's part does not go with this one; "" where it does."""
        if descriptor != self.descriptor:
            alike = descriptor.startswith(self.descriptor[: len(self.descriptor) - len(flow.algorithm.name) - 1])
            return "members would do it by different algorithms" if alike else "members brought different operations"
        expected = flow.algorithm.expected(peer) if isinstance(flow.algorithm, Eager) else 0
        if data_bytes != expected:
            return f"rank {flow.ranks[peer]} brought {data_bytes} bytes, not {expected}"
        return ""

    def describe(self, descriptor: bytes) -> str:
        """A peer's part in words, whatever it sent."""
        try:
            match = msgspec.msgpack.decode(descriptor, type=list[str | int | float | list[int] | None])
            text = f"{_words(match[:-1])} by {match[-1]}"
        except (ValueError, IndexError, RecursionError):  # msgspec's own are ValueErrors
            return "something unreadable"
        return text[:_MAX_WORDS] if text.isprintable() else "something unreadable"

    def finish(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy.view(tensor.shape))


class Collectives(ABC):
    """What Group, Transaction and Subgroup have in common. Every method returns at once; see Work.wait.

    Operations with one `tag` are matched in the order in which each member begins them; operations with different
    tags go on side by side, in any order. An operation needs every member: what is brought is compared before any
    data moves, and a difference is a Mismatch on all of them. Until its Work is done, an operation's tensors must
    not be used, and two operations under way must not share memory that one of them writes.
    """

    deterministic = True  # for operations that do not say it themselves

    @property
    @abstractmethod
    def rank(self) -> int:
        """This member's position, 0 to size-1."""

    @property
    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def _submit(self, operation: Operation) -> Work: ...

    def _view_in_use(self) -> object:
        """What ranks are of; None where that cannot change."""
        return None

    def subgroup(self, ranks: Sequence[int], name: str = "") -> Subgroup:
        """The members `ranks`, of which this is one; see subgroups.py. Sends nothing.

        Its members name the same ranks, in the same order, which is that of its own ranks. Of two subgroups with
        the same ranks only the name tells their operations apart.
        """
        from everstep.collectives.subgroups import Subgroup  # which is a Collectives

        return Subgroup(self, ranks, name)

    def grid(self, *, data: int = 1, tensor: int = 1, pipeline: int = 1) -> Grid:
        """All members on three axes, the last one of pipeline, data, tensor being the fastest; see Grid."""
        from everstep.collectives.subgroups import grid_of

        return grid_of(self, data, tensor, pipeline)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: str = "sum",
        tag: int = 0,
        quantize: str | None = None,
        deterministic: bool | None = None,
        feedback: ErrorFeedback | None = None,
    ) -> Work:
        """Combines all members' tensors, in place. op: sum | avg | max | min, in the order of [Note: rank tree].

        `deterministic` False (default: the group's) lets sums of floats be of another order where that is faster; all
        members still get the same bits.

        `quantize` "minmax8" | "zeropoint8" sends 8 bit codes of float32, bfloat16 or float16 sums and averages, about
        a quarter of float32's bytes, always in one order. |result - exact| <= D + 0.501 / 255 (the sum's range + 2 D)
        in each block of 1,024 elements, D = 0.501 / 255 of the sum of the members' ranges in it (and roundings:
        quantisation.error_bound, docs/groups.md). A block in which anybody has a NaN or an infinity, or whose sum
        overflows, becomes all NaN, on all members. `feedback` carries what was lost over to the next call.
        """
        kind = "all_reduce"
        check_tensor(kind, "tensor", tensor, written=True)
        if quantize is not None or feedback is not None:
            arguments.check_quantize(kind, quantize, op, tensor, feedback)
        check_op(kind, op, tensor)
        check_tag(kind, tag)
        flat, copies = flat_of(tensor)
        match = (op, *_form(tensor))
        if quantize is not None:
            residual = None if feedback is None else feedback.of(flat.numel())
            lost = None if residual is None else torch.empty_like(residual)
            made = quantised(op, flat, quantize, residual, lost)
            writes: Sequence[torch.Tensor] = (tensor,)
            if residual is not None and lost is not None:  # undone with the tensor, and written when all is well
                writes, copies = (tensor, residual), (*copies, (residual, lost))
            small = fits(flat.numel(), quantize)
            return self._submit(Operation(kind, (*match, f"quantize={quantize}"), tag, made, writes, small, copies))
        return self._submit(
            Operation(
                kind,
                match,
                tag,
                build.all_reduce(op, flat, self.deterministic if deterministic is None else deterministic),
                (tensor,),
                is_small(flat),
                copies,
            )
        )

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, op: str = "sum", tag: int = 0) -> Work:
        """Combines all members' `tensor` and leaves part `rank` of it, of size equal parts, in `output`.

        `output` may be that part of `tensor`.
        """
        kind = "reduce_scatter"
        arguments.check_same_dtype(kind, output, tensor)
        arguments.check_parts(kind, tensor, self.size)
        arguments.check_elements(kind, output, tensor.numel() // self.size, f"one of {self.size} parts of tensor")
        check_op(kind, op, tensor)
        check_tag(kind, tag)
        out, copies = flat_of(output)
        flat = apart(flat_of(tensor)[0], out, self.rank * out.numel())
        made = build.reduce_scatter(op, flat, out)
        return self._submit(Operation(kind, (op, *_form(tensor)), tag, made, (output,), is_small(flat), copies))

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor, tag: int = 0) -> Work:
        """Leaves all members' `tensor` in `output`, by rank; `tensor` may be its own part of `output`."""
        kind = "all_gather"
        arguments.check_same_dtype(kind, output, tensor)
        arguments.check_elements(kind, output, tensor.numel() * self.size, f"{self.size} times those of tensor")
        check_tag(kind, tag)
        out, copies = flat_of(output)
        flat = apart(flat_of(tensor)[0], out, self.rank * tensor.numel())
        made = build.all_gather(flat, out)
        return self._submit(Operation(kind, _form(tensor), tag, made, (output,), is_small(flat), copies))

    def all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, tag: int = 0) -> Work:
        """Sends part r of `tensor` to rank r and leaves the part that rank s sent as part s of `output`."""
        kind = "all_to_all"
        arguments.check_same_dtype(kind, output, tensor)
        arguments.check_parts(kind, tensor, self.size)
        arguments.check_elements(kind, output, tensor.numel(), "as tensor")
        check_tag(kind, tag)
        out, copies = flat_of(output)
        flat = apart(flat_of(tensor)[0], out)
        made = build.all_to_all(flat, out)
        return self._submit(Operation(kind, _form(tensor), tag, made, (output,), is_small(flat), copies))

    def broadcast(self, tensor: torch.Tensor, root: int = 0, tag: int = 0) -> Work:
        """Everybody's `tensor` becomes the root's, in place."""
        kind = "broadcast"
        check_rank(kind, "root", root, self.size)
        mine = root == self.rank
        check_tensor(kind, "tensor", tensor, written=not mine)
        check_tag(kind, tag)
        flat, copies = flat_of(tensor)
        made, match = build.broadcast(flat, root), (*_form(tensor), root)
        writes: Sequence[torch.Tensor] = () if mine else (tensor,)
        return self._submit(Operation(kind, match, tag, made, writes, is_small(flat), () if mine else copies))

    def barrier(self, tag: int = 0) -> Work:
        """Is done when every member has come to it."""
        check_tag("barrier", tag)
        return self._submit(Operation("barrier", (), tag, build.barrier, (), True))

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> Work:
        """To the `recv` of rank `to` with the same tag; is done when that has begun and all data has left."""
        self._check_peer("send", "to", to)
        check_tensor("send", "tensor", tensor)
        check_tag("send", tag)
        flat, _ = flat_of(tensor)
        made, ranks = build.pair(flat, sending=True), (self.rank, to)
        return self._submit(
            Operation("send/recv", _form(tensor), tag, made, (), is_small(flat), (), SENDER, to, ranks)
        )

    def recv(self, tensor: torch.Tensor, source: int, tag: int = 0) -> Work:
        """From the `send` of rank `source` with the same tag, into `tensor` of the same shape and dtype."""
        self._check_peer("recv", "source", source)
        check_tensor("recv", "tensor", tensor, written=True)
        check_tag("recv", tag)
        flat, copies = flat_of(tensor)
        made, ranks = build.pair(flat, sending=False), (source, self.rank)
        return self._submit(
            Operation(
                "send/recv", _form(tensor), tag, made, (tensor,), is_small(flat), copies, RECEIVER, source, ranks
            )
        )

    def _check_peer(self, kind: str, argument: str, peer: int) -> None:
        check_rank(kind, argument, peer, self.size)
        if peer == self.rank:
            raise ValueError(f"{kind}: {argument} is {peer}, this rank itself; another rank is allowed")


def _form(tensor: torch.Tensor) -> tuple[str, list[int]]:
    return arguments.name_of(tensor.dtype), list(tensor.shape)


def _words(match: Sequence[Any]) -> str:
    kind, *rest = match
    return f"{kind}({', '.join(str(part) for part in rest)})"


__all__ = ["Collectives", "Operation"]

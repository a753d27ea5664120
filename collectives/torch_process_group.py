"""The ProcessGroup that torch.distributed calls: its operations in terms of a group's.

    torch                                    the group
    allreduce, reduce, broadcast, barrier    the same; of reduce only the root keeps the result
    allgather (list, single)                 all_gather; a broadcast from each rank where sizes differ
    reduce_scatter (list, single)            reduce_scatter
    alltoall (list, single), gather, scatter one send/recv a pair, in a scope of their own
    send, recv                               the same, by tag

Tensors are handed over flat, so that shapes may differ as they may for Gloo. What is contiguous is not copied.
Torch 2.13 calls `all_gather_single` and the like by these names, releases before it by the names at the end.
Thread-safety: as torch asks; operations are matched in the order in which each member begins them.
"""

# torch's stubs overload each method for its own C++ callers; Python subclasses get the form with options only.
# mypy: disable-error-code="override, misc, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from everstep.collectives.arguments import FLOATS, INTEGERS, name_of
from everstep.collectives.operations import Collectives
from everstep.collectives.subgroups import Subgroup
from everstep.collectives.torch_work import Completer, TorchWork
from everstep.collectives.work import Work

Tensors = list[torch.Tensor]
_OPS = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.MIN: "min",
}
_DTYPES = (*FLOATS, *INTEGERS, torch.bool)


class EverstepProcessGroup(dist.ProcessGroup):
    """`members`: the ranks of this process group, in its order. `on_shutdown` ends what is underneath, if owned."""

    def __init__(
        self, members: Collectives, name: str, timeout: timedelta, on_shutdown: Callable[[bool], None]
    ) -> None:
        super().__init__(members.rank, members.size)  # type: ignore[call-arg]  # the stubs know another form
        self.members = members
        # Their sends and receives are not to meet those of the caller.
        self._pairs = Subgroup(members, range(members.size), "pairs")
        self._name, self._desc = name, "undefined"
        self._timeout_s = timeout.total_seconds()
        self._on_shutdown = on_shutdown
        self._completer = Completer(name)
        self._coalesced: list[TorchWork] | None = None

    # ---- reductions --------------------------------------------------------------------------------------

    def allreduce(self, tensors: Tensors, opts: Any = None) -> TorchWork:
        """In place; sum, avg, max or min."""
        call, op = _Call("all_reduce"), _op("all_reduce", opts)
        for tensor in tensors:
            call.works.append(self.members.all_reduce(call.writes(tensor), op))
        return self._begin(call, tensors, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> TorchWork:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Tensors, opts: Any = None) -> TorchWork:
        """An all_reduce that only the root sees."""
        call, op = _Call("reduce"), _op("reduce", opts)
        tensor = _only("reduce", tensors)
        flat = call.writes(tensor) if opts.rootRank == self.rank() else call.reads(tensor).clone()
        call.works.append(self.members.all_reduce(flat, op))
        return self._begin(call, tensors, opts)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> TorchWork:
        call, op = _Call("reduce_scatter"), _op("reduce_scatter", opts)
        for output, parts in zip(outputs, inputs, strict=True):
            _check_parts("reduce_scatter", parts, self.size(), output.numel())
            row = torch.cat([call.reads(part) for part in parts])
            call.works.append(self.members.reduce_scatter(call.writes(output), row, op))
        return self._begin(call, outputs, opts)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> TorchWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> TorchWork:
        call, op = _Call("reduce_scatter_single"), _op("reduce_scatter_single", opts)
        for output, tensor in zip(outputs, inputs, strict=True):
            flat = call.reads(tensor)
            call.works.append(self.members.reduce_scatter(call.writes(output), flat, op))
        return self._begin(call, outputs, opts)

    # ---- copies to all -------------------------------------------------------------------------------------

    def broadcast(self, tensors: Tensors, opts: Any = None) -> TorchWork:
        call = _Call("broadcast")
        root = int(opts.rootRank) if opts is not None else 0
        for tensor in tensors:
            flat = call.reads(tensor) if root == self.rank() else call.writes(tensor)
            call.works.append(self.members.broadcast(flat, root))
        return self._begin(call, tensors, opts)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> TorchWork:
        call = _Call("all_gather")
        for parts, tensor in zip(outputs, inputs, strict=True):
            if len(parts) != self.size():
                raise ValueError(f"all_gather: {len(parts)} output tensors; one a rank, {self.size()}, is needed")
            if len({part.numel() for part in parts}) > 1:  # the same on all ranks, who all name all sizes
                self._gather_uneven(call, parts, tensor)
                continue
            flat = call.reads(tensor)
            row = flat.new_empty(flat.numel() * self.size())
            call.works.append(self.members.all_gather(row, flat))
            for part, found in zip(parts, row.chunk(self.size()), strict=False):
                call.copies_later(part, found)
        return self._begin(call, [part for parts in outputs for part in parts], opts)

    def _gather_uneven(self, call: _Call, parts: Tensors, tensor: torch.Tensor) -> None:
        _copy(parts[self.rank()], call.reads(tensor))
        for root, part in enumerate(parts):
            flat = call.reads(part) if root == self.rank() else call.writes(part)
            call.works.append(self.members.broadcast(flat, root))

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> TorchWork:
        """`outputs[rank][i]`, as torch has it here, is what that rank's `inputs[i]` goes to."""
        return self.allgather([list(parts) for parts in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> TorchWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> TorchWork:
        call = _Call("all_gather_single")
        for output, tensor in zip(outputs, inputs, strict=True):
            flat = call.reads(tensor)
            call.works.append(self.members.all_gather(call.writes(output), flat))
        return self._begin(call, outputs, opts)

    # ---- pair by pair ----------------------------------------------------------------------------------------

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        opts: Any = None,
    ) -> TorchWork:
        """Splits are of the first dimension, equal where none are given."""
        call = _Call("all_to_all_single")
        for tensor in (output, input):
            _check("all_to_all_single", tensor)
        into = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
        self._exchange(
            call,
            _split("all_to_all_single", "output", into, output_splits, self.size()),
            _split("all_to_all_single", "input", input.contiguous(), input_splits, self.size()),
        )
        if into is not output:
            call.copies_later(output, into)
        return self._begin(call, [output], opts)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> TorchWork:
        call = _Call("all_to_all")
        if not len(outputs) == len(inputs) == self.size():
            raise ValueError(
                f"all_to_all: {len(outputs)} output and {len(inputs)} input tensors; {self.size()} each are needed"
            )
        self._exchange(call, outputs, inputs)
        return self._begin(call, outputs, opts)

    def _exchange(self, call: _Call, outputs: Tensors, inputs: Tensors) -> None:
        rank, n = self.rank(), self.size()
        if outputs[rank].numel() != inputs[rank].numel():
            raise ValueError(
                f"{call.kind}: this rank's own part has {inputs[rank].numel()} elements in the input and "
                f"{outputs[rank].numel()} in the output; they must be equal"
            )
        # All are read before any is written to: they may share memory.
        flats = [call.reads(part) for part in inputs]
        own = flats[rank].clone()
        for step in range(1, n):
            call.works.append(self._pairs.send(flats[(rank + step) % n], (rank + step) % n))
        for step in range(1, n):
            call.works.append(self._pairs.recv(call.writes(outputs[(rank - step) % n]), (rank - step) % n))
        _copy(outputs[rank], own)

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> TorchWork:
        call, tensor, root = _Call("gather"), _only("gather", inputs), int(opts.rootRank)
        flat = call.reads(tensor)
        if root != self.rank():
            call.works.append(self._pairs.send(flat, root))
            return self._begin(call, inputs, opts)
        parts = outputs[0]
        if len(parts) != self.size():
            raise ValueError(f"gather: {len(parts)} output tensors; one a rank, {self.size()}, is needed")
        _copy(parts[root], flat)
        for rank, part in enumerate(parts):
            if rank != root:
                call.works.append(self._pairs.recv(call.writes(part), rank))
        return self._begin(call, parts, opts)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> TorchWork:
        call, output, root = _Call("scatter"), _only("scatter", outputs), int(opts.rootRank)
        if root != self.rank():
            call.works.append(self._pairs.recv(call.writes(output), root))
            return self._begin(call, outputs, opts)
        parts = inputs[0]
        _check_parts("scatter", parts, self.size(), output.numel())
        for rank, part in enumerate(parts):
            if rank != root:
                call.works.append(self._pairs.send(call.reads(part), rank))
        _copy(output, call.reads(parts[root]))
        return self._begin(call, outputs, opts)

    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> TorchWork:
        call = _Call("send")
        call.works.append(self.members.send(call.reads(_only("send", tensors)), dst, tag))
        return self._begin(call, tensors, None)

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> TorchWork:
        call = _Call("recv")
        call.works.append(self.members.recv(call.writes(_only("recv", tensors)), src, tag))
        return self._begin(call, tensors, None)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> TorchWork:
        raise NotImplementedError("everstep: recv without src is not supported; name src, one recv a sender")

    def barrier(self, opts: Any = None) -> TorchWork:
        call = _Call("barrier")
        call.works.append(self.members.barrier())
        return self._begin(call, [], opts)

    def monitored_barrier(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("everstep: monitored_barrier is not supported; barrier names who is missing, too")

    # ---- several at once ---------------------------------------------------------------------------------------

    def _start_coalescing(self, device: Any = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> TorchWork:
        begun, self._coalesced = self._coalesced or [], None
        works = [work for one in begun for work in one._works]
        after = [copy for one in begun for copy in one._after]
        result = [tensor for one in begun for tensor in one.value()]
        return TorchWork(works, after, result, self._timeout_s, self._completer)

    def _begin(self, call: _Call, result: Tensors, opts: Any) -> TorchWork:
        asked = getattr(opts, "timeout", None)  # negative where none was named
        asked_s = asked.total_seconds() if asked is not None else -1.0
        limit_s = asked_s if asked_s > 0 else self._timeout_s
        work = TorchWork(call.works, call.after, result, limit_s, self._completer)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    # ---- what torch asks of a process group --------------------------------------------------------------------

    def getBackendName(self) -> str:
        return "everstep"

    def _get_backend_name(self) -> str:
        return "everstep"

    def name(self) -> str:
        return "everstep"

    # DeviceMesh and the functional collectives find a group by its name; C++ asks the second form.
    @property
    def group_name(self) -> str:
        return self._name

    def getGroupName(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._desc

    def getGroupDesc(self) -> str:
        return self._desc

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def shutdown(self) -> None:
        """By destroy_process_group. Waits a moment for the other ranks to come to it."""
        self._on_shutdown(True)
        self._completer.close()

    def abort(self) -> None:
        """At once: pending operations raise PeerLost, here and on the other ranks."""
        self._on_shutdown(False)
        self._completer.close()

    # ---- as releases before 2.13 call them ---------------------------------------------------------------------

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


class _Call:
    """What one call of torch begins: operations, and copies to make when they are done."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.works: list[Work] = []
        self.after: list[Callable[[], object]] = []

    def reads(self, tensor: torch.Tensor) -> torch.Tensor:
        _check(self.kind, tensor)
        return tensor.detach().contiguous().view(-1)

    def writes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its elements in one row; also their present values."""
        flat = self.reads(tensor)
        if not tensor.is_contiguous():
            self.copies_later(tensor, flat)
        return flat

    def copies_later(self, tensor: torch.Tensor, found: torch.Tensor) -> None:
        self.after.append(lambda: _copy(tensor, found))


def _copy(tensor: torch.Tensor, found: torch.Tensor) -> None:
    if tensor.numel() != found.numel():
        raise ValueError(f"an output has {tensor.numel()} elements; it must have {found.numel()}")
    tensor.detach().copy_(found.view(tensor.shape))


def _check(kind: str, tensor: torch.Tensor) -> None:
    """Raises ValueError with what to do instead."""
    if tensor.layout != torch.strided:
        why, instead = f"a tensor of layout {tensor.layout}", "tensor.to_dense()"
    elif tensor.device.type != "cpu":
        why = f"a tensor on {tensor.device}"
        instead = "a CPU tensor, or a group of its own for devices: dist.new_group(backend='nccl')"
    elif tensor.is_complex():
        why, instead = f"a tensor of {name_of(tensor.dtype)}", "torch.view_as_real(tensor)"
    elif tensor.dtype not in _DTYPES:
        why = f"a tensor of {name_of(tensor.dtype)}"
        instead = f"tensor.view(torch.uint8) to copy it; dtypes are {', '.join(map(name_of, _DTYPES))}"
    else:
        return
    raise ValueError(f"everstep: {kind} of {why} is not supported; use {instead}")


def _op(kind: str, opts: Any) -> str:
    asked = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
    for known, name in _OPS.items():
        if asked == known:
            return name
    name = str(getattr(asked, "op", asked)).rpartition(".")[2]
    instead = {
        "PRODUCT": "all_gather and torch.prod",
        "BAND": "all_gather and torch.bitwise_and, or MIN for flags",
        "BOR": "all_gather and torch.bitwise_or, or MAX for flags",
        "BXOR": "all_gather and torch.bitwise_xor",
        "PREMUL_SUM": "tensor.mul_(factor) and SUM",
    }.get(name, "SUM, AVG, MAX or MIN")
    raise ValueError(f"everstep: {kind} with ReduceOp.{name} is not supported; use {instead}")


def _only(kind: str, tensors: Tensors) -> torch.Tensor:
    if len(tensors) != 1:
        raise ValueError(f"everstep: {kind} of {len(tensors)} tensors is not supported; use one call for each")
    return tensors[0]


def _check_parts(kind: str, parts: Tensors, size: int, elements: int) -> None:
    sizes = [part.numel() for part in parts]
    if sizes != [elements] * size:
        raise ValueError(
            f"{kind}: input tensors of {sizes} elements; {size} of {elements}, as the output, are needed"
        )


def _split(kind: str, which: str, tensor: torch.Tensor, sizes: Sequence[int] | None, n: int) -> Tensors:
    if not sizes:
        length = tensor.shape[0] if tensor.dim() else 0
        if length % n:
            raise ValueError(f"{kind}: {which} has {length} rows; {n} equal parts are needed, or {which}_split_sizes")
        sizes = [length // n] * n
    if len(sizes) != n or sum(sizes) != tensor.shape[0]:
        raise ValueError(
            f"{kind}: {which}_split_sizes are {list(sizes)}; {n} that add up to {tensor.shape[0]} are needed"
        )
    return list(torch.split(tensor, list(sizes)))

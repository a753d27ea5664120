"""What the operations accept: every refusal names the operation, the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from everstep.collectives.algorithms.reduction import COMBINE
from everstep.collectives.feedback import ErrorFeedback
from everstep.collectives.quantisation import CODECS
from everstep.collectives.quantisation import FLOATS as CODED

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ANY = (*FLOATS, *INTEGERS, torch.bool)
_MAX_DIMENSIONS = 64  # more cannot be described in an OPEN
Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (tensor, contiguous copy that stands for it)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(kind: str, argument: str, tensor: torch.Tensor, written: bool = False) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{kind}: {argument} is a {type(tensor).__name__}; a torch.Tensor is needed")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{kind}: {argument} is on {tensor.device} ({tensor.layout}); dense CPU tensors are allowed")
    if tensor.dtype not in _ANY:
        allowed = ", ".join(map(name_of, _ANY))
        raise ValueError(f"{kind}: {argument} is of {name_of(tensor.dtype)}; allowed are {allowed}")
    if tensor.dim() > _MAX_DIMENSIONS:
        raise ValueError(f"{kind}: {argument} has {tensor.dim()} dimensions; {_MAX_DIMENSIONS} are allowed")
    if written and any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(
            f"{kind}: {argument} is expanded (strides {tensor.stride()}) and is written to; "
            "every element must have memory of its own"
        )


def check_same_dtype(kind: str, output: torch.Tensor, tensor: torch.Tensor) -> None:
    check_tensor(kind, "output", output, written=True)
    check_tensor(kind, "tensor", tensor)
    if output.dtype != tensor.dtype:
        raise ValueError(
            f"{kind}: output is of {name_of(output.dtype)} and tensor of {name_of(tensor.dtype)}; "
            "they must be the same"
        )


def check_elements(kind: str, output: torch.Tensor, wanted: int, why: str) -> None:
    if output.numel() != wanted:
        raise ValueError(f"{kind}: output has {output.numel()} elements; it must have {wanted}, {why}")


def check_parts(kind: str, tensor: torch.Tensor, size: int) -> None:
    if tensor.numel() % size:
        raise ValueError(f"{kind}: tensor has {tensor.numel()} elements; {size} equal parts are needed")


def check_op(kind: str, op: str, tensor: torch.Tensor) -> None:
    if not isinstance(op, str) or op not in COMBINE:
        raise ValueError(f"{kind}: op is {op!r}; allowed are {', '.join(COMBINE)}")
    if tensor.dtype == torch.bool or (op == "avg" and tensor.dtype in INTEGERS):
        allowed = FLOATS if op == "avg" else (*FLOATS, *INTEGERS)
        raise ValueError(
            f"{kind}: tensor is of {name_of(tensor.dtype)}; allowed with op {op!r} are "
            f"{', '.join(map(name_of, allowed))}"
        )


def check_quantize(
    kind: str, quantize: str | None, op: str, tensor: torch.Tensor, feedback: ErrorFeedback | None
) -> None:
    schemes = ", ".join(CODECS)
    if quantize is None:
        raise ValueError(f"{kind}: feedback is for quantize {schemes}, and quantize is None; leave feedback out")
    if not isinstance(quantize, str) or quantize not in CODECS:
        raise ValueError(f"{kind}: quantize is {quantize!r}; allowed are None, {schemes}")
    if op not in ("sum", "avg"):
        raise ValueError(f"{kind}: op is {op!r} with quantize {quantize!r}; allowed are sum, avg; others with None")
    if tensor.dtype not in CODED:
        raise ValueError(
            f"{kind}: tensor is of {name_of(tensor.dtype)} with quantize {quantize!r}; allowed are "
            f"{', '.join(map(name_of, CODED))}; convert it first (tensor.float()), or reduce it with quantize None"
        )
    if feedback is not None and not isinstance(feedback, ErrorFeedback):
        raise TypeError(f"{kind}: feedback is a {type(feedback).__name__}; an ErrorFeedback is needed")


def check_rank(kind: str, argument: str, rank: int, size: int) -> None:
    if not is_integer(rank):
        raise TypeError(f"{kind}: {argument} is {rank!r}; a rank, 0 to {size - 1}, is needed")
    if not 0 <= rank < size:
        raise ValueError(f"{kind}: {argument} is {rank}; ranks are 0 to {size - 1}")


def check_tag(kind: str, tag: int) -> None:
    if not is_integer(tag):
        raise TypeError(f"{kind}: tag is {tag!r}; an integer is needed")
    if not -(1 << 63) <= tag < 1 << 63:
        raise ValueError(f"{kind}: tag is {tag}; it must fit in 64 bits, signed")


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---- as one row -----------------------------------------------------------------------------------------


def flat_of(tensor: torch.Tensor) -> tuple[torch.Tensor, Copies]:
    """Its elements in one row, and what is to be copied back at the end where that is a copy."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), ()
    copy = tensor.contiguous().view(-1)
    return copy, ((tensor, copy),)


def apart(flat: torch.Tensor, output: torch.Tensor, in_place_at: int = -1) -> torch.Tensor:
    """`flat`, or a copy where writing `output` would change it.

    `in_place_at`: the element of the longer of the two at which the shorter one may begin.
    """
    short, long = sorted((flat, output), key=torch.Tensor.numel)
    begin, other = short.data_ptr(), long.data_ptr()
    if begin + short.nbytes <= other or other + long.nbytes <= begin:
        return flat
    if in_place_at >= 0 and begin == other + in_place_at * long.element_size():
        return flat
    return flat.clone()

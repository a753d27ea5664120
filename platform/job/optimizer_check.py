"""Whether an optimizer's work can be cut over ranks, and what it keeps for a tensor: asked before the start.

| optimizer                                   | cut                                        |
|---------------------------------------------|--------------------------------------------|
| the engine's `ELEMENTWISE`, exactly these   | anywhere on block boundaries ("blocks")    |
| any other that treats each tensor alone     | by whole tensors ("tensors")               |
| needs a closure, sparse, or mixes tensors   | refused                                    |

A subclass of a known class is cut by whole tensors: what it adds is unknown. Whether an unknown class mixes
tensors is found out by trying: two small tensors stepped together and apart must give equal bits.

Imports torch: only for processes that may. Thread-safety: pure, besides the optimizer's own code.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from typing import Any, Literal

import torch
from torch import optim

from everstep.platform.training.optimizers import ELEMENTWISE, is_elementwise

Cut = Literal["blocks", "tensors"]

CUTTABLE = ", ".join(sorted(c.__name__ for c in ELEMENTWISE)) + ", or one that treats each tensor alone"

# Distinct sizes, so that a state tensor's dimensions can be told apart and scaled to the real tensor's.
_DUMMY_SIZES = (3, 5, 7, 11, 13, 17, 19, 23)
_TRIAL_STEPS = 3


def cut_of(optimizer: optim.Optimizer) -> Cut:
    """How this optimizer may be cut, for one that `refusal` does not refuse."""
    return "blocks" if is_elementwise(optimizer) else "tensors"


def refusal(optimizer: optim.Optimizer) -> str:
    """Why this optimizer cannot be cut over ranks, or "" when it can. Steps small tensors of its own."""
    if isinstance(optimizer, optim.LBFGS):
        return "LBFGS works on all parameters as one vector and calls the loss again inside its step"
    if isinstance(optimizer, optim.SparseAdam):
        return "SparseAdam needs sparse gradients"
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "its step needs a closure that computes the loss again"
    try:
        if not is_elementwise(optimizer) and _mixes(optimizer):
            return "it mixes tensors: its result for one depends on the others"
        for group in optimizer.param_groups:
            for dims in sorted({p.dim() for p in group["params"]}):
                stepped = _step(optimizer, group, [_dummy(dims, 0)], 1)
                for kind, value in _kept(stepped).items():
                    if not isinstance(value, torch.Tensor | bool | int | float):
                        return f"its state {kind!r} is a {type(value).__name__}, which no snapshot can hold"
    except Exception as error:
        return f"its step fails on a small tensor: {type(error).__name__}: {error}"
    return ""


def state_bytes(optimizer: optim.Optimizer) -> int:
    """Bytes that the optimizer will keep for its parameters, learnt from a step on small tensors."""
    total = 0
    for group in optimizer.param_groups:
        kinds: dict[int, list[Any]] = {}
        for param in group["params"]:
            if param.dim() not in kinds:
                stepped = _step(optimizer, group, [_dummy(param.dim(), 0)], 1)
                kinds[param.dim()] = list(_kept(stepped).values())
            total += sum(_scaled_bytes(value, param) for value in kinds[param.dim()])
    return total


def _kept(stepped: optim.Optimizer) -> dict[str, Any]:
    """What a twin keeps for its first parameter, by name."""
    state: dict[str, Any] = next(iter(stepped.state.values()), {})
    return {kind: value for kind, value in state.items() if value is not None}


def _scaled_bytes(kept: Any, param: torch.Tensor) -> int:
    if not isinstance(kept, torch.Tensor):
        return 8  # a number is kept as int64 or float64
    real = dict(zip(_DUMMY_SIZES, param.shape, strict=False))
    count = 1
    for size in kept.shape:
        count *= real.get(size, size)
    return count * kept.element_size()


def _dummy(dims: int, seed: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    shape = [_DUMMY_SIZES[i % len(_DUMMY_SIZES)] for i in range(dims)]
    return torch.nn.Parameter(torch.randn(shape, generator=generator))


def _step(
    optimizer: optim.Optimizer, group: dict[str, Any], params: list[torch.nn.Parameter], steps: int
) -> optim.Optimizer:
    """Steps other parameters with a twin of the optimizer: same class and options, fresh state."""
    twin: optim.Optimizer = object.__new__(type(optimizer))
    own = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    vars(twin).update(copy.deepcopy(own))
    twin.state = defaultdict(dict)
    options = {k: v for k, v in group.items() if k != "params"}
    twin.param_groups = [{**copy.deepcopy(options), "params": params}]
    for step in range(steps):
        for index, param in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * step + 10 * param.numel() + index)
            param.grad = torch.randn(param.shape, generator=generator) * (index + 1)
        twin.step()
    return twin


def _mixes(optimizer: optim.Optimizer) -> bool:
    for group in optimizer.param_groups:
        for dims in sorted({p.dim() for p in group["params"]}):
            together = [_dummy(dims, 1), _dummy(dims, 2)]
            alone = [_dummy(dims, 1)]
            _step(optimizer, group, together, _TRIAL_STEPS)
            _step(optimizer, group, alone, _TRIAL_STEPS)
            if not torch.equal(together[0].view(torch.int32), alone[0].view(torch.int32)):
                return True
    return False

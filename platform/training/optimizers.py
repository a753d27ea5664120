"""A task's optimizers, made to work on pieces of tensors.

Known element-wise optimizers are cut anywhere on block boundaries; any other by whole tensors; those that mix
tensors, or call back into the model, are refused. The user's own instances are used: their groups keep their
settings, and get pieces of the parameters instead of the parameters.

Belongs to the training thread.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from everstep.platform.training.layout import Piece
from everstep.storage.index import TensorMeta

Kinds = dict[str, TensorMeta]  # by kind, for one parameter

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.Rprop,
    torch.optim.ASGD,
)
REFUSED: tuple[type[torch.optim.Optimizer], ...] = (torch.optim.LBFGS, torch.optim.SparseAdam)
_DUMMY_ELEMENTS = 32


class UnsupportedOptimizer(ValueError):
    """An optimizer that cannot be cut over ranks; says which and what may be used."""


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises UnsupportedOptimizer for one that mixes tensors or needs a closure."""
    name = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if isinstance(optimizer, REFUSED) or needs_closure:
        why = (
            "its step calls the model again (closure)"
            if needs_closure
            else "it mixes tensors or needs sparse gradients"
        )
        allowed = ", ".join(cls.__name__ for cls in ELEMENTWISE)
        raise UnsupportedOptimizer(
            f"optimizer {name} cannot be cut over ranks: {why}; "
            f"use one of {allowed}, or one that treats each tensor by itself"
        )


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) in ELEMENTWISE


def group_of_names(
    optimizers: Sequence[torch.optim.Optimizer], params: Sequence[tuple[str, torch.nn.Parameter]]
) -> dict[str, tuple[int, int]]:
    """Parameter name → (optimizer, group). Raises UnsupportedOptimizer where a parameter has none or two."""
    names = {id(p): n for n, p in params}
    found: dict[str, tuple[int, int]] = {}
    for o, optimizer in enumerate(optimizers):
        check_optimizer(optimizer)
        for g, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    continue  # frozen, or not the model's: it gets no gradient
                if name in found:
                    raise UnsupportedOptimizer(f"parameter {name} is in two optimizers or groups")
                found[name] = (o, g)
    left = [n for n, _ in params if n not in found]
    if left:
        raise UnsupportedOptimizer(
            f"{len(left)} trainable parameters are in no optimizer, first {left[0]}; "
            "add them, or set requires_grad=False"
        )
    return found


class OptimizerSet:
    """The optimizers of one rank. `kinds[name]` are the state tensors that a parameter has once updated."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], params: Sequence[tuple[str, torch.nn.Parameter]]
    ) -> None:
        self._optimizers = list(optimizers)
        self._group = group_of_names(optimizers, params)
        self._base_lr = [[_number(g["lr"]) if "lr" in g else None for g in o.param_groups] for o in optimizers]
        for optimizer in self._optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["params"] = []
        self.kinds: dict[str, Kinds] = {}
        self._like: dict[tuple[str, str], bool] = {}
        learned: dict[tuple[int, int], dict[str, Any]] = {}
        for name, parameter in params:
            place = self._group[name]
            if self.cuttable(name):
                if place not in learned:
                    learned[place] = self._learn(place, torch.zeros(_DUMMY_ELEMENTS))
                dummy_shape: tuple[int, ...] = (_DUMMY_ELEMENTS,)
                state = learned[place]
            else:
                state, dummy_shape = self._learn(place, torch.zeros(parameter.shape)), tuple(parameter.shape)
            self.kinds[name] = self._describe(name, parameter, state, dummy_shape)
        self._tensors: dict[tuple[str, int], torch.Tensor] = {}

    def cuttable(self, name: str) -> bool:
        return is_elementwise(self._optimizers[self._group[name][0]])

    def metas(self, name: str) -> list[TensorMeta]:
        return list(self.kinds[name].values())

    def like_param(self, name: str, kind: str) -> bool:
        """Whether this state tensor is cut as its parameter is."""
        return self._like[(name, kind)]

    def attach(self, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> None:
        """From now on the optimizers work on these pieces, without state."""
        self._tensors = {(piece.tensor.name, piece.start): tensor for piece, tensor in pieces}
        self._pieces = [piece for piece, _ in pieces]
        for o, optimizer in enumerate(self._optimizers):
            optimizer.state.clear()
            for g, group in enumerate(optimizer.param_groups):
                group["params"] = [t for p, t in pieces if self._group[p.tensor.name] == (o, g)]

    def clear(self) -> None:
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def step(self, gradient: Callable[[Piece], torch.Tensor | None], factor: float) -> None:
        """One update with every learning rate multiplied by `factor`; pieces without gradient are left."""
        for piece in self._pieces:
            self._tensors[(piece.tensor.name, piece.start)].grad = gradient(piece)
        for optimizer, rates in zip(self._optimizers, self._base_lr, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if rate is not None:
                    group["lr"] = rate * factor
            if any(t.grad is not None for group in optimizer.param_groups for t in group["params"]):
                optimizer.step()
        for piece in self._pieces:
            self._tensors[(piece.tensor.name, piece.start)].grad = None

    def places(self, piece: Piece) -> Iterator[tuple[TensorMeta, int, int, torch.Tensor]]:
        """(meta, start, stop, flat tensor) of the state tensors of one held piece, by kind."""
        state = self._state_of(piece)
        for kind, meta in self.kinds[piece.tensor.name].items():
            value = state[kind]
            if not isinstance(value, torch.Tensor):
                value = torch.tensor(value, dtype=getattr(torch, meta.dtype))
            span = (piece.start, piece.stop) if self._like[(piece.tensor.name, kind)] else (0, meta.numel)
            yield meta, *span, value.reshape(-1)

    def put(self, piece: Piece, kind: str, fill: Callable[[torch.Tensor], None]) -> None:
        """Makes one state tensor of a held piece; `fill` writes its flat content."""
        meta = self.kinds[piece.tensor.name][kind]
        target = self._tensors[(piece.tensor.name, piece.start)]
        like = self._like[(piece.tensor.name, kind)]
        value = torch.empty(target.shape if like else meta.shape, dtype=getattr(torch, meta.dtype))
        fill(value.reshape(-1))
        self._state_of(piece)[kind] = value.item() if meta.python else value

    def _state_of(self, piece: Piece) -> dict[str, Any]:
        optimizer = self._optimizers[self._group[piece.tensor.name][0]]
        state: dict[str, Any] = optimizer.state[self._tensors[(piece.tensor.name, piece.start)]]
        return state

    def _learn(self, place: tuple[int, int], dummy: torch.Tensor) -> dict[str, Any]:
        """The state that one step leaves, found on a copy of the optimizer and a parameter of zeros."""
        trial = copy.deepcopy(self._optimizers[place[0]])
        dummy.grad = torch.zeros_like(dummy)
        trial.param_groups[place[1]]["params"] = [dummy]
        trial.step()
        return dict(trial.state[dummy])

    def _describe(
        self, name: str, parameter: torch.nn.Parameter, state: dict[str, Any], dummy_shape: tuple[int, ...]
    ) -> Kinds:
        kinds: Kinds = {}
        for kind in sorted(state):
            value = state[kind]
            if value is None:
                continue
            if isinstance(value, torch.Tensor):
                like = value.dim() > 0 and tuple(value.shape) == dummy_shape
                shape = tuple(parameter.shape) if like else tuple(value.shape)
                dtype = str(value.dtype).removeprefix("torch.")
                kinds[kind] = TensorMeta(name, kind, dtype, shape)
            elif isinstance(value, bool | int | float):
                like = False
                kinds[kind] = TensorMeta(name, kind, _python_dtype(value), (), python=True)
            else:
                what = type(value).__name__
                raise UnsupportedOptimizer(
                    f"state {kind!r} of {name} is a {what}; only tensors and numbers can be saved"
                )
            self._like[(name, kind)] = like
        return kinds


def state_bytes(kinds: Kinds) -> int:
    return sum(math.prod(meta.shape) * meta.itemsize for meta in kinds.values())


def _number(value: Any) -> float:
    return float(value)


def _python_dtype(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int64" if isinstance(value, int) else "float64"

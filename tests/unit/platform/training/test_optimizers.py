"""Optimizers on pieces of tensors: what they keep, and equal bits however the pieces are cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn, optim

from everstep.platform.training.layout import MIN_BLOCK, FlatLayout, Piece
from everstep.platform.training.optimizers import (
    ELEMENTWISE,
    OptimizerSet,
    UnsupportedOptimizer,
    group_of_names,
    state_bytes,
)

Params = list[tuple[str, nn.Parameter]]
Make = Callable[[Any], optim.Optimizer]


def params(**shapes: tuple[int, ...]) -> Params:
    generator = torch.Generator().manual_seed(7)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def kinds_of(optimizer: optim.Optimizer, named: Params, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {kind: (m.dtype, m.shape) for kind, m in OptimizerSet([optimizer], named).kinds[name].items()}


# ---- what is learned ------------------------------------------------------------------------------------

F32, SCALAR = "float32", ("float32", ())
W = (F32, (40, 3))
LEARNED: dict[str, tuple[Make, dict[str, tuple[str, tuple[int, ...]]]]] = {
    "SGD": (lambda p: optim.SGD(p, lr=0.1), {}),
    "momentum": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer": W}),
    "AdamW": (lambda p: optim.AdamW(p), {"exp_avg": W, "exp_avg_sq": W, "step": SCALAR}),
    "amsgrad": (
        lambda p: optim.AdamW(p, amsgrad=True),
        {"exp_avg": W, "exp_avg_sq": W, "max_exp_avg_sq": W, "step": SCALAR},
    ),
    "Adagrad": (lambda p: optim.Adagrad(p), {"sum": W, "step": SCALAR}),
    "RMSprop": (
        lambda p: optim.RMSprop(p, momentum=0.5, centered=True),
        {"square_avg": W, "momentum_buffer": W, "grad_avg": W, "step": SCALAR},
    ),
    "Adadelta": (lambda p: optim.Adadelta(p), {"acc_delta": W, "square_avg": W, "step": SCALAR}),
    "Adafactor": (
        lambda p: optim.Adafactor(p),
        {"col_var": (F32, (1, 3)), "row_var": (F32, (40, 1)), "step": SCALAR},
    ),
}


@pytest.mark.parametrize("which", LEARNED)
def test_the_state_of_an_optimizer_is_learned_with_the_parameters_shape(which: str) -> None:
    make, expected = LEARNED[which]
    named = params(w=(40, 3))
    assert kinds_of(make([p for _, p in named]), named, "w") == expected


def test_learning_leaves_no_trace_in_the_optimizer() -> None:
    named = params(w=(40, 3), v=(5,))
    optimizer = optim.Adagrad([p for _, p in named], initial_accumulator_value=0.5)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    found = OptimizerSet([optimizer], named)
    assert not optimizer.state
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before
    assert state_bytes(found.kinds["w"]) == 40 * 3 * 4 + 4


def test_only_tensors_of_the_parameters_shape_are_cut_as_it_is() -> None:
    named = params(w=(40, 3), one=(1,), nothing=())
    found = OptimizerSet([optim.AdamW([p for _, p in named])], named)
    for name in ("w", "one", "nothing"):
        assert found.like_param(name, "exp_avg")
        assert not found.like_param(name, "step")
    whole = OptimizerSet([optim.Adafactor([p for _, p in named])], named)
    assert not whole.like_param("w", "row_var")
    assert [whole.cuttable("w"), found.cuttable("w")] == [False, True]


class CountsInPython(optim.SGD):
    """Keeps Python numbers, as older optimizers do."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                state["scale"] = state.get("scale", 1.0) / 3
                state["warm"] = True
                p.data.add_(p.grad, alpha=-state["scale"])


def test_python_numbers_keep_their_type() -> None:
    named = params(w=(4,))
    found = OptimizerSet([CountsInPython([named[0][1]], lr=0.1)], named)
    assert {(m.kind, m.dtype, m.python) for m in found.metas("w")} == {
        ("steps", "int64", True),
        ("scale", "float64", True),
        ("warm", "bool", True),
    }
    layout = FlatLayout.of([("w", (4,), True)])
    (piece,) = layout.pieces(layout.units)
    found.attach([(piece, named[0][1].detach().clone())])
    found.step(lambda _: torch.ones(4), 1.0)
    found.step(lambda _: torch.ones(4), 1.0)
    values = {meta.kind: flat.clone() for meta, _, _, flat in found.places(piece)}
    found.clear()
    for kind, value in values.items():
        found.put(piece, kind, lambda flat, value=value: flat.copy_(value))
    back = {meta.kind: flat.item() for meta, _, _, flat in found.places(piece)}
    assert back == {"steps": 2, "scale": 1 / 9, "warm": True}
    assert type(back["steps"]) is int


# ---- pieces and whole tensors ---------------------------------------------------------------------------

SETTINGS: dict[type[optim.Optimizer], list[dict[str, Any]]] = {
    optim.SGD: [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    optim.Adam: [{"weight_decay": 0.1}],
    optim.AdamW: [{"weight_decay": 0.1}, {"amsgrad": True}],
    optim.RMSprop: [{"momentum": 0.9, "centered": True}],
}
CASES = [(cls, options) for cls in ELEMENTWISE for options in SETTINGS.get(cls, [{}])]


def pieces_of(layout: FlatLayout, rng: random.Random) -> list[Piece]:
    """The layout's elements, cut at random block boundaries, as different ranks' runs would cut them."""
    runs: list[tuple[int, int]] = []
    found: list[Piece] = []
    for unit in layout.units:
        runs.append(unit)
        if rng.random() < 0.4:
            found += layout.pieces([(runs[0][0], runs[-1][1])])
            runs = []
    return found + (layout.pieces([(runs[0][0], runs[-1][1])]) if runs else [])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_pieces_get_the_bits_of_whole_tensors(cls: Any, options: dict[str, Any], threads: int) -> None:
    """Also with several threads, between which torch divides a large tensor."""
    rng = random.Random(11)
    named = params(w=(9, MIN_BLOCK + 5), b=(37,), s=())
    layout = FlatLayout.of([(name, tuple(p.shape), False) for name, p in named])
    whole = [p.detach().clone().requires_grad_() for _, p in named]
    reference = cls(whole, lr=0.01, **options)
    found = OptimizerSet([cls([p for _, p in named], lr=0.01, **options)], named)
    pieces = pieces_of(layout, rng)
    assert len(pieces) > len(named), "nothing was cut"
    flats = {name: p.detach().reshape(-1).clone() for name, p in named}
    found.attach([(piece, flats[piece.tensor.name][piece.start : piece.stop]) for piece in pieces])
    generator = torch.Generator().manual_seed(3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            scale = torch.randint(-20, 6, (layout.total,), generator=generator)
            gradient = torch.randn(layout.total, generator=generator) * 2.0**scale
            for (name, _), p in zip(named, whole, strict=True):
                tensor = layout.by_name[name]
                p.grad = gradient[tensor.start : tensor.stop].clone().view(tensor.shape)
            reference.step()
            found.step(lambda piece, g=gradient: g[piece.flat : piece.flat + piece.numel].clone(), 1.0)
    finally:
        torch.set_num_threads(before)
    for (name, start), p in zip(named, whole, strict=True):
        assert not torch.equal(p, start), "the optimizer did nothing"
        assert flats[name].numpy().tobytes() == p.detach().numpy().tobytes(), name
    by_name = {name: reference.state[p] for (name, _), p in zip(named, whole, strict=True)}
    for piece in pieces:
        for meta, start, stop, flat in found.places(piece):
            kept = by_name[meta.name][meta.kind]
            kept = kept if isinstance(kept, torch.Tensor) else torch.tensor(kept)
            expected = kept.reshape(-1)[start:stop]
            assert flat.numpy().tobytes() == expected.to(flat.dtype).numpy().tobytes(), (meta.name, meta.kind)


def test_a_piece_without_gradient_is_left_alone() -> None:
    named = params(w=(4,), v=(4,))
    layout = FlatLayout.of([(name, tuple(p.shape), False) for name, p in named])
    found = OptimizerSet([optim.AdamW([p for _, p in named], lr=0.1)], named)
    values = {piece.tensor.name: torch.ones(4) for piece in layout.pieces(layout.units)}
    found.attach([(piece, values[piece.tensor.name]) for piece in layout.pieces(layout.units)])
    found.step(lambda piece: torch.ones(4) if piece.tensor.name == "w" else None, 1.0)
    assert not torch.equal(values["w"], torch.ones(4))
    assert torch.equal(values["v"], torch.ones(4)), "not even weight decay"


def test_the_schedules_factor_multiplies_each_groups_own_rate() -> None:
    named = params(w=(4,), v=(4,))
    groups = [{"params": [named[0][1]], "lr": 1.0}, {"params": [named[1][1]], "lr": 0.25}]
    layout = FlatLayout.of([(name, (4,), False) for name, _ in named])
    found = OptimizerSet([optim.SGD(groups)], named)
    values = {piece.tensor.name: torch.zeros(4) for piece in layout.pieces(layout.units)}
    found.attach([(piece, values[piece.tensor.name]) for piece in layout.pieces(layout.units)])
    for factor in (0.5, 0.5, 1.0):
        found.step(lambda _: torch.ones(4), factor)
    assert values["w"].tolist() == [-2.0] * 4
    assert values["v"].tolist() == [-0.5] * 4


def test_several_optimizers_each_step_their_own_parameters() -> None:
    named = params(w=(4,), v=(4,))
    optimizers = [optim.SGD([named[0][1]], lr=1.0), optim.AdamW([named[1][1]], lr=1.0, weight_decay=0.0)]
    layout = FlatLayout.of([(name, (4,), False) for name, _ in named])
    found = OptimizerSet(optimizers, named)
    assert [set(found.kinds[name]) for name in ("w", "v")] == [set(), {"exp_avg", "exp_avg_sq", "step"}]
    values = {piece.tensor.name: torch.zeros(4) for piece in layout.pieces(layout.units)}
    found.attach([(piece, values[piece.tensor.name]) for piece in layout.pieces(layout.units)])
    found.step(lambda _: torch.full((4,), 3.0), 1.0)
    assert values["w"].tolist() == [-3.0] * 4
    assert values["v"].tolist() == pytest.approx([-1.0] * 4)


# ---- what is refused ------------------------------------------------------------------------------------


class NeedsClosure(optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class KeepsText(optim.SGD):
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["mood"] = "good"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: optim.LBFGS(p), "LBFGS cannot be cut over ranks: its step calls the model again"),
        (lambda p: optim.SparseAdam(p), "SparseAdam cannot be cut over ranks: it mixes tensors or needs sparse"),
        (lambda p: NeedsClosure(p, lr=0.1), "NeedsClosure cannot be cut over ranks: its step calls the model again"),
        (lambda p: KeepsText(p, lr=0.1), "state 'mood' of w is a str"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Make, why: str) -> None:
    named = params(w=(9, 7), v=(4,))
    with pytest.raises(UnsupportedOptimizer, match=why):
        OptimizerSet([make([p for _, p in named])], named)


def two(named: Params) -> Sequence[optim.Optimizer]:
    return [optim.SGD([named[0][1], named[1][1]], lr=0.1), optim.AdamW([named[1][1]])]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (two, "v is in two optimizers or groups"),
        (lambda n: [optim.SGD([n[0][1]], lr=0.1)], "1 trainable parameters are in no optimizer, first v"),
        (lambda n: [optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)], "2 trainable parameters .* first w"),
    ],
)
def test_every_parameter_has_exactly_one_group(make: Callable[[Params], Any], why: str) -> None:
    named = params(w=(4,), v=(4,))
    with pytest.raises(UnsupportedOptimizer, match=why):
        group_of_names(make(named), named)


def test_a_parameter_that_is_not_trained_may_stand_in_an_optimizer() -> None:
    named = params(w=(4,), v=(4,))
    optimizer = optim.SGD([{"params": [nn.Parameter(torch.ones(3))]}, {"params": [p for _, p in named]}], lr=0.1)
    assert group_of_names([optimizer], named) == {"w": (0, 1), "v": (0, 1)}

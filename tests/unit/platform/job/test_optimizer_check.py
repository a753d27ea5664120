"""Which optimizers are cut, how, and what they keep."""

from __future__ import annotations

import pytest
import torch

from everstep.platform.job.optimizer_check import cut_of, refusal, state_bytes
from everstep.platform.training.optimizers import ELEMENTWISE


def params(*shapes):
    with torch.device("meta"):
        return [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]


class MyAdam(torch.optim.Adam):
    """A subclass: it may do anything, so it is cut by whole tensors."""


class GlobalNorm(torch.optim.SGD):
    """Mixes tensors: scales by the norm over all of them."""

    def step(self, closure=None):
        every = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            p.grad.div_(norm)
        super().step()


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        closure()


class KeepsText(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["mood"] = "good"


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no such luck")


@pytest.mark.parametrize("kind", sorted(ELEMENTWISE, key=lambda c: c.__name__))
def test_known_optimizers_are_cut_into_blocks(kind):
    optimizer = kind(params((1000, 7), (33,), ()), lr=0.1)
    assert refusal(optimizer) == ""
    assert cut_of(optimizer) == "blocks"


def test_others_are_cut_by_whole_tensors():
    for optimizer in (
        MyAdam(params((9, 7))),
        torch.optim.Adafactor(params((9, 7), (3,))),
        torch.optim.Muon(params((9, 7))),
    ):
        assert refusal(optimizer) == ""
        assert cut_of(optimizer) == "tensors"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (torch.optim.LBFGS, "one vector"),
        (torch.optim.SparseAdam, "sparse gradients"),
        (NeedsClosure, "needs a closure"),
        (GlobalNorm, "mixes tensors"),
        (KeepsText, "state 'mood' is a str"),
        (Broken, "RuntimeError: no such luck"),
    ],
)
def test_what_cannot_be_cut_is_refused(kind, why):
    assert why in refusal(kind(params((9, 7), (5, 3)), lr=0.1))


def test_the_probe_leaves_the_optimizer_alone():
    optimizer = torch.optim.AdamW(params((9, 7)))
    before = optimizer.param_groups[0]["params"][0]
    refusal(optimizer)
    state_bytes(optimizer)
    assert optimizer.param_groups[0]["params"][0] is before
    assert not optimizer.state
    assert before.grad is None


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4 * 7033),
        (lambda p: torch.optim.AdamW(p), 8 * 7033 + 2 * 4),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12 * 7033 + 2 * 4),
        (lambda p: torch.optim.Adagrad(p), 4 * 7033 + 2 * 4),
    ],
)
def test_state_is_sized_without_making_it(make, expected):
    optimizer = make(params((1000, 7), (33,)))
    assert not optimizer.state or kept_on_meta(optimizer)
    assert state_bytes(optimizer) == expected


def kept_on_meta(optimizer):
    """Adagrad makes its state at once, but on the meta device it costs nothing."""
    return all(t.is_meta or t.numel() == 1 for s in optimizer.state.values() for t in s.values())


def test_factored_state_is_scaled_by_dimension():
    whole = torch.optim.Adafactor(params((1000, 700)))
    real = torch.optim.Adafactor([torch.nn.Parameter(torch.zeros(1000, 700))])
    real.param_groups[0]["params"][0].grad = torch.ones(1000, 700)
    real.step()
    kept = next(iter(real.state.values())).values()
    expected = sum(t.numel() * t.element_size() for t in kept if isinstance(t, torch.Tensor))
    assert state_bytes(whole) == expected

"""Randomness keyed by seed, step, lane, module and call, whatever was drawn before and whoever computes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from everstep.platform.training.randomness import KeyedRandomness
from everstep.platform.training.task import keyed_seed


class Noise(nn.Module):
    """Draws and keeps what it drew."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.drawn: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(self.size)
        self.drawn.append(noise.tolist())
        return x + noise.sum()


class Parent(nn.Module):
    """Draws before, between and after its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Noise(), Noise()
        self.own: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.own = [torch.rand(()).item()]
        x = self.first(x)
        self.own.append(torch.rand(()).item())
        x = self.second(x)
        self.own.append(torch.rand(()).item())
        return x


@pytest.fixture(autouse=True)
def generator_as_it_was() -> Iterator[None]:
    state = torch.default_generator.get_state()
    yield
    torch.default_generator.set_state(state)


def drawn(seed: int, key: str, call: int, count: int, step: int = 5, lane: int = 2) -> list[float]:
    generator = torch.Generator().manual_seed(keyed_seed(seed, step, lane, key, call))
    return torch.rand(count, generator=generator).tolist()


def test_each_module_draws_from_its_own_stream() -> None:
    model = Parent()
    keyed = KeyedRandomness(model, 9)
    torch.manual_seed(1234)
    keyed.begin(5, 2)
    model(torch.zeros(1))
    assert model.first.drawn == [drawn(9, "first", 0, 4)]
    assert model.second.drawn == [drawn(9, "second", 0, 4)]


def test_a_parent_goes_on_after_its_children_as_if_they_had_drawn_nothing() -> None:
    model = Parent()
    keyed = KeyedRandomness(model, 9)
    keyed.begin(5, 2)
    model(torch.zeros(1))
    assert model.own == drawn(9, "", 0, 3)
    small, model.first.size = model.own, 1000
    keyed.begin(5, 2)
    model(torch.zeros(1))
    assert model.own == small
    assert model.second.drawn[1] == model.second.drawn[0]


def test_functional_dropout_in_a_parent_does_not_follow_what_a_child_draws() -> None:
    class Dropping(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.child = Noise(size)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.child(x)
            return F.dropout(x, 0.5)

    masks = []
    for size in (1, 77):
        model = Dropping(size)
        KeyedRandomness(model, 1).begin(0, 0)
        masks.append(model(torch.ones(200)))
    assert torch.equal(*masks)
    assert 0 < masks[0].count_nonzero() < 200


def test_the_loss_draws_from_the_lanes_stream_whatever_the_model_drew() -> None:
    model = Parent()
    keyed = KeyedRandomness(model, 9)
    keyed.begin(5, 2)
    before = torch.rand(()).item()
    model(torch.zeros(1))
    assert [before, torch.rand(()).item()] == drawn(9, "<lane>", 0, 2)


def test_a_module_called_twice_in_a_lane_draws_differently_and_repeatably() -> None:
    model = nn.ModuleDict({"noise": Noise()})
    keyed = KeyedRandomness(model, 3)
    for _ in range(2):
        keyed.begin(5, 2)
        model["noise"](model["noise"](torch.zeros(1)))
    first, second, *again = model["noise"].drawn
    assert [first, second] == [drawn(3, "noise", 0, 4), drawn(3, "noise", 1, 4)]
    assert again == [first, second]
    assert first != second


def test_seed_step_and_lane_each_change_what_is_drawn() -> None:
    seen = []
    for seed, step, lane in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]:
        model = Noise()
        KeyedRandomness(model, seed).begin(step, lane)
        model(torch.zeros(1))
        seen.append(tuple(model.drawn[0]))
    assert len(set(seen)) == 5


def test_the_order_of_lanes_and_earlier_failures_do_not_matter() -> None:
    model = Parent()
    keyed = KeyedRandomness(model, 3)

    def lane(number: int) -> list[float]:
        keyed.begin(7, number)
        model(torch.zeros(1))
        return [*model.own, *model.first.drawn[-1], torch.rand(()).item()]

    in_order = {number: lane(number) for number in range(6)}
    for number in random.Random(1).sample(range(6), 6):
        with pytest.raises(TypeError):  # an attempt that breaks off inside a child
            model(None)
        assert lane(number) == in_order[number]


def test_an_error_in_a_child_leaves_its_parent_in_its_own_stream() -> None:
    class Tolerant(Parent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.own = [torch.rand(()).item()]
            with pytest.raises(TypeError):
                self.first(None)
            self.own.append(torch.rand(()).item())
            return x

    model = Tolerant()
    KeyedRandomness(model, 9).begin(5, 2)
    model(torch.zeros(1))
    assert model.own == drawn(9, "", 0, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.drop(torch.tanh(self.layer(x))), 0.2)


class Deep(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.how == "plain":
                x = block(x)
            else:
                # Without torch's own care for the random state: ours must do.
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant", preserve_rng_state=False)
        return x.square().sum()


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_activation_checkpointing_gives_equal_gradients(how: str) -> None:
    gradients = []
    for kind in ("plain", how):
        torch.manual_seed(2)
        model = Deep(kind)
        keyed = KeyedRandomness(model, 4)
        for lane in range(2):  # the second lane starts clean after the first one's backward
            keyed.begin(1, lane)
            model(torch.linspace(-1, 1, 16).requires_grad_()).backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert gradients[0].count_nonzero() > 0
    assert torch.equal(*gradients)


def test_after_remove_a_model_draws_as_it_did_before() -> None:
    model = Parent()
    keyed = KeyedRandomness(model, 4)
    keyed.begin(0, 0)
    keyed.remove()
    torch.manual_seed(6)
    model(torch.zeros(1))
    torch.manual_seed(6)
    expected = [torch.rand(()).item(), torch.rand(4).tolist()]
    assert [model.own[0], model.first.drawn[0]] == expected

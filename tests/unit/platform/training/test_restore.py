"""A rank's way to a view's base step, where its own memory is all that it needs."""

from __future__ import annotations

import torch
from torch import nn, optim

from everstep.platform.training.conductor import Seat
from everstep.platform.training.layout import MIN_BLOCK, Run
from everstep.platform.training.messages import ViewPlan
from everstep.platform.training.restore import restore
from everstep.platform.training.settings import Settings
from everstep.platform.training.shard import RankState
from everstep.platform.training.solo import Solo


def state_of(own: Run, mirrored: Run) -> RankState:
    model = nn.Linear(MIN_BLOCK, 2, bias=False)
    state = RankState(model, [optim.AdamW(model.parameters())])
    state.hold([own], [mirrored])
    state.reset()
    return state


def seat(state: RankState, owned: tuple[tuple[Run, ...], ...], shadowed: tuple[tuple[Run, ...], ...]) -> Seat:
    plan = ViewPlan(owned, state.live_index("solo"), shadowed=shadowed)
    return Seat("1.2", 0, state.stamp, plan, None, ("solo", "other"))


def test_where_nothing_changes_not_even_memory_is_touched() -> None:
    first, second = (0, MIN_BLOCK), (MIN_BLOCK, 2 * MIN_BLOCK)
    state = state_of(first, second)
    memory = state.master.data.data_ptr()
    restore(state, [first], seat(state, ((first,), (second,)), ((second,), (first,))), Solo(Settings(steps=1)))
    assert state.master.data.data_ptr() == memory
    assert state.stamp == 0


def test_two_that_change_places_own_what_they_mirrored_and_fetch_nothing() -> None:
    """What they hold is the same, what they answer for is not. (Solo refuses to fetch.)"""
    first, second = (0, MIN_BLOCK), (MIN_BLOCK, 2 * MIN_BLOCK)
    state = state_of(first, second)
    before = {(p.meta.key, p.start): p.tensor.clone() for p in state.places([first])}
    restore(state, [second], seat(state, ((second,), (first,)), ((first,), (second,))), Solo(Settings(steps=1)))
    assert (state.own, state.mirrored, state.stamp) == ((second,), (first,), 0)
    after = {(p.meta.key, p.start): p.tensor for p in state.places(state.mirrored)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

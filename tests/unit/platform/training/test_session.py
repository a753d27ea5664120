"""A user's loop: it holds over aborts, deaths and joins at every point, and ends with equal bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.checkpoint import checkpoint

import everstep as es
from everstep.collectives.errors import CollectiveError
from everstep.platform.training.conductor import RunOver, ViewOver
from everstep.platform.training.layout import MIN_BLOCK, total_of
from everstep.platform.training.session import Session, Settings
from everstep.platform.training.shard import UnsupportedModel
from everstep.platform.training.solo import Solo
from everstep.platform.training.task import CommitEvent
from everstep.storage.state_hash import combine

STEPS = 4
SETTINGS = Settings(steps=STEPS, lanes=5, lane_batch=2, seed=3, clip_norm=0.7)
PHASES = ("gradient", "reduce", "vote", "verdict", "apply", "snapshot", "gather")


class Model(nn.Module):
    """Cut inside a tensor, BatchNorm with its counter, a buffer that forward assigns, a parameter now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, MIN_BLOCK // 4)
        self.norm = nn.BatchNorm1d(MIN_BLOCK // 4)
        self.outer = nn.Linear(MIN_BLOCK // 4, 3)
        self.rare = nn.Parameter(torch.ones(3))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: torch.Tensor, rare: bool) -> torch.Tensor:
        y = self.outer(torch.tanh(self.norm(self.inner(x))))
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        return y * self.rare if rare else y


def session(conductor: Any, settings: Settings = SETTINGS) -> Session:
    model = Model()
    params = list(model.parameters())
    optimizers = [optim.AdamW(params[:2], lr=0.01), optim.Adafactor(params[2:], lr=0.01)]
    return Session(model, optimizers, settings=settings, conductor=conductor)


def lane_loss(s: Session, step: int, lane: int) -> es.Loss:
    generator = torch.Generator().manual_seed(100 * step + lane)
    y = s.model(torch.randn(4, 6, generator=generator), rare=step >= 2 and lane == 3)
    loss = (y - s.model.average).square().sum() * 10.0 ** (lane - 2)
    return es.Loss(sum=loss, weight=1.0 + lane)


@cache
def reference() -> tuple[str, tuple[float, ...]]:
    """State hash and losses of one process that holds all lanes and to which nothing happens."""
    torch.manual_seed(SETTINGS.seed)
    with session(None) as s:
        for step in s.steps():
            for lane in s.lanes():
                s.backward(lane, lane_loss(s, step, lane))
            s.commit()
    return combine(s.state_lines, STEPS), tuple(s.losses)


def assert_reference(outcome: Any) -> None:
    sha256, losses = reference()
    assert outcome.state_sha256 == sha256
    expected = {step: {("commit", loss)} for step, loss in enumerate(losses, 1)}
    assert outcome.verdicts == expected, "also those of steps that were rolled back"


def group_of(zero: int) -> tuple[Settings, Callable[[Any], Session]]:
    settings = replace(SETTINGS, zero=zero)
    return settings, lambda conductor: session(conductor, settings)


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_any_number_of_ranks_ends_with_the_bits_of_one_process(zero: int, ranks: int, group_run) -> None:
    settings, make = group_of(zero)
    outcome = group_run(settings, ranks, make, lane_loss)
    assert_reference(outcome)
    assert outcome.yielded == {f"rank-{rank}": list(range(STEPS)) for rank in range(ranks)}
    assert all(tuple(s.losses) == reference()[1] for s in outcome.sessions.values())


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_a_view_that_ends_at_any_point_does_not_matter(phase: str, zero: int, group_run) -> None:
    """The members stay: what was committed may be taken back, what was not is yielded again."""
    settings, make = group_of(zero)
    outcome = group_run(settings, 3, make, lane_loss, {(phase, 2, 1): "abort", (phase, 4, 0): "abort"})
    assert_reference(outcome)
    assert [ranks for _, ranks in outcome.views] == [3, 3, 3]
    for session_, yielded in zip(outcome.sessions.values(), outcome.yielded.values(), strict=True):
        missed = set(reference()[1]) - set(session_.losses)  # a commit that it got by recovery, if any
        assert session_.losses == [loss for loss in reference()[1] if loss not in missed], "announced once, in order"
        assert not missed or phase not in ("snapshot", "gather"), "applied, and not announced"
        assert sorted(set(yielded)) == list(range(STEPS))


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_dies_at_any_point_does_not_matter(phase: str, zero: int, group_run) -> None:
    settings, make = group_of(zero)
    outcome = group_run(settings, 3, make, lane_loss, {(phase, 3, 2): "die", (phase, 4, 0): "die"})
    assert_reference(outcome)
    assert [ranks for _, ranks in outcome.views] == [3, 2, 1]
    bases = [base for base, _ in outcome.views]
    assert bases[0] == 0
    assert bases[1] in (2, 3)
    assert bases[2] in (3, 4)


@pytest.mark.parametrize("zero", [0, 2])
def test_deaths_and_ends_in_the_middle_of_a_recovery_do_not_matter(zero: int, group_run) -> None:
    settings, make = group_of(zero)
    faults = {
        ("recovery", 0, 1): "abort",  # while the first view forms
        ("reduce", 3, 0): "die",
        ("recovery", 2, 2): "abort",  # rank 2 of the three that are left, then one of them dies too
        ("recovery", 2, 1): "die",
    }
    outcome = group_run(settings, 4, make, lane_loss, faults)
    assert_reference(outcome)
    assert outcome.views[-1][1] == 2


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_ranks_that_join_and_leave_do_not_matter(zero: int, group_run) -> None:
    settings, make = group_of(zero)
    faults = {("gradient", 2, 0): "join", ("gradient", 3, 0): "join", ("gradient", 4, 2): "die"}
    outcome = group_run(settings, 1, make, lane_loss, faults)
    assert_reference(outcome)
    assert outcome.views == [(0, 1), (1, 2), (2, 3), (3, 2)]
    assert outcome.yielded["rank-1"][0] == 1, "a joiner begins where the others are"


@pytest.mark.parametrize("shadow", [False, True])
def test_ranks_that_own_nothing_take_part_in_the_hash(shadow: bool, group_run) -> None:
    """One owns the only unit there is: it holds everything, as all do with ZeRO 0."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

    settings = Settings(steps=2, lanes=3, zero=2)

    def make(conductor: Any) -> Session:
        model = Small()
        return Session(model, optim.AdamW(model.parameters(), lr=0.1), settings=settings, conductor=conductor)

    def loss(s: Session, step: int, lane: int) -> torch.Tensor:
        return (s.model.w * (lane + step)).square().sum()

    alone = group_run(settings, 1, make, loss).state_sha256
    assert group_run(settings, 3, make, loss, shadow=shadow).state_sha256 == alone != ""


def test_a_death_after_the_last_step_does_not_matter(group_run) -> None:
    settings, make = group_of(2)
    outcome = group_run(settings, 3, make, lane_loss, {("gather", STEPS, 1): "die"})
    assert_reference(outcome)


# ---- shadows --------------------------------------------------------------------------------------------

# The step from which the others go on when a rank dies in this phase of step 3.
SHADOWED = {"gradient": 2, "reduce": 2, "vote": 2, "verdict": 3, "apply": 3, "gather": 3}


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("phase", SHADOWED)
def test_a_rank_that_dies_with_all_its_memory_loses_no_step_where_it_has_a_shadow(
    phase: str, zero: int, group_run
) -> None:
    settings, make = group_of(zero)
    outcome = group_run(settings, 4, make, lane_loss, {(phase, 3, 2): "die", (phase, 4, 0): "die"}, shadow=True)
    assert_reference(outcome)
    assert outcome.views == [(0, 4), (SHADOWED[phase], 3), (SHADOWED[phase] + 1, 2)]
    assert all(tuple(s.losses) == reference()[1] for s in list(outcome.sessions.values())[1:2])


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shadows_change_no_bit_and_hold_each_run_twice(zero: int, ranks: int, group_run) -> None:
    settings, make = group_of(zero)
    outcome = group_run(settings, ranks, make, lane_loss, shadow=True)
    assert_reference(outcome)
    states = [s.state for s in outcome.sessions.values()]
    total = states[0].layout.total
    assert sum(total_of(state.own) for state in states) == total
    assert sum(total_of(state.mirrored) for state in states) == (total if ranks > 1 else 0)
    for before, state in zip([states[-1], *states], states, strict=False):
        assert state.mirrored == (before.own if ranks > 1 else ())
        for owned, mirrored in zip(before.places(state.mirrored), state.places(state.mirrored), strict=True):
            assert (owned.meta, owned.start, owned.stop) == (mirrored.meta, mirrored.start, mirrored.stop)
            assert torch.equal(owned.tensor, mirrored.tensor)


def test_ranks_that_join_get_a_shadow(group_run) -> None:
    settings, make = group_of(2)
    faults = {("gradient", 2, 0): "join", ("gradient", 3, 0): "join", ("gradient", 4, 2): "die"}
    outcome = group_run(settings, 1, make, lane_loss, faults, shadow=True)
    assert_reference(outcome)
    assert outcome.views == [(0, 1), (1, 2), (2, 3), (3, 2)]


# ---- one rank, and a conductor that does one thing wrong ------------------------------------------------


class Staged(Solo):
    """Ends the view once, at a phase of a step or in the middle of its lanes; the memory stays stamped."""

    def __init__(self, settings: Settings, at: tuple[str, int] = ("", 0)) -> None:
        super().__init__(settings)
        self.at = at
        self.is_over = False
        self.stood: list[str] = []

    def fault_point(self, phase: str, step: int) -> None:
        if (phase, step) == self.at:
            self.at = ("", 0)
            raise ViewOver(f"{phase} {step}")

    def take_seat(self, inventory: Callable[[], Any]) -> Any:
        self.is_over = False
        offer = inventory()
        seat = super().take_seat(lambda: offer)
        if offer.step <= 0 or not offer.held:
            return seat
        return replace(seat, base_step=offer.step, plan=_at(seat.plan, offer.step))

    def over(self) -> bool:
        return self.is_over

    def stand_up(self, error: CollectiveError | None) -> None:
        self.stood.append(str(error or ""))


def _at(plan: Any, step: int) -> Any:
    """A plan whose state the rank's own memory holds: nothing is fetched."""
    import msgspec

    from everstep.storage.index import StateIndex

    return msgspec.structs.replace(plan, have=StateIndex(step, (), ()))


def small(steps: int = 2, lanes: int = 2, **fields: Any) -> Settings:
    return Settings(steps=steps, lanes=lanes, lane_batch=1, **fields)


class Counting(nn.Module):
    """Its buffers tell how many lanes ran since the committed state."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: float) -> torch.Tensor:
        self.seen += x
        self.count += 1
        return (self.w * x).sum()


def test_every_lane_starts_from_the_committed_buffers_and_they_become_the_mean() -> None:
    model = Counting()
    with Session(model, optim.SGD(model.parameters(), lr=0.1), settings=small(2, 4)) as s:
        for step in s.steps():
            for lane in s.lanes():
                assert (model.seen.item(), model.count.item()) == (step * 2.5, step)
                s.backward(lane, model(1.0 + lane))
            s.commit()
    assert (model.seen.item(), model.count.item()) == (5.0, 2)


@pytest.mark.parametrize("phase", ["lane", "reduce", "vote"])
def test_an_aborted_step_is_yielded_again_and_leaves_no_trace_in_the_buffers(phase: str) -> None:
    model = Counting()
    conductor = Staged(small(2, 3), (phase, 2))
    yielded, started = [], []
    with Session(model, optim.SGD(model.parameters(), lr=0.1), settings=small(2, 3), conductor=conductor) as s:
        for step in s.steps():
            yielded.append(step)
            for lane in s.lanes():
                started.append((step, lane, model.seen.item(), model.count.item()))
                loss = model(1.0 + lane)
                if phase == "lane" and (step, lane) == (1, 1) and len(yielded) == 2:
                    conductor.is_over = True  # while the lane is computed
                s.backward(lane, loss)
            s.commit()
    assert yielded == [0, 1, 1]
    again = [(1, lane, 2.0, 1) for lane in range(3)]
    first = again[:2] if phase == "lane" else again
    assert started == [(0, lane, 0.0, 0) for lane in range(3)] + first + again
    assert (model.seen.item(), model.count.item()) == (4.0, 2)
    assert [why for why in conductor.stood if why] or phase == "lane"
    assert len(s.losses) == 2


def test_the_rest_of_an_aborted_step_is_a_no_op() -> None:
    model = Counting()
    conductor = Staged(small(1, 4))
    computed = []
    with Session(model, optim.SGD(model.parameters(), lr=0.1), settings=small(1, 4), conductor=conductor) as s:
        for _ in s.steps():
            for lane in s.lanes():
                computed.append(lane)
                conductor.is_over = len(computed) == 2
                s.backward(lane, model(1.0))
                assert model.w.grad is None
            if len(computed) == 2:
                assert list(s.lanes()) == []
            s.commit()
            s.commit()
    assert computed == [0, 1, 0, 1, 2, 3]
    assert len(s.losses) == 1


def test_a_step_that_is_not_finite_is_skipped_and_announced() -> None:
    events: list[CommitEvent] = []
    model = Counting()
    task = _Listening(events)
    with Session(model, optim.SGD(model.parameters(), lr=0.1), settings=small(3, 2), task=task) as s:
        for step in s.steps():
            before = model.w.detach().clone()
            for lane in s.lanes():
                s.backward(lane, model(float("nan") if (step, lane) == (1, 1) else 1.0))
            s.commit()
            assert torch.equal(model.w, before) == (step == 1)
    assert [(e.step, e.skipped) for e in events] == [(0, False), (1, True), (2, False)]
    assert (model.seen.item(), model.count.item()) == (2.0, 2)


class _Listening(es.Task):
    def __init__(self, events: list[CommitEvent]) -> None:
        super().__init__()
        self.events = events

    def model(self) -> nn.Module:
        raise NotImplementedError

    def dataset(self) -> es.Dataset:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any, ctx: Any) -> torch.Tensor:
        raise NotImplementedError

    def schedule(self, step: int) -> float:
        return 1.0

    def on_commit(self, event: CommitEvent) -> None:
        self.events.append(event)


def test_integer_buffers_that_depend_on_the_lane_end_the_run() -> None:
    """Also where one rank computes all lanes: whether it is seen must not depend on their number."""
    model = Counting()
    conductor = Solo(small(3, 2))
    with Session(model, optim.SGD(model.parameters(), lr=0.1), settings=small(3, 2), conductor=conductor) as s:
        for _ in s.steps():
            for lane in s.lanes():
                loss = model(1.0)
                model.count += lane
                s.backward(lane, loss)
            s.commit()
    assert [v.outcome for v in conductor.verdicts] == ["failed"]
    assert "integer buffers differ" in conductor.verdicts[0].error


def test_the_end_of_the_run_ends_the_loop_quietly() -> None:
    class Ending(Solo):
        def vote(self, *args: Any) -> Any:
            raise RunOver("enough")

    model = Counting()
    with Session(
        model, optim.SGD(model.parameters(), lr=0.1), settings=small(5, 1), conductor=Ending(small(5, 1))
    ) as s:
        for count, _ in enumerate(s.steps()):
            assert count == 0
            for lane in s.lanes():
                s.backward(lane, model(1.0))
            s.commit()
    assert s.losses == []


def test_a_gradient_that_comes_twice_in_one_backward_pass_is_refused() -> None:
    """Reentrant checkpointing of a module that runs twice: the second part would be lost."""

    class Twice(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)
            self.other = nn.Linear(3, 3)
            self.reentrant = reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=self.reentrant)
            return self.other(x).sum()

    def train(reentrant: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = Twice(reentrant)
        with Session(model, optim.SGD(model.parameters(), lr=1.0), settings=small(1, 1)) as s:
            for _ in s.steps():
                for lane in s.lanes():
                    s.backward(lane, model(torch.ones(1, 3, requires_grad=True)))
                s.commit()
        return model.layer.weight.detach()

    torch.manual_seed(0)
    plain = Twice(reentrant=False)
    plain.other(plain.layer(plain.layer(torch.ones(1, 3)))).sum().backward()
    assert torch.equal(train(reentrant=False), plain.layer.weight.detach() - plain.layer.weight.grad)
    with pytest.raises(UnsupportedModel, match=r"layer\.weight got a gradient twice"):
        train(reentrant=True)


def test_buffers_are_those_after_forward_though_backward_runs_it_again() -> None:
    """Activation checkpointing changes no bits, not even those of BatchNorm's averages."""

    class Normed(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.how = how

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.how == "plain":
                return self.block(x).square().sum()
            return checkpoint(self.block, x, use_reentrant=self.how == "reentrant").square().sum()

    lines = {}
    for how in ("plain", "reentrant", "not reentrant"):
        torch.manual_seed(0)
        model = Normed(how)
        with Session(model, optim.AdamW(model.parameters()), settings=small(2, 3)) as s:
            for step in s.steps():
                for lane in s.lanes():
                    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + lane))
                    s.backward(lane, model(x.requires_grad_()))
                s.commit()
        lines[how] = s.state_lines
    assert lines["plain"] == lines["reentrant"] == lines["not reentrant"]


def test_a_parameter_without_gradient_is_not_even_decayed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    before = model["b"].weight.detach().clone()
    with Session(model, optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), settings=small(2, 2)) as s:
        for step in s.steps():
            for lane in s.lanes():
                part = model["b"] if (step, lane) == (1, 1) else model["a"]
                s.backward(lane, part(torch.ones(1, 2)).sum())
            s.commit()
            assert torch.equal(model["b"].weight, before) == (step == 0)


def test_the_model_is_an_ordinary_one_again_afterwards() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with Session(model, optim.SGD(model.parameters(), lr=0.1), settings=small(1, 1)) as s:
        for _ in s.steps():
            for lane in s.lanes():
                s.backward(lane, model(torch.ones(1, 2)).sum())
            s.commit()
    model(torch.ones(1, 2)).sum().backward()
    assert model[0].weight.grad is not None
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append((torch.rand(()).item(), model(torch.ones(64, 2)).tolist(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][2], "its random state goes on"


def test_a_session_outside_of_a_job_says_what_it_needs() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="outside of a job needs settings"):
        Session(model, optimizer)
    with (
        Session(model, optimizer, settings=small()) as s,
        pytest.raises(ValueError, match="needs a task with a dataset"),
    ):
        s.batch(0)

"""A user's own loop on `es.Session`: the same bits in one process, over any number of ranks, and in a job.

Ranks are threads here, on real connections, with one conductor that judges as a supervisor does; what only
processes can show is in test_same_bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import everstep as es
from everstep.collectives.members import Members
from everstep.collectives.mesh import Mesh
from everstep.collectives.messages import Member, View, ViewId
from everstep.collectives.transport.listener import Listener
from everstep.platform.training.conductor import Seat
from everstep.platform.training.layout import units_in
from everstep.platform.training.messages import Inventory, Verdict, ViewPlan, Vote
from everstep.platform.training.ownership import assign
from everstep.platform.training.solo import Solo
from everstep.platform.training.task import TaskContext, keyed_seed
from everstep.platform.training.verdict import Progress, Rules, judge_step
from everstep.storage.state_hash import combine
from integration.harness import assert_same_bits, finish, job, ranks, reference
from integration.tasks import Norm

PATIENCE_S = 60.0
# One weight has more elements than a block (4096), so that it is cut where its optimizer allows it.
FEATURES, WIDTH, BATCH = 64, 96, 3
Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]


class Net(nn.Module):
    """[B, FEATURES] -> [B, 1]; `far` is used where a batch's first number is above `threshold`."""

    def __init__(self, norm: bool = False, threshold: float | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.far = nn.Linear(WIDTH, WIDTH) if threshold is not None else None
        self.out = nn.Linear(WIDTH, 1)
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.inner(x)))
        if self.far is not None and self.threshold is not None and float(x[0, 0]) > self.threshold:
            hidden = hidden + self.far(hidden)
        value: torch.Tensor = self.out(hidden)
        return value


class Tied(nn.Module):
    """One matrix that is used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(FEATURES, WIDTH)
        self.up = nn.Linear(FEATURES, WIDTH, bias=False)
        self.up.weight = self.down.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(self.down(x)) + self.up(x).sin()).mean(1, keepdim=True)


def frozen() -> nn.Module:
    net = Net()
    net.inner.weight.requires_grad_(False)
    return net


def adamw(net: nn.Module) -> Optimizers:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def momentum(net: nn.Module) -> Optimizers:
    return torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def adafactor(net: nn.Module) -> Optimizers:
    return torch.optim.Adafactor(net.parameters(), lr=1e-2)


def two(net: nn.Module) -> Optimizers:
    first, *others = net.parameters()
    return [torch.optim.SGD([first], lr=1e-2, momentum=0.9), torch.optim.Adam(others, lr=1e-3)]


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizers] = adamw


CASES = {
    "plain": Case(Net),
    "batchnorm": Case(lambda: Net(norm=True)),
    "tied": Case(Tied),
    "frozen": Case(frozen),
    "gradient in some lanes": Case(lambda: Net(threshold=0.0)),
    "gradient in no lane": Case(lambda: Net(threshold=1e9)),
    "momentum": Case(Net, momentum),
    "two optimizers": Case(Net, two),
    "adafactor": Case(Net, adafactor),
}


def settings(lanes: int, **changes: int) -> es.Settings:
    return replace(es.Settings(steps=4, lanes=lanes, lane_batch=BATCH, seed=5, clip_norm=0.3), **changes)


def loss_of(net: nn.Module, step: int, lane: int) -> torch.Tensor:
    x, y = batch_of(step, lane)
    return functional.mse_loss(net(x), y)


def batch_of(step: int, lane: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + lane)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, x[:, :4].sum(1, keepdim=True).sin()


@dataclass(frozen=True)
class Ended:
    losses: tuple[float, ...]
    lines: tuple[str, ...]
    net: nn.Module


def built(case: Case) -> tuple[nn.Module, Optimizers]:
    torch.manual_seed(11)
    net = case.model()
    return net, case.optimizer(net)


def loop(session: es.Session, net: nn.Module) -> Ended:
    """The loop of the README."""
    with session as s:
        for step in s.steps():
            for lane in s.lanes():
                s.backward(lane, loss_of(net, step, lane))
            s.commit()
    return Ended(tuple(session.losses), session.state_lines, net)


def alone(case: Case, wanted: es.Settings) -> Ended:
    net, optimizer = built(case)
    return loop(es.Session(net, optimizer, settings=wanted), net)


class Meeting:
    """One verdict a step out of everybody's votes."""

    def __init__(self, wanted: es.Settings, count: int) -> None:
        self._rules = Rules(wanted.lanes, wanted.clip_norm, wanted.nonfinite_limit)
        self._progress = Progress()
        self._barrier = threading.Barrier(count)
        self._votes: dict[str, Vote] = {}
        self._verdict = Verdict("commit")

    def vote(self, name: str, step: int, vote: Vote) -> Verdict:
        self._votes[name] = vote
        if self._barrier.wait(PATIENCE_S) == 0:
            kinds = {v.kind for v in self._votes.values()}
            if kinds == {"step"}:
                self._verdict, self._progress = judge_step(step, self._votes, self._rules, self._progress)
            else:
                self._verdict = Verdict("sealed" if kinds == {"seal"} else "finished")
            self._votes = {}
        self._barrier.wait(PATIENCE_S)
        return self._verdict

    def abort(self) -> None:
        self._barrier.abort()


class Seated(Solo):
    """A conductor for one of several threads."""

    def __init__(self, wanted: es.Settings, meeting: Meeting, view: View, rank: int, mesh: Mesh) -> None:
        super().__init__(wanted)
        self.name = view.members[rank].name
        self._meeting, self._view, self._rank, self._mesh = meeting, view, rank, mesh

    def take_seat(self, inventory: Callable[[], Inventory]) -> Seat:
        plan = ViewPlan(assign(units_in(inventory().units), len(self._view.members)), None)
        names = tuple(member.name for member in self._view.members)
        return Seat(str(self._view.id), self._rank, 0, plan, Members(self._mesh), names)

    def level(self, seat: Seat) -> None:
        self._mesh.connect(PATIENCE_S)

    def vote(self, seat: Seat, step: int, vote: Vote) -> Verdict:
        return self._meeting.vote(self.name, step, vote)


def together(case: Case, wanted: es.Settings, count: int) -> list[Ended]:
    """The same job on `count` threads; every thread has a model of its own."""
    listeners = [Listener("127.0.0.1", "token") for _ in range(count)]
    members = tuple(Member(f"rank-{i}", i, f"slot-{i}", it.address, local=it.local) for i, it in enumerate(listeners))
    view = View(ViewId(1, 1), members, 0)
    broken: list[str] = []
    meshes = [Mesh(view, i, it, lambda peer, why: broken.append(why), PATIENCE_S) for i, it in enumerate(listeners)]
    meeting = Meeting(wanted, count)
    sessions = []
    for rank, (listener, mesh) in enumerate(zip(listeners, meshes, strict=True)):
        listener.expect(mesh)
        net, optimizer = built(case)
        conductor = Seated(wanted, meeting, view, rank, mesh)
        sessions.append((es.Session(net, optimizer, settings=wanted, conductor=conductor), net))

    def work(pair: tuple[es.Session, nn.Module]) -> Ended:
        try:
            return loop(*pair)
        except BaseException:
            meeting.abort()
            raise

    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(work, sessions))
    finally:
        for mesh in meshes:
            mesh.close()
        for listener in listeners:
            listener.close()


def assert_same(case: Case, wanted: es.Settings, count: int) -> None:
    expected = alone(case, wanted)
    ended = together(case, wanted, count)
    assert {one.losses for one in ended} == {expected.losses}
    assert sorted(line for one in ended for line in one.lines) == sorted(expected.lines)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads of one operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_who_holds_the_lanes(name: str, zero: int):
    assert_same(CASES[name], settings(lanes=5, zero=zero), count=3)


@pytest.mark.parametrize("lanes", range(1, 10))
def test_any_number_of_lanes_over_any_number_of_ranks(lanes: int):
    for count in {1, 2, 3, 4, lanes} & set(range(1, min(lanes, 5) + 1)):
        assert_same(CASES["batchnorm"], settings(lanes=lanes, zero=(lanes + count) % 3, steps=2), count)


@pytest.mark.parametrize("name", ["plain", "tied", "frozen", "gradient in some lanes", "momentum", "two optimizers"])
def test_it_is_what_plain_pytorch_computes(name: str):
    """But for the order of additions: one batch of all lanes, clipped, one optimizer step."""
    wanted = settings(lanes=5)
    ended = alone(CASES[name], wanted)
    net, optimizers = built(CASES[name])
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    losses = []
    for step in range(wanted.steps):
        total = torch.stack([loss_of(net, step, lane) for lane in range(wanted.lanes)]).mean()
        net.zero_grad()
        total.backward()
        assert wanted.clip_norm is not None
        norm = nn.utils.clip_grad_norm_(net.parameters(), wanted.clip_norm)
        assert norm > wanted.clip_norm, "clipping is part of what is compared"
        for optimizer in optimizers:
            optimizer.step()
        losses.append(total.item())
    torch.testing.assert_close(torch.tensor(ended.losses), torch.tensor(losses))
    torch.testing.assert_close(dict(ended.net.named_parameters()), dict(net.named_parameters()))


def test_a_parameter_without_gradient_in_any_lane_is_left_alone():
    """No weight decay, and no optimizer state."""
    ended = alone(CASES["gradient in no lane"], settings(lanes=3))
    before, _ = built(CASES["gradient in no lane"])
    after = dict(ended.net.named_parameters())
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after[name]) == name.startswith("far."), name
    kinds = {line.split()[1] for line in ended.lines if line.startswith("far.")}
    assert kinds == {"param"}
    assert {line.split()[1] for line in ended.lines if line.startswith("out.bias")} == {
        "param", "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip


def test_batchnorm_takes_the_mean_over_lanes_of_what_each_lane_leaves():
    ended = alone(CASES["batchnorm"], settings(lanes=4, steps=1))
    left = []
    for lane in range(4):
        net, _ = built(CASES["batchnorm"])
        net(batch_of(0, lane)[0])
        left.append(net.get_buffer("norm.running_mean"))
    torch.testing.assert_close(ended.net.get_buffer("norm.running_mean"), torch.stack(left).mean(0))
    assert int(ended.net.get_buffer("norm.num_batches_tracked")) == 1


def test_a_users_own_loop_over_a_task_has_the_bits_of_a_job():
    spec = job("Norm", ranks=ranks(2), steps=6)
    task = Norm(spec.args, TaskContext.of(spec))
    torch.manual_seed(keyed_seed(spec.seed, "model"))
    model = task.model()
    wanted = es.Settings(
        steps=spec.steps,
        lanes=spec.lanes,
        lane_batch=spec.lane_batch,
        seed=spec.seed,
        clip_norm=spec.train.clip_norm,
    )
    with es.Session(model, task.optimizer(model.parameters()), settings=wanted, task=task) as s:
        for step in s.steps():
            for lane in s.lanes():
                inputs, targets = s.batch(lane)
                s.backward(lane, functional.cross_entropy(model(inputs), targets))
            s.commit()
            assert len(s.losses) == step + 1
    expected = reference(spec)
    assert tuple(s.losses) == expected.losses
    assert combine(s.state_lines, spec.steps) == expected.state_sha256
    assert_same_bits(finish(spec).result, spec)


def test_outside_of_a_job_the_settings_have_to_be_given():
    with pytest.raises(ValueError, match=r"settings=es\.Settings\(steps=…, lanes=…\)"):
        es.Session(Net(), adamw(Net()))

"""What one rank holds: it moves to any other ownership with equal bits, and is never offered half-written."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from everstep.collectives.tensors import bytes_of
from everstep.platform.training.capture import write_snapshot
from everstep.platform.training.layout import MIN_BLOCK, Run, merge_runs
from everstep.platform.training.messages import Verdict
from everstep.platform.training.shard import (
    TORN,
    Place,
    RankState,
    UnsupportedModel,
    check_model,
)
from everstep.storage.index import Source, TensorMeta, merge
from everstep.storage.planner import Want
from everstep.storage.segment import SegmentMap, create_segment, read_index, required_bytes, verify

LANES = 4


class Model(nn.Module):
    """Every kind of state: cut and uncut parameters, a scalar, a parameter that gets no gradient, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(3 * MIN_BLOCK // 8 + 1, 8)
        self.norm = nn.BatchNorm1d(8)
        self.gain = nn.Parameter(torch.ones(()))
        self.unused = nn.Embedding(5, 7)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))


UNUSED = 5
MAKERS: dict[str, Callable[[list[nn.Parameter]], list[optim.Optimizer]]] = {
    "AdamW": lambda p: [optim.AdamW(p, lr=0.01)],
    "Adafactor": lambda p: [optim.Adafactor(p, lr=0.01)],
    "mixed": lambda p: [optim.RMSprop(p[:2], lr=0.01, momentum=0.5), optim.Adafactor(p[2:], lr=0.01)],
    "plain": lambda p: [optim.SGD(p, lr=0.01)],
}


def state_of(maker: str = "AdamW", runs: Sequence[Run] | None = None) -> RankState:
    torch.manual_seed(5)
    model = Model()
    state = RankState(model, MAKERS[maker]([p for p in model.parameters() if p.requires_grad]))
    state.hold([(0, state.layout.total)] if runs is None else runs)
    if runs is None:
        state.reset()
    return state


def commit(changed: tuple[int, ...] = (), untouched: tuple[int, ...] = (UNUSED,), **fields: Any) -> Verdict:
    return Verdict("commit", weight=3.0, changed=changed, untouched=untouched, **fields)


def step(states: Sequence[RankState], verdict: Verdict | None = None) -> None:
    """One update of states that hold the whole between them, with the same gradients whoever holds what."""
    number = states[0].stamp + 1
    gradient = torch.randn(states[0].layout.total, generator=torch.Generator().manual_seed(number))
    counted = [torch.tensor(number) if b.dtype == torch.int64 else b.clone() for _, b in states[0].integers]
    for state in states:
        for start, stop in state.held:
            state.reduced.view(start, stop).copy_(gradient[start:stop])
        state.apply(number, verdict or commit((0, 1)), LANES, 0.5, counted, lambda: None)
    for state in states:
        for owner in states:
            for piece in owner.pieces:
                span = (piece.flat, piece.flat + piece.numel)
                state.compute[slice(*span)].copy_(owner.master.view(*span))
        state.gathered()


def content(states: Sequence[RankState]) -> dict[tuple[str, str], bytes]:
    """All bytes of the state by tensor; every element must be held, by equal bits where by several."""
    data: dict[tuple[str, str], bytearray] = {m.key: bytearray(m.nbytes) for m in states[0].metas()}
    seen = {m.key: bytearray(m.nbytes) for m in states[0].metas()}
    for state in states:
        for place in state.places():
            size = place.meta.itemsize
            span = slice(place.start * size, place.stop * size)
            now = bytes(bytes_of(place.tensor))
            if any(seen[place.meta.key][span]):
                assert bytes(data[place.meta.key][span]) == now, place.meta
            data[place.meta.key][span] = now
            seen[place.meta.key][span] = b"\1" * len(now)
    assert all(all(marks) for marks in seen.values()), "elements that nobody holds"
    return {key: bytes(value) for key, value in data.items()}


def fill_from(states: Sequence[RankState]) -> Callable[[Want, torch.Tensor], None]:
    kept = content(states)
    size = {m.key: m.itemsize for m in states[0].metas()}

    def fill(want: Want, target: torch.Tensor) -> None:
        each = size[(want.name, want.kind)]
        data = bytearray(kept[(want.name, want.kind)][want.start * each : want.stop * each])
        assert target.numel() == want.stop - want.start
        target.view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))

    return fill


def dealt(state: RankState, ranks: int, rng: random.Random) -> list[tuple[Run, ...]]:
    """The units, dealt at random: a rank may own several runs of one tensor, or nothing."""
    hands: list[list[Run]] = [[] for _ in range(ranks)]
    for unit in state.layout.units:
        rng.choice(hands).append(unit)
    return [merge_runs(hand) for hand in hands]


def moved(states: Sequence[RankState], maker: str, owned: Sequence[Sequence[Run]]) -> list[RankState]:
    have = merge(*(index for i, s in enumerate(states) if (index := s.live_index(f"rank-{i}")) is not None))
    assert have.missing() == []
    fill = fill_from(states)
    found = []
    for runs in owned:
        state = state_of(maker, runs)
        assert {(w.name, w.kind, w.start, w.stop) for w in state.wants(have, "me")} == _asked(state, have, fill)
        found.append(state)
    for state in found:
        for owner in found:
            for piece in owner.pieces:
                span = (piece.flat, piece.flat + piece.numel)
                state.compute[slice(*span)].copy_(owner.master.view(*span))
        state.gathered()
    return found


def _asked(state: RankState, have: Any, fill: Callable[[Want, torch.Tensor], None]) -> set[tuple[str, str, int, int]]:
    asked: set[tuple[str, str, int, int]] = set()

    def noted(want: Want, target: torch.Tensor) -> None:
        asked.add((want.name, want.kind, want.start, want.stop))
        fill(want, target)

    state.install(have, noted)
    return asked


@pytest.mark.parametrize("maker", MAKERS)
def test_state_moves_to_any_ownership_with_equal_bits_and_trains_on(maker: str) -> None:
    rng = random.Random(maker)
    alone = [state_of(maker)]
    step(alone)
    states = alone
    for ranks in (3, 1, 4, 2):
        states = moved(states, maker, dealt(alone[0], ranks, rng))
        assert content(states) == content(alone)
        assert {s.stamp for s in states} == {alone[0].stamp}
        assert len({s.metas() for s in [*states, *alone]}) == 1
        step(alone)
        step(states)
        assert content(states) == content(alone)
        assert all(torch.equal(s.compute, alone[0].compute) for s in states)


def test_a_skipped_step_changes_only_the_stamp() -> None:
    state = state_of()
    step([state])
    before = content([state])
    state.model.norm.running_mean.fill_(7.0)  # what the lanes' forward left
    state.reduced.data.fill_(float("nan"))
    state.apply(2, Verdict("skip"), LANES, 1.0, [], lambda: pytest.fail("nothing is torn by a skip"))
    assert (state.stamp, content([state])) == (2, before)
    assert not (state.model.norm.running_mean == 7.0).any()


def test_memory_is_torn_while_it_is_applied_and_while_it_is_installed() -> None:
    state = state_of()
    step([state])
    seen: list[Any] = []
    state.reduced.data.zero_()
    integers = [b.clone() for _, b in state.integers]
    state.apply(2, commit(), LANES, 1.0, integers, lambda: seen.append((state.stamp, state.live_index("me"))))
    assert seen == [(TORN, None)]
    index = state.live_index("me")
    assert index is not None
    assert index.step == state.stamp == 2
    fill = fill_from([state])
    state.hold(state.held)
    assert (state.stamp, state.live_index("me")) == (TORN, None)
    state.install(index, lambda want, target: (seen.append(state.stamp), fill(want, target)))
    assert set(seen[1:]) == {TORN}
    assert state.stamp == 2


def test_a_step_is_applied_to_the_state_before_it_only() -> None:
    with pytest.raises(AssertionError, match="step 2 on state 0"):
        state_of().apply(2, commit(), LANES, 1.0, [], lambda: None)


def test_scalars_are_listed_once_though_two_runs_of_their_tensor_are_held() -> None:
    first = state_of()
    big = first.layout.by_name["big.weight"]
    units = [unit for unit in first.layout.units if big.start <= unit[0] < big.stop]
    assert len(units) >= 3
    step([first])
    (state,) = moved([first], "AdamW", [(units[0], units[2])])
    listed = [(p.meta.name, p.meta.kind, p.start, p.stop) for p in state.places() if p.meta.name == "big.weight"]
    assert len([p for p in listed if p[1] == "param"]) == 2
    assert [p for p in listed if p[1] == "step"] == [("big.weight", "step", 0, 1)]
    assert len(set(listed)) == len(listed)
    index = state.live_index("me")
    assert index is not None
    index.validate()


def test_a_parameter_has_optimizer_state_from_its_first_gradient_on() -> None:
    state = state_of()
    kinds = lambda: {m.kind for m in state.metas() if m.name == "unused.weight"}  # noqa: E731
    step([state])
    assert kinds() == {"param"}
    assert {p.meta.kind for p in state.places() if p.meta.name == "unused.weight"} == {"param"}
    step([state], commit(untouched=()))
    assert kinds() == {"param", "exp_avg", "exp_avg_sq", "step"}
    step([state])
    assert kinds() == {"param", "exp_avg", "exp_avg_sq", "step"}
    content([state])


def test_only_changed_buffers_become_the_mean_of_the_lanes() -> None:
    state = state_of()
    names = [name for name, _ in state.buffers]
    assert names == ["norm.running_mean", "norm.running_var"]
    mean, var = (state.layout.by_name[name] for name in names)
    state.reduced.data.fill_(LANES * 2.5)
    state.apply(1, commit((0,)), LANES, 1.0, [torch.tensor(9) for _ in state.integers], lambda: None)
    assert state.master.view(mean.start, mean.stop).tolist() == [2.5] * 8
    assert state.master.view(var.start, var.stop).tolist() == [1.0] * 8


def test_buffers_go_back_to_the_committed_ones_before_each_lane() -> None:
    state = state_of()
    step([state])
    committed = {name: b.clone() for name, b in state.model.named_buffers()}
    with torch.no_grad():
        state.model.norm(torch.randn(6, 8))
    _, changed, integers = state.lane_buffers()
    assert changed == [0, 1]
    assert [i.item() for i in integers if i.dim() == 0] == [2]
    state.begin_lane()
    assert all(torch.equal(b, committed[name]) for name, b in state.model.named_buffers())
    assert state.lane_buffers()[1] == []


def test_a_buffer_that_forward_assigns_anew_is_taken_and_put_back() -> None:
    state = state_of()
    norm, home = state.model.norm, state.model.norm.running_mean
    norm.running_mean = norm.running_mean + 2.0
    norm.num_batches_tracked = norm.num_batches_tracked + 5
    floats, changed, integers = state.lane_buffers()
    assert changed == [0]
    assert floats[:8].tolist() == [2.0] * 8
    assert sorted(i.item() for i in integers if i.dim() == 0) == [5]
    state.begin_lane()
    assert norm.running_mean is home
    assert (home.tolist(), norm.num_batches_tracked.item()) == ([0.0] * 8, 0)
    assert "norm.running_mean" in dict(state.model.named_buffers())


@pytest.mark.parametrize("wrong", [torch.zeros(9), torch.zeros(8, dtype=torch.float64), None])
def test_a_buffer_that_becomes_something_else_is_refused(wrong: torch.Tensor | None) -> None:
    state = state_of()
    state.model.norm.running_mean = wrong
    with pytest.raises(UnsupportedModel, match=r"buffer norm\.running_mean was torch\.float32\[8\] and became"):
        state.lane_buffers()


def test_reset_gives_the_seeds_state() -> None:
    state = state_of()
    before, compute = content([state]), state.compute.clone()
    step([state])
    step([state], commit(untouched=()))
    assert content([state]) != before
    state.reset()
    assert (state.stamp, content([state])) == (0, before)
    assert torch.equal(state.compute, compute)


def test_norm_blocks_do_not_depend_on_who_owns_them() -> None:
    state = state_of()
    state.reduced.data.normal_(generator=torch.Generator().manual_seed(1))
    whole = state.norm_blocks(state.held)
    rng = random.Random(2)
    for ranks in (2, 3, 5):
        parts = [state.norm_blocks(runs) for runs in dealt(state, ranks, rng)]
        assert sorted(block for part in parts for block in part) == sorted(whole)
    parameters = [t for t in state.layout.tensors if not t.is_buffer]
    exact = sum(float(state.reduced.view(t.start, t.stop).double().square().sum()) for t in parameters)
    assert sum(whole) == pytest.approx(exact, rel=1e-12)


def test_parameters_stand_at_64_bytes_and_are_the_models_own_memory() -> None:
    state = state_of(runs=[(0, 0)])
    for name, tensor in [*state.params, *state.buffers]:
        assert tensor.data_ptr() % 64 == 0, name
        start = state.layout.by_name[name].start
        state.compute[start] = 3.0
        assert tensor.reshape(-1)[0] == 3.0
    state = state_of(runs=dealt(state, 2, random.Random(0))[0])
    for piece in state.pieces:
        assert state.master.view(piece.flat, piece.flat + piece.numel).data_ptr() % 64 == 0


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_footprint_has_room_for_every_real_snapshot(maker: str, ranks: int, tmp_path: Path) -> None:
    """Also with the fewest bytes of data, when names and checksums weigh most, and once all is touched."""
    rng = random.Random(ranks)
    first = state_of(maker)
    step([first])
    step([first], commit(untouched=()))
    states = moved([first], maker, dealt(first, ranks, rng))
    for rank, state in enumerate(states):
        snapshot(state, tmp_path / f"{maker}-{rank}")


def snapshot(state: RankState, path: Path) -> None:
    """As a rank's conductor writes it: every tensor is named, then what is held."""
    create_segment(path, required_bytes(state.footprint()))
    with SegmentMap(path, writable=True) as segment:
        write_snapshot(segment, state, (2**32 - 1, 2**32 - 1))
        assert verify(segment).step == state.stamp


@pytest.mark.parametrize("maker", MAKERS)
def test_what_a_rank_mirrors_has_its_owners_bits_and_is_told_apart_from_its_own(maker: str, tmp_path: Path) -> None:
    """Two ranks that mirror each other, after steps that each of them applies by itself."""
    rng = random.Random(maker)
    alone = state_of(maker)
    owned = dealt(alone, 2, rng)
    pair = [state_of(maker, runs) for runs in owned]
    for state, runs in zip(pair, owned, strict=True):
        other = next(others for others in owned if others is not runs)
        state.hold(runs, other)
        assert (state.own, state.mirrored, state.held) == (runs, other, ((0, alone.layout.total),))
        state.reset()
    for verdict in (commit((0, 1)), commit((0, 1), untouched=())):
        step([alone], verdict)
        step(pair, verdict)
    assert content([pair[0]]) == content([pair[1]]) == content([alone])
    for state in pair:
        own, mirror = list(state.places(state.own)), list(state.places(state.mirrored))
        floats = [p for p in own + mirror if p.meta.shape and p.meta.dtype == "float32"]
        assert len({(p.meta.key, p.start, p.stop) for p in floats}) == len(floats), "nothing is in both"
        for held, runs in ((own, state.own), (mirror, state.mirrored)):
            path = tmp_path / "segment"
            create_segment(path, required_bytes(state.footprint(runs)))
            with SegmentMap(path, writable=True) as segment:
                seal = write_snapshot(segment, state, (1, 1), runs=runs)
                index = read_index(segment, seal, Source("segment", "slot-0", path.name))
            path.unlink()
            assert index.tensors == state.metas(), "every index lists the whole state"
            listed = {(f.name, f.kind, f.start, f.stop) for f in index.fragments if f.start < f.stop}
            assert listed == {(p.meta.name, p.meta.kind, p.start, p.stop) for p in held if p.start < p.stop}


def test_places_of_some_runs_are_cut_out_of_the_pieces_that_are_held() -> None:
    state = state_of()
    step([state])
    big = state.layout.by_name["big.weight"]
    some = [(big.start + MIN_BLOCK, big.start + 2 * MIN_BLOCK), (big.stop - 5, big.stop + 16)]
    found = {(p.meta.kind, p.start, p.stop): p.tensor for p in state.places(some) if p.meta.name == "big.weight"}
    whole = {p.meta.kind: p.tensor for p in state.places() if p.meta.name == "big.weight"}
    spans = [(MIN_BLOCK, 2 * MIN_BLOCK), (big.numel - 5, big.numel)]
    assert set(found) == {(kind, *span) for kind in ("param", "exp_avg", "exp_avg_sq") for span in spans} | {
        ("step", 0, 1)
    }
    for (kind, start, stop), tensor in found.items():
        assert torch.equal(tensor, whole[kind][start:stop])


def test_the_footprint_has_room_where_names_are_short_and_tensors_tiny(tmp_path: Path) -> None:
    class Crumbs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(300):
                self.register_buffer(f"i{i}", torch.tensor(i % 100, dtype=torch.int8))
                self.register_buffer(f"f{i}", torch.tensor(float(i)))
            self.w = nn.Parameter(torch.ones(1))

    model = Crumbs()
    state = RankState(model, [optim.AdamW(model.parameters())])
    state.hold([(0, state.layout.total)])
    state.reset()
    state.reduced.data.fill_(1.0)
    state.apply(1, commit(untouched=()), LANES, 1.0, [b.clone() for _, b in state.integers], lambda: None)
    snapshot(state, tmp_path / "crumbs")


def test_the_footprint_has_room_for_the_names_of_what_others_hold(tmp_path: Path) -> None:
    model = nn.ParameterDict({f"parameter_{i}": nn.Parameter(torch.ones(1)) for i in range(300)})
    state = RankState(model, [optim.AdamW(model.parameters())])
    state.hold(state.layout.units[:1])
    state.reset()
    state.apply(1, commit(untouched=()), LANES, 1.0, [], lambda: None)
    snapshot(state, tmp_path / "names")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.register_parameter("w", nn.Parameter(torch.ones(2).double())), "parameter w is torch.float64"),
        (lambda m: m.register_buffer("b", torch.ones(2).half()), "buffer b is torch.float16"),
        (lambda m: m.register_buffer("b", torch.ones(2, dtype=torch.complex64)), "buffer b is complex"),
    ],
)
def test_a_model_that_the_flat_space_cannot_hold_is_refused(change: Callable[[nn.Module], None], why: str) -> None:
    model = nn.Linear(2, 2)
    check_model(model)
    change(model)
    with pytest.raises(UnsupportedModel, match=why):
        check_model(model)


def test_a_frozen_parameter_of_another_type_is_no_state() -> None:
    model = Model()
    model.frozen = nn.Parameter(torch.ones(3).half(), requires_grad=False)
    state = RankState(model, [optim.SGD(model.parameters(), lr=0.1)])
    assert "frozen" not in state.layout.by_name


def test_tied_parameters_are_one_tensor() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    state = RankState(model, [optim.SGD(model.parameters(), lr=0.1)])
    assert [t.name for t in state.layout.tensors] == ["a.weight"]
    assert [m.key for m in state.metas()] == [("a.weight", "param")]
    state.compute.fill_(2.0)
    assert model["b"].weight.tolist() == [[2.0] * 4] * 4


def test_every_place_says_what_it_is() -> None:
    state = state_of()
    step([state])
    for place in state.places():
        assert isinstance(place, Place)
        assert isinstance(place.meta, TensorMeta)
        assert place.tensor.is_contiguous()
        assert place.tensor.numel() == place.stop - place.start
        assert place.meta in state.metas()

"""A copy in the background: when the state may change, what ends up in the segment, what an error does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from everstep.platform.training.capture import Capture
from everstep.platform.training.layout import Run
from everstep.platform.training.shard import Place
from everstep.storage.index import Source, TensorMeta
from everstep.storage.segment import (
    SegmentFull,
    SegmentMap,
    create_segment,
    payload,
    read_index,
    read_seal,
    required_bytes,
    verify,
)


class State:
    """What a capture needs of a rank's state."""

    stamp = 9

    def __init__(self) -> None:
        self.tensors = {
            "large": torch.rand(700_000),
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0),
            "odd": torch.randint(0, 255, (1_000_003,), dtype=torch.uint8),
            "flags": torch.tensor([True, False, True]),
        }

    def metas(self) -> tuple[TensorMeta, ...]:
        return tuple(
            TensorMeta(name, "param", str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in sorted(self.tensors.items())
        )

    def places(self, runs: Sequence[Run] | None = None) -> Iterator[Place]:
        for meta in self.metas():
            yield Place(meta, 0, meta.numel, self.tensors[meta.name].reshape(-1))


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[SegmentMap]:
    metas = State().metas()
    create_segment(tmp_path / "a.seg", required_bytes([(meta, 0, meta.numel) for meta in (*metas, *metas)]))
    with SegmentMap(tmp_path / "a.seg", writable=True) as segment:
        yield segment


def content(segment: SegmentMap) -> dict[str, bytes]:
    seal = verify(segment)
    found = {}
    for f in read_index(segment, seal, Source("segment", "", "")).fragments:
        meta = next(meta for meta in State().metas() if meta.name == f.name)
        if f.stop > f.start or meta.numel == 0:
            found[f.name] = bytes(payload(segment, f.offset, (f.stop - f.start) * meta.itemsize))
    return found


def of(state: State) -> dict[str, bytes]:
    return {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state.tensors.items()}


@pytest.mark.parametrize("hurry", [False, True])
def test_all_of_the_state_is_there_with_its_checksums(segment: SegmentMap, hurry: bool) -> None:
    state = State()
    capture = Capture(segment, state, (2, 3))  # type: ignore[arg-type]
    assert read_seal(segment) is None
    if hurry:  # somebody waits already: everything is copied first
        waiting = threading.Thread(target=capture.release)
        waiting.start()
        while not capture.hurried:
            pass
    capture.run()
    if hurry:
        waiting.join(10)
    capture.wait()
    seal = verify(segment)
    assert (seal.epoch, seal.number, seal.step) == (2, 3, 9)
    assert content(segment) == of(state)


def test_the_state_may_change_before_the_seal_and_the_seal_knows_nothing_of_it(segment: SegmentMap) -> None:
    state = State()
    expected = of(state)
    may_seal = threading.Event()
    capture = Capture(segment, state, (2, 3), before_seal=lambda: assert_waited(may_seal))  # type: ignore[arg-type]
    thread = threading.Thread(target=capture.run)
    thread.start()
    capture.release()
    for tensor in state.tensors.values():
        tensor.zero_()
    assert not capture.ended
    assert read_seal(segment) is None
    may_seal.set()
    capture.wait()
    thread.join(10)
    assert capture.ended
    assert content(segment) == expected


def assert_waited(event: threading.Event) -> None:
    assert event.wait(10)


def test_what_fails_is_raised_where_somebody_waits_and_leaves_no_seal(segment: SegmentMap) -> None:
    def strike() -> None:
        raise KeyError("struck")

    capture = Capture(segment, State(), (2, 3), before_seal=strike)  # type: ignore[arg-type]
    capture.run()
    for wait in (capture.release, capture.wait):
        with pytest.raises(KeyError, match="struck"):
            wait()
    assert read_seal(segment) is None


def test_a_segment_that_is_too_small_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    create_segment(tmp_path / "small.seg", 8192)
    with SegmentMap(tmp_path / "small.seg", writable=True) as small, pytest.raises(SegmentFull):
        Capture(small, State(), (2, 3))  # type: ignore[arg-type]

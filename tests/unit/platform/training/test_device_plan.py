"""How the items of a device copy are cut into buckets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.platform.training.device_copy import plan_buckets


def test_fragments_of_a_segment_share_buckets() -> None:
    (bucket,) = plan_buckets([(0, 4096, 100), (0, 4224, 64), (0, 4288, 6)], 1024)
    assert (bucket.target, bucket.offset, bucket.nbytes) == (0, 4096, 198)
    assert [part.at for part in bucket.slices] == [0, 128, 192]


def test_long_items_are_cut() -> None:
    buckets = plan_buckets([(0, 0, 100), (0, 128, 500)], 256)
    assert [(b.offset, b.nbytes) for b in buckets] == [(0, 256), (256, 256), (512, 116)]
    assert [(s.item, s.start, s.stop) for b in buckets for s in b.slices] == [
        (0, 0, 100), (1, 0, 128), (1, 128, 384), (1, 384, 500),
    ]  # fmt: skip


def test_a_gap_another_target_or_a_step_back_begins_a_bucket() -> None:
    buckets = plan_buckets([(0, 0, 64), (0, 128, 64), (1, 192, 64), (1, 64, 64)], 1024)
    assert [(b.target, b.offset, b.nbytes) for b in buckets] == [
        (0, 0, 64),
        (0, 128, 64),
        (1, 192, 64),
        (1, 64, 64),
    ]


def test_a_place_where_words_would_be_misaligned_begins_a_bucket() -> None:
    assert len(plan_buckets([(0, 0, 4), (0, 4, 8)], 1024)) == 2


def test_nothing() -> None:
    assert plan_buckets([], 64) == plan_buckets([(0, 0, 0), (-1, 0, 0)], 64) == []


@pytest.mark.parametrize("size", [0, 32, 100])
def test_bad_bucket_size(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        plan_buckets([], size)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 200), st.integers(0, 700)), max_size=12),
    st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_every_byte_once(items: list[tuple[int, int, int]], units: int) -> None:
    places, ends = [], [0, 0]
    for target, gap, nbytes in items:
        places.append((target, ends[target] + gap, nbytes))
        ends[target] += gap + nbytes
    buckets = plan_buckets(places, 64 * units)
    copied: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(places))}
    for bucket in buckets:
        assert 0 < bucket.nbytes <= 64 * units
        used = sum(part.stop - part.start for part in bucket.slices)
        assert bucket.nbytes - used < 64 * len(bucket.slices)
        for part in bucket.slices:
            target, offset, _ = places[part.item]
            assert (target, offset + part.start) == (bucket.target, bucket.offset + part.at)
            assert part.at % 16 == 0
            assert part.start % 64 == 0
            assert part.at + part.stop - part.start <= bucket.nbytes
            copied[part.item].append((part.start, part.stop))
    for i, (_, _, nbytes) in enumerate(places):
        ends_of = [0, *(stop for _, stop in copied[i])]
        assert [start for start, _ in copied[i]] == ends_of[:-1]
        assert ends_of[-1] == nbytes
    order = [part.item for bucket in buckets for part in bucket.slices]
    assert order == sorted(order)

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.storage.errors import IndexInvalid, Unrecoverable
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
from everstep.storage.planner import GRAIN_BYTES, Want, plan

SIZE = 64
METAS = (TensorMeta("w", "param", "float32", (SIZE,)), TensorMeta("w", "exp_avg", "int64", (SIZE,)))
ITEM = {meta.key: meta.itemsize for meta in METAS}
SOURCES = [Source("live", f"rank-{i}", "") for i in range(3)] + [
    Source("segment", "d0", "s"),
    Source("file", "", "f"),
]
COST = {"live": 0, "segment": 1, "file": 5}


def cost(source: Source, want: Want) -> int:
    return -1 if source.holder == want.holder else COST[source.kind]


def at(source: Source, key: tuple[str, str], element: int) -> int:
    """Every source keeps a whole image of the state: where an element lies in it."""
    base = 0 if key[1] == "param" else SIZE * 4
    return base + SOURCES.index(source) * 10_000 + element * ITEM[key]


def fragment(source: Source, key: tuple[str, str], start: int, stop: int) -> Fragment:
    return Fragment(*key, start, stop, source, at(source, key, start), checksum=start * 100 + stop + 1)


keys = st.sampled_from([meta.key for meta in METAS])
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
fragments = st.lists(st.tuples(st.sampled_from(SOURCES), keys, spans), max_size=30)
wants = st.lists(st.tuples(keys, spans, st.sampled_from(["rank-0", "rank-1", "other"])), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(fragments, wants, st.randoms(use_true_random=False))
def test_every_want_is_covered_exactly_once_by_the_cheapest(have, want, rng):
    pieces = [fragment(source, key, *span) for source, key, span in have]
    asked = [Want(*key, *span, holder) for key, span, holder in want]
    holders = {(f.name, f.kind, e, f.source) for f in pieces for e in range(f.start, f.stop)}
    needed = [(w.holder, w.name, w.kind, e) for w in asked for e in range(w.start, w.stop)]

    def sources_of(name, kind, element):
        return [source for source in SOURCES if (name, kind, element, source) in holders]

    lost = [item for item in needed if not sources_of(*item[1:])]
    if lost:
        with pytest.raises(Unrecoverable) as caught:
            plan(StateIndex(1, METAS, tuple(pieces)), asked, cost)
        error = caught.value
        gone = {(name, kind, e) for _, name, kind, e in lost}
        assert error.start < error.stop
        assert all((error.name, error.kind, e) in gone for e in range(error.start, error.stop))
        return

    copies = plan(StateIndex(1, METAS, tuple(pieces)), asked, cost)
    got = [(c.holder, c.name, c.kind, e) for c in copies for e in range(c.start, c.stop)]
    assert sorted(got) == sorted(needed)
    for c in copies:
        assert c.nbytes == (c.stop - c.start) * ITEM[c.name, c.kind] > 0
        assert c.itemsize == ITEM[c.name, c.kind]
        assert c.offset == at(c.source, (c.name, c.kind), c.start)
        asker = Want(c.name, c.kind, c.start, c.stop, c.holder)
        for e in range(c.start, c.stop):
            assert cost(c.source, asker) == min(cost(s, asker) for s in sources_of(c.name, c.kind, e))
        assert all(f.source == c.source and f.start < c.stop and f.stop > c.start for f in c.fragments)
        for first, end, checksum in c.whole_fragments():
            start, stop = c.start + first // c.itemsize, c.start + end // c.itemsize
            assert checksum == start * 100 + stop + 1
            assert 0 <= first <= end <= c.nbytes

    rng.shuffle(pieces)
    rng.shuffle(asked)
    assert plan(StateIndex(1, METAS, tuple(pieces)), asked, cost) == copies


def test_cheaper_fragments_take_over_where_they_start_and_end():
    live, file = SOURCES[0], SOURCES[4]
    have = StateIndex(1, METAS, (fragment(file, METAS[0].key, 0, SIZE), fragment(live, METAS[0].key, 10, 20)))
    copies = plan(have, [Want("w", "param", 0, SIZE, "other")], cost)
    assert [(c.start, c.stop, c.source.kind) for c in copies] == [
        (0, 10, "file"),
        (10, 20, "live"),
        (20, SIZE, "file"),
    ]


def test_adjacent_copies_from_one_source_are_one():
    live = SOURCES[0]
    have = StateIndex(1, METAS, tuple(fragment(live, METAS[0].key, i, i + 8) for i in range(0, SIZE, 8)))
    (copy,) = plan(have, [Want("w", "param", 4, 30, "other"), Want("w", "param", 30, 60, "other")], cost)
    assert (copy.start, copy.stop, copy.nbytes) == (4, 60, 224)
    assert [f.start for f in copy.fragments] == list(range(0, 60, 8))
    # The first and the last fragment are only in part there: they cannot be checked.
    assert [first for first, _, _ in copy.whole_fragments()] == [4 * (i - 4) for i in range(8, 56, 8)]


def test_adjacent_elements_that_do_not_lie_together_stay_two_copies():
    live = SOURCES[0]
    padded = (Fragment("w", "param", 0, 8, live, 0), Fragment("w", "param", 8, 16, live, 64))
    copies = plan(StateIndex(1, METAS, padded), [Want("w", "param", 0, 16, "other")], cost)
    assert [(c.start, c.offset) for c in copies] == [(0, 0), (8, 64)]


def test_load_is_spread_over_equally_cheap_sources():
    units, elements = 120, 1 << 16
    meta = TensorMeta("big", "param", "float32", (units * elements,))
    peers = [Source("segment", f"d{i}", "s") for i in range(3)]
    pieces = tuple(
        Fragment("big", "param", u * elements, (u + 1) * elements, peer, u * elements * 4)
        for peer in peers
        for u in range(units)
    )
    for wants in (
        [Want("big", "param", 0, meta.numel, "a")],
        [Want("big", "param", u * elements, (u + 1) * elements, "a") for u in range(units)],
    ):
        given_ = dict.fromkeys(peers, 0)
        copies = plan(StateIndex(1, (meta,), pieces), wants, lambda s, w: 3)
        for c in copies:
            given_[c.source] += c.nbytes
        assert max(given_.values()) - min(given_.values()) <= 2 * GRAIN_BYTES
        # Spread in grains, not in crumbs.
        assert len(copies) <= meta.nbytes // GRAIN_BYTES + 3


def test_what_nobody_holds_is_named():
    have = StateIndex(
        1, METAS, (fragment(SOURCES[0], METAS[0].key, 0, 10), fragment(SOURCES[1], METAS[0].key, 12, SIZE))
    )
    with pytest.raises(Unrecoverable, match=r"10:12 of 'w' \(param\), which 'me' needs"):
        plan(have, [Want("w", "param", 0, SIZE, "me")], cost)
    with pytest.raises(Unrecoverable, match="'v'"):
        plan(have, [Want("v", "param", 0, 1, "me")], cost)


def test_a_want_outside_its_tensor_is_refused():
    with pytest.raises(IndexInvalid, match="wants 0:65"):
        plan(StateIndex(1, METAS, ()), [Want("w", "param", 0, SIZE + 1, "me")], cost)


def test_an_empty_want_takes_nothing():
    assert plan(StateIndex(1, METAS, ()), [Want("w", "param", 5, 5, "me")], cost) == ()


@pytest.mark.parametrize("parts", [1, 1000, 50_000])
def test_a_hundred_thousand_fragments_do_not_make_it_quadratic(parts):
    units, elements = 50_000, 4096
    meta = TensorMeta("big", "param", "float32", (units * elements,))
    pieces = [
        Fragment(
            "big",
            "param",
            u * elements,
            (u + 1) * elements,
            Source("segment", f"d{u % 4 + r}", "s"),
            u * 16384,
        )
        for r in range(2)
        for u in range(units)
    ]
    pieces.append(Fragment("big", "param", 0, meta.numel, Source("file", "", "f"), 0))
    random.Random(0).shuffle(pieces)
    share = meta.numel // parts
    asked = [Want("big", "param", i * share, (i + 1) * share, "a") for i in range(parts)]
    started = time.process_time()
    copies = plan(StateIndex(1, (meta,), tuple(pieces)), asked, cost)
    # Half a second here; a quadratic plan takes minutes. Processor time: a busy machine does not matter.
    assert time.process_time() - started < 10
    assert sum(c.nbytes for c in copies) == meta.nbytes
    assert all(c.source.kind == "segment" for c in copies)

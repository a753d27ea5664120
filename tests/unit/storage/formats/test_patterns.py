"""The pattern language, and shards joined by it against arrays cut by numpy."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep.storage.errors import CheckpointCorrupt, CheckpointUnsupported
from everstep.storage.formats.patterns import Patterns, Rule, parse, places
from everstep.storage.formats.shards import Piece, Shard, join, rounded
from everstep.storage.stores.opening import folder_at


def rules(*given, default="error", **more):
    return {"default": default, "rules": list(given), **more}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "default is None; allowed: one of cat, replicated, error"),
        ({"default": "none"}, "default is 'none'"),
        ([], "a list; a mapping is wanted"),
        ("default: [", "not YAML"),
        ({"default": "cat", "rule": []}, "unknown field 'rule'"),
        ({"default": "cat", "rules": {"match": "a"}}, "rules is"),
        (rules("x"), "rule 1: a str"),
        (rules({"as": "cat"}), r"rule 1 \(None\): match is None"),
        (rules({"match": "a", "as": "cat"}, {"match": "(", "as": "cat"}), r"rule 2 \('\('\): match is"),
        (rules({"match": "a", "as": "split"}), "as is 'split'; allowed: one of replicated"),
        (rules({"match": "a"}), "as is None"),
        (rules({"match": "a", "as": "cat", "dim": -1}), "dim is -1"),
        (rules({"match": "a", "as": "cat", "dim": True}), "dim is True"),
        (rules({"match": "a", "as": "cat", "rows": 3}), "unknown field 'rows'"),
        (rules({"match": "a", "as": "vocabulary"}), "rows is 0"),
        (rules({"match": "a", "as": "parts"}), "widths is None"),
        (rules({"match": "a", "as": "parts", "widths": []}), "widths is"),
        (rules({"match": "a", "as": "parts", "widths": {"q": [4, -1]}}), "widths is"),
        (rules({"match": "a", "as": "experts"}), "match is 'a'; allowed: a pattern with a group"),
        (rules({"match": r"(?P<expert>\d+)", "as": "experts", "per_rank": 4}), "per_rank is 4"),
        (rules({"match": "a", "as": "tied"}), "to is ''"),
        (rules({"match": "a", "as": "cat", "rename": r"\1"}), "rename is"),
        (rules(layers={"match": "a"}), "layers: match is 'a'"),
        (rules(layers={"match": r"(?P<layer>\d)", "per_stage": [1, "2"]}), "per_stage is"),
    ],
)
def test_mistakes_are_named_with_rule_and_field(document, message):
    with pytest.raises(CheckpointUnsupported, match=message):
        parse(document)


def test_a_document_may_be_text_or_a_file(tmp_path):
    text = "default: cat\nrules:\n  - {match: '.*norm', as: replicated}\n"
    (tmp_path / "patterns.yaml").write_text(text)
    expected = parse({"default": "cat", "rules": [{"match": ".*norm", "as": "replicated"}]})
    assert isinstance(expected, Patterns)
    assert parse(text) == parse(tmp_path / "patterns.yaml") == parse(str(tmp_path / "patterns.yaml")) == expected
    with pytest.raises(CheckpointUnsupported, match="cannot be read"):
        parse(tmp_path / "none.yaml")


def test_rules_that_match_nothing_and_names_matched_twice_are_all_listed():
    patterns = parse(
        rules(
            {"match": "a.*", "as": "cat"},
            {"match": ".*b", "as": "replicated"},
            {"match": "never", "as": "cat"},
            {"match": "nor.this", "as": "cat"},
        )
    )
    with pytest.raises(CheckpointUnsupported) as caught:
        patterns.matched(["ab", "axb", "other", "a"])
    told = str(caught.value)
    for text in (
        "'ab' is matched by 2",
        "'axb' is matched by 2",
        "'other' is matched by no",
        "'never'",
        "'nor.this'",
    ):
        assert text in told
    assert "'a' is" not in told


def test_match_is_of_the_whole_name():
    patterns = parse(rules({"match": "norm", "as": "replicated"}, default="cat"))
    found = patterns.matched(["norm", "norm.weight"])
    assert found["norm"][0].form == "replicated"
    assert found["norm.weight"][0].form == "cat"


@pytest.mark.parametrize(
    ("rule", "shapes", "message"),
    [
        (Rule("replicated"), [(2, 3), (3, 2)], "different shapes"),
        (Rule("cat"), [(2, 3), (2, 4)], "along dimension 0 has shapes"),
        (Rule("cat", dim=2), [(2, 3), (2, 3)], "along dimension 2"),
        (Rule("cat"), [(2, 3), (2,)], "along dimension 0"),
        (Rule("vocabulary", rows=9), [(4, 1), (4, 1)], "of 9 rows has only 8"),
        (Rule("parts", parts=(("q", 4), ("k", 2))), [(3,), (2,)], r"make \[3, 3\].*have \[3, 2\]"),
        (Rule("parts", parts=(("q", (2, 2, 2)),)), [(3,), (3,)], "widths for 3 ranks; there are 2"),
    ],
)
def test_shapes_that_do_not_fit_a_rule(rule, shapes, message):
    with pytest.raises(CheckpointUnsupported, match=message):
        places(rule, "x", shapes)


class Files:
    """Shards written with junk around them, in pieces or with strides."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = folder_at(root)
        self.number = 0

    def shard(self, name, array, cuts=(), strided=False, **place) -> Shard:
        """`cuts`: where its flat elements are cut into pieces of their own files."""
        array = np.asarray(array, order="C")
        if strided:
            file, offset = self._written(array.T.tobytes())
            strides = tuple(int(s) // array.itemsize for s in np.asarray(array.T, order="C").T.strides)
            pieces = [Piece(0, array.size, file, offset, strides)]
        else:
            edges = sorted({0, array.size, *(min(c, array.size) for c in cuts)})
            pieces = [
                Piece(a, b, *self._written(array.reshape(-1)[a:b].tobytes())) for a, b in itertools.pairwise(edges)
            ]
        return Shard(name, place.pop("kind", "param"), str(array.dtype), array.shape, tuple(pieces), **place)

    def _written(self, data: bytes) -> tuple[str, int]:
        self.number += 1
        name, before = f"file{self.number}", self.number % 7
        (self.root / name).write_bytes(b"\xee" * before + data + b"\xee" * 3)
        return name, before

    def tensor(self, joined, name, kind="param") -> np.ndarray:
        """What a tensor's fragments say, element by element."""
        meta = next(meta for meta in joined.tensors if meta.key == (name, kind))
        out = np.zeros(meta.shape, meta.dtype)
        written = np.zeros(meta.shape, np.int64)
        if meta.key in joined.inline:
            return np.frombuffer(joined.inline[meta.key], meta.dtype).reshape(meta.shape)
        for f in (f for f in joined.fragments if f.key == meta.key):
            raw = (self.root / f.source.locator).read_bytes()
            box = f.box or tuple((0, extent) for extent in meta.shape)
            shape = tuple(extent for _, extent in box)
            where = tuple(slice(first, first + extent) for first, extent in box)
            order = np.arange(out.size).reshape(out.shape)[where].reshape(-1)[f.start : f.stop]
            if f.strides:
                steps = tuple(s * meta.itemsize for s in f.strides)
                values = np.ndarray(shape, meta.dtype, raw, f.offset, steps).reshape(-1)
            else:
                values = np.frombuffer(raw, meta.dtype, f.stop - f.start, f.offset)
            out.reshape(-1)[order] = values
            written.reshape(-1)[order] += 1
        assert (written == 1).all()
        return out


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@st.composite
def cut_tensors(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    ranks = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    if not sum(widths):
        widths[0] = 1
    cuts = draw(st.lists(st.lists(st.integers(0, 60), max_size=3), min_size=ranks, max_size=ranks))
    return shape, dim, ranks, widths, cuts, draw(st.booleans()), draw(st.sampled_from(["cat", "parts", "vocabulary"]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut_tensors())
def test_any_cut_of_any_tensor_in_any_pieces(files, case):
    """Cut by numpy (array_split, part by part), in flat pieces or transposed in its file, joined back."""
    shape, dim, ranks, widths, cuts, strided, form = case
    dim = 0 if form == "vocabulary" else dim
    widths = widths if form == "parts" else [sum(widths)]
    total = sum(widths)
    shape = (*shape[:dim], total, *shape[dim + 1 :])
    full = np.random.default_rng(total).integers(0, 255, shape, np.int32)
    parts = np.split(full, list(itertools.accumulate(widths))[:-1], axis=dim)
    shards = []
    for rank in range(ranks):
        own = np.concatenate([np.array_split(part, ranks, axis=dim)[rank] for part in parts], axis=dim)
        if form == "vocabulary" and rank == ranks - 1:
            own = np.concatenate([own, np.full((2, *shape[1:]), -1, np.int32)])
        shards.append(files.shard("x", own, cuts[rank], strided, tensor=rank))
    rule = {"match": "x", "as": form}
    rule |= {"cat": {"dim": dim}, "parts": {"dim": dim, "widths": widths}, "vocabulary": {"rows": total}}[form]
    joined = join(files.folder, shards, parse(rules(rule)), ranks)
    np.testing.assert_array_equal(files.tensor(joined, "x"), full)


@pytest.mark.parametrize("form", [{"as": "cat", "dim": 1}, {"as": "parts", "dim": 1, "widths": [3, 5]}])
def test_every_place_where_a_shard_can_be_cut(files, form):
    full = np.arange(24, dtype=np.int16).reshape(3, 8)
    for cut in range(1, 12):
        shards = []
        for rank in range(2):
            own = [np.array_split(part, 2, axis=1)[rank] for part in np.split(full, [3], axis=1)]
            held = np.array_split(full, 2, axis=1)[rank] if form["as"] == "cat" else np.concatenate(own, axis=1)
            shards.append(files.shard("x", held, (cut, cut + 4), tensor=rank))
        joined = join(files.folder, shards, parse(rules({"match": "x", **form})), 2)
        np.testing.assert_array_equal(files.tensor(joined, "x"), full)


def test_widths_rank_by_rank(files):
    q, k = np.arange(6, dtype=np.int64), np.arange(100, 104, dtype=np.int64)
    shards = [
        files.shard("x", np.concatenate([q[:1], k[:3]]), tensor=0),
        files.shard("x", np.concatenate([q[1:], k[3:]]), tensor=1),
    ]
    rule = {"match": "x", "as": "parts", "widths": {"q": [1, 5], "k": [3, 1]}}
    joined = join(files.folder, shards, parse(rules(rule)), 2)
    np.testing.assert_array_equal(files.tensor(joined, "x"), np.concatenate([q, k]))


def test_replicas_are_compared_however_they_lie(files):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    patterns = parse(rules(default="replicated"))
    shards = [files.shard("x", array, (5,), tensor=0), files.shard("x", array, (), True, tensor=1)]
    joined = join(files.folder, shards, patterns, 2)
    np.testing.assert_array_equal(files.tensor(joined, "x"), array)
    other = array.copy()
    other[2, 3] = -1
    shards[1] = files.shard("x", other, (), True, tensor=1)
    with pytest.raises(CheckpointCorrupt, match="replicated") as caught:
        join(files.folder, shards, patterns, 2)
    assert (caught.value.tensor, caught.value.file) == ("x", shards[1].pieces[0].file)


def test_an_average_is_rounded_once(files):
    a, b = np.float32([1, 3, 1e30]), np.float32([2, 5, 3e30])
    joined = join(
        files.folder,
        [files.shard("x", a, tensor=0), files.shard("x", b, tensor=1)],
        parse(rules({"match": "x", "as": "average"})),
        2,
    )
    np.testing.assert_array_equal(files.tensor(joined, "x"), np.float32([1.5, 4, 2e30]))
    assert joined.fragments == []
    integers = [files.shard("x", np.arange(3), tensor=rank) for rank in range(2)]
    with pytest.raises(CheckpointUnsupported, match="'x' as average: no arithmetic on int64"):
        join(files.folder, integers, parse(rules({"match": "x", "as": "average"})), 2)


def test_rounding_to_bfloat16_is_that_of_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[~np.isnan(values)], np.float32([0, -0.0, np.inf, 1.00390625, 1.01171875])])
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().tobytes()
    assert rounded(values.astype(np.float64), "bfloat16") == expected
    nan = torch.frombuffer(bytearray(rounded(np.array([np.nan]), "bfloat16")), dtype=torch.bfloat16)
    assert nan.isnan().item()
    # Half-way between two bfloat16 and a little more, less than float32 can tell: up, not to even.
    above = rounded(np.array([1.00390625 + 2**-40]), "bfloat16")
    assert np.frombuffer(above, np.uint16) == 0x3F81


def test_optimizer_state_follows_its_parameter_where_the_shape_is_the_same(files):
    full = np.arange(24, dtype=np.float32).reshape(4, 6)
    shards = []
    for rank in range(2):
        own = full[:, rank * 3 : rank * 3 + 3]
        shards += [
            files.shard("x", own, tensor=rank),
            files.shard("x", own * 2, tensor=rank, kind="exp_avg"),
            files.shard("x", np.float32([7, 8]), tensor=rank, kind="row"),
            Shard("x", "step", "float32", (), value=np.float32(3).tobytes(), tensor=rank),
        ]
    patterns = parse(rules({"match": "x", "as": "cat", "dim": 1}))
    joined = join(files.folder, shards, patterns, 2)
    np.testing.assert_array_equal(files.tensor(joined, "x", "exp_avg"), full * 2)
    np.testing.assert_array_equal(files.tensor(joined, "x", "row"), np.float32([7, 8]))
    assert joined.inline["x", "step"] == np.float32(3).tobytes()
    shards[-1] = Shard("x", "step", "float32", (), value=np.float32(4).tobytes(), tensor=1)
    with pytest.raises(CheckpointCorrupt, match="step"):
        join(files.folder, shards, patterns, 2)


def test_experts_are_numbered_through_the_ranks(files):
    shards = [
        files.shard(f"moe.{local}.w", np.full(2, 10 * rank + local, np.int32), tensor=rank)
        for rank, count in enumerate((2, 3))
        for local in range(count)
    ]
    rule = {"match": r"moe\.(?P<expert>\d+)\.w", "as": "experts", "rename": r"experts.\g<expert>"}
    with pytest.raises(CheckpointUnsupported, match=r"per_rank \[2, 2\].*\[0, 1, 2\]"):
        join(files.folder, shards, parse(rules(rule)), 2)
    joined = join(files.folder, shards, parse(rules({**rule, "per_rank": [2, 3]})), 2)
    found = [int(files.tensor(joined, f"experts.{n}")[0]) for n in range(5)]
    assert found == [0, 1, 10, 11, 12]
    assert len(joined.tensors) == 5


def test_a_rank_that_lacks_a_tensor_is_named(files):
    shards = [files.shard("x", np.arange(3), tensor=0), files.shard("y", np.arange(3), tensor=1)]
    with pytest.raises(CheckpointUnsupported, match=r"'x' \(param\) is not on tensor ranks \[1\]"):
        join(files.folder, shards, parse(rules(default="cat")), 2)


def test_two_names_cannot_become_one(files):
    shards = [files.shard("a.w", np.arange(3)), files.shard("b.w", np.arange(3))]
    rule = {"match": r"\w\.w", "as": "cat", "rename": "w"}
    with pytest.raises(CheckpointUnsupported, match=r"'a\.w' and 'b\.w' are both renamed 'w'"):
        join(files.folder, shards, parse(rules(rule)), 1)


def test_a_tie_to_nothing_is_refused(files):
    shards = [files.shard("head", np.arange(3))]
    with pytest.raises(CheckpointUnsupported, match="tied to 'embedding', which is not there"):
        join(files.folder, shards, parse(rules({"match": "head", "as": "tied", "to": "embedding"})), 1)


def test_a_tie_to_what_is_tied_itself_is_refused(files):
    shards = [files.shard(name, np.arange(3)) for name in "abc"]
    given = [{"match": "a", "as": "tied", "to": "b"}, {"match": "b", "as": "tied", "to": "c"}]
    with pytest.raises(CheckpointUnsupported, match="'a' is tied to 'b', which is itself tied"):
        join(files.folder, shards, parse(rules(*given, default="cat")), 1)


def test_tensors_without_dimensions_are_replicated_by_default(files):
    shards = [files.shard("x", np.float32(3), tensor=rank) for rank in range(2)]
    joined = join(files.folder, shards, parse(rules(default="cat")), 2)
    assert files.tensor(joined, "x") == 3

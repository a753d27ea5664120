"""Weights out of another run's checkpoint: which goes where, and what is refused."""

from __future__ import annotations

import pytest

from everstep.platform.job.spec import InitFrom
from everstep.platform.training.warm_start import WarmStartRefused, match
from everstep.storage.index import StateIndex, TensorMeta

HAVE = StateIndex(
    7,
    (
        TensorMeta("body.weight", "param", "float32", (3, 4)),
        TensorMeta("body.weight", "exp_avg", "float32", (3, 4)),
        TensorMeta("head.weight", "param", "bfloat16", (2, 3)),
        TensorMeta("mean", "buffer", "float32", (3,)),
    ),
    (),
)
MODEL = {"body.weight": (3, 4), "head.weight": (2, 3), "mean": (3,)}


def rule(**fields) -> InitFrom:
    return InitFrom(url="somewhere", **fields)


def test_weights_and_buffers_are_taken_and_optimizer_state_is_not() -> None:
    found = match(MODEL, HAVE, rule())
    assert [(name, meta.kind) for name, meta in found.pairs] == [
        ("body.weight", "param"),
        ("head.weight", "param"),
        ("mean", "buffer"),
    ]
    assert (found.renamed, found.missing, found.unused) == ((), (), ())
    assert found.text("there") == "initial weights: 3 tensors of there"


def test_names_are_changed_by_patterns_and_what_was_renamed_is_listed() -> None:
    model = {"encoder.body.weight": (3, 4), "encoder.head.weight": (2, 3), "mean": (3,)}
    found = match(model, HAVE, rule(names={r"^(body|head)\.": r"encoder.\1."}))
    assert found.renamed == (("body.weight", "encoder.body.weight"), ("head.weight", "encoder.head.weight"))
    assert "2 renamed (body.weight -> encoder.body.weight, " in found.text("there")


def test_what_is_missing_is_an_error_unless_it_may_stay() -> None:
    model = {**MODEL, "new.bias": (2,)}
    with pytest.raises(WarmStartRefused, match=r"has not new\.bias; .*missing: keep"):
        match(model, HAVE, rule())
    found = match(model, HAVE, rule(missing="keep"))
    assert found.missing == ("new.bias",)
    assert "1 stay as built (new.bias)" in found.text("there")


def test_what_the_model_has_no_use_for_is_listed() -> None:
    found = match({"body.weight": (3, 4)}, HAVE, rule())
    assert found.unused == ("head.weight", "mean")
    assert "2 of it not used (head.weight, mean)" in found.text("there")


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        ({**MODEL, "body.weight": (4, 3)}, {}, ["body.weight", "[3, 4] in the checkpoint", "[4, 3] in the model"]),
        ({"other": (1,)}, {"missing": "keep"}, ["none of the model's tensors", "body.weight"]),
        (MODEL, {"names": {"(": "x"}}, ["'('", "no regular expression"]),
        (MODEL, {"names": {"^body": r"\2"}}, [r"'\\2'", "cannot be put in"]),
        (MODEL, {"names": {"^tail": "x"}}, ["^tail", "match no tensor"]),
        (
            {"mean": (3,), "w": (3, 4)},
            {"names": {"^(body|head).weight": "w"}},
            ["body.weight", "head.weight", "both become 'w'"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    model: dict[str, tuple[int, ...]], fields: dict, words: list[str]
) -> None:
    with pytest.raises(WarmStartRefused) as refused:
        match(model, HAVE, rule(**fields))
    assert all(word in str(refused.value) for word in words), refused.value

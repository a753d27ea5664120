import hashlib

import pytest

from everstep.storage.checkpoint import Checkpoint
from everstep.storage.index import TensorMeta
from everstep.storage.state_hash import combine, tensor_line

W = TensorMeta("w", "param", "float32", (2, 3))
S = TensorMeta("w", "step", "float32", ())
D = hashlib.sha256(b"bytes").hexdigest()


def test_the_lines_are_as_documented():
    assert tensor_line(W, D) == f"w param float32 [2,3] {D}"
    assert tensor_line(S, D) == f"w step float32 [] {D}"


def test_the_hash_is_over_the_sorted_lines_and_the_step():
    lines = [tensor_line(S, D), tensor_line(W, D)]
    text = f"w param float32 [2,3] {D}\nw step float32 [] {D}\nstep 7\n"
    assert combine(lines, 7) == combine(lines[::-1], 7) == hashlib.sha256(text.encode()).hexdigest()
    assert combine(lines, 8) != combine(lines, 7)


def test_what_is_no_line_is_refused():
    with pytest.raises(ValueError, match="SHA-256"):
        tensor_line(W, D[:-1])
    with pytest.raises(ValueError, match="line break"):
        tensor_line(TensorMeta("a\nb", "param", "float32", ()), D)
    with pytest.raises(ValueError, match="'w param'"):
        combine([tensor_line(W, D), tensor_line(W, hashlib.sha256(b"other").hexdigest())], 7)


def test_a_checkpoints_hash_does_not_depend_on_how_it_is_cut(state):
    hashes = {Checkpoint.open(state.checkpoint(step=4, ranks=ranks)).state_sha256() for ranks in (1, 2, 5)}
    lines = [tensor_line(meta, hashlib.sha256(state.content(meta, 4)).hexdigest()) for meta in state.metas]
    assert hashes == {combine(lines, 4)}

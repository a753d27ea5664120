"""The proof of the token: bound to role, nonces, purpose and protocol version."""

from __future__ import annotations

import itertools

import pytest

from everstep.collectives import handshake
from everstep.collectives.handshake import NONCE_BYTES, PROOF_BYTES, new_nonce, proof, proof_matches

A, B = b"a" * NONCE_BYTES, b"b" * NONCE_BYTES
GIVEN = ("token", "client", A, B, b"view 1.2")


def test_a_proof_matches_what_it_was_made_for_and_nothing_else() -> None:
    given = proof(*GIVEN)
    assert len(given) == PROOF_BYTES
    assert proof_matches(given, *GIVEN)
    others = [
        ("Token", *GIVEN[1:]),
        ("token", "server", A, B, b"view 1.2"),
        ("token", "client", B, A, b"view 1.2"),
        ("token", "client", A, B, b"view 1.3"),
        ("token", "client", A, B, b""),
    ]
    for other in others:
        assert not proof_matches(given, *other)
    assert len({proof(*other) for other in [GIVEN, *others]}) == len(others) + 1


@pytest.mark.parametrize("given", [b"", b"x", bytes(PROOF_BYTES), bytes(PROOF_BYTES + 1)])
def test_anything_else_is_no_proof(given: bytes) -> None:
    assert not proof_matches(given, *GIVEN)
    assert not proof_matches(proof(*GIVEN)[:-1], *GIVEN)


def test_a_proof_is_not_the_token_and_not_another_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    given = proof(*GIVEN)
    assert b"token" not in given
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", handshake.PROTOCOL_VERSION + 1)
    assert not proof_matches(given, *GIVEN)


def test_nonces_are_never_the_same() -> None:
    nonces = [new_nonce() for _ in range(100)]
    assert all(len(nonce) == NONCE_BYTES for nonce in nonces)
    assert all(a != b for a, b in itertools.combinations(nonces, 2))

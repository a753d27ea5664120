"""Mutual proof of the run's token, for TCP connections and control streams alike.

The token never crosses the wire: each side sends a nonce and proves with an HMAC over both nonces, the
protocol version and its own role. Pure functions; no socket here.
"""

from __future__ import annotations

import hashlib
import hmac
import os

PROTOCOL_VERSION = 1
NONCE_BYTES = 16
PROOF_BYTES = 32


def new_nonce() -> bytes:
    return os.urandom(NONCE_BYTES)


def proof(token: str, role: str, client_nonce: bytes, server_nonce: bytes, context: bytes = b"") -> bytes:
    """HMAC-SHA256 that `role` ("client" | "server") knows `token`; `context` binds a view or purpose."""
    parts = (b"everstep", str(PROTOCOL_VERSION).encode(), role.encode(), client_nonce, server_nonce, context)
    # Each with its length: no bytes can be moved from one into the next, whatever the other side sent as a nonce.
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.new(token.encode(), message, hashlib.sha256).digest()


def proof_matches(
    given: bytes, token: str, role: str, client_nonce: bytes, server_nonce: bytes, context: bytes = b""
) -> bool:
    return hmac.compare_digest(given, proof(token, role, client_nonce, server_nonce, context))

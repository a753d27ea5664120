"""Unary calls of a run's clients (everstep.actors.client), answered from gRPC threads."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from everstep.platform.job.result import RunResult
from everstep.platform.job.status import Event, Status

_LONGEST_WAIT_S = 30.0  # a call must not keep its thread for ever; the client asks again


class Steered(Protocol):
    """What a client may do to a run."""

    def status(self) -> Status: ...
    def events(self, after: int) -> list[Event]: ...
    def scale(self, ranks: int) -> str: ...
    def save(self) -> str: ...
    def drain(self, node: str, rank: int | None) -> str: ...
    def stop(self, reason: str) -> None: ...
    def result(self) -> RunResult | None: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def end_processes(self) -> None: ...


def answer(run: Steered, data: bytes) -> bytes:
    """One call: msgpack in, JSON out. Raises ValueError for a call that does not exist."""
    request = msgspec.msgpack.decode(data, type=dict[str, Any])
    reply: Any = None
    match request.get("do"):
        case "status":
            reply = run.status()
        case "events":
            reply = run.events(int(request["after"]))
        case "scale":
            reply = run.scale(int(request["ranks"]))
        case "save":
            reply = run.save()
        case "drain":
            reply = run.drain(str(request["node"]), request["rank"])
        case "stop":
            run.stop(str(request["reason"]))
        case "result":
            reply = run.result()
        case "wait":
            reply = run.wait(min(float(request["timeout_s"]), _LONGEST_WAIT_S))
        case "close":
            run.end_processes()
        case other:
            raise ValueError(f"unknown call {other!r}")
    return msgspec.json.encode(reply)

"""Steers and watches a live run from outside, over its supervisor's endpoint. Implements `RunClient`."""

from __future__ import annotations

from typing import Any

import msgspec

from everstep.collectives.control import call
from everstep.collectives.errors import CollectiveError
from everstep.platform.job.result import RunResult
from everstep.platform.job.status import Event, Status


class SupervisorClient:
    """Calls raise ConnectionError when the supervisor cannot be reached or refuses the token."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self._token = token

    def _call(self, request: dict[str, Any], timeout_s: float = 10.0) -> bytes:
        try:
            return call(self.address, self._token, msgspec.msgpack.encode(request), timeout_s)
        except CollectiveError as error:
            raise ConnectionError(str(error)) from error

    def status(self) -> Status:
        return msgspec.json.decode(self._call({"do": "status"}), type=Status)

    def events(self, after: int) -> list[Event]:
        return msgspec.json.decode(self._call({"do": "events", "after": after}), type=list[Event])

    def scale(self, ranks: int) -> str:
        return msgspec.json.decode(self._call({"do": "scale", "ranks": ranks}), type=str)

    def save(self) -> str:
        return msgspec.json.decode(self._call({"do": "save"}), type=str)

    def drain(self, node: str, rank: int | None) -> str:
        return msgspec.json.decode(self._call({"do": "drain", "node": node, "rank": rank}), type=str)

    def stop(self, reason: str) -> None:
        self._call({"do": "stop", "reason": reason})

    def result(self) -> RunResult | None:
        return msgspec.json.decode(self._call({"do": "result"}), type=RunResult | None)

    def wait(self, timeout_s: float) -> bool:
        """True once there is a result."""
        return msgspec.json.decode(self._call({"do": "wait", "timeout_s": timeout_s}, timeout_s + 10), type=bool)

    def close(self) -> None:
        """Ends the run's processes, now if it still goes on."""
        self._call({"do": "close"}, 60.0)


def connect(address: str, token: str) -> SupervisorClient:
    """A client of the run at `address`; raises ConnectionError if nobody answers there."""
    client = SupervisorClient(address, token)
    client.status()
    return client

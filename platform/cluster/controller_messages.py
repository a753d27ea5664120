"""What supervisors and the cluster's controller say to each other, and what the controller shows and keeps. msgpack.

A supervisor opens a stream and enrols, then says whenever the number of its processes changes, or a grant has come;
`number` is that of the newest grant that it knows of. No I/O.
"""

from __future__ import annotations

from typing import Any

import msgspec

from everstep.collectives.messages import decoded

VERSION = 1  # of the messages; another one is refused
STATE_VERSION = 1  # of what is kept


class Enrol(msgspec.Struct, frozen=True, tag="enrol"):
    """`granted`: what a run that goes on was granted last, 0 for one that waits for its first grant."""

    version: int
    job: str
    run: str
    priority: int
    min: int
    max: int
    spares: int
    demand: dict[str, float]
    granted: int = 0
    held: int = 0
    number: int = 0

    @property
    def key(self) -> str:
        return f"{self.job}.{self.run}"


class Held(msgspec.Struct, frozen=True, tag="held"):
    held: int
    number: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The run has ended and its processes are gone; `result` is what of it is worth keeping."""

    result: dict[str, Any]


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """0 processes: the run is queued."""

    processes: int
    reason: str
    number: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    reason: str


class Owner(msgspec.Struct, frozen=True):
    """The controller that wrote a state. `machine`, `pid`, `started` name its process for good."""

    id: str
    host: str
    machine: str
    pid: int
    started: int
    address: str

    def __str__(self) -> str:
        return f"the controller at {self.address} (host {self.host}, pid {self.pid})"


class KeptJob(msgspec.Struct, frozen=True):
    job: str
    run: str
    priority: int
    min: int
    max: int
    spares: int
    demand: dict[str, float]
    arrival: int
    granted: int
    reason: str
    proven: bool


class Kept(msgspec.Struct, frozen=True):
    """What survives the controller. `owner` is None where it ended in order."""

    version: int
    owner: Owner | None
    jobs: dict[str, KeptJob]
    arrivals: int
    grants: int
    results: list[dict[str, Any]]


class JobRow(msgspec.Struct, frozen=True):
    """state: running, queued, or absent (its supervisor is not heard of)."""

    job: str
    run: str
    priority: int
    state: str
    granted: int
    held: int
    min: int
    max: int
    spares: int
    reason: str


class Table(msgspec.Struct, frozen=True):
    """What `everstep jobs --address` shows. `pid` and `host` are the controller's."""

    address: str
    host: str
    pid: int
    place: str  # where its state is kept
    jobs: list[JobRow]
    results: list[dict[str, Any]]  # of ended runs, newest last


_encoder = msgspec.msgpack.Encoder()
_to_controller = msgspec.msgpack.Decoder(Enrol | Held | Done)
_to_supervisor = msgspec.msgpack.Decoder(Granted | Refused)
_kept = msgspec.msgpack.Decoder(Kept)


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode_to_controller(data: bytes) -> Enrol | Held | Done:
    """Raises msgspec.ValidationError for anything else."""
    message: Enrol | Held | Done = decoded(_to_controller, data)
    return message


def decode_to_supervisor(data: bytes) -> Granted | Refused:
    message: Granted | Refused = decoded(_to_supervisor, data)
    return message


def decode_kept(data: bytes) -> Kept:
    """Raises msgspec.ValidationError, also for a state of another version."""
    kept: Kept = decoded(_kept, data)
    if kept.version != STATE_VERSION:
        raise msgspec.ValidationError(f"its version is {kept.version}, this everstep reads {STATE_VERSION}")
    return kept

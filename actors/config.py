"""What a started process is told. The bytes hold the token: they travel by pipe or actor call, never by argv."""

from __future__ import annotations

from typing import Any

import msgspec

from everstep.collectives.messages import Verdict


class ManagerConfig(msgspec.Struct, frozen=True):
    run_id: str
    run_folder: str  # /dev/shm/everstep-RUNID
    name: str  # manager-SLOT.INCARNATION
    slot: int
    domain: str
    token: str
    coordinator: str  # host:port
    frozen_s: float
    stall_s: float
    embedded: bool  # the driver keeps the run folder; else this manager does too
    epoch: int = 0  # of the supervisor that started it
    orphan_s: float = 0.0  # how long it waits for a successor of a supervisor that is lost; 0: there will be none


class RankConfig(msgspec.Struct, frozen=True):
    run_id: str
    run_folder: str
    name: str  # rank-SLOT.INCARNATION
    slot: int
    domain: str
    token: str
    manager: str  # host:port of the manager's control listener
    fetch: str  # host:port of the manager's fetch listener
    spec: dict[str, Any]
    spec_dir: str


class ParityGroup(msgspec.Struct, frozen=True):
    """The failure domains that keep parity of each other's snapshots, by position; one of them is this one."""

    members: tuple[tuple[str, str], ...]  # domain, address of its manager's fetch listener
    position: int
    parity: int
    capacity_bytes: int  # of one version's parity segment


class SlotsWanted(msgspec.Struct, frozen=True):
    """A trainer asks its manager for segments: `count` slots, numbered from `first`."""

    label: tuple[int, int]  # epoch, view number
    capacity_bytes: int
    count: int
    first: int = 0
    group: ParityGroup | None = None


class SlotsGiven(msgspec.Struct, frozen=True):
    label: tuple[int, int]
    paths: tuple[str, ...]
    error: str = ""


class SegmentSealed(msgspec.Struct, frozen=True):
    """A trainer has sealed a version; `protect`: its group's parity of it is due."""

    label: tuple[int, int]
    step: int
    path: str
    protect: bool


class Secured(msgspec.Struct, frozen=True):
    """The manager has written its parity of a version, or `error` says why it has not."""

    label: tuple[int, int]
    step: int
    cpu_s: float
    error: str = ""


class SaveSegment(msgspec.Struct, frozen=True):
    """A trainer has sealed `step` in `path`: its manager writes it into the checkpoint's folder."""

    path: str
    step: int
    folder: str
    file: str


class Saved(msgspec.Struct, frozen=True):
    """`record` is a msgpack FileRecord; `error` says why there is none."""

    folder: str
    step: int
    file: str
    record: bytes = b""
    error: str = ""


class TaskFailed(msgspec.Struct, frozen=True):
    message: str
    traceback: str
    step: int
    lane: int
    kind: str = "task"  # or "internal": not the task's fault


class Wake(msgspec.Struct, frozen=True):
    """Scripted: `name` is sent SIGCONT when it is to be fenced, and killed only `wake_s` later."""

    name: str
    wake_s: float


class FaultReached(msgspec.Struct, frozen=True):
    index: int
    step: int


class Follow(msgspec.Struct, frozen=True):
    """The supervisor of `epoch` is at `address`; of the books it took over, `known_step` is the newest step."""

    epoch: int
    address: str
    known_step: int


class Followed(msgspec.Struct, frozen=True):
    """A manager's answer; `refused` says why it does not follow."""

    refused: str = ""


class Heard(msgspec.Struct, frozen=True):
    """What a manager that follows has passed on in the newest view it knows: verdicts, oldest first."""

    verdicts: tuple[Verdict, ...] = ()

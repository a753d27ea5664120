"""What a rank and its supervisor say to each other about training, inside the collectives' messages."""

from __future__ import annotations

import msgspec

from everstep.platform.training.layout import Run
from everstep.storage.index import StateIndex


class Inventory(msgspec.Struct, frozen=True):
    """What a rank can offer. `step`: the stamp of its live state, or -1. `live`: its stamped fragments.

    `held` lets the chooser keep blocks where they are, also when the state must be rolled back.
    """

    step: int
    held: tuple[Run, ...]
    live: StateIndex | None
    units: tuple[Run, ...] = ()  # of the model's layout; every rank sends the same


class Stock(msgspec.Struct, frozen=True):
    """The sealed versions that a domain's manager holds."""

    versions: tuple[StateIndex, ...]


class LiveFault(msgspec.Struct, frozen=True):
    """A scripted fault that has not fired yet. `index` is its place in the job's list."""

    index: int
    at_step: int
    rank: int
    do: str
    phase: str = "gradient"
    seconds: float = 0.0
    wake_s: float = -1.0
    factor: float = 1.0
    steps: int = 1


class ViewPlan(msgspec.Struct, frozen=True):
    """Payload of a view: everything a member needs to take its place."""

    owned: tuple[tuple[Run, ...], ...]  # by rank
    have: StateIndex | None  # at the base step; None: the initial state, built from the seed
    checkpoint: str = ""  # folder of `file` sources
    faults: tuple[LiveFault, ...] = ()
    nonfinite_in_a_row: int = 0
    final: bool = False  # base step is the last one: only sealing and hashing are left
    fetch: dict[str, str] = {}  # domain -> host:port where its manager serves segments


class LaneLoss(msgspec.Struct, frozen=True, array_like=True):
    lane: int
    sum: float
    weight: float
    metrics: dict[str, float] = {}


class Vote(msgspec.Struct, frozen=True):
    """A rank's word on one step, or on the ends of a run.

    `kind`: "step"; after the last step "seal" (my snapshot of it is sealed) and "hash" (lines of the state hash).
    """

    kind: str
    losses: tuple[LaneLoss, ...] = ()
    norm_blocks: bytes = b""  # float64 sums of squares of my owned blocks
    finite: bool = True
    untouched: tuple[int, ...] = ()  # parameters without a gradient in any of my lanes
    changed: tuple[int, ...] = ()  # float buffers that a lane of mine changed
    integers: str = ""  # digest of the integer buffers after my lanes; all lanes must agree
    integers_agree: bool = True  # among my own lanes
    sealed_step: int = -1  # newest snapshot that I have sealed
    hash_lines: tuple[str, ...] = ()
    compute_s: float = 0.0
    exchange_s: float = 0.0
    stall_s: float = 0.0  # what the last snapshot cost this rank
    samples: int = 0


class Verdict(msgspec.Struct, frozen=True):
    """The one decision over all groups and tensors of a step."""

    outcome: str  # "commit" | "skip" | "sealed" | "finished" | "failed"
    loss: float = 0.0
    metrics: dict[str, float] = {}
    weight: float = 1.0
    grad_norm: float = 0.0
    clip_factor: float = 1.0
    untouched: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    protected_step: int = -1
    snapshot: bool = True  # write a snapshot after this step
    checkpoint: str = ""  # folder to write this step's snapshot to, or ""
    last: bool = False  # no further step; seal and hash follow
    error: str = ""

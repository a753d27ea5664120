"""What a rank and its supervisor say to each other about training, inside the collectives' messages."""

from __future__ import annotations

import msgspec

from everstep.platform.training.layout import Row, Run
from everstep.storage.index import Fragment, StateIndex, TensorMeta
from everstep.storage.parity import ParityIndex


class Inventory(msgspec.Struct, frozen=True):
    """What a rank can offer. `step`: the stamp of its live state, or -1. `live`: its stamped fragments.

    `held` lets the chooser keep blocks where they are, also when the state must be rolled back.
    """

    step: int
    held: tuple[Run, ...]
    live: StateIndex | None
    units: tuple[Row, ...] = ()  # of the model's layout (`rows_of`); every rank sends the same
    mirrored: tuple[Run, ...] = ()  # the part of `held` that another rank owned
    damaged: tuple[tuple[str, str], ...] = ()  # (domain, locator) whose bytes do not match their checksums


class SealedVersion(msgspec.Struct, frozen=True):
    """A sealed segment: the state of `index` in the layout of `view` (epoch, number)."""

    view: tuple[int, int]
    locator: str
    index: StateIndex


class ParityVersion(msgspec.Struct, frozen=True):
    """A sealed parity segment: one position's rows of a group's version."""

    view: tuple[int, int]
    step: int
    locator: str
    index: ParityIndex


class Stock(msgspec.Struct, frozen=True):
    """What a domain's manager holds."""

    versions: tuple[SealedVersion, ...] = ()
    parities: tuple[ParityVersion, ...] = ()


class _RawIndex(msgspec.Struct, frozen=True):
    step: int
    tensors: msgspec.Raw
    fragments: tuple[Fragment, ...]


class _RawVersion(msgspec.Struct, frozen=True):
    view: tuple[int, int]
    locator: str
    index: _RawIndex


class _RawStock(msgspec.Struct, frozen=True):
    versions: tuple[_RawVersion, ...] = ()
    parities: tuple[ParityVersion, ...] = ()


class StockReader:
    """Decodes the stocks of a choice. Every version lists all tensors of the state, the same ones: they are read
    once, and the indices share them, so that `merge` sees at once that they agree.
    """

    def __init__(self) -> None:
        self._decode = msgspec.msgpack.Decoder(_RawStock).decode
        self._tensors = msgspec.msgpack.Decoder(tuple[TensorMeta, ...]).decode
        self._known: list[tuple[bytes, tuple[TensorMeta, ...]]] = []

    def read(self, data: bytes) -> Stock:
        """Raises msgspec.ValidationError."""
        stock = self._decode(data)
        versions = [
            SealedVersion(v.view, v.locator, StateIndex(v.index.step, self._list(v.index.tensors), v.index.fragments))
            for v in stock.versions
        ]
        return Stock(tuple(versions), stock.parities)

    def _list(self, raw: msgspec.Raw) -> tuple[TensorMeta, ...]:
        data = bytes(raw)
        for known, tensors in self._known:
            if known == data:
                return tensors
        tensors = self._tensors(data)
        self._known.append((data, tensors))
        return tensors


class ParityPlan(msgspec.Struct, frozen=True):
    """`groups`: ranks by position, for every group that can keep parity; `parity`: each group's own."""

    groups: tuple[tuple[int, ...], ...]
    parity: tuple[int, ...]

    def group_of(self, rank: int) -> tuple[tuple[int, ...], int]:
        """(its group, the group's parity); a group of its own without parity where it is in none."""
        for group, parity in zip(self.groups, self.parity, strict=True):
            if rank in group:
                return group, parity
        return (rank,), 0


class Rebuild(msgspec.Struct, frozen=True):
    """How a lost domain's payload is decoded: sources of kind "parity" with this holder and locator.

    By position: `payloads` bytes; `data` and `rows` (domain, locator) of what is left, ("", "") of what is not.
    """

    domain: str
    locator: str
    position: int
    parity: int
    payloads: tuple[int, ...]
    data: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str], ...]


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
    shadowed: tuple[tuple[Run, ...], ...] = ()  # by rank: what it mirrors ([Note: shadows]); (): nobody does
    parity: ParityPlan = ParityPlan((), ())
    rebuilds: tuple[Rebuild, ...] = ()
    save: str = ""  # folder of a checkpoint of the base step, which the former view could not finish


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
    sealed_step: int = -1  # newest snapshot that I have sealed, and whose parity my domain has
    hash_lines: tuple[str, ...] = ()
    compute_s: float = 0.0
    exchange_s: float = 0.0
    stall_s: float = 0.0  # what this rank has waited for snapshots since its last vote
    background_s: float = 0.0  # CPU time that went into snapshots meanwhile: copies, checksums, parity
    samples: int = 0
    evaluation: tuple[LaneLoss, ...] = ()  # of the state before the step, of my lanes, where it is due


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
    interval: int = 1  # steps from one snapshot to the next; by then the former has to be protected
    checkpoint: str = ""  # folder to write this step's snapshot to, or ""
    last: bool = False  # no further step; seal and hash follow
    error: str = ""

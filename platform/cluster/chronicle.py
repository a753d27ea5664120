"""What a run's standby keeps of it, so that it can go on as its supervisor. Pure; msgpack on the wire.

The supervisor sends a `Base` to a standby that has come, then every change as it happens. `Chronicle` is the sum of
them. The state of training is not here: the ranks and their managers hold it and report anew. These are the books
(losses, incidents, goodput), the staff (names that were used, where managers listen) and what was asked for.

    record      when
    ----------  --------------------------------------------------------------------------------------------
    Committed   a step was committed or skipped
    Standing    staff, wishes or checkpoints have changed; it is small and sent whole
    Said        an event of the journal
    Recovered   a recovery was booked
    Rescaled    a rescale was booked
    Beat        nothing else was sent for a while
    Over        the run has ended in order: nobody has to take over
"""

from __future__ import annotations

from typing import Any

import msgspec

from everstep.platform.cluster import saving as sv
from everstep.platform.cluster import staffing as st
from everstep.platform.job.result import Finding, Recovery, Rescale
from everstep.platform.job.status import Event

_KEPT_EVENTS = 10_000


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the ledger that has a fixed size. Seconds of wall time, by what the run was doing."""

    start_step: int = 0
    step: int = 0
    ranks: int = 0
    parity: int = 0
    skipped: int = 0
    snapshots: int = 0  # begun
    redone_until: int = 0
    wall_s: float = 0.0
    booked: dict[str, float] = {}
    metrics: dict[str, float] = {}
    weight: float = 0.0


class Committed(msgspec.Struct, frozen=True, tag="committed"):
    """`floor`: newest step known to be protected; `row`: steps in a row that were not finite."""

    step: int
    loss: float
    row: int
    floor: int
    account: Account


class Standing(msgspec.Struct, frozen=True, kw_only=True, tag="standing"):
    """`located`: where each process is, as its host names places. `standbys`: how many were ever started."""

    staffing: st.State
    target: int
    wish: int = 0  # ranks that the user asked for
    granted: int = 0  # processes, by the controller's grant of that number
    grant_number: int = 0
    located: dict[str, bytes] = {}
    fired: tuple[int, ...] = ()
    scaled: tuple[int, ...] = ()  # steps whose scripted scale is done
    stop_reason: str = ""
    fingerprint: dict[str, str] = {}
    saving: sv.Saving = sv.Saving(0)
    checkpoints: tuple[tuple[int, str], ...] = ()  # (step, url), finished
    last_step: int | None = None
    standbys: int = 0


class Said(msgspec.Struct, frozen=True, tag="said"):
    event: Event


class Recovered(msgspec.Struct, frozen=True, tag="recovered"):
    recovery: Recovery


class Rescaled(msgspec.Struct, frozen=True, tag="rescaled"):
    rescale: Rescale


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    pass


class Over(msgspec.Struct, frozen=True, tag="over"):
    pass


class Chronicle(msgspec.Struct, kw_only=True):
    """Everything so far. `epoch`: of the supervisor that it came from; `started_at`: wall clock."""

    epoch: int
    started_at: float
    standing: Standing
    account: Account = Account()
    floor: int | None = None
    losses: dict[int, float] = {}
    rows: dict[int, int] = {}
    events: list[Event] = []
    findings: list[Finding] = []
    recoveries: list[Recovery] = []
    rescales: list[Rescale] = []

    def add(self, record: Record) -> None:
        """Takes a record in. Raises TypeError for what is none."""
        match record:
            case Committed(step, loss, row, floor, account):
                self.losses[step] = loss
                self.rows[step] = row
                self.floor = floor
                self.account = account
            case Standing():
                self.standing = record
            case Said(event):
                self.events.append(event)
                del self.events[:-_KEPT_EVENTS]
                if event.kind == "finding":
                    self.findings.append(finding_of(event))
            case Recovered(recovery):
                self.recoveries.append(recovery)
            case Rescaled(rescale):
                self.rescales.append(rescale)
            case Beat() | Over():
                pass
            case Base():
                raise TypeError("a base comes once, first")


class Base(msgspec.Struct, frozen=True, tag="base"):
    chronicle: Chronicle


Record = Base | Committed | Standing | Said | Recovered | Rescaled | Beat | Over
_decoder: Any = msgspec.msgpack.Decoder(Record)
_encoder = msgspec.msgpack.Encoder()


def finding_of(event: Event) -> Finding:
    return Finding(
        syndrome=str(event.data.get("syndrome", "unknown")),
        first_step=int(event.data.get("step", 0)),
        evidence=event.text,
    )


def encode(record: Record) -> bytes:
    return _encoder.encode(record)


def decode(data: bytes) -> Record:
    """Raises msgspec.ValidationError for anything else."""
    record: Record = _decoder.decode(data)
    return record

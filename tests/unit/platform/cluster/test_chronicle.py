"""What a standby keeps is what the supervisor's books say, record by record."""

from __future__ import annotations

import msgspec
import pytest

from everstep.collectives.messages import Lost
from everstep.platform.cluster import chronicle as ch
from everstep.platform.cluster import staffing as st
from everstep.platform.cluster.ledger import Ledger
from everstep.platform.job.result import Recovery, Rescale
from everstep.platform.job.status import Event
from everstep.platform.training.messages import Verdict


def standing(**changes: object) -> ch.Standing:
    return msgspec.structs.replace(ch.Standing(staffing=st.initial(3, 2, 1, 100), target=2), **changes)


def chronicle() -> ch.Chronicle:
    return ch.Chronicle(epoch=4, started_at=1000.0, standing=standing())


def sent(record: ch.Record) -> ch.Record:
    """As it arrives."""
    return ch.decode(ch.encode(record))


def test_a_base_arrives_whole() -> None:
    known = chronicle()
    known.add(ch.Committed(7, 0.5, 0, 6, ch.Account(step=7)))
    arrived = sent(ch.Base(known))
    assert isinstance(arrived, ch.Base)
    assert arrived.chronicle == known


def test_each_record_changes_its_part() -> None:
    known = chronicle()
    event = Event(id=3, at_s=1.0, kind="finding", text="odd", data={"syndrome": "unprotected", "step": 5})
    recovery = Recovery(step=6, cause="signal 9", ranks=[1], detect_ms=1.0, resume_ms=2.0, steps_lost=1)
    rescale = Rescale(step=6, from_=2, to=4, pause_ms=3.0)
    changed = standing(target=1, fired=(0,), stop_reason="enough")
    for record in (
        ch.Committed(7, 0.5, 2, 6, ch.Account(step=7, ranks=2)),
        changed,
        ch.Said(event),
        ch.Recovered(recovery),
        ch.Rescaled(rescale),
        ch.Beat(),
    ):
        known.add(sent(record))
    assert (known.losses, known.rows, known.floor, known.account.ranks) == ({7: 0.5}, {7: 2}, 6, 2)
    assert known.standing == changed
    assert known.events == [event]
    assert [(found.syndrome, found.first_step) for found in known.findings] == [("unprotected", 5)]
    assert (known.recoveries, known.rescales) == ([recovery], [rescale])


def test_nonsense_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        ch.decode(b"\x81\xa4type\xa4evil")
    with pytest.raises(TypeError, match="first"):
        chronicle().add(ch.Base(chronicle()))


def test_the_ledger_goes_on_where_the_books_end() -> None:
    former = Ledger(2, 100.0)
    former.acts(2, 3, 103.0)
    former.committed(3, Verdict("commit", 5.0), [0.5], 105.0)
    former.committed(4, Verdict("skip", 4.0), [], 106.0)
    known = chronicle()
    known.losses, known.account = former.losses, former.account(106.0)
    ledger = Ledger.go_on(msgspec.msgpack.decode(msgspec.msgpack.encode(known), type=ch.Chronicle), 2.0, 508.0)
    assert ledger.wall_s(508.0) == 8.0, "6 s of the former, 2 s of silence"
    ledger.lost(Lost("the supervisor", "the supervisor: gone", -1, 2000.0), 508.0)
    ledger.acts(4, 3, 509.0)
    ledger.committed(5, Verdict("commit", 3.0), [], 510.0)
    assert ledger.committed_losses() == [5.0, 4.0, 3.0]
    [recovery] = ledger.recoveries
    assert (recovery.cause, recovery.ranks, recovery.steps_lost) == ("the supervisor: gone", [], 0)
    assert (recovery.detect_ms, recovery.resume_ms) == (2000.0, 4000.0)
    assert sum(msgspec.to_builtins(ledger.goodput(510.0)).values()) == pytest.approx(10.0), (
        "each second is booked once"
    )
    assert ledger.snapshots().count == former.snapshots().count + 2, "of the view, and of step 5"

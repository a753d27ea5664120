"""`snapshot.every: auto` in a real run: it measures, says what it chose, and a loss in between costs no bits."""

from __future__ import annotations

import pytest

from integration.harness import assert_same_bits, finish, job, ranks


@pytest.mark.parametrize("faults", [[], [{"at_step": 30, "rank": 1, "do": "kill"}]])
def test_what_it_measures_decides_how_often_and_no_bits(faults: list[dict[str, object]]):
    spec = job(ranks=ranks(2), steps=60, snapshot={"every": "auto", "share": 0.002}, faults=faults)
    done = finish(spec)
    assert_same_bits(done.result, spec)
    # A step of milliseconds, and a rank that waits for parity in each: far above a share of two thousandths.
    told = [event for event in done.events if event.kind == "snapshots"]
    assert told
    assert told[0].text.startswith(f"a snapshot every {told[0].data['interval']} steps: each costs ")
    assert "share 0.2 %" in told[0].text
    assert done.result.snapshots.interval == told[-1].data["interval"] > 1
    assert done.result.snapshots.count < 60
    assert len(done.result.recoveries) == len(faults)


def test_an_interval_that_the_job_sets_stays():
    spec = job(ranks=ranks(2), steps=21, snapshot={"every": 5})
    done = finish(spec)
    assert_same_bits(done.result, spec)
    assert (done.result.snapshots.interval, done.result.snapshots.count) == (5, 6)  # 0, 5, 10, 15, 20 and the end
    assert not [event for event in done.events if event.kind == "snapshots"]

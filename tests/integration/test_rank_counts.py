"""A layout that is cut anew for every number of ranks from 8 down to 1, out of memory alone.

11 lanes divide by none of them but 1. The run was resumed, so that a checkpoint would serve as a source, but its
tensors are gone as soon as the first view acts: who reads one of them fails. What memory cannot serve comes from
storage: test_snapshot_losses.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.harness import Gates, assert_same_bits, finish, job, live

pytestmark = pytest.mark.slow

MOST, LANES, RESUMED_AT = 8, 11, 2


def test_state_is_cut_anew_in_memory_for_any_number_of_ranks(tmp_path: Path):
    assert all(LANES % count for count in range(2, MOST + 1))
    gates = Gates(tmp_path / "gates")
    downs = [{"at_step": RESUMED_AT + 2 + 2 * i, "do": "scale", "to": MOST - 1 - i} for i in range(MOST - 1)]
    common: dict[str, Any] = {
        "name": "counts",
        "args": {"gates": str(gates.folder)},
        "lanes": LANES,
        "ranks": {"min": 1, "max": MOST, "spares": 0},
        "layout": {"zero": 2},
        "checkpoint": {"to": str(tmp_path / "runs"), "every": 100},
    }
    short = common | {"ranks": {"min": 1, "max": 2, "spares": 0}}
    assert finish(job("Gated", steps=RESUMED_AT, **short)).result.ok
    (stored,) = (tmp_path / "runs").rglob("step-*")

    gates.shut(RESUMED_AT)
    spec = job("Gated", steps=20, faults=downs, **common)
    with live(spec) as run:
        run.until(lambda: run.handle.status().ranks == MOST, "a view of all ranks")
        run.until(lambda: run.handle.status().phase == "training", "training")
        tensors = list(stored.glob("*.safetensors"))
        assert len(tensors) == 2
        for file in tensors:
            file.unlink()
        gates.open(RESUMED_AT)
        result = run.result()
    assert_same_bits(result, spec, start=RESUMED_AT)
    assert [(rescale.from_, rescale.to) for rescale in result.rescales] == [(n, n - 1) for n in range(MOST, 1, -1)]
    assert result.ranks_final == 1

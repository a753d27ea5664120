"""A byte of a sealed segment flips, and then the segment is needed: told by name, not used, and no bit of the result
changes."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from everstep.storage.index import Source
from everstep.storage.parity import read_parity_index
from everstep.storage.segment import SEAL_BYTES, SegmentMap, read_index, read_seal
from integration.harness import Gates, Live, assert_same_bits, job, live, ranks, run_folders, run_processes

GATE = 6


def flip(path: Path, at: int) -> None:
    """Of the payload."""
    with SegmentMap(path, writable=True) as segment:
        segment.memory[SEAL_BYTES + at] ^= 0x10


def newest(run: Live, domain: str, suffix: str, step: int) -> Path:
    """The domain's segment that holds the step."""
    (folder,) = run_folders(run.spec.name)

    def look() -> Path | None:
        for path in sorted((folder / domain).glob(f"*{suffix}")):
            with SegmentMap(path, writable=False) as segment:
                seal = read_seal(segment)
                if seal is not None and seal.step == step:
                    return path
        return None

    found: Path = run.until(look, f"{domain} has sealed step {step}")
    return found


def held(path: Path) -> list[tuple[int, int]]:
    """Offset and bytes of what a segment holds of the large tensors."""
    with SegmentMap(path, writable=False) as segment:
        seal = read_seal(segment)
        assert seal is not None
        index = read_index(segment, seal, Source("segment", "", path.name))
        return [(f.offset, 4 * (f.stop - f.start)) for f in index.fragments if f.stop - f.start > 64]


@pytest.mark.parametrize(("zero", "parity", "seed"), [(1, 1, 1), (2, 2, 2), (2, 1, 3)])
def test_a_flipped_byte_is_found_told_and_decoded_from_parity(
    zero: int, parity: int, seed: int, tmp_path: Path
) -> None:
    """Rank 1 dies while the others stand in front of a step. What it held of the newest one is damaged at one place,
    which may lie in a fragment of which each of the others needs a part only."""
    gates = Gates(tmp_path / "gates")
    gates.shut(GATE)
    snapshot = {"every": 1, "parity": parity}
    spec = job("Gated", args={"gates": str(gates.folder)}, ranks=ranks(3), layout={"zero": zero}, snapshot=snapshot)
    with live(spec) as run:
        run.until(lambda: run.step() == GATE, "the gate is reached")
        for domain in ("slot-0", "slot-1", "slot-2"):
            newest(run, domain, ".par", GATE)
        path = newest(run, "slot-1", ".seg", GATE)
        offset, nbytes = random.Random(seed).choice(held(path))
        flip(path, offset + random.Random(seed).randrange(nbytes))
        os.kill(run_processes(spec.name)["rank-1.1"], signal.SIGKILL)
        run.until(lambda: run.events("lost"), "the loss is told")
        gates.open(GATE)
        result = run.result()
        views = run.events("view")
    assert_same_bits(result, spec)
    (finding,) = [f for f in result.findings if f.syndrome == "silent corruption"]
    told = f"{finding}"
    assert "slot-1" in told
    assert path.name in told
    (recovery,) = result.recoveries
    assert recovery.step == GATE
    assert recovery.steps_lost == 0
    assert len(views) <= 4, "one view to find it, one without it, and one or two for the rank that comes back"


def test_a_flipped_byte_of_parity_costs_a_step_at_most(tmp_path: Path) -> None:
    """Rank 1's domain is lost with its memory, and the parity that would bring it back is damaged."""
    gates = Gates(tmp_path / "gates")
    gates.shut(GATE)
    spec = job("Gated", args={"gates": str(gates.folder)}, ranks=ranks(3), layout={"zero": 1}, snapshot={"every": 1})
    with live(spec) as run:
        run.until(lambda: run.step() == GATE, "the gate is reached")
        for domain in ("slot-0", "slot-1", "slot-2"):
            newest(run, domain, ".par", GATE)
        path = newest(run, "slot-2", ".par", GATE)
        with SegmentMap(path, writable=False) as segment:
            seal = read_seal(segment)
            assert seal is not None
            assert read_parity_index(segment, seal).parity == 1
        flip(path, seal.payload_bytes // 3)
        (folder,) = run_folders(spec.name)
        for file in (folder / "slot-1").iterdir():
            file.unlink()
        os.kill(run_processes(spec.name)["manager-1.1"], signal.SIGKILL)
        run.until(lambda: run.events("lost"), "the loss is told")
        gates.open(GATE)
        result = run.result()
    assert_same_bits(result, spec)
    (finding,) = [f for f in result.findings if f.syndrome == "silent corruption"]
    assert "slot-2" in f"{finding}"
    assert path.name in f"{finding}"
    assert all(recovery.steps_lost <= 1 for recovery in result.recoveries)

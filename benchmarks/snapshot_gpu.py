"""What a snapshot costs a training loop on a GPU, beside torch.distributed.checkpoint in the same process.

One rank of two of a GPT with 1.42 G parameters: 8.5 GB of float32 master parameters and AdamW moments, a snapshot
every 4 steps. The ways take turns: no snapshots; ours (`DeviceCopy` into a segment in /dev/shm, checksums by threads
in the background, sealed header last, two segments in turns); DCP's `async_save` as documented, and with pinned
memory and staging in the background. At the end the newest sealed segment is compared bit by bit with the state that
the GPU had, while the optimizer goes on. Parity between ranks needs more than one GPU and is not in here; `--parity`
measures its arithmetic.

stall: time for which the training thread or the GPU stands still a snapshot, the wait for the one before included.
step: wall time from one loss that is read on the CPU to the next. Needs torch, numpy, msgspec and xxhash, no Ray.
Without a GPU it is a small dry run of the same code. Times depend on the machine and are never asserted.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from parts.gpt_half import BIG, SMALL, HalfRank
from parts.snapshot_modes import Dcp, Everstep, Mode, Nothing, differences, join_alone

_STALL_AIM_S = 0.010
_LONGER_AIM = 0.03
_MIB = 1 << 20


@dataclass
class Side:
    """What was measured of one way, in seconds; `blocks_s`: of all steps of a block together."""

    steps_s: list[float] = field(default_factory=list)
    blocks_s: list[float] = field(default_factory=list)
    costs: list[Any] = field(default_factory=list)

    @property
    def mean_s(self) -> float:
        return sum(self.blocks_s) / len(self.steps_s)


class Bench:
    """The training loop, and how long its steps take."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.every: int = options.every
        self.rank = HalfRank(SMALL if options.small else BIG, self.device)
        self.step = 0
        self.sides: dict[str, Side] = {}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def one(self, mode: Mode, snapshot: bool) -> float:
        """A step; when its loss was there."""
        self.rank.forward_backward()
        seen = time.perf_counter()
        mode.before_update()
        self.rank.update()
        self.step += 1
        if snapshot:
            mode.snapshot(self.step)
        return seen

    def block(self, mode: Mode, cycles: int, counted: bool = True) -> None:
        """`cycles` times a snapshot and the steps until the next one."""
        first = len(mode.costs)
        gc.collect()
        self.synchronize()
        began = last = time.perf_counter()
        steps_s = []
        for i in range(cycles * self.every):
            seen = self.one(mode, snapshot=i % self.every == 0)
            steps_s.append(seen - last)
            last = seen
        self.synchronize()
        total_s = time.perf_counter() - began
        mode.finish()
        if not counted:
            return
        side = self.sides.setdefault(mode.name, Side())
        side.steps_s += steps_s
        side.blocks_s.append(total_s)
        side.costs += mode.costs[first:]
        say(f"{mode.name}: {len(steps_s)} steps, {total_s / len(steps_s) * 1000:.1f} ms each")

    def compare(self, ours: Everstep) -> list[str]:
        """One more snapshot, with the optimizer hard behind it: what the segment then holds that the GPU had not."""
        self.one(ours, snapshot=False)
        state = [(meta, start, stop, tensor.clone()) for meta, start, stop, tensor in self.rank.state()]
        ours.snapshot(self.step)
        ours.before_update()
        self.rank.optimizer.step()  # with the gradients that are there: no forward gives the copy time
        ours.finish()
        changed = any(
            not torch.equal(mine[3], theirs[3]) for mine, theirs in zip(state, self.rank.state(), strict=True)
        )
        if not changed:
            return ["the step after the snapshot changed nothing: it proves nothing"]
        return differences(ours.newest(), self.step, state)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pinned_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second from the device into pinned memory (without a GPU: of a plain copy), the best of several."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return nbytes / best


def measure_parity(device: torch.device, shard_bytes: int) -> dict[str, float]:
    """GB/s of data of the XOR of four shards on the device."""
    from everstep.storage import ErasureCode

    code = ErasureCode(data=4, parity=1)
    shards = [torch.randint(0, 256, (shard_bytes,), dtype=torch.uint8, device=device) for _ in range(4)]
    expected = shards[0] ^ shards[1] ^ shards[2] ^ shards[3]
    (parity,) = code.encode(shards)
    if not torch.equal(parity.view(torch.uint8), expected):
        raise SystemExit("WRONG: the parity is not the XOR of the shards")
    rates = []
    for _ in range(20):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            code.encode(shards)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        else:
            began = time.perf_counter()
            code.encode(shards)
            seconds = time.perf_counter() - began
        rates.append(4 * shard_bytes / seconds / 1e9)
    return {"xor_4_plus_1_gb_per_s": statistics.median(rates), "shard_bytes": shard_bytes}


def summary(name: str, side: Side, none: Side | None) -> dict[str, Any]:
    """The row of one way; times in ms."""
    row: dict[str, Any] = {
        "snapshots": len(side.costs),
        "step_mean_ms": side.mean_s * 1000,
        "step_median_ms": statistics.median(side.steps_s) * 1000,
        "ratio": None if none is None else side.mean_s / none.mean_s,
    }
    if not side.costs:
        return row
    parts: dict[str, Callable[[Any], float]] = {
        "stall": lambda c: c.stall_s,
        "waited": lambda c: c.waited_s,
        "call": lambda c: c.call_s,
        "before_update": lambda c: c.before_update_s,
        "sealed": lambda c: c.sealed_s,
    }
    for part, of in parts.items():
        row[f"{part}_median_ms"] = statistics.median(map(of, side.costs)) * 1000
        row[f"{part}_max_ms"] = max(map(of, side.costs)) * 1000
    timings = [cost.timings for cost in side.costs if cost.timings is not None]
    if timings:
        row["gpu_held_max_ms"] = max(t.held_ms for t in timings)
        row["staging_copy_median_ms"] = statistics.median(t.staged_ms for t in timings)
        row["arrived_median_ms"] = statistics.median(t.arrived_ms for t in timings)
        to_host = [t.nbytes / max(t.arrived_ms - t.staged_ms, 1e-3) / 1e6 for t in timings]
        row["to_host_gb_per_s"] = statistics.median(to_host)
    return row


def show(report: dict[str, Any], every: int) -> None:
    rows = report["ways"]
    print(
        f"{report['device']}, torch {torch.__version__}; {report['parameters'] / 1e6:.1f} M parameters, "
        f"{report['state_bytes'] / 1e9:.2f} GB of state, a snapshot every {every} steps"
    )
    print(
        f"floor: {report['floor_ms']:.1f} ms to the host at {report['pinned_gb_per_s']:.1f} GB/s into pinned memory; "
        f"segments {'registered: the device writes into them' if report['direct'] else 'NOT registered: bounced'}"
    )
    heads = ("", "snapshots", "stall median", "max", "step mean", "median", "ratio", "sealed after", "to host")
    table = [heads]
    for name, row in rows.items():
        taken = bool(row["snapshots"])
        table.append(
            (
                name, str(row["snapshots"]),
                _ms(row["stall_median_ms"]) if taken else "-", _ms(row["stall_max_ms"]) if taken else "-",
                _ms(row["step_mean_ms"]), _ms(row["step_median_ms"]),
                "-" if row["ratio"] is None else f"{row['ratio']:.3f}",
                _ms(row["sealed_median_ms"]) if taken else "-",
                f"{row['to_host_gb_per_s']:.1f} GB/s" if "to_host_gb_per_s" in row else "-",
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    for line in table:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    if ours := rows.get("everstep"):
        show_ours(ours, report["differences"], every, rows["none"]["step_mean_ms"])
        if report["device"] != "cpu":
            judge(ours)
    if parity := report.get("parity"):
        size, rate = parity["shard_bytes"] / 1e6, parity["xor_4_plus_1_gb_per_s"]
        print(f"parity: XOR of 4 shards of {size:.0f} MB at {rate:.0f} GB/s of data")


def show_ours(ours: dict[str, Any], differences: list[str], every: int, none_ms: float) -> None:
    print(
        f"everstep's stall: call {_ms(ours['call_median_ms'])}, release {_ms(ours['before_update_median_ms'])}, "
        f"wait for the one before {_ms(ours['waited_median_ms'])}; "
        f"GPU held in release at most {_ms(ours['gpu_held_max_ms'])}"
    )
    print(
        f"beside training: staged after {_ms(ours['staging_copy_median_ms'])} of GPU time, in host memory after "
        f"{_ms(ours['arrived_median_ms'])}; all in all {(ours['step_mean_ms'] - none_ms) * every:+.2f} ms a snapshot"
    )
    print("segment: " + ("bit-equal to the state" if not differences else "WRONG"))
    for text in differences:
        print("  " + text)


def judge(ours: dict[str, Any]) -> None:
    stall, longer = ours["stall_median_ms"] / 1000, ours["ratio"] - 1
    print(
        f"{'pass' if stall <= _STALL_AIM_S else 'FAIL'}: stall {_ms(stall * 1000)} (aim {_ms(_STALL_AIM_S * 1000)})"
    )
    print(f"{'pass' if longer <= _LONGER_AIM else 'FAIL'}: steps {longer:+.2%} longer (aim {_LONGER_AIM:.0%})")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bench = Bench(options)
    device, none = bench.device, Nothing()
    bench.block(none, 1, counted=False)
    state_bytes = sum(tensor.nbytes for *_, tensor in bench.rank.state())
    say(f"{bench.rank.parameters / 1e6:.1f} M parameters, {state_bytes / 1e9:.2f} GB of state")
    bandwidth = pinned_bandwidth(device, min(state_bytes, 1 << 30))
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": bench.rank.parameters,
        "state_bytes": state_bytes,
        "pinned_gb_per_s": bandwidth / 1e9,
        "floor_ms": state_bytes / bandwidth * 1000,
        "direct": True,
        "differences": [],
    }
    if "everstep" in options.ways:
        began = time.perf_counter()
        ours = Everstep(bench.rank, device, folder, options.threads, int(options.margin_gib * (1 << 30)))
        say(f"two segments of {state_bytes / 1e9:.2f} GB made and registered in {time.perf_counter() - began:.1f} s")
        try:
            report["direct"] = ours.direct
            bench.block(ours, 2, counted=False)
            for _ in range(options.rounds):
                bench.block(none, options.cycles)
                bench.block(ours, options.cycles)
            report["differences"] = bench.compare(ours)
        finally:
            ours.close()
    else:
        bench.block(none, options.cycles)
    if "dcp" in options.ways or "dcp-pinned" in options.ways:
        join_alone()
        for way in ("dcp", "dcp-pinned"):
            if way not in options.ways or (way == "dcp-pinned" and device.type != "cuda"):
                continue
            peer = Dcp(bench.rank, folder, pinned=way == "dcp-pinned")
            try:
                bench.block(peer, 1, counted=False)
                bench.block(peer, options.peer_cycles)
            finally:
                peer.close()
        dist.destroy_process_group()
    if options.parity:
        report["parity"] = measure_parity(device, (4 if options.small else 512) * _MIB)
    base = bench.sides.get("none")
    report["ways"] = {name: summary(name, side, base) for name, side in bench.sides.items()}
    report["costs"] = {name: [asdict(cost) for cost in side.costs] for name, side in bench.sides.items()}
    return report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", help="cuda or cpu; default cuda, or a small dry run on the CPU where there is none"
    )
    parser.add_argument("--small", action="store_true", help="a few million parameters, few steps: a dry run")
    parser.add_argument("--ways", default="everstep,dcp", help="besides none; comma-separated")
    parser.add_argument("--every", type=int, default=4, help="steps from one snapshot to the next")
    parser.add_argument("--cycles", type=int, help="snapshots a block of ours, and as many steps without; default 8")
    parser.add_argument("--rounds", type=int, help="blocks of ours and of none, in turns; default 2")
    parser.add_argument("--peer-cycles", type=int, help="snapshots of each DCP way; default 3")
    parser.add_argument("--threads", type=int, help="that hash what has arrived; default 4")
    parser.add_argument("--margin-gib", type=float, default=2.0, help="device memory that staging leaves free")
    parser.add_argument("--folder", default="/dev/shm", help="where segments and DCP's files go; memory")
    parser.add_argument("--parity", action="store_true", help="also XOR of 4 shards on the device")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.device == "cpu":
            options.small = True
            say("no GPU: a dry run on the CPU, its times mean nothing")
    defaults = {"cycles": (8, 2), "rounds": (2, 1), "peer_cycles": (3, 1), "threads": (4, 2)}
    for name, (big, small) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else big)
    options.ways = {way for way in options.ways.split(",") if way}
    if unknown := options.ways - {"everstep", "dcp", "dcp-pinned"}:
        parser.error(f"--ways: {', '.join(sorted(unknown))}; known: everstep, dcp, dcp-pinned")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: there is no GPU; --device cpu --small is a dry run without one")
    free = shutil.disk_usage(options.folder).free
    need = 0 if options.small else 19 << 30
    if free < need:
        parser.error(
            f"{options.folder} has {free / 1e9:.1f} GB free, two segments (and then two checkpoints) take "
            f"{need / 1e9:.1f}: enlarge it (mount -o remount,size=40G {options.folder}) or name another --folder"
        )
    return options


def main() -> int:
    options = parse()

    def ended(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, ended)
    if options.device == "cpu":
        torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="everstep-snapshot-gpu-", dir=options.folder))
    began = time.perf_counter()
    try:
        report = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(report, options.every)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {time.perf_counter() - began:.0f} s in all")
    if options.json:
        Path(options.json).write_text(json.dumps(report))
    return 1 if report["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())

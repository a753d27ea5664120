"""Erasure codes beside zfec and pyeclib, on the same data in the same run; with --gpu, on CUDA tensors alone.

Every implementation takes the same 64 MiB of data (beyond most caches), cut into groups of `data` shards of one
size: 1 MiB, as snapshot managers pipeline it, and all of it at once. They take turns, round by round; what is
compared are medians, in GB/s of data, so that parity and what is rebuilt do not count. Decoding: the first `parity`
data shards are lost. everstep is measured as managers call it, into memory that is there (`encode_into`,
`rebuild_into`), and as `encode` and `decode`, which make new memory each time; zfec and pyeclib always do. pyeclib
decodes by the faster of its `decode` and `reconstruct`. The floor is one copy of the data. Times depend on the
machine and are never asserted; that all rebuild the same bytes is.

With --gpu nothing but torch and numpy is needed. Times are those of CUDA events over several calls.
"""

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from everstep.storage import ErasureCode
from everstep.storage.kernels import NumpyKernel

CODES = ((4, 1), (8, 1), (4, 2), (6, 2))
AIMS = {"zfec": 5.0, "pyeclib": 1.0}  # times as fast, the smallest of all cases; pyeclib with two parities only
GPU_AIM = 200.0  # GB/s of data, XOR
_MIB = 1 << 20

Group = list[memoryview]  # one group's data shards, side by side in memory of their own, as in a segment


@dataclass(frozen=True)
class Row:
    """Median GB/s of data, by implementation. Sizes in bytes."""

    data: int
    parity: int
    work: str  # encode or decode
    shard_bytes: int
    threads: int
    speed: dict[str, float]


@dataclass
class Report:
    machine: str
    load: list[float] = field(default_factory=list)  # one-minute load averages: start, end
    rows: list[Row] = field(default_factory=list)


# ---- implementations --------------------------------------------------------------------------------------


class Contestant(Protocol):
    """Encodes and decodes group number `at`; `decode` returns the lost shards, or nothing if they are in place."""

    def encode(self, at: int) -> None: ...

    def decode(self, at: int) -> list[Any]: ...


class Everstep:
    """Into memory that is there."""

    def __init__(self, code: ErasureCode, groups: list[Group]) -> None:
        self._code, self._groups = code, groups
        length = len(groups[0][0])
        self._parity = [[_memory(length) for _ in range(code.parity)] for _ in groups]
        self._lost = [{index: _memory(length) for index in range(code.parity)} for _ in groups]

    def encode(self, at: int) -> None:
        self._code.encode_into(self._groups[at], self._parity[at])

    def decode(self, at: int) -> list[Any]:
        shards = [*self._groups[at], *self._parity[at]]
        self._code.rebuild_into(dict(list(enumerate(shards))[self._code.parity :]), self._lost[at])
        return list(self._lost[at].values())


class EverstepNew:
    """Into new memory each time."""

    def __init__(self, code: ErasureCode, groups: list[Group]) -> None:
        self._code, self._groups = code, groups
        self._parity = [code.encode(group) for group in groups]

    def encode(self, at: int) -> None:
        self._code.encode(self._groups[at])

    def decode(self, at: int) -> list[Any]:
        shards = [*self._groups[at], *self._parity[at]]
        return self._code.decode(dict(list(enumerate(shards))[self._code.parity :]))[: self._code.parity]


class Zfec:
    def __init__(self, code: ErasureCode, groups: list[Group]) -> None:
        import zfec

        self._groups, self._count = groups, code.parity
        self._numbers = list(range(code.data, code.data + code.parity))
        self._encoder = zfec.Encoder(code.data, code.data + code.parity)
        self._decoder = zfec.Decoder(code.data, code.data + code.parity)
        self._parity = [self._encoder.encode(group, self._numbers) for group in groups]

    def encode(self, at: int) -> None:
        self._encoder.encode(self._groups[at], self._numbers)

    def decode(self, at: int) -> list[Any]:
        blocks = [*self._parity[at], *self._groups[at][self._count :]]  # a parity stands where a lost one stood
        numbers = [*self._numbers, *range(self._count, len(blocks))]
        return self._decoder.decode(blocks, numbers)[: self._count]


class Pyeclib:
    def __init__(self, code: ErasureCode, groups: list[Group]) -> None:
        from pyeclib.ec_iface import ECDriver

        self._groups, self._count = groups, code.parity
        self._blobs = [b"".join(group) for group in groups]  # it takes `bytes` only
        self._driver = ECDriver(k=code.data, m=code.parity, ec_type="isa_l_rs_vand")
        self._left = [self._driver.encode(blob)[code.parity :] for blob in self._blobs]
        self._decode = min((self._whole, self._reconstruct), key=lambda way: _seconds(lambda: [way(0), way(0)]))

    def encode(self, at: int) -> None:
        self._driver.encode(self._blobs[at])

    def decode(self, at: int) -> list[Any]:
        return self._decode(at)

    def _whole(self, at: int) -> list[Any]:
        length = len(self._groups[at][0])
        blob = memoryview(self._driver.decode(self._left[at]))
        return [blob[index * length : (index + 1) * length] for index in range(self._count)]

    def _reconstruct(self, at: int) -> list[Any]:
        length = len(self._groups[at][0])
        shards = self._driver.reconstruct(self._left[at], list(range(self._count)))
        return [memoryview(shard)[len(shard) - length :] for shard in shards]  # behind a header


class Copy:
    """The floor: the data once read and once written."""

    def __init__(self, code: ErasureCode, groups: list[Group]) -> None:
        del code
        self._from = [np.frombuffer(group[0].obj, dtype=np.uint8) for group in groups]
        self._to = [np.frombuffer(_memory(len(array)), dtype=np.uint8) for array in self._from]

    def encode(self, at: int) -> None:
        np.copyto(self._to[at], self._from[at])

    def decode(self, at: int) -> list[Any]:
        self.encode(at)
        return []


# ---- the CPU ----------------------------------------------------------------------------------------------


def contestants(code: ErasureCode, groups: list[Group]) -> dict[str, Contestant]:
    return {
        "copy": Copy(code, groups),
        "zfec": Zfec(code, groups),
        "pyeclib": Pyeclib(code, groups),
        "numpy": Everstep(ErasureCode(code.data, code.parity, kernel=NumpyKernel()), groups),
        "new": EverstepNew(code, groups),
        "everstep": Everstep(code, groups),
    }


def measure(total: int, shard_bytes: int | None, rounds: int, threads: int) -> Iterator[Row]:
    """A row for encoding and one for decoding of each code; `shard_bytes` None: all the data in one group."""
    noise = np.random.default_rng(0)
    for data, parity in CODES:
        length = shard_bytes or total // data // 64 * 64
        groups = []
        for _ in range(max(threads, total // data // length)):
            view = _memory(length * data)
            view[:] = noise.bytes(length * data)
            groups.append([view[index * length : (index + 1) * length] for index in range(data)])
        everyone = contestants(ErasureCode(data, parity), groups)
        for work in ("encode", "decode"):
            times: dict[str, list[float]] = {name: [] for name in everyone}
            with ThreadPoolExecutor(threads) as pool:
                for number in range(rounds + 1):
                    for name, contestant in everyone.items():
                        taken = _turn(getattr(contestant, work), len(groups), threads, pool)
                        if number:  # the first warms memory and tables
                            times[name].append(taken)
            nbytes = length * data * len(groups)
            speed = {name: nbytes / statistics.median(taken) / 1e9 for name, taken in times.items()}
            yield Row(data, parity, work, length, threads, speed)
        for name, contestant in everyone.items():
            lost = contestant.decode(0)
            assert name == "copy" or [bytes(shard) for shard in lost] == [bytes(s) for s in groups[0][:parity]], name


def _memory(nbytes: int) -> memoryview:
    """Pages of its own, as segments are: `bytes` start at odd addresses, where every vector spans two cache lines."""
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _turn(work: Callable[[int], Any], count: int, threads: int, pool: ThreadPoolExecutor) -> float:
    """Seconds for all groups, dealt out over the threads."""

    def part(first: int) -> None:
        for at in range(first, count, threads):
            work(at)

    if threads == 1:
        return _seconds(lambda: part(0))
    return _seconds(lambda: list(pool.map(part, range(threads))))


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(report: Report) -> None:
    load = " to ".join(f"{load:.1f}" for load in report.load)
    print(f"erasure codes, GB/s of data (medians), {report.machine}, load {load}")
    print(
        "numpy: everstep without ISA-L; new: `encode`, `decode` into new memory; everstep: into memory that is there"
    )
    names = list(report.rows[0].speed)
    print(f"{'code':>5} {'':6} {'shard':>9} threads", *(f"{name:>9}" for name in names), "  x zfec  x pyeclib")
    for row in report.rows:
        cells = [f"{row.speed[name]:9.2f}" for name in names]
        ratios = [f"{row.speed['everstep'] / row.speed[name]:8.1f}" for name in AIMS]
        shard = f"{row.shard_bytes / _MIB:.4g} MiB"
        print(f"{row.data:>3}+{row.parity} {row.work:6} {shard:>9} {row.threads:7}", *cells, *ratios)
    for name, aim in AIMS.items():
        rows = [row for row in report.rows if name == "zfec" or row.parity > 1]
        ratio = min(row.speed["everstep"] / row.speed[name] for row in rows)
        print(f"{'pass' if ratio >= aim else 'FAIL'}: smallest ratio to {name}: {ratio:.2f} (target >= {aim:g})")


# ---- a GPU ------------------------------------------------------------------------------------------------


def measure_gpu(total: int, rounds: int) -> Iterator[Row]:
    """A row for encoding and one for decoding of each code."""
    for data, parity in CODES:
        length = total // data // 16 * 16
        for work, calls in _gpu_calls(ErasureCode(data, parity), length).items():
            speed = {name: data * length / _gpu_seconds(call, rounds) / 1e9 for name, call in calls.items()}
            yield Row(data, parity, work, length, 1, speed)


def _gpu_calls(code: ErasureCode, length: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """`encode` and `decode` of tensors; beside them the plain operations that stand in where nothing can be compiled,
    and one copy of the data. What they compute is checked first, against the CPU and against the data."""
    import torch

    from everstep.storage.erasure_torch import plain_words
    from everstep.storage.gf256 import parity_row, rebuild_rows

    shards = [torch.randint(-(1 << 62), 1 << 62, (length // 8,), device="cuda") for _ in range(code.data)]
    rows = code.encode(shards)
    wanted = code.encode([shard[: 1 << 17].cpu() for shard in shards])
    assert all(torch.equal(a[: 1 << 20].cpu(), b) for a, b in zip(rows, wanted, strict=True)), "unlike the CPU"
    left = dict(list(enumerate([*shards, *rows]))[code.parity :])
    assert all(torch.equal(a, b) for a, b in zip(code.decode(left), shards, strict=True)), "not what was lost"
    have = [shard.view(torch.int64) for shard in left.values()]
    encoding = tuple(parity_row(row, code.data) for row in range(code.parity))
    decoding = rebuild_rows(code.data, tuple(range(code.parity)), tuple(left))
    flat = torch.cat(shards)
    copied = torch.empty_like(flat)
    copy = partial(copied.copy_, flat)
    return {
        "encode": {
            "copy": copy,
            "plain": partial(plain_words, encoding, shards),
            "everstep": partial(code.encode, shards),
        },
        "decode": {
            "copy": copy,
            "plain": partial(plain_words, decoding, have),
            "everstep": partial(code.decode, left),
        },
    }


def _gpu_seconds(call: Callable[[], Any], rounds: int, calls: int = 4) -> float:
    import torch

    times = []
    for number in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        if number > 1:
            times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def show_gpu(report: Report) -> None:
    print(f"erasure codes, GB/s of data (medians), {report.machine}")
    names = list(report.rows[0].speed)
    print(f"{'code':>5} {'':6} {'shard':>10}", *(f"{name:>9}" for name in names))
    for row in report.rows:
        shard = f"{row.shard_bytes / _MIB:.4g} MiB"
        print(f"{row.data:>3}+{row.parity} {row.work:6} {shard:>10}", *(f"{row.speed[name]:9.0f}" for name in names))
    slowest = min(row.speed["everstep"] for row in report.rows if row.parity == 1)
    print(f"{'pass' if slowest >= GPU_AIM else 'FAIL'}: XOR at {slowest:.0f} GB/s of data (target >= {GPU_AIM:g})")


# ---- command line -----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure erasure codes beside zfec and pyeclib. About a minute by default.",
        epilog="python benchmarks/erasure.py\npython benchmarks/erasure.py --threads 2 --rounds 21 --json\n"
        "PYTHONPATH=src python benchmarks/erasure.py --gpu",
    )
    parser.add_argument("--gpu", action="store_true", help="CUDA tensors instead; needs torch only")
    parser.add_argument("--mib", type=int, help="MiB of data (64; with --gpu 64 and then 1024)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds a case (9)")
    parser.add_argument("--threads", type=int, default=1, help="threads of every implementation (1)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args()
    for name in ("mib", "rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; allowed are 1 and more")
    report = Report(_machine(options.gpu))
    report.load.append(os.getloadavg()[0])
    if options.gpu:
        for mib in [options.mib] if options.mib else [64, 1024]:
            report.rows += measure_gpu(mib * _MIB, options.rounds)
    else:
        for shard_bytes in (_MIB, None):
            report.rows += measure((options.mib or 64) * _MIB, shard_bytes, options.rounds, options.threads)
    report.load.append(os.getloadavg()[0])
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        (show_gpu if options.gpu else show)(report)


def _machine(gpu: bool) -> str:
    if not gpu:
        return f"{os.cpu_count()} cores, kernel {ErasureCode(1, 1).kernel.name}"
    import torch

    if not torch.cuda.is_available():
        sys.exit("erasure.py: --gpu needs a CUDA device, and torch finds none; leave --gpu out to measure the CPU")
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()

"""All-reduce between processes of one host, beside Gloo in the same processes.

Ranks are processes with one torch thread each. In each, our group over shared memory (on an ordinary tensor, and on a
registered one, `group.empty`), our group over loopback TCP, and Gloo take turns (see parts/exchange.py). The time of
a call is that of its slowest rank; what is compared are medians. The floor is the same tensor copied once by every
rank at the same time: an all-reduce has to write every rank's result. Times depend on the machine and are never
asserted.
"""

import json
import math
import multiprocessing as mp
import os
import secrets
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NoReturn

import torch.distributed as dist
import typer
from parts.exchange import COPY, REGISTERED, Case, Meeting, serve
from rich import box
from rich.console import Console
from rich.table import Table

from everstep.collectives import Coordinator
from everstep.collectives.quantisation import CODECS

_SIZES = "1K,1M,16M,64M,256M"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SMALL = 1 << 16  # below, latency is what counts
_BURST = 32
_TRANSPORTS = {"auto": "shared memory", REGISTERED: "registered", "tcp": "TCP"}
_CASE_LIMIT_S = 300.0
_MEAN_FROM = 1 << 20
# Against Gloo: geometric mean over 1 to 256 MiB, worst single case, and latency of 1 KiB (time, not speed).
_TARGET_MEAN = {"auto": 3.0, REGISTERED: 3.0, "tcp": 1.8}
_TARGET_WORST = {"auto": 1.5, REGISTERED: 1.5}
_TARGET_LATENCY = 1.5

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Row:
    """Medians in seconds, of one all-reduce; `auto` and `tcp` are ours, None where left out."""

    ranks: int
    size_bytes: int
    burst: int
    rounds: int
    gloo_s: float
    copy_s: float
    ours_s: dict[str, float]

    def ratio(self, transport: str) -> float:
        """How many times as fast as Gloo."""
        return self.gloo_s / self.ours_s[transport]


@dataclass
class Report:
    quantize: str = ""
    cores: int = os.cpu_count() or 1
    load: list[float] = field(default_factory=list)  # one-minute load averages: start, end
    rows: list[Row] = field(default_factory=list)


def measure(ranks: int, cases: list[Case], transports: list[str], quantize: str | None = None) -> Iterator[Row]:
    """Starts that many processes, and yields each case's row when all have measured it."""
    spawn = mp.get_context("spawn")
    token = secrets.token_hex(16)
    with ExitStack() as cleanup:
        groups = {}
        for transport in ("auto", "tcp"):
            if transport not in transports and not (transport == "auto" and REGISTERED in transports):
                continue
            coordinator = Coordinator(token=token, min_peers=ranks)
            coordinator.start()
            cleanup.callback(coordinator.stop)
            groups[transport] = coordinator.address
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = Meeting(groups, token, store.port, ranks, REGISTERED in transports, quantize)
        pipes = []
        for rank in range(ranks):
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=serve, args=(rank, meeting, cases, theirs), name=f"rank {rank}")
            process.start()
            theirs.close()
            cleanup.callback(_end, process)
            pipes.append(ours)
        for case in cases:
            began = time.monotonic()
            answers = []
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(_CASE_LIMIT_S):
                    _fail(f"rank {rank} has not measured {_size(case.size_bytes)} within {_CASE_LIMIT_S:g} s")
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    _fail(f"rank {rank} of {ranks} died at {_size(case.size_bytes)}; its error is above")
            _say(f"{ranks} ranks, {_size(case.size_bytes)}: {time.monotonic() - began:.1f} s")
            yield _row(ranks, case, transports, answers)


def _row(ranks: int, case: Case, transports: list[str], answers: list[dict[str, list[tuple[float, float]]]]) -> Row:
    medians = {}
    for name in answers[0]:
        slowest = [max(end - start for start, end in call) for call in zip(*(a[name] for a in answers), strict=True)]
        medians[name] = statistics.median(slowest) / (1 if name == COPY else case.calls)
    ours = {name: medians[name] for name in transports}
    return Row(ranks, case.size_bytes, case.calls, case.rounds, medians["gloo"], medians[COPY], ours)


def _end(process: Any) -> None:
    process.join(20)
    if process.is_alive():
        process.kill()
        process.join()


# ---- the report -----------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(report: Report) -> list[dict[str, Any]]:
    """Each target with what was found."""
    found: list[dict[str, Any]] = []
    if report.quantize:  # the targets are float32's
        return found

    def add(what: str, transport: str, values: list[float], value: float, target: float, at_least: bool) -> None:
        ok = value >= target if at_least else value <= target
        found.append(
            {"what": what, "transport": transport, "cases": len(values), "value": value, "target": target, "ok": ok}
        )

    transports = report.rows[0].ours_s if report.rows else {}
    for transport in transports:
        large = [row for row in report.rows if row.size_bytes >= _MEAN_FROM]
        if large:
            ratios = [row.ratio(transport) for row in large]
            add("geometric mean of ratios", transport, ratios, mean(ratios), _TARGET_MEAN[transport], True)
            if transport in _TARGET_WORST:
                add("smallest ratio", transport, ratios, min(ratios), _TARGET_WORST[transport], True)
        for row in (row for row in report.rows if row.size_bytes < _SMALL):
            times = [1 / row.ratio(transport)]
            what = f"time / Gloo's, {_case(row)}, {row.ranks} ranks"
            add(what, transport, times, times[0], _TARGET_LATENCY, False)
    return found


def show(report: Report, console: Console) -> None:
    load = " to ".join(f"{load:.1f}" for load in report.load)
    what = f"float32 sum{', ours ' * bool(report.quantize)}{report.quantize}"
    console.print(f"all-reduce, {what}, {report.cores} cores, load {load}; medians of the slowest rank's time")
    transports = list(report.rows[0].ours_s)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("ranks", "size", "n", "Gloo"):
        table.add_column(column, justify="right")
    for transport in transports:
        for column in (_TRANSPORTS[transport], "ratio", "x floor"):
            table.add_column(column, justify="right")
    table.add_column("floor: one copy", justify="right")
    for row in report.rows:
        cells = [str(row.ranks), _case(row), str(row.rounds), _speed(row, row.gloo_s)]
        for transport in transports:
            ours_s = row.ours_s[transport]
            floor = "" if row.size_bytes < _SMALL else f"{ours_s / row.copy_s:.1f}"
            cells += [_speed(row, ours_s), f"{row.ratio(transport):.2f}", floor]
        table.add_row(*cells, "" if row.size_bytes < _SMALL else _speed(row, row.copy_s))
    console.print(table)
    for ranks in sorted({row.ranks for row in report.rows}):
        for transport in transports:
            large = [row for row in report.rows if row.ranks == ranks and row.size_bytes >= _MEAN_FROM]
            if large:
                ratio = mean(row.ratio(transport) for row in large)
                floor = mean(row.ours_s[transport] / row.copy_s for row in large)
                console.print(
                    f"{ranks} ranks, {_TRANSPORTS[transport]}: {ratio:.2f} times Gloo's speed, {floor:.1f} times the "
                    f"floor's time (geometric means over {_size(large[0].size_bytes)} and more)"
                )
    for line in summary(report):
        sign = "<=" if line["what"].startswith("time") else ">="
        console.print(
            f"{'pass' if line['ok'] else 'FAIL'}: {_TRANSPORTS[line['transport']]}, {line['what']}: "
            f"{line['value']:.2f} (target {sign} {line['target']:g})"
        )


def _case(row: Row) -> str:
    return _size(row.size_bytes) + (f" x{row.burst}" if row.burst > 1 else "")


def _speed(row: Row, seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if row.size_bytes < _SMALL else f"{row.size_bytes / seconds / 1e9:.2f} GB/s"


def _size(size_bytes: int) -> str:
    unit, name = (1 << 20, "MiB") if size_bytes >= 1 << 20 else (1 << 10, "KiB")
    return f"{size_bytes / unit:g} {name}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    _say(f"allreduce.py: {message}")
    raise typer.Exit(code)


def _parse_size(text: str) -> int:
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not number.isdecimal() or int(number) * unit < 4 or int(number) * unit % 4:
        _fail(f"--sizes: {text!r} is no size; allowed are multiples of 4 such as 1K, 16M or 1G", 2)
    return int(number) * unit


def _cases(sizes: str, rounds: float) -> list[Case]:
    """About as long on each size, but at least 5 calls; small ones also back to back."""
    cases = []
    for size_bytes in map(_parse_size, sizes.split(",")):
        count = max(5, round(rounds * min(200, max(7, (320 << 20) / size_bytes))))
        cases.append(Case(size_bytes, count))
        if size_bytes < _SMALL:
            cases.append(Case(size_bytes, max(5, count // 4), _BURST if size_bytes <= 4096 else 8))
    return cases


@app.command()
def main(
    ranks: Annotated[str, typer.Option(help="Numbers of processes, with commas.")] = "2,4",
    sizes: Annotated[str, typer.Option(help="Sizes of the tensor, with commas: 1K is 1024 bytes.")] = _SIZES,
    transport: Annotated[
        str, typer.Option(help="Ours: auto (shared memory), registered, tcp.")
    ] = "auto,registered,tcp",
    rounds: Annotated[float, typer.Option(min=0.01, help="Multiplies the number of timed calls.")] = 1.0,
    quantize: Annotated[
        str, typer.Option(help="Ours with 8 bit codes, minmax8 or zeropoint8, beside Gloo's float32.")
    ] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure all-reduce over shared memory and TCP beside Gloo. About 2 minutes by default.

    \b
    python benchmarks/allreduce.py
    python benchmarks/allreduce.py --ranks 2 --sizes 1K,64M --transport auto
    python benchmarks/allreduce.py --rounds 3 --json
    """
    if not all(n.isdecimal() and int(n) >= 2 for n in ranks.split(",")):
        _fail(f"--ranks is {ranks!r}; allowed are numbers of 2 and more, such as 2,4", 2)
    if not set(transport.split(",")) <= set(_TRANSPORTS):
        _fail(f"--transport is {transport!r}; allowed are {', '.join(_TRANSPORTS)}", 2)
    if quantize not in ("", *CODECS):
        _fail(f"--quantize is {quantize!r}; allowed are {', '.join(CODECS)}", 2)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # its guess from the host's name may be no loopback
    report = Report(quantize)
    report.load.append(os.getloadavg()[0])
    cases = _cases(sizes, rounds)
    for n in map(int, ranks.split(",")):
        report.rows += measure(n, cases, transport.split(","), quantize or None)
    report.load.append(os.getloadavg()[0])
    if json_:
        rows = [{**asdict(row), "ratio": {name: row.ratio(name) for name in row.ours_s}} for row in report.rows]
        print(json.dumps({**asdict(report), "rows": rows, "summary": summary(report)}))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 160))


if __name__ == "__main__":
    app()

"""What a checkpoint costs on storage; beside it torch.distributed.checkpoint, torch.save, and plain writes and reads.

Every method saves and loads the same bytes on the same file system, from `--ranks` processes at once (as many
managers write), in turns, `--rounds` times; shown are medians. A save ends when its bytes are on the disk (fsync),
for every method. Loads come in two kinds: right after the save, from the page cache, which is the most a processor
has to do, and, for root, after the page cache was dropped. With `--deepspeed PYTHON` (a Python that has DeepSpeed)
its two converters and our import read one ZeRO checkpoint. Times depend on the machine and are never asserted.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from peers.deepspeed_convert import Converted, measure_deepspeed
from rich import box
from rich.console import Console
from rich.table import Table

from everstep.storage.manifest import commit, new_folder
from everstep.storage.rank_file import FileRecord
from everstep.storage.stores.opening import folder_at

_ROOT = Path(__file__).resolve().parent
_METHODS = ("plain", "everstep", "dcp", "torch")
_TITLES = {
    "plain": "plain write and read",
    "everstep": "everstep",
    "dcp": "torch.distributed.checkpoint",
    "torch": "torch.save, one file a rank",
}
_VERBS = {"plain": ("plain_write", "plain_read")}
_TARGET = 0.85  # of the plain bytes' speed
_DROP = Path("/proc/sys/vm/drop_caches")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass
class Method:
    """Seconds of each round."""

    save_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    cold_s: list[float] = field(default_factory=list)


@dataclass
class Report:
    ranks: int
    nbytes: int
    threads: int
    folder: str
    cores: int = os.cpu_count() or 1
    methods: dict[str, Method] = field(default_factory=dict)
    deepspeed: Converted | None = None
    notes: list[str] = field(default_factory=list)

    def speed(self, method: str, what: str) -> float:
        """Median, in bytes a second; 0 where it was not measured."""
        seconds = getattr(self.methods[method], what)
        return self.nbytes / statistics.median(seconds) if seconds else 0.0


class Workers:
    """The processes, which do each task at the same time."""

    def __init__(self, ranks: int, nbytes: int, threads: int, shm: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._logs = [shm / f"worker-{rank}.log" for rank in range(ranks)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            given: dict[str, Any] = {
                "rank": rank,
                "ranks": ranks,
                "bytes": nbytes // ranks,
                "port": port,
                "threads": threads,
                "shm": shm,
            }
            command = [sys.executable, str(_ROOT / "parts" / "checkpoint_worker.py")]
            command += [item for name, value in given.items() for item in (f"--{name}", str(value))]
            with log.open("wb") as errors:
                self._processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                    )
                )  # fmt: skip
        self.nbytes = sum(answer["ready"] for answer in self._answers())

    def do(self, what: str, folder: Path) -> float:
        """Seconds until the slowest is done."""
        began = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": what, "folder": str(folder)}) + "\n")
            process.stdin.flush()
        self._answers()
        return time.perf_counter() - began

    def close(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process, log in zip(self._processes, self._logs, strict=True):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(log.read_text(errors="replace")[-3000:])
            answers.append(json.loads(line))
        return answers


def one_round(workers: Workers, report: Report, folder: Path, cold: bool) -> None:
    for name in _METHODS:
        method = report.methods.setdefault(name, Method())
        save, load = _VERBS.get(name, (f"{name}_save", f"{name}_load"))
        at = folder / name
        if name == "everstep":
            made, ident = new_folder(folder_at(folder), 1, 1)
            at = Path(made.url)
            began = time.perf_counter()
            workers.do(save, at)
            records = [
                msgspec.msgpack.decode((at / f"record-{rank}").read_bytes(), type=FileRecord)
                for rank in range(report.ranks)
            ]
            commit(made, records, job="bench", run="bench", name=ident, spec={})
            method.save_s.append(time.perf_counter() - began)
        else:
            at.mkdir()
            method.save_s.append(workers.do(save, at))
        method.load_s.append(workers.do(load, at))
        if name != "plain":
            workers.do("check", at)
        if cold:
            os.sync()
            _DROP.write_text("3\n")
            method.cold_s.append(workers.do(load, at))
            if name != "plain":
                workers.do("check", at)
        shutil.rmtree(at)


def show(report: Report, console: Console) -> None:
    console.print(
        f"{report.nbytes / 1e9:.2f} GB in {report.ranks} files, {report.threads} threads a process, "
        f"{report.cores} cores, {report.folder}"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("GB/s (share of plain)", "save", "load, cached", "load, cold"):
        table.add_column(column)
    for name in _METHODS:
        cells = []
        for what in ("save_s", "load_s", "cold_s"):
            speed, plain = report.speed(name, what), report.speed("plain", what)
            cells.append(f"{speed / 1e9:.2f} ({speed / plain:.2f})" if plain else "-")
        table.add_row(_TITLES[name], *cells)
    console.print(table)
    ours = [report.speed("everstep", what) / report.speed("plain", what) for what in ("save_s", "load_s")]
    peer = [report.speed("everstep", what) / report.speed("dcp", what) for what in ("save_s", "load_s")]
    console.print(
        f"everstep saves at {ours[0]:.2f} and loads at {ours[1]:.2f} of the plain speed (wanted: {_TARGET}), "
        f"{peer[0]:.1f} and {peer[1]:.1f} times as fast as dcp"
    )
    if report.deepspeed is not None:
        found = report.deepspeed
        console.print(f"ZeRO-{found.zero} checkpoint of {found.nbytes / 1e6:.0f} MB, {found.ranks} ranks:")
        for name, seconds in found.seconds.items():
            speed = found.nbytes / seconds / (3 if "weights only" in name else 1)  # one float32 tensor of three
            ratio = found.nbytes / found.seconds["everstep import"] / speed
            console.print(f"  {name:28} {seconds:6.2f} s  {speed / 1e6:6.0f} MB/s  everstep x{ratio:.1f}")
    for note in report.notes:
        console.print(note)


@app.command()
def main(
    gib: Annotated[float, typer.Option(min=0.01, help="Size of the state in all.")] = 1.0,
    ranks: Annotated[int, typer.Option(min=1, max=8)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="A process, for every method that takes them.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where to write; else a temporary folder.")] = None,
    cold: Annotated[bool, typer.Option(help="Loads after the page cache was dropped, too (root).")] = True,
    deepspeed: Annotated[Path | None, typer.Option(metavar="PYTHON", help="A Python that has DeepSpeed.")] = None,
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Save and load one state in every way, in turns."""
    shm = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir="/dev/shm"))
    where = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir=folder))
    drop = cold and os.access(_DROP, os.W_OK)
    console = Console(stderr=json_, highlight=False)
    try:
        workers = Workers(ranks, int(gib * (1 << 30)), threads, shm)
        report = Report(ranks, workers.nbytes, threads, str(where.parent))
        if cold and not drop:
            report.notes.append("cold loads were left out: only root may drop the page cache")
        try:
            one_round(workers, report, where, cold=False)  # warms up: libraries, files, the disk's own cache
            report.methods.clear()
            for number in range(rounds):
                console.print(f"round {number + 1} of {rounds}")
                one_round(workers, report, where, drop)
        finally:
            workers.close()
        if deepspeed is not None:
            report.deepspeed = measure_deepspeed(deepspeed, where)
        show(report, console)
        if json_:
            print(json.dumps(asdict(report)))
    finally:
        shutil.rmtree(shm, ignore_errors=True)
        shutil.rmtree(where, ignore_errors=True)


if __name__ == "__main__":
    app()

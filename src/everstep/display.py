"""What people see of a run: pure functions from Status, Event and RunResult to text, and three thin shells.

`Terminal` redraws one line of progress, `Plain` prints lines (for pipes), `JsonLines` one object a line.
Owns: the wording. Thread-safety: a shell belongs to the thread that made it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from everstep.platform.job.check import gib, shared_memory_needed
from everstep.platform.job.facts import TaskFacts
from everstep.platform.job.result import Goodput, RunResult
from everstep.platform.job.spec import JobSpec
from everstep.platform.job.status import Event, Status

# A line every 5 s tells a log's reader that the run lives, without filling the disk in a long one.
PLAIN_EVERY_S = 5.0
JSON_EVERY_S = 1.0
# A pipe has no width; the tables need about 100 columns.
PIPE_WIDTH = 120

_GOODPUT = {
    "productive_s": "productive",
    "startup_s": "startup",
    "snapshot_s": "snapshot",
    "recovery_s": "recovery",
    "lost_work_s": "lost work",
    "waiting_s": "waiting",
}


class Display(Protocol):
    """Shows one run, from its start to its end."""

    def start(self, spec: JobSpec, facts: TaskFacts, host: str, spec_dir: Path) -> None:
        """Called once, before anything is launched."""

    def status(self, status: Status) -> None:
        """Called several times a second."""

    def event(self, event: Event) -> None:
        """Called once an event, in order."""

    def note(self, text: str) -> None:
        """Something that the command itself has to say."""

    def result(self, result: RunResult) -> None:
        """Called once, at the end."""

    def close(self) -> None:
        """Gives the terminal back. Idempotent."""


def header_lines(spec: JobSpec, facts: TaskFacts, host: str, spec_dir: Path) -> list[str]:
    """What a user checks before a long run: batch, ranks, size, where checkpoints go."""
    run = "" if spec.run_name == spec.name else f", run {spec.run_name}"
    ranks = f"{spec.ranks.min} to {spec.ranks.max}" if spec.ranks.min != spec.ranks.max else f"{spec.ranks.max}"
    url = spec.checkpoint_url(spec_dir)
    checkpoint = "none (stopping the run loses it; set checkpoint.to)"
    if url is not None and spec.checkpoint is not None:
        checkpoint = f"every {spec.checkpoint.every} steps to {url}"
    lines = [
        f"job {spec.name}{run}: {spec.steps} steps of {spec.task} on host {host}",
        f"  global batch  {spec.global_batch} = {spec.lanes} lanes x {spec.lane_batch} samples,"
        f" of {facts.samples:,} samples",
        f"  ranks         {ranks}, {spec.ranks.spares} spare, zero {spec.layout.zero},"
        f" {spec.resources.threads} thread{'s' if spec.resources.threads > 1 else ''} each",
        f"  model         {facts.parameters:,} parameters in {facts.tensors} tensors, {facts.optimizer},"
        f" {gib(facts.state_bytes)} of state",
        f"  memory        up to {gib(shared_memory_needed(spec, facts.state_bytes))} of /dev/shm",
        f"  checkpoint    {checkpoint}",
    ]
    return lines + [f"  note          {note}" for note in facts.notes]


def rate_text(status: Status) -> str:
    """Tokens a second where the task counts tokens, else samples a second, else ""."""
    if status.tokens_per_s is not None:
        return f"{_short(status.tokens_per_s)} tokens/s"
    if status.samples_per_s is not None:
        return f"{_short(status.samples_per_s)} samples/s"
    return ""


def status_line(status: Status) -> str:
    """One line: step, loss, speed, ranks, phase, last event."""
    ranks = f"{status.ranks}"
    if status.ranks_target and status.ranks_target != status.ranks:
        ranks += f" of {status.ranks_target}"
    parts = [
        f"step {status.step}/{status.steps}",
        f"loss {status.loss:.4f}" if status.loss is not None else "",
        rate_text(status),
        f"{status.step_s * 1000:.0f} ms/step" if status.step_s is not None else "",
        f"ranks {ranks}",
        status.phase,
        status.last_event,
    ]
    return " | ".join(part for part in parts if part)


def event_line(event: Event) -> str:
    """One line: time of day, kind, text."""
    return f"{datetime.fromtimestamp(event.at_s):%H:%M:%S} {event.kind}: {event.text}"


def progress(status: Status) -> RenderableType:
    """The live line: a bar and what `status_line` says."""
    grid = Table.grid(padding=(0, 1), expand=False)
    bar = ProgressBar(total=max(status.steps, 1), completed=status.step, width=24)
    grid.add_row(bar, Text(status_line(status), overflow="ellipsis", no_wrap=True))
    return grid


def goodput_rows(goodput: Goodput) -> list[tuple[str, float, float]]:
    """(name, seconds, percent of their sum) of each part."""
    values = {name: float(getattr(goodput, field)) for field, name in _GOODPUT.items()}
    whole = sum(values.values())
    return [(name, value, 100 * value / whole if whole else 0.0) for name, value in values.items()]


def summary(result: RunResult) -> RenderableType:
    """Everything a user asks at the end: what happened, what it cost, what came out."""
    parts: list[RenderableType] = []
    if result.recoveries:
        table = _table("recoveries", "cause", "rank", "step", "detected after", "resumed after", "steps lost")
        for r in result.recoveries:
            ranks = ", ".join(str(rank) for rank in r.ranks) or "-"
            table.add_row(r.cause, ranks, str(r.step), _ms(r.detect_ms), _ms(r.resume_ms), str(r.steps_lost))
        parts.append(table)
    if result.rescales:
        table = _table("rescales", "step", "from", "to", "pause")
        for c in result.rescales:
            table.add_row(str(c.step), str(c.from_), str(c.to), _ms(c.pause_ms))
        parts.append(table)
    table = _table("goodput", "part", "seconds", "%")
    for name, seconds, percent in goodput_rows(result.goodput):
        table.add_row(name, f"{seconds:.2f}", f"{percent:.1f}")
    parts.append(table)
    parts += [Text(line, overflow="fold") for line in outcome_lines(result)]
    return Group(*parts)


def outcome_lines(result: RunResult) -> list[str]:
    """The last lines: outcome, loss, hash, checkpoint."""
    how = "done" if result.ok else "stopped" if result.stopped else "FAILED"
    lines = [f"{how}: step {result.steps} after {result.wall_s:.1f} s with {result.ranks_final} ranks"]
    if result.loss.last is not None:
        bits = result.metrics.get("bits_per_byte")
        first = f" (first {result.loss.first:.4f})" if result.loss.first is not None else ""
        lines.append(
            f"  final loss    {result.loss.last:.4f}{first}"
            + (f", {bits:.3f} bits per byte" if bits is not None else "")
        )
    if result.skipped:
        lines.append(f"  skipped       {result.skipped} steps, not finite")
    if result.snapshots.count:
        every = f", one every {result.snapshots.interval} steps" if result.snapshots.interval > 1 else ""
        lines.append(
            f"  snapshots     {result.snapshots.count}{every}, stall {result.snapshots.stall_ms_median:.1f} ms,"
            f" {100 * result.snapshots.stall_share:.1f} % of step time, parity {result.snapshots.parity}"
        )
    lines.append(f"  state_sha256  {result.state_sha256 or '-'}")
    lines.append(f"  checkpoint    {result.checkpoints[-1] if result.checkpoints else 'none'}")
    return lines


def failure_lines(result: RunResult) -> list[str]:
    """Why a run failed, with the task's own traceback; [] when it did not."""
    error = result.error
    if error is None:
        return [] if result.ok or result.stopped else ["the run failed and said no reason"]
    named = (("step", error.step), ("rank", error.rank), ("lane", error.lane))
    where = ", ".join(f"{name} {value}" for name, value in named if value is not None)
    head = f"run failed ({error.kind}{'; ' + where if where else ''}): {error.message}"
    return [head, *error.traceback.rstrip().splitlines()]


class Terminal:
    """Progress in place, events above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, redirect_stdout=False, redirect_stderr=False)
        self._started = False

    def start(self, spec: JobSpec, facts: TaskFacts, host: str, spec_dir: Path) -> None:
        for line in header_lines(spec, facts, host, spec_dir):
            self._say(line)

    def status(self, status: Status) -> None:
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(progress(status))

    def event(self, event: Event) -> None:
        self._say(event_line(event))

    def note(self, text: str) -> None:
        self._say(text)

    def result(self, result: RunResult) -> None:
        self.close()
        self._console.print(summary(result))

    def close(self) -> None:
        if self._started:
            self._live.stop()
            self._started = False

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class Plain:
    """Lines for pipes and log files: events at once, progress every few seconds."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._last: tuple[int, str] = (-1, "")
        self._last_at = float("-inf")

    def start(self, spec: JobSpec, facts: TaskFacts, host: str, spec_dir: Path) -> None:
        for line in header_lines(spec, facts, host, spec_dir):
            self.note(line)

    def status(self, status: Status) -> None:
        now, seen = self._clock(), (status.step, status.phase)
        turned = seen[1] != self._last[1]
        if turned or (seen != self._last and now - self._last_at >= PLAIN_EVERY_S):
            self._last, self._last_at = seen, now
            self.note(status_line(status))

    def event(self, event: Event) -> None:
        self.note(event_line(event))

    def note(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def result(self, result: RunResult) -> None:
        Console(file=self._out, width=PIPE_WIDTH, no_color=True, highlight=False).print(summary(result))

    def close(self) -> None:
        self._out.flush()


class JsonLines:
    """For programs: {"kind": "start"}, then events and some {"kind": "status"}, last the RunResult."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._last_step = -1
        self._last_at = float("-inf")

    def start(self, spec: JobSpec, facts: TaskFacts, host: str, spec_dir: Path) -> None:
        data = {
            "job": spec.name,
            "run": spec.run_name,
            "host": host,
            "global_batch": spec.global_batch,
            "ranks": spec.ranks.model_dump(),
            "facts": msgspec.to_builtins(facts),
        }
        self._write({"kind": "start", "at_s": time.time(), "data": data})

    def status(self, status: Status) -> None:
        now = self._clock()
        if status.step != self._last_step and now - self._last_at >= JSON_EVERY_S:
            self._last_step, self._last_at = status.step, now
            self._write({"kind": "status", "at_s": time.time(), "data": msgspec.to_builtins(status)})

    def event(self, event: Event) -> None:
        self._write(msgspec.to_builtins(event))

    def note(self, text: str) -> None:
        self._write({"kind": "note", "at_s": time.time(), "text": text})

    def result(self, result: RunResult) -> None:
        print(result.to_json(indent=0), file=self._out, flush=True)

    def close(self) -> None:
        self._out.flush()

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._out, flush=True)


def choose(out: TextIO, *, as_json: bool) -> Display:
    """The display that fits where the output goes."""
    if as_json:
        return JsonLines(out)
    if out.isatty():
        return Terminal(Console(file=out, highlight=False))
    return Plain(out)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    return table


def _ms(value: float) -> str:
    return f"{value:.0f} ms"


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.1f}"

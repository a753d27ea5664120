"""Refuses, before any actor starts, what cannot run: task, data, optimizer, checkpoint folder, shared memory.

`check()` never imports torch: the task is looked at by `python -m everstep.platform.job.check`, a process of
its own (see `inspect_task.py`), so that a task which hangs, prints or crashes on import harms nobody.

Owns: the file that it writes into the checkpoint folder for a moment, and its subprocess.
Thread-safety: may be called from any thread.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

import everstep
from everstep.platform.job.errors import MISSING, Problem, SpecError
from everstep.platform.job.facts import TaskFacts
from everstep.platform.job.spec import JobSpec
from everstep.platform.training.protection import parity_plan
from everstep.storage.errors import StorageError
from everstep.storage.stores.opening import folder_at

# Importing torch takes 2 s, reading a corpus of some GB minutes; whatever takes longer is taken to hang.
CHECK_TIMEOUT_S = 300.0
_STDERR_LINES = 12

# [Note: shared memory] Of a view of n ranks, in copies of the whole state:
#
#     zero 1, 2    slots + the sum over its parity groups of (g / n) x 2 m / (g - m)
#     shadows      slots + 1, for what each rank mirrors; no parity. A rank alone mirrors nothing
#     zero 0       slots x n: every rank holds everything; no parity
#
# slots: two (the protected version and the one being written), three where checkpoints are written from one. A group
# of g ranks keeps parity of m, also two versions of it. That is a run's steady state. While a view changes, the old
# one's segments and the new one's exist, and a rank of the old one that was between two snapshots seals its state
# into one slot more (not with `every: 1`: there is no between). Each further loss before the new view is protected
# adds a view. Shares are uneven by a block, and headers and indices take a little: a tenth more.
SLOTS = 2
SLOTS_WITH_CHECKPOINTS = 3
PARITY_SEGMENTS = 2
MARGIN = 1.1


def check(
    spec: JobSpec,
    spec_dir: Path,
    *,
    source: str = "job",
    timeout_s: float = CHECK_TIMEOUT_S,
    shm: Path = Path("/dev/shm"),
    here: bool = True,
) -> TaskFacts:
    """Returns what is known of the task; raises SpecError with everything that is wrong.

    spec_dir: folder of the job file; `task` and `checkpoint.to` are relative to it. shm: where segments go. here:
    the run is to be on this machine or started from it; else its memory and its storage are not looked at.
    """
    problems: list[Problem] = []
    facts: TaskFacts | None = None
    answer = _ask(spec, spec_dir, timeout_s)
    if "facts" in answer:
        facts = msgspec.convert(answer["facts"], TaskFacts)
        problems += shared_memory(spec, facts.state_bytes, shm) if here else []
    else:
        problems += [Problem(**p) for p in answer["problems"]]
    problems += checkpoint_folder(spec, spec_dir) if here else []
    if problems or facts is None:
        raise SpecError(problems, source)
    return facts


def shared_memory_needed(spec: JobSpec, state_bytes: int) -> int:
    """Returns the bytes of shared memory that a run needs; see [Note: shared memory]."""
    return int(MARGIN * copies_of_state(spec) * state_bytes)


def copies_of_state(spec: JobSpec) -> float:
    """Returns how many times the whole state may be in shared memory at once: while one view follows another of the
    numbers of ranks, within the job's limits, that take most."""
    worst = max(range(spec.ranks.min, spec.ranks.max + 1), key=lambda ranks: copies_of_view(spec, ranks))
    between = 0 if spec.snapshot.every == 1 else (worst if spec.layout.zero == 0 else 1)
    return 2 * copies_of_view(spec, worst) + between


def copies_of_view(spec: JobSpec, ranks: int) -> float:
    """Returns how many times the whole state takes shared memory while a view of so many ranks acts."""
    slots = SLOTS_WITH_CHECKPOINTS if spec.checkpoint is not None else SLOTS
    if spec.layout.zero == 0:
        return slots * ranks
    if spec.snapshot.redundancy == "shadow":
        return slots + (ranks > 1)
    plan = parity_plan([str(rank) for rank in range(ranks)], spec.snapshot.parity)
    groups = [(len(group), parity) for group, parity in zip(plan.groups, plan.parity, strict=True)]
    return slots + sum(size / ranks * PARITY_SEGMENTS * parity / (size - parity) for size, parity in groups)


def shared_memory(spec: JobSpec, state_bytes: int, shm: Path = Path("/dev/shm")) -> list[Problem]:
    """Returns a problem when the segments would not fit into shared memory."""
    needed = shared_memory_needed(spec, state_bytes)
    try:
        free = shutil.disk_usage(shm).free
    except OSError as error:
        return [Problem("", MISSING, f"a folder {shm}", f"mount a tmpfs at {shm}", f"no {shm}: {error.strerror}")]
    if free >= needed:
        return []
    copies = f"{MARGIN} x {copies_of_state(spec):.3g} x"
    smaller = "a smaller model"
    if spec.layout.zero == 0:
        smaller += ", layout.zero: 1 or 2"
    elif spec.snapshot.redundancy == "parity" and spec.ranks.max > spec.ranks.min:
        smaller += ", a larger ranks.min (few ranks keep parity at a higher price)"
    return [
        Problem(
            str(shm),
            f"{gib(free)} free",
            f"{gib(needed)} ({copies} {gib(state_bytes)} of training state)",
            f"mount it larger (docker: --shm-size={-(-needed // 2**30)}g; a host: mount -o"
            f" remount,size={-(-needed // 2**30)}g {shm}), or use {smaller}",
            "too small for this job's snapshots",
        )
    ]


def check_nodes(spec: JobSpec, nodes: int) -> None:
    """Raises SpecError where so many machines cannot carry the parity that is to survive the loss of machines."""
    parity = spec.snapshot.parity
    if spec.snapshot.domain == "node" and parity and nodes <= parity:
        raise SpecError(
            [
                Problem(
                    "snapshot.parity",
                    parity,
                    f"0 to {nodes - 1} ({nodes} failure domain{'s' * (nodes != 1)}: snapshot.domain is node)",
                    f"use {parity + 1} machines or more, or `--set snapshot.domain=rank` (a machine is not survived)",
                    "ranks on one machine are one failure domain, not several",
                )
            ]
        )


def checkpoint_folder(spec: JobSpec, spec_dir: Path) -> list[Problem]:
    """Returns a problem when nothing can be written to `checkpoint.to`, or not exclusively, which every commit needs.

    Writes a small folder there and removes it.
    """
    url = spec.checkpoint_url(spec_dir)
    if url is None or spec.checkpoint is None:
        return []
    try:
        folder = folder_at(url)
        probe = folder.child(f"everstep-check-{secrets.token_hex(8)}")
        folder.store.claim_folder(probe.path)
        folder.store.put_new(probe.child("file").path, b"may be removed\n")
        folder.store.remove_folder(probe.path, first="file")
    except StorageError as error:
        return [
            Problem(
                "checkpoint.to",
                spec.checkpoint.to,
                "a folder or bucket that can be written",
                "correct its rights or choose another: `--set checkpoint.to=URL`",
                str(error),
            )
        ]
    return []


def gib(count: int) -> str:
    """Returns a number of bytes for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _ask(spec: JobSpec, spec_dir: Path, timeout_s: float) -> dict[str, Any]:
    """Runs the subprocess; its own failure becomes a problem of `task`."""
    request = json.dumps({"spec": spec.to_dict(), "spec_dir": str(spec_dir.resolve())})
    # -P keeps the current folder off sys.path: a file there must not hide one of the standard library's.
    command = [sys.executable, "-P", "-m", "everstep.platform.job.check"]
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=_environment(spec),
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr.decode(errors="replace") if isinstance(late.stderr, bytes) else (late.stderr or "")
        why = f"its check did not end within {timeout_s:g} s\n{_tail(said)}"
        return _failed(spec, "importing and building it must end", "see where it hangs", why)
    if done.returncode == 0:
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer
        except json.JSONDecodeError:
            pass
    code = done.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    why = f"the process that looked at it ended with {how}\n{_tail(done.stderr)}"
    return _failed(spec, "a task that can be imported and built", "correct the task", why)


def _failed(spec: JobSpec, allowed: str, fix: str, why: str) -> dict[str, Any]:
    return {"problems": [Problem("task", spec.task, allowed, fix, why).to_dict()]}


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_STDERR_LINES:])


def _environment(spec: JobSpec) -> dict[str, str]:
    """The caller's environment with the job's own variables, and this very everstep importable."""
    env = dict(os.environ)
    variables = spec.runtime_env.get("env_vars")
    if isinstance(variables, dict):
        env.update({str(k): str(v) for k, v in variables.items()})
    home = str(Path(everstep.__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(p for p in (home, env.get("PYTHONPATH", "")) if p)
    return env


if __name__ == "__main__":
    from everstep.platform.job.inspect_task import main

    main()

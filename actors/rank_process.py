"""Entry point of a trainer: builds the task, runs a dry lane, joins, and trains until the run ends."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import threading
import traceback
from pathlib import Path

import msgspec
import torch

from everstep.actors.config import RankConfig, TaskFailed
from everstep.actors.rank_conductor import RankConductor
from everstep.actors.run_folder import RunFolder
from everstep.platform.job.spec import JobSpec
from everstep.platform.training.conductor import RunOver
from everstep.platform.training.engine import build, has_own_loop, load, probe, run_own_loop, train
from everstep.platform.training.task import TaskRaised
from everstep.storage.errors import StorageError

log = logging.getLogger(__name__)


def fingerprint(spec: JobSpec) -> dict[str, str]:
    """What must be equal on all ranks for equal bits, beside the gradient of a dry lane."""
    return {
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "precision": spec.train.precision,
    }


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _keep_freed_memory() -> None:
    """Has the C library keep what a step frees for the next one: by default it gives gradients and frames back
    to the kernel and faults them in again, some 5,000 pages a step for 1.8 million parameters.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def _heed_notice(conductor: RankConductor) -> None:
    """SIGTERM is a notice (of a spot instance, of a container's end): this rank is replaced, and leaves in order."""

    def tell(number: int, frame: object) -> None:
        # On a thread of its own: what this one was doing may hold what sending needs.
        threading.Thread(target=conductor.note, args=("notice", b"SIGTERM"), daemon=True).start()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, tell)


def main(config: bytes) -> None:
    """Runs one trainer; ends the process with 0 when the run is over for it, 1 when its task failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    decoded = msgspec.msgpack.decode(config, type=RankConfig)
    RunFolder.at(Path(decoded.run_folder)).register_pid()
    _keep_freed_memory()
    spec = JobSpec.parse(decoded.spec)
    torch.set_num_threads(spec.resources.threads)
    mine = fingerprint(spec)
    conductor = RankConductor(decoded, spec.timeouts.stall_s, os.getpid(), mine)
    _heed_notice(conductor)
    step, lane = 0, -1
    try:
        task = load(spec, Path(decoded.spec_dir))
        if has_own_loop(task):
            run_own_loop(task, spec, conductor)
        else:
            built = build(task, spec, conductor)
            conductor.join({**mine, "gradient": probe(built)})
            train(built)
    except RunOver as over:
        log.info("%s leaves: %s", decoded.name, over)
    except Exception as error:
        kind = "internal"
        if isinstance(error, TaskRaised):
            step, lane, kind = error.step, error.lane, "task"
        elif isinstance(error, StorageError):
            kind = "storage"  # /dev/shm is full, or a checkpoint cannot be read
        trace = "".join(traceback.format_exception(error.__cause__ or error))
        print(trace, file=sys.stderr, flush=True)
        failed = TaskFailed(str(error) or type(error).__name__, trace, step, lane, kind)
        conductor.note("failed", msgspec.msgpack.encode(failed))
        conductor.close()
        sys.exit(1)
    conductor.close()

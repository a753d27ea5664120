"""Keeps a run's name in the registry when its driver is gone: the run goes on, so `status`, `stop` and `logs` work.

    driver lives              it holds the name's lock, and this thread waits for it
    driver has ended the run  the record says so, and there is nothing to keep
    driver is gone            the name is ours: nobody else can take it, and the result is booked when it comes

Runs in the supervisor's process, where the registry's folder is on the same machine; elsewhere there is nothing to
keep, and whoever looks sees the run through Ray. Owns: one thread, and the name once it has it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from pathlib import Path

import msgspec

from everstep.platform.job.registry import Registration, RunRecord
from everstep.platform.job.result import RunResult

log = logging.getLogger(__name__)

_EXIT_OK, _EXIT_FAILED, _EXIT_STOPPED = 0, 1, 130  # as `everstep run` exits


class NameKeeper:
    """`taken` is set once the name is ours."""

    def __init__(self, folder: Path, token: str) -> None:
        """folder: the run's in the registry; token: this execution's, so that no other one's name is taken."""
        self.taken = threading.Event()
        self._folder = folder
        self._token = token
        self._registration: Registration | None = None
        threading.Thread(target=self._wait, name="name-keeper", daemon=True).start()

    def finish(self, result: RunResult | None) -> None:
        """Books the result, where the name is ours. The name is given back by the end of this process."""
        if self._registration is None:
            return
        done, stopped = result is not None and result.ok, result is not None and result.stopped
        code = _EXIT_OK if done else _EXIT_STOPPED if stopped else _EXIT_FAILED
        try:
            self._registration.finish(result, code)
        except OSError as error:
            log.warning("the result could not be booked: %s", error)

    def _wait(self) -> None:
        try:
            lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            log.info("the registry is not on this machine: %s", error)
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the driver is gone
            record = msgspec.json.decode((self._folder / "run.json").read_bytes(), type=RunRecord)
            ours = (self._folder / "token").read_text(encoding="utf-8").strip() == self._token
            if not ours or record.ended is not None:
                os.close(lock)
                return
            self._registration = Registration(self._folder, record, lock, self._token)
            self._registration.update(pid=os.getpid())
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the run's name cannot be kept: %s", error)
            os.close(lock)
            return
        log.info("the driver is gone; this process keeps the run's name")
        self.taken.set()

"""What a driver does differently when it runs under a Ray job (`ray job submit`, `everstep submit`).

Ray starts the driver in the job's working directory and tells it the job's runtime_env in an environment variable;
`ray.init` merges that with the driver's own and refuses a key that both have. The job's own log is the driver's
output, so that is where the prints of ranks have to appear.

Never needs a connection. `Prints` is called from Ray's threads and read from any.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

logger = logging.getLogger(__name__)

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
LINES_A_SECOND, BURST = 100.0, 1000.0  # a person reads some ten; Ray's own log of each process has all of them
_TELL_EVERY_S = 5.0
_QUIET_S, _SETTLE_S = 0.5, 3.0  # Ray looks at the files of its workers every 0.1 s
_OURS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} everstep")
_RAYS_TOKENS = (":actor_name:", ":task_name:", ":job_id:")


def under_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    return _JOB_CONFIG in os.environ


def job_runtime_env() -> dict[str, Any]:
    """The runtime_env that the Ray job was submitted with; {} outside of one."""
    found: dict[str, Any] = json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("runtime_env") or {}
    return found


def beside_the_jobs(own: Mapping[str, Any], jobs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a job file's runtime_env Ray does not have from its job: there the job's word counts."""
    rest = {key: value for key, value in own.items() if key not in jobs or key == "env_vars"}
    taken = jobs.get("env_vars") or {}
    if "env_vars" in rest:
        rest["env_vars"] = {name: value for name, value in rest["env_vars"].items() if name not in taken}
        if not rest["env_vars"]:
            del rest["env_vars"]
    return rest


class Prints:
    """Writes what ranks print into the driver's output, at most so many lines a second.

    Takes the place of Ray's own function, so that deaths, which the run tells better, and what everstep logs in
    ranks, managers and supervisor do not come twice.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._lock = threading.Lock()
        self._allowed, self._at = BURST, clock()
        self._left_out, self._told_at = 0, clock()
        self._last = clock()

    def __call__(self, data: Mapping[str, Any], *_: Any, **__: Any) -> None:
        name = str(data.get("actor_name") or "")
        if not name.startswith("rank-"):
            for line in data["lines"]:
                logger.info("%s: %s", name or data.get("pid"), line)
            return
        with self._lock:
            for line in data["lines"]:
                if not _OURS.match(line) and not line.startswith(_RAYS_TOKENS):
                    self._print(f"{name} | {line}")

    def settle(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Waits for the last lines of processes that have ended: until none has come for a while."""
        begun = self._clock()
        with self._lock:
            self._last = begun
        while self._clock() - self._last < _QUIET_S and self._clock() - begun < _SETTLE_S:
            sleep(0.05)
        with self._lock:
            self._tell_left_out()

    def _print(self, line: str) -> None:
        now = self._last = self._clock()
        self._allowed = min(BURST, self._allowed + (now - self._at) * LINES_A_SECOND)
        self._at = now
        if self._allowed < 1:
            self._left_out += 1
        else:
            self._allowed -= 1
            print(line, file=self._out or sys.stderr, flush=True)
        if now - self._told_at >= _TELL_EVERY_S:
            self._told_at = now
            self._tell_left_out()

    def _tell_left_out(self) -> None:
        if self._left_out:
            text = f"{self._left_out} lines of ranks are left out here (more than {LINES_A_SECOND:g} a second)"
            print(
                f"everstep: {text}; everstep logs, or Ray's log of each process, has them",
                file=self._out or sys.stderr,
            )
            self._left_out = 0

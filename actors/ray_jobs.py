"""A cluster's job server, through which a run is submitted without being in the cluster's network.

    everstep submit  --HTTP, the dashboard's port-->  job server  --starts-->  everstep run (the driver, on the head)

Everything goes through that one port: what Ray's job API does not know (scale, an orderly stop, a look at the
cluster) is a short Ray job of its own, which runs an `everstep` command where the driver is.

Owns: an HTTP client, and a thread while it follows a log. Any thread may call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from everstep.actors.ray_cluster import REACH_S, use_token

RECONNECT_S = 60.0  # a head that restarts is back in seconds; then its jobs are lost, or there
AGENT_S = 30.0  # a head that has just started refuses jobs until its agent is up
_NO_AGENT = "No available agent"
_RETRY_S = 1.0
_LOOK_S = 0.2
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray lets them win over an address that was given


class JobServerError(ConnectionError):
    """The job server cannot be used, or refuses; the message says what to do."""


@dataclass(frozen=True)
class JobState:
    """A Ray job. status: Ray's word; exit_code: the driver's, where it ended by itself."""

    status: str
    exit_code: int | None = None
    message: str = ""
    ray_job_id: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """The job server at http://HEAD:8265. Every call raises JobServerError where it cannot be reached."""

    def __init__(self, address: str) -> None:
        """Connects. Raises JobServerError: not http, nobody there, no job server there, or another token."""
        self.address = address.rstrip("/")
        _check_address(address)
        for name in ("ray.dashboard", "ray._private.runtime_env"):
            logging.getLogger(name).setLevel(logging.WARNING)  # else each upload and each request is told
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)  # these two set a level of their own
        token = use_token()
        with _without_overrides():
            self._client: Any = self._called(lambda: JobSubmissionClient(self.address), token)
        self.ray_version = str(self._client._server_ray_version or "")

    def submit(
        self, words: Sequence[str], *, id: str | None, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> str:
        """Uploads local folders of the runtime_env, starts `everstep WORDS` as a job; returns its id."""

        with _packed(runtime_env) as packed:

            def ask() -> Any:
                return self._client.submit_job(
                    entrypoint=entrypoint_of(words), submission_id=id, runtime_env=packed, metadata=dict(metadata)
                )

            deadline = time.monotonic() + AGENT_S
            while True:
                try:
                    return str(self._called(ask))
                except JobServerError as error:
                    if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(_RETRY_S)

    def state(self, id: str) -> JobState:
        info: Any = self._called(lambda: self._client.get_job_info(id))
        return JobState(info.status.value, info.driver_exit_code, info.message or "", info.job_id)

    def metadata(self, id: str) -> dict[str, str]:
        return dict(self._called(lambda: self._client.get_job_info(id)).metadata or {})

    def logs(self, id: str) -> str:
        return str(self._called(lambda: self._client.get_job_logs(id)))

    def stop(self, id: str) -> None:
        """SIGTERM to the driver, SIGKILL 3 s later. Returns at once."""
        self._called(lambda: self._client.stop_job(id))

    def wait(self, id: str, timeout_s: float | None = None) -> JobState | None:
        """How the job ended; None where it has not within `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (state := self.state(id)).ended:
            if deadline is not None and time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_S)
        return state

    def run(self, words: Sequence[str], runtime_env: Mapping[str, Any], timeout_s: float = 60.0) -> tuple[int, str]:
        """Runs a short `everstep WORDS` on the head as a job of its own; returns its exit code and what it wrote."""
        id = self.submit(words, id=None, runtime_env=runtime_env, metadata={"everstep": "control"})
        state = self.wait(id, timeout_s)
        if state is None:
            self.stop(id)
            raise JobServerError(
                f"`everstep {shlex.join(words)}` did not end on {self.address} within {timeout_s:g} s"
            )
        # The first line is Ray's own: which command it runs.
        text = "\n".join(line for line in self.logs(id).splitlines() if not line.startswith("Running entrypoint"))
        if state.exit_code is None and state.status == "FAILED":
            text += state.message
        return (0 if state.status == "SUCCEEDED" else state.exit_code or 1), text

    def follow(self, id: str, on_text: Callable[[str], None], stop: threading.Event) -> JobState | None:
        """Hands over the job's log as it grows, until the job has ended; then how. None where `stop` was set.

        A connection that breaks is made again for up to RECONNECT_S; what was handed over is not repeated.
        """
        seen, lost_at = 0, 0.0
        while not stop.is_set():
            try:
                seen = asyncio.run(self._tail(id, seen, on_text, stop))
                if (state := self.state(id)).ended:
                    rest = self.logs(id)[seen:]
                    if rest:
                        on_text(rest)
                    return state
                lost_at = 0.0
            except Exception as error:  # aiohttp's and Ray's: whatever it is, the log is not to be had now
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > RECONNECT_S:
                    raise JobServerError(
                        f"the job server at {self.address} has not answered for {RECONNECT_S:g} s: {error}"
                    ) from error
            stop.wait(_RETRY_S)
        return None

    async def _tail(self, id: str, skip: int, on_text: Callable[[str], None], stop: threading.Event) -> int:
        """One connection; returns how many characters of the log were handed over by now."""
        at = 0
        lines = self._client.tail_job_logs(id).__aiter__()
        pending: Any = None
        while not stop.is_set():
            pending = pending or asyncio.ensure_future(lines.__anext__())
            done, _ = await asyncio.wait({pending}, timeout=_LOOK_S)
            if not done:
                continue
            try:
                text = pending.result()
            except StopAsyncIteration:
                return max(at, skip)
            pending = None
            fresh = text[max(0, skip - at) :]
            at += len(text)
            if fresh:
                on_text(fresh)
        if pending is not None:
            pending.cancel()
        return max(at, skip)

    def _called(self, call: Callable[[], Any], token: bool = True) -> Any:
        try:
            return call()
        except AuthenticationError as error:
            raise JobServerError(_about_token(self.address, token, str(error))) from error
        except (requests.RequestException, ConnectionError) as error:
            if isinstance(error, JobServerError):
                raise
            raise JobServerError(
                f"no job server answers at {self.address}: {error}; want the dashboard's address,"
                " http://HEAD:8265 (ray start --head --dashboard-host=…)"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise JobServerError(f"the job server at {self.address} refuses: {error}") from error


def entrypoint_of(words: Sequence[str]) -> str:
    """A shell command that runs `everstep` on the cluster, whether its script is on the path there or not."""
    return f"exec $(command -v everstep || echo python3 -m everstep) {shlex.join(words)}"


@contextmanager
def _packed(runtime_env: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The runtime_env with its local working directory as a package that no other submission shares.

    Ray names a package by its content, does not upload one that is there, and deletes it with its last user. So a
    folder that was submitted again just when the run before it ended was gone before the new job had it.
    """
    plain = dict(runtime_env)
    folder = Path(str(plain.get("working_dir", "")))
    if "working_dir" not in plain or not folder.is_dir():
        yield plain
        return
    with tempfile.TemporaryDirectory(prefix="everstep-submit-") as temporary:
        package = Path(temporary, "working_dir.zip")
        create_package(
            str(folder),
            package,
            include_gitignore=os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1",
            excludes=plain.pop("excludes", None),
        )
        with zipfile.ZipFile(package, "a") as file:
            file.comment = secrets.token_bytes(16)
        plain["working_dir"] = str(package)
        yield plain


def _check_address(address: str) -> None:
    parts = urlsplit(address if "://" in address else f"//{address}")
    host = parts.hostname or "HEAD"
    if parts.scheme not in ("http", "https"):
        what = {
            "": "no scheme; a cluster's own port (6379) is for `everstep run --address`",
            "ray": "Ray Client's address",
        }
        why = what.get(parts.scheme, f"scheme {parts.scheme}")
        raise JobServerError(f"--address {address}: {why}; want the job server's: http://{host}:8265")
    if not parts.hostname:
        raise JobServerError(f"--address {address}: no host; want http://HEAD:8265")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), REACH_S).close()
    except (OSError, ValueError) as error:
        raise JobServerError(
            f"nobody answers at {address}: {error}; is the head up, its dashboard on (ray start --head"
            " --dashboard-host=0.0.0.0), the port open or forwarded (ssh -L 8265:localhost:8265 HEAD)?"
        ) from error


def _about_token(address: str, have: bool, said: str) -> str:
    where = "RAY_AUTH_TOKEN_PATH (a file), RAY_AUTH_TOKEN, or ~/.ray/auth_token"
    if not have:
        return f"the cluster at {address} wants a token and there is none here: put it where Ray looks: {where}"
    head = said.splitlines()[0] if said else "refused"
    return f"the cluster at {address} refuses the token ({head}): take the one the head was started with: {where}"


@contextmanager
def _without_overrides() -> Iterator[None]:
    former = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(former)
